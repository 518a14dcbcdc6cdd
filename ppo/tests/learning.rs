//! PPO learns: a policy that knows nothing raises a score that is written by hand, on three seeds.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

use std::path::Path;

use clap::Parser;
use common::checkpoint::{Checkpoint, Stage, Weights};
use common::group::Group;
use common::interrupt::Interrupt;
use common::model::{HostTensor, NamedTensors};
use common::testing::{save_tiny, save_weights, tiny_config};
use common::tokenizer::{Tokenizer, TokenizerConfig, TokenizerKind};
use ppo::{Cli, Command};
use serde_json::{Value, json};

const CONFIG: &str = r#"
[data]
train = ["prompts.jsonl"]
val = ["prompts.jsonl"]

[optimizer]
lr = 3e-3

[value_optimizer]
lr = 3e-3

[train]
steps = 30
batch_size = 32
eval_prompts = 0

[ppo]
response_length = 12
kl_coef = 0.02
value_init = "zero-head"
"#;

/// A reward model whose score grows with the share of `a` in what it reads.
///
/// Its attention is uniform and copies one feature of the tokens: +1 for `a`, −1 for the other letters. A large
/// constant in two other features keeps the layer norms from taking the feature's size away.
fn likes_a(tokenizer: &Tokenizer) -> Weights {
    let config = tiny_config(tokenizer.vocab_size());
    let d_model = config.d_model;
    let mut embedding = vec![0.0; config.vocab_size * d_model];
    let id = |letter: &str| tokenizer.encode(letter).expect("a known letter")[0] as usize;
    for token in embedding.chunks_mut(d_model) {
        (token[2], token[3]) = (5.0, -5.0);
    }
    for letter in ["a", "b", "c", "d"] {
        let sign = if letter == "a" { 1.0 } else { -1.0 };
        (embedding[id(letter) * d_model], embedding[id(letter) * d_model + 1]) = (sign, -sign);
    }
    let identity = |columns: usize, first: usize| -> Vec<f32> {
        (0..d_model * columns).map(|i| f32::from(u8::from(i % columns == first + i / columns))).collect()
    };
    let zeros = |n: usize| vec![0.0; n];
    let mut score = zeros(d_model);
    (score[0], score[1]) = (20.0, -20.0);
    let tensors = [
        ("trunk.token_embedding", vec![config.vocab_size, d_model], embedding),
        ("trunk.position_embedding", vec![config.max_seq_len, d_model], zeros(config.max_seq_len * d_model)),
        ("trunk.blocks.0.norm_1.gamma", vec![d_model], vec![1.0; d_model]),
        ("trunk.blocks.0.norm_1.beta", vec![d_model], zeros(d_model)),
        // Queries and keys of zero, values as they come.
        ("trunk.blocks.0.attention.qkv.weight", vec![d_model, 3 * d_model], identity(3 * d_model, 2 * d_model)),
        ("trunk.blocks.0.attention.qkv.bias", vec![3 * d_model], zeros(3 * d_model)),
        ("trunk.blocks.0.attention.proj.weight", vec![d_model, d_model], identity(d_model, 0)),
        ("trunk.blocks.0.attention.proj.bias", vec![d_model], zeros(d_model)),
        ("trunk.blocks.0.norm_2.gamma", vec![d_model], vec![1.0; d_model]),
        ("trunk.blocks.0.norm_2.beta", vec![d_model], zeros(d_model)),
        ("trunk.blocks.0.mlp.up.weight", vec![d_model, config.d_ff], zeros(d_model * config.d_ff)),
        ("trunk.blocks.0.mlp.up.bias", vec![config.d_ff], zeros(config.d_ff)),
        ("trunk.blocks.0.mlp.down.weight", vec![config.d_ff, d_model], zeros(config.d_ff * d_model)),
        ("trunk.blocks.0.mlp.down.bias", vec![d_model], zeros(d_model)),
        ("trunk.final_norm.gamma", vec![d_model], vec![1.0; d_model]),
        ("trunk.final_norm.beta", vec![d_model], zeros(d_model)),
        ("score.weight", vec![1, d_model], score),
    ];
    let named: NamedTensors =
        tensors.into_iter().map(|(path, shape, data)| (path.to_owned(), HostTensor { shape, data })).collect();
    // So that answers of the initial policy score about 0, as a trained reward model's do: below −1 on average, the best
    // policy would be one that never ends.
    Weights::Scalar { named, config, score_bias: 2.2 }
}

