//! Training steps on random tokens.

use std::num::NonZeroUsize;
use std::time::Instant;

use burn::module::Module;
use clap::{Args, ValueEnum};
use common::cli::{RuntimeArgs, at_least_1, without_base};
use common::hf;
use common::kernels::{Instructions, memory};
use common::model::params::Output;
use common::model::{GptConfig, LoraConfig, Positions};
use common::optim::OptimizerConfig;
use common::rng::Streams;
use common::runtime::Runtime;
use pretrain::{Windows, gradients};
use serde_json::{Map, Value, json};

use super::{Shape, median, quantile, rounded, smallest};

/// Different batches, taken in turn.
const N_BATCHES: usize = 8;

/// What is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Work {
    /// All weights
    Full,
    /// Adapters of rank 16 beside all linear layers of the frozen model
    Lora,
}

/// Flags of `recipe bench train`.
#[derive(Debug, Args)]
#[command(
    mut_arg("base", without_base),
    after_help = "Example:\n  recipe bench train --size a --steps 20\n  \
    recipe bench train --size s --work lora --trunk bf16 --steps 3\n  \
    recipe bench train --size c --steps 5 --kernels plain --threads 1"
)]
pub struct TrainBenchArgs {
    /// The model
    #[command(flatten)]
    pub shape: Shape,

    /// Weights that are trained
    #[arg(long, value_enum, default_value = "full")]
    pub work: Work,

    /// Rows of a step, instead of the size's
    #[arg(long, value_name = "N", value_parser = at_least_1)]
    pub batch: Option<NonZeroUsize>,

    /// Measured steps
    #[arg(long, value_name = "N", default_value = "20", value_parser = at_least_1)]
    pub steps: NonZeroUsize,

    /// Steps before the measured ones, at least 1
    #[arg(long, value_name = "N", default_value = "3", value_parser = at_least_1)]
    pub warmup: NonZeroUsize,

    /// Random seed of the weights and tokens
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,

    /// Vector instructions that our own kernels use at most, to measure as if the processor had no others [default: all it has]
    #[arg(long, value_enum, value_name = "SET")]
    pub instructions: Option<Instructions>,

    /// Device, precision, threads and verbosity
    #[command(flatten)]
    pub runtime: RuntimeArgs,
}

/// Memory held along the way, in MiB.
#[derive(Default)]
struct Held {
    /// By the process.
    resident: Vec<Value>,
    /// By the device's pools, where it has any.
    device: Vec<Value>,
}

impl Held {
    fn measure(&mut self, runtime: &Runtime) {
        let mib = |bytes: u64| rounded(bytes as f64 / f64::from(1 << 20), 1);
        self.resident.push(mib(memory::usage().resident_bytes as u64));
        self.device.extend(runtime.device.memory_pool_usage().map(|usage| mib(usage.bytes_reserved)));
    }
}

