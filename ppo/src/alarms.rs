//! Alarms during training: metrics of a step, and their course, against limits.
//!
//! An alarm is a function of what `metrics.jsonl` holds, so that a resumed run has heard what it would have heard without the
//! break; nothing here changes what is trained. It sounds once, when its number has been beyond the limit for some
//! logged steps in a row, and again only after it was back within.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use common::metrics::{self, METRICS_FILE, MetricsError, names};

use crate::doctor::{About, significant};

crate::doctor::checks! {
    KL_BELOW_ZERO = "kl-below-zero", Ppo,
        "`objective/kl`: not below −0.05 nats and not by more than 4 standard errors",
        "A mean divergence cannot be negative: the log-probabilities do not belong to the tokens that were sampled.",
        "Look for a temperature, padding or position that differs between sampling and scoring; `ppo doctor` measures it.",
        "TRL 0.11, `ppo_trainer.py`, which warns below −1 (\"might be a precursor for failed training\"), and issues 235, 925, 1857; the limit is ours";
    RATIO = "ratio", Ppo,
        "`policy/ratio_mean`: at most 10",
        "The updates go so far that old samples say nothing of the new policy.",
        "Lower `optimizer.lr`, `ppo.epochs` or `ppo.clip_range`.",
        "TRL 0.11, `ppo_trainer.py`, `ratio_threshold`: such batches are skipped there";
    APPROX_KL = "approx-kl", Ppo,
        "`policy/approx_kl`: at most 0.25 nats",
        "One step moves the policy too far from the one that sampled.",
        "Lower `optimizer.lr`, or make fewer updates a step (`ppo.epochs`, `ppo.minibatches`).",
        "minimind, `train_ppo.py`: it stops a step's epochs at 0.25";
    CLIP_FRACTION = "clip-fraction", Ppo,
        "`policy/clip_frac`: at most 0.3",
        "The objective of so many tokens is clipped that steps are larger than PPO's trust region.",
        "Lower `optimizer.lr`, or make fewer updates a step (`ppo.epochs`, `ppo.minibatches`).",
        "Schulman et al., arXiv:1707.06347, section 3; the limit is ours: `configs/tiny` stays below 0.15";
    EXPLAINED_VARIANCE = "explained-variance", Ppo,
        "`value/explained_variance`: not below 0 for 10 logged steps in a row",
        "The values are worse than a constant, so they add noise to the advantages.",
        "Raise `value_optimizer.lr`, or set `ppo.value_init` to \"zero-head\".",
        "openai/baselines, `explained_variance`: below 0 is worse than predicting nothing; the 10 steps are ours";
    ENDS_DRIFT = "ends-drift", Ppo,
        "`rollout/eos_rate`: not 0.2, and 4 standard errors, below the first step's, for 2 logged steps in a row",
        "Fewer and fewer answers end: the policy runs into the length limit.",
        "Lower `ppo.missing_eos_score`, raise `ppo.kl_coef`, or allow longer answers (`ppo.response_length`).",
        "Huang et al., arXiv:2403.17031, on the EOS trick; the limits are ours";
    LENGTH_DRIFT = "length-drift", RewardModel,
        "`rollout/response_length`: at most 1.5 times, at least half the first step's, within these bounds again after 3 logged steps",
        "The policy learns a length in place of better answers.",
        "Look at `beats-longer-wins` and `accuracy-by-length` of `ppo doctor`; raise `ppo.kl_coef`.",
        "Singhal et al., arXiv:2310.03716; the limits are ours";
    REPETITION = "repetition", RewardModel,
        "`rollout/repetition`: at most 0.2 above the first step's, for 2 logged steps in a row",
        "The answers repeat themselves, and the reward model pays for it.",
        "Look at `order-repeated` of `ppo doctor`; raise `ppo.kl_coef`, or stop earlier.",
        "Welleck et al., arXiv:1908.04319: the share of repeated 4-grams (seq-rep-4); the limit is ours";
    ENTROPY_COLLAPSE = "entropy-collapse", Ppo,
        "`policy/entropy`: at least a fifth of the first step's, for 2 logged steps in a row",
        "The policy answers almost always alike, so nothing is left to learn from.",
        "Lower `optimizer.lr`, raise `ppo.kl_coef` or `ppo.temperature`.",
        "TRL, \"Logging\": entropy should stay high; the limit is ours: https://huggingface.co/docs/trl/v0.16.1/logging";
    SCORE_AGAINST_ORDER = "score-against-order", RewardModel,
        "`val/order_accuracy`: not 0.15, and 4 standard errors, below the first evaluation's while `val/score` is above its first value",
        "The score rises while the reward model orders the policy's answers and their damaged forms ever worse: it is being exploited.",
        "Stop at an earlier checkpoint, raise `ppo.kl_coef`, or train the reward model on answers of this policy.",
        "Gao et al., arXiv:2210.10760: past some divergence the score rises while quality falls; the limits are ours";
}

