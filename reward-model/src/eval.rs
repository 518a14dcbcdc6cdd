//! How well the scores agree with held-out preferences, of all records and of each person's.

use std::collections::BTreeMap;

use common::checkpoint::{Checkpoint, Stage};
use common::cli::print_json;
use common::data::records::{Label, OnBadRecord, Verdict, read_labels};
use common::group::Group;
use common::interrupt::Interrupt;
use common::model::ScalarGpt;
use common::pace::Pace;
use common::score::{Agreement, Pairs, ScoreError, distance, score_pairs};
use common::session::DataConfig;
use common::stats::{Interval, win};
use serde::Serialize;

use crate::cli::EvalArgs;
use crate::data;

/// What `reward-model eval` prints.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Evaluation {
    /// Over all pairs.
    #[serde(flatten)]
    pub agreement: Agreement,
    /// Pairs that have a margin, by which `loss` wants their scores apart; it changes nothing else.
    #[serde(skip_serializing_if = "is_zero")]
    pub pairs_with_margin: usize,
    /// Decisions for neither answer, which have no order to agree with: counted, and in no other number.
    #[serde(skip_serializing_if = "is_zero")]
    pub ties: usize,
    /// The same for each person, where records name one.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub annotators: BTreeMap<String, OfAnnotator>,
}

/// How far the scores agree with one person.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct OfAnnotator {
    /// Fraction of their pairs whose chosen answer scores higher, equal scores counting half, with Wilson's interval;
    /// `None` where all their decisions are ties.
    pub accuracy: Option<Interval>,
    /// Mean of `score_chosen − score_rejected` over their pairs.
    pub margin_mean: Option<f64>,
    /// Their decisions for neither answer.
    #[serde(skip_serializing_if = "is_zero")]
    pub ties: usize,
}

/// Carries out `reward-model eval`: one JSON object on stdout.
pub(crate) fn run(args: &EvalArgs) -> anyhow::Result<()> {
    args.runtime.check_base([&*args.checkpoint])?;
    // Nothing is to be saved: a signal ends the program at once.
    print_json(&evaluate(args, Interrupt::never())?)
}

/// Measures a checkpoint on a file of pairs.
///
/// # Errors
/// If the checkpoint or the file cannot be used, a score is not finite, or `interrupt` ends it.
pub fn evaluate(args: &EvalArgs, interrupt: Interrupt) -> anyhow::Result<Evaluation> {
    let mut checkpoint =
        Checkpoint::open_with(&args.checkpoint, args.runtime.opening())?.of_stage(&[Stage::RewardModel])?;
    let model = args.runtime.open()?.take_scalar(&mut checkpoint)?;
    let tokenizer = checkpoint.require_tokenizer()?;
    let max_seq_len = model.config().max_seq_len;
    let files = std::slice::from_ref(&args.data);
    let pairs = data::read(files, tokenizer, max_seq_len, &DataConfig::default())?;
    let pace = Pace::new("scoring pairs", 2 * pairs.encoded.len(), "answers", interrupt);
    let scores = score_pairs(&Group::alone(), &model, &pairs.encoded, args.batch_size.get(), &|n| pace.done(n))?;
    Ok(Evaluation::of(&pairs, &scores, &read_labels(&args.data, OnBadRecord::Fail)?))
}

/// Measures `model` on the first `n` pairs, `batch_size` answers at a time, which `group` shares.
pub(crate) fn evaluate_pairs(
    group: &Group,
    model: &ScalarGpt,
    pairs: &Pairs,
    n: usize,
    batch_size: usize,
) -> Result<Agreement, ScoreError> {
    let used = &pairs.encoded[..n.min(pairs.encoded.len())];
    let n_answers = group.share().of(2 * used.len()).len();
    let pace = Pace::new("evaluation", n_answers, "answers", Interrupt::never());
    Ok(Agreement::of(used, &score_pairs(group, model, used, batch_size, &|n| pace.done(n))?))
}

impl Evaluation {
    /// Compares the scores of `pairs` with their order; `labels` are what the same file says, ties among them.
    fn of(pairs: &Pairs, scores: &[[f32; 2]], labels: &[Label]) -> Self {
        let mut distances: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        for (annotator, scores) in pairs.annotators.iter().zip(scores) {
            if let Some(name) = annotator {
                distances.entry(name).or_default().push(distance(*scores));
            }
        }
        // Somebody who is asked again says nothing new.
        let tied = labels.iter().filter(|label| !label.repeat && is_tie(label));
        let (mut n_ties, mut ties) = (0, BTreeMap::<&str, usize>::new());
        for label in tied {
            n_ties += 1;
            if let Some(name) = &label.annotator {
                *ties.entry(name).or_default() += 1;
                distances.entry(name).or_default();
            }
        }
        let annotators = distances.into_iter().map(|(name, distances)| {
            let wins: Vec<f64> = distances.iter().map(|distance| win(*distance, 0.0)).collect();
            let of_annotator = OfAnnotator {
                accuracy: Interval::of_rate(&wins),
                margin_mean: Interval::of(&distances).map(|interval| interval.mean),
                ties: ties.get(name).copied().unwrap_or(0),
            };
            (name.to_owned(), of_annotator)
        });
        Self {
            annotators: annotators.collect(),
            agreement: Agreement::of(&pairs.encoded, scores),
            pairs_with_margin: pairs.encoded.iter().filter(|pair| pair.margin.is_some()).count(),
            ties: n_ties,
        }
    }
}

