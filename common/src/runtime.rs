//! The device, and models placed on it.

use std::num::NonZeroUsize;

use burn::tensor::{Device, Tensor};

use crate::backend::{self, BackendError};
use crate::checkpoint::{Checkpoint, CheckpointError};
use crate::group::{Group, Share};
use crate::hf::HostAdapter;
use crate::kernels::{self, Kernels, Precision, TrunkPrecision};
use crate::model::params::Output;
use crate::model::{Gpt, GptConfig, LoraConfig, NamedError, NamedTensors, ScalarGpt};
use crate::optim::{AdamW, OptimizerConfig};
use crate::rng::Streams;

/// A device, and how models compute on it. Every model it gives is on the device and ready to run.
#[derive(Debug, Clone)]
pub struct Runtime {
    /// Where tensors live; with autodiff where it is for training.
    pub device: Device,
    /// Which implementation of the model's operations to use.
    pub kernels: Kernels,
    /// Float type of the model's computations.
    pub precision: Precision,
    /// Float type in which weights that are not trained lie in memory.
    pub trunk: TrunkPrecision,
    /// Whether the models it gives compute the activations inside their blocks twice in training; see
    /// [`Gpt::with_checkpoints`].
    pub checkpoint_activations: bool,
    /// Which part of an optimiser this process keeps.
    pub share: Share,
    /// The backend as a checkpoint records it: as given, with the adapter found, and the precisions unless they are f32.
    pub label: String,
}

impl Runtime {
    /// Opens the device `NAME[:INDEX]`, without autodiff.
    ///
    /// # Errors
    /// As [`backend::open`], and if the device cannot compute in `precision` or hold weights in the type of `trunk`.
    pub fn open(
        backend: &str,
        kernels: Kernels,
        precision: Precision,
        trunk: TrunkPrecision,
    ) -> Result<Self, BackendError> {
        let device = backend::open(backend)?;
        backend::check_precision(backend, &device, precision)?;
        backend::check_trunk(backend, &device, trunk)?;
        let mut label = backend::label(backend, &device);
        if precision != Precision::F32 {
            label = format!("{label}, {}", precision.name());
        }
        if trunk != TrunkPrecision::F32 {
            label = format!("{label}, trunk in {}", trunk.name());
        }
        Ok(Self { device, kernels, precision, trunk, checkpoint_activations: false, share: Share::WHOLE, label })
    }

    /// The same device with autodiff, for the models that are trained.
    #[must_use]
    pub fn autodiff(&self) -> Self {
        Self { device: self.device.clone().autodiff(), ..self.clone() }
    }

    /// [`autodiff`](Self::autodiff), with or without activations computed twice, as `train.checkpoint_activations` says.
    #[must_use]
    pub fn training(&self, checkpoint_activations: bool) -> Self {
        Self { checkpoint_activations, ..self.autodiff() }
    }

    /// The same with optimisers of which each process of `group` keeps its share, where it `shards` them, as
    /// `train.shard_optimizer` says.
    #[must_use]
    pub fn sharing(self, group: &Group, shards: bool) -> Self {
        Self { share: if shards { group.share() } else { Share::WHOLE }, ..self }
    }

    /// Whether models are in the host's memory, as those of the CPU backends are.
    pub fn is_on_host(&self) -> bool {
        kernels::is_on_host(&Tensor::<1>::zeros([1], &self.device))
    }

    /// The operations that run: fused ones are there for f32 on the flex backend.
    pub fn effective_kernels(&self) -> Kernels {
        let is_fused = self.precision == Precision::F32 && self.label.starts_with("flex");
        if is_fused { self.kernels } else { Kernels::Plain }
    }

    /// The language model of a checkpoint.
    ///
    /// # Errors
    /// As [`Checkpoint::load_gpt`].
    pub fn gpt(&self, checkpoint: &Checkpoint) -> Result<Gpt, CheckpointError> {
        Ok(self.ready(checkpoint.load_gpt(&self.device)?))
    }

    /// The weights of a checkpoint that adapters stand beside, moved here, without autodiff: see [`Checkpoint::take_trunk`].
    ///
    /// # Errors
    /// As there.
    pub fn trunk(&self, checkpoint: &mut Checkpoint) -> Result<Gpt, CheckpointError> {
        Ok(self.ready(checkpoint.take_trunk(&self.device.clone().inner())?))
    }

    /// The language model of a checkpoint of which [`trunk`](Self::trunk) gave `trunk`: with its adapter where it is one, and
    /// not trained.
    ///
    /// # Errors
    /// If the adapter does not fit.
    pub fn on_trunk(&self, trunk: &Gpt, checkpoint: &Checkpoint) -> Result<Gpt, CheckpointError> {
        let Some(HostAdapter { adapters, tensors, .. }) = checkpoint.adapter() else { return Ok(trunk.clone()) };
        trunk.clone().with_adapters(adapters, tensors.clone(), &self.device).map_err(named_error(checkpoint))
    }

    /// The language model that training begins with: all weights of `start`, or with `lora` adapters beside them.
    ///
    /// # Errors
    /// As [`Checkpoint::load_gpt`] and [`Checkpoint::adapter_to_train`].
    pub fn gpt_to_train(
        &self,
        start: &mut Checkpoint,
        lora: Option<&LoraConfig>,
        streams: &Streams,
    ) -> Result<Gpt, CheckpointError> {
        let Some(lora) = lora else { return self.take_gpt(start) };
        let HostAdapter { adapters, tensors, .. } = start.adapter_to_train(lora, Output::Logits, streams)?;
        self.trunk(start)?.with_adapters(&adapters, tensors, &self.device).map_err(named_error(start))
    }

