//! `overoptimise.json`, and the sentences that its numbers make.

use common::score::Ensemble;
use common::stats::Interval;
use serde::Serialize;

use super::curves::Curve;
use super::design::{Axis, Design, Judge};

/// Everything that was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Results {
    /// Name of the recipe.
    pub recipe: String,
    /// Its title.
    pub title: String,
    /// Program version.
    pub version: String,
    /// Whether this is the quick form.
    pub quick: bool,
    /// The seeds.
    pub seeds: Vec<u64>,
    /// Held-out prompts.
    pub prompts: usize,
    /// Answers to each of them.
    pub pool: usize,
    /// Preference pairs in all.
    pub pairs: usize,
    /// Gold score of the SFT model's answers, over prompts.
    pub gold: Interval,
    /// Wall seconds of all that the page rests on, less the recipe's own steps.
    pub seconds: f64,
    /// How good each reward model is.
    pub judges: Vec<JudgeResult>,
    /// Every curve.
    pub curves: Vec<NamedCurve>,
    /// What the numbers say.
    pub findings: Vec<Finding>,
}

/// A reward model, over its seeds.
#[derive(Debug, Serialize)]
pub(crate) struct JudgeResult {
    /// What was trained.
    pub judge: Judge,
    /// How often each seed's model puts two answers of the pool in their gold order.
    pub accuracy: Vec<Interval>,
}

/// How a curve was made.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Method {
    /// Best-of-n by one reward model.
    BestOfN,
    /// Best-of-n by several.
    Ensemble(Ensemble),
    /// PPO with this KL coefficient.
    Ppo(f64),
    /// RLOO with this KL coefficient.
    Rloo(f64),
    /// DPO with one β after the other.
    Dpo,
}

impl Method {
    /// In words.
    pub(crate) fn title(self) -> String {
        match self {
            Self::BestOfN => "best-of-n".to_owned(),
            Self::Ensemble(Ensemble::Mean) => "best-of-n, mean".to_owned(),
            Self::Ensemble(Ensemble::Worst) => "best-of-n, worst".to_owned(),
            Self::Ensemble(Ensemble::MeanLessVariance) => "best-of-n, mean less variance".to_owned(),
            Self::Ppo(kl_coef) => format!("PPO, KL coefficient {kl_coef}"),
            Self::Rloo(kl_coef) => format!("RLOO, KL coefficient {kl_coef}"),
            Self::Dpo => "DPO".to_owned(),
        }
    }
}

/// A curve with what it is of.
#[derive(Debug, Serialize)]
pub(crate) struct NamedCurve {
    /// How it was made.
    pub method: Method,
    /// By which reward model, or from whose pairs.
    pub judge: Judge,
    /// Its points and fit.
    #[serde(flatten)]
    pub curve: Curve,
}

/// An expectation from the literature, and what was measured.
#[derive(Debug, Serialize)]
pub(crate) struct Finding {
    /// The expectation.
    pub claim: String,
    /// `found`, `refuted` or `not seen`; of a single seed `found once` or `refuted once`.
    pub verdict: &'static str,
    /// The numbers.
    pub numbers: String,
}

impl Results {
    /// The curve of a method by a reward model.
    pub(crate) fn curve(&self, method: Method, judge: &Judge) -> Option<&Curve> {
        let is_it = |named: &&NamedCurve| named.method == method && named.judge == *judge;
        self.curves.iter().find(is_it).map(|named| &named.curve)
    }

    /// The methods by which there are curves of the centre.
    pub(crate) fn methods(&self, design: &Design) -> Vec<Method> {
        self.curves.iter().filter(|named| named.judge == design.centre).map(|named| named.method).collect()
    }

    /// The first PPO of the design.
    pub(crate) fn first_ppo(&self, design: &Design) -> Option<Method> {
        self.methods(design).into_iter().find(|method| matches!(method, Method::Ppo(_)))
    }

    /// Judges the expectations.
    pub(crate) fn find(&mut self, design: &Design) {
        let n_seeds = self.seeds.len();
        let mut findings = Vec::new();
        let bon = self.curve(Method::BestOfN, &design.centre);
        let ppo = self.first_ppo(design).and_then(|method| self.curve(method, &design.centre));
        if let (Some(bon), Some(ppo)) = (bon, ppo) {
            findings.push(Finding {
                claim: "Best-of-n turns over later than PPO, per nat of KL.".to_owned(),
                verdict: verdict(&[Turn::of(ppo), Turn::of(bon)], n_seeds),
                numbers: format!("PPO: {}; best-of-n: {}.", describe(ppo), describe(bon)),
            });
        }
        for (axis, what) in [
            (Axis::Pairs, "More preference pairs turn over later."),
            (Axis::Size, "A larger reward model turns over later."),
            (Axis::WrongLabels, "Fewer wrong labels turn over later."),
        ] {
            let mut judges = design.along(axis);
            if axis == Axis::WrongLabels {
                judges.reverse();
            }
            let methods = [Some(Method::BestOfN), self.first_ppo(design)];
            for method in methods.into_iter().flatten() {
                let curves: Vec<(&Judge, &Curve)> =
                    judges.iter().filter_map(|judge| Some((*judge, self.curve(method, judge)?))).collect();
                if curves.len() < 2 {
                    continue;
                }
                let turns: Vec<Turn> = curves.iter().map(|(_, curve)| Turn::of(curve)).collect();
                let numbers: Vec<String> =
                    curves.iter().map(|(judge, curve)| format!("{}: {}", judge.title(), describe(curve))).collect();
                findings.push(Finding {
                    claim: format!("{what} ({})", method.title()),
                    verdict: verdict(&turns, n_seeds),
                    numbers: format!("{}.", numbers.join("; ")),
                });
            }
        }
        self.findings = findings;
    }
}