/// Times single steps: the loss with its gradients, clipping by the global norm, AdamW, and reading the loss. Memory is
/// looked at five times, so that it shows whether it grows.
pub fn measure(args: &TrainBenchArgs, runtime: &Runtime) -> anyhow::Result<Map<String, Value>> {
    let model = args.shape.model()?;
    let batch = args.batch.map_or(args.shape.size.batch(), NonZeroUsize::get);
    let (seq, streams) = (model.max_seq_len, Streams::new(args.seed));
    let optimizer = OptimizerConfig { lr: 6e-4, ..OptimizerConfig::default() };
    let mut gpt = match args.work {
        Work::Full => runtime.autodiff().new_gpt(&model, &streams),
        Work::Lora => {
            let adapters = hf::adapters_of(&model, &LoraConfig::default())?;
            let values = adapters.initial(&model, Output::Logits, &streams);
            runtime.new_gpt(&model, &streams).with_adapters(&adapters, values, &runtime.autodiff().device)?
        }
    };
    let (n_all, n_trained) = (gpt.num_params(), gpt.to_trained().values().map(|tensor| tensor.data.len()).sum());
    let n_params = if args.work == Work::Lora { n_all - n_trained } else { n_all };
    let mut adamw = runtime.optimizer(&optimizer);
    let mut rng = streams.get("bench/tokens", 0);
    let batches: Vec<Windows> = (0..N_BATCHES)
        .map(|_| {
            let rows = (0..batch).map(|_| (0..=seq).map(|_| rng.below(model.vocab_size) as u32).collect());
            Windows { rows: rows.collect(), seq_len: seq, bos: None }
        })
        .collect();

    let warmup = args.warmup.get();
    let (mut seconds, mut losses, mut held) = (Vec::new(), Vec::new(), Held::default());
    let (mut cpu_before, n_steps) = (0.0, warmup + args.steps.get());
    for i in 0..n_steps {
        if i == warmup {
            cpu_before = memory::usage().cpu_seconds;
        }
        let clock = Instant::now();
        let (grads, loss) = gradients(&gpt, &adamw, &batches[i % N_BATCHES], batch * seq, None);
        (gpt, _) = adamw.step(gpt, grads, optimizer.lr);
        losses.push(loss.into_scalar::<f32>());
        seconds.push(clock.elapsed().as_secs_f64());
        if i >= warmup && (n_steps - 1 - i) % args.steps.get().div_ceil(5) == 0 {
            held.measure(runtime);
        }
    }
    let cpu = memory::usage().cpu_seconds - cpu_before;
    let first_step = seconds[0];
    let seconds = &seconds[warmup..];

    let tokens = (batch * seq) as f64;
    let flops = tokens * flops_of_token(n_params, n_trained, &model);
    let (median, smallest) = (median(seconds), smallest(seconds));
    let mut fields = args.shape.describe(&model);
    let own = [
        ("work", json!(args.work.to_possible_value().map(|work| work.get_name().to_owned()))),
        ("batch", json!(batch)),
        ("params", json!(n_params)),
        ("trained", json!(n_trained)),
        ("first_step_s", rounded(first_step, 3)),
        ("steps", json!(args.steps)),
        ("ms_per_step", rounded(median * 1e3, 3)),
        ("ms_min", rounded(smallest * 1e3, 3)),
        ("ms_p90", rounded(quantile(seconds, 0.9) * 1e3, 3)),
        ("cpu_ms_per_step", rounded(cpu * 1e3 / seconds.len() as f64, 3)),
        ("tokens_per_s", rounded(tokens / median, 1)),
        ("tokens_per_s_best", rounded(tokens / smallest, 1)),
        ("gflop_per_step", rounded(flops / 1e9, 6)),
        ("gflops", rounded(flops / median / 1e9, 2)),
        ("loss_first", rounded(f64::from(losses[0]), 4)),
        ("loss_last", rounded(f64::from(losses[losses.len() - 1]), 4)),
        ("resident_mib", Value::Array(held.resident)),
        ("device_mib", Value::Array(held.device)),
    ];
    fields.extend(own.map(|(name, value)| (name.to_owned(), value)));
    Ok(fields)
}

/// Floating-point operations of a trained token: `6·N + 12·n_layers·n_heads·d_head·seq`, where `N` leaves out the
/// positions and counts the tied table once, as the output layer. Of frozen weights there is no gradient: `4·N`, and 6 for
/// each of the adapters' numbers, which are all that is trained.
///
/// # Source
/// nanoGPT's `estimate_mfu`; causality is not taken off the attention's part.
fn flops_of_token(n_params: usize, n_trained: usize, model: &GptConfig) -> f64 {
    let n_positions = if model.positions == Positions::Learned { model.max_seq_len * model.d_model } else { 0 };
    let of_scores = 12.0 * (model.n_layers * model.qkv_widths()[0] * model.max_seq_len) as f64;
    let n_params_in_products = (n_params - n_positions) as f64;
    if n_trained == n_params {
        return 6.0 * n_params_in_products + of_scores;
    }
    4.0 * n_params_in_products + 6.0 * n_trained as f64 + of_scores
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Size;

    #[test]
    fn a_step_of_each_size_costs_what_the_formula_says() {
        // Parameters by hand: wte + wpe + layers·(12d² + 13d) + 2d.
        let n = |layers: usize, d: usize, vocab: usize| vocab * d + 256 * d + layers * (12 * d * d + 13 * d) + 2 * d;
        let of_all = |n_params, size: Size| flops_of_token(n_params, n_params, &size.model());
        assert_eq!(of_all(n(4, 128, 4096), Size::A), 6.0 * 1_317_632.0 + 1_572_864.0);
        assert_eq!(n(12, 768, 50257) - 256 * 768, 123_653_376);
        // As transformers counts SmolLM2-135M.
        assert_eq!(of_all(134_515_008, Size::S), 6.0 * 134_515_008.0 + 53_084_160.0);
        let of_adapters = flops_of_token(134_515_008, 4_884_480, &Size::S.model());
        assert_eq!(of_adapters, 4.0 * 134_515_008.0 + 6.0 * 4_884_480.0 + 53_084_160.0);
    }
}
