//! The reward model on labelled pairs: whether it orders them better than simple counts, and as surely as it says.

use std::path::{Path, PathBuf};

use anyhow::Context;
use common::checkpoint::{CONFIG_FILE, Checkpoint};
use common::data::file_sha256;
use common::data::records::{Pair, ReadOptions, read_pairs};
use common::group::Group;
use common::model::ScalarGpt;
use common::score::{EncodedPair, PairTooLong, ScoreError, Watch, distance, longer_wins, score_pairs};
use common::session::DataConfig;
use common::stats::{Interval, win};
use common::tokenizer::Tokenizer;
use serde::Deserialize;

use super::about;
use super::repeats;
use super::report::{Check, Verdict, interval};
use super::scores::Answered;
use super::tokens::chain;
use super::words::BagOfWords;

/// Held-out pairs that are scored, from the beginning of the files.
const MAX_PAIRS: usize = 512;

/// Pairs from which a calibration can be read, and of which a reward model that is of use orders more than half right.
const ENOUGH: usize = 100;

/// Largest error of the calibration.
const CALIBRATION: f64 = 0.1;

/// Preference pairs, or why there are none.
pub(super) type Source = Result<Vec<Pair>, String>;

/// The pairs to measure a reward model on.
pub(super) struct Sources {
    /// That it was trained on.
    pub(super) training: Source,
    /// That it was not.
    pub(super) held_out: Source,
}

/// What the configuration of a reward model says of its data.
#[derive(Deserialize)]
struct Trained {
    data: DataConfig<PairTooLong>,
}

impl Sources {
    /// Reads the pairs of the flags, and for those that are not given the files that the reward model's own
    /// configuration names, unless they have changed since.
    ///
    /// # Errors
    /// If a file of the flags cannot be read or has no pair: whoever names a file wants it looked at.
    pub(super) fn find(
        reward_model: &Checkpoint,
        training: Option<&Path>,
        held_out: Option<&Path>,
    ) -> anyhow::Result<Self> {
        let trained = (|| -> anyhow::Result<Trained> {
            let path = reward_model.dir().join(CONFIG_FILE);
            let text =
                std::fs::read_to_string(&path).with_context(|| format!("failed to read `{}`", path.display()))?;
            toml::from_str(&text).with_context(|| format!("`{}` names no data", path.display()))
        })();
        let trained = trained.map_err(chain);
        let of_config = |files: fn(&DataConfig<PairTooLong>) -> &[PathBuf]| -> Source {
            let trained = trained.as_ref().map_err(Clone::clone)?;
            unchanged(reward_model, files(&trained.data))?;
            read(files(&trained.data), trained.data.read_options()).map_err(chain)
        };
        let find = |flag: Option<&Path>, files| match flag {
            Some(file) => read(&[file.to_owned()], ReadOptions::default()).map(Ok),
            None => Ok(of_config(files)),
        };
        Ok(Self { training: find(training, |data| &data.train)?, held_out: find(held_out, |data| &data.val)? })
    }
}

/// Checks that files hold what the reward model was trained with.
fn unchanged(reward_model: &Checkpoint, files: &[PathBuf]) -> Result<(), String> {
    for file in files {
        let recorded = reward_model.manifest().and_then(|manifest| manifest.data.get(&file.display().to_string()));
        let now = file_sha256(file).map_err(chain)?;
        if recorded.is_some_and(|recorded| *recorded != now) {
            return Err(format!("`{}` has changed since the reward model was trained", file.display()));
        }
    }
    Ok(())
}

fn read(files: &[PathBuf], options: ReadOptions) -> anyhow::Result<Vec<Pair>> {
    let mut all = Vec::new();
    for file in files {
        all.extend(read_pairs(file, options)?);
    }
    let names: Vec<String> = files.iter().map(|file| format!("`{}`", file.display())).collect();
    anyhow::ensure!(!all.is_empty(), "there is no pair in {}", names.join(", "));
    Ok(all)
}

