//! Results on the held-out prompts: answers of every policy, their gold scores where known, and the reward model's scores.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use common::files::{read_if_there, write_whole};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use common::stats::Interval;

use crate::best_of::BestOf;

/// A model that answers prompts, in the order in which the recipe makes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// The pretrained model.
    Base,
    /// After supervised fine-tuning.
    Sft,
    /// After PPO.
    Ppo,
    /// After RLOO.
    Rloo,
    /// After DPO.
    Dpo,
}

impl Policy {
    /// All of them, earliest first.
    pub const ALL: [Self; 5] = [Self::Base, Self::Sft, Self::Ppo, Self::Rloo, Self::Dpo];

    /// Key in the report files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Base => "base",
            Self::Sft => "sft",
            Self::Ppo => "ppo",
            Self::Rloo => "rloo",
            Self::Dpo => "dpo",
        }
    }
}

/// `<out>/evaluation.json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Results {
    /// Gold score over the held-out prompts; empty where the recipe knows none.
    pub gold: BTreeMap<Policy, Interval>,
    /// The reward model's score of the same answers; empty without a reward model.
    pub score: BTreeMap<Policy, Interval>,
    /// Words of an answer.
    pub words: BTreeMap<Policy, Interval>,
    /// Share of answers that stopped by themselves.
    pub ended: BTreeMap<Policy, Interval>,
    /// Gold score of PPO minus SFT, prompt by prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gain: Option<Interval>,
    /// The output of `reward-model eval` for the test pairs, and the same against the noise-free gold order.
    pub reward_model: Map<String, Value>,
    /// The output of `ppo eval` for the held-out prompts.
    pub ppo: Map<String, Value>,
    /// The output of `ppo eval` for the held-out prompts, of the policy after RLOO.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub rloo: Map<String, Value>,
    /// The output of `dpo eval` for the test pairs, and with a reward model that of `ppo eval` of the same policy.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub dpo: Map<String, Value>,
    /// The SFT model's best answer of several, by the reward model.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub best_of: Vec<BestOf>,
}

/// One line of `<out>/answers.jsonl`: a held-out prompt and what each policy answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AnswerRow {
    /// The request.
    pub prompt: String,
    /// Answers by policy.
    #[serde(flatten)]
    pub answers: BTreeMap<Policy, ScoredAnswer>,
}

/// One answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ScoredAnswer {
    /// The model's answer, special tokens left out.
    pub text: String,
    /// Whether it stopped by itself, before the length limit.
    pub ended: bool,
    /// Sampled tokens, the stop token included.
    pub tokens: usize,
    /// Gold score, where known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gold: Option<f64>,
    /// The reward model's normalised score, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score: Option<f64>,
}

impl Results {
    /// Averages over the rows of `answers.jsonl`; the maps of the stages' own evaluations start empty.
    pub fn of_answers(rows: &[AnswerRow]) -> Self {
        let values = |policy: Policy, value: &dyn Fn(&ScoredAnswer) -> Option<f64>| -> Vec<f64> {
            rows.iter().filter_map(|row| row.answers.get(&policy)).filter_map(value).collect()
        };
        let over_rows = |value: &dyn Fn(&ScoredAnswer) -> Option<f64>| -> BTreeMap<Policy, Interval> {
            let interval = |policy| Some((policy, Interval::of(&values(policy, value))?));
            Policy::ALL.into_iter().filter_map(interval).collect()
        };
        let ended = |policy| {
            let values = values(policy, &|answer| Some(f64::from(u8::from(answer.ended))));
            Some((policy, Interval::of_rate(&values)?))
        };
        let gains: Vec<f64> = rows
            .iter()
            .filter_map(|row| Some(row.answers.get(&Policy::Ppo)?.gold? - row.answers.get(&Policy::Sft)?.gold?))
            .collect();
        Self {
            gold: over_rows(&|answer| answer.gold),
            score: over_rows(&|answer| answer.score),
            words: over_rows(&|answer| Some(answer.text.split_whitespace().count() as f64)),
            ended: Policy::ALL.into_iter().filter_map(ended).collect(),
            gain: Interval::of(&gains),
            reward_model: Map::new(),
            ppo: Map::new(),
            rloo: Map::new(),
            dpo: Map::new(),
            best_of: Vec::new(),
        }
    }

