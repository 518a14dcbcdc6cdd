//! Documents for pretraining, one after the other.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::json::Records;
use super::source::{Found, Source};
use super::table::TextColumn;
use super::tally::Tally;
use super::{BYTE_ORDER_MARK, NOT_UTF8, ReadOptions, Summary, json, shapes, text_of};
use crate::data::DataError;

/// Where a `.txt` file is cut into documents.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(from = "String", into = "String")]
pub enum Separator {
    /// `"blank-line"`: at lines of white space.
    #[default]
    BlankLine,
    /// `"line"`: each line is a document.
    Line,
    /// `"none"`: the whole file is one document, to the byte.
    None,
    /// Any other string, `"<|endoftext|>"` for one: wherever it stands. Line breaks around it belong to no document.
    Text(String),
}

impl From<String> for Separator {
    fn from(name: String) -> Self {
        match name.as_str() {
            "blank-line" | "" => Self::BlankLine,
            "line" => Self::Line,
            "none" => Self::None,
            _ => Self::Text(name),
        }
    }
}

impl From<Separator> for String {
    fn from(separator: Separator) -> Self {
        match separator {
            Separator::BlankLine => "blank-line".to_owned(),
            Separator::Line => "line".to_owned(),
            Separator::None => "none".to_owned(),
            Separator::Text(text) => text,
        }
    }
}

/// The documents of one file, read as they are asked for.
///
/// After the last document, the iterator gives one error if the file was empty or held malformed records only.
pub struct Texts {
    form: Form,
    summary: Option<Summary>,
}

enum Form {
    Plain(Plain),
    Records(Records),
    Parquet(TextColumn),
}

impl Texts {
    /// Opens `.txt`, which is cut at `separator`, `{"text"}` records, or Parquet with a column `text`; the first two
    /// also gzipped.
    ///
    /// # Errors
    /// If the file cannot be read or its name has another ending.
    pub fn open(path: &Path, separator: &Separator, options: ReadOptions) -> Result<Self, DataError> {
        const ENDINGS: &[&str] = &[".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet"];
        let form = match shapes::ending(path, ENDINGS)? {
            ".txt" | ".txt.gz" => Form::Plain(Plain::open(path, separator, options)?),
            ".parquet" => Form::Parquet(TextColumn::open(path, options)?),
            ending => Form::Records(Records::open(path, ending, options)?),
        };
        Ok(Self { form, summary: None })
    }

    /// How many bytes of the file are read so far.
    pub fn position(&self) -> u64 {
        match &self.form {
            Form::Plain(plain) => plain.source.position(),
            Form::Records(records) => records.position(),
            Form::Parquet(column) => column.position(),
        }
    }

    /// The file's counts, once all of it is read.
    pub fn summary(&self) -> Summary {
        self.summary.unwrap_or_default()
    }

    fn next_document(&mut self) -> Result<Option<String>, DataError> {
        if self.summary.is_some() {
            return Ok(None);
        }
        let next = match &mut self.form {
            Form::Plain(plain) => plain.next(),
            Form::Records(records) => records.next(document_of),
            Form::Parquet(column) => column.next(),
        };
        match next {
            Ok(None) => {}
            found => return found,
        }
        // Set first: what follows an error is the end.
        self.summary = Some(Summary::default());
        self.summary = Some(match &mut self.form {
            Form::Plain(plain) => plain.finish()?,
            Form::Records(records) => records.finish()?,
            Form::Parquet(column) => column.finish()?,
        });
        Ok(None)
    }
}

impl Iterator for Texts {
    type Item = Result<String, DataError>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.next_document();
        if next.is_err() {
            self.summary.get_or_insert_default();
        }
        next.transpose()
    }
}

/// The document of a record.
fn document_of(record: &json::Record) -> Result<String, String> {
    if record.contains_key("text") { text_of(record, "text") } else { Err(shapes::other(record, shapes::TEXT)) }
}

/// Plain text, cut at a separator.
struct Plain {
    path: PathBuf,
    source: Source,
    separator: Separator,
    max_bytes: u64,
    tally: Tally,
    /// The line where the document begins that was read last.
    first_line: usize,
    n_marks: usize,
    line: Vec<u8>,
}

impl Plain {
    fn open(path: &Path, separator: &Separator, options: ReadOptions) -> Result<Self, DataError> {
        Ok(Self {
            path: path.to_owned(),
            source: Source::open(path, options)?,
            separator: separator.clone(),
            max_bytes: options.max_record_bytes.bytes(),
            tally: Tally::new(path, "line", options),
            first_line: 1,
            n_marks: 0,
            line: Vec::new(),
        })
    }