/// Where a curve turns over, in nats.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Turn {
    at: Option<f64>,
    /// The ends of where it may be, by the errors of the fit; none beyond which it may lie anywhere.
    range: [Option<f64>; 2],
    /// How far was measured: a curve that has not turned by then turns later than that, if ever.
    reach: f64,
}

impl Turn {
    fn of(curve: &Curve) -> Self {
        if curve.fit.is_none() || !curve.gains() {
            return Self { at: None, range: [None; 2], reach: 0.0 }; // says nothing about where it turns
        }
        Self { at: curve.turn(), range: curve.fit.map_or([None; 2], |fit| fit.turn_range), reach: curve.reach() }
    }

    /// Whether `self` turns before `other`, by more than the errors of both; `None` where the measurement does not say.
    fn is_before(self, other: Self) -> Option<bool> {
        if self.ends_before(other) {
            Some(true)
        } else if other.ends_before(self) {
            Some(false)
        } else {
            None
        }
    }

    /// Whether the latest turn of `self` comes before the earliest of `other`, or before `other` was seen not to turn.
    fn ends_before(self, other: Self) -> bool {
        let Some(latest) = self.at.and(self.range[1]) else { return false };
        let earliest = if other.at.is_some() { other.range[0] } else { Some(other.reach) };
        earliest.is_some_and(|earliest| latest < earliest)
    }
}

/// What turns, which are expected in rising order, say of it. The errors of a single seed's curve leave out how much
/// another reward model and another policy would differ.
fn verdict(turns: &[Turn], n_seeds: usize) -> &'static str {
    let steps: Vec<Option<bool>> = turns.windows(2).map(|pair| pair[0].is_before(pair[1])).collect();
    match (steps.contains(&Some(false)), steps.contains(&Some(true))) {
        (true, _) if n_seeds < 2 => "refuted once",
        (true, _) => "refuted",
        (false, true) if n_seeds < 2 => "found once",
        (false, true) => "found",
        (false, false) => "not seen",
    }
}

/// A curve's turn and its best, in words.
pub(crate) fn describe(curve: &Curve) -> String {
    let best = curve.best();
    let turn = match curve.turn() {
        _ if !curve.gains() => return format!("gains nothing within {} nats", nats(curve.reach())),
        None if curve.fit.is_none() => format!("is known at {} places", curve.mean.len()),
        Some(kl) => format!("turns over at {} nats", nats(kl)),
        None => format!("does not turn over within {} nats", nats(curve.reach())),
    };
    format!("{turn}, gains {:+.3} at best, at {} nats", best.gold[0], nats(best.kl))
}

/// A divergence with as many digits as say something.
pub(super) fn nats(kl: f64) -> String {
    if kl.abs() < 0.1 { format!("{kl:.3}") } else { format!("{kl:.1}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expectations_are_judged_as_far_as_the_measurement_goes() {
        let verdict = |turns: &[Turn]| verdict(turns, 3);
        let turn = |at: f64| Turn { at: Some(at), range: [Some(at - 0.2), Some(at + 0.2)], reach: 10.0 };
        let beyond = |reach: f64| Turn { at: None, range: [None; 2], reach };
        assert_eq!(verdict(&[turn(1.0), turn(2.0), beyond(3.0)]), "found");
        assert_eq!(verdict(&[turn(1.0), turn(3.0), turn(2.0)]), "refuted");
        assert_eq!(verdict(&[beyond(5.0), turn(2.0)]), "refuted");
        assert_eq!(verdict(&[beyond(1.0), turn(2.0)]), "not seen");
        assert_eq!(verdict(&[turn(2.0), beyond(1.0)]), "not seen");
        assert_eq!(verdict(&[beyond(5.0), beyond(6.0)]), "not seen");
        assert_eq!(verdict(&[turn(2.3), turn(2.1)]), "not seen"); // nearer than their errors
        let vague = Turn { range: [Some(1.0), None], ..turn(2.0) };
        assert_eq!(verdict(&[vague, turn(8.0)]), "not seen");
        let of_one_seed = |turns: &[Turn]| super::verdict(turns, 1);
        assert_eq!(of_one_seed(&[turn(1.0), turn(2.0)]), "found once");
        assert_eq!(of_one_seed(&[turn(2.0), turn(1.0)]), "refuted once");
    }
}
