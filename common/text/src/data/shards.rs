//! Text that was tokenised once, kept on disk.
//!
//! A shard's name is a hash of its documents and of the tokenizer, so a shard that is there is the right one. Ids take
//! two bytes where the vocabulary allows, else four, little-endian, behind a header that guards itself by a hash.
//!
//! Shards are read by position instead of through a memory map: a map needs `unsafe`, and the system's page cache
//! serves both alike. A training step reads a few windows, each one system call.

use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use sha2::{Digest, Sha256};

use super::DataError;
use base::hash::hex;

const MAGIC: [u8; 8] = *b"KNDLTOKS";
const VERSION: u32 = 1;
/// Magic, version, bytes an id, tokens, documents, bytes of text, key, and the hash of all that.
const HEADER_LEN: usize = 8 + 4 + 4 + 8 + 8 + 8 + 32 + 32;
/// Documents that are encoded at a time: enough for all threads, and a text of any length in bounded memory.
const CHUNK: usize = 1024;

/// Documents to be kept as tokens.
#[derive(Debug, Clone, Copy)]
pub struct ShardSource<'a> {
    /// The texts.
    pub documents: &'a [String],
    /// The id to put before each document (`<|bos|>`); `None` joins them without a mark.
    pub begin: Option<u32>,
    /// Hash of the tokenizer: another one gives another shard.
    pub tokenizer_sha256: &'a str,
    /// The tokenizer's vocabulary, which says how wide an id is.
    pub vocab_size: usize,
}

