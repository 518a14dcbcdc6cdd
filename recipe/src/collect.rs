//! Preference pairs of the SFT model's own answers.
//!
//! Two answers to the same prompt are shown to the simulated labeller, who prefers the first with probability
//! `σ((gold_a − gold_b) / temperature)` ([`toy::label_pair`]). A reward model that is to score this model's
//! answers learns most from pairs of exactly such answers. Or people label them: [`crate::people`].

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use common::checkpoint::{Checkpoint, Stage};
use common::cli::RuntimeArgs;
use common::data::records::{OnBadRecord, Prompt, read_prompts};
use common::files::write_whole;
use common::generate::SamplingConfig;
use common::interrupt::Interrupt;
use common::rng::Streams;
use common::score::Response;
use serde_json::json;

use crate::answers::PromptSampler;
use crate::config::{BasePrompt, CollectConfig, LabelledBy};
use crate::gold::GoldScorer;
use crate::people;
use crate::setup::Setup;
use crate::steps::{Progress, Step};
use toy::label_pair;

/// Sampling streams from here on belong to this step; those of the stages begin at 0.
const FIRST_ROW: u64 = 1 << 48;
/// And from here on to the test prompts.
const FIRST_TEST_ROW: u64 = FIRST_ROW + (1 << 40);

/// The files that this step writes into the data directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairFiles {
    /// To train the reward model on.
    pub train: PathBuf,
    /// For its early stopping.
    pub val: PathBuf,
    /// For the report alone.
    pub test: PathBuf,
}

impl PairFiles {
    /// Their places in a recipe's output directory.
    pub fn in_out(out: &Path) -> Self {
        let file = |part: &str| out.join("data").join(format!("pairs.{part}.jsonl"));
        Self { train: file("train"), val: file("val"), test: file("test") }
    }
}

/// The step that makes preference pairs.
pub struct Collector<'a> {
    /// Its configuration.
    pub config: &'a CollectConfig,
    /// The score by which the simulated labeller prefers.
    pub gold: Option<&'a GoldScorer>,
    /// The recipe.
    pub setup: &'a Setup,
    /// On what to run.
    pub runtime: &'a RuntimeArgs,
    /// Whether to stop.
    pub interrupt: Interrupt,
}

/// The prompts of the pairs to train on and to validate by, with their answers, those to one prompt side by side.
pub(crate) struct Sampled {
    pub(crate) prompts: Vec<Prompt>,
    pub(crate) answers: Vec<Response>,
    /// The test pairs, labelled by the gold score.
    pub(crate) test: Option<Pairs>,
}

