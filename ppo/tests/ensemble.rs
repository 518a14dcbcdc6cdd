//! Several reward models in PPO from outside: what each says, what counts, and what a run remembers of them.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

mod support;

use std::path::Path;

use common::checkpoint::Stage;
use common::testing::{byte_tokenizer, run, save_tiny};
use serde_json::{Value, json};
use tempfile::TempDir;

use support::{
    PROGRAM, ends_in_the_same_bytes, ends_with_the_same_bytes_after_a_kill, lines, metrics, train, workplace,
};

/// The second and third reward model, beside that of a workplace.
const FURTHER: [&str; 4] = ["--reward-model", "rm-2", "--reward-model", "rm-3"];

/// A workplace with three reward models.
fn with_members() -> TempDir {
    let dir = workplace();
    for (name, seed) in [("rm-2", 6), ("rm-3", 7)] {
        save_tiny(&dir.path().join(name), Stage::RewardModel, &byte_tokenizer(), seed);
    }
    dir
}

fn member_scores(line: &Value) -> Vec<f64> {
    line["member_scores"].as_array().unwrap().iter().map(|score| score.as_f64().unwrap()).collect()
}

/// How the scores of members become one.
type Combined = fn(&[f64]) -> f64;

#[test]
fn every_member_scores_every_response_and_the_ensemble_says_what_counts() {
    let dir = with_members();
    let mean: Combined = |scores| scores.iter().sum::<f64>() / scores.len() as f64;
    let worst: Combined = |scores| scores.iter().copied().fold(f64::INFINITY, f64::min);
    let variance =
        |scores: &[f64]| mean(&scores.iter().map(|score| (score - mean(scores)).powi(2)).collect::<Vec<_>>());
    for name in ["mean", "worst", "mean-less-variance"] {
        let set = format!("ppo.ensemble={name}");
        // What was cut off counts as what the reward models say of it.
        let more = [&FURTHER[..], &["--set", &set, "--set", "ppo.missing_eos=none", "--set", "train.steps=2"]].concat();
        let (code, _, stderr) = train(dir.path(), name, &more);
        assert_eq!(code, 0, "{stderr}");
        assert!(
            stderr.contains(&format!("3 reward models score every response; what counts is \"{name}\"")),
            "{stderr}"
        );
        let out = dir.path().join(name);
        let rollouts = lines(&out.join("rollouts.jsonl"));
        for line in rollouts.iter().chain(&lines(&out.join("samples.jsonl"))) {
            let scores = member_scores(line);
            assert_eq!(scores.len(), 3, "{line}");
            let counts = match name {
                "mean" => mean(&scores),
                "worst" => worst(&scores),
                _ => mean(&scores) - 0.5 * variance(&scores),
            };
            assert!((line["score"].as_f64().unwrap() - counts).abs() < 1e-6, "{name}: {line}");
        }
        let measured = metrics(&out);
        for (step, line) in measured.iter().filter(|line| line["objective/score"].is_f64()).enumerate() {
            let of_step = rollouts.iter().filter(|rollout| rollout["step"] == json!(step + 1));
            let spreads: Vec<f64> = of_step.map(|rollout| variance(&member_scores(rollout)).sqrt()).collect();
            assert_eq!(spreads.len(), 8);
            let spread = line["objective/score_std_members"].as_f64().unwrap();
            assert!((spread - mean(&spreads)).abs() < 1e-6 && spread > 0.0, "{spread} {spreads:?}");
        }
        assert!(measured[0]["val/score_std_members"].as_f64().unwrap() > 0.0, "{}", measured[0]);
    }
}

#[test]
fn members_that_agree_are_one_reward_model_to_the_byte() {
    let dir = with_members();
    let (code, _, stderr) = train(dir.path(), "one", &[]);
    assert_eq!(code, 0, "{stderr}");
    let config = std::fs::read_to_string(dir.path().join("one/config.toml")).unwrap();
    assert!(!config.contains("ensemble"), "{config}");
    for ensemble in ["mean", "worst", "mean-less-variance"] {
        let set = format!("ppo.ensemble={ensemble}");
        let (code, _, stderr) = train(dir.path(), ensemble, &["--reward-model", "rm", "--set", &set]);
        assert_eq!(code, 0, "{stderr}");
        for file in ["model.safetensors", "value/model.safetensors", "state/optimizer.safetensors"] {
            let [a, b] = ["one", ensemble].map(|out| std::fs::read(dir.path().join(out).join(file)).unwrap());
            assert!(a == b, "{ensemble}: {file} differs");
        }
    }
}

#[test]
fn a_killed_and_resumed_run_with_several_reward_models_ends_with_the_same_bytes() {
    ends_with_the_same_bytes_after_a_kill(&["--reward-model", "rm", "--set", "ppo.ensemble=mean-less-variance"], true);
    let dir = with_members();
    let more = [&FURTHER[..], &["--set", "ppo.ensemble=worst"]].concat();
    ends_in_the_same_bytes(&dir, &more, true);
}

