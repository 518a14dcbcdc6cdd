//! The bytes of one file, unpacked and cut into pieces of limited length.

use std::cell::Cell;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use base::files::FileError;
use flate2::read::MultiGzDecoder;

use super::ReadOptions;
use super::tally::Expansion;
use crate::data::DataError;

/// The bytes of one file, read from front to back.
pub(super) struct Source {
    path: PathBuf,
    reader: Box<dyn BufRead>,
    max_piece: usize,
    /// Bytes of the file itself that are read, packed or not.
    n_read: Rc<Cell<u64>>,
    expansion: Expansion,
    line: usize,
}

/// How a piece ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// With its mark, which is part of it.
    Mark,
    /// With the file.
    End,
    /// At the limit; the rest of it is still to be read.
    TooLong,
    /// There was no byte left.
    Nothing,
}

/// Counts what is read through it.
struct Counted {
    file: File,
    n_read: Rc<Cell<u64>>,
}

impl Read for Counted {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.file.read(buffer)?;
        self.n_read.set(self.n_read.get() + n as u64);
        Ok(n)
    }
}

impl Source {
    /// Opens `path`, unpacking it if its name ends in `.gz`.
    pub(super) fn open(path: &Path, options: ReadOptions) -> Result<Self, DataError> {
        let (file, len) = open_file(path)?;
        let n_read = Rc::new(Cell::new(0));
        let file = Counted { file, n_read: Rc::clone(&n_read) };
        let is_packed = path.extension().is_some_and(|ending| ending.eq_ignore_ascii_case("gz"));
        Ok(Self {
            path: path.to_owned(),
            reader: if is_packed {
                Box::new(BufReader::new(MultiGzDecoder::new(file)))
            } else {
                Box::new(BufReader::new(file))
            },
            max_piece: usize::try_from(options.max_record_bytes.bytes()).unwrap_or(usize::MAX - 1),
            n_read,
            expansion: Expansion::new(path, len, options),
            line: 1,
        })
    }

    /// The line that the next byte stands in, from 1.
    pub(super) fn line(&self) -> usize {
        self.line
    }

    /// How many bytes of the file are read so far.
    pub(super) fn position(&self) -> u64 {
        self.n_read.get()
    }

    /// Reads up to and with `mark` into `piece`, which is emptied first; to the end of the file with an empty mark.
    pub(super) fn next(&mut self, mark: &[u8], piece: &mut Vec<u8>) -> Result<Found, DataError> {
        piece.clear();
        loop {
            let found = self.append(piece, |bytes| last_of(mark, bytes))?;
            if found != Found::Mark || piece.ends_with(mark) {
                return Ok(found);
            }
        }
    }

    /// Reads over the rest of a piece that is too long, up to and with `mark`.
    pub(super) fn skip(&mut self, mark: &[u8], piece: &mut Vec<u8>) -> Result<(), DataError> {
        loop {
            // The mark may have begun before the limit.
            piece.drain(..piece.len().saturating_sub(mark.len().saturating_sub(1)));
            match self.append(piece, |bytes| last_of(mark, bytes))? {
                Found::Mark if !piece.ends_with(mark) => {}
                Found::TooLong => {}
                _ => return Ok(()),
            }
        }
    }

    /// The next byte that is neither white space nor part of a byte order mark; it stays unread.
    pub(super) fn peek(&mut self) -> Result<Option<u8>, DataError> {
        loop {
            let bytes = fill(&mut *self.reader, &self.path)?;
            if bytes.is_empty() {
                return Ok(None);
            }
            let is_blank = |byte: &u8| byte.is_ascii_whitespace() || super::BYTE_ORDER_MARK.as_bytes().contains(byte);
            let n = bytes.iter().take_while(|byte| is_blank(byte)).count();
            let found = bytes.get(n).copied();
            self.consume(n, None)?;
            if found.is_some() {
                return Ok(found);
            }
        }
    }

    /// Reads into `piece` up to and with the byte whose place `end` gives, if it is among those that `end` is shown.
    pub(super) fn append(
        &mut self,
        piece: &mut Vec<u8>,
        mut end: impl FnMut(&[u8]) -> Option<usize>,
    ) -> Result<Found, DataError> {
        loop {
            let bytes = fill(&mut *self.reader, &self.path)?;
            if bytes.is_empty() {
                return Ok(if piece.is_empty() { Found::Nothing } else { Found::End });
            }
            // One byte more than the limit: the mark, or the sign that the piece is too long.
            let room = (self.max_piece + 1).saturating_sub(piece.len()).max(1);
            let bytes = &bytes[..bytes.len().min(room)];
            let at = end(bytes);
            let n = at.map_or(bytes.len(), |at| at + 1);
            self.consume(n, Some(&mut *piece))?;
            if at.is_some() {
                return Ok(Found::Mark);
            }
            if piece.len() > self.max_piece {
                return Ok(Found::TooLong);
            }
        }
    }

    /// Takes `n` bytes of the buffer, which are moved to `piece`.
    fn consume(&mut self, n: usize, piece: Option<&mut Vec<u8>>) -> Result<(), DataError> {
        let bytes = &fill(&mut *self.reader, &self.path)?[..n];
        self.line += memchr::memchr_iter(b'\n', bytes).count();
        if let Some(piece) = piece {
            piece.extend_from_slice(bytes);
        }
        self.reader.consume(n);
        self.expansion.add(n as u64)
    }
}

/// Opens a file, and says how long it is.
pub(super) fn open_file(path: &Path) -> Result<(File, u64), DataError> {
    let file = File::open(path).map_err(FileError::read(path))?;
    let metadata = file.metadata().map_err(FileError::read(path))?;
    if metadata.is_file() { Ok((file, metadata.len())) } else { Err(DataError::NotAFile(path.to_owned())) }
}

/// The buffer, filled if it is empty; empty at the end of the file.
fn fill<'a>(reader: &'a mut dyn BufRead, path: &Path) -> Result<&'a [u8], DataError> {
    while let Err(error) = reader.fill_buf() {
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(FileError::read(path)(error).into());
        }
    }
    // The buffer's content is given out without another read.
    reader.fill_buf().map_err(|error| FileError::read(path)(error).into())
}

/// Where in `bytes` the last byte of `mark` stands first.
fn last_of(mark: &[u8], bytes: &[u8]) -> Option<usize> {
    memchr::memchr(*mark.last()?, bytes)
}
