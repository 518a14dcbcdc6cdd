//! Preference pairs to batches.

use std::path::PathBuf;

use anyhow::ensure;
use burn::tensor::{Device, Tensor, TensorData};
use common::data::records::ReadOptions;
use common::model::Gpt;
use common::score::{EncodedPair, Pairs, ResponseBatch, log_probs, sum_by_response};
use common::tokenizer::Tokenizer;

use crate::config::TooLong;

/// Log-probabilities of a pair's chosen and rejected answer, each summed over its tokens, in nats.
pub(crate) type PairLogProbs = [f32; 2];

/// The answers of some pairs in one batch: all chosen ones, then all rejected ones.
pub(crate) struct Batch {
    responses: ResponseBatch,
    /// Of the answers, in their order.
    reference: Vec<f32>,
    /// Tokens of the answers.
    pub(crate) n_tokens: Vec<usize>,
}

/// Reads and tokenises `files`.
///
/// # Errors
/// If a file cannot be read, none of its records can be used, or an answer has no token.
pub(crate) fn read(
    files: &[PathBuf],
    tokenizer: &Tokenizer,
    max_seq_len: usize,
    options: ReadOptions,
    on_too_long: TooLong,
) -> anyhow::Result<Pairs> {
    let pairs = Pairs::read(files, tokenizer, max_seq_len, options, on_too_long)?;
    let has_empty = pairs.encoded.iter().flat_map(answers).any(|(_, answer)| answer.is_empty());
    ensure!(!has_empty, "an answer is empty, and the chat template ends it with no token: it has no probability");
    Ok(pairs)
}

/// Prompt and answer of a pair, chosen and rejected.
pub(crate) fn answers(pair: &EncodedPair) -> [(&[u32], &[u32]); 2] {
    [&pair.chosen, &pair.rejected].map(|row| row.split_at(pair.n_prompt))
}

impl Batch {
    /// Collates `pairs` with their log-probabilities under the reference.
    pub(crate) fn new(pairs: &[(&EncodedPair, PairLogProbs)]) -> Self {
        let side = |i: usize| pairs.iter().map(move |(pair, _)| answers(pair)[i]);
        let rows: Vec<_> = side(0).chain(side(1)).collect();
        let of_reference = |i: usize| pairs.iter().map(move |(_, reference)| reference[i]);
        Self {
            reference: of_reference(0).chain(of_reference(1)).collect(),
            n_tokens: rows.iter().map(|(_, answer)| answer.len()).collect(),
            responses: ResponseBatch::new(rows),
        }
    }

    /// Log-probabilities of the answers under `gpt`, with gradient where it is trained, `[2 · n_pairs]`.
    pub(crate) fn log_probs(&self, gpt: &Gpt) -> Tensor<1> {
        sum_by_response(&self.responses, log_probs(gpt, &self.responses, 1.0))
    }

    /// Log-probabilities of the answers under the reference, `[2 · n_pairs]`.
    pub(crate) fn reference(&self, device: &Device) -> Tensor<1> {
        Tensor::from_data(TensorData::new(self.reference.clone(), [self.reference.len()]), device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::rng::Streams;
    use common::testing::{assert_close, tiny_config};

    fn pair(prompt: &[u32], chosen: &[u32], rejected: &[u32]) -> EncodedPair {
        EncodedPair {
            chosen: [prompt, chosen].concat(),
            rejected: [prompt, rejected].concat(),
            n_prompt: prompt.len(),
            margin: None,
        }
    }

    #[test]
    fn a_batch_holds_chosen_then_rejected_answers_and_sums_over_their_tokens() {
        // Sums of a few f32 of order one, in another order.
        const REORDERED: f32 = 1e-5;
        let gpt = Gpt::new(&tiny_config(20), &Streams::new(3), &Device::flex());
        let (a, b) = (pair(&[1, 2], &[3, 4, 5], &[6]), pair(&[1], &[7], &[8, 9]));
        let batch = Batch::new(&[(&a, [-1.0, -2.0]), (&b, [-3.0, -4.0])]);
        assert_eq!((&batch.n_tokens[..], &batch.reference[..]), (&[3, 1, 1, 2][..], &[-1.0, -3.0, -2.0, -4.0][..]));
        let host = |tensor: Tensor<1>| tensor.try_into_vec_as::<f32>().unwrap();
        let sums = [&a, &b].map(|pair| {
            answers(pair).map(|row| host(log_probs(&gpt, &ResponseBatch::new([row]), 1.0)).iter().sum::<f32>())
        });
        let [[c, r], [other_c, other_r]] = sums;
        assert_close(&host(batch.log_probs(&gpt)), &[c, other_c, r, other_r], REORDERED);
    }
}
