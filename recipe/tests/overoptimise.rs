//! `recipe overoptimise`: every method and axis on a world of moments, its results, and what is done twice.

#![allow(clippy::unwrap_used, reason = "a test that unwraps fails with the error in its message")]

mod lab;

use std::fs;
use std::process::Output;

use lab::{Lab, RECIPE, n_skipped, snapshot};
use serde_json::Value;

const LABORATORY: &str = r#"
[overoptimise]
prompts = "$DATA/prompts.test.jsonl"
seeds = [1, 2]
n_prompts = 3
pool = 8
pairs = [6]
other_wrong_labels = [0.0]
kl_coefs = [0.0, 0.5]
policy_steps = 4
rloo_samples = 2
betas = [1.0, 0.3, 0.1]
samples = 2
sizes = ["d_model=24", "d_model=8"]
"#;

/// Parts of the whole: two trainings for each size, the pool, and for each seed reward models and their scores, eight policies
/// and a measurement of DPO's three.
const N_PARTS: usize = 2 * 2 + 1 + 2 * (2 * 5 + (2 + 1 + 3 + 4) + 3);

fn laboratory() -> Lab {
    let lab = Lab::new();
    lab.write("micro/recipe.toml", &format!("{RECIPE}{LABORATORY}"));
    lab
}

fn overoptimise(lab: &Lab, args: &[&str]) -> Output {
    lab.program(&[&["overoptimise", "micro", "--out", "out", "--threads", "1"], args].concat()).output().unwrap()
}

/// Both streams of a command that succeeds.
#[track_caller]
fn run(lab: &Lab, args: &[&str]) -> (String, String) {
    let output = overoptimise(lab, args);
    let [stdout, stderr] = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap());
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    (stdout, stderr)
}

#[track_caller]
fn fail(lab: &Lab, args: &[&str]) -> String {
    let output = overoptimise(lab, args);
    assert!(matches!(output.status.code(), Some(1 | 2)), "{args:?}");
    String::from_utf8(output.stderr).unwrap()
}

/// Parts that a command carried out.
fn n_done(stderr: &str) -> usize {
    stderr.matches(&format!("/{N_PARTS}] ")).count()
}

fn methods(results: &Value) -> Vec<String> {
    let curves = results["curves"].as_array().unwrap();
    curves.iter().map(|curve| curve["method"].to_string()).collect()
}

#[test]
fn every_method_has_its_curve_and_nothing_is_done_twice() {
    let lab = laboratory();
    let (stdout, stderr) = run(&lab, &[]);
    assert_eq!(n_done(&stderr), N_PARTS, "{stderr}");
    assert!(stdout.contains("report: out/overoptimise.html"), "{stdout}");
    let results = lab.json("overoptimise.json");
    // Five reward models; ensembles of the first; PPO against each, once more with the other coefficient.
    let methods = methods(&results);
    for (method, n) in [
        ("\"best-of-n\"", 5),
        ("{\"ensemble\":", 3),
        ("{\"ppo\":0.0}", 5),
        ("{\"ppo\":0.5}", 1),
        ("{\"rloo\":", 1),
        ("\"dpo\"", 1),
    ] {
        assert_eq!(methods.iter().filter(|found| found.starts_with(method)).count(), n, "{method} in {methods:?}");
    }
    for curve in results["curves"].as_array().unwrap() {
        let seeds = curve["seeds"].as_array().unwrap();
        let is_ensemble = curve["method"].get("ensemble").is_some();
        assert_eq!(seeds.len(), if is_ensemble { 1 } else { 2 }, "{curve}");
        let n = match &curve["method"] {
            Value::String(name) if name == "best-of-n" => 4,
            Value::String(_) => 3,
            Value::Object(_) => 4,
            other => panic!("{other}"),
        };
        assert!(seeds.iter().all(|seed| seed["points"].as_array().unwrap().len() == n), "{curve}");
    }
    let sizes: Vec<&Value> =
        results["judges"].as_array().unwrap().iter().map(|judge| &judge["judge"]["size"]).collect();
    assert_eq!(sizes, [&Value::Null, &Value::Null, &Value::Null, &"4k".into(), &"17k".into()]);
    let verdicts: Vec<&str> =
        results["findings"].as_array().unwrap().iter().map(|f| f["verdict"].as_str().unwrap()).collect();
    assert!(verdicts.iter().all(|verdict| !verdict.ends_with("once")), "two seeds: {verdicts:?}");
    let page = fs::read_to_string(lab.out("overoptimise.html")).unwrap();
    assert_eq!(page.matches("<svg").count(), 2 + 2 + 3 * 2 + 1);
    let figures = lab.out("overoptimise/figures");
    assert_eq!(fs::read_dir(&figures).unwrap().count(), 2 + 2 + 3 * 2 + 1);
    let gold = fs::read_to_string(figures.join("methods-gold.svg")).unwrap();
    assert!(
        gold.contains(">best-of-n</text>") && gold.contains(">RLOO, KL coefficient 0</text>") && !gold.contains("var("),
        "{gold}"
    );
    assert!(!page.contains("<script") && !page.contains("NaN") && !page.contains("inf"), "{page}");

    let before = snapshot(&lab.out("overoptimise"));
    let (_, stderr) = run(&lab, &[]);
    assert_eq!((n_done(&stderr), n_skipped(&stderr)), (0, 5), "{stderr}");
    assert!(snapshot(&lab.out("overoptimise")) == before);

    // Work is not given up unasked, and only what a setting changes is done again.
    let error = fail(&lab, &["--set", "recipe.overoptimise.policy_steps=5"]);
    assert!(error.contains("`ppo.train.steps` changed from 4 to 5") && error.contains("`--overwrite`"), "{error}");
    let (_, stderr) = run(&lab, &["--set", "recipe.overoptimise.policy_steps=5", "--overwrite"]);
    assert!(!stderr.contains("were collected"), "{stderr}");
    assert_eq!(n_done(&stderr), 2 * (2 + 1 + 4), "{stderr}");
}

