//! Our numbers against those of transformers.
//!
//! `shared/fixtures` holds checkpoints that transformers wrote and what it computes from them.
//! `fixtures/hf_roundtrip.json` holds what transformers computes from checkpoints that *we* wrote; the models are made
//! here from seeds, so that a change of one byte we write shows as another SHA-256. `oracles/hf_roundtrip.py` renews it.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor, TensorData};
use common::hash::sha256_of_file;
use common::hf::{self, Class, Head, TokenIds};
use common::kernels::Kernels;
use common::loss::cross_entropy;
use common::model::{
    Activation, Cache, Gpt, GptConfig, HostTensor, Layout, NamedTensors, NormPlacement, Positions, RopeScaling, Rotary,
    ScalarGpt, param_paths,
};
use common::optim::Grads;
use common::rng::Streams;
use common::testing::shared;
use serde_json::{Value, json};

#[path = "parity/adapters.rs"]
mod adapters;
#[path = "parity/dpo_trainer.rs"]
mod dpo_trainer;
#[path = "parity/smollm2.rs"]
mod smollm2;

/// Logits, losses and scores: f32 against the oracle's f64 over numbers of size ten.
const ABSOLUTE: f64 = 1e-4;

/// Gradients, relative to the norm of the parameter's gradient.
const RELATIVE: f64 = 1e-3;

/// Where the oracle wants the checkpoints.
const ORACLE_DIR: &str = "KINDLING_ORACLE_DIR";

/// Folders of the families that came after GPT-2: language models, then reward models.
const FAMILIES: [&str; 7] = ["llama", BF16, "llama-rope-llama3", "mistral", "qwen2", "qwen3", "gpt-neox"];
const BF16: &str = "llama-untied-biased-bf16-sharded";
const FAMILIES_SCORED: [&str; 3] = ["llama-reward", "qwen2-reward", "qwen3-reward"];

/// Ids that the models' texts do not have.
fn tokens() -> TokenIds {
    TokenIds { bos: Some(20), eos: vec![21], pad: Some(22) }
}