    /// The next document that is more than white space.
    fn next(&mut self) -> Result<Option<String>, DataError> {
        let mut document = Vec::new();
        while self.next_bytes(&mut document)? {
            match std::str::from_utf8(&document) {
                Ok(text) => {
                    let text = self.trimmed(text);
                    if !text.trim().is_empty() {
                        self.tally.good();
                        return Ok(Some(text.to_owned()));
                    }
                }
                Err(error) => {
                    let n_lines = memchr::memchr_iter(b'\n', &document[..error.valid_up_to()]).count();
                    self.tally.bad(self.first_line + n_lines, NOT_UTF8.to_owned())?;
                }
            }
        }
        Ok(None)
    }

    /// Reports what was read, and a separator that never occurred.
    fn finish(&mut self) -> Result<Summary, DataError> {
        let summary = self.tally.finish()?;
        if let Some(warning) = self.unused_separator() {
            tracing::warn!("{warning}");
        }
        Ok(summary)
    }

    /// A mistyped name of a separator is taken for a text, which then occurs nowhere.
    fn unused_separator(&self) -> Option<String> {
        match &self.separator {
            Separator::Text(mark) if self.n_marks == 0 => Some(format!(
                "the separator {mark:?} does not occur in `{}`: the file is one document\nhint: `{}.separator` is \
                 \"blank-line\", \"line\", \"none\" or a text that stands between documents",
                self.path.display(),
                self.tally.section()
            )),
            _ => None,
        }
    }

    /// Reads the bytes of the next document; false at the end of the file.
    fn next_bytes(&mut self, document: &mut Vec<u8>) -> Result<bool, DataError> {
        let mark = match &self.separator {
            Separator::BlankLine => return self.next_paragraph(document),
            Separator::Line => "\n",
            Separator::None => "",
            Separator::Text(mark) => mark,
        };
        loop {
            self.first_line = self.source.line();
            match self.source.next(mark.as_bytes(), document)? {
                Found::Nothing => return Ok(false),
                Found::End => return Ok(true),
                Found::Mark => {
                    self.n_marks += 1;
                    document.truncate(document.len() - mark.len());
                    if self.separator == Separator::Line && document.ends_with(b"\r") {
                        document.pop();
                    }
                    return Ok(true);
                }
                Found::TooLong => {
                    self.tally.too_long(self.first_line)?;
                    self.source.skip(mark.as_bytes(), document)?;
                }
            }
        }
    }

    /// The lines up to one of white space, joined by `\n`.
    fn next_paragraph(&mut self, document: &mut Vec<u8>) -> Result<bool, DataError> {
        let mut is_refused = false;
        document.clear();
        loop {
            let number = self.source.line();
            let found = self.source.next(b"\n", &mut self.line)?;
            if found == Found::Nothing {
                return Ok(!document.is_empty());
            }
            let line = self.line.strip_prefix(BYTE_ORDER_MARK.as_bytes()).unwrap_or(&self.line);
            let line = line.strip_suffix(b"\n").map_or(line, |line| line.strip_suffix(b"\r").unwrap_or(line));
            let is_too_long = found == Found::TooLong || (document.len() + line.len()) as u64 > self.max_bytes;
            if !is_too_long && std::str::from_utf8(line).is_ok_and(|line| line.trim().is_empty()) {
                if !document.is_empty() {
                    return Ok(true);
                }
                is_refused = false;
                continue;
            }
            if document.is_empty() {
                self.first_line = number;
            } else {
                document.push(b'\n');
            }
            if is_too_long && !is_refused {
                self.tally.too_long(self.first_line)?;
                is_refused = true;
            }
            if is_refused {
                document.clear();
            } else {
                document.extend_from_slice(line);
            }
            if found == Found::TooLong {
                self.source.skip(b"\n", &mut self.line)?;
            }
        }
    }

    /// A document without what stands around it in the file.
    fn trimmed<'a>(&self, text: &'a str) -> &'a str {
        match self.separator {
            Separator::Line => text.trim_start_matches(BYTE_ORDER_MARK),
            Separator::None if self.first_line == 1 => text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text),
            // Where files were joined, a byte order mark stands in the middle.
            Separator::Text(_) => {
                let text = text.trim_matches(['\r', '\n']);
                text.strip_prefix(BYTE_ORDER_MARK).map_or(text, |text| text.trim_matches(['\r', '\n']))
            }
            Separator::BlankLine | Separator::None => text,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::records::OnBadRecord;

    #[test]
    fn a_separator_that_never_occurs_is_reported() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("a.txt");
        std::fs::write(&path, "a\n\nb").expect("written");
        let warning = |separator: &str| {
            let separator = Separator::from(separator.to_owned());
            let mut plain = Plain::open(&path, &separator, OnBadRecord::Fail.into()).expect("opened");
            while plain.next().expect("text").is_some() {}
            plain.unused_separator()
        };
        let text = warning("paragraph").expect("a mistyped name");
        assert!(text.starts_with("the separator \"paragraph\" does not occur in `"), "{text}");
        for separator in ["blank-line", "line", "none", "\n\n"] {
            assert_eq!(warning(separator), None, "{separator}");
        }
    }
}
