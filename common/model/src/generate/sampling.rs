//! From one row of logits to one token. Pure, on the host.

use std::collections::BTreeMap;

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
/// The order is that of Hugging Face: repetition penalty, temperature, top-k, top-p, then the draw; the penalties of
/// OpenAI's interface come behind the repetition penalty.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingConfig {
    /// Divides the logits; below [`TEMPERATURE_EPS`] the likeliest token is taken, the one with the lowest id among
    /// equals.
    pub temperature: f64,
    /// Keeps the `top_k` likeliest tokens and those that equal the last of them; 0 keeps all.
    pub top_k: usize,
    /// Keeps the fewest tokens, likeliest first, whose probabilities sum to at least `top_p`; 1 keeps all.
    pub top_p: f64,
    /// Divides the positive and multiplies the negative logits of tokens already in the prompt or the answer; 1 is off.
    pub repetition_penalty: f64,
    /// Subtracted from the logit of a token for each time that the answer has it; 0 is off.
    pub frequency_penalty: f64,
    /// Subtracted from the logits of the tokens that the answer has; 0 is off.
    pub presence_penalty: f64,
    /// Most tokens of one answer, the stop token included.
    pub max_tokens: usize,
    /// Tokens that end an answer; they are part of it.
    pub stop: Vec<u32>,
}

impl Default for SamplingConfig {
    /// The model's own distribution, 128 tokens, no stop token.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            max_tokens: 128,
            stop: Vec::new(),
        }
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
        check_repetition_penalty(self.repetition_penalty)?;
        for (name, penalty) in
            [("frequency_penalty", self.frequency_penalty), ("presence_penalty", self.presence_penalty)]
        {
            if !(-MAX_PENALTY..=MAX_PENALTY).contains(&penalty) {
                return Err(invalid(name, "a number from -2 to 2", penalty));
            }
        }
        check_max_tokens(self.max_tokens)
    }
}

/// The largest frequency or presence penalty, as in OpenAI's interface.
const MAX_PENALTY: f64 = 2.0;

/// Refuses a repetition penalty that sampling in f32 would turn into 0 or infinity.
pub(super) fn check_repetition_penalty(penalty: f64) -> Result<(), GenerateError> {
    if (penalty as f32).is_normal() && penalty > 0.0 {
        return Ok(());
    }
    Err(invalid("repetition_penalty", "a number above 0 and within the range of f32", penalty))
}

/// Refuses an answer without tokens.
pub(super) fn check_max_tokens(max_tokens: usize) -> Result<(), GenerateError> {
    if max_tokens == 0 { Err(invalid("max_tokens", "at least 1", max_tokens)) } else { Ok(()) }
}

