//! Prompts in pieces: the same tokens and bits whatever runs beside them, and nobody waits for a long one.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;

use burn::tensor::Device;
use proptest::prelude::*;

use super::{Finish, Limits, Request, SampledToken, Scheduler};
use crate::adapter::LoraConfig;
use crate::generate::tests::{adapted, random_model};
use crate::generate::{GenerateOptions, SamplingConfig, generate};
use crate::{ALL_LINEAR, Activation, CHUNK, Gpt, GptConfig, NormPlacement, Positions};
use base::rng::Streams;
use kernels::Kernels;

fn limits(max_rows: usize, piece: usize) -> Limits {
    Limits { max_rows, capacity: 600, batch_invariant: true, prompt_piece: NonZeroUsize::new(piece) }
}

fn model() -> Gpt {
    let config = GptConfig {
        d_model: 48,
        n_layers: 2,
        n_heads: 4,
        d_ff: 96,
        max_seq_len: 700,
        positions: Positions::Sinusoidal,
        ..GptConfig::gpt2(61)
    };
    random_model(&config, &Device::flex())
}

fn prompt(n: usize) -> Vec<u32> {
    let mut rng = Streams::new(8).get("test", n as u64);
    (0..n).map(|_| rng.below(61) as u32).collect()
}

fn request(id: usize, n: usize, max_tokens: usize) -> Request {
    let sampling = SamplingConfig { max_tokens, stop: vec![7], ..SamplingConfig::default() };
    Request { id, prompt: prompt(n), sampling, rng: Streams::new(1).get("sampling", id as u64), n_likeliest: 2 }
}

/// The tokens of requests that are submitted at the given steps.
fn scheduled(model: &Gpt, limits: Limits, requests: &[(usize, Request)]) -> BTreeMap<usize, Vec<SampledToken>> {
    let mut scheduler = Scheduler::new(model, limits).unwrap();
    let mut found = BTreeMap::<usize, Vec<SampledToken>>::new();
    for step in 0.. {
        for (_, request) in requests.iter().filter(|(at, _)| *at == step) {
            scheduler.submit(request.clone()).unwrap();
        }
        if scheduler.is_idle() && requests.iter().all(|(at, _)| *at <= step) {
            break;
        }
        for token in scheduler.step().unwrap() {
            found.entry(token.request).or_default().push(token);
        }
        assert!(scheduler.n_running() <= limits.max_rows.min(64));
    }
    found
}

#[test]
fn a_long_prompt_stops_nobody() {
    let model = model();
    let mut scheduler = Scheduler::new(&model, limits(8, CHUNK)).unwrap();
    let talker = Request { sampling: SamplingConfig { max_tokens: 90, ..Default::default() }, ..request(0, 5, 90) };
    scheduler.submit(talker).unwrap();
    assert_eq!(scheduler.step().unwrap().len(), 1);
    scheduler.submit(request(1, 500, 3)).unwrap();
    scheduler.submit(request(2, 4, 3)).unwrap();
    let mut firsts = BTreeMap::new();
    for step in 0..60 {
        let tokens = scheduler.step().unwrap();
        assert!(tokens.iter().any(|token| token.request == 0), "step {step} gave the running request no token");
        for token in tokens {
            firsts.entry(token.request).or_insert(step);
        }
    }
    // One piece a step, and one for each prompt in the step in which two wait.
    assert!((500 / CHUNK - 1..=500_usize.div_ceil(CHUNK)).contains(&(firsts[&1] + 1)), "{firsts:?}");
    assert!(firsts[&2] <= 1, "the short prompt waited for the long one: {firsts:?}");
}

#[test]
fn a_cancelled_prompt_is_read_no_further() {
    let model = model();
    let mut scheduler = Scheduler::new(&model, limits(1, 16)).unwrap();
    scheduler.submit(request(0, 500, 3)).unwrap();
    scheduler.step().unwrap();
    assert!(!scheduler.reading.is_empty() && !scheduler.is_idle());
    scheduler.submit(request(1, 3, 3)).unwrap();
    scheduler.cancel(0);
    assert_eq!(scheduler.step().unwrap().first().map(|token| token.request), Some(1));
}

