//! The command `pretrain` from outside: help, tokenizers, training, evaluation. What it says of bad input is among the
//! tests of the whole pipeline.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

use std::path::Path;

use common::checkpoint::Stage;
use common::testing::{assert_snapshot, byte_tokenizer, run, save_tiny};
use serde_json::{Value, json};
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_pretrain");

const CONFIG: &str = r#"
seed = 1

[data]
train = ["train.txt"]
val = ["val.txt"]

[tokenizer]
vocab_size = 300

[model]
d_model = 16
n_layers = 1
n_heads = 2
max_seq_len = 32

[train]
steps = 30
batch_size = 8
sample_prompts = ["the", ""]
sample_tokens = 6

[optimizer]
lr = 1e-2

[run]
log_every = 10
eval_every = 15
save_every = 0
"#;

/// Two losses of the same tokens, one from logits in f32, the other by the fused kernel.
const ROUNDING: f64 = 1e-5;

fn workplace() -> TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let write = |file: &str, text: &str| std::fs::write(dir.path().join(file), text).unwrap();
    write("config.toml", CONFIG);
    write("train.txt", &"the fox sees a boat.\n\nthe owl sees a tree.\n\nthe fox sees a tree.\n\n".repeat(20));
    write("val.txt", &"the owl sees a boat.\n\n".repeat(10));
    dir
}

/// Runs a command that is to succeed and returns the object it prints.
fn result(dir: &Path, args: &[&str]) -> Value {
    let (code, stdout, stderr) = run(PROGRAM, args, dir);
    assert_eq!(code, 0, "{args:?}: {stderr}");
    assert_eq!(stdout.lines().count(), 1, "one line, {stdout}");
    serde_json::from_str(&stdout).unwrap()
}

fn train(dir: &Path, more: &[&str]) {
    let args = [&["train", "--config", "config.toml"][..], more].concat();
    let (code, stdout, stderr) = run(PROGRAM, &args, dir);
    assert_eq!((code, stdout.as_str()), (0, ""), "{stderr}");
}

#[test]
fn help_has_an_example_and_version_a_number() {
    let dir = tempfile::tempdir().unwrap();
    let snapshots = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots");
    for (name, args) in [
        ("help.txt", &["--help"][..]),
        ("tokenizer-help.txt", &["tokenizer", "--help"]),
        ("train-help.txt", &["train", "--help"]),
        ("eval-help.txt", &["eval", "--help"]),
    ] {
        let (code, stdout, stderr) = run(PROGRAM, args, dir.path());
        assert_eq!((code, stderr.as_str()), (0, ""), "{args:?}");
        assert_snapshot(&snapshots.join(name), &stdout);
    }
    assert!(run(PROGRAM, &["--help"], dir.path()).1.contains("Example:"));
    assert_eq!(run(PROGRAM, &["--version"], dir.path()).1, format!("pretrain {}\n", env!("CARGO_PKG_VERSION")));
    // Without a command: help, and wrong usage.
    let (code, stdout, stderr) = run(PROGRAM, &[], dir.path());
    assert_eq!((code, stdout.as_str()), (2, ""));
    assert!(stderr.contains("Usage: pretrain <COMMAND>"), "{stderr}");
}

#[test]
fn a_tokenizer_is_trained_and_its_compression_printed() {
    let dir = workplace();
    let printed = result(dir.path(), &["tokenizer", "--config", "config.toml", "--out", "tokenizer"]);
    // The text is so uniform that it runs out of pairs before the vocabulary is full, or not; never beyond.
    let vocab_size = printed["vocab_size"].as_u64().unwrap();
    assert!((263..=300).contains(&vocab_size), "{printed}");
    assert!(printed["bytes_per_token"].as_f64().unwrap() > 2.0, "{printed}");
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        assert!(dir.path().join("tokenizer").join(file).is_file(), "{file}");
    }
    // A byte is a token.
    let bytes = ["tokenizer", "--config", "config.toml", "--out", "bytes", "--set", "tokenizer.kind=byte"];
    assert_eq!(result(dir.path(), &bytes)["bytes_per_token"], 1.0);
    // Again, and with fewer tokens.
    let again = ["tokenizer", "--config", "config.toml", "--out", "tokenizer", "--set", "tokenizer.vocab_size=270"];
    assert_eq!(run(PROGRAM, &again, dir.path()).0, 1, "the directory is not empty");
    assert_eq!(result(dir.path(), &[&again[..], &["--overwrite"]].concat())["vocab_size"], 270);
}

