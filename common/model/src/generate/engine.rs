//! Batched decoding over the key/value cache.

use std::ops::ControlFlow;

use burn::tensor::{Int, Tensor, TensorData};

use super::{GenerateError, NonFiniteLogit, Sampler, SamplingConfig, check_prompt, last_logits};
use crate::{Cache, Gpt};
use base::rng::Streams;
use kernels;

/// Called with a prompt's index and each of its new tokens, as they come; `Break` ends that answer.
pub type OnToken<'a> = &'a mut dyn FnMut(usize, u32) -> ControlFlow<()>;

/// How a set of prompts is worked through. Nothing here changes what is sampled, unless `on_token` breaks off.
#[derive(Default)]
pub struct GenerateOptions<'a> {
    /// Most prompts decoded together; 0 means all. More are decoded in groups of similar length.
    pub max_batch: usize,
    /// Watches the tokens: to print them, to count them, to stop at a text or on Ctrl-C.
    pub on_token: Option<OnToken<'a>>,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// With one of the stop tokens, which is its last.
    Stop,
    /// At `max_tokens`, or where the context window ends.
    Length,
    /// [`OnToken`] broke off.
    Interrupted,
}

/// The continuation of one prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Generated {
    /// The new tokens, with the stop token where there is one.
    pub ids: Vec<u32>,
    /// The log-probability of each in nats, see [`Choice::log_prob`](super::Choice::log_prob).
    pub log_probs: Vec<f32>,
    /// Why it ended.
    pub finish: Finish,
}

/// Continues every prompt, in one batch or several, and returns the answers in the order of the prompts.
///
/// Prompts are padded on the left, read in one pass, and then all unfinished rows take one token a step. Prompt `i`
/// draws from stream `("sampling", first_row + i)`, so its answer does not depend on the others. An answer ends at a
/// stop token, at `max_tokens`, or where prompt and answer fill the model's context window.
///
/// The model should be on a plain device: on an autodiff device every step would be recorded.
///
/// # Errors
/// For an invalid `config`, a prompt that is empty, fills the window or holds an unknown token, and for logits that
/// are not finite. `on_token` may have been called by then.
pub fn generate(
    model: &Gpt,
    prompts: &[Vec<u32>],
    config: &SamplingConfig,
    streams: &Streams,
    first_row: u64,
    options: GenerateOptions<'_>,
) -> Result<Vec<Generated>, GenerateError> {
    config.validate()?;
    for (prompt_idx, prompt) in prompts.iter().enumerate() {
        check_prompt(model, prompt_idx, prompt)?;
    }
    let max_seq_len = model.config().max_seq_len;
    let mut rows: Vec<Row<'_>> = prompts
        .iter()
        .enumerate()
        .map(|(prompt_idx, prompt)| {
            let rng = streams.get("sampling", first_row + prompt_idx as u64);
            let max_tokens = config.max_tokens.min(max_seq_len - prompt.len());
            Row {
                prompt_idx,
                prompt,
                max_tokens,
                sampler: Sampler::new(config, prompt, rng),
                ids: Vec::with_capacity(max_tokens),
                log_probs: Vec::with_capacity(max_tokens),
                finish: None,
            }
        })
        .collect();

    // Longest first: neighbours need little padding, and what needs most memory runs (or fails) first.
    rows.sort_by_key(|row| std::cmp::Reverse(row.prompt.len()));
    let mut on_token = options.on_token;
    let max_batch = if options.max_batch == 0 { rows.len().max(1) } else { options.max_batch };
    for group in rows.chunks_mut(max_batch) {
        run_group(model, group, config, &mut on_token)?;
    }

    rows.sort_by_key(|row| row.prompt_idx);
    Ok(rows.into_iter().map(Row::into_generated).collect())
}

/// One prompt on its way.
struct Row<'p> {
    prompt_idx: usize,
    prompt: &'p [u32],
    max_tokens: usize,
    sampler: Sampler,
    ids: Vec<u32>,
    log_probs: Vec<f32>,
    finish: Option<Finish>,
}

