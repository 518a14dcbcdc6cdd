//! `recipe run` with pairs that people label: it asks, waits, and goes on.

#![allow(clippy::unwrap_used, reason = "a test that unwraps fails with the error in its message")]

mod lab;

use std::fs;

use clap::Parser;
use common::interrupt::Interrupt;
use lab::{Lab, n_skipped};

const PEOPLE: [&str; 4] = ["--set", "recipe.collect.labels=people", "--set", "recipe.collect.n_labels=16"];

/// Both streams of a run that ends with 0.
fn run(lab: &Lab, args: &[&str]) -> (String, String) {
    let output = lab.command(&[&PEOPLE[..], args].concat()).output().unwrap();
    let [stdout, stderr] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    (stdout, stderr)
}

/// Labels as somebody who prefers at random: a model that has learned nothing writes nothing of worth.
fn label(lab: &Lab, name: &str, limit: &str, seed: &str) {
    let questions = lab.out("data/pairs.questions.jsonl").display().to_string();
    let out = lab.out(&format!("labels/{name}.jsonl")).display().to_string();
    let args = ["reward-model", "label", "--pairs", &questions, "--out", &out, "--annotator", name, "--by", "gold"];
    let more = ["--label-temperature", "0.1", "--limit", limit, "--seed", seed];
    reward_model::run(reward_model::Cli::parse_from(args.into_iter().chain(more))).unwrap();
}

#[test]
fn a_recipe_waits_for_people_and_goes_on_with_their_labels() {
    let lab = Lab::new();
    let (stdout, stderr) = run(&lab, &[]);
    assert!(
        stdout.starts_with("0 of 16 labels are there.") && stdout.contains("reward-model label --pairs"),
        "{stdout}"
    );
    assert!(
        stdout.contains(
            "chat serve --checkpoint out/sft --questions out/data/pairs.questions.jsonl --labels out/labels/page.jsonl"
        ),
        "{stdout}"
    );
    assert!(stderr.contains("collect: waiting for labels") && !stderr.contains("reward-model:"), "{stderr}");
    let asked = fs::read(lab.out("data/pairs.questions.jsonl")).unwrap();

    label(&lab, "mia", "10", "0");
    let (stdout, stderr) = run(&lab, &[]);
    assert!(stdout.starts_with("10 of 16 labels are there."), "{stdout}");
    assert!(n_skipped(&stderr) == 4 && stderr.contains("collect: resuming"), "{stderr}");
    assert!(fs::read(lab.out("data/pairs.questions.jsonl")).unwrap() == asked, "the questions stay the same");

    label(&lab, "tom", "10", "1");
    // Of a person whose program was killed while it wrote.
    fs::write(lab.out("labels/stray.jsonl"), "{\"prompt\": \"p\", \"chosen\": \"a\", \"rejected\": \"b\"}\n{\"pro")
        .unwrap();
    fs::write(lab.out("labels/kim.txt"), "").unwrap();
    let (stdout, stderr) = run(&lab, &[]);
    assert!(stdout.contains("report: "), "{stdout}");
    assert!(stderr.contains("warning: 1 label in `out/labels` left out"), "{stderr}");
    assert!(stderr.contains("warning: `out/labels/stray.jsonl` ends in the middle of a record"), "{stderr}");
    assert!(stderr.contains("warning: `out/labels/kim.txt` left out"), "{stderr}");
    let labels = &lab.json("report.json")["labels"];
    assert_eq!(
        (&labels["decisions"], &labels["people"]["mia"], &labels["people"]["tom"]),
        (&20.into(), &10.into(), &10.into())
    );
    assert_eq!(labels["agreement"]["shared"], 10, "{labels}");
    let html = fs::read_to_string(lab.out("report.html")).unwrap();
    assert!(html.contains("20 decisions of people (mia 10, tom 10)"));
    // How far the reward model agrees with each of them, on what it was not trained on.
    let held_out = fs::read_to_string(lab.out("data/pairs.val.jsonl")).unwrap();
    let by = &lab.json("report.json")["stages"]["reward-model"]["metrics"]["annotators"];
    for name in ["mia", "tom"] {
        let n = held_out.matches(&format!("\"annotator\":\"{name}\"")).count();
        assert!(n > 0 && by[name]["accuracy"]["n"] == n, "{name}: {by} of {held_out}");
        assert!(html.contains(&format!("Agrees with {name}")), "{name}");
    }
    let lines = |file: &str| fs::read_to_string(lab.out(file)).unwrap().lines().count();
    assert_eq!(lines("data/pairs.train.jsonl") + lines("data/pairs.val.jsonl"), 20);
    assert!(fs::read_to_string(lab.out("data/pairs.train.jsonl")).unwrap().contains("\"annotator\":\"mia\""));

    // What comes later is not passed over in silence, and what was asked is not sampled again to take it.
    label(&lab, "kim", "3", "2");
    let (_, stderr) = run(&lab, &[]);
    assert!(stderr.contains("3 labels came after the pairs were made of 20"), "{stderr}");
    let written = || fs::metadata(lab.out("data/pairs.questions.jsonl")).unwrap().modified().unwrap();
    let before = written();
    let all = ["--set", "recipe.collect.n_labels=23", "--overwrite"];
    let (_, stderr) = run(&lab, &all);
    assert!(!stderr.contains("came after") && written() == before, "{stderr}");
    assert_eq!(lab.json("report.json")["labels"]["decisions"], 23);

    // Nobody's work is thrown away unasked.
    let (_, stderr) = run(&lab, &all[..2]);
    assert_eq!(n_skipped(&stderr), 8, "{stderr}");
    let error = lab.fail(&[&PEOPLE[..], &all[..2], &["--set", "recipe.collect.temperature=0.5"]].concat());
    assert!(error.contains("`recipe.collect.temperature` changed from 1.0 to 0.5"), "{error}");
}

