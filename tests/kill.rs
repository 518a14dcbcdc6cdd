//! However a run dies, what it leaves is a whole checkpoint or none.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

use std::time::{Duration, Instant};

use burn::tensor::Device;
use common::checkpoint::Checkpoint;
use common::rng::{Rng, Streams};
use pipeline_tests::{Lab, PPO, PRETRAIN, Stage};
use rustix::process::Signal;
use std::os::unix::process::ExitStatusExt;

/// Kills `stage` at `n_kills` random moments of one run that saves at every step, at least half of them after a save of
/// that life; looks at what is left after each and goes on from it. At the end the run is one that was never killed.
fn assert_survives(stage: Stage, n_steps: u32, n_kills: usize) {
    let lab = Lab::before(stage);
    let steps = format!("train.steps={n_steps}");
    let settings = ["--set", &steps, "--set", "run.save_every=1", "--set", "run.eval_every=7"];
    let train = |out: &str, goes_on: &str| stage.train(out, &[&settings[..], &[goes_on]].concat());
    let start = Instant::now();
    let mut run = lab.start(stage.program, &train("whole", "--overwrite"));
    assert!(run.until(|| lab.saved_step("whole").is_some()), "{}", run.stderr());
    let first_save = start.elapsed();
    assert!(run.ends().success(), "{}", run.stderr());
    let step = start.elapsed().saturating_sub(first_save) / n_steps;

    let mut moments = Streams::new(11).get("tests/kill", 0);
    let (mut n_killed, mut n_after_save) = (0, 0);
    while n_killed < n_kills || n_after_save < n_kills / 2 {
        assert!(n_killed < 10 * n_kills, "only {n_after_save} of {n_killed} kills came after a save");
        // Text that is tokenised is kept between runs; a run may die while it writes that, too.
        let _ = std::fs::remove_dir_all(lab.path("cache"));
        let before = lab.saved_step("parts");
        let goes_on = if before.is_some() { "--resume" } else { "--overwrite" };
        let mut run = lab.start(stage.program, &train("parts", goes_on));
        std::thread::sleep(moment(&mut moments, first_save, step)); // a random moment is what this is about
        run.signal(Signal::KILL);
        let status = run.ends();
        if status.signal() != Some(9) {
            assert!(status.success(), "{}", run.stderr());
            // It was faster than we: another run from its beginning.
            std::fs::remove_dir_all(lab.path("parts")).unwrap();
            continue;
        }
        n_killed += 1;
        assert_whole_or_absent(&lab, stage);
        let after = lab.saved_step("parts");
        assert!(after >= before, "a checkpoint was lost: step {before:?}, then {after:?}");
        n_after_save += usize::from(after > before);
    }

    let goes_on = if lab.saved_step("parts").is_some() { "--resume" } else { "--overwrite" };
    lab.ok(stage.program, &train("parts", goes_on));
    lab.assert_same("whole", "parts");
    let left: Vec<_> = std::fs::read_dir(lab.dir()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().contains(".tmp-")), "unfinished saves were left: {left:?}");
}

/// From half the way to the first save of a life to a few steps after it.
fn moment(moments: &mut Rng, first_save: Duration, step: Duration) -> Duration {
    let (from, to) = (first_save / 2, first_save + 5 * step);
    from + to.saturating_sub(from).mul_f64(moments.uniform())
}

/// Checks that what a killed run left loads, or that there is nothing to load.
fn assert_whole_or_absent(lab: &Lab, stage: Stage) {
    let dir = lab.path("parts");
    if !dir.join("manifest.json").exists() {
        assert!(!dir.join("model.safetensors").exists(), "weights without a manifest");
        return;
    }
    let checkpoint = Checkpoint::open(&dir).unwrap();
    checkpoint.load_gpt(&Device::flex()).unwrap();
    checkpoint.state().unwrap();
    if stage == PPO {
        checkpoint.load_value(&Device::flex()).unwrap();
    }
}

#[test]
fn pretraining_killed_20_times_leaves_checkpoints_that_load() {
    assert_survives(PRETRAIN, 60, 20);
}

#[test]
fn ppo_killed_20_times_leaves_checkpoints_that_load() {
    assert_survives(PPO, 30, 20);
}
