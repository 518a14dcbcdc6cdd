//! The scale of the scores: mean 0 and deviation 1 on the initial model's own answers.

use anyhow::{Context, ensure};
use common::data::order::Order;
use common::interrupt::Interrupt;
use common::model::{Gpt, ScalarGpt};
use common::pace::Pace;
use common::rng::Streams;
use common::score::{Pairs, Sampling, score_rows_watched};
use common::tokenizer::Tokenizer;

use crate::config::NormalisationConfig;

/// Below this the answers do not differ, and a gain would only blow up rounding.
const LEAST_DEVIATION: f64 = 1e-6;

/// The mean and deviation of the scores, to which the affine map `score ↦ gain·score + bias` is fitted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Normalisation {
    /// Mean of the scores before.
    pub(crate) mean: f64,
    /// Population deviation of the scores before.
    pub(crate) deviation: f64,
}

impl Normalisation {
    /// Fits the map to `scores`.
    ///
    /// `gain = 1/σ`, `bias = −μ/σ`: afterwards these scores have mean 0 and (population) deviation 1.
    ///
    /// # Source
    /// Ziegler et al., arXiv:1909.08593, section 2; `gain = σ_T/σ_D`, `bias = μ_T − gain·μ_D` in
    /// lm-human-preferences, `rewards.py`, with target mean 0 and deviation 1.
    pub(crate) fn fit(scores: &[f32]) -> anyhow::Result<Self> {
        let n = scores.len() as f64;
        let mean = scores.iter().map(|&score| f64::from(score)).sum::<f64>() / n;
        let deviation = (scores.iter().map(|&score| (f64::from(score) - mean).powi(2)).sum::<f64>() / n).sqrt();
        ensure!(
            deviation > LEAST_DEVIATION && deviation.is_finite(),
            "the scores of {} sampled answers have deviation {deviation}: they cannot be normalised\nhint: train \
             longer or with a higher `optimizer.lr`; `normalisation.samples = 0` leaves the scores as they are",
            scores.len()
        );
        Ok(Self { mean, deviation })
    }

    /// The model whose scores are mapped: the gain goes into the head's weights, the bias beside them.
    pub(crate) fn apply(self, model: ScalarGpt) -> ScalarGpt {
        let gain = 1.0 / self.deviation;
        let bias = gain * (model.score_bias() - self.mean);
        model.with_gain(gain).with_score_bias(bias)
    }
}

