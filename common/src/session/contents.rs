//! What a model in training hands to its checkpoint.

use burn::module::Module as _;
use serde_json::Value;

use crate::checkpoint::{Parent, Weights};
use crate::hf::{Head, HostAdapter};
use crate::logging::grouped;
use crate::model::{Gpt, NamedTensors, ScalarGpt};
use crate::optim::AdamW;

/// The model whose weights a checkpoint exports.
#[derive(Debug, Clone, Copy)]
pub enum Exported<'a> {
    /// A language model.
    Lm(&'a Gpt),
    /// A reward model.
    Scalar(&'a ScalarGpt),
}

/// Contents of a checkpoint of a model in training.
#[derive(Debug)]
pub struct Contents<'a> {
    /// The trained weights.
    pub weights: Exported<'a>,
    /// The optimisers by the name of their file.
    pub optimizers: Vec<(&'static str, &'a AdamW)>,
    /// The value model, saved beside the policy.
    pub value: Option<&'a ScalarGpt>,
    /// The stage's own state.
    pub stage: Value,
    /// A moving average of the trained weights, which is exported in their place.
    pub average: Option<&'a NamedTensors>,
    /// The model to export in place of the trained weights, such as a reward model whose scores were normalised.
    pub exported: Option<Exported<'a>>,
}

impl<'a> Contents<'a> {
    /// A model and its only optimiser.
    pub fn new(weights: Exported<'a>, optimizer: &'a AdamW) -> Self {
        let optimizers = vec![("optimizer", optimizer)];
        Self { weights, optimizers, value: None, stage: Value::Null, average: None, exported: None }
    }
}

impl Exported<'_> {
    /// How many parameters it has, and with adapters how many of them are trained: for the log.
    pub fn parameters(&self) -> String {
        let (n, is_adapted) = match self {
            Self::Lm(gpt) => (gpt.num_params(), gpt.adapters().is_some()),
            Self::Scalar(scalar) => (scalar.num_params(), scalar.adapters().is_some()),
        };
        if !is_adapted {
            return format!("{} parameters", grouped(n));
        }
        let n_trained = self.to_trained().values().map(|tensor| tensor.data.len()).sum();
        format!("{} parameters ({} of them trained)", grouped(n), grouped(n_trained))
    }

    /// The weights that training changes, on the host.
    pub(super) fn to_trained(self) -> NamedTensors {
        match self {
            Self::Lm(gpt) => gpt.to_trained(),
            Self::Scalar(scalar) => scalar.to_trained(),
        }
    }

    /// `named` as the weights of this model, adapters as standing beside those of `base`.
    pub(super) fn with(&self, named: NamedTensors, base: &Parent) -> Weights {
        let (config, adapters, head) = match self {
            Self::Lm(gpt) => (gpt.config(), gpt.adapters(), Head::Lm),
            Self::Scalar(scalar) => (scalar.config(), scalar.adapters(), Head::Score { bias: scalar.score_bias() }),
        };
        if let Some(adapters) = adapters {
            let adapter = HostAdapter { adapters: adapters.clone(), head, tensors: named };
            return Weights::Adapter { adapter, config: config.clone(), base: base.clone() };
        }
        match self {
            Self::Lm(gpt) => Weights::Lm { named, config: gpt.config().clone() },
            Self::Scalar(scalar) => {
                Weights::Scalar { named, config: scalar.config().clone(), score_bias: scalar.score_bias() }
            }
        }
    }
}
