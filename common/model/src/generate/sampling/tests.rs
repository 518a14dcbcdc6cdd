//! Sampling against the definitions, written out by full sort and in f64.

use proptest::prelude::*;

use super::*;
use base::rng::Streams;

// Weights are f32 (relative error 1e-7) and probabilities at most 1; a log-probability is rounded to f32 once.
const ROUNDING: f64 = 1e-6;

fn sampler(config: &SamplingConfig, prompt: &[u32], row: u64) -> Sampler {
    Sampler::new(config, prompt, Streams::new(3).get("sampling", row))
}

/// What `choose` must draw from: the distribution by full sort, in f64, straight from the definitions.
fn by_full_sort(logits: &[f32], config: &SamplingConfig, prompt: &[u32]) -> Vec<f64> {
    let mut logits: Vec<f32> = logits.to_vec();
    let mut seen = prompt.to_vec();
    seen.sort_unstable();
    seen.dedup();
    penalise(&mut logits, &seen, config.repetition_penalty as f32);
    let softmax = |kept: &[usize]| -> Vec<f64> {
        let max = kept.iter().map(|&id| logits[id]).fold(f32::MIN, f32::max) as f64;
        let mut weights = vec![0.0; logits.len()];
        for &id in kept {
            weights[id] = ((logits[id] as f64 - max) / config.temperature).exp();
        }
        let total: f64 = weights.iter().sum();
        weights.iter().map(|weight| weight / total).collect()
    };
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).unwrap().then(a.cmp(&b)));
    if config.top_k > 0 && config.top_k < order.len() {
        let cut = logits[order[config.top_k - 1]];
        order.retain(|&id| logits[id] >= cut);
    }
    if config.top_p < 1.0 {
        let probs = softmax(&order);
        let mut cumulative = 0.0;
        let kept = order.iter().take_while(|&&id| {
            let keep = cumulative < config.top_p;
            cumulative += probs[id];
            keep
        });
        order.truncate(kept.count().max(1));
    }
    softmax(&order)
}

fn distribution(logits: &[f32], config: &SamplingConfig, prompt: &[u32]) -> Vec<f64> {
    sampler(config, prompt, 0).distribution(&mut logits.to_vec()).unwrap()
}

#[test]
fn log_prob_is_of_the_whole_tempered_softmax() {
    // softmax([ln 4, ln 2, ln 2] / 0.5) = [16, 4, 4] / 24; top_k = 1 leaves the first token alone.
    let config = SamplingConfig { temperature: 0.5, top_k: 1, ..SamplingConfig::default() };
    let choice = sampler(&config, &[], 0).choose(&mut [4f32.ln(), 2f32.ln(), 2f32.ln()]).unwrap();
    assert_eq!(choice.id, 0);
    assert!((choice.log_prob as f64 - (16.0f64 / 24.0).ln()).abs() < ROUNDING, "{choice:?}");
}

#[test]
fn temperature_zero_takes_the_likeliest_and_the_lowest_id_among_equals() {
    let config = SamplingConfig::greedy(1, vec![]);
    let choice = sampler(&config, &[], 0).choose(&mut [0.0, 2.0, 1.0, 2.0, 2.0]).unwrap();
    assert_eq!(choice.id, 1);
    let total = 1.0 + 1f64.exp() + 3.0 * 2f64.exp();
    assert!((choice.log_prob as f64 - (2.0 - total.ln())).abs() < ROUNDING);
    let mut many = vec![-1.0; 1000];
    (many[321], many[322], many[999]) = (0.5, 0.5, 0.5);
    assert_eq!(sampler(&config, &[], 0).choose(&mut many).unwrap().id, 321);
}

