//! How well the scores agree with held-out preferences.

use common::checkpoint::{Checkpoint, Stage};
use common::cli::print_json;
use common::group::Group;
use common::model::ScalarGpt;
pub use common::score::Agreement as Evaluation;
use common::score::{Pairs, ScoreError, score_pairs};
use common::session::DataConfig;

use crate::cli::EvalArgs;
use crate::data;

/// Carries out `reward-model eval`: one JSON object on stdout.
pub(crate) fn run(args: &EvalArgs) -> anyhow::Result<()> {
    print_json(&evaluate(args)?)
}

/// Measures a checkpoint on a file of pairs.
///
/// # Errors
/// If the checkpoint or the file cannot be used, or a score is not finite.
pub fn evaluate(args: &EvalArgs) -> anyhow::Result<Evaluation> {
    let checkpoint =
        Checkpoint::open_with(&args.checkpoint, args.runtime.opening())?.of_stage(&[Stage::RewardModel])?;
    let tokenizer = checkpoint.require_tokenizer()?;
    let model = args.runtime.open()?.scalar(&checkpoint)?;
    let max_seq_len = model.config().max_seq_len;
    let files = std::slice::from_ref(&args.data);
    let pairs = data::read(files, tokenizer, max_seq_len, &DataConfig::default())?;
    Ok(evaluate_pairs(&Group::alone(), &model, &pairs, pairs.encoded.len(), args.batch_size.get())?)
}

/// Measures `model` on the first `n` pairs, `batch_size` answers at a time, which `group` shares.
pub(crate) fn evaluate_pairs(
    group: &Group,
    model: &ScalarGpt,
    pairs: &Pairs,
    n: usize,
    batch_size: usize,
) -> Result<Evaluation, ScoreError> {
    let used = &pairs.encoded[..n.min(pairs.encoded.len())];
    Ok(Evaluation::of(used, &score_pairs(group, model, used, batch_size)?))
}
