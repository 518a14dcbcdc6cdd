//! The directory that a run or a tokenizer writes to.

use std::fs::{File, TryLockError};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};

/// The names that a training run or a tokenizer writes: a directory of these alone is ours.
const OUR_FILES: [&str; 18] = [
    "config.toml",
    "manifest.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "additional_chat_templates",
    "metrics.jsonl",
    "samples.jsonl",
    "rollouts.jsonl",
    "events.out.tfevents.kindling",
    "reference.json",
    "state",
    "value",
];

/// In the name of a file that was being written when the process was killed.
const PARTIAL: &str = ".partial-";

/// Makes `out` ready to be written to: it exists and is empty, or with `resume` holds a checkpoint.
///
/// `overwrite` empties it, but only if it is ours, see [`check_replaceable`]. Read the config first, because it may lie in
/// `out`.
///
/// # Errors
/// If `out` is not empty and neither flag is given, there is nothing to resume, it is not ours to overwrite, or one
/// of `inputs` (checkpoints, data, the tokenizer) lies in what would be deleted.
pub fn prepare(out: &Path, resume: bool, overwrite: bool, inputs: &[&Path]) -> Result<(), OutDirError> {
    let failed = |source| OutDirError::Io { path: out.to_owned(), source };
    if resume {
        return if out.join("manifest.json").is_file() {
            Ok(())
        } else {
            Err(OutDirError::NothingToResume { out: out.to_owned() })
        };
    }
    if out.exists() && !out.is_dir() {
        return Err(OutDirError::NotADirectory { out: out.to_owned() });
    }
    let entries = entry_names(out).map_err(failed)?;
    if entries.is_empty() {
        return std::fs::create_dir_all(out).map_err(failed);
    }
    if !overwrite {
        let ways = if out.join("manifest.json").is_file() { Ways::Resume } else { Ways::Replace };
        return Err(OutDirError::NotEmpty { out: out.to_owned(), ways });
    }
    check_replaceable(out, inputs)?;
    let target = out.canonicalize().map_err(failed)?;
    for entry in entries {
        let path = target.join(entry);
        let is_dir = path.symlink_metadata().map_err(failed)?.is_dir();
        if is_dir { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) }.map_err(failed)?;
    }
    Ok(())
}

/// [`prepare`] of a command that cannot go on with what another wrote.
///
/// # Errors
/// As there.
pub fn prepare_new(out: &Path, overwrite: bool, inputs: &[&Path]) -> Result<(), OutDirError> {
    prepare(out, false, overwrite, inputs).map_err(|error| match error {
        OutDirError::NotEmpty { out, .. } => {
            let ways = if check_replaceable(&out, inputs).is_ok() { Ways::Replace } else { Ways::None };
            OutDirError::NotEmpty { out, ways }
        }
        error => error,
    })
}

/// The right to write to a directory, for as long as this lives: no other process gets it. A process that is killed
/// loses it.
///
/// What is locked is a file `.NAME.lock` beside the directory, because a save exchanges the directory itself.
#[derive(Debug)]
pub struct OutLock {
    path: PathBuf,
    /// `None` where the file system has no locks.
    file: Option<File>,
    /// The directory that was made for the lock.
    made: Option<PathBuf>,
}

impl OutLock {
    /// Takes the right to write to `out`, which need not exist.
    ///
    /// # Errors
    /// [`OutDirError::InUse`] if another process has it; if the file beside `out` cannot be written.
    pub fn take(out: &Path) -> Result<Self, OutDirError> {
        let failed = |source| OutDirError::Io { path: out.to_owned(), source };
        if out.is_symlink() && !out.exists() {
            return Err(OutDirError::DanglingLink { out: out.to_owned() });
        }
        // A link and what it points to are one directory.
        let target = if out.exists() { out.canonicalize() } else { std::path::absolute(out) }.map_err(failed)?;
        let (Some(parent), Some(name)) = (target.parent(), target.file_name()) else {
            return Err(OutDirError::Fixed { out: out.to_owned() });
        };
        // Safetensors files are written to paths that are text.
        if target.to_str().is_none() {
            return Err(OutDirError::NotText { out: out.to_owned() });
        }
        std::fs::create_dir_all(parent).map_err(|error| match error.kind() {
            // What is there is a file.
            io::ErrorKind::AlreadyExists => failed(io::ErrorKind::NotADirectory.into()),
            _ => failed(error),
        })?;
        Self::at(parent.join(format!(".{}.lock", name.to_string_lossy())), out)
    }

