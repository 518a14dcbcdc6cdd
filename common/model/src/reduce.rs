//! Sums and lists over the micro-batches of a step, wherever each was computed.

use burn::tensor::{Device, Tensor, TensorData};
use group::{Group, GroupError};

use crate::HostTensor;
use crate::optim::Grads;

/// The gradients of an optimiser step: the sum over its micro-batches in their order, of which every rank adds its share.
///
/// The sum is `((g₁ + g₂) + g₃) + …` whatever the number of ranks, so that this changes no bit. The price is memory: the
/// first rank keeps one sum, every other one the gradients of each of its micro-batches, on the host.
#[derive(Debug)]
pub struct GradSum {
    group: Group,
    /// The sum of this rank's micro-batches, where it is the first.
    sum: Grads,
    /// Otherwise those of each micro-batch, all parameters one behind the other.
    own: Vec<Vec<f32>>,
    /// Path and size of each parameter.
    sizes: Vec<(String, usize)>,
    device: Option<Device>,
}

impl GradSum {
    /// The sum of nothing yet.
    pub fn new(group: &Group) -> Self {
        Self { group: group.clone(), sum: Grads::default(), own: Vec::new(), sizes: Vec::new(), device: None }
    }

    /// Adds the gradients of the next micro-batch of this rank.
    pub fn add(&mut self, grads: Grads) {
        if self.group.is_first() {
            self.sum = std::mem::take(&mut self.sum).plus(grads);
        } else {
            let flat = self.flat(grads);
            self.own.push(flat);
        }
    }

    /// The sum over all ranks.
    ///
    /// # Errors
    /// If a rank has ended.
    ///
    /// # Panics
    /// In a group, if this rank had no micro-batch.
    pub fn total(mut self) -> Result<Grads, GroupError> {
        if self.group.is_alone() {
            return Ok(self.sum);
        }
        if self.group.is_first() {
            let sum = std::mem::take(&mut self.sum);
            let flat = self.flat(sum);
            self.own.push(flat);
        }
        let total = self.group.sum_in_order(self.own)?;
        let device = self.device.expect("every rank has a micro-batch");
        let mut rest = total.as_slice();
        let of_parameters = self.sizes.into_iter().map(|(path, size)| {
            let (grad, others) = rest.split_at(size);
            rest = others;
            (path, Tensor::from_data(TensorData::new(grad.to_vec(), [size]), &device))
        });
        Ok(Grads::from_flat(of_parameters.collect()))
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
