//! The command `ppo doctor` from outside.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

use std::path::Path;

use common::checkpoint::Stage;
use common::interrupt::{Interrupt, Stopped};
use common::testing::{byte_tokenizer, run, save_tiny};
use common::tokenizer::{Tokenizer, TokenizerConfig, TokenizerKind};
use serde_json::{Value, json};
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_ppo");

/// A directory with an untrained policy, an untrained reward model, prompts and pairs.
fn workplace() -> TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    save_tiny(&dir.path().join("sft"), Stage::Sft, &byte_tokenizer(), 3);
    save_tiny(&dir.path().join("rm"), Stage::RewardModel, &byte_tokenizer(), 5);
    let write = |name: &str, records: &mut dyn Iterator<Item = Value>| {
        let lines: Vec<String> = records.map(|record| record.to_string()).collect();
        std::fs::write(dir.path().join(name), lines.join("\n")).unwrap();
    };
    write("prompts.jsonl", &mut (0..20).map(|i| json!({ "prompt": format!("say {i}") })));
    let pair =
        |i: usize| json!({ "prompt": format!("say {i}"), "chosen": "ab".repeat(1 + i % 3), "rejected": i.to_string() });
    write("train-pairs.jsonl", &mut (20..220).map(pair));
    write("pairs.jsonl", &mut (220..420).map(pair));
    std::fs::write(dir.path().join("ppo.toml"), "[ppo]\nresponse_length = 48\n").unwrap();
    dir
}

const DOCTOR: [&str; 9] =
    ["doctor", "--policy", "sft", "--reward-model", "rm", "--data", "prompts.jsonl", "--config", "ppo.toml"];

/// The exit code, and the report with what was said on stderr.
fn examine(dir: &Path, more: &[&str]) -> (i32, Value, String) {
    let (code, stdout, stderr) = run(PROGRAM, &[&DOCTOR[..], &["--json", "--threads", "1"], more].concat(), dir);
    (code, serde_json::from_str(&stdout).unwrap_or_else(|error| panic!("{error}: {stdout}{stderr}")), stderr)
}

fn check<'a>(report: &'a Value, id: &str) -> &'a Value {
    let checks = report["checks"].as_array().unwrap();
    checks.iter().find(|check| check["id"] == id).unwrap_or_else(|| panic!("no `{id}`"))
}

#[test]
fn it_stops_when_asked_to() {
    use clap::Parser as _;

    let dir = workplace();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let flags = ["--policy", "sft", "--reward-model", "rm", "--data", "prompts.jsonl", "--config", "ppo.toml"];
    let of_flag = |flag: &str| if flag.starts_with("--") { flag.to_owned() } else { path(flag) };
    let args = ["ppo", "doctor"].map(str::to_owned).into_iter().chain(flags.map(of_flag));
    let ppo::Command::Doctor(args) = ppo::Cli::parse_from(args).command else { panic!("it examines") };
    assert!(ppo::doctor::examine(&args, Interrupt::never()).is_ok());
    let interrupt = Interrupt::of_test();
    interrupt.request();
    let error = ppo::doctor::examine(&args, interrupt).unwrap_err();
    assert_eq!(error.downcast_ref::<Stopped>().map(|stopped| stopped.exit_code()), Some(130), "{error:#}");
}

