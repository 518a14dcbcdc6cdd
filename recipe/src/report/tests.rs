//! The reports of a made-up run.

use std::fs;
use std::path::Path;

use common::checkpoint::{Manifest, Stage};
use serde_json::{Value, json};

use crate::cli::ReportArgs;
use crate::record::{RunRecord, StepRecord};
use crate::results::{AnswerRow, Policy, Results, ScoredAnswer};
use crate::steps::Step;

fn jsonl(path: &Path, rows: impl IntoIterator<Item = Value>) {
    let text = rows.into_iter().fold(String::new(), |text, row| text + &row.to_string() + "\n");
    fs::write(path, text).unwrap();
}

/// Every stage with curves, an evaluation and hostile text.
fn made_up_run(out: &Path) {
    let stages = [Step::Pretrain, Step::Sft, Step::RewardModel, Step::Ppo];
    for step in stages {
        let dir = out.join(step.name());
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("config.toml"), "seed = 1\nlr = 1e-3\n").unwrap();
        jsonl(
            &dir.join("metrics.jsonl"),
            (1..=60).map(|i| {
                let falling = 1.0 / f64::from(i);
                let mut row = json!({ "step": i * 10, "seconds": i, "tokens": i * 640 });
                if step == Step::Ppo {
                    row["objective/score"] = json!(1.0 - falling);
                    row["objective/kl"] = json!(6.0 - 6.0 * falling);
                    row["gold/score"] = json!(0.9 - 0.3 * falling);
                    if i % 10 == 0 {
                        row["gold/val_score"] = json!(0.8);
                    }
                } else {
                    row["train/loss"] = json!(1.0 + falling);
                    if i % 10 == 0 {
                        row["val/loss"] = json!(1.1 + falling);
                    }
                }
                row
            }),
        );
    }
    jsonl(
        &out.join("pretrain/samples.jsonl"),
        [
            json!({ "step": 10, "prompt": "", "text": "the the <script>alert(1)</script>" }),
            json!({ "step": 600, "prompt": "Once", "text": "there was a fox & a boat." }),
        ],
    );
    let answer = |gold: f64, text: &str| ScoredAnswer {
        text: text.to_owned(),
        ended: gold > 0.3,
        tokens: 9,
        gold: Some(gold),
        score: Some(gold - 0.5),
    };
    let rows: Vec<AnswerRow> = (0..40)
        .map(|i| {
            let noise = f64::from(i % 5) * 0.02;
            AnswerRow {
                prompt: format!("Tell me a story about fox <{i}>."),
                answers: [
                    (Policy::Base, answer(0.2 + noise, "and the fox")),
                    (Policy::Sft, answer(0.6 + noise, "A fox sat. The end.")),
                    (Policy::Ppo, answer(0.85 + noise, "A fox found a boat & was happy. The end.")),
                ]
                .into(),
            }
        })
        .collect();
    AnswerRow::write_all(&rows, out).unwrap();
    let mut results = Results::of_answers(&rows);
    for name in ["accuracy", "gold_accuracy", "label_agreement"] {
        results.reward_model.insert(name.to_owned(), json!(0.81));
    }
    results.ppo.insert("kl_mean".to_owned(), json!({ "mean": 6.5, "low": 6.0, "high": 7.0 }));
    results.write(out).unwrap();
    let mut record = RunRecord {
        recipe: "tiny".to_owned(),
        title: "A tiny world".to_owned(),
        seed: 1,
        version: "0.1.0".to_owned(),
        backend: "flex".to_owned(),
        threads: 2,
        gold: Some("five parts of a story".to_owned()),
        ..RunRecord::default()
    };
    for step in stages.into_iter().chain([Step::World, Step::Evaluate]) {
        record.steps.insert(step, StepRecord { finished: true, seconds: 61.0, ..StepRecord::default() });
    }
    record.save(out).unwrap();
}

