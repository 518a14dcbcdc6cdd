//! Adapters through every stage: trained, saved beside their base, handed on, evaluated, merged and refused.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

use std::path::Path;

use clap::Parser;
use pipeline_tests::{DPO, Lab, PPO, PRETRAIN, REWARD_MODEL, SFT, Stage};
use serde_json::{Value, json};

/// The same model with an adapter beside its weights and in them: sums in another order.
const MERGED: f64 = 1e-4;

const LORA: [&str; 6] = ["--set", "lora.rank=3", "--set", "lora.alpha=12", "--set", "optimizer.lr=0.01"];

/// `reward-model train` from an adapter, and `ppo train` on two.
const REWARD_MODEL_LORA: Stage = Stage { inputs: &["--init", "sft-lora"], ..REWARD_MODEL };
const PPO_LORA: Stage = Stage { inputs: &["--policy", "sft-lora", "--reward-model", "reward-lora"], ..PPO };

fn train(lab: &Lab, stage: Stage, out: &str, more: &[&str]) -> String {
    let output = lab.run(stage.program, &stage.train(out, &[&LORA[..], more].concat()));
    assert!(output.status.success(), "{}", output.stderr);
    output.stderr
}

/// A lab with a base, and an adapter of every stage on it.
fn adapters() -> Lab {
    let lab = Lab::before(SFT);
    train(&lab, SFT, "sft-lora", &[]);
    train(&lab, REWARD_MODEL_LORA, "reward-lora", &[]);
    lab
}

fn object(lab: &Lab, program: &str, args: &[&str]) -> Value {
    serde_json::from_str(&lab.ok(program, args)).unwrap()
}

fn loss(lab: &Lab, checkpoint: &str) -> f64 {
    let args = ["eval", "--checkpoint", checkpoint, "--data", "data/sft.val.jsonl", "-q"];
    object(lab, "sft", &args)["loss"].as_f64().unwrap()
}

fn scores(lab: &Lab, checkpoint: &str) -> Vec<f64> {
    let args = ["score", "--checkpoint", checkpoint, "--data", "data/pairs.val.jsonl", "-q"];
    let lines = lab.ok("reward-model", &args);
    let line = |line: &str| serde_json::from_str::<Value>(line).unwrap();
    lines.lines().flat_map(|l| ["score_chosen", "score_rejected"].map(|key| line(l)[key].as_f64().unwrap())).collect()
}

#[track_caller]
fn assert_near(a: &[f64], b: &[f64]) {
    assert_eq!(a.len(), b.len());
    assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() <= MERGED), "{a:?}\n{b:?}");
}

fn merge(lab: &Lab, checkpoint: &str, out: &str) {
    lab.ok("chat", &["merge", "--checkpoint", checkpoint, "--out", out, "-q"]);
}

#[test]
fn an_adapter_is_saved_beside_its_base_and_a_merged_one_is_the_same_model() {
    let lab = adapters();
    for (out, task, merged) in [("sft-lora", "CAUSAL_LM", "sft-merged"), ("reward-lora", "SEQ_CLS", "reward-merged")] {
        let settings = lab.json(&format!("{out}/adapter_config.json"));
        let base = lab.path("base").display().to_string();
        assert_eq!(settings["base_model_name_or_path"], json!(base));
        assert_eq!((&settings["task_type"], &settings["r"]), (&json!(task), &json!(3)));
        let recorded = &lab.json(&format!("{out}/config.json"))["base_weights_sha256"];
        assert_eq!(*recorded, lab.json("base/manifest.json")["weights_sha256"]);
        assert!(!lab.path(out).join("model.safetensors").exists());
        assert!(size(&lab.path(out).join("adapter_model.safetensors")) * 3 < size(&lab.path("base/model.safetensors")));
        merge(&lab, out, merged);
        let manifest = |dir: &str| lab.json(&format!("{dir}/manifest.json"));
        assert_eq!(manifest(out)["stage"], manifest(merged)["stage"]);
        assert_eq!(manifest(out)["weights_sha256"], manifest(merged)["parents"][0]["weights_sha256"]);
        assert!(!lab.path(merged).join("adapter_config.json").exists());
    }
    assert!((loss(&lab, "sft-lora") - loss(&lab, "sft-merged")).abs() < MERGED);
    assert!(loss(&lab, "sft-lora") < loss(&lab, "base") - 0.05, "the adapter is to have learned");
    // The constant of the normalisation comes along, in `config.json`.
    assert_ne!(lab.json("reward-lora/config.json")["score_bias"], json!(0.0));
    assert_near(&scores(&lab, "reward-lora"), &scores(&lab, "reward-merged"));
}

