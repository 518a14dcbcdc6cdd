//! `pretrain tokenizer`: text in, a tokenizer out.

use std::path::{Path, PathBuf};

use anyhow::Context;
use common::config::{self, PathResolver};
use common::data::records;
use common::out_dir::{self, OutLock};
use common::tokenizer::Tokenizer;
use serde::Serialize;

use crate::cli::TokenizerArgs;
use crate::config::PretrainConfig;

/// Bytes of text that the measure of compression looks at.
const HELD_OUT_BYTES: usize = 1 << 20;

/// A tokenizer that was learned, in numbers: what `pretrain tokenizer` prints, as JSON.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TokenizerReport {
    /// Number of tokens, special ones included.
    pub vocab_size: usize,
    /// Bytes of held-out text for each of its tokens.
    pub bytes_per_token: f64,
    /// Bytes of held-out text that were looked at.
    pub held_out_bytes: usize,
    /// SHA-256 of the vocabulary and its rules, as [`Tokenizer::sha256`] defines it.
    pub sha256: String,
}

/// Trains a tokenizer on the configured text and writes its directory.
///
/// # Errors
/// If the configuration, the text or the output directory cannot be used.
pub fn train_tokenizer(args: &TokenizerArgs) -> anyhow::Result<TokenizerReport> {
    let mut config: PretrainConfig = config::load(&args.config, &args.overrides)?;
    config.validate().with_context(|| format!("invalid config `{}`", args.config.display()))?;
    let resolver = PathResolver::new(&args.config, args.data.as_deref());
    for (key, paths) in config.data.sources_mut() {
        resolver.resolve_files(key, paths)?;
    }
    let read = |files: &[PathBuf]| {
        let mut texts = Vec::new();
        for file in files {
            texts.extend(records::read_texts(file, &config.data.separator, config.data.read_options())?);
        }
        anyhow::Ok(texts)
    };
    let mut texts = read(&config.data.train)?;
    let held_out = if config.data.val.is_empty() {
        // A single document is cut, several are divided.
        let split = texts.len() - (texts.len() as f64 * config.data.val_fraction) as usize;
        if texts.len() > 1 { texts.split_off(split.clamp(1, texts.len() - 1)) } else { texts.clone() }
    } else {
        read(&config.data.val)?
    };
    let _lock = OutLock::take(&args.out)?;
    let inputs: Vec<&Path> = config.data.train.iter().chain(&config.data.val).map(PathBuf::as_path).collect();
    out_dir::prepare(&args.out, false, args.overwrite, &inputs)?;
    let tokenizer = Tokenizer::train(&config.tokenizer, texts.iter(), args.process.hides_bars())?;
    tokenizer.save(&args.out)?;
    let path = args.out.join("config.toml");
    std::fs::write(&path, config::to_toml(&config)?)
        .with_context(|| format!("failed to write `{}`", path.display()))?;

    let (mut n_bytes, mut n_tokens) = (0, 0);
    for text in &held_out {
        n_bytes += text.len();
        n_tokens += tokenizer.encode(text)?.len();
        if n_bytes > HELD_OUT_BYTES {
            break;
        }
    }
    Ok(TokenizerReport {
        vocab_size: tokenizer.vocab_size(),
        bytes_per_token: if n_tokens == 0 { 0.0 } else { n_bytes as f64 / n_tokens as f64 },
        held_out_bytes: n_bytes,
        sha256: tokenizer.sha256(),
    })
}
