//! What the tests of the program share: a directory to train in, and what a run leaves there.

#![allow(dead_code)] // not every test program uses all of it

use std::fmt::Write as _;
use std::path::Path;

use common::checkpoint::Stage;
use common::testing::{byte_tokenizer, kill_after_first_save, run, save_tiny};
use serde_json::{Value, json};
use tempfile::TempDir;

/// The program under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_ppo");

/// A short run that leaves nothing out.
pub const CONFIG: &str = r#"
seed = 1

[data]
train = ["train.jsonl"]
val = ["val.jsonl"]

[optimizer]
lr = 1e-3

[value_optimizer]
lr = 1e-3

[train]
steps = 6
batch_size = 8
micro_batch_size = 2
eval_prompts = 6
n_samples = 2

[ppo]
response_length = 12
temperature = 0.9
minibatches = 2
epochs = 2
kl_target = 0.5
kl_horizon = 50.0

[run]
log_every = 1
eval_every = 3
save_every = 2
"#;

/// A directory with a policy, a reward model, prompts, and text in `text.train.txt` and `text.val.txt`.
pub fn workplace() -> TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    save_tiny(&dir.path().join("sft"), Stage::Sft, &byte_tokenizer(), 3);
    save_tiny(&dir.path().join("rm"), Stage::RewardModel, &byte_tokenizer(), 5);
    for (file, n) in [("train.jsonl", 20), ("val.jsonl", 10)] {
        let mut lines = String::new();
        for i in 0..n {
            writeln!(lines, "{}", json!({ "prompt": format!("{} {}", "say".repeat(1 + i % 4), i) })).unwrap();
        }
        std::fs::write(dir.path().join(file), lines).unwrap();
    }
    for (file, n) in [("text.train.txt", 60), ("text.val.txt", 20)] {
        let text: Vec<String> =
            (0..n).map(|i| format!("the {} sat on the mat", ["cat", "dog", "fox"][i % 3])).collect();
        std::fs::write(dir.path().join(file), text.join("\n\n")).unwrap();
    }
    std::fs::write(dir.path().join("config.toml"), CONFIG).unwrap();
    dir
}

/// The arguments of `ppo train` in a [`workplace`].
pub const TRAIN: [&str; 7] = ["train", "--config", "config.toml", "--policy", "sft", "--reward-model", "rm"];

/// Trains in a [`workplace`]; the exit code, stdout and stderr.
pub fn train(dir: &Path, out: &str, more: &[&str]) -> (i32, String, String) {
    run(PROGRAM, &[&TRAIN[..], &["--out", out], more].concat(), dir)
}

/// The lines of a file of JSON.
pub fn lines(path: &Path) -> Vec<Value> {
    std::fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The metrics without what a clock measures.
pub fn metrics(dir: &Path) -> Vec<Value> {
    let mut lines = lines(&dir.join("metrics.jsonl"));
    for line in &mut lines {
        line.as_object_mut().unwrap().retain(|name, _| name != "seconds" && !name.starts_with("timing/"));
    }
    lines
}

/// Trains with `settings` in one go, and again killed and resumed.
pub fn ends_with_the_same_bytes_after_a_kill(settings: &[&str], has_values: bool) {
    ends_in_the_same_bytes(&workplace(), settings, has_values);
}

/// The same in `dir`.
pub fn ends_in_the_same_bytes(dir: &TempDir, settings: &[&str], has_values: bool) {
    let more = ["--set", "train.steps=60", "--set", "run.save_every=4", "--set", "run.eval_every=15"];
    let more = [&more[..], settings].concat();
    let (code, _, stderr) = train(dir.path(), "whole", &more);
    assert_eq!(code, 0, "{stderr}");
    let args = [&TRAIN[..], &["--out", "parts"], &more].concat();
    let step = kill_after_first_save(PROGRAM, &args, dir.path(), "parts");
    assert!((4..60).contains(&step), "{step}");
    let (code, _, stderr) = run(PROGRAM, &[&args[..], &["--resume"]].concat(), dir.path());
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains(&format!("resuming at step {step} of 60")), "{stderr}");
    let (a, b) = (dir.path().join("whole"), dir.path().join("parts"));
    let files = [
        "model.safetensors",
        "state/weights.safetensors",
        "state/optimizer.safetensors",
        "rollouts.jsonl",
        "samples.jsonl",
        "value/model.safetensors",
        "state/value_optimizer.safetensors",
    ];
    let of_values = if has_values { 0 } else { 2 };
    for file in &files[files.len() - of_values..] {
        assert!(!a.join(file).exists(), "{file} is written without a value model");
    }
    assert_eq!(a.join("value").exists(), has_values);
    for file in &files[..files.len() - of_values] {
        assert!(std::fs::read(a.join(file)).unwrap() == std::fs::read(b.join(file)).unwrap(), "{file} differs");
    }
    assert_eq!(metrics(&a), metrics(&b));
}
