//! The last step: every model answers the held-out prompts, and the answers are judged.

use std::fmt::Write as _;
use std::num::NonZeroUsize;
use std::path::Path;

use anyhow::{Context, Result};
use common::checkpoint::Checkpoint;
use common::cli::RuntimeArgs;
use common::conversation::{Message, Role};
use common::data::records::{OnBadRecord, Pair, read_pairs, read_prompts};
use common::generate::SamplingConfig;
use common::interrupt::Interrupt;
use common::rng::Streams;
use common::session::Outcome;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::answers::{self, Answerer};
use crate::config::{BasePrompt, EvaluateConfig};
use crate::evaluation::{Answer, AnswerRow, Evaluation, Policy};
use crate::gold::GoldScorer;
use crate::steps::{Step, write_whole};

/// Sampling streams from here on belong to this step.
const FIRST_ROW: u64 = 1 << 50;

/// What the last step works with.
pub struct Evaluator<'a> {
    /// Its configuration.
    pub config: &'a EvaluateConfig,
    /// The recipe's seed.
    pub seed: u64,
    /// The recipe's output directory.
    pub out: &'a Path,
    /// The stages of the recipe.
    pub stages: &'a [Step],
    /// Test pairs for the reward model.
    pub pairs: Option<&'a Path>,
    /// Who knows what answers are worth.
    pub gold: Option<&'a GoldScorer>,
    /// On what to run.
    pub runtime: &'a RuntimeArgs,
    /// Whether to stop.
    pub interrupt: Interrupt,
}

impl Evaluator<'_> {
    /// Writes `answers.jsonl` and `evaluation.json`.
    ///
    /// # Errors
    /// If a checkpoint or a data file cannot be used.
    pub fn run(&self) -> Result<Outcome> {
        let mut prompts = read_prompts(&self.config.prompts, OnBadRecord::Fail)?;
        if self.config.n_prompts > 0 {
            prompts.truncate(self.config.n_prompts);
        }
        let messages: Vec<Vec<Message>> = prompts.iter().map(|prompt| prompt.messages.clone()).collect();
        let mut rows: Vec<AnswerRow> =
            prompts.iter().map(|prompt| AnswerRow { prompt: prompt.text.clone(), answers: [].into() }).collect();
        for policy in Policy::ALL {
            if !self.stages.contains(&step_of(policy)) {
                continue;
            }
            let Some(answers) = self.answers(policy, &messages)? else { return Ok(Outcome::Interrupted) };
            for (row, mut answer) in rows.iter_mut().zip(answers) {
                answer.gold = self.gold.and_then(|gold| gold.score(&row.prompt, &answer.text));
                row.answers.insert(policy, answer);
            }
        }
        let mut evaluation = Evaluation::of_answers(&rows);
        evaluation.reward_model = self.reward_model()?;
        evaluation.ppo = self.ppo()?;
        if self.interrupt.requested() {
            return Ok(Outcome::Interrupted);
        }
        AnswerRow::write_all(&rows, self.out)?;
        evaluation.write(self.out)?;
        Ok(Outcome::Finished)
    }

    /// Answers of one model with the reward model's scores; `None` if the user asked to stop.
    fn answers(&self, policy: Policy, prompts: &[Vec<Message>]) -> Result<Option<Vec<Answer>>> {
        let dir = self.out.join(step_of(policy).name());
        let checkpoint = Checkpoint::open(&dir).with_context(|| format!("failed to load `{}`", dir.display()))?;
        let runtime = self.runtime.open()?;
        let gpt = runtime.gpt(&checkpoint)?;
        let tokenizer = checkpoint.require_tokenizer()?;
        let form = if policy == Policy::Base { self.config.base_prompt } else { BasePrompt::Chat };
        let answerer = Answerer {
            gpt: &gpt,
            tokenizer,
            form,
            sampling: SamplingConfig {
                temperature: self.config.temperature,
                max_tokens: self.config.max_tokens,
                ..SamplingConfig::default()
            },
            batch_size: self.config.batch_size,
        };
        // The same random numbers for every model.
        let streams = Streams::new(self.seed);
        let Some(sampled) = answerer.answer(prompts, streams, FIRST_ROW, policy.name(), self.interrupt)? else {
            return Ok(None);
        };
        let scores = if self.stages.contains(&Step::RewardModel) {
            let judge = Checkpoint::open(&self.out.join(Step::RewardModel.name()))?;
            let model = runtime.scalar(&judge)?;
            answers::scores(&model, judge.require_tokenizer()?, prompts, &sampled, form, self.config.batch_size)?
        } else {
            vec![None; sampled.len()]
        };
        let answers = sampled.into_iter().zip(scores).map(|(sampled, score)| Answer {
            text: sampled.text.trim().to_owned(),
            ended: sampled.ended,
            tokens: sampled.ids.len(),
            gold: None,
            score,
        });
        Ok(Some(answers.collect()))
    }

    /// What `reward-model eval` says of the test pairs, and of the same pairs in their gold order.
    fn reward_model(&self) -> Result<Map<String, Value>> {
        let Some(pairs) = self.pairs.filter(|_| self.stages.contains(&Step::RewardModel)) else {
            return Ok(Map::new());
        };
        let evaluate = |data: &Path| {
            reward_model::evaluate(&reward_model::EvalArgs {
                checkpoint: self.out.join(Step::RewardModel.name()),
                data: data.to_owned(),
                batch_size: self.batch_size(),
                runtime: self.runtime.clone(),
            })
            .with_context(|| format!("failed to evaluate the reward model on `{}`", data.display()))
        };
        let mut result = fields(&evaluate(pairs)?)?;
        let Some(gold) = self.gold else { return Ok(result) };
        let ordered = in_gold_order(&read_pairs(pairs, OnBadRecord::Fail)?, gold)?;
        if ordered.n == 0 {
            return Ok(result);
        }
        let path = self.out.join("pairs.test.gold-order.jsonl");
        write_whole(&path, &ordered.jsonl)?;
        let against_gold = evaluate(&path)?;
        result.insert("gold_accuracy".to_owned(), json!(against_gold.accuracy));
        result.insert("gold_longer_wins_accuracy".to_owned(), json!(against_gold.longer_wins_accuracy));
        result.insert("gold_pairs".to_owned(), json!(ordered.n));
        result.insert("label_agreement".to_owned(), json!(ordered.n_agreeing as f64 / ordered.n as f64));
        Ok(result)
    }

    /// What `ppo eval` says of the held-out prompts.
    fn ppo(&self) -> Result<Map<String, Value>> {
        if !self.stages.contains(&Step::Ppo) {
            return Ok(Map::new());
        }
        let evaluation = ppo::evaluate(&ppo::EvalArgs {
            checkpoint: self.out.join(Step::Ppo.name()),
            reference: self.out.join(Step::Sft.name()),
            reward_model: self.out.join(Step::RewardModel.name()),
            data: self.config.prompts.clone(),
            temperature: Some(self.config.temperature),
            max_tokens: Some(self.config.max_tokens),
            seed: self.seed,
            batch_size: self.batch_size(),
            runtime: self.runtime.clone(),
        })
        .context("failed to compare the policy with its reference")?;
        fields(&evaluation)
    }

    fn batch_size(&self) -> NonZeroUsize {
        NonZeroUsize::new(self.config.batch_size).unwrap_or(NonZeroUsize::MIN)
    }
}

