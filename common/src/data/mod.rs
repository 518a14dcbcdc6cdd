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

/// Bytes in hexadecimal.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
