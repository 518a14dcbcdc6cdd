//! Beam search with the semantics of Hugging Face transformers.

use burn::tensor::{Int, Tensor, TensorData};

use super::sampling::{check_finite, check_max_tokens, check_repetition_penalty, penalise};
use super::{Finish, GenerateError, NonFiniteLogit, check_prompt, invalid, logits_of};
use crate::{Cache, Gpt};
use kernels::softmax::log_sum_exp;

/// Most beams of a search: each is a row of the cache, and beyond some dozens they find the same answers.
pub const MAX_BEAMS: usize = 1024;

/// Largest power of the length: beyond it `length^length_penalty` leaves the range of f64.
const MAX_LENGTH_PENALTY: f64 = 50.0;

/// How [`beam_search`] searches.
#[derive(Debug, Clone, PartialEq)]
pub struct BeamConfig {
    /// How many continuations are kept at every step, at most [`MAX_BEAMS`]; 1 is greedy decoding.
    pub n_beams: usize,
    /// `score = Σ log_probs / length^length_penalty`: 0 favours short answers, values above 1 long ones.
    pub length_penalty: f64,
    /// As in [`SamplingConfig`](super::SamplingConfig), here on log-probabilities: repeated tokens' are multiplied.
    pub repetition_penalty: f64,
    /// Most tokens of the answer, the stop token included.
    pub max_tokens: usize,
    /// Tokens that end an answer; they are part of it.
    pub stop: Vec<u32>,
}

impl Default for BeamConfig {
    /// Four beams, scores per token, 128 tokens, no stop token.
    fn default() -> Self {
        Self { n_beams: 4, length_penalty: 1.0, repetition_penalty: 1.0, max_tokens: 128, stop: Vec::new() }
    }
}

impl BeamConfig {
    /// Checks every setting.
    ///
    /// # Errors
    /// [`GenerateError::InvalidOption`] naming the first setting outside its range.
    pub fn validate(&self) -> Result<(), GenerateError> {
        if !(1..=MAX_BEAMS).contains(&self.n_beams) {
            return Err(invalid("n_beams", "a whole number from 1 to 1024", self.n_beams));
        }
        if !(-MAX_LENGTH_PENALTY..=MAX_LENGTH_PENALTY).contains(&self.length_penalty) {
            return Err(invalid("length_penalty", "a number from -50 to 50", self.length_penalty));
        }
        check_repetition_penalty(self.repetition_penalty)?;
        check_max_tokens(self.max_tokens)
    }
}

/// A continuation that beam search found.
#[derive(Debug, Clone, PartialEq)]
pub struct Hypothesis {
    /// The new tokens, with the stop token where there is one.
    pub ids: Vec<u32>,
    /// The log-probability of each in nats, before the repetition penalty.
    pub log_probs: Vec<f32>,
    /// `Σ log_probs / length^length_penalty`, after the repetition penalty.
    pub score: f64,
    /// [`Finish::Stop`] or [`Finish::Length`].
    pub finish: Finish,
}

/// The continuation of `prompt` with the best score that beam search finds.
///
/// Every step scores all one-token extensions of the running beams and looks at the best
/// `n_beams · max(2, 1 + n_stop_tokens)` of them: those that end with a stop token are finished if they are among the
/// best `n_beams`, and the best `n_beams` of the others run on. At the last step all of the best `n_beams` are
/// finished. The `n_beams` best finished ones are remembered; the search ends when they are as many and the best
/// running beam, scored at its present length, is not better than the worst of them.
///
/// The answer ends with `max_tokens` or with the model's context window. Equal scores: the earlier beam first, then the
/// lower id.
///
/// # Errors
/// As [`generate`](super::generate()).
///
/// # Source
/// transformers 5, `GenerationMixin._beam_search` with `early_stopping=False` and `do_sample=False`. Scores are summed
/// in f64 here, in f32 there.
pub fn beam_search(model: &Gpt, prompt: &[u32], config: &BeamConfig) -> Result<Hypothesis, GenerateError> {
    config.validate()?;
    check_prompt(model, 0, prompt)?;
    let device = model.device();
    let max_tokens = config.max_tokens.min(model.config().max_seq_len - prompt.len());
    let n_candidates = config.n_beams * (1 + config.stop.len()).max(2);

    let mut cache = Cache::new(model, 1, prompt.len() + max_tokens - 1);
    let mut running = vec![Beam { ids: Vec::new(), log_probs: Vec::new(), sum: 0.0 }];
    let mut finished: Vec<Hypothesis> = Vec::new();
    let mut input: Vec<i32> = prompt.iter().map(|&id| id as i32).collect();
    for length in 1..=max_tokens {
        let shape = [running.len(), input.len() / running.len()];
        let hidden = model.decode(Tensor::<2, Int>::from_data(TensorData::new(input, shape), &device), &mut cache);
        let [_, seq, _] = hidden.dims();
        let mut logits = logits_of(model, hidden.narrow(1, seq - 1, 1))?; // [n_running, vocab_size]
        let candidates = best_extensions(&running, prompt, &mut logits, n_candidates, config.repetition_penalty)?;

        let scale = (length as f64).powf(config.length_penalty);
        let mut next = Vec::with_capacity(config.n_beams);
        for (rank, candidate) in candidates.into_iter().enumerate() {
            let stopped = config.stop.contains(&candidate.id);
            if stopped || length == max_tokens {
                if rank < config.n_beams {
                    let Beam { ids, log_probs, sum } = candidate.extend(&running);
                    let finish = if stopped { Finish::Stop } else { Finish::Length };
                    finished.push(Hypothesis { ids, log_probs, score: sum / scale, finish });
                }
            } else if next.len() < config.n_beams {
                next.push(candidate);
            }
        }
        finished.sort_by(|a, b| b.score.total_cmp(&a.score)); // stable: of equals the earlier found stays first
        finished.truncate(config.n_beams);

        let Some(best) = next.first() else { break };
        let full = finished.len() == config.n_beams;
        if full && best.sum / scale <= finished[finished.len() - 1].score {
            break;
        }
        cache.keep_rows(&next.iter().map(|candidate| candidate.beam_idx).collect::<Vec<_>>());
        input = next.iter().map(|candidate| candidate.id as i32).collect();
        running = next.into_iter().map(|candidate| candidate.extend(&running)).collect();
    }
    Ok(finished.swap_remove(0))
}

