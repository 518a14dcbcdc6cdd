//! What every program says when it cannot do what it was asked: a snapshot of the message and the exit code each.
//!
//! Beyond the text, each refusal ends with 1 or 2, begins `error: ` in lower case, and leaves no output behind.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

mod checkpoints;
mod config;
mod data;
mod flags;
mod output;
mod special_tokens;

use common::checkpoint::Stage;
use common::testing::{byte_tokenizer, save_tiny};
use pipeline_tests::{Lab, Output, PPO, PRETRAIN, REWARD_MODEL, SFT, assert_snapshot};

/// A lab with an untrained checkpoint of every stage.
fn models() -> Lab {
    let lab = Lab::new();
    let tokenizer = byte_tokenizer();
    tokenizer.save(&lab.path("tokenizer")).unwrap();
    save_tiny(&lab.path("base"), Stage::Pretrain, &tokenizer, 1);
    save_tiny(&lab.path("sft"), Stage::Sft, &tokenizer, 2);
    save_tiny(&lab.path("reward"), Stage::RewardModel, &tokenizer, 3);
    lab
}

fn pretrain(more: &[&str]) -> Vec<String> {
    pretrain_into("out", more)
}

fn pretrain_into(out: &str, more: &[&str]) -> Vec<String> {
    PRETRAIN.train(out, more)
}

fn pretrain_with(tokenizer: &str) -> Vec<&str> {
    vec!["train", "--config", "configs/pretrain.toml", "--out", "out", "--tokenizer", tokenizer]
}

fn sft(more: &[&str]) -> Vec<String> {
    sft_into("out", more)
}

fn sft_into(out: &str, more: &[&str]) -> Vec<String> {
    SFT.train(out, more)
}

fn sft_from(init: &str) -> Vec<&str> {
    vec!["train", "--config", "configs/sft.toml", "--out", "out", "--init", init]
}

fn reward_model(more: &[&str]) -> Vec<String> {
    reward_model_into("out", more)
}

fn reward_model_into(out: &str, more: &[&str]) -> Vec<String> {
    REWARD_MODEL.train(out, more)
}

fn ppo(more: &[&str]) -> Vec<String> {
    ppo_into("out", more)
}

fn ppo_into(out: &str, more: &[&str]) -> Vec<String> {
    PPO.train(out, more)
}

fn ppo_from<'a>(policy: &'a str, reward_model: &'a str) -> Vec<&'a str> {
    vec!["train", "--config", "configs/ppo.toml", "--out", "out", "--policy", policy, "--reward-model", reward_model]
}

/// Something a program has to refuse, and the name of the snapshot.
struct Case<'a>(&'a Lab, &'a str);

impl Case<'_> {
    /// Runs the program and compares exit code and stderr with the snapshot.
    #[track_caller]
    fn refused(&self, program: &str, args: &[impl AsRef<str>]) {
        let output = self.0.run(program, args);
        let args: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
        self.compare(&format!("{program} {}", args.join(" ")), &output);
        assert!(!self.0.path("out").exists(), "{}: `--out` was made although nothing was done", self.1);
    }

    #[track_caller]
    fn compare(&self, command: &str, output: &Output) {
        let Self(_, name) = self;
        let stderr = &output.stderr;
        let code = output.status.code();
        assert!(matches!(code, Some(1 | 2)), "{name}: {:?}\n{stderr}", output.status);
        assert_eq!(output.stdout, "", "{name}: a refusal has no result");
        let message = stderr.lines().find_map(|line| line.strip_prefix("error: "));
        let message = message.unwrap_or_else(|| panic!("{name}: no error is told:\n{stderr}"));
        assert!(!message.starts_with(char::is_uppercase), "{name}: `{message}` begins with a capital");
        assert!(!message.ends_with('.'), "{name}: `{message}` ends with a full stop");
        assert!(!stderr.contains("panicked"), "{name}: {stderr}");
        let code = code.unwrap_or_default();
        assert_snapshot(name, &format!("$ {command}\nexit {code}\n{stderr}"));
    }
}
