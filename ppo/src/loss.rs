//! PPO's two clipped objectives, over the response tokens of a minibatch.
//!
//! All tensors are flat, `[n_tokens]`: the response tokens of the rows at hand one after another, with no padding
//! among them and so no mask. Each function also takes `minibatch_tokens`, the number of response tokens of the
//! whole minibatch, and divides its sums by that number. So losses (and gradients and fractions) of the pieces that
//! one minibatch is accumulated from add up to those of the minibatch in one go, however unequal the pieces; without
//! accumulation it is `n_tokens`, and the sums are plain means.
//!
//! A dialect may weigh tokens otherwise, see [`Weights`]; the diagnostics are means over tokens all the same. They
//! are tensors without gradient, so that no step waits for the device to report them.

use burn::tensor::{Device, Tensor};

use crate::dialect::{KlEstimator, LossMean, Switches};

/// The policy's objective and its diagnostics, each of shape `[1]`.
#[derive(Debug, Clone)]
pub struct PolicyLoss {
    /// The clipped surrogate to minimise: sum over the tokens / `minibatch_tokens`.
    pub loss: Tensor<1>,
    /// Fraction of tokens whose loss the clip raised; adds up over pieces.
    pub clip_frac: Tensor<1>,
    /// `½·mean((log π − log π_old)²)` in nats, an estimate of the divergence from the old policy; adds up over pieces.
    pub approx_kl: Tensor<1>,
    /// Mean of `π/π_old`; adds up over pieces.
    pub ratio_mean: Tensor<1>,
    /// Largest `π/π_old` of these tokens.
    pub ratio_max: Tensor<1>,
}

/// The value function's objective and its clip fraction; each of shape `[1]`.
#[derive(Debug, Clone)]
pub struct ValueLoss {
    /// Half the clipped squared error to minimise: sum over the tokens / `minibatch_tokens`.
    pub loss: Tensor<1>,
    /// Fraction of tokens whose loss the clip raised; adds up over pieces.
    pub clip_frac: Tensor<1>,
}

/// The size of a whole minibatch, the denominator of its means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MinibatchSize {
    /// Responses.
    pub responses: usize,
    /// Numbers of all responses: tokens for the policy, values for the value model.
    pub numbers: usize,
    /// Maximum number of tokens in a response.
    pub response_length: usize,
}

/// How much each token of a minibatch counts.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant, reason = "there is one a micro-batch")]
pub enum Weights {
    /// `1/n` each.
    Equal(f32),
    /// Its own part, `[n_tokens]`.
    Each(Tensor<1>),
}

impl Weights {
    /// `1/n` for each of `n` tokens.
    const fn of(n: usize) -> Self {
        Self::Equal(n as f32)
    }

    /// Those of `loss_mean` for a piece of a minibatch whose responses have `lengths` numbers; the weights of all pieces
    /// together are those of the minibatch.
    pub fn of_responses(loss_mean: LossMean, lengths: &[usize], minibatch: MinibatchSize, device: &Device) -> Self {
        let MinibatchSize { responses, numbers, response_length } = minibatch;
        match loss_mean {
            LossMean::Token => Self::of(numbers),
            LossMean::FixedLength => Self::of(responses * response_length),
            LossMean::Sequence => {
                let each = |&length: &usize| vec![1.0 / (responses * length) as f32; length];
                let weights: Vec<f32> = lengths.iter().flat_map(each).collect();
                Self::Each(Tensor::from_floats(weights.as_slice(), device))
            }
        }
    }

    /// The weighted sum of `x`.
    fn mean(&self, x: Tensor<1>) -> Tensor<1> {
        match self {
            Self::Equal(n) => x.sum().div_scalar(*n),
            Self::Each(weights) => (x * weights.clone()).sum(),
        }
    }
}

/// Where the policy's objective is cut off; 0 sets no limit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Clips {
    /// ε of the ratio.
    pub ratio: f32,
    /// Of the logarithm of the ratio.
    pub log_ratio: f32,
    /// Of the ratio where the advantage is negative.
    pub dual: f32,
}