/// Scores that `model` gives to answers that `initial`, the model it was made from, samples to training prompts.
///
/// The prompts are those of `normalisation.samples` pairs drawn by seed; answers end at `<|end|>` or are cut off at
/// `normalisation.max_tokens`, as in PPO. Both models are on a plain device.
///
/// # Errors
/// If the answers cannot be sampled or scored, or `interrupt` ends that.
pub(crate) fn score_samples(
    config: &NormalisationConfig,
    initial: &Gpt,
    model: &ScalarGpt,
    training: &Pairs,
    tokenizer: &Tokenizer,
    streams: Streams,
    interrupt: Interrupt,
) -> anyhow::Result<Vec<f32>> {
    let max_seq_len = initial.config().max_seq_len;
    let mut order = Order::new(training.encoded.len(), streams, "normalisation");
    let prompts: Vec<Vec<u32>> = (0..config.samples as u64)
        .map(|position| {
            let pair = &training.encoded[order.item(position)];
            pair.chosen[..pair.n_prompt].to_vec()
        })
        .filter(|prompt| prompt.len() < max_seq_len)
        .collect();
    let NormalisationConfig { temperature, max_tokens, batch_size, .. } = *config;
    // Streams of their own: PPO's first rollouts draw those of the seed from the same model.
    let sampling = Sampling::new(temperature, max_tokens, streams.of("normalisation"), tokenizer, batch_size);
    let pace = Pace::new("normalisation", prompts.len(), "answers", interrupt);
    let answers = sampling.answer_counted(initial, &prompts, 0, &|n| pace.done(n));
    let answers = answers.context("failed to sample answers of the initial model")?;
    drop(pace);
    let rows: Vec<Vec<u32>> =
        prompts.iter().zip(&answers).map(|(prompt, answer)| [prompt.as_slice(), &answer.ids].concat()).collect();
    let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
    let pace = Pace::new("normalisation", rows.len(), "scores", interrupt);
    Ok(score_rows_watched(model, &rows, batch_size, &|n| pace.done(n))?)
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use common::score::EncodedPair;
    use common::score::score_rows;
    use common::testing::{assert_close, byte_tokenizer, tiny_config};

    use super::*;

    #[test]
    fn normalised_scores_have_mean_zero_and_deviation_one() {
        // Mean 4, population deviation 2.
        let scores = [2.0_f32, 6.0, 2.0, 6.0];
        let fitted = Normalisation::fit(&scores).expect("they vary");
        assert_eq!(fitted, Normalisation { mean: 4.0, deviation: 2.0 });
        let mapped = scores.map(|score| ((f64::from(score) - fitted.mean) / fitted.deviation) as f32);
        assert_close(&mapped, &[-1.0, 1.0, -1.0, 1.0], 0.0);
    }

    #[test]
    fn the_initial_models_answers_score_zero_on_average_with_deviation_one() {
        let tokenizer = byte_tokenizer();
        let streams = Streams::new(7);
        let initial = Gpt::new(&tiny_config(tokenizer.vocab_size()), &streams, &Device::flex());
        let model = ScalarGpt::new(initial.clone(), &streams);
        let pair = |i: u32| {
            let prompt = [1, 2, 3 + i];
            EncodedPair { chosen: prompt.to_vec(), rejected: prompt.to_vec(), n_prompt: 3, margin: None }
        };
        let training = Pairs { encoded: (0..20).map(pair).collect(), records: Vec::new(), annotators: Vec::new() };
        let config = NormalisationConfig { samples: 50, max_tokens: 20, ..NormalisationConfig::default() };
        let scores = |model: &ScalarGpt| {
            let interrupt = Interrupt::never();
            score_samples(&config, &initial, model, &training, &tokenizer, streams, interrupt).expect("scores")
        };
        let fitted = Normalisation::fit(&scores(&model)).expect("they vary");
        assert!(fitted.deviation < 0.9 || fitted.deviation > 1.1, "{fitted:?} needs no normalisation");
        let again = Normalisation::fit(&scores(&fitted.apply(model))).expect("they vary");
        // Fifty f32 scores of size one.
        assert!(again.mean.abs() < 1e-5 && (again.deviation - 1.0).abs() < 1e-5, "{again:?}");
    }

    #[test]
    fn sampling_ends_when_asked_to() {
        let tokenizer = byte_tokenizer();
        let streams = Streams::new(7);
        let initial = Gpt::new(&tiny_config(tokenizer.vocab_size()), &streams, &Device::flex());
        let model = ScalarGpt::new(initial.clone(), &streams);
        let pair = EncodedPair { chosen: vec![1, 2, 3], rejected: vec![1, 2, 3], n_prompt: 3, margin: None };
        let training = Pairs { encoded: vec![pair], records: Vec::new(), annotators: Vec::new() };
        let config = NormalisationConfig { samples: 4, max_tokens: 20, ..NormalisationConfig::default() };
        let interrupt = Interrupt::of_test();
        interrupt.request();
        let stopped = score_samples(&config, &initial, &model, &training, &tokenizer, streams, interrupt);
        let stopped = stopped.expect_err("it was asked to stop");
        assert!(matches!(stopped.downcast_ref(), Some(common::score::ScoreError::Stopped)), "{stopped:#}");
    }

    #[test]
    fn the_scale_is_not_fitted_to_the_responses_of_a_first_rollout() {
        let tokenizer = byte_tokenizer();
        let streams = Streams::new(7);
        let initial = Gpt::new(&tiny_config(tokenizer.vocab_size()), &streams, &Device::flex());
        let model = ScalarGpt::new(initial.clone(), &streams);
        let prompt = vec![1, 2, 3];
        let pair = EncodedPair { chosen: prompt.clone(), rejected: prompt.clone(), n_prompt: 3, margin: None };
        let training = Pairs { encoded: vec![pair], records: Vec::new(), annotators: Vec::new() };
        let config = NormalisationConfig { samples: 4, max_tokens: 20, ..NormalisationConfig::default() };
        let interrupt = Interrupt::never();
        let fitted_to =
            score_samples(&config, &initial, &model, &training, &tokenizer, streams, interrupt).expect("scores");

        let rollout = Sampling::new(config.temperature, config.max_tokens, streams, &tokenizer, config.batch_size);
        let responses = rollout.answer(&initial, &vec![prompt.clone(); 4], 0).expect("responses");
        let rows: Vec<Vec<u32>> =
            responses.iter().map(|response| [prompt.as_slice(), &response.ids].concat()).collect();
        let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
        let rolled_out = score_rows(&model, &rows, config.batch_size).expect("scores");
        assert!(fitted_to.iter().zip(&rolled_out).all(|(a, b)| a != b), "{fitted_to:?} {rolled_out:?}");
    }

    #[test]
    fn equal_scores_cannot_be_normalised() {
        let error = Normalisation::fit(&[0.5; 8]).expect_err("no deviation");
        assert!(error.to_string().contains("hint: train longer"), "{error}");
    }
}