#[test]
fn report_json_has_the_contracts_fields() {
    let out = tempfile::tempdir().unwrap();
    made_up_run(out.path());
    super::write(out.path()).unwrap();
    let report: Value = serde_json::from_str(&fs::read_to_string(out.path().join("report.json")).unwrap()).unwrap();
    for stage in ["pretrain", "sft", "reward-model", "ppo"] {
        assert_eq!(report["stages"][stage]["seconds"], 61.0, "{stage}");
        assert_eq!(report["stages"][stage]["tokens"], 60 * 640, "{stage}");
    }
    assert_eq!(report["total_seconds"], 6.0 * 61.0);
    assert_eq!(report["stages"]["ppo"]["metrics"]["objective/kl"], 5.9);
    assert_eq!(report["stages"]["ppo"]["metrics"]["kl_mean"]["mean"], 6.5);
    assert_eq!(report["stages"]["reward-model"]["metrics"]["accuracy"], 0.81);
    for (policy, mean) in [("base", 0.24), ("sft", 0.64), ("ppo", 0.89)] {
        let gold = &report["gold"][policy];
        assert!((gold["mean"].as_f64().unwrap() - mean).abs() < 1e-9, "{gold}");
        assert!(gold["low"].as_f64() < gold["mean"].as_f64() && gold["mean"].as_f64() < gold["high"].as_f64());
        assert_eq!(gold["n"], 40);
    }
}

#[test]
fn report_html_is_one_file_with_every_part_and_escapes_what_models_write() {
    let out = tempfile::tempdir().unwrap();
    made_up_run(out.path());
    super::write(out.path()).unwrap();
    let html = fs::read_to_string(out.path().join("report.html")).unwrap();
    for part in
        ["id=\"pretrain\"", "id=\"sft\"", "id=\"reward-model\"", "id=\"ppo\"", "id=\"answers\"", "from 0.640 to 0.890"]
    {
        assert!(html.contains(part), "{part} is missing");
    }
    assert!(html.contains("6.5 nats of KL") && html.contains("do not overlap"));
    assert!(!html.contains("<script") && html.contains("&lt;script&gt;"));
    assert!(html.contains("fox &lt;3&gt;") && html.contains("boat &amp; was happy"));
    assert!(!html.contains("src=") && !html.contains("<link"), "the page must stand alone");
    assert!(html.matches("<svg").count() == 6, "{} plots", html.matches("<svg").count());
}

#[test]
fn a_run_of_one_stage_without_gold_has_a_report() {
    let out = tempfile::tempdir().unwrap();
    made_up_run(out.path());
    let mut record = RunRecord::load(out.path()).unwrap();
    record.steps.retain(|&step, _| step == Step::Pretrain);
    record.save(out.path()).unwrap();
    super::write(out.path()).unwrap();
    let report: Value = serde_json::from_str(&fs::read_to_string(out.path().join("report.json")).unwrap()).unwrap();
    assert!(report.get("gold").is_none() && report["stages"].as_object().unwrap().len() == 1);
    let html = fs::read_to_string(out.path().join("report.html")).unwrap();
    assert!(html.contains("id=\"pretrain\"") && !html.contains("id=\"ppo\"") && !html.contains("Answers side by side"));
}

/// The page and `report.json` of a run that `change` changed.
fn report_of(change: impl FnOnce(&Path)) -> (String, Value) {
    let out = tempfile::tempdir().unwrap();
    made_up_run(out.path());
    change(out.path());
    super::write(out.path()).unwrap();
    let read = |name: &str| fs::read_to_string(out.path().join(name)).unwrap();
    (read("report.html"), serde_json::from_str(&read("report.json")).unwrap())
}

/// The answers of the run without what `change` takes away.
fn change_answers(out: &Path, change: impl Fn(&mut ScoredAnswer)) {
    let mut rows = AnswerRow::read_all(out).unwrap();
    rows.iter_mut().flat_map(|row| row.answers.values_mut()).for_each(change);
    AnswerRow::write_all(&rows, out).unwrap();
    Results::of_answers(&rows).write(out).unwrap();
}

#[test]
fn without_a_gold_score_the_models_are_compared_by_the_reward_models() {
    let (html, report) = report_of(|out| change_answers(out, |answer| answer.gold = None));
    assert!(report.get("gold").is_none() && report.get("gold_gain").is_none(), "{report}");
    assert!((report["score"]["ppo"]["mean"].as_f64().unwrap() - 0.39).abs() < 1e-9, "{report}");
    assert!(report["words"]["sft"]["mean"].is_number());
    let verdict = "PPO raised the mean reward model’s score over 40 held-out prompts from 0.140 to 0.390";
    assert!(html.contains(verdict) && !html.contains("Gold score:"), "{html}");
}

