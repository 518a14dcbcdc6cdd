//! Decoding of many prompts: against the uncached forward pass, and whatever the batch.

use std::ops::ControlFlow;

use burn::tensor::{Device, Tensor, TensorData};
use proptest::prelude::*;

use super::{Finish, GenerateError, GenerateOptions, Generated, Limits, Request, SamplingConfig, Scheduler, generate};
use crate::adapter::LoraConfig;
use crate::params::Output;
use crate::{Gpt, GptConfig, Layout, NormPlacement, Positions, hf};
use base::rng::Streams;
use kernels::Kernels;

// Sums of a few dozen f32 products of order one, in another order.
const REORDERED: f32 = 1e-5;

/// A random model whose distributions are far from uniform.
pub(super) fn random_model(config: &GptConfig, device: &Device) -> Gpt {
    let mut named = Gpt::new(config, &Streams::new(11), device).to_named();
    let mut rng = Streams::new(12).get("test", 0);
    for tensor in named.values_mut() {
        for x in &mut tensor.data {
            *x += 0.3 * rng.normal() as f32;
        }
    }
    Gpt::from_named(config, named, device).unwrap()
}

/// `model` with adapters that change what it computes; `None` where its architecture takes none.
pub(super) fn adapted(model: Gpt, lora: &LoraConfig) -> Option<Gpt> {
    let (config, device) = (model.config().clone(), model.device());
    let adapters = hf::adapters_of(&config, lora).ok()?;
    let mut named = adapters.initial(&config, Output::Logits, &Streams::new(1));
    // Half of the initial numbers are zero.
    let numbers = named.values_mut().flat_map(|tensor| &mut tensor.data);
    numbers.enumerate().for_each(|(i, x)| *x += (i % 5) as f32 * 0.1);
    Some(model.with_adapters(&adapters, named, &device).expect("fits"))
}

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
    random_model(&config(Positions::Learned, NormPlacement::Pre), &Device::flex())
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
    assert_within(REORDERED, found, expected, what);
}

fn assert_within(tolerance: f32, found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        assert!((found - expected).abs() < tolerance * expected.abs().max(1.0), "{what}: {found} for {expected}");
    }
}

