//! Text to windows of tokens.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, ensure};
use burn::tensor::{Device, Int, Tensor, TensorData};
use common::data::file_sha256;
use common::data::order::Order;
use common::data::shards::{ShardSource, TokenShard, cache_dir};
use common::model::Layout;
use common::rng::Streams;
use common::tokenizer::Tokenizer;

use crate::config::DataConfig;

/// The training text and the held-out text.
pub(crate) struct Corpus {
    pub(crate) train: TokenSet,
    pub(crate) val: TokenSet,
}

/// A stream of tokens, cut into windows.
pub(crate) struct TokenSet {
    shards: Arc<[TokenShard]>,
    /// Which of the tokens of all shards, one after the other, belong to this set.
    range: std::ops::Range<usize>,
    bytes_per_token: f64,
    seq_len: usize,
    order: Option<Order>,
    streams: Streams,
    bos: Option<u32>,
}

/// Windows of `seq_len + 1` tokens: every token but the last is an input, every one but the first a target.
pub struct Windows {
    /// `seq_len + 1` tokens each.
    pub rows: Vec<Vec<u32>>,
    /// How many tokens of a window are predicted.
    pub seq_len: usize,
    /// The token that begins a document where attention stops at documents' ends.
    pub bos: Option<u32>,
}

impl Corpus {
    /// Tokenises the configured files, or opens the shards that an earlier run with the same tokenizer left.
    pub(crate) fn open(
        data: &DataConfig,
        tokenizer: &Tokenizer,
        seq_len: usize,
        streams: &Streams,
        quiet: bool,
    ) -> anyhow::Result<Self> {
        let open = |files: &[PathBuf]| {
            let shards = files.iter().map(|file| open_shard(file, data, tokenizer, quiet));
            shards.collect::<anyhow::Result<Arc<[TokenShard]>>>().context("failed to tokenise the text")
        };
        let (train, val) = (open(&data.train)?, open(&data.val)?);
        let n_train = n_tokens(&train);
        // Where no file is held out, the end of the training text is.
        let n_held_out = if val.is_empty() { (n_train as f64 * data.val_fraction) as usize } else { 0 };
        let split = n_train - n_held_out;
        let bos = bos_of(data, tokenizer);
        let set = |shards, range| TokenSet::new(shards, range, seq_len, *streams, bos);
        let val = if val.is_empty() {
            set(Arc::clone(&train), split..n_train)
        } else {
            let n_val = n_tokens(&val);
            set(val, 0..n_val)
        };
        let mut train = set(train, 0..split);
        for (name, set) in [("training", &train), ("held-out", &val)] {
            ensure!(
                set.n_windows(0) > 0,
                "the {name} text has {} tokens, fewer than one window of {seq_len} and its target\nhint: give more \
                 text or lower `train.seq_len`",
                set.n_tokens()
            );
        }
        // One window fewer than fit, so that each epoch can begin at another offset.
        train.order = Some(Order::new(train.n_windows(seq_len - 1), *streams, "order"));
        Ok(Self { train, val })
    }
}

fn n_tokens(shards: &[TokenShard]) -> usize {
    shards.iter().map(TokenShard::len).sum()
}

/// The token that begins a document, where attention stops at documents' ends.
fn bos_of(data: &DataConfig, tokenizer: &Tokenizer) -> Option<u32> {
    if data.document_bos && !data.attend_across_documents { tokenizer.bos() } else { None }
}

impl TokenSet {
    /// The tokens `range` of `shards`, in no order yet.
    fn new(
        shards: Arc<[TokenShard]>,
        range: std::ops::Range<usize>,
        seq_len: usize,
        streams: Streams,
        bos: Option<u32>,
    ) -> Self {
        let n_bytes: u64 = shards.iter().map(TokenShard::n_bytes).sum();
        let bytes_per_token = n_bytes as f64 / n_tokens(&shards).max(1) as f64;
        Self { shards, range, bytes_per_token, seq_len, order: None, streams, bos }
    }

    /// Number of tokens in the set.
    pub(crate) fn n_tokens(&self) -> usize {
        self.range.len()
    }

    /// UTF-8 bytes of text that `n_tokens` tokens stand for, on average.
    pub(crate) fn bytes_of(&self, n_tokens: usize) -> f64 {
        self.bytes_per_token * n_tokens as f64
    }

    /// Windows that do not overlap but for the token between them, beginning at `offset`; at least one if any fits.
    fn n_windows(&self, offset: usize) -> usize {
        let whole = self.range.len().saturating_sub(1) / self.seq_len;
        (self.range.len().saturating_sub(1 + offset) / self.seq_len).max(whole.min(1))
    }

    /// The windows `positions` of the endless sequence of shuffled epochs.
    ///
    /// Every epoch cuts the text at another offset, so that a token does not always stand at the same position.
    ///
    /// # Panics
    /// If the set is the held-out one, which is not shuffled.
    pub(crate) fn batch(&mut self, positions: std::ops::Range<u64>) -> anyhow::Result<Windows> {
        let order = self.order.as_mut().expect("the training text is shuffled");
        let slack = self.range.len() - 1 - order.n_items() * self.seq_len;
        let starts: Vec<usize> = positions
            .map(|position| {
                let mut offsets = self.streams.get("order/offset", order.epoch(position));
                offsets.below(slack.min(self.seq_len - 1) + 1) + order.item(position) * self.seq_len
            })
            .collect();
        self.windows(starts)
    }

