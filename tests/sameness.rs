//! The same seed gives the same bytes, however many threads compute; micro-batches give the large batch's weights.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

use common::hf;
use common::model::NamedTensors;
use pipeline_tests::{DPO, Lab, PPO, PRETRAIN, REWARD_MODEL, SFT, STAGES, Stage};
use serde_json::json;

/// Of weights of order 1 after a dozen steps, computed in f32 in another order. Holds only with [`PROPORTIONAL`].
const ROUNDING: f32 = 2e-5;

/// AdamW divides a gradient by its own size, so where the true gradient is 0 (the bias of attention's keys) it makes a
/// whole step of the rounding error. An epsilon far above the gradients makes its steps proportional to them instead.
const PROPORTIONAL: [&str; 2] = ["optimizer.eps=1.0", "optimizer.lr=1.0"];

/// Losses of the recorded steps on another machine, whose vector units round otherwise.
const TRAJECTORY: f64 = 1e-3;

fn set<'a>(settings: &[&'a str]) -> Vec<&'a str> {
    settings.iter().flat_map(|setting| ["--set", setting]).collect()
}

fn weights(lab: &Lab, out: &str) -> NamedTensors {
    hf::read_file(&lab.path(out).join("state/weights.safetensors"), |_| true).unwrap().0
}

/// The largest difference between two numbers that stand at the same place.
fn distance(a: &NamedTensors, b: &NamedTensors) -> f32 {
    assert!(a.keys().eq(b.keys()));
    let differences =
        a.values().zip(b.values()).flat_map(|(a, b)| a.data.iter().zip(&b.data)).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, f32::max)
}

/// Trains with `batch_size` 8 at once and in parts, and with a batch of other content.
fn assert_accumulates(stage: Stage, batch_key: &str, settings: &[&str]) {
    let lab = Lab::before(stage);
    let train = |out: &str, more: &[&str]| {
        let settings = set(&[&PROPORTIONAL[..], settings, more].concat());
        lab.ok(stage.program, &stage.train(out, &[&settings[..], &["-q"]].concat()));
        weights(&lab, out)
    };
    let whole = train("whole", &["train.batch_size=8", &format!("{batch_key}=8")]);
    for (out, size) in [("by-1", 1), ("by-4", 4)] {
        let parts = train(out, &["train.batch_size=8", &format!("{batch_key}={size}")]);
        let distance = distance(&whole, &parts);
        assert!(distance <= ROUNDING, "{}: micro-batches of {size}: {distance} > {ROUNDING}", stage.program);
    }
    let smaller = train("smaller", &["train.batch_size=4", &format!("{batch_key}=4")]);
    assert!(distance(&whole, &smaller) > 100.0 * ROUNDING, "{}: the comparison could not fail", stage.program);
}

#[test]
fn micro_batches_of_windows_add_up_to_the_batch() {
    assert_accumulates(PRETRAIN, "train.micro_batch_size", &[]);
}

#[test]
fn micro_batches_of_conversations_add_up_to_the_batch() {
    assert_accumulates(SFT, "train.micro_batch_size", &[]);
}

#[test]
fn micro_batches_of_pairs_add_up_to_the_batch() {
    assert_accumulates(REWARD_MODEL, "train.micro_batch_size", &["train.centring_coef=0.1"]);
}

#[test]
fn micro_batches_of_responses_add_up_to_the_minibatch() {
    // One minibatch; few steps, because a weight that differs by rounding will in the end sample another token.
    let settings = ["train.steps=2", "ppo.minibatches=1", "value_optimizer.eps=1.0", "value_optimizer.lr=1.0"];
    assert_accumulates(PPO, "train.micro_batch_size", &settings);
}

