//! Generation against transformers: `fixtures/generation.json` from `oracles/generation.py`, and a checkpoint that
//! transformers wrote with what it generated from it.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

use std::path::Path;

use burn::tensor::Device;
use common::checkpoint::Checkpoint;
use common::generate::{BeamConfig, GenerateOptions, Generated, Sampler, SamplingConfig, beam_search, generate};
use common::kernels::Kernels;
use common::model::{Gpt, GptConfig, HostTensor, NamedTensors, param_paths};
use common::rng::Streams;
use common::testing::shared;
use serde_json::Value;

// Scores are sums of up to 20 log-probabilities, added in f32 by transformers and rounded to 8 digits in the file.
const SCORE: f64 = 2e-4;
// Weights are f32 exponentials on both sides.
const PROBABILITY: f64 = 2e-6;

#[allow(deprecated)] // Burn calls ndarray superseded by flex; it stays the second opinion here
fn devices() -> [Device; 2] {
    [Device::flex(), Device::ndarray()]
}

fn fixture() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/generation.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

fn floats(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect()
}

fn size(value: &Value) -> usize {
    value.as_u64().unwrap() as usize
}

/// The model whose weights the oracle computes from a formula.
fn model(recipe: &Value, device: &Device) -> Gpt {
    let d_model = size(&recipe["d_model"]);
    let config = GptConfig {
        d_model,
        n_layers: size(&recipe["n_layers"]),
        n_heads: size(&recipe["n_heads"]),
        d_ff: 4 * d_model,
        max_seq_len: size(&recipe["max_seq_len"]),
        ..GptConfig::gpt2(size(&recipe["vocab_size"]))
    };
    let scale = recipe["scale"].as_f64().unwrap();
    let order: Vec<&str> = recipe["parameters"].as_array().unwrap().iter().map(|path| path.as_str().unwrap()).collect();
    let named: NamedTensors = param_paths(&Gpt::new(&config, &Streams::new(0), device))
        .into_iter()
        .map(|(path, shape)| {
            let t = order.iter().position(|&ours| ours == path).unwrap() as f64;
            let gain = if path.ends_with("gamma") { 1.0 } else { 0.0 };
            let value = |i: usize| (gain + scale * (12.9898 * (i as f64 + 1.0) + 78.233 * t).sin()) as f32;
            let data = (0..shape.iter().product()).map(value).collect();
            (path, HostTensor { shape, data })
        })
        .collect();
    Gpt::from_named(&config, named, device).unwrap()
}

fn greedy(model: &Gpt, prompts: &[Vec<u32>], config: &SamplingConfig) -> Vec<Generated> {
    generate(model, prompts, config, &Streams::new(0), 0, GenerateOptions::default()).unwrap()
}

#[test]
fn beam_search_and_greedy_decoding_choose_as_transformers() {
    let fixture = fixture();
    let cases = fixture["searches"].as_array().unwrap();
    for (device, step) in devices().into_iter().zip([1, 7]) {
        let model = model(&fixture["model"], &device);
        for case in cases.iter().step_by(step) {
            let prompt = ids(&case["prompt"]);
            let max_tokens = size(&case["max_new_tokens"]);
            let repetition_penalty = case["repetition_penalty"].as_f64().unwrap();
            let n_beams = size(&case["beams"]);
            let found = if n_beams == 1 {
                let config =
                    SamplingConfig { repetition_penalty, ..SamplingConfig::greedy(max_tokens, ids(&case["eos"])) };
                greedy(&model, &[prompt], &config).remove(0).ids
            } else {
                let config = BeamConfig {
                    n_beams,
                    length_penalty: case["length_penalty"].as_f64().unwrap(),
                    repetition_penalty,
                    max_tokens,
                    stop: ids(&case["eos"]),
                };
                let best = beam_search(&model, &prompt, &config).unwrap();
                let score = case["score"].as_f64().unwrap();
                assert!((best.score - score).abs() < SCORE * score.abs().max(1.0), "{} for {case}", best.score);
                best.ids
            };
            assert_eq!(found, ids(&case["new_tokens"]), "{device:?}: {case}");
        }
    }
}

#[test]
fn penalty_temperature_top_k_and_top_p_leave_the_distribution_that_transformers_leaves() {
    for case in fixture()["filters"].as_array().unwrap() {
        let logits: Vec<f32> = floats(&case["logits"]).into_iter().map(|x| x as f32).collect();
        let prompt = ids(&case["prompt"]);
        let config = SamplingConfig {
            temperature: case["temperature"].as_f64().unwrap(),
            top_k: size(&case["top_k"]),
            top_p: case["top_p"].as_f64().unwrap(),
            repetition_penalty: case["repetition_penalty"].as_f64().unwrap(),
            ..SamplingConfig::default()
        };
        let mut sampler = Sampler::new(&config, &prompt, Streams::new(0).get("sampling", 0));
        let found = sampler.distribution(&mut logits.clone()).unwrap();
        for (id, (found, expected)) in found.iter().zip(floats(&case["probs"])).enumerate() {
            assert!((found - expected).abs() < PROBABILITY, "token {id}: {found}, expected {expected}, {config:?}");
            assert_eq!(*found > 0.0, expected > 0.0, "token {id}, {config:?}");
        }
    }
}

#[test]
fn a_checkpoint_of_transformers_continues_as_it_does_there() {
    let Some(dir) = shared("fixtures/gpt2-generation") else { return };
    let expected: Value = serde_json::from_str(&std::fs::read_to_string(dir.join("generated.json")).unwrap()).unwrap();
    let max_tokens = size(&expected["max_new_tokens"]);
    let cases = expected["cases"].as_array().unwrap();
    let prompts: Vec<Vec<u32>> = cases.iter().map(|case| ids(&case["prompt"])).collect();
    for device in devices() {
        for kernels in [Kernels::Plain, Kernels::Fused] {
            let model = Checkpoint::open(&dir).unwrap().load_gpt(&device).unwrap().with_kernels(kernels);
            let together = greedy(&model, &prompts, &SamplingConfig::greedy(max_tokens, vec![]));
            for ((case, prompt), together) in cases.iter().zip(&prompts).zip(&together) {
                let what = format!("{device:?} {kernels:?} {}", case["name"]);
                assert_eq!(together.ids, ids(&case["greedy"]), "{what}");
                let config = BeamConfig {
                    n_beams: size(&expected["num_beams"]),
                    length_penalty: expected["length_penalty"].as_f64().unwrap(),
                    max_tokens,
                    ..BeamConfig::default()
                };
                let best = beam_search(&model, prompt, &config).unwrap();
                assert_eq!(best.ids, ids(&case["beam4"]), "{what}");
                let score = case["beam4_score"].as_f64().unwrap();
                assert!((best.score - score).abs() < 1e-5, "{what}: {} for {score}", best.score);
            }
        }
    }
}
