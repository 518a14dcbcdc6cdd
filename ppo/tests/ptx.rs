//! PPO-ptx from outside: text beside the scores, what it holds, and what is refused.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

mod support;

use std::path::Path;

use common::checkpoint::Stage;
use common::testing::{assert_close, byte_tokenizer, run, save_tiny};

use support::{PROGRAM, TRAIN, ends_with_the_same_bytes_after_a_kill, lines, train, workplace};

/// Text for a run in a workplace.
const TEXT: [&str; 8] = [
    "--set",
    "ptx.data.train=text.train.txt",
    "--set",
    "ptx.data.val=text.val.txt",
    "--set",
    "ptx.seq_len=16",
    "--set",
    "ptx.batch_size=3",
];

/// The values of a metric of the run in `out`, in the order of its steps.
fn values(out: &Path, name: &str) -> Vec<f64> {
    lines(&out.join("metrics.jsonl")).iter().filter_map(|line| line[name].as_f64()).collect()
}

#[test]
fn a_killed_and_resumed_run_with_text_ends_with_the_same_bytes() {
    let with_text = [&TEXT[..], &["--set", "ppo.ptx_coef=0.5"]].concat();
    ends_with_the_same_bytes_after_a_kill(&[&with_text[..], &["--set", "ppo.policy_ema=0.5"]].concat(), true);
    let grouped = ["--set", "ppo.samples_per_prompt=4", "--set", "ppo.estimator=rloo"];
    ends_with_the_same_bytes_after_a_kill(&[&with_text[..], &grouped].concat(), false);
}

#[test]
fn text_holds_the_loss_that_scores_alone_do_not() {
    let dir = workplace();
    let lr = ["--set", "optimizer.lr=3e-3", "--set", "train.steps=20", "--set", "run.eval_every=10"];
    for (name, estimator) in [("gae", &[][..]), ("rloo", &["ppo.estimator=rloo"]), ("grpo", &["ppo.estimator=grpo"])] {
        let sets: Vec<&str> =
            estimator.iter().chain(["ppo.samples_per_prompt=4"].iter().take(estimator.len())).copied().collect();
        let sets: Vec<&str> = sets.into_iter().flat_map(|set| ["--set", set]).collect();
        let held_out = |coef: &str| {
            let out = format!("{name}-{coef}");
            let coef_set = format!("ppo.ptx_coef={coef}");
            let more = [&TEXT[..], &lr, &sets, &["--set", &coef_set]].concat();
            let (code, _, stderr) = train(dir.path(), &out, &more);
            assert_eq!(code, 0, "{stderr}");
            let out = dir.path().join(out);
            let trained = values(&out, "train/ptx_loss");
            assert_eq!(trained.len(), if coef == "0" { 0 } else { 20 }, "nothing is learned from text at 0");
            assert!(coef == "0" || trained[19] < trained[0] - 0.5, "{trained:?}");
            values(&out, "val/ptx_loss")
        };
        let (without, with) = (held_out("0"), held_out("1"));
        assert_eq!((without.len(), with.len()), (3, 3), "before the first step, and twice along the way");
        assert_eq!(without[0], with[0], "the same policy on the same windows");
        assert!(with[2] < without[2] - 0.5, "{name}: {with:?} {without:?}");
    }
}

#[test]
fn the_held_out_loss_is_that_of_pretraining_and_measuring_changes_no_byte() {
    let dir = workplace();
    let whole = ["--set", "ptx.eval_windows=0"];
    let (code, _, stderr) = train(dir.path(), "measured", &[&TEXT[..], &whole].concat());
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("nothing learned from the text: `ppo.ptx_coef` is 0"), "{stderr}");
    let (code, _, stderr) = train(dir.path(), "plain", &[]);
    assert_eq!(code, 0, "{stderr}");
    for file in ["model.safetensors", "value/model.safetensors", "rollouts.jsonl", "samples.jsonl"] {
        let [a, b] = ["measured", "plain"].map(|out| std::fs::read(dir.path().join(out).join(file)).unwrap());
        assert!(a == b, "{file} differs");
    }
    assert!(!std::fs::read_to_string(dir.path().join("plain/config.toml")).unwrap().contains("[ptx"));

    // 16 tokens a window: of a model that has never seen text about ln(vocabulary) each.
    let first = values(&dir.path().join("measured"), "val/ptx_loss")[0];
    let uniform = (byte_tokenizer().vocab_size() as f64).ln();
    assert_close(&[first as f32], &[uniform as f32], 0.2);
}

#[test]
fn adapters_learn_from_text_beside_a_frozen_trunk() {
    let dir = workplace();
    let lora = ["--set", "lora.rank=2", "--set", "optimizer.lr=1e-2", "--set", "ppo.ptx_coef=1"];
    let (code, _, stderr) = train(dir.path(), "adapted", &[&TEXT[..], &lora].concat());
    assert_eq!(code, 0, "{stderr}");
    let held_out = values(&dir.path().join("adapted"), "val/ptx_loss");
    assert!(held_out[2] < held_out[0], "{held_out:?}");
    assert!(dir.path().join("adapted/adapter_model.safetensors").is_file());
}