#[test]
fn logits_that_are_not_finite_end_their_request_alone() {
    let mut named = model().to_named();
    // Position 40 and whatever sees it.
    let config = GptConfig { positions: Positions::Learned, ..model().config().clone() };
    let table: Vec<f32> = (0..700 * 48).map(|i| if i / 48 == 40 { f32::NAN } else { 0.0 }).collect();
    let learned = Gpt::new(&config, &Streams::new(1), &Device::flex()).to_named();
    let (name, mut tensor) = learned.into_iter().find(|(name, _)| !named.contains_key(name)).unwrap();
    tensor.data = table;
    named.insert(name, tensor);
    let model = Gpt::from_named(&config, named, &Device::flex()).unwrap();
    let mut scheduler = Scheduler::new(&model, limits(8, 16)).unwrap();
    for (id, n) in [(0, 3), (1, 60), (2, 5)] {
        scheduler.submit(request(id, n, 9)).unwrap();
    }
    let mut failed = Vec::new();
    let mut ended = Vec::new();
    while !scheduler.is_idle() {
        for token in scheduler.step_each().unwrap() {
            match token {
                Ok(token) => ended.extend(token.finish.map(|_| token.request)),
                Err((request, _)) => failed.push(request),
            }
        }
    }
    ended.sort_unstable();
    assert_eq!((failed, ended), (vec![1], vec![0, 2]));
}

/// A model so wide that the products of up to three rows have other sums than those of more.
fn wide_model() -> Gpt {
    random_model(&GptConfig { d_model: 96, d_ff: 512, ..model().config().clone() }, &Device::flex())
}

#[test]
fn prompts_that_are_read_together_keep_the_bits_of_each_alone() {
    let model = wide_model();
    let together: Vec<_> = (0..12).map(|id| (0, request(id, 1 + id % 5, 6))).collect();
    let found = scheduled(&model, limits(16, 128), &together);
    for (_, request) in together {
        let id = request.id;
        assert_eq!(found[&id], scheduled(&model, limits(16, 128), &[(0, request)])[&id], "request {id}");
    }
}

#[test]
fn where_a_long_prompt_is_cut_changes_no_bit() {
    let model = wide_model();
    let limits = Limits { capacity: 700, ..limits(16, CHUNK) };
    let long = request(0, 690, 4);
    let alone = scheduled(&model, limits, &[(0, long.clone())]);
    // Where others wait, passes are longer.
    let others = (1..6).map(|id| (0, request(id, 600, 2)));
    let together = scheduled(&model, limits, &std::iter::once((0, long)).chain(others).collect::<Vec<_>>());
    assert_eq!(alone[&0], together[&0]);
}

#[test]
fn what_is_not_finite_reaches_no_later_request() {
    let config = GptConfig { tie_embeddings: false, ..model().config().clone() };
    let mut named = random_model(&config, &Device::flex()).to_named();
    let (_, embedding) = named.iter_mut().find(|(name, _)| name.contains("embed")).expect("the embedding");
    embedding.data[9 * 48..10 * 48].fill(f32::NAN);
    // Masked weights are multiplied like others where attention is not fused.
    let model = Gpt::from_named(&config, named, &Device::flex()).unwrap().with_kernels(Kernels::Plain);
    let mut scheduler = Scheduler::new(&model, limits(4, CHUNK)).unwrap();
    let greedy = SamplingConfig { max_tokens: 60, temperature: 0.0, ..Default::default() };
    let talker = Request { sampling: greedy, ..request(0, 1, 60) };
    scheduler.submit(Request { prompt: vec![1], ..talker }).unwrap();
    let mut failed = Vec::new();
    for step in 0..60 {
        let (prompt, id) = if step % 12 < 2 { (vec![9; 50], 100 + step) } else { (vec![3; 5], 200 + step) };
        if step % 2 == 0 {
            scheduler.submit(Request { prompt, ..request(id, 5, 3) }).unwrap();
        }
        failed.extend(scheduler.step_each().unwrap().into_iter().filter_map(|token| token.err().map(|(id, _)| id)));
    }
    assert_eq!(failed, [100, 112, 124, 136, 148], "requests with token 9");
}

/// An architecture of every family, small.
fn families() -> Vec<(&'static str, GptConfig)> {
    let [gpt2, llama, neox] = [GptConfig::gpt2(61), GptConfig::llama(61), GptConfig::gpt_neox(61)];
    let neox = GptConfig { head_dim: Some(16), ..neox };
    let post = GptConfig { norm: NormPlacement::Post, ..gpt2.clone() };
    let tanh = GptConfig { activation: Activation::GeluTanh, ..neox.clone() };
    let untied = GptConfig { tie_embeddings: false, n_kv_heads: None, ..llama.clone() };
    let families = [
        ("gpt2", gpt2),
        ("openai-gpt", post.clone()),
        ("post-norm, gated", GptConfig { gated: true, activation: Activation::Silu, ..post }),
        ("transformer", GptConfig::transformer(61)),
        ("llama", llama.clone()),
        ("untied, a key for each query", untied),
        ("qwen2", GptConfig { qkv_bias: true, ..llama.clone() }),
        ("qwen3", GptConfig { qk_norm: true, head_dim: Some(20), ..llama.clone() }),
        ("biases beside gates", GptConfig { mlp_bias: true, proj_bias: true, ..llama.clone() }),
        ("parallel, gated", GptConfig { parallel: true, ..llama }),
        ("gpt-neox", tanh),
        ("gpt-neox, exact", neox),
    ];
    let small = |config| GptConfig { d_model: 48, n_layers: 3, n_heads: 4, d_ff: 72, max_seq_len: 64, ..config };
    families.map(|(name, config)| (name, small(config))).to_vec()
}

