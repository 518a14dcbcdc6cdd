//! Steps of PPO on random models.

use std::num::NonZeroUsize;

use anyhow::bail;
use burn::module::Module;
use clap::Args;
use common::cli::{RuntimeArgs, at_least_1, without_base};
use common::exit::UsageError;
use common::kernels::Instructions;
use common::model::{Gpt, GptConfig, ScalarGpt};
use common::optim::{OptimizerConfig, Schedule};
use common::rng::Streams;
use common::runtime::Runtime;
use common::score::{EncodedPrompt, Ensemble, FrozenModels};
use common::tokenizer::{Tokenizer, TokenizerConfig, TokenizerKind};
use ppo::targets::Experience;
use ppo::{Critic, Iteration, Learner, PpoConfig, Seconds, StepOutput};
use serde_json::{Map, Value, json};

use super::{Shape, median, rounded, smallest};

/// Flags of `recipe bench ppo`.
#[derive(Debug, Args)]
#[command(mut_arg("base", without_base), after_help = "Example:\n  recipe bench ppo --size a --steps 5")]
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

    /// Vector instructions that our own kernels use at most, to measure as if the processor had no others [default: all it has]
    #[arg(long, value_enum, value_name = "SET")]
    pub instructions: Option<Instructions>,

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

    let (measured, last) = steps(&model, &config, args, &tokenizer, runtime)?;
    let of = |part: fn(&Seconds) -> f64| measured.iter().map(part).collect::<Vec<f64>>();
    let (rollout, score) = (median(&of(|seconds| seconds.rollout)), median(&of(|seconds| seconds.score)));
    let update = median(&of(|seconds| seconds.update));
    let totals = of(|seconds| seconds.rollout + seconds.score + seconds.update);
    let kl = last.batch.iter().map(|experience| experience.rollout.kl()).sum::<f64>() / batch as f64;
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
                "objective/kl": rounded(kl, 5),
                "policy/loss": rounded(last.update.policy_loss, 5),
                "value/loss": rounded(last.update.value.map_or(0.0, |value| value.loss), 5),
            }),
        ),
    ];
    fields.extend(own.map(|(name, value)| (name.to_owned(), value)));
    Ok(fields)
}

/// Makes the steps with random weights and prompts; returns the times of those measured, and the last step.
///
/// Nothing stops a response before its full length; else a step is that of `ppo train`.
fn steps(
    model: &GptConfig,
    config: &PpoConfig,
    args: &PpoBenchArgs,
    tokenizer: &Tokenizer,
    runtime: &Runtime,
) -> anyhow::Result<(Vec<Seconds>, StepOutput)> {
    let streams = Streams::new(config.seed);
    let gpt = |seed: u64, runtime: &Runtime| runtime.new_gpt(model, &Streams::new(seed));
    let scalar = |seed: u64, runtime: &Runtime| ScalarGpt::new(gpt(seed, runtime), &Streams::new(seed));
    let autodiff = runtime.autodiff();
    let mut sampling = config.sampling(streams, tokenizer);
    sampling.config.stop.clear();
    let frozen = FrozenModels {
        reference: gpt(config.seed, runtime),
        reward_model: scalar(config.seed + 1, runtime),
        further: Vec::new(),
        ensemble: Ensemble::default(),
        gold: None,
        batch_size: config.micro_batch_size(),
    };
    let iteration = Iteration { config, sampling: &sampling, frozen: &frozen, streams };
    let learner = Learner {
        policy: gpt(config.seed, &autodiff),
        policy_optimizer: runtime.optimizer(&config.optimizer),
        critic: Some(Critic {
            model: scalar(config.seed + 2, &autodiff),
            optimizer: runtime.optimizer(&config.value_optimizer),
        }),
    };
    let batch_size = config.train.batch_size as u64;
    let step = |learner: Learner, step: u64| -> anyhow::Result<StepOutput> {
        let prompts: Vec<EncodedPrompt> = (step * batch_size..(step + 1) * batch_size)
            .map(|row| {
                let mut rng = streams.get("trial/prompt", row);
                let ids = (0..args.prompt.get()).map(|_| rng.below(model.vocab_size) as u32).collect();
                EncodedPrompt { ids, text: String::new() }
            })
            .collect();
        let output = iteration.run(learner, &prompts, step, config.ppo.kl_coef as f32, &[])?;
        let n_tokens: usize = output.batch.iter().map(Experience::n_tokens).sum();
        assert_eq!(n_tokens, prompts.len() * args.response.get(), "a response ended early");
        Ok(output)
    };
    let n_warmup = args.warmup.get() as u64;
    let mut last = step(learner, 0)?;
    let mut measured = Vec::new();
    for i in 1..config.train.steps {
        last = step(last.learner, i)?;
        if i >= n_warmup {
            measured.push(last.seconds);
        }
    }
    Ok((measured, last))
}