    /// Reads `evaluation.json` in `out`; `None` if the last step has not run.
    ///
    /// # Errors
    /// If the file is there but cannot be read.
    pub fn read(out: &Path) -> Result<Option<Self>> {
        let path = out.join("evaluation.json");
        let Some(text) = read_if_there(&path)? else { return Ok(None) };
        serde_json::from_str(&text).map(Some).with_context(|| format!("failed to read `{}`", path.display()))
    }

    /// Writes `evaluation.json` into `out`.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&self, out: &Path) -> Result<()> {
        Ok(write_whole(&out.join("evaluation.json"), serde_json::to_string_pretty(self)?)?)
    }
}

impl AnswerRow {
    /// Reads `answers.jsonl` in `out`; empty if the last step has not run.
    ///
    /// # Errors
    /// If a line is not such a row.
    pub fn read_all(out: &Path) -> Result<Vec<Self>> {
        let path = out.join("answers.jsonl");
        let text = read_if_there(&path)?.unwrap_or_default();
        text.lines()
            .enumerate()
            .map(|(i, line)| {
                serde_json::from_str(line)
                    .with_context(|| format!("failed to read `{}` line {}", path.display(), i + 1))
            })
            .collect()
    }

    /// Writes `answers.jsonl` into `out`.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write_all(rows: &[Self], out: &Path) -> Result<()> {
        let mut text = String::new();
        for row in rows {
            text.push_str(&serde_json::to_string(row)?);
            text.push('\n');
        }
        Ok(write_whole(&out.join("answers.jsonl"), text)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(prompt: &str, sft: f64, ppo: f64) -> AnswerRow {
        let answer =
            |gold| ScoredAnswer { text: "a b".to_owned(), ended: true, tokens: 3, gold: Some(gold), score: None };
        AnswerRow {
            prompt: prompt.to_owned(),
            answers: [(Policy::Sft, answer(sft)), (Policy::Ppo, answer(ppo))].into(),
        }
    }

    #[test]
    fn the_gain_is_paired_by_prompt() {
        // Differences 0.1 and 0.3: mean 0.2, s = 0.1414, half width 1.96·0.1414/√2 = 0.196.
        let results = Results::of_answers(&[row("a", 0.2, 0.3), row("b", 0.5, 0.8)]);
        let gain = results.gain.unwrap();
        assert!((gain.mean - 0.2).abs() < 1e-12 && (gain.high - gain.mean - 0.196).abs() < 1e-4, "{gain:?}");
        assert!((results.gold[&Policy::Ppo].mean - 0.55).abs() < 1e-12);
        assert!(!results.gold.contains_key(&Policy::Base) && results.score.is_empty());
        assert_eq!(results.words[&Policy::Sft].mean, 2.0);
        // Wilson's interval of 2 of 2: 1/(1 + 1.96²/2) to 1.
        let ended = results.ended[&Policy::Ppo];
        assert!((ended.low - 0.3424).abs() < 1e-4 && ended.high <= 1.0, "{ended:?}");
    }

    #[test]
    fn files_survive_the_round_trip() {
        let dir = tempfile::tempdir().unwrap();
        let rows = [row("a <b>", 0.2, 0.3), row("c", 0.1, 0.9)];
        AnswerRow::write_all(&rows, dir.path()).unwrap();
        assert_eq!(AnswerRow::read_all(dir.path()).unwrap(), rows);
        let results = Results::of_answers(&rows);
        results.write(dir.path()).unwrap();
        assert_eq!(Results::read(dir.path()).unwrap(), Some(results));
    }
}
