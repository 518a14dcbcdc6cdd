//! Text that several processes tokenise together: the files that one process makes, and what a killed one left is kept.

use std::collections::BTreeMap;
use std::time::SystemTime;

use common::testing::has_mpirun;
use pipeline_tests::{Lab, PRETRAIN};
use rustix::process::{Signal, kill_process};

use crate::mpirun::{mpirun, process, rank_pids, set};

/// Four parts of the large file, so that each of three processes has one to make, and one has another.
const CORPUS_BYTES: usize = 210 << 20;

/// Of all runs: a short training on bytes.
const SETTINGS: [&str; 7] = [
    "data.train=\"../data/big.jsonl\"",
    "train.steps=2",
    "train.batch_size=6",
    "train.micro_batch_size=1",
    "train.eval_windows=1",
    "run.eval_every=0",
    "run.save_every=0",
];

/// A lab with a large text and a tokenizer of bytes.
fn lab() -> Lab {
    let lab = Lab::new();
    let bytes = ["tokenizer", "--config", "configs/pretrain.toml", "--out", "tokenizer", "-q"];
    lab.ok("pretrain", &[&bytes[..], &["--set", "tokenizer.kind=\"byte\""]].concat());
    let line = |i: usize| format!("{{\"text\": \"{}\"}}\n", format!("{i} sees a fox. ").repeat(3000));
    let n_lines = CORPUS_BYTES / line(10_000).len();
    lab.write("data/big.jsonl", (10_000..10_000 + n_lines).map(line).collect::<String>());
    lab
}

/// The whole parts in the cache, and when each was written. What a killed process had begun lies beside them for a while.
fn parts(lab: &Lab) -> BTreeMap<String, SystemTime> {
    let Ok(entries) = std::fs::read_dir(lab.path("cache")) else { return BTreeMap::new() };
    let part = |entry: std::io::Result<std::fs::DirEntry>| {
        let entry = entry.ok()?;
        let name = entry.file_name().into_string().ok()?;
        Some((name.ends_with(".tokens").then_some(name)?, entry.metadata().ok()?.modified().ok()?))
    };
    entries.filter_map(part).collect()
}

#[test]
fn processes_tokenise_what_one_would_and_go_on_after_one_was_killed() {
    if !has_mpirun() {
        return;
    }
    let lab = lab();
    let more = set(&SETTINGS);
    lab.ok("pretrain", &PRETRAIN.train("one", &[&more[..], &["-q"]].concat()));
    // Beside the cache, so that the others begin with an empty one.
    std::fs::rename(lab.path("cache"), lab.path("of-one")).unwrap();
    let of_one: Vec<String> = {
        let entries = std::fs::read_dir(lab.path("of-one")).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    };
    assert!(of_one.len() >= 5, "four parts of the large text and one of the other: {of_one:?}");

    let three = || mpirun(&lab, &vec![process(PRETRAIN, "three", &[&more[..], &["--overwrite"]].concat()); 3]);
    let mut run = Lab::running(three());
    assert!(run.until(|| !parts(&lab).is_empty()), "{}", run.stderr());
    kill_process(rank_pids(&run)[1], Signal::KILL).unwrap();
    assert!(!run.ends().success(), "{}", run.stderr());
    assert!(!lab.path("three/manifest.json").exists(), "nothing was trained");
    let before = parts(&lab);
    assert!((1..of_one.len()).contains(&before.len()), "{before:?}");

    let goes_on = lab.finish(three());
    assert!(goes_on.status.success(), "{}", goes_on.stderr);
    let after = parts(&lab);
    assert!(before.iter().all(|(name, written)| after[name] == *written), "a whole part was made again");
    assert_eq!(after.len(), of_one.len(), "{after:?}");
    for name in &of_one {
        let same = lab.bytes(&format!("of-one/{name}")) == lab.bytes(&format!("cache/{name}"));
        assert!(same, "`{name}` is not as one process makes it");
    }
    lab.assert_same("one", "three");
}
