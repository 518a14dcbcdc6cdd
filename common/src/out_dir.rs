//! The directory that a run or a tokenizer writes to.

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
        "output directory `{}` is not empty\nhint: pass `--resume` to go on from it, `--overwrite` to replace it, or another `--out`",
        out.display()
    )]
    NotEmpty {
        /// The directory.
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
