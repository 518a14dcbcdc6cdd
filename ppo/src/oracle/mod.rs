//! `ppo oracle`: the equations of training against the original implementations.
//!
//! `tests/oracles/dialects.py` gives TRL, `OpenRLHF` and verl the same numbers and records what they make of them, and writes
//! down the formulas of those that cannot be installed. Here the functions that training calls are given them too.

mod equations;
mod vectors;

use std::io::Write as _;

use anyhow::{Context, bail};
use common::cli::print_json;
use serde::Serialize;

use crate::cli::OracleArgs;
use crate::dialect::Dialect;
use equations::Comparing;
use vectors::Vectors;

/// The largest difference that rounding explains of what is computed from a few f32 numbers on the host.
const HOST: f64 = 1e-6;

/// The same of f32 sums on tensors, their exponentials and gradients.
const TENSORS: f64 = 1e-4;

/// One equation, ours and theirs, at the number where they differ most.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Comparison {
    dialect: &'static str,
    /// Whether the original was run, or its formulas computed.
    how: String,
    case: String,
    equation: String,
    ours: f64,
    theirs: f64,
    /// Relative to the number, or to the median number (1 at most) where it is smaller than that.
    largest_difference: f64,
    numbers: usize,
    tolerance: f64,
    passed: bool,
}

/// Carries out `ppo oracle`.
///
/// # Errors
/// If the recorded numbers cannot be read, or an equation is off.
pub(crate) fn run(args: &OracleArgs) -> anyhow::Result<()> {
    let vectors = Vectors::read(args.vectors.as_deref())?;
    let device = args.runtime.open()?.training(false).device;
    let mut comparisons = Vec::new();
    for dialect in Dialect::ALL.into_iter().filter(|dialect| args.dialect.is_none_or(|only| only == *dialect)) {
        comparisons.extend(Comparing { vectors: &vectors, dialect, device: &device }.all()?);
    }
    if args.json {
        print_json(&serde_json::json!({
            "made_with": vectors.made_with,
            "equations": comparisons,
            "passed": comparisons.iter().all(|comparison| comparison.passed),
        }))?;
    } else {
        write!(std::io::stdout(), "{}", text(&comparisons)).context("failed to write the list")?;
    }
    let failed: Vec<&Comparison> = comparisons.iter().filter(|comparison| !comparison.passed).collect();
    if let Some(first) = failed.first() {
        bail!(
            "{} of {} equations are off, the first `{}` of dialect `{}`: {} here, {} there",
            failed.len(),
            comparisons.len(),
            first.equation,
            first.dialect,
            first.ours,
            first.theirs
        );
    }
    Ok(())
}

/// One line an equation, and how many of them pass.
fn text(comparisons: &[Comparison]) -> String {
    let mut lines = String::new();
    for Comparison { dialect, how, case, equation, ours, theirs, largest_difference, numbers, tolerance, passed } in
        comparisons
    {
        let verdict = if *passed { "pass" } else { "FAIL" };
        lines += &format!(
            "{verdict}  {dialect:20}  {equation:24}  {case:8}  ours {ours:>14.7e}  theirs {theirs:>14.7e}  difference \
             {largest_difference:.1e} (limit {tolerance:.0e}) of {numbers} numbers, {how}\n"
        );
    }
    let n_passed = comparisons.iter().filter(|comparison| comparison.passed).count();
    lines + &format!("{n_passed} of {} pass\n", comparisons.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::tensor::Device;

    fn all(vectors: &Vectors) -> Vec<Comparison> {
        let device = Device::flex().autodiff();
        let of = |dialect| Comparing { vectors, dialect, device: &device }.all().expect("comparable");
        Dialect::ALL.into_iter().flat_map(of).collect()
    }

    #[test]
    fn every_equation_of_every_dialect_is_the_originals() {
        let comparisons = all(&Vectors::read(None).expect("recorded"));
        let failed: Vec<&Comparison> = comparisons.iter().filter(|comparison| !comparison.passed).collect();
        assert!(failed.is_empty(), "{failed:#?}");
        // Nine equations of three cases in seven dialects, Adam's steps in each, two estimators, twice six losses.
        assert_eq!(comparisons.len(), 9 * 3 * 7 + 7 + 2 + 12);
    }

    #[test]
    fn another_dialects_numbers_do_not_pass() {
        let recorded = Vectors::read(None).expect("recorded");
        for (one, other) in [
            (Dialect::Kindling, Dialect::Trl),
            (Dialect::Trl, Dialect::NPlus),
            (Dialect::NPlus, Dialect::LmHumanPreferences),
            (Dialect::OpenRlhf, Dialect::Verl),
            (Dialect::Verl, Dialect::DeepSpeedChat),
        ] {
            let mut swapped = recorded.clone();
            let theirs = swapped.dialects[&other].clone();
            swapped.dialects.insert(one, theirs);
            let device = Device::flex().autodiff();
            let comparing = Comparing { vectors: &swapped, dialect: one, device: &device };
            // Rows of another length are refused before they are compared.
            let comparisons = comparing.all();
            assert!(comparisons.is_err_and(|_| true) || all(&swapped).iter().any(|c| !c.passed), "{one:?} {other:?}");
        }
    }
}
