//! A process that is there and does nothing ends the others; one that is slow does not.

use std::time::{Duration, Instant};

use common::testing::has_mpirun;
use pipeline_tests::{Lab, PRETRAIN, Running};
use rustix::process::{Signal, kill_process};

use crate::faults::LONGEST;
use crate::mpirun::{mpirun, process, rank_pids, set};
use crate::together::SHARED;

/// A run of some seconds that saves along the way, with the shortest patience.
const RUN: [&str; 4] = ["train.steps=300", "run.save_every=20", "run.eval_every=0", "run.group_timeout=5"];

/// Starts two processes and waits until they have saved.
fn two(lab: &Lab, more: &[&str]) -> Running {
    let mut run = Lab::running(mpirun(lab, &vec![process(PRETRAIN, "parts", more); 2]));
    assert!(run.until(|| lab.saved_step("parts").is_some()), "{}", run.stderr());
    run
}

#[test]
fn a_stopped_process_is_named_and_ends_the_others_and_the_rest_goes_on() {
    if !has_mpirun() {
        return;
    }
    let lab = Lab::before(PRETRAIN);
    let more = set(&[&SHARED[..], &RUN].concat());
    lab.ok("pretrain", &PRETRAIN.train("whole", &more));
    for silent in [1, 0] {
        let mut run = two(&lab, &more);
        let stopped = Instant::now();
        kill_process(rank_pids(&run)[silent], Signal::STOP).unwrap();
        assert_eq!(run.ends().code(), Some(1), "{}", run.stderr());
        let (took, says) = (stopped.elapsed(), run.stderr());
        assert!(took < LONGEST && took > Duration::from_secs(4), "ended after {took:?}");
        let (other, waited) = (1 - silent, format!("with rank {silent}"));
        let named = format!("rank {silent} has not answered for 5 seconds, while rank {other} was exchanging ");
        assert!(says.contains(&named) && says.contains(&waited), "`{named}`:\n{says}");
        assert!(says.contains("hint: look after the process of that rank"), "{says}");
        lab.ok("pretrain", &PRETRAIN.train("parts", &[&more[..], &["--resume"]].concat()));
        lab.assert_same("whole", "parts");
        std::fs::remove_dir_all(lab.path("parts")).unwrap();
    }
}

#[test]
fn processes_that_were_all_stopped_for_longer_than_patience_go_on() {
    if !has_mpirun() {
        return;
    }
    let lab = Lab::before(PRETRAIN);
    let more = set(&[&SHARED[..], &RUN].concat());
    let mut run = two(&lab, &more);
    let pids = rank_pids(&run);
    for &pid in &pids {
        kill_process(pid, Signal::STOP).unwrap();
    }
    std::thread::sleep(Duration::from_secs(8)); // longer than patience
    for &pid in &pids {
        kill_process(pid, Signal::CONT).unwrap();
    }
    assert!(run.ends().success(), "{}", run.stderr());
}

#[test]
fn a_process_that_is_slow_is_waited_for() {
    if !has_mpirun() {
        return;
    }
    let lab = Lab::before(PRETRAIN);
    // The first samples alone, and the other waits: for so many prompts that it takes longer than patience. They are in
    // the file, since an argument may be of 128 KiB at most.
    let config = String::from_utf8(lab.bytes("configs/pretrain.toml")).unwrap();
    let prompts_of = |n: usize| {
        let prompts = format!("sample_prompts = [{}]", "'the fox', ".repeat(n));
        assert!(config.contains("sample_prompts = [\"the fox\"]"));
        lab.write("configs/pretrain.toml", config.replace("sample_prompts = [\"the fox\"]", &prompts));
    };
    let settings = ["train.sample_tokens=60", "train.steps=4", "run.group_timeout=5", "run.eval_every=0"];
    let more = [set(&[&SHARED[..], &settings].concat()), vec!["--overwrite"]].concat();
    let sampling = |mut run: Running| {
        run.hears("step 4/4");
        let start = Instant::now();
        run.hears("done at step 4");
        let took = start.elapsed();
        assert!(run.ends().success(), "{}", run.stderr());
        took
    };
    // How many those are depends on the machine and what else it does.
    let mut n_prompts = 2000;
    loop {
        prompts_of(n_prompts);
        let took = sampling(Lab::running(mpirun(&lab, &vec![process(PRETRAIN, "parts", &more); 2])));
        if took > Duration::from_secs(6) {
            break;
        }
        n_prompts *= 2;
    }
}
