//! A safetensors file with its `config.json`, as a checkpoint or a directory of transformers holds them.
//!
//! An input is `{"config", "generation", "header", "n_bytes", "byte", "index", "manifest"}`: the JSON files, the header of
//! the tensors' file, and how often which byte follows; or, if it is no such JSON, the tensors' file itself.

#![no_main]

use std::path::Path;

use common::checkpoint::Checkpoint;
use common::hf::{self, Head, HostModel};
use fuzz::{check_error, file, mutate, put};
use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use serde_json::{Value, json};

/// The most bytes of tensors that an input asks for.
const MAX_BYTES: u64 = 1 << 18;

/// Keys that may be `null` in what is written.
const MAY_BE_NULL: [&str; 4] = ["bos_token_id", "eos_token_id", "pad_token_id", "n_inner"];

const WORDS: [&str; 49] = [
    "config",
    "generation",
    "header",
    "n_bytes",
    "byte",
    "index",
    "manifest",
    "model_type",
    "gpt2",
    "openai-gpt",
    "kindling",
    "gpt",
    "architectures",
    "GPT2LMHeadModel",
    "GPT2ForSequenceClassification",
    "OpenAIGPTForSequenceClassification",
    "n_embd",
    "hidden_size",
    "n_layer",
    "n_head",
    "n_positions",
    "n_inner",
    "vocab_size",
    "resid_pdrop",
    "layer_norm_epsilon",
    "tie_word_embeddings",
    "score_bias",
    "num_labels",
    "id2label",
    "eos_token_id",
    "bos_token_id",
    "pad_token_id",
    "afn",
    "activation_function",
    "relu",
    "gelu_new",
    "lm_head.weight",
    "score.weight",
    "h.0.attn.bias",
    "dtype",
    "shape",
    "data_offsets",
    "F32",
    "F16",
    "BF16",
    "I64",
    "__metadata__",
    "weight_map",
    "../model.safetensors",
];

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mutate(data, size, max_size, seed, &WORDS)
});

fuzz_target!(|data: &[u8]| {
    let dir = file("weights");
    std::fs::create_dir_all(&dir).expect("a folder");
    let input = serde_json::from_slice::<Value>(data).unwrap_or_default();
    let text = |key: &str| input.get(key).filter(|value| !value.is_null()).map(|value| value.to_string().into_bytes());
    let small =
        json!({ "model_type": "gpt2", "n_embd": 4, "n_layer": 1, "n_head": 2, "n_positions": 6, "vocab_size": 8 });
    let weights = match text("header") {
        None => data.to_vec(),
        Some(header) => {
            let n_bytes = input["n_bytes"].as_u64().unwrap_or_default().min(MAX_BYTES) as usize;
            let tensors = vec![input["byte"].as_u64().unwrap_or_default() as u8; n_bytes];
            [(header.len() as u64).to_le_bytes().to_vec(), header, tensors].concat()
        }
    };
    put(&dir, "config.json", Some(&text("config").unwrap_or_else(|| small.to_string().into_bytes())));
    put(&dir, "generation_config.json", text("generation").as_deref());
    put(&dir, "manifest.json", text("manifest").as_deref());
    put(&dir, "model.safetensors.index.json", text("index").as_deref());
    let name = if input.get("index").is_some() { "model-00001-of-00001.safetensors" } else { "model.safetensors" };
    put(&dir, "model.safetensors", None);
    put(&dir, name, Some(&weights));
    match hf::read_file(&dir.join(name), |_| true) {
        Err(error) => check_error(&error),
        Ok((tensors, _)) => {
            assert!(tensors.values().all(|tensor| tensor.data.len() == tensor.shape.iter().product::<usize>()));
        }
    }
    let read = hf::read(&dir);
    match (&read, Checkpoint::open(&dir)) {
        (Ok(_), Ok(_)) => {}
        (Err(error), Err(of_checkpoint)) => {
            check_error(error);
            check_error(&of_checkpoint);
        }
        (Ok(_), Err(error)) => {
            assert!(input.get("manifest").is_some(), "the model is read, the checkpoint is not: {error}");
            check_error(&error);
        }
        (Err(error), Ok(_)) => panic!("the checkpoint is read, the model is not: {error}"),
    }
    if let Ok((model, tokens, _)) = read {
        check(&model, &tokens);
    }
});

/// Checks a model, and that it is the same when it is written and read again.
fn check(model: &HostModel, tokens: &hf::TokenIds) {
    let HostModel { config, head, tensors, .. } = model;
    config.validate().expect("a model that was read");
    assert!(tensors.values().all(|tensor| tensor.data.iter().all(|x| x.is_finite())), "a number is not finite");
    let known = |id: &u32| (*id as usize) < config.vocab_size;
    assert!(tokens.eos.iter().all(known) && tokens.bos.iter().all(known) && tokens.pad.iter().all(known));
    if let Head::Score { bias } = head {
        assert!(bias.is_finite());
    }
    let dir = file("written");
    std::fs::create_dir_all(&dir).expect("a folder");
    hf::write(&dir, config, *head, tensors, tokens).expect("a model that was read");
    for name in [hf::CONFIG_FILE, hf::GENERATION_FILE] {
        check_json(&dir.join(name));
    }
    let (again, ids, _) = hf::read(&dir).expect("a model that was written");
    assert_eq!(again, *model);
    assert_eq!(ids, *tokens);
}

fn check_json(path: &Path) {
    let json: Value = serde_json::from_slice(&std::fs::read(path).expect("read")).expect("JSON");
    for (key, value) in json.as_object().expect("an object") {
        assert!(!value.is_null() || MAY_BE_NULL.contains(&key.as_str()), "`{key}` is null in {}", path.display());
    }
}