    /// `n` windows spread evenly over the text, or all with 0.
    pub(crate) fn spread(&self, n: usize) -> Vec<usize> {
        let all = self.n_windows(0);
        let n = if n == 0 { all } else { n.min(all) };
        (0..n).map(|i| i * all / n * self.seq_len).collect()
    }

    /// The windows that begin at `starts`, counted from the beginning of the set.
    pub(crate) fn windows(&self, starts: impl IntoIterator<Item = usize>) -> anyhow::Result<Windows> {
        let rows = starts.into_iter().map(|start| self.read(self.range.start + start, self.seq_len + 1));
        Ok(Windows { rows: rows.collect::<anyhow::Result<_>>()?, seq_len: self.seq_len, bos: self.bos })
    }

    /// `len` tokens from `start` of all shards together.
    fn read(&self, mut start: usize, len: usize) -> anyhow::Result<Vec<u32>> {
        let mut tokens = Vec::with_capacity(len);
        for shard in &*self.shards {
            if start >= shard.len() {
                start -= shard.len();
                continue;
            }
            let n = (shard.len() - start).min(len - tokens.len());
            tokens.extend(shard.window(start, n)?);
            start = 0;
            if tokens.len() == len {
                break;
            }
        }
        ensure!(tokens.len() == len, "the tokenised text is shorter than its header says");
        Ok(tokens)
    }
}

impl Windows {
    /// Inputs `[batch, seq]` and the tokens that follow them, `[batch · seq]`.
    pub(crate) fn tensors(&self, device: &Device) -> (Tensor<2, Int>, Tensor<1, Int>) {
        let (batch, seq) = (self.rows.len(), self.seq_len);
        let ids = |skip: usize| -> Vec<i64> {
            self.rows.iter().flat_map(|row| row[skip..skip + seq].iter().map(|&id| i64::from(id))).collect()
        };
        (
            Tensor::from_data(TensorData::new(ids(0), [batch, seq]), device),
            Tensor::from_data(TensorData::new(ids(1), [batch * seq]), device),
        )
    }

    /// How many tokens are predicted.
    pub(crate) fn n_targets(&self) -> usize {
        self.rows.len() * self.seq_len
    }

    /// Attention over the whole window, or within each document.
    pub(crate) fn layout(&self) -> Layout {
        let Some(bos) = self.bos else {
            return Layout::right_padded();
        };
        let mut first_key = Vec::with_capacity(self.n_targets());
        for row in &self.rows {
            let mut first = 0;
            for (t, &id) in row[..self.seq_len].iter().enumerate() {
                if id == bos {
                    first = t as u32;
                }
                first_key.push(first);
            }
        }
        Layout::packed(first_key, self.seq_len)
    }
}

/// The tokens of one file, from an earlier run where there are any.
fn open_shard(file: &Path, data: &DataConfig, tokenizer: &Tokenizer, quiet: bool) -> anyhow::Result<TokenShard> {
    let source = ShardSource {
        path: file,
        sha256: &file_sha256(file)?,
        separator: &data.separator,
        options: data.read_options(),
        begin: if data.document_bos { tokenizer.bos() } else { None },
        tokenizer_sha256: &tokenizer.sha256(),
        vocab_size: tokenizer.vocab_size(),
    };
    Ok(TokenShard::open_or_encode(&cache_dir(), &source, |texts| tokenizer.encode_batch(texts), quiet)?)
}

/// Text of one file as a stream of its own, cut into windows without overlap: what `pretrain eval` measures.
pub(crate) fn single_file(
    file: &Path,
    data: &DataConfig,
    tokenizer: &Tokenizer,
    seq_len: usize,
    quiet: bool,
) -> anyhow::Result<TokenSet> {
    let shard = open_shard(file, data, tokenizer, quiet).context("failed to tokenise the text")?;
    let n_tokens = shard.len();
    ensure!(n_tokens > 1, "`{}` has {n_tokens} tokens; at least 2 are needed", file.display());
    let bos = bos_of(data, tokenizer);
    Ok(TokenSet::new(Arc::new([shard]), 0..n_tokens, seq_len.min(n_tokens - 1), Streams::new(0), bos))
}

impl TokenSet {
    /// The last window of [`spread`](Self::spread) ends before the text does: what is left, as a shorter window.
    pub(crate) fn remainder(&self) -> anyhow::Result<Option<Windows>> {
        let done = self.n_windows(0) * self.seq_len;
        let seq_len = self.range.len() - 1 - done;
        if seq_len == 0 {
            return Ok(None);
        }
        let row = self.read(self.range.start + done, seq_len + 1)?;
        Ok(Some(Windows { rows: vec![row], seq_len, bos: self.bos }))
    }

    /// UTF-8 bytes of the whole text.
    pub(crate) fn n_bytes(&self) -> f64 {
        self.bytes_of(self.range.len())
    }
}