#[test]
fn a_checkpoint_records_the_members_and_a_resumed_run_refuses_others() {
    let dir = with_members();
    let (code, _, stderr) = train(dir.path(), "out", &[&FURTHER[..], &["--set", "train.steps=1"]].concat());
    assert_eq!(code, 0, "{stderr}");
    let out = dir.path().join("out");
    let manifest: Value = serde_json::from_slice(&std::fs::read(out.join("manifest.json")).unwrap()).unwrap();
    let parents: Vec<&str> =
        manifest["parents"].as_array().unwrap().iter().map(|parent| parent["path"].as_str().unwrap()).collect();
    let names: Vec<_> = parents.iter().map(|path| Path::new(path).file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(names, ["sft", "rm", "rm-2", "rm-3"]);
    let config = std::fs::read_to_string(out.join("config.toml")).unwrap();
    assert!(config.contains("ensemble = \"mean\""), "the default is written down: {config}");
    let resume =
        |more: &[&str]| train(dir.path(), "out", &[&["--resume", "--set", "train.steps=2"][..], more].concat());
    for (members, named) in [
        (&["--reward-model", "rm-2"][..], "which is not given now"),
        (&["--reward-model", "rm-3", "--reward-model", "rm-2"], "`--reward-model` was `"),
        (
            &[FURTHER[0], FURTHER[1], FURTHER[2], FURTHER[3], "--set", "ppo.ensemble=worst"],
            "`ppo.ensemble` was \"mean\", is now \"worst\"",
        ),
        (&[], "which is not given now"),
    ] {
        let (code, _, stderr) = resume(members);
        assert_eq!(code, 1, "{members:?}: {stderr}");
        assert!(stderr.contains("cannot resume") && stderr.contains(named), "{members:?}: {stderr}");
    }
    // Where the ensemble is set, too, it is the reward models that are missing.
    let (code, _, stderr) = resume(&["--set", "ppo.ensemble=mean"]);
    assert!(code == 1 && stderr.contains("which is not given now") && !stderr.contains("ppo.ensemble"), "{stderr}");
    let (code, _, stderr) = resume(&FURTHER);
    assert_eq!(code, 0, "{stderr}");
}

#[test]
fn an_evaluation_scores_by_the_ensemble_of_the_training_or_of_the_flag() {
    let dir = with_members();
    let more = [&FURTHER[..2], &["--set", "train.steps=1", "--set", "ppo.ensemble=worst"]].concat();
    let (code, _, stderr) = train(dir.path(), "out", &more);
    assert_eq!(code, 0, "{stderr}");
    let eval = |more: &[&str]| -> (i32, Value, String) {
        let args = ["eval", "--checkpoint", "out", "--reference", "sft", "--data", "val.jsonl", "-q"];
        let (code, stdout, stderr) = run(PROGRAM, &[&args[..], more].concat(), dir.path());
        (code, serde_json::from_str(&stdout).unwrap_or_default(), stderr)
    };
    let score = |more: &[&str]| eval(more).1["score_mean"].as_f64().unwrap();
    let (rm, rm_2) = (["--reward-model", "rm"], ["--reward-model", "rm-2"]);
    let both = |flags: &[&str]| score(&[&rm[..], &rm_2, flags].concat());
    let (one, two) = (score(&rm), score(&rm_2));
    assert!((both(&["--ensemble", "mean"]) - f64::midpoint(one, two)).abs() < 1e-6);
    assert_eq!(both(&[]), both(&["--ensemble", "worst"]), "as the checkpoint was trained");
    assert!(both(&[]) <= one.min(two) && both(&[]) < both(&["--ensemble", "mean"]));
    let (code, _, stderr) = eval(&[&rm[..], &["--ensemble", "worst"]].concat());
    assert!(code == 2 && stderr.contains("needs several reward models"), "{stderr}");
}

#[test]
fn what_is_no_ensemble_is_an_error_that_says_why() {
    let dir = with_members();
    for (more, named) in [
        (&["--set", "ppo.ensemble=worst"][..], "`ppo.ensemble` is \"worst\", but there is one reward model\nhint: "),
        (&["--reward-model", "rm-2", "--set", "ppo.ensemble=median"], "ppo.ensemble=median"),
        (&["--reward-model", "nowhere"], "hint: pass the directory that a training command wrote: its `--out`"),
        (&["--reward-model", "sft"], "failed to load the reward model: "),
    ] {
        let (code, _, stderr) = train(dir.path(), "out", more);
        assert_eq!(code, 1, "{more:?}: {stderr}");
        assert!(stderr.contains(named), "{more:?}: {stderr}");
        assert!(!dir.path().join("out/config.toml").exists());
    }
}
