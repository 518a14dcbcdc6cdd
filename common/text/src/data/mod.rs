//! From files on disk to rows of token ids.
//!
//! [`files`] finds people's files, [`records`] reads them, [`shards`] keeps tokenised text, [`order`] says which item comes when, and
//! [`collate`] makes equal rows of unequal ones. [`ids`] reads rows of token ids that others prepared.

mod error;

pub mod collate;
pub mod files;
pub mod ids;
pub mod order;
pub mod records;
pub mod shards;

pub use error::DataError;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use base::files::FileError;

/// Size and modification time of a file: what shows that somebody has written to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stamp {
    len: u64,
    modified: SystemTime,
}

impl Stamp {
    /// That of the file at `path`, now.
    ///
    /// # Errors
    /// If it cannot be read or is no file.
    pub fn of(path: &Path) -> Result<Self, DataError> {
        let metadata = path.metadata().map_err(FileError::read(path))?;
        if !metadata.is_file() {
            return Err(DataError::NotAFile(path.to_owned()));
        }
        Ok(Self { len: metadata.len(), modified: metadata.modified().map_err(FileError::read(path))? })
    }

    /// Bytes of the file.
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Whether the file has no byte.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// Age from which a file that changes again is certain to get another modification time.
const SETTLED: Duration = Duration::from_secs(2);

/// SHA-256 of a data file's bytes, in hexadecimal.
///
/// A corpus is asked for by every step of a recipe that uses it and by the checkpoints; it is read once in a process, as
/// long as path, size and modification time stay the same.
///
/// # Errors
/// If the file cannot be read.
pub fn file_sha256(path: &Path) -> Result<String, DataError> {
    static KNOWN: LazyLock<Mutex<HashMap<(PathBuf, Stamp), String>>> = LazyLock::new(Mutex::default);
    let stamp = Stamp::of(path)?;
    let file = (path.to_owned(), stamp);
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(sha256) = known.get(&file) {
        return Ok(sha256.clone());
    }
    let sha256 = base::hash::sha256_of_file(path).map_err(FileError::read(path))?;
    if stamp.modified.elapsed().is_ok_and(|age| age > SETTLED) {
        known.insert(file, sha256.clone());
    }
    Ok(sha256)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;

    #[test]
    fn a_file_is_hashed_again_only_when_it_has_changed() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("a.txt");
        let old = SystemTime::now() - Duration::from_mins(1);
        let write = |text: &str, modified: SystemTime| {
            fs::write(&path, text).expect("written");
            File::options().append(true).open(&path).and_then(|file| file.set_modified(modified)).expect("dated");
        };
        let hash = || file_sha256(&path).expect("readable");
        write("abc", old);
        let of_abc = hash();
        assert_eq!(of_abc, base::hash::sha256_of(b"abc"));
        // A change that hides itself shows that the file is not read again.
        write("abd", old);
        assert_eq!(hash(), of_abc);
        write("abd", old + Duration::from_secs(1));
        assert_eq!(hash(), base::hash::sha256_of(b"abd"));
        // The clock of a file that was just written may stand still.
        let now = SystemTime::now();
        for text in ["abe", "abf"] {
            write(text, now);
            assert_eq!(hash(), base::hash::sha256_of(text.as_bytes()));
        }
        fs::remove_file(&path).expect("there");
        assert!(file_sha256(&path).is_err());
        assert!(matches!(file_sha256(dir.path()), Err(DataError::NotAFile(_))));
    }
}
