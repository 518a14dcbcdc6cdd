//! What runs of the stages have written so far: their metrics and samples, for the page.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::path::{Component, Path, PathBuf};
use std::time::UNIX_EPOCH;

use axum::extract::State;
use axum::http::StatusCode;
use common::metrics::{self, METRICS_FILE, SAMPLES_FILE};
use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::params::Params;
use super::shapes::Json;
use super::state::{App, on_disk};

/// How far below the folder runs are looked for.
const MAX_DEPTH: usize = 4;

/// Most directories that are looked into.
const MAX_DIRS: usize = 10_000;

/// Most bytes of metrics that are sent at once.
const MAX_BYTES: u64 = 1 << 20;

/// Samples of a step that are sent.
const N_SAMPLES: usize = 4;

/// The name of a run that is the folder itself.
const ITSELF: &str = ".";

/// `GET /training/runs`: the runs, the one that changed last first.
pub(super) async fn runs(State(app): State<App>) -> Result<Json, ApiError> {
    let root = root(&app)?;
    let mut found = on_disk(move || Ok::<_, io::Error>(find(&root))).await?;
    found.sort_by(|(a, at_a), (b, at_b)| at_b.total_cmp(at_a).then_with(|| a.cmp(b)));
    let runs: Vec<Value> =
        found.into_iter().map(|(name, changed)| json!({ "name": name, "changed": changed })).collect();
    Ok(Json(json!({ "runs": runs })))
}

/// `POST /training/rows`: the metrics of `run` from byte `from` of their file on.
///
/// The answer begins again at byte 0 where the file no longer has a line that begins at `from`, because the run began anew.
pub(super) async fn rows(State(app): State<App>, mut params: Params) -> Result<Json, ApiError> {
    let dir = run(&app, &mut params)?;
    let from = params.take::<u64>("from", "a whole number")?.unwrap_or(0);
    params.finish()?;
    let rows = on_disk(move || Rows::read(&dir.join(METRICS_FILE), from)).await?;
    Ok(Json(json!({ "rows": rows.objects, "from": rows.from, "next": rows.next, "is_all": rows.is_all })))
}

/// `POST /training/samples`: samples of the first and of the last step of `run` that have some.
pub(super) async fn samples(State(app): State<App>, mut params: Params) -> Result<Json, ApiError> {
    let dir = run(&app, &mut params)?;
    params.finish()?;
    let samples = on_disk(move || metrics::read(&dir.join(SAMPLES_FILE))).await?;
    Ok(Json(json!({ "samples": first_and_last(samples) })))
}

/// The folder of the runs.
fn root(app: &App) -> Result<PathBuf, ApiError> {
    let missing = "there are no runs: the server was started without `--runs`";
    app.runs.clone().ok_or_else(|| ApiError::of_status(StatusCode::NOT_FOUND, missing))
}

/// The directory of the run that a request names, which lies in the folder.
fn run(app: &App, params: &mut Params) -> Result<PathBuf, ApiError> {
    let root = root(app)?;
    let name = params.take::<String>("run", "the name of a run")?.unwrap_or_default();
    let is_below = !name.is_empty() && Path::new(&name).components().all(|part| matches!(part, Component::Normal(_)));
    let dir = if name == ITSELF { root } else { root.join(&name) };
    if (is_below || name == ITSELF) && dir.join(METRICS_FILE).is_file() {
        return Ok(dir);
    }
    let name: String = name.chars().take(64).collect();
    let message = format!("there is no run `{name}`; `GET /training/runs` lists them");
    Err(ApiError::of_status(StatusCode::NOT_FOUND, message).about("run"))
}

/// Directories at and below `root` that have metrics: their paths from there, and when those changed, in seconds since
/// 1970. Links are not followed, and what cannot be read has none.
fn find(root: &Path) -> Vec<(String, f64)> {
    let mut found = Vec::new();
    let mut dirs = vec![(root.to_owned(), 0)];
    let mut n_seen = 0;
    while let Some((dir, depth)) = dirs.pop() {
        n_seen += 1;
        if let Ok(file) = dir.join(METRICS_FILE).metadata() {
            let changed = file.modified().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
            let name = dir.strip_prefix(root).ok().and_then(Path::to_str).filter(|name| !name.is_empty());
            found.push((name.unwrap_or(ITSELF).to_owned(), changed.map_or(0.0, |since| since.as_secs_f64())));
        }
        let Ok(entries) = dir.read_dir() else { continue };
        let is_dir = |entry: &std::fs::DirEntry| {
            let name = entry.file_name();
            // What begins with a dot is being written, and nobody can ask for a name that is no text.
            entry.file_type().is_ok_and(|kind| kind.is_dir())
                && name.to_str().is_some_and(|name| !name.starts_with('.'))
        };
        if depth < MAX_DEPTH && n_seen + dirs.len() < MAX_DIRS {
            dirs.extend(entries.filter_map(Result::ok).filter(is_dir).map(|entry| (entry.path(), depth + 1)));
        }
    }
    found
}

