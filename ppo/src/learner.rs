//! The models that learn, each with its optimiser: how they begin, go on and are saved.

use burn::module::Module;
use common::checkpoint::{Checkpoint, CheckpointError};
use common::model::{Gpt, ScalarGpt};
use common::optim::AdamW;
use common::runtime::Runtime;
use common::score::{Rollout, ScoreError, of_response_tokens, values};
use common::session::{Contents, Exported, Restored};
use serde_json::json;

use crate::config::{PpoConfig, ValueInit};

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
        let has_critic = config.ppo.estimator.has_critic();
        let Some(mut restored) = restored else {
            let value = || -> Result<ScalarGpt, CheckpointError> {
                let model = runtime.scalar(reward_model)?;
                Ok(match config.ppo.value_init {
                    ValueInit::RewardModel => model,
                    ValueInit::ZeroHead => model.with_zero_head(),
                })
            };
            let critic = has_critic.then(value).transpose()?;
            return Ok(Self {
                policy: runtime.gpt(initial)?,
                policy_optimizer: runtime.optimizer(&config.optimizer),
                critic: critic.map(|model| Critic { model, optimizer: runtime.optimizer(&config.value_optimizer) }),
            });
        };
        let critic = if has_critic {
            let model = runtime.value(&restored.checkpoint)?;
            let optimizer = restored.optimizer("value_optimizer", &config.value_optimizer, runtime)?;
            Some(Critic { model, optimizer })
        } else {
            None
        };
        Ok(Self {
            policy: restored.gpt(runtime)?,
            policy_optimizer: restored.optimizer("optimizer", &config.optimizer, runtime)?,
            critic,
        })
    }

    /// The values of each response's tokens, `batch_size` responses at a time; `None` without a value model.
    ///
    /// # Errors
    /// If the device cannot be read.
    pub fn values(&self, rollouts: &[Rollout], batch_size: usize) -> Result<Option<Vec<Vec<f32>>>, ScoreError> {
        let Some(critic) = &self.critic else { return Ok(None) };
        let model = critic.model.valid();
        let responses: Vec<_> = rollouts.iter().map(Rollout::ids).collect();
        Ok(Some(of_response_tokens(&responses, batch_size, |batch| values(&model, batch))?))
    }

    /// The contents of a checkpoint: models, optimisers and the KL coefficient.
    pub(crate) fn contents(&self, kl_coef: f32) -> Contents<'_> {
        let mut contents = Contents {
            value: self.critic.as_ref().map(|critic| &critic.model),
            stage: json!({ "kl_coef": kl_coef }),
            ..Contents::new(Exported::Lm(&self.policy), &self.policy_optimizer)
        };
        contents.optimizers.extend(self.critic.as_ref().map(|critic| ("value_optimizer", &critic.optimizer)));
        contents
    }
}