#[test]
fn every_check_is_reported_and_untrained_models_are_named() {
    let dir = workplace();
    let pairs = ["--pairs", "pairs.jsonl", "--train-pairs", "train-pairs.jsonl"];
    let (code, report, stderr) = examine(dir.path(), &pairs);
    assert_eq!((code, &report["verdict"]), (1, &json!("fail")), "{stderr}");
    let ids: Vec<&str> =
        report["checks"].as_array().unwrap().iter().map(|check| check["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ppo::doctor::ALL.iter().map(|about| about.id).collect::<Vec<_>>());
    for check in report["checks"].as_array().unwrap() {
        for key in ["stage", "verdict", "reason", "hint", "source"] {
            assert!(check[key].as_str().is_some_and(|text| !text.is_empty()), "{key} in {check}");
        }
        assert!(check["value"].is_number() == check["limit"].is_number(), "{check}");
        let reason = check["reason"].as_str().unwrap();
        // What follows from an order that is the wrong way round is not found again.
        let follows = reason == "not checked: the scores order the pairs against their labels";
        assert!(follows || !reason.starts_with("not checked"), "{check}");
    }
    let verdict =
        |id: &str| (check(&report, id)["stage"].as_str().unwrap(), check(&report, id)["verdict"].as_str().unwrap());
    assert_eq!(verdict("held-out-accuracy"), ("reward-model", "fail"));
    assert_eq!(verdict("answers-end"), ("sft", "fail"));
    assert_eq!(verdict("held-out-loss"), ("sft", "fail"));
    for id in ["kl-of-itself", "cached-is-uncached", "ratio-is-one", "values-finite", "memory", "models-load"] {
        assert_eq!(verdict(id), ("ppo", "pass"), "{report}");
    }
    assert!(stderr.contains("checks failed: `held-out-loss`, `answers-end`"), "{stderr}");
}

#[test]
fn a_check_that_cannot_be_made_warns_and_says_why() {
    let dir = workplace();
    let (_, report, _) = examine(dir.path(), &[]);
    for id in ["held-out-accuracy", "beats-bag-of-words", "pairs-leak", "pairs-ties"] {
        let check = check(&report, id);
        assert_eq!(check["verdict"], "warn", "{check}");
        let reason = check["reason"].as_str().unwrap();
        assert!(reason.starts_with("not checked: `rm/config.toml` names no data"), "{reason}");
    }

    let config = TokenizerConfig { kind: TokenizerKind::Char, ..TokenizerConfig::default() };
    let other = Tokenizer::train(&config, ["say 0123456789"].into_iter(), true).unwrap();
    save_tiny(&dir.path().join("rm"), Stage::RewardModel, &other, 5);
    let (code, report, stderr) = examine(dir.path(), &[]);
    assert_eq!((code, &check(&report, "same-tokenizer")["verdict"]), (1, &json!("fail")), "{stderr}");
    let skipped = &check(&report, "ratio-is-one")["reason"];
    assert_eq!(skipped, "not checked: `same-tokenizer` failed before");
}

#[test]
fn a_file_of_pairs_that_was_named_is_looked_at_or_refused() {
    let dir = workplace();
    std::fs::write(dir.path().join("empty.jsonl"), "").unwrap();
    std::fs::write(dir.path().join("broken.jsonl"), "{\"prompt\": 1}\n").unwrap();
    for (flag, file) in [("--pairs", "nope.jsonl"), ("--train-pairs", "empty.jsonl"), ("--pairs", "broken.jsonl")] {
        let (code, stdout, stderr) = run(PROGRAM, &[&DOCTOR[..], &["--threads", "1", flag, file]].concat(), dir.path());
        assert_eq!((code, stdout.as_str()), (1, ""), "{stderr}");
        assert!(stderr.contains("error: ") && stderr.contains(file), "{stderr}");
    }
}

#[test]
fn without_prompts_nothing_that_reads_them_passes() {
    let dir = workplace();
    std::fs::remove_file(dir.path().join("prompts.jsonl")).unwrap();
    let (code, report, stderr) = examine(dir.path(), &[]);
    assert_eq!(code, 1, "{stderr}");
    assert_eq!(check(&report, "prompts-fit")["verdict"], "fail");
    for id in ["tokenizer-round-trip", "template-round-trip", "answers-end"] {
        let check = check(&report, id);
        assert!(check["verdict"] == "warn" && check["reason"].as_str().unwrap().contains("not checked"), "{check}");
    }
}

#[test]
fn people_get_a_line_for_each_check() {
    let dir = workplace();
    let (code, stdout, stderr) = run(PROGRAM, &DOCTOR, dir.path());
    assert_eq!(code, 1, "{stderr}");
    let lines: Vec<&str> = stdout.lines().collect();
    assert_eq!(lines.len(), ppo::doctor::ALL.len() + 1);
    assert!(lines[0].starts_with("pass  sft           policy-loads"), "{}", lines[0]);
    assert!(lines.last().unwrap().starts_with("verdict: fail ("), "{stdout}");
}
