//! Responses with what the frozen models say of them.

use model::{Gpt, ScalarGpt};

use crate::kl::k1;
use crate::{EncodedPrompt, Response, ScoreError, log_probs, of_response_tokens, score_rows};

/// The true reward of a response to a prompt, both as text; `None` for a prompt that it does not know.
///
/// Known in experiments alone: it is reported, never trained on.
pub type Gold<'a> = &'a dyn Fn(&str, &str) -> Option<f64>;

/// A prompt, a response to it, and what the frozen models say of the response.
#[derive(Debug, Clone, PartialEq)]
pub struct Rollout {
    /// The prompt.
    pub prompt: EncodedPrompt,
    /// The response, with log-probabilities under the policy.
    pub response: Response,
    /// Log-probabilities of the response's tokens under the reference policy, at the sampling temperature.
    pub ref_log_probs: Vec<f32>,
    /// The reward model's score, whether or not the response ended.
    pub score: f32,
    /// The true reward, where it is known.
    pub gold: Option<f64>,
}

impl Rollout {
    /// Divergence from the reference policy in nats, estimator k1 summed over the response.
    pub fn kl(&self) -> f64 {
        k1(&self.response.log_probs, &self.ref_log_probs).iter().map(|&kl| f64::from(kl)).sum()
    }

    /// Token ids of prompt and response.
    pub fn ids(&self) -> (&[u32], &[u32]) {
        (&self.prompt.ids, &self.response.ids)
    }
}

/// The models that score responses and do not learn: the reference policy and the reward model, on a plain device.
pub struct FrozenModels<'a> {
    /// The policy that divergence is measured from.
    pub reference: Gpt,
    /// The reward model.
    pub reward_model: ScalarGpt,
    /// The true reward, where it is known.
    pub gold: Option<Gold<'a>>,
    /// Responses computed at a time.
    pub batch_size: usize,
}

impl FrozenModels<'_> {
    /// Scores `responses`, one for each of `prompts`, sampled at `temperature`.
    ///
    /// # Errors
    /// If a score is not finite, or the device cannot be read.
    ///
    /// # Panics
    /// If a response is empty, exceeds a model's context, or there are not as many as prompts.
    pub fn rollouts(
        &self,
        prompts: &[EncodedPrompt],
        responses: Vec<Response>,
        temperature: f64,
    ) -> Result<Vec<Rollout>, ScoreError> {
        assert_eq!(prompts.len(), responses.len(), "one response per prompt");
        let pairs: Vec<(&[u32], &[u32])> =
            prompts.iter().zip(&responses).map(|(prompt, response)| (&*prompt.ids, &*response.ids)).collect();
        let rows: Vec<Vec<u32>> = pairs.iter().map(|(prompt, response)| [*prompt, response].concat()).collect();
        let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
        let (reference, reward_model, batch_size) = (&self.reference, &self.reward_model, self.batch_size);
        let (ref_log_probs, scores) = kernels::at_once(
            &reference.device(),
            || of_response_tokens(&pairs, batch_size, |batch| log_probs(reference, batch, temperature)),
            || score_rows(reward_model, &rows, batch_size),
        );
        let (ref_log_probs, scores) = (ref_log_probs?, scores?);
        if !scores.iter().all(|score| score.is_finite()) {
            return Err(ScoreError::NotFinite);
        }
        let scored = prompts.iter().zip(responses).zip(scores).zip(ref_log_probs);
        Ok(scored
            .map(|(((prompt, response), score), ref_log_probs)| Rollout {
                gold: self.gold.and_then(|gold| gold(&prompt.text, &response.text)),
                prompt: prompt.clone(),
                response,
                ref_log_probs,
                score,
            })
            .collect())
    }
}