/// Held-out pairs with their scores.
pub(crate) struct Scored {
    pub(crate) pairs: Vec<Pair>,
    pub(crate) encoded: Vec<EncodedPair>,
    /// By how much the chosen answer scores higher.
    pub(crate) distances: Vec<f64>,
}

impl Scored {
    /// Scores the first pairs that fit the model's context, the beginning of a long prompt cut off.
    ///
    /// # Errors
    /// If a score is not finite.
    pub(super) fn of(
        model: &ScalarGpt,
        tokenizer: &Tokenizer,
        pairs: Vec<Pair>,
        batch_size: usize,
        watch: Watch<'_>,
    ) -> Result<Self, ScoreError> {
        let max_seq_len = model.config().max_seq_len;
        let encode = |pair: Pair| {
            let encoded = EncodedPair::new(&pair, tokenizer).ok()?.with_prompt_cut(max_seq_len)?;
            Some((pair, encoded))
        };
        let (pairs, encoded): (Vec<_>, Vec<_>) = pairs.into_iter().filter_map(encode).take(MAX_PAIRS).unzip();
        let distances = score_pairs(&Group::alone(), model, &encoded, batch_size, watch)?;
        let distances = distances.into_iter().map(distance).collect();
        Ok(Self { pairs, encoded, distances })
    }

    /// Answers that are scored of `pairs`, at most.
    pub(super) fn n_answers(pairs: &[Pair]) -> usize {
        2 * pairs.len().min(MAX_PAIRS)
    }

    /// The preferred answers.
    pub(super) fn answered(&self) -> Vec<Answered> {
        let both = self.pairs.iter().zip(&self.encoded);
        both.map(|(pair, encoded)| Answered {
            prompt: encoded.chosen[..encoded.n_prompt].to_vec(),
            answer: pair.chosen.clone(),
        })
        .filter(|answered| !answered.answer.trim().is_empty())
        .collect()
    }

    /// Whether each pair is in the labelled order.
    fn wins(&self) -> Vec<f64> {
        self.distances.iter().map(|&distance| win(distance, 0.0)).collect()
    }

    /// All checks of held-out pairs; `training` is for the baseline that is fitted.
    pub(super) fn checks(&self, training: &Source) -> Vec<Check> {
        let wins = self.wins();
        let Some(accuracy) = Interval::of_rate(&wins) else { return skipped("no held-out pair fits the context") };
        let is_reversed = accuracy.high < 0.5;
        let reason = format!("of {} held-out pairs, {} are in the labelled order", accuracy.n, interval(accuracy));
        let accuracy = match Check::above(&about::ACCURACY, accuracy, 0.5, reason.clone()) {
            check if check.verdict == Verdict::Warn && accuracy.n >= ENOUGH => {
                let reason = reason + ": so many, and no better than chance";
                Check::measured(&about::ACCURACY, Verdict::Fail, accuracy.mean, 0.5, reason)
            }
            check => check,
        };
        if is_reversed && accuracy.verdict == Verdict::Fail {
            let why = "the scores order the pairs against their labels";
            return [accuracy].into_iter().chain(skipped(why).into_iter().skip(1)).collect();
        }
        vec![
            accuracy,
            self.beats_longer_wins(&wins),
            self.beats_bag_of_words(&wins, training),
            calibration(&self.distances),
            self.by_length(&wins),
        ]
    }

    /// Compared with the better of "longer wins" and "shorter wins".
    fn beats_longer_wins(&self, wins: &[f64]) -> Check {
        let longer: Vec<f64> = self.encoded.iter().map(longer_wins).collect();
        let rate = longer.iter().sum::<f64>() / longer.len().max(1) as f64;
        let (name, baseline) = if rate >= 0.5 {
            ("longer wins", longer)
        } else {
            ("shorter wins", longer.iter().map(|win| 1.0 - win).collect())
        };
        beats(&about::LONGER_WINS, wins, &baseline, name)
    }

    fn beats_bag_of_words(&self, wins: &[f64], training: &Source) -> Check {
        match training {
            Ok(training) => {
                let bag = BagOfWords::fit(training);
                let baseline: Vec<f64> = self.pairs.iter().map(|pair| bag.wins(pair)).collect();
                beats(&about::BAG_OF_WORDS, wins, &baseline, "a bag of words")
            }
            Err(reason) => Check::skipped(&about::BAG_OF_WORDS, reason),
        }
    }

