//! All stages by their command lines in turn, on a text world so small that it takes seconds: what each leaves behind is
//! what the contract says, and the next one can use it, on the same backend or another.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

use std::collections::BTreeSet;

use common::hash::sha256_of_file;
use pipeline_tests::{DPO, Lab, PPO, PRETRAIN, REWARD_MODEL, SFT, STAGES, Stage};
use serde_json::Value;

/// The same loss by two backends, whose sums run in different orders.
const BACKENDS: f64 = 1e-4;

/// The same loss of the same tokens, in batches of another size.
const ROUNDING: f64 = 1e-5;

/// What every checkpoint holds.
const FILES: [&str; 10] = [
    "config.json",
    "config.toml",
    "generation_config.json",
    "manifest.json",
    "metrics.jsonl",
    "model.safetensors",
    "state/optimizer.safetensors",
    "state/state.json",
    "state/weights.safetensors",
    "tokenizer.json",
];

/// What a checkpoint holds besides [`FILES`] and `tokenizer_config.json`.
fn more_files(stage: Stage) -> &'static [&'static str] {
    match stage.program {
        "reward-model" => &[],
        "dpo" => &["reference.json"],
        "ppo" => &[
            "rollouts.jsonl",
            "samples.jsonl",
            "state/value_optimizer.safetensors",
            "value/config.json",
            "value/model.safetensors",
        ],
        _ => &["samples.jsonl"],
    }
}

/// The names that the contract promises, those that only a recipe with a gold score has aside.
fn metrics(stage: Stage) -> &'static [&'static str] {
    match stage.program {
        "pretrain" => {
            &["train/loss", "train/lr", "train/grad_norm", "train/tokens_per_second", "val/loss", "val/bits_per_byte"]
        }
        "sft" => &["train/loss", "train/lr", "train/grad_norm", "train/tokens_per_second", "val/loss"],
        "reward-model" => &[
            "train/loss",
            "train/lr",
            "train/grad_norm",
            "train/tokens_per_second",
            "train/accuracy",
            "train/margin",
            "val/accuracy",
            "val/loss",
            "val/margin",
        ],
        "dpo" => &[
            "train/loss",
            "train/lr",
            "train/grad_norm",
            "train/tokens_per_second",
            "rewards/chosen",
            "rewards/rejected",
            "rewards/accuracies",
            "rewards/margins",
            "logps/chosen",
            "logps/rejected",
            "val/accuracy",
            "val/loss",
            "val/margin",
        ],
        _ => &[
            "objective/kl",
            "objective/kl_coef",
            "objective/entropy",
            "objective/score",
            "objective/rlhf_reward",
            "objective/non_score_reward",
            "policy/loss",
            "policy/approx_kl",
            "policy/clip_frac",
            "policy/ratio_mean",
            "policy/ratio_max",
            "policy/entropy",
            "value/loss",
            "value/clip_frac",
            "value/explained_variance",
            "rollout/response_length",
            "rollout/eos_rate",
            "timing/rollout",
            "timing/score",
            "timing/update",
        ],
    }
}

/// A lab in which every stage was trained.
fn trained() -> Lab {
    let lab = Lab::before(PPO);
    lab.prepare(PPO);
    lab.prepare(DPO);
    lab
}

fn object(text: &str) -> Value {
    assert_eq!(text.lines().count(), 1, "one object on one line: {text}");
    serde_json::from_str(text).unwrap()
}

fn number(value: &Value, name: &str) -> f64 {
    value[name].as_f64().unwrap_or_else(|| panic!("no number `{name}` in {value}"))
}

/// The last value of a metric.
fn last(lab: &Lab, out: &str, name: &str) -> f64 {
    let lines = lab.lines(&format!("{out}/metrics.jsonl"));
    lines.iter().rev().find_map(|line| line[name].as_f64()).unwrap_or_else(|| panic!("no `{name}` in `{out}`"))
}

#[test]
fn every_stage_leaves_what_the_contract_says() {
    let lab = trained();
    for stage in STAGES {
        assert_files(&lab, stage);
        assert_metrics(&lab, stage);
        assert_manifest(&lab, stage);
    }
    assert_evaluations(&lab);
    assert_answers(&lab);
    // The resolved configuration is one that the stage can be given again, with the same result.
    let again = ["train", "--config", "base/config.toml", "--tokenizer", "tokenizer", "--out", "again", "-q"];
    lab.ok("pretrain", &again);
    lab.assert_same("base", "again");
}

fn assert_files(lab: &Lab, stage: Stage) {
    let found: BTreeSet<String> = lab.contents(stage.out).into_keys().collect();
    let mut expected: BTreeSet<String> = FILES.iter().chain(more_files(stage)).map(ToString::to_string).collect();
    expected.insert("tokenizer_config.json".to_owned());
    if stage == PPO {
        // The value model is a Hugging Face directory of its own.
        expected.insert("value/generation_config.json".to_owned());
    }
    assert_eq!(found, expected, "files of `{}`", stage.program);
}

