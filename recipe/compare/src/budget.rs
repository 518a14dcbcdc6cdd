//! Two backends' records side by side: how far apart, within which budget, and where the first excess is.

use common::checkpoint::Stage;
use common::kernels::Precision;
use serde::Serialize;

use super::record::{Level, Records};
use super::tokens::NONE;

/// How far a backend may be from the reference.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Budget {
    /// Not at all.
    Exact,
    /// Largest difference of two numbers.
    Absolute(f64),
    /// The same in units of the tensor's largest number, or of 1 if that is smaller.
    Scaled(f64),
    /// Norm of the difference by the norm of the tensor.
    Relative(f64),
    /// Same tokens, but for choices nearer than this.
    Tokens(f64),
    /// Any distance, which is reported.
    None,
}

/// Two candidates nearer than this in logits are a near tie.
const NEAR_TIE: f64 = 1e-4;

impl Budget {
    /// The budget of a level.
    ///
    /// Backends add the same numbers in different orders, which moves the last bits of sums: 2⁻²⁴ of each addend.
    /// Small gradients are sums that nearly cancel, so theirs is relative and wider. AdamW divides a gradient by its own
    /// size, so the relative error of each *number* becomes one of the step, also where that number is next to nothing
    /// beside the rest of its tensor. PPO's clip is a step function: a token whose ratio lies on its edge counts on one
    /// backend and not on the other, and the updates after it see that.
    pub const fn of(level: Level, precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::of_f32(level),
            Precision::Bf16 => Self::of_16_bits(level, 1.0 / 256.0),
            Precision::F16 => Self::of_16_bits(level, 1.0 / 2048.0),
        }
    }

    const fn of_f32(level: Level) -> Self {
        match level {
            Level::InitialWeights | Level::Activations | Level::Margins => Self::Exact,
            Level::Operations => Self::Scaled(1e-5),
            Level::PpoIteration => Self::Scaled(1e-4),
            Level::Loss => Self::Absolute(1e-5),
            Level::Logits | Level::Scores => Self::Absolute(1e-4),
            Level::OperationGradients => Self::Relative(1e-4),
            Level::Gradients => Self::Relative(1e-3),
            Level::OneStep => Self::Relative(5e-3),
            Level::TenSteps | Level::PpoRatios => Self::Relative(5e-2),
            Level::Tokens => Self::Tokens(NEAR_TIE),
            Level::PpoUpdates | Level::Curve => Self::Absolute(1e-2),
        }
    }

    /// Of a backend that computes in 16 bits, where the reference has 32; `unit` is the largest relative error of a rounded
    /// number.
    ///
    /// The numbers between two operations are rounded, and the operations of a model follow each other, so a few dozen
    /// roundings meet in a logit and more in a gradient. Steps of AdamW and whole iterations of PPO magnify that without
    /// bound where a gradient is next to nothing, so there the distance is only reported.
    const fn of_16_bits(level: Level, unit: f64) -> Self {
        match level {
            Level::InitialWeights | Level::Activations | Level::Margins => Self::Exact,
            Level::Logits | Level::Scores | Level::PpoIteration => Self::Scaled(16.0 * unit),
            Level::Loss => Self::Absolute(4.0 * unit),
            Level::Gradients => Self::Relative(64.0 * unit),
            Level::Tokens => Self::Tokens(64.0 * unit),
            Level::Curve => Self::Absolute(64.0 * unit),
            // Operations are not compared: in 16 bits a model is made of others.
            Level::Operations
            | Level::OperationGradients
            | Level::OneStep
            | Level::TenSteps
            | Level::PpoUpdates
            | Level::PpoRatios => Self::None,
        }
    }

    /// For people.
    pub fn text(self) -> String {
        match self {
            Self::Exact => "equal".to_owned(),
            Self::Absolute(most) => format!("{most:.0e} abs"),
            Self::Scaled(most) => format!("{most:.0e} of largest"),
            Self::Relative(most) => format!("{most:.0e} rel"),
            Self::Tokens(most) => format!("ties < {most:.0e}"),
            Self::None => "none".to_owned(),
        }
    }

    fn holds(self, distance: &Distance) -> bool {
        match self {
            Self::Exact => distance.absolute == 0.0,
            Self::Absolute(most) => distance.absolute <= most,
            Self::Scaled(most) => distance.absolute <= most * distance.largest.max(1.0),
            Self::Relative(most) => distance.relative <= most,
            Self::Tokens(_) => false,
            Self::None => distance.absolute.is_finite(),
        }
    }
}