impl Clips {
    /// Those of `switches`, with the clip range ε.
    pub const fn of(clip_range: f64, switches: &Switches) -> Self {
        Self { ratio: clip_range as f32, log_ratio: switches.log_ratio_clip as f32, dual: switches.dual_clip as f32 }
    }
}

impl ValueLoss {
    /// The loss to minimise: `coef` times the value loss.
    pub fn priced(&self, coef: f64) -> Tensor<1> {
        if coef == 1.0 { self.loss.clone() } else { self.loss.clone() * coef }
    }
}

/// PPO's clipped surrogate objective, as a loss.
///
/// `mean(max(−A·ρ, −A·clip(ρ, 1 − ε, 1 + ε)))` with `ρ = π(a)/π_old(a) = exp(log π − log π_old)`.
/// The maximum takes the gradient away where ρ has already moved the way the advantage asks by more than ε, and
/// leaves it where ρ has moved the wrong way.
///
/// # Shapes
/// - `log_probs`: `[n_tokens]`, of the sampled tokens under the policy in training, with gradient
/// - `old_log_probs`, `advantages`: `[n_tokens]`, fixed when the response was sampled
/// - `clip_range`: ε
/// - `minibatch_tokens`: response tokens of the whole minibatch (see the module)
///
/// # Source
/// Schulman et al., arXiv:1707.06347, equation 7, with the sign of a loss; 0.2 for ε as there.
/// Averaged over tokens, not over responses and then tokens, as in lm-human-preferences and TRL.
pub fn policy_loss(
    log_probs: Tensor<1>,
    old_log_probs: Tensor<1>,
    advantages: Tensor<1>,
    clip_range: f32,
    minibatch_tokens: usize,
) -> PolicyLoss {
    let clips = Clips { ratio: clip_range, log_ratio: 0.0, dual: 0.0 };
    clipped_policy_loss(log_probs, old_log_probs, advantages, clips, &Weights::of(minibatch_tokens), minibatch_tokens)
}

/// [`policy_loss`] with the further `clips` and the `weights` of a dialect.
///
/// With `clips.dual`, c, a token of negative advantage costs no more than `−A·c`.
///
/// # Source
/// Ye et al., arXiv:1912.09729, equation 4, for the dual clip.
pub fn clipped_policy_loss(
    log_probs: Tensor<1>,
    old_log_probs: Tensor<1>,
    advantages: Tensor<1>,
    clips: Clips,
    weights: &Weights,
    minibatch_tokens: usize,
) -> PolicyLoss {
    let mean = |x: Tensor<1>| x.sum().div_scalar(minibatch_tokens as f32);
    let mut log_ratio = log_probs - old_log_probs; // [n_tokens]
    if clips.log_ratio > 0.0 {
        log_ratio = log_ratio.clamp(-clips.log_ratio, clips.log_ratio);
    }
    let ratio = log_ratio.clone().exp();
    let clipped_ratio = ratio.clone().clamp(1.0 - clips.ratio, 1.0 + clips.ratio);
    let bound = (clips.dual > 0.0).then(|| {
        let positive = advantages.clone().greater_equal_elem(0.0);
        (-advantages.clone() * clips.dual).mask_fill(positive, f32::MAX)
    });
    let unclipped = -(advantages.clone() * ratio.clone());
    let clipped = -(advantages * clipped_ratio);

    let (ratio, log_ratio) = (ratio.inner(), log_ratio.inner());
    let clip_raised = clipped.clone().inner().greater(unclipped.clone().inner());
    let larger = unclipped.max_pair(clipped);
    PolicyLoss {
        loss: weights.mean(match bound {
            Some(bound) => larger.min_pair(bound),
            None => larger,
        }),
        clip_frac: mean(clip_raised.float()),
        approx_kl: mean(log_ratio.square()).mul_scalar(0.5),
        ratio_mean: mean(ratio.clone()),
        ratio_max: ratio.max(),
    }
}