fn assert_metrics(lab: &Lab, stage: Stage) {
    let lines = lab.lines(&format!("{}/metrics.jsonl", stage.out));
    for line in &lines {
        let keys: Vec<&String> = line.as_object().unwrap().keys().collect();
        assert_eq!(keys[..3], ["step", "seconds", "tokens"], "{line}");
        assert!(keys[3..].iter().all(|key| key.contains('/')), "{line}");
        assert!(line.as_object().unwrap().values().all(Value::is_number), "{line}");
    }
    for name in ["step", "seconds", "tokens"] {
        let column: Vec<f64> = lines.iter().map(|line| number(line, name)).collect();
        assert!(column.is_sorted(), "`{name}` of `{}`: {column:?}", stage.program);
    }
    for name in metrics(stage) {
        assert!(lines.iter().any(|line| line.get(name).is_some()), "`{}` has no `{name}`", stage.program);
    }
    if stage != PPO {
        let losses: Vec<f64> = lines.iter().filter_map(|line| line["val/loss"].as_f64()).collect();
        assert!(losses.last() < losses.first(), "the held-out loss of `{}` does not fall: {losses:?}", stage.program);
    }
}

fn assert_manifest(lab: &Lab, stage: Stage) {
    let manifest = lab.json(&format!("{}/manifest.json", stage.out));
    assert_eq!(manifest["stage"], stage.program);
    assert_eq!(manifest["step"], if stage == PPO { 8 } else { 12 });
    assert!(number(&manifest, "tokens") > 0.0);
    assert_eq!(manifest["backend"], "flex");
    assert_eq!(manifest["program_version"], env!("CARGO_PKG_VERSION"));
    assert!(manifest["metrics"].as_object().is_some_and(|metrics| !metrics.is_empty()));
    let sha256 = |path: &str| sha256_of_file(&lab.path(path)).unwrap();
    assert_eq!(manifest["weights_sha256"], sha256(&format!("{}/model.safetensors", stage.out)));
    for (file, hash) in manifest["files_sha256"].as_object().unwrap() {
        assert_eq!(*hash, sha256(&format!("{}/{file}", stage.out)), "{file}");
    }
    // The checkpoints it was made from, by path and by the hash of their weights.
    let parents = manifest["parents"].as_array().unwrap();
    assert_eq!(parents.len(), stage.parents.len(), "{manifest}");
    for (parent, of) in parents.iter().zip(stage.parents) {
        assert_eq!(parent["path"], lab.path(of.out).to_str().unwrap());
        assert_eq!(parent["weights_sha256"], sha256(&format!("{}/model.safetensors", of.out)));
        let theirs = lab.json(&format!("{}/manifest.json", of.out));
        assert_eq!(manifest["tokenizer_sha256"], theirs["tokenizer_sha256"]);
        assert_eq!(manifest["chat_template_sha256"], theirs["chat_template_sha256"]);
    }
    let data = manifest["data"].as_object().unwrap();
    assert_eq!(data.len(), 2, "training and held-out data: {data:?}");
    for (file, hash) in data {
        assert_eq!(*hash, sha256_of_file(file.as_ref()).unwrap(), "{file}");
    }
}

fn assert_evaluations(lab: &Lab) {
    let of_text = object(&lab.ok("pretrain", &["eval", "--checkpoint", "base", "--data", "data/val.txt"]));
    for name in ["loss", "perplexity", "bits_per_byte", "tokens", "bytes"] {
        assert!(number(&of_text, name) > 0.0, "{of_text}");
    }
    let of_answers = object(&lab.ok("sft", &["eval", "--checkpoint", "sft", "--data", "data/sft.val.jsonl"]));
    assert!((number(&of_answers, "loss") - last(lab, "sft", "val/loss")).abs() < ROUNDING, "{of_answers}");
    assert!(number(&of_answers, "tokens") > 0.0 && number(&of_answers, "token_accuracy") >= 0.0, "{of_answers}");

    let of_pairs = ["eval", "--checkpoint", "reward", "--data", "data/pairs.val.jsonl"];
    let of_pairs = object(&lab.ok("reward-model", &of_pairs));
    // Scores were scaled after training, which changes no order.
    assert_eq!(number(&of_pairs, "accuracy"), last(lab, "reward", "val/accuracy"), "{of_pairs}");
    for name in ["loss", "margin_mean", "longer_wins_accuracy", "pairs"] {
        assert!(number(&of_pairs, name).is_finite(), "{of_pairs}");
    }
    let scores = lab.ok("reward-model", &["score", "--checkpoint", "reward", "--data", "data/pairs.val.jsonl"]);
    let scores: Vec<Value> = scores.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let wins = scores.iter().filter(|line| number(line, "score_chosen") > number(line, "score_rejected")).count();
    assert_eq!(wins as f64 / scores.len() as f64, number(&of_pairs, "accuracy"));
    assert!(scores.iter().all(|line| line["prompt"].is_string() && line["chosen"].is_string()), "{}", scores[0]);

    let of_dpo = ["eval", "--checkpoint", "dpo", "--reference", "sft", "--data", "data/pairs.val.jsonl"];
    let of_dpo = object(&lab.ok("dpo", &of_dpo));
    for (name, metric) in [("accuracy", "val/accuracy"), ("margin_mean", "val/margin"), ("loss", "val/loss")] {
        assert!((number(&of_dpo, name) - last(lab, "dpo", metric)).abs() < ROUNDING, "{of_dpo}");
    }
    assert_eq!(number(&of_dpo, "pairs"), 8.0);

    let of_policy = [
        "eval",
        "--checkpoint",
        "ppo",
        "--reference",
        "sft",
        "--reward-model",
        "reward",
        "--data",
        "data/prompts.val.jsonl",
    ];
    let of_policy = object(&lab.ok("ppo", &of_policy));
    for name in ["score_mean", "score_reference_mean", "win_rate", "kl_mean", "length_mean", "eos_rate"] {
        let interval = &of_policy[format!("{name}_interval")];
        let [low, high] = [0, 1].map(|i| interval[i].as_f64().unwrap_or_else(|| panic!("{name}: {of_policy}")));
        let mean = number(&of_policy, name);
        assert!(low <= mean && mean <= high, "{name}: {of_policy}");
    }
}