/// One stream of token ids on disk.
#[derive(Debug)]
pub struct TokenShard {
    file: File,
    path: PathBuf,
    header: Header,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Header {
    id_width: u32,
    n_tokens: u64,
    n_documents: u64,
    n_bytes: u64,
    key: [u8; 32],
}

impl TokenShard {
    /// Opens the shard of `source` in the folder `cache`, writing it first if it is not there.
    ///
    /// `encode` turns documents into ids, in order. A shard is whole or absent: it is written beside and renamed. A
    /// damaged one is written again. `quiet` hides the progress bar, which only a terminal shows anyway.
    ///
    /// # Errors
    /// If the folder cannot be written or read, or `encode` fails.
    pub fn open_or_encode<E>(
        cache: &Path,
        source: &ShardSource<'_>,
        encode: impl Fn(&[String]) -> Result<Vec<Vec<u32>>, E>,
        quiet: bool,
    ) -> Result<Self, DataError>
    where
        E: std::error::Error + Send + Sync + 'static,
    {
        let key = source.key();
        let path = cache.join(format!("{}.tokens", hex(&key[..16])));
        match Self::open(&path) {
            Ok(shard) if shard.header.key == key => return Ok(shard),
            Err(DataError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            Ok(_) => tracing::warn!("`{}` is of another text and is written again", path.display()),
            Err(error @ DataError::Shard { .. }) => tracing::warn!("{error}"),
            Err(error) => return Err(error),
        }
        fs::create_dir_all(cache).map_err(|error| DataError::Write { path: cache.to_owned(), source: error })?;
        // The process's number keeps two runs that need the same shard apart; the later rename wins, with equal bytes.
        let beside = path.with_extension(format!("{}.tmp", std::process::id()));
        let written = write(&beside, source, key, encode, quiet);
        let renamed = written.and_then(|()| {
            fs::rename(&beside, &path).map_err(|error| DataError::Write { path: path.clone(), source: error })
        });
        if renamed.is_err() {
            // The error that matters is the first one.
            let _ = fs::remove_file(&beside);
        }
        renamed?;
        Self::open(&path)
    }

    /// Opens a shard, checking its header and length.
    ///
    /// # Errors
    /// If it cannot be read, is cut short or is no shard.
    pub fn open(path: &Path) -> Result<Self, DataError> {
        let read = |source| DataError::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(read)?;
        let length = file.metadata().map_err(read)?.len();
        let broken = |reason: String| DataError::Shard { path: path.to_owned(), reason };
        if length < HEADER_LEN as u64 {
            return Err(broken(format!("it has {length} bytes, its header alone {HEADER_LEN}")));
        }
        let mut bytes = [0; HEADER_LEN];
        read_exact_at(&file, &mut bytes, 0).map_err(read)?;
        let header = Header::from_bytes(&bytes).map_err(|reason| broken(reason.to_owned()))?;
        let expected = HEADER_LEN as u64 + header.n_tokens * u64::from(header.id_width);
        if length != expected {
            return Err(broken(format!("it has {length} bytes, expected {expected}")));
        }
        Ok(Self { file, path: path.to_owned(), header })
    }

    /// Number of token ids.
    pub fn len(&self) -> usize {
        self.header.n_tokens as usize
    }

    /// Whether there is no id.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of documents.
    pub fn n_documents(&self) -> usize {
        self.header.n_documents as usize
    }

    /// Length of the text in bytes of UTF-8: what bits per byte divide by.
    pub fn n_bytes(&self) -> u64 {
        self.header.n_bytes
    }

    /// SHA-256 of text and tokenizer, in hexadecimal: the data's name in a manifest.
    pub fn sha256(&self) -> String {
        hex(&self.header.key)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `len` ids from `start` on.
    ///
    /// # Errors
    /// If the file cannot be read.
    ///
    /// # Panics
    /// If the window reaches beyond the end.
    pub fn window(&self, start: usize, len: usize) -> Result<Vec<u32>, DataError> {
        assert!(start + len <= self.len(), "window {start}..{} of {} tokens", start + len, self.len());
        let width = self.header.id_width as usize;
        let mut bytes = vec![0; len * width];
        read_exact_at(&self.file, &mut bytes, (HEADER_LEN + start * width) as u64)
            .map_err(|source| DataError::Read { path: self.path.clone(), source })?;
        Ok(if width == 2 {
            bytes.as_chunks().0.iter().map(|id| u32::from(u16::from_le_bytes(*id))).collect()
        } else {
            bytes.as_chunks().0.iter().map(|id| u32::from_le_bytes(*id)).collect()
        })
    }
}

impl ShardSource<'_> {
    /// Hash of everything that decides the shard's content. Lengths stand before texts, so no two sources run together.
    fn key(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(MAGIC);
        hash.update(VERSION.to_le_bytes());
        hash.update((self.tokenizer_sha256.len() as u64).to_le_bytes());
        hash.update(self.tokenizer_sha256);
        hash.update(self.begin.map_or(u64::MAX, u64::from).to_le_bytes());
        hash.update((self.vocab_size as u64).to_le_bytes());
        for document in self.documents {
            hash.update((document.len() as u64).to_le_bytes());
            hash.update(document);
        }
        hash.finalize().into()
    }
}

fn write<E>(
    path: &Path,
    source: &ShardSource<'_>,
    key: [u8; 32],
    encode: impl Fn(&[String]) -> Result<Vec<Vec<u32>>, E>,
    quiet: bool,
) -> Result<(), DataError>
where
    E: std::error::Error + Send + Sync + 'static,
{
    let failed = |error| DataError::Write { path: path.to_owned(), source: error };
    let mut header = Header {
        id_width: if source.vocab_size <= 1 << 16 { 2 } else { 4 },
        n_tokens: 0,
        n_documents: source.documents.len() as u64,
        n_bytes: source.documents.iter().map(|document| document.len() as u64).sum(),
        key,
    };
    let progress = progress(header.n_bytes, quiet);
    let mut file = BufWriter::new(File::create(path).map_err(failed)?);
    // The header needs the count of tokens: it is written last.
    file.write_all(&[0; HEADER_LEN]).map_err(failed)?;
    for chunk in source.documents.chunks(CHUNK) {
        let encoded = encode(chunk).map_err(|error| DataError::Encode(Box::new(error)))?;
        assert_eq!(encoded.len(), chunk.len(), "one list of ids a document");
        let mut bytes = Vec::new();
        for id in encoded.into_iter().flat_map(|ids| source.begin.into_iter().chain(ids)) {
            assert!((id as usize) < source.vocab_size, "id {id} of a vocabulary of {}", source.vocab_size);
            bytes.extend_from_slice(&id.to_le_bytes()[..header.id_width as usize]);
        }
        header.n_tokens += bytes.len() as u64 / u64::from(header.id_width);
        file.write_all(&bytes).map_err(failed)?;
        progress.inc(chunk.iter().map(|document| document.len() as u64).sum());
    }
    progress.finish_and_clear();
    let mut file = file.into_inner().map_err(|error| failed(error.into_error()))?;
    file.seek(SeekFrom::Start(0)).map_err(failed)?;
    file.write_all(&header.to_bytes()).map_err(failed)?;
    file.sync_all().map_err(failed)
}

fn progress(n_bytes: u64, quiet: bool) -> ProgressBar {
    if quiet {
        return ProgressBar::hidden();
    }
    let progress = ProgressBar::with_draw_target(Some(n_bytes), ProgressDrawTarget::stderr());
    let style = ProgressStyle::with_template("tokens {wide_bar} {bytes}/{total_bytes}, {eta} left");
    if let Ok(style) = style {
        progress.set_style(style);
    }
    progress
}

impl Header {
    fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = Vec::with_capacity(HEADER_LEN);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(self.id_width.to_le_bytes());
        for count in [self.n_tokens, self.n_documents, self.n_bytes] {
            bytes.extend(count.to_le_bytes());
        }
        bytes.extend(self.key);
        let hash = Sha256::digest(&bytes);
        bytes.extend_from_slice(&hash);
        bytes.try_into().expect("the fields fill the header")
    }

