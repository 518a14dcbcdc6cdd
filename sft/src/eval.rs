//! Held-out loss and accuracy on trained tokens.

use std::io::Write;

use anyhow::{Context, ensure};
use common::checkpoint::{Checkpoint, Stage};
use common::data::records::OnBadRecord;
use common::loss;
use common::model::Gpt;
use serde_json::json;

use crate::cli::EvalArgs;
use crate::config::TooLong;
use crate::data::{Batch, Conversations};

/// What a model makes of the assistant's tokens.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Evaluation {
    /// Sum of `−log p(token)` in nats.
    pub nats: f64,
    /// How many tokens the model itself would have chosen.
    pub correct: usize,
    /// How many tokens were predicted.
    pub tokens: usize,
}

impl Evaluation {
    /// Mean over trained tokens, in nats.
    pub fn loss(&self) -> f64 {
        self.nats / self.tokens as f64
    }

    /// Fraction of trained tokens that are the most probable one.
    pub fn token_accuracy(&self) -> f64 {
        self.correct as f64 / self.tokens as f64
    }
}

/// Carries out `sft eval`: one JSON object on stdout.
pub(crate) fn run(args: &EvalArgs) -> anyhow::Result<()> {
    let checkpoint = Checkpoint::open(&args.checkpoint)?;
    checkpoint.expect_stage(&[Stage::Pretrain, Stage::Sft, Stage::Ppo])?;
    let tokenizer = checkpoint.require_tokenizer()?;
    let gpt = args.runtime.open()?.gpt(&checkpoint)?;
    let max_seq_len = gpt.config().max_seq_len;
    let files = std::slice::from_ref(&args.data);
    let conversations = Conversations::read(files, tokenizer, max_seq_len, OnBadRecord::Fail, TooLong::Truncate)?;
    let pad = tokenizer.try_specials()?.pad;
    let all = evaluate(&gpt, &conversations, conversations.encoded.len(), args.batch_size.get(), pad)?;
    let result = json!({ "loss": all.loss(), "token_accuracy": all.token_accuracy(), "tokens": all.tokens });
    writeln!(std::io::stdout(), "{result}").context("failed to write the result")
}

/// Loss and accuracy on the first `n` conversations.
pub(crate) fn evaluate(
    gpt: &Gpt,
    conversations: &Conversations,
    n: usize,
    batch_size: usize,
    pad: u32,
) -> anyhow::Result<Evaluation> {
    let mut all = Evaluation::default();
    let device = gpt.device();
    for chunk in conversations.encoded[..n.min(conversations.encoded.len())].chunks(batch_size) {
        let batch = Batch::new(&chunk.iter().collect::<Vec<_>>(), gpt.config().max_seq_len, pad);
        let hidden = gpt.hidden(batch.inputs(&device), &batch.layout());
        let (positions, targets) = batch.targets(&device);
        let [rows, seq, d_model] = hidden.dims();
        // [n_targets, d_model]
        let hidden = hidden.reshape([rows * seq, d_model]).select(0, positions);
        let chosen = gpt.logits(hidden.clone().unsqueeze_dim(0)).argmax(2).reshape([batch.n_targets()]);
        let correct = chosen.equal(targets.clone()).int().sum();
        let (log_probs, _) = loss::token_log_probs(gpt, hidden, targets, 1.0);
        let log_probs = log_probs.try_into_vec_as::<f32>().context("failed to read the loss from the device")?;
        all.nats -= log_probs.iter().map(|&p| f64::from(p)).sum::<f64>();
        all.correct += correct.into_scalar::<i64>() as usize;
        all.tokens += batch.n_targets();
    }
    ensure!(all.nats.is_finite(), "the held-out loss is {}", all.nats);
    Ok(all)
}
