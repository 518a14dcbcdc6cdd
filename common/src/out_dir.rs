//! The directory that a run or a tokenizer writes to.

use std::fs::{File, TryLockError};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

/// The names that a training run or a tokenizer writes: a directory of these alone is ours.
const OUR_FILES: [&str; 12] = [
    "config.toml",
    "manifest.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "metrics.jsonl",
    "samples.jsonl",
    "rollouts.jsonl",
    "state",
    "value",
];

/// Makes `out` ready to be written to: it exists and is empty, or with `resume` holds a checkpoint.
///
/// `overwrite` empties it, but only if it is ours: it has a `manifest.json`, or nothing but files that a run or a
/// tokenizer writes, `config.toml` or `tokenizer.json` among them. Read the config first, because it may lie in `out`.
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
        return Err(OutDirError::NotEmpty { out: out.to_owned() });
    }
    let has = |name: &str| entries.iter().any(|entry| entry == name);
    let only_ours = entries.iter().all(|entry| OUR_FILES.contains(&entry.as_str()));
    if !(has("manifest.json") || only_ours && (has("config.toml") || has("tokenizer.json"))) {
        return Err(OutDirError::NotOurs { out: out.to_owned() });
    }
    let target = out.canonicalize().map_err(failed)?;
    for input in inputs {
        if input.canonicalize().is_ok_and(|input| input.starts_with(&target)) {
            return Err(OutDirError::InputInside { out: out.to_owned(), input: (*input).to_owned() });
        }
    }
    for entry in entries {
        let path = target.join(entry);
        let is_dir = path.symlink_metadata().map_err(failed)?.is_dir();
        if is_dir { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) }.map_err(failed)?;
    }
    Ok(())
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
            return Err(failed(io::ErrorKind::InvalidInput.into()));
        };
        std::fs::create_dir_all(parent).map_err(|error| match error.kind() {
            // What is there is a file.
            io::ErrorKind::AlreadyExists => failed(io::ErrorKind::NotADirectory.into()),
            _ => failed(error),
        })?;
        let path = parent.join(format!(".{}.lock", name.to_string_lossy()));
        loop {
            let mut file =
                File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
            match file.try_lock() {
                Ok(()) if is_at(&file, &path) => {
                    // The number is for the other process's message alone.
                    let _ = file.set_len(0).and_then(|()| write!(file, "{}", std::process::id()));
                    return Ok(Self { path, file: Some(file) });
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
                    return Ok(Self { path, file: None });
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
    }
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

fn entry_names(dir: &Path) -> std::io::Result<Vec<String>> {
    if !dir.exists() {
        return Ok(Vec::new());
    }
    std::fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

/// Why an output directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OutDirError {
    /// `--out` holds something.
    #[error(
        "output directory `{}` is not empty\nhint: pass `--resume` to continue it, `--overwrite` to replace it, or another `--out`",
        out.display()
    )]
    NotEmpty {
        /// The directory.
        out: PathBuf,
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
        "refusing to overwrite `{}`: it was not written by this program\nhint: pass an empty `--out`, or delete the directory yourself",
        out.display()
    )]
    NotOurs {
        /// The directory.
        out: PathBuf,
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
        std::fs::write(out.join("manifest.json"), "{}").expect("written");
        prepare(&out, true, false, &[]).expect("a checkpoint");
        assert!(matches!(prepare(&out, false, true, &[&out]), Err(OutDirError::InputInside { .. })));
        prepare(&out, false, true, &[dir.path()]).expect("ours");
        assert_eq!(entry_names(&out).expect("there").len(), 0);
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
        std::fs::remove_file(dir.path().join("thesis.tex")).expect("removed");
        prepare(dir.path(), false, true, &[]).expect("a run stopped before its first save");
        let file = dir.path().join("file");
        std::fs::write(&file, "").expect("written");
        assert!(matches!(prepare(&file, false, true, &[]), Err(OutDirError::NotADirectory { .. })));
    }
}
