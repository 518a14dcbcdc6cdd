//! The command `sft` from outside: help, training, evaluation. What it says of bad input is among the tests of the whole
//! pipeline.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

use std::fmt::Write as _;
use std::path::Path;

use common::checkpoint::Stage;
use common::testing::{assert_snapshot, byte_tokenizer, run, save_tiny};
use serde_json::{Value, json};
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_sft");

const CONFIG: &str = r#"
seed = 1

[data]
train = ["train.jsonl"]
val = ["val.jsonl"]

[optimizer]
lr = 1e-2

[train]
batch_size = 8
epochs = 2
n_samples = 2
sample_tokens = 6

[run]
log_every = 1
eval_every = 4
save_every = 0
"#;

/// A loss of the same tokens, computed in batches of another size.
const ROUNDING: f64 = 1e-5;

/// A directory with a pretrained model and conversations in each of the accepted forms.
fn workplace() -> TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    save_tiny(&dir.path().join("base"), Stage::Pretrain, &byte_tokenizer(), 3);
    std::fs::write(dir.path().join("config.toml"), CONFIG).unwrap();
    for (file, n) in [("train.jsonl", 36), ("val.jsonl", 9)] {
        let mut lines = String::new();
        for i in 0..n {
            let (question, answer) = (format!("say {}", i % 5), "ab".repeat(1 + i % 5));
            let record = match i % 3 {
                0 => json!({ "prompt": question, "completion": answer }),
                1 => json!({ "prompt": question, "response": answer, "source": "ignored" }),
                _ => json!({ "messages": [
                    { "role": "system", "content": "be brief" },
                    { "role": "user", "content": question },
                    { "role": "assistant", "content": answer },
                ] }),
            };
            writeln!(lines, "{record}").unwrap();
        }
        std::fs::write(dir.path().join(file), lines).unwrap();
    }
    dir
}

fn train(dir: &Path, out: &str, more: &[&str]) -> String {
    let args = [&["train", "--config", "config.toml", "--init", "base", "--out", out][..], more].concat();
    let (code, stdout, stderr) = run(PROGRAM, &args, dir);
    assert_eq!((code, stdout.as_str()), (0, ""), "{stderr}");
    stderr
}

fn eval(dir: &Path, checkpoint: &str, more: &[&str]) -> Value {
    let args = [&["eval", "--checkpoint", checkpoint, "--data", "val.jsonl"][..], more].concat();
    let (code, stdout, stderr) = run(PROGRAM, &args, dir);
    assert_eq!(code, 0, "{stderr}");
    serde_json::from_str(&stdout).unwrap()
}

fn lines(path: &Path) -> Vec<Value> {
    std::fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn no_sample_steers_the_terminal() {
    let dir = workplace();
    let record = json!({ "prompt": "a\u{1c}b\tc\u{202e}d", "response": "ab" });
    std::fs::write(dir.path().join("val.jsonl"), record.to_string()).unwrap();
    let args = ["train", "--config", "config.toml", "--init", "base", "--out", "out", "--set", "train.epochs=1"];
    let (code, _, stderr) = run(PROGRAM, &args, dir.path());
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("sample: a\u{fffd}b\tc\u{fffd}d → "), "{stderr:?}");
    let steers = |c: char| c.is_control() && c != '\n' && c != '\t';
    assert!(!stderr.contains(steers), "{stderr:?}");
}

#[test]
fn messages_in_a_file_have_date_and_time() {
    let dir = workplace();
    let stderr = train(dir.path(), "out", &["--set", "train.steps=1"]);
    for line in stderr.lines() {
        let (date, message) = line.split_at(20);
        let shape: String = date.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
        assert!(shape == "0000-00-00 00:00:00 " && !message.is_empty(), "{line}");
    }
    assert!(stderr.contains(" step 1/1  val/loss "), "{stderr}");
}

#[test]
fn help_has_an_example_and_version_a_number() {
    let dir = tempfile::tempdir().unwrap();
    let snapshots = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots");
    for (name, args) in [
        ("help.txt", &["--help"][..]),
        ("train-help.txt", &["train", "--help"]),
        ("eval-help.txt", &["eval", "--help"]),
    ] {
        let (code, stdout, stderr) = run(PROGRAM, args, dir.path());
        assert_eq!((code, stderr.as_str()), (0, ""), "{args:?}");
        assert_snapshot(&snapshots.join(name), &stdout);
    }
    assert!(run(PROGRAM, &["--help"], dir.path()).1.contains("Example:"));
    assert_eq!(run(PROGRAM, &["--version"], dir.path()).1, format!("sft {}\n", env!("CARGO_PKG_VERSION")));
    let (code, stdout, stderr) = run(PROGRAM, &[], dir.path());
    assert_eq!((code, stdout.as_str()), (2, ""));
    assert!(stderr.contains("Usage: sft <COMMAND>"), "{stderr}");
}

