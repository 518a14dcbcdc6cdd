//! What implementations of PPO for language models do differently, as switches.
//!
//! A [`Dialect`] names an implementation and sets every switch as that does; [`table`] is the one place that says how, with
//! the line of its source. An [`Estimator`] without a value model sets five of them anew.

mod print;
pub mod table;

pub(crate) use print::run;
pub use print::{Row, rows};

use clap::ValueEnum;
use common::optim::AdamStyle;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The implementation whose choices the switches of `[ppo]` take by default.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize, JsonSchema, ValueEnum,
)]
#[serde(rename_all = "kebab-case")]
pub enum Dialect {
    /// The choices of this program.
    #[default]
    Kindling,
    /// `openai/lm-human-preferences` (Ziegler et al., 2019).
    LmHumanPreferences,
    /// `vwxyzjn/summarize_from_feedback_details` (Huang et al., 2024, "The N+ Implementation Details").
    NPlus,
    /// `PPOTrainer` of TRL.
    Trl,
    /// `OpenRLHF`.
    #[serde(rename = "openrlhf")]
    #[value(name = "openrlhf")]
    OpenRlhf,
    /// verl.
    Verl,
    /// DeepSpeed-Chat.
    #[serde(rename = "deepspeed-chat")]
    #[value(name = "deepspeed-chat")]
    DeepSpeedChat,
}

impl Dialect {
    /// All of them, in the order of the table's columns.
    pub const ALL: [Self; 7] = [
        Self::Kindling,
        Self::LmHumanPreferences,
        Self::NPlus,
        Self::Trl,
        Self::OpenRlhf,
        Self::Verl,
        Self::DeepSpeedChat,
    ];

    /// The name in configurations.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kindling => "kindling",
            Self::LmHumanPreferences => "lm-human-preferences",
            Self::NPlus => "n-plus",
            Self::Trl => "trl",
            Self::OpenRlhf => "openrlhf",
            Self::Verl => "verl",
            Self::DeepSpeedChat => "deepspeed-chat",
        }
    }
}

/// Estimator of the advantages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Estimator {
    /// Generalised advantage estimation, with a value model.
    #[default]
    Gae,
    /// REINFORCE leave-one-out: a response's rewards less the mean of those of the prompt's other responses.
    Rloo,
    /// Group relative: a response's rewards less the mean of the prompt's, over their standard deviation.
    Grpo,
}

impl Estimator {
    /// Whether a value model is trained beside the policy.
    pub const fn has_critic(self) -> bool {
        matches!(self, Self::Gae)
    }
}

/// Where the score joins the rewards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ScorePosition {
    /// The last response token, `<|end|>` where there is one.
    LastToken,
    /// The place after the last token, with a value of its own, where the response is shorter than `response_length`.
    AfterLast,
    /// The place after the last token, where the response is shorter than the longest of the batch.
    FirstPadding,
    /// The last of `response_length` tokens: sampling goes on after `<|end|>`, and those tokens are learned from too.
    FixedEnd,
}

impl ScorePosition {
    /// Whether each of a batch's responses, of these lengths, has a place after its last token.
    pub fn has_place_after(self, lengths: &[usize], response_length: usize) -> Vec<bool> {
        let width = match self {
            Self::LastToken | Self::FixedEnd => 0,
            Self::AfterLast => response_length,
            Self::FirstPadding => lengths.iter().copied().max().unwrap_or(0),
        };
        lengths.iter().map(|&length| length < width).collect()
    }
}

/// What `missing_eos_score` does to the score of a response that was cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum MissingEos {
    /// Takes its place.
    Replace,
    /// Is added to it: −1 is a penalty of 1.
    Subtract,
    /// Nothing.
    None,
}

/// Estimator of the divergence from the reference that is charged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum KlEstimator {
    /// `log π − log π_ref`.
    K1,
    /// Half its square.
    K2,
    /// `π_ref/π − 1 − log(π_ref/π)`.
    K3,
}

/// Where the divergence from the reference is charged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum KlPlace {
    /// In the reward of each token, by the log-probabilities of sampling.
    Reward,
    /// In the policy's loss, by those of training.
    Loss,
}

/// Which tokens advantages are whitened over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Whiten {
    /// None: they are not whitened.
    None,
    /// Those of a minibatch, each time it is learned from.
    Minibatch,
    /// Those of a step, once.
    Batch,
}