    /// [`take`](Self::take) for a directory that is never exchanged, and so may be a mount point: the file lies in it.
    ///
    /// # Errors
    /// As [`take`](Self::take).
    pub fn take_inside(out: &Path) -> Result<Self, OutDirError> {
        let is_new = !out.exists();
        std::fs::create_dir_all(out).map_err(|source| OutDirError::Io { path: out.to_owned(), source })?;
        let mut lock = Self::at(out.join(".recipe.lock"), out)?;
        lock.made = is_new.then(|| out.to_owned());
        Ok(lock)
    }

    fn at(path: PathBuf, out: &Path) -> Result<Self, OutDirError> {
        loop {
            let mut file = open_lock(&path).map_err(|source| OutDirError::Lock { path: path.clone(), source })?;
            match file.try_lock() {
                Ok(()) if is_at(&file, &path) => {
                    let mut content = String::new();
                    let read = file.read_to_string(&mut content);
                    if read.is_err() || !content.bytes().all(|byte| byte.is_ascii_digit()) {
                        let source = io::Error::other("it is not a lock of this program");
                        return Err(OutDirError::Lock { path, source });
                    }
                    let _ = file.rewind();
                    // The number is for the other process's message alone.
                    let _ = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
                    return Ok(Self { path, file: Some(file), made: None });
                }
                // Its owner removed it after it was opened here.
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let mut pid = String::new();
                    let _ = file.read_to_string(&mut pid);
                    return Err(OutDirError::InUse { out: out.to_owned(), pid: pid.parse().ok() });
                }
                Err(TryLockError::Error(error)) => {
                    tracing::debug!("`{}` cannot be locked: {error}", path.display());
                    return Ok(Self { path, file: None, made: None });
                }
            }
        }
    }
}

impl Drop for OutLock {
    fn drop(&mut self) {
        // Removed while it is still locked: whoever opened it before sees that it is gone.
        if self.file.is_some() {
            let _ = std::fs::remove_file(&self.path);
        }
        // Stays unless it is empty.
        if let Some(made) = &self.made {
            let _ = std::fs::remove_dir(made);
        }
    }
}

/// Opens or makes the file of a lock; a link is not followed, because what it points to is written to.
fn open_lock(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt as _;
        let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
        options.custom_flags(flags.bits() as i32);
    }
    options.open(path)
}

/// Whether another file system begins at `target`: such a directory cannot change places with another one.
#[cfg(unix)]
fn is_mount_point(target: &Path, parent: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    matches!((target.metadata(), parent.metadata()), (Ok(target), Ok(parent)) if target.dev() != parent.dev())
}

#[cfg(not(unix))]
fn is_mount_point(_target: &Path, _parent: &Path) -> bool {
    false
}

/// Whether `file` is the one at `path`.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let number = |metadata: &std::fs::Metadata| (metadata.dev(), metadata.ino());
    matches!((file.metadata(), path.metadata()), (Ok(ref ours), Ok(ref there)) if number(ours) == number(there))
}

/// Windows removes no file that is open.
#[cfg(not(unix))]
fn is_at(_file: &File, _path: &Path) -> bool {
    true
}

/// Checks that everything in `out` may be deleted: it holds nothing but files that a run or a tokenizer writes, a
/// `manifest.json` of ours, a `config.toml` or a `tokenizer.json` among them, and none of `inputs`.
///
/// # Errors
/// If not, or if `out` cannot be read.
pub fn check_replaceable(out: &Path, inputs: &[&Path]) -> Result<(), OutDirError> {
    let failed = |source| OutDirError::Io { path: out.to_owned(), source };
    let entries = entry_names(out).map_err(failed)?;
    let foreign = |entry: &&String| !OUR_FILES.contains(&entry.as_str()) && !entry.contains(PARTIAL);
    if let Some(entry) = entries.iter().find(foreign) {
        return Err(OutDirError::NotOurs { out: out.to_owned(), entry: entry.clone() });
    }
    if let Some(entry) = entries.iter().find(|entry| *entry == "manifest.json").filter(|_| !has_our_manifest(out)) {
        return Err(OutDirError::NotOurs { out: out.to_owned(), entry: entry.clone() });
    }
    // A run killed in its first moments leaves no more than the beginning of its configuration.
    let whole = |entry: &str| entry.split_once(PARTIAL).map_or(entry, |(whole, _)| whole).to_owned();
    let is_known = |entry: &String| ["manifest.json", "config.toml", "tokenizer.json"].contains(&&*whole(entry));
    if let Some(entry) = entries.first().filter(|_| !entries.iter().any(is_known)) {
        return Err(OutDirError::NotOurs { out: out.to_owned(), entry: entry.clone() });
    }
    let Ok(target) = out.canonicalize() else { return Ok(()) };
    for input in inputs {
        if input.canonicalize().is_ok_and(|input| input.starts_with(&target)) {
            return Err(OutDirError::InputInside { out: out.to_owned(), input: (*input).to_owned() });
        }
    }
    Ok(())
}

