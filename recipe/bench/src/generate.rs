//! Sampling from random prompts.

use std::num::NonZeroUsize;
use std::ops::ControlFlow;
use std::time::Instant;

use anyhow::bail;
use burn::module::Module;
use clap::Args;
use common::cli::{RuntimeArgs, at_least_1, without_base};
use common::exit::UsageError;
use common::generate::{GenerateOptions, SamplingConfig, generate};
use common::kernels::Instructions;
use common::model::{Gpt, GptConfig};
use common::rng::Streams;
use common::runtime::Runtime;
use serde_json::{Map, Value, json};

use super::{Shape, median, rounded, smallest};

/// New tokens of the run that warms up.
const WARMUP_TOKENS: usize = 16;

/// Flags of `recipe bench generate`.
#[derive(Debug, Args)]
#[command(
    mut_arg("base", without_base),
    after_help = "The figures outside `results` are those of the first batch size.\n\nExample:\n  \
    recipe bench generate --size a --batches 1,32\n  recipe bench generate --size c --batches 1 --steps 3 --top-k 50"
)]
pub struct GenerateBenchArgs {
    /// The model
    #[command(flatten)]
    pub shape: Shape,

    /// Prompts decoded at once, one measurement for each
    #[arg(long, visible_alias = "batch", value_name = "N,...", default_value = "1,32", value_delimiter = ',',
        value_parser = at_least_1)]
    pub batches: Vec<NonZeroUsize>,

    /// Tokens of each prompt
    #[arg(long, value_name = "N", default_value = "64", value_parser = at_least_1)]
    pub prefill: NonZeroUsize,

    /// New tokens of each prompt
    #[arg(long = "gen", value_name = "N", default_value = "192", value_parser = at_least_1)]
    pub new_tokens: NonZeroUsize,

    /// Sample from the K most likely tokens; 0 for all
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub top_k: usize,

    /// Sampling temperature
    #[arg(long, value_name = "T", default_value_t = 1.0)]
    pub temperature: f64,

    /// Measured runs for each batch size
    #[arg(long, value_name = "N", default_value = "5", value_parser = at_least_1)]
    pub steps: NonZeroUsize,

    /// Random seed of the weights, prompts and samples
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,

    /// Vector instructions that our own kernels use at most, to measure as if the processor had no others [default: all it has]
    #[arg(long, value_enum, value_name = "SET")]
    pub instructions: Option<Instructions>,

    /// Device, precision, threads and verbosity
    #[command(flatten)]
    pub runtime: RuntimeArgs,
}

/// Times whole runs: a prefill and then one token a step; no token stops an answer.
pub fn measure(args: &GenerateBenchArgs, runtime: &Runtime) -> anyhow::Result<Map<String, Value>> {
    let model = args.shape.model()?;
    let (prefill, new) = (args.prefill.get(), args.new_tokens.get());
    if prefill + new > model.max_seq_len {
        bail!(UsageError(format!(
            "a prompt of {prefill} and {new} new tokens do not fit the context of {}\nhint: lower `--prefill` or \
             `--gen`, or raise `--max-seq-len`",
            model.max_seq_len
        )));
    }
    if new < 2 {
        bail!(UsageError("`--gen` must be at least 2: the first token belongs to the prefill".to_owned()));
    }
    let streams = Streams::new(args.seed);
    let gpt = runtime.new_gpt(&model, &streams);
    let results: Vec<Map<String, Value>> = args
        .batches
        .iter()
        .map(|batch| of_batch(args, &gpt, &model, batch.get(), &streams))
        .collect::<anyhow::Result<_>>()?;
    let mut fields = args.shape.describe(&model);
    let own = [
        ("params", json!(gpt.num_params())),
        ("prefill", json!(prefill)),
        ("gen", json!(new)),
        ("top_k", json!(args.top_k)),
        ("temperature", json!(args.temperature)),
        ("steps", json!(args.steps)),
    ];
    fields.extend(own.map(|(name, value)| (name.to_owned(), value)));
    fields.extend(results[0].clone());
    fields.insert("results".into(), json!(results));
    Ok(fields)
}

/// One batch size.
fn of_batch(
    args: &GenerateBenchArgs,
    gpt: &Gpt,
    model: &GptConfig,
    batch: usize,
    streams: &Streams,
) -> anyhow::Result<Map<String, Value>> {
    let mut rng = streams.get("bench/prompts", batch as u64);
    let prompts: Vec<Vec<u32>> =
        (0..batch).map(|_| (0..args.prefill.get()).map(|_| rng.below(model.vocab_size) as u32).collect()).collect();
    // Seconds until the first tokens, and until the last.
    let run = |n_new: usize| -> anyhow::Result<(f64, f64)> {
        let sampling = SamplingConfig {
            temperature: args.temperature,
            top_k: args.top_k,
            max_tokens: n_new,
            ..SamplingConfig::default()
        };
        let mut first = None;
        let clock = Instant::now();
        let mut note = |_: usize, _: u32| {
            first.get_or_insert_with(|| clock.elapsed().as_secs_f64());
            ControlFlow::Continue(())
        };
        let options = GenerateOptions { max_batch: batch, on_token: Some(&mut note), ..GenerateOptions::default() };
        let answers = generate(gpt, &prompts, &sampling, streams, 0, options)?;
        let total = clock.elapsed().as_secs_f64();
        assert!(answers.iter().all(|answer| answer.ids.len() == n_new), "an answer ended early");
        Ok((first.unwrap_or(total), total))
    };

    let new = args.new_tokens.get();
    run(new.min(WARMUP_TOKENS))?;
    let runs = (0..args.steps.get()).map(|_| run(new)).collect::<anyhow::Result<Vec<_>>>()?;
    let firsts: Vec<f64> = runs.iter().map(|&(first, _)| first).collect();
    let totals: Vec<f64> = runs.iter().map(|&(_, total)| total).collect();
    let (prefill, total) = (median(&firsts), median(&totals));
    let tokens = (batch * new) as f64;
    let decode = total - prefill;
    let fields = [
        ("batch", json!(batch)),
        ("runs", json!(runs.len())),
        ("total_s", rounded(total, 4)),
        ("prefill_ms", rounded(prefill * 1e3, 3)),
        ("ms_per_decode_step", rounded(decode * 1e3 / (new - 1) as f64, 4)),
        ("tokens_per_s", rounded(tokens / total, 1)),
        ("tokens_per_s_best", rounded(tokens / smallest(&totals), 1)),
        ("decode_tokens_per_s", rounded((batch * (new - 1)) as f64 / decode, 1)),
    ];
    Ok(fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
}