#[test]
fn without_any_score_there_are_words_and_answers() {
    let (html, report) = report_of(|out| change_answers(out, |answer| (answer.gold, answer.score) = (None, None)));
    assert!(report.get("gold").is_none() && report.get("score").is_none() && report["words"].is_object(), "{report}");
    assert!(html.contains(">words<") && !html.contains("95 % interval") && html.contains("id=\"answers\""));
}

#[test]
fn what_rests_on_replaced_models_is_left_out() {
    let (html, report) = report_of(|out| {
        let mut record = RunRecord::load(out).unwrap();
        for step in [Step::Ppo, Step::Evaluate] {
            record.steps.get_mut(&step).unwrap().stale = true;
        }
        record.save(out).unwrap();
    });
    assert!(report["stages"].get("ppo").is_none() && report.get("gold").is_none(), "{report}");
    assert!(!html.contains("id=\"ppo\"") && !html.contains("id=\"answers\""));
}

#[test]
fn the_gold_curve_of_another_scorer_is_left_out() {
    let scored_by = |gold: &str| {
        report_of(|out| {
            let mut record = RunRecord::load(out).unwrap();
            let ppo = record.steps.get_mut(&Step::Ppo).unwrap();
            ppo.inputs.set("precision", "f32");
            ppo.gold = Some(gold.to_owned());
            record.gold_fingerprint = Some("this one".to_owned());
            record.save(out).unwrap();
        })
    };
    assert!(scored_by("this one").1["stages"]["ppo"]["metrics"]["gold/score"].is_number());
    let (html, report) = scored_by("another");
    assert!(report["stages"]["ppo"]["metrics"].get("gold/score").is_none(), "{report}");
    assert!(!html.contains("PPO does not see it"), "{html}");
}

#[test]
fn texts_count_what_there_is() {
    let (html, _) = report_of(|out| {
        let mut record = RunRecord::load(out).unwrap();
        record.threads = 1;
        record.samples_per_prompt = Some(3);
        record.steps.insert(Step::Collect, StepRecord { finished: true, ..StepRecord::default() });
        record.save(out).unwrap();
    });
    assert!(html.contains("backend flex, 1 thread<"), "{html}");
    assert!(html.contains("3 to a prompt") && html.contains("of the final policy, held-out prompts"), "{html}");
}

#[test]
fn a_run_from_an_existing_model_says_so() {
    let (html, _) = report_of(|_| {});
    assert!(
        html.contains("From plain text to an aligned chat model: pretrained, fine-tuned, given a reward model and")
    );
    assert!(html.contains("the labeller errs like people") && html.contains("The base model has only seen plain text"));
    let (html, _) = report_of(|out| {
        let mut record = RunRecord::load(out).unwrap();
        record.gold = Some("a list of words".to_owned());
        record.steps.retain(|&step, _| !matches!(step, Step::World | Step::Pretrain));
        record.save(out).unwrap();
    });
    assert!(html.contains("From an existing model to an aligned chat model: fine-tuned, given a reward model and"));
    assert!(html.contains("another judge than that behind the labels") && html.contains("these were not made from it"));
    for untrue in ["plain text", "pretrained", "errs like people", "noise taken out"] {
        assert!(!html.contains(untrue), "{untrue}: {html}");
    }
}

#[test]
fn what_rounds_to_zero_has_no_sign() {
    let (html, _) = report_of(|out| {
        let mut results = Results::read(out).unwrap().unwrap();
        results.ppo.insert("kl_mean".to_owned(), json!({ "mean": -0.004, "low": -0.01, "high": 0.01 }));
        for score in results.gold.values_mut() {
            (score.mean, score.low, score.high) = (-0.0004, -0.0004, 0.0);
        }
        results.score.values_mut().for_each(|score| score.mean = -0.004);
        results.write(out).unwrap();
    });
    assert!(html.contains("0.0 nats of KL from the fine-tuned model") && html.contains("0.000 to 0.000"), "{html}");
    for zero in ["−0.0 ", "−0.00<", "−0.000", "-0.000", "-0.0 "] {
        assert!(!html.contains(zero), "{zero}: {html}");
    }
}

