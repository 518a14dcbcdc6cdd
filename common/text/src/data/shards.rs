//! Text that was tokenised once, kept on disk.
//!
//! A shard's name is a hash of its text file, of how that is cut into documents, and of the tokenizer: a shard that is
//! there is the right one, and nothing but the file's hash is needed to find it. Ids take two bytes where the
//! vocabulary allows, else four, little-endian, behind a header that guards itself by a hash.
//!
//! Shards are read by position instead of through a memory map: a map needs `unsafe`, and the system's page cache
//! serves both alike. A training step reads a few windows, each one system call.

use std::fs::{self, File};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use base::files::FileError;
use base::hash::hex;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use sha2::{Digest, Sha256};

use super::DataError;
use super::records::{ReadOptions, Separator, Texts};

/// The environment variable that names the folder of tokenised text.
pub const CACHE_VARIABLE: &str = "KINDLING_CACHE";

const MAGIC: [u8; 8] = *b"KNDLTOKS";
const VERSION: u32 = 2;
/// Magic, version, bytes an id, tokens, bytes of text, skipped records, key, and the hash of all that.
const HEADER_LEN: usize = 8 + 4 + 4 + 8 + 8 + 8 + 32 + 32;
/// Documents that are encoded at a time: enough for all threads.
const CHUNK: usize = 1024;
/// Bytes of text after which a chunk is full, however few its documents are.
const CHUNK_BYTES: usize = 16 << 20;

/// A text file to be kept as tokens, and all that decides which tokens.
#[derive(Debug, Clone, Copy)]
pub struct ShardSource<'a> {
    /// The file.
    pub path: &'a Path,
    /// SHA-256 of the file.
    pub sha256: &'a str,
    /// Where a `.txt` file is cut into documents.
    pub separator: &'a Separator,
    /// How its records are read.
    pub options: ReadOptions,
    /// The id to put before each document (`<|bos|>`); `None` joins them without a mark.
    pub begin: Option<u32>,
    /// Hash of the tokenizer: another one gives another shard.
    pub tokenizer_sha256: &'a str,
    /// The tokenizer's vocabulary, which decides how wide an id is.
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
    n_bytes: u64,
    n_skipped: u64,
    key: [u8; 32],
}

/// The folder of tokenised text: `KINDLING_CACHE`, else `kindling` in the user's cache folder.
pub fn cache_dir() -> PathBuf {
    match std::env::var_os(CACHE_VARIABLE).filter(|value| !value.is_empty()) {
        Some(dir) => dir.into(),
        None => dirs::cache_dir().unwrap_or_else(std::env::temp_dir).join("kindling"),
    }
}

impl TokenShard {
    /// Opens the shard of `source` in the folder `cache`, writing it first if it is not there.
    ///
    /// `encode` turns documents into ids, in order. A shard is whole or absent: it is written beside and renamed. A
    /// damaged one is written again. `quiet` hides the progress bar, which only a terminal shows anyway.
    ///
    /// # Errors
    /// If the text cannot be read, the folder cannot be written, or `encode` fails.
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
            Ok(shard) if shard.header.key == key => {
                if shard.header.n_skipped > 0 {
                    let text = source.path.display();
                    tracing::warn!("`{text}` was tokenised without its {} bad records", shard.header.n_skipped);
                }
                return Ok(shard);
            }
            Err(DataError::File(FileError::Read { source, .. })) if source.kind() == io::ErrorKind::NotFound => {}
            Err(DataError::File(FileError::Read { path, source })) => return Err(DataError::Cache { path, source }),
            Ok(_) => tracing::warn!("`{}` is of another text and is written again", path.display()),
            Err(error @ DataError::Shard { .. }) => tracing::warn!("{error}"),
            Err(error) => return Err(error),
        }
        fs::create_dir_all(cache).map_err(unwritable(cache))?;
        // The process's number keeps two runs that need the same shard apart; the later rename wins, with equal bytes.
        let beside = path.with_extension(format!("{}.tmp", std::process::id()));
        let written = write(&beside, source, key, encode, quiet);
        let renamed = written.and_then(|()| fs::rename(&beside, &path).map_err(unwritable(&path)));
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

    /// Length of the text in bytes of UTF-8: what bits per byte divide by.
    pub fn n_bytes(&self) -> u64 {
        self.header.n_bytes
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
            .map_err(FileError::read(&self.path))?;
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
        // The name's ending decides how the file is read.
        let name = self.path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
        let ending = name.split_once('.').map_or("", |(_, ending)| ending);
        let separator = String::from(self.separator.clone());
        let reading = format!("{:?} {}", self.options.on_bad_record, self.options.max_record_bytes.bytes());
        for text in [ending, self.sha256, &separator, &reading, self.tokenizer_sha256] {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text);
        }
        hash.update(self.begin.map_or(u64::MAX, u64::from).to_le_bytes());
        hash.update((self.vocab_size as u64).to_le_bytes());
        hash.finalize().into()
    }
}