#[test]
fn a_resumed_run_refuses_other_text_and_takes_the_same_from_elsewhere() {
    let dir = workplace();
    let with_text = [&TEXT[..], &["--set", "ppo.ptx_coef=0.5", "--set", "train.steps=2"]].concat();
    let (code, _, stderr) = train(dir.path(), "out", &with_text);
    assert_eq!(code, 0, "{stderr}");
    let resume = |more: &[&str]| {
        let on = ["--resume", "--set", "train.steps=3"];
        train(dir.path(), "out", &[&on[..], more].concat())
    };
    for (set, named) in [
        ("ptx.data.train=text.val.txt", "`ptx.data.train` was `"),
        ("ptx.data.train=['text.train.txt', 'text.val.txt']", "`ptx.data.train` was 1 files, is now 2"),
        ("ptx.batch_size=4", "`ptx.batch_size` was 3, is now 4"),
        ("ppo.ptx_coef=1.0", "`ppo.ptx_coef` was 0.5, is now 1.0"),
    ] {
        let (code, _, stderr) = resume(&["--set", set]);
        assert_eq!(code, 1, "{set}: {stderr}");
        assert!(stderr.contains(named), "{set}: {stderr}");
    }
    std::fs::rename(dir.path().join("text.train.txt"), dir.path().join("moved.txt")).unwrap();
    let (code, _, stderr) = resume(&["--set", "ptx.data.train=moved.txt", "--set", "ptx.eval_windows=2"]);
    assert_eq!(code, 0, "{stderr}");
}

#[test]
fn text_that_cannot_be_used_is_an_error_that_says_why() {
    let dir = workplace();
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("short.txt"), "no").unwrap();
    std::fs::write(path("blank.txt"), "\n\n").unwrap();
    std::fs::write(path("bad.jsonl"), "{\"words\": 1}\n").unwrap();
    save_tiny(&path("other"), Stage::Sft, &byte_tokenizer(), 3);
    let with = |sets: &[&str]| -> (i32, String) {
        let sets: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
        let (code, _, stderr) = run(PROGRAM, &[&TRAIN[..], &["--out", "out"], &sets].concat(), dir.path());
        (code, stderr)
    };
    let coef = "ppo.ptx_coef=1";
    for (sets, named) in [
        (
            &[coef][..],
            &["`ppo.ptx_coef` is 1, but there is no pretraining text", "hint: name its files with `ptx.data.train`"][..],
        ),
        (&[coef, "ptx.seq_len=8"], &["`ptx.data.train` names no file", "hint: "]),
        (&[coef, "ptx.data.train=nowhere.txt"], &["nowhere.txt"]),
        (&[coef, "ptx.data.train=train.json"], &["train.json"]),
        (&[coef, "ptx.data.train=blank.txt"], &["blank.txt` is empty", "hint: fill it, or leave it out"]),
        (
            &[coef, "ptx.data.train=bad.jsonl"],
            &["bad.jsonl`, line 1: ", "hint: fix the record, or skip such records with `ptx.data.on_bad_record = "],
        ),
        (
            &[coef, "ptx.data.train=bad.jsonl", "ptx.data.max_record_bytes=2"],
            &["hint: raise `ptx.data.max_record_bytes`, or skip such records with `ptx.data.on_bad_record = "],
        ),
        (
            &[coef, "ptx.data.train=short.txt", "ptx.data.val=text.val.txt"],
            &["the training text has", "lower `ptx.seq_len`"],
        ),
        (
            &[coef, "ptx.data.train=text.train.txt", "ptx.data.val=short.txt"],
            &["the held-out text has", "lower `ptx.seq_len`"],
        ),
        (
            &[coef, "ptx.data.train=text.train.txt", "ptx.seq_len=65"],
            &["`ptx.seq_len` 65 exceeds the policy's context of 64"],
        ),
        (&["ppo.ptx_coef=-1"], &["ptx_coef"]),
        (&["ptx.data.trian=a.txt"], &["did you mean `train`?"]),
    ] {
        let (code, stderr) = with(sets);
        assert_eq!(code, 1, "{sets:?}: {stderr}");
        for named in named {
            assert!(stderr.contains(named), "{sets:?}: {stderr}");
        }
        assert!(!path("out").join("config.toml").exists(), "{sets:?}");
    }
}

#[test]
fn memory_counts_the_windows() {
    let dir = workplace();
    // A window of any length is computed at once: too many do not fit, fewer do.
    let huge = ["--set", "ppo.ptx_coef=1", "--set", "ptx.batch_size=1000000", "--set", "ptx.seq_len=64"];
    let text = ["--set", "ptx.data.train=text.train.txt"];
    let (code, _, stderr) = train(dir.path(), "out", &[&text[..], &huge].concat());
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("this run needs about") && stderr.contains("GiB of memory"), "{stderr}");
    // The hint names as many as do fit.
    let hint = "`ptx.batch_size=";
    let (_, rest) = stderr.split_once(hint).unwrap_or_else(|| panic!("{stderr}"));
    let fitting: usize = rest.split('`').next().unwrap().parse().unwrap();
    assert!((1..1_000_000).contains(&fitting) && rest.contains("which is another training"), "{stderr}");
    let fewer = format!("ptx.batch_size={}", fitting / 2);
    let (code, _, stderr) =
        train(dir.path(), "out", &[&text[..], &huge, &["--set", &fewer, "--set", "data.train=nowhere.jsonl"]].concat());
    assert!(code == 1 && stderr.contains("nowhere.jsonl") && !stderr.contains("GiB"), "{stderr}");
}
