//! Every metric's name and meaning, the files they go to, and what the console shows of them.
//!
//! `metrics.jsonl` has one object a line: `step`, `seconds` (wall time since the stage began, carried over a resume),
//! `tokens` seen so far, and numbers under the slash-separated [`names`]. A number that is not finite is left out, because
//! JSON has neither NaN nor infinity.

pub mod names;

mod curves;
pub mod live;
mod log;
mod tensorboard;

pub use curves::{Curves, curves};
pub use log::{MetricsLog, Sample, first_and_last, read_samples};
pub use tensorboard::EVENTS_FILE;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, BufWriter, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Map, Value};

use crate::files::FileError;
use crate::logging::bars;
use tensorboard::Events;

/// The file of metrics in an output directory.
pub const METRICS_FILE: &str = "metrics.jsonl";

/// The file of prompts and generations made along the way.
pub const SAMPLES_FILE: &str = "samples.jsonl";

/// Where an interrupted stage stood, from its checkpoint.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ResumePoint {
    /// Steps done.
    pub step: u64,
    /// Wall time spent on them, in seconds.
    pub seconds: f64,
}

/// Writes one stage's metrics and samples, and shows how far it is.
///
/// A file is opened for each line and closed again: a save exchanges the whole directory, and no handle may keep
/// pointing into the old one. Record what a step measured before saving that step, because a resume drops what comes
/// after the saved one.
#[derive(Debug)]
pub struct Recorder {
    out: PathBuf,
    /// Whether it writes and shows: among processes that train together, one does.
    writes: bool,
    total_steps: u64,
    earlier_seconds: f64,
    started: Instant,
    /// When this process began to make steps, and after which step.
    training_since: (Instant, u64),
    last: BTreeMap<String, f64>,
    events: Option<Events>,
    throughput: (Instant, Option<u64>),
    bar: Option<ProgressBar>,
}

impl Recorder {
    /// A recorder for the stage that writes to `out` and has `total_steps` steps.
    ///
    /// With `resume`, lines after its step are dropped from both files, as is a last line cut short by a crash.
    /// Without, what the files held is gone. With `tensorboard`, [`EVENTS_FILE`] has the metrics too.
    ///
    /// # Errors
    /// If the files cannot be read or written.
    pub fn open(
        out: &Path,
        total_steps: u64,
        resume: Option<ResumePoint>,
        tensorboard: bool,
    ) -> Result<Self, MetricsError> {
        Self::open_on(true, out, total_steps, resume, tensorboard)
    }