/// `recipe report` of `dirs` into a file.
fn report_on(dirs: &[&Path], file: &Path) -> anyhow::Result<String> {
    let dirs = dirs.iter().map(|dir| dir.to_path_buf()).collect();
    super::run(&ReportArgs { dirs, out: file.to_owned() })?;
    Ok(fs::read_to_string(file)?)
}

/// Says in the directory of a stage which one it is of.
fn sign(dir: &Path, stage: Stage) {
    fs::write(dir.join("manifest.json"), serde_json::to_string(&Manifest::new(stage)).unwrap()).unwrap();
}

#[test]
fn a_stage_alone_has_a_report() {
    let out = tempfile::tempdir().unwrap();
    made_up_run(out.path());
    let (dir, file) = (out.path().join("pretrain"), out.path().join("pretrain.html"));
    let unsigned = report_on(&[&dir], &file).unwrap_err().to_string();
    assert!(unsigned.contains("does not say yet which stage wrote it\nhint: "), "{unsigned}");
    sign(&dir, Stage::Pretrain);
    let html = report_on(&[&dir], &file).unwrap();
    for part in ["id=\"pretrain\"", "Best held-out loss", "seed 1", "&lt;script&gt;", "lr = 1e-3", "metrics.jsonl"] {
        assert!(html.contains(part), "{part} is missing");
    }
    for absent in ["id=\"ppo\"", "recipe ", "<script", "Stage 1 of 1", "<link", "src="] {
        assert!(!html.contains(absent), "{absent} in {html}");
    }
    assert_eq!(html, report_on(&[&dir], &file).unwrap(), "an earlier report is replaced");
    let foreign = report_on(&[&dir], &dir.join("config.toml")).unwrap_err().to_string();
    assert!(foreign.starts_with("refusing to overwrite"), "{foreign}");
    let nothing = report_on(&[&out.path().join("data")], &file).unwrap_err().to_string();
    assert!(nothing.contains("holds no run") && nothing.ends_with("of `recipe run`"), "{nothing}");
    // A folder of stages that were run one by one is not a run of a recipe.
    fs::remove_file(out.path().join("recipe.json")).unwrap();
    let folder = report_on(&[out.path()], &file).unwrap_err().to_string();
    let stages =
        ["ppo", "pretrain", "reward-model", "sft"].map(|name| format!("`{}`", out.path().join(name).display()));
    let hint = format!("\nhint: pass one or more of the runs in it: {}", stages.join(", "));
    assert!(folder.contains("holds no run") && folder.ends_with(&hint), "{folder}");
}

#[test]
fn runs_stand_side_by_side_stage_by_stage() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    made_up_run(a.path());
    made_up_run(b.path());
    let alone = b.path().join("pretrain");
    sign(&alone, Stage::Pretrain);
    fs::write(alone.join("config.toml"), "seed = 1\nlr = 2e-3\n").unwrap();
    let html = report_on(&[a.path(), &alone], &a.path().join("both.html")).unwrap();
    let (stage, rest) = html.split_once("id=\"sft\"").unwrap();
    assert!(rest.contains("id=\"ppo\"") && rest.contains("Gold score."), "the recipe's other stages are there");
    // Each plot of the stage has a curve of either run.
    let figures = stage.split("<figure>").skip(1).collect::<Vec<_>>();
    assert_eq!(figures.len(), 2, "loss in training and on held-out data");
    for figure in figures {
        assert!(figure.contains("var(--ember") && figure.contains("var(--slate"), "{figure}");
    }
    let stage = stage.replace("&#x2f;", "/");
    let cells = |name: &str| {
        let row = stage.split("<tr>").find(|row| row.starts_with(&format!("<th>{name}</th>")))?;
        Some(row.split("<td").skip(1).map(|cell| cell.split(['>', '<']).nth(1).unwrap()).collect::<Vec<_>>())
    };
    assert_eq!(cells("lr").unwrap(), ["0.001", "0.002"]);
    assert_eq!(cells("seed"), None, "it is the same");
    assert_eq!(cells("lowest val/loss").unwrap(), ["1.117", "1.117"]);
    assert_eq!(stage.matches("there was a fox &amp; a boat.").count(), 2);
    assert!(!html.contains("<script") && !html.contains("src=") && !html.contains("<link"));
}