/// The checkpoint that a policy comes from.
fn step_of(policy: Policy) -> Step {
    match policy {
        Policy::Base => Step::Pretrain,
        Policy::Sft => Step::Sft,
        Policy::Ppo => Step::Ppo,
    }
}

fn fields<T: Serialize>(value: &T) -> Result<Map<String, Value>> {
    match serde_json::to_value(value)? {
        Value::Object(fields) => Ok(fields),
        other => anyhow::bail!("expected an object, found {other}"),
    }
}

/// Pairs with the answer of the higher gold score as the chosen one.
struct GoldOrder {
    jsonl: String,
    n: usize,
    /// Pairs whose label says the same.
    n_agreeing: usize,
}

/// Puts `pairs` in gold order; pairs of equal worth, and those the scorer cannot judge, are left out.
fn in_gold_order(pairs: &[Pair], gold: &GoldScorer) -> Result<GoldOrder> {
    let mut ordered = GoldOrder { jsonl: String::new(), n: 0, n_agreeing: 0 };
    for pair in pairs {
        let asked = pair.prompt.iter().rfind(|message| message.role == Role::User).map_or("", |m| m.content.as_str());
        let (Some(chosen), Some(rejected)) = (gold.score(asked, &pair.chosen), gold.score(asked, &pair.rejected))
        else {
            continue;
        };
        if chosen == rejected {
            continue;
        }
        let (better, worse) =
            if chosen > rejected { (&pair.chosen, &pair.rejected) } else { (&pair.rejected, &pair.chosen) };
        writeln!(ordered.jsonl, "{}", json!({ "prompt": pair.prompt, "chosen": better, "rejected": worse }))?;
        ordered.n += 1;
        ordered.n_agreeing += usize::from(chosen > rejected);
    }
    Ok(ordered)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_labels_are_turned_and_counted() {
        let gold = GoldScorer::Lexicon(lexicon());
        let pair = |chosen: &str, rejected: &str| Pair {
            prompt: vec![Message::new(Role::User, "Hello?")],
            chosen: chosen.to_owned(),
            rejected: rejected.to_owned(),
            margin: None,
        };
        let pairs = [pair("good day", "bad day"), pair("bad day", "good day"), pair("a day", "one day")];
        let ordered = in_gold_order(&pairs, &gold).unwrap();
        assert_eq!((ordered.n, ordered.n_agreeing), (2, 1));
        for line in ordered.jsonl.lines() {
            let record: Value = serde_json::from_str(line).unwrap();
            assert_eq!((&record["chosen"], &record["rejected"]), (&json!("good day"), &json!("bad day")));
        }
    }

    fn lexicon() -> crate::gold::Lexicon {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("words.json");
        std::fs::write(&path, r#"{"good": 3, "bad": -3}"#).unwrap();
        crate::gold::Lexicon::load(&path).unwrap()
    }
}
