//! How far people agree with each other about the same answers.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::ensure;
use common::cli::print_json;
use common::data::records::{Label, OnBadRecord, Verdict, read_labels};
use serde::Serialize;

use crate::cli::AgreementArgs;

/// What two people said about what both were asked.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PairAgreement {
    /// One of them.
    pub a: String,
    /// The other.
    pub b: String,
    /// Pairs of answers that both decided.
    pub pairs: usize,
    /// Fraction of these with the same decision.
    pub agreement: f64,
    /// Cohen's kappa: 1 for perfect agreement, 0 for what chance gives; absent where chance alone agrees always.
    pub kappa: Option<f64>,
}

/// How far everybody agrees.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Agreement {
    /// Who decided how many pairs of answers.
    pub people: BTreeMap<String, usize>,
    /// Every two people who were asked about the same answers.
    pub pairs: Vec<PairAgreement>,
    /// Krippendorff's alpha for nominal data: 1 for perfect agreement, 0 for what chance gives; absent where nothing can
    /// be compared, or all decisions are the same.
    pub alpha: Option<f64>,
    /// Pairs of answers that two people or more decided.
    pub shared: usize,
    /// How far each person agrees with themself who was asked the same again.
    pub consistency: BTreeMap<String, Consistency>,
}

/// What a person said when asked the same again.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Consistency {
    /// Pairs of answers that they were asked about again.
    pub repeats: usize,
    /// Fraction of these with the same decision as before.
    pub agreement: f64,
}

/// A decision, whichever answer was shown first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Decision {
    /// The answer that comes first in the alphabet.
    Lower,
    /// The other.
    Upper,
    /// Neither: a tie, or both bad.
    Neither,
}

/// Decisions by question, then by person.
type Decisions = BTreeMap<String, BTreeMap<String, Decision>>;

/// Carries out `reward-model agreement`: one JSON object on stdout.
pub(crate) fn run(args: &AgreementArgs) -> anyhow::Result<()> {
    print_json(&measure(&args.files)?)
}

/// Measures the agreement of the labels in `files`. Labels without an annotator are those of a person with the file's name; of
/// several by one person on the same answers, the last counts.
///
/// # Errors
/// If a file cannot be read, or no two people were asked about the same answers.
pub fn measure(files: &[impl AsRef<Path>]) -> anyhow::Result<Agreement> {
    let mut labels = Vec::new();
    for file in files {
        let file = file.as_ref();
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        for mut label in read_labels(file, OnBadRecord::Fail)? {
            label.annotator.get_or_insert_with(|| name.clone().into_owned());
            labels.push(label);
        }
    }
    let agreement = of_labels(&labels);
    ensure!(
        agreement.shared > 0 || !agreement.consistency.is_empty(),
        "no two people decided about the same answers\nhint: have several people label the same `--pairs`, each with an \
         `--annotator` of their own"
    );
    Ok(agreement)
}

/// The agreement of `labels`, each of which names its annotator; of several by one person on the same answers, the last counts.
pub fn of_labels(labels: &[Label]) -> Agreement {
    let mut decisions = Decisions::new();
    let (repeats, first): (Vec<&Label>, Vec<&Label>) = labels.iter().partition(|label| label.repeat);
    let key =
        |label: &Label| (Label::question(&label.prompt, &label.answers), label.annotator.clone().unwrap_or_default());
    for label in first {
        let (question, person) = key(label);
        decisions.entry(question).or_default().insert(person, Decision::of(label));
    }
    let mut alike: BTreeMap<String, Vec<bool>> = BTreeMap::new();
    for label in repeats {
        let (question, person) = key(label);
        if let Some(before) = decisions.get(&question).and_then(|said| said.get(&person)) {
            alike.entry(person).or_default().push(*before == Decision::of(label));
        }
    }
    let consistency = alike.into_iter().map(|(person, alike)| {
        let agreement = alike.iter().filter(|same| **same).count() as f64 / alike.len() as f64;
        (person, Consistency { repeats: alike.len(), agreement })
    });
    Agreement { consistency: consistency.collect(), ..of_decisions(&decisions) }
}

