//! One iteration on given answers, with all its numbers: what a comparison of backends needs to see.

use std::path::Path;

use anyhow::{Context, ensure};
use burn::module::Module;
use common::checkpoint::{self, Checkpoint, Stage};
use common::data::order::Order;
use common::generate::{Finish, Generated};
use common::model::Gpt;
use common::rng::Streams;

use crate::cli::TrainArgs;
use crate::config::PpoConfig;
use crate::data::{Prompt, Prompts};
use crate::eval::open_reward_model;
use crate::rollout::{Experience, Judge, Rollout, Sampling, log_probs, of_response_tokens, values};
use crate::update::Learner;

/// What one iteration computes, each as flat numbers under the name of the quantity.
#[derive(Debug, Clone, PartialEq)]
pub struct Replay {
    /// The answers it was made on, token ids.
    pub responses: Vec<Vec<u32>>,
    /// What is computed before the updates, names and numbers in the order of their computation.
    pub before: Vec<(&'static str, Vec<f32>)>,
    /// Means over the updates.
    pub losses: Vec<(&'static str, Vec<f32>)>,
    /// Of each token after the updates to before.
    pub ratio: Vec<f32>,
}

/// Makes one iteration on answers to the first prompts.
///
/// `reference` takes the place of the initial policy as the model that divergence is measured from, which is zero
/// otherwise. `responses` are the answers; without them the initial policy samples some to `n_prompts` prompts, rounded
/// down to full minibatches.
///
/// # Errors
/// As [`train`](crate::train()), which makes the same computations.
pub fn replay(
    args: &TrainArgs,
    reference: &Path,
    n_prompts: usize,
    responses: Option<&[Vec<u32>]>,
) -> anyhow::Result<Replay> {
    let config = PpoConfig::load(&args.stage)?;
    let runtime = args.stage.runtime.open()?;
    let streams = Streams::new(config.seed);
    let initial = checkpoint::init_from(&args.policy).context("failed to load the initial policy")?;
    initial.expect_stage(&[Stage::Sft]).context("failed to load the initial policy")?;
    let reward_model = open_reward_model(&args.reward_model, &initial)?;
    let tokenizer = initial.require_tokenizer()?;
    let max_seq_len = initial.model_config().max_seq_len.min(reward_model.model_config().max_seq_len);
    let (bad, long) = (config.data.read_options(), config.data.on_too_long);
    let all = Prompts::read(&config.data.train, tokenizer, max_seq_len, config.ppo.response_length, bad, long)?;
    let minibatches = config.ppo.minibatches;
    let n = responses.map_or(n_prompts / minibatches * minibatches, <[_]>::len).max(minibatches);
    let mut order = Order::new(all.encoded.len(), streams, "order");
    let prompts: Vec<Prompt> = (0..n as u64).map(|position| all.encoded[order.item(position)].clone()).collect();

    let mut learner = Learner::start(&config, &initial, &reward_model, None, &runtime.autodiff())?;
    let judge = Judge {
        reference: runtime.gpt(&Checkpoint::open(reference)?)?,
        reward_model: runtime.scalar(&reward_model)?,
        gold: None,
        missing_eos_score: config.ppo.missing_eos_score as f32,
        batch_size: config.micro_batch_size(),
    };
    let sampling = Sampling::new(config.ppo.temperature, config.ppo.response_length, streams, tokenizer);
    let responses = match responses {
        Some(given) => given.to_vec(),
        None => sampling.answer(&learner.policy.valid(), &prompts, 0)?.into_iter().map(|answer| answer.ids).collect(),
    };
    ensure!(responses.iter().all(|response| !response.is_empty()), "an answer is empty");
    let end = tokenizer.specials().end;
    let pairs: Vec<(&[u32], &[u32])> = prompts.iter().zip(&responses).map(|(p, r)| (&*p.ids, &**r)).collect();
    let micro = config.micro_batch_size();
    let probs =
        |policy: &Gpt| of_response_tokens(&pairs, micro, |batch| log_probs(policy, batch, config.ppo.temperature).0);
    let answers = responses.iter().zip(probs(&learner.policy.valid())?).map(|(ids, log_probs)| Generated {
        ids: ids.clone(),
        log_probs,
        finish: if ids.last() == Some(&end) { Finish::Stop } else { Finish::Length },
    });
    let rollouts = judge.judge(&prompts, answers.collect(), &sampling)?;
    let value = learner.value.valid();
    let old_values = of_response_tokens(&pairs, micro, |batch| values(&value, batch))?;
    let batch = Experience::of_batch(rollouts, old_values, config.ppo.kl_coef as f32, &config.ppo);
    let update;
    (learner, update) = learner.update(&batch, &config, streams, 0)?;
    let new = probs(&learner.policy.valid())?;

    let flat = |numbers: fn(&Experience) -> &[f32]| batch.iter().flat_map(numbers).copied().collect::<Vec<f32>>();
    let of_rollout = |number: fn(&Rollout) -> f32| batch.iter().map(|e| number(&e.rollout)).collect::<Vec<f32>>();
    let old = flat(|experience| &experience.rollout.log_probs);
    Ok(Replay {
        before: vec![
            ("ref-log-probs", flat(|experience| &experience.rollout.ref_log_probs)),
            ("kl", of_rollout(|rollout| rollout.kl() as f32)),
            ("scores", of_rollout(|rollout| rollout.raw_score)),
            ("values", flat(|experience| &experience.values)),
            ("advantages", flat(|experience| &experience.advantages)),
            ("log-probs", old.clone()),
        ],
        losses: vec![
            ("policy loss", vec![update.policy_loss as f32]),
            ("value loss", vec![update.value_loss as f32]),
            ("approximate kl", vec![update.approx_kl as f32]),
            ("entropy", vec![update.entropy as f32]),
        ],
        ratio: new.iter().flatten().zip(&old).map(|(new, old)| (new - old).exp()).collect(),
        responses,
    })
}