/// Tokens of the pieces that [`repetition`] compares.
const N_GRAM: usize = 4;

/// Standard errors beyond which a difference is no noise: once in 30,000 steps by chance.
const ERRORS: f64 = 4.0;

/// Share of the pieces of four tokens that occurred in the same response before; 0 of fewer than four tokens.
///
/// # Source
/// Welleck et al., arXiv:1908.04319, section 6: `1 − |unique n-grams| / |n-grams|`, there of a whole continuation.
pub(crate) fn repetition(ids: &[u32]) -> f64 {
    let n = ids.windows(N_GRAM).len();
    let unique: HashSet<&[u32]> = ids.windows(N_GRAM).collect();
    if n == 0 { 0.0 } else { 1.0 - unique.len() as f64 / n as f64 }
}

/// Numbers by the name of their metric.
type Numbers = BTreeMap<String, f64>;

/// What a rule looks at.
struct Look<'a> {
    now: &'a Numbers,
    /// The first value of each metric in this run.
    first: &'a Numbers,
    /// Standard error of `objective/kl`.
    kl_error: f64,
    /// Responses of a step.
    n_responses: usize,
}

impl Look<'_> {
    fn now(&self, name: &str) -> Option<f64> {
        self.now.get(name).copied()
    }

    fn both(&self, name: &str) -> Option<(f64, f64)> {
        Some((self.now(name)?, *self.first.get(name)?))
    }

    /// The value under `name`, which may lie as far below `low` as above `high`.
    fn within(&self, name: &str, low: f64, high: f64) -> Option<Reading> {
        let value = self.now(name)?;
        let limit = if value < low { low } else { high };
        Some(Reading { value, limit, is_beyond: !(low..=high).contains(&value) })
    }

    /// The rate under `name`, which may not fall `by` below its first value; `n` values make a rate.
    fn not_below_first(&self, name: &str, by: f64, n: usize) -> Option<Reading> {
        let (value, first) = self.both(name)?;
        // One more of each kind, so that rates of 0 and 1 have an error too.
        let variance = |rate: f64| {
            let rate = (rate * n as f64 + 1.0) / (n as f64 + 2.0);
            rate * (1.0 - rate) / n as f64
        };
        let limit = first - by.max(ERRORS * (variance(value) + variance(first)).sqrt());
        Some(Reading { value, limit, is_beyond: value < limit })
    }
}

/// A number against its limit.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Reading {
    value: f64,
    limit: f64,
    is_beyond: bool,
}

