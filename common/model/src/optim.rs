//! AdamW with parameter groups, clipping by the global norm, and learning-rate schedules.
//!
//! Burn's own optimisers clip tensor by tensor and know no groups by name, so the update is ours; the arithmetic of one
//! step is [`kernels::adamw_update`].

mod config;
mod shard;

use std::collections::BTreeMap;
use std::ops::Range;

use burn::module::{Module, Param};
use burn::tensor::{Device, Gradients, Tensor, TensorData};
use group::Share;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::named::{self, ParamMapper, ParamVisitor};
use crate::params::role_of;
use crate::{HostTensor, NamedTensors};
use kernels::{self, AdamWParam, AdamWStep, Kernels, Precision};

pub use config::{OptimizerConfig, OptimizerConfigError, RlhfDefaults, Schedule};
pub(crate) use shard::Places;

/// Where Adam's ε stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AdamStyle {
    /// As PyTorch: beside the corrected second moment, `m̂/(√v̂ + ε)`.
    #[default]
    Torch,
    /// As TensorFlow 1: beside the second moment as it is, `√(1 − β₂ᵗ)/(1 − β₁ᵗ)·m/(√v + ε)`. First steps are smaller.
    Tf,
}

impl AdamStyle {
    /// The number to add to the root of the corrected second moment in step `step`, the first being 1.
    ///
    /// # Source
    /// `tf.train.AdamOptimizer`, whose documentation calls its ε "epsilon hat"; Kingma & Ba, arXiv:1412.6980, section 2.
    pub fn eps_at(self, eps: f64, beta_2: f64, step: u64) -> f64 {
        match self {
            Self::Torch => eps,
            Self::Tf => eps / (1.0 - beta_2.powf(step as f64)).sqrt(),
        }
    }
}

/// Gradients by parameter path, each flat, off the autodiff graph.
#[derive(Debug, Default)]
pub struct Grads {
    by_path: BTreeMap<String, Tensor<1>>,
    /// The norm of all, where it is known already.
    norm: Option<GradNorm>,
    /// Where those of all ranks stand, if these are the part of one.
    places: Option<Places>,
}

impl Grads {
    /// Takes the gradients of `module`'s parameters out of a backward pass.
    ///
    /// A parameter the loss does not depend on has none.
    pub fn take<M: Module>(module: &M, gradients: Gradients) -> Self {
        struct OfParameters {
            gradients: Gradients,
            by_path: BTreeMap<String, Tensor<1>>,
        }
        impl ParamVisitor for OfParameters {
            fn visit<const D: usize>(&mut self, path: String, param: &Param<Tensor<D>>) {
                if let Some(grad) = param.val().grad_remove(&mut self.gradients) {
                    let n = grad.shape().num_elements();
                    self.by_path.insert(path, grad.reshape([n]));
                }
            }
        }
        let mut of_parameters = OfParameters { gradients, by_path: BTreeMap::new() };
        named::for_each(module, &mut of_parameters);
        Self::from_flat(of_parameters.by_path)
    }

    /// The gradients by path, each flat.
    pub(crate) fn into_flat(self) -> BTreeMap<String, Tensor<1>> {
        self.by_path
    }

    /// Of the gradients by path, each flat.
    pub(crate) const fn from_flat(by_path: BTreeMap<String, Tensor<1>>) -> Self {
        Self { by_path, norm: None, places: None }
    }

    /// The same gradients, the norm of all being `norm`.
    pub(crate) fn with_norm(self, norm: GradNorm) -> Self {
        Self { norm: Some(norm), ..self }
    }

    /// The same gradients as one rank's part of all that stand at `places`.
    pub(crate) fn into_part_of(self, places: Places) -> Self {
        Self { places: Some(places), ..self }
    }

    /// Adds another micro-batch's gradients.
    #[must_use]
    pub fn plus(mut self, other: Self) -> Self {
        for (path, grad) in other.by_path {
            let sum = match self.by_path.remove(&path) {
                Some(earlier) => earlier + grad,
                None => grad,
            };
            self.by_path.insert(path, sum);
        }
        self
    }

    /// The Euclidean norm over all gradients together, read from the device.
    pub fn norm(&self, kernels: Kernels) -> f64 {
        let grads: Vec<Tensor<1>> = self.by_path.values().cloned().collect();
        kernels::sum_of_squares(kernels, &grads).sqrt()
    }

    /// The same norm as `[1]` on the device, without waiting for it; `None` without gradients.
    fn norm_on_device(&self) -> Option<Tensor<1>> {
        let squares: Vec<Tensor<1>> = self.by_path.values().map(|grad| grad.clone().square().sum()).collect();
        if squares.is_empty() { None } else { Some(Tensor::cat(squares, 0).sum().sqrt()) }
    }

