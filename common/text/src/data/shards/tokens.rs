//! Tokens read from disk by their position.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use base::files::FileError;

use super::header::{HEADER_LEN, Header};
use crate::data::DataError;

/// Files that are kept open at once: a folder may have more of them than a process may open.
pub(super) const MAX_OPEN: usize = 128;

/// A part of a text file, as a file of token ids whose header and length are those of a whole one.
#[derive(Debug, Clone)]
pub struct Part {
    path: PathBuf,
    header: Header,
}

/// The tokens of any number of parts, one after the other.
#[derive(Debug)]
pub struct Tokens {
    parts: Vec<Part>,
    /// Where each part ends in the whole.
    ends: Vec<usize>,
    n_bytes: u64,
    /// The files that were read last, the latest at the end.
    pub(super) open: Mutex<VecDeque<(usize, Arc<File>)>>,
}

impl Part {
    /// Opens a part, checking its header and length.
    ///
    /// # Errors
    /// If it cannot be read, is cut short or is no file of tokens.
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let file = File::open(path).map_err(FileError::read(path))?;
        let length = file.metadata().map_err(FileError::read(path))?.len();
        let broken = |reason: String| DataError::Shard { path: path.to_owned(), reason };
        if length < HEADER_LEN as u64 {
            return Err(broken(format!("it has {length} bytes, its header alone {HEADER_LEN}")));
        }
        let mut bytes = [0; HEADER_LEN];
        read_exact_at(&file, &mut bytes, 0).map_err(FileError::read(path))?;
        let header = Header::from_bytes(&bytes).map_err(|reason| broken(reason.to_owned()))?;
        let expected = header.n_tokens.saturating_mul(u64::from(header.id_width)).saturating_add(HEADER_LEN as u64);
        if length != expected {
            return Err(broken(format!("it has {length} bytes, expected {expected}")));
        }
        Ok(Self { path: path.to_owned(), header })
    }

    /// Whether it is part `index` of the text and settings with this key.
    pub(super) fn is(&self, key: &[u8; 32], index: u64) -> bool {
        self.header.key == *key && self.header.index == index
    }

    /// Whether the text file ends with it, and how many bad records were left out of that.
    pub(super) const fn end(&self) -> (bool, u64) {
        (self.header.is_last, self.header.n_skipped)
    }
}

impl Tokens {
    /// The tokens of `parts` in this order.
    pub fn new(parts: Vec<Part>) -> Self {
        let ends = parts.iter().scan(0, |end, part| {
            *end += part.header.n_tokens as usize;
            Some(*end)
        });
        let (ends, n_bytes) = (ends.collect(), parts.iter().map(|part| part.header.n_bytes).sum());
        Self { parts, ends, n_bytes, open: Mutex::default() }
    }

    /// Number of token ids.
    pub fn len(&self) -> usize {
        self.ends.last().copied().unwrap_or_default()
    }

    /// Whether there is no id.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Length of the text in bytes of UTF-8: what bits per byte divide by.
    pub fn n_bytes(&self) -> u64 {
        self.n_bytes
    }

    /// The ids at `range`.
    ///
    /// # Errors
    /// If a file cannot be read.
    ///
    /// # Panics
    /// If the range reaches beyond the end.
    pub fn read(&self, range: Range<usize>) -> Result<Vec<u32>, DataError> {
        assert!(range.end <= self.len(), "tokens {range:?} of {}", self.len());
        let mut ids = Vec::with_capacity(range.len());
        let mut at = range.start;
        let mut i = self.ends.partition_point(|&end| end <= at);
        while at < range.end {
            let start = if i == 0 { 0 } else { self.ends[i - 1] };
            let end = range.end.min(self.ends[i]);
            self.read_part(i, at - start, end - at, &mut ids)?;
            (at, i) = (end, i + 1);
        }
        Ok(ids)
    }

    /// Appends `len` ids of part `i` from its position `start` on.
    fn read_part(&self, i: usize, start: usize, len: usize, ids: &mut Vec<u32>) -> Result<(), DataError> {
        let Part { path, header } = &self.parts[i];
        let width = header.id_width as usize;
        let mut bytes = vec![0; len * width];
        let file = self.file(i)?;
        read_exact_at(&file, &mut bytes, (HEADER_LEN + start * width) as u64).map_err(FileError::read(path))?;
        if width == 2 {
            ids.extend(bytes.as_chunks().0.iter().map(|id| u32::from(u16::from_le_bytes(*id))));
        } else {
            ids.extend(bytes.as_chunks().0.iter().map(|id| u32::from_le_bytes(*id)));
        }
        Ok(())
    }

    /// The file of part `i`, opened unless it is still open.
    fn file(&self, i: usize) -> Result<Arc<File>, DataError> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = match open.iter().position(|(index, _)| *index == i) {
            Some(place) => open.remove(place).expect("the place was just found"),
            None => (i, Arc::new(File::open(&self.parts[i].path).map_err(FileError::read(&self.parts[i].path))?)),
        };
        let file = Arc::clone(&entry.1);
        open.push_back(entry);
        if open.len() > MAX_OPEN {
            open.pop_front();
        }
        Ok(file)
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, bytes, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut bytes: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        let n = std::os::windows::fs::FileExt::seek_read(file, bytes, offset)?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes = &mut bytes[n..];
        offset += n as u64;
    }
    Ok(())
}
