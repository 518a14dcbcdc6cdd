//! Sampling responses, and what reference policy, reward model and value model make of them.

use anyhow::{Context, ensure};
use burn::tensor::Tensor;
use common::generate::{Finish, GenerateOptions, Generated, SamplingConfig, generate};
use common::kernels;
use common::loss;
use common::model::{Gpt, Layout, ScalarGpt};
use common::rng::Streams;
use common::scoring::{by_length, score_rows};
use common::tokenizer::Tokenizer;
use serde_json::{Value, json};

use crate::Gold;
use crate::advantage::{gae, whiten};
use crate::config::PpoSection;
use crate::data::{Prompt, ResponseBatch};
use crate::kl::k1;
use crate::rewards::{kl_shaped, score_of_ended};

/// A sampled response and what the frozen models say of it.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Rollout {
    /// What was answered.
    pub(crate) prompt: Prompt,
    /// The sampled tokens, with `<|end|>` where there is one; at least one.
    pub(crate) response: Vec<u32>,
    /// The response as text.
    pub(crate) text: String,
    /// Whether `<|end|>` was sampled.
    pub(crate) ended: bool,
    /// Of each response token under the policy that sampled it, at the sampling temperature.
    pub(crate) log_probs: Vec<f32>,
    /// The same under the reference policy.
    pub(crate) ref_log_probs: Vec<f32>,
    /// The reward model's score.
    pub(crate) raw_score: f32,
    /// The score that counts: [`score_of_ended`] of the raw one.
    pub(crate) score: f32,
    /// The true reward, where the recipe knows it.
    pub(crate) gold: Option<f64>,
}

impl Rollout {
    /// Divergence from the reference policy in nats, estimator k1 summed over the response.
    pub(crate) fn kl(&self) -> f64 {
        k1(&self.log_probs, &self.ref_log_probs).iter().map(|&kl| f64::from(kl)).sum()
    }

    /// The line of `rollouts.jsonl` or `samples.jsonl`.
    pub(crate) fn to_json(&self) -> Value {
        let mut line = json!({
            "prompt": self.prompt.text,
            "response": self.text,
            "score": self.score,
            "kl": self.kl(),
            "length": self.response.len(),
            "finish": if self.ended { "stop" } else { "length" },
        });
        if let Some(gold) = self.gold {
            line["gold"] = json!(gold);
        }
        line
    }
}

/// How prompts are answered.
#[derive(Debug)]
pub(crate) struct Sampling<'a> {
    /// Log-probabilities are those at its temperature.
    pub(crate) config: SamplingConfig,
    /// Seeds the tokens.
    pub(crate) streams: Streams,
    pub(crate) tokenizer: &'a Tokenizer,
}

impl<'a> Sampling<'a> {
    /// The policy's own distribution at a temperature, up to `<|end|>` or `max_tokens`.
    pub(crate) fn new(temperature: f64, max_tokens: usize, streams: Streams, tokenizer: &'a Tokenizer) -> Self {
        let stop = vec![tokenizer.specials().end];
        Self {
            config: SamplingConfig { temperature, max_tokens, stop, ..SamplingConfig::default() },
            streams,
            tokenizer,
        }
    }

    /// Answers `prompts`; row `i` draws from stream `first_row + i`. The policy is on a plain device.
    pub(crate) fn answer(&self, policy: &Gpt, prompts: &[Prompt], first_row: u64) -> anyhow::Result<Vec<Generated>> {
        let ids: Vec<Vec<u32>> = prompts.iter().map(|prompt| prompt.ids.clone()).collect();
        generate(policy, &ids, &self.config, &self.streams, first_row, GenerateOptions::default())
            .context("failed to sample responses")
    }
}

/// The frozen models, which judge responses; on a plain device.
pub(crate) struct Judge<'a> {
    /// The initial policy.
    pub(crate) reference: Gpt,
    pub(crate) reward_model: ScalarGpt,
    pub(crate) gold: Option<Gold<'a>>,
    pub(crate) missing_eos_score: f32,
    /// Responses computed at a time.
    pub(crate) batch_size: usize,
}