impl Collector<'_> {
    /// Samples, labels and writes the pairs, or has people label them.
    ///
    /// # Errors
    /// If the SFT model or a prompt cannot be used, or no two answers to the training prompts differ in worth.
    pub fn run(&self) -> Result<Progress> {
        match self.config.labels {
            LabelledBy::People => people::collect(self),
            LabelledBy::Simulated => self.simulate(),
        }
    }

    /// Labels by the gold score.
    fn simulate(&self) -> Result<Progress> {
        let config = self.config;
        let Some(Sampled { prompts, answers, test }) = self.sample_all()? else { return Ok(Progress::Interrupted) };
        let n_train = prompts.len() - config.n_val_prompts;
        let k = config.samples_per_prompt;
        let files = PairFiles::in_out(&self.setup.out);
        let labeller = self.labeller()?;
        let train = labeller.pairs(&prompts[..n_train], &answers[..n_train * k], "train")?;
        ensure!(
            train.n > 0,
            "no two answers to the prompts of `{}` differ in gold score by `collect.least_difference` ({})\nhint: train the \
             model for longer, or lower the least difference; 0 keeps every pair of different answers",
            config.prompts.display(),
            config.least_difference
        );
        let val = labeller.pairs(&prompts[n_train..], &answers[n_train * k..], "val")?;
        self.prepare_data_dir()?;
        train.write(&files.train)?;
        val.write(&files.val)?;
        self.write_test(test)?;
        Ok(Progress::Finished)
    }

    /// The labeller that the gold score simulates.
    fn labeller(&self) -> Result<Labeller<'_>> {
        let gold = self.gold.context("the recipe has no `[gold]`")?;
        Ok(Labeller { config: self.config, gold, streams: self.streams() })
    }

    /// Makes the folder of the pairs.
    pub(crate) fn prepare_data_dir(&self) -> Result<()> {
        let dir = self.setup.data_dir();
        std::fs::create_dir_all(&dir).with_context(|| format!("failed to make `{}`", dir.display()))
    }

    /// Writes the test pairs where there are any.
    pub(crate) fn write_test(&self, test: Option<Pairs>) -> Result<()> {
        test.map_or(Ok(()), |pairs| pairs.write(&PairFiles::in_out(&self.setup.out).test))
    }

    /// Answers all prompts; `None` if the user asked to stop.
    pub(crate) fn sample_all(&self) -> Result<Option<Sampled>> {
        let config = self.config;
        let dir = self.setup.dir(Step::Sft);
        let mut checkpoint = Checkpoint::open_with(&dir, self.setup.opening(&dir))
            .and_then(|checkpoint| checkpoint.of_stage(&[Stage::Sft]))
            .context("failed to load the model to sample from")?;
        let gpt = self.runtime.open()?.take_gpt(&mut checkpoint)?;
        let sampler = PromptSampler {
            gpt: &gpt,
            tokenizer: checkpoint.require_tokenizer()?,
            form: BasePrompt::Chat,
            sampling: SamplingConfig {
                temperature: config.temperature,
                max_tokens: config.max_tokens,
                ..SamplingConfig::default()
            },
            batch_size: config.batch_size,
        };

        let mut prompts = read_prompts(&config.prompts, OnBadRecord::Fail)?;
        if config.n_prompts > 0 {
            prompts.truncate(config.n_prompts);
        }
        ensure!(
            prompts.len() > config.n_val_prompts,
            "`{}` has {} prompts, and `collect.n_val_prompts` keeps {} of them for validation",
            config.prompts.display(),
            prompts.len(),
            config.n_val_prompts
        );
        let Some(answers) = self.sample(&sampler, &prompts, FIRST_ROW)? else { return Ok(None) };
        let mut test = None;
        if !config.test_prompts.as_os_str().is_empty() {
            let prompts = read_prompts(&config.test_prompts, OnBadRecord::Fail)?;
            let Some(answers) = self.sample(&sampler, &prompts, FIRST_TEST_ROW)? else { return Ok(None) };
            test = Some(self.labeller()?.pairs(&prompts, &answers, "test")?);
        }
        Ok(Some(Sampled { prompts, answers, test }))
    }

    /// The random streams of the recipe.
    fn streams(&self) -> Streams {
        Streams::new(self.setup.recipe.config.seed)
    }

    /// `samples_per_prompt` answers to each prompt, those to one prompt side by side.
    fn sample(&self, sampler: &PromptSampler<'_>, prompts: &[Prompt], first_row: u64) -> Result<Option<Vec<Response>>> {
        let repeated: Vec<_> = prompts
            .iter()
            .flat_map(|prompt| std::iter::repeat_n(prompt.messages.clone(), self.config.samples_per_prompt))
            .collect();
        sampler.answer(&repeated, self.streams(), first_row, "sampling pairs", self.interrupt)
    }
}

struct Labeller<'a> {
    config: &'a CollectConfig,
    gold: &'a GoldScorer,
    streams: Streams,
}

/// Labelled pairs as a file's text, with what there is to say of them.
#[derive(Debug, Default)]
pub(crate) struct Pairs {
    jsonl: String,
    n: usize,
    n_wrong: usize,
    gold_sum: f64,
}

