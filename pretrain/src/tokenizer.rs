//! `pretrain tokenizer`: text in, a tokenizer out.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};

use anyhow::Context;
use common::config::{self, PathResolver};
use common::corpus::TextConfig;
use common::data::DataError;
use common::data::records::Texts;
use common::out_dir::{self, OutLock};
use common::rng::Streams;
use common::tokenizer::{Tokenizer, TokenizerKind};
use serde::Serialize;
use tracing::subscriber::{NoSubscriber, with_default};

use crate::cli::TokenizerArgs;
use crate::config::PretrainConfig;

/// Bytes of text that the measure of compression looks at.
const HELD_OUT_BYTES: usize = 1 << 20;

/// Documents that are read ahead.
const AHEAD: usize = 256;

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
    let text = Text::count(&config)?;
    let _lock = OutLock::take(&args.out)?;
    let inputs: Vec<&Path> = config.data.train.iter().chain(&config.data.val).map(PathBuf::as_path).collect();
    out_dir::prepare_new(&args.out, args.overwrite, &inputs)?;
    let (tokenizer, held_out) = learn(&config, &text, args.process.hides_bars())?;
    tokenizer.save(&args.out)?;
    let path = args.out.join("config.toml");
    std::fs::write(&path, config::to_toml(&config)?)
        .with_context(|| format!("failed to write `{}`", path.display()))?;

    let (mut n_bytes, mut n_tokens) = (0, 0);
    for text in &held_out {
        n_bytes += text.len();
        n_tokens += tokenizer.encode(text)?.len();
    }
    Ok(TokenizerReport {
        vocab_size: tokenizer.vocab_size(),
        bytes_per_token: if n_tokens == 0 { 0.0 } else { n_bytes as f64 / n_tokens as f64 },
        held_out_bytes: n_bytes,
        sha256: tokenizer.sha256(),
    })
}

/// The text in numbers, which decide what of it is learned from.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Text {
    /// Documents of the training files that a vocabulary is learned from: the first ones.
    n_learned: usize,
    /// Documents of these files after which the held-out ones begin; `None` where other files are held out.
    n_before_held_out: Option<usize>,
    /// The probability with which one of the first documents is drawn.
    drawn: f64,
}

impl Text {
    /// Reads all files, which finds every bad record before anything is written.
    fn count(config: &PretrainConfig) -> anyhow::Result<Self> {
        let data = &config.data;
        let (mut n, mut n_bytes) = (0, 0);
        for text in documents(&data.train, data) {
            n += 1;
            n_bytes += text?.len() as u64;
        }
        documents(&data.val, data).try_for_each(|text| text.map(drop))?;
        // A single document is cut, several are divided.
        let (n_learned, n_before_held_out) = match n {
            _ if !data.val.is_empty() => (n, None),
            0 | 1 => (n, Some(0)),
            _ => {
                let split = (n - (n as f64 * data.val_fraction) as usize).clamp(1, n - 1);
                (split, Some(split))
            }
        };
        let limit = config.tokenizer.sample_bytes;
        let is_sample = n_bytes > limit && !matches!(config.tokenizer.kind, TokenizerKind::Char | TokenizerKind::Byte);
        if is_sample {
            let mb = |bytes: u64| bytes as f64 / 1e6;
            tracing::info!(
                "the vocabulary is learned from {:.1} MB of {:.1} MB of text: `tokenizer.sample_bytes`",
                mb(limit),
                mb(n_bytes)
            );
        }
        Ok(Self { n_learned, n_before_held_out, drawn: if is_sample { limit as f64 / n_bytes as f64 } else { 1.0 } })
    }
}

/// Learns a tokenizer, and gives the beginning of the held-out text.
///
/// The documents go from a thread that reads them to those that count their words: no more are in memory than are read
/// ahead.
fn learn(config: &PretrainConfig, text: &Text, quiet: bool) -> anyhow::Result<(Tokenizer, Vec<String>)> {
    std::thread::scope(|scope| {
        let (sender, receiver) = sync_channel(AHEAD);
        // What there is to say of bad records was said when they were counted.
        let reader = scope.spawn(move || with_default(NoSubscriber::new(), || read(config, text, &sender)));
        let tokenizer = Tokenizer::train(&config.tokenizer, receiver.into_iter(), quiet);
        let held_out = reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok((tokenizer?, held_out))
    })
}

