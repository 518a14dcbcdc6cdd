//! From one row of logits to one token. Pure, on the host.

use super::{GenerateError, invalid};
use base::rng::Rng;
use kernels::softmax::{self, BLOCK, max_of, ordered_bits};

/// Logits are divided by `temperature + TEMPERATURE_EPS` (by exactly 1 at temperature 1), in sampling as in every pass
/// that scores what was sampled: the same rule as in [`token_log_probs`](kernels::token_log_probs).
///
/// # Source
/// Huang et al., "The N+ Implementation Details of RLHF with PPO", arXiv:2403.17031, and TRL's PPO trainer.
pub const TEMPERATURE_EPS: f64 = 1e-7;

/// How tokens are chosen and when to stop.
///
/// The order is that of Hugging Face: repetition penalty, temperature, top-k, top-p, then the draw.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingConfig {
    /// Divides the logits; 0 takes the likeliest token, the one with the lowest id among equals.
    pub temperature: f64,
    /// Keeps the `top_k` likeliest tokens and those that equal the last of them; 0 keeps all.
    pub top_k: usize,
    /// Keeps the fewest tokens, likeliest first, whose probabilities sum to at least `top_p`; 1 keeps all.
    pub top_p: f64,
    /// Divides the positive and multiplies the negative logits of tokens already in the prompt or the answer; 1 is off.
    pub repetition_penalty: f64,
    /// Most tokens of one answer, the stop token included.
    pub max_tokens: usize,
    /// Tokens that end an answer; they are part of it.
    pub stop: Vec<u32>,
}

impl Default for SamplingConfig {
    /// The model's own distribution, 128 tokens, no stop token.
    fn default() -> Self {
        Self { temperature: 1.0, top_k: 0, top_p: 1.0, repetition_penalty: 1.0, max_tokens: 128, stop: Vec::new() }
    }
}

impl SamplingConfig {
    /// The likeliest token every time.
    pub fn greedy(max_tokens: usize, stop: Vec<u32>) -> Self {
        Self { temperature: 0.0, max_tokens, stop, ..Self::default() }
    }

    /// Checks every setting.
    ///
    /// # Errors
    /// [`GenerateError::InvalidOption`] naming the first setting outside its range.
    pub fn validate(&self) -> Result<(), GenerateError> {
        if !(self.temperature.is_finite() && self.temperature >= 0.0) {
            return Err(invalid("temperature", "a number of at least 0", self.temperature));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(invalid("top_p", "a number above 0 and up to 1", self.top_p));
        }
        if !(self.repetition_penalty.is_finite() && self.repetition_penalty > 0.0) {
            return Err(invalid("repetition_penalty", "a number above 0", self.repetition_penalty));
        }
        if self.max_tokens == 0 {
            return Err(invalid("max_tokens", "at least 1", self.max_tokens));
        }
        Ok(())
    }
}

/// A chosen token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// The token.
    pub id: u32,
    /// Its log-probability in nats under `softmax(logits / temperature)` over the whole vocabulary, before the
    /// repetition penalty, top-k and top-p (at temperature 0: under `softmax(logits)`). This is what PPO needs of the
    /// policy it sampled from, and why its rollouts use none of the three.
    pub log_prob: f32,
}

/// A row of logits that holds NaN or infinity.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct NonFiniteLogit {
    /// The first such token.
    pub id: u32,
    /// Its logit.
    pub logit: f32,
}

/// Refuses a row that holds NaN or infinity.
pub(super) fn check_finite(logits: &[f32]) -> Result<(), NonFiniteLogit> {
    match softmax::first_not_finite(logits) {
        None => Ok(()),
        Some(id) => Err(NonFiniteLogit { id: id as u32, logit: logits[id] }),
    }
}

/// Chooses the tokens of one row; holds its random stream, the tokens it has seen and its buffers.
#[derive(Debug, Clone)]
pub struct Sampler {
    temperature: f64,
    top_k: usize,
    top_p: f64,
    repetition_penalty: f32,
    rng: Rng,
    /// Distinct tokens of the prompt and the answer so far; stays empty while the penalty is off.
    seen: Vec<u32>,
    weights: Vec<f32>,
    sums: Vec<f64>,
    masses: Vec<f64>,
    candidates: Vec<u32>,
}

impl Sampler {
    /// A sampler for the continuation of `prompt`, drawing from `rng`.
    pub fn new(config: &SamplingConfig, prompt: &[u32], rng: Rng) -> Self {
        let mut seen = Vec::new();
        if config.repetition_penalty != 1.0 {
            seen.extend_from_slice(prompt);
            seen.sort_unstable();
            seen.dedup();
        }
        Self {
            temperature: config.temperature,
            top_k: config.top_k,
            top_p: config.top_p,
            repetition_penalty: config.repetition_penalty as f32,
            rng,
            seen,
            weights: Vec::new(),
            sums: Vec::new(),
            masses: Vec::new(),
            candidates: Vec::new(),
        }
    }