/// A continuation on its way.
struct Beam {
    ids: Vec<u32>,
    log_probs: Vec<f32>,
    /// Sum of the log-probabilities, after the repetition penalty.
    sum: f64,
}

/// A running beam with one more token.
struct Candidate {
    beam_idx: usize,
    id: u32,
    log_prob: f32,
    sum: f64,
}

impl Candidate {
    fn extend(self, running: &[Beam]) -> Beam {
        let beam = &running[self.beam_idx];
        let mut ids = Vec::with_capacity(beam.ids.len() + 1);
        ids.extend_from_slice(&beam.ids);
        ids.push(self.id);
        let mut log_probs = Vec::with_capacity(ids.len());
        log_probs.extend_from_slice(&beam.log_probs);
        log_probs.push(self.log_prob);
        Beam { ids, log_probs, sum: self.sum }
    }
}

/// The `n_candidates` extensions with the largest sums, best first.
///
/// # Shapes
/// - `logits`: `running.len() · vocab_size`, row after row; turned into penalised log-probabilities
fn best_extensions(
    running: &[Beam],
    prompt: &[u32],
    logits: &mut [f32],
    n_candidates: usize,
    repetition_penalty: f64,
) -> Result<Vec<Candidate>, GenerateError> {
    let vocab_size = logits.len() / running.len();
    let mut candidates: Vec<Candidate> = Vec::with_capacity(2 * n_candidates);
    for ((beam_idx, beam), row) in running.iter().enumerate().zip(logits.chunks_mut(vocab_size)) {
        check_finite(row).map_err(|NonFiniteLogit { id, logit }| GenerateError::NonFinite {
            prompt_idx: 0,
            n_generated: beam.ids.len(),
            id,
            logit,
        })?;
        let log_total = log_sum_exp(row);
        let log_probs = row.iter().map(|&logit| (f64::from(logit) - log_total).max(f64::from(f32::MIN)) as f32);
        let penalised = (repetition_penalty != 1.0).then(|| {
            let mut penalised: Vec<f32> = log_probs.clone().collect();
            let mut seen = [prompt, &beam.ids].concat();
            seen.sort_unstable();
            seen.dedup();
            penalise(&mut penalised, &seen, repetition_penalty as f32);
            penalised
        });
        // No token can matter below the `n_candidates`-th best of its own row.
        let mut of_row: Vec<Candidate> = (0u32..)
            .zip(log_probs)
            .map(|(id, log_prob)| {
                let scored = penalised.as_ref().map_or(log_prob, |penalised| penalised[id as usize]);
                Candidate { beam_idx, id, log_prob, sum: beam.sum + f64::from(scored) }
            })
            .collect();
        keep_best(&mut of_row, n_candidates);
        candidates.append(&mut of_row);
        keep_best(&mut candidates, n_candidates);
    }
    candidates.sort_unstable_by(better);
    Ok(candidates)
}

/// Keeps the `n` best candidates, in no particular order.
fn keep_best(candidates: &mut Vec<Candidate>, n: usize) {
    if candidates.len() > n {
        candidates.select_nth_unstable_by(n - 1, better);
        candidates.truncate(n);
    }
}

