//! Verdicts of the checks, as people and programs read them.

use std::fmt::{self, Write as _};

use common::stats::{Interval, fixed};
use serde::Serialize;

use super::about::{ALL, About, Blame};

/// Verdict of a check; the worst one is the report's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// Within its limit.
    Pass,
    /// Beyond the limit by less than is certain, or not checked.
    Warn,
    /// Beyond its limit.
    Fail,
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Pass => "pass",
            Self::Warn => "warn",
            Self::Fail => "fail",
        })
    }
}

/// The result of one check.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Check {
    /// Name of the check.
    pub id: &'static str,
    /// The stage to mend where it does not pass.
    pub stage: Blame,
    /// The verdict.
    pub verdict: Verdict,
    /// The measured number; `None` where there is none.
    pub value: Option<f64>,
    /// The number that it is compared with.
    pub limit: Option<f64>,
    /// What was measured, in words.
    pub reason: String,
    /// What a wrong number means.
    pub meaning: &'static str,
    /// What to do about it.
    pub hint: &'static str,
    /// Where the check and its limit come from.
    pub source: &'static str,
    /// Whether nothing wrong was found, and too little was seen to be sure.
    #[serde(skip)]
    pub is_open: bool,
}

impl Check {
    fn new(about: &About, verdict: Verdict, value: Option<f64>, limit: Option<f64>, reason: String) -> Self {
        let About { id, stage, meaning, hint, source, .. } = *about;
        // JSON has no number that is not finite; the reason spells it.
        let [value, limit] = [value, limit].map(|number| number.filter(|number| number.is_finite()));
        Self { id, stage, verdict, value, limit, reason, meaning, hint, source, is_open: false }
    }

    /// A number against its limit.
    pub(crate) fn measured(about: &About, verdict: Verdict, value: f64, limit: f64, reason: impl Into<String>) -> Self {
        Self::new(about, verdict, Some(value), Some(limit), reason.into())
    }

    /// A number that may not exceed `limit`; one that is not finite fails.
    pub(crate) fn at_most(about: &About, value: f64, limit: f64, reason: impl Into<String>) -> Self {
        let verdict = if value <= limit { Verdict::Pass } else { Verdict::Fail };
        Self::measured(about, verdict, value, limit, reason)
    }

    /// A share of faulty items: above `warn` it warns, above `fail` it fails.
    pub(crate) fn share(about: &About, value: f64, [warn, fail]: [f64; 2], reason: impl Into<String>) -> Self {
        let (verdict, limit) = if value > fail {
            (Verdict::Fail, fail)
        } else if value > warn {
            (Verdict::Warn, warn)
        } else {
            (Verdict::Pass, warn)
        };
        Self::measured(about, verdict, value, limit, reason)
    }

    /// A mean that should exceed `limit`: it passes where its interval lies above, fails where it lies below, and warns
    /// where there are too few values to say.
    pub(crate) fn above(about: &About, interval: Interval, limit: f64, reason: impl Into<String>) -> Self {
        /// Values of which all may lie on one side by chance: their interval means little.
        const FEW: usize = 10;
        let reason = reason.into();
        let is_few = interval.n < FEW;
        if interval.low > limit && !is_few {
            return Self::measured(about, Verdict::Pass, interval.mean, limit, reason);
        }
        if interval.high < limit && !is_few {
            return Self::measured(about, Verdict::Fail, interval.mean, limit, reason);
        }
        let open = Self::measured(about, Verdict::Warn, interval.mean, limit, reason + ": too few to be sure");
        Self { is_open: interval.mean > limit, ..open }
    }

    /// A check without a number.
    pub(crate) fn stated(about: &About, verdict: Verdict, reason: impl Into<String>) -> Self {
        Self::new(about, verdict, None, None, reason.into())
    }

    /// A check that cannot be made, and why.
    pub(crate) fn skipped(about: &About, why: impl fmt::Display) -> Self {
        Self::stated(about, Verdict::Warn, format!("{NOT_CHECKED}{why}"))
    }

    fn is_skipped(&self) -> bool {
        self.reason.starts_with(NOT_CHECKED)
    }
}

/// How the reason of a check begins that could not be made.
const NOT_CHECKED: &str = "not checked: ";

/// The results of all checks.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// In the order in which a run uses what they look at.
    pub checks: Vec<Check>,
    /// The worst verdict.
    pub verdict: Verdict,
}

impl Report {
    /// All checks in order; those that `checks` lacks could not be made after the first that failed.
    pub(crate) fn complete(mut checks: Vec<Check>) -> Self {
        let failed = checks.iter().find(|check| check.verdict == Verdict::Fail);
        let why = failed.map_or_else(
            || "it needs answers or pairs that there are none of".to_owned(),
            |failed| format!("`{}` failed before", failed.id),
        );
        let mut all = Vec::new();
        for about in ALL {
            let place = checks.iter().position(|check| check.id == about.id);
            all.push(place.map_or_else(|| Check::skipped(about, &why), |place| checks.swap_remove(place)));
        }
        Self::new(all)
    }

