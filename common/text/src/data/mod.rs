//! From files on disk to rows of token ids.
//!
//! [`files`] finds people's files, [`records`] reads them, [`shards`] keeps tokenised text, [`order`] says which item comes when, and
//! [`collate`] makes equal rows of unequal ones. [`ids`] reads rows of token ids that others prepared.

mod error;

pub mod collate;
pub mod files;
pub mod ids;
pub mod order;
pub mod records;
pub mod shards;

pub use error::DataError;

/// SHA-256 of a file's bytes, in hexadecimal.
///
/// # Errors
/// If the file cannot be read.
pub fn file_sha256(path: &std::path::Path) -> Result<String, DataError> {
    Ok(base::hash::sha256_of_file(path).map_err(base::files::FileError::read(path))?)
}
