//! The distribution of the next token.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use common::backend;
use common::checkpoint::Checkpoint;
use common::conversation::{Message, Role, encode_prompt};
use common::generate::{NonFiniteLogit, Sampler, SamplingConfig};
use common::kernels::{Kernels, Precision, TrunkPrecision};
use common::model::{Gpt, Layout};
use common::rng::Streams;
use common::runtime::Runtime;
use common::tokenizer::Tokenizer;

use crate::inside::batch_of_one;

/// Tokens printed.
const N_TOKENS: usize = 6;
/// Temperatures printed.
const TEMPERATURES: [f64; 4] = [0.25, 0.5, 1.0, 2.0];

/// Share of the probability that top-p keeps.
const TOP_P: f64 = 0.9;

/// A language model on the CPU, and its tokenizer.
pub(crate) fn open(checkpoint: &Path) -> Result<(Gpt, Tokenizer)> {
    let checkpoint = Checkpoint::open(checkpoint)?;
    let tokenizer = checkpoint.require_tokenizer()?.clone();
    let runtime = Runtime::open(backend::DEFAULT, Kernels::default(), Precision::default(), TrunkPrecision::default())?;
    Ok((runtime.gpt(&checkpoint)?, tokenizer))
}

/// Probabilities of the first token of an answer, a column a temperature, and how many tokens top-p keeps of each.
pub(crate) fn next(checkpoint: &Path, prompt: &str) -> Result<String> {
    let (model, tokenizer) = open(checkpoint)?;
    let ids = encode_prompt(&tokenizer, &[Message::new(Role::User, prompt)])?;
    let hidden = model.hidden(batch_of_one(&model, &ids), &Layout::right_padded());
    let logits = model.logits(hidden.narrow(1, ids.len() - 1, 1)); // [1, 1, vocab_size]
    let logits = logits.try_to_vec_as::<f32>().context("failed to read the logits")?;
    let mut rows = vec![format!("{:<12}", "temperature"); N_TOKENS + 2];
    let likeliest = sampler(1.0, 1.0).likeliest(&logits, N_TOKENS).map_err(not_finite)?;
    for (row, (id, _)) in rows[1..].iter_mut().zip(&likeliest) {
        *row = format!("{:<12}", format!("{:?}", tokenizer.decode_with_specials(&[*id])));
    }
    rows[N_TOKENS + 1] = format!("{:<12}", "in top-p");
    for temperature in TEMPERATURES {
        let distribution = |top_p| sampler(temperature, top_p).distribution(&mut logits.clone()).map_err(not_finite);
        let (all, nucleus) = (distribution(1.0)?, distribution(TOP_P)?);
        rows[0] += &format!("{temperature:>8}");
        for (row, (id, _)) in rows[1..].iter_mut().zip(&likeliest) {
            *row += &format!("{:>8.3}", all[*id as usize]);
        }
        rows[N_TOKENS + 1] += &format!("{:>8}", nucleus.iter().filter(|&&p| p > 0.0).count());
    }
    Ok(rows.join("\n") + "\n")
}

fn sampler(temperature: f64, top_p: f64) -> Sampler {
    let config = SamplingConfig { temperature, top_p, ..SamplingConfig::default() };
    Sampler::new(&config, &[], Streams::new(0).get("sampling", 0))
}

fn not_finite(NonFiniteLogit { id, logit }: NonFiniteLogit) -> anyhow::Error {
    anyhow!("the logit of token {id} is {logit}")
}