    fn new(checks: Vec<Check>) -> Self {
        let verdict = checks.iter().map(|check| check.verdict).max().unwrap_or(Verdict::Pass);
        Self { checks, verdict }
    }

    /// The checks with this verdict.
    pub fn with(&self, verdict: Verdict) -> impl Iterator<Item = &Check> {
        self.checks.iter().filter(move |check| check.verdict == verdict)
    }

    /// One line a check, and a last one with the verdict.
    pub(crate) fn text(&self) -> String {
        let mut text = String::new();
        for check in &self.checks {
            let number = |number: Option<f64>| number.map_or("–".to_owned(), significant);
            let _ = write!(
                text,
                "{:4}  {:12}  {:22} {:>9}  (limit {:>7})  {}",
                check.verdict,
                check.stage,
                check.id,
                number(check.value),
                number(check.limit),
                check.reason
            );
            // A fault that was not looked for is not described: it would hide the one that was found.
            if check.verdict != Verdict::Pass && !check.is_skipped() && !check.is_open {
                let _ = write!(text, ". {} {}", check.meaning, check.hint);
            }
            text.push('\n');
        }
        let count = |verdict| self.with(verdict).count();
        let _ = writeln!(
            text,
            "verdict: {} ({} passed, {} warned, {} failed)",
            self.verdict,
            count(Verdict::Pass),
            count(Verdict::Warn),
            count(Verdict::Fail)
        );
        text
    }
}

/// A number with three significant digits.
pub fn significant(number: f64) -> String {
    if number == 0.0 || (0.01..10_000.0).contains(&number.abs()) {
        let decimals = if number.abs() >= 100.0 { 0 } else { 3 };
        fixed(number, decimals)
    } else {
        format!("{number:.1e}")
    }
}

/// A mean with its interval, for reasons.
pub(crate) fn interval(Interval { mean, low, high, .. }: Interval) -> String {
    format!("{} (95 % {} to {})", fixed(mean, 3), fixed(low, 3), fixed(high, 3))
}

#[cfg(test)]
mod tests {
    use super::super::about;
    use super::*;

    #[test]
    fn the_worst_verdict_is_the_reports() {
        let check = |verdict| Check::stated(&about::PROMPTS_FIT, verdict, "");
        let report = |verdicts: &[Verdict]| Report::new(verdicts.iter().map(|&verdict| check(verdict)).collect());
        assert_eq!(report(&[Verdict::Pass, Verdict::Warn]).verdict, Verdict::Warn);
        assert_eq!(report(&[Verdict::Fail, Verdict::Pass]).verdict, Verdict::Fail);
        assert_eq!(report(&[]).verdict, Verdict::Pass);
    }

    #[test]
    fn what_was_not_checked_is_one_short_line() {
        let report = Report::complete(vec![Check::stated(&about::POLICY_LOADS, Verdict::Fail, "no such file")]);
        let text = report.text();
        let unchecked: Vec<&str> = text.lines().filter(|line| line.contains("not checked")).collect();
        assert_eq!(unchecked.len(), ALL.len() - 1, "{text}");
        assert!(unchecked.iter().all(|line| line.ends_with("not checked: `policy-loads` failed before")), "{text}");
        assert!(text.contains(about::POLICY_LOADS.hint), "{text}");
    }

    #[test]
    fn a_number_that_is_not_finite_fails_and_is_null() {
        let check = Check::at_most(&about::KL_ZERO, f64::NAN, 1.0, "NaN");
        assert_eq!((check.verdict, check.value), (Verdict::Fail, None));
    }

    #[test]
    fn a_mean_whose_interval_holds_the_limit_warns() {
        let at = |low, high, n| Interval { mean: f64::midpoint(low, high), low, high, n };
        let of = |low, high, n| Check::above(&about::ACCURACY, at(low, high, n), 0.5, "");
        let verdict = |low, high| of(low, high, 99).verdict;
        let verdicts = [verdict(0.6, 0.8), verdict(0.4, 0.8), verdict(0.1, 0.4)];
        assert_eq!(verdicts, [Verdict::Pass, Verdict::Warn, Verdict::Fail]);
        // Three of three, or none of three.
        assert_eq!([of(1.0, 1.0, 3), of(0.0, 0.0, 3)].map(|check| check.verdict), [Verdict::Warn; 2]);
        let text = |check| Report::new(vec![check]).text();
        assert!(!text(of(0.4, 1.0, 9)).contains(about::ACCURACY.meaning), "nothing wrong was seen");
        assert!(text(of(0.0, 0.6, 9)).contains(about::ACCURACY.meaning));
    }
}