fn assert_answers(lab: &Lab) {
    for checkpoint in ["base", "sft", "ppo", "dpo"] {
        let args = ["generate", "--checkpoint", checkpoint, "--prompt", "what does the fox see?", "--max-tokens", "6"];
        let once = lab.ok("chat", &args);
        assert_eq!(once, lab.ok("chat", &args), "the same seed gives the same answer");
        let json = object(&lab.ok("chat", &[&args[..], &["--json"]].concat()));
        assert_eq!(format!("{}\n", json["text"].as_str().unwrap()), once);
        let ids = json["token_ids"].as_array().unwrap();
        assert!((1..=6).contains(&ids.len()), "{json}");
        assert_eq!(ids.len(), json["log_probs"].as_array().unwrap().len(), "{json}");
        assert!(json["finish_reason"] == "stop" || json["finish_reason"] == "length", "{json}");
        let beams = [&args[..], &["--beams", "2"]].concat();
        let greedy = [&args[..], &["--temperature", "0"]].concat();
        assert!(!lab.ok("chat", &beams).is_empty() && !lab.ok("chat", &greedy).is_empty());
    }
}

#[test]
fn checkpoints_of_one_backend_go_on_on_another_and_back() {
    let lab = Lab::before(PRETRAIN);
    let ndarray = ["--backend", "ndarray", "-q"];
    lab.prepare(PRETRAIN);
    // A run itself: flex, ndarray, flex.
    let loss = |backend: &str| {
        let args = ["eval", "--checkpoint", "base", "--data", "data/val.txt", "--backend", backend];
        number(&object(&lab.ok("pretrain", &args)), "loss")
    };
    let mut losses = vec![loss("flex")];
    for (steps, backend) in [("train.steps=18", "ndarray"), ("train.steps=24", "flex")] {
        lab.ok("pretrain", &PRETRAIN.train("base", &["--resume", "-q", "--set", steps, "--backend", backend]));
        assert_eq!(lab.json("base/manifest.json")["backend"], backend);
        let (flex, other) = (loss("flex"), loss("ndarray"));
        assert!((flex - other).abs() < BACKENDS, "after {steps} on {backend}: flex {flex}, ndarray {other}");
        losses.push(flex);
    }
    assert!(losses.is_sorted_by(|a, b| a > b), "the loss falls on: {losses:?}");

    // The chain: flex, ndarray, flex, ndarray.
    lab.ok("sft", &SFT.train(SFT.out, &ndarray));
    lab.ok("reward-model", &REWARD_MODEL.train(REWARD_MODEL.out, &["-q"]));
    lab.ok("ppo", &PPO.train(PPO.out, &ndarray));
    for stage in [SFT, REWARD_MODEL, PPO] {
        assert_eq!(lab.saved_step(stage.out), Some(if stage == PPO { 8 } else { 12 }));
    }
    let args =
        ["generate", "--checkpoint", "ppo", "--prompt", "what does the owl see?", "--temperature", "0", "--json"];
    let answers =
        ["flex", "ndarray"].map(|backend| object(&lab.ok("chat", &[&args[..], &["--backend", backend]].concat())));
    assert_eq!(answers[0]["token_ids"], answers[1]["token_ids"]);
}

#[test]
fn both_backends_begin_with_the_same_numbers_and_see_the_same_data() {
    let lab = Lab::before(PRETRAIN);
    for backend in ["flex", "ndarray"] {
        lab.ok("pretrain", &PRETRAIN.train(backend, &["-q", "--backend", backend]));
    }
    let column = |backend: &str, name: &str| -> Vec<f64> {
        lab.lines(&format!("{backend}/metrics.jsonl")).iter().filter_map(|line| line[name].as_f64()).collect()
    };
    for name in ["train/loss", "train/grad_norm", "val/loss"] {
        let (flex, ndarray) = (column("flex", name), column("ndarray", name));
        assert!(!flex.is_empty() && flex.len() == ndarray.len());
        let distance = flex.iter().zip(&ndarray).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(distance < BACKENDS * 10.0, "`{name}` over twelve steps: {flex:?} {ndarray:?}");
    }
}