#[test]
fn a_trained_reward_models_head_is_that_of_its_adapter() {
    let lab = adapters();
    // Twice the head on the same adapters: twice the scores.
    let before = scores(&lab, "reward-lora");
    let path = lab.path("reward-lora/adapter_model.safetensors");
    let (mut tensors, _) = common::hf::read_file(&path, |_| true).unwrap();
    let head = tensors.get_mut("base_model.model.score.weight").expect("the head is saved");
    head.data.iter_mut().for_each(|x| *x *= 2.0);
    common::hf::write_file(&path, tensors.iter().map(|(name, tensor)| (name.clone(), tensor))).unwrap();
    std::fs::remove_file(lab.path("reward-lora/manifest.json")).unwrap();
    let bias = lab.json("reward-lora/config.json")["score_bias"].as_f64().unwrap();
    let doubled: Vec<f64> = before.iter().map(|score| 2.0 * (score - bias) + bias).collect();
    assert_near(&scores(&lab, "reward-lora"), &doubled);
}

#[test]
fn ppo_trains_adapters_on_one_trunk_and_its_result_goes_wherever_a_policy_does() {
    let lab = adapters();
    let said = train(&lab, PPO_LORA, "ppo-lora", &["--set", "value_optimizer.lr=0.01"]);
    assert!(said.contains("one frozen trunk serves"), "{said}");
    let first = &lab.lines("ppo-lora/metrics.jsonl")[0];
    assert!(first["val/kl"].as_f64().unwrap().abs() < 1e-4, "the reference is the policy's start: {first}");
    for file in ["adapter_model.safetensors", "value/adapter_model.safetensors", "value/adapter_config.json"] {
        assert!(lab.path("ppo-lora").join(file).is_file(), "{file}");
    }
    let (start, end) = (lab.json("sft-lora/manifest.json"), lab.json("ppo-lora/manifest.json"));
    assert_ne!(start["weights_sha256"], end["weights_sha256"]);
    let kl = |checkpoint: &str, reference: &str| {
        let prompts = ["--reward-model", "reward-lora", "--data", "data/prompts.val.jsonl", "-q"];
        let args = [&["eval", "--checkpoint", checkpoint, "--reference", reference][..], &prompts].concat();
        object(&lab, "ppo", &args)["kl_mean"].as_f64().unwrap()
    };
    assert_ne!(kl("ppo-lora", "sft-lora"), 0.0);
    merge(&lab, "ppo-lora", "ppo-merged");
    merge(&lab, "sft-lora", "sft-merged");
    assert_near(&[kl("ppo-lora", "sft-lora")], &[kl("ppo-merged", "sft-merged")]);
    lab.ok("chat", &["generate", "--checkpoint", "ppo-lora", "--prompt", "the fox", "--max-tokens", "4", "-q"]);
    // Further reward models on the same base bring no weights but their adapters.
    let said = train(&lab, PPO_LORA, "ppo-members", &["--reward-model", "reward-lora", "--set", "train.steps=1"]);
    assert!(
        said.contains("one frozen trunk serves")
            && said.contains("further reward models stand on frozen trunks that are there"),
        "{said}"
    );
    // All weights are trained where nothing says otherwise, those of an adapter added into its base's.
    lab.ok("ppo", &PPO_LORA.train("ppo-full", &["--set", "train.steps=1", "-q"]));
    assert!(lab.path("ppo-full/model.safetensors").is_file() && lab.path("ppo-full/value/model.safetensors").is_file());
}