/// Runs rows of one batch to their ends.
fn run_group(
    model: &Gpt,
    rows: &mut [Row<'_>],
    config: &SamplingConfig,
    on_token: &mut Option<OnToken<'_>>,
) -> Result<(), GenerateError> {
    let longest = rows.iter().map(|row| row.prompt.len()).max().unwrap_or(0);
    let max_tokens = rows.iter().map(|row| row.max_tokens).max().unwrap_or(0);
    let n_pads: Vec<usize> = rows.iter().map(|row| longest - row.prompt.len()).collect();
    let mut ids: Vec<i32> = Vec::with_capacity(rows.len() * longest);
    for (row, &n_pads) in rows.iter().zip(&n_pads) {
        ids.extend(std::iter::repeat_n(0, n_pads)); // any token: padding is never looked at
        ids.extend(row.prompt.iter().map(|&id| id as i32));
    }
    let mut group = Group {
        model,
        stop: &config.stop,
        // The last token is never read back.
        cache: Cache::new(model, &n_pads, longest + max_tokens - 1),
        rows: rows.iter_mut().collect(),
        n_steps: 0,
    };
    if group.step(ids, longest, on_token)? {
        return Ok(());
    }
    kernels::standing_by(|| {
        loop {
            let last = |row: &&mut Row<'_>| row.ids[row.ids.len() - 1] as i32;
            let ids = group.rows.iter().map(last).collect();
            if group.step(ids, 1, on_token)? {
                return Ok(());
            }
        }
    })
}

/// Rows that are decoded together.
struct Group<'g, 'p> {
    model: &'g Gpt,
    stop: &'g [u32],
    cache: Cache,
    /// One entry for each row of the cache; finished ones stay, with their last token and unheeded, until leaving pays.
    rows: Vec<&'g mut Row<'p>>,
    n_steps: usize,
}

impl Group<'_, '_> {
    /// Reads `seq` tokens of each row and gives each unfinished row one more; returns whether all are finished.
    ///
    /// # Shapes
    /// - `ids`: `n_rows · seq`
    fn step(&mut self, ids: Vec<i32>, seq: usize, on_token: &mut Option<OnToken<'_>>) -> Result<bool, GenerateError> {
        let (model, rows) = (self.model, &mut self.rows);
        let input = Tensor::<2, Int>::from_data(TensorData::new(ids, [rows.len(), seq]), &model.device());
        let hidden = model.decode(input, &mut self.cache); // [n_rows, seq, d_model]
        choose(rows, last_logits(model, hidden)?, self.stop)?;
        self.n_steps += 1;
        let n_steps = self.n_steps;
        if let Some(on_token) = on_token {
            for row in rows.iter_mut().filter(|row| row.ids.len() == n_steps) {
                if on_token(row.prompt_idx, row.ids[n_steps - 1]).is_break() {
                    row.finish = row.finish.or(Some(Finish::Interrupted));
                }
            }
        }
        let n_live = rows.iter().filter(|row| row.finish.is_none()).count();
        // A finished row must leave where its context window ends, though others go on.
        let max_seq_len = model.config().max_seq_len;
        let at_end = rows.iter().any(|row| row.prompt.len() + n_steps > max_seq_len);
        if n_live > 0 && (n_live * 4 <= rows.len() * 3 || at_end) {
            let live: Vec<usize> = (0..rows.len()).filter(|&i| rows[i].finish.is_none()).collect();
            self.cache.keep_rows(&live);
            rows.retain(|row| row.finish.is_none());
        }
        Ok(n_live == 0)
    }
}

/// Gives every unfinished row its next token.
///
/// # Shapes
/// - `logits`: `n_rows · vocab_size`, row after row
fn choose(rows: &mut [&mut Row<'_>], mut logits: Vec<f32>, stop: &[u32]) -> Result<(), GenerateError> {
    let vocab_size = logits.len() / rows.len();
    let mut tasks: Vec<_> =
        rows.iter_mut().zip(logits.chunks_mut(vocab_size)).map(|(row, logits)| (row, logits, None)).collect();
    kernels::for_each_of(&mut tasks, |(row, logits, failed)| *failed = row.choose(logits, stop).err());
    let failed = tasks.into_iter().filter_map(|(.., failed)| failed).min_by_key(|&(prompt_idx, _)| prompt_idx);
    failed.map_or(Ok(()), |(_, error)| Err(error))
}

impl Row<'_> {
    /// Takes the next token, unless the row is finished. An error comes with the prompt's index.
    fn choose(&mut self, logits: &mut [f32], stop: &[u32]) -> Result<(), (usize, GenerateError)> {
        if self.finish.is_some() {
            return Ok(());
        }
        let choice = self.sampler.choose(logits).map_err(|NonFiniteLogit { id, logit }| {
            let (prompt_idx, n_generated) = (self.prompt_idx, self.ids.len());
            (prompt_idx, GenerateError::NonFinite { prompt_idx, n_generated, id, logit })
        })?;
        self.ids.push(choice.id);
        self.log_probs.push(choice.log_prob);
        if stop.contains(&choice.id) {
            self.finish = Some(Finish::Stop);
        } else if self.ids.len() == self.max_tokens {
            self.finish = Some(Finish::Length);
        }
        Ok(())
    }

    fn into_generated(self) -> Generated {
        let finish = self.finish.expect("a group runs until all its rows are finished");
        Generated { ids: self.ids, log_probs: self.log_probs, finish }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use proptest::prelude::*;

    use super::*;
    use crate::generate::tests::random_model as model;
    use crate::{GptConfig, Layout, NormPlacement, Positions};
    use kernels::Kernels;

    // Sums of a few dozen f32 products of order one, in another order.
    const REORDERED: f32 = 1e-5;

    fn config(positions: Positions, norm: NormPlacement) -> GptConfig {
        GptConfig {
            d_model: 16,
            n_layers: 2,
            n_heads: 2,
            d_ff: 32,
            max_seq_len: 48,
            positions,
            norm,
            tie_embeddings: false,
            ..GptConfig::gpt2(37)
        }
    }

    fn small() -> Gpt {
        model(&config(Positions::Learned, NormPlacement::Pre), &Device::flex())
    }

    #[allow(deprecated)] // Burn calls ndarray superseded by flex; it stays the second opinion here
    fn devices() -> [Device; 2] {
        [Device::flex(), Device::ndarray()]
    }

    fn prompts(lengths: &[usize]) -> Vec<Vec<u32>> {
        let mut rng = Streams::new(5).get("test", 0);
        lengths.iter().map(|&n| (0..n).map(|_| rng.below(37) as u32).collect()).collect()
    }

    fn run(model: &Gpt, prompts: &[Vec<u32>], config: &SamplingConfig, first_row: u64) -> Vec<Generated> {
        generate(model, prompts, config, &Streams::new(1), first_row, GenerateOptions::default()).unwrap()
    }

    /// Log-probabilities of `answer` after `prompt` by one uncached forward pass in f32 and a softmax in f64.
    fn log_probs(model: &Gpt, prompt: &[u32], answer: &[u32], temperature: f64) -> Vec<f32> {
        let ids: Vec<i32> = prompt.iter().chain(answer).map(|&id| id as i32).collect();
        let shape = [1, ids.len()];
        let ids = Tensor::from_data(TensorData::new(ids, shape), &model.device());
        let logits = model.forward(ids, &Layout::right_padded()).try_into_vec_as::<f32>().unwrap();
        let rows = logits.chunks(model.config().vocab_size).skip(prompt.len() - 1);
        rows.zip(answer)
            .map(|(row, &id)| {
                let total: f64 = row.iter().map(|&x| (f64::from(x) / temperature).exp()).sum();
                (f64::from(row[id as usize]) / temperature - total.ln()) as f32
            })
            .collect()
    }

    fn assert_near(found: &[f32], expected: &[f32], what: &str) {
        assert_eq!(found.len(), expected.len(), "{what}");
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < REORDERED * expected.abs().max(1.0), "{what}: {found} for {expected}");
        }
    }

    #[test]
    fn cached_decoding_equals_the_full_forward() {
        let sampling = SamplingConfig { temperature: 0.9, max_tokens: 30, ..SamplingConfig::default() };
        for device in devices() {
            for positions in [Positions::Learned, Positions::Sinusoidal] {
                for norm in [NormPlacement::Pre, NormPlacement::Post] {
                    for kernels in [Kernels::Plain, Kernels::Fused] {
                        let model = model(&config(positions, norm), &device).with_kernels(kernels);
                        let prompts = prompts(&[9, 1, 5]);
                        for (prompt, answer) in prompts.iter().zip(run(&model, &prompts, &sampling, 0)) {
                            assert_eq!(answer.ids.len(), 30);
                            let expected = log_probs(&model, prompt, &answer.ids, 0.9);
                            let what = format!("{device:?} {positions:?} {norm:?} {kernels:?}");
                            assert_near(&answer.log_probs, &expected, &what);
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_batch_equals_its_rows_alone() {
        let sampling = SamplingConfig { max_tokens: 20, stop: vec![3, 4, 5], ..SamplingConfig::default() };
        for device in devices() {
            let model = model(&config(Positions::Sinusoidal, NormPlacement::Post), &device);
            let prompts = prompts(&[4, 12, 1, 7, 7, 20, 2, 3]);
            let together = run(&model, &prompts, &sampling, 100);
            let lengths: Vec<usize> = together.iter().map(|answer| answer.ids.len()).collect();
            assert!(lengths.iter().any(|&n| n < 20), "no row left the batch early: {lengths:?}");
            for (i, (prompt, together)) in prompts.iter().zip(&together).enumerate() {
                let alone = run(&model, std::slice::from_ref(prompt), &sampling, 100 + i as u64).remove(0);
                assert_eq!(alone.ids, together.ids);
                assert_eq!(alone.finish, together.finish);
                assert_near(&alone.log_probs, &together.log_probs, "alone");
            }
        }
    }

    #[test]
    fn the_batch_size_does_not_matter() {
        let sampling = SamplingConfig { max_tokens: 8, stop: vec![1], ..SamplingConfig::default() };
        let (model, prompts) = (small(), prompts(&[4, 12, 1, 7, 7, 20, 2]));
        let together = run(&model, &prompts, &sampling, 0);
        for max_batch in [1, 2, 3, 7, 100] {
            let options = GenerateOptions { max_batch, on_token: None };
            let grouped = generate(&model, &prompts, &sampling, &Streams::new(1), 0, options).unwrap();
            let ids = |answers: &[Generated]| answers.iter().map(|answer| answer.ids.clone()).collect::<Vec<_>>();
            assert_eq!(ids(&grouped), ids(&together), "in batches of {max_batch}");
        }
    }

    #[test]
    fn prompt_and_answer_fill_the_context_window_and_no_more() {
        let (model, prompts) = (small(), prompts(&[47, 1, 40, 3]));
        let sampling = SamplingConfig { max_tokens: 45, ..SamplingConfig::default() };
        let answers = run(&model, &prompts, &sampling, 0);
        assert_eq!(answers.iter().map(|answer| answer.ids.len()).collect::<Vec<_>>(), [1, 45, 8, 45]);
        assert!(answers.iter().all(|answer| answer.finish == Finish::Length));
        for (prompt, answer) in prompts.iter().zip(&answers) {
            assert_near(&answer.log_probs, &log_probs(&model, prompt, &answer.ids, 1.0), "at the window's end");
        }
    }

    #[test]
    fn the_stop_token_ends_the_answer_and_is_part_of_it() {
        let (model, prompts) = (small(), prompts(&[3]));
        let greedy = run(&model, &prompts, &SamplingConfig::greedy(12, vec![]), 0).remove(0);
        assert_eq!(greedy.finish, Finish::Length);
        let stop = greedy.ids[6];
        let first = greedy.ids.iter().position(|&id| id == stop).unwrap();
        let stopped = run(&model, &prompts, &SamplingConfig::greedy(12, vec![36, stop]), 0).remove(0);
        assert_eq!(stopped.ids, greedy.ids[..=first]);
        assert_eq!(stopped.finish, Finish::Stop);
    }

    #[test]
    fn on_token_sees_every_token_and_can_break_off() {
        let (model, prompts) = (small(), prompts(&[3, 8, 5]));
        let sampling = SamplingConfig { max_tokens: 10, ..SamplingConfig::default() };
        let mut seen = vec![Vec::new(); 3];
        let mut watch = |prompt_idx: usize, id: u32| {
            seen[prompt_idx].push(id);
            if prompt_idx == 1 && seen[1].len() == 4 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let options = GenerateOptions { max_batch: 0, on_token: Some(&mut watch) };
        let answers = generate(&model, &prompts, &sampling, &Streams::new(1), 0, options).unwrap();
        assert_eq!(answers.iter().map(|answer| answer.ids.clone()).collect::<Vec<_>>(), seen);
        assert_eq!(answers.iter().map(|answer| answer.ids.len()).collect::<Vec<_>>(), [10, 4, 10]);
        assert_eq!(answers[1].finish, Finish::Interrupted);
        let undisturbed = run(&model, &prompts, &sampling, 0);
        assert_eq!(answers[0], undisturbed[0]);
        assert_eq!(answers[1].ids, undisturbed[1].ids[..4]);
    }

    #[test]
    fn prompts_the_model_cannot_take_are_refused() {
        let model = small();
        let error = |prompt: Vec<u32>| {
            let prompts = [vec![1], prompt];
            let sampling = SamplingConfig::default();
            let options = GenerateOptions::default();
            generate(&model, &prompts, &sampling, &Streams::new(1), 0, options).unwrap_err().to_string()
        };
        assert!(error(vec![]).starts_with("prompt 1 is empty\nhint: "));
        assert!(error(vec![0; 48]).starts_with("prompt 1 is too long: 48 tokens"));
        assert!(error(vec![0, 37]).starts_with("token 37 of prompt 1 is outside the model's vocabulary of 37\nhint: "));
        assert!(run(&model, &[], &SamplingConfig::default(), 0).is_empty());
    }

    #[test]
    fn weights_with_nan_are_an_error() {
        let config = config(Positions::Learned, NormPlacement::Pre);
        let mut named = small().to_named();
        named.get_mut("head").unwrap().data[16 * 5] = f32::NAN;
        let model = Gpt::from_named(&config, named, &Device::flex()).unwrap();
        let sampling = SamplingConfig::default();
        let options = GenerateOptions::default();
        let error = generate(&model, &prompts(&[2, 3]), &sampling, &Streams::new(1), 0, options).unwrap_err();
        let GenerateError::NonFinite { prompt_idx, n_generated, id, logit } = error else { panic!("{error}") };
        assert_eq!((prompt_idx, n_generated, id), (0, 0, 5));
        assert!(logit.is_nan());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(12))]
        #[test]
        fn every_answer_fills_its_window_or_its_length(
            lengths in prop::collection::vec(1usize..48, 1..12),
            max_tokens in 1usize..60,
            max_batch in 0usize..5,
        ) {
            let (model, prompts) = (small(), prompts(&lengths));
            let sampling = SamplingConfig { max_tokens, ..SamplingConfig::default() };
            let options = GenerateOptions { max_batch, on_token: None };
            let answers = generate(&model, &prompts, &sampling, &Streams::new(1), 0, options).unwrap();
            for (length, answer) in lengths.iter().zip(&answers) {
                prop_assert_eq!(answer.ids.len(), max_tokens.min(48 - length));
            }
        }
    }
}
