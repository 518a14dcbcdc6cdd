//! How well the scores agree with held-out preferences.

use anyhow::ensure;
use common::checkpoint::{Checkpoint, Stage};
use common::cli::print_json;
use common::model::ScalarGpt;
use common::score::score_rows;
use common::session::DataConfig;
use common::stats::win;
use serde::Serialize;

use crate::cli::EvalArgs;
use crate::data::{EncodedPair, Pairs};

/// A reward model's agreement with labelled pairs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Evaluation {
    /// Fraction of pairs whose chosen answer scores higher; equal scores count half.
    pub accuracy: f64,
    /// Mean pairwise loss in nats, margins included where the pairs have them; of the scores as the checkpoint gives them,
    /// which training normalises after its last `val/loss`.
    pub loss: f64,
    /// Mean of `score_chosen − score_rejected`.
    pub margin_mean: f64,
    /// The accuracy of preferring whichever answer has more tokens; equal lengths count half.
    pub longer_wins_accuracy: f64,
    /// Number of pairs.
    pub pairs: usize,
}

/// Carries out `reward-model eval`: one JSON object on stdout.
pub(crate) fn run(args: &EvalArgs) -> anyhow::Result<()> {
    print_json(&evaluate(args)?)
}

/// Measures a checkpoint on a file of pairs.
///
/// # Errors
/// If the checkpoint or the file cannot be used, or a score is not finite.
pub fn evaluate(args: &EvalArgs) -> anyhow::Result<Evaluation> {
    let checkpoint = Checkpoint::open_on(&args.checkpoint, args.runtime.base())?.of_stage(&[Stage::RewardModel])?;
    let tokenizer = checkpoint.require_tokenizer()?;
    let model = args.runtime.open()?.scalar(&checkpoint)?;
    let max_seq_len = model.config().max_seq_len;
    let files = std::slice::from_ref(&args.data);
    let pairs = Pairs::read(files, tokenizer, max_seq_len, &DataConfig::default())?;
    evaluate_pairs(&model, &pairs, pairs.encoded.len(), args.batch_size.get())
}

/// Measures `model` on the first `n` pairs, `batch_size` answers at a time.
pub(crate) fn evaluate_pairs(
    model: &ScalarGpt,
    pairs: &Pairs,
    n: usize,
    batch_size: usize,
) -> anyhow::Result<Evaluation> {
    let used = &pairs.encoded[..n.min(pairs.encoded.len())];
    let rows: Vec<&[u32]> = used.iter().flat_map(|pair| [pair.chosen.as_slice(), pair.rejected.as_slice()]).collect();
    let scores = score_rows(model, &rows, batch_size)?;
    ensure!(scores.iter().all(|score| score.is_finite()), "a score is not finite: the weights have diverged");
    let (mut accuracy, mut loss, mut margin_mean) = (0.0, 0.0, 0.0);
    for (pair, scores) in used.iter().zip(scores.chunks(2)) {
        let distance = f64::from(scores[0]) - f64::from(scores[1]);
        accuracy += win(distance, 0.0);
        loss += negative_log_sigmoid(distance - f64::from(pair.margin.unwrap_or(0.0)));
        margin_mean += distance;
    }
    let n = used.len() as f64;
    Ok(Evaluation {
        accuracy: accuracy / n,
        loss: loss / n,
        margin_mean: margin_mean / n,
        longer_wins_accuracy: longer_wins_accuracy(used),
        pairs: used.len(),
    })
}

/// How often the longer answer is the preferred one; answers of equal length count half.
fn longer_wins_accuracy(pairs: &[EncodedPair]) -> f64 {
    let wins = pairs.iter().map(|pair| win(pair.chosen.len() as f64, pair.rejected.len() as f64));
    wins.sum::<f64>() / pairs.len() as f64
}

/// `−log σ(x)`, as in [`pairwise_loss`](crate::loss::pairwise_loss) but on the host.
fn negative_log_sigmoid(x: f64) -> f64 {
    (-x).max(0.0) + (-x.abs()).exp().ln_1p()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_lengths_count_half_for_the_longer() {
        let pair = |chosen: &[u32], rejected: &[u32]| EncodedPair {
            chosen: chosen.to_vec(),
            rejected: rejected.to_vec(),
            n_prompt: 1,
            margin: None,
        };
        let pairs = [pair(&[0, 1, 2], &[0, 1]), pair(&[0, 1], &[0, 2])];
        assert_eq!(longer_wins_accuracy(&pairs), 0.75);
    }

    #[test]
    fn negative_log_sigmoid_is_stable_on_both_sides() {
        assert!((negative_log_sigmoid(0.0) - std::f64::consts::LN_2).abs() < 1e-15);
        assert_eq!(negative_log_sigmoid(-1e4), 1e4);
        assert_eq!(negative_log_sigmoid(1e4), 0.0);
        assert!((negative_log_sigmoid(3.0_f64.ln()) - (4.0_f64 / 3.0).ln()).abs() < 1e-15);
    }
}
