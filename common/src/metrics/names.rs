//! The names under which metrics are recorded, each with its meaning. KL and entropy are in nats; averages over tokens leave
//! out padding.

/// Declares each name as a constant, and [`ALL`] of them with their doc comments.
macro_rules! names {
    ($($(#[doc = $doc:literal])+ $name:ident = $value:literal;)+) => {
        $($(#[doc = $doc])+ pub const $name: &str = $value;)+

        /// Every name with its meaning, in the order of the stages.
        pub const ALL: &[(&str, &str)] = &[$(($value, concat!($($doc),+))),+];
    };
}

names! {
    /// Training loss of the step: cross-entropy in nats per trained token; for a reward model the pairwise loss, with the
    /// centring term; for DPO the mean loss of a pair.
    TRAIN_LOSS = "train/loss";
    /// Mean cross-entropy of a token of the pretraining text that PPO learns from beside the scores, in nats, before
    /// `ppo.ptx_coef`; mean over minibatches.
    TRAIN_PTX_LOSS = "train/ptx_loss";
    /// Learning rate of the step; of the policy in PPO.
    TRAIN_LR = "train/lr";
    /// Global norm of the gradient before clipping; of the policy in PPO.
    TRAIN_GRAD_NORM = "train/grad_norm";
    /// Trained tokens per second of wall time; evaluation and saving do not count.
    TRAIN_TOKENS_PER_SECOND = "train/tokens_per_second";
    /// Held-out loss in the unit of `train/loss`; for a reward model without the centring term.
    VAL_LOSS = "val/loss";
    /// Held-out loss in bits per byte of text, which does not depend on the tokenizer.
    VAL_BITS_PER_BYTE = "val/bits_per_byte";
    /// Fraction of the training pairs whose chosen response scores higher.
    TRAIN_ACCURACY = "train/accuracy";
    /// Mean score of the chosen minus the rejected response, over the training pairs.
    TRAIN_MARGIN = "train/margin";
    /// `train/accuracy`, or for DPO `rewards/accuracies`, on held-out pairs; for SFT, the fraction of the assistant's tokens that
    /// are predicted correctly.
    VAL_ACCURACY = "val/accuracy";
    /// `train/margin`, or for DPO `rewards/margins`, on held-out pairs.
    VAL_MARGIN = "val/margin";
    /// Fraction of the held-out pairs whose chosen response is the longer one: the baseline that `val/accuracy` has to beat.
    VAL_LONGER_WINS_ACCURACY = "val/longer_wins_accuracy";
    /// Implicit reward `β·(log π − log π_ref)` of the chosen response, summed over its tokens, mean over the pairs of the step.
    REWARDS_CHOSEN = "rewards/chosen";
    /// The same of the rejected response.
    REWARDS_REJECTED = "rewards/rejected";
    /// Fraction of the pairs whose chosen response has the higher implicit reward; equal rewards count half.
    REWARDS_ACCURACIES = "rewards/accuracies";
    /// Mean of `rewards/chosen` less `rewards/rejected`, pair by pair.
    REWARDS_MARGINS = "rewards/margins";
    /// Log-probability of the chosen response under the policy, summed over its tokens, mean over the pairs of the step.
    LOGPS_CHOSEN = "logps/chosen";
    /// The same of the rejected response.
    LOGPS_REJECTED = "logps/rejected";
    /// Mean score of answers to held-out prompts.
    VAL_SCORE = "val/score";
    /// `objective/score_std_members` of answers to held-out prompts.
    VAL_SCORE_STD_MEMBERS = "val/score_std_members";
    /// `objective/kl` of answers to held-out prompts.
    VAL_KL = "val/kl";
    /// `rollout/response_length` of answers to held-out prompts.
    VAL_RESPONSE_LENGTH = "val/response_length";
    /// `rollout/eos_rate` of answers to held-out prompts.
    VAL_EOS_RATE = "val/eos_rate";
    /// Share of comparisons in which an answer to a held-out prompt scores above a damaged form of it: empty, cut, repeated or to
    /// another prompt.
    VAL_ORDER_ACCURACY = "val/order_accuracy";
    /// The policy's held-out loss on pretraining text, in nats per token: what PPO costs it as a language model.
    VAL_PTX_LOSS = "val/ptx_loss";
    /// KL divergence from the reference policy, summed over the tokens of a response (estimator k1), averaged over responses.
    OBJECTIVE_KL = "objective/kl";
    /// KL coefficient: reward lost per nat of divergence.
    OBJECTIVE_KL_COEF = "objective/kl_coef";
    /// `−Σ log π` at the sampling temperature, summed over the tokens of a response, averaged over responses. A sum, where
    /// `policy/entropy` is a mean per token.
    OBJECTIVE_ENTROPY = "objective/entropy";
    /// Mean score that PPO trains on: the reward model's, or `ppo.missing_eos_score` for a response that was cut off. `ppo eval`
    /// reports the reward model's score of every response.
    OBJECTIVE_SCORE = "objective/score";
    /// Standard deviation of the scores that several reward models give a response, averaged over responses: how far they disagree.
    OBJECTIVE_SCORE_STD_MEMBERS = "objective/score_std_members";
    /// `objective/score` plus `objective/non_score_reward`.
    OBJECTIVE_RLHF_REWARD = "objective/rlhf_reward";
    /// KL penalty, summed over the tokens of a response, averaged over responses; negative once the policy has moved.
    OBJECTIVE_NON_SCORE_REWARD = "objective/non_score_reward";
    /// Clipped policy loss, mean over minibatches.
    POLICY_LOSS = "policy/loss";
    /// `½·mean((log ratio)²)` between the updated and the sampling policy.
    POLICY_APPROX_KL = "policy/approx_kl";
    /// Fraction of the response tokens whose probability ratio was clipped.
    POLICY_CLIP_FRAC = "policy/clip_frac";
    /// Mean probability ratio; 1 before the first update.
    POLICY_RATIO_MEAN = "policy/ratio_mean";
    /// Largest probability ratio.
    POLICY_RATIO_MAX = "policy/ratio_max";
    /// Entropy of the policy's next-token distribution, mean over response tokens.
    POLICY_ENTROPY = "policy/entropy";
    /// Clipped value loss, mean over minibatches.
    VALUE_LOSS = "value/loss";
    /// Fraction of the response tokens whose value was clipped.
    VALUE_CLIP_FRAC = "value/clip_frac";
    /// `1 − Var(returns − values) / Var(returns)`; 1 is a value function that is right up to a constant, 0 a constant.
    VALUE_EXPLAINED_VARIANCE = "value/explained_variance";
    /// `train/grad_norm` of the value model.
    VALUE_GRAD_NORM = "value/grad_norm";
    /// Mean number of tokens in a response, `<|end|>` included.
    ROLLOUT_RESPONSE_LENGTH = "rollout/response_length";
    /// Fraction of the responses that end with `<|end|>`.
    ROLLOUT_EOS_RATE = "rollout/eos_rate";
    /// Share of a response's pieces of 4 tokens that occurred in it before, averaged over responses.
    ROLLOUT_REPETITION = "rollout/repetition";
    /// Seconds spent sampling.
    TIMING_ROLLOUT = "timing/rollout";
    /// Seconds spent on log-probabilities of the reference, scores and values.
    TIMING_SCORE = "timing/score";
    /// Seconds spent in the PPO epochs.
    TIMING_UPDATE = "timing/update";
    /// Mean gold score of the responses of a rollout, where the recipe has one.
    GOLD_SCORE = "gold/score";
    /// Mean gold score of answers to held-out prompts.
    GOLD_VAL_SCORE = "gold/val_score";
}

/// The metrics on the console, in this order; the rest is for the file.
pub(super) const ON_CONSOLE: [&str; 20] = [
    TRAIN_LOSS,
    TRAIN_ACCURACY,
    REWARDS_ACCURACIES,
    REWARDS_MARGINS,
    VAL_LOSS,
    VAL_BITS_PER_BYTE,
    VAL_ACCURACY,
    VAL_SCORE,
    VAL_KL,
    VAL_EOS_RATE,
    VAL_PTX_LOSS,
    OBJECTIVE_SCORE,
    GOLD_SCORE,
    GOLD_VAL_SCORE,
    OBJECTIVE_KL,
    ROLLOUT_RESPONSE_LENGTH,
    ROLLOUT_EOS_RATE,
    POLICY_CLIP_FRAC,
    TRAIN_LR,
    TRAIN_TOKENS_PER_SECOND,
];

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;
    use std::path::Path;

    use super::*;

    #[test]
    fn the_page_of_metrics_lists_every_name() {
        let mut page = String::from(
            "# Metrics\n\nThis file is generated from `common/src/metrics/names.rs` (`UPDATE_SNAPSHOTS=1 cargo test --release -p \
             common`).\n\nA run writes one JSON object a line to `metrics.jsonl`: `step`, `seconds` (wall time since the stage \
             began, carried over a resume), `tokens` and the\nnumbers below, as far as the stage has them. A number that is not \
             finite is left out. KL and entropy are in nats; means over tokens\nleave out padding. The console shows a selection \
             under the same names, without `train/` and `objective/`.\n\n| name | meaning |\n| --- | --- |\n",
        );
        for (name, meaning) in ALL {
            let _ = writeln!(page, "| `{name}` | {} |", meaning.trim());
        }
        base::testing::assert_snapshot(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/metrics.md"), &page);
    }
}
