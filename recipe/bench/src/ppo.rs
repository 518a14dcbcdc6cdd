//! Steps of PPO on random models.

use std::num::NonZeroUsize;

use anyhow::bail;
use burn::module::Module;
use clap::Args;
use common::cli::{RuntimeArgs, at_least_1};
use common::exit::UsageError;
use common::model::Gpt;
use common::optim::{OptimizerConfig, Schedule};
use common::rng::Streams;
use common::runtime::Runtime;
use common::tokenizer::{Tokenizer, TokenizerConfig, TokenizerKind};
use ppo::{Measurement, PpoConfig, Trial};
use serde_json::{Map, Value, json};

use super::{Shape, median, rounded, smallest};

/// Flags of `recipe bench ppo`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  recipe bench ppo --size a --steps 5")]
pub struct PpoBenchArgs {
    /// The model
    #[command(flatten)]
    pub shape: Shape,

    /// Prompts of a step
    #[arg(long, value_name = "N", default_value = "32", value_parser = at_least_1)]
    pub ppo_batch: NonZeroUsize,

    /// Tokens of each prompt
    #[arg(long, value_name = "N", default_value = "32", value_parser = at_least_1)]
    pub prompt: NonZeroUsize,

    /// Tokens of each response
    #[arg(long, value_name = "N", default_value = "64", value_parser = at_least_1)]
    pub response: NonZeroUsize,

    /// Passes over the responses
    #[arg(long, alias = "ppo-epochs", value_name = "N", default_value = "4", value_parser = at_least_1)]
    pub epochs: NonZeroUsize,

    /// Updates in a pass
    #[arg(long, alias = "mini-batches", value_name = "N", default_value = "1", value_parser = at_least_1)]
    pub minibatches: NonZeroUsize,

    /// Measured steps
    #[arg(long, value_name = "N", default_value = "3", value_parser = at_least_1)]
    pub steps: NonZeroUsize,

    /// Steps before the measured ones
    #[arg(long, value_name = "N", default_value = "1", value_parser = at_least_1)]
    pub warmup: NonZeroUsize,

    /// Random seed of the weights, prompts and samples
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,

    /// Device, precision, threads and verbosity
    #[command(flatten)]
    pub runtime: RuntimeArgs,
}

/// Times whole steps and their parts.
pub fn measure(args: &PpoBenchArgs, runtime: &Runtime) -> anyhow::Result<Map<String, Value>> {
    let model = args.shape.model()?;
    let (batch, prompt, response) = (args.ppo_batch.get(), args.prompt.get(), args.response.get());
    if prompt + response > model.max_seq_len {
        bail!(UsageError(format!(
            "prompts of {prompt} and responses of {response} tokens do not fit the context of {}\nhint: lower \
             `--prompt` or `--response`, or raise `--max-seq-len`",
            model.max_seq_len
        )));
    }
    if batch % args.minibatches.get() != 0 {
        bail!(UsageError(format!("`--minibatches {}` does not divide `--ppo-batch {batch}`", args.minibatches)));
    }
    let mut config = PpoConfig { seed: args.seed, ..PpoConfig::default() };
    config.train.batch_size = batch;
    config.train.steps = (args.warmup.get() + args.steps.get()) as u64;
    config.ppo.response_length = response;
    config.ppo.epochs = args.epochs.get() as u64;
    config.ppo.minibatches = args.minibatches.get();
    let constant = OptimizerConfig { schedule: Schedule::Constant, ..OptimizerConfig::rlhf() };
    (config.optimizer, config.value_optimizer) = (constant.clone(), constant);
    let bytes = TokenizerConfig { kind: TokenizerKind::Byte, ..TokenizerConfig::default() };
    let tokenizer = Tokenizer::train(&bytes, std::iter::empty::<String>(), true)?;

    let mut trial = Trial::new(&model, config, prompt, &tokenizer, runtime);
    let mut measured: Vec<Measurement> = Vec::new();
    for step in 0..args.warmup.get() + args.steps.get() {
        let of_step = trial.step(step as u64)?;
        assert_eq!(of_step.tokens, batch * response, "a response ended early");
        if step >= args.warmup.get() {
            measured.push(of_step);
        }
    }
    let of = |part: fn(&Measurement) -> f64| measured.iter().map(part).collect::<Vec<f64>>();
    let (rollout, score) = (median(&of(|m| m.seconds.rollout)), median(&of(|m| m.seconds.score)));
    let update = median(&of(|m| m.seconds.update));
    let totals = of(|m| m.seconds.rollout + m.seconds.score + m.seconds.update);
    let last = measured[measured.len() - 1];
    let n_params = Gpt::new(&model, &Streams::new(args.seed), &runtime.device).num_params();
    let mut fields = args.shape.describe(&model);
    let own = [
        ("params_policy", json!(n_params)),
        ("ppo_batch", json!(batch)),
        ("prompt", json!(prompt)),
        ("response", json!(response)),
        ("ppo_epochs", json!(args.epochs)),
        ("mini_batches", json!(args.minibatches)),
        ("iterations", json!(measured.len())),
        ("s_per_iteration", rounded(median(&totals), 4)),
        ("s_per_iteration_min", rounded(smallest(&totals), 4)),
        ("rollout_s", rounded(rollout, 4)),
        ("score_s", rounded(score, 4)),
        ("update_s", rounded(update, 4)),
        ("rollout_tokens_per_s", rounded((batch * response) as f64 / rollout, 1)),
        ("episodes_per_s", rounded(batch as f64 / median(&totals), 3)),
        (
            "last_metrics",
            json!({
                "objective/kl": rounded(last.kl, 5),
                "policy/loss": rounded(last.policy_loss, 5),
                "value/loss": rounded(last.value_loss, 5),
            }),
        ),
    ];
    fields.extend(own.map(|(name, value)| (name.to_owned(), value)));
    Ok(fields)
}
