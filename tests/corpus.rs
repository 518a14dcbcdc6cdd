//! A corpus that takes time to tokenise: runs that die or are stopped meanwhile, full disks, files that change.

#![cfg(unix)]
#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::process::Command;

use pipeline_tests::{Lab, PRETRAIN, Running, binary};
use rustix::process::Signal;

/// Two parts and a bit, so that the second is at work when the first is there.
const CORPUS_BYTES: usize = 140 << 20;

/// Of all runs: a short training on bytes.
const SETTINGS: [&str; 5] = [
    "data.train=\"../data/big.jsonl\"",
    "train.steps=2",
    "run.eval_every=0",
    "run.save_every=0",
    "train.eval_windows=1",
];

/// A lab with a large text and a tokenizer of bytes.
fn lab() -> Lab {
    let lab = Lab::new();
    let bytes = ["tokenizer", "--config", "configs/pretrain.toml", "--out", "tokenizer", "-q"];
    lab.ok("pretrain", &[&bytes[..], &["--set", "tokenizer.kind=\"byte\""]].concat());
    let line = |i: usize| format!("{{\"text\": \"{}\"}}\n", format!("{i} sees a fox. ").repeat(300));
    let n_lines = CORPUS_BYTES / line(10_000).len();
    lab.write("data/big.jsonl", (10_000..10_000 + n_lines).map(line).collect::<String>());
    lab
}

fn args(out: &str, more: &[&str]) -> Vec<String> {
    let settings: Vec<&str> = SETTINGS.iter().flat_map(|setting| ["--set", setting]).collect();
    PRETRAIN.train(out, &[&settings[..], more].concat())
}

/// The files of the cache with the ending `.tokens`, and when each was written.
fn parts(lab: &Lab) -> BTreeMap<String, std::time::SystemTime> {
    let Ok(entries) = std::fs::read_dir(lab.path("cache")) else { return BTreeMap::new() };
    let part = |entry: std::io::Result<std::fs::DirEntry>| {
        let entry = entry.ok()?;
        let name = entry.file_name().into_string().ok()?;
        Some((name.ends_with(".tokens").then_some(name)?, entry.metadata().ok()?.modified().ok()?))
    };
    entries.filter_map(part).collect()
}

/// Starts a run with an empty cache and waits until it has a part of the large text.
fn started(lab: &Lab, out: &str) -> Running {
    let _ = std::fs::remove_dir_all(lab.path("cache"));
    let mut run = lab.start("pretrain", &args(out, &["--overwrite"]));
    assert!(run.until(|| !parts(lab).is_empty()), "{}", run.stderr());
    run
}

#[test]
fn tokenising_that_dies_or_is_stopped_goes_on_after_the_last_part() {
    let lab = lab();
    lab.ok("pretrain", &args("whole", &["-q"]));
    let of_whole = parts(&lab);
    assert!(of_whole.len() >= 4, "three parts of the large text and one of the other: {of_whole:?}");
    for (signal, code) in [(Signal::KILL, None), (Signal::INT, Some(130)), (Signal::TERM, Some(143))] {
        let mut run = started(&lab, "parts");
        run.signal(signal);
        let status = run.ends();
        assert_eq!((status.code(), status.signal()), (code, code.is_none().then_some(9)), "{}", run.stderr());
        assert!(!lab.path("parts/manifest.json").exists(), "nothing was trained");
        let before = parts(&lab);
        assert!((1..of_whole.len()).contains(&before.len()), "{before:?}");
        let unfinished = || {
            let entries = std::fs::read_dir(lab.path("cache")).unwrap();
            entries.filter(|entry| entry.as_ref().is_ok_and(|entry| entry.path().extension().unwrap() == "tmp")).count()
        };
        assert!(code.is_none() || unfinished() == 0, "a run that is asked to stop removes what it cannot finish");
        lab.ok("pretrain", &args("parts", &["-q", "--overwrite"]));
        let after = parts(&lab);
        assert!(after.keys().eq(of_whole.keys()));
        assert!(before.iter().all(|(name, written)| after[name] == *written), "a whole part was made again");
        lab.assert_same("whole", "parts");
        std::fs::remove_dir_all(lab.path("parts")).unwrap();
    }
}

#[test]
fn a_disk_that_is_full_is_one_error_and_leaves_no_half_part() {
    let lab = lab();
    // A limit on the size of files, with the signal that comes with it ignored, is what a program sees of a full disk.
    let mut command = Command::new("bash");
    command.args(["-c", "trap '' XFSZ; ulimit -f 20000; exec \"$0\" \"$@\""]).arg(binary("pretrain"));
    let output = lab.finish(lab.within(command, &args("out", &["-q"])));
    assert_eq!(output.status.code(), Some(1), "{}", output.stderr);
    let lines: Vec<&str> = output.stderr.lines().collect();
    assert!(
        lines[0].starts_with("error: failed to tokenise the text: cannot keep the tokenised text in `"),
        "{lines:?}"
    );
    assert!(lines.len() == 2 && lines[1].starts_with("hint: set `KINDLING_CACHE` to a folder"), "{lines:?}");
    let left = std::fs::read_dir(lab.path("cache")).unwrap().map(|entry| entry.unwrap().path());
    assert!(left.into_iter().all(|path| path.extension().unwrap() == "tokens"));
    assert!(!lab.path("out/manifest.json").exists());
}

#[test]
fn a_changed_file_or_a_cut_part_is_made_anew_and_nothing_else() {
    let lab = Lab::before(PRETRAIN);
    lab.write("data/one.txt", lab.bytes("data/train.txt"));
    let train = |out: &str| {
        let both = "data.train=[\"../data/train.txt\", \"../data/one.txt\"]";
        let args = PRETRAIN.train(out, &["--set", both, "--set", "train.steps=2", "-q", "--overwrite"]);
        let output = lab.run("pretrain", &args);
        assert!(output.status.success(), "{}", output.stderr);
        output.stderr
    };
    train("first");
    let first = parts(&lab);
    let mut longer = lab.bytes("data/one.txt");
    longer.extend_from_slice(b"\n\nthe fox sees one more.\n");
    lab.write("data/one.txt", longer);
    train("second");
    let second = parts(&lab);
    assert_eq!(second.len(), first.len() + 1, "the new text beside the old one");
    assert!(first.iter().all(|(name, written)| second[name] == *written));

    let new = second.keys().find(|name| !first.contains_key(*name)).unwrap();
    let whole = lab.bytes(&format!("cache/{new}"));
    lab.write(&format!("cache/{new}"), &whole[..whole.len() - 3]);
    let said = train("third");
    assert_eq!(said.matches("is not a whole file of tokens").count(), 1, "{said}");
    assert_eq!(lab.bytes(&format!("cache/{new}")), whole);
    lab.assert_same("second", "third");
}
