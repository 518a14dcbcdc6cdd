//! The last step: every model answers the held-out prompts, and the answers are scored.

use std::fmt::Write as _;
use std::num::NonZeroUsize;
use std::path::Path;

use anyhow::{Context, Result};
use common::checkpoint::{self, Checkpoint};
use common::cli::RuntimeArgs;
use common::conversation::{Message, Role};
use common::data::records::{OnBadRecord, Pair, read_pairs, read_prompts};
use common::files::write_whole;
use common::generate::SamplingConfig;
use common::interrupt::Interrupt;
use common::rng::Streams;
use common::session::Outcome;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::answers::{self, PromptSampler};
use crate::best_of::BestOf;
use crate::collect::PairFiles;
use crate::config::{BasePrompt, EvaluateConfig, LabelledBy};
use crate::gold::GoldScorer;
use crate::results::{AnswerRow, Policy, Results, ScoredAnswer};
use crate::setup::Setup;

/// In the output directory: the test pairs in the order of their gold scores.
pub const GOLD_ORDER_FILE: &str = "pairs.test.gold-order.jsonl";
use crate::steps::Step;

/// Sampling streams from here on belong to this step.
const FIRST_ROW: u64 = 1 << 50;

/// Those of the answers that the best are chosen from.
const FIRST_ROW_OF_POOL: u64 = FIRST_ROW + (1 << 40);

