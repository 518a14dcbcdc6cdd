//! A run that was stopped and resumed ends as if it had not been stopped: the same weights, state and metrics, to the
//! byte, whether it was killed or asked to stop.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

use pipeline_tests::{Lab, PPO, PRETRAIN, REWARD_MODEL, Running, SFT, Stage};
use rustix::process::Signal;
use std::os::unix::process::ExitStatusExt;

/// How often a run may be faster than the signal that should stop it.
const MAX_TRIES: u32 = 20;

/// Trains `stage` without interruption into `whole`; then into `parts`, killed once the checkpoint of step `k` is there
/// and resumed; and checks that nothing but times differs.
fn assert_killed_and_resumed_is_uninterrupted(lab: &Lab, stage: Stage, k: u64, settings: &[&str]) {
    let save_every = format!("run.save_every={k}");
    let mut more = vec!["--set", &save_every];
    more.extend(settings.iter().flat_map(|setting| ["--set", setting]));
    lab.ok(stage.program, &stage.train("whole", &[&more[..], &["--overwrite"]].concat()));

    kill_after_checkpoint(lab, stage, k, &more);
    let killed_at = lab.lines("parts/metrics.jsonl").last().and_then(|line| line["step"].as_u64()).unwrap_or(0);
    lab.ok(stage.program, &stage.train("parts", &[&more[..], &["--resume"]].concat()));
    lab.assert_same("whole", "parts");
    let steps: Vec<_> = lab.lines("parts/metrics.jsonl").iter().filter_map(|line| line["step"].as_u64()).collect();
    assert!(steps.is_sorted() && killed_at >= k, "{steps:?}, killed at {killed_at}");
}

/// Leaves in `parts` what a run leaves that was killed between the checkpoint of step `k` and its end.
fn kill_after_checkpoint(lab: &Lab, stage: Stage, k: u64, more: &[&str]) {
    for _ in 0..MAX_TRIES {
        let mut run = lab.start(stage.program, &stage.train("parts", &[more, &["--overwrite"]].concat()));
        assert!(run.until(|| lab.saved_step("parts") == Some(k)), "no checkpoint of step {k}:\n{}", run.stderr());
        run.signal(Signal::KILL);
        if run.ends().signal() == Some(9) && lab.saved_step("parts") == Some(k) {
            return;
        }
    }
    panic!("`{}` ended {MAX_TRIES} times before it could be killed", stage.program);
}

#[test]
fn pretraining_killed_and_resumed_is_pretraining_uninterrupted() {
    let lab = Lab::before(PRETRAIN);
    assert_killed_and_resumed_is_uninterrupted(&lab, PRETRAIN, 6, &[]);
}

#[test]
fn dropout_accumulation_and_the_best_weights_survive_a_kill() {
    let lab = Lab::before(PRETRAIN);
    let settings = [
        "model.dropout=0.2",
        "train.micro_batch_size=2",
        "run.keep_best=true",
        "run.eval_every=2",
        // So high a rate that the loss rises after the first evaluations: the best weights are not the last.
        "optimizer.lr=0.3",
    ];
    assert_killed_and_resumed_is_uninterrupted(&lab, PRETRAIN, 6, &settings);
    let best = lab.json("whole/manifest.json")["metrics"]["best/step"].as_f64().unwrap();
    assert!(best < 12.0, "the best weights were to be earlier ones, they are those of step {best}");
    assert_ne!(lab.json("whole/manifest.json")["weights_sha256"], weights_sha256_of_last(&lab, &settings));
}

/// The hash of the weights that the same run exports without keep-best.
fn weights_sha256_of_last(lab: &Lab, settings: &[&str]) -> serde_json::Value {
    let mut more: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
    more.extend(["--set", "run.keep_best=false"]);
    lab.ok("pretrain", &PRETRAIN.train("last", &more));
    lab.json("last/manifest.json")["weights_sha256"].clone()
}

#[test]
fn fine_tuning_killed_and_resumed_is_fine_tuning_uninterrupted() {
    let lab = Lab::before(SFT);
    assert_killed_and_resumed_is_uninterrupted(&lab, SFT, 6, &["train.micro_batch_size=2", "run.keep_best=true"]);
}