/// The divisor of a variance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Variance {
    /// The number of values.
    Population,
    /// One less.
    Sample,
}

/// How the losses of tokens become that of a minibatch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LossMean {
    /// The mean over all tokens.
    Token,
    /// The mean over responses of each one's mean.
    Sequence,
    /// The sum over responses and `response_length`.
    FixedLength,
}

/// Initial weights of the value model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ValueInit {
    /// The reward model with its head.
    RewardModel,
    /// The reward model's trunk with a head of zeros: no response is worth more than another at first.
    ZeroHead,
}

/// Every switch with its value.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Switches {
    /// Where the score joins the rewards.
    pub score_position: ScorePosition,
    /// The score of a response that was cut off.
    pub missing_eos: MissingEos,
    /// What is charged for a token's divergence from the reference.
    pub kl_estimator: KlEstimator,
    /// Where it is charged.
    pub kl_place: KlPlace,
    /// Largest absolute value of that estimate, in nats; 0 sets no limit.
    pub kl_clip: f64,
    /// Whether rewards are scaled to variance 1, over the same tokens as advantages.
    pub whiten_rewards: bool,
    /// Which tokens advantages are whitened over.
    pub whiten_advantages: Whiten,
    /// The divisor of whitening's variance, and of a group's.
    pub whiten_variance: Variance,
    /// How the losses of tokens become that of a minibatch.
    pub loss_mean: LossMean,
    /// Distance from the old value within which values are clipped.
    pub value_clip_range: f64,
    /// Factor on the value model's loss.
    pub value_loss_coef: f64,
    /// Largest absolute value of a score; 0 sets no limit.
    pub reward_clip: f64,
    /// Largest absolute value of `log π − log π_old`; 0 sets no limit.
    pub log_ratio_clip: f64,
    /// Where an advantage is negative, the ratio at which the loss stops growing; 0 sets no limit.
    pub dual_clip: f64,
    /// Initial weights of the value model.
    pub value_init: ValueInit,
    /// Where Adam's ε stands.
    pub adam_style: AdamStyle,
    /// Added to the temperature.
    pub temperature_eps: f64,
    /// Factor on the loss on pretraining text beside the policy's; 0 leaves it out.
    pub ptx_coef: f64,
    /// Decay of a moving average of the policy; 0 keeps none.
    pub policy_ema: f64,
}

impl Switches {
    /// The switches of `dialect`, with those that `estimator` sets.
    pub const fn of(dialect: Dialect, estimator: Estimator) -> Self {
        let switches = table::switches(dialect);
        match estimator {
            Estimator::Gae => switches,
            Estimator::Rloo => Self { whiten_rewards: false, whiten_advantages: Whiten::None, ..switches },
            Estimator::Grpo => Self {
                whiten_rewards: false,
                whiten_advantages: Whiten::None,
                whiten_variance: Variance::Sample,
                kl_estimator: KlEstimator::K3,
                kl_place: KlPlace::Loss,
                loss_mean: LossMean::Sequence,
                ..switches
            },
        }
    }

    /// Names of the switches that have another value than in `other`, in the alphabet's order.
    ///
    /// # Errors
    /// If a value has no form in JSON.
    pub fn differing_from(&self, other: &Self) -> Result<Vec<String>, serde_json::Error> {
        let (ours, theirs) = (serde_json::to_value(self)?, serde_json::to_value(other)?);
        let fields = ours.as_object().into_iter().flatten();
        let differing = fields.filter(|(name, value)| theirs[*name] != **value).map(|(name, _)| name.clone());
        let mut names: Vec<String> = differing.collect();
        names.sort();
        Ok(names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_the_one_that_configurations_have() {
        for dialect in Dialect::ALL {
            assert_eq!(serde_json::to_value(dialect).expect("a string"), dialect.name());
        }
    }

    #[test]
    fn a_place_after_the_last_token_is_within_the_width() {
        let lengths = [3, 5, 4];
        let after = |position: ScorePosition| position.has_place_after(&lengths, 6);
        assert_eq!(after(ScorePosition::AfterLast), [true, true, true]);
        assert_eq!(after(ScorePosition::FirstPadding), [true, false, true]);
        assert_eq!(after(ScorePosition::LastToken), [false; 3]);
        assert_eq!(after(ScorePosition::FixedEnd), [false; 3]);
    }
}
