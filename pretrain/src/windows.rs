//! Training windows by themselves, to compare what backends compute from them.

use anyhow::Context;
use common::group::Group;
use common::rng::Streams;
use common::tokenizer::Tokenizer;

use crate::cli::TrainArgs;
use crate::config::PretrainConfig;
use crate::data::Corpus;
use crate::tokenise::Tokenising;

/// The first `n` windows that `pretrain train` would see: rows of `seq_len + 1` tokens.
///
/// # Errors
/// If configuration, tokenizer or text cannot be read.
pub fn first_windows(args: &TrainArgs, n: usize) -> anyhow::Result<Vec<Vec<u32>>> {
    let config = PretrainConfig::load(&args.stage)?;
    let tokenizer = Tokenizer::load(args.tokenizer.as_ref().context("windows need `--tokenizer`")?)?;
    let model = config.model.resolve(tokenizer.vocab_size())?;
    let seq_len = config.seq_len(&model)?;
    let mut corpus = Corpus::open(
        &config.data,
        &tokenizer,
        seq_len,
        &Streams::new(config.seed),
        &Tokenising::alone(&Group::alone(), args.stage.runtime.process.hides_bars()),
    )?;
    Ok(corpus.train.batch(0..n as u64)?.rows)
}