/// A chosen token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Choice {
    /// The token.
    pub id: u32,
    /// Its log-probability in nats under `softmax(logits / temperature)` over the whole vocabulary, before the
    /// penalties, top-k and top-p (at temperature 0: under `softmax(logits)`). This is what PPO needs of the
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
    frequency_penalty: f32,
    presence_penalty: f32,
    rng: Rng,
    /// Distinct tokens of the prompt and the answer so far; stays empty while the repetition penalty is off.
    seen: Vec<u32>,
    /// How often the answer has each of its tokens; stays empty while neither of its penalties is on.
    counts: BTreeMap<u32, u32>,
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
            frequency_penalty: config.frequency_penalty as f32,
            presence_penalty: config.presence_penalty as f32,
            rng,
            seen,
            counts: BTreeMap::new(),
            weights: Vec::new(),
            sums: Vec::new(),
            masses: Vec::new(),
            candidates: Vec::new(),
        }
    }

    /// Chooses the next token; changes `logits` where penalties apply.
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
        // Of a token that only the penalty made likely, at a low temperature, it can lie below what f32 holds.
        let log_prob = |logit: f32| ((f64::from(logit) - max) * scale - log_total).max(f64::from(f32::MIN)) as f32;

        if self.repetition_penalty == 1.0 && !self.counts_tokens() {
            let id = if self.is_greedy() {
                argmax(logits)
            } else {
                self.filter(logits);
                self.draw()
            };
            return Ok(Choice { id, log_prob: log_prob(logits[id as usize]) });
        }
        let unpenalised = logits.to_vec();
        self.penalise(logits);
        let id = if self.is_greedy() {
            argmax(logits)
        } else {
            self.weigh(logits, scale);
            self.filter(logits);
            self.draw()
        };
        if self.repetition_penalty != 1.0
            && let Err(at) = self.seen.binary_search(&id)
        {
            self.seen.insert(at, id);
        }
        if self.counts_tokens() {
            *self.counts.entry(id).or_default() += 1;
        }
        Ok(Choice { id, log_prob: log_prob(unpenalised[id as usize]) })
    }

    /// The `n` likeliest tokens with their log-probabilities as [`Choice::log_prob`] has them, likeliest first, the lowest
    /// id among equals.
    ///
    /// # Errors
    /// [`NonFiniteLogit`] if a logit is NaN or infinite.
    pub fn likeliest(&mut self, logits: &[f32], n: usize) -> Result<Vec<(u32, f32)>, NonFiniteLogit> {
        if n == 0 {
            return Ok(Vec::new());
        }
        check_finite(logits)?;
        let scale = self.scale();
        let max = f64::from(self.weigh(logits, scale));
        let log_total = self.total().ln();
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        let likelier = |&a: &u32, &b: &u32| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b));
        if n < order.len() {
            order.select_nth_unstable_by(n - 1, likelier);
            order.truncate(n);
        }
        order.sort_unstable_by(likelier);
        let log_prob = |id: u32| ((f64::from(logits[id as usize]) - max) * scale - log_total).max(f64::from(f32::MIN));
        Ok(order.into_iter().map(|id| (id, log_prob(id) as f32)).collect())
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
        self.penalise(logits);
        if self.is_greedy() {
            let chosen = argmax(logits);
            return Ok((0..logits.len() as u32).map(|id| if id == chosen { 1.0 } else { 0.0 }).collect());
        }
        self.weigh(logits, self.scale());
        self.filter(logits);
        let total = self.total();
        Ok(self.weights.iter().map(|&weight| f64::from(weight) / total).collect())
    }

    /// Whether a penalty depends on how often the answer has a token.
    fn counts_tokens(&self) -> bool {
        self.frequency_penalty != 0.0 || self.presence_penalty != 0.0
    }

    /// Applies every penalty.
    ///
    /// # Source
    /// OpenAI, "Advanced usage", parameter details: `logit[j] −= count[j]·frequency + (count[j] > 0)·presence`, where the
    /// tokens of the prompt do not count.
    fn penalise(&self, logits: &mut [f32]) {
        penalise(logits, &self.seen, self.repetition_penalty);
        for (&id, &count) in &self.counts {
            let penalty = count as f32 * self.frequency_penalty + self.presence_penalty;
            let logit = &mut logits[id as usize];
            *logit = (*logit - penalty).clamp(f32::MIN, f32::MAX);
        }
    }

    /// Whether the likeliest token is taken: at a temperature this low nothing else would be drawn, but for equals.
    fn is_greedy(&self) -> bool {
        self.temperature < TEMPERATURE_EPS
    }

    /// Factor on the logits.
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

/// Divides the positive and multiplies the negative numbers of the tokens `seen`, each once; the results stay finite.
///
/// # Source
/// Keskar et al., "CTRL", arXiv:1909.05858, section 4.1, as in transformers' `RepetitionPenaltyLogitsProcessor`, which
/// multiplies negative logits where the paper divides all.
pub(super) fn penalise(logits: &mut [f32], seen: &[u32], penalty: f32) {
    for &id in seen {
        let logit = &mut logits[id as usize];
        let penalised = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
        *logit = penalised.clamp(f32::MIN, f32::MAX);
    }
}

/// The lowest id among those with the largest logit.
fn argmax(logits: &[f32]) -> u32 {
    let max = max_of(logits);
    logits.iter().position(|&logit| logit == max).expect("logits are finite") as u32
}

#[cfg(test)]
mod tests;
