//! Errors of data.

use std::io;
use std::path::{Path, PathBuf};

use base::files::FileError;

use super::shards::CACHE_VARIABLE;

/// Why data cannot be read or kept.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// A file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A folder, a device or a pipe stands where a file is expected.
    #[error("`{path}` is not a file\nhint: name a file in it, or where several may stand a pattern such as `{path}/*.jsonl`", path = .0.display())]
    NotAFile(PathBuf),
    /// A file of decisions could not be read again.
    #[error("`{path}` does not end in `.jsonl`\nhint: decisions are a line of JSON each: name a file such as `labels.jsonl`", path = .0.display())]
    LabelsName(PathBuf),
    /// Another program appends to a file of decisions.
    #[error("another program writes to `{path}`\nhint: end it, or name another file", path = .0.display())]
    LabelsInUse(PathBuf),
    /// No file matches a pattern.
    #[error("no file matches `{pattern}`", pattern = .0.display())]
    NoMatch(PathBuf),
    /// A pattern has no meaning.
    #[error("invalid pattern `{pattern}`: {reason}", pattern = pattern.display())]
    Pattern {
        /// The pattern.
        pattern: PathBuf,
        /// The fault.
        reason: String,
    },
    /// The folder of tokenised text cannot be used.
    #[error(
        "cannot keep the tokenised text in `{path}`\nhint: set `{CACHE_VARIABLE}` to a folder that can be written and has \
         room for two bytes a token, or four with a vocabulary of more than 65,536",
        path = path.display()
    )]
    Cache {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The file's name does not tell its format.
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
    /// A record is malformed.
    #[error("bad record in `{path}`, {unit} {number}: {reason}\nhint: {hint}", path = path.display())]
    BadRecord {
        /// The file.
        path: PathBuf,
        /// `line` or `row`.
        unit: &'static str,
        /// Its number, from 1.
        number: usize,
        /// The fault.
        reason: String,
        /// The remedy.
        hint: String,
    },
    /// A file unpacks to far more than its own size.
    #[error(
        "`{path}` unpacks to more than {factor} times its size, as a file made to fill the memory does\n\
         hint: if you trust it, unpack it or raise `{section}.max_record_bytes`",
        path = path.display()
    )]
    Expands {
        /// The file.
        path: PathBuf,
        /// The ratio that is allowed.
        factor: u64,
        /// The section of the configuration that says so.
        section: &'static str,
    },
    /// The file has no record.
    #[error("`{path}` is empty\nhint: fill it, or leave it out", path = .0.display())]
    Empty(PathBuf),
    /// Every record of the file is malformed.
    #[error("all {n_skipped} records of `{path}` are bad; the first: {reason}", path = path.display())]
    AllBad {
        /// The file.
        path: PathBuf,
        /// Number of records.
        n_skipped: usize,
        /// The fault of the first one.
        reason: String,
    },
    /// A Parquet file is damaged or has no text.
    #[error("cannot read `{path}` as Parquet: {reason}", path = path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// The fault.
        reason: String,
    },
    /// A file of tokens is damaged.
    #[error("`{path}` is not a whole file of tokens: {reason}\nhint: delete it; it is written again when needed", path = path.display())]
    Shard {
        /// The file.
        path: PathBuf,
        /// The fault.
        reason: String,
    },
    /// A file of token ids is not what it should be.
    #[error("`{path}` is not a JSON array of arrays of token ids: {reason}", path = path.display())]
    Ids {
        /// The file.
        path: PathBuf,
        /// The fault.
        reason: String,
    },
    /// A text file was written to while it was tokenised.
    #[error("`{path}` has changed while it was read\nhint: start again when nothing writes to it", path = .0.display())]
    Changed(PathBuf),
    /// The user asked to stop while text was tokenised.
    #[error("stopped while the text was tokenised")]
    Stopped,
    /// The documents cannot be encoded.
    #[error("cannot encode the documents")]
    Encode(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl DataError {
    /// A damaged Parquet file.
    pub(super) fn parquet(path: &Path, reason: String) -> Self {
        Self::Parquet { path: path.to_owned(), reason }
    }
}
