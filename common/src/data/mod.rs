//! From files on disk to rows of token ids.
//!
//! [`records`] reads people's files, [`shards`] keeps tokenised text, [`order`] says which item comes when, and
//! [`collate`] makes equal rows of unequal ones. [`ids`] reads rows of token ids that others prepared.

mod error;

pub mod collate;
pub mod ids;
pub mod order;
pub mod records;
pub mod shards;

pub use error::DataError;

use std::path::Path;

/// SHA-256 of a file's bytes, in hexadecimal.
///
/// # Errors
/// If the file cannot be read.
pub fn file_sha256(path: &Path) -> Result<String, DataError> {
    use sha2::{Digest, Sha256};
    let read = |source| DataError::Read { path: path.to_owned(), source };
    let mut file = std::fs::File::open(path).map_err(read)?;
    let mut hash = Sha256::new();
    std::io::copy(&mut file, &mut hash).map_err(read)?;
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}
