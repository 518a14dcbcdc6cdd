//! Text of pretraining beside the scores: PPO-ptx.
//!
//! `L = L_PPO + γ_ptx·L_LM`, with `L_LM` the mean cross-entropy of the next token over windows of pretraining text. What PPO
//! unlearns of the language, since no score asks for it, this term holds; how much that is, the held-out loss shows.
//!
//! # Source
//! Ouyang et al., arXiv:2203.02155, equation 2 and appendix C.4: the gradients of both are computed one after the other and
//! accumulated, that of the text times γ = 27.8. `DeepSpeed-Chat`, `main.py`, makes an optimiser step of its own for each.

use std::path::PathBuf;

use anyhow::{Context, ensure};
use common::corpus::{Corpus, TextConfig, Tokenising, Windows, evaluate_windows};
use common::group::Group;
use common::metrics::names;
use common::model::Gpt;
use common::model::footprint::Batch;
use common::rng::Streams;
use common::tokenizer::Tokenizer;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::PpoConfig;

/// `[ptx]`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PtxConfig {
    /// Number of windows of text in an update, whose loss is their mean; as many as a minibatch has responses by default. A
    /// micro-batch takes its part of both.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_000_000))]
    pub batch_size: Option<usize>,
    /// Length of a window in tokens; at most the policy's context, which is the default.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000_000))]
    pub seq_len: Option<usize>,
    /// Number of held-out windows in an evaluation, the same every time; 0 takes all.
    pub eval_windows: usize,
    /// The text, best that which the policy was pretrained on; keys are those of `[data]` in `pretrain.toml`.
    pub data: TextConfig,
}

impl Default for PtxConfig {
    fn default() -> Self {
        Self { batch_size: None, seq_len: None, eval_windows: 64, data: TextConfig::default() }
    }
}

impl PtxConfig {
    /// Tokens in a window of a policy that reads at most `context`.
    ///
    /// # Errors
    /// If `ptx.seq_len` is more than that.
    pub fn seq_len(&self, context: usize) -> anyhow::Result<usize> {
        let seq_len = self.seq_len.unwrap_or(context);
        ensure!(
            seq_len <= context,
            "`ptx.seq_len` {seq_len} exceeds the policy's context of {context} tokens\nhint: lower it, or leave it out"
        );
        Ok(seq_len)
    }
}

impl PpoConfig {
    /// Checks that coefficient and text come together.
    pub(crate) fn validate_ptx(&self) -> anyhow::Result<()> {
        let ptx_coef = self.ppo.switches().ptx_coef;
        let Some(ptx) = &self.ptx else {
            ensure!(
                ptx_coef == 0.0,
                "`ppo.ptx_coef` is {ptx_coef}, but there is no pretraining text to take the loss of\n\
                 hint: name its files with `ptx.data.train`, or leave `ppo.ptx_coef` out"
            );
            return Ok(());
        };
        ensure!(
            !ptx.data.train.is_empty(),
            "`ptx.data.train` names no file\nhint: list at least one .txt, .jsonl or .parquet of pretraining text, or leave \
             `[ptx]` out"
        );
        Ok(())
    }

    /// The files by their key in the configuration.
    pub fn sources(&self) -> Vec<(&'static str, &[PathBuf])> {
        let mut sources = self.data.sources();
        let of_text = self
            .ptx
            .iter()
            .flat_map(|ptx| [("ptx.data.train", ptx.data.train.as_slice()), ("ptx.data.val", ptx.data.val.as_slice())]);
        sources.extend(of_text);
        sources
    }

    /// [`sources`](Self::sources), to be resolved.
    pub fn sources_mut(&mut self) -> common::config::Sources<'_> {
        let mut sources = self.data.sources_mut();
        let of_text = self
            .ptx
            .iter_mut()
            .flat_map(|ptx| [("ptx.data.train", &mut ptx.data.train), ("ptx.data.val", &mut ptx.data.val)]);
        sources.extend(of_text);
        sources
    }

    /// Windows of text in an update that learns from some; 0 otherwise.
    pub(crate) fn n_windows(&self) -> usize {
        let Some(ptx) = self.ptx.as_ref().filter(|_| self.ppo.switches().ptx_coef > 0.0) else { return 0 };
        ptx.batch_size.unwrap_or(self.train.batch_size / self.ppo.minibatches)
    }
}

