//! Files of JSON objects: one a line, or the elements of an array.

use std::path::Path;

use serde_json::{Map, Value};

use super::source::{Found, Source};
use super::tally::Tally;
use super::{BYTE_ORDER_MARK, NOT_UTF8, ReadOptions, Summary, kind, shapes};
use crate::data::DataError;

/// The object of one record.
pub(super) type Record = Map<String, Value>;

/// The endings of files that hold such records.
const ENDINGS: &[&str] = &[".jsonl", ".jsonl.gz", ".json", ".json.gz"];

/// The records of one file.
pub(super) struct Records {
    source: Source,
    form: Form,
    tally: Tally,
    piece: Vec<u8>,
}

/// How the records of a file are divided.
enum Form {
    /// One a line.
    Lines,
    /// The elements of an array.
    Array(Scanner),
}

/// Where a byte of JSON stands.
#[derive(Clone, Copy, Default)]
enum Quote {
    #[default]
    Outside,
    Inside,
    /// After a `\\` in a string.
    Escaped,
}

/// Finds the commas and the bracket that divide the elements of one JSON array.
#[derive(Default)]
struct Scanner {
    depth: usize,
    quote: Quote,
    /// Whether the array's `[` is read and its `]` is not.
    is_open: bool,
    /// Whether a comma was read last, so that another element has to follow.
    after_comma: bool,
}

/// Reads a whole file, each record through `parse`, which says what is wrong with a malformed one.
pub(super) fn read<T>(
    path: &Path,
    options: ReadOptions,
    parse: impl Fn(&Record) -> Result<T, String>,
) -> Result<Vec<T>, DataError> {
    let mut records = Records::open(path, shapes::ending(path, ENDINGS)?, options)?;
    let mut items = Vec::new();
    while let Some(item) = records.next(&parse)? {
        items.push(item);
    }
    records.finish()?;
    Ok(items)
}

/// Reads a whole file as [`read`] does, and keeps nothing of it.
pub(super) fn check<T>(
    path: &Path,
    options: ReadOptions,
    parse: impl Fn(&Record) -> Result<T, String>,
) -> Result<Summary, DataError> {
    let mut records = Records::open(path, shapes::ending(path, ENDINGS)?, options)?;
    while records.next(&parse)?.is_some() {}
    records.finish()
}

impl Records {
    /// Opens a file whose name has the given ending.
    pub(super) fn open(path: &Path, ending: &str, options: ReadOptions) -> Result<Self, DataError> {
        let mut source = Source::open(path, options)?;
        // Many a `.json` holds an object a line.
        let is_array = matches!(ending, ".json" | ".json.gz") && source.peek()? == Some(b'[');
        let form = if is_array { Form::Array(Scanner::default()) } else { Form::Lines };
        Ok(Self { source, form, tally: Tally::new(path, "line", options), piece: Vec::new() })
    }

    /// The next well-formed record, as `parse` takes it.
    pub(super) fn next<T>(&mut self, parse: impl Fn(&Record) -> Result<T, String>) -> Result<Option<T>, DataError> {
        while let Some(number) = self.next_piece()? {
            let Some(record) = object(&self.piece) else { continue };
            match record.and_then(|record| parse(&record)) {
                Ok(item) => {
                    self.tally.good();
                    return Ok(Some(item));
                }
                Err(reason) => self.tally.bad(number, reason)?,
            }
        }
        Ok(None)
    }

    /// Reports what was read; see [`Tally::finish`].
    pub(super) fn finish(&mut self) -> Result<Summary, DataError> {
        self.tally.finish()
    }

    /// How many bytes of the file are read so far.
    pub(super) fn position(&self) -> u64 {
        self.source.position()
    }

    /// Reads the text of the next record into `piece`, and gives the line where it begins.
    fn next_piece(&mut self) -> Result<Option<usize>, DataError> {
        let Self { source, form, tally, piece } = self;
        match form {
            Form::Lines => next_line(source, tally, piece),
            Form::Array(scanner) => scanner.next_element(source, tally, piece),
        }
    }
}