/// Whether `manifest.json` is a checkpoint's, or too damaged to be anybody's: others use the name as well.
fn has_our_manifest(out: &Path) -> bool {
    let text = std::fs::read_to_string(out.join("manifest.json")).unwrap_or_default();
    serde_json::from_str::<serde_json::Value>(&text)
        .map_or(true, |manifest| manifest["format"].is_u64() && manifest["stage"].is_string())
}

/// Whether nothing but locks is in `out`, or it does not exist.
///
/// # Errors
/// If it cannot be read.
pub fn is_empty(out: &Path) -> Result<bool, OutDirError> {
    let names = entry_names(out).map_err(|source| OutDirError::Io { path: out.to_owned(), source })?;
    Ok(names.is_empty())
}

/// Checks that `out` can change places with the directory of a checkpoint.
///
/// # Errors
/// If it is a mount point.
pub fn check_exchangeable(out: &Path) -> Result<(), OutDirError> {
    let target = std::path::absolute(out).map_err(|source| OutDirError::Io { path: out.to_owned(), source })?;
    let target = target.canonicalize().unwrap_or(target);
    match target.parent() {
        Some(parent) if !is_mount_point(&target, parent) => Ok(()),
        _ => Err(OutDirError::Fixed { out: out.to_owned() }),
    }
}

fn entry_names(dir: &Path) -> std::io::Result<Vec<String>> {
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let names = std::fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    // The lock of a directory in this one, which a killed process left.
    let is_lock = |name: &String| name.strip_prefix('.').is_some_and(|name| name.strip_suffix(".lock").is_some());
    names.filter(|name| !name.as_ref().is_ok_and(is_lock)).collect()
}

/// What a command can do with an output directory that holds something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ways {
    /// Go on with it, or replace it.
    Resume,
    /// Replace it.
    Replace,
    /// Nothing: it is not ours, or holds what the command reads.
    None,
}

