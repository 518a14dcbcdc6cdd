//! However a run dies, what it leaves is a whole checkpoint or none.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

use std::time::{Duration, Instant};

use burn::tensor::Device;
use common::checkpoint::Checkpoint;
use common::rng::{Rng, Streams};
use pipeline_tests::{Lab, PPO, PRETRAIN, Stage};
use rustix::process::Signal;
use std::os::unix::process::ExitStatusExt;

/// Kills `stage` at `n_kills` random moments of one run that saves at every step, looks at what is left after each and
/// goes on from it; at the end the run is one that was never killed.
fn assert_survives(stage: Stage, steps: u64, n_kills: usize) {
    let lab = Lab::before(stage);
    let steps = format!("train.steps={steps}");
    let settings = ["--set", &steps, "--set", "run.save_every=1", "--set", "run.eval_every=7"];
    let start = Instant::now();
    lab.ok(stage.program, &stage.train("whole", &settings));
    let whole = start.elapsed();

    let mut moments = Streams::new(11).get("tests/kill", 0);
    let (mut n_killed, mut n_saved, mut n_none) = (0, 0, 0);
    while n_killed < n_kills {
        // Text that is tokenised is kept between runs; a run may die while it writes that, too.
        let _ = std::fs::remove_dir_all(lab.path("cache"));
        let goes_on = if lab.saved_step("parts").is_some() { "--resume" } else { "--overwrite" };
        let mut run = lab.start(stage.program, &stage.train("parts", &[&settings[..], &[goes_on]].concat()));
        std::thread::sleep(moment(&mut moments, whole, n_kills)); // a random moment is what this is about
        run.signal(Signal::KILL);
        let status = run.ends();
        if status.signal() != Some(9) {
            assert!(status.success(), "{}", run.stderr());
            // It was faster than we: another run from its beginning.
            std::fs::remove_dir_all(lab.path("parts")).unwrap();
            continue;
        }
        n_killed += 1;
        if assert_whole_or_absent(&lab, stage) { n_saved += 1 } else { n_none += 1 }
    }
    assert!(
        n_saved > n_kills / 4,
        "{n_saved} of {n_kills} kills came after a save, {n_none} before: too few to show much"
    );

    let goes_on = if lab.saved_step("parts").is_some() { "--resume" } else { "--overwrite" };
    lab.ok(stage.program, &stage.train("parts", &[&settings[..], &[goes_on]].concat()));
    lab.assert_same("whole", "parts");
    let left: Vec<_> = std::fs::read_dir(lab.dir()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().contains(".tmp-")), "unfinished saves were left: {left:?}");
}

/// From the start of a life to its end: short ones die before the first save, long ones after some.
fn moment(moments: &mut Rng, whole: Duration, n_kills: usize) -> Duration {
    whole.mul_f64(moments.uniform() * 4.0 / n_kills as f64)
}

/// Whether there is a checkpoint; if so, it loads.
fn assert_whole_or_absent(lab: &Lab, stage: Stage) -> bool {
    let dir = lab.path("parts");
    if !dir.join("manifest.json").exists() {
        assert!(!dir.join("model.safetensors").exists(), "weights without a manifest");
        return false;
    }
    let checkpoint = Checkpoint::open(&dir).unwrap();
    checkpoint.load_gpt(&Device::flex()).unwrap();
    checkpoint.state().unwrap();
    if stage == PPO {
        checkpoint.load_value(&Device::flex()).unwrap();
    }
    true
}

#[test]
fn pretraining_killed_20_times_leaves_checkpoints_that_load() {
    assert_survives(PRETRAIN, 60, 20);
}

#[test]
fn ppo_killed_20_times_leaves_checkpoints_that_load() {
    assert_survives(PPO, 30, 20);
}
