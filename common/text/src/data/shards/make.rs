//! Text to parts.

use std::fs::{self, File};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use super::header::{HEADER_LEN, Header};
use super::{Cache, ShardSource, UNFINISHED, unwritable};
use crate::data::records::Texts;
use crate::data::{DataError, Stamp};

/// Documents that are encoded at a time: enough for all threads.
const CHUNK: usize = 1024;
/// Bytes of text after which a chunk is full, however few its documents are.
const CHUNK_BYTES: u64 = 4 << 20;

/// A text file on its way into a cache, part by part.
///
/// Where a part ends follows from the text alone, so that a run which makes some of the parts reads over the others.
pub struct Making<'a> {
    cache: &'a Cache,
    source: &'a ShardSource<'a>,
    key: [u8; 32],
    texts: Texts,
    /// The document to come: whether there is one decides which part is the last.
    next: Option<String>,
    /// The part that it begins.
    index: u64,
}

/// The documents of one part that are encoded together.
struct Chunk {
    documents: Vec<String>,
    n_bytes: u64,
    /// Whether the part ends with it.
    is_end: bool,
}

impl<'a> Making<'a> {
    /// Begins with the first part of `source`.
    ///
    /// # Errors
    /// If the text cannot be read.
    pub fn new(cache: &'a Cache, source: &'a ShardSource<'a>) -> Result<Self, DataError> {
        let mut texts = Texts::open(source.path, source.separator, source.options)?;
        let next = texts.next().transpose()?;
        Ok(Self { cache, source, key: cache.key(source), texts, next, index: 0 })
    }

    /// The number of the part to come, from 0; `None` after the last.
    pub fn index(&self) -> Option<u64> {
        self.next.as_ref().map(|_| self.index)
    }

    /// Bytes of the text file that are read so far.
    pub fn position(&self) -> u64 {
        self.texts.position()
    }

    /// Reads over the next part.
    ///
    /// # Errors
    /// If the text cannot be read, and as `watch`, which is asked now and then.
    pub fn skip(&mut self, mut watch: impl FnMut(&Self) -> Result<(), DataError>) -> Result<(), DataError> {
        let mut n_bytes = 0;
        loop {
            let chunk = self.chunk(n_bytes)?;
            n_bytes += chunk.n_bytes;
            watch(self)?;
            if chunk.is_end {
                self.index += 1;
                return Ok(());
            }
        }
    }

    /// Whether the next part is there, whole.
    ///
    /// # Errors
    /// If the cache cannot be read.
    pub fn is_there(&self) -> Result<bool, DataError> {
        Ok(self.cache.find_part(&self.key, self.index)?.is_ok())
    }

    /// Writes the next part, and says how many bytes of text it holds.
    ///
    /// `encode` turns documents into ids, in order. A part is whole or absent: it is written beside and renamed. `watch` is
    /// asked before each chunk; its error ends the work.
    ///
    /// # Errors
    /// If the text cannot be read or has changed, the folder cannot be written, or `encode` or `watch` fails.
    pub fn make<E>(
        &mut self,
        encode: impl Fn(&[String]) -> Result<Vec<Vec<u32>>, E>,
        watch: impl FnMut(&Self) -> Result<(), DataError>,
    ) -> Result<u64, DataError>
    where
        E: std::error::Error + Send + Sync + 'static,
    {
        let path = self.cache.path(&self.key, self.index);
        // Two runs may need the same part at once, on two machines too: the later rename wins, with equal bytes.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let beside = path.with_extension(format!("{}-{now:x}.{UNFINISHED}", std::process::id()));
        let written = self.write(&beside, encode, watch);
        let renamed = written.and_then(|n_bytes| {
            fs::rename(&beside, &path).map_err(unwritable(&path))?;
            Ok(n_bytes)
        });
        if renamed.is_err() {
            // The error that matters is the first one.
            let _ = fs::remove_file(&beside);
        }
        let n_bytes = renamed?;
        self.index += 1;
        Ok(n_bytes)
    }

    fn write<E>(
        &mut self,
        path: &Path,
        encode: impl Fn(&[String]) -> Result<Vec<Vec<u32>>, E>,
        mut watch: impl FnMut(&Self) -> Result<(), DataError>,
    ) -> Result<u64, DataError>
    where
        E: std::error::Error + Send + Sync + 'static,
    {
        let failed = unwritable(path);
        let ShardSource { begin, vocab_size, .. } = *self.source;
        let id_width: u32 = if vocab_size <= 1 << 16 { 2 } else { 4 };
        let mut file = BufWriter::new(File::create(path).map_err(&failed)?);
        // The header needs the count of tokens: it is written last.
        file.write_all(&[0; HEADER_LEN]).map_err(&failed)?;
        let (mut n_tokens, mut n_bytes) = (0, 0);
        loop {
            watch(self)?;
            let chunk = self.chunk(n_bytes)?;
            let encoded = encode(&chunk.documents).map_err(|error| DataError::Encode(Box::new(error)))?;
            assert_eq!(encoded.len(), chunk.documents.len(), "one list of ids a document");
            let mut bytes = Vec::new();
            for id in encoded.into_iter().flat_map(|ids| begin.into_iter().chain(ids)) {
                assert!((id as usize) < vocab_size, "id {id} of a vocabulary of {vocab_size}");
                bytes.extend_from_slice(&id.to_le_bytes()[..id_width as usize]);
            }
            n_tokens += bytes.len() as u64 / u64::from(id_width);
            n_bytes += chunk.n_bytes;
            file.write_all(&bytes).map_err(&failed)?;
            if chunk.is_end {
                break;
            }
        }
        let n_skipped = self.texts.summary().n_skipped as u64;
        let is_last = self.next.is_none();
        let header = Header { id_width, n_tokens, n_bytes, index: self.index, is_last, n_skipped, key: self.key };
        let mut file = file.into_inner().map_err(|error| failed(error.into_error()))?;
        file.seek(SeekFrom::Start(0)).map_err(&failed)?;
        file.write_all(&header.to_bytes()).map_err(&failed)?;
        file.sync_all().map_err(&failed)?;
        if Stamp::of(self.source.path)? != self.source.stamp {
            return Err(DataError::Changed(self.source.path.to_owned()));
        }
        Ok(n_bytes)
    }

    /// The documents that come next in a part that has `n_before` bytes of text already.
    fn chunk(&mut self, n_before: u64) -> Result<Chunk, DataError> {
        let mut chunk = Chunk { documents: Vec::new(), n_bytes: 0, is_end: false };
        while chunk.documents.len() < CHUNK && chunk.n_bytes < CHUNK_BYTES && !chunk.is_end {
            let Some(document) = self.next.take() else { break };
            chunk.n_bytes += document.len() as u64;
            chunk.documents.push(document);
            self.next = self.texts.next().transpose()?;
            chunk.is_end = self.next.is_none() || n_before + chunk.n_bytes >= self.cache.part_bytes;
        }
        Ok(chunk)
    }
}
