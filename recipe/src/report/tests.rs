//! The reports of a made-up run.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use crate::evaluation::{Answer, AnswerRow, Evaluation, Policy};
use crate::steps::{RunRecord, Step, StepRecord};

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
    let answer = |gold: f64, text: &str| Answer {
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
    let mut evaluation = Evaluation::of_answers(&rows);
    evaluation.reward_model.insert("accuracy".to_owned(), json!(0.81));
    evaluation.ppo.insert("kl_mean".to_owned(), json!({ "mean": 6.5, "low": 6.0, "high": 7.0 }));
    evaluation.write(out).unwrap();
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
    for step in stages.into_iter().chain([Step::World]) {
        record.steps.insert(step, StepRecord { key: String::new(), finished: true, seconds: 61.0 });
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
    assert_eq!(report["total_seconds"], 5.0 * 61.0);
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
    fs::remove_file(out.path().join("evaluation.json")).unwrap();
    fs::remove_file(out.path().join("answers.jsonl")).unwrap();
    super::write(out.path()).unwrap();
    let report: Value = serde_json::from_str(&fs::read_to_string(out.path().join("report.json")).unwrap()).unwrap();
    assert!(report.get("gold").is_none() && report["stages"].as_object().unwrap().len() == 1);
    let html = fs::read_to_string(out.path().join("report.html")).unwrap();
    assert!(html.contains("id=\"pretrain\"") && !html.contains("id=\"ppo\"") && !html.contains("Answers side by side"));
}
