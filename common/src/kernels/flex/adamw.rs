//! `AdamW` over one flat parameter in one pass, and the sum of squares of a gradient.

use burn::backend::Flex;
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::simd::{LANES, fma, simd};
use super::{contiguous, exclusive, floats};
use crate::kernels::AdamWStep;

/// Numbers handled by one task.
const CHUNK: usize = 16_384;

/// One step; tensors that nobody else holds are updated in place, others are copied first.
pub fn update(
    param: FlexTensor,
    grad: &FlexTensor,
    m: FlexTensor,
    v: FlexTensor,
    step: &AdamWStep,
) -> (FlexTensor, FlexTensor, FlexTensor) {
    let grad = contiguous(grad);
    let [mut param, mut m, mut v] = [param, m, v].map(exclusive);
    let factors = Factors::new(step);
    param
        .storage_mut::<f32>()
        .par_chunks_mut(CHUNK)
        .zip(m.storage_mut::<f32>().par_chunks_mut(CHUNK))
        .zip(v.storage_mut::<f32>().par_chunks_mut(CHUNK))
        .zip(floats(&grad).par_chunks(CHUNK))
        .for_each(|(((param, m), v), grad)| {
            update_chunk(param, m, v, grad, factors);
        });
    (param, m, v)
}

/// The numbers of a step, in f32.
#[derive(Clone, Copy)]
struct Factors {
    betas: [f32; 2],
    /// One minus each.
    rests: [f32; 2],
    /// What decay leaves of a parameter.
    keep: f32,
    /// The learning rate over the first moment's correction.
    lr: f32,
    /// One over the root of the second moment's correction.
    inv_root_2: f32,
    eps: f32,
    grad_scale: f32,
}

impl Factors {
    fn new(step: &AdamWStep) -> Self {
        let [correction_1, correction_2] = step.corrections();
        Self {
            betas: [step.beta_1 as f32, step.beta_2 as f32],
            rests: [(1.0 - step.beta_1) as f32, (1.0 - step.beta_2) as f32],
            keep: (1.0 - step.lr * step.weight_decay) as f32,
            lr: (step.lr / correction_1) as f32,
            inv_root_2: (1.0 / correction_2.sqrt()) as f32,
            eps: step.eps as f32,
            grad_scale: step.grad_scale as f32,
        }
    }
}

simd! {
    fn update_chunk(param: &mut [f32], m: &mut [f32], v: &mut [f32], grad: &[f32], by: Factors) {
        for (((param, m), v), grad) in param.iter_mut().zip(m).zip(v).zip(grad) {
            let grad = grad * by.grad_scale;
            *m = fma(by.betas[0], *m, by.rests[0] * grad);
            *v = fma(by.betas[1], *v, by.rests[1] * grad * grad);
            *param = by.keep * *param - by.lr * *m / fma(v.sqrt(), by.inv_root_2, by.eps);
        }
    }

    /// `Σ x²` in f64 lanes.
    fn squares(x: &[f32]) -> f64 {
        let mut totals = [0.0f64; LANES];
        let (chunks, rest) = x.as_chunks::<LANES>();
        for chunk in chunks {
            for lane in 0..LANES {
                totals[lane] += f64::from(chunk[lane]) * f64::from(chunk[lane]);
            }
        }
        for (total, &x) in totals.iter_mut().zip(rest) {
            *total += f64::from(x) * f64::from(x);
        }
        totals.iter().sum()
    }
}

/// `Σ x²` of a tensor on the flex backend, added in f64.
pub fn sum_of_squares_of<const D: usize>(x: Tensor<D>) -> f64 {
    let x = if x.device().is_autodiff() { x.inner() } else { x };
    let x = x.try_into_primitive::<Flex>().expect("a tensor on the flex backend");
    sum_of_squares(floats(&contiguous(&x)))
}

/// `Σ x²` added in f64: each chunk in lanes, then the chunks in order.
fn sum_of_squares(x: &[f32]) -> f64 {
    let parts: Vec<f64> = x.par_chunks(CHUNK).map(squares).collect();
    parts.iter().sum()
}