/// All tokens, with the logits' bits in the log-probabilities of the whole vocabulary, and how many steps had free rows.
fn sampled(mut scheduler: Scheduler<'_>, n: usize) -> (Vec<SampledToken>, usize) {
    for id in 0..n {
        let request = request(id, 1 + id * 5 % 13, 3 + id * 7 % 20);
        scheduler.submit(Request { n_likeliest: 61, ..request }).unwrap();
    }
    let (mut tokens, mut n_ragged) = (Vec::new(), 0);
    while !scheduler.is_idle() {
        tokens.extend(scheduler.step().unwrap());
        n_ragged += usize::from((1..scheduler.rows.len()).contains(&scheduler.n_running()));
    }
    (tokens, n_ragged)
}

fn assert_a_decoder_changes_nothing(model: &Gpt, what: &str) {
    for (max_rows, batch_invariant, piece) in
        [(1, false, None), (3, false, None), (8, false, None), (8, true, Some(16))]
    {
        let limits =
            Limits { max_rows, capacity: 48, batch_invariant, prompt_piece: piece.and_then(NonZeroUsize::new) };
        let with = Scheduler::new(model, limits).unwrap();
        assert!(with.decoder.is_some(), "{what}: no decoder");
        let mut without = Scheduler::new(model, limits).unwrap();
        without.decoder = None;
        let ((with, n_ragged), (without, _)) = (sampled(with, 11), sampled(without, 11));
        assert!(max_rows == 1 || n_ragged > 0, "{what}: no row retired beside others");
        assert_eq!(with.len(), without.len(), "{what}, {limits:?}");
        let first = with.iter().zip(&without).position(|(with, without)| with != without);
        assert_eq!(first, None, "{what}, {limits:?}: token so many differs");
    }
}

#[test]
fn a_decoder_changes_no_token_and_no_bit() {
    for (name, config) in families().iter().filter(|(_, config)| config.activation != Activation::Gelu) {
        let model = random_model(config, &Device::flex());
        assert_a_decoder_changes_nothing(&model, name);
        assert_a_decoder_changes_nothing(&model.narrowed(), &format!("{name}, narrow"));
    }
}

#[test]
fn a_decoder_changes_nothing_beside_adapters() {
    let lora = LoraConfig { rank: 3, targets: vec![ALL_LINEAR.into()], ..LoraConfig::default() };
    for (name, config) in families() {
        let Some(model) = adapted(random_model(&config, &Device::flex()), &lora) else { continue };
        if config.gated {
            assert_a_decoder_changes_nothing(&model, name);
        } else {
            assert!(model.decoder().is_none(), "{name}: an adapter before an activation has no body");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10))]
    #[test]
    fn tokens_and_bits_do_not_depend_on_what_runs_beside(
        others in prop::collection::vec((0usize..12, 1usize..200, 1usize..40), 0..12),
        (length, max_tokens, at) in (1usize..300, 1usize..40, 0usize..9),
        max_rows in 1usize..9,
    ) {
        let model = model();
        let ours = request(99, length, max_tokens);
        let alone = scheduled(&model, limits(4, 32), &[(0, ours.clone())]).remove(&99).unwrap();
        let mut requests: Vec<_> =
            others.iter().enumerate().map(|(id, &(at, n, max))| (at, request(id, n, max))).collect();
        requests.push((at, ours.clone()));
        let together = scheduled(&model, limits(max_rows, 32), &requests);
        prop_assert_eq!(together.len(), requests.len());
        prop_assert_eq!(&alone, &together[&99]);
        prop_assert!(alone.last().unwrap().finish.is_some_and(|finish| finish != Finish::Interrupted));
        // As for a list of prompts, which are read whole.
        let listed = generate(
            &model, &[ours.prompt], &ours.sampling, &Streams::new(1), 99, GenerateOptions::default(),
        ).unwrap().remove(0);
        prop_assert_eq!(alone.iter().map(|token| token.id).collect::<Vec<_>>(), listed.ids);
        for (token, log_prob) in alone.iter().zip(&listed.log_probs) {
            prop_assert!((token.log_prob - log_prob).abs() < 1e-4 * log_prob.abs().max(1.0));
        }
    }
}
