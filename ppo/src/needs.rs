//! Memory that a run needs.

use common::capacity::{self, Lengths, Needs, Ranks, Settings, TooLarge, Trained};
use common::checkpoint::Preview;
use common::group::Group;
use common::kernels::{Kernels, TrunkPrecision};
use common::model::footprint::{self, Batch};
use common::model::params::Output;
use common::runtime::Runtime;

use crate::cli::TrainArgs;
use crate::config::PpoConfig;
use crate::ptx;

/// Refuses a run that needs more memory than there is, before the weights of policy and reward model are read.
///
/// # Errors
/// If it does not fit.
pub(crate) fn check(config: &PpoConfig, args: &TrainArgs, group: &Group, runtime: &Runtime) -> anyhow::Result<()> {
    // What is wrong with a model is said where it is loaded.
    let preview = |dir| Preview::open(dir, args.stage.runtime.base());
    let reward_models: Result<Vec<Preview>, _> = args.reward_model.iter().map(|dir| preview(dir)).collect();
    let (Ok(policy), Ok(reward_models)) = (preview(&args.policy), reward_models) else { return Ok(()) };
    let reward_models: Vec<&Preview> = reward_models.iter().collect();
    let ranks = Ranks::gathered(group, config.run.check_memory && runtime.is_on_host())?;
    let kernels = runtime.effective_kernels();
    let (batch_size, settings) = (config.train.batch_size / config.ppo.minibatches, config.memory(runtime.trunk));
    let of_run = |config: &PpoConfig, lengths: &Lengths, settings| {
        needs(config, &policy, &reward_models, lengths, kernels, settings)
    };
    let checked = capacity::check_run(
        &ranks,
        batch_size,
        settings,
        policy.config.max_seq_len,
        || lengths(config, &policy),
        |lengths, settings| of_run(config, lengths, settings),
    );
    let too_large = match checked.map_err(anyhow::Error::downcast::<TooLarge>) {
        Ok(()) => return Ok(()),
        Err(Err(other)) => return Err(other),
        Err(Ok(too_large)) => too_large,
    };
    let lengths = lengths(config, &policy)?;
    let fits =
        |less: &PpoConfig| capacity::check(&ranks, batch_size, settings, |of| of_run(less, &lengths, of)).is_ok();
    let n_windows = ptx::most_windows(config, fits);
    let setting = |n| format!("`ptx.batch_size={n}`, which is another training");
    Err(too_large.or_with(n_windows.map(setting)).into())
}

/// The lengths of the training prompts.
///
/// # Errors
/// If they cannot be read.
pub fn lengths(config: &PpoConfig, policy: &Preview) -> anyhow::Result<Lengths> {
    let context = policy.config.max_seq_len;
    let Some(tokenizer) = &policy.tokenizer else { return Ok(Lengths::unknown(context)) };
    let prompts = config.read_prompts(&config.data.train, tokenizer, context)?;
    Ok(Lengths::of(context, prompts.encoded.iter().map(|prompt| prompt.ids.len()).collect()))
}

