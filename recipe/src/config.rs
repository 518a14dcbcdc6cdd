//! `recipe.toml`: which stages, from which seed, on which data, and how they are evaluated.

use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::doctor::DoctorConfig;
use crate::gold::GoldConfig;
use crate::overoptimise::config::OveroptimiseConfig;
use crate::steps::Step;
use toy::WorldConfig;

/// A recipe's own TOML file; the stages have one each beside it.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RecipeConfig {
    /// Title of the report.
    pub title: String,
    /// Random seed of all steps; takes precedence over the `seed` of a stage's file.
    pub seed: u64,
    /// Training stages to run, in this order: `pretrain`, `sft`, `reward-model`, `ppo`, `rloo`, `dpo`. All but the last two by default, or with
    /// `init` those after `pretrain`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("items" = serde_json::json!({ "enum": ["pretrain", "sft", "reward-model", "ppo", "rloo", "dpo"] })))]
    pub stages: Option<Vec<Step>>,
    /// Model to start from, a checkpoint or a directory in Hugging Face layout: the initial model of SFT, or of pretraining
    /// if `stages` names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init: Option<PathBuf>,
    /// Generated world of stories. With this table the recipe generates its own data, and `$DATA/` stands for the folder of
    /// the generated files.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub world: Option<WorldConfig>,
    /// Gold score: the true quality of an answer, where it is known. No model is trained on it; it labels the pairs of
    /// `[collect]` and is reported.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub gold: Option<GoldConfig>,
    /// Preference pairs of the SFT model's own answers, labelled by a simulated labeller; the reward model then learns from
    /// them instead of the files in `reward-model.toml`. Needs `[gold]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub collect: Option<CollectConfig>,
    /// Examination of SFT model, reward model and data before PPO, as `ppo doctor` makes it; its checks are in the report.
    pub doctor: DoctorConfig,
    /// Evaluation of the base model, the SFT model and the policies after PPO, RLOO and DPO on held-out prompts, for the report.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evaluate: Option<EvaluateConfig>,
    /// Curves of gold and proxy against the distance from the SFT model, as `recipe overoptimise` measures them; `recipe run` does not
    /// look at it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overoptimise: Option<OveroptimiseConfig>,
}

/// `[collect]`: pairs of the SFT model's own answers, labelled by the simulated labeller.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CollectConfig {
    /// Prompts of the training and validation pairs (`.jsonl`). Required.
    pub prompts: PathBuf,
    /// Prompts of the test pairs; if empty, there are none.
    pub test_prompts: PathBuf,
    /// Number of prompts used, from the beginning of `prompts`; 0 uses all.
    pub n_prompts: usize,
    /// Number of these prompts, from the end, whose pairs are for validation.
    pub n_val_prompts: usize,
    /// Number of answers sampled to each prompt; every two of them form a pair.
    #[schemars(range(min = 2, max = 1000))]
    pub samples_per_prompt: usize,
    /// Sampling temperature.
    #[schemars(extend("exclusiveMinimum" = 0), range(max = 1000))]
    pub temperature: f64,
    /// Maximum number of tokens in an answer.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_tokens: usize,
    /// Who labels the pairs.
    pub labels: LabelledBy,
    /// With `labels = "people"`, number of decisions after which the recipe goes on; 0 waits until every pair has one.
    pub n_labels: usize,
    /// Which pairs people are asked about first.
    pub order: LabelOrder,
    /// With `order = "uncertain"`, the reward model of an earlier run, with the same tokenizer, whose scores say so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub order_by: Option<PathBuf>,
    /// Temperature of the simulated labeller, in units of the gold score; the higher, the more labels are wrong.
    #[schemars(extend("exclusiveMinimum" = 0), range(max = 1_000_000))]
    pub label_temperature: f64,
    /// Smallest difference in gold score between the answers of a pair; closer pairs are discarded.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub least_difference: f64,
    /// Number of answers decoded at once.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub batch_size: usize,
}

impl Default for CollectConfig {
    fn default() -> Self {
        Self {
            prompts: PathBuf::new(),
            test_prompts: PathBuf::new(),
            n_prompts: 0,
            n_val_prompts: 200,
            samples_per_prompt: 2,
            temperature: 1.0,
            max_tokens: 128,
            labels: LabelledBy::default(),
            n_labels: 200,
            order: LabelOrder::default(),
            order_by: None,
            label_temperature: toy::labeller::TEMPERATURE,
            least_difference: 0.02,
            batch_size: 64,
        }
    }
}

/// Who says which of two answers is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LabelledBy {
    /// A labeller who prefers the answer of the higher gold score, and errs where two are close.
    #[default]
    Simulated,
    /// People, through `reward-model label`: the recipe stops, says how, and goes on when there are enough labels.
    People,
}

/// In which order people are asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LabelOrder {
    /// In that of the prompts, one pair of each before the second of any.
    #[default]
    Prompts,
    /// Pairs whose scores by an earlier reward model are nearest come first: it knows least about them.
    Uncertain,
}