/// The divergence from the reference as a part of the policy's loss, times nothing yet.
///
/// # Shapes
/// - `log_probs`: `[n_tokens]`, with gradient
/// - `ref_log_probs`: `[n_tokens]`
/// - returns `[1]`
///
/// # Source
/// Shao et al., arXiv:2402.03300, equation 4, for k3. The estimate is within `±clip` unless that is 0, as in `OpenRLHF`,
/// `models/utils.py`, with no gradient beyond.
pub fn kl_loss(
    log_probs: Tensor<1>,
    ref_log_probs: Tensor<1>,
    estimator: KlEstimator,
    clip: f32,
    weights: &Weights,
) -> Tensor<1> {
    let mut log_ratio = ref_log_probs - log_probs; // [n_tokens]
    if clip > 0.0 && estimator == KlEstimator::K3 {
        // Beyond it k3 is above the clip, and its exponential must not overflow.
        log_ratio = log_ratio.clamp_max(clip);
    }
    let kl = match estimator {
        KlEstimator::K1 => -log_ratio,
        KlEstimator::K2 => log_ratio.square().mul_scalar(0.5),
        KlEstimator::K3 => log_ratio.clone().exp().sub_scalar(1.0) - log_ratio,
    };
    weights.mean(if clip > 0.0 { kl.clamp(-clip, clip) } else { kl })
}

/// Half the squared error of the values, clipped around the old ones.
///
/// `½·mean(max((V − R)², (clip(V, V_old − ε, V_old + ε) − R)²))`: a value that has moved more than ε from the old
/// one towards its target learns no more from this response.
///
/// # Shapes
/// - `values`: `[n_tokens]`, of the value network in training, with gradient
/// - `old_values`, `returns`: `[n_tokens]`, fixed when the response was sampled; `returns = advantages + old_values`
///   before whitening
/// - `clip_range`: ε, in units of the score
/// - `minibatch_tokens`: response tokens of the whole minibatch (see the module)
///
/// # Source
/// `vf_losses1`, `vf_losses2` in lm-human-preferences, `train_policy.py`; the clip is not in the PPO paper.
/// The coefficient `vf_coef` of a joint loss has no place here: the value network has its own optimiser, to whose
/// steps the scale of the loss makes no difference but by ε and the clip of its gradient.
pub fn value_loss(
    values: Tensor<1>,
    old_values: Tensor<1>,
    returns: Tensor<1>,
    clip_range: f32,
    minibatch_tokens: usize,
) -> ValueLoss {
    weighted_value_loss(values, old_values, returns, clip_range, &Weights::of(minibatch_tokens), minibatch_tokens)
}