/// What PPO needs with such a policy and such reward models: all of them and the frozen reference, the value model, which begins
/// as the first reward model, the answers as they are decoded. With `[lora]` policy and reference share a trunk, as do reward and
/// value model, and all that stand on one base. The loss on pretraining text has a backward pass of its
/// own, after theirs and with their gradients kept.
///
/// # Panics
/// If there is no reward model.
pub fn needs(
    config: &PpoConfig,
    policy: &Preview,
    reward_models: &[&Preview],
    lengths: &Lengths,
    kernels: Kernels,
    settings: Settings,
) -> Needs {
    let mut trunks = vec![&policy.weights_dir];
    let (mut of_reward_models, mut loaded) = (0.0, 0.0);
    for member in reward_models {
        let weights = footprint::weights(&member.config, Output::Score, settings.trunk);
        if config.lora.is_none() || !trunks.contains(&&member.weights_dir) {
            of_reward_models += weights;
        } else {
            // Read before it is known that they are there already.
            loaded += weights;
        }
        trunks.push(&member.weights_dir);
    }
    let first = reward_models.first().expect("a run has a reward model");
    let (policy, reward_model) = (&policy.config, &first.config);
    let seq = (lengths.longest() + config.ppo.response_length).min(policy.max_seq_len);
    let batch = Batch { rows: settings.micro_batch_size as f64, seq: seq as f64 };
    let text = ptx::batches(config, policy.max_seq_len, settings.micro_batch_size);
    let learned = text.and_then(|(learned, _)| learned);
    let trained = |model, output| Trained {
        config: model,
        output,
        lora: config.lora.as_ref(),
        kernels,
        settings,
        batch,
        // Where text is learned, each micro-batch has two backward passes.
        n_micro_batches: config.train.batch_size / config.ppo.minibatches / settings.micro_batch_size
            * if learned.is_some() { 2 } else { 1 },
    };
    let actor = trained(policy, Output::Logits);
    let mut needs = actor.needs();
    let of_policy = footprint::weights(policy, Output::Logits, settings.trunk);
    let of_reward_model = footprint::weights(reward_model, Output::Score, settings.trunk);
    if config.ppo.estimator.has_critic() {
        let model = trained(reward_model, Output::Score);
        let (critic, trained) = (model.needs(), model.trained());
        // It is saved once: nothing is handed on in its place, and ranks behind the first do not compare it. A trunk that it
        // shares is the reward model's.
        let shared = if config.lora.is_some() { of_reward_model } else { 0.0 };
        let [activations, last_activations] = if settings.trunk == TrunkPrecision::F32 {
            [critic.activations, critic.last_activations]
        } else {
            // One model after the other: what the larger takes beyond the actor's.
            [critic.activations - needs.activations, critic.last_activations - needs.last_activations]
                .map(|x| x.max(0.0))
        };
        let (weights, saving) = (critic.weights - shared, critic.saving - trained);
        // One is sent after the other, through the same library.
        let (exchange, library) = ((critic.exchange - trained).max(0.0), 0.0);
        needs += Needs { weights, saving, exchange, library, activations, last_activations, ..critic };
    }
    if let Some(batch) = learned {
        let of_text = Trained { batch, ..actor }.needs();
        needs.activations = needs.activations.max(of_text.activations);
        needs.last_activations = needs.last_activations.max(of_text.last_activations);
    }
    let measured = text.map_or(0.0, |(_, measured)| footprint::inference(policy, actor.computation(), measured));
    let rows = config.train.rollout_batch_size.min(settings.share.of(config.train.batch_size).len());
    needs += Needs {
        weights: if config.lora.is_some() { 0.0 } else { of_policy } + of_reward_models,
        loading: loaded + actor.loading(),
        cache: measured
            .max(footprint::cache(policy, rows, seq) + footprint::inference(policy, actor.computation(), batch)),
        data: capacity::vocabulary(policy.vocab_size)
            + capacity::records(config.data.train.iter().chain(&config.data.val)),
        ..Needs::default()
    };
    needs
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use common::testing::tiny_config;

    #[test]
    fn every_reward_model_takes_its_weights_and_adapters_on_one_base_take_them_once() {
        let preview =
            |dir: &str| Preview { config: tiny_config(100), tokenizer: None, weights_dir: Path::new(dir).to_owned() };
        let (policy, on_base, other) = (preview("base"), preview("base"), preview("other"));
        let weights = footprint::weights(&policy.config, Output::Score, TrunkPrecision::F32);
        let of = |lora: bool, members: &[&Preview]| {
            let config = PpoConfig { lora: lora.then(Default::default), ..PpoConfig::default() };
            let settings = config.memory(TrunkPrecision::F32);
            needs(&config, &policy, members, &Lengths::unknown(64), Kernels::Fused, settings).weights
        };
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1.0, "{a} {b}");
        close(of(false, &[&other, &other, &on_base]) - of(false, &[&other]), 2.0 * weights);
        close(of(true, &[&on_base, &on_base]) - of(true, &[&on_base]), 0.0);
        close(of(true, &[&on_base, &other, &other]) - of(true, &[&on_base]), weights);
    }
}