/// Every backend and implementation that has to agree.
fn places() -> [(&'static str, Device, Kernels); 3] {
    #[allow(deprecated)] // Burn calls ndarray superseded by flex; it stays the second opinion here
    let ndarray = Device::ndarray();
    [
        ("flex, fused", Device::flex(), Kernels::Fused),
        ("flex, plain", Device::flex(), Kernels::Plain),
        ("ndarray", ndarray, Kernels::Plain),
    ]
}

#[test]
fn language_models_of_transformers_have_the_same_logits_loss_and_gradients() {
    for folder in ["gpt2", "gpt2-untied-sharded", "openai-gpt-relu-sinusoid"].into_iter().chain(FAMILIES) {
        let Some(dir) = shared(&format!("fixtures/{folder}")) else { return };
        let mut expected = json_of(&dir.join("expected.json"));
        let ids = ids(&expected["input_ids"]);
        if folder == BF16 {
            // `oracles/llama_bf16.py` says why.
            expected = json_of(&fixtures().join("llama_bf16.json"));
        }
        let (model, ..) = hf::read(&dir).unwrap();
        for (place, device, kernels) in places() {
            let name = format!("{folder} on {place}");
            let gpt = Gpt::from_named(&model.config, model.tensors.clone(), &device.clone().autodiff()).unwrap();
            let run = run(&gpt.with_kernels(kernels), &ids);
            assert_close(&name, &run.logits, &floats(&expected["logits"]));
            assert_close(&name, &[run.loss], &[expected["loss"].as_f64().unwrap()]);
            for (tensor, statistics) in expected["grad_sum_and_norm"].as_object().unwrap() {
                let tensor = name_in_files(tensor, &run.grads);
                // Positions are fixed with us.
                let Some(grad) = run.grads.get(tensor).filter(|_| !is_fixed(tensor, &model.config)) else {
                    assert!(is_fixed(tensor, &model.config), "{name}: no gradient for {tensor}");
                    continue;
                };
                let [sum, norm] = floats(statistics)[..] else { panic!("a sum and a norm") };
                let our_sum: f64 = grad.data.iter().map(|&x| f64::from(x)).sum();
                let our_norm = grad.data.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
                assert!(
                    (our_norm - norm).abs() <= RELATIVE * norm,
                    "{name}: {tensor}: norm {our_norm}, expected {norm}"
                );
                // A sum of n numbers of both signs may cancel to nothing: the scale is that of its terms.
                let scale = norm * (grad.data.len() as f64).sqrt();
                assert!((our_sum - sum).abs() <= RELATIVE * scale, "{name}: {tensor}: sum {our_sum}, expected {sum}");
            }
        }
    }
}

#[test]
fn a_prompt_is_continued_as_transformers_does_token_by_token() {
    for folder in FAMILIES {
        let Some(dir) = shared(&format!("fixtures/{folder}")) else { return };
        let expected = json_of(&dir.join("expected.json"));
        let (model, ..) = hf::read(&dir).unwrap();
        let prompt = &ids(&expected["greedy_from"])[0];
        let continued = &ids(&expected["greedy"])[0][prompt.len()..];
        for (place, device, kernels) in places() {
            let gpt = Gpt::from_named(&model.config, model.tensors.clone(), &device).unwrap().with_kernels(kernels);
            let mut cache = Cache::new(&gpt, 1, prompt.len() + continued.len());
            let (mut next, mut found) = (prompt.clone(), Vec::new());
            for _ in 0..continued.len() {
                let hidden = gpt.decode(tensor(&[next], &device), &mut cache);
                let logits = numbers(&gpt.logits(hidden));
                let last = &logits[logits.len() - model.config.vocab_size..];
                let best = (0..last.len()).max_by(|&a, &b| last[a].total_cmp(&last[b])).unwrap() as u32;
                found.push(best);
                next = vec![best];
            }
            assert_eq!(found, continued, "{folder} on {place}");
        }
    }
}

#[test]
fn a_model_of_every_family_is_the_same_after_it_was_written() {
    for folder in FAMILIES.into_iter().chain(FAMILIES_SCORED) {
        let Some(dir) = shared(&format!("fixtures/{folder}")) else { return };
        let (model, tokens, _) = hf::read(&dir).unwrap();
        let written = tempfile::tempdir().unwrap();
        let class = hf::write(written.path(), &model.config, model.head, &model.tensors, &tokens).unwrap();
        assert_ne!(class, Class::Kindling, "{folder}");
        let (again, tokens_again, _) = hf::read(written.path()).unwrap();
        assert_eq!((&again, tokens_again), (&model, tokens), "{folder}");
        // For readers that know no `rope_parameters`.
        let json = json_of(&written.path().join("config.json"));
        assert_eq!(json["rope_theta"], json["rope_parameters"]["rope_theta"], "{folder}");
        let is_scaled = json["rope_parameters"]["rope_type"] != "default";
        assert_eq!(json.get("rope_scaling"), is_scaled.then_some(&json["rope_parameters"]), "{folder}");
        let model_type = |dir: &Path| json_of(&dir.join("config.json"))["model_type"].clone();
        if folder != "mistral" {
            assert_eq!(model_type(written.path()), model_type(&dir), "{folder}");
        }
    }
}

#[test]
fn reward_models_of_transformers_give_the_same_scores() {
    for folder in ["gpt2-reward", "openai-gpt-reward"].into_iter().chain(FAMILIES_SCORED) {
        let Some(dir) = shared(&format!("fixtures/{folder}")) else { return };
        let expected = json_of(&dir.join("expected.json"));
        let (model, ..) = hf::read(&dir).unwrap();
        assert_eq!(model.head, Head::Score { bias: 0.0 });
        let ids = ids(&expected["input_ids"]);
        let last: Vec<usize> = floats(&expected["lengths"]).iter().map(|&length| length as usize - 1).collect();
        for (place, device, kernels) in places() {
            let scalar = ScalarGpt::from_named(&model.config, model.tensors.clone(), 0.0, &device).unwrap();
            let scores = scores(&scalar.with_kernels(kernels), &ids, &last);
            assert_close(&format!("{folder} on {place}"), &scores, &floats(&expected["scores"]));
        }
    }
}

#[test]
fn what_transformers_computes_from_our_checkpoints_is_what_we_compute() {
    let recorded = json_of(&fixtures().join("hf_roundtrip.json"));
    for (name, model) in models() {
        let expected = &recorded["models"][name];
        let dir = tempfile::tempdir().unwrap();
        model.write(dir.path());
        let sha256 = sha256_of_file(&dir.path().join(hf::WEIGHTS_FILE)).unwrap();
        assert_eq!(json!(sha256), expected["weights_sha256"], "{name} is written in other bytes; renew the fixture");
        assert_eq!(expected["warnings"], json!([]), "{name}");
        assert_eq!(expected["pad_token_id"], json!(tokens().pad), "{name}");
        assert_eq!(expected["eos_token_id"], json!(tokens().eos[0]), "{name}");
        for (place, device, kernels) in places() {
            let at = format!("{name} on {place}");
            match model.head {
                Head::Lm => {
                    let gpt =
                        Gpt::from_named(&model.config, model.tensors.clone(), &device.clone().autodiff()).unwrap();
                    let run = run(&gpt.with_kernels(kernels), &model.ids());
                    assert_close(&at, &run.logits, &floats(&expected["logits"]));
                    assert_close(&at, &[run.loss], &[expected["loss"].as_f64().unwrap()]);
                    check_gradients(
                        &at,
                        &run.grads,
                        &fixtures().join(format!("hf_roundtrip-{name}.safetensors")),
                        &model.config,
                    );
                }
                Head::Score { bias } => {
                    let scalar = ScalarGpt::from_named(&model.config, model.tensors.clone(), bias, &device).unwrap();
                    let ours = scores(&scalar.with_kernels(kernels), &model.ids(), &model.last());
                    // The constant is for us alone: transformers has no place for it.
                    let theirs: Vec<f64> = floats(&expected["scores"]).iter().map(|score| score + bias).collect();
                    assert_close(&at, &ours, &theirs);
                    assert_eq!(expected["score_bias"], json!(bias));
                }
            }
        }
    }
}

#[test]
#[ignore = "writes the checkpoints that oracles/hf_roundtrip.py reads; the script runs it"]
fn write_the_checkpoints_for_the_oracle() {
    let dir = PathBuf::from(std::env::var_os(ORACLE_DIR).expect("the script names the directory"));
    for (name, model) in models() {
        let dir = dir.join(name);
        std::fs::create_dir_all(&dir).unwrap();
        model.write(&dir);
        let input = json!({ "input_ids": model.ids(), "last": model.last() });
        std::fs::write(dir.join("input.json"), input.to_string()).unwrap();
    }
}

/// A model made from a seed, in one architecture that transformers has a class for.
struct Model {
    config: GptConfig,
    head: Head,
    tensors: NamedTensors,
}

/// The classes with every switch that they have.
fn models() -> Vec<(&'static str, Model)> {
    let base = GptConfig { d_model: 16, n_layers: 2, n_heads: 2, d_ff: 64, max_seq_len: 12, ..GptConfig::gpt2(23) };
    let gpt2 = |change: fn(&mut GptConfig)| changed(&base, change);
    let post = GptConfig { norm: NormPlacement::Post, ..base.clone() };
    let openai = |change: fn(&mut GptConfig)| {
        changed(&GptConfig { positions: Positions::Sinusoidal, activation: Activation::Relu, ..post.clone() }, change)
    };
    let sizes = |family: GptConfig| GptConfig { d_model: 16, n_layers: 2, max_seq_len: 12, ..family };
    let llama = sizes(GptConfig { d_ff: 40, n_kv_heads: Some(2), head_dim: Some(6), ..GptConfig::llama(23) });
    let neox =
        sizes(GptConfig { d_ff: 48, rotary: Rotary { fraction: 0.5, ..Rotary::default() }, ..GptConfig::gpt_neox(23) });
    let score = Head::Score { bias: 0.625 };
    vec![
        ("gpt2", Model::new(gpt2(|_| {}), Head::Lm)),
        (
            "gpt2-untied-wide-relu",
            Model::new(gpt2(|c| (c.tie_embeddings, c.d_ff, c.activation) = (false, 40, Activation::Relu)), Head::Lm),
        ),
        ("gpt2-sinusoidal", Model::new(gpt2(|c| c.positions = Positions::Sinusoidal), Head::Lm)),
        ("openai-gpt", Model::new(openai(|_| {}), Head::Lm)),
        (
            "openai-gpt-untied-learned-gelu",
            Model::new(
                openai(|c| {
                    (c.tie_embeddings, c.positions, c.activation) = (false, Positions::Learned, Activation::GeluTanh);
                }),
                Head::Lm,
            ),
        ),
        ("llama", Model::new(changed(&llama, |_| {}), Head::Lm)),
        (
            "llama-biased-untied-llama3",
            Model::new(
                changed(&llama, |c| {
                    (c.qkv_bias, c.proj_bias, c.mlp_bias, c.tie_embeddings) = (true, true, true, false);
                    c.rotary.theta = 50.0;
                    c.rotary.scaling =
                        RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original: 8 };
                }),
                Head::Lm,
            ),
        ),
        (
            "llama-linear",
            Model::new(changed(&llama, |c| c.rotary.scaling = RopeScaling::Linear { factor: 2.0 }), Head::Lm),
        ),
        ("qwen2", Model::new(changed(&llama, |c| (c.qkv_bias, c.head_dim) = (true, None)), Head::Lm)),
        ("qwen3", Model::new(changed(&llama, |c| c.qk_norm = true), Head::Lm)),
        ("gpt-neox", Model::new(changed(&neox, |_| {}), Head::Lm)),
        (
            "gpt-neox-in-turn-tanh",
            Model::new(
                changed(&neox, |c| {
                    (c.parallel, c.rotary.fraction, c.activation) = (false, 1.0, Activation::GeluTanh);
                }),
                Head::Lm,
            ),
        ),
        ("llama-reward", Model::new(changed(&llama, |_| {}), score)),
        ("qwen3-reward", Model::new(changed(&llama, |c| c.qk_norm = true), score)),
        ("gpt-neox-reward", Model::new(changed(&neox, |_| {}), score)),
        ("gpt2-reward", Model::new(gpt2(|_| {}), score)),
        ("openai-gpt-reward", Model::new(openai(|c| c.tie_embeddings = false), score)),
    ]
}

