//! `recipe run` with models so small that every step takes moments: what is done, skipped, done anew and gone on with.

#![allow(clippy::unwrap_used, reason = "a test that unwraps fails with the error in its message")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const RECIPE: &str = r#"
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

/// Steps of the recipe, the report aside.
const N_STEPS: usize = 8;

struct Lab {
    dir: tempfile::TempDir,
}

impl Lab {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let recipe = dir.path().join("micro");
        fs::create_dir(&recipe).unwrap();
        for (name, text) in
            [("recipe", RECIPE), ("pretrain", PRETRAIN), ("sft", SFT), ("reward-model", REWARD_MODEL), ("ppo", PPO)]
        {
            fs::write(recipe.join(format!("{name}.toml")), text).unwrap();
        }
        Self { dir }
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_recipe"));
        command
            .args(["run", "micro", "--out", "out", "--threads", "1"])
            .args(args)
            .current_dir(self.dir.path())
            .env("KINDLING_CACHE", self.dir.path().join("cache"))
            .env_remove("KINDLING_DATA")
            .env_remove("RUST_LOG");
        command
    }

    /// Runs the recipe, which must succeed, and returns what it said on stderr.
    fn run(&self, args: &[&str]) -> String {
        let Output { status, stderr, .. } = self.command(args).output().unwrap();
        let stderr = String::from_utf8(stderr).unwrap();
        assert!(status.success(), "{args:?}: {stderr}");
        stderr
    }

    fn out(&self, path: &str) -> PathBuf {
        self.dir.path().join("out").join(path)
    }

    fn json(&self, path: &str) -> serde_json::Value {
        serde_json::from_str(&fs::read_to_string(self.out(path)).unwrap()).unwrap()
    }
}

fn n_skipped(stderr: &str) -> usize {
    stderr.matches("nothing it depends on has changed").count()
}

#[test]
fn a_recipe_runs_once_skips_what_is_unchanged_and_redoes_what_is_not() {
    let lab = Lab::new();
    let said = lab.run(&[]);
    assert_eq!(n_skipped(&said), 0);
    assert!(said.contains("[1/9] world") && said.contains("[9/9] report"), "{said}");

    let report = lab.json("report.json");
    for stage in ["pretrain", "sft", "reward-model", "ppo"] {
        assert!(report["stages"][stage]["seconds"].as_f64() > Some(0.0), "{stage}: {report}");
        assert!(report["stages"][stage]["tokens"].as_u64() > Some(0), "{stage}: {report}");
    }
    for metric in ["objective/kl", "gold/score", "kl_mean", "win_rate"] {
        assert!(report["stages"]["ppo"]["metrics"][metric].is_number(), "{metric}: {report}");
    }
    for metric in ["accuracy", "longer_wins_accuracy", "val/accuracy"] {
        assert!(report["stages"]["reward-model"]["metrics"][metric].is_number(), "{metric}: {report}");
    }
    for policy in ["base", "sft", "ppo"] {
        assert_eq!(report["gold"][policy]["n"], 5, "{report}");
    }
    let html = fs::read_to_string(lab.out("report.html")).unwrap();
    assert!(html.contains("Micro") && html.contains("id=\"answers\""));
    let pairs = fs::read_to_string(lab.out("data/pairs.train.jsonl")).unwrap();
    let config = fs::read_to_string(lab.out("reward-model/config.toml")).unwrap();
    assert!(pairs.lines().count() > 4 && config.contains("pairs.train.jsonl"), "{config}");

    assert_eq!(n_skipped(&lab.run(&[])), N_STEPS);

    let policy = fs::read(lab.out("ppo/model.safetensors")).unwrap();
    let said = lab.run(&["--set", "ppo.ppo.kl_coef=0.5"]);
    assert_eq!(n_skipped(&said), N_STEPS - 2, "PPO and the evaluation: {said}");
    assert_ne!(fs::read(lab.out("ppo/model.safetensors")).unwrap(), policy);

    // Data changed by hand are noticed, and everything that learned from them is done anew.
    let path = lab.out("data/sft.train.jsonl");
    let sft = fs::read_to_string(&path).unwrap();
    fs::write(&path, sft.lines().skip(1).collect::<Vec<_>>().join("\n")).unwrap();
    assert_eq!(n_skipped(&lab.run(&["--set", "ppo.ppo.kl_coef=0.5"])), 3);
}

#[test]
fn an_interrupted_recipe_saves_and_goes_on_to_the_same_weights() {
    let steps = ["--set", "pretrain.train.steps=400", "--set", "pretrain.run.log_every=1", "--stages"];
    let stages = "world,tokenizer,pretrain";
    let uninterrupted = Lab::new();
    uninterrupted.run(&[&steps[..], &[stages]].concat());

    let lab = Lab::new();
    let child = lab.command(&[&steps[..], &[stages]].concat()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for_lines(&lab.out("pretrain/metrics.jsonl"), 8);
    assert!(Command::new("kill").args(["-TERM", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    assert!(said.contains("run the same command again to go on"), "{said}");
    assert!(lab.out("report.html").is_file());

    let said = lab.run(&[&steps[..], &[stages]].concat());
    assert_eq!(n_skipped(&said), 2, "{said}");
    assert!(said.contains("pretrain: going on"), "{said}");
    let weights = |lab: &Lab| fs::read(lab.out("pretrain/model.safetensors")).unwrap();
    assert!(weights(&lab) == weights(&uninterrupted), "resumed and uninterrupted weights differ");
}

fn wait_for_lines(path: &Path, n: usize) {
    let started = Instant::now();
    while fs::read_to_string(path).map_or(0, |text| text.lines().count()) < n {
        assert!(started.elapsed() < Duration::from_mins(2), "`{}` has no {n} lines", path.display());
        std::thread::sleep(Duration::from_millis(2));
    }
}
