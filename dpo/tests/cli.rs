//! The command `dpo` from outside: training, evaluating, and what it says when it cannot.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

use std::fmt::Write as _;
use std::path::Path;

use common::checkpoint::Stage;
use common::testing::{assert_snapshot, byte_tokenizer, run, save_tiny};
use serde_json::{Value, json};
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_dpo");

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

[run]
log_every = 1
eval_every = 4
"#;

/// A directory with a policy and pairs whose preferred answer is the one of `a`.
fn workplace() -> TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    save_tiny(&dir.path().join("sft"), Stage::Sft, &byte_tokenizer(), 3);
    for (file, n) in [("train.jsonl", 96), ("val.jsonl", 24)] {
        let mut lines = String::new();
        for i in 0..n {
            let (chosen, rejected) = ("a".repeat(3 + i % 5), "b".repeat(3 + (i + 2) % 5));
            let pair = json!({ "prompt": format!("say {i}"), "chosen": chosen, "rejected": rejected });
            writeln!(lines, "{pair}").unwrap();
        }
        std::fs::write(dir.path().join(file), lines).unwrap();
    }
    std::fs::write(dir.path().join("config.toml"), CONFIG).unwrap();
    dir
}

fn train(dir: &Path, init: &str, out: &str, more: &[&str]) {
    let args = [&["train", "--config", "config.toml", "--init", init, "--out", out][..], more].concat();
    let (code, stdout, stderr) = run(PROGRAM, &args, dir);
    assert_eq!((code, stdout.as_str()), (0, ""), "{stderr}");
}

fn eval(dir: &Path, checkpoint: &str, reference: &str) -> Value {
    let args = ["eval", "--checkpoint", checkpoint, "--reference", reference, "--data", "val.jsonl"];
    let (code, stdout, stderr) = run(PROGRAM, &args, dir);
    assert_eq!(code, 0, "{stderr}");
    serde_json::from_str(&stdout).unwrap()
}