/// One alarm.
struct Rule {
    about: &'static About,
    /// The metric that its message names.
    metric: &'static str,
    /// Logged steps in a row beyond the limit before it sounds.
    patience: u32,
    /// `None` where the metrics are not there.
    read: fn(&Look<'_>) -> Option<Reading>,
}

/// Comparisons that `val/order_accuracy` is an average of.
pub(crate) const N_ORDERED: usize = 32;

const RULES: [Rule; 10] = [
    Rule {
        about: &KL_BELOW_ZERO,
        metric: names::OBJECTIVE_KL,
        patience: 1,
        read: |look| look.within(names::OBJECTIVE_KL, -(ERRORS * look.kl_error).max(0.05), f64::INFINITY),
    },
    Rule {
        about: &RATIO,
        metric: names::POLICY_RATIO_MEAN,
        patience: 1,
        read: |look| look.within(names::POLICY_RATIO_MEAN, f64::NEG_INFINITY, 10.0),
    },
    Rule {
        about: &APPROX_KL,
        metric: names::POLICY_APPROX_KL,
        patience: 1,
        read: |look| look.within(names::POLICY_APPROX_KL, f64::NEG_INFINITY, 0.25),
    },
    Rule {
        about: &CLIP_FRACTION,
        metric: names::POLICY_CLIP_FRAC,
        patience: 1,
        read: |look| look.within(names::POLICY_CLIP_FRAC, f64::NEG_INFINITY, 0.3),
    },
    Rule {
        about: &EXPLAINED_VARIANCE,
        metric: names::VALUE_EXPLAINED_VARIANCE,
        patience: 10,
        read: |look| look.within(names::VALUE_EXPLAINED_VARIANCE, 0.0, f64::INFINITY),
    },
    Rule {
        about: &ENDS_DRIFT,
        metric: names::ROLLOUT_EOS_RATE,
        patience: 2,
        read: |look| look.not_below_first(names::ROLLOUT_EOS_RATE, 0.2, look.n_responses),
    },
    Rule {
        about: &LENGTH_DRIFT,
        metric: names::ROLLOUT_RESPONSE_LENGTH,
        patience: 3,
        read: |look| {
            let (_, first) = look.both(names::ROLLOUT_RESPONSE_LENGTH)?;
            look.within(names::ROLLOUT_RESPONSE_LENGTH, 0.5 * first, 1.5 * first)
        },
    },
    Rule {
        about: &REPETITION,
        metric: names::ROLLOUT_REPETITION,
        patience: 2,
        read: |look| {
            let (_, first) = look.both(names::ROLLOUT_REPETITION)?;
            look.within(names::ROLLOUT_REPETITION, f64::NEG_INFINITY, first + 0.2)
        },
    },
    Rule {
        about: &ENTROPY_COLLAPSE,
        metric: names::POLICY_ENTROPY,
        patience: 2,
        read: |look| {
            let (_, first) = look.both(names::POLICY_ENTROPY)?;
            look.within(names::POLICY_ENTROPY, 0.2 * first, f64::INFINITY)
        },
    },
    Rule {
        about: &SCORE_AGAINST_ORDER,
        metric: names::VAL_ORDER_ACCURACY,
        patience: 1,
        read: |look| {
            let (score, first) = look.both(names::VAL_SCORE)?;
            let reading = look.not_below_first(names::VAL_ORDER_ACCURACY, 0.15, N_ORDERED)?;
            Some(Reading { is_beyond: reading.is_beyond && score > first, ..reading })
        },
    },
];

/// An alarm that sounds.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Alarm {
    /// What it means.
    pub(crate) about: &'static About,
    metric: &'static str,
    step: u64,
    value: f64,
    limit: f64,
}

impl Alarm {
    /// The number and its limit, in words.
    pub(crate) fn says(&self) -> String {
        let Self { about, metric, step, value, limit } = self;
        let (value, limit) = (significant(*value), significant(*limit));
        format!("alarm `{}` at step {step}: `{metric}` is {value}, limit {limit}", about.id)
    }
}

/// The alarms of a run.
#[derive(Debug, Default)]
pub(crate) struct Alarms {
    n_responses: usize,
    first: Numbers,
    /// Logged steps in a row that each rule's number is beyond its limit.
    beyond: [u32; RULES.len()],
}

impl Alarms {
    /// Of a run with `n_responses` in a step that has not begun.
    pub(crate) fn new(n_responses: usize) -> Self {
        Self { n_responses, ..Self::default() }
    }

    /// Hears again what the run in `out` has logged.
    ///
    /// # Errors
    /// If its metrics cannot be read.
    pub(crate) fn replay(&mut self, out: &Path) -> Result<(), MetricsError> {
        for line in metrics::read(&out.join(METRICS_FILE))? {
            let step = line.get("step").and_then(serde_json::Value::as_u64).unwrap_or(0);
            let numbers: Vec<(&str, f64)> =
                line.iter().filter_map(|(name, value)| Some((name.as_str(), value.as_f64()?))).collect();
            // The error of the divergence is not logged: without it an alarm about it may have sounded less often.
            self.hear(step, &numbers, 0.0);
        }
        Ok(())
    }

