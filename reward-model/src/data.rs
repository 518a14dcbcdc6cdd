//! Preference pairs to batches.

use std::path::PathBuf;

use burn::tensor::{Device, Int, Tensor, TensorData};
use common::data::collate;
use common::score::{EncodedPair, Pairs, ScoreError};
use common::session::DataConfig;
use common::tokenizer::Tokenizer;

use crate::config::TooLong;

/// The answers of some pairs in one right-padded batch: all chosen ones, then all rejected ones.
pub(crate) struct Batch {
    ids: Vec<i32>,
    rows: usize,
    seq: usize,
    /// Index into `[rows · seq]` of each row's last token.
    last: Vec<i64>,
    margins: Option<Vec<f32>>,
}

/// Reads `files` as training does, to find what it cannot use before it begins.
///
/// # Errors
/// If a file cannot be read, or none of its records can be used.
pub fn check_data(
    files: &[PathBuf],
    tokenizer: &Tokenizer,
    max_seq_len: usize,
    data: &DataConfig<TooLong>,
) -> Result<(), ScoreError> {
    read(files, tokenizer, max_seq_len, data).map(drop)
}

/// Reads and tokenises `files`.
pub(crate) fn read(
    files: &[PathBuf],
    tokenizer: &Tokenizer,
    max_seq_len: usize,
    data: &DataConfig<TooLong>,
) -> Result<Pairs, ScoreError> {
    Pairs::read(files, tokenizer, max_seq_len, data.read_options(), data.on_too_long)
}

impl Batch {
    /// Collates `pairs`.
    pub(crate) fn new(pairs: &[&EncodedPair]) -> Self {
        let rows: Vec<Vec<u32>> =
            pairs.iter().map(|p| p.chosen.clone()).chain(pairs.iter().map(|p| p.rejected.clone())).collect();
        // The padding id is arbitrary: no position that is read comes after it.
        let padded = collate::right_pad(&rows, 0);
        let last = rows.iter().enumerate().map(|(i, row)| (i * padded.seq + row.len() - 1) as i64).collect();
        let margins = pairs
            .iter()
            .any(|pair| pair.margin.is_some())
            .then(|| pairs.iter().map(|pair| pair.margin.unwrap_or(0.0)).collect());
        Self { ids: padded.ids, rows: padded.batch, seq: padded.seq, last, margins }
    }

    /// `[rows, seq]`
    pub(crate) fn inputs(&self, device: &Device) -> Tensor<2, Int> {
        Tensor::from_data(TensorData::new(self.ids.clone(), [self.rows, self.seq]), device)
    }

    /// Indices into `[rows · seq]` of the last tokens, `[rows]`.
    pub(crate) fn last(&self, device: &Device) -> Tensor<1, Int> {
        Tensor::from_data(TensorData::new(self.last.clone(), [self.rows]), device)
    }

    /// Margins of the pairs, `[rows / 2]`, where any has one.
    pub(crate) fn margins(&self, device: &Device) -> Option<Tensor<1>> {
        self.margins.as_ref().map(|margins| Tensor::from_floats(margins.as_slice(), device))
    }

    /// Tokens that are not padding.
    pub(crate) fn n_tokens(&self) -> usize {
        self.last.iter().enumerate().map(|(i, &last)| last as usize + 1 - i * self.seq).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(chosen: &[u32], rejected: &[u32], n_prompt: usize, margin: Option<f32>) -> EncodedPair {
        EncodedPair { chosen: chosen.to_vec(), rejected: rejected.to_vec(), n_prompt, margin }
    }

    #[test]
    fn a_batch_holds_chosen_then_rejected_rows_and_their_ends() {
        let (a, b) = (pair(&[0, 1, 2], &[0, 1], 1, None), pair(&[0, 5], &[0, 6, 7], 1, Some(1.5)));
        let batch = Batch::new(&[&a, &b]);
        assert_eq!((batch.rows, batch.seq, batch.n_tokens()), (4, 3, 10));
        assert_eq!(batch.ids, [0, 1, 2, 0, 5, 0, 0, 1, 0, 0, 6, 7]);
        assert_eq!(batch.last, [2, 4, 7, 11]);
        assert_eq!(batch.margins, Some(vec![0.0, 1.5]));
    }
}
