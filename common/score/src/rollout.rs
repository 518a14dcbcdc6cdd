//! Responses scored by the frozen models.

use group::Group;
use model::{Gpt, ScalarGpt};

use crate::kl::k1;
use crate::rows::{score_rows_watched, score_share_of_rows};
use crate::{
    EncodedPrompt, Ensemble, Response, ScoreError, UNWATCHED, Watch, log_probs, of_share_of_responses, spread,
};

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
    /// The reward model's score, or of several what their ensemble makes of them, whether or not the response ended.
    pub score: f32,
    /// The scores of several reward models; nothing where there is one.
    pub member_scores: Vec<f32>,
    /// The true reward, where it is known.
    pub gold: Option<f64>,
}

impl Rollout {
    /// Divergence from the reference policy in nats, estimator k1 summed over the response.
    pub fn kl(&self) -> f64 {
        k1(&self.response.log_probs, &self.ref_log_probs).iter().map(|&kl| f64::from(kl)).sum()
    }

    /// How far several reward models disagree: the deviation of their scores; `None` where there is one.
    pub fn score_spread(&self) -> Option<f64> {
        let scores: Vec<f64> = self.member_scores.iter().map(|&score| f64::from(score)).collect();
        (!scores.is_empty()).then(|| spread(&scores))
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
    /// Further reward models, which score each response too.
    pub further: Vec<ScalarGpt>,
    /// How the scores of several become one.
    pub ensemble: Ensemble,
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

    /// [`rollouts`](Self::rollouts), with `watch` looking on: it is told of each response once by the reference policy and
    /// once by every reward model.
    ///
    /// # Errors
    /// As there, and if `watch` breaks it off.
    ///
    /// # Panics
    /// As there.
    pub fn rollouts_watched(
        &self,
        prompts: &[EncodedPrompt],
        responses: Vec<Response>,
        temperature: f64,
        watch: Watch<'_>,
    ) -> Result<Vec<Rollout>, ScoreError> {
        self.rollouts_of(&Group::alone(), prompts, responses, temperature, watch)
    }

    /// How many responses [`rollouts_watched`](Self::rollouts_watched) tells of, where there are `n`.
    pub const fn n_watched(&self, n: usize) -> usize {
        n * (2 + self.further.len())
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
        self.rollouts_of(group, prompts, responses, temperature, UNWATCHED)
    }

    fn rollouts_of(
        &self,
        group: &Group,
        prompts: &[EncodedPrompt],
        responses: Vec<Response>,
        temperature: f64,
        watch: Watch<'_>,
    ) -> Result<Vec<Rollout>, ScoreError> {
        assert_eq!(prompts.len(), responses.len(), "one response per prompt");
        let pairs: Vec<(&[u32], &[u32])> =
            prompts.iter().zip(&responses).map(|(prompt, response)| (&*prompt.ids, &*response.ids)).collect();
        let row = |(prompt, response): (&EncodedPrompt, &Response)| [&*prompt.ids, response.answer()].concat();
        let rows: Vec<Vec<u32>> = prompts.iter().zip(&responses).map(row).collect();
        let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
        let (reference, batch_size) = (&self.reference, self.batch_size);
        let members: Vec<&ScalarGpt> = self.members().collect();
        let of_member = |model: &&ScalarGpt| score_share_of_rows(model, &rows, batch_size, group.share(), watch);
        let (ref_log_probs, scores) = kernels::join(
            &reference.device(),
            || {
                of_share_of_responses(&pairs, batch_size, group.share(), watch, |batch| {
                    log_probs(reference, batch, temperature)
                })
            },
            || members.iter().map(of_member).collect::<Result<Vec<_>, _>>(),
        );
        let ref_log_probs = group.in_order(ref_log_probs?)?;
        let by_member = scores?.into_iter().map(|own| Ok(group.in_order(own)?));
        let by_member = by_member.collect::<Result<Vec<Vec<f32>>, ScoreError>>()?;
        check_finite(&by_member)?;
        let scored = prompts.iter().zip(responses).zip(self.combined(&by_member)).zip(ref_log_probs);
        Ok(scored
            .map(|(((prompt, response), (score, member_scores)), ref_log_probs)| Rollout {
                gold: self.gold.and_then(|gold| gold(&prompt.text, &response.text)),
                prompt: prompt.clone(),
                response,
                ref_log_probs,
                score,
                member_scores,
            })
            .collect())
    }

    /// The score of each row of tokens, by the reward model or the ensemble.
    ///
    /// # Errors
    /// If the device cannot be read.
    pub fn scores(&self, rows: &[&[u32]]) -> Result<Vec<f32>, ScoreError> {
        self.scores_watched(rows, UNWATCHED)
    }

    /// [`scores`](Self::scores), with `watch` looking on: it is told of each row by every reward model.
    ///
    /// # Errors
    /// As there, and if `watch` breaks it off.
    pub fn scores_watched(&self, rows: &[&[u32]], watch: Watch<'_>) -> Result<Vec<f32>, ScoreError> {
        let of_member = |model| score_rows_watched(model, rows, self.batch_size, watch);
        let by_member: Vec<Vec<f32>> = self.members().map(of_member).collect::<Result<_, _>>()?;
        Ok(self.combined(&by_member).into_iter().map(|(score, _)| score).collect())
    }

    /// Tokens that every reward model reads.
    pub fn score_context(&self) -> usize {
        self.members().map(|model| model.config().max_seq_len).min().unwrap_or(0)
    }

    /// The reward models.
    fn members(&self) -> impl Iterator<Item = &ScalarGpt> {
        std::iter::once(&self.reward_model).chain(&self.further)
    }

    /// The one score of each response, and those that several members gave it.
    fn combined(&self, by_member: &[Vec<f32>]) -> Vec<(f32, Vec<f32>)> {
        let of_response = |i: usize| {
            if let [only] = by_member {
                return (only[i], Vec::new());
            }
            let scores: Vec<f32> = by_member.iter().map(|scores| scores[i]).collect();
            let wide: Vec<f64> = scores.iter().map(|&score| f64::from(score)).collect();
            (self.ensemble.combine(&wide) as f32, scores)
        };
        (0..by_member.first().map_or(0, Vec::len)).map(of_response).collect()
    }
}

/// Every score of every member is a number.
fn check_finite(by_member: &[Vec<f32>]) -> Result<(), ScoreError> {
    let Some(i) = by_member.iter().position(|scores| scores.iter().any(|score| !score.is_finite())) else {
        return Ok(());
    };
    let n = by_member.len();
    Err(if n == 1 { ScoreError::NotFinite } else { ScoreError::MemberNotFinite { number: i + 1, n } })
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
        FrozenModels { reference, reward_model, further: Vec::new(), ensemble: Ensemble::Mean, gold, batch_size: 2 }
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
    fn several_reward_models_score_each_response_and_are_combined() {
        let tokenizer = tokenizer();
        let one = frozen(&tokenizer, 0.25, None);
        let sampling = Sampling::new(0.7, 12, Streams::new(1), &tokenizer, 2);
        let responses = sampling.answer(&one.reference, &prompts(), 0).unwrap();
        let scores = |frozen: &FrozenModels<'_>| frozen.rollouts(&prompts(), responses.clone(), 0.7).unwrap();
        let alone = scores(&one);
        assert!(alone.iter().all(|rollout| rollout.member_scores.is_empty() && rollout.score_spread().is_none()));
        // The same model, each score 3 higher: mean 1.5 above, variance 1.5².
        let FrozenModels { reference, reward_model, .. } = &one;
        for (ensemble, above) in [(Ensemble::Mean, 1.5), (Ensemble::Worst, 0.0), (Ensemble::MeanLessVariance, 0.375)] {
            let two = || FrozenModels {
                reference: reference.clone(),
                reward_model: reward_model.clone(),
                further: vec![reward_model.clone().with_score_bias(3.25)],
                ensemble,
                gold: None,
                batch_size: 2,
            };
            let shared: Vec<Vec<f32>> = group::threads(2, |group| {
                let rollouts = two().rollouts_in(&group, &prompts(), responses.clone(), 0.7).unwrap();
                rollouts.into_iter().map(|rollout| rollout.score).collect()
            });
            let two = two();
            for (i, (rollout, alone)) in scores(&two).iter().zip(&alone).enumerate() {
                assert_close(&rollout.member_scores, &[alone.score, alone.score + 3.0], REORDERED);
                assert_close(&[rollout.score], &[alone.score + above], REORDERED);
                assert!((rollout.score_spread().unwrap() - 1.5).abs() < f64::from(REORDERED));
                assert!(shared.iter().all(|of_rank| of_rank[i] == rollout.score), "a rank's share changes no bit");
            }
            let row: Vec<u32> = [&*prompts()[0].ids, responses[0].answer()].concat();
            assert_close(&two.scores(&[&row]).unwrap(), &[scores(&two)[0].score], REORDERED);
        }
    }

    #[test]
    fn divergence_is_summed_over_the_response() {
        let response = Response { ids: vec![5, 6], log_probs: vec![-1.0, -0.5], ..Response::default() };
        let prompt = EncodedPrompt { ids: vec![1], text: String::new() };
        let rollout = Rollout {
            prompt,
            response,
            ref_log_probs: vec![-1.5, -0.25],
            score: 0.0,
            member_scores: Vec::new(),
            gold: None,
        };
        // (−1 + 1.5) + (−0.5 + 0.25).
        assert_eq!(rollout.kl(), 0.25);
    }

    #[test]
    fn a_score_that_is_not_finite_is_an_error() {
        let tokenizer = tokenizer();
        let frozen = frozen(&tokenizer, f64::NAN, None);
        let sampling = Sampling::new(1.0, 4, Streams::new(1), &tokenizer, 0);
        let responses = sampling.answer(&frozen.reference, &prompts(), 0).unwrap();
        assert!(matches!(frozen.rollouts(&prompts(), responses.clone(), 1.0), Err(ScoreError::NotFinite)));
        // Of several, the one whose score it is.
        let sound = frozen.reward_model.clone().with_score_bias(0.0);
        let further = vec![frozen.reward_model.clone()];
        let two = FrozenModels { reward_model: sound, further, ..frozen };
        let error = two.rollouts(&prompts(), responses, 1.0).unwrap_err();
        assert!(matches!(error, ScoreError::MemberNotFinite { number: 2, n: 2 }));
        assert!(error.to_string().contains("reward model 2 of 2"), "{error}");
    }
}
