//! The table: every switch in every dialect, and the line of the source that says so.
//!
//! Columns are in the order of [`Dialect::ALL`]; [`SOURCES`] says which version and folder a line is in. A switch that an
//! implementation does not have stands at the value that does the same.

use common::optim::AdamStyle;

use super::{
    Dialect, KlEstimator, KlPlace, LossMean, MissingEos, ScorePosition, Switches, ValueInit, Variance, Whiten,
};

/// The version that each column was read from, and the folder of its lines.
pub const SOURCES: [&str; 7] = [
    "this program",
    "openai/lm-human-preferences, commit cbfd210, lm_human_preferences/",
    "vwxyzjn/summarize_from_feedback_details, commit ee77a9a, summarize_from_feedback_details/",
    "TRL 1.12.0, trl/experimental/ppo/",
    "OpenRLHF 0.11.2, openrlhf/",
    "verl 0.9.1, verl/",
    "microsoft/DeepSpeedExamples, commit 83757d9, applications/DeepSpeed-Chat/dschat/; \
     main.py in training/step3_rlhf_finetuning/",
];

/// One switch: its value in every dialect, with the source.
#[derive(Debug, Clone, Copy)]
pub struct Switch<T> {
    /// Its key in `[ppo]`.
    pub name: &'static str,
    /// What it decides.
    pub meaning: &'static str,
    /// Value and source by dialect.
    pub of: [(T, &'static str); 7],
}

/// Where the score joins the rewards.
pub const SCORE_POSITION: Switch<ScorePosition> = Switch {
    name: "score_position",
    meaning: "Where the score joins the rewards",
    of: [
        (ScorePosition::LastToken, "Ziegler et al., arXiv:1909.08593, equation 2"),
        (ScorePosition::FixedEnd, "train_policy.py:153"),
        (ScorePosition::AfterLast, "ppo.py:684"),
        (ScorePosition::FirstPadding, "ppo_trainer.py:778"),
        (ScorePosition::LastToken, "models/utils.py:154"),
        (ScorePosition::LastToken, "workers/reward_manager/naive.py:153"),
        (ScorePosition::LastToken, "rlhf/ppo_trainer.py:187, where padding is the end token (utils/utils.py:88)"),
    ],
};

/// What `missing_eos_score` does to the score of a response that was cut off.
pub const MISSING_EOS: Switch<MissingEos> = Switch {
    name: "missing_eos",
    meaning: "What `missing_eos_score` does to the score of a response that was cut off",
    of: [
        (MissingEos::Replace, "as lm-human-preferences and N+"),
        (MissingEos::Replace, "train_policy.py:390"),
        (MissingEos::Replace, "ppo.py:667"),
        (MissingEos::Subtract, "ppo_trainer.py:759"),
        (MissingEos::None, "trainer/ppo_utils/experience_maker.py:247: no penalty by default"),
        (MissingEos::None, "workers/reward_manager/naive.py:153: no penalty"),
        (MissingEos::None, "rlhf/ppo_trainer.py:188: no penalty"),
    ],
};

/// What is charged for a token's divergence from the reference.
pub const KL_ESTIMATOR: Switch<KlEstimator> = Switch {
    name: "kl_estimator",
    meaning: "What is charged for a token's divergence from the reference",
    of: [
        (KlEstimator::K1, "Schulman, \"Approximating KL Divergence\", 2020"),
        (KlEstimator::K1, "train_policy.py:150"),
        (KlEstimator::K1, "ppo.py:680"),
        (KlEstimator::K1, "ppo_config.py:243"),
        (KlEstimator::K1, "cli/train_ppo_ray.py:449"),
        (KlEstimator::K1, "trainer/config/algorithm.py:660"),
        (KlEstimator::K1, "rlhf/ppo_trainer.py:184"),
    ],
};

/// Where the divergence is charged.
pub const KL_PLACE: Switch<KlPlace> = Switch {
    name: "kl_place",
    meaning: "Where the divergence is charged",
    of: [
        (KlPlace::Reward, "Ziegler et al., arXiv:1909.08593, equation 2"),
        (KlPlace::Reward, "train_policy.py:151"),
        (KlPlace::Reward, "ppo.py:681"),
        (KlPlace::Reward, "ppo_trainer.py:775"),
        (KlPlace::Reward, "cli/train_ppo_ray.py:524"),
        (KlPlace::Reward, "trainer/ppo/ray_trainer.py:106, if `use_kl_in_reward`"),
        (KlPlace::Reward, "rlhf/ppo_trainer.py:184"),
    ],
};

/// Largest absolute value of that estimate; 0 sets no limit.
pub const KL_CLIP: Switch<f64> = Switch {
    name: "kl_clip",
    meaning: "Largest absolute value of that estimate; 0 sets no limit",
    of: [
        (0.0, "no limit"),
        (0.0, "train_policy.py:150"),
        (0.0, "ppo.py:680"),
        (0.0, "ppo_trainer.py:774"),
        (10.0, "models/utils.py:113"),
        (0.0, "trainer/ppo/core_algos.py:2228 (k3 has ±10, line 2245)"),
        (0.0, "rlhf/ppo_trainer.py:184"),
    ],
};

/// Whether rewards are scaled to variance 1, over the same tokens as advantages.
pub const WHITEN_REWARDS: Switch<bool> = Switch {
    name: "whiten_rewards",
    meaning: "Whether rewards are scaled to variance 1, over the same tokens as advantages",
    of: [
        (false, "as N+"),
        (true, "train_policy.py:58, 325"),
        (false, "ppo.py:50"),
        (false, "ppo_config.py:235"),
        (false, "trainer/ppo_utils/experience_maker.py:284"),
        (false, "trainer/ppo/ray_trainer.py:106"),
        (false, "rlhf/ppo_trainer.py:181"),
    ],
};

/// Which tokens advantages are whitened over.
pub const WHITEN_ADVANTAGES: Switch<Whiten> = Switch {
    name: "whiten_advantages",
    meaning: "Which tokens advantages are whitened over",
    of: [
        (Whiten::Batch, "as N+"),
        (Whiten::Minibatch, "train_policy.py:338"),
        (Whiten::Batch, "ppo.py:703"),
        (Whiten::Batch, "ppo_trainer.py:797"),
        (Whiten::Batch, "trainer/ppo_utils/experience_maker.py:332"),
        (Whiten::Batch, "trainer/ppo/core_algos.py:262"),
        (Whiten::None, "rlhf/ppo_trainer.py:308"),
    ],
};

/// The divisor of whitening's variance.
pub const WHITEN_VARIANCE: Switch<Variance> = Switch {
    name: "whiten_variance",
    meaning: "The divisor of whitening's variance",
    of: [
        (Variance::Population, "as lm-human-preferences"),
        (Variance::Population, "utils/core.py:337"),
        (Variance::Sample, "ppo.py:230"),
        (Variance::Sample, "ppo_trainer.py:259"),
        (Variance::Population, "trainer/ppo_utils/experience_maker.py:332"),
        (Variance::Sample, "utils/torch_functional.py:324"),
        (Variance::Population, "whitens nothing"),
    ],
};

/// How the losses of tokens become that of a minibatch.
pub const LOSS_MEAN: Switch<LossMean> = Switch {
    name: "loss_mean",
    meaning: "How the losses of tokens become that of a minibatch",
    of: [
        (LossMean::Token, "as N+, also over gradient accumulation"),
        (LossMean::Token, "train_policy.py:354"),
        (LossMean::Token, "ppo.py:754"),
        (LossMean::Token, "ppo_trainer.py:846"),
        (LossMean::Token, "models/loss.py:31"),
        (LossMean::Token, "trainer/config/actor/actor.yaml:86"),
        (LossMean::Token, "rlhf/ppo_trainer.py:289"),
    ],
};

/// Distance from the old value within which values are clipped.
pub const VALUE_CLIP_RANGE: Switch<f64> = Switch {
    name: "value_clip_range",
    meaning: "Distance from the old value within which values are clipped",
    of: [
        (0.2, "as lm-human-preferences"),
        (0.2, "train_policy.py:55"),
        (0.2, "ppo.py:47"),
        (0.2, "ppo_config.py:260"),
        (0.5, "cli/train_ppo_ray.py:409"),
        (0.5, "trainer/config/critic/critic.yaml:61"),
        (0.2, "rlhf/ppo_trainer.py:69"),
    ],
};

/// Factor on the value model's loss.
pub const VALUE_LOSS_COEF: Switch<f64> = Switch {
    name: "value_loss_coef",
    meaning: "Factor on the value model's loss",
    of: [
        (1.0, "an optimiser of its own"),
        (0.1, "train_policy.py:53"),
        (0.1, "ppo.py:45"),
        (0.1, "ppo_config.py:256"),
        (1.0, "trainer/ray/ppo_critic.py:152"),
        (1.0, "trainer/ppo/core_algos.py:2175"),
        (1.0, "rlhf/ppo_trainer.py:304"),
    ],
};

/// Largest absolute value of a score; 0 sets no limit.
pub const REWARD_CLIP: Switch<f64> = Switch {
    name: "reward_clip",
    meaning: "Largest absolute value of a score; 0 sets no limit",
    of: [
        (0.0, "no limit"),
        (0.0, "train_policy.py:153"),
        (0.0, "ppo.py:685"),
        (0.0, "ppo_trainer.py:779"),
        (10.0, "cli/train_ppo_ray.py:474"),
        (0.0, "workers/reward_manager/naive.py:153"),
        (5.0, "rlhf/ppo_trainer.py:67"),
    ],
};

/// Largest absolute value of `log π − log π_old`; 0 sets no limit.
pub const LOG_RATIO_CLIP: Switch<f64> = Switch {
    name: "log_ratio_clip",
    meaning: "Largest absolute value of `log π − log π_old`; 0 sets no limit",
    of: [
        (0.0, "no limit"),
        (0.0, "train_policy.py:351"),
        (0.0, "ppo.py:750"),
        (0.0, "ppo_trainer.py:842"),
        (20.0, "models/loss.py:187"),
        (20.0, "trainer/ppo/core_algos.py:1338"),
        (0.0, "rlhf/ppo_trainer.py:284"),
    ],
};

/// Where an advantage is negative, the ratio at which the loss stops growing; 0 sets no limit.
pub const DUAL_CLIP: Switch<f64> = Switch {
    name: "dual_clip",
    meaning: "Where an advantage is negative, the ratio at which the loss stops growing; 0 sets no limit",
    of: [
        (0.0, "no limit"),
        (0.0, "train_policy.py:354"),
        (0.0, "ppo.py:753"),
        (0.0, "ppo_trainer.py:845"),
        (0.0, "cli/train_ppo_ray.py:408"),
        (3.0, "trainer/ppo/core_algos.py:1323"),
        (0.0, "rlhf/ppo_trainer.py:289"),
    ],
};

/// Initial weights of the value model.
pub const VALUE_INIT: Switch<ValueInit> = Switch {
    name: "value_init",
    meaning: "Initial weights of the value model",
    of: [
        (ValueInit::RewardModel, "Stiennon et al., arXiv:2009.01325"),
        (ValueInit::ZeroHead, "language/model.py:368, on the policy's trunk"),
        (ValueInit::RewardModel, "ppo.py:482"),
        (ValueInit::RewardModel, "ppo_config.py:219"),
        (ValueInit::RewardModel, "cli/train_ppo_ray.py:648"),
        (ValueInit::ZeroHead, "utils/model.py:641: a new head, drawn at random"),
        (ValueInit::RewardModel, "rlhf/rlhf_engine.py:218"),
    ],
};

/// Where Adam's ε stands.
pub const ADAM_STYLE: Switch<AdamStyle> = Switch {
    name: "adam_style",
    meaning: "Where Adam's ε stands",
    of: [
        (AdamStyle::Torch, "as N+"),
        (AdamStyle::Tf, "utils/core.py:627"),
        (AdamStyle::Torch, "ppo.py:500"),
        (AdamStyle::Torch, "ppo_trainer.py:494"),
        (AdamStyle::Torch, "utils/deepspeed/deepspeed.py:359"),
        (AdamStyle::Torch, "trainer/config/optim/fsdp.yaml:5"),
        (AdamStyle::Torch, "rlhf/rlhf_engine.py:108"),
    ],
};

/// Added to the temperature.
pub const TEMPERATURE_EPS: Switch<f64> = Switch {
    name: "temperature_eps",
    meaning: "Added to the temperature",
    of: [
        (0.0, "none"),
        (0.0, "policy.py:121"),
        (1e-7, "ppo.py:733"),
        (1e-7, "ppo_trainer.py:822"),
        (0.0, "models/utils.py:174"),
        (0.0, "workers/engine/torchtitan/transformer_impl.py:834"),
        (0.0, "rlhf/ppo_trainer.py:155: no temperature"),
    ],
};

/// Factor on the loss on pretraining text; 0 leaves it out.
pub const PTX_COEF: Switch<f64> = Switch {
    name: "ptx_coef",
    meaning: "Factor on the loss on pretraining text; 0 leaves it out",
    of: [
        (0.0, "off"),
        (0.0, "train_policy.py:357: no such term"),
        (0.0, "ppo.py:756: no such term"),
        (0.0, "ppo_trainer.py:847: no such term"),
        (0.0, "trainer/ray/ppo_actor.py:300: no such term"),
        (0.0, "workers/utils/losses.py:101: no such term"),
        (0.0, "main.py:87: 27.8, if unsupervised data are given"),
    ],
};

/// Decay of a moving average of the policy; 0 keeps none.
pub const POLICY_EMA: Switch<f64> = Switch {
    name: "policy_ema",
    meaning: "Decay of a moving average of the policy; 0 keeps none",
    of: [
        (0.0, "off"),
        (0.0, "train_policy.py:176: none"),
        (0.0, "ppo.py:758: none"),
        (0.0, "ppo_trainer.py:849: none"),
        (0.0, "cli/train_ppo_ray.py:338: off; 0.992 if on"),
        (0.0, "none"),
        (0.0, "main.py:319: off; 0.992 if on"),
    ],
};

/// The column of `dialect`.
pub(super) const fn switches(dialect: Dialect) -> Switches {
    let at = dialect as usize;
    Switches {
        score_position: SCORE_POSITION.of[at].0,
        missing_eos: MISSING_EOS.of[at].0,
        kl_estimator: KL_ESTIMATOR.of[at].0,
        kl_place: KL_PLACE.of[at].0,
        kl_clip: KL_CLIP.of[at].0,
        whiten_rewards: WHITEN_REWARDS.of[at].0,
        whiten_advantages: WHITEN_ADVANTAGES.of[at].0,
        whiten_variance: WHITEN_VARIANCE.of[at].0,
        loss_mean: LOSS_MEAN.of[at].0,
        value_clip_range: VALUE_CLIP_RANGE.of[at].0,
        value_loss_coef: VALUE_LOSS_COEF.of[at].0,
        reward_clip: REWARD_CLIP.of[at].0,
        log_ratio_clip: LOG_RATIO_CLIP.of[at].0,
        dual_clip: DUAL_CLIP.of[at].0,
        value_init: VALUE_INIT.of[at].0,
        adam_style: ADAM_STYLE.of[at].0,
        temperature_eps: TEMPERATURE_EPS.of[at].0,
        ptx_coef: PTX_COEF.of[at].0,
        policy_ema: POLICY_EMA.of[at].0,
    }
}