impl Pairs {
    fn write(&self, path: &Path) -> Result<()> {
        write_whole(path, &self.jsonl)?;
        tracing::info!(
            "{} pairs in `{}`: mean gold score of the answers {:.3}, {:.1} % of the labels wrong",
            self.n,
            path.display(),
            self.gold_sum / (2 * self.n.max(1)) as f64,
            100.0 * self.n_wrong as f64 / self.n.max(1) as f64,
        );
        Ok(())
    }
}

impl Labeller<'_> {
    /// Labels every two answers to the same prompt; those of the same worth are left out.
    fn pairs(&self, prompts: &[Prompt], answers: &[Response], part: &str) -> Result<Pairs> {
        let k = self.config.samples_per_prompt;
        let mut pairs = Pairs::default();
        let mut index = 0;
        for (prompt, answers) in prompts.iter().zip(answers.chunks(k)) {
            let golds = answers
                .iter()
                .map(|answer| {
                    self.gold.score(&prompt.text, &answer.text).with_context(|| {
                        format!(
                            "the gold score is not defined for answers to `{}`\nhint: leave such prompts out",
                            prompt.text
                        )
                    })
                })
                .collect::<Result<Vec<f64>>>()?;
            for a in 0..k {
                for b in a + 1..k {
                    index += 1;
                    if (golds[a] - golds[b]).abs() < self.config.least_difference || answers[a].text == answers[b].text
                    {
                        continue;
                    }
                    let mut rng = self.streams.get(&format!("labels/{part}"), index);
                    let first_wins = label_pair(golds[a], golds[b], self.config.label_temperature, &mut rng);
                    let (chosen, rejected) = if first_wins { (a, b) } else { (b, a) };
                    let record = json!({
                        "prompt": prompt.messages,
                        "chosen": answers[chosen].text,
                        "rejected": answers[rejected].text,
                        "gold_chosen": golds[chosen],
                        "gold_rejected": golds[rejected],
                    });
                    writeln!(pairs.jsonl, "{record}")?;
                    pairs.n += 1;
                    pairs.n_wrong += usize::from(golds[chosen] < golds[rejected]);
                    pairs.gold_sum += golds[a] + golds[b];
                }
            }
        }
        Ok(pairs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::conversation::{Message, Role};

    fn labelled(least_difference: f64, label_temperature: f64) -> Pairs {
        let config =
            CollectConfig { samples_per_prompt: 3, least_difference, label_temperature, ..CollectConfig::default() };
        let labeller = Labeller { config: &config, gold: &GoldScorer::World, streams: Streams::new(1) };
        let text = "Tell me a story about Mia.";
        let prompt = Prompt { messages: vec![Message::new(Role::User, text)], text: text.to_owned() };
        let good = "On a warm day, Mia went to the park. Soon, Mia found an orange kite under a bench. Mia was very happy. \
                    On a warm day, a gentle owl went to the park. Soon, the owl found an orange kite under a bench.";
        let answers =
            [good, "boat boat boat", good].map(|text| Response { text: text.to_owned(), ..Response::default() });
        labeller.pairs(&[prompt], &answers, "train").unwrap()
    }

    #[test]
    fn every_two_answers_of_different_worth_make_a_pair() {
        let pairs = labelled(0.02, 1e-6); // so cold a labeller does not err
        assert_eq!((pairs.n, pairs.n_wrong), (2, 0)); // the two good answers are the same
        for line in pairs.jsonl.lines() {
            let record: serde_json::Value = serde_json::from_str(line).unwrap();
            assert_eq!(record["rejected"], "boat boat boat");
            assert_eq!(record["prompt"][0]["role"], "user");
            assert!(record["gold_chosen"].as_f64() > record["gold_rejected"].as_f64());
        }
        assert_eq!(labelled(1.1, 0.1).n, 0);
    }

    #[test]
    fn the_same_seed_gives_the_same_labels() {
        assert_eq!(labelled(0.02, 5.0).jsonl, labelled(0.02, 5.0).jsonl);
    }
}
