//! Files of one JSON object a line, and what becomes of the bad ones.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;
use serde_json::{Map, Value};

use super::OnBadRecord;
use crate::data::DataError;

/// One line's object.
pub(super) type Record = Map<String, Value>;

pub(super) const NOT_UTF8: &str = "it is not valid UTF-8";

/// What some editors put at the beginning of a file.
pub(super) const BYTE_ORDER_MARK: &str = "\u{feff}";

/// Reads a `.jsonl` or `.jsonl.gz` file, each line through `parse`, which says what is wrong with a bad one.
pub(super) fn read<T>(
    path: &Path,
    on_bad: OnBadRecord,
    parse: impl Fn(&Record) -> Result<T, String>,
) -> Result<Vec<T>, DataError> {
    ending(path, &[".jsonl", ".jsonl.gz"])?;
    let mut reader = open(path)?;
    let mut items = Vec::new();
    let mut bad = BadRecords::new(path, "line", on_bad);
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let n_read = reader.read_until(b'\n', &mut line);
        if n_read.map_err(|source| DataError::Read { path: path.to_owned(), source })? == 0 {
            break;
        }
        match record(&line, number) {
            None => {}
            Some(Err(reason)) => bad.add(number, reason)?,
            Some(Ok(record)) => match parse(&record) {
                Ok(item) => items.push(item),
                Err(reason) => bad.add(number, reason)?,
            },
        }
    }
    bad.report(items)
}

/// The object of a line; none for a blank line.
fn record(line: &[u8], number: usize) -> Option<Result<Record, String>> {
    let Ok(text) = std::str::from_utf8(line) else {
        return Some(Err(NOT_UTF8.to_owned()));
    };
    let text = if number == 1 { text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text) } else { text };
    let text = text.trim();
    if text.is_empty() {
        return None;
    }
    Some(match serde_json::from_str(text) {
        Ok(Value::Object(record)) => Ok(record),
        Ok(other) => Err(format!("it is {}, expected a JSON object", super::kind(&other))),
        Err(error) => Err(format!("it is not JSON: {error}").replace(" at line 1 column", " at column")),
    })
}

/// The bad records of one file.
pub(super) struct BadRecords {
    path: PathBuf,
    unit: &'static str,
    on_bad: OnBadRecord,
    n_skipped: usize,
    first: Option<String>,
}

impl BadRecords {
    pub(super) fn new(path: &Path, unit: &'static str, on_bad: OnBadRecord) -> Self {
        Self { path: path.to_owned(), unit, on_bad, n_skipped: 0, first: None }
    }

    /// Notes a bad record, or fails if it is not to be skipped.
    pub(super) fn add(&mut self, number: usize, reason: String) -> Result<(), DataError> {
        if self.on_bad == OnBadRecord::Fail {
            return Err(DataError::BadRecord { path: self.path.clone(), unit: self.unit, number, reason });
        }
        self.n_skipped += 1;
        self.first.get_or_insert_with(|| format!("{} {number}: {reason}", self.unit));
        Ok(())
    }

    /// Says how many were skipped, and that something must be left.
    pub(super) fn report<T>(self, items: Vec<T>) -> Result<Vec<T>, DataError> {
        let Some(reason) = self.first else {
            return if items.is_empty() { Err(DataError::Empty(self.path)) } else { Ok(items) };
        };
        if items.is_empty() {
            return Err(DataError::AllBad { path: self.path, n_skipped: self.n_skipped, reason });
        }
        let records = if self.n_skipped == 1 { "record" } else { "records" };
        tracing::warn!("skipped {} bad {records} of `{}`; the first: {reason}", self.n_skipped, self.path.display());
        Ok(items)
    }
}

/// Which of `endings` the file's name has, however it is written.
pub(super) fn ending(path: &Path, endings: &'static [&'static str]) -> Result<&'static str, DataError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    let ending = endings.iter().find(|ending| name.ends_with(**ending));
    ending.copied().ok_or_else(|| DataError::Format { path: path.to_owned(), expected: endings })
}

/// The whole of a file, unpacked if its name ends in `.gz`.
pub(super) fn read_bytes(path: &Path) -> Result<Vec<u8>, DataError> {
    let mut bytes = Vec::new();
    open(path)?.read_to_end(&mut bytes).map_err(|source| DataError::Read { path: path.to_owned(), source })?;
    Ok(bytes)
}

fn open(path: &Path) -> Result<Box<dyn BufRead>, DataError> {
    let file = File::open(path).map_err(|source| DataError::Read { path: path.to_owned(), source })?;
    let is_packed = path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("gz"));
    Ok(if is_packed { Box::new(BufReader::new(MultiGzDecoder::new(file))) } else { Box::new(BufReader::new(file)) })
}