    /// The lower of the accuracies where the longer and where the shorter answer is preferred.
    fn by_length(&self, wins: &[f64]) -> Check {
        let about = &about::BY_LENGTH;
        let of = |which: f64| {
            let wins = wins.iter().zip(&self.encoded).filter(|(_, pair)| longer_wins(pair) == which);
            Interval::of_rate(&wins.map(|(&win, _)| win).collect::<Vec<_>>())
        };
        let (Some(longer), Some(shorter)) = (of(1.0), of(0.0)) else {
            return Check::skipped(about, "the preferred answers are all longer, or all shorter");
        };
        let worse = if longer.mean < shorter.mean { longer } else { shorter };
        let verdict = if worse.high < 0.5 { Verdict::Fail } else { Verdict::Pass };
        let reason = format!(
            "accuracy {} where the longer answer is preferred, {} where the shorter one is",
            interval(longer),
            interval(shorter)
        );
        Check::measured(about, verdict, worse.mean, 0.5, reason)
    }
}

/// Whether the reward model is right more often than a baseline on the same pairs.
fn beats(about: &about::About, wins: &[f64], baseline: &[f64], name: &str) -> Check {
    let gains: Vec<f64> = wins.iter().zip(baseline).map(|(ours, theirs)| ours - theirs).collect();
    let Some(gain) = Interval::of(&gains) else { return Check::skipped(about, "there is no held-out pair") };
    let accuracy = baseline.iter().sum::<f64>() / baseline.len() as f64;
    let reason =
        format!("{} more of the pairs are ordered right than by {name}, which has {accuracy:.3}", interval(gain));
    Check::above(about, gain, 0.0, reason)
}

/// Mean distance between stated and found accuracy, over bins of equally many pairs by `|distance|`.
///
/// `Σ |mean(σ(a·|d|)) − accuracy| · share`, with the scale `a` that makes the pairwise loss least: normalised scores have
/// lost the unit that they were trained in.
///
/// # Source
/// Guo et al., arXiv:1706.04599: expected calibration error, and scaling by one number.
pub(crate) fn calibration(distances: &[f64]) -> Check {
    const BINS: usize = 10;
    /// Pairs in a bin at least.
    const LEAST: usize = 25;
    let about = &about::CALIBRATION;
    let n = distances.len();
    if n < ENOUGH {
        return Check::skipped(about, format!("{n} held-out pairs are too few, {ENOUGH} are needed"));
    }
    let scale = best_scale(distances);
    let mut sorted: Vec<f64> = distances.to_vec();
    sorted.sort_by(|a, b| a.abs().total_cmp(&b.abs()));
    let in_bin = n.div_ceil((n / LEAST).min(BINS));
    let error = |bin: &[f64]| {
        let gaps = bin.iter().map(|d| sigmoid(scale * d.abs()) - win(*d, 0.0));
        gaps.sum::<f64>().abs() / n as f64
    };
    let error: f64 = sorted.chunks(in_bin).map(error).sum();
    let verdict = if error <= CALIBRATION { Verdict::Pass } else { Verdict::Warn };
    let reason = format!("stated and found accuracy differ by {error:.3} on average, at scale {scale:.2}");
    Check::measured(about, verdict, error, CALIBRATION, reason)
}