fn changed(base: &GptConfig, change: fn(&mut GptConfig)) -> GptConfig {
    let mut config = base.clone();
    change(&mut config);
    config
}

impl Model {
    /// Wide random weights, so that a wrong bias, norm, activation, transpose or head shows.
    fn new(config: GptConfig, head: Head) -> Self {
        let gpt = Gpt::new(&config, &Streams::new(0), &Device::flex());
        let paths = match head {
            Head::Lm => param_paths(&gpt),
            Head::Score { .. } => param_paths(&ScalarGpt::new(gpt, &Streams::new(0))),
        };
        let tensors = paths
            .into_iter()
            .map(|(path, shape)| {
                let mut rng = Streams::new(5).get(&path, 0);
                let (mean, half_width) = match path.rsplit('.').next() {
                    Some("gamma") => (1.0, 0.5),
                    Some("beta" | "bias") => (0.0, 0.35),
                    _ => (0.0, 0.25),
                };
                // Uniform, because the last bit of a normal number depends on the system's logarithm.
                let number = |_| (mean + half_width * (2.0 * rng.uniform() - 1.0)) as f32;
                let data = (0..shape.iter().product()).map(number).collect();
                (path, HostTensor { shape, data })
            })
            .collect();
        Self { config, head, tensors }
    }

