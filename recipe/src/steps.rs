//! The steps of a recipe.

use std::fmt;

use common::session::Outcome;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How far a step came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// To its end.
    Finished,
    /// To where the user stopped it.
    Interrupted,
    /// To where people have to do something.
    Waiting,
}

impl From<Outcome> for Progress {
    fn from(outcome: Outcome) -> Self {
        match outcome {
            Outcome::Finished => Self::Finished,
            Outcome::Interrupted => Self::Interrupted,
        }
    }
}

/// One step of a recipe, in the order in which they run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Step {
    /// Generate the data of a recipe that brings its own world.
    World,
    /// Learn the tokenizer.
    Tokenizer,
    /// Next-token prediction on text.
    Pretrain,
    /// Supervised fine-tuning on conversations.
    Sft,
    /// Sample preference pairs from the SFT model and label them.
    Collect,
    /// Train the reward model on preference pairs.
    RewardModel,
    /// Improve the SFT model by PPO against the reward model.
    Ppo,
    /// Improve the SFT model against the reward model without a value model: several answers to a prompt, each measured
    /// against the others.
    Rloo,
    /// Train the SFT model on the preference pairs themselves, without a reward model.
    Dpo,
    /// Answer the held-out prompts with every policy and score the answers.
    Evaluate,
}

impl Step {
    /// Every step, in running order.
    pub const ALL: [Self; 10] = [
        Self::World,
        Self::Tokenizer,
        Self::Pretrain,
        Self::Sft,
        Self::Collect,
        Self::RewardModel,
        Self::Ppo,
        Self::Rloo,
        Self::Dpo,
        Self::Evaluate,
    ];

    /// Name in commands, directories and reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::World => "world",
            Self::Tokenizer => "tokenizer",
            Self::Pretrain => "pretrain",
            Self::Sft => "sft",
            Self::Collect => "collect",
            Self::RewardModel => "reward-model",
            Self::Ppo => "ppo",
            Self::Rloo => "rloo",
            Self::Dpo => "dpo",
            Self::Evaluate => "evaluate",
        }
    }

    /// The steps that train and leave a checkpoint.
    pub fn trains(self) -> bool {
        matches!(self, Self::Pretrain | Self::Sft | Self::RewardModel | Self::Ppo | Self::Rloo | Self::Dpo)
    }

    /// Those that run only where `stages` names them.
    pub fn is_extra(self) -> bool {
        matches!(self, Self::Rloo | Self::Dpo)
    }

    /// The steps that train a policy against the reward model.
    pub fn follows_scores(self) -> bool {
        matches!(self, Self::Ppo | Self::Rloo)
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_ordered_as_they_run_and_named_as_in_commands() {
        assert!(Step::ALL.is_sorted());
        for step in Step::ALL {
            assert_eq!(serde_json::to_value(step).unwrap(), step.name());
        }
    }
}
