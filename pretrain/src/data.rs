//! Text to windows of tokens, which [`common::corpus`] cuts: those of a run's first steps, and those of one file.

use std::path::Path;

use anyhow::Context;
use common::corpus::{Corpus, TextConfig, TokenSet, Tokenising};
use common::group::Group;
use common::rng::Streams;
use common::tokenizer::Tokenizer;

use crate::cli::TrainArgs;
use crate::config::PretrainConfig;

/// The key that says how long a window is.
pub(crate) const SEQ_LEN: &str = "train.seq_len";

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
        (seq_len, SEQ_LEN),
        &Streams::new(config.seed),
        &Tokenising::alone(&Group::alone(), args.stage.runtime.process.hides_bars()),
    )?;
    Ok(corpus.train.batch(0..n as u64)?.rows)
}

/// Text of one file as a stream of its own, cut into windows without overlap: what `pretrain eval` measures.
pub(crate) fn single_file(
    file: &Path,
    data: &TextConfig,
    tokenizer: &Tokenizer,
    seq_len: usize,
    quiet: bool,
) -> anyhow::Result<TokenSet> {
    TokenSet::of_file(file, data, tokenizer, seq_len, &Tokenising::alone(&Group::alone(), quiet))
}