/// Lines of a file of metrics.
struct Rows {
    /// The objects of whole lines.
    objects: Vec<Map<String, Value>>,
    /// The byte at which the first begins.
    from: u64,
    /// The byte at which the line after them begins.
    next: u64,
    /// Whether there are no more for now.
    is_all: bool,
}

impl Rows {
    fn read(path: &Path, from: u64) -> io::Result<Self> {
        let mut file = match File::open(path) {
            Ok(file) => file,
            // A save exchanges the whole directory.
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Ok(Self { objects: Vec::new(), from, next: from, is_all: true });
            }
            Err(error) => return Err(error),
        };
        let size = file.metadata()?.len();
        let from = if from <= size && begins_line(&mut file, from)? { from } else { 0 };
        file.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        file.take(MAX_BYTES).read_to_end(&mut bytes)?;
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        let objects = bytes[..whole].split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok());
        Ok(Self { objects: objects.collect(), from, next: from + whole as u64, is_all: size - from <= MAX_BYTES })
    }
}

fn begins_line(file: &mut File, at: u64) -> io::Result<bool> {
    let Some(before) = at.checked_sub(1) else { return Ok(true) };
    let mut byte = [0];
    file.seek(SeekFrom::Start(before))?;
    Ok(file.read(&mut byte)? == 1 && byte == *b"\n")
}

/// The first samples of the first and of the last step that have some.
fn first_and_last(samples: Vec<Map<String, Value>>) -> Vec<Map<String, Value>> {
    let step = |sample: &Map<String, Value>| sample.get("step").and_then(Value::as_u64).unwrap_or(0);
    let ends = [samples.iter().map(step).min(), samples.iter().map(step).max()];
    let mut n_sent = [0; 2];
    let mut is_sent = |sample: &Map<String, Value>| {
        let Some(end) = ends.iter().position(|end| *end == Some(step(sample))) else { return false };
        n_sent[end] += 1;
        n_sent[end] <= N_SAMPLES
    };
    samples.into_iter().filter(|sample| is_sent(sample)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_from_where_one_has_read_to_and_anew_where_the_run_began_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(METRICS_FILE);
        let steps = |from| {
            let Rows { objects, from, next, .. } = Rows::read(&path, from).unwrap();
            (objects.iter().map(|row| row["step"].as_u64().unwrap()).collect::<Vec<_>>(), from, next)
        };
        assert_eq!(steps(7), (vec![], 7, 7), "being exchanged");
        std::fs::write(&path, "{\"step\":1}\n{\"step\":2}\n{\"st").unwrap();
        assert_eq!(steps(0), (vec![1, 2], 0, 22));
        assert_eq!(steps(22), (vec![], 22, 22), "half a line is left for later");
        std::fs::write(&path, "{\"step\":1}\n{\"step\":2}\n{\"step\":3}\n").unwrap();
        assert_eq!(steps(22), (vec![3], 22, 33));
        std::fs::write(&path, "{\"step\":1,\"train/loss\":2.0}\n").unwrap();
        assert_eq!(steps(33), (vec![1], 0, 28), "shorter");
        assert_eq!(steps(11), (vec![1], 0, 28), "another line stands there");
    }

    #[test]
    fn runs_are_found_below_the_folder_but_for_those_being_written() {
        let dir = tempfile::tempdir().unwrap();
        for run in ["", "tiny/sft", "tiny/.ppo.new", "a/b/c/d", "a/b/c/d/e"] {
            std::fs::create_dir_all(dir.path().join(run)).unwrap();
            std::fs::write(dir.path().join(run).join(METRICS_FILE), "").unwrap();
        }
        let mut found: Vec<String> = find(dir.path()).into_iter().map(|(name, _)| name).collect();
        found.sort();
        assert_eq!(found, [".", "a/b/c/d", "tiny/sft"]);
    }

    #[test]
    fn samples_are_those_of_the_first_and_the_last_step() {
        let sample = |step: u64| Map::from_iter([("step".to_owned(), json!(step))]);
        let steps = [0, 0, 0, 0, 0, 5, 9, 9];
        let sent = first_and_last(steps.map(sample).to_vec());
        assert_eq!(sent.iter().map(|sample| sample["step"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 0, 0, 0, 9, 9]);
    }
}
