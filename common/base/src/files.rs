//! Files that are whole or absent, and the words for files that fail.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Makes `bytes` the content of `path`, whole or not at all: written beside it, flushed to the disk, renamed over it.
///
/// # Errors
/// If the file cannot be written or renamed; `path` is then as before.
pub fn write_whole(path: &Path, bytes: impl AsRef<[u8]>) -> Result<(), FileError> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".partial-{}", std::process::id()));
    let beside = path.with_file_name(name);
    let written = File::create(&beside)
        .and_then(|mut file| file.write_all(bytes.as_ref()).and_then(|()| file.sync_all()))
        .and_then(|()| fs::rename(&beside, path));
    if written.is_err() {
        // Only the first failure matters; there may be nothing to remove.
        let _ = fs::remove_file(&beside);
    }
    written.map_err(FileError::write(path))
}

/// The text of the file at `path`; `None` where there is no such file.
///
/// # Errors
/// If the file is there but cannot be read.
pub fn read_if_there(path: &Path) -> Result<Option<String>, FileError> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        read => read.map(Some).map_err(FileError::read(path)),
    }
}

/// Whether `dir` is there with something in it.
///
/// # Errors
/// If it is no directory or cannot be read.
pub fn is_filled(dir: &Path) -> Result<bool, FileError> {
    Ok(dir.exists() && dir.read_dir().map_err(FileError::read(dir))?.next().is_some())
}

/// Why a file cannot be used, and which one.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("cannot read `{path}`", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It cannot be written.
    #[error("cannot write `{path}`", path = path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

impl FileError {
    /// For `map_err` where `path` is read.
    pub fn read(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Read { path: path.to_owned(), source }
    }

    /// For `map_err` where `path` is written.
    pub fn write(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Write { path: path.to_owned(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_and_nothing_stays_beside_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("a.json");
        write_whole(&path, b"one").expect("written");
        write_whole(&path, b"two").expect("replaced");
        assert_eq!(fs::read(&path).expect("there"), b"two");
        assert_eq!(fs::read_dir(dir.path()).expect("readable").count(), 1);
        let error = write_whole(&dir.path().join("no/such.json"), b"x").expect_err("no folder").to_string();
        assert!(error.starts_with("cannot write `") && error.ends_with("no/such.json`"), "{error}");
    }

    #[test]
    fn what_is_absent_is_neither_read_nor_filled() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("a");
        assert_eq!((read_if_there(&path).expect("absent"), is_filled(&path).expect("absent")), (None, false));
        assert!(!is_filled(dir.path()).expect("empty"));
        fs::write(&path, "text").expect("written");
        assert_eq!(read_if_there(&path).expect("there").as_deref(), Some("text"));
        assert!(
            is_filled(dir.path()).expect("filled") && is_filled(&path).is_err() && read_if_there(dir.path()).is_err()
        );
    }
}
