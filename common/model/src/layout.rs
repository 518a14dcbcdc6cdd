//! Which keys a query sees, and at which position it stands, in a batch of rows of different lengths.

use burn::tensor::{Device, Int, Tensor, TensorData};

/// How real tokens lie in the rows of a batch.
///
/// Query `t` of row `b` sees keys `first_key[b][t]..=t` and stands at position `t − first_key[b][t]`. This one rule
/// covers padding behind a row (`first_key` is 0; no real query sees the padding) and several documents packed into a row
/// (`first_key` is the start of the query's document).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    first_key: Option<Vec<u32>>,
}

impl Layout {
    /// Rows that begin at index 0; whatever stands behind a row's end is padding.
    pub const fn right_padded() -> Self {
        Self { first_key: None }
    }

    /// Rows that hold several documents each.
    ///
    /// # Shapes
    /// - `first_key`: `[batch · seq]`, for each token the index in its row where its document starts
    ///
    /// # Panics
    /// If the length is no multiple of `seq`, or a document starts behind its token.
    pub fn packed(first_key: Vec<u32>, seq: usize) -> Self {
        assert_eq!(first_key.len() % seq, 0, "{} entries do not fill rows of {seq}", first_key.len());
        assert!(
            first_key.iter().enumerate().all(|(i, &first)| first as usize <= i % seq),
            "a document starts behind one of its tokens"
        );
        Self { first_key: Some(first_key) }
    }

    /// `first_key` on the device, `[batch, seq]`; `None` where it is 0 everywhere.
    ///
    /// # Panics
    /// If the layout was made for another batch.
    pub(super) fn first_key_tensor(&self, batch: usize, seq: usize, device: &Device) -> Option<Tensor<2, Int>> {
        let first_key = self.first_key.as_ref()?;
        assert_eq!(
            first_key.len(),
            batch * seq,
            "a layout of {} tokens for a batch of {batch} × {seq}",
            first_key.len()
        );
        let data: Vec<i64> = first_key.iter().map(|&first| i64::from(first)).collect();
        Some(Tensor::from_data(TensorData::new(data, [batch, seq]), device))
    }

    /// The position of each token, `[batch · seq]`; `None` where it is simply the index in the row.
    pub(super) fn positions(&self, seq: usize) -> Option<Vec<usize>> {
        let first_key = self.first_key.as_ref()?;
        Some(first_key.iter().enumerate().map(|(i, &first)| i % seq - first as usize).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packing_moves_positions_not_order() {
        let layout = Layout::packed(vec![0, 0, 0, 0, 0, 0, 2, 2], 4);
        assert_eq!(layout.positions(4), Some(vec![0, 1, 2, 3, 0, 1, 0, 1]));
        assert_eq!(Layout::right_padded().positions(4), None);
    }
}
