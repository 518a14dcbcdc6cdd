//! Sums and lists over the micro-batches of a step, wherever each was computed.

use burn::module::Module;
use burn::tensor::{Device, Tensor, TensorData};
use group::{Group, GroupError, Pieces};
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
    /// Otherwise those of each micro-batch, a piece for each parameter.
    own: Vec<Pieces>,
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
            let own = self.on_host(grads);
            self.own.push(own);
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
            let own = self.on_host(sum);
            self.own.push(own);
        }
        let group = self.group.clone();
        let (grads, is_finite) = self.reduced(optimizer)?;
        let norm = optimizer.norm_of(&grads);
        if norm.known().is_some_and(|norm| !norm.is_finite()) && !optimizer.scales_loss() {
            let all = group.gather(is_finite)?;
            for (rank, _) in all.iter().enumerate().filter(|(_, is_finite)| !**is_finite) {
                tracing::warn!("a gradient that rank {rank} computed is not finite");
            }
        }
        Ok(grads.with_norm(norm))
    }

    /// What comes of the exchange, and whether what this rank gave was finite.
    fn reduced(self, optimizer: &AdamW) -> Result<(Grads, bool), GroupError> {
        let Self { group, reduce, own, sizes, device, .. } = self;
        let device = device.expect("every rank has a micro-batch");
        let places = Places::of(sizes);
        let (n, share) = (places.n(), group.share().of(places.n()));
        let mut is_finite = true;
        let look = |numbers: &[f32]| is_finite &= are_finite(numbers);
        let (part, norm) = match (reduce, optimizer.is_shared()) {
            (Reduce::Ordered, false) => {
                let sum = group.sum_in_order(own, look)?;
                return Ok((Grads::from_flat(places.of_pieces(sum, &device)), is_finite));
            }
            (Reduce::Fast, false) => {
                let own = only(own, look);
                let sum = group.sum(own)?;
                return Ok((Grads::from_flat(places.tensors(0..n, &sum, &device)), is_finite));
            }
            (Reduce::Ordered, true) => {
                // As it is without parts: of all at once, and to the bit.
                let measure = |sum| {
                    let sum = Grads::from_flat(places.of_pieces(sum, &device));
                    let norm = optimizer.norm_of(&sum).value();
                    (sum.into_flat().into_values().map(into_numbers).collect::<Vec<_>>().into(), norm)
                };
                let (part, norm) = group.sum_in_order_by_parts(own, look, measure)?;
                let is_known = optimizer.scales_loss() || kernels::is_on_host(&Tensor::<1>::zeros([1], &device));
                (part, if is_known { GradNorm::Host(norm) } else { on_device(norm, &device) })
            }
            (Reduce::Fast, true) => {
                let part = group.sum_by_parts(only(own, look))?;
                let squares: f64 = part.iter().map(|&x| f64::from(x).powi(2)).sum();
                (part, GradNorm::Host(group.gather(squares)?.iter().sum::<f64>().sqrt()))
            }
        };
        let part = Grads::from_flat(places.tensors(share, &part, &device));
        Ok((part.with_norm(norm).into_part_of(places), is_finite))
    }

    /// All gradients on the host, without a copy where they are there already.
    fn on_host(&mut self, grads: Grads) -> Pieces {
        let grads = grads.into_flat();
        self.device = grads.values().next().map(Tensor::device);
        self.sizes = grads.iter().map(|(path, grad)| (path.clone(), grad.dims()[0])).collect();
        grads.into_values().map(into_numbers).collect::<Vec<_>>().into()
    }
}

/// The numbers of a tensor, which nobody else has.
fn into_numbers(tensor: Tensor<1>) -> Vec<f32> {
    tensor.into_data().try_into_vec_as::<f32>().expect("the device can be read")
}

/// The sum of a rank whose micro-batches are summed already, in one piece.
fn only(own: Vec<Pieces>, look: impl FnMut(&[f32])) -> Vec<f32> {
    let own = own.into_iter().next().expect("every rank has a micro-batch");
    own.iter().for_each(look);
    own.flat()
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