/// Why an output directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OutDirError {
    /// `--out` holds something.
    #[error(
        "output directory `{}` is not empty\nhint: pass {}another `--out`",
        out.display(),
        match ways {
            Ways::Resume => "`--resume` to continue it, `--overwrite` to replace it, or ",
            Ways::Replace => "`--overwrite` to replace it, or ",
            Ways::None => "",
        }
    )]
    NotEmpty {
        /// The directory.
        out: PathBuf,
        /// What can be done with it.
        ways: Ways,
    },
    /// Another process writes to `--out`.
    #[error(
        "another process{} is writing to `{}`\nhint: wait for its end, or pass another `--out`",
        pid.map(|pid| format!(" ({pid})")).unwrap_or_default(),
        out.display()
    )]
    InUse {
        /// The directory.
        out: PathBuf,
        /// The number of the process, where it could be read.
        pid: Option<u32>,
    },
    /// `--out` cannot change places with the directory of the next checkpoint.
    #[error("`{}` is the root or a mount point, which cannot be replaced by a checkpoint\nhint: name a directory in it", out.display())]
    Fixed {
        /// The directory.
        out: PathBuf,
    },
    /// `--out` is no UTF-8.
    #[error("the name of the output directory `{}` is not UTF-8\nhint: pass another `--out`", out.display())]
    NotText {
        /// The directory.
        out: PathBuf,
    },
    /// The file of the lock cannot be used.
    #[error("cannot lock the output directory with `{}`\nhint: pass another `--out`, or remove that file if no run uses it", path.display())]
    Lock {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// `--out` is a link to what does not exist.
    #[error("output directory `{}` is a link to a directory that does not exist\nhint: make that directory, or remove the link", out.display())]
    DanglingLink {
        /// The link.
        out: PathBuf,
    },
    /// `--out` is a file.
    #[error("output directory `{}` is a file", out.display())]
    NotADirectory {
        /// The file.
        out: PathBuf,
    },
    /// `--resume` without a checkpoint.
    #[error(
        "nothing to resume: `{}` holds no checkpoint\nhint: start without `--resume`; add `--overwrite` if an earlier run stopped before its first save",
        out.display()
    )]
    NothingToResume {
        /// The directory.
        out: PathBuf,
    },
    /// `--overwrite` on a directory that no run of ours wrote.
    #[error(
        "refusing to overwrite `{}`: it holds `{entry}`, which was not written by a run\nhint: pass an empty `--out`, or delete the directory yourself",
        out.display()
    )]
    NotOurs {
        /// The directory.
        out: PathBuf,
        /// A file in it.
        entry: String,
    },
    /// `--overwrite` would delete what the run reads.
    #[error("refusing to overwrite `{}`: the input `{}` lies in it\nhint: pass another `--out`", out.display(), input.display())]
    InputInside {
        /// The directory.
        out: PathBuf,
        /// The path that would be deleted.
        input: PathBuf,
    },
    /// Not readable or not writable.
    #[error("failed to prepare the output directory `{}`: {source}", path.display())]
    Io {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn out_must_be_empty_or_named_for_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let out = dir.path().join("runs/sft");
        prepare(&out, false, false, &[]).expect("made");
        prepare(&out, false, false, &[]).expect("still empty");
        let nothing = prepare(&out, true, false, &[]).expect_err("no checkpoint");
        assert!(matches!(nothing, OutDirError::NothingToResume { .. }));
        std::fs::write(out.join("config.toml"), "").expect("written");
        assert!(matches!(prepare(&out, false, false, &[]), Err(OutDirError::NotEmpty { .. })));
        std::fs::write(out.join("manifest.json"), "{\"format\": 1, \"stage\": \"sft\"}").expect("written");
        prepare(&out, true, false, &[]).expect("a checkpoint");
        assert!(matches!(prepare(&out, false, true, &[&out]), Err(OutDirError::InputInside { .. })));
        let hint = |inputs: &[&Path]| prepare_new(&out, false, inputs).expect_err("not empty").to_string();
        assert!(hint(&[dir.path()]).ends_with("\nhint: pass `--overwrite` to replace it, or another `--out`"));
        assert!(hint(&[&out]).ends_with("is not empty\nhint: pass another `--out`"), "{}", hint(&[&out]));
        let resumes = prepare(&out, false, false, &[]).expect_err("not empty").to_string();
        assert!(resumes.contains("hint: pass `--resume` to continue it, `--overwrite`"), "{resumes}");
        prepare(&out, false, true, &[dir.path()]).expect("ours");
        assert_eq!(entry_names(&out).expect("there").len(), 0);
    }

    #[test]
    fn chat_templates_in_files_are_part_of_a_checkpoint() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::create_dir(dir.path().join("additional_chat_templates")).expect("made");
        for file in ["config.toml", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"] {
            std::fs::write(dir.path().join(file), "").expect("written");
        }
        prepare(dir.path(), false, true, &[]).expect("a run with the tokenizer of a model from elsewhere");
    }

    #[test]
    fn what_a_run_leaves_that_was_killed_at_once_is_replaced() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("config.toml.partial-20505"), "seed").expect("written");
        prepare(dir.path(), false, true, &[]).expect("ours");
        std::fs::write(dir.path().join("thesis.doc.partial-20505"), "").expect("written");
        assert!(matches!(prepare(dir.path(), false, true, &[]), Err(OutDirError::NotOurs { .. })));
    }

    #[test]
    fn one_process_at_a_time_writes_to_a_directory() {
        let dir = tempfile::tempdir().expect("a directory");
        let out = dir.path().join("runs/sft");
        let lock = OutLock::take(&out).expect("free");
        let second = OutLock::take(&out).expect_err("taken");
        assert!(matches!(second, OutDirError::InUse { pid: Some(pid), .. } if pid == std::process::id()));
        OutLock::take(&dir.path().join("runs/ppo")).expect("another directory");
        drop(lock);
        drop(OutLock::take(&out).expect("free again"));
        assert_eq!(entry_names(&dir.path().join("runs")).expect("readable").len(), 0, "no file stays");
    }

    #[cfg(unix)]
    #[test]
    fn a_file_that_is_no_lock_is_left_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let (lock, precious) = (dir.path().join(".out.lock"), dir.path().join("precious"));
        std::fs::write(&precious, "data").expect("written");
        std::os::unix::fs::symlink(&precious, &lock).expect("linked");
        assert!(matches!(OutLock::take(&dir.path().join("out")), Err(OutDirError::Lock { .. })));
        std::fs::remove_file(&lock).expect("removed");
        std::fs::write(&lock, "somebody's").expect("written");
        assert!(matches!(OutLock::take(&dir.path().join("out")), Err(OutDirError::Lock { .. })));
        assert_eq!(std::fs::read_to_string(&precious).expect("there"), "data");
        assert_eq!(std::fs::read_to_string(&lock).expect("there"), "somebody's");
        std::fs::write(&lock, "12345").expect("of a process that was killed");
        OutLock::take(&dir.path().join("out")).expect("free");
        assert!(matches!(OutLock::take(Path::new("/")), Err(OutDirError::Fixed { .. })));
    }

    #[test]
    fn a_directory_with_its_lock_inside_goes_if_nothing_came_into_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let out = dir.path().join("runs/tiny");
        let lock = OutLock::take_inside(&out).expect("free");
        assert!(matches!(OutLock::take_inside(&out), Err(OutDirError::InUse { .. })));
        assert!(is_empty(&out).expect("readable") && out.is_dir());
        drop(lock);
        assert!(!out.exists());
        let lock = OutLock::take_inside(&out).expect("free");
        std::fs::write(out.join("recipe.json"), "{}").expect("written");
        drop(lock);
        assert_eq!(entry_names(&out).expect("readable"), ["recipe.json"]);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_mount_point_cannot_change_places() {
        assert!(matches!(check_exchangeable(Path::new("/proc")), Err(OutDirError::Fixed { .. })));
        let dir = tempfile::tempdir().expect("a directory");
        check_exchangeable(dir.path()).expect("an ordinary directory");
        check_exchangeable(&dir.path().join("new")).expect("one to be made");
    }

    #[cfg(unix)]
    #[test]
    fn a_link_and_its_directory_are_locked_together() {
        let dir = tempfile::tempdir().expect("a directory");
        let (out, link) = (dir.path().join("out"), dir.path().join("link"));
        std::fs::create_dir(&out).expect("made");
        std::os::unix::fs::symlink(&out, &link).expect("linked");
        let _lock = OutLock::take(&link).expect("free");
        let dangling = dir.path().join("dangling");
        std::os::unix::fs::symlink(dir.path().join("absent"), &dangling).expect("linked");
        assert!(matches!(OutLock::take(&dangling), Err(OutDirError::DanglingLink { .. })));
        assert!(matches!(OutLock::take(&out), Err(OutDirError::InUse { .. })));
    }

    #[test]
    fn overwrite_refuses_a_directory_that_is_not_ours() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("thesis.tex"), "").expect("written");
        assert!(matches!(prepare(dir.path(), false, true, &[]), Err(OutDirError::NotOurs { .. })));
        std::fs::write(dir.path().join("config.toml"), "").expect("written");
        assert!(matches!(prepare(dir.path(), false, true, &[]), Err(OutDirError::NotOurs { .. })));
        assert!(dir.path().join("thesis.tex").exists());
        std::fs::write(dir.path().join("manifest.json"), "{\"format\": 1, \"stage\": \"sft\"}").expect("written");
        let foreign = prepare(dir.path(), false, true, &[]).expect_err("not all ours").to_string();
        assert!(foreign.contains("it holds `thesis.tex`"), "{foreign}");
        std::fs::remove_file(dir.path().join("thesis.tex")).expect("removed");
        std::fs::write(dir.path().join("manifest.json"), "{\"manifest_version\": 3}").expect("written");
        let foreign = prepare(dir.path(), false, true, &[]).expect_err("an extension's").to_string();
        assert!(foreign.contains("it holds `manifest.json`"), "{foreign}");
        std::fs::remove_file(dir.path().join("manifest.json")).expect("removed");
        prepare(dir.path(), false, true, &[]).expect("a run stopped before its first save");
        let file = dir.path().join("file");
        std::fs::write(&file, "").expect("written");
        assert!(matches!(prepare(&file, false, true, &[]), Err(OutDirError::NotADirectory { .. })));
    }
}