#[test]
fn models_of_different_bases_keep_their_own_trunks() {
    let lab = Lab::before(PPO);
    // On the weights of `sft`, not on `base`.
    train(&lab, REWARD_MODEL, "reward-lora", &[]);
    train(&lab, SFT, "sft-lora", &[]);
    let said = train(&lab, PPO_LORA, "ppo-lora", &[]);
    assert!(!said.contains("one frozen trunk"), "{said}");
    // Adapters of their own on a policy and a reward model that have none.
    let said = train(&lab, PPO, "ppo-on-full", &[]);
    assert!(!said.contains("one frozen trunk"), "{said}");
    let base = |dir: &str| lab.json(&format!("{dir}/adapter_config.json"))["base_model_name_or_path"].clone();
    assert_eq!(base("ppo-on-full"), json!(lab.path("sft").display().to_string()));
    assert_eq!(base("ppo-on-full/value"), json!(lab.path("reward").display().to_string()));
    // The value model stands on the first of several reward models.
    let said = train(&lab, PPO, "ppo-members", &["--reward-model", "reward-lora", "--set", "train.steps=1"]);
    assert!(
        said.contains("further reward models stand on frozen trunks that are there"),
        "the one that the policy was trained of: {said}"
    );
    assert_eq!(base("ppo-members/value"), json!(lab.path("reward").display().to_string()));
}

#[test]
fn an_adapter_of_another_base_or_other_settings_is_refused() {
    let lab = adapters();
    let refused = |program: &str, args: &[&str]| {
        let output = lab.run(program, args);
        assert_eq!(output.status.code(), Some(1), "{}", output.stderr);
        output.stderr
    };
    let eval = ["eval", "--checkpoint", "sft-lora", "--data", "data/sft.val.jsonl", "-q"];
    let said = refused("sft", &[&eval[..], &["--base", "sft-lora"]].concat());
    assert!(said.contains("the base of the adapter `sft-lora` is an adapter itself"), "{said}");
    lab.ok(PRETRAIN.program, &PRETRAIN.train("other", &["--set", "seed=4", "-q"]));
    let said = refused("sft", &[&eval[..], &["--base", "other"]].concat());
    assert!(said.contains("adapter `sft-lora` was trained on other weights than those of `other`"), "{said}");
    let init = ["train", "--config", "configs/sft.toml", "--out", "out", "--init", "sft-lora", "-q"];
    for (setting, value) in [("rank", "4"), ("alpha", "3"), ("targets", "c_attn"), ("rslora", "true")] {
        let set = format!("lora.{setting}={value}");
        let said = refused("sft", &[&init[..], &LORA, &["--set", &set]].concat());
        assert!(said.contains(&format!("`lora.{setting}` is ")) && said.contains("chat merge"), "{said}");
    }
    let said = refused("sft", &[&init[..], &LORA, &["--set", "lora.targets=q_proj"]].concat());
    let expected = "`q_proj` is no linear layer of this model\nhint: targets can be `c_attn`, `c_fc`, `c_proj`";
    assert!(said.contains(expected) && !lab.path("out").exists(), "{said}");
    let said = refused("chat", &["merge", "--checkpoint", "base", "--out", "merged", "-q"]);
    assert!(said.contains("`base` holds no adapter") && !lab.path("merged").exists(), "{said}");

    // The base has moved: `--base` finds it.
    let of_adapter = loss(&lab, "sft-lora");
    std::fs::rename(lab.path("base"), lab.path("moved")).unwrap();
    let said = refused("sft", &eval);
    let expected = "the base of the adapter `sft-lora` is not there: `LAB/base` is no directory\nhint: `--base DIR`";
    assert!(said.contains(expected), "{said}");
    let moved = object(&lab, "sft", &[&eval[..], &["--base", "moved"]].concat());
    assert_eq!(moved["loss"].as_f64(), Some(of_adapter));
    lab.ok("chat", &["merge", "--checkpoint", "sft-lora", "--base", "moved", "--out", "merged", "-q"]);
    assert!((loss(&lab, "merged") - of_adapter).abs() < MERGED);
}