    /// Whether the gradients can be read without waiting.
    fn are_on_host(&self) -> bool {
        self.by_path.values().next().is_none_or(kernels::is_on_host)
    }

    /// The gradients on the host, flat, by path.
    pub fn to_named(&self) -> NamedTensors {
        self.by_path.iter().map(|(path, grad)| (path.clone(), HostTensor::of(grad))).collect()
    }
}

/// The global norm of one step's gradients before clipping.
///
/// On a GPU it stays there until it is asked for, so that a step that logs nothing waits for nothing.
#[derive(Debug, Clone)]
#[allow(clippy::large_enum_variant, reason = "there is one a step")]
pub enum GradNorm {
    /// Known.
    Host(f64),
    /// `[1]`, perhaps still being computed.
    Device(Tensor<1>),
}

impl GradNorm {
    /// The norm, if it is known without waiting.
    pub const fn known(&self) -> Option<f64> {
        match self {
            Self::Host(norm) => Some(*norm),
            Self::Device(_) => None,
        }
    }

    /// The norm; waits for the device.
    pub fn value(&self) -> f64 {
        Self::mean(std::slice::from_ref(self))
    }

    /// The mean of several, read at once.
    pub fn mean(norms: &[Self]) -> f64 {
        let known: f64 = norms.iter().filter_map(Self::known).sum();
        let waiting: Vec<Tensor<1>> = norms
            .iter()
            .filter_map(|norm| if let Self::Device(norm) = norm { Some(norm.clone()) } else { None })
            .collect();
        let waited = if waiting.is_empty() { 0.0 } else { Tensor::cat(waiting, 0).sum().into_scalar::<f32>().into() };
        (known + waited) / norms.len() as f64
    }
}

/// The factor on the loss that keeps small gradients within the range of f16.
///
/// # Source
/// Micikevicius et al., arXiv:1710.03740, section 3.2; start, growth and its interval as in PyTorch's `GradScaler`.
#[derive(Debug, Clone, Copy, PartialEq)]
struct LossScale {
    factor: f64,
    /// Steps since it last changed.
    n_good: u64,
}

impl LossScale {
    const START: Self = Self { factor: 65_536.0, n_good: 0 };
    const GROWTH_INTERVAL: u64 = 2000;

    /// Notes a step whose gradients were finite or not.
    fn note(&mut self, finite: bool) {
        self.n_good += 1;
        if !finite {
            *self = Self { factor: (self.factor / 2.0).max(1.0), n_good: 0 };
        } else if self.n_good == Self::GROWTH_INTERVAL {
            *self = Self { factor: self.factor * 2.0, n_good: 0 };
        }
    }
}

/// AdamW over all parameters of a module.
///
/// Two groups: matrices decay, norms, biases and embeddings do not; see [`Role::decays`](crate::params::Role::decays).
///
/// # Source
/// Loshchilov & Hutter, arXiv:1711.05101, algorithm 2, with the decay multiplied by the learning rate as in PyTorch.
/// Clipping: Pascanu et al., arXiv:1211.5063, over the global norm as in `torch.nn.utils.clip_grad_norm_`, but without
/// its 1e-6 in the denominator.
#[derive(Debug, Clone)]
pub struct AdamW {
    config: OptimizerConfig,
    style: AdamStyle,
    kernels: Kernels,
    n_updates: u64,
    /// First and second moment of each parameter, flat.
    moments: BTreeMap<String, [Tensor<1>; 2]>,
    /// With f16 only.
    loss_scale: Option<LossScale>,
    /// Which part of all numbers it keeps and moves.
    share: Share,
    /// Where all numbers stand, if it has a part of them and has made a step.
    places: Places,
}

/// Name of the factor on the loss in a saved optimiser.
const LOSS_SCALE: &str = "loss_scale";

/// Why an optimiser's state cannot be restored.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum OptimizerStateError {
    /// A moment without its partner, or a name that is not a moment's.
    #[error("optimizer state: `{name}` has no counterpart")]
    Unpaired {
        /// The tensor's name.
        name: String,
    },
}

impl AdamW {
    /// An optimiser that has made no step.
    pub fn new(config: &OptimizerConfig, kernels: Kernels) -> Self {
        Self {
            config: config.clone(),
            style: AdamStyle::default(),
            kernels,
            n_updates: 0,
            moments: BTreeMap::new(),
            loss_scale: None,
            share: Share::WHOLE,
            places: Places::default(),
        }
    }

    /// The same optimiser with its ε elsewhere; PyTorch's place is the default.
    #[must_use]
    pub fn with_style(mut self, style: AdamStyle) -> Self {
        self.style = style;
        self
    }

