//! Text that was tokenised once, kept on disk.
//!
//! A text file becomes one part for every 64 MiB of its text, each a file of its own: a run that is killed loses the part
//! that it was at, and several processes can each make some of them. A part's name is a hash of its text file, of how
//! that is cut into documents, and of the tokenizer: a part that is there is the right one, and nothing but the file's
//! hash is needed to find it. Ids take two bytes where the vocabulary allows, else four, little-endian, behind a header
//! that guards itself by a hash.
//!
//! Tokens are read by position instead of through a memory map: a map needs `unsafe`, and the system's page cache
//! serves both alike. A training step reads a few windows, each one system call. Neither writing nor reading takes memory
//! that grows with the text.

mod header;
mod make;
mod tokens;

#[cfg(test)]
mod tests;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use base::files::FileError;
use base::hash::hex;
use sha2::{Digest, Sha256};

use super::records::{ReadOptions, Separator};
use super::{DataError, Stamp};
use header::{MAGIC, VERSION};
pub use make::Making;
pub use tokens::{Part, Tokens};

/// The environment variable that names the folder of tokenised text.
pub const CACHE_VARIABLE: &str = "KINDLING_CACHE";

/// Bytes of text after whose document a part ends.
const PART_BYTES: u64 = 64 << 20;

/// The ending of an unfinished part.
const UNFINISHED: &str = "tmp";

/// Age at which an unfinished part that nobody writes to was left by a run that was killed.
const ABANDONED: Duration = Duration::from_hours(1);

/// A text file to be kept as tokens, and all that decides which tokens.
#[derive(Debug, Clone)]
pub struct ShardSource<'a> {
    /// The file.
    pub path: &'a Path,
    /// Size and age of the file before its hash was taken.
    pub stamp: Stamp,
    /// SHA-256 of the file.
    pub sha256: String,
    /// Where a `.txt` file is cut into documents.
    pub separator: &'a Separator,
    /// How its records are read.
    pub options: ReadOptions,
    /// The id to put before each document (`<|bos|>`); `None` joins them without a mark.
    pub begin: Option<u32>,
    /// Hash of the tokenizer: another one gives other tokens.
    pub tokenizer_sha256: &'a str,
    /// The tokenizer's vocabulary, which decides how wide an id is.
    pub vocab_size: usize,
}

/// The folder of tokenised text.
#[derive(Debug, Clone)]
pub struct Cache {
    dir: PathBuf,
    part_bytes: u64,
}

impl Cache {
    /// The folder that `KINDLING_CACHE` names, else `kindling` in the user's cache folder.
    pub fn usual() -> Self {
        Self::new(match std::env::var_os(CACHE_VARIABLE).filter(|value| !value.is_empty()) {
            Some(dir) => dir.into(),
            None => dirs::cache_dir().unwrap_or_else(std::env::temp_dir).join("kindling"),
        })
    }

    /// The folder `dir`, which need not be there yet.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir, part_bytes: PART_BYTES }
    }

    /// The same with parts of another size: for tests, whose texts are short.
    #[must_use]
    pub fn with_part_bytes(self, part_bytes: u64) -> Self {
        Self { part_bytes, ..self }
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Bytes of text after whose document a part ends.
    pub fn part_bytes(&self) -> u64 {
        self.part_bytes
    }

    /// Makes the folder, and removes what runs that were killed have left unfinished in it.
    ///
    /// # Errors
    /// If the folder cannot be made.
    pub fn prepare(&self) -> Result<(), DataError> {
        fs::create_dir_all(&self.dir).map_err(unwritable(&self.dir))?;
        for entry in fs::read_dir(&self.dir).map_err(unwritable(&self.dir))?.flatten() {
            let path = entry.path();
            let written = entry.metadata().and_then(|metadata| metadata.modified());
            let age = written.ok().and_then(|written| SystemTime::now().duration_since(written).ok());
            if path.extension().is_some_and(|ending| ending == UNFINISHED) && age.is_some_and(|age| age > ABANDONED) {
                // Another run may have removed it in between.
                let _ = fs::remove_file(path);
            }
        }
        Ok(())
    }

    /// The parts of `source` in their order; `None` if one is missing or damaged.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn find(&self, source: &ShardSource<'_>) -> Result<Option<Vec<Part>>, DataError> {
        let key = self.key(source);
        let mut parts = Vec::new();
        loop {
            let index = parts.len() as u64;
            let part = match self.find_part(&key, index)? {
                Ok(part) => part,
                Err(reason) => {
                    if let Some(reason) = reason {
                        tracing::warn!("{reason}");
                    }
                    return Ok(None);
                }
            };
            let (is_last, n_skipped) = part.end();
            parts.push(part);
            if is_last {
                if n_skipped > 0 {
                    let text = source.path.display();
                    tracing::warn!("`{text}` was tokenised without its {n_skipped} bad records");
                }
                return Ok(Some(parts));
            }
        }
    }

    /// One part, or what is wrong with it; nothing is where there is no file.
    fn find_part(&self, key: &[u8; 32], index: u64) -> Result<Result<Part, Option<String>>, DataError> {
        let path = self.path(key, index);
        match Part::open(&path) {
            Ok(part) if part.is(key, index) => Ok(Ok(part)),
            Ok(_) => Ok(Err(Some(format!("`{}` is of another text and is written again", path.display())))),
            Err(DataError::File(FileError::Read { source, .. })) if source.kind() == io::ErrorKind::NotFound => {
                Ok(Err(None))
            }
            Err(DataError::File(FileError::Read { path, source })) => Err(DataError::Cache { path, source }),
            Err(error @ DataError::Shard { .. }) => Ok(Err(Some(error.to_string()))),
            Err(error) => Err(error),
        }
    }

    fn path(&self, key: &[u8; 32], index: u64) -> PathBuf {
        let name = hex(&key[..16]);
        self.dir.join(if index == 0 { format!("{name}.tokens") } else { format!("{name}-{index}.tokens") })
    }

    /// Hash of everything that decides the parts' content. Lengths stand before texts, so no two sources run together.
    fn key(&self, source: &ShardSource<'_>) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(MAGIC);
        hash.update(VERSION.to_le_bytes());
        // The name's ending decides how the file is read.
        let name = source.path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
        let ending = name.split_once('.').map_or("", |(_, ending)| ending);
        let separator = String::from(source.separator.clone());
        let reading = format!("{:?} {}", source.options.on_bad_record, source.options.max_record_bytes.bytes());
        for text in [ending, &source.sha256, &separator, &reading, source.tokenizer_sha256] {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text);
        }
        hash.update(source.begin.map_or(u64::MAX, u64::from).to_le_bytes());
        hash.update((source.vocab_size as u64).to_le_bytes());
        hash.update(self.part_bytes.to_le_bytes());
        hash.finalize().into()
    }
}

fn unwritable(path: &Path) -> impl Fn(io::Error) -> DataError {
    move |source| DataError::Cache { path: path.to_owned(), source }
}