fn better(a: &Candidate, b: &Candidate) -> std::cmp::Ordering {
    b.sum.total_cmp(&a.sum).then(a.beam_idx.cmp(&b.beam_idx)).then(a.id.cmp(&b.id))
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::generate::tests::random_model;
    use crate::generate::{GenerateOptions, SamplingConfig, generate};
    use crate::{GptConfig, Layout};
    use base::rng::Streams;

    const VOCAB: usize = 5;

    fn model() -> Gpt {
        let config =
            GptConfig { d_model: 16, n_layers: 1, n_heads: 2, d_ff: 32, max_seq_len: 12, ..GptConfig::gpt2(VOCAB) };
        random_model(&config, &Device::flex())
    }

    /// Log-probabilities of `answer` after `prompt`, uncached.
    fn log_probs(model: &Gpt, prompt: &[u32], answer: &[u32]) -> Vec<f64> {
        let ids: Vec<i32> = prompt.iter().chain(answer).map(|&id| id as i32).collect();
        let shape = [1, ids.len()];
        let ids = Tensor::from_data(TensorData::new(ids, shape), &model.device());
        let logits = model.forward(ids, &Layout::right_padded()).try_into_vec_as::<f32>().unwrap();
        let rows = logits.chunks(VOCAB).skip(prompt.len() - 1);
        rows.zip(answer).map(|(row, &id)| f64::from(row[id as usize]) - log_sum_exp(row)).collect()
    }

    /// Every answer of up to `max_tokens` tokens that ends there or at a stop token, with its score.
    fn all_answers(model: &Gpt, prompt: &[u32], config: &BeamConfig) -> Vec<(Vec<u32>, f64)> {
        let mut open = vec![Vec::new()];
        let mut done = Vec::new();
        while let Some(answer) = open.pop() {
            for id in 0..VOCAB as u32 {
                let longer = [answer.as_slice(), &[id]].concat();
                if config.stop.contains(&id) || longer.len() == config.max_tokens {
                    let sum: f64 = log_probs(model, prompt, &longer).iter().sum();
                    let score = sum / (longer.len() as f64).powf(config.length_penalty);
                    done.push((longer, score));
                } else {
                    open.push(longer);
                }
            }
        }
        done.sort_by(|a, b| b.1.total_cmp(&a.1));
        done
    }

    #[test]
    fn enough_beams_find_the_best_answer_of_all() {
        let model = model();
        for stop in [vec![], vec![2]] {
            for length_penalty in [0.0, 1.0, 3.0] {
                let config = BeamConfig {
                    n_beams: 125,
                    length_penalty,
                    max_tokens: 3,
                    stop: stop.clone(),
                    ..BeamConfig::default()
                };
                let (ids, score) = all_answers(&model, &[1, 4], &config).remove(0);
                let best = beam_search(&model, &[1, 4], &config).unwrap();
                assert_eq!(best.ids, ids, "{config:?}");
                assert!((best.score - score).abs() < 1e-5, "{} for {score}", best.score);
                for (found, expected) in best.log_probs.iter().zip(log_probs(&model, &[1, 4], &ids)) {
                    assert!((f64::from(*found) - expected).abs() < 1e-5);
                }
            }
        }
    }

    #[test]
    fn one_beam_is_greedy_decoding() {
        let model = model();
        let config = BeamConfig { n_beams: 1, max_tokens: 8, ..BeamConfig::default() };
        let beam = beam_search(&model, &[3], &config).unwrap();
        let greedy = SamplingConfig::greedy(8, vec![]);
        let greedy = generate(&model, &[vec![3]], &greedy, &Streams::new(0), 0, GenerateOptions::default()).unwrap();
        assert_eq!(beam.ids, greedy[0].ids);
        assert_eq!(beam.finish, Finish::Length);
    }

    #[test]
    fn the_answer_ends_with_the_context_window() {
        let model = model();
        let best = beam_search(&model, &[0; 8], &BeamConfig::default()).unwrap();
        assert_eq!((best.ids.len(), best.finish), (4, Finish::Length));
        let error = beam_search(&model, &[0; 12], &BeamConfig::default()).unwrap_err();
        assert!(matches!(error, GenerateError::PromptTooLong { n_tokens: 12, max_seq_len: 12, .. }));
    }

    #[test]
    fn settings_out_of_range_are_named() {
        let base = BeamConfig::default();
        let cases = [
            (BeamConfig { n_beams: 0, ..base.clone() }, "n_beams"),
            (BeamConfig { n_beams: usize::MAX, ..base.clone() }, "n_beams"),
            (BeamConfig { length_penalty: 1e6, ..base.clone() }, "length_penalty"),
            (BeamConfig { repetition_penalty: 1e-300, ..base.clone() }, "repetition_penalty"),
            (BeamConfig { length_penalty: f64::NAN, ..base.clone() }, "length_penalty"),
            (BeamConfig { repetition_penalty: -1.0, ..base.clone() }, "repetition_penalty"),
            (BeamConfig { max_tokens: 0, ..base.clone() }, "max_tokens"),
        ];
        for (config, name) in cases {
            let message = config.validate().unwrap_err().to_string();
            assert!(message.starts_with(&format!("invalid `{name}`: expected ")), "{message}");
        }
    }
}