    /// [`open`](Self::open) on a rank of a group: the first one writes and shows; the others, which open after it, know what
    /// it recorded.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_on(
        is_first: bool,
        out: &Path,
        total_steps: u64,
        resume: Option<ResumePoint>,
        tensorboard: bool,
    ) -> Result<Self, MetricsError> {
        let mut last = BTreeMap::new();
        for file in [METRICS_FILE, SAMPLES_FILE].into_iter().filter(|_| is_first) {
            let path = out.join(file);
            match resume {
                Some(point) => truncate_after(&path, point.step)?,
                None if path.exists() => std::fs::remove_file(&path).map_err(FileError::write(&path))?,
                None => {}
            }
        }
        let rows = read(&out.join(METRICS_FILE))?;
        for row in &rows {
            keep_numbers(&mut last, row);
        }
        let point = resume.unwrap_or(ResumePoint { step: 0, seconds: 0.0 });
        live::begin(out, total_steps, &rows);
        let events = (is_first && tensorboard).then(|| Events::create(out, &rows, point.seconds)).transpose()?;
        let bar = (is_first && std::io::stderr().is_terminal()).then(|| {
            let style = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} {eta} left")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            let bar = bars().add(ProgressBar::new(total_steps).with_style(style).with_position(point.step));
            bar.reset_eta();
            bar.enable_steady_tick(Duration::from_millis(500));
            bar
        });
        let started = Instant::now();
        Ok(Self {
            out: out.to_owned(),
            writes: is_first,
            total_steps,
            earlier_seconds: point.seconds,
            started,
            training_since: (started, point.step),
            last,
            events,
            throughput: (started, None),
            bar,
        })
    }

    /// Wall time the stage has taken, in seconds, earlier runs of it included.
    pub fn seconds(&self) -> f64 {
        self.earlier_seconds + self.started.elapsed().as_secs_f64()
    }

    /// The last finite value of each metric, for the manifest.
    pub fn last(&self) -> &BTreeMap<String, f64> {
        &self.last
    }

    /// Tokens per second since this or [`Recorder::restart_clock`] was last called; `tokens` counts from the start.
    ///
    /// `None` at the first call, when there is nothing to compare with.
    pub fn tokens_per_second(&mut self, tokens: u64) -> Option<f64> {
        let (since, before) = self.throughput;
        self.throughput = (Instant::now(), Some(tokens));
        let before = before?;
        Some(tokens.saturating_sub(before) as f64 / since.elapsed().as_secs_f64().max(1e-9))
    }

    /// Starts a new span for [`Recorder::tokens_per_second`]: after evaluating or saving, and before the first step.
    pub fn restart_clock(&mut self, tokens: u64) {
        self.throughput = (Instant::now(), Some(tokens));
    }

    /// Says that the first step begins now: what was prepared before does not count when the time that is left is estimated.
    pub fn begin(&mut self) {
        self.training_since.0 = Instant::now();
        if let Some(bar) = &self.bar {
            bar.reset_eta();
        }
    }

    /// Moves the progress bar; needs no number from the device, so it may be called at every step.
    pub fn advance(&self, step: u64) {
        live::advance(self, step);
        if let Some(bar) = &self.bar {
            bar.set_position(step);
        }
    }

    /// Appends one line of metrics for `step` and shows the important ones.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn record(&mut self, step: u64, tokens: u64, values: &[(&str, f64)]) -> Result<(), MetricsError> {
        let mut line = Map::new();
        line.insert("step".into(), step.into());
        line.insert("seconds".into(), ((self.seconds() * 1e3).round() / 1e3).into());
        line.insert("tokens".into(), tokens.into());
        for (name, value) in values {
            if value.is_finite() {
                line.insert((*name).to_owned(), (*value).into());
            }
        }
        if self.writes {
            append(&self.out.join(METRICS_FILE), &line)?;
        }
        if let Some(events) = &self.events {
            events.append(&self.out, &line)?;
        }
        keep_numbers(&mut self.last, &line);
        live::record(&line);
        self.show(step, values);
        Ok(())
    }

    /// Appends one object to `samples.jsonl`, its `step` put first.
    ///
    /// # Errors
    /// If the file cannot be written.
    ///
    /// # Panics
    /// If `sample` is not an object.
    pub fn sample(&self, step: u64, sample: &Value) -> Result<(), MetricsError> {
        self.append_to(SAMPLES_FILE, step, sample)?;
        if let Value::Object(sample) = sample {
            live::sample(Sample::of(step, sample));
        }
        Ok(())
    }

    /// [`Recorder::sample`] into the file `name` of the output directory, such as PPO's `rollouts.jsonl`.
    ///
    /// # Errors
    /// If the file cannot be written.
    ///
    /// # Panics
    /// If `object` is not an object.
    pub fn append_to(&self, name: &str, step: u64, object: &Value) -> Result<(), MetricsError> {
        let Value::Object(fields) = object else { panic!("a line of `{name}` is an object, not {object}") };
        let mut line = Map::new();
        line.insert("step".into(), step.into());
        line.extend(fields.clone());
        if self.writes { append(&self.out.join(name), &line) } else { Ok(()) }
    }

    /// Takes the progress bar away.
    pub fn finish(self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
            bars().remove(bar);
        }
    }

    fn show(&self, step: u64, values: &[(&str, f64)]) {
        let text = console_text(values);
        if let Some(bar) = &self.bar {
            bar.set_position(step);
            bar.set_message(text.clone());
            // The bar forgets; an evaluation should stay on the screen.
            if !values.iter().any(|(name, _)| name.starts_with("val/")) {
                return;
            }
        }
        let left = self.seconds_left(step).map_or_else(String::new, |left| format!("  {} left", duration_text(left)));
        tracing::info!("step {step}/{}  {text}{left}", self.total_steps);
    }

    /// Seconds until the last step, by the pace of this process; `None` before its first step and after the last.
    fn seconds_left(&self, step: u64) -> Option<f64> {
        let (since, first) = self.training_since;
        let (done, remaining) = (step.saturating_sub(first), self.total_steps.saturating_sub(step));
        (done > 0 && remaining > 0).then(|| since.elapsed().as_secs_f64() / done as f64 * remaining as f64)
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// The objects of the JSONL file at `path` in order; none if there is no file. A last line cut short is left out.
///
/// # Errors
/// If the file cannot be read or a line before the last is no JSON object.
pub fn read(path: &Path) -> Result<Vec<Map<String, Value>>, MetricsError> {
    let mut records = Vec::new();
    for_each_line(path, |_, record| {
        records.push(record);
        Ok(())
    })?;
    Ok(records)
}

/// Drops from the JSONL file at `path` every line whose `step` is after `step`, and a last line cut short.
///
/// # Errors
/// If the file cannot be read or written, or a line before the last is no JSON object.
pub fn truncate_after(path: &Path, step: u64) -> Result<(), MetricsError> {
    if !path.exists() {
        return Ok(());
    }
    let beside = path.with_extension("jsonl.tmp");
    let mut writer = BufWriter::new(File::create(&beside).map_err(FileError::write(&beside))?);
    for_each_line(path, |line, record| match record.get("step").and_then(Value::as_u64) {
        Some(at) if at > step => Ok(()),
        _ => writeln!(writer, "{line}").map_err(FileError::write(&beside)),
    })?;
    writer.flush().map_err(FileError::write(&beside))?;
    Ok(std::fs::rename(&beside, path).map_err(FileError::write(path))?)
}

/// Calls `visit` with every line of the JSONL file at `path` and the object it is, if there is the file. A last line cut
/// short is left out.
fn for_each_line(
    path: &Path,
    mut visit: impl FnMut(&str, Map<String, Value>) -> Result<(), FileError>,
) -> Result<(), MetricsError> {
    let file = match File::open(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        file => file.map_err(FileError::read(path))?,
    };
    let mut broken = None;
    for (line_idx, line) in BufReader::new(file).lines().enumerate() {
        let line = line.map_err(FileError::read(path))?;
        if let Some(line) = broken {
            return Err(MetricsError::Line { path: path.to_owned(), line });
        }
        match serde_json::from_str(&line) {
            Ok(record) => visit(&line, record)?,
            Err(_) => broken = Some(line_idx + 1),
        }
    }
    Ok(())
}

/// Errors of a metrics file.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// It cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A line in the middle is no JSON.
    #[error("`{}` line {line}: expected a JSON object", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
    },
}

