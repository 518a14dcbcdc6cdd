//! The models of a run, and which of them share their weights.

use common::checkpoint::Checkpoint;
use common::hf::HostAdapter;
use common::logging::counted;
use common::model::params::Output;
use common::model::{Gpt, LoraConfig, ScalarGpt};
use common::rng::Streams;
use common::runtime::Runtime;
use common::score::{FrozenModels, Gold};
use common::session::Restored;

use crate::config::PpoConfig;
use crate::dialect::ValueInit;
use crate::learner::{Critic, Learner};

/// The models of a run.
///
/// With `[lora]` there is one frozen trunk for the policy (the trunk and its adapter) and the reference (the trunk, or with
/// the adapter that the initial policy is), and one for reward model and value model; both are the same where the
/// reward model is an adapter on the initial policy's base, by the hash of its weights. Of several reward models, those that are
/// adapters on one base share it too. Without it each has its own.
#[derive(Debug)]
pub struct Models {
    /// Policy and value model, with autodiff.
    pub learner: Learner,
    /// The policy that divergence is measured from.
    pub reference: Gpt,
    /// The reward model, of which the value model begins.
    pub reward_model: ScalarGpt,
    /// Further reward models.
    pub further: Vec<ScalarGpt>,
}

impl Models {
    /// What learns, and what does not.
    #[must_use]
    pub fn split<'a>(self, config: &PpoConfig, gold: Option<Gold<'a>>) -> (Learner, FrozenModels<'a>) {
        let Self { learner, reference, reward_model, further } = self;
        let ensemble = config.ppo.ensemble.unwrap_or_default();
        let batch_size = config.micro_batch_size();
        (learner, FrozenModels { reference, reward_model, further, ensemble, gold, batch_size })
    }

    /// The models to begin or to go on with, on the device of `runtime`, which is without autodiff. The weights of the
    /// checkpoints are freed.
    ///
    /// # Errors
    /// If weights or the state of an optimiser cannot be loaded, or adapters do not fit what they are to stand beside.
    ///
    /// # Panics
    /// If there is no reward model.
    pub fn load(
        config: &PpoConfig,
        initial: &mut Checkpoint,
        reward_models: &mut [Checkpoint],
        restored: Option<Restored>,
        runtime: &Runtime,
    ) -> anyhow::Result<Self> {
        let training = runtime.training(config.train.checkpoint_activations);
        let models = if let Some(lora) = &config.lora {
            let run = Adapting { config, lora, runtime, training: &training };
            run.load(initial, reward_models, restored)?
        } else {
            let (reward_model, further) = reward_models.split_first_mut().expect("a run has a reward model");
            Self {
                learner: Learner::start(config, initial, reward_model, restored, &training)?,
                reference: runtime.take_gpt(initial)?,
                reward_model: runtime.take_scalar(reward_model)?,
                further: further.iter_mut().map(|model| runtime.take_scalar(model)).collect::<Result<_, _>>()?,
            }
        };
        initial.release();
        reward_models.iter_mut().for_each(Checkpoint::release);
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
        reward_models: &mut [Checkpoint],
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
        let mut trunks = Trunks { runtime, known: vec![(Base::of(initial), trunk)] };
        let (reward_model, further) = reward_models.split_first_mut().expect("a run has a reward model");
        let (scored, trunk) = trunks.reward_model(reward_model)?;
        if trunks.known.len() == 1 && reward_model.adapter().is_some() {
            tracing::info!("one frozen trunk serves the policy, its reference, the reward model and the value model");
        }
        let n_before = trunks.known.len();
        let n_adapters = further.iter().filter(|model| model.adapter().is_some()).count();
        let further = further.iter_mut().map(|model| Ok(trunks.reward_model(model)?.0));
        let further = further.collect::<anyhow::Result<Vec<ScalarGpt>>>()?;
        match trunks.known.len() - n_before {
            0 if n_adapters > 0 => tracing::info!("the further reward models stand on frozen trunks that are there"),
            0 => {}
            n => {
                let trunks = counted(n, "more frozen trunk", "more frozen trunks");
                tracing::info!("{trunks} for the adapters of further reward models");
            }
        }
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
        Ok(Models { learner: Learner { policy, policy_optimizer, critic }, reference, reward_model: scored, further })
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

/// What adapters stand beside: the weights by their hash, and the rows of the embedding.
#[derive(PartialEq)]
struct Base(String, usize);

impl Base {
    fn of(model: &Checkpoint) -> Self {
        Self(model.base().weights_sha256.clone(), model.model_config().vocab_size)
    }
}

/// The frozen trunks of a run, each once; the policy's is the first.
struct Trunks<'a> {
    runtime: &'a Runtime,
    known: Vec<(Base, Gpt)>,
}

impl Trunks<'_> {
    /// A reward model and its trunk, which is one of those that are known if its adapter stands beside that.
    fn reward_model(&mut self, reward_model: &mut Checkpoint) -> anyhow::Result<(ScalarGpt, Gpt)> {
        let runtime = self.runtime;
        let Some(HostAdapter { adapters, tensors, head }) = reward_model.adapter().cloned() else {
            let model = runtime.take_scalar(reward_model)?;
            return Ok((model.clone(), model.into_trunk()));
        };
        let base = Base::of(reward_model);
        let known = self.known.iter().position(|(known, _)| *known == base);
        let trunk = if let Some(i) = known {
            self.known[i].1.clone()
        } else {
            let trunk = runtime.trunk(reward_model)?;
            self.known.push((base, trunk.clone()));
            trunk
        };
        let model = ScalarGpt::with_adapters(trunk.clone(), &adapters, tensors, head.bias(), &runtime.device)?;
        Ok((model, trunk))
    }
}
