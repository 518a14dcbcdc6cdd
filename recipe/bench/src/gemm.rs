//! Matrix products of the sizes that training meets: the ceiling of everything else.

use std::num::NonZeroUsize;
use std::time::Instant;

use anyhow::Context;
use burn::tensor::{Tensor, TensorData};
use clap::Args;
use common::cli::{RuntimeArgs, at_least_1, without_base};
use common::rng::Streams;
use common::runtime::Runtime;
use serde_json::{Map, Value, json};

use super::{Shape, median, rounded, smallest};

/// Flags of `recipe bench gemm`.
#[derive(Debug, Args)]
#[command(mut_arg("base", without_base), after_help = "Example:\n  recipe bench gemm --size b --threads 2")]
pub struct GemmBenchArgs {
    /// The model
    #[command(flatten)]
    pub shape: Shape,

    /// Measured products of each shape
    #[arg(long, value_name = "N", default_value = "20", value_parser = at_least_1)]
    pub steps: NonZeroUsize,

    /// Device, precision, threads and verbosity
    #[command(flatten)]
    pub runtime: RuntimeArgs,
}

/// Times the backend's own product, for the linear layers and the output layer of a training step.
pub fn measure(args: &GemmBenchArgs, runtime: &Runtime) -> anyhow::Result<Map<String, Value>> {
    let model = args.shape.model()?;
    let (rows, d, d_ff) = (args.shape.size.batch() * model.max_seq_len, model.d_model, model.d_ff);
    let d_qkv = model.qkv_widths().iter().sum();
    let shapes = [(rows, d, d_qkv), (rows, d, d_ff), (rows, d_ff, d), (rows, d, model.vocab_size), (1024, 1024, 1024)];
    let mut results = Vec::new();
    let mut best = 0f64;
    for (n, d_in, d_out) in shapes {
        let random = |stream: u64, rows: usize, columns: usize| {
            let mut rng = Streams::new(0).get("bench/gemm", stream);
            let data: Vec<f32> = (0..rows * columns).map(|_| rng.uniform() as f32 - 0.5).collect();
            Tensor::<2>::from_data(TensorData::new(data, [rows, columns]), &runtime.device)
        };
        let (x, weight) = (random(0, n, d_in), random(1, d_in, d_out));
        let once = || -> anyhow::Result<f64> {
            let clock = Instant::now();
            let product = x.clone().matmul(weight.clone());
            // A number read back, so that a device that works ahead has finished.
            product
                .slice([n - 1..n, d_out - 1..d_out])
                .try_into_vec_as::<f32>()
                .context("failed to read the device")?;
            Ok(clock.elapsed().as_secs_f64())
        };
        once()?;
        let seconds = (0..args.steps.get()).map(|_| once()).collect::<anyhow::Result<Vec<f64>>>()?;
        let gflop = 2.0 * (n * d_in * d_out) as f64 / 1e9;
        let (of_median, of_best) = (gflop / median(&seconds), gflop / smallest(&seconds));
        best = best.max(of_median);
        results.push(json!({
            "shape": [n, d_in, d_out],
            "gflops": rounded(of_median, 1),
            "gflops_best": rounded(of_best, 1),
        }));
    }
    let mut fields = args.shape.describe(&model);
    fields.insert("gflops".into(), rounded(best, 1));
    fields.insert("results".into(), json!(results));
    Ok(fields)
}
