//! The beginning of a part's file.

use sha2::{Digest, Sha256};

pub(super) const MAGIC: [u8; 8] = *b"KNDLTOKS";
pub(super) const VERSION: u32 = 3;
/// Magic, version, bytes an id, five numbers, key, and the hash of all that.
pub(super) const HEADER_LEN: usize = 8 + 4 + 4 + 5 * 8 + 32 + 32;

/// What a part's file says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    /// Bytes of an id.
    pub(super) id_width: u32,
    pub(super) n_tokens: u64,
    /// Bytes of text.
    pub(super) n_bytes: u64,
    /// Which part of its text file it is, from 0.
    pub(super) index: u64,
    /// Whether the text file ends with it.
    pub(super) is_last: bool,
    /// Bad records that were left out of the whole text file; known in its last part only.
    pub(super) n_skipped: u64,
    /// Of the text file and all settings.
    pub(super) key: [u8; 32],
}

impl Header {
    pub(super) fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = Vec::with_capacity(HEADER_LEN);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(self.id_width.to_le_bytes());
        for number in [self.n_tokens, self.n_bytes, self.index, u64::from(self.is_last), self.n_skipped] {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend(self.key);
        let hash = Sha256::digest(&bytes);
        bytes.extend_from_slice(&hash);
        bytes.try_into().expect("the fields fill the header")
    }

    pub(super) fn from_bytes(bytes: &[u8; HEADER_LEN]) -> Result<Self, &'static str> {
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
        let [n_tokens, n_bytes, index, is_last, n_skipped] =
            std::array::from_fn(|_| u64::from_le_bytes(take(&mut rest)));
        let header =
            Self { id_width, n_tokens, n_bytes, index, is_last: is_last != 0, n_skipped, key: take(&mut rest) };
        if matches!(id_width, 2 | 4) { Ok(header) } else { Err("its ids have neither two bytes nor four") }
    }
}

fn take<const N: usize>(bytes: &mut &[u8]) -> [u8; N] {
    let (first, rest) = bytes.split_first_chunk().expect("a header's fields are no longer than the header");
    *bytes = rest;
    *first
}