/// How one level of one stage came out for one backend.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// The stage.
    pub stage: Stage,
    /// The level.
    pub level: Level,
    /// The backend that was compared with the first.
    pub backend: String,
    /// Tensors compared.
    pub n_tensors: usize,
    /// Largest absolute difference.
    pub max_absolute: f64,
    /// Largest relative difference of a tensor.
    pub max_relative: f64,
    /// The budget.
    pub budget: Budget,
    /// Whether it was kept.
    pub passed: bool,
    /// The first tensor outside the budget, and where in it the difference is largest.
    pub first_excess: Option<String>,
    /// Remarks.
    pub note: Option<String>,
}

/// Compares what a backend computed in `precision` with what the reference did, in the order of the reference.
pub fn check(reference: &Records, backend: &str, found: &Records, stages: &[Stage], precision: Precision) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    let compared = |level: Level| match level {
        Level::Activations | Level::Margins => false,
        Level::Operations | Level::OperationGradients => precision == Precision::F32,
        _ => true,
    };
    for entry in reference.entries.iter().filter(|entry| stages.contains(&entry.stage) && compared(entry.level)) {
        let (stage, level) = (entry.stage, entry.level);
        let at = rows.iter().position(|row| (row.stage, row.level) == (stage, level)).unwrap_or_else(|| {
            rows.push(Row {
                stage,
                level,
                backend: backend.to_owned(),
                n_tensors: 0,
                max_absolute: 0.0,
                max_relative: 0.0,
                budget: Budget::of(level, precision),
                passed: true,
                first_excess: None,
                note: None,
            });
            rows.len() - 1
        });
        let row = &mut rows[at];
        let Some(tensor) = found.find(stage, level, &entry.name) else {
            row.passed = false;
            row.first_excess.get_or_insert_with(|| format!("no `{}`: the process ended before", entry.name));
            continue;
        };
        row.n_tensors += 1;
        if let Budget::Tokens(tie) = row.budget {
            let margins = reference.find(stage, Level::Margins, &entry.name).map_or(&[][..], |margins| &margins.data);
            let width = entry.tensor.shape.last().copied().unwrap_or(1);
            compare_tokens(row, &entry.name, [&entry.tensor.data, &tensor.data], margins, width, tie);
            continue;
        }
        let distance = Distance::of(&entry.tensor.data, &tensor.data);
        row.max_absolute = row.max_absolute.max(distance.absolute);
        row.max_relative = row.max_relative.max(distance.relative);
        if !row.budget.holds(&distance) {
            row.passed = false;
            row.first_excess.get_or_insert_with(|| distance.place(&entry.name, &entry.tensor.data, &tensor.data));
        }
    }
    rows
}

/// The distance between two tensors; infinite where one has a number that is not finite or another length.
struct Distance {
    absolute: f64,
    relative: f64,
    /// Largest number of the reference.
    largest: f64,
    /// Where the absolute difference is largest.
    at: usize,
}

impl Distance {
    fn of(expected: &[f32], found: &[f32]) -> Self {
        let mut distance = Self { absolute: 0.0, relative: 0.0, largest: 0.0, at: 0 };
        let (mut squares, mut norm) = (0.0, 0.0);
        for (at, (&a, &b)) in expected.iter().zip(found).enumerate() {
            let (a, b) = (f64::from(a), f64::from(b));
            let apart = if (a - b).is_finite() { (a - b).abs() } else { f64::INFINITY };
            if apart > distance.absolute {
                (distance.absolute, distance.at) = (apart, at);
            }
            squares += apart * apart;
            norm += a * a;
            distance.largest = distance.largest.max(a.abs());
        }
        if expected.len() != found.len() {
            distance.absolute = f64::INFINITY;
            squares = f64::INFINITY;
        }
        distance.relative = if squares == 0.0 { 0.0 } else { (squares / norm).sqrt() };
        distance
    }

    fn place(&self, name: &str, expected: &[f32], found: &[f32]) -> String {
        let number = |of: &[f32]| of.get(self.at).map_or("nothing".to_owned(), f32::to_string);
        format!("{name} [{}]: {}, reference {}", self.at, number(found), number(expected))
    }
}

