//! Text to windows of tokens.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, ensure};
use burn::tensor::{Device, Int, Tensor, TensorData};

use super::{Shuffle, TextConfig, Tokenising};
use crate::data::order::Order;
use crate::data::shards::Tokens;
use crate::model::Layout;
use crate::rng::Streams;
use crate::tokenizer::Tokenizer;

/// Windows of an epoch up to which [`Shuffle::Auto`] puts all of them in one random order.
const ONE_ORDER: usize = 1 << 20;

/// The training text and the held-out text.
#[derive(Debug)]
pub struct Corpus {
    /// The text to train on.
    pub train: TokenSet,
    /// The held-out text.
    pub val: TokenSet,
}

/// A stream of tokens, cut into windows.
#[derive(Debug)]
pub struct TokenSet {
    tokens: Arc<Tokens>,
    /// Which of the tokens belong to this set.
    range: Range<usize>,
    bytes_per_token: f64,
    seq_len: usize,
    order: Option<Order>,
    streams: Streams,
    bos: Option<u32>,
}

/// Windows of `seq_len + 1` tokens: every token but the last is an input, every one but the first a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Windows {
    /// `seq_len + 1` tokens each.
    pub rows: Vec<Vec<u32>>,
    /// How many tokens of a window are predicted.
    pub seq_len: usize,
    /// The token that begins a document where attention stops at documents' ends.
    pub bos: Option<u32>,
}

impl Corpus {
    /// Tokenises the configured files, but for the parts that an earlier run with the same tokenizer left. A window has
    /// `seq_len` tokens, as the key `seq_len_key` says.
    ///
    /// # Errors
    /// If a file cannot be read or the cache not be written, training text or held-out text is shorter than a window, or
    /// a rank was asked to stop.
    pub fn open(
        data: &TextConfig,
        tokenizer: &Tokenizer,
        (seq_len, seq_len_key): (usize, &str),
        streams: &Streams,
        tokenising: &Tokenising<'_>,
    ) -> anyhow::Result<Self> {
        let files = [&data.train[..], &data.val[..]].concat();
        let mut parts = tokenising.parts(&files, data, tokenizer).context("failed to tokenise the text")?;
        let val = Tokens::new(parts.split_off(data.train.len()).concat());
        let train = Arc::new(Tokens::new(parts.concat()));
        let n_train = train.len();
        // Where no file is held out, the end of the training text is.
        let n_held_out = if data.val.is_empty() { (n_train as f64 * data.val_fraction) as usize } else { 0 };
        let split = n_train - n_held_out;
        let bos = bos_of(data, tokenizer);
        let set = |tokens, range| TokenSet::new(tokens, range, seq_len, *streams, bos);
        let val = if data.val.is_empty() {
            set(Arc::clone(&train), split..n_train)
        } else {
            let n_val = val.len();
            set(Arc::new(val), 0..n_val)
        };
        let mut train = set(train, 0..split);
        for (name, set) in [("training", &train), ("held-out", &val)] {
            ensure!(
                set.n_windows(0) > 0,
                "the {name} text has {} tokens, fewer than one window of {seq_len} and its target\nhint: give more \
                 text or lower `{seq_len_key}`",
                set.n_tokens()
            );
        }
        // One window fewer than fit, so that each epoch can begin at another offset.
        let n_windows = train.n_windows(seq_len - 1);
        let in_blocks = match data.shuffle {
            Shuffle::Auto => n_windows > ONE_ORDER,
            Shuffle::Windows => false,
            Shuffle::Blocks => true,
        };
        train.order = Some(if in_blocks {
            tracing::info!("{n_windows} windows in an epoch: shuffled in blocks, then within pools of blocks");
            Order::in_blocks(n_windows, *streams, "order")
        } else {
            Order::new(n_windows, *streams, "order")
        });
        Ok(Self { train, val })
    }
}

/// The token that begins a document, where attention stops at documents' ends.
fn bos_of(data: &TextConfig, tokenizer: &Tokenizer) -> Option<u32> {
    if data.document_bos && !data.attend_across_documents { tokenizer.bos() } else { None }
}

