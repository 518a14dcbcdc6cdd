//! Preference pairs from files to token ids, and how far scores agree with them.

use std::ops::Range;
use std::path::{Path, PathBuf};

use base::stats::win;
use group::Group;
use model::ScalarGpt;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use text::conversation::{self, ConversationError};
use text::data::order::Order;
use text::data::records::{self, Pair, ReadOptions};
use text::tokenizer::Tokenizer;

use crate::rows::score_share_of_rows;
use crate::{ScoreError, Watch};

/// A pair as the model reads it.
#[derive(Debug, Clone, PartialEq)]
pub struct EncodedPair {
    /// Prompt and preferred answer, the mark that ends it last.
    pub chosen: Vec<u32>,
    /// Prompt and rejected answer, the mark that ends it last.
    pub rejected: Vec<u32>,
    /// How many tokens of both are the prompt.
    pub n_prompt: usize,
    /// How much higher the chosen answer should score.
    pub margin: Option<f32>,
}

/// Tokenised pairs.
#[derive(Debug, Clone, PartialEq)]
pub struct Pairs {
    /// In the order of the files; at least one.
    pub encoded: Vec<EncodedPair>,
    /// Which of `encoded` come from one record: one pair, or all pairs of a ranked list. A batch holds them together.
    pub records: Vec<Range<usize>>,
    /// Who decided each of `encoded`, where the records say so.
    pub annotators: Vec<Option<String>>,
}

/// Treatment of a pair whose prompt and longer answer do not fit into the model's context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PairTooLong {
    /// Cut off the beginning of the prompt (after `<|bos|>`), the same for both answers. The score is read at the end of
    /// the answer, so the answer stays whole; a pair whose answer alone does not fit is left out.
    #[default]
    TruncatePrompt,
    /// Leave the pair out.
    Skip,
    /// Stop with an error.
    Fail,
}

impl Pairs {
    /// Reads and tokenises `files` for a model that reads `max_seq_len` tokens.
    ///
    /// # Errors
    /// If a file or record cannot be used, a pair is too long and not to be cut or skipped, or none is left.
    pub fn read(
        files: &[PathBuf],
        tokenizer: &Tokenizer,
        max_seq_len: usize,
        options: ReadOptions,
        on_too_long: PairTooLong,
    ) -> Result<Self, ScoreError> {
        let mut all = Self { encoded: Vec::new(), records: Vec::new(), annotators: Vec::new() };
        let (mut n_cut, mut n_left_out) = (0, 0);
        for file in files {
            let mut last = None;
            for pair in records::read_pairs(file, options)? {
                let encoded = EncodedPair::new(&pair, tokenizer)
                    .map_err(|source| ScoreError::EncodePair { path: file.clone(), source })?;
                let fitting = if encoded.len() <= max_seq_len {
                    Some(encoded)
                } else {
                    match on_too_long {
                        PairTooLong::TruncatePrompt => encoded.with_prompt_cut(max_seq_len).inspect(|_| n_cut += 1),
                        PairTooLong::Skip => None,
                        PairTooLong::Fail => return Err(too_long(file, encoded.len(), max_seq_len)),
                    }
                };
                let Some(encoded) = fitting else {
                    n_left_out += 1;
                    continue;
                };
                all.encoded.push(encoded);
                all.annotators.push(pair.annotator);
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
                let are = if n == 1 { "pair is" } else { "pairs are" };
                tracing::warn!("{n} {are} longer than {max_seq_len} tokens: {done} (data.on_too_long)");
            }
        }
        if all.encoded.is_empty() { Err(ScoreError::NoPair) } else { Ok(all) }
    }

    /// Which of the pairs step `step` learns from: all pairs of the `batch_size` records that come next in `order`.
    pub fn of_step(&self, order: &mut Order, step: u64, batch_size: usize) -> Vec<usize> {
        let first = step * batch_size as u64;
        (first..first + batch_size as u64).flat_map(|position| self.records[order.item(position)].clone()).collect()
    }
}

fn too_long(file: &Path, n_tokens: usize, max_seq_len: usize) -> ScoreError {
    ScoreError::PairTooLong { path: file.to_owned(), n_tokens, max_seq_len }
}

