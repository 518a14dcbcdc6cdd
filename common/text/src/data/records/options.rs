//! How records are read: what becomes of a malformed one, and how long one may be.

use std::num::NonZeroU64;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Treatment of a malformed record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnBadRecord {
    /// Stop with an error that names file, line and reason.
    #[default]
    Fail,
    /// Leave the record out; the log says how many were skipped.
    Skip,
}

/// The longest record or document that is read, in bytes: 64 MiB by default.
///
/// A line of a compressed file can be a thousand times as long as the file. Without a limit it fills the memory before
/// anything can be said about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct RecordLimit(NonZeroU64);

impl RecordLimit {
    /// A limit of `bytes`; `None` for 0, which would refuse every record.
    pub fn new(bytes: u64) -> Option<Self> {
        NonZeroU64::new(bytes).map(Self)
    }

    /// The limit in bytes.
    pub fn bytes(self) -> u64 {
        self.0.get()
    }
}

impl Default for RecordLimit {
    fn default() -> Self {
        Self(const { NonZeroU64::new(64 << 20).expect("64 MiB is not 0") })
    }
}

/// How the records of a file are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ReadOptions {
    /// Treatment of a malformed record.
    pub on_bad_record: OnBadRecord,
    /// The longest record that is read.
    pub max_record_bytes: RecordLimit,
    /// The section of a configuration whose keys decide the two, as `data`: hints name them only then.
    pub section: Option<&'static str>,
}

impl From<OnBadRecord> for ReadOptions {
    /// The default limit, and hints that name no key: for files that a flag names.
    fn from(on_bad_record: OnBadRecord) -> Self {
        Self { on_bad_record, ..Self::default() }
    }
}