#[test]
fn an_earlier_reward_model_says_what_is_asked_first() {
    let lab = Lab::new();
    lab.run(&["--stages", "world,tokenizer,pretrain,sft,collect,reward-model"]);
    fs::rename(lab.out("reward-model"), lab.path("earlier")).unwrap();
    let uncertain = ["--set", "recipe.collect.order=uncertain"];
    let error = lab.fail(&[&PEOPLE[..], &uncertain].concat());
    assert!(error.contains("`order_by`"), "{error}");
    let by = format!("recipe.collect.order_by={}", lab.path("earlier").display());
    let error = lab.fail(&[&uncertain[..], &["--set", &by]].concat());
    assert!(error.contains("`order` is for pairs that people label"), "{error}");
    let (stdout, _) = run(&lab, &[&uncertain[..], &["--set", &by, "--overwrite"]].concat());
    assert!(stdout.starts_with("0 of 16 labels are there."), "{stdout}");
    let text = fs::read_to_string(lab.out("data/pairs.questions.jsonl")).unwrap();
    let apart: Vec<f64> = text.lines().map(|line| distance(&lab, line)).collect();
    assert!(apart.is_sorted_by(|a, b| *a <= b + 1e-5) && apart[0] < apart[apart.len() - 1], "{apart:?}");
}

/// How far the earlier reward model tells the answers of a question apart, by `reward-model eval`.
fn distance(lab: &Lab, line: &str) -> f64 {
    let question: serde_json::Value = serde_json::from_str(line).unwrap();
    let [a, b] = [&question["tied"][0], &question["tied"][1]];
    lab.write(
        "one.jsonl",
        &serde_json::json!({ "prompt": question["prompt"], "chosen": a, "rejected": b }).to_string(),
    );
    let [model, pair] = ["earlier", "one.jsonl"].map(|name| lab.path(name).display().to_string());
    let cli = reward_model::Cli::parse_from(["reward-model", "eval", "--checkpoint", &model, "--data", &pair]);
    let reward_model::Command::Eval(args) = cli.command else { panic!("another command") };
    reward_model::evaluate(&args, Interrupt::never()).unwrap().agreement.margin_mean.abs()
}

#[test]
fn more_labels_than_pairs_cannot_be_waited_for() {
    let lab = Lab::new();
    let error = lab.fail(&["--set", "recipe.collect.labels=people", "--set", "recipe.collect.n_labels=9999"]);
    assert!(error.contains("`collect.n_labels` is 9999, but there are"), "{error}");
}

#[test]
fn a_report_is_written_to_a_file_and_to_nothing_else() {
    let lab = Lab::new();
    lab.run(&["--stages", "world,tokenizer,pretrain"]);
    for place in ["/dev/full", "/dev/zero"] {
        let output = lab.program(&["report", "out/pretrain", "--out", place]).output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(1) && stderr.contains("is not a file"), "{place}: {stderr}");
    }
}
