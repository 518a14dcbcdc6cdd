//! `act(x + b)` and its gradients, the bias gradient in the same pass; and a gate times what it lets through.

use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::gemm::SharedMut;
use super::linear::add_in_order;
use super::simd::{fma, sigmoid, simd};
use super::workers::for_each;
use super::{contiguous, exclusive, floats, matrix_dims, tensor, unset};
use crate::Activation;

/// Rows handled by one task.
const ROWS: usize = 64;

/// Numbers of a gate handled by one task.
const GATED: usize = 1 << 13;

/// `2 · √(2/π)`: GELU is `x · σ(SLOPE · (x + CUBIC · x³))`, as `(1 + tanh u) / 2 = σ(2u)`.
const SLOPE: f32 = 1.595_769;
/// The cubic coefficient of the tanh approximation.
const CUBIC: f32 = 0.044_715;

/// `act(x + b)`.
pub fn forward(x: &FlexTensor, bias: &FlexTensor, activation: Activation) -> FlexTensor {
    let shape = x.layout().shape().clone();
    let (_, d) = matrix_dims(x);
    let (x, bias) = (contiguous(x), contiguous(bias));
    let (x, bias) = (floats(&x), floats(&bias));
    let mut out = unset(x.len());
    out.par_chunks_mut(d * ROWS)
        .zip(x.par_chunks(d * ROWS))
        .for_each(|(out, x)| bias_activation_rows(out, x, bias, activation));
    tensor(out, shape)
}

/// `act(x + b)`, row by row.
pub fn bias_activation_rows(out: &mut [f32], x: &[f32], bias: &[f32], activation: Activation) {
    match activation {
        Activation::Relu => relu_rows(out, x, bias),
        Activation::GeluTanh => gelu_rows(out, x, bias),
        Activation::Gelu | Activation::Silu => unreachable!("it has no fused body"),
    }
}

/// `silu(gate) · up`.
pub fn gate(gate: &FlexTensor, up: &FlexTensor) -> FlexTensor {
    let shape = gate.layout().shape().clone();
    let (gate, up) = (contiguous(gate), contiguous(up));
    let (gate, up) = (floats(&gate), floats(&up));
    let mut out = unset(gate.len());
    gate_into(&mut out, gate, up);
    tensor(out, shape)
}

/// `out = silu(gate) · up`.
pub fn gate_into(out: &mut [f32], gate: &[f32], up: &[f32]) {
    let shared = SharedMut::new(out);
    for_each(gate.len().div_ceil(GATED), |i| {
        let (first, n) = (i * GATED, GATED.min(gate.len() - i * GATED));
        // SAFETY: tasks have different numbers.
        silu_gate(unsafe { shared.slice(first, n) }, &gate[first..first + n], &up[first..first + n]);
    });
}

/// Gradients of `gate` and `up`.
pub fn gate_backward(gate: FlexTensor, up: FlexTensor, grad: FlexTensor) -> [FlexTensor; 2] {
    let [mut gate, mut up, mut grad] = [gate, up, grad].map(exclusive);
    let gates = gate.storage_mut::<f32>().par_chunks_mut(GATED).zip(up.storage_mut::<f32>().par_chunks_mut(GATED));
    grad.storage_mut::<f32>().par_chunks_mut(GATED).zip(gates).for_each(|(grad, (gate, up))| {
        silu_gate_backward(grad, gate, up);
    });
    [gate, up]
}

/// Gradients of `x` and of the bias.
pub fn backward(
    x: &FlexTensor,
    bias: &FlexTensor,
    activation: Activation,
    grad: &FlexTensor,
) -> (FlexTensor, FlexTensor) {
    let shape = x.layout().shape().clone();
    let (_, d) = matrix_dims(x);
    let (x, bias, grad) = (contiguous(x), contiguous(bias), contiguous(grad));
    let (x, bias, grad) = (floats(&x), floats(&bias), floats(&grad));
    let mut x_grad = unset(x.len());
    let parts: Vec<Vec<f32>> = x_grad
        .par_chunks_mut(d * ROWS)
        .zip(x.par_chunks(d * ROWS))
        .zip(grad.par_chunks(d * ROWS))
        .map(|((x_grad, x), grad)| {
            let mut bias_grad = vec![0.0; d];
            match activation {
                Activation::Relu => relu_grads(x_grad, &mut bias_grad, x, bias, grad),
                Activation::GeluTanh => gelu_grads(x_grad, &mut bias_grad, x, bias, grad),
                Activation::Gelu | Activation::Silu => unreachable!("it has no fused body"),
            }
            bias_grad
        })
        .collect();
    (tensor(x_grad, shape), tensor(add_in_order(parts, d), [d]))
}

/// A non-linearity, in a form that is sure to be inlined where a function passed as an argument is not.
trait Function {
    /// `f(x)`
    fn value(x: f32) -> f32;
    /// `f′(x)`
    fn slope(x: f32) -> f32;
}

struct Relu;

impl Function for Relu {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        // Not `max`, which would turn a NaN into 0.
        if x < 0.0 { 0.0 } else { x }
    }

    #[inline(always)]
    fn slope(x: f32) -> f32 {
        if x > 0.0 { 1.0 } else { 0.0 }
    }
}

struct Gelu;