fn unwritable(path: &Path) -> impl Fn(io::Error) -> DataError {
    move |source| DataError::Cache { path: path.to_owned(), source }
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
    let failed = unwritable(path);
    let id_width = if source.vocab_size <= 1 << 16 { 2 } else { 4 };
    let mut header = Header { id_width, n_tokens: 0, n_bytes: 0, n_skipped: 0, key };
    let mut texts = Texts::open(source.path, source.separator, source.options)?;
    let progress = progress(fs::metadata(source.path).map_or(0, |metadata| metadata.len()), quiet);
    let mut file = BufWriter::new(File::create(path).map_err(&failed)?);
    // The header needs the count of tokens: it is written last.
    file.write_all(&[0; HEADER_LEN]).map_err(&failed)?;
    loop {
        let chunk = next_chunk(&mut texts)?;
        if chunk.is_empty() {
            break;
        }
        let encoded = encode(&chunk).map_err(|error| DataError::Encode(Box::new(error)))?;
        assert_eq!(encoded.len(), chunk.len(), "one list of ids a document");
        let mut bytes = Vec::new();
        for id in encoded.into_iter().flat_map(|ids| source.begin.into_iter().chain(ids)) {
            assert!((id as usize) < source.vocab_size, "id {id} of a vocabulary of {}", source.vocab_size);
            bytes.extend_from_slice(&id.to_le_bytes()[..id_width as usize]);
        }
        header.n_tokens += bytes.len() as u64 / u64::from(id_width);
        header.n_bytes += chunk.iter().map(|document| document.len() as u64).sum::<u64>();
        file.write_all(&bytes).map_err(&failed)?;
        progress.set_position(texts.position());
    }
    header.n_skipped = texts.summary().n_skipped as u64;
    progress.finish_and_clear();
    let mut file = file.into_inner().map_err(|error| failed(error.into_error()))?;
    file.seek(SeekFrom::Start(0)).map_err(&failed)?;
    file.write_all(&header.to_bytes()).map_err(&failed)?;
    file.sync_all().map_err(&failed)
}

