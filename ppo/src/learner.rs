//! The models that learn, each with its optimiser: how they begin, go on and are saved.

use burn::module::Module;
use common::checkpoint::{Checkpoint, CheckpointError};
use common::group::Group;
use common::model::{Gpt, NamedTensors, ScalarGpt};
use common::optim::AdamW;
use common::runtime::Runtime;
use common::score::{Rollout, ScoreError, Watch, of_share_of_responses, values};
use common::session::{Contents, Exported, Restored};
use serde_json::json;

use crate::config::{PpoConfig, PpoSection};
use crate::dialect::ValueInit;
use crate::targets::places_after;

/// The models that are trained, on an autodiff device.
#[derive(Debug)]
pub struct Learner {
    /// The policy.
    pub policy: Gpt,
    /// Its optimiser.
    pub policy_optimizer: AdamW,
    /// The value model, where the estimator has one.
    pub critic: Option<Critic>,
}

/// The response's tokens before each of which the value model sees a state: one more, of any kind, where there is a place
/// `after` the last.
pub(crate) fn valued_ids(rollout: &Rollout, after: bool) -> Vec<u32> {
    let mut ids = rollout.response.ids.clone();
    ids.extend(after.then_some(0));
    ids
}

/// A value model and its optimiser.
#[derive(Debug)]
pub struct Critic {
    /// The value model.
    pub model: ScalarGpt,
    /// Its optimiser.
    pub optimizer: AdamW,
}

impl Learner {
    /// The models and optimisers to begin or to go on with.
    ///
    /// `runtime` is with autodiff. The policy begins as `initial`, the value model as `reward_model`, changed as `ppo.value_init` says.
    ///
    /// # Errors
    /// If weights or the state of an optimiser cannot be loaded.
    pub fn start(
        config: &PpoConfig,
        initial: &Checkpoint,
        reward_model: &Checkpoint,
        restored: Option<Restored>,
        runtime: &Runtime,
    ) -> anyhow::Result<Self> {
        let (has_critic, switches) = (config.ppo.estimator.has_critic(), config.ppo.switches());
        let Some(mut restored) = restored else {
            let value = || -> Result<ScalarGpt, CheckpointError> {
                let model = runtime.scalar(reward_model)?;
                Ok(match switches.value_init {
                    ValueInit::RewardModel => model,
                    ValueInit::ZeroHead => model.with_zero_head(),
                })
            };
            let critic = has_critic.then(value).transpose()?;
            let optimizer = |config| runtime.optimizer(config).with_style(switches.adam_style);
            return Ok(Self {
                policy: runtime.gpt(initial)?,
                policy_optimizer: optimizer(&config.optimizer),
                critic: critic.map(|model| Critic { model, optimizer: optimizer(&config.value_optimizer) }),
            });
        };
        let critic = if has_critic {
            let model = runtime.value(&restored.checkpoint)?;
            let optimizer = restored.optimizer("value_optimizer", &config.value_optimizer, runtime)?;
            Some(Critic { model, optimizer: optimizer.with_style(switches.adam_style) })
        } else {
            None
        };
        Ok(Self {
            policy: restored.gpt(runtime)?,
            policy_optimizer: restored
                .optimizer("optimizer", &config.optimizer, runtime)?
                .with_style(switches.adam_style),
            critic,
        })
    }

    /// The values of each response's tokens, and of the place after the last where `config` gives the score that,
    /// `batch_size` responses at a time, which `group` shares; `None` without a value model.
    ///
    /// # Errors
    /// If the device cannot be read.
    pub fn values(
        &self,
        group: &Group,
        rollouts: &[Rollout],
        config: &PpoSection,
        batch_size: usize,
        watch: Watch<'_>,
    ) -> Result<Option<Vec<Vec<f32>>>, ScoreError> {
        let Some(critic) = &self.critic else { return Ok(None) };
        let model = critic.model.valid();
        let valued = places_after(rollouts, config);
        let responses: Vec<Vec<u32>> =
            rollouts.iter().zip(valued).map(|(rollout, after)| valued_ids(rollout, after)).collect();
        let responses: Vec<(&[u32], &[u32])> =
            rollouts.iter().zip(&responses).map(|(rollout, ids)| (&*rollout.prompt.ids, &**ids)).collect();
        let own = of_share_of_responses(&responses, batch_size, group.share(), watch, |batch| values(&model, batch))?;
        Ok(Some(group.in_order(own)?))
    }

    /// The contents of a checkpoint: models, optimisers, the policy's moving average and the KL coefficient.
    pub(crate) fn contents<'a>(&'a self, average: Option<&'a NamedTensors>, kl_coef: f32) -> Contents<'a> {
        let mut contents = Contents {
            average,
            value: self.critic.as_ref().map(|critic| &critic.model),
            stage: json!({ "kl_coef": kl_coef }),
            ..Contents::new(Exported::Lm(&self.policy), &self.policy_optimizer)
        };
        contents.optimizers.extend(self.critic.as_ref().map(|critic| ("value_optimizer", &critic.optimizer)));
        contents
    }
}