    /// Three rows, right-padded where there are scores to find.
    fn ids(&self) -> Vec<Vec<u32>> {
        let mut rng = Streams::new(6).get("ids", 0);
        let rows = self.last().into_iter().map(|last| {
            let mut row: Vec<u32> = (0..10).map(|t| if t <= last { rng.below(20) as u32 } else { 22 }).collect();
            if matches!(self.head, Head::Score { .. }) {
                // A prompt and an answer, which the same id ends.
                (row[1], row[last]) = (21, 21);
            }
            row
        });
        rows.collect()
    }

    /// The place of each row's last real token.
    fn last(&self) -> Vec<usize> {
        match self.head {
            Head::Lm => vec![9; 3],
            Head::Score { .. } => vec![9, 6, 2],
        }
    }

    fn write(&self, dir: &Path) {
        hf::write(dir, &self.config, self.head, &self.tensors, &tokens()).unwrap();
    }
}

/// What one forward and backward pass gives, gradients under the foreign names.
struct Run {
    logits: Vec<f64>,
    loss: f64,
    grads: NamedTensors,
}

fn run(gpt: &Gpt, ids: &[Vec<u32>]) -> Run {
    let logits = numbers(&gpt.forward(tensor(ids, &gpt.device()), &Layout::right_padded()));
    let (loss, grads) = loss_and_gradients(gpt, ids);
    let shapes: BTreeMap<String, Vec<usize>> = param_paths(gpt).into_iter().collect();
    let grads = grads
        .into_iter()
        .map(|(path, grad)| {
            let shape = shapes[&path].clone();
            (path, HostTensor { shape, ..grad })
        })
        .collect();
    // Gradients have the names of their parameters, so what names a model names them.
    let dir = tempfile::tempdir().unwrap();
    hf::write(dir.path(), gpt.config(), Head::Lm, &grads, &TokenIds::default()).unwrap();
    let (grads, _) = hf::read_file(&dir.path().join(hf::WEIGHTS_FILE), |_| true).unwrap();
    Run { logits, loss, grads }
}

