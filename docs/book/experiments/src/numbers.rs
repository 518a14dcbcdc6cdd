//! PPO's equations on a made-up response of five tokens.

use anyhow::{Context, Result};
use burn::tensor::Tensor;
use common::backend;
use ppo::advantage::{gae, whiten};
use ppo::kl::{k1, k2, k3};
use ppo::loss::policy_loss;
use ppo::rewards::kl_shaped;

/// Log-probabilities of the sampled tokens by the policy, in nats.
const LOG_PROBS: [f32; 5] = [-0.5, -1.0, -0.2, -2.0, -0.1];
/// And by the reference.
const REF_LOG_PROBS: [f32; 5] = [-0.6, -0.8, -0.2, -3.0, -0.3];
/// What the value model expected at each token, in units of the score.
const VALUES: [f32; 5] = [0.2, 0.3, 0.1, 0.4, 0.8];
/// The reward model's score of the response.
const SCORE: f32 = 1.0;
/// Reward per nat of divergence.
const KL_COEF: f32 = 0.05;

/// Three estimates of the divergence, and the rewards that the first one shapes.
pub(crate) fn rewards() -> String {
    // Plus 0, for no −0.
    let of = |estimate: fn(&[f32], &[f32]) -> Vec<f32>| {
        estimate(&LOG_PROBS, &REF_LOG_PROBS).iter().map(|x| x + 0.0).collect()
    };
    let kl: [Vec<f32>; 3] = [k1, k2, k3].map(of);
    let rewards = kl_shaped(&LOG_PROBS, &REF_LOG_PROBS, SCORE, KL_COEF);
    let line = |t: usize| format!("{t:>5} {:>7.3} {:>7.3} {:>7.3} {:>8.3}\n", kl[0][t], kl[1][t], kl[2][t], rewards[t]);
    let lines: String = (0..rewards.len()).map(line).collect();
    let [a, b, c] = kl.map(|kl| kl.iter().sum::<f32>());
    format!(
        "token      k1      k2      k3   reward\n{lines}  sum {a:>7.3} {b:>7.3} {c:>7.3} {:>8.3}\n",
        rewards.iter().sum::<f32>()
    )
}

/// Advantages for λ = 0, 0.95 and 1, returns, and whitened advantages.
pub(crate) fn advantages() -> String {
    let rewards = kl_shaped(&LOG_PROBS, &REF_LOG_PROBS, SCORE, KL_COEF);
    let [one_step, mixed, all] = [0.0, 0.95, 1.0].map(|lambda| gae(&rewards, &VALUES, 1.0, lambda));
    let white = whiten(&mixed, true);
    let line = |t: usize| {
        format!(
            "{t:>5} {:>7.3} {:>6.2} {:>6.3} {:>9.3} {:>6.3} {:>7.3} {:>9.3}\n",
            rewards[t],
            VALUES[t],
            one_step[t],
            mixed[t],
            all[t],
            mixed[t] + VALUES[t],
            white[t]
        )
    };
    let lines: String = (0..rewards.len()).map(line).collect();
    format!("token  reward  value    λ=0    λ=0.95    λ=1  return  whitened\n{lines}")
}

/// The objective of one token, which PPO makes large, and its slope by the log-probability.
pub(crate) fn clip() -> Result<String> {
    let line = |&ratio: &f32| {
        let ([gain, gain_slope], [loss, loss_slope]) = (objective(ratio, 1.0)?, objective(ratio, -1.0)?);
        Ok(format!("{ratio:>5} {gain:>11.2} {gain_slope:>6.2} {loss:>13.2} {loss_slope:>6.2}\n"))
    };
    let lines: Result<String> = [0.5, 0.7, 0.9, 1.0, 1.1, 1.3, 1.5].iter().map(line).collect();
    let heads = ["          advantage +1          advantage −1", "ratio   objective  slope     objective  slope"];
    Ok(format!("{}\n{}\n{}", heads[0], heads[1], lines?))
}

/// The objective of a token whose ratio is `ratio`, with ε = 0.2, and its slope by the log-probability.
pub(crate) fn objective(ratio: f32, advantage: f32) -> Result<[f32; 2]> {
    let device = backend::open(backend::DEFAULT)?.autodiff();
    let log_prob = Tensor::<1>::from_floats([ratio.ln()], &device).require_grad();
    let [old, advantage] = [0.0, advantage].map(|x| Tensor::from_floats([x], &device));
    let loss = policy_loss(log_prob.clone(), old, advantage, 0.2, 1).loss;
    let gradients = loss.backward();
    let slope = log_prob.grad(&gradients).context("the loss depends on the log-probability")?;
    // Plus 0, for no −0.
    Ok([-loss.into_scalar::<f32>(), 0.0 - slope.into_scalar::<f32>()])
}
