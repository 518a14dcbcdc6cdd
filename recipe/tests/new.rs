//! `recipe new`: the recipe it writes runs, and files that do not parse are refused before anything is written.

#![allow(clippy::unwrap_used, reason = "a test that unwraps fails with the error in its message")]

use std::fs;
use std::path::Path;

use common::testing::run;

const RECIPE: &str = env!("CARGO_BIN_EXE_recipe");

fn write_files(dir: &Path) {
    let text: String = (0..200).map(|i| format!("the fox sees {i} red boats.\n\n")).collect();
    fs::write(dir.join("book.txt"), text).unwrap();
    let sft: String = (0..30)
        .map(|i| format!("{{\"prompt\": \"what does fox {i} see?\", \"completion\": \"the fox sees {i} boats.\"}}\n"))
        .collect();
    fs::write(dir.join("sft.jsonl"), sft).unwrap();
    let pairs: String = (0..30)
        .map(|i| {
            format!(
                "{{\"prompt\": \"what does fox {i} see?\", \"chosen\": \"{i} boats.\", \"rejected\": \"no {i}\"}}\n"
            )
        })
        .collect();
    fs::write(dir.join("pairs.jsonl"), pairs).unwrap();
    let prompts: String = (0..30).map(|i| format!("{{\"prompt\": \"what does fox {i} see?\"}}\n")).collect();
    fs::write(dir.join("prompts.jsonl"), prompts).unwrap();
}

/// Settings with which every stage takes a moment.
const SMALL: [&str; 13] = [
    "pretrain.train.steps=2",
    "pretrain.train.batch_size=2",
    "pretrain.model.d_model=16",
    "pretrain.model.n_layers=1",
    "pretrain.model.n_heads=2",
    "pretrain.tokenizer.vocab_size=300",
    "sft.train.steps=2",
    "reward-model.train.steps=2",
    "reward-model.normalisation.samples=4",
    "reward-model.normalisation.max_tokens=8",
    "ppo.train.steps=1",
    "ppo.ppo.response_length=8",
    "recipe.evaluate.max_tokens=8",
];

/// Runs the recipe in `my` with [`SMALL`] settings of its stages.
fn runs(dir: &Path, stages: &[&str]) {
    runs_as(dir, "my", stages);
}

fn runs_as(dir: &Path, recipe: &str, stages: &[&str]) {
    let mut args = vec!["run", recipe, "--out", "out", "--threads", "1"];
    for setting in SMALL {
        let stage = setting.split('.').next().unwrap();
        if stages.contains(&stage) || stage == "recipe" && stages.contains(&"ppo") {
            args.extend(["--set", setting]);
        }
    }
    let (code, _, stderr) = run(RECIPE, &args, dir);
    assert_eq!(code, 0, "{stderr}");
    assert!(dir.join("out/report.html").is_file(), "{stderr}");
    for stage in stages {
        assert!(dir.join("out").join(stage).join("manifest.json").is_file(), "{stage}: {stderr}");
    }
}

#[test]
fn a_recipe_for_all_files_runs_to_its_report() {
    let dir = tempfile::tempdir().unwrap();
    write_files(dir.path());
    let args = [
        "new",
        "my",
        "--text",
        "book.txt",
        "--sft",
        "sft.jsonl",
        "--pairs",
        "pairs.jsonl",
        "--prompts",
        "prompts.jsonl",
    ];
    let (code, stdout, stderr) = run(RECIPE, &args, dir.path());
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("sft: 29 records to train on, 1 held out"), "{stdout}");
    assert!(stdout.contains("recipe run my --out runs/my\n"), "{stdout}");
    runs(dir.path(), &["pretrain", "sft", "reward-model", "ppo"]);
}

#[test]
fn a_missing_file_leaves_out_the_stages_that_need_it() {
    let dir = tempfile::tempdir().unwrap();
    write_files(dir.path());
    let args = ["new", "my", "--text", "book.txt", "--sft", "sft.jsonl", "--prompts", "prompts.jsonl"];
    let (code, _, stderr) = run(RECIPE, &args, dir.path());
    assert_eq!(code, 0, "{stderr}");
    assert!(stderr.contains("`ppo` is left out: it needs `--pairs`"), "{stderr}");
    assert!(!dir.path().join("my/ppo.toml").exists());
    runs(dir.path(), &["pretrain", "sft"]);
}

#[test]
fn few_records_are_seen_more_often_and_a_pretrained_model_learns_slower() {
    let dir = tempfile::tempdir().unwrap();
    write_files(dir.path());
    let files = ["--sft", "sft.jsonl", "--pairs", "pairs.jsonl"];
    let (code, _, stderr) = run(RECIPE, &[&["new", "small", "--text", "book.txt"], &files[..]].concat(), dir.path());
    assert_eq!(code, 0, "{stderr}");
    let read = |path: &str| -> toml::Table { fs::read_to_string(dir.path().join(path)).unwrap().parse().unwrap() };
    let sft = read("small/sft.toml");
    // 29 records: 10 passes of 4 steps.
    assert_eq!((&sft["train"]["epochs"], &sft["train"]["batch_size"]), (&10.into(), &8.into()));
    assert_eq!((&sft["optimizer"]["lr"], &sft["optimizer"]["warmup_steps"]), (&3e-4.into(), &4.into()));
    assert_eq!(read("small/reward-model.toml")["train"]["epochs"], 3.into());

    runs_as(dir.path(), "small", &["pretrain", "sft", "reward-model"]);
    let from = |init| run(RECIPE, &[&["new", "init", "--init", init], &files[..]].concat(), dir.path());
    for (wrong, what) in [("out/tokenizer", "it holds a tokenizer"), ("out/reward-model", "written by stage")] {
        let (code, _, stderr) = from(wrong);
        assert!(code == 1 && stderr.contains(what) && !dir.path().join("init").exists(), "{stderr}");
    }
    let (code, _, stderr) = from("out/pretrain");
    assert_eq!(code, 0, "{stderr}");
    let text = fs::read_to_string(dir.path().join("init/sft.toml")).unwrap();
    assert!(text.contains("\nlr = 1e-5                      # peak\n"), "{text}");
    assert!(!text.contains('{') && text.contains("40 steps in all"), "{text}");
}

#[test]
fn nothing_is_written_for_files_that_do_not_parse() {
    let dir = tempfile::tempdir().unwrap();
    write_files(dir.path());
    fs::write(dir.path().join("bad.jsonl"), "{\"prompt\": \"a\", \"completion\": \"b\"}\n{\"question\": \"a\"}\n")
        .unwrap();
    let (code, _, stderr) = run(RECIPE, &["new", "my", "--text", "book.txt", "--sft", "bad.jsonl"], dir.path());
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("bad.jsonl") && stderr.contains("line 2"), "{stderr}");
    assert!(!dir.path().join("my").exists());
    let (code, _, stderr) = run(RECIPE, &["new", "my", "--sft", "sft.jsonl"], dir.path());
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("`--text`") && stderr.contains("`--init`"), "{stderr}");
    let (code, _, stderr) = run(RECIPE, &["new", ".", "--text", "book.txt"], dir.path());
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("is not empty"), "{stderr}");
}
