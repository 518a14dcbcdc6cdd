//! Continuations, and how near each of their tokens was to another choice.

use anyhow::Result;
use burn::tensor::{Int, Tensor, TensorData};
use common::generate::{GenerateOptions, SamplingConfig, generate};
use common::model::{Gpt, HostTensor, Layout};
use common::rng::Streams;

/// In place of a token where an answer has ended.
pub const NONE: f32 = -1.0;

/// The tokens of some prompts' continuations and their margins.
pub struct Continuations {
    /// `[n_prompts, max_tokens]`, ids as numbers
    pub ids: HostTensor,
    /// `[n_prompts, max_tokens]`: how far a logit may move before another token is chosen
    pub margins: HostTensor,
}

/// Continues every prompt by `max_tokens` tokens: the likeliest ones at temperature 0, else drawn from `streams`.
///
/// The margin of a likeliest token is half its lead in logits. That of a drawn one is the distance from the random number to
/// the nearer end of the token's interval in the cumulative distribution: no cumulative probability moves by more than
/// the largest change of a logit.
///
/// # Errors
/// If generation fails.
pub fn continuations(
    gpt: &Gpt,
    prompts: &[Vec<u32>],
    max_tokens: usize,
    temperature: f64,
    streams: &Streams,
) -> Result<Continuations> {
    let config = SamplingConfig { temperature, max_tokens, ..SamplingConfig::default() };
    let answers = generate(gpt, prompts, &config, streams, 0, GenerateOptions::default())?;
    let (mut ids, mut margins) = (Vec::new(), Vec::new());
    for (row, (prompt, answer)) in prompts.iter().zip(&answers).enumerate() {
        let all: Vec<i64> = prompt.iter().chain(&answer.ids).map(|&id| i64::from(id)).collect();
        let seq = all.len();
        let input = Tensor::<2, Int>::from_data(TensorData::new(all, [1, seq]), &gpt.device());
        let logits = HostTensor::of(&gpt.forward(input, &Layout::right_padded())).data;
        let mut rng = streams.get("sampling", row as u64);
        let rows = logits.chunks(gpt.config().vocab_size).skip(prompt.len() - 1);
        for (logits, &id) in rows.zip(&answer.ids) {
            let margin =
                if temperature == 0.0 { lead(logits) / 2.0 } else { to_next(logits, id as usize, rng.uniform()) };
            ids.push(id as f32);
            margins.push(margin);
        }
        let n_missing = max_tokens - answer.ids.len();
        ids.extend(std::iter::repeat_n(NONE, n_missing));
        margins.extend(std::iter::repeat_n(f32::MAX, n_missing));
    }
    let shape = vec![prompts.len(), max_tokens];
    Ok(Continuations {
        ids: HostTensor { shape: shape.clone(), data: ids },
        margins: HostTensor { shape, data: margins },
    })
}

/// By how much the largest logit exceeds the second.
fn lead(logits: &[f32]) -> f32 {
    let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &logit in logits {
        if logit > first {
            (first, second) = (logit, first);
        } else if logit > second {
            second = logit;
        }
    }
    first - second
}

/// Distance from `uniform` to the nearer end of the interval of `id` in the cumulative distribution.
fn to_next(logits: &[f32], id: usize, uniform: f64) -> f32 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = logits.iter().map(|&logit| f64::from(logit - max).exp()).collect();
    let total: f64 = weights.iter().sum();
    let low = weights[..id].iter().sum::<f64>() / total;
    let high = low + weights[id] / total;
    (uniform - low).abs().min((high - uniform).abs()) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn margins_of_a_hand_made_distribution() {
        // Probabilities 1/2, 1/4, 1/4: token 1 owns [0.5, 0.75).
        let logits = [2.0_f32.ln(), 0.0, 0.0];
        assert!((lead(&logits) - 2.0_f32.ln()).abs() < 1e-6);
        assert!((to_next(&logits, 1, 0.7) - 0.05).abs() < 1e-6);
        assert!((to_next(&logits, 1, 0.51) - 0.01).abs() < 1e-6);
    }
}