#[test]
fn the_number_of_threads_does_not_change_a_byte() {
    // Large enough that every kernel divides its work.
    let large = set(&[
        "model.d_model=128",
        "model.n_layers=2",
        "model.n_heads=4",
        "model.dropout=0.1",
        "train.batch_size=24",
        "train.seq_len=64",
        "train.steps=3",
    ]);
    let lab = Lab::before(PRETRAIN);
    let train = |stage: Stage, threads: &str, more: &[&str]| {
        let out = format!("{}-{threads}", stage.program);
        lab.ok(stage.program, &stage.train(&out, &[more, &["--threads", threads, "-q"]].concat()));
        out
    };
    for threads in ["1", "2", "3"] {
        train(PRETRAIN, threads, &large);
    }
    lab.assert_same("pretrain-1", "pretrain-2");
    lab.assert_same("pretrain-1", "pretrain-3");
    // The other stages go on from the large model.
    std::fs::rename(lab.path("pretrain-1"), lab.path(PRETRAIN.out)).unwrap();
    for stage in [SFT, REWARD_MODEL, PPO, DPO] {
        let mut more = set(&["train.steps=3", "train.batch_size=16"]);
        if stage == REWARD_MODEL {
            more.extend(set(&["normalisation.max_tokens=4"]));
        }
        let outs = ["1", "2", "3"].map(|threads| train(stage, threads, &more));
        lab.assert_same(&outs[0], &outs[1]);
        lab.assert_same(&outs[0], &outs[2]);
        std::fs::rename(lab.path(&outs[0]), lab.path(stage.out)).unwrap();
    }
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_another_seed_others() {
    let lab = Lab::before(PPO);
    let runs: [(&str, &[&str]); 3] =
        [("flex", &[]), ("plain", &["--kernels", "plain"]), ("ndarray", &["--backend", "ndarray"])];
    for stage in STAGES {
        for (name, flags) in runs {
            let train = |out: String, more: &[&str]| {
                let few = set(&["train.steps=4"]);
                lab.ok(stage.program, &stage.train(&out, &[&few[..], flags, more, &["-q"]].concat()));
                out
            };
            let once = train(format!("{}-{name}-once", stage.program), &[]);
            let twice = train(format!("{}-{name}-twice", stage.program), &[]);
            lab.assert_same(&once, &twice);
            let other = train(format!("{}-{name}-other", stage.program), &["--set", "seed=1234"]);
            let sha256 = |out: &str| lab.json(&format!("{out}/manifest.json"))["weights_sha256"].clone();
            assert_ne!(sha256(&once), sha256(&other), "{} on {name}: the seed is not used", stage.program);
        }
    }
}

/// A change of these numbers is a change of what is computed: renew them with `UPDATE_SNAPSHOTS=1` and say why.
#[test]
fn every_stage_makes_the_recorded_steps() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/trajectory.json");
    let lab = Lab::before(PPO);
    lab.prepare(PPO);
    lab.prepare(DPO);
    let name = |stage: Stage| if stage == PPO { "policy/loss" } else { "train/loss" };
    let losses = STAGES.map(|stage| {
        let lines = lab.lines(&format!("{}/metrics.jsonl", stage.out));
        let losses: Vec<f64> = lines.iter().filter_map(|line| line[name(stage)].as_f64()).collect();
        (stage.program, losses)
    });
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some_and(|value| value == "1") {
        let environment = format!("{} {}, flex, fused", std::env::consts::OS, std::env::consts::ARCH);
        let recorded: serde_json::Map<_, _> = std::iter::once(("environment".to_owned(), json!(environment)))
            .chain(losses.iter().map(|(program, losses)| ((*program).to_owned(), json!(losses))))
            .collect();
        std::fs::write(&path, format!("{:#}\n", json!(recorded))).unwrap();
        return;
    }
    let recorded: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for (program, losses) in losses {
        let expected: Vec<f64> = serde_json::from_value(recorded[program].clone()).unwrap();
        let close = losses.iter().zip(&expected).all(|(a, b)| (a - b).abs() <= TRAJECTORY);
        assert!(losses.len() == expected.len() && close, "{program}: {losses:?}, recorded {expected:?}");
    }
}
