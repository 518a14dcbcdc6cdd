//! `AdamW` over all parameters in one pass, and the sum of squares of all gradients.

use burn::backend::Flex;
use burn::tensor::Tensor;
use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::simd::{LANES, fma, simd};
use super::{exclusive, floats};
use crate::{AdamWParam, AdamWStep};

/// Numbers handled by one task.
const CHUNK: usize = 16_384;

/// A tensor's numbers on the flex backend.
fn primitive(x: Tensor<1>) -> FlexTensor {
    x.try_into_primitive::<Flex>().expect("a tensor on the flex backend")
}

/// One step; tensors that nobody else holds are updated in place, others are copied first.
pub fn update(params: Vec<AdamWParam>) -> Vec<[Tensor<1>; 3]> {
    let mut states: Vec<([FlexTensor; 3], FlexTensor, Factors)> = params
        .into_iter()
        .map(|AdamWParam { param, grad, m, v, step }| {
            let state = [param, m, v].map(|x| exclusive(primitive(x)));
            (state, primitive(grad).to_contiguous(), Factors::new(&step))
        })
        .collect();
    let mut tasks = Vec::new();
    for (state, grad, factors) in &mut states {
        let [param, m, v] = state.each_mut().map(|x| x.storage_mut::<f32>().chunks_mut(CHUNK));
        let chunks = param.zip(m).zip(v).zip(floats(grad).chunks(CHUNK));
        tasks.extend(chunks.map(|(((param, m), v), grad)| (param, m, v, grad, *factors)));
    }
    tasks.into_par_iter().for_each(|(param, m, v, grad, factors)| update_chunk(param, m, v, grad, factors));
    states.into_iter().map(|(state, ..)| state.map(Tensor::from_primitive::<Flex>)).collect()
}

/// The numbers of a step, in f32.
#[derive(Clone, Copy)]
struct Factors {
    betas: [f32; 2],
    /// One minus each.
    rests: [f32; 2],
    /// Factor that decay leaves of a parameter.
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

/// `Σ x²` added in f64: each chunk in lanes, then the chunks in order.
pub fn sum_of_squares(tensors: &[Tensor<1>]) -> f64 {
    let tensors: Vec<FlexTensor> = tensors.iter().map(|x| primitive(x.clone()).to_contiguous()).collect();
    let chunks: Vec<&[f32]> = tensors.iter().flat_map(|x| floats(x).chunks(CHUNK)).collect();
    let parts: Vec<f64> = chunks.into_par_iter().map(squares).collect();
    parts.iter().sum()
}