/// Sends the documents to learn from, and returns the first [`HELD_OUT_BYTES`] of the others.
fn read(config: &PretrainConfig, text: &Text, sender: &SyncSender<String>) -> Result<Vec<String>, DataError> {
    let data = &config.data;
    let streams = Streams::new(config.seed);
    let is_drawn = |i: usize| text.drawn >= 1.0 || streams.get("tokenizer/sample", i as u64).uniform() < text.drawn;
    // A `byte` tokenizer learns nothing, and does not listen.
    let mut is_heard = true;
    let mut held_out = HeldOut::default();
    for (i, document) in documents(&data.train, data).enumerate() {
        let document = document?;
        let is_held_out = text.n_before_held_out.is_some_and(|n| i >= n);
        if is_held_out && !held_out.is_full() {
            held_out.add(document.clone());
        }
        if i < text.n_learned && is_heard && is_drawn(i) {
            is_heard = sender.send(document).is_ok();
        }
        let needs_held_out = text.n_before_held_out.is_some() && !held_out.is_full();
        if (i + 1 >= text.n_learned || !is_heard) && !needs_held_out {
            break;
        }
    }
    for document in documents(&data.val, data) {
        if held_out.is_full() {
            break;
        }
        held_out.add(document?);
    }
    Ok(held_out.texts)
}

/// The beginning of a text.
#[derive(Default)]
struct HeldOut {
    texts: Vec<String>,
    n_bytes: usize,
}

impl HeldOut {
    fn is_full(&self) -> bool {
        self.n_bytes > HELD_OUT_BYTES
    }

    fn add(&mut self, text: String) {
        self.n_bytes += text.len();
        self.texts.push(text);
    }
}

/// The documents of `files`, one after the other.
fn documents(files: &[PathBuf], data: &TextConfig) -> impl Iterator<Item = Result<String, DataError>> {
    files.iter().flat_map(|file| {
        let (texts, error) = match Texts::open(file, &data.separator, data.read_options("data")) {
            Ok(texts) => (Some(texts), None),
            Err(error) => (None, Some(Err(error))),
        };
        error.into_iter().chain(texts.into_iter().flatten())
    })
}

#[cfg(test)]
mod tests {
    use common::tokenizer::TokenizerConfig;

    use super::*;

    /// 400 documents in two files, of which the last 40 are held out.
    fn config(dir: &Path, tokenizer: TokenizerConfig) -> PretrainConfig {
        let write = |name: &str, documents: std::ops::Range<usize>| {
            let text: Vec<_> = documents.map(|i| format!("document number {i} of all")).collect();
            std::fs::write(dir.join(name), text.join("\n\n")).unwrap();
            dir.join(name)
        };
        let train = vec![write("a.txt", 0..150), write("b.txt", 150..400)];
        PretrainConfig { data: TextConfig { train, ..TextConfig::default() }, tokenizer, ..PretrainConfig::default() }
    }

    fn learned(config: &PretrainConfig) -> (Vec<String>, Vec<String>) {
        let (sender, receiver) = sync_channel(1000);
        let held_out = read(config, &Text::count(config).unwrap(), &sender).unwrap();
        drop(sender);
        (receiver.into_iter().collect(), held_out)
    }

    #[test]
    fn a_small_corpus_is_read_whole_and_a_large_one_in_a_sample_from_all_over() {
        let dir = tempfile::tempdir().unwrap();
        let all = |from, to| (from..to).map(|i: usize| format!("document number {i} of all")).collect::<Vec<_>>();
        let whole = config(dir.path(), TokenizerConfig::default());
        assert_eq!(learned(&whole), (all(0, 360), all(360, 400)));

        let n_bytes = all(0, 400).concat().len() as u64;
        let limited = |kind, sample_bytes| TokenizerConfig { kind, sample_bytes, ..TokenizerConfig::default() };
        let exact = config(dir.path(), limited(TokenizerKind::Bpe, n_bytes));
        assert_eq!(learned(&exact).0.len(), 360, "all of it is not too much");
        let sampled = config(dir.path(), limited(TokenizerKind::Bpe, n_bytes / 4));
        let (sample, held_out) = learned(&sampled);
        assert!((60..120).contains(&sample.len()), "{} of 360, about a quarter", sample.len());
        assert_eq!(held_out, all(360, 400));
        let in_first_half = sample.iter().filter(|text| all(0, 180).contains(text)).count();
        assert!((sample.len() / 3..=2 * sample.len() / 3).contains(&in_first_half), "{in_first_half}");
        assert_eq!(learned(&sampled).0, sample, "the same sample each time");

        let chars = config(dir.path(), limited(TokenizerKind::Char, 10));
        assert_eq!(learned(&chars).0.len(), 360, "a character must not be missed");
    }

    #[test]
    fn a_single_document_is_learned_from_and_measured() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = config(dir.path(), TokenizerConfig::default());
        std::fs::write(dir.path().join("a.txt"), "one").unwrap();
        config.data.train.truncate(1);
        assert_eq!(learned(&config), (vec!["one".to_owned()], vec!["one".to_owned()]));
    }
}