#[test]
fn repetition_penalty_divides_positive_and_multiplies_negative_logits_once() {
    let mut logits = [3.0, -2.0, 1.0, 0.0];
    let config = SamplingConfig { repetition_penalty: 2.0, temperature: 0.0, ..SamplingConfig::default() };
    // The prompt names token 0 twice; it is penalised once: 1.5 still beats the others.
    let mut sampler = sampler(&config, &[0, 1, 0], 0);
    let choice = sampler.choose(&mut logits).unwrap();
    assert_eq!(logits, [1.5, -4.0, 1.0, 0.0]);
    assert_eq!(choice.id, 0);
    // The log-probability is the model's own, without the penalty.
    let total = 3f64.exp() + (-2f64).exp() + 1f64.exp() + 1.0;
    assert!((choice.log_prob as f64 - (3.0 - total.ln())).abs() < ROUNDING);
    // A chosen token counts as seen from then on.
    assert_eq!(sampler.choose(&mut [0.0, 0.0, 2.0, 1.5]).unwrap().id, 2);
    assert_eq!(sampler.choose(&mut [0.0, 0.0, 2.0, 1.5]).unwrap().id, 3);
}

#[test]
fn top_k_keeps_equals_of_the_last() {
    let config = SamplingConfig { top_k: 2, ..SamplingConfig::default() };
    let kept = distribution(&[1.0, 0.5, -3.0, 0.5, 0.2], &config, &[]);
    assert_eq!(kept.iter().map(|&p| p > 0.0).collect::<Vec<_>>(), [true, true, false, true, false]);
}

#[test]
fn top_p_keeps_the_smallest_sufficient_set() {
    // Probabilities 0.1, 0.4, 0.3, 0.2: 0.4 + 0.3 first reach 0.65, 0.4 alone reaches 0.3.
    let logits = [0.1f32.ln(), 0.4f32.ln(), 0.3f32.ln(), 0.2f32.ln()];
    let kept = |top_p| {
        let config = SamplingConfig { top_p, ..SamplingConfig::default() };
        distribution(&logits, &config, &[]).iter().map(|&p| p > 0.0).collect::<Vec<_>>()
    };
    assert_eq!(kept(0.65), [false, true, true, false]);
    assert_eq!(kept(0.3), [false, true, false, false]);
    assert_eq!(kept(1e-9), [false, true, false, false]);
    assert_eq!(kept(0.999), [true, true, true, true]);
}

#[test]
fn logits_that_are_not_finite_are_refused() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let error = sampler(&SamplingConfig::default(), &[], 0).choose(&mut [0.0, bad, 0.0]).unwrap_err();
        assert_eq!(error.id, 1);
        assert_eq!(error.logit.to_bits(), bad.to_bits());
    }
}

#[test]
fn huge_logits_do_not_overflow() {
    for temperature in [1e-30, 0.7, 1e30] {
        let config = SamplingConfig { temperature, ..SamplingConfig::default() };
        let choice = sampler(&config, &[], 0).choose(&mut [f32::MAX, f32::MIN, 0.0]).unwrap();
        assert!(choice.log_prob.is_finite(), "{temperature}: {choice:?}");
    }
}

#[test]
fn temperatures_near_zero_are_greedy() {
    let logits = [0.3, 2.0, 2.0, -1.0, 2.0];
    for temperature in [5e-324, 1e-40, 1e-12, 0.99e-7] {
        let config = SamplingConfig { temperature, ..SamplingConfig::default() };
        for row in 0..20 {
            let choice = sampler(&config, &[], row).choose(&mut logits.clone()).unwrap();
            assert_eq!(choice.id, 1, "{temperature}");
            // Three are equally likely.
            assert!((f64::from(choice.log_prob) + 3f64.ln()).abs() < ROUNDING, "{temperature}: {choice:?}");
        }
    }
}

