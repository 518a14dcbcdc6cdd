//! Preference pairs to batches.

use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use burn::tensor::{Device, Int, Tensor, TensorData};
use common::conversation;
use common::data::collate;
use common::data::records::{self, Pair};
use common::logging::counted;
use common::session::DataConfig;
use common::tokenizer::Tokenizer;

use crate::config::TooLong;

/// A pair as the model reads it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct EncodedPair {
    /// Prompt and preferred answer, the mark that ends it last.
    pub(crate) chosen: Vec<u32>,
    /// Prompt and rejected answer, the mark that ends it last.
    pub(crate) rejected: Vec<u32>,
    /// How many tokens of both are the prompt.
    pub(crate) n_prompt: usize,
    /// How much higher the chosen answer should score.
    pub(crate) margin: Option<f32>,
}

/// Tokenised pairs.
pub(crate) struct Pairs {
    pub(crate) encoded: Vec<EncodedPair>,
    /// Which of `encoded` come from one record: one pair, or all pairs of a ranked list. A batch holds them together.
    pub(crate) records: Vec<Range<usize>>,
}

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
) -> anyhow::Result<()> {
    Pairs::read(files, tokenizer, max_seq_len, data).map(drop)
}

impl Pairs {
    /// Reads and tokenises `files`.
    pub(crate) fn read(
        files: &[PathBuf],
        tokenizer: &Tokenizer,
        max_seq_len: usize,
        data: &DataConfig<TooLong>,
    ) -> anyhow::Result<Self> {
        let mut all = Self { encoded: Vec::new(), records: Vec::new() };
        let (mut n_cut, mut n_left_out) = (0, 0);
        for file in files {
            let mut last = None;
            for pair in records::read_pairs(file, data.read_options())? {
                let encoded = EncodedPair::new(&pair, tokenizer).with_context(|| in_file(file))?;
                let fitting = if encoded.len() <= max_seq_len {
                    Some(encoded)
                } else {
                    match data.on_too_long {
                        TooLong::TruncatePrompt => encoded.with_prompt_cut(max_seq_len).inspect(|_| n_cut += 1),
                        TooLong::Skip => None,
                        TooLong::Fail => bail!(
                            "a pair of `{}` has {} tokens, the context {max_seq_len}\nhint: set `data.on_too_long` to \
                             \"truncate-prompt\" or \"skip\"",
                            file.display(),
                            encoded.len()
                        ),
                    }
                };
                let Some(encoded) = fitting else {
                    n_left_out += 1;
                    continue;
                };
                all.encoded.push(encoded);
                let n = all.encoded.len();
                match all.records.last_mut() {
                    Some(record) if last == Some(pair.record) => record.end = n,
                    _ => all.records.push(n - 1..n),
                }
                last = Some(pair.record);
            }
        }
        for (n, done) in [(n_cut, "the beginning of the prompt is cut off"), (n_left_out, "left out")] {
            if n > 0 {
                let are = counted(n, "pair is", "pairs are");
                tracing::warn!("{are} longer than {max_seq_len} tokens: {done} (data.on_too_long)");
            }
        }
        ensure!(!all.encoded.is_empty(), "no pair is left to use");
        Ok(all)
    }
}

fn in_file(file: &Path) -> String {
    format!("failed to encode a pair of `{}`", file.display())
}

impl EncodedPair {
    /// Tokenises a pair.
    pub(crate) fn new(pair: &Pair, tokenizer: &Tokenizer) -> anyhow::Result<Self> {
        let prompt = conversation::encode_prompt(tokenizer, &pair.prompt)?;
        let answer = |text: &str| -> anyhow::Result<Vec<u32>> {
            let mut ids = prompt.clone();
            ids.extend(conversation::encode_response(tokenizer, text)?);
            Ok(ids)
        };
        Ok(Self {
            chosen: answer(&pair.chosen)?,
            rejected: answer(&pair.rejected)?,
            n_prompt: prompt.len(),
            margin: pair.margin,
        })
    }

    /// Tokens of the longer row.
    pub(crate) fn len(&self) -> usize {
        self.chosen.len().max(self.rejected.len())
    }

    /// The pair without as much of its prompt's beginning as makes it fit; `None` if the answer alone does not.
    ///
    /// The first token of the prompt and the last, which the answer follows, stay.
    pub(crate) fn with_prompt_cut(&self, max_seq_len: usize) -> Option<Self> {
        let n_cut = self.len().saturating_sub(max_seq_len);
        if n_cut + 2 > self.n_prompt {
            return None;
        }
        let cut = |ids: &[u32]| [&ids[..1], &ids[1 + n_cut..]].concat();
        Some(Self {
            chosen: cut(&self.chosen),
            rejected: cut(&self.rejected),
            n_prompt: self.n_prompt - n_cut,
            margin: self.margin,
        })
    }
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
    fn cutting_keeps_the_first_token_and_the_end_of_the_prompt() {
        let long = pair(&[0, 1, 2, 3, 4, 90, 91], &[0, 1, 2, 3, 4, 80], 5, Some(0.5));
        let cut = long.with_prompt_cut(5).expect("it fits");
        assert_eq!(cut, pair(&[0, 3, 4, 90, 91], &[0, 3, 4, 80], 3, Some(0.5)));
        assert_eq!(long.with_prompt_cut(7), Some(long.clone()));
        assert_eq!(long.with_prompt_cut(4).map(|cut| cut.n_prompt), Some(2));
        assert_eq!(long.with_prompt_cut(3), None);
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
