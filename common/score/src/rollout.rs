//! Responses scored by the frozen models.

use group::Group;
use model::{Gpt, ScalarGpt};

use crate::kl::k1;
use crate::pairs::finite;
use crate::rows::score_share_of_rows;
use crate::{EncodedPrompt, Response, ScoreError, log_probs, of_share_of_responses};

/// The true reward of a response to a prompt, both as text; `None` for a prompt that it does not know.
///
/// Known in experiments alone: it is reported, never trained on.
pub type Gold<'a> = &'a dyn Fn(&str, &str) -> Option<f64>;

/// A prompt and a response to it, scored by the frozen models.
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
        self.rollouts_in(&Group::alone(), prompts, responses, temperature)
    }

    /// [`rollouts`](Self::rollouts), the batches of which `group` shares: the same numbers to the bit.
    ///
    /// # Errors
    /// As there, and if a process of the group has ended.
    ///
    /// # Panics
    /// As there.
    pub fn rollouts_in(
        &self,
        group: &Group,
        prompts: &[EncodedPrompt],
        responses: Vec<Response>,
        temperature: f64,
    ) -> Result<Vec<Rollout>, ScoreError> {
        assert_eq!(prompts.len(), responses.len(), "one response per prompt");
        let pairs: Vec<(&[u32], &[u32])> =
            prompts.iter().zip(&responses).map(|(prompt, response)| (&*prompt.ids, &*response.ids)).collect();
        let row = |(prompt, response): (&EncodedPrompt, &Response)| [&*prompt.ids, response.answer()].concat();
        let rows: Vec<Vec<u32>> = prompts.iter().zip(&responses).map(row).collect();
        let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
        let (reference, reward_model, batch_size) = (&self.reference, &self.reward_model, self.batch_size);
        let (ref_log_probs, scores) = kernels::join(
            &reference.device(),
            || {
                of_share_of_responses(&pairs, batch_size, group.share(), |batch| {
                    log_probs(reference, batch, temperature)
                })
            },
            || score_share_of_rows(reward_model, &rows, batch_size, group.share()),
        );
        let (ref_log_probs, scores) = (group.in_order(ref_log_probs?)?, finite(group.in_order(scores?)?)?);
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

#[cfg(test)]
mod tests {
    use super::*;
    use base::rng::Streams;
    use base::testing::assert_close;
    use burn::tensor::Device;
    use model::GptConfig;
    use text::tokenizer::{Tokenizer, TokenizerConfig, TokenizerKind};

    use crate::{Sampling, score_rows};

    // Sums of a few dozen f32 products of order one, in another order.
    const REORDERED: f32 = 1e-5;

    fn tokenizer() -> Tokenizer {
        let config = TokenizerConfig { kind: TokenizerKind::Byte, ..TokenizerConfig::default() };
        Tokenizer::train(&config, std::iter::empty::<&str>(), true).unwrap()
    }

    fn frozen<'a>(tokenizer: &Tokenizer, score_bias: f64, gold: Option<Gold<'a>>) -> FrozenModels<'a> {
        let config = GptConfig {
            d_model: 16,
            n_layers: 1,
            n_heads: 2,
            d_ff: 32,
            max_seq_len: 32,
            ..GptConfig::gpt2(tokenizer.vocab_size())
        };
        let streams = Streams::new(3);
        let reference = Gpt::new(&config, &streams, &Device::flex());
        let reward_model = ScalarGpt::new(reference.clone(), &streams).with_score_bias(score_bias);
        FrozenModels { reference, reward_model, gold, batch_size: 2 }
    }

    fn prompts() -> Vec<EncodedPrompt> {
        [&[1, 2, 3][..], &[1, 9], &[1, 5, 5, 5, 7]]
            .iter()
            .enumerate()
            .map(|(i, ids)| EncodedPrompt { ids: ids.to_vec(), text: i.to_string() })
            .collect()
    }

    #[test]
    fn a_policy_does_not_diverge_from_itself_and_every_response_has_its_score() {
        let tokenizer = tokenizer();
        let known = |prompt: &str, _: &str| (prompt != "1").then_some(prompt.len() as f64);
        let frozen = frozen(&tokenizer, 0.25, Some(&known));
        let sampling = Sampling::new(0.7, 12, Streams::new(1), &tokenizer, 2);
        let responses = sampling.answer(&frozen.reference, &prompts(), 0).unwrap();
        let rollouts = frozen.rollouts(&prompts(), responses.clone(), 0.7).unwrap();
        for ((rollout, response), prompt) in rollouts.iter().zip(&responses).zip(prompts()) {
            assert_eq!((&rollout.response, &rollout.prompt), (response, &prompt));
            assert_close(&rollout.ref_log_probs, &response.log_probs, REORDERED);
            assert!(rollout.kl().abs() < 12.0 * f64::from(REORDERED), "{}", rollout.kl());
            let row = [&*prompt.ids, &*response.ids].concat();
            let alone = score_rows(&frozen.reward_model, &[&row], 1).unwrap();
            assert_close(&[rollout.score], &alone, REORDERED);
        }
        assert_eq!(rollouts.iter().map(|rollout| rollout.gold).collect::<Vec<_>>(), [Some(1.0), None, Some(1.0)]);
    }

    #[test]
    fn divergence_is_summed_over_the_response() {
        let response = Response { ids: vec![5, 6], log_probs: vec![-1.0, -0.5], ..Response::default() };
        let prompt = EncodedPrompt { ids: vec![1], text: String::new() };
        let rollout = Rollout { prompt, response, ref_log_probs: vec![-1.5, -0.25], score: 0.0, gold: None };
        // (−1 + 1.5) + (−0.5 + 0.25).
        assert_eq!(rollout.kl(), 0.25);
    }

    #[test]
    fn a_score_that_is_not_finite_is_an_error() {
        let tokenizer = tokenizer();
        let frozen = frozen(&tokenizer, f64::NAN, None);
        let sampling = Sampling::new(1.0, 4, Streams::new(1), &tokenizer, 0);
        let responses = sampling.answer(&frozen.reference, &prompts(), 0).unwrap();
        assert!(matches!(frozen.rollouts(&prompts(), responses, 1.0), Err(ScoreError::NotFinite)));
    }
}