fn append(path: &Path, line: &Map<String, Value>) -> Result<(), MetricsError> {
    let text = serde_json::to_string(line).map_err(std::io::Error::from).map(|text| text + "\n");
    let file = OpenOptions::new().create(true).append(true).open(path);
    Ok(file.and_then(|mut file| file.write_all(text?.as_bytes())).map_err(FileError::write(path))?)
}

fn keep_numbers(last: &mut BTreeMap<String, f64>, record: &Map<String, Value>) {
    for (name, value) in record {
        if let (true, Some(number)) = (name.contains('/'), value.as_f64()) {
            last.insert(name.clone(), number);
        }
    }
}

/// `loss 2.310  lr 3.00e-4  12.3k tokens/s`: what the console shows of `values`.
fn console_text(values: &[(&str, f64)]) -> String {
    let mut parts = Vec::new();
    for shown in names::ON_CONSOLE {
        let Some((_, value)) = values.iter().find(|(name, _)| *name == shown) else { continue };
        if shown == names::TRAIN_TOKENS_PER_SECOND {
            parts.push(rate_text(*value));
            continue;
        }
        let label = shown.trim_start_matches("train/").trim_start_matches("objective/");
        parts.push(format!("{label} {}", number_text(*value)));
    }
    parts.join("  ")
}

