//! A recipe so small that every step takes moments, and a directory to run it in.

#![allow(dead_code, reason = "each test program uses its own part")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

/// recipe.toml with everything a recipe may have.
pub const RECIPE: &str = r#"
title = "Micro"
seed = 3
[world]
stories = 80
sft = 40
prefs = 24
pair_prompts = 24
prompts = 16
held_out = 8
[gold]
kind = "world"
[collect]
prompts = "$DATA/prompts.pairs.jsonl"
test_prompts = "$DATA/prompts.pairs-test.jsonl"
n_val_prompts = 6
max_tokens = 12
least_difference = 0.0  # a model that has learned nothing writes nothing of worth
[evaluate]
prompts = "$DATA/prompts.test.jsonl"
n_prompts = 5
max_tokens = 12
"#;

const PRETRAIN: &str = r#"
[data]
train = ["$DATA/pretrain.train.txt"]
val = ["$DATA/pretrain.val.txt"]
[tokenizer]
vocab_size = 400
[model]
d_model = 16
n_layers = 1
n_heads = 2
max_seq_len = 256
[train]
steps = 6
batch_size = 2
seq_len = 32
eval_windows = 2
sample_tokens = 4
[run]
eval_every = 3
"#;

const SFT: &str = r#"
[data]
train = ["$DATA/sft.train.jsonl"]
val = ["$DATA/sft.val.jsonl"]
[train]
steps = 3
batch_size = 4
n_samples = 1
sample_tokens = 4
"#;

const REWARD_MODEL: &str = r#"
[data]
train = ["$DATA/prefs.train.jsonl"]
val = ["$DATA/prefs.test.jsonl"]
[train]
steps = 3
batch_size = 4
[normalisation]
samples = 4
max_tokens = 8
"#;

const PPO: &str = r#"
[data]
train = ["$DATA/prompts.train.jsonl"]
val = ["$DATA/prompts.pairs-test.jsonl"]
[train]
steps = 2
batch_size = 4
eval_prompts = 2
n_samples = 1
[ppo]
response_length = 8
epochs = 1
"#;

const DPO: &str = r#"
[data]
train = ["$DATA/prefs.train.jsonl"]
val = ["$DATA/prefs.test.jsonl"]
[train]
steps = 3
batch_size = 4
"#;

/// A directory with a recipe in `micro/`, whose results go to `out/`.
pub struct Lab {
    pub dir: tempfile::TempDir,
    /// Flags of every run.
    flags: Vec<String>,
}

impl Lab {
    /// The recipe that generates its data.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let lab = Self { dir, flags: Vec::new() };
        for (name, text) in [
            ("recipe", RECIPE),
            ("pretrain", PRETRAIN),
            ("sft", SFT),
            ("reward-model", REWARD_MODEL),
            ("ppo", PPO),
            ("rloo", &format!("{PPO}estimator = \"rloo\"\nsamples_per_prompt = 2\n[optimizer]\nlr = 0.05\n")),
            ("dpo", DPO),
        ] {
            lab.write(&format!("micro/{name}.toml"), text);
        }
        lab
    }

    /// A recipe with data of its own in `data/`, which is what `$DATA` means, and `recipe` for its recipe.toml.
    pub fn with_own_data(recipe: &str) -> Self {
        let mut lab = Self::new();
        let output = lab.program(&["world", "--out", "data", "--seed", "3", "--stories", "480"]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        lab.write("micro/recipe.toml", recipe);
        lab.flags = ["--data", "data"].map(str::to_owned).into();
        lab
    }

    pub fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    pub fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    pub fn program(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_recipe"));
        command
            .args(args)
            .current_dir(self.dir.path())
            .env("KINDLING_CACHE", self.dir.path().join("cache"))
            .env_remove("KINDLING_DATA")
            .env_remove("RUST_LOG");
        command
    }

    /// `recipe run` with `args` besides the usual flags.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = self.program(&["run", "micro", "--out", "out", "--threads", "1"]);
        command.args(&self.flags).args(args);
        command
    }

    /// Runs the recipe, which must succeed, and returns what it said on stderr.
    #[track_caller]
    pub fn run(&self, args: &[&str]) -> String {
        let Output { status, stderr, .. } = self.command(args).output().unwrap();
        let stderr = String::from_utf8(stderr).unwrap();
        assert!(status.success(), "{args:?}: {stderr}");
        stderr
    }

    /// Runs the recipe, which must fail, and returns the error.
    #[track_caller]
    pub fn fail(&self, args: &[&str]) -> String {
        let Output { status, stderr, .. } = self.command(args).output().unwrap();
        let stderr = String::from_utf8(stderr).unwrap();
        assert!(matches!(status.code(), Some(1 | 2)), "{args:?}: {status}: {stderr}");
        let error = stderr.find("error: ").map(|at| stderr[at..].to_owned());
        error.unwrap_or_else(|| panic!("{args:?}: no error in {stderr}"))
    }

    pub fn out(&self, path: &str) -> PathBuf {
        self.path("out").join(path)
    }

    pub fn bytes(&self, path: &str) -> Vec<u8> {
        fs::read(self.out(path)).unwrap()
    }

    pub fn json(&self, path: &str) -> Value {
        serde_json::from_slice(&self.bytes(path)).unwrap()
    }
}

/// Steps that were finished earlier, by what a run said.
pub fn n_skipped(stderr: &str) -> usize {
    stderr.matches("nothing it depends on has changed").count()
}

/// Every file below `dir` with its bytes.
pub fn snapshot(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(snapshot(&path));
        } else {
            files.push((path.clone(), fs::read(&path).unwrap()));
        }
    }
    files.sort();
    files
}