/// The mean loss of predicting each next token, and the gradients by our paths, flat.
fn loss_and_gradients(gpt: &Gpt, ids: &[Vec<u32>]) -> (f64, NamedTensors) {
    let hidden = gpt.hidden(tensor(ids, &gpt.device()), &Layout::right_padded());
    let [batch, seq, d_model] = hidden.dims();
    // Position t predicts token t + 1.
    let inner = hidden.slice([0..batch, 0..seq - 1]).reshape([batch * (seq - 1), d_model]);
    let targets: Vec<Vec<u32>> = ids.iter().map(|row| row[1..].to_vec()).collect();
    let targets = tensor(&targets, &gpt.device()).reshape([batch * (seq - 1)]);
    let loss = cross_entropy(gpt, inner, targets, batch * (seq - 1));
    let value = numbers(&loss)[0];
    (value, Grads::take(gpt, loss.backward()).to_named())
}

fn scores(scalar: &ScalarGpt, ids: &[Vec<u32>], last: &[usize]) -> Vec<f64> {
    let all = numbers(&scalar.forward(tensor(ids, &scalar.device()), &Layout::right_padded()));
    let seq = ids[0].len();
    last.iter().enumerate().map(|(row, t)| all[row * seq + t]).collect()
}

fn check_gradients(at: &str, ours: &NamedTensors, path: &Path, config: &GptConfig) {
    let (theirs, _) = hf::read_file(path, |_| true).unwrap();
    for (name, expected) in theirs.iter().filter(|(name, _)| !is_fixed(name, config)) {
        let norm = expected.data.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>().sqrt();
        let difference = expected
            .data
            .iter()
            .zip(&ours[name_in_files(name, ours)].data)
            .map(|(&a, &b)| f64::from(a - b).powi(2))
            .sum::<f64>();
        assert!(difference.sqrt() <= RELATIVE * norm, "{at}: {name}: off by {} of {norm}", difference.sqrt());
    }
    assert_eq!(theirs.len(), ours.len(), "{at}");
}

/// GPT-NeoX's class calls its output layer `lm_head` in Python and `embed_out` in files.
fn name_in_files<'a>(name: &'a str, tensors: &NamedTensors) -> &'a str {
    if name == "lm_head.weight" && tensors.contains_key("embed_out.weight") { "embed_out.weight" } else { name }
}

/// Whether the tensor is a position table that is no parameter with us.
fn is_fixed(name: &str, config: &GptConfig) -> bool {
    config.positions == Positions::Sinusoidal && (name.contains("positions_embed") || name.contains("wpe"))
}

fn tensor(ids: &[Vec<u32>], device: &Device) -> Tensor<2, Int> {
    let flat: Vec<i64> = ids.iter().flatten().map(|&id| i64::from(id)).collect();
    Tensor::from_data(TensorData::new(flat, [ids.len(), ids[0].len()]), device)
}

fn numbers<const D: usize>(tensor: &Tensor<D>) -> Vec<f64> {
    HostTensor::of(tensor).data.into_iter().map(f64::from).collect()
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

fn json_of(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// All numbers in nested arrays, in order.
fn floats(value: &Value) -> Vec<f64> {
    match value {
        Value::Array(items) => items.iter().flat_map(floats).collect(),
        number => vec![number.as_f64().unwrap()],
    }
}

fn ids(value: &Value) -> Vec<Vec<u32>> {
    value.as_array().unwrap().iter().map(|row| floats(row).iter().map(|&id| id as u32).collect()).collect()
}

fn assert_close(name: &str, ours: &[f64], expected: &[f64]) {
    assert_eq!(ours.len(), expected.len(), "{name}: lengths differ");
    let worst = ours.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(worst <= ABSOLUTE, "{name}: off by {worst}");
}