#[test]
fn a_base_is_refused_where_nothing_is_an_adapter() {
    let lab = Lab::before(PPO);
    let (pairs, prompts) = ("data/pairs.val.jsonl", "data/prompts.val.jsonl");
    let models = ["--checkpoint", "sft", "--reference", "base"];
    let mut commands: Vec<(&str, Vec<String>)> =
        [SFT, REWARD_MODEL, PPO, DPO].map(|stage| (stage.program, stage.train("out", &[]))).into();
    for (program, args) in [
        ("pretrain", &["eval", "--checkpoint", "base", "--data", "data/val.txt"][..]),
        ("sft", &["eval", "--checkpoint", "sft", "--data", "data/sft.val.jsonl"]),
        ("reward-model", &["eval", "--checkpoint", "reward", "--data", pairs]),
        ("reward-model", &["score", "--checkpoint", "reward", "--data", pairs]),
        ("reward-model", &["label", "--policy", "sft", "--prompts", prompts, "--out", "labels.jsonl"]),
        ("ppo", &[&["eval", "--reward-model", "reward", "--data", prompts][..], &models].concat()),
        ("ppo", &["doctor", "--policy", "sft", "--reward-model", "reward", "--data", prompts]),
        ("dpo", &[&["eval", "--data", pairs][..], &models].concat()),
        ("chat", &["--checkpoint", "sft"]),
        ("chat", &["generate", "--checkpoint", "sft", "--prompt", "the fox"]),
        ("chat", &["serve", "--checkpoint", "sft"]),
        ("recipe", &["duel", "sft", "base", "--reward-model", "reward", "--prompts", prompts]),
    ] {
        commands.push((program, args.iter().map(|arg| (*arg).to_owned()).collect()));
    }
    for (program, args) in commands {
        let args = [&args[..], &["--base".to_owned(), "nowhere".to_owned()]].concat();
        let output = lab.run(program, &args);
        assert_eq!(output.status.code(), Some(2), "{program} {args:?}: {}", output.stderr);
        let expected = "`--base nowhere` says where the base of an adapter lies, but ";
        assert!(output.stderr.contains(expected), "{program} {args:?}: {}", output.stderr);
    }
    assert!(!lab.path("out").exists() && !lab.path("labels.jsonl").exists());
}

#[test]
fn an_adapter_that_peft_wrote_can_be_trained_further() {
    let lab = adapters();
    // Ours without what PEFT does not write.
    for entry in std::fs::read_dir(lab.path("sft-lora")).unwrap() {
        let path = entry.unwrap().path();
        match path.file_name().unwrap().to_str().unwrap() {
            "adapter_config.json" | "adapter_model.safetensors" => {}
            _ if path.is_dir() => std::fs::remove_dir_all(path).unwrap(),
            _ => std::fs::remove_file(path).unwrap(),
        }
    }
    let before = loss(&lab, "sft-lora");
    train(&lab, Stage { inputs: &["--init", "sft-lora"], ..SFT }, "further", &[]);
    assert!(loss(&lab, "further") < before, "it goes on from where it was");
    let base = lab.json("further/adapter_config.json")["base_model_name_or_path"].clone();
    assert_eq!(base, json!(lab.path("base").display().to_string()), "an adapter stands on a base, not on an adapter");
    merge(&lab, "sft-lora", "merged");
    assert_eq!(lab.json("merged/manifest.json")["stage"], json!("sft"));
}

/// Of losses and scores of the tiny models: eight bits of a weight instead of twenty-four.
const ROUNDED: f64 = 0.03;

