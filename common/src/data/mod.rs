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

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use sha2::{Digest, Sha256};

/// SHA-256 of a file's bytes, in hexadecimal.
///
/// # Errors
/// If the file cannot be read.
pub fn file_sha256(path: &Path) -> Result<String, DataError> {
    let read = |source| DataError::Read { path: path.to_owned(), source };
    let mut file = BufReader::with_capacity(1 << 20, File::open(path).map_err(read)?);
    let mut hash = Sha256::new();
    loop {
        let bytes = file.fill_buf().map_err(read)?;
        if bytes.is_empty() {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(bytes);
        let n_read = bytes.len();
        file.consume(n_read);
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}
