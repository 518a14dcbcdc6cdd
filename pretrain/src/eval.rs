//! Held-out loss.

use anyhow::Context;
use burn::tensor::{Int, Tensor, TensorData};
use common::checkpoint::{CONFIG_FILE, Checkpoint, Stage};
use common::cli::print_json;
use common::config;
use common::corpus::{TextConfig, evaluate_batch, evaluate_windows};
use common::data::{collate, ids};
use common::group::Group;
use common::model::{Gpt, Layout};
use serde_json::json;

use crate::cli::EvalArgs;
use crate::config::PretrainConfig;
use crate::data;

/// Carries out `pretrain eval`: one JSON object on stdout.
pub(crate) fn run(args: &EvalArgs) -> anyhow::Result<()> {
    args.runtime.check_base([&*args.checkpoint])?;
    let mut checkpoint =
        Checkpoint::open_with(&args.checkpoint, args.runtime.opening())?.of_stage(&Stage::LANGUAGE_MODELS)?;
    let gpt = args.runtime.open()?.take_gpt(&mut checkpoint)?;
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

/// How the text of a checkpoint's own pretraining was cut; the defaults for a checkpoint of another stage or program.
fn data_config(checkpoint: &Checkpoint) -> anyhow::Result<TextConfig> {
    if checkpoint.stage() != Some(Stage::Pretrain) {
        return Ok(TextConfig::default());
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
