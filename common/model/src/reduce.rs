//! Sums and lists over the micro-batches of a step, wherever each was computed.

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use group::{Group, GroupError};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::HostTensor;
use crate::optim::{AdamW, GradNorm, Grads, Places};

/// How gradients are summed over processes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Reduce {
    /// Over the micro-batches in their order: the same weights, to the byte, with any number of processes.
    #[default]
    Ordered,
    /// Over those of a process first, then round a ring of the processes, each of which sends as much; another number of
    /// processes rounds otherwise.
    Fast,
}

/// The gradients of an optimiser step: the sum over its micro-batches, of which every rank adds its share.
///
/// In order it is `((g₁ + g₂) + g₃) + …` whatever the number of ranks, so that this changes no bit. The price is memory: the
/// first rank keeps one sum, every other one the gradients of each of its micro-batches, on the host.
#[derive(Debug)]
pub struct GradSum {
    group: Group,
    reduce: Reduce,
    /// The sum of this rank's micro-batches, where it is the first or the order does not count.
    sum: Grads,
    /// Otherwise those of each micro-batch, all parameters one behind the other.
    own: Vec<Vec<f32>>,
    /// Path and size of each parameter.
    sizes: Vec<(String, usize)>,
    device: Option<Device>,
}

impl GradSum {
    /// The sum of nothing yet.
    pub fn new(group: &Group, reduce: Reduce) -> Self {
        let group = group.clone();
        Self { group, reduce, sum: Grads::default(), own: Vec::new(), sizes: Vec::new(), device: None }
    }

    /// Adds the gradients of the next micro-batch of this rank.
    pub fn add(&mut self, grads: Grads) {
        if self.group.is_first() || self.reduce == Reduce::Fast {
            self.sum = std::mem::take(&mut self.sum).plus(grads);
        } else {
            let flat = self.flat(grads);
            self.own.push(flat);
        }
    }

    /// A step of `optimizer` by the sum over all ranks, after which all have the same weights; and the sum's norm.
    ///
    /// # Errors
    /// If a rank has ended.
    ///
    /// # Panics
    /// As [`total`](Self::total).
    pub fn descend<M: Module>(self, optimizer: &mut AdamW, module: M, lr: f64) -> Result<(M, GradNorm), GroupError> {
        let group = self.group.clone();
        let grads = self.total(optimizer)?;
        let (module, norm) = optimizer.step(module, grads, lr);
        Ok((optimizer.share_weights(&group, module)?, norm))
    }

    /// The sum over all ranks, for a step of `optimizer`: with its norm, and where that is shared, of this rank's part.
    ///
    /// # Errors
    /// If a rank has ended.
    ///
    /// # Panics
    /// In a group, if this rank had no micro-batch.
    pub fn total(mut self, optimizer: &AdamW) -> Result<Grads, GroupError> {
        if self.group.is_alone() {
            return Ok(self.sum);
        }
        if self.group.is_first() || self.reduce == Reduce::Fast {
            let sum = std::mem::take(&mut self.sum);
            let flat = self.flat(sum);
            self.own.push(flat);
        }
        let is_finite = self.own.iter().all(|grads| are_finite(grads));
        let group = self.group.clone();
        let grads = self.reduced(optimizer)?;
        let norm = optimizer.norm_of(&grads);
        if norm.known().is_some_and(|norm| !norm.is_finite()) && !optimizer.scales_loss() {
            let all = group.gather(is_finite)?;
            for (rank, _) in all.iter().enumerate().filter(|(_, is_finite)| !**is_finite) {
                tracing::warn!("a gradient that rank {rank} computed is not finite");
            }
        }
        Ok(grads.with_norm(norm))
    }

    /// What comes of the exchange.
    fn reduced(self, optimizer: &AdamW) -> Result<Grads, GroupError> {
        let Self { group, reduce, own, sizes, device, .. } = self;
        let device = device.expect("every rank has a micro-batch");
        let places = Places::of(sizes);
        let (n, share) = (places.n(), group.share().of(places.n()));
        let whole = |sum: &[f32]| Grads::from_flat(places.tensors(0..n, sum, &device));
        let (part, norm) = match (reduce, optimizer.is_shared()) {
            (Reduce::Ordered, false) => return Ok(whole(&group.sum_in_order(own)?)),
            (Reduce::Fast, false) => return Ok(whole(&group.sum(only(own))?)),
            (Reduce::Ordered, true) => {
                // As it is without parts: of all at once, and to the bit.
                let (part, norm) = group.sum_in_order_by_parts(own, |sum| optimizer.norm_of(&whole(sum)).value())?;
                let is_known = optimizer.scales_loss() || kernels::is_on_host(&Tensor::<1>::zeros([1], &device));
                (part, if is_known { GradNorm::Host(norm) } else { on_device(norm, &device) })
            }
            (Reduce::Fast, true) => {
                let part = group.sum_by_parts(only(own))?;
                let squares: f64 = part.iter().map(|&x| f64::from(x).powi(2)).sum();
                (part, GradNorm::Host(group.gather(squares)?.iter().sum::<f64>().sqrt()))
            }
        };
        let part = Grads::from_flat(places.tensors(share, &part, &device));
        Ok(part.with_norm(norm).into_part_of(places))
    }

    /// All gradients on the host, one parameter behind the other.
    fn flat(&mut self, grads: Grads) -> Vec<f32> {
        let grads = grads.into_flat();
        self.device = grads.values().next().map(Tensor::device);
        let mut flat = Vec::with_capacity(grads.values().map(|grad| grad.dims()[0]).sum());
        self.sizes.clear();
        for (path, grad) in grads {
            let data = HostTensor::of(&grad).data;
            self.sizes.push((path, data.len()));
            flat.extend(data);
        }
        flat
    }
}

/// The sum of a rank whose micro-batches are summed already.
fn only(own: Vec<Vec<f32>>) -> Vec<f32> {
    own.into_iter().next().expect("every rank has a micro-batch")
}

/// Whether all are; the largest pattern of bits without its sign tells, and is found in one pass.
fn are_finite(numbers: &[f32]) -> bool {
    numbers.iter().fold(0, |largest, x| largest.max(x.to_bits() & 0x7fff_ffff)) < f32::INFINITY.to_bits()
}

/// A norm that was read from the last rank's device.
fn on_device(norm: f64, device: &Device) -> GradNorm {
    GradNorm::Device(Tensor::from_floats([norm as f32], device))
}

/// The tensors of all ranks in their order, on the device of this rank's `own`; without other ranks `own` itself.
///
/// # Errors
/// If a rank has ended.
///
/// # Panics
/// If the device cannot be read.
pub fn in_order(group: &Group, own: Vec<Tensor<1>>) -> Result<Vec<Tensor<1>>, GroupError> {
    if group.is_alone() {
        return Ok(own);
    }
    let device = own.first().map(Tensor::device).unwrap_or_default();
    let on_host: Vec<Vec<f32>> = own.iter().map(|tensor| HostTensor::of(tensor).data).collect();
    let of_numbers = |numbers: Vec<f32>| {
        let n = numbers.len();
        Tensor::from_data(TensorData::new(numbers, [n]), &device)
    };
    Ok(group.gather(on_host)?.into_iter().flatten().map(of_numbers).collect())
}
