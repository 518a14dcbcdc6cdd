//! `report.json`, for programs.

use serde_json::{Map, Value, json};

use super::Source;
use crate::steps::Step;
use common::stats;

/// Builds the report: `stages.<stage>.{seconds,tokens,metrics}`, `total_seconds`, what was run, `doctor` as `ppo doctor --json`
/// prints it but without the numbers of checks that have none, `labels` where people labelled, and of the answers to held-out
/// prompts `gold` where it is known, `score` where there is a reward model, `best_of` where the recipe asks for it, `words`
/// and `ended`.
///
/// `metrics` are the last values of `metrics.jsonl`; those measured afterwards on the test files are added under the names
/// that `reward-model eval`, `ppo eval` and `dpo eval` print.
pub fn report(source: &Source) -> Value {
    let mut stages = Map::new();
    for stage in &source.stages {
        let mut metrics: Map<String, Value> =
            stage.log.last_values().into_iter().map(|(name, value)| (name, json!(value))).collect();
        if let Some(results) = &source.results {
            match stage.step {
                Step::RewardModel => metrics.extend(results.reward_model.clone()),
                Step::Ppo => metrics.extend(results.ppo.clone()),
                Step::Rloo => metrics.extend(results.rloo.clone()),
                Step::Dpo => metrics.extend(results.dpo.clone()),
                _ => {}
            }
        }
        let tokens = stage.log.tokens().unwrap_or(0.0) as u64;
        stages.insert(
            stage.step.name().to_owned(),
            json!({ "seconds": stage.seconds, "tokens": tokens, "metrics": metrics }),
        );
    }
    let mut report = json!({
        "recipe": source.record.recipe,
        "seed": source.record.seed,
        "version": source.record.version,
        "backend": source.record.backend,
        "threads": source.record.threads,
        "stages": stages,
        "total_seconds": source.total_seconds(),
    });
    if let Some(doctor) = &source.doctor {
        report["doctor"] = doctor.clone();
    }
    if let Some(labels) = &source.labels {
        report["labels"] = json!(labels);
    }
    if let Some(results) = &source.results {
        if !results.gold.is_empty() {
            report["gold"] = json!(results.gold);
            report["gold_gain"] = json!(results.gain);
        }
        if !results.score.is_empty() {
            report["score"] = json!(results.score);
        }
        if !results.best_of.is_empty() {
            report["best_of"] = json!(results.best_of);
        }
        report["words"] = json!(results.words);
        report["ended"] = json!(results.ended);
        report["interval"] = json!(stats::METHOD);
    }
    report
}