    /// The same optimiser for a model that computes in `precision`: with f16 the loss is scaled.
    #[must_use]
    pub fn with_precision(mut self, precision: Precision) -> Self {
        let scale = self.loss_scale.unwrap_or(LossScale::START);
        self.loss_scale = (precision == Precision::F16).then_some(scale);
        self
    }

    /// The tensor for `backward`: the loss, with f16 times the present factor, by which [`step`](Self::step) divides.
    pub fn scaled(&self, loss: Tensor<1>) -> Tensor<1> {
        match self.loss_scale {
            Some(scale) => loss * scale.factor,
            None => loss,
        }
    }

    /// The present factor on the loss; 1 but for f16.
    pub fn loss_factor(&self) -> f64 {
        self.loss_scale.map_or(1.0, |scale| scale.factor)
    }

    /// Clips `grads` by their global norm, then moves every parameter that has a gradient.
    ///
    /// Returns the module and the norm before clipping. With f16, gradients that are not finite lower the factor on
    /// the loss, move nothing and count as a norm of 0; only then does a GPU have to be waited for.
    pub fn step<M: Module>(&mut self, module: M, mut grads: Grads, lr: f64) -> (M, GradNorm) {
        let clip = self.config.grad_clip;
        let (mut grad_scale, mut device_scale) = (1.0, None);
        let norm = match self.norm_of(&grads) {
            GradNorm::Device(norm) => {
                if clip > 0.0 {
                    device_scale = Some(norm.clone().clamp_min(clip).recip() * clip);
                }
                GradNorm::Device(norm)
            }
            GradNorm::Host(norm) => {
                let factor = self.loss_factor();
                let norm = norm / factor;
                if let Some(scale) = &mut self.loss_scale {
                    scale.note(norm.is_finite());
                    if !norm.is_finite() {
                        tracing::debug!("f16 overflowed: the factor on the loss falls to {}", scale.factor);
                        return (module, GradNorm::Host(0.0));
                    }
                }
                grad_scale = if clip > 0.0 && norm > clip { clip / norm } else { 1.0 } / factor;
                GradNorm::Host(norm)
            }
        };
        self.note_places(grads.places.take());
        let pieces = self.pieces();
        self.n_updates += 1;
        let mut take_out = TakeOut {
            optimizer: self,
            grads,
            lr,
            grad_scale,
            device_scale,
            pieces,
            paths: Vec::new(),
            params: Vec::new(),
        };
        let module = named::map(module, &mut take_out);
        let TakeOut { paths, params, pieces, .. } = take_out;
        let mut moved = BTreeMap::new();
        for (path, [param, m, v]) in paths.into_iter().zip(kernels::adamw_update(self.kernels, params)) {
            self.moments.insert(path.clone(), [m, v]);
            moved.insert(path, param);
        }
        (named::map(module, &mut PutBack { moved, pieces }), norm)
    }

    /// The norm of all gradients, on the device where nothing has to wait for it.
    pub(crate) fn norm_of(&self, grads: &Grads) -> GradNorm {
        if let Some(norm) = &grads.norm {
            return norm.clone();
        }
        let waits = self.scales_loss() || grads.are_on_host();
        match if waits { None } else { grads.norm_on_device() } {
            Some(norm) => GradNorm::Device(norm),
            None => GradNorm::Host(grads.norm(self.kernels)),
        }
    }

    /// Whether gradients that are not finite are nothing but a reason for a smaller factor on the loss.
    pub(crate) const fn scales_loss(&self) -> bool {
        self.loss_scale.is_some()
    }

    /// How many steps were made.
    pub const fn n_updates(&self) -> u64 {
        self.n_updates
    }

    /// The moments as `m.<path>` and `v.<path>`, for a checkpoint.
    pub fn to_named(&self) -> NamedTensors {
        let mut named = self.other_named();
        for (path, [m, v]) in &self.moments {
            named.insert(format!("m.{path}"), HostTensor::of(m));
            named.insert(format!("v.{path}"), HostTensor::of(v));
        }
        named
    }

    /// What a checkpoint has besides the moments.
    fn other_named(&self) -> NamedTensors {
        let mut named = NamedTensors::new();
        if let Some(LossScale { factor, n_good }) = self.loss_scale {
            let data = vec![factor as f32, n_good as f32];
            named.insert(LOSS_SCALE.to_owned(), HostTensor { shape: vec![2], data });
        }
        named
    }

