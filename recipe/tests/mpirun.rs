//! `recipe run` by several processes. Needs the feature `mpi` and an `mpirun`; says so where there are none.

#![allow(clippy::unwrap_used, reason = "a test that unwraps fails with the error in its message")]

mod lab;

use std::fs;
use std::process::Output;

use common::testing::{has_mpirun, mpirun};
use lab::Lab;

const STAGES: [&str; 4] = ["pretrain", "sft", "reward-model", "ppo"];

/// Micro-batches for two.
const SHARED: [&str; 10] = [
    "--set",
    "pretrain.train.micro_batch_size=1",
    "--set",
    "sft.train.micro_batch_size=1",
    "--set",
    "reward-model.train.micro_batch_size=2",
    "--set",
    "ppo.train.micro_batch_size=2",
    "--set",
    "ppo.train.batch_invariant=true",
];

/// Runs the recipe of `lab` with two processes.
fn run_by_two(lab: &Lab, args: &[&str]) -> Output {
    run_by(lab, args, args)
}

/// Runs it with a command line for each of two processes.
fn run_by(lab: &Lab, first: &[&str], second: &[&str]) -> Output {
    let [first, second] = [first, second].map(|args| lab.command(args));
    let mut command = mpirun();
    command.args(["-n", "1"]).arg(first.get_program()).args(first.get_args());
    command.args([":", "-n", "1"]).arg(second.get_program()).args(second.get_args());
    command.current_dir(lab.dir.path()).env("KINDLING_CACHE", lab.path("cache"));
    command.env_remove("KINDLING_DATA").env_remove("RUST_LOG");
    command.output().unwrap()
}

#[test]
fn a_recipe_by_two_processes_is_that_of_one() {
    if !has_mpirun() {
        return;
    }
    let lab = Lab::new();
    lab.run(&SHARED);
    fs::rename(lab.path("out"), lab.path("one")).unwrap();
    let Output { status, stderr, stdout } = run_by_two(&lab, &SHARED);
    let stderr = String::from_utf8(stderr).unwrap();
    assert!(status.success(), "{stderr}");
    assert_eq!(String::from_utf8(stdout).unwrap().matches("report:").count(), 1, "one of them speaks");
    for stage in STAGES {
        let weights = |out: &str| fs::read(lab.path(out).join(stage).join("model.safetensors")).unwrap();
        assert!(weights("one") == weights("out"), "the weights of {stage} differ");
    }
    // Nothing is left to do, and the other process learns that too.
    assert!(run_by_two(&lab, &SHARED).status.success());
}

#[test]
fn a_stage_with_too_few_micro_batches_is_found_before_the_first_step() {
    if !has_mpirun() {
        return;
    }
    let lab = Lab::new();
    let more = [&SHARED[..], &["--set", "ppo.train.micro_batch_size=4"]].concat();
    let Output { status, stderr, .. } = run_by_two(&lab, &more);
    let stderr = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(1), "{stderr}");
    assert!(
        stderr.contains("error: the step `ppo`: a batch of 4 in micro-batches of 4 is too little for 2"),
        "{stderr}"
    );
    assert!(!lab.out("data").exists());
}

#[test]
fn ranks_with_other_settings_are_found_before_the_first_step() {
    if !has_mpirun() {
        return;
    }
    let lab = Lab::new();
    for (other, says) in [
        (["--set", "sft.optimizer.lr=0.5"], "rank 1 differs from rank 0: `sft.optimizer.lr` is 0.5, and "),
        (["--seed", "77"], "rank 1 differs from rank 0: `recipe.seed` is 77, and "),
        (["--stages", "pretrain"], "rank 1 differs from rank 0: `--stages` is pretrain, and "),
    ] {
        let Output { status, stderr, .. } = run_by(&lab, &SHARED, &[&SHARED[..], &other].concat());
        let stderr = String::from_utf8(stderr).unwrap();
        assert_eq!(status.code(), Some(1), "{stderr}");
        assert!(stderr.contains(says), "`{says}`:\n{stderr}");
        assert!(!lab.out("data").exists());
    }
}