/// `[evaluate]`: answers of the base model, the SFT model and the policies after PPO, RLOO and DPO to prompts that none was trained on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EvaluateConfig {
    /// Held-out prompts that every model answers (`.jsonl`). Required.
    pub prompts: PathBuf,
    /// Number of prompts used, from the beginning of `prompts`; 0 uses all.
    pub n_prompts: usize,
    /// Preference pairs for the accuracy of the reward model; the test pairs of `[collect]` by default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pairs: Option<PathBuf>,
    /// Sampling temperature; 0 always takes the most likely token.
    #[schemars(range(min = 0, max = 1000))]
    pub temperature: f64,
    /// Maximum number of tokens in an answer.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub max_tokens: usize,
    /// Form in which the prompt is given to the base model, which has seen no conversations.
    pub base_prompt: BasePrompt,
    /// Numbers of answers of the SFT model of which the reward model chooses the best one, reported beside the policies; estimated
    /// without bias from as many answers to each prompt as the largest of them. None by default.
    #[schemars(inner(range(min = 1, max = 10_000)))]
    pub best_of: Vec<usize>,
    /// Number of answers decoded at once.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub batch_size: usize,
}

impl Default for EvaluateConfig {
    fn default() -> Self {
        Self {
            prompts: PathBuf::new(),
            n_prompts: 0,
            pairs: None,
            temperature: 1.0,
            max_tokens: 128,
            base_prompt: BasePrompt::default(),
            best_of: Vec::new(),
            batch_size: 64,
        }
    }
}

/// Form in which a prompt is given to the pretrained model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum BasePrompt {
    /// `<|bos|>`, the prompt and a line break, as text to continue.
    #[default]
    Raw,
    /// The chat format, whose special tokens the model has never seen.
    Chat,
}

impl RecipeConfig {
    /// Checks the constraints that the types do not express.
    ///
    /// # Errors
    /// Naming the key that is out of range or lacks another.
    pub fn validate(&self) -> Result<()> {
        if let Some(stages) = &self.stages {
            ensure!(!stages.is_empty(), "`stages` names no stage");
            if let Some(step) = stages.iter().find(|step| !step.trains()) {
                bail!("`stages` names `{step}`, expected `pretrain`, `sft`, `reward-model`, `ppo`, `rloo` or `dpo`");
            }
            ensure!(stages.is_sorted_by(|a, b| a < b), "`stages` must be in the order in which they run, each once");
        }
        if let Some(gold) = &self.gold {
            gold.validate()?;
        }
        if let Some(world) = &self.world {
            world.validate().context("invalid `[world]`")?;
        }
        if let Some(collect) = &self.collect {
            collect.validate().context("invalid `[collect]`")?;
            ensure!(
                self.gold.is_some() || collect.labels == LabelledBy::People,
                "`[collect]` needs `[gold]`: the simulated labeller prefers the answer of the higher gold score\n\
                 hint: add `[gold]`, set `collect.labels` to \"people\", or give the reward model pairs of your own in \
                 reward-model.toml"
            );
            ensure!(
                self.gold.is_some() || collect.test_prompts.as_os_str().is_empty(),
                "`collect.test_prompts` needs `[gold]`: pairs for the report alone are not shown to people\n\
                 hint: leave it out, or name labelled pairs as `evaluate.pairs`"
            );
        }
        if let Some(overoptimise) = &self.overoptimise {
            overoptimise.validate().context("invalid `[overoptimise]`")?;
        }
        if let Some(evaluate) = &self.evaluate {
            evaluate.validate().context("invalid `[evaluate]`")?;
            let has = |step| self.stages().contains(&step);
            let samples = has(Step::Ppo)
                || has(Step::Rloo)
                || has(Step::Dpo) && has(Step::RewardModel)
                || !evaluate.best_of.is_empty();
            ensure!(
                evaluate.temperature > 0.0 || !samples,
                "`evaluate.temperature` is 0, but divergence from the SFT model and the best of several answers are measured on \
                 sampled answers\nhint: set it above 0; as in PPO's rollouts is best"
            );
            ensure!(
                evaluate.best_of.is_empty() || has(Step::Sft) && has(Step::RewardModel),
                "`evaluate.best_of` needs the stages `sft`, which answers, and `reward-model`, which chooses\nhint: name both in `stages`"
            );
        }
        Ok(())
    }

    /// Training stages to run, in order.
    pub fn stages(&self) -> Vec<Step> {
        let wanted =
            |step: &Step| step.trains() && !step.is_extra() && (self.init.is_none() || *step != Step::Pretrain);
        self.stages.clone().unwrap_or_else(|| Step::ALL.into_iter().filter(wanted).collect())
    }

