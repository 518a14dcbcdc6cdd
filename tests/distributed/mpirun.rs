//! The programs themselves under `mpirun`.

use std::process::Command;
use std::time::{Duration, Instant};

use common::testing::has_mpirun;
use pipeline_tests::{DPO, Lab, Output, PPO, PRETRAIN, REWARD_MODEL, Running, SFT, Stage, binary};
use rustix::process::{Pid, Signal, kill_process};

use crate::together::SHARED;

/// `mpirun` in the lab: for every process a command line, shell commands before the program's own included.
pub(crate) fn mpirun(lab: &Lab, processes: &[Vec<String>]) -> Command {
    let mut args = Vec::new();
    for (i, process) in processes.iter().enumerate() {
        args.extend((i > 0).then(|| ":".to_owned()));
        args.extend(["-n".to_owned(), "1".to_owned()]);
        args.extend(process.iter().cloned());
    }
    lab.within(common::testing::mpirun(), &args)
}

/// The command line of one process of a stage.
pub(crate) fn process(stage: Stage, out: &str, more: &[&str]) -> Vec<String> {
    let program = binary(stage.program).display().to_string();
    [vec![program], stage.train(out, more), vec!["--threads".to_owned(), "1".to_owned()]].concat()
}

/// Trains with `n` processes.
fn train(lab: &Lab, stage: Stage, out: &str, n: usize, more: &[&str]) -> Output {
    lab.finish(mpirun(lab, &vec![process(stage, out, more); n]))
}

pub(crate) fn set<'a>(settings: &[&'a str]) -> Vec<&'a str> {
    settings.iter().flat_map(|setting| ["--set", setting]).collect()
}

/// The number of each rank's process, from the environment that `mpirun` gave its children.
pub(crate) fn rank_pids(run: &Running) -> Vec<Pid> {
    let parent = format!("PPid:\t{}", run.id());
    let mut ranks: Vec<(usize, i32)> = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap() {
        let path = entry.unwrap().path();
        let read = |name: &str| std::fs::read_to_string(path.join(name)).unwrap_or_default();
        if !read("status").lines().any(|line| line == parent) {
            continue;
        }
        let environment = read("environ");
        let rank = environment.split('\0').find_map(|variable| variable.strip_prefix("OMPI_COMM_WORLD_RANK="));
        let pid = path.file_name().and_then(|name| name.to_str()?.parse().ok());
        ranks.extend(rank.and_then(|rank| rank.parse().ok()).zip(pid));
    }
    ranks.sort_unstable();
    ranks.into_iter().map(|(_, pid)| Pid::from_raw(pid).unwrap()).collect()
}

/// Checks that 2 and 3 processes leave what one leaves, and that a run goes on with another number.
fn assert_any_number_of_processes_is_one(stage: Stage, settings: &[&str]) {
    if !has_mpirun() {
        return;
    }
    let lab = Lab::before(stage);
    let more = set(&[&SHARED[..], settings].concat());
    lab.ok(stage.program, &stage.train("one", &more));
    for n in [2, 3] {
        let out = format!("by-{n}");
        let output = train(&lab, stage, &out, n, &more);
        assert!(output.status.success(), "{n} processes:\n{}", output.stderr);
        assert_eq!(output.stderr.matches("done at step").count(), 1, "one of them speaks:\n{}", output.stderr);
        lab.assert_same("one", &out);
    }
    let parts = train(&lab, stage, "shards", 3, &[&more[..], &["--set", "train.shard_optimizer=true"]].concat());
    assert!(parts.status.success(), "{}", parts.stderr);
    for file in ["model.safetensors", "state/optimizer.safetensors"] {
        let path = |out: &str| format!("{out}/{file}");
        assert!(lab.bytes(&path("one")) == lab.bytes(&path("shards")), "`{file}` differs with parts of the optimiser");
    }
    let few = train(&lab, stage, "parts", 3, &[&more[..], &["--set", "train.steps=3"]].concat());
    assert!(few.status.success(), "{}", few.stderr);
    let steps = format!("train.steps={}", lab.saved_step("one").unwrap());
    let rest = train(&lab, stage, "parts", 2, &[&more[..], &["--resume", "--set", &steps]].concat());
    assert!(rest.status.success(), "{}", rest.stderr);
    // The schedule of the learning rate was another one for three steps: what is the same is the run with one process.
    lab.ok(stage.program, &stage.train("alone", &[&more[..], &["--set", "train.steps=3"]].concat()));
    lab.ok(stage.program, &stage.train("alone", &[&more[..], &["--resume", "--set", &steps]].concat()));
    lab.assert_same("alone", "parts");
}

#[test]
fn pretraining_by_several_processes_is_that_of_one() {
    assert_any_number_of_processes_is_one(PRETRAIN, &["model.dropout=0.1", "run.keep_best=true"]);
}

#[test]
fn fine_tuning_by_several_processes_is_that_of_one() {
    assert_any_number_of_processes_is_one(SFT, &["model.dropout=0.1"]);
}

#[test]
fn a_reward_model_by_several_processes_is_that_of_one() {
    assert_any_number_of_processes_is_one(REWARD_MODEL, &["train.centring_coef=0.1"]);
}

#[test]
fn dpo_by_several_processes_is_that_of_one() {
    assert_any_number_of_processes_is_one(DPO, &[]);
}

#[test]
fn ppo_by_several_processes_is_that_of_one() {
    assert_any_number_of_processes_is_one(PPO, &["train.batch_invariant=true"]);
}