    /// Chooses the next token; changes `logits` where the repetition penalty applies.
    ///
    /// Takes one uniform number from the stream (none at temperature 0) and inverts the cumulative distribution in the
    /// order of the ids. Weights are f32, their sums f64; the exponential is our own, so that every processor and
    /// system draws the same tokens from the same logits.
    ///
    /// # Errors
    /// [`NonFiniteLogit`] if a logit is NaN or infinite.
    ///
    /// # Panics
    /// If `logits` is empty.
    pub fn choose(&mut self, logits: &mut [f32]) -> Result<Choice, NonFiniteLogit> {
        assert!(!logits.is_empty(), "there is no token to choose from");
        check_finite(logits)?;
        let scale = self.scale();
        let max = f64::from(self.weigh(logits, scale));
        let log_total = self.total().ln();
        let log_prob = |logit: f32| ((f64::from(logit) - max) * scale - log_total) as f32;

        if self.repetition_penalty == 1.0 {
            let id = if self.temperature == 0.0 {
                argmax(logits)
            } else {
                self.filter(logits);
                self.draw()
            };
            return Ok(Choice { id, log_prob: log_prob(logits[id as usize]) });
        }
        let unpenalised: Vec<f32> = self.seen.iter().map(|&id| logits[id as usize]).collect();
        penalise(logits, &self.seen, self.repetition_penalty);
        let id = if self.temperature == 0.0 {
            argmax(logits)
        } else {
            self.weigh(logits, scale);
            self.filter(logits);
            self.draw()
        };
        let logit = match self.seen.binary_search(&id) {
            Ok(at) => unpenalised[at],
            Err(at) => {
                self.seen.insert(at, id);
                logits[id as usize]
            }
        };
        Ok(Choice { id, log_prob: log_prob(logit) })
    }

    /// The probabilities that [`choose`](Self::choose) would draw from, after the penalty and the filters.
    ///
    /// Takes nothing from the stream; changes `logits` as `choose` does.
    ///
    /// # Errors
    /// [`NonFiniteLogit`] if a logit is NaN or infinite.
    ///
    /// # Panics
    /// If `logits` is empty.
    pub fn distribution(&mut self, logits: &mut [f32]) -> Result<Vec<f64>, NonFiniteLogit> {
        assert!(!logits.is_empty(), "there is no token to choose from");
        check_finite(logits)?;
        penalise(logits, &self.seen, self.repetition_penalty);
        if self.temperature == 0.0 {
            let chosen = argmax(logits);
            return Ok((0..logits.len() as u32).map(|id| if id == chosen { 1.0 } else { 0.0 }).collect());
        }
        self.weigh(logits, self.scale());
        self.filter(logits);
        let total = self.total();
        Ok(self.weights.iter().map(|&weight| f64::from(weight) / total).collect())
    }

    /// What logits are multiplied by.
    fn scale(&self) -> f64 {
        if self.temperature == 0.0 || self.temperature == 1.0 {
            1.0
        } else {
            1.0 / (self.temperature + TEMPERATURE_EPS)
        }
    }

    fn total(&self) -> f64 {
        self.sums.iter().sum()
    }

    /// Sets `weights = exp((logits − max)·scale)` and the sums of its blocks; returns `max`.
    fn weigh(&mut self, logits: &[f32], scale: f64) -> f32 {
        self.weights.resize(logits.len(), 0.0);
        self.sums.resize(logits.len().div_ceil(BLOCK), 0.0);
        softmax::weigh(logits, scale as f32, &mut self.weights, &mut self.sums)
    }

    fn sum_blocks(&mut self) {
        softmax::sum_blocks(&self.weights, &mut self.sums);
    }

    /// Applies top-k and top-p to the weights.
    fn filter(&mut self, logits: &[f32]) {
        if self.top_k > 0 && self.top_k < logits.len() {
            self.keep_top_k(logits);
        }
        if self.top_p < 1.0 {
            self.keep_top_p(logits);
        }
    }

    /// Draws a token by its weight.
    fn draw(&mut self) -> u32 {
        let mut target = self.rng.uniform() * self.total();
        let mut chosen_block = 0;
        for (block, &sum) in self.sums.iter().enumerate() {
            if sum > 0.0 {
                chosen_block = block;
                if target < sum {
                    break;
                }
                target -= sum;
            }
        }
        let first = chosen_block * BLOCK;
        let last = self.weights.len().min(first + BLOCK);
        let mut chosen = first;
        for (id, &weight) in (first..).zip(&self.weights[first..last]) {
            if weight > 0.0 {
                chosen = id; // if rounding leaves a rest of the target, the last possible token takes it
                if target < weight as f64 {
                    break;
                }
                target -= weight as f64;
            }
        }
        chosen as u32
    }