/// Tokens per second.
pub(crate) fn rate_text(rate: f64) -> String {
    if rate >= 1e4 { format!("{:.1}k tokens/s", rate / 1e3) } else { format!("{rate:.0} tokens/s") }
}

/// Four significant digits, with an exponent where zeros would fill the line.
pub fn number_text(value: f64) -> String {
    match value.abs() {
        size if size == 0.0 || !size.is_finite() => format!("{value}"),
        size if size < 1e-3 => format!("{value:.2e}"),
        size if size < 10.0 => format!("{value:.3}"),
        size if size < 100.0 => format!("{value:.2}"),
        _ => format!("{value:.1}"),
    }
}

/// `2h05m`, `3m07s` or `12s`.
pub fn duration_text(seconds: f64) -> String {
    let seconds = seconds.round().max(0.0) as u64;
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, s) => format!("{s}s"),
        (0, m, s) => format!("{m}m{s:02}s"),
        (h, m, _) => format!("{h}h{m:02}m"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps(path: &Path) -> Vec<u64> {
        read(path).expect("readable").iter().map(|record| record["step"].as_u64().expect("a step")).collect()
    }

    #[test]
    fn a_record_is_one_line_with_step_seconds_tokens_and_names() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut recorder = Recorder::open(dir.path(), 10, None, false).expect("opens");
        recorder.record(1, 64, &[(names::TRAIN_LOSS, 2.5), (names::TRAIN_GRAD_NORM, f64::NAN)]).expect("writes");
        let text = std::fs::read_to_string(dir.path().join(METRICS_FILE)).expect("written");
        let record: Value = serde_json::from_str(&text).expect("one line");
        let keys: Vec<&String> = record.as_object().expect("an object").keys().collect();
        assert_eq!(keys, ["step", "seconds", "tokens", "train/loss"], "NaN has no place in JSON");
        assert_eq!(record["train/loss"], 2.5);
        assert_eq!(recorder.last().clone().into_iter().collect::<Vec<_>>(), [("train/loss".to_owned(), 2.5)]);
    }

    #[test]
    fn a_resume_drops_later_lines_and_a_torn_one_and_carries_seconds() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut recorder = Recorder::open(dir.path(), 10, None, false).expect("opens");
        for step in 1..=5 {
            recorder.record(step, step * 10, &[(names::TRAIN_LOSS, step as f64)]).expect("writes");
            recorder.sample(step, &serde_json::json!({ "text": "x" })).expect("writes");
        }
        drop(recorder);
        let path = dir.path().join(METRICS_FILE);
        let mut file = OpenOptions::new().append(true).open(&path).expect("there");
        file.write_all(b"{\"step\": 6, \"sec").expect("writes");
        let resume = Some(ResumePoint { step: 3, seconds: 100.0 });
        let mut recorder = Recorder::open(dir.path(), 10, resume, false).expect("resumes");
        assert_eq!(recorder.last()["train/loss"], 3.0);
        recorder.record(4, 40, &[(names::TRAIN_LOSS, 9.0)]).expect("writes");
        assert_eq!(steps(&path), [1, 2, 3, 4]);
        assert_eq!(steps(&dir.path().join(SAMPLES_FILE)), [1, 2, 3]);
        let records = read(&path).expect("readable");
        assert!(records[3]["seconds"].as_f64().expect("a number") >= 100.0);
    }

    #[test]
    fn a_fresh_start_forgets_what_was_there() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join(METRICS_FILE), "{\"step\":1}\n").expect("writes");
        let mut recorder = Recorder::open(dir.path(), 10, None, false).expect("opens");
        recorder.record(1, 0, &[]).expect("writes");
        assert_eq!(steps(&dir.path().join(METRICS_FILE)), [1]);
    }

    #[test]
    fn lines_go_to_the_new_directory_after_an_exchange() {
        let dir = tempfile::tempdir().expect("a directory");
        let out = dir.path().join("run");
        std::fs::create_dir(&out).expect("made");
        let mut recorder = Recorder::open(&out, 10, None, false).expect("opens");
        recorder.record(1, 0, &[]).expect("writes");
        std::fs::create_dir(dir.path().join("new")).expect("made");
        std::fs::copy(out.join(METRICS_FILE), dir.path().join("new").join(METRICS_FILE)).expect("copied");
        std::fs::rename(&out, dir.path().join("old")).expect("moved");
        std::fs::rename(dir.path().join("new"), &out).expect("moved");
        recorder.record(2, 0, &[]).expect("writes");
        assert_eq!(steps(&out.join(METRICS_FILE)), [1, 2]);
        assert_eq!(steps(&dir.path().join("old").join(METRICS_FILE)), [1]);
    }

    #[test]
    fn a_line_in_the_middle_that_is_no_json_is_an_error_naming_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join(METRICS_FILE);
        std::fs::write(&path, "{\"step\":1}\nnonsense\n{\"step\":2}\n").expect("writes");
        let error = read(&path).expect_err("broken").to_string();
        assert!(error.ends_with("line 2: expected a JSON object"), "{error}");
        assert!(truncate_after(&path, 1).is_err());
    }

    #[test]
    fn the_console_shows_what_matters_in_a_fixed_order() {
        let of_ppo = [(names::VAL_EOS_RATE, 0.5), (names::VAL_KL, 2.0), (names::VAL_SCORE, 0.25)];
        assert_eq!(console_text(&of_ppo), "val/score 0.250  val/kl 2.000  val/eos_rate 0.500");
        let values = [
            (names::TRAIN_TOKENS_PER_SECOND, 12_345.0),
            (names::TRAIN_LR, 3e-4),
            (names::TRAIN_LOSS, 2.309_87),
            (names::TRAIN_GRAD_NORM, 1.0),
        ];
        assert_eq!(console_text(&values), "loss 2.310  lr 3.00e-4  12.3k tokens/s");
        assert_eq!([3.0, 187.0, 7500.0].map(duration_text), ["3s", "3m07s", "2h05m"]);
    }

    #[test]
    fn the_time_left_goes_by_the_pace_since_the_first_step() {
        let dir = tempfile::tempdir().expect("a directory");
        let resume = Some(ResumePoint { step: 2, seconds: 50.0 });
        let mut recorder = Recorder::open(dir.path(), 10, resume, false).expect("opens");
        recorder.training_since.0 -= Duration::from_secs(100); // of preparation
        let before = recorder.seconds_left(4).expect("steps are left");
        assert!((before - 300.0).abs() < 10.0, "{before}");
        recorder.begin();
        assert!(recorder.seconds_left(4).expect("steps are left") < 10.0);
        assert_eq!([2, 10].map(|step| recorder.seconds_left(step)), [None, None]);
    }

    #[test]
    fn throughput_counts_from_the_last_restart() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut recorder = Recorder::open(dir.path(), 10, None, false).expect("opens");
        assert_eq!(recorder.tokens_per_second(100), None);
        recorder.restart_clock(100);
        std::thread::sleep(Duration::from_millis(20));
        let rate = recorder.tokens_per_second(300).expect("a span");
        // 200 tokens in 20 ms or somewhat more.
        assert!(rate > 0.0 && rate <= 10_000.0, "{rate}");
    }
}