/// How much text is computed at a time, with responses `micro_batch_size` at a time: in training, and where it is measured.
/// `None` without text; the first is `None` where nothing is learned from it.
pub(crate) fn batches(config: &PpoConfig, context: usize, micro_batch_size: usize) -> Option<(Option<Batch>, Batch)> {
    let ptx = config.ptx.as_ref()?;
    let seq = ptx.seq_len.unwrap_or(context).min(context) as f64;
    let batch = |rows: usize| Batch { rows: rows as f64, seq };
    let n_parts = (config.train.batch_size / config.ppo.minibatches).div_ceil(micro_batch_size);
    let n_windows = config.n_windows();
    Some(((n_windows > 0).then(|| batch(n_windows.div_ceil(n_parts))), batch(micro_batch_size)))
}

/// The largest `ptx.batch_size` below that of `config` with which a run `fits`; `None` where none does, or nothing is learned
/// from text.
pub(crate) fn most_windows(config: &PpoConfig, fits: impl Fn(&PpoConfig) -> bool) -> Option<usize> {
    let fits = |n: usize| {
        let mut less = config.clone();
        less.ptx.iter_mut().for_each(|ptx| ptx.batch_size = Some(n));
        fits(&less)
    };
    let (mut most, mut too_many) = (1, config.n_windows());
    if too_many < 2 || !fits(most) {
        return None;
    }
    while too_many - most > 1 {
        let middle = usize::midpoint(most, too_many);
        if fits(middle) { most = middle } else { too_many = middle }
    }
    Some(most)
}

/// The text of a run.
#[derive(Debug)]
pub(crate) struct Text {
    corpus: Corpus,
    /// Windows in an update; 0 where the loss is measured and nothing learned from.
    batch_size: usize,
    eval_windows: usize,
    micro_batch_size: usize,
}

impl Text {
    /// The text that `config` names, for a policy that reads at most `context` tokens; `None` where it names none.
    ///
    /// # Errors
    /// As [`Corpus::open`], or if a window is longer than the context.
    pub(crate) fn open(
        config: &PpoConfig,
        tokenizer: &Tokenizer,
        context: usize,
        tokenising: &Tokenising<'_>,
    ) -> anyhow::Result<Option<Self>> {
        let Some(ptx) = &config.ptx else { return Ok(None) };
        let seq_len = ptx.seq_len(context)?;
        let streams = Streams::new(config.seed).of("ptx");
        let corpus = Corpus::open(&ptx.data, tokenizer, (seq_len, "ptx.seq_len"), &streams, tokenising)?;
        let batch_size = config.n_windows();
        let (n_train, n_val) = (corpus.train.n_tokens(), corpus.val.n_tokens());
        if batch_size == 0 {
            tracing::info!(
                "the loss on pretraining text is measured on {n_val} held-out tokens, and nothing learned from the text: \
                 `ppo.ptx_coef` is 0"
            );
        } else {
            let coef = config.ppo.switches().ptx_coef;
            tracing::info!("pretraining text at {coef} times its loss: {n_train} tokens, {n_val} held out");
        }
        let (eval_windows, micro_batch_size) = (ptx.eval_windows, config.micro_batch_size());
        Ok(Some(Self { corpus, batch_size, eval_windows, micro_batch_size }))
    }

    /// The windows of each of the `n_updates` updates of step `step`, the same wherever a run began; none where nothing is
    /// learned from them.
    pub(crate) fn of_step(&mut self, step: u64, n_updates: u64) -> anyhow::Result<Vec<Windows>> {
        let n = self.batch_size as u64;
        if n == 0 {
            return Ok(Vec::new());
        }
        let updates = step * n_updates..(step + 1) * n_updates;
        updates.map(|update| self.corpus.train.batch(update * n..(update + 1) * n)).collect()
    }

    /// The held-out loss of `policy` in nats a token, by name; on the same windows every time, so that two evaluations differ
    /// by their policies.
    pub(crate) fn evaluate(&self, group: &Group, policy: &Gpt) -> anyhow::Result<(&'static str, f64)> {
        let held_out = evaluate_windows(group, policy, &self.corpus.val, self.eval_windows, self.micro_batch_size);
        Ok((names::VAL_PTX_LOSS, held_out.context("failed to measure the loss on pretraining text")?.loss()))
    }
}
