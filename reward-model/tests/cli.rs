//! The command `reward-model` from outside: training, resuming, evaluating, scoring, and what it says when it cannot.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

use std::fmt::Write as _;
use std::path::Path;

use common::checkpoint::Stage;
use common::testing::{assert_snapshot, byte_tokenizer, kill_after_first_save, run, save_tiny};
use serde_json::{Value, json};
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_reward-model");

const CONFIG: &str = r#"
seed = 1

[data]
train = ["train.jsonl"]
val = ["val.jsonl"]

[optimizer]
lr = 3e-3

[train]
batch_size = 8
micro_batch_size = 4
steps = 12

[normalisation]
samples = 16
max_tokens = 8

[run]
log_every = 1
eval_every = 4
save_every = 5
"#;

/// A directory with a policy and pairs whose preferred answer is the one with more `a`.
fn workplace() -> TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    save_tiny(&dir.path().join("sft"), Stage::Sft, &byte_tokenizer(), 3);
    for (file, n) in [("train.jsonl", 96), ("val.jsonl", 24)] {
        let mut lines = String::new();
        for i in 0..n {
            let (prompt, n_letters) = (format!("say {i}"), 3 + i % 5);
            let (chosen, rejected) = ("a".repeat(n_letters), "b".repeat(3 + (i + 2) % 5));
            writeln!(lines, "{}", json!({ "prompt": prompt, "chosen": chosen, "rejected": rejected })).unwrap();
        }
        std::fs::write(dir.path().join(file), lines).unwrap();
    }
    std::fs::write(dir.path().join("config.toml"), CONFIG).unwrap();
    dir
}

fn train(dir: &Path, out: &str, more: &[&str]) -> (i32, String, String) {
    let args = [&["train", "--config", "config.toml", "--init", "sft", "--out", out][..], more].concat();
    run(PROGRAM, &args, dir)
}

fn lines(path: &Path) -> Vec<Value> {
    std::fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The metrics without what a clock measures.
fn metrics(dir: &Path) -> Vec<Value> {
    let mut lines = lines(&dir.join("metrics.jsonl"));
    for line in &mut lines {
        let line = line.as_object_mut().unwrap();
        line.remove("seconds");
        line.remove("train/tokens_per_second");
    }
    lines
}

#[test]
fn training_learns_the_preference_and_normalises_the_scores() {
    let dir = workplace();
    let (code, stdout, stderr) = train(dir.path(), "rm", &["--set", "train.steps=40"]);
    assert_eq!((code, stdout.as_str()), (0, ""), "{stderr}");

    let (code, stdout, stderr) = run(PROGRAM, &["eval", "--checkpoint", "rm", "--data", "val.jsonl"], dir.path());
    assert_eq!(code, 0, "{stderr}");
    let result: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(result["pairs"], 24);
    assert!(result["accuracy"].as_f64().unwrap() > 0.9, "{result}");
    assert!(result["loss"].as_f64().unwrap() < 0.5 && result["margin_mean"].as_f64().unwrap() > 0.0, "{result}");
    let longer = (0..24).map(|i| match (i % 5).cmp(&((i + 2) % 5)) {
        std::cmp::Ordering::Greater => 1.0,
        std::cmp::Ordering::Equal => 0.5,
        std::cmp::Ordering::Less => 0.0,
    });
    assert!((result["longer_wins_accuracy"].as_f64().unwrap() - longer.sum::<f64>() / 24.0).abs() < 1e-12, "{result}");

    // The same samples that the normalisation drew are not at hand; other answers show that gain and bias were used.
    let config: Value = serde_json::from_slice(&std::fs::read(dir.path().join("rm/config.json")).unwrap()).unwrap();
    let bias = config["score_bias"].as_f64().unwrap();
    assert!(bias != 0.0, "{config}");
    let score = |file: &str| {
        let (code, stdout, stderr) = run(PROGRAM, &["score", "--checkpoint", "rm", "--data", file], dir.path());
        assert_eq!(code, 0, "{stderr}");
        stdout.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()).collect::<Vec<_>>()
    };
    let pairs = score("val.jsonl");
    assert_eq!((pairs.len(), &pairs[3]["prompt"]), (24, &json!("say 3")));
    let (chosen, raw) = (pairs[3]["score_chosen"].as_f64().unwrap(), pairs[3]["raw_score_chosen"].as_f64().unwrap());
    assert!((chosen - raw - bias).abs() < 1e-12, "{chosen} {raw} {bias}");

    let answer = json!({ "id": 7, "prompt": "say 3", "response": pairs[3]["chosen"] });
    std::fs::write(dir.path().join("answers.jsonl"), answer.to_string()).unwrap();
    let answers = score("answers.jsonl");
    assert_eq!(answers[0]["id"], 7);
    assert!((answers[0]["score"].as_f64().unwrap() - chosen).abs() < 1e-5, "{answers:?}");
}

