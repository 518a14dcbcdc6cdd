//! What can go wrong with data.

use std::io;
use std::path::PathBuf;

/// Why data cannot be read or kept.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file cannot be read.
    #[error("cannot read `{path}`", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file or folder of the cache cannot be written.
    #[error("cannot write `{path}`", path = path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The file's name says nothing of its format.
    #[error(
        "cannot tell the format of `{path}` by its name: expected one of {expected}",
        path = path.display(),
        expected = expected.iter().map(|ending| format!("`{ending}`")).collect::<Vec<_>>().join(", ")
    )]
    Format {
        /// The file.
        path: PathBuf,
        /// The endings that are known here.
        expected: &'static [&'static str],
    },
    /// A record is not one.
    #[error(
        "bad record in `{path}`, {unit} {number}: {reason}\nhint: mend it; training leaves such records out with `data.on_bad_record = \"skip\"`",
        path = path.display()
    )]
    BadRecord {
        /// The file.
        path: PathBuf,
        /// `line`, `row` or `document`.
        unit: &'static str,
        /// Which one, from 1.
        number: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// A text file is in another encoding.
    #[error("`{path}`, line {line}, is not valid UTF-8\nhint: convert the file to UTF-8", path = path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
    },
    /// There is nothing in the file.
    #[error("`{path}` is empty", path = .0.display())]
    Empty(PathBuf),
    /// There is nothing good in the file.
    #[error("all {n_skipped} records of `{path}` are bad; the first: {reason}", path = path.display())]
    AllBad {
        /// The file.
        path: PathBuf,
        /// How many there are.
        n_skipped: usize,
        /// What is wrong with the first one.
        reason: String,
    },
    /// A Parquet file is damaged or has no text.
    #[error("cannot read `{path}` as Parquet: {reason}", path = path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file of tokens is damaged.
    #[error("`{path}` is not a whole file of tokens: {reason}\nhint: delete it; it is written again when it is needed", path = path.display())]
    Shard {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file of token ids is not what it should be.
    #[error("`{path}` is not a JSON array of arrays of token ids: {reason}", path = path.display())]
    Ids {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The documents cannot be encoded.
    #[error("cannot encode the documents")]
    Encode(#[source] Box<dyn std::error::Error + Send + Sync>),
}