    fn from_bytes(bytes: &[u8; HEADER_LEN]) -> Result<Self, &'static str> {
        let (guarded, hash) = bytes.split_at(HEADER_LEN - 32);
        let mut rest = guarded;
        if take::<8>(&mut rest) != MAGIC {
            return Err("it does not begin as one");
        }
        if Sha256::digest(guarded).as_slice() != hash {
            return Err("its header is damaged");
        }
        if u32::from_le_bytes(take(&mut rest)) != VERSION {
            return Err("it is of another version");
        }
        let id_width = u32::from_le_bytes(take(&mut rest));
        let [n_tokens, n_documents, n_bytes] = std::array::from_fn(|_| u64::from_le_bytes(take(&mut rest)));
        let header = Self { id_width, n_tokens, n_documents, n_bytes, key: take(&mut rest) };
        if matches!(id_width, 2 | 4) { Ok(header) } else { Err("its ids have neither two bytes nor four") }
    }
}

fn take<const N: usize>(bytes: &mut &[u8]) -> [u8; N] {
    let (first, rest) = bytes.split_first_chunk().expect("a header's fields are no longer than the header");
    *bytes = rest;
    *first
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

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::convert::Infallible;

    use super::*;

    fn documents() -> Vec<String> {
        ["abc", "", "é"].map(str::to_owned).to_vec()
    }

    fn source(documents: &[String]) -> ShardSource<'_> {
        ShardSource { documents, begin: Some(256), tokenizer_sha256: "t", vocab_size: 300 }
    }

    #[expect(clippy::unnecessary_wraps, reason = "the shape that `open_or_encode` takes")]
    fn bytes(documents: &[String]) -> Result<Vec<Vec<u32>>, Infallible> {
        Ok(documents.iter().map(|document| document.bytes().map(u32::from).collect()).collect())
    }

    fn all(shard: &TokenShard) -> Vec<u32> {
        shard.window(0, shard.len()).unwrap()
    }

    #[test]
    fn a_shard_holds_each_document_behind_its_mark() {
        let dir = tempfile::tempdir().unwrap();
        let documents = documents();
        let shard = TokenShard::open_or_encode(dir.path(), &source(&documents), bytes, true).unwrap();
        assert_eq!(all(&shard), [256, 97, 98, 99, 256, 256, 0xc3, 0xa9]);
        assert_eq!(shard.window(2, 3).unwrap(), [98, 99, 256]);
        assert_eq!((shard.n_bytes(), shard.n_documents(), shard.header.id_width), (5, 3, 2));

        let joined = ShardSource { begin: None, vocab_size: 70_000, ..source(&documents) };
        let shard = TokenShard::open_or_encode(dir.path(), &joined, bytes, true).unwrap();
        assert_eq!(all(&shard), [97, 98, 99, 0xc3, 0xa9]);
        assert_eq!(shard.header.id_width, 4);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "nothing is left beside");
    }

    #[test]
    fn a_text_is_encoded_once_and_another_text_or_tokenizer_anew() {
        let dir = tempfile::tempdir().unwrap();
        let n_calls = Cell::new(0);
        let open = |source: &ShardSource<'_>| {
            let counted = |documents: &[String]| {
                n_calls.set(n_calls.get() + 1);
                bytes(documents)
            };
            TokenShard::open_or_encode(dir.path(), source, counted, true).unwrap().sha256()
        };
        let texts = documents();
        let first = open(&source(&texts));
        assert_eq!((open(&source(&texts)), n_calls.get()), (first.clone(), 1));
        assert_ne!(open(&ShardSource { tokenizer_sha256: "u", ..source(&texts) }), first);
        let joined = ["abcé".to_owned()];
        assert_ne!(open(&source(&joined)), first);
        assert_eq!(n_calls.get(), 3);
    }

    #[test]
    fn damaged_shards_are_noticed_and_written_again() {
        let dir = tempfile::tempdir().unwrap();
        let documents = documents();
        let open = || TokenShard::open_or_encode(dir.path(), &source(&documents), bytes, true).unwrap();
        let path = open().path().to_owned();
        let whole = fs::read(&path).unwrap();
        let mut flipped = whole.clone();
        flipped[17] ^= 1;
        for damaged in [&whole[..whole.len() - 1], &whole[..50], &[], b"something else".repeat(20).as_slice(), &flipped]
        {
            fs::write(&path, damaged).unwrap();
            let error = TokenShard::open(&path).unwrap_err();
            assert!(matches!(error, DataError::Shard { .. }), "{error}");
            assert!(error.to_string().contains("\nhint: "));
            assert_eq!(all(&open()).len(), 8);
            assert_eq!(fs::read(&path).unwrap(), whole, "the same bytes");
        }
    }

    #[test]
    fn a_failed_encoding_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let fails = |_: &[String]| Err(io::Error::other("no"));
        let error = TokenShard::open_or_encode(dir.path(), &source(&documents()), fails, true).unwrap_err();
        assert!(matches!(error, DataError::Encode(_)));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