    /// Clears the weights of tokens below the `top_k`-th largest logit.
    fn keep_top_k(&mut self, logits: &[f32]) {
        // The buffer of candidates holds the bits of the logits here: selection needs values, not ids.
        self.candidates.clear();
        self.candidates.extend(logits.iter().map(|&logit| ordered_bits(logit)));
        let (_, &mut cut, _) = self.candidates.select_nth_unstable_by(self.top_k - 1, |a, b| b.cmp(a));
        for (weight, &logit) in self.weights.iter_mut().zip(logits) {
            *weight = if ordered_bits(logit) < cut { 0.0 } else { *weight };
        }
        self.sum_blocks();
    }

    /// Clears the weights outside the smallest set of likeliest tokens with at least `top_p` of their sum.
    ///
    /// A histogram over the logits finds the bucket where the sum is reached, so only that bucket's tokens are ordered.
    fn keep_top_p(&mut self, logits: &[f32]) {
        let (max, per_logit) = (max_of(logits), self.scale() as f32 * BUCKETS_PER_NAT);
        let bucket_of = |logit: f32| (((max - logit) * per_logit) as usize).min(N_BUCKETS - 1);
        self.masses.clear();
        self.masses.resize(N_BUCKETS, 0.0);
        for (&logit, &weight) in logits.iter().zip(&self.weights) {
            self.masses[bucket_of(logit)] += f64::from(weight);
        }
        let mut missing = self.top_p * self.total();
        let mut bucket = 0;
        for (i, &mass) in self.masses.iter().enumerate().filter(|&(_, &mass)| mass > 0.0) {
            bucket = i; // if rounding leaves something missing, the last bucket takes it
            if mass >= missing {
                break;
            }
            missing -= mass;
        }
        let in_bucket = |&(id, &logit): &(u32, &f32)| bucket_of(logit) == bucket && self.weights[id as usize] > 0.0;
        self.candidates.clear();
        self.candidates.extend((0u32..).zip(logits).filter(in_bucket).map(|(id, _)| id));

        let likelier = |&a: &u32, &b: &u32| {
            let (logit_a, logit_b) = (logits[a as usize], logits[b as usize]);
            logit_b.partial_cmp(&logit_a).expect("logits are finite").then(a.cmp(&b))
        };
        let (mut low, mut high) = (0, self.candidates.len());
        // Bisection by mass: the last kept token lies in `low..high`, all before `low` are kept.
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            self.candidates[low..high].select_nth_unstable_by(middle - low, likelier);
            let mass: f64 = self.candidates[low..middle].iter().map(|&id| f64::from(self.weights[id as usize])).sum();
            if mass >= missing {
                high = middle;
            } else {
                missing -= mass;
                low = middle;
            }
        }
        let last = self.candidates[low];
        let cut = logits[last as usize];
        for ((id, weight), &logit) in (0u32..).zip(self.weights.iter_mut()).zip(logits) {
            let keep = logit > cut || logit == cut && id <= last;
            *weight = if keep { *weight } else { 0.0 };
        }
        self.sum_blocks();
    }
}

/// Resolution of top-p's histogram.
const BUCKETS_PER_NAT: f32 = 64.0;

/// Width of top-p's histogram: 16 nats below the likeliest token, and all that is less likely in the last bucket.
const N_BUCKETS: usize = 1024;

/// Divides the positive and multiplies the negative numbers of the tokens `seen`, each once.
///
/// # Source
/// Keskar et al., "CTRL", arXiv:1909.05858, section 4.1, as in transformers' `RepetitionPenaltyLogitsProcessor`, which
/// multiplies negative logits where the paper divides all.
pub(super) fn penalise(logits: &mut [f32], seen: &[u32], penalty: f32) {
    for &id in seen {
        let logit = &mut logits[id as usize];
        *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
    }
}

/// The lowest id among those with the largest logit.
fn argmax(logits: &[f32]) -> u32 {
    let max = max_of(logits);
    logits.iter().position(|&logit| logit == max).expect("logits are finite") as u32
}

#[cfg(test)]
mod tests {
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
    fn settings_out_of_range_are_named() {
        let base = SamplingConfig::default();
        let cases = [
            (SamplingConfig { temperature: -0.1, ..base.clone() }, "temperature"),
            (SamplingConfig { temperature: f64::NAN, ..base.clone() }, "temperature"),
            (SamplingConfig { top_p: 0.0, ..base.clone() }, "top_p"),
            (SamplingConfig { top_p: 1.1, ..base.clone() }, "top_p"),
            (SamplingConfig { repetition_penalty: 0.0, ..base.clone() }, "repetition_penalty"),
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
}