#[test]
fn sigterm_to_any_process_finishes_the_step_of_all_and_saves() {
    if !has_mpirun() {
        return;
    }
    let lab = Lab::before(PRETRAIN);
    let more = set(&[&SHARED[..], &["train.steps=400", "run.eval_every=0"]].concat());
    lab.ok("pretrain", &PRETRAIN.train("one", &more));
    for rank in [0, 1] {
        let _ = std::fs::remove_dir_all(lab.path("parts"));
        let mut run = Lab::running(mpirun(&lab, &vec![process(PRETRAIN, "parts", &more); 2]));
        run.hears("step 3/");
        kill_process(rank_pids(&run)[rank], Signal::TERM).unwrap();
        assert_eq!(run.ends().code(), Some(143), "{}", run.stderr());
        let step = lab.saved_step("parts").unwrap();
        assert!(step < 400 && run.stderr().contains(&format!("stopped at step {step} of 400")), "{}", run.stderr());
        let rest = train(&lab, PRETRAIN, "parts", 3, &[&more[..], &["--resume"]].concat());
        assert!(rest.status.success(), "{}", rest.stderr);
        lab.assert_same("one", "parts");
    }
}

#[test]
fn more_processes_than_micro_batches_are_refused() {
    if !has_mpirun() {
        return;
    }
    let lab = Lab::before(PRETRAIN);
    let refused = train(&lab, PRETRAIN, "out", 2, &[]);
    assert_eq!(refused.status.code(), Some(1), "{}", refused.stderr);
    let says = "error: a batch of 4 in micro-batches of 4 is too little for 2 processes";
    assert!(refused.stderr.contains(says), "{}", refused.stderr);
    assert!(refused.stderr.contains("hint: set `train.micro_batch_size` to 2 or less"), "{}", refused.stderr);
    assert!(!lab.path("out").exists());
}

#[test]
fn processes_with_other_settings_or_data_are_refused_and_the_difference_named() {
    if !has_mpirun() {
        return;
    }
    let lab = Lab::before(PRETRAIN);
    let more = set(&SHARED);
    lab.write("data/other.txt", "quite another text, long enough for a window of the model. ".repeat(40));
    let other = format!("data.train=['{}']", lab.path("data/other.txt").display());
    for (setting, says) in [
        ("optimizer.lr=0.5", "rank 1 differs from rank 0: `optimizer.lr` is 0.5, and 0.003 on rank 0"),
        (other.as_str(), "rank 1 differs from rank 0: file 1 of `data.train` (SHA-256) is "),
    ] {
        let processes =
            [process(PRETRAIN, "out", &more), process(PRETRAIN, "out", &[&more[..], &["--set", setting]].concat())];
        let refused = lab.finish(mpirun(&lab, &processes));
        assert_eq!(refused.status.code(), Some(1), "{}", refused.stderr);
        assert!(refused.stderr.contains(says), "`{says}`:\n{}", refused.stderr);
        assert_eq!(lab.saved_step("out"), None);
    }
    let on_other = [&more[..], &["--backend", "ndarray"]].concat();
    let refused = lab.finish(mpirun(&lab, &[process(PRETRAIN, "out", &more), process(PRETRAIN, "out", &on_other)]));
    let says = "rank 1 differs from rank 0: `--backend` is ndarray, and flex on rank 0";
    assert!(refused.stderr.contains(says), "{}", refused.stderr);
    assert_eq!(lab.saved_step("out"), None);
}

#[test]
fn ranks_that_resume_from_different_checkpoints_are_refused_before_a_step() {
    if !has_mpirun() {
        return;
    }
    let lab = Lab::before(PRETRAIN);
    for (out, steps) in [("early", "train.steps=2"), ("late", "train.steps=4")] {
        lab.ok("pretrain", &PRETRAIN.train(out, &set(&[&SHARED[..], &[steps]].concat())));
    }
    let more = [&set(&[&SHARED[..], &["train.steps=8"]].concat())[..], &["--resume"]].concat();
    let refused = lab.finish(mpirun(&lab, &[process(PRETRAIN, "early", &more), process(PRETRAIN, "late", &more)]));
    assert_eq!(refused.status.code(), Some(1), "{}", refused.stderr);
    let says = "rank 1 differs from rank 0: the step of the checkpoint in `--out` is 4, and 2 on rank 0";
    assert!(refused.stderr.contains(says), "{}", refused.stderr);
    assert_eq!((lab.saved_step("early"), lab.saved_step("late")), (Some(2), Some(4)));
}

#[test]
fn a_command_that_is_one_process_says_so_once() {
    if !has_mpirun() {
        return;
    }
    let lab = Lab::before(PRETRAIN);
    let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
    for line in ["pretrain tokenizer --config configs/pretrain.toml --out tokens", "recipe world --out world"] {
        let mut line = words(line);
        line[0] = binary(&line[0]).display().to_string();
        let refused = lab.finish(mpirun(&lab, &[line.clone(), line]));
        assert_ne!(refused.status.code(), Some(0), "{}", refused.stderr);
        assert_eq!(refused.stderr.matches("this command is one process").count(), 1, "{}", refused.stderr);
    }
    assert!(!lab.path("tokens").exists() && !lab.path("world").exists());
}

#[test]
fn a_process_that_never_starts_mpi_is_not_waited_for_in_vain() {
    if !has_mpirun() {
        return;
    }
    let lab = Lab::before(PRETRAIN);
    let own = process(PRETRAIN, "out", &set(&SHARED));
    let patient = ["env", "KINDLING_MPI_START_TIMEOUT=2"].map(str::to_owned);
    let start = Instant::now();
    let other = ["sleep", "100"].map(str::to_owned).to_vec();
    let ended = lab.finish(mpirun(&lab, &[[&patient[..], &own].concat(), other]));
    assert!(ended.stderr.contains("error: not every process had started MPI after 2 seconds"), "{}", ended.stderr);
    assert_ne!(ended.status.code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(30), "{:?}", start.elapsed());
}