#[test]
fn a_reward_model_killed_and_resumed_is_one_trained_uninterrupted() {
    let lab = Lab::before(REWARD_MODEL);
    assert_killed_and_resumed_is_uninterrupted(&lab, REWARD_MODEL, 6, &["train.micro_batch_size=2"]);
    assert_killed_and_resumed_is_uninterrupted(&lab, REWARD_MODEL, 6, &["run.keep_best=true"]);
}

#[test]
fn ppo_killed_and_resumed_is_ppo_uninterrupted() {
    let lab = Lab::before(PPO);
    assert_killed_and_resumed_is_uninterrupted(&lab, PPO, 4, &[]);
    assert_killed_and_resumed_is_uninterrupted(&lab, PPO, 3, &["run.keep_best=true", "train.micro_batch_size=1"]);
}

#[test]
fn ctrl_c_and_sigterm_finish_the_step_save_and_exit_0() {
    for stage in [PRETRAIN, SFT, REWARD_MODEL, PPO] {
        let lab = Lab::before(stage);
        lab.ok(stage.program, &stage.train("whole", &["-q"]));
        for signal in [Signal::INT, Signal::TERM] {
            let stopped_at = stop(&lab, stage, signal);
            let logged = lab.lines("parts/metrics.jsonl").last().and_then(|line| line["step"].as_u64());
            assert_eq!(logged, Some(stopped_at), "the metrics of the step that was finished are there");
            lab.ok(stage.program, &stage.train("parts", &["--resume", "-q"]));
            lab.assert_same("whole", "parts");
        }
    }
}

/// Stops a run by `signal` after its third step; returns the step it saved.
fn stop(lab: &Lab, stage: Stage, signal: Signal) -> u64 {
    for _ in 0..MAX_TRIES {
        let mut run = lab.start(stage.program, &stage.train("parts", &["--overwrite"]));
        run.hears("step 3/");
        run.signal(signal);
        let status = run.ends();
        assert_eq!(status.code(), Some(0), "{}:\n{}", stage.program, run.stderr());
        let step = lab.saved_step("parts").unwrap();
        let finished = run.stderr().contains("done at step");
        assert_eq!(finished, !run.stderr().contains("go on with `--resume`"), "{}", run.stderr());
        if !finished {
            assert!(run.stderr().contains("finishing the step"), "{}", run.stderr());
            assert!(run.stderr().contains(&format!("stopped at step {step} of")), "{}", run.stderr());
            return step;
        }
    }
    panic!("`{}` ended {MAX_TRIES} times before the signal arrived", stage.program);
}

#[test]
fn a_second_signal_ends_the_run_at_once() {
    let lab = Lab::before(PRETRAIN);
    // A step of this size takes seconds, so the second signal arrives within it.
    let more = ["--set", "train.batch_size=4096", "--set", "train.eval_windows=1"];
    let mut run: Running = lab.start("pretrain", &PRETRAIN.train("parts", &more));
    run.hears("parameters");
    run.signal(Signal::INT);
    run.hears("press Ctrl-C again");
    run.signal(Signal::INT);
    assert_eq!(run.ends().code(), Some(130), "{}", run.stderr());
    assert_eq!(lab.saved_step("parts"), None);
}

#[test]
fn resuming_a_finished_run_changes_nothing() {
    let lab = Lab::before(PPO);
    lab.prepare(PPO);
    for stage in [PRETRAIN, SFT, REWARD_MODEL, PPO] {
        let before = lab.contents(stage.out);
        lab.ok(stage.program, &stage.train(stage.out, &["--resume", "-q"]));
        let after = lab.contents(stage.out);
        for (name, content) in &before {
            assert!(after.get(name) == Some(content), "{}: `{name}` changed", stage.program);
        }
    }
}

#[test]
fn a_longer_schedule_makes_a_finished_run_go_on() {
    let lab = Lab::before(PRETRAIN);
    lab.prepare(PRETRAIN);
    lab.ok("pretrain", &PRETRAIN.train("base", &["--resume", "--set", "train.steps=15", "-q"]));
    assert_eq!(lab.saved_step("base"), Some(15));
}