#[test]
fn a_trunk_in_bf16_goes_through_every_stage() {
    let lab = Lab::before(SFT);
    let narrow = ["--trunk", "bf16"];
    let said = train(&lab, SFT, "sft-lora", &narrow);
    assert!(said.contains("`base/model.safetensors`: matrices are rounded to bf16"), "{said}");
    train(&lab, REWARD_MODEL_LORA, "reward-lora", &narrow);
    let said = train(&lab, PPO_LORA, "ppo-lora", &narrow);
    assert!(said.contains("one frozen trunk serves"), "{said}");
    let first = &lab.lines("ppo-lora/metrics.jsonl")[0];
    assert!(first["val/kl"].as_f64().unwrap().abs() < 1e-4, "the reference is the policy's start: {first}");
    assert_eq!(lab.json("ppo-lora/manifest.json")["backend"], json!("flex, trunk in bf16"));

    let eval = ["eval", "--checkpoint", "sft-lora", "--data", "data/sft.val.jsonl", "-q"];
    let of_narrow = object(&lab, "sft", &[&eval[..], &narrow].concat())["loss"].as_f64().unwrap();
    let difference = (of_narrow - loss(&lab, "sft-lora")).abs();
    assert!(difference > 0.0 && difference < ROUNDED, "{difference}");
    let prompts = ["--reward-model", "reward-lora", "--data", "data/prompts.val.jsonl", "-q"];
    let eval = [&["eval", "--checkpoint", "ppo-lora", "--reference", "sft-lora"][..], &prompts, &narrow].concat();
    assert!(object(&lab, "ppo", &eval)["kl_mean"].as_f64().unwrap().is_finite());
    for program in ["chat", "pretrain"] {
        let more: &[&str] = match program {
            "chat" => &["generate", "--checkpoint", "ppo-lora", "--prompt", "the fox", "--max-tokens", "4", "-q"],
            _ => &["eval", "--checkpoint", "base", "--data", "data/val.txt", "-q"],
        };
        lab.ok(program, &[more, &narrow].concat());
    }

    // What was trained beside a trunk in bf16 is added into the weights in f32.
    merge(&lab, "sft-lora", "sft-merged");
    assert!((loss(&lab, "sft-merged") - loss(&lab, "sft-lora")).abs() < MERGED);
    // Another type on resuming is said.
    let longer = ["--resume", "--set", "train.steps=14"];
    let said = train(&lab, SFT, "sft-lora", &longer);
    let began = "the run began on `flex, trunk in bf16` and resumes on `flex`: its numbers will be others";
    assert!(said.contains(began) && said.contains("resume with the same `--precision` and `--trunk`"), "{said}");
}

#[test]
fn an_interrupted_run_says_with_which_types_it_is_continued() {
    let of = |more: &[&str]| {
        let args = [&["sft", "train", "--config", "c", "--init", "i", "--out", "o"], more].concat();
        let sft::Command::Train(args) = sft::Cli::parse_from(args).command else { panic!("it trains") };
        args.stage.how_to_continue()
    };
    assert_eq!(of(&[]), "continue with `--resume`");
    assert_eq!(of(&["--trunk", "bf16"]), "continue with `--resume --trunk bf16`");
    assert_eq!(of(&["--precision", "f16", "--trunk", "bf16"]), "continue with `--resume --precision f16 --trunk bf16`");
}

#[test]
fn a_trunk_that_is_trained_is_not_in_bf16() {
    let lab = Lab::before(SFT);
    for stage in [PRETRAIN, SFT] {
        let output = lab.run(stage.program, &stage.train("out", &["--trunk", "bf16"]));
        assert_eq!(output.status.code(), Some(2), "{}", output.stderr);
        assert!(output.stderr.contains("`--trunk bf16` is for weights that are not trained"), "{}", output.stderr);
        assert!(!lab.path("out").exists());
    }
    let args = ["eval", "--checkpoint", "base", "--data", "data/sft.val.jsonl", "--trunk", "bf16"];
    let output = lab.run("sft", &[&args[..], &["--backend", "ndarray"]].concat());
    assert_eq!(output.status.code(), Some(1), "{}", output.stderr);
    assert!(output.stderr.contains("backend `ndarray` cannot hold weights in bf16"), "{}", output.stderr);
}

fn size(path: &Path) -> u64 {
    path.metadata().unwrap().len()
}