    /// The optimiser as it was after `n_updates` steps.
    ///
    /// # Errors
    /// If a moment lacks its partner.
    pub fn from_named(
        config: &OptimizerConfig,
        kernels: Kernels,
        n_updates: u64,
        mut named: NamedTensors,
        device: &Device,
    ) -> Result<Self, OptimizerStateError> {
        let mut moments = BTreeMap::new();
        let loss_scale = named.remove(LOSS_SCALE).and_then(|saved| match saved.data[..] {
            [factor, n_good] => Some(LossScale { factor: f64::from(factor), n_good: n_good as u64 }),
            _ => None,
        });
        while let Some((name, m)) = named.pop_first() {
            let path = name.strip_prefix("m.").map(str::to_owned);
            let pair = path.and_then(|path| Some((named.remove(&format!("v.{path}"))?, path)));
            let Some((v, path)) = pair else {
                return Err(OptimizerStateError::Unpaired { name });
            };
            let flat = |t: HostTensor| Tensor::from_data(TensorData::new(t.data, t.shape), device);
            moments.insert(path, [flat(m), flat(v)]);
        }
        Ok(Self { n_updates, moments, loss_scale, ..Self::new(config, kernels) })
    }
}

/// Takes the parameters that have gradients out of a module: they can be updated in place where nothing else holds
/// them. [`PutBack`] ends it.
struct TakeOut<'a> {
    optimizer: &'a mut AdamW,
    grads: Grads,
    lr: f64,
    grad_scale: f64,
    /// The clip where the norm is not known on the host, `[1]`.
    device_scale: Option<Tensor<1>>,
    /// Of parameters of which a piece alone is moved.
    pieces: BTreeMap<String, Range<usize>>,
    /// The path of each of `params`.
    paths: Vec<String>,
    params: Vec<AdamWParam>,
}

impl ParamMapper for TakeOut<'_> {
    fn map<const D: usize>(&mut self, path: String, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(grad) = self.grads.by_path.remove(&path) else {
            return param;
        };
        let grad = match &self.device_scale {
            Some(scale) => grad * scale.clone(),
            None => grad,
        };
        let config = &self.optimizer.config;
        let role = role_of(&path).unwrap_or_else(|| panic!("parameter `{path}` has no row in the table"));
        let step = AdamWStep {
            lr: self.lr,
            beta_1: config.betas[0],
            beta_2: config.betas[1],
            eps: self.optimizer.style.eps_at(config.eps, config.betas[1], self.optimizer.n_updates),
            weight_decay: if role.decays() { config.weight_decay } else { 0.0 },
            step: self.optimizer.n_updates,
            grad_scale: self.grad_scale,
        };
        let (id, value, mapper) = param.consume();
        let shape = value.dims();
        let n = shape.iter().product::<usize>();
        let piece = self.pieces.get(&path);
        // The rest of a piece stays where it is.
        let whole = piece.map(|_| value.clone());
        let value = value.inner().reshape([n]);
        let value = match piece {
            Some(range) => value.narrow(0, range.start, range.len()),
            None => value,
        };
        let n = value.dims()[0];
        let [m, v] = self.optimizer.moments.remove(&path).unwrap_or_else(|| {
            let zeros = || Tensor::zeros([n], &value.device());
            [zeros(), zeros()]
        });
        // One number, seen in the parameter's shape.
        let empty = || Tensor::from_inner(Tensor::<1>::empty([1], &value.device()).expand(shape));
        let stand_in = whole.unwrap_or_else(empty);
        self.paths.push(path);
        self.params.push(AdamWParam { param: value, grad, m, v, step });
        Param::from_mapped_value(id, stand_in, mapper)
    }
}

/// Puts back, updated, the parameters that [`TakeOut`] took.
struct PutBack {
    moved: BTreeMap<String, Tensor<1>>,
    /// Of parameters of which a piece alone was moved.
    pieces: BTreeMap<String, Range<usize>>,
}

impl ParamMapper for PutBack {
    fn map<const D: usize>(&mut self, path: String, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(value) = self.moved.remove(&path) else {
            return param;
        };
        let (id, stand_in, mapper) = param.consume();
        let shape = stand_in.dims();
        let value = match self.pieces.remove(&path) {
            Some(range) => {
                let n = shape.iter().product::<usize>();
                stand_in.inner().reshape([n]).slice_assign([range], value)
            }
            None => value,
        };
        Param::from_mapped_value(id, Tensor::from_inner(value.reshape(shape)).require_grad(), mapper)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_factor_on_the_loss_halves_on_overflow_and_doubles_after_many_good_steps() {
        let mut scale = LossScale::START;
        scale.note(false);
        assert_eq!(scale, LossScale { factor: 32_768.0, n_good: 0 });
        (0..LossScale::GROWTH_INTERVAL).for_each(|_| scale.note(true));
        assert_eq!(scale, LossScale { factor: 65_536.0, n_good: 0 });
        (0..40).for_each(|_| scale.note(false));
        assert_eq!(scale.factor, 1.0);
    }
}