impl EncodedPair {
    /// Tokenises a pair.
    ///
    /// # Errors
    /// If a text cannot be encoded.
    pub fn new(pair: &Pair, tokenizer: &Tokenizer) -> Result<Self, ConversationError> {
        let prompt = conversation::encode_prompt(tokenizer, &pair.prompt)?;
        let answer = |text: &str| -> Result<Vec<u32>, ConversationError> {
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
    #[allow(clippy::len_without_is_empty)] // a row has at least the prompt's tokens
    pub fn len(&self) -> usize {
        self.chosen.len().max(self.rejected.len())
    }

    /// The pair without as much of its prompt's beginning as makes it fit; `None` if the answer alone does not.
    ///
    /// The first token of the prompt and the last, which the answer follows, stay.
    pub fn with_prompt_cut(&self, max_seq_len: usize) -> Option<Self> {
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

/// The scores of each pair's chosen and rejected answer, `batch_size` answers at a time, the batches shared by `group`, with
/// `watch` looking on: it is told of answers.
///
/// # Errors
/// If the device cannot be read, a score is not finite, or `watch` breaks it off.
///
/// # Panics
/// As [`score_rows`](crate::score_rows).
pub fn score_pairs(
    group: &Group,
    model: &ScalarGpt,
    pairs: &[EncodedPair],
    batch_size: usize,
    watch: Watch<'_>,
) -> Result<Vec<[f32; 2]>, ScoreError> {
    let rows: Vec<&[u32]> = pairs.iter().flat_map(|pair| [pair.chosen.as_slice(), pair.rejected.as_slice()]).collect();
    let own = score_share_of_rows(model, &rows, batch_size, group.share(), watch)?;
    let scores = group.in_order(own)?;
    if scores.iter().any(|score| !score.is_finite()) {
        return Err(ScoreError::NotFinite);
    }
    Ok(scores.chunks_exact(2).map(|of_pair| [of_pair[0], of_pair[1]]).collect())
}

/// A reward model's agreement with labelled pairs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Agreement {
    /// Fraction of pairs whose chosen answer scores higher; equal scores count half.
    pub accuracy: f64,
    /// Mean pairwise loss in nats, margins included where the pairs have them; of the scores as the checkpoint gives them,
    /// which training normalises after its last `val/loss`.
    pub loss: f64,
    /// Mean of `score_chosen − score_rejected`.
    pub margin_mean: f64,
    /// The accuracy of preferring whichever answer has more tokens; equal lengths count half.
    pub longer_wins_accuracy: f64,
    /// Number of pairs.
    pub pairs: usize,
}

impl Agreement {
    /// Compares the scores of [`score_pairs`] with the order of the pairs.
    ///
    /// # Panics
    /// If there are not as many scores as pairs, or none.
    pub fn of(pairs: &[EncodedPair], scores: &[[f32; 2]]) -> Self {
        assert_eq!(pairs.len(), scores.len(), "two scores a pair");
        assert!(!pairs.is_empty(), "no pair has no mean");
        let (mut accuracy, mut loss, mut margin_mean) = (0.0, 0.0, 0.0);
        for (pair, scores) in pairs.iter().zip(scores) {
            let distance = distance(*scores);
            accuracy += win(distance, 0.0);
            loss += negative_log_sigmoid(distance - f64::from(pair.margin.unwrap_or(0.0)));
            margin_mean += distance;
        }
        let n = pairs.len() as f64;
        Self {
            accuracy: accuracy / n,
            loss: loss / n,
            margin_mean: margin_mean / n,
            longer_wins_accuracy: pairs.iter().map(longer_wins).sum::<f64>() / n,
            pairs: pairs.len(),
        }
    }
}

/// By how much a pair's chosen answer scores higher.
pub fn distance([chosen, rejected]: [f32; 2]) -> f64 {
    f64::from(chosen) - f64::from(rejected)
}

/// Whether the longer answer is the preferred one: 1, 0, or ½ for answers of equal length.
pub fn longer_wins(pair: &EncodedPair) -> f64 {
    win(pair.chosen.len() as f64, pair.rejected.len() as f64)
}

/// `−log σ(x)` in nats, stable on both sides: the pairwise loss of a distance `x`.
pub fn negative_log_sigmoid(x: f64) -> f64 {
    (-x).max(0.0) + (-x.abs()).exp().ln_1p()
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::rng::Streams;

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
    fn the_steps_of_an_epoch_take_every_pair_once_and_those_of_a_record_together() {
        let records = vec![0..1, 1..4, 4..5, 5..6];
        let encoded = (0..6).map(|i| pair(&[0, i], &[0, 9], 1, None)).collect();
        let pairs = Pairs { encoded, records, annotators: vec![None; 6] };
        let mut order = Order::new(4, Streams::new(3), "order");
        for epoch in 0..2 {
            let mut seen: Vec<usize> = Vec::new();
            for step in 2 * epoch..2 * epoch + 2 {
                let of_step = pairs.of_step(&mut order, step, 2);
                let ranked = of_step.iter().filter(|i| (1..4).contains(*i)).count();
                assert!(ranked == 0 || ranked == 3, "{of_step:?}");
                seen.extend(of_step);
            }
            seen.sort_unstable();
            assert_eq!(seen, [0, 1, 2, 3, 4, 5]);
        }
    }

    #[test]
    fn equal_lengths_count_half_for_the_longer() {
        let pairs = [pair(&[0, 1, 2], &[0, 1], 1, None), pair(&[0, 1], &[0, 2], 1, None)];
        let agreement = Agreement::of(&pairs, &[[1.0, 0.0], [0.0, 0.0]]);
        assert_eq!((agreement.longer_wins_accuracy, agreement.accuracy), (0.75, 0.75));
    }

    #[test]
    fn negative_log_sigmoid_is_stable_on_both_sides() {
        assert!((negative_log_sigmoid(0.0) - std::f64::consts::LN_2).abs() < 1e-15);
        assert_eq!(negative_log_sigmoid(-1e4), 1e4);
        assert_eq!(negative_log_sigmoid(1e4), 0.0);
        assert!((negative_log_sigmoid(3.0_f64.ln()) - (4.0_f64 / 3.0).ln()).abs() < 1e-15);
    }
}
