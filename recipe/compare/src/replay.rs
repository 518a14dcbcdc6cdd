//! One PPO step on given responses, with all its numbers.

use std::path::Path;

use anyhow::{Result, ensure};
use burn::module::Module;
use common::checkpoint::Checkpoint;
use common::data::order::Order;
use common::model::Gpt;
use common::rng::Streams;
use common::score::{EncodedPrompt, FrozenModels, Response, Sampling, log_probs, of_response_tokens};
use common::tokenizer::Tokenizer;
use ppo::targets::{Experience, ValueTargets};
use ppo::{Iteration, Models, PpoConfig, TrainArgs, UpdateMetrics};

/// The results of one step, each as flat numbers under the name of the quantity.
#[derive(Debug, Clone, PartialEq)]
pub struct Replay {
    /// Token ids of the responses it was made on.
    pub responses: Vec<Vec<u32>>,
    /// The results before the updates, in the order of their computation.
    pub before: Vec<(&'static str, Vec<f32>)>,
    /// Means over the updates.
    pub losses: Vec<(&'static str, Vec<f32>)>,
    /// Of each token's probability after the updates to before.
    pub ratio: Vec<f32>,
}

/// Makes one step on responses to the first prompts.
///
/// `reference` takes the place of the initial policy as the model that divergence is measured from, which is zero
/// otherwise. Without `responses` the initial policy samples some to `n_prompts` prompts, rounded down to full
/// minibatches.
///
/// # Errors
/// As [`ppo::train`], which makes the same computations.
pub fn replay(args: &TrainArgs, reference: &Path, n_prompts: usize, responses: Option<&[Vec<u32>]>) -> Result<Replay> {
    let config = PpoConfig::load(&args.stage)?;
    let runtime = args.stage.runtime.open()?;
    let streams = Streams::new(config.seed);
    let (mut initial, mut reward_models) = ppo::open_models(args)?;
    let tokenizer = &initial.require_tokenizer()?.clone();
    let contexts = std::iter::once(&initial).chain(&reward_models).map(|model| model.model_config().max_seq_len);
    let max_seq_len = contexts.min().unwrap_or(0);
    let minibatches = config.ppo.minibatches;
    let n = responses.map_or(n_prompts / minibatches * minibatches, <[_]>::len).max(minibatches);
    let prompts = first_prompts(&config, n, tokenizer, max_seq_len, streams)?;

    let (learner, frozen) =
        Models::load(&config, &mut initial, &mut reward_models, None, &runtime)?.split(&config, None);
    let frozen = FrozenModels { reference: runtime.gpt(&Checkpoint::open(reference)?)?, ..frozen };
    let sampling = config.sampling(streams, tokenizer);
    let policy = learner.policy.valid();
    let ids = match responses {
        Some(given) => given.to_vec(),
        None => sampling.answer(&policy, &prompts, 0)?.into_iter().map(|response| response.ids).collect(),
    };
    let responses = with_log_probs(&policy, &prompts, &ids, &config, &sampling)?;
    let iteration = Iteration { config: &config, sampling: &sampling, frozen: &frozen, streams };
    let batch = iteration.experience(&learner, &prompts, responses, config.ppo.kl_coef as f32)?;
    let (learner, update) = learner.update(&batch, &config, streams, 0, config.ppo.kl_coef as f32)?;
    let after = with_log_probs(&learner.policy.valid(), &prompts, &ids, &config, &sampling)?;
    let tokens = batch.iter().zip(&after);
    let ratio = tokens
        .flat_map(|(before, after)| after.log_probs.iter().zip(&before.rollout.response.log_probs))
        .map(|(after, before)| (after - before).exp())
        .collect();
    Ok(Replay { responses: ids, before: numbers(&batch), losses: losses(&update), ratio })
}

/// The prompts of a run's first step.
fn first_prompts(
    config: &PpoConfig,
    n: usize,
    tokenizer: &Tokenizer,
    max_seq_len: usize,
    streams: Streams,
) -> Result<Vec<EncodedPrompt>> {
    let all = config.read_prompts(&config.data.train, tokenizer, max_seq_len)?;
    let mut order = Order::new(all.encoded.len(), streams, "order");
    Ok((0..n as u64).map(|position| all.encoded[order.item(position)].clone()).collect())
}

/// Given responses as if `policy` had sampled them.
fn with_log_probs(
    policy: &Gpt,
    prompts: &[EncodedPrompt],
    ids: &[Vec<u32>],
    config: &PpoConfig,
    sampling: &Sampling<'_>,
) -> Result<Vec<Response>> {
    ensure!(ids.iter().all(|response| !response.is_empty()), "an answer is empty");
    let pairs: Vec<(&[u32], &[u32])> =
        prompts.iter().zip(ids).map(|(prompt, response)| (&*prompt.ids, &**response)).collect();
    let probs = of_response_tokens(&pairs, config.micro_batch_size(), |batch| {
        log_probs(policy, batch, config.ppo.temperature())
    })?;
    let responses = ids.iter().zip(probs).map(|(ids, log_probs)| Response {
        ids: ids.clone(),
        log_probs,
        text: sampling.tokenizer.decode(ids),
        ended: ids.last().is_some_and(|id| sampling.config.stop.contains(id)),
        n_after_end: 0,
    });
    Ok(responses.collect())
}

/// The numbers of a batch before the updates.
fn numbers(batch: &[Experience]) -> Vec<(&'static str, Vec<f32>)> {
    let flat = |numbers: fn(&Experience) -> &[f32]| batch.iter().flat_map(numbers).copied().collect::<Vec<f32>>();
    let targets = batch.iter().filter_map(|experience| experience.critic.as_ref());
    let values = |targets: &ValueTargets| targets.values.clone();
    vec![
        ("ref-log-probs", flat(|experience| &experience.rollout.ref_log_probs)),
        ("kl", batch.iter().map(|experience| experience.rollout.kl() as f32).collect()),
        ("scores", batch.iter().map(|experience| experience.rollout.score).collect()),
        ("values", targets.flat_map(values).collect()),
        ("advantages", flat(|experience| &experience.advantages)),
        ("log-probs", flat(|experience| &experience.rollout.response.log_probs)),
    ]
}

fn losses(update: &UpdateMetrics) -> Vec<(&'static str, Vec<f32>)> {
    let of = |number: f64| vec![number as f32];
    let mut losses = vec![("policy loss", of(update.policy_loss))];
    losses.extend(update.value.map(|value| ("value loss", of(value.loss))));
    losses.extend([("approximate kl", of(update.approx_kl)), ("entropy", of(update.entropy))]);
    losses
}