#[test]
fn extreme_settings_choose_a_token_with_a_finite_log_prob() {
    let logits = [3.0, -2.0, 1.0, 0.0, f32::MAX, f32::MIN];
    for temperature in [0.0, 5e-324, 1e-300, 1e-7, 1.0, 1e300, f64::MAX] {
        for top_p in [f64::MIN_POSITIVE, 1e-12, 1.0] {
            for top_k in [0, 1, usize::MAX] {
                for repetition_penalty in [1.2e-38, 1e-30, 1.0, 1e30, 3.4e38] {
                    let config =
                        SamplingConfig { temperature, top_k, top_p, repetition_penalty, ..SamplingConfig::default() };
                    config.validate().unwrap();
                    let mut sampler = sampler(&config, &[0, 4], 0);
                    for _ in 0..3 {
                        let choice = sampler.choose(&mut logits.clone()).unwrap();
                        assert!(choice.log_prob.is_finite(), "{config:?}: {choice:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn settings_out_of_range_are_named() {
    let base = SamplingConfig::default();
    let cases = [
        (SamplingConfig { temperature: -0.1, ..base.clone() }, "temperature"),
        (SamplingConfig { temperature: f64::NAN, ..base.clone() }, "temperature"),
        (SamplingConfig { top_p: 0.0, ..base.clone() }, "top_p"),
        (SamplingConfig { top_p: 1.1, ..base.clone() }, "top_p"),
        (SamplingConfig { repetition_penalty: 0.0, ..base.clone() }, "repetition_penalty"),
        (SamplingConfig { repetition_penalty: 1e-300, ..base.clone() }, "repetition_penalty"),
        (SamplingConfig { repetition_penalty: 1e300, ..base.clone() }, "repetition_penalty"),
        (SamplingConfig { max_tokens: 0, ..base.clone() }, "max_tokens"),
    ];
    base.validate().unwrap();
    for (config, name) in cases {
        let message = config.validate().unwrap_err().to_string();
        assert!(message.starts_with(&format!("invalid `{name}`: expected ")), "{message}");
    }
}

#[test]
fn a_stream_gives_one_uniform_number_a_token() {
    let mut rng = Streams::new(3).get("sampling", 0);
    let mut sampler = sampler(&SamplingConfig::default(), &[], 0);
    for _ in 0..5 {
        // Four equal tokens: the token is the quarter the number falls into.
        let expected = (rng.uniform() * 4.0) as u32;
        assert_eq!(sampler.choose(&mut [0.5; 4]).unwrap().id, expected);
    }
}

#[test]
fn frequencies_match_probabilities() {
    let mut rng = Streams::new(1).get("test", 0);
    let logits: Vec<f32> = (0..40).map(|_| 1.5 * rng.normal() as f32).collect();
    let config = SamplingConfig { temperature: 0.8, top_k: 30, top_p: 0.97, ..SamplingConfig::default() };
    let probs = by_full_sort(&logits, &config, &[]);
    let n_draws = 100_000;
    let mut counts = vec![0f64; logits.len()];
    let mut sampler = sampler(&config, &[], 0);
    for _ in 0..n_draws {
        counts[sampler.choose(&mut logits.clone()).unwrap().id as usize] += 1.0;
    }
    let (mut chi_square, mut n_kept) = (0.0, 0.0);
    for (&count, &prob) in counts.iter().zip(&probs) {
        if prob > 0.0 {
            let expected = prob * f64::from(n_draws);
            chi_square += (count - expected).powi(2) / expected;
            n_kept += 1.0;
        } else {
            assert_eq!(count, 0.0);
        }
    }
    // Mean n − 1, variance 2(n − 1): five standard deviations.
    assert!(chi_square < n_kept - 1.0 + 5.0 * f64::sqrt(2.0 * (n_kept - 1.0)), "{chi_square} for {n_kept} tokens");
}

proptest! {
    #[test]
    fn nothing_is_dropped_without_filters(logits in prop::collection::vec(-20f32..20.0, 1..700)) {
        let probs = distribution(&logits, &SamplingConfig::default(), &[]);
        prop_assert!(probs.iter().all(|&p| p > 0.0));
    }

    #[test]
    fn the_distribution_is_that_of_the_full_sort(
        logits in prop::collection::vec(-6f32..6.0, 2..600),
        temperature in 0.3f64..2.0,
        top_k in 0usize..50,
        top_p in 0.05f64..=1.0,
        repetition_penalty in 0.5f64..2.0,
        prompt in prop::collection::vec(0u32..2, 0..4),
    ) {
        let config = SamplingConfig { temperature, top_k, top_p, repetition_penalty, ..SamplingConfig::default() };
        let expected = by_full_sort(&logits, &config, &prompt);
        for (id, (found, expected)) in distribution(&logits, &config, &prompt).iter().zip(&expected).enumerate() {
            prop_assert!((found - expected).abs() < ROUNDING, "token {id}: {found}, expected {expected}");
        }
    }

    #[test]
    fn log_probs_are_those_of_the_softmax_in_f64(
        logits in prop::collection::vec(-30f32..30.0, 1..600),
        temperature in 0.1f64..3.0,
    ) {
        let config = SamplingConfig { temperature, ..SamplingConfig::default() };
        let choice = sampler(&config, &[], 0).choose(&mut logits.clone()).unwrap();
        let scaled: Vec<f64> = logits.iter().map(|&logit| f64::from(logit) / (temperature + TEMPERATURE_EPS)).collect();
        let max = scaled.iter().copied().fold(f64::MIN, f64::max);
        let log_total = max + scaled.iter().map(|x| (x - max).exp()).sum::<f64>().ln();
        let expected = scaled[choice.id as usize] - log_total;
        prop_assert!((f64::from(choice.log_prob) - expected).abs() < ROUNDING * expected.abs().max(1.0));
    }
}

#[test]
fn frequency_and_presence_count_the_tokens_of_the_answer_alone() {
    let config = SamplingConfig { frequency_penalty: 0.5, presence_penalty: 0.25, ..SamplingConfig::greedy(9, vec![]) };
    let mut sampler = sampler(&config, &[0, 0, 2], 0);
    let chosen: Vec<u32> = (0..5).map(|_| sampler.choose(&mut [3.0, 2.6, 0.0]).unwrap().id).collect();
    // 3 − 0.75 < 2.6; then 2.25 and 1.85, 1.75 and 1.85, 1.75 and 1.35.
    assert_eq!(chosen, [0, 1, 0, 1, 0]);
    let config = SamplingConfig { presence_penalty: 2.0, ..SamplingConfig::default() };
    let mut sampler = Sampler { counts: [(1, 3)].into(), ..sampler_of(&config) };
    let found = sampler.distribution(&mut [0.0, 2.0]).unwrap();
    assert!(found.iter().all(|p| (p - 0.5).abs() < ROUNDING), "{found:?}");
    for penalty in [2.1, f64::NAN, -3.0] {
        let config = SamplingConfig { frequency_penalty: penalty, ..SamplingConfig::default() };
        assert!(config.validate().unwrap_err().to_string().starts_with("invalid `frequency_penalty`"));
    }
}

fn sampler_of(config: &SamplingConfig) -> Sampler {
    sampler(config, &[], 0)
}

#[test]
fn a_penalised_token_keeps_the_log_probability_of_the_model() {
    let config = SamplingConfig { frequency_penalty: 2.0, ..SamplingConfig::greedy(9, vec![]) };
    let mut sampler = sampler_of(&config);
    for _ in 0..2 {
        let choice = sampler.choose(&mut [9.0, 9f32 - 1.0]).unwrap();
        let expected = if choice.id == 0 { -(-1f64).exp().ln_1p() } else { -1.0 - (-1f64).exp().ln_1p() };
        assert!((f64::from(choice.log_prob) - expected).abs() < ROUNDING, "{choice:?}");
    }
}

#[test]
fn the_likeliest_tokens_come_in_order_with_the_log_probabilities_of_the_choice() {
    let mut logits = [1.0, 4.0, -2.0, 4.0, 3.0];
    let config = SamplingConfig { temperature: 0.7, top_k: 1, ..SamplingConfig::default() };
    let mut sampler = sampler_of(&config);
    let likeliest = sampler.likeliest(&logits, 3).unwrap();
    assert_eq!(likeliest.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 3, 4]);
    let choice = sampler.choose(&mut logits).unwrap();
    let of_choice = likeliest.iter().find(|(id, _)| *id == choice.id).unwrap();
    assert_eq!(of_choice.1, choice.log_prob);
    let all = sampler.likeliest(&logits, 99).unwrap();
    let total: f64 = all.iter().map(|(_, log_prob)| f64::from(*log_prob).exp()).sum();
    assert!(all.len() == 5 && (total - 1.0).abs() < ROUNDING, "{all:?}");
    assert!(sampler.likeliest(&[0.0, f32::NAN], 1).is_err() && sampler.likeliest(&[0.0], 0).unwrap().is_empty());
}
