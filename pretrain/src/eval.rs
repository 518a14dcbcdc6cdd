//! Held-out loss.

use anyhow::{Context, ensure};
use burn::tensor::{Int, Tensor, TensorData};
use common::checkpoint::{CONFIG_FILE, Checkpoint, Stage};
use common::cli::print_json;
use common::data::{collate, ids};
use common::group::Group;
use common::model::{Gpt, Layout};
use common::{config, loss};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::cli::EvalArgs;
use crate::config::{DataConfig, PretrainConfig};
use crate::data::{self, TokenSet, Windows};

/// Batches that are evaluated before their sums are added: a text of any length takes no more memory.
const TOGETHER: usize = 1 << 14;

/// Cross-entropy summed over tokens.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct Evaluation {
    /// Sum of `−log p(token)` in nats.
    pub nats: f64,
    /// How many tokens were predicted.
    pub tokens: usize,
}

impl Evaluation {
    /// Mean over tokens, in nats.
    pub fn loss(&self) -> f64 {
        self.nats / self.tokens as f64
    }

    fn add(&mut self, other: Self) {
        self.nats += other.nats;
        self.tokens += other.tokens;
    }
}

/// Carries out `pretrain eval`: one JSON object on stdout.
pub(crate) fn run(args: &EvalArgs) -> anyhow::Result<()> {
    let checkpoint =
        Checkpoint::open_with(&args.checkpoint, args.runtime.opening())?.of_stage(&Stage::LANGUAGE_MODELS)?;
    let gpt = args.runtime.open()?.gpt(&checkpoint)?;
    let result = match (&args.data, &args.ids) {
        (Some(file), _) => {
            let tokenizer = checkpoint.require_tokenizer()?;
            let text = data::single_file(
                file,
                &data_config(&checkpoint)?,
                tokenizer,
                gpt.config().max_seq_len,
                args.runtime.process.quiet,
            )?;
            let mut all = evaluate_windows(&Group::alone(), &gpt, &text, 0, args.batch_size.get())?;
            if let Some(rest) = text.remainder()? {
                all.add(evaluate_batch(&gpt, &rest)?);
            }
            json!({
                "loss": all.loss(),
                "perplexity": all.loss().exp(),
                "bits_per_byte": all.nats / std::f64::consts::LN_2 / text.n_bytes(),
                "tokens": all.tokens,
                "bytes": text.n_bytes().round() as u64,
            })
        }
        (None, Some(file)) => evaluate_ids(&gpt, file, args)?,
        (None, None) => unreachable!("clap requires one of the two"),
    };
    print_json(&result)
}

/// Mean loss over `n_windows` windows spread over `text`, or all of them with 0.
pub(crate) fn evaluate_windows(
    group: &Group,
    gpt: &Gpt,
    text: &TokenSet,
    n_windows: usize,
    batch_size: usize,
) -> anyhow::Result<Evaluation> {
    let mut all = Evaluation::default();
    let n = text.n_spread(n_windows);
    let n_batches = n.div_ceil(batch_size);
    for first in (0..n_batches).step_by(TOGETHER) {
        let of_batch = |i: usize| {
            let start = (first + i) * batch_size;
            let starts = (start..n.min(start + batch_size)).map(|i| text.spread(i, n));
            evaluate_batch(gpt, &text.windows(starts)?)
        };
        let of_batches = group.map_shared(TOGETHER.min(n_batches - first), of_batch)?;
        for of_batch in of_batches {
            all.add(of_batch);
        }
    }
    ensure!(all.nats.is_finite(), "the held-out loss is {}", all.nats);
    Ok(all)
}

fn evaluate_batch(gpt: &Gpt, windows: &Windows) -> anyhow::Result<Evaluation> {
    let (inputs, targets) = windows.tensors(&gpt.device());
    let hidden = gpt.hidden(inputs, &windows.layout());
    let [batch, seq, d_model] = hidden.dims();
    let log_probs = loss::token_log_probs(gpt, hidden.reshape([batch * seq, d_model]), targets, 1.0);
    let log_probs = log_probs.try_into_vec_as::<f32>().context("failed to read the loss from the device")?;
    Ok(Evaluation { nats: -log_probs.iter().map(|&p| f64::from(p)).sum::<f64>(), tokens: batch * seq })
}

/// How the text of a checkpoint's own pretraining was cut; the defaults for a checkpoint of another stage or program.
fn data_config(checkpoint: &Checkpoint) -> anyhow::Result<DataConfig> {
    if checkpoint.stage() != Some(Stage::Pretrain) {
        return Ok(DataConfig::default());
    }
    let path = checkpoint.dir().join(CONFIG_FILE);
    let config: PretrainConfig =
        config::load(&path, &[]).context("failed to read how the checkpoint's text was cut into documents")?;
    Ok(config.data)
}

/// Loss, and logits if asked, of rows of token ids given as JSON.
fn evaluate_ids(gpt: &Gpt, file: &std::path::Path, args: &EvalArgs) -> anyhow::Result<serde_json::Value> {
    let rows = ids::read(file, gpt.config().vocab_size, gpt.config().max_seq_len)?;
    let mut nats = 0.0;
    let mut tokens = 0;
    let mut logits = Vec::new();
    for batch in rows.chunks(args.batch_size.get()) {
        let padded = collate::right_pad(batch, 0);
        let (n, seq) = (padded.batch, padded.seq);
        let ids = Tensor::<2, Int>::from_data(TensorData::new(padded.ids, [n, seq]), &gpt.device());
        let out = gpt.forward(ids, &Layout::right_padded());
        let values = out.try_into_vec_as::<f32>().context("failed to read the logits from the device")?;
        let vocab_size = gpt.config().vocab_size;
        for (row, values) in batch.iter().zip(values.chunks(seq * vocab_size)) {
            let positions: Vec<&[f32]> = values.chunks(vocab_size).take(row.len()).collect();
            for (logits, &target) in positions.iter().zip(&row[1..]) {
                nats -= log_softmax_at(logits, target as usize);
                tokens += 1;
            }
            if args.logits {
                logits.push(json!(positions));
            }
        }
    }
    let loss = if tokens == 0 { serde_json::Value::Null } else { json!(nats / f64::from(tokens)) };
    Ok(if args.logits { json!({ "loss": loss, "logits": logits }) } else { json!({ "loss": loss, "tokens": tokens }) })
}

/// `log softmax(logits)[target]` in double precision.
fn log_softmax_at(logits: &[f32], target: usize) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&z| f64::from(z - max).exp()).sum();
    f64::from(logits[target] - max) - sum.ln()
}