/// The last step.
pub struct Evaluator<'a> {
    /// Its configuration.
    pub config: &'a EvaluateConfig,
    /// The recipe.
    pub setup: &'a Setup,
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
        let outcome = self.measure();
        // What was broken off failed for no other reason.
        if self.interrupt.requested() { Ok(Outcome::Interrupted) } else { outcome }
    }

    fn measure(&self) -> Result<Outcome> {
        let mut prompts = read_prompts(&self.config.prompts, OnBadRecord::Fail)?;
        let n_all = prompts.len();
        if self.config.n_prompts > 0 {
            prompts.truncate(self.config.n_prompts);
        }
        let messages: Vec<Vec<Message>> = prompts.iter().map(|prompt| prompt.messages.clone()).collect();
        let mut rows: Vec<AnswerRow> =
            prompts.iter().map(|prompt| AnswerRow { prompt: prompt.text.clone(), answers: [].into() }).collect();
        for policy in Policy::ALL {
            if !self.has(policy) {
                continue;
            }
            let Some(answers) = self.answers(policy, &messages, FIRST_ROW)? else { return Ok(Outcome::Interrupted) };
            for (row, mut answer) in rows.iter_mut().zip(answers) {
                answer.gold = self.gold(&row.prompt, &answer);
                row.answers.insert(policy, answer);
            }
        }
        let Some(best_of) = self.best_of(&rows, &messages)? else { return Ok(Outcome::Interrupted) };
        let path = self.setup.out.join("prompts.evaluated.jsonl");
        let data = if prompts.len() < n_all { &path } else { &self.config.prompts };
        if *data == path {
            let lines = messages.iter().map(|messages| format!("{}\n", json!({ "prompt": messages })));
            write_whole(&path, lines.collect::<String>())?;
        }
        let results = Results {
            reward_model: self.reward_model()?,
            ppo: self.against_sft(Step::Ppo, data)?,
            rloo: self.against_sft(Step::Rloo, data)?,
            dpo: self.dpo(data)?,
            best_of,
            ..Results::of_answers(&rows)
        };
        if self.interrupt.requested() {
            return Ok(Outcome::Interrupted);
        }
        AnswerRow::write_all(&rows, &self.setup.out)?;
        results.write(&self.setup.out)?;
        Ok(Outcome::Finished)
    }

    fn trains(&self, step: Step) -> bool {
        self.setup.recipe.config.stages().contains(&step)
    }

    fn has(&self, policy: Policy) -> bool {
        match policy {
            Policy::Base => self.setup.has_base(),
            Policy::Sft => self.trains(Step::Sft),
            Policy::Ppo => self.trains(Step::Ppo),
            Policy::Rloo => self.trains(Step::Rloo),
            Policy::Dpo => self.trains(Step::Dpo),
        }
    }

    fn gold(&self, prompt: &str, answer: &ScoredAnswer) -> Option<f64> {
        self.setup.gold.as_ref().and_then(|gold| gold.score(prompt, &answer.text))
    }

    fn open(&self, policy: Policy) -> Result<Checkpoint> {
        let dir = match policy {
            Policy::Base => self.setup.base(),
            Policy::Sft => self.setup.dir(Step::Sft),
            Policy::Ppo => self.setup.dir(Step::Ppo),
            Policy::Rloo => self.setup.dir(Step::Rloo),
            Policy::Dpo => self.setup.dir(Step::Dpo),
        };
        let failed = || format!("failed to load `{}`", dir.display());
        match policy {
            Policy::Base => checkpoint::init_from(&dir, self.setup.opening_init()),
            Policy::Sft | Policy::Ppo | Policy::Rloo | Policy::Dpo => {
                Checkpoint::open_with(&dir, self.setup.opening(&dir))
            }
        }
        .with_context(failed)
    }

    /// The best answers of several as `evaluate.best_of` wants them; `None` if the user asked to stop.
    fn best_of(&self, rows: &[AnswerRow], prompts: &[Vec<Message>]) -> Result<Option<Vec<BestOf>>> {
        let Some(&n_answers) = self.config.best_of.iter().max() else { return Ok(Some(Vec::new())) };
        let repeated: Vec<_> =
            prompts.iter().flat_map(|prompt| std::iter::repeat_n(prompt.clone(), n_answers)).collect();
        let Some(mut answers) = self.answers(Policy::Sft, &repeated, FIRST_ROW_OF_POOL)? else { return Ok(None) };
        for (pool, row) in answers.chunks_exact_mut(n_answers).zip(rows) {
            for answer in pool {
                answer.gold = self.gold(&row.prompt, answer);
            }
        }
        let pools: Vec<&[ScoredAnswer]> = answers.chunks_exact(n_answers).collect();
        Ok(Some(self.config.best_of.iter().filter_map(|&n| BestOf::of_pools(&pools, n)).collect()))
    }

    /// Answers of one model with the reward model's scores; `None` if the user asked to stop. The answer to prompt `i` draws from
    /// sampling stream `first_row + i`.
    fn answers(&self, policy: Policy, prompts: &[Vec<Message>], first_row: u64) -> Result<Option<Vec<ScoredAnswer>>> {
        let mut checkpoint = self.open(policy)?;
        let runtime = self.runtime.open()?;
        let gpt = runtime.take_gpt(&mut checkpoint)?;
        let tokenizer = checkpoint.require_tokenizer()?;
        let form = if policy == Policy::Base { self.config.base_prompt } else { BasePrompt::Chat };
        let sampler = PromptSampler {
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
        let streams = Streams::new(self.setup.recipe.config.seed);
        let Some(sampled) = sampler.answer(prompts, streams, first_row, policy.name(), self.interrupt)? else {
            return Ok(None);
        };
        let scores = if self.trains(Step::RewardModel) {
            let dir = self.setup.dir(Step::RewardModel);
            let mut reward_model = Checkpoint::open_with(&dir, self.setup.opening(&dir))?;
            let model = runtime.take_scalar(&mut reward_model)?;
            let (tokenizer, batch_size) = (reward_model.require_tokenizer()?, self.config.batch_size);
            answers::scores(&model, tokenizer, prompts, &sampled, form, batch_size, self.interrupt)?
        } else {
            vec![None; sampled.len()]
        };
        let answers = sampled.into_iter().zip(scores).map(|(sampled, score)| ScoredAnswer {
            text: sampled.text.trim().to_owned(),
            ended: sampled.ended,
            tokens: sampled.ids.len(),
            gold: None,
            score,
        });
        Ok(Some(answers.collect()))
    }

    /// The results of `reward-model eval` on the test pairs, and on the same pairs in their gold order; where people labelled,
    /// how far the scores agree with each of them.
    fn reward_model(&self) -> Result<Map<String, Value>> {
        if !self.trains(Step::RewardModel) {
            return Ok(Map::new());
        }
        let mut result = match self.setup.test_pairs() {
            Some(pairs) => self.on_test_pairs(&pairs)?,
            None => Map::new(),
        };
        if self.setup.recipe.config.collect.as_ref().is_some_and(|collect| collect.labels == LabelledBy::People) {
            let by_people = self.evaluate_reward_model(&PairFiles::in_out(&self.setup.out).val)?;
            result.insert("annotators".to_owned(), json!(by_people.annotators));
        }
        Ok(result)
    }

    fn on_test_pairs(&self, pairs: &Path) -> Result<Map<String, Value>> {
        let mut result = fields(&self.evaluate_reward_model(pairs)?)?;
        let Some(gold) = &self.setup.gold else { return Ok(result) };
        let ordered = in_gold_order(&read_pairs(pairs, OnBadRecord::Fail)?, gold)?;
        if ordered.n == 0 {
            return Ok(result);
        }
        let path = self.setup.out.join(GOLD_ORDER_FILE);
        write_whole(&path, ordered.jsonl)?;
        let against_gold = self.evaluate_reward_model(&path)?.agreement;
        result.insert("gold_accuracy".to_owned(), json!(against_gold.accuracy));
        result.insert("gold_longer_wins_accuracy".to_owned(), json!(against_gold.longer_wins_accuracy));
        result.insert("gold_pairs".to_owned(), json!(ordered.n));
        result.insert("label_agreement".to_owned(), json!(ordered.n_agreeing as f64 / ordered.n as f64));
        Ok(result)
    }

    /// The flags of a command that opens the checkpoints of `steps`.
    fn runtime_for<const N: usize>(&self, steps: [Step; N]) -> RuntimeArgs {
        let dirs = steps.map(|step| self.setup.dir(step));
        self.runtime.among_own(dirs.iter().map(|dir| &**dir))
    }

    fn evaluate_reward_model(&self, data: &Path) -> Result<reward_model::Evaluation> {
        let args = reward_model::EvalArgs {
            checkpoint: self.setup.dir(Step::RewardModel),
            data: data.to_owned(),
            batch_size: self.batch_size(),
            runtime: self.runtime_for([Step::RewardModel]),
        };
        tracing::info!("scoring the pairs of `{}`", data.display());
        reward_model::evaluate(&args, self.interrupt)
            .with_context(|| format!("failed to evaluate the reward model on `{}`", data.display()))
    }

    /// The results of `dpo eval` on the test pairs, and of [`against_sft`](Self::against_sft).
    fn dpo(&self, data: &Path) -> Result<Map<String, Value>> {
        let mut results = self.against_sft(Step::Dpo, data)?;
        if let Some(pairs) = self.setup.test_pairs().filter(|_| self.trains(Step::Dpo)) {
            let args = dpo::EvalArgs {
                checkpoint: self.setup.dir(Step::Dpo),
                reference: self.setup.dir(Step::Sft),
                data: pairs,
                batch_size: self.batch_size(),
                runtime: self.runtime_for([Step::Dpo, Step::Sft]),
            };
            tracing::info!("the implicit reward of the test pairs");
            let evaluation = dpo::evaluate(&args, self.interrupt);
            results.extend(fields(&evaluation.context("failed to evaluate the implicit reward")?)?);
        }
        Ok(results)
    }

    /// The results of `ppo eval` of a stage's policy on the prompts in the file `data`, which are those of the answers; none
    /// without a reward model.
    fn against_sft(&self, stage: Step, data: &Path) -> Result<Map<String, Value>> {
        if !(self.trains(stage) && self.trains(Step::RewardModel)) {
            return Ok(Map::new());
        }
        let args = ppo::EvalArgs {
            checkpoint: self.setup.dir(stage),
            reference: self.setup.dir(Step::Sft),
            reward_model: vec![self.setup.dir(Step::RewardModel)],
            ensemble: None,
            data: data.to_owned(),
            temperature: Some(self.config.temperature),
            max_tokens: Some(self.config.max_tokens),
            seed: self.setup.recipe.config.seed,
            batch_size: self.batch_size(),
            runtime: self.runtime_for([stage, Step::Sft, Step::RewardModel]),
        };
        tracing::info!("comparing {stage} with its reference");
        let evaluation =
            ppo::evaluate(&args, self.interrupt).context("failed to compare the policy with its reference")?;
        fields(&evaluation)
    }

    fn batch_size(&self) -> NonZeroUsize {
        NonZeroUsize::new(self.config.batch_size).unwrap_or(NonZeroUsize::MIN)
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

/// Puts `pairs` in gold order; pairs of equal worth, and those the scorer does not understand, are left out.
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
            ..Pair::default()
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