    /// Hears the metrics of a step or an evaluation; returns the alarms that begin to sound. `kl_error` is the standard
    /// error of `objective/kl`.
    pub(crate) fn hear(&mut self, step: u64, logged: &[(&str, f64)], kl_error: f64) -> Vec<Alarm> {
        let now: Numbers = logged.iter().map(|&(name, value)| (name.to_owned(), value)).collect();
        for (name, value) in &now {
            self.first.entry(name.clone()).or_insert(*value);
        }
        let look = Look { now: &now, first: &self.first, kl_error, n_responses: self.n_responses };
        let mut sounding = Vec::new();
        for (rule, beyond) in RULES.iter().zip(&mut self.beyond) {
            let Some(Reading { value, limit, is_beyond }) = (rule.read)(&look) else { continue };
            *beyond = if is_beyond { *beyond + 1 } else { 0 };
            if *beyond == rule.patience {
                sounding.push(Alarm { about: rule.about, metric: rule.metric, step, value, limit });
            }
        }
        sounding
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ids of the alarms that begin to sound at each of the steps.
    fn heard(steps: &[&[(&str, f64)]]) -> Vec<Vec<&'static str>> {
        let mut alarms = Alarms::new(64);
        let ids = |alarms: Vec<Alarm>| alarms.iter().map(|alarm| alarm.about.id).collect();
        (1..).zip(steps).map(|(step, numbers)| ids(alarms.hear(step, numbers, 0.01))).collect()
    }

    #[test]
    fn repetition_is_the_share_of_pieces_that_occurred_before() {
        assert_eq!(repetition(&[1, 2, 3]), 0.0);
        assert_eq!(repetition(&[1, 2, 3, 4, 5]), 0.0);
        // Pieces aaaa, aaaa, aaaa, of which one is new.
        assert!((repetition(&[7; 6]) - 2.0 / 3.0).abs() < 1e-12);
    }

    #[test]
    fn an_alarm_sounds_once_until_its_number_was_within_the_limit() {
        let kl = |value: f64| [(names::OBJECTIVE_KL, value)];
        let steps = [kl(0.0), kl(-0.04), kl(-0.06), kl(-0.5), kl(0.1), kl(f64::NAN)];
        let steps: Vec<&[(&str, f64)]> = steps.iter().map(<[_; 1]>::as_slice).collect();
        let expected: [&[&str]; 6] = [&[], &[], &["kl-below-zero"], &[], &[], &["kl-below-zero"]];
        assert_eq!(heard(&steps), expected);
    }

    #[test]
    fn noise_of_the_divergence_is_no_alarm() {
        let mut alarms = Alarms::new(64);
        assert!(alarms.hear(1, &[(names::OBJECTIVE_KL, -0.3)], 0.1).is_empty());
        assert_eq!(alarms.hear(2, &[(names::OBJECTIVE_KL, -0.5)], 0.1)[0].about.id, "kl-below-zero");
    }

    #[test]
    fn patience_counts_steps_in_a_row() {
        let variance = |value: f64| [(names::VALUE_EXPLAINED_VARIANCE, value)];
        let mut values = vec![-1.0; 9];
        values.push(0.1);
        values.extend([-1.0; 10]);
        let steps: Vec<[(&str, f64); 1]> = values.into_iter().map(variance).collect();
        let steps: Vec<&[(&str, f64)]> = steps.iter().map(<[_; 1]>::as_slice).collect();
        let heard = heard(&steps);
        assert!(heard[..19].iter().all(Vec::is_empty), "{heard:?}");
        assert_eq!(heard[19], ["explained-variance"]);
    }

    #[test]
    fn drifts_are_measured_from_the_first_step() {
        let step = |eos: f64, length: f64, repetition: f64, entropy: f64| {
            [
                (names::ROLLOUT_EOS_RATE, eos),
                (names::ROLLOUT_RESPONSE_LENGTH, length),
                (names::ROLLOUT_REPETITION, repetition),
                (names::POLICY_ENTROPY, entropy),
            ]
        };
        let (first, last) = (step(0.9, 40.0, 0.1, 1.0), step(0.5, 64.0, 0.4, 0.1));
        let heard = heard(&[&first, &last, &last, &last]);
        assert_eq!(heard[..2], [vec![], Vec::<&str>::new()]);
        assert_eq!(heard[2], ["ends-drift", "repetition", "entropy-collapse"]);
        assert_eq!(heard[3], ["length-drift"]);
    }

    #[test]
    fn a_score_that_rises_against_the_order_of_damaged_answers_is_heard() {
        let step = |score: f64, order: f64| [(names::VAL_SCORE, score), (names::VAL_ORDER_ACCURACY, order)];
        let alarms = heard(&[&step(0.0, 0.95), &step(-1.0, 0.3), &step(1.0, 0.9), &step(1.0, 0.3)]);
        assert_eq!(alarms, [vec![], vec![], vec![], vec!["score-against-order"]]);
    }
}