fn metrics(dir: &Path, out: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(dir.join(out).join("metrics.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn number(value: &Value, name: &str) -> f64 {
    value[name].as_f64().unwrap_or_else(|| panic!("no `{name}` in {value}"))
}

/// Equal sums of a few f32 in batches of another size.
const ROUNDING: f64 = 1e-4;

#[test]
fn training_learns_the_preference_by_either_loss() {
    let dir = workplace();
    for (loss, out, at_first) in [("sigmoid", "dpo", std::f64::consts::LN_2), ("ipo", "ipo", 25.0)] {
        let loss = format!("dpo.loss={loss}");
        train(dir.path(), "sft", out, &["--set", "train.steps=40", "--set", &loss]);
        let first = &metrics(dir.path(), out)[0];
        // The policy is its reference until the first step is made.
        assert!((number(first, "train/loss") - at_first).abs() < ROUNDING * 100.0, "{first}");
        assert!(number(first, "rewards/margins").abs() < ROUNDING, "{first}");
        let result = eval(dir.path(), out, "sft");
        assert_eq!(result["pairs"], 24);
        assert!(number(&result, "accuracy") > 0.9 && number(&result, "margin_mean") > 0.0, "{result}");
        assert!(number(&result, "loss") < at_first * 0.9, "{result}");
        let last = metrics(dir.path(), out).into_iter().rev().find(|line| line["val/loss"].is_number()).unwrap();
        for (name, metric) in [("accuracy", "val/accuracy"), ("margin_mean", "val/margin"), ("loss", "val/loss")] {
            assert!((number(&result, name) - number(&last, metric)).abs() < ROUNDING, "{result} {last}");
        }
    }
    // Of a policy against itself nothing is preferred.
    let same = eval(dir.path(), "sft", "sft");
    assert_eq!((number(&same, "accuracy"), number(&same, "margin_mean")), (0.5, 0.0));
}

#[test]
fn the_reference_of_a_run_is_what_it_began_from() {
    let dir = workplace();
    train(dir.path(), "sft", "first", &[]);
    train(dir.path(), "first", "second", &[]);
    let first = &metrics(dir.path(), "second")[0];
    assert!((number(first, "train/loss") - std::f64::consts::LN_2).abs() < ROUNDING, "{first}");
    // With adapters it is the trunk.
    train(dir.path(), "sft", "lora", &["--set", "lora.rank=2", "--set", "lora.dropout=0.5"]);
    let first = &metrics(dir.path(), "lora")[0];
    assert!((number(first, "train/loss") - std::f64::consts::LN_2).abs() < ROUNDING, "{first}");
    assert!(number(&eval(dir.path(), "lora", "sft"), "margin_mean") > 0.0);
}

#[test]
fn a_resumed_run_does_not_ask_its_reference_again() {
    let dir = workplace();
    train(dir.path(), "sft", "out", &[]);
    let path = dir.path().join("out/reference.json");
    let kept = std::fs::read_to_string(&path).unwrap();
    let mut reference: Value = serde_json::from_str(&kept).unwrap();
    // Numbers that no model gives: they show in the loss where they are read.
    reference["val"] = json!(vec![[-1000.0, 0.0]; 24]);
    std::fs::write(&path, reference.to_string()).unwrap();
    train(dir.path(), "sft", "out", &["--resume", "--set", "train.steps=16"]);
    let last = metrics(dir.path(), "out").into_iter().rev().find(|line| line["val/loss"].is_number()).unwrap();
    assert!(number(&last, "val/margin") > 90.0, "{last}");
    // Those of another model are not read.
    reference["fingerprint"] = json!("of another");
    std::fs::write(&path, reference.to_string()).unwrap();
    train(dir.path(), "sft", "out", &["--resume", "--set", "train.steps=20"]);
    let last = metrics(dir.path(), "out").into_iter().rev().find(|line| line["val/loss"].is_number()).unwrap();
    assert!(number(&last, "val/margin") < 90.0, "{last}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), kept);
}

#[test]
fn every_pair_of_a_ranked_list_is_in_one_step() {
    let dir = workplace();
    let list = json!({ "prompt": "say it", "responses": ["aaa", "ab", "bb"] });
    std::fs::write(dir.path().join("train.jsonl"), format!("{list}\n{list}\n")).unwrap();
    let one = ["--set", "train.steps=1", "--set", "train.batch_size=1", "--set", "train.micro_batch_size=1"];
    train(dir.path(), "sft", "out", &one);
    // Three pairs, of answers with 4 + 3, 4 + 3 and 3 + 3 tokens.
    assert_eq!(metrics(dir.path(), "out")[0]["tokens"], 20);
}

#[test]
fn help_is_as_recorded() {
    let dir = tempfile::tempdir().unwrap();
    let mut all = String::new();
    for args in [&["--help"][..], &["train", "--help"], &["eval", "--help"]] {
        let (code, stdout, stderr) = run(PROGRAM, args, dir.path());
        assert_eq!(code, 0, "{stderr}");
        write!(all, "$ dpo {}\n{stdout}\n", args.join(" ")).unwrap();
    }
    assert_snapshot(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots/help.txt"), &all);
}

#[test]
fn errors_say_what_and_where_and_what_to_do() {
    let dir = workplace();
    let tokenizer = byte_tokenizer();
    save_tiny(&dir.path().join("base"), Stage::Pretrain, &tokenizer, 4);
    save_tiny(&dir.path().join("rm"), Stage::RewardModel, &tokenizer, 4);
    std::fs::write(dir.path().join("bad.jsonl"), "{\"prompt\": \"q\", \"chosen\": \"a\"}\n").unwrap();
    let pair = json!({ "prompt": "q", "chosen": "a".repeat(99), "rejected": "b" });
    std::fs::write(dir.path().join("long.jsonl"), pair.to_string()).unwrap();
    let init = |init: &'static str| vec!["train", "--config", "config.toml", "--init", init, "--out", "out"];
    let train = |more: &[&'static str]| [&init("sft")[..], more].concat();
    let eval = |checkpoint, reference, data| {
        vec!["eval", "--checkpoint", checkpoint, "--reference", reference, "--data", data]
    };
    let cases = [
        init("base"),
        init("rm"),
        train(&["--set", "dpo.beta=0"]),
        train(&["--set", "dpo.label_smoothing=0.5"]),
        train(&["--set", "dpo.label_smoothing=0.1", "--set", "dpo.loss=ipo"]),
        train(&["--set", "dpo.loss=hinge"]),
        train(&["--set", "train.micro_batch_size=3"]),
        train(&["--set", "data.train=['bad.jsonl']"]),
        train(&["--set", "data.train=['long.jsonl']", "--set", "data.on_too_long=fail"]),
        train(&["--resume"]),
        train(&["--trunk", "bf16"]),
        eval("rm", "sft", "val.jsonl"),
        eval("sft", "rm", "val.jsonl"),
        eval("sft", "base", "bad.jsonl"),
    ];
    let mut all = String::new();
    for args in cases {
        let (code, stdout, stderr) = run(PROGRAM, &args, dir.path());
        assert_eq!(stdout, "", "{args:?}");
        assert!(code == 1 || code == 2, "{args:?}: {stderr}");
        let error = &stderr[stderr.find("error: ").unwrap_or(0)..];
        write!(all, "$ dpo {}\nexit {code}\n{error}\n", args.join(" ")).unwrap();
        assert!(!dir.path().join("out").exists(), "{args:?}: `--out` was made although nothing was done");
    }
    assert_snapshot(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots/errors.txt"), &all);
}