/// The scale in `[0, 100 / mean |d|]` at which the mean of `−log σ(a·d)` is least, by bisection of its slope.
fn best_scale(distances: &[f64]) -> f64 {
    const STEPS: usize = 60;
    let slope = |scale: f64| distances.iter().map(|d| -d * sigmoid(-scale * d)).sum::<f64>();
    let mean = distances.iter().map(|d| d.abs()).sum::<f64>() / distances.len() as f64;
    let (mut low, mut high) = (0.0, 100.0 / mean.max(f64::MIN_POSITIVE));
    for _ in 0..STEPS {
        let middle = f64::midpoint(low, high);
        if slope(middle) < 0.0 { low = middle } else { high = middle }
    }
    low
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// Every check of held-out pairs, where there are none.
pub(super) fn skipped(why: &str) -> Vec<Check> {
    [&about::ACCURACY, &about::LONGER_WINS, &about::BAG_OF_WORDS, &about::CALIBRATION, &about::BY_LENGTH]
        .map(|about| Check::skipped(about, why))
        .to_vec()
}

/// The checks of the pairs themselves.
pub(super) fn data_checks(sources: &Sources) -> Vec<Check> {
    let mut checks = vec![match (&sources.training, &sources.held_out) {
        (Ok(training), Ok(held_out)) => repeats::leaks(training, held_out),
        (Err(why), _) | (_, Err(why)) => Check::skipped(&about::LEAKS, why),
    }];
    match &sources.training {
        Ok(training) => {
            checks.extend(repeats::training(training, sources.held_out.as_deref().unwrap_or_default()));
        }
        Err(why) => checks
            .extend([&about::DUPLICATES, &about::TIES, &about::CONTRADICTIONS].map(|about| Check::skipped(about, why))),
    }
    checks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_that_state_their_accuracy_are_calibrated_at_any_scale() {
        // 75 of 100 right at distance ln 3, where σ is 3/4; in another unit a scale makes up for it.
        let distances = |unit: f64| -> Vec<f64> {
            (0..200).map(|i| if i % 4 == 0 { -unit * 3.0_f64.ln() } else { unit * 3.0_f64.ln() }).collect()
        };
        for unit in [1.0, 5.0] {
            let scale = best_scale(&distances(unit));
            assert!((scale * unit - 1.0).abs() < 1e-6, "{scale}");
            let check = calibration(&distances(unit));
            assert!(check.value.is_some_and(|error| error < 0.02) && check.verdict == Verdict::Pass, "{check:?}");
        }
        // Sure where it is wrong: half of the small distances are right, none of the large ones.
        let unsure: Vec<f64> = (0..200).map(|i| if i < 100 { 0.1 } else { -3.0 }).collect();
        assert_eq!(calibration(&unsure).verdict, Verdict::Warn);
    }

    #[test]
    fn only_an_order_that_is_surely_reversed_leaves_the_rest_out() {
        let encoded = |i: usize| EncodedPair {
            chosen: vec![0; 3 + i % 2],
            rejected: vec![0; 4 - i % 2],
            n_prompt: 1,
            margin: None,
        };
        let checks = |n_right: usize| {
            let distances = (0..120).map(|i| if i < n_right { 1.0 } else { -1.0 }).collect();
            let scored =
                Scored { pairs: vec![Pair::default(); 120], encoded: (0..120).map(encoded).collect(), distances };
            scored.checks(&Err("no pairs".to_owned()))
        };
        let of = |n_right| checks(n_right).into_iter().map(|check| (check.verdict, check.value.is_some()));
        let skipped = (Verdict::Warn, false);
        // 0.48 of 120: no better than chance, and no reversed order.
        let at_chance: Vec<_> = of(58).collect();
        assert!(at_chance[0] == (Verdict::Fail, true) && at_chance[1] != skipped, "{at_chance:?}");
        let reason = &checks(58)[0].reason;
        assert!(reason.ends_with(": so many, and no better than chance"), "{reason}");
        let reversed: Vec<_> = of(20).collect();
        assert!(reversed[0] == (Verdict::Fail, true) && reversed[1..] == [skipped; 4], "{reversed:?}");
    }

    #[test]
    fn a_baseline_is_compared_pair_by_pair() {
        let (right, wrong) = (vec![1.0; 20], vec![0.0; 20]);
        let verdict = |ours: &[f64], theirs: &[f64]| beats(&about::LONGER_WINS, ours, theirs, "x").verdict;
        assert_eq!(verdict(&right, &wrong), Verdict::Pass);
        assert_eq!(verdict(&right, &right), Verdict::Warn);
        assert_eq!(verdict(&wrong, &right), Verdict::Fail);
    }
}