/// [`value_loss`] with the `weights` of a dialect.
pub fn weighted_value_loss(
    values: Tensor<1>,
    old_values: Tensor<1>,
    returns: Tensor<1>,
    clip_range: f32,
    weights: &Weights,
    minibatch_tokens: usize,
) -> ValueLoss {
    let mean = |x: Tensor<1>| x.sum().div_scalar(minibatch_tokens as f32);
    // Bounds rather than `V_old + clip(V − V_old)`, whose rounding would move values that are not clipped.
    let clipped_values =
        values.clone().max_pair(old_values.clone().sub_scalar(clip_range)).min_pair(old_values.add_scalar(clip_range)); // [n_tokens]
    let unclipped = (values - returns.clone()).square();
    let clipped = (clipped_values - returns).square();
    let clip_raised = clipped.clone().inner().greater(unclipped.clone().inner());
    ValueLoss { loss: weights.mean(unclipped.max_pair(clipped)).mul_scalar(0.5), clip_frac: mean(clip_raised.float()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;
    use common::testing::assert_close;
    use proptest::prelude::*;

    /// Sums of a few dozen f32 terms of size 10.
    const ROUNDING: f32 = 1e-4;
    /// The hand-worked numbers, but for `exp(ln x)`.
    const ONE_EXP: f32 = 1e-6;

    fn tensor(numbers: &[f32]) -> Tensor<1> {
        Tensor::from_floats(numbers, &Device::flex().autodiff())
    }

    fn host(tensor: Tensor<1>) -> Vec<f32> {
        tensor.try_into_vec_as::<f32>().expect("f32 on the host")
    }

    /// Loss and gradient with respect to the log-probabilities.
    fn policy(log_probs: &[f32], old: &[f32], advantages: &[f32]) -> (PolicyLoss, Vec<f32>) {
        let log_probs = tensor(log_probs).require_grad();
        let result = policy_loss(log_probs.clone(), tensor(old), tensor(advantages), 0.2, old.len());
        let gradient = log_probs.grad(&result.loss.backward()).expect("a gradient");
        (result, host(gradient))
    }

    fn value(values: &[f32], old: &[f32], returns: &[f32]) -> (ValueLoss, Vec<f32>) {
        let values = tensor(values).require_grad();
        let result = value_loss(values.clone(), tensor(old), tensor(returns), 0.2, old.len());
        let gradient = values.grad(&result.loss.backward()).expect("a gradient");
        (result, host(gradient))
    }

    #[test]
    fn policy_loss_matches_hand_worked_tokens() {
        // ρ = [1.5, 0.5, 1.5, 0.5] with A = [1, 1, −1, −1]:
        // max(−1.5, −1.2) = −1.2 (clipped), max(−0.5, −0.8) = −0.5, max(1.5, 1.2) = 1.5, max(0.5, 0.8) = 0.8 (clipped).
        let log_ratios = [1.5_f32.ln(), 0.5_f32.ln(), 1.5_f32.ln(), 0.5_f32.ln()];
        let (result, gradient) = policy(&log_ratios, &[0.0; 4], &[1.0, 1.0, -1.0, -1.0]);
        assert_close(&host(result.loss), &[0.6 / 4.0], ONE_EXP);
        assert_close(&host(result.clip_frac), &[0.5], 0.0);
        assert_close(&host(result.ratio_mean), &[1.0], ONE_EXP);
        assert_close(&host(result.ratio_max), &[1.5], ONE_EXP);
        // ½·(ln² 1.5 + ln² 0.5)/2 = ½·(0.164402 + 0.480453)/2.
        assert_close(&host(result.approx_kl), &[0.161_214], ONE_EXP);
        // d(−A·ρ)/d log π = −A·ρ where not clipped, 0 where clipped, over 4 tokens.
        assert_close(&gradient, &[0.0, -0.125, 0.375, 0.0], ONE_EXP);
    }

    #[test]
    fn an_unmoved_policy_has_the_plain_policy_gradient() {
        // At ρ = 1 the two arguments of the maximum are equal: the gradient must count once, not twice or by half.
        let (result, gradient) = policy(&[-1.0, -2.0], &[-1.0, -2.0], &[3.0, -1.0]);
        assert_close(&host(result.loss), &[-1.0], 0.0);
        assert_close(&gradient, &[-1.5, 0.5], 0.0);
        assert_close(&host(result.clip_frac), &[0.0], 0.0);
        assert_close(&host(result.approx_kl), &[0.0], 0.0);
    }

    #[test]
    fn value_loss_matches_hand_worked_tokens() {
        // V_old = 0, R = 1. V = 0.1: inside, (0.9)² = 0.81. V = 0.5: clipped to 0.2, max(0.25, 0.64) = 0.64.
        // V = −0.5: clipped to −0.2, max(2.25, 1.44) = 2.25.
        let (result, gradient) = value(&[0.1, 0.5, -0.5], &[0.0; 3], &[1.0; 3]);
        assert_close(&host(result.loss), &[0.5 * 3.7 / 3.0], ONE_EXP);
        assert_close(&host(result.clip_frac), &[1.0 / 3.0], ONE_EXP);
        assert_close(&gradient, &[-0.3, 0.0, -0.5], ONE_EXP);
    }

    #[test]
    fn unmoved_values_have_the_plain_gradient_and_are_not_counted_as_clipped() {
        // Numbers whose f32 differences round, with |V − V_old| inside the range.
        let (old, values) = ([0.1, 7.3, -123.456], [0.123_456, 7.299_999, -123.444]);
        let (result, gradient) = value(&values, &old, &[1.0, 2.0, 3.0]);
        assert_close(&host(result.clip_frac), &[0.0], 0.0);
        let plain: Vec<f32> = values.iter().zip([1.0, 2.0, 3.0]).map(|(v, r)| (v - r) / 3.0).collect();
        assert_close(&gradient, &plain, 1e-5);
    }

    fn tokens() -> impl Strategy<Value = Vec<[f32; 3]>> {
        prop::collection::vec((-1.0_f32..1.0, -1.0_f32..1.0, -3.0_f32..3.0), 2..30)
            .prop_map(|tokens| tokens.into_iter().map(|(a, b, c)| [a, b, c]).collect())
    }

    fn column(tokens: &[[f32; 3]], idx: usize) -> Vec<f32> {
        tokens.iter().map(|token| token[idx]).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn pieces_add_up_to_the_minibatch(tokens in tokens(), cut in 0.0_f64..1.0) {
            let cut = 1 + (cut * (tokens.len() - 1) as f64) as usize;
            let n = tokens.len();
            let policy_piece = |piece: &[[f32; 3]]| {
                let [a, b, c] = [0, 1, 2].map(|idx| tensor(&column(piece, idx)));
                let result = policy_loss(a, b, c, 0.2, n);
                [result.loss, result.clip_frac, result.approx_kl, result.ratio_mean].map(|x| host(x)[0])
            };
            let value_piece = |piece: &[[f32; 3]]| {
                let [a, b, c] = [0, 1, 2].map(|idx| tensor(&column(piece, idx)));
                let result = value_loss(a, b, c, 0.2, n);
                [result.loss, result.clip_frac].map(|x| host(x)[0])
            };
            let (first, second) = tokens.split_at(cut.min(n - 1));
            for idx in 0..4 {
                let sum = policy_piece(first)[idx] + policy_piece(second)[idx];
                assert_close(&[sum], &[policy_piece(&tokens)[idx]], ROUNDING);
            }
            for idx in 0..2 {
                let sum = value_piece(first)[idx] + value_piece(second)[idx];
                assert_close(&[sum], &[value_piece(&tokens)[idx]], ROUNDING);
            }
        }

        #[test]
        fn the_clipped_losses_are_never_below_the_plain_ones(tokens in tokens()) {
            let [a, b, c] = [0, 1, 2].map(|idx| column(&tokens, idx));
            let n = tokens.len() as f32;
            let plain: f32 = (0..tokens.len()).map(|i| -c[i] * (a[i] - b[i]).exp()).sum::<f32>() / n;
            prop_assert!(host(policy(&a, &b, &c).0.loss)[0] >= plain - ROUNDING);
            let plain: f32 = (0..tokens.len()).map(|i| 0.5 * (a[i] - c[i]).powi(2)).sum::<f32>() / n;
            prop_assert!(host(value(&a, &b, &c).0.loss)[0] >= plain - ROUNDING);
        }

        #[test]
        fn policy_gradient_vanishes_exactly_where_the_clip_binds(tokens in tokens()) {
            let [a, b, c] = [0, 1, 2].map(|idx| column(&tokens, idx));
            let (_, gradient) = policy(&a, &b, &c);
            for i in 0..tokens.len() {
                let ratio = (a[i] - b[i]).exp();
                let margin = (ratio - 1.2).abs().min((ratio - 0.8).abs());
                prop_assume!(margin > 1e-5 && c[i].abs() > 1e-5);
                let binds = if c[i] > 0.0 { ratio > 1.2 } else { ratio < 0.8 };
                let expected = if binds { 0.0 } else { -c[i] * ratio / tokens.len() as f32 };
                assert_close(&[gradient[i]], &[expected], ROUNDING);
            }
        }
    }
}
