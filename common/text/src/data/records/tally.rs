//! Counts while a file is read: good and malformed records, and the expansion of a packed file.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::{OnBadRecord, ReadOptions};
use crate::data::DataError;

/// How many times the file's own size its content may have: no honest text or table is packed so well.
pub(super) const MAX_EXPANSION: u64 = 200;

/// Numbers of records in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Summary {
    /// Well-formed records.
    pub n_records: usize,
    /// Malformed ones, which are left out.
    pub n_skipped: usize,
}

/// The records of one file, counted.
pub(super) struct Tally {
    path: PathBuf,
    /// `line` or `row`.
    unit: &'static str,
    options: ReadOptions,
    summary: Summary,
    first: Option<String>,
}

impl Tally {
    pub(super) fn new(path: &Path, unit: &'static str, options: ReadOptions) -> Self {
        Self { path: path.to_owned(), unit, options, summary: Summary::default(), first: None }
    }

    /// The section of the configuration that says how the file is read.
    pub(super) fn section(&self) -> &'static str {
        self.options.section.unwrap_or("data")
    }

    /// Counts a well-formed record.
    pub(super) fn good(&mut self) {
        self.summary.n_records += 1;
    }

    /// Counts a malformed record, or fails if such records are not to be skipped.
    pub(super) fn bad(&mut self, number: usize, reason: String) -> Result<(), DataError> {
        self.refuse(number, reason, |section| match section {
            Some(section) => format!("fix the record, or skip such records with `{section}.on_bad_record = \"skip\"`"),
            None => "fix the record".to_owned(),
        })
    }

    /// Counts a record above the limit, or fails.
    pub(super) fn too_long(&mut self, number: usize) -> Result<(), DataError> {
        let reason = format!("it is longer than the limit of {} bytes", self.options.max_record_bytes.bytes());
        self.refuse(number, reason, |section| match section {
            Some(section) => format!(
                "raise `{section}.max_record_bytes`, or skip such records with `{section}.on_bad_record = \"skip\"`"
            ),
            None => "split the record".to_owned(),
        })
    }

    /// `hint` is told the section of the configuration that says what becomes of such records.
    fn refuse(
        &mut self,
        number: usize,
        reason: String,
        hint: impl FnOnce(Option<&'static str>) -> String,
    ) -> Result<(), DataError> {
        if self.options.on_bad_record == OnBadRecord::Fail {
            let hint = hint(self.options.section);
            return Err(DataError::BadRecord { path: self.path.clone(), unit: self.unit, number, reason, hint });
        }
        self.summary.n_skipped += 1;
        self.first.get_or_insert_with(|| format!("{} {number}: {reason}", self.unit));
        Ok(())
    }

    /// Says how many were skipped, and makes sure that something is left.
    pub(super) fn finish(&mut self) -> Result<Summary, DataError> {
        let Summary { n_records, n_skipped } = self.summary;
        let path = self.path.clone();
        match self.first.take() {
            None if n_records == 0 => Err(DataError::Empty(path)),
            None => Ok(self.summary),
            Some(reason) if n_records == 0 => Err(DataError::AllBad { path, n_skipped, reason }),
            Some(reason) => {
                if is_news(&path, n_skipped) {
                    let records = if n_skipped == 1 { "record" } else { "records" };
                    tracing::warn!("skipped {n_skipped} bad {records} of `{}`; the first: {reason}", path.display());
                }
                Ok(self.summary)
            }
        }
    }
}

/// Whether it was not said yet that so many records of this file are skipped: a command reads its files to check them, to
/// measure them and to use them.
fn is_news(path: &Path, n_skipped: usize) -> bool {
    static SAID: Mutex<BTreeSet<(PathBuf, usize)>> = Mutex::new(BTreeSet::new());
    SAID.lock().unwrap_or_else(PoisonError::into_inner).insert((path.to_owned(), n_skipped))
}

/// Guards against a small file that unpacks to more than memory holds.
pub(super) struct Expansion {
    path: PathBuf,
    allowed: u64,
    total: u64,
    section: &'static str,
}

impl Expansion {
    /// For a file of `file_len` bytes, which may also hold one record of the longest length.
    pub(super) fn new(path: &Path, file_len: u64, options: ReadOptions) -> Self {
        Self {
            path: path.to_owned(),
            allowed: file_len.saturating_mul(MAX_EXPANSION).saturating_add(options.max_record_bytes.bytes()),
            total: 0,
            section: options.section.unwrap_or("data"),
        }
    }

    /// Notes `n` more bytes of content.
    pub(super) fn add(&mut self, n: u64) -> Result<(), DataError> {
        self.total = self.total.saturating_add(n);
        if self.total > self.allowed {
            return Err(DataError::Expands { path: self.path.clone(), factor: MAX_EXPANSION, section: self.section });
        }
        Ok(())
    }
}