    /// The steps of the recipe, in order.
    pub fn steps(&self) -> Vec<Step> {
        let stages = self.stages();
        let has = |step: &Step| match step {
            Step::World => self.world.is_some(),
            Step::Tokenizer => stages.contains(&Step::Pretrain) && self.init.is_none(),
            Step::Collect => self.collect.is_some(),
            Step::Evaluate => self.evaluate.is_some(),
            stage => stages.contains(stage),
        };
        Step::ALL.into_iter().filter(has).collect()
    }

    /// Every path that is given.
    pub(crate) fn paths_mut(&mut self) -> Vec<&mut PathBuf> {
        let mut paths: Vec<&mut PathBuf> = self.init.iter_mut().collect();
        if let Some(collect) = &mut self.collect {
            paths.extend([&mut collect.prompts, &mut collect.test_prompts]);
            paths.extend(&mut collect.order_by);
        }
        if let Some(evaluate) = &mut self.evaluate {
            paths.push(&mut evaluate.prompts);
            paths.extend(&mut evaluate.pairs);
        }
        paths.extend(self.overoptimise.iter_mut().map(|overoptimise| &mut overoptimise.prompts));
        paths.extend(self.gold.iter_mut().filter_map(|gold| gold.words.as_mut()));
        paths.retain(|path| !path.as_os_str().is_empty());
        paths
    }
}

impl CollectConfig {
    fn validate(&self) -> Result<()> {
        ensure!(!self.prompts.as_os_str().is_empty(), "`prompts` names no file");
        ensure!(
            self.n_prompts == 0 || self.n_val_prompts < self.n_prompts,
            "`n_val_prompts` {} leaves nothing to train on of `n_prompts` {}",
            self.n_val_prompts,
            self.n_prompts
        );
        ensure!(
            self.order == LabelOrder::Prompts || self.labels == LabelledBy::People,
            "`order` is for pairs that people label\nhint: set `labels` to \"people\", or leave it out"
        );
        ensure!(
            (self.order == LabelOrder::Uncertain) == self.order_by.is_some(),
            "`order = \"uncertain\"` and `order_by`, the reward model that is uncertain, belong together"
        );
        Ok(())
    }
}

impl EvaluateConfig {
    fn validate(&self) -> Result<()> {
        ensure!(!self.prompts.as_os_str().is_empty(), "`prompts` names no file");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(toml: &str) -> RecipeConfig {
        toml::from_str(toml).unwrap()
    }

    #[test]
    fn steps_follow_from_the_sections() {
        assert_eq!(config("stages = [\"pretrain\"]\n").steps(), [Step::Tokenizer, Step::Pretrain]);
        assert_eq!(config("").stages().len(), 4);
        let all = "[gold]\nkind = \"world\"\n[collect]\nprompts = \"p\"\n[evaluate]\nprompts = \"q\"\n";
        assert_eq!(config(all).steps().len(), Step::ALL.len() - 3); // all but the world, RLOO and DPO
        let with_dpo = "init = \"m\"\nstages = [\"sft\", \"dpo\"]";
        assert_eq!(config(with_dpo).steps(), [Step::Sft, Step::Dpo]);
    }

    #[test]
    fn a_recipe_that_starts_from_a_model_does_not_pretrain_unless_it_says_so() {
        assert_eq!(config("init = \"m\"").steps(), [Step::Sft, Step::RewardModel, Step::Ppo]);
        let more = config("init = \"m\"\nstages = [\"pretrain\", \"sft\"]");
        assert_eq!(more.steps(), [Step::Pretrain, Step::Sft]); // with the model's own tokenizer
    }

    #[test]
    fn greedy_answers_are_refused_only_where_a_divergence_is_measured() {
        let greedy = "[evaluate]\nprompts = \"q\"\ntemperature = 0\n";
        let error = config(greedy).validate().unwrap_err().to_string();
        assert!(error.contains("`evaluate.temperature` is 0") && error.contains("hint:"), "{error}");
        config(&format!("stages = [\"pretrain\", \"sft\"]\n{greedy}")).validate().unwrap();
        config(&format!("stages = [\"sft\", \"dpo\"]\n{greedy}")).validate().unwrap();
        let with_reward_model = format!("stages = [\"sft\", \"reward-model\", \"dpo\"]\n{greedy}");
        config(&with_reward_model).validate().unwrap_err();
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        for (section, key, value) in [
            ("evaluate", "temperature", "nan"),
            ("evaluate", "temperature", "inf"),
            ("collect", "temperature", "nan"),
            ("collect", "temperature", "0"),
            ("collect", "label_temperature", "inf"),
            ("collect", "least_difference", "nan"),
            ("collect", "samples_per_prompt", "1"),
            ("collect", "max_tokens", "0"),
        ] {
            let text = format!("[gold]\nkind = \"world\"\n[{section}]\nprompts = \"p\"\n{key} = {value}\n");
            let error = common::config::parse::<RecipeConfig>(&text, std::path::Path::new("recipe.toml"), &[])
                .unwrap_err()
                .to_string();
            assert!(error.contains(&format!("expected `{section}.{key}` to be")), "{text}: {error}");
        }
    }
}
