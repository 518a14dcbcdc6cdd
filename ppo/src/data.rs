//! Prompts to batches, and responses to what the models read.

use std::path::PathBuf;

use anyhow::{Context, bail, ensure};
use burn::tensor::{Device, Int, Tensor, TensorData};
use common::conversation;
use common::data::collate;
use common::data::records::{self, ReadOptions};
use common::tokenizer::Tokenizer;

use crate::config::TooLong;

/// A prompt as the policy reads it, and as people do.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Prompt {
    /// Ends after `<|assistant|>`.
    pub(crate) ids: Vec<u32>,
    /// The last thing the user said.
    pub(crate) text: String,
}

/// Tokenised prompts.
pub(crate) struct Prompts {
    pub(crate) encoded: Vec<Prompt>,
}

/// Prompts with their responses in one right-padded batch, and where the response tokens are predicted.
///
/// The state *before* a token predicts it and holds its value: position `n_prompt − 1` for the first token of a
/// response. The last token is therefore no input.
pub(crate) struct ResponseBatch {
    ids: Vec<i32>,
    rows: usize,
    seq: usize,
    /// Indices into `[rows · seq]`, response after response.
    positions: Vec<i64>,
    /// The response tokens themselves.
    targets: Vec<i64>,
}

impl Prompts {
    /// Reads and tokenises `files`; each prompt has to leave room for `response_length` tokens in the context.
    pub(crate) fn read(
        files: &[PathBuf],
        tokenizer: &Tokenizer,
        max_seq_len: usize,
        response_length: usize,
        options: ReadOptions,
        on_too_long: TooLong,
    ) -> anyhow::Result<Self> {
        let mut all = Self { encoded: Vec::new() };
        let (mut n_too_long, mut longest) = (0, 0);
        for file in files {
            for prompt in records::read_prompts(file, options)? {
                let ids = conversation::encode_prompt(tokenizer, &prompt.messages)
                    .with_context(|| format!("failed to encode a prompt of `{}`", file.display()))?;
                if ids.len() + response_length > max_seq_len {
                    n_too_long += 1;
                    longest = longest.max(ids.len());
                } else {
                    all.encoded.push(Prompt { ids, text: prompt.text });
                }
            }
        }
        if n_too_long > 0 {
            let what = format!(
                "{n_too_long} of {} prompts leave no room for {response_length} more tokens in the context of \
                 {max_seq_len}; the longest has {longest}",
                n_too_long + all.encoded.len()
            );
            match on_too_long {
                TooLong::Fail => {
                    bail!("{what}\nhint: lower `ppo.response_length` or set `data.on_too_long` to \"skip\"")
                }
                TooLong::Skip => tracing::warn!("{what}; they are left out"),
            }
        }
        ensure!(!all.encoded.is_empty(), "no prompt is left to use");
        Ok(all)
    }
}

impl ResponseBatch {
    /// Collates prompts and the responses to them.
    pub(crate) fn new<'a>(responses: impl IntoIterator<Item = (&'a [u32], &'a [u32])>) -> Self {
        let responses: Vec<_> = responses.into_iter().collect();
        let rows: Vec<Vec<u32>> =
            responses.iter().map(|(prompt, response)| [prompt, &response[..response.len() - 1]].concat()).collect();
        // The padding id is arbitrary: no position that is read comes after it.
        let padded = collate::right_pad(&rows, 0);
        let mut positions = Vec::new();
        let mut targets = Vec::new();
        for (i, (prompt, response)) in responses.iter().enumerate() {
            let first = i * padded.seq + prompt.len() - 1;
            positions.extend((first..first + response.len()).map(|position| position as i64));
            targets.extend(response.iter().map(|&id| i64::from(id)));
        }
        Self { ids: padded.ids, rows: padded.batch, seq: padded.seq, positions, targets }
    }

    /// Response tokens of all rows.
    pub(crate) fn n_tokens(&self) -> usize {
        self.targets.len()
    }

    /// `[rows, seq]`
    pub(crate) fn inputs(&self, device: &Device) -> Tensor<2, Int> {
        Tensor::from_data(TensorData::new(self.ids.clone(), [self.rows, self.seq]), device)
    }

    /// Indices into `[rows · seq]` of the states before the response tokens, `[n_tokens]`.
    pub(crate) fn positions(&self, device: &Device) -> Tensor<1, Int> {
        Tensor::from_data(TensorData::new(self.positions.clone(), [self.n_tokens()]), device)
    }

    /// The response tokens, `[n_tokens]`.
    pub(crate) fn targets(&self, device: &Device) -> Tensor<1, Int> {
        Tensor::from_data(TensorData::new(self.targets.clone(), [self.n_tokens()]), device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_response_token_is_predicted_by_the_state_before_it() {
        let rows: [(&[u32], &[u32]); 2] = [(&[1, 2, 3], &[7]), (&[1, 4], &[8, 9, 5])];
        let batch = ResponseBatch::new(rows);
        assert_eq!((batch.rows, batch.seq, batch.n_tokens()), (2, 4, 4));
        assert_eq!(batch.ids, [1, 2, 3, 0, 1, 4, 8, 9]);
        assert_eq!(batch.positions, [2, 5, 6, 7]);
        assert_eq!(batch.targets, [7, 8, 9, 5]);
    }
}