#[test]
fn the_quick_form_is_a_part_whose_reward_models_the_whole_takes_over() {
    let lab = laboratory();
    let (_, stderr) = run(&lab, &["--quick"]);
    assert!(stderr.contains("/9] "), "{stderr}"); // the pool, two reward models with scores, PPO, RLOO, DPO and its answers
    let results = lab.json("overoptimise.json");
    assert_eq!((&results["quick"], results["seeds"].as_array().unwrap().len()), (&true.into(), 1));
    let models = || {
        let all = snapshot(&lab.out("overoptimise/reward-models"));
        all.into_iter().filter(|(path, _)| path.ends_with("model.safetensors")).collect::<Vec<_>>()
    };
    let quick = models();
    assert_eq!(quick.len(), 2);
    let (_, stderr) = run(&lab, &[]);
    assert!(!stderr.contains("reward-models/own-all-10-1\n"), "{stderr}");
    assert!(quick.iter().all(|model| models().contains(model)));
}

#[test]
fn what_the_laboratory_needs_is_said_first() {
    let lab = Lab::new();
    let error = fail(&lab, &[]);
    assert!(error.contains("has no `[overoptimise]`") && error.contains("hint: "), "{error}");
    let people = ["--set", "recipe.collect.labels=people"];
    lab.write("micro/recipe.toml", &format!("{RECIPE}{LABORATORY}"));
    let error = fail(&lab, &people);
    assert!(error.contains("`[overoptimise]` needs `[gold]`"), "{error}");
    let error = fail(&lab, &["--set", "recipe.overoptimise.sizes=[\"n_heads=3\"]"]);
    assert!(error.contains("an invalid size, `n_heads=3`"), "{error}");
    let error = fail(&lab, &["--set", "recipe.overoptimise.seeds=[]"]);
    assert!(error.contains("`seeds` names none"), "{error}");
    for (setting, key) in [
        ("dpo.dpo.label_smoothing=2", "label_smoothing"),
        ("recipe.overoptimise.betas=[-1]", "beta"),
        ("recipe.overoptimise.kl_coefs=[-1]", "kl_coef"),
        ("ppo.ppo.lambda=2", "ppo.lambda"),
        ("reward-model.train.batch_size=0", "train.batch_size"),
    ] {
        let error = fail(&lab, &["--set", setting]);
        assert!(error.contains(key), "{setting}: {error}");
    }
    let error = fail(&lab, &["--set", "recipe.overoptimise.sizes=[\" \"]"]);
    assert!(error.contains("`sizes` has an empty one"), "{error}");
    assert!(!lab.out("tokenizer").exists(), "nothing was begun");
    let error = fail(&lab, &["--set", "recipe.overoptimise.prompts=none.jsonl"]);
    assert!(error.contains("none.jsonl") && !lab.out("data").exists(), "{error}");
    // The world writes prompts, but not these.
    let error = fail(&lab, &["--set", "recipe.overoptimise.prompts=$DATA/none.jsonl"]);
    assert!(error.contains("none.jsonl"), "{error}");
    assert!(!lab.out("tokenizer").exists(), "{error}");
}