#[test]
fn cached_decoding_equals_the_full_forward() {
    let sampling = SamplingConfig { temperature: 0.9, max_tokens: 30, ..SamplingConfig::default() };
    for device in devices() {
        for positions in [Positions::Learned, Positions::Sinusoidal] {
            for norm in [NormPlacement::Pre, NormPlacement::Post] {
                for kernels in [Kernels::Plain, Kernels::Fused] {
                    let model = random_model(&config(positions, norm), &device).with_kernels(kernels);
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
        let model = random_model(&config(Positions::Sinusoidal, NormPlacement::Post), &device);
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

/// Decodes the requests `order` of `prompts`, in that order, at most `max_rows` together; calls `watch` after every step.
fn scheduled(
    model: &Gpt,
    prompts: &[Vec<u32>],
    sampling: &SamplingConfig,
    order: &[usize],
    limits: Limits,
    mut watch: impl FnMut(&mut Scheduler<'_>),
) -> Vec<Generated> {
    let mut scheduler = Scheduler::new(model, limits).unwrap();
    for &id in order {
        let rng = Streams::new(1).get("sampling", id as u64);
        scheduler
            .submit(Request { id, prompt: prompts[id].clone(), sampling: sampling.clone(), rng, n_likeliest: 0 })
            .unwrap();
    }
    let nothing = Generated { ids: Vec::new(), log_probs: Vec::new(), finish: Finish::Interrupted };
    let mut answers = vec![nothing; prompts.len()];
    while !scheduler.is_idle() {
        for token in scheduler.step().unwrap() {
            answers[token.request].ids.push(token.id);
            answers[token.request].log_probs.push(token.log_prob);
            answers[token.request].finish = token.finish.unwrap_or(answers[token.request].finish);
        }
        watch(&mut scheduler);
    }
    answers
}

fn ids(answers: &[Generated]) -> Vec<&[u32]> {
    answers.iter().map(|answer| &*answer.ids).collect()
}

#[test]
fn the_batch_size_does_not_matter() {
    let sampling = SamplingConfig { max_tokens: 8, stop: vec![1], ..SamplingConfig::default() };
    for device in devices() {
        for kernels in [Kernels::Plain, Kernels::Fused] {
            let model = random_model(&config(Positions::Learned, NormPlacement::Pre), &device).with_kernels(kernels);
            let prompts = prompts(&[4, 12, 1, 7, 7, 20, 2, 5, 3, 3, 9]);
            let together = run(&model, &prompts, &sampling, 0);
            for max_batch in [1, 2, 3, 7, 100] {
                let options = GenerateOptions { max_batch, ..GenerateOptions::default() };
                let limited = generate(&model, &prompts, &sampling, &Streams::new(1), 0, options).unwrap();
                assert_eq!(ids(&limited), ids(&together), "at most {max_batch} together");
                for (limited, together) in limited.iter().zip(&together) {
                    assert_eq!(limited.finish, together.finish);
                    assert_near(&limited.log_probs, &together.log_probs, "limited");
                }
            }
        }
    }
}

#[test]
fn ten_thousand_prompts_take_no_more_rows_than_allowed() {
    let model = small();
    let prompts = prompts(&(0..10_000).map(|i| 1 + i % 7).collect::<Vec<_>>());
    let sampling = SamplingConfig { max_tokens: 5, stop: vec![1, 2, 3, 30], ..SamplingConfig::default() };
    let order: Vec<usize> = (0..prompts.len()).collect();
    for batch_invariant in [false, true] {
        let limits = Limits { max_rows: 24, capacity: 11, batch_invariant, prompt_piece: None };
        let (mut most_rows, mut most_positions, mut n_full) = (0, 0, 0);
        let answers = scheduled(&model, &prompts, &sampling, &order, limits, |scheduler| {
            most_rows = most_rows.max(scheduler.cache().n_rows());
            most_positions = most_positions.max(scheduler.cache().lens().iter().sum());
            n_full += usize::from(scheduler.n_running() > 16);
        });
        assert!(most_rows <= 24 && most_positions <= 24 * 11, "{most_rows} rows, {most_positions} positions");
        assert!(answers.iter().all(|answer| !answer.ids.is_empty() && answer.finish != Finish::Interrupted));
        // Refilled rows: most steps run with most rows, or there would be some 2,000 of them and more.
        assert!((1_000..2_000).contains(&n_full), "{n_full} steps with most rows");
    }
}

#[test]
fn a_cancelled_request_frees_its_row_and_disturbs_nobody() {
    let (model, prompts) = (small(), prompts(&[5, 3, 8, 2, 6]));
    let sampling = SamplingConfig { max_tokens: 12, ..SamplingConfig::default() };
    let limits = Limits { max_rows: 2, capacity: 40, batch_invariant: false, prompt_piece: None };
    let order = [0, 1, 2, 3, 4];
    let undisturbed = scheduled(&model, &prompts, &sampling, &order, limits, |_| ());
    let mut n_steps = 0;
    let answers = scheduled(&model, &prompts, &sampling, &order, limits, |scheduler| {
        n_steps += 1;
        if n_steps == 4 {
            scheduler.cancel(0); // running
            scheduler.cancel(3); // queued
            assert_eq!(scheduler.n_running(), 1);
        }
        assert!(scheduler.n_running() <= 2);
    });
    assert!((1..12).contains(&answers[0].ids.len()), "{:?}", answers[0]);
    assert_eq!(answers[0].ids, undisturbed[0].ids[..answers[0].ids.len()]);
    assert!(answers[3].ids.is_empty());
    for i in [1, 2, 4] {
        assert_eq!(answers[i].ids, undisturbed[i].ids);
    }
}

#[test]
fn requests_sample_each_in_its_own_way() {
    let (model, prompts) = (small(), prompts(&[4, 4]));
    let mut scheduler =
        Scheduler::new(&model, Limits { max_rows: 8, capacity: 48, batch_invariant: false, prompt_piece: None })
            .unwrap();
    let samplings = [SamplingConfig::greedy(3, vec![]), SamplingConfig { max_tokens: 9, ..SamplingConfig::default() }];
    for (id, (prompt, sampling)) in prompts.iter().zip(&samplings).enumerate() {
        let rng = Streams::new(1).get("sampling", id as u64);
        scheduler
            .submit(Request { id, prompt: prompt.clone(), sampling: sampling.clone(), rng, n_likeliest: 0 })
            .unwrap();
    }
    let mut found = vec![Vec::new(); 2];
    while !scheduler.is_idle() {
        for token in scheduler.step().unwrap() {
            found[token.request].push(token.id);
        }
    }
    for (i, sampling) in samplings.iter().enumerate() {
        assert_eq!(found[i], run(&model, &prompts, sampling, 0)[i].ids);
    }
}

#[test]
fn every_stop_token_of_a_list_ends_the_answer() {
    let (model, prompts) = (small(), prompts(&[3]));
    let free = run(&model, &prompts, &SamplingConfig::greedy(12, vec![]), 0).remove(0);
    for &stop in &free.ids {
        let first = free.ids.iter().position(|&id| id == stop).unwrap();
        let others = (0..37).filter(|id| !free.ids.contains(id));
        let sampling = SamplingConfig::greedy(12, others.chain([stop]).collect());
        let stopped = run(&model, &prompts, &sampling, 0).remove(0);
        assert_eq!((&*stopped.ids, stopped.finish), (&free.ids[..=first], Finish::Stop));
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
    let options = GenerateOptions { on_token: Some(&mut watch), ..GenerateOptions::default() };
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
        max_tokens in prop_oneof![1usize..60, Just(usize::MAX)],
        max_batch in 0usize..5,
    ) {
        let (model, prompts) = (small(), prompts(&lengths));
        let sampling = SamplingConfig { max_tokens, ..SamplingConfig::default() };
        let options = GenerateOptions { max_batch, ..GenerateOptions::default() };
        let answers = generate(&model, &prompts, &sampling, &Streams::new(1), 0, options).unwrap();
        for (length, answer) in lengths.iter().zip(&answers) {
            prop_assert_eq!(answer.ids.len(), max_tokens.min(48 - length));
        }
    }

    /// Wide enough for each way in which the fused kernels cut up their sums.
    #[test]
    fn log_probs_keep_their_bits_in_any_batch_and_order(
        lengths in prop::collection::vec(1usize..30, 1..90),
        limits in (1usize..100, 1usize..100),
        seed: u64,
    ) {
        let shape = GptConfig { d_model: 96, d_ff: 384, ..config(Positions::Sinusoidal, NormPlacement::Post) };
        let (model, prompts) = (random_model(&shape, &Device::flex()), prompts(&lengths));
        let sampling = SamplingConfig { max_tokens: 9, stop: vec![1, 4], ..SamplingConfig::default() };
        let mut order: Vec<usize> = (0..lengths.len()).collect();
        let limit = |max_rows| Limits { max_rows, capacity: 40, batch_invariant: true, prompt_piece: None };
        let answers = scheduled(&model, &prompts, &sampling, &order, limit(limits.0), |_| ());
        Streams::new(seed).get("order", 0).shuffle(&mut order);
        prop_assert_eq!(&answers, &scheduled(&model, &prompts, &sampling, &order, limit(limits.1), |_| ()));
        let options = GenerateOptions { max_batch: limits.1, batch_invariant: true, ..GenerateOptions::default() };
        prop_assert_eq!(&answers, &generate(&model, &prompts, &sampling, &Streams::new(1), 0, options).unwrap());
        for (prompt, answer) in prompts.iter().zip(&answers).take(4) {
            // Sums of some hundred products.
            assert_within(10.0 * REORDERED, &answer.log_probs, &log_probs(&model, prompt, &answer.ids, 1.0), "uncached");
        }
    }
}