fn next_line(source: &mut Source, tally: &mut Tally, line: &mut Vec<u8>) -> Result<Option<usize>, DataError> {
    loop {
        let number = source.line();
        match source.next(b"\n", line)? {
            Found::Nothing => return Ok(None),
            Found::TooLong => {
                tally.too_long(number)?;
                source.skip(b"\n", line)?;
            }
            Found::Mark | Found::End => return Ok(Some(number)),
        }
    }
}

impl Scanner {
    /// As [`next_line`]: the next element of the array, or of another one that follows it in a file of joined files.
    fn next_element(
        &mut self,
        source: &mut Source,
        tally: &mut Tally,
        element: &mut Vec<u8>,
    ) -> Result<Option<usize>, DataError> {
        loop {
            element.clear();
            if !self.is_open {
                match source.peek()? {
                    None => return Ok(None),
                    Some(b'[') => {}
                    Some(_) => {
                        tally.bad(source.line(), "something other than an array follows the array".to_owned())?;
                        return Ok(None);
                    }
                }
                source.append(element, |_| Some(0))?;
                element.clear();
                self.is_open = true;
            }
            let line = source.line();
            let mut found = source.append(element, |bytes| self.end(bytes))?;
            let n_blank = element.iter().take_while(|byte| byte.is_ascii_whitespace()).count();
            let number = line + memchr::memchr_iter(b'\n', &element[..n_blank]).count();
            let is_too_long = found == Found::TooLong;
            if is_too_long {
                tally.too_long(number)?;
            }
            while found == Found::TooLong {
                element.clear();
                found = source.append(element, |bytes| self.end(bytes))?;
            }
            if found != Found::Mark {
                tally.bad(number, "the file ends within the array: `]` is missing".to_owned())?;
                self.is_open = false;
                continue;
            }
            let is_needed = self.after_comma;
            self.after_comma = element.pop() == Some(b',');
            self.is_open = self.after_comma;
            if is_too_long {
                continue;
            }
            if n_blank < element.len() {
                return Ok(Some(number));
            }
            if is_needed || self.after_comma {
                tally.bad(number, "an element of the array is missing".to_owned())?;
            }
        }
    }

    /// Where in `bytes` the element ends: at a comma or bracket of the array itself.
    fn end(&mut self, bytes: &[u8]) -> Option<usize> {
        bytes.iter().position(|&byte| {
            match (self.quote, byte) {
                (Quote::Inside, b'\\') => self.quote = Quote::Escaped,
                (Quote::Inside, b'"') => self.quote = Quote::Outside,
                (Quote::Inside | Quote::Escaped, _) | (Quote::Outside, b'"') => self.quote = Quote::Inside,
                (Quote::Outside, b'[' | b'{') => self.depth += 1,
                (Quote::Outside, b',' | b']') if self.depth == 0 => return true,
                (Quote::Outside, b']' | b'}') => self.depth = self.depth.saturating_sub(1),
                _ => {}
            }
            false
        })
    }
}

/// The object that `text` is, or what is wrong with it; `None` for white space.
pub(super) fn object(text: &[u8]) -> Option<Result<Record, String>> {
    let Ok(text) = std::str::from_utf8(text) else {
        return Some(Err(NOT_UTF8.to_owned()));
    };
    // Where files were joined, a byte order mark stands in the middle.
    let text = text.trim().trim_start_matches(BYTE_ORDER_MARK).trim_start();
    if text.is_empty() {
        return None;
    }
    Some(match serde_json::from_str(text) {
        Ok(Value::Object(record)) => Ok(record),
        Ok(other) => Err(format!("it is {}, expected a JSON object", kind(&other))),
        Err(error) => Err(format!("it is not JSON: {error}").replace(" at line 1 column", " at column")),
    })
}