impl Judge<'_> {
    /// What the frozen models say of responses sampled by `sampling`.
    pub(crate) fn judge(
        &self,
        prompts: &[Prompt],
        generated: Vec<Generated>,
        sampling: &Sampling<'_>,
    ) -> anyhow::Result<Vec<Rollout>> {
        let pairs: Vec<(&[u32], &[u32])> =
            prompts.iter().zip(&generated).map(|(prompt, answer)| (&*prompt.ids, &*answer.ids)).collect();
        let rows: Vec<Vec<u32>> = pairs.iter().map(|(prompt, response)| [*prompt, response].concat()).collect();
        let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
        let temperature = sampling.config.temperature;
        let (reference, reward_model, batch_size) = (&self.reference, &self.reward_model, self.batch_size);
        let (ref_log_probs, scores) = kernels::at_once(
            &reference.device(),
            || of_response_tokens(&pairs, batch_size, |batch| log_probs(reference, batch, temperature).0),
            || score_rows(reward_model, &rows, batch_size),
        );
        let (ref_log_probs, scores) = (ref_log_probs?, scores?);
        ensure!(
            scores.iter().all(|score| score.is_finite()),
            "a score is not finite: the reward model's weights have diverged"
        );
        let rollouts = prompts.iter().zip(generated).zip(scores).zip(ref_log_probs);
        Ok(rollouts
            .map(|(((prompt, answer), raw_score), ref_log_probs)| {
                let text = sampling.tokenizer.decode(&answer.ids);
                let ended = answer.finish == Finish::Stop;
                Rollout {
                    gold: self.gold.map(|gold| gold(&prompt.text, &text)),
                    prompt: prompt.clone(),
                    response: answer.ids,
                    text,
                    ended,
                    log_probs: answer.log_probs,
                    ref_log_probs,
                    raw_score,
                    score: score_of_ended(raw_score, ended, self.missing_eos_score),
                }
            })
            .collect())
    }
}

/// A rollout with its targets: what the updates learn from, one number a response token.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Experience {
    pub(crate) rollout: Rollout,
    /// Before the updates.
    pub(crate) values: Vec<f32>,
    /// `advantages + values` before whitening: what the values should have been.
    pub(crate) returns: Vec<f32>,
    /// Whitened over all responses of the batch.
    pub(crate) advantages: Vec<f32>,
}

impl Experience {
    /// Turns a batch of rollouts into experience: KL-shaped rewards, advantages, returns, then whitening.
    ///
    /// `values` holds the old values of each response's tokens.
    pub(crate) fn of_batch(
        rollouts: Vec<Rollout>,
        values: Vec<Vec<f32>>,
        kl_coef: f32,
        config: &PpoSection,
    ) -> Vec<Self> {
        let (gamma, lambda) = (config.gamma as f32, config.lambda as f32);
        let mut batch: Vec<Self> = rollouts
            .into_iter()
            .zip(values)
            .map(|(rollout, values)| {
                let rewards = kl_shaped(&rollout.log_probs, &rollout.ref_log_probs, rollout.score, kl_coef);
                let advantages = gae(&rewards, &values, gamma, lambda);
                let returns = advantages.iter().zip(&values).map(|(advantage, value)| advantage + value).collect();
                Self { rollout, values, returns, advantages }
            })
            .collect();
        let flat: Vec<f32> = batch.iter().flat_map(|experience| experience.advantages.iter().copied()).collect();
        let mut whitened = whiten(&flat, true).into_iter();
        for advantage in batch.iter_mut().flat_map(|experience| &mut experience.advantages) {
            *advantage = whitened.next().expect("whitening keeps the number of tokens");
        }
        batch
    }
}

