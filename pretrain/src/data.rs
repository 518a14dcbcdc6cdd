//! Text to windows of tokens.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, ensure};
use burn::tensor::{Device, Int, Tensor, TensorData};
use common::data::order::Order;
use common::data::shards::Tokens;
use common::group::Group;
use common::model::Layout;
use common::rng::Streams;
use common::tokenizer::Tokenizer;

use crate::config::{DataConfig, Shuffle};
use crate::tokenise::Tokenising;

/// Windows of an epoch up to which [`Shuffle::Auto`] puts all of them in one random order.
const ONE_ORDER: usize = 1 << 20;

/// The training text and the held-out text.
pub(crate) struct Corpus {
    pub(crate) train: TokenSet,
    pub(crate) val: TokenSet,
}

/// A stream of tokens, cut into windows.
pub(crate) struct TokenSet {
    tokens: Arc<Tokens>,
    /// Which of the tokens belong to this set.
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
    /// Tokenises the configured files, but for the parts that an earlier run with the same tokenizer left.
    pub(crate) fn open(
        data: &DataConfig,
        tokenizer: &Tokenizer,
        seq_len: usize,
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
                 text or lower `train.seq_len`",
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
fn bos_of(data: &DataConfig, tokenizer: &Tokenizer) -> Option<u32> {
    if data.document_bos && !data.attend_across_documents { tokenizer.bos() } else { None }
}

impl TokenSet {
    /// The tokens at `range`, in no order yet.
    fn new(
        tokens: Arc<Tokens>,
        range: std::ops::Range<usize>,
        seq_len: usize,
        streams: Streams,
        bos: Option<u32>,
    ) -> Self {
        let bytes_per_token = tokens.n_bytes() as f64 / tokens.len().max(1) as f64;
        Self { tokens, range, bytes_per_token, seq_len, order: None, streams, bos }
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

    /// How many windows `n` are, where 0 is all.
    pub(crate) fn n_spread(&self, n: usize) -> usize {
        let all = self.n_windows(0);
        if n == 0 { all } else { n.min(all) }
    }

    /// Where window `i` of `n` begins that are spread evenly over the text.
    pub(crate) fn spread(&self, i: usize, n: usize) -> usize {
        i * self.n_windows(0) / n * self.seq_len
    }

    /// The windows that begin at `starts`, counted from the beginning of the set.
    pub(crate) fn windows(&self, starts: impl IntoIterator<Item = usize>) -> anyhow::Result<Windows> {
        let rows = starts.into_iter().map(|start| self.read(start, self.seq_len + 1));
        Ok(Windows { rows: rows.collect::<anyhow::Result<_>>()?, seq_len: self.seq_len, bos: self.bos })
    }

    /// `len` tokens from `start` on, counted from the beginning of the set.
    fn read(&self, start: usize, len: usize) -> anyhow::Result<Vec<u32>> {
        let start = self.range.start + start;
        Ok(self.tokens.read(start..start + len)?)
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

/// Text of one file as a stream of its own, cut into windows without overlap: what `pretrain eval` measures.
pub(crate) fn single_file(
    file: &Path,
    data: &DataConfig,
    tokenizer: &Tokenizer,
    seq_len: usize,
    quiet: bool,
) -> anyhow::Result<TokenSet> {
    let alone = Group::alone();
    let parts = Tokenising::alone(&alone, quiet).parts(&[file.to_owned()], data, tokenizer);
    let tokens = Tokens::new(parts.context("failed to tokenise the text")?.concat());
    let n_tokens = tokens.len();
    ensure!(n_tokens > 1, "`{}` has {n_tokens} tokens; at least 2 are needed", file.display());
    let bos = bos_of(data, tokenizer);
    Ok(TokenSet::new(Arc::new(tokens), 0..n_tokens, seq_len.min(n_tokens - 1), Streams::new(0), bos))
}

impl TokenSet {
    /// The last window of [`spread`](Self::spread) ends before the text does: what is left, as a shorter window.
    pub(crate) fn remainder(&self) -> anyhow::Result<Option<Windows>> {
        let done = self.n_windows(0) * self.seq_len;
        let seq_len = self.range.len() - 1 - done;
        if seq_len == 0 {
            return Ok(None);
        }
        let row = self.read(done, seq_len + 1)?;
        Ok(Some(Windows { rows: vec![row], seq_len, bos: self.bos }))
    }

    /// UTF-8 bytes of the whole text.
    pub(crate) fn n_bytes(&self) -> f64 {
        self.bytes_of(self.range.len())
    }
}