/// Compares continuations row by row up to the first token that differs; after it they are different texts.
fn compare_tokens(row: &mut Row, name: &str, [expected, found]: [&[f32]; 2], margins: &[f32], width: usize, tie: f64) {
    let is_near = |at: usize| margins.get(at).is_some_and(|&margin| f64::from(margin) < tie);
    let (mut n_tokens, mut n_near, mut n_split) = (0, 0, 0);
    for (answer, tokens) in expected.chunks(width.max(1)).enumerate() {
        let first = answer * width.max(1);
        for (t, token) in tokens.iter().enumerate() {
            n_tokens += usize::from(*token != NONE);
            n_near += usize::from(is_near(first + t));
            let other = found.get(first + t);
            if other == Some(token) {
                continue;
            }
            if is_near(first + t) {
                n_split += 1;
            } else {
                row.passed = false;
                let other = other.map_or("nothing".to_owned(), f32::to_string);
                row.first_excess
                    .get_or_insert_with(|| format!("{name}, answer {answer} token {t}: {other}, reference {token}"));
            }
            break;
        }
    }
    let ties = if n_near == 1 { "near tie" } else { "near ties" };
    let text = format!("{name}: {n_tokens} tokens, {n_near} {ties}, {n_split} of them decided otherwise");
    row.note = Some(row.note.take().map_or(text.clone(), |note| format!("{note}; {text}")));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Entry;
    use common::model::HostTensor;

    fn records(entries: &[(Level, &str, &[f32])]) -> Records {
        let entry = |&(level, name, data): &(Level, &str, &[f32])| Entry {
            stage: Stage::Pretrain,
            level,
            name: name.to_owned(),
            tensor: HostTensor { shape: vec![data.len()], data: data.to_vec() },
        };
        Records { entries: entries.iter().map(entry).collect(), ..Records::default() }
    }

    fn one(reference: &Records, found: &Records) -> Row {
        let mut rows = check(reference, "b", found, &[Stage::Pretrain], Precision::F32);
        assert_eq!(rows.len(), 1);
        rows.remove(0)
    }

    #[test]
    fn the_first_excess_is_named_with_its_place() {
        let reference = records(&[(Level::Gradients, "a", &[1.0, 2.0]), (Level::Gradients, "b", &[3.0, 4.0])]);
        assert!(one(&reference, &reference).passed);
        // |(0, 0.01)| / |(3, 4)| = 0.002, above 1e-3; `a` is within it.
        let found = records(&[(Level::Gradients, "a", &[1.0, 2.000_1]), (Level::Gradients, "b", &[3.0, 4.01])]);
        let row = one(&reference, &found);
        assert_eq!((row.passed, row.n_tensors), (false, 2));
        assert_eq!(row.first_excess.as_deref(), Some("b [1]: 4.01, reference 4"));
        assert!((row.max_relative - 0.002).abs() < 1e-6 && (row.max_absolute - 0.01).abs() < 1e-6, "{row:?}");
    }

    #[test]
    fn sixteen_bits_have_budgets_of_their_own() {
        let reference = records(&[(Level::Logits, "logits", &[8.0, 2.0]), (Level::OneStep, "w", &[1e-3, 1e-3])]);
        let found = records(&[(Level::Logits, "logits", &[8.05, 2.0]), (Level::OneStep, "w", &[1e-3, -1e-3])]);
        let passed = |precision, found: &Records| {
            let rows = check(&reference, "b", found, &[Stage::Pretrain], precision);
            rows.iter().map(|row| row.passed).collect::<Vec<_>>()
        };
        assert_eq!(passed(Precision::F32, &found), [false, false]);
        assert_eq!(passed(Precision::F16, &found), [true, true]);
        let wrong = records(&[(Level::Logits, "logits", &[8.1, 2.0]), (Level::OneStep, "w", &[1e-3, f32::NAN])]);
        assert_eq!(passed(Precision::F16, &wrong), [false, false]);
        assert_eq!(passed(Precision::Bf16, &wrong), [true, false]);
    }

    #[test]
    fn what_is_not_finite_or_missing_never_passes() {
        let reference = records(&[(Level::Logits, "logits", &[1.0, 2.0])]);
        for found in [&[1.0, f32::NAN][..], &[1.0, f32::INFINITY], &[1.0]] {
            let row = one(&reference, &records(&[(Level::Logits, "logits", found)]));
            assert!(!row.passed && row.max_absolute.is_infinite(), "{row:?}");
        }
        assert!(!one(&reference, &records(&[])).passed);
        // NaN on both sides is no agreement.
        let broken = records(&[(Level::Logits, "logits", &[f32::NAN])]);
        assert!(!one(&broken, &broken).passed);
    }

    #[test]
    fn a_near_tie_excuses_a_token_and_nothing_else_does() {
        let tokens: &[f32] = &[5.0, 6.0, 7.0];
        let reference =
            |margins: &[f32]| records(&[(Level::Tokens, "greedy", tokens), (Level::Margins, "greedy", margins)]);
        let found = records(&[(Level::Tokens, "greedy", &[5.0, 8.0, 9.0])]);
        let row = one(&reference(&[1.0, 1e-5, 1.0]), &found);
        assert!(row.passed, "{row:?}");
        assert_eq!(row.note.as_deref(), Some("greedy: 2 tokens, 1 near tie, 1 of them decided otherwise"));
        let row = one(&reference(&[1.0, 1e-2, 1.0]), &found);
        assert_eq!(row.first_excess.as_deref(), Some("greedy, answer 0 token 1: 8, reference 6"));
        assert!(one(&reference(&[1.0, 1.0, 1.0]), &records(&[(Level::Tokens, "greedy", tokens)])).passed);
    }
}
