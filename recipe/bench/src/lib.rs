//! `recipe bench`: how fast this machine trains, decodes and makes steps of PPO.
//!
//! Random weights and random tokens go through the code of the stages; one JSON object comes out. Sizes, amounts and
//! field names are those that `docs/performance.md` compares with `PyTorch`, transformers and TRL.

#![forbid(unsafe_code)]

mod gemm;
mod generate;
mod ppo;
mod size;
mod train;

pub use gemm::GemmBenchArgs;
pub use generate::GenerateBenchArgs;
pub use ppo::PpoBenchArgs;
pub use size::{Shape, Size};
pub use train::TrainBenchArgs;

use clap::Subcommand;
use common::cli::print_json;
use common::exit::UsageError;
use common::kernels::{Instructions, Precision, TrunkPrecision, memory};
use common::runtime::{n_threads, on_pool};
use serde_json::{Map, Value, json};

use train::Work;

/// The measurement.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Training steps: forward, backward, clipping, AdamW
    Train(TrainBenchArgs),
    /// Sampling over the key/value cache
    Generate(GenerateBenchArgs),
    /// Steps of PPO: rollout, scores, updates
    Ppo(PpoBenchArgs),
    /// Matrix products of the sizes of training: what the machine could do at most
    Gemm(GemmBenchArgs),
}

/// Measures, and prints one JSON object.
///
/// # Errors
/// For a backend that cannot be opened, numbers that do not fit together, and a computation that fails.
pub fn run(command: &BenchCommand) -> anyhow::Result<()> {
    let (name, flags, instructions) = match command {
        BenchCommand::Train(args) => ("train", &args.runtime, args.instructions),
        BenchCommand::Generate(args) => ("generate", &args.runtime, args.instructions),
        BenchCommand::Ppo(args) => ("ppo", &args.runtime, args.instructions),
        BenchCommand::Gemm(args) => ("gemm", &args.runtime, None),
    };
    flags.start()?;
    if flags.precision != Precision::F32 {
        return Err(UsageError("a bench computes in f32: leave out `--precision`".to_owned()).into());
    }
    if flags.trunk != TrunkPrecision::F32 && !holds_frozen_weights(command) {
        return Err(UsageError(
            "`--trunk` is for weights that are not trained, and here all are\nhint: leave it out, or measure `generate` or \
             `train --work lora`"
                .to_owned(),
        )
        .into());
    }
    if let Some(set) = instructions.filter(|set| !set.limit()) {
        return Err(UsageError(format!(
            "this processor has no {}\nhint: leave out `--instructions`; the most it has is {}",
            set.name(),
            Instructions::in_use().name()
        ))
        .into());
    }
    let runtime = flags.open()?;
    let measured = on_pool(|| match command {
        BenchCommand::Train(args) => train::measure(args, &runtime),
        BenchCommand::Generate(args) => generate::measure(args, &runtime),
        BenchCommand::Ppo(args) => ppo::measure(args, &runtime),
        BenchCommand::Gemm(args) => gemm::measure(args, &runtime),
    })?;
    let mut line = Map::new();
    line.insert("bench".into(), json!(name));
    line.insert("backend".into(), json!(flags.backend));
    line.insert("kernels".into(), json!(runtime.kernels));
    line.insert("instructions".into(), json!(Instructions::in_use().name()));
    line.insert("threads".into(), json!(n_threads()));
    line.insert("dtype".into(), json!("f32"));
    line.insert("trunk".into(), json!(flags.trunk.name()));
    line.extend(measured);
    line.insert("peak_rss_mib".into(), rounded(memory::usage().peak_bytes as f64 / f64::from(1 << 20), 1));
    print_json(&line)
}

/// Whether weights are read that nothing trains, so that their type can be chosen.
fn holds_frozen_weights(command: &BenchCommand) -> bool {
    match command {
        BenchCommand::Generate(_) => true,
        BenchCommand::Train(args) => args.work == Work::Lora,
        BenchCommand::Ppo(_) | BenchCommand::Gemm(_) => false,
    }
}

/// `value` to so many decimals.
fn rounded(value: f64, decimals: i32) -> Value {
    let unit = 10f64.powi(decimals);
    json!((value * unit).round() / unit)
}

/// The `fraction`-quantile; of an even number the median is the mean of the middle two.
fn quantile(values: &[f64], fraction: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len() - 1;
    if fraction == 0.5 {
        return f64::midpoint(sorted[last / 2], sorted[sorted.len() / 2]);
    }
    sorted[((fraction * last as f64).round() as usize).min(last)]
}

fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

fn smallest(values: &[f64]) -> f64 {
    quantile(values, 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_of_few_values() {
        assert_eq!(median(&[3.0, 1.0]), 2.0);
        assert_eq!(median(&[3.0, 1.0, 7.0]), 3.0);
        assert_eq!((smallest(&[3.0, 1.0, 7.0]), quantile(&[3.0, 1.0, 7.0], 0.9)), (1.0, 7.0));
    }

    #[test]
    fn numbers_are_rounded_to_their_decimals() {
        assert_eq!((rounded(1.2345, 2), rounded(7.0, 1)), (json!(1.23), json!(7.0)));
    }
}