#[test]
fn scores_of_token_ids_are_those_of_the_same_text() {
    let dir = workplace();
    save_tiny(&dir.path().join("rm"), Stage::RewardModel, &byte_tokenizer(), 5);
    let tokenizer = byte_tokenizer();
    let specials = tokenizer.specials();
    let text = |text: &str| tokenizer.encode(text).unwrap();
    let ids = [
        vec![specials.bos, specials.user],
        text("q"),
        vec![specials.end, specials.assistant],
        text("yes"),
        vec![specials.end],
    ]
    .concat();
    std::fs::write(dir.path().join("ids.json"), json!([[1, 2, 3], ids]).to_string()).unwrap();
    std::fs::write(dir.path().join("answers.jsonl"), r#"{"prompt": "q", "response": "yes"}"#).unwrap();
    let (code, by_ids, stderr) = run(PROGRAM, &["score", "--checkpoint", "rm", "--ids", "ids.json"], dir.path());
    assert_eq!(code, 0, "{stderr}");
    let (_, by_text, _) = run(PROGRAM, &["score", "--checkpoint", "rm", "--data", "answers.jsonl"], dir.path());
    let by_ids: Vec<Value> = by_ids.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let by_text: Value = serde_json::from_str(&by_text).unwrap();
    assert_eq!((by_ids.len(), &by_ids[0]["ids"]), (2, &json!([1, 2, 3])));
    let difference = by_ids[1]["score"].as_f64().unwrap() - by_text["score"].as_f64().unwrap();
    assert!(difference.abs() < 1e-6, "{difference}");
}

#[test]
fn a_killed_and_resumed_run_ends_with_the_same_bytes() {
    let dir = workplace();
    for keep_best in ["run.keep_best=false", "run.keep_best=true"] {
        let more = ["--set", keep_best, "--set", "train.steps=300", "--set", "run.save_every=20"];
        let (code, _, stderr) = train(dir.path(), &format!("whole-{keep_best}"), &more);
        assert_eq!(code, 0, "{stderr}");
        let parts = format!("parts-{keep_best}");
        let args = [&["train", "--config", "config.toml", "--init", "sft", "--out", &parts][..], &more].concat();
        let step = kill_after_first_save(PROGRAM, &args, dir.path(), &parts);
        assert!((20..300).contains(&step), "{step}");
        let (code, _, stderr) = run(PROGRAM, &[&args[..], &["--resume"]].concat(), dir.path());
        assert_eq!(code, 0, "{stderr}");
        assert!(stderr.contains(&format!("resuming at step {step} of 300")), "{stderr}");
        let (a, b) = (dir.path().join(format!("whole-{keep_best}")), dir.path().join(&parts));
        for file in ["model.safetensors", "config.json", "state/weights.safetensors", "state/optimizer.safetensors"] {
            assert!(std::fs::read(a.join(file)).unwrap() == std::fs::read(b.join(file)).unwrap(), "{file} differs");
        }
        assert_eq!(metrics(&a), metrics(&b));
    }
}

#[test]
fn micro_batches_add_up_to_the_batch() {
    let dir = workplace();
    let loss = |micro: usize| {
        let out = format!("micro-{micro}");
        let micro = format!("train.micro_batch_size={micro}");
        let (code, _, stderr) = train(dir.path(), &out, &["--set", &micro, "--set", "train.centring_coef=0.05"]);
        assert_eq!(code, 0, "{stderr}");
        let last = metrics(&dir.path().join(&out)).into_iter().rfind(|line| line["train/loss"].is_f64());
        last.unwrap()["train/loss"].as_f64().unwrap()
    };
    // Twelve steps of float rounding in another order.
    assert!((loss(1) - loss(8)).abs() < 1e-4);
}

#[test]
fn help_and_version_are_as_recorded() {
    let dir = tempfile::tempdir().unwrap();
    let mut all = String::new();
    for args in [
        &["--help"][..],
        &["train", "--help"],
        &["eval", "--help"],
        &["score", "--help"],
        &["label", "--help"],
        &["agreement", "--help"],
    ] {
        let (code, stdout, _) = run(PROGRAM, args, dir.path());
        assert_eq!(code, 0, "{args:?}");
        write!(all, "$ reward-model {}\n{stdout}\n", args.join(" ")).unwrap();
    }
    assert_snapshot(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots/help.txt"), &all);
    let version = run(PROGRAM, &["--version"], dir.path()).1;
    assert_eq!(version, concat!("reward-model ", env!("CARGO_PKG_VERSION"), "\n"));
    assert_eq!(run(PROGRAM, &["score", "--checkpoint", "rm"], dir.path()).0, 2, "wrong usage");
}

#[test]
fn errors_name_what_is_wrong_and_what_to_do() {
    let dir = workplace();
    save_tiny(&dir.path().join("rm"), Stage::RewardModel, &byte_tokenizer(), 5);
    std::fs::write(dir.path().join("bad.jsonl"), "{\"prompt\": \"q\", \"chosen\": \"a\"}\n").unwrap();
    std::fs::write(dir.path().join("long.jsonl"), json!({ "prompt": "q", "response": "a".repeat(99) }).to_string())
        .unwrap();
    let pair = json!({ "prompt": "q", "chosen": "a".repeat(99), "rejected": "b" });
    std::fs::write(dir.path().join("long-pair.jsonl"), pair.to_string()).unwrap();
    std::fs::write(dir.path().join("ids.json"), "[[1, 2], [400]]").unwrap();
    std::fs::create_dir(dir.path().join("full")).unwrap();
    std::fs::write(dir.path().join("full/notes.txt"), "mine").unwrap();
    std::fs::write(dir.path().join("empty.jsonl"), "").unwrap();
    let init =
        |init: &'static str, out: &'static str| vec!["train", "--config", "config.toml", "--init", init, "--out", out];
    let train = |more: &[&'static str]| [&init("sft", "out")[..], more].concat();
    let cases = [
        init("rm", "out"),
        init("nowhere", "out"),
        init("sft", "full"),
        train(&["--set", "optimizer.learning_rate=1"]),
        train(&["--set", "train.micro_batch_size=3"]),
        train(&["--set", "train.centring_coef=-1"]),
        train(&["--set", "normalisation.samples=1"]),
        train(&["--set", "data.train=[]"]),
        train(&["--set", "data.train=['nowhere.jsonl']"]),
        train(&["--set", "data.train=['empty.jsonl']"]),
        train(&["--set", "data.train=['bad.jsonl']"]),
        train(&["--set", "data.train=['long-pair.jsonl']", "--set", "data.on_too_long=fail"]),
        train(&["--set", "data.train=['long-pair.jsonl']", "--set", "data.on_too_long=skip"]),
        train(&["--resume"]),
        vec!["eval", "--checkpoint", "sft", "--data", "val.jsonl"],
        vec!["score", "--checkpoint", "rm", "--data", "bad.jsonl"],
        vec!["score", "--checkpoint", "rm", "--data", "long.jsonl"],
        vec!["score", "--checkpoint", "rm", "--ids", "ids.json"],
    ];
    let mut all = String::new();
    for args in cases {
        let (code, stdout, stderr) = run(PROGRAM, &args, dir.path());
        assert_eq!((code, stdout.as_str()), (1, ""), "{args:?}: {stderr}");
        let error = &stderr[stderr.find("error: ").unwrap_or(0)..];
        write!(all, "$ reward-model {}\n{error}\n", args.join(" ")).unwrap();
        std::fs::remove_dir_all(dir.path().join("out")).ok();
    }
    assert_snapshot(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots/errors.txt"), &all);
}

#[test]
fn missing_optimizer_keys_take_the_defaults_of_rlhf() {
    let dir = workplace();
    let (code, _, stderr) = train(dir.path(), "rm", &["--set", "train.steps=1"]);
    assert_eq!(code, 0, "{stderr}");
    let resolved = std::fs::read_to_string(dir.path().join("rm/config.toml")).unwrap();
    for line in ["lr = 0.003", "schedule = \"linear\"", "weight_decay = 0.0", "eps = 0.00001"] {
        assert!(resolved.contains(line), "{resolved}");
    }
}