/// Log-probabilities of the response tokens and entropies of the distributions they were drawn from, in nats.
///
/// # Shapes
/// - returns `([n_tokens], [n_tokens])`
pub(crate) fn log_probs(gpt: &Gpt, batch: &ResponseBatch, temperature: f64) -> (Tensor<1>, Tensor<1>) {
    let device = gpt.device();
    let hidden = gpt.hidden(batch.inputs(&device), &Layout::right_padded());
    let [rows, seq, d_model] = hidden.dims();
    // Only states before response tokens meet the vocabulary: [n_tokens, d_model].
    let hidden = hidden.reshape([rows * seq, d_model]).select(0, batch.positions(&device));
    loss::token_log_probs(gpt, hidden, batch.targets(&device), temperature)
}

/// Values of the states before the response tokens, `[n_tokens]`.
pub(crate) fn values(model: &ScalarGpt, batch: &ResponseBatch) -> Tensor<1> {
    let device = model.device();
    model.forward_at(batch.inputs(&device), &Layout::right_padded(), batch.positions(&device), None)
}

/// Computes a number for every response token, `batch_size` responses at a time, on the host response by response.
pub(crate) fn of_response_tokens(
    responses: &[(&[u32], &[u32])],
    batch_size: usize,
    compute: impl Fn(&ResponseBatch) -> Tensor<1>,
) -> anyhow::Result<Vec<Vec<f32>>> {
    let mut all = vec![Vec::new(); responses.len()];
    for batch in by_length(responses.iter().map(|(prompt, response)| prompt.len() + response.len()), batch_size) {
        let numbers = compute(&ResponseBatch::new(batch.iter().map(|&i| responses[i])));
        let numbers = numbers.try_into_vec_as::<f32>().context("failed to read the device")?;
        let mut rest = numbers.as_slice();
        for i in batch {
            let (of_response, others) = rest.split_at(responses[i].1.len());
            all[i] = of_response.to_vec();
            rest = others;
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::testing::assert_close;

    fn rollout(log_probs: &[f32], ref_log_probs: &[f32], score: f32) -> Rollout {
        Rollout {
            prompt: Prompt { ids: vec![0, 1], text: "p".into() },
            response: vec![5; log_probs.len()],
            text: "r".into(),
            ended: true,
            log_probs: log_probs.to_vec(),
            ref_log_probs: ref_log_probs.to_vec(),
            raw_score: score,
            score,
            gold: None,
        }
    }

    #[test]
    fn experience_matches_a_hand_worked_batch() {
        // First: KL = [0.5, 0], β = 1: rewards [−0.5, 1]; λ = 1: A = [0.5 − 0.25, 1 − 0.5] = [0.25, 0.5].
        // Second: reward 0, value 0.25: A = −0.25. Mean 1/6, E[A²] = 0.125: variance 0.125 − 1/36 = 0.097222.
        let rollouts = vec![rollout(&[-1.0, -1.0], &[-1.5, -1.0], 1.0), rollout(&[-1.0], &[-1.0], 0.0)];
        let config = PpoSection { lambda: 1.0, ..PpoSection::default() };
        let batch = Experience::of_batch(rollouts, vec![vec![0.25, 0.5], vec![0.25]], 1.0, &config);
        assert_close(&batch[0].returns, &[0.5, 1.0], 0.0);
        assert_close(&batch[1].returns, &[0.0], 0.0);
        assert_close(&batch[0].advantages, &[0.267_261, 1.069_045], 1e-5);
        assert_close(&batch[1].advantages, &[-1.336_306], 1e-5);
    }

    #[test]
    fn a_line_of_rollouts_names_what_it_holds() {
        let mut line = rollout(&[-1.0, -0.5], &[-1.5, -0.25], 2.0);
        assert_eq!(
            line.to_json(),
            json!({ "prompt": "p", "response": "r", "score": 2.0, "kl": 0.25, "length": 2, "finish": "stop" })
        );
        (line.gold, line.ended) = (Some(0.5), false);
        assert_eq!((&line.to_json()["gold"], &line.to_json()["finish"]), (&json!(0.5), &json!("length")));
    }
}
