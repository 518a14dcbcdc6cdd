//! `report.json`, for programs.

use serde_json::{Map, Value, json};

use super::Source;
use crate::evaluation::Policy;
use crate::stats;
use crate::steps::Step;

/// Builds the report: `stages.<stage>.{seconds,tokens,metrics}`, `total_seconds`, `gold`, and what was run.
///
/// `metrics` are the last values of `metrics.jsonl`; those measured afterwards on the test files are added under the names
/// that `reward-model eval` and `ppo eval` print.
pub fn report(source: &Source) -> Value {
    let mut stages = Map::new();
    for stage in &source.stages {
        let mut metrics: Map<String, Value> =
            stage.log.last_values().into_iter().map(|(name, value)| (name, json!(value))).collect();
        if let Some(evaluation) = &source.evaluation {
            match stage.step {
                Step::RewardModel => metrics.extend(evaluation.reward_model.clone()),
                Step::Ppo => metrics.extend(evaluation.ppo.clone()),
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
    if let Some(evaluation) = source.evaluation.as_ref().filter(|evaluation| !evaluation.gold.is_empty()) {
        let of = |policy: Policy| evaluation.gold.get(&policy).map(|interval| json!(interval));
        let mut gold = Map::new();
        for policy in Policy::ALL {
            if let Some(interval) = of(policy) {
                gold.insert(policy.name().to_owned(), interval);
            }
        }
        report["gold"] = Value::Object(gold);
        report["gold_gain"] = json!(evaluation.gain);
        report["score"] = json!(evaluation.score);
        report["interval"] = json!(stats::METHOD);
    }
    report
}
