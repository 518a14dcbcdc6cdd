//! Numbers and names as the report writes them.

use common::stats::fixed;
use serde_json::Value;

use crate::results::Policy;
use crate::steps::Step;

/// Heading of a step.
pub fn title(step: Step) -> &'static str {
    match step {
        Step::World => "Data",
        Step::Tokenizer => "Tokenizer",
        Step::Pretrain => "Pretraining",
        Step::Sft => "Supervised fine-tuning",
        Step::Collect => "Preference pairs",
        Step::RewardModel => "Reward model",
        Step::Ppo => "PPO",
        Step::Rloo => "RLOO",
        Step::Dpo => "DPO",
        Step::Evaluate => "Evaluation",
    }
}

/// Name of a policy.
pub fn policy_title(policy: Policy) -> &'static str {
    match policy {
        Policy::Base => "Base",
        Policy::Sft => "SFT",
        Policy::Ppo => "PPO",
        Policy::Rloo => "RLOO",
        Policy::Dpo => "DPO",
    }
}

/// The mean of a value printed by `ppo eval`: a number, or an object with `mean`.
pub fn mean_of(value: &Value) -> Option<f64> {
    value.as_f64().or_else(|| value.get("mean")?.as_f64())
}

/// `1 h 2 min`, `3 min 12 s` or `4.2 s`.
pub fn duration(seconds: f64) -> String {
    if seconds < 10.0 {
        return format!("{seconds:.1} s");
    }
    let whole = seconds.round() as u64;
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s} s"),
        (h, m, _) => format!("{h} h {m} min"),
    }
}

/// A share as a percentage.
pub fn percent(share: f64) -> String {
    format!("{:.1}\u{a0}%", share * 100.0)
}

/// To so many decimals, a true minus, and no sign of what rounds to zero.
pub fn number(value: f64, decimals: usize) -> String {
    fixed(value, decimals).replace('-', "−")
}

/// With its sign, a true minus.
pub fn signed(value: f64) -> String {
    let text = number(value, 2);
    if text.starts_with('−') { text } else { format!("+{text}") }
}

/// Two decimals at most, a true minus.
pub fn compact(value: f64) -> String {
    number(value, 2).trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// `1 thread`, `2 threads`.
pub fn counted(n: usize, noun: &str) -> String {
    if n == 1 { format!("1 {noun}") } else { format!("{n} {noun}s") }
}