/// The documents to encode next; none at the end of the file.
fn next_chunk(texts: &mut Texts) -> Result<Vec<String>, DataError> {
    let mut chunk = Vec::new();
    let mut n_bytes = 0;
    while chunk.len() < CHUNK && n_bytes < CHUNK_BYTES {
        let Some(text) = texts.next().transpose()? else { break };
        n_bytes += text.len();
        chunk.push(text);
    }
    Ok(chunk)
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
        for count in [self.n_tokens, self.n_bytes, self.n_skipped] {
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
        let [n_tokens, n_bytes, n_skipped] = std::array::from_fn(|_| u64::from_le_bytes(take(&mut rest)));
        let header = Self { id_width, n_tokens, n_bytes, n_skipped, key: take(&mut rest) };
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
    use crate::data::records::OnBadRecord;

    /// A folder with the text of the tests and their shards.
    struct Scratch {
        dir: tempfile::TempDir,
        text: PathBuf,
    }

    impl Scratch {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let text = dir.path().join("a.jsonl");
            fs::write(&text, "{\"text\": \"abc\"}\n{}\n{\"text\": \"é\"}\n").unwrap();
            Self { dir, text }
        }

        fn source(&self) -> ShardSource<'_> {
            ShardSource {
                path: &self.text,
                sha256: "of the file",
                separator: &Separator::BlankLine,
                options: OnBadRecord::Skip.into(),
                begin: Some(256),
                tokenizer_sha256: "t",
                vocab_size: 300,
            }
        }

        fn cache(&self) -> PathBuf {
            self.dir.path().join("cache")
        }

        fn shards(&self) -> Vec<PathBuf> {
            fs::read_dir(self.cache()).unwrap().map(|entry| entry.unwrap().path()).collect()
        }
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
        let scratch = Scratch::new();
        let shard = TokenShard::open_or_encode(&scratch.cache(), &scratch.source(), bytes, true).unwrap();
        assert_eq!(all(&shard), [256, 97, 98, 99, 256, 0xc3, 0xa9]);
        assert_eq!(shard.window(2, 3).unwrap(), [98, 99, 256]);
        assert_eq!((shard.n_bytes(), shard.header.n_skipped, shard.header.id_width), (5, 1, 2));

        let joined = ShardSource { begin: None, vocab_size: 70_000, ..scratch.source() };
        let shard = TokenShard::open_or_encode(&scratch.cache(), &joined, bytes, true).unwrap();
        assert_eq!(all(&shard), [97, 98, 99, 0xc3, 0xa9]);
        assert_eq!(shard.header.id_width, 4);
        assert_eq!(scratch.shards().len(), 2, "nothing is left beside");
    }

    #[test]
    fn a_text_is_encoded_once_and_another_text_or_tokenizer_anew() {
        let scratch = Scratch::new();
        let n_calls = Cell::new(0);
        let open = |source: &ShardSource<'_>| {
            let counted = |documents: &[String]| {
                n_calls.set(n_calls.get() + 1);
                bytes(documents)
            };
            TokenShard::open_or_encode(&scratch.cache(), source, counted, true).unwrap().header.key
        };
        let first = open(&scratch.source());
        // The text itself is not needed again: its hash is enough.
        fs::write(&scratch.text, "not even JSON").unwrap();
        assert_eq!((open(&scratch.source()), n_calls.get()), (first, 1));

        fs::write(&scratch.text, "{\"text\": \"abc\"}").unwrap();
        let one_a_line = Separator::Line;
        for other in [
            ShardSource { tokenizer_sha256: "u", ..scratch.source() },
            ShardSource { sha256: "of another file", ..scratch.source() },
            ShardSource { separator: &one_a_line, ..scratch.source() },
            ShardSource { options: OnBadRecord::Fail.into(), ..scratch.source() },
        ] {
            assert_ne!(open(&other), first);
        }
        assert_eq!(n_calls.get(), 5);
    }

    #[test]
    fn damaged_shards_are_noticed_and_written_again() {
        let scratch = Scratch::new();
        let open = || TokenShard::open_or_encode(&scratch.cache(), &scratch.source(), bytes, true).unwrap();
        open();
        let path = scratch.shards().remove(0);
        let whole = fs::read(&path).unwrap();
        let mut flipped = whole.clone();
        flipped[17] ^= 1;
        for damaged in [&whole[..whole.len() - 1], &whole[..50], &[], b"something else".repeat(20).as_slice(), &flipped]
        {
            fs::write(&path, damaged).unwrap();
            let error = TokenShard::open(&path).unwrap_err();
            assert!(matches!(error, DataError::Shard { .. }), "{error}");
            assert!(error.to_string().contains("\nhint: "));
            assert_eq!(all(&open()).len(), 7);
            assert_eq!(fs::read(&path).unwrap(), whole, "the same bytes");
        }
    }

    #[test]
    fn a_failed_encoding_leaves_nothing() {
        let scratch = Scratch::new();
        let fails = |_: &[String]| Err(io::Error::other("no"));
        let error = TokenShard::open_or_encode(&scratch.cache(), &scratch.source(), fails, true).unwrap_err();
        assert!(matches!(error, DataError::Encode(_)));
        assert!(scratch.shards().is_empty());
    }

    #[test]
    fn a_cache_that_cannot_be_written_names_the_variable() {
        let scratch = Scratch::new();
        let cache = scratch.text.join("below-a-file");
        let error = TokenShard::open_or_encode(&cache, &scratch.source(), bytes, true).unwrap_err().to_string();
        assert!(error.contains("below-a-file"), "{error}");
        assert!(error.ends_with("`\nhint: set `KINDLING_CACHE` to a folder that can be written"), "{error}");
    }
}