impl TokenSet {
    /// The text of one file, in no order: windows of `seq_len` tokens, or one of all if there are fewer.
    ///
    /// # Errors
    /// If it cannot be tokenised, or has fewer than two tokens.
    pub fn of_file(
        file: &Path,
        data: &TextConfig,
        tokenizer: &Tokenizer,
        seq_len: usize,
        tokenising: &Tokenising<'_>,
    ) -> anyhow::Result<Self> {
        let parts = tokenising.parts(&[file.to_owned()], data, tokenizer);
        let tokens = Tokens::new(parts.context("failed to tokenise the text")?.concat());
        let n_tokens = tokens.len();
        ensure!(n_tokens > 1, "`{}` has {n_tokens} tokens; at least 2 are needed", file.display());
        let bos = bos_of(data, tokenizer);
        Ok(Self::new(Arc::new(tokens), 0..n_tokens, seq_len.min(n_tokens - 1), Streams::new(0), bos))
    }

    /// The tokens at `range`, in no order yet.
    fn new(tokens: Arc<Tokens>, range: Range<usize>, seq_len: usize, streams: Streams, bos: Option<u32>) -> Self {
        let bytes_per_token = tokens.n_bytes() as f64 / tokens.len().max(1) as f64;
        Self { tokens, range, bytes_per_token, seq_len, order: None, streams, bos }
    }

    /// Number of tokens in the set.
    pub fn n_tokens(&self) -> usize {
        self.range.len()
    }

    /// UTF-8 bytes of text that `n_tokens` tokens stand for, on average.
    pub fn bytes_of(&self, n_tokens: usize) -> f64 {
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
    /// # Errors
    /// If the tokens cannot be read.
    ///
    /// # Panics
    /// If the set is the held-out one, which is not shuffled.
    pub fn batch(&mut self, positions: Range<u64>) -> anyhow::Result<Windows> {
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

    /// How many windows `n` are, where 0 is all.
    pub fn n_spread(&self, n: usize) -> usize {
        let all = self.n_windows(0);
        if n == 0 { all } else { n.min(all) }
    }

    /// Where window `i` of `n` begins that are spread evenly over the text.
    pub fn spread(&self, i: usize, n: usize) -> usize {
        i * self.n_windows(0) / n * self.seq_len
    }

    /// The windows that begin at `starts`, counted from the beginning of the set.
    ///
    /// # Errors
    /// If the tokens cannot be read.
    pub fn windows(&self, starts: impl IntoIterator<Item = usize>) -> anyhow::Result<Windows> {
        let rows = starts.into_iter().map(|start| self.read(start, self.seq_len + 1));
        Ok(Windows { rows: rows.collect::<anyhow::Result<_>>()?, seq_len: self.seq_len, bos: self.bos })
    }

    /// The last window of [`spread`](Self::spread) ends before the text does: what is left, as a shorter window.
    ///
    /// # Errors
    /// If the tokens cannot be read.
    pub fn remainder(&self) -> anyhow::Result<Option<Windows>> {
        let done = self.n_windows(0) * self.seq_len;
        let seq_len = self.range.len() - 1 - done;
        if seq_len == 0 {
            return Ok(None);
        }
        let row = self.read(done, seq_len + 1)?;
        Ok(Some(Windows { rows: vec![row], seq_len, bos: self.bos }))
    }

    /// UTF-8 bytes of the whole text.
    pub fn n_bytes(&self) -> f64 {
        self.bytes_of(self.range.len())
    }

    /// `len` tokens from `start` on, counted from the beginning of the set.
    fn read(&self, start: usize, len: usize) -> anyhow::Result<Vec<u32>> {
        let start = self.range.start + start;
        Ok(self.tokens.read(start..start + len)?)
    }
}

impl Windows {
    /// Inputs `[batch, seq]` and the tokens that follow them, `[batch · seq]`.
    pub fn tensors(&self, device: &Device) -> (Tensor<2, Int>, Tensor<1, Int>) {
        let (batch, seq) = (self.rows.len(), self.seq_len);
        let ids = |skip: usize| -> Vec<i64> {
            self.rows.iter().flat_map(|row| row[skip..skip + seq].iter().map(|&id| i64::from(id))).collect()
        };
        (
            Tensor::from_data(TensorData::new(ids(0), [batch, seq]), device),
            Tensor::from_data(TensorData::new(ids(1), [batch * seq]), device),
        )
    }

    /// The windows at `range` of these.
    #[must_use]
    pub fn part(&self, range: Range<usize>) -> Self {
        Self { rows: self.rows[range].to_vec(), ..*self }
    }

    /// How many tokens are predicted.
    pub fn n_targets(&self) -> usize {
        self.rows.len() * self.seq_len
    }

    /// Attention over the whole window, or within each document.
    pub fn layout(&self) -> Layout {
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