#[test]
fn training_lowers_the_loss_and_continues_beginnings() {
    let dir = workplace();
    result(dir.path(), &["tokenizer", "--config", "config.toml", "--out", "tokenizer"]);
    train(dir.path(), &["--tokenizer", "tokenizer", "--out", "base"]);
    let lines = |file: &str| -> Vec<Value> {
        let text = std::fs::read_to_string(dir.path().join("base").join(file)).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let metrics = lines("metrics.jsonl");
    let losses: Vec<f64> = metrics.iter().filter_map(|line| line["train/loss"].as_f64()).collect();
    assert_eq!(losses.len(), 4, "of steps 1, 10, 20 and 30");
    assert!(losses[3] < losses[0] - 1.0, "{losses:?}");
    let samples = lines("samples.jsonl");
    let prompts: Vec<_> = samples.iter().map(|line| (line["step"].clone(), line["prompt"].clone())).collect();
    assert_eq!(
        prompts,
        [(json!(15), json!("the")), (json!(15), json!("")), (json!(30), json!("the")), (json!(30), json!(""))]
    );

    // The last evaluation takes all of the held-out text, in the windows that `eval` takes too.
    let logged = metrics.iter().rev().find_map(|line| line["val/loss"].as_f64()).unwrap();
    let printed = result(dir.path(), &["eval", "--checkpoint", "base", "--data", "val.txt"]);
    let loss = printed["loss"].as_f64().unwrap();
    // `eval` adds the text after the last whole window.
    assert!((loss - logged).abs() < 0.1, "{loss} {logged}");
    assert!((printed["perplexity"].as_f64().unwrap() - loss.exp()).abs() < ROUNDING * loss.exp(), "{printed}");

    // Training goes on from a checkpoint, with its tokenizer.
    train(dir.path(), &["--init", "base", "--out", "more", "--set", "train.steps=5"]);
    let manifest: Value =
        serde_json::from_slice(&std::fs::read(dir.path().join("more/manifest.json")).unwrap()).unwrap();
    let parent: Value = serde_json::from_slice(&std::fs::read(dir.path().join("base/manifest.json")).unwrap()).unwrap();
    assert_eq!(manifest["parents"][0]["weights_sha256"], parent["weights_sha256"]);
    assert_eq!(manifest["tokenizer_sha256"], parent["tokenizer_sha256"]);
}

#[test]
fn text_and_its_token_ids_have_the_same_loss() {
    let dir = workplace();
    let tokenizer = byte_tokenizer();
    save_tiny(&dir.path().join("base"), Stage::Pretrain, &tokenizer, 7);
    std::fs::write(dir.path().join("text.txt"), "a fox, ein Füchslein").unwrap();
    let mut ids = vec![tokenizer.specials().bos];
    ids.extend(tokenizer.encode("a fox, ein Füchslein").unwrap());
    std::fs::write(dir.path().join("ids.json"), json!([ids]).to_string()).unwrap();
    let of_text = result(dir.path(), &["eval", "--checkpoint", "base", "--data", "text.txt"]);
    assert_eq!((&of_text["tokens"], &of_text["bytes"]), (&json!(21), &json!(21)), "{of_text}");
    let loss = of_text["loss"].as_f64().unwrap();
    let bits_per_byte = loss / std::f64::consts::LN_2;
    assert!((of_text["bits_per_byte"].as_f64().unwrap() - bits_per_byte).abs() < 1e-9, "{of_text}");

    let of_ids = result(dir.path(), &["eval", "--checkpoint", "base", "--ids", "ids.json", "--logits"]);
    assert!((of_ids["loss"].as_f64().unwrap() - loss).abs() < ROUNDING, "{} {loss}", of_ids["loss"]);
    let rows = of_ids["logits"].as_array().unwrap();
    assert_eq!((rows.len(), rows[0].as_array().unwrap().len()), (1, ids.len()));
    assert_eq!(rows[0][0].as_array().unwrap().len(), tokenizer.vocab_size());

    // Rows of different lengths, together and alone, and by a checkpoint without a tokenizer.
    std::fs::write(dir.path().join("ids.json"), json!([ids[..4], ids]).to_string()).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json", "manifest.json"] {
        std::fs::remove_file(dir.path().join("base").join(file)).unwrap();
    }
    let args = ["eval", "--checkpoint", "base", "--ids", "ids.json", "--logits"];
    let (together, alone) =
        (result(dir.path(), &args), result(dir.path(), &[&args[..], &["--batch-size", "1"]].concat()));
    let flat = |value: &Value| -> Vec<f64> {
        let rows = value["logits"].as_array().unwrap().iter().flat_map(|row| row.as_array().unwrap());
        rows.flat_map(|position| position.as_array().unwrap()).map(|logit| logit.as_f64().unwrap()).collect()
    };
    let (together, alone) = (flat(&together), flat(&alone));
    assert_eq!(together.len(), (4 + ids.len()) * tokenizer.vocab_size());
    assert!(together.iter().zip(&alone).all(|(a, b)| (a - b).abs() < ROUNDING));
    let text = run(PROGRAM, &["eval", "--checkpoint", "base", "--data", "text.txt"], dir.path());
    assert_eq!(text.0, 1, "text needs a tokenizer");
}