    /// [`gpt`](Self::gpt) of a checkpoint whose weights are needed for nothing else: they are taken out of it.
    ///
    /// # Errors
    /// As [`Checkpoint::take_gpt`].
    pub fn take_gpt(&self, checkpoint: &mut Checkpoint) -> Result<Gpt, CheckpointError> {
        Ok(self.ready(checkpoint.take_gpt(&self.device)?))
    }

    /// [`scalar`](Self::scalar) of a checkpoint whose weights are needed for nothing else: they are taken out of it.
    ///
    /// # Errors
    /// As [`Checkpoint::take_scalar`].
    pub fn take_scalar(&self, checkpoint: &mut Checkpoint) -> Result<ScalarGpt, CheckpointError> {
        Ok(self.ready_scalar(checkpoint.take_scalar(&self.device)?))
    }

    /// The reward model of a checkpoint.
    ///
    /// # Errors
    /// As [`Checkpoint::load_scalar`].
    pub fn scalar(&self, checkpoint: &Checkpoint) -> Result<ScalarGpt, CheckpointError> {
        Ok(self.ready_scalar(checkpoint.load_scalar(&self.device)?))
    }

    /// The value model of a checkpoint of PPO.
    ///
    /// # Errors
    /// As [`Checkpoint::load_value`].
    pub fn value(&self, checkpoint: &Checkpoint) -> Result<ScalarGpt, CheckpointError> {
        Ok(self.ready_scalar(checkpoint.load_value(&self.device)?))
    }

    /// A language model with random weights, see [`Gpt::new`], in the type of the trunk.
    pub fn new_gpt(&self, config: &GptConfig, streams: &Streams) -> Gpt {
        let gpt = self.ready(Gpt::new(config, streams, &self.device));
        if self.trunk == TrunkPrecision::Bf16 { gpt.narrowed() } else { gpt }
    }

    /// A language model with the given weights.
    ///
    /// # Errors
    /// As [`Gpt::from_named`].
    pub fn gpt_of(&self, config: &GptConfig, named: NamedTensors) -> Result<Gpt, NamedError> {
        Ok(self.ready(Gpt::from_named(config, named, &self.device)?))
    }

    /// A reward or value model with the given weights and no score bias.
    ///
    /// # Errors
    /// As [`ScalarGpt::from_named`].
    pub fn scalar_of(&self, config: &GptConfig, named: NamedTensors) -> Result<ScalarGpt, NamedError> {
        Ok(self.ready_scalar(ScalarGpt::from_named(config, named, 0.0, &self.device)?))
    }

    /// An optimiser that has made no step.
    pub fn optimizer(&self, config: &OptimizerConfig) -> AdamW {
        AdamW::new(config, self.kernels).with_precision(self.precision).with_share(self.share)
    }

    fn ready(&self, gpt: Gpt) -> Gpt {
        gpt.with_kernels(self.kernels).with_precision(self.precision).with_checkpoints(self.checkpoint_activations)
    }

    fn ready_scalar(&self, scalar: ScalarGpt) -> ScalarGpt {
        scalar.with_kernels(self.kernels).with_precision(self.precision).with_checkpoints(self.checkpoint_activations)
    }
}

/// For `map_err` where the weights of `checkpoint` are put on a device.
fn named_error(checkpoint: &Checkpoint) -> impl FnOnce(NamedError) -> CheckpointError {
    move |source| CheckpointError::Named { dir: checkpoint.dir().to_owned(), source }
}

/// Runs `work` on a thread of the pool that everything computes on.
///
/// An operation that starts outside of the pool puts its thread to sleep and wakes another, hundreds of times a step;
/// one that starts inside begins at once, and the other threads join in.
pub fn on_pool<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    rayon::scope(|_| work())
}

/// Sets the number of threads of everything that computes on the CPU: our kernels and Burn's flex backend.
///
/// `None` takes one for each core. `ndarray` multiplies matrices with threads of its own, which only the variable
/// `MATMUL_NUM_THREADS` counts.
///
/// # Errors
/// If the pool runs already with another number of threads.
pub fn set_threads(threads: Option<NonZeroUsize>) -> Result<(), ThreadsError> {
    /// As large as that of the main thread, whose work [`on_pool`] hands over.
    const STACK: usize = 8 << 20;
    // 0 is one for each core.
    let wanted = threads.map_or(0, NonZeroUsize::get);
    let built = rayon::ThreadPoolBuilder::new().num_threads(wanted).stack_size(STACK).build_global();
    if built.is_err() && wanted != 0 && rayon::current_num_threads() != wanted {
        return Err(ThreadsError { wanted, running: rayon::current_num_threads() });
    }
    Ok(())
}

/// The number of threads of everything that computes on the CPU.
pub fn n_threads() -> usize {
    rayon::current_num_threads()
}

/// The thread pool cannot change its size once it runs.
#[derive(Debug, thiserror::Error)]
#[error("cannot use {wanted} threads: {running} are running already")]
pub struct ThreadsError {
    /// Asked for.
    pub wanted: usize,
    /// Running.
    pub running: usize,
}
