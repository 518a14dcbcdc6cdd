//! The models of a run, and which of them share their weights.

use common::checkpoint::Checkpoint;
use common::hf::HostAdapter;
use common::model::params::Output;
use common::model::{Gpt, LoraConfig, ScalarGpt};
use common::rng::Streams;
use common::runtime::Runtime;
use common::session::Restored;

use crate::config::PpoConfig;
use crate::dialect::ValueInit;
use crate::learner::{Critic, Learner};

/// The models of a run.
///
/// With `[lora]` there is one frozen trunk for the policy (the trunk and its adapter) and the reference (the trunk, or with
/// the adapter that the initial policy is), and one for reward model and value model; both are the same where the
/// reward model is an adapter on the initial policy's base, by the hash of its weights. Without it each has its own.
#[derive(Debug)]
pub struct Models {
    /// Policy and value model, with autodiff.
    pub learner: Learner,
    /// The policy that divergence is measured from.
    pub reference: Gpt,
    /// The reward model.
    pub reward_model: ScalarGpt,
}

impl Models {
    /// The models to begin or to go on with, on the device of `runtime`, which is without autodiff. The weights of the
    /// checkpoints are freed.
    ///
    /// # Errors
    /// If weights or the state of an optimiser cannot be loaded, or adapters do not fit what they are to stand beside.
    pub fn load(
        config: &PpoConfig,
        initial: &mut Checkpoint,
        reward_model: &mut Checkpoint,
        restored: Option<Restored>,
        runtime: &Runtime,
    ) -> anyhow::Result<Self> {
        let training = runtime.training(config.train.checkpoint_activations);
        let models = if let Some(lora) = &config.lora {
            let run = Adapting { config, lora, runtime, training: &training };
            run.load(initial, reward_model, restored)?
        } else {
            Self {
                learner: Learner::start(config, initial, reward_model, restored, &training)?,
                reference: runtime.gpt(initial)?,
                reward_model: runtime.scalar(reward_model)?,
            }
        };
        initial.release();
        reward_model.release();
        Ok(models)
    }
}

/// A run that trains adapters.
struct Adapting<'a> {
    config: &'a PpoConfig,
    lora: &'a LoraConfig,
    runtime: &'a Runtime,
    training: &'a Runtime,
}

impl Adapting<'_> {
    fn load(
        &self,
        initial: &mut Checkpoint,
        reward_model: &mut Checkpoint,
        mut restored: Option<Restored>,
    ) -> anyhow::Result<Models> {
        let Self { config, lora, runtime, training } = *self;
        let trunk = runtime.trunk(initial)?;
        let reference = runtime.on_trunk(&trunk, initial)?;
        let policy = if let Some(restored) = &mut restored {
            restored.adapted_gpt(trunk.clone(), training)?
        } else {
            let start = initial.adapter_to_train(lora, Output::Logits, &Streams::new(config.seed))?;
            trunk.clone().with_adapters(&start.adapters, start.tensors, &training.device)?
        };
        let (scored, trunk) = self.reward_model(initial, reward_model, trunk)?;
        let policy_optimizer = match &mut restored {
            Some(restored) => restored.optimizer("optimizer", &config.optimizer, training)?,
            None => training.optimizer(&config.optimizer),
        };
        let policy_optimizer = policy_optimizer.with_style(config.ppo.switches().adam_style);
        let critic = if config.ppo.estimator.has_critic() {
            Some(self.critic(reward_model, trunk, restored.as_mut())?)
        } else {
            None
        };
        let policy = policy.with_checkpoints(training.checkpoint_activations);
        Ok(Models { learner: Learner { policy, policy_optimizer, critic }, reference, reward_model: scored })
    }

    /// The reward model and its trunk, for which `trunk` is taken if it is the same.
    fn reward_model(
        &self,
        initial: &Checkpoint,
        reward_model: &mut Checkpoint,
        trunk: Gpt,
    ) -> anyhow::Result<(ScalarGpt, Gpt)> {
        let runtime = self.runtime;
        let Some(HostAdapter { adapters, tensors, head }) = reward_model.adapter().cloned() else {
            let model = runtime.scalar(reward_model)?;
            return Ok((model.clone(), model.into_trunk()));
        };
        let same_base = reward_model.base().weights_sha256 == initial.base().weights_sha256;
        let same_rows = reward_model.model_config().vocab_size == initial.model_config().vocab_size;
        let trunk = if same_base && same_rows {
            tracing::info!("one frozen trunk serves the policy, its reference, the reward model and the value model");
            trunk
        } else {
            runtime.trunk(reward_model)?
        };
        let model = ScalarGpt::with_adapters(trunk.clone(), &adapters, tensors, head.bias(), &runtime.device)?;
        Ok((model, trunk))
    }

    /// The value model on `trunk`. It goes on from the reward model's adapter if that is one, whatever its settings.
    fn critic(&self, reward_model: &Checkpoint, trunk: Gpt, restored: Option<&mut Restored>) -> anyhow::Result<Critic> {
        let Self { config, lora, training, .. } = *self;
        let switches = config.ppo.switches();
        let trunk = trunk.with_checkpoints(training.checkpoint_activations);
        let optimizer = &config.value_optimizer;
        if let Some(restored) = restored {
            let HostAdapter { adapters, tensors, head } = restored.checkpoint.value_adapter(trunk.config())?;
            let model = ScalarGpt::with_adapters(trunk, &adapters, tensors, head.bias(), &training.device)?;
            let optimizer = restored.optimizer("value_optimizer", optimizer, training)?;
            return Ok(Critic { model, optimizer: optimizer.with_style(switches.adam_style) });
        }
        let own = reward_model.adapter().cloned();
        let start = match own {
            Some(own) => own,
            None => reward_model.adapter_to_train(lora, Output::Score, &Streams::new(config.seed))?,
        };
        let bias = reward_model.score_bias();
        let model = ScalarGpt::with_adapters(trunk, &start.adapters, start.tensors, bias, &training.device)?;
        let model = match switches.value_init {
            ValueInit::RewardModel => model,
            ValueInit::ZeroHead => model.with_zero_head(),
        };
        Ok(Critic { model, optimizer: training.optimizer(optimizer).with_style(switches.adam_style) })
    }
}