/// The share of `a` in an answer.
fn share_of_a(answer: &str) -> f64 {
    answer.chars().filter(|&letter| letter == 'a').count() as f64 / answer.chars().count().max(1) as f64
}

/// The held-out lines of `metrics.jsonl`.
fn evaluations(out: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(out.join("metrics.jsonl")).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line["val/score"].is_f64()).collect()
}

/// Trains a policy that knows nothing, with `settings` of `[ppo]` beside those of [`CONFIG`], and checks that it learned.
fn learns(seed: u64, settings: &str) {
    let config = TokenizerConfig { kind: TokenizerKind::Char, ..TokenizerConfig::default() };
    let tokenizer = Tokenizer::train(&config, ["abcd"].into_iter(), true).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    save_tiny(&dir.path().join("sft"), Stage::Sft, &tokenizer, seed);
    save_weights(&dir.path().join("rm"), Stage::RewardModel, &tokenizer, likes_a(&tokenizer));
    let prompts: Vec<String> =
        (0..64).map(|i| json!({ "prompt": "abcd"[i % 4..].repeat(1 + i % 3) }).to_string()).collect();
    std::fs::write(path("prompts.jsonl"), prompts.join("\n")).unwrap();
    std::fs::write(path("ppo.toml"), format!("seed = {seed}\n{CONFIG}{settings}")).unwrap();
    let (config, policy, reward_model, out) = (path("ppo.toml"), path("sft"), path("rm"), path("out"));
    let args =
        ["ppo", "train", "--config", &config, "--policy", &policy, "--reward-model", &reward_model, "--out", &out];
    let Command::Train(args) = Cli::parse_from(args).command else { panic!("the command is `train`") };
    ppo::train(&args, &Group::alone(), Interrupt::never(), Some(&|_, answer| Some(share_of_a(answer)))).unwrap();

    let evaluations = evaluations(&dir.path().join("out"));
    let (first, last) = (&evaluations[0], &evaluations[evaluations.len() - 1]);
    let gain = |name: &str| last[name].as_f64().unwrap() - first[name].as_f64().unwrap();
    assert_eq!(first["step"], 0);
    assert!(gain("val/score") > 0.5, "seed {seed}: {first} {last}");
    assert!(gain("gold/val_score") > 0.25, "seed {seed}: {first} {last}");
    assert!(last["val/eos_rate"].as_f64().unwrap() > 0.5, "seed {seed}: {last}");
    assert!(last["val/kl"].as_f64().unwrap() > 0.5, "seed {seed}: {last}");

    // What was saved is the trained policy, and it names both parents.
    let checkpoint = Checkpoint::open(&dir.path().join("out")).unwrap();
    assert_eq!(checkpoint.stage(), Some(Stage::Ppo));
    assert_eq!(checkpoint.manifest().unwrap().parents.len(), 2);
}

#[test]
fn answers_compared_with_each_other_raise_a_toy_score_on_three_seeds() {
    for estimator in ["rloo", "grpo"] {
        (0..3).for_each(|seed| learns(seed, &format!("estimator = \"{estimator}\"\nsamples_per_prompt = 8\n")));
    }
}

#[test]
fn every_dialect_raises_a_toy_score() {
    for dialect in ["lm-human-preferences", "n-plus", "trl", "openrlhf", "verl", "deepspeed-chat"] {
        // Without a rule for answers that do not end the best policy here would be one that never ends.
        learns(1, &format!("dialect = \"{dialect}\"\nmissing_eos = \"replace\"\n"));
    }
}

#[test]
fn ppo_raises_a_toy_score_and_what_it_stands_for_on_three_seeds() {
    (0..3).for_each(|seed| learns(seed, ""));
}