impl Decision {
    fn of(label: &Label) -> Self {
        let first_is_lower = label.answers[0] <= label.answers[1];
        match label.verdict {
            Verdict::First if first_is_lower => Self::Lower,
            Verdict::Second if !first_is_lower => Self::Lower,
            Verdict::First | Verdict::Second => Self::Upper,
            Verdict::Tie | Verdict::BothBad => Self::Neither,
        }
    }
}

fn of_decisions(decisions: &Decisions) -> Agreement {
    let mut people = BTreeMap::new();
    decisions.values().flat_map(BTreeMap::keys).for_each(|name| *people.entry(name.clone()).or_insert(0) += 1);
    let names: Vec<&String> = people.keys().collect();
    let mut pairs = Vec::new();
    for (i, a) in names.iter().enumerate() {
        for b in &names[i + 1..] {
            let both: Vec<(Decision, Decision)> =
                decisions.values().filter_map(|said| Some((*said.get(*a)?, *said.get(*b)?))).collect();
            if !both.is_empty() {
                let (agreement, kappa) = cohen(&both);
                pairs.push(PairAgreement { a: (*a).clone(), b: (*b).clone(), pairs: both.len(), agreement, kappa });
            }
        }
    }
    let units: Vec<Vec<Decision>> = decisions.values().map(|said| said.values().copied().collect()).collect();
    let shared = units.iter().filter(|unit| unit.len() > 1).count();
    Agreement { people, pairs, alpha: krippendorff(&units), shared, consistency: BTreeMap::new() }
}

/// The fraction of equal decisions `p_o`, and `κ = (p_o − p_e) / (1 − p_e)` with the agreement `p_e` that chance gives.
///
/// # Source
/// Cohen 1960, A coefficient of agreement for nominal scales.
fn cohen(both: &[(Decision, Decision)]) -> (f64, Option<f64>) {
    let n = both.len() as f64;
    let observed = both.iter().filter(|(a, b)| a == b).count() as f64 / n;
    let share = |is: &dyn Fn(&(Decision, Decision)) -> bool| both.iter().filter(|pair| is(pair)).count() as f64 / n;
    let expected: f64 = [Decision::Lower, Decision::Upper, Decision::Neither]
        .map(|decision| share(&|pair| pair.0 == decision) * share(&|pair| pair.1 == decision))
        .iter()
        .sum();
    (observed, (expected < 1.0).then(|| (observed - expected) / (1.0 - expected)))
}

/// `α = 1 − D_o / D_e` for nominal data, with missing decisions.
///
/// # Source
/// Krippendorff 2011, Computing Krippendorff's Alpha-Reliability, section C.
fn krippendorff(units: &[Vec<Decision>]) -> Option<f64> {
    let units: Vec<&Vec<Decision>> = units.iter().filter(|unit| unit.len() > 1).collect();
    let kinds: BTreeSet<Decision> = units.iter().flat_map(|unit| unit.iter().copied()).collect();
    let count = |unit: &[Decision], kind| unit.iter().filter(|said| **said == kind).count() as f64;
    let n: f64 = units.iter().map(|unit| unit.len() as f64).sum();
    let mut observed = 0.0;
    let mut totals = Vec::new();
    for kind in &kinds {
        let total: f64 = units.iter().map(|unit| count(unit, *kind)).sum();
        let disagreeing = |unit: &&Vec<Decision>| {
            let (m, same) = (unit.len() as f64, count(unit, *kind));
            same * (m - same) / (m - 1.0)
        };
        observed += units.iter().map(disagreeing).sum::<f64>();
        totals.push(total);
    }
    let expected: f64 = totals.iter().map(|total| total * (n - total)).sum::<f64>() / (n - 1.0);
    (expected > 0.0).then(|| 1.0 - observed / expected)
}

#[cfg(test)]
mod tests {
    use common::conversation::{Message, Role};

    use super::*;
    use Decision::{Lower as L, Neither as N, Upper as U};

