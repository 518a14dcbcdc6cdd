//! Training windows by themselves, for whoever compares what the model makes of them.

use anyhow::Context;
use common::rng::Streams;
use common::tokenizer::Tokenizer;

use crate::cli::TrainArgs;
use crate::data::Corpus;
use crate::train::load_config;

/// The first `n` windows that `pretrain train` would see: rows of `seq_len + 1` tokens.
///
/// # Errors
/// If configuration, tokenizer or text cannot be read.
pub fn first_windows(args: &TrainArgs, n: usize) -> anyhow::Result<Vec<Vec<u32>>> {
    let config = load_config(args)?;
    let tokenizer = Tokenizer::load(args.tokenizer.as_ref().context("windows need `--tokenizer`")?)?;
    let model = config.model.resolve(tokenizer.vocab_size())?;
    let seq_len = config.train.seq_len.unwrap_or(model.max_seq_len).min(model.max_seq_len);
    let mut corpus =
        Corpus::open(&config.data, &tokenizer, seq_len, &Streams::new(config.seed), args.stage.runtime.quiet)?;
    Ok(corpus.train.batch(0..n as u64)?.rows)
}