#[test]
fn training_teaches_the_answers() {
    let dir = workplace();
    let before = eval(dir.path(), "base", &[]);
    train(dir.path(), "sft", &[]);
    let metrics = lines(&dir.path().join("sft/metrics.jsonl"));
    let steps = metrics.iter().filter(|line| line["train/loss"].is_f64()).count();
    assert_eq!(steps, 9, "two epochs of 36 conversations in batches of 8");
    let after = eval(dir.path(), "sft", &[]);
    let number = |value: &Value, name: &str| value[name].as_f64().unwrap();
    assert!(number(&after, "loss") < number(&before, "loss") - 1.0, "{before} {after}");
    assert!(number(&after, "token_accuracy") > number(&before, "token_accuracy"), "{before} {after}");

    // The last evaluation along the way takes all held-out conversations.
    let logged = metrics.iter().rev().find(|line| line["val/loss"].is_f64()).unwrap();
    assert!((number(logged, "val/loss") - number(&after, "loss")).abs() < ROUNDING, "{logged} {after}");
    assert_eq!(logged["val/accuracy"], after["token_accuracy"]);
    let samples = lines(&dir.path().join("sft/samples.jsonl"));
    assert_eq!(samples.len(), 3 * 2, "at steps 4, 8 and 9");
    assert_eq!(samples[0]["prompt"], "say 0");
}

#[test]
fn the_loss_is_on_the_answers_and_their_end_alone() {
    let dir = workplace();
    let result = eval(dir.path(), "base", &[]);
    // Each answer is `ab` one to five times and its `<|end|>`; byte by byte.
    let expected: usize = (0..9).map(|i| 2 * (1 + i % 5) + 1).sum();
    assert_eq!(result["tokens"], expected);
    let alone = eval(dir.path(), "base", &["--batch-size", "1"]);
    let [together, alone] = [&result, &alone].map(|result| result["loss"].as_f64().unwrap());
    assert!((together - alone).abs() < ROUNDING, "{together} {alone}: a packed conversation sees its neighbour");
}

#[test]
fn bad_records_are_counted_where_they_are_to_be_skipped() {
    let dir = workplace();
    let path = dir.path().join("train.jsonl");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, format!("nonsense\n{text}{{\"prompt\": 3}}\n")).unwrap();
    let stderr = train(dir.path(), "sft", &["--set", "data.on_bad_record=skip", "--set", "train.steps=1"]);
    assert!(stderr.contains("2 bad records"), "{stderr}");
    assert!(stderr.contains("36 training conversations"), "{stderr}");
}

#[test]
fn the_dropout_of_an_imported_model_can_be_replaced() {
    let dir = workplace();
    // The same weights in a directory of transformers, whose models are configured with dropout.
    let imported = dir.path().join("imported");
    std::fs::create_dir(&imported).unwrap();
    for file in ["model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(dir.path().join("base").join(file), imported.join(file)).unwrap();
    }
    let config = |of: &str| -> Value {
        serde_json::from_slice(&std::fs::read(dir.path().join(of).join("config.json")).unwrap()).unwrap()
    };
    let dropout = |of: &str| ["resid_pdrop", "embd_pdrop", "attn_pdrop"].map(|key| config(of)[key].as_f64().unwrap());
    let mut changed = config("base");
    for key in ["resid_pdrop", "embd_pdrop", "attn_pdrop"] {
        changed[key] = 0.1.into();
    }
    std::fs::write(imported.join("config.json"), changed.to_string()).unwrap();

    let fine_tuned = |init: &str, out: &str, more: &[&str]| {
        let args = ["train", "--config", "config.toml", "--init", init, "--out", out, "--set", "train.steps=2"];
        let (code, _, stderr) = run(PROGRAM, &[&args[..], more].concat(), dir.path());
        assert_eq!(code, 0, "{stderr}");
        (std::fs::read(dir.path().join(out).join("model.safetensors")).unwrap(), stderr)
    };
    let (without, _) = fine_tuned("base", "without", &[]);
    let (own, stderr) = fine_tuned("imported", "own", &[]);
    assert!(stderr.contains("keeps its dropout of 0.1"), "{stderr}");
    assert_eq!(dropout("own"), [0.1; 3]);
    let (replaced, stderr) = fine_tuned("imported", "replaced", &["--set", "model.dropout=0"]);
    assert!(!stderr.contains("dropout"), "{stderr}");
    assert_eq!(dropout("replaced"), [0.0; 3]);
    assert!(own != without, "dropout does nothing");
    assert!(replaced == without, "trained with the dropout of the imported model");
}