    #[test]
    fn what_is_asked_again_counts_for_consistency_alone() {
        let said = |prompt: &str, answers: [&str; 2], verdict, repeat| Label {
            prompt: vec![Message::new(Role::User, prompt)],
            answers: answers.map(str::to_owned),
            verdict,
            annotator: Some("mia".to_owned()),
            seconds: None,
            models: None,
            repeat,
        };
        let labels = [
            said("p", ["a", "b"], Verdict::First, false),
            said("q", ["a", "b"], Verdict::First, false),
            said("p", ["b", "a"], Verdict::Second, true), // the same answer, on the other side
            said("q", ["b", "a"], Verdict::First, true),
            said("r", ["a", "b"], Verdict::First, true), // decided nowhere
        ];
        let agreement = of_labels(&labels);
        assert_eq!(agreement.consistency["mia"], Consistency { repeats: 2, agreement: 0.5 });
        assert_eq!((agreement.people["mia"], agreement.shared), (2, 0));
    }

    #[test]
    fn kappa_matches_a_hand_worked_table() {
        // 20 both yes, 5 yes and no, 10 no and yes, 15 both no: p_o = 0.7, p_e = 0.5, so kappa is 0.4.
        let both = [vec![(L, L); 20], vec![(L, U); 5], vec![(U, L); 10], vec![(U, U); 15]].concat();
        let (agreement, kappa) = cohen(&both);
        assert!((agreement - 0.7).abs() < 1e-12 && (kappa.expect("a number") - 0.4).abs() < 1e-12, "{kappa:?}");
        assert_eq!(cohen(&[(L, L), (L, L)]), (1.0, None));
    }

    #[test]
    fn alpha_matches_krippendorffs_binary_example() {
        // Two observers, ten units, 0 and 1, section A of the source: alpha = 0.095.
        let a = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0];
        let b = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0];
        let decision = |said: i32| if said == 0 { L } else { U };
        let units: Vec<Vec<Decision>> = a.iter().zip(b).map(|(a, b)| vec![decision(*a), decision(b)]).collect();
        let alpha = krippendorff(&units).expect("a number");
        assert!((alpha - 0.095).abs() < 5e-4, "{alpha}");
    }

    #[test]
    fn alpha_leaves_out_what_one_person_alone_was_asked() {
        // Coincidences by hand: L–L 2, U–U 2, N–N 2, of one unit of three L–L–U: 2/2 L–L, 2·2/2 L–U.
        let units = [vec![L, L], vec![U, U], vec![N, N], vec![L, L, U], vec![U]];
        // n = 9, totals L 4, U 3, N 2; D_o = 2, D_e = (4·5 + 3·6 + 2·7) / 8 = 6.5.
        let alpha = krippendorff(&units).expect("a number");
        assert!((alpha - (1.0 - 2.0 / 6.5)).abs() < 1e-12, "{alpha}");
        assert_eq!(krippendorff(&[vec![L], vec![U]]), None);
        assert_eq!(krippendorff(&[vec![L, L]]), None);
    }

    #[test]
    fn people_are_compared_on_what_both_were_asked_in_whatever_order() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = |name: &str| dir.path().join(name);
        let write = |name: &str, lines: &[&str]| std::fs::write(path(name), lines.join("\n")).expect("written");
        write(
            "mia.jsonl",
            &[
                r#"{"prompt": "p", "chosen": "a", "rejected": "b", "annotator": "mia"}"#,
                r#"{"prompt": "q", "chosen": "a", "rejected": "b", "annotator": "mia"}"#,
                r#"{"prompt": "r", "tied": ["a", "b"], "annotator": "mia"}"#,
            ],
        );
        // Without a name; the last word on `q` counts.
        write(
            "tom.jsonl",
            &[
                r#"{"prompt": "q", "chosen": "a", "rejected": "b"}"#,
                r#"{"prompt": "q", "chosen": "b", "rejected": "a"}"#,
                r#"{"prompt": "r", "tied": ["b", "a"], "both_bad": true}"#,
            ],
        );
        let agreement = measure(&[path("mia.jsonl"), path("tom.jsonl")]).expect("shared questions");
        assert_eq!((agreement.people["mia"], agreement.people["tom.jsonl"], agreement.shared), (3, 2, 2));
        assert_eq!((agreement.pairs[0].pairs, agreement.pairs[0].agreement), (2, 0.5));
        let error = measure(&[path("mia.jsonl")]).expect_err("one person").to_string();
        assert!(error.contains("hint: have several people"), "{error}");
    }
}