impl Function for Gelu {
    #[inline(always)]
    fn value(x: f32) -> f32 {
        x * sigmoid(SLOPE * fma(CUBIC * x * x, x, x))
    }

    #[inline(always)]
    fn slope(x: f32) -> f32 {
        Self::value_and_slope(x).1
    }
}

struct Silu;

impl Silu {
    #[inline(always)]
    fn value_and_slope(x: f32) -> (f32, f32) {
        let s = sigmoid(x);
        let value = x * s;
        // σ + x σ (1 − σ)
        (value, fma(value, 1.0 - s, s))
    }
}

impl Gelu {
    #[inline(always)]
    fn value_and_slope(x: f32) -> (f32, f32) {
        // Beyond 30 the slope is 0 or 1 to the last bit, and the cube could overflow.
        let near = x.clamp(-30.0, 30.0);
        let square = near * near;
        let s = sigmoid(SLOPE * fma(CUBIC * near * near, near, near));
        let inner_slope = fma(3.0 * CUBIC * SLOPE, square, SLOPE);
        (x * s, fma(near * inner_slope, s * (1.0 - s), s))
    }
}

simd! {
    /// `max(x, 0)` in place.
    pub fn relu(x: &mut [f32]) {
        for x in x {
            *x = Relu::value(*x);
        }
    }

    /// `gelu(x)`.
    pub fn gelu(out: &mut [f32], x: &[f32]) {
        for (out, x) in out.iter_mut().zip(x) {
            *out = Gelu::value(*x);
        }
    }

    /// Turns gradients of `active = relu(x)` into those of `x`, and adds their rows to `bias_grad`.
    pub fn relu_backward(grad: &mut [f32], bias_grad: &mut [f32], active: &[f32]) {
        let d = bias_grad.len();
        for (grad, active) in grad.chunks_exact_mut(d).zip(active.chunks_exact(d)) {
            for ((grad, bias_grad), active) in grad.iter_mut().zip(bias_grad.iter_mut()).zip(active) {
                *grad *= Relu::slope(*active);
                *bias_grad += *grad;
            }
        }
    }

    /// Turns gradients of `gelu(x)` into those of `x`, adds their rows to `bias_grad`, and turns `x` into `gelu(x)`.
    pub fn gelu_backward(grad: &mut [f32], bias_grad: &mut [f32], x: &mut [f32]) {
        let d = bias_grad.len();
        for (grad, x) in grad.chunks_exact_mut(d).zip(x.chunks_exact_mut(d)) {
            for ((grad, bias_grad), x) in grad.iter_mut().zip(bias_grad.iter_mut()).zip(x) {
                let (value, slope) = Gelu::value_and_slope(*x);
                *grad *= slope;
                *bias_grad += *grad;
                *x = value;
            }
        }
    }

    /// `silu(gate) · up`.
    pub fn silu_gate(out: &mut [f32], gate: &[f32], up: &[f32]) {
        for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
            *out = gate * sigmoid(*gate) * up;
        }
    }

    /// Turns gradients of `silu(gate) · up` into its values, and `gate` and `up` into their gradients.
    pub fn silu_gate_backward(grad: &mut [f32], gate: &mut [f32], up: &mut [f32]) {
        for ((grad, gate), up) in grad.iter_mut().zip(gate).zip(up) {
            let (value, slope) = Silu::value_and_slope(*gate);
            let active = value * *up;
            *gate = *grad * *up * slope;
            *up = *grad * value;
            *grad = active;
        }
    }

    fn relu_rows(out: &mut [f32], x: &[f32], bias: &[f32]) {
        map_rows::<Relu>(out, x, bias);
    }

    fn gelu_rows(out: &mut [f32], x: &[f32], bias: &[f32]) {
        map_rows::<Gelu>(out, x, bias);
    }

    fn relu_grads(x_grad: &mut [f32], bias_grad: &mut [f32], x: &[f32], bias: &[f32], grad: &[f32]) {
        chain_rows::<Relu>(x_grad, bias_grad, x, bias, grad);
    }

    fn gelu_grads(x_grad: &mut [f32], bias_grad: &mut [f32], x: &[f32], bias: &[f32], grad: &[f32]) {
        chain_rows::<Gelu>(x_grad, bias_grad, x, bias, grad);
    }
}

/// `out = f(x + bias)`, row by row.
#[inline(always)]
fn map_rows<F: Function>(out: &mut [f32], x: &[f32], bias: &[f32]) {
    let d = bias.len();
    for (out, x) in out.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
        for ((out, x), bias) in out.iter_mut().zip(x).zip(bias) {
            *out = F::value(x + bias);
        }
    }
}

/// `x_grad = grad · f′(x + bias)`, row by row, and adds the rows to `bias_grad`.
#[inline(always)]
fn chain_rows<F: Function>(x_grad: &mut [f32], bias_grad: &mut [f32], x: &[f32], bias: &[f32], grad: &[f32]) {
    let d = bias.len();
    for ((x_grad, x), grad) in x_grad.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(grad.chunks_exact(d)) {
        for ((((x_grad, bias_grad), x), bias), grad) in
            x_grad.iter_mut().zip(bias_grad.iter_mut()).zip(x).zip(bias).zip(grad)
        {
            let chained = grad * F::slope(x + bias);
            *x_grad = chained;
            *bias_grad += chained;
        }
    }
}
