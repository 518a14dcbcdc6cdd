//! What a training run refuses before its first step, what it says of its data, and what its numbers mean.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

use pipeline_tests::{Lab, PRETRAIN, REWARD_MODEL, SFT};

#[test]
fn a_window_longer_than_the_context_is_refused() {
    let lab = Lab::before(PRETRAIN);
    let refused = lab.run("pretrain", &PRETRAIN.train("out", &["--set", "train.seq_len=512"]));
    assert_eq!(refused.status.code(), Some(1), "{}", refused.stderr);
    let says = "`train.seq_len` 512 exceeds the model's context, `model.max_seq_len` 64";
    assert!(refused.stderr.contains(says), "{}", refused.stderr);
}

#[test]
fn a_damaged_configuration_stops_an_evaluation_that_goes_by_it() {
    let lab = Lab::before(PRETRAIN);
    lab.prepare(PRETRAIN);
    let eval = ["eval", "--checkpoint", "base", "--data", "data/val.txt"];
    lab.ok("pretrain", &eval);
    lab.write("base/config.toml", [&lab.bytes("base/config.toml")[..], b"\n[of_a_newer_version]\n"].concat());
    let refused = lab.run("pretrain", &eval);
    assert_eq!((refused.status.code(), refused.stdout.as_str()), (Some(1), ""), "{}", refused.stderr);
    assert!(refused.stderr.contains("of_a_newer_version"), "{}", refused.stderr);
}

#[test]
fn conversations_that_are_cut_or_left_out_are_counted_one_by_one() {
    let lab = Lab::before(SFT);
    let say =
        |prompt: &str, completion: &str| format!("{{\"prompt\": \"{prompt}\", \"completion\": \"{completion}\"}}\n");
    let long = "the fox sees the owl and ".repeat(40);
    let cut = say("hi", &long) + &say("hi", &long) + &say(&long, "yes");
    lab.write("data/odd.jsonl", cut + &say("hi", "the fox"));
    let odd = ["--overwrite", "--set", "data.train=[\"../data/odd.jsonl\"]", "--set", "train.steps=1"];
    let run = lab.run("sft", &SFT.train("out", &odd));
    assert!(run.status.success(), "{}", run.stderr);
    for line in [
        "warning: 3 conversations are longer than 64 tokens: cut to fit (data.on_too_long)",
        "warning: 1 conversation has no token of an answer in the first 64: left out",
    ] {
        assert!(run.stderr.contains(line), "{line}:\n{}", run.stderr);
    }
    let skip = [&odd[..], &["--set", "data.on_too_long=skip"]].concat();
    let run = lab.run("sft", &SFT.train("out", &skip));
    let line = "warning: 3 conversations are longer than 64 tokens: left out (data.on_too_long)";
    assert!(run.stderr.contains(line), "{}", run.stderr);
}

#[test]
fn the_dropout_of_an_initial_model_can_be_changed_and_switched_off() {
    let lab = Lab::before(REWARD_MODEL);
    for (stage, out) in [(SFT, "tuned"), (REWARD_MODEL, "scored")] {
        let dropout = |more: &[&str]| {
            lab.ok(
                stage.program,
                &stage.train(out, &[&["-q", "--overwrite", "--set", "train.steps=2"], more].concat()),
            );
            lab.json(&format!("{out}/config.json"))["resid_pdrop"].as_f64()
        };
        assert_eq!(dropout(&[]), Some(0.0));
        let plain = lab.bytes(&format!("{out}/model.safetensors"));
        assert_eq!(dropout(&["--set", "model.dropout=0.5"]), Some(0.5));
        assert_ne!(plain, lab.bytes(&format!("{out}/model.safetensors")));
        assert_eq!(dropout(&["--set", "model.dropout=0.0"]), Some(0.0));
        assert_eq!(plain, lab.bytes(&format!("{out}/model.safetensors")));
    }
}

#[test]
fn training_and_held_out_loss_of_a_reward_model_are_the_same_quantity() {
    let lab = Lab::before(REWARD_MODEL);
    let first_loss = |coef: &str| {
        let coef = format!("train.centring_coef={coef}");
        let more = ["-q", "--overwrite", "--set", "train.steps=1", "--set", &coef];
        lab.ok("reward-model", &REWARD_MODEL.train("out", &more));
        lab.lines("out/metrics.jsonl")[0]["train/loss"].as_f64().unwrap()
    };
    // The penalty acts on the weights and is no part of either loss.
    assert_eq!(first_loss("0"), first_loss("100"));
}