fn is_tie(label: &Label) -> bool {
    matches!(label.verdict, Verdict::Tie | Verdict::BothBad)
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
fn is_zero(n: &usize) -> bool {
    *n == 0
}

#[cfg(test)]
mod tests {
    use common::conversation::{Message, Role};
    use common::score::EncodedPair;
    use serde_json::{Value, json};

    use super::*;

    fn pairs(annotators: &[Option<&str>]) -> Pairs {
        let pair = EncodedPair { chosen: vec![0, 1], rejected: vec![0, 2], n_prompt: 1, margin: None };
        Pairs {
            encoded: vec![pair; annotators.len()],
            records: (0..annotators.len()).map(|i| i..i + 1).collect(),
            annotators: annotators.iter().map(|name| name.map(str::to_owned)).collect(),
        }
    }

    fn label(annotator: Option<&str>, verdict: Verdict, repeat: bool) -> Label {
        Label {
            prompt: vec![Message::new(Role::User, "p")],
            answers: ["a", "b"].map(str::to_owned),
            verdict,
            annotator: annotator.map(str::to_owned),
            seconds: None,
            models: None,
            repeat,
        }
    }

    #[test]
    fn each_person_has_the_accuracy_of_their_own_pairs() {
        let pairs = pairs(&[Some("mia"), Some("tom"), None, Some("mia"), Some("tom"), Some("mia"), Some("mia")]);
        // Mia: right by 2, wrong by 1, right by 1, equal; Tom: wrong by 3, wrong by 1; nobody: right by 5.
        let scores = [[2.0, 0.0], [0.0, 3.0], [5.0, 0.0], [0.0, 1.0], [1.0, 2.0], [1.0, 0.0], [1.0, 1.0]];
        let evaluation = Evaluation::of(&pairs, &scores, &[]);
        let of = |name: &str| evaluation.annotators[name];
        let [mia, tom] = ["mia", "tom"].map(|name| of(name).accuracy.expect("pairs"));
        assert_eq!((mia.mean, mia.n, of("mia").margin_mean), (0.625, 4, Some(0.5)));
        assert_eq!((tom.mean, tom.n, of("tom").margin_mean), (0.0, 2, Some(-2.0)));
        // Wilson's upper end of 0 of n is z²/(n + z²).
        let z2 = 1.959_963_984_540_054_f64.powi(2);
        assert!((tom.high - z2 / (2.0 + z2)).abs() < 1e-12 && tom.low == 0.0, "{tom:?}");
        assert_eq!((evaluation.annotators.len(), evaluation.agreement.accuracy), (2, 3.5 / 7.0));
    }

    #[test]
    fn ties_are_counted_once_and_agree_with_nothing() {
        let labels = [
            label(Some("mia"), Verdict::Tie, false),
            label(Some("mia"), Verdict::Tie, true),
            label(Some("kim"), Verdict::BothBad, false),
            label(None, Verdict::Tie, false),
            label(Some("mia"), Verdict::First, false),
        ];
        let evaluation = Evaluation::of(&pairs(&[Some("mia")]), &[[1.0, 0.0]], &labels);
        assert_eq!((evaluation.ties, evaluation.annotators["mia"].ties), (3, 1));
        let kim = evaluation.annotators["kim"];
        assert_eq!((kim.accuracy, kim.margin_mean, kim.ties), (None, None, 1));
    }

    #[test]
    fn records_without_people_ties_and_margins_are_reported_as_ever() {
        let printed = |pairs: &Pairs| -> Vec<String> {
            let Value::Object(fields) = json!(Evaluation::of(pairs, &[[1.0, 0.0]], &[])) else { panic!("an object") };
            fields.keys().cloned().collect()
        };
        let mut of_nobody = pairs(&[None]);
        let ever = ["accuracy", "longer_wins_accuracy", "loss", "margin_mean", "pairs"];
        let mut fields = printed(&of_nobody);
        fields.sort();
        assert_eq!(fields, ever);
        of_nobody.encoded[0].margin = Some(0.5);
        assert!(printed(&of_nobody).contains(&"pairs_with_margin".to_owned()));
    }
}
