//! Frozen weights in bf16: each operation gives the bits that it gives of the same numbers in f32.

use burn::tensor::{DType, Device, FloatDType, Tensor};

use super::*;
use crate::{Adapted, GatedWeights, LowRank, adapted_linear, gated_mlp_add_rms_norm, lookup, project_add_rms_norm};

/// Rows of a product around the edges between its loops.
const ROWS: [usize; 12] = [1, 2, 3, 4, 5, 8, 16, 17, 33, 64, 65, 130];

/// Width and length of a weight: odd, of whole registers, and beyond the second cache.
const SIZES: [[usize; 2]; 5] = [[1, 1], [7, 5], [33, 65], [64, 96], [301, 520]];

/// A weight in bf16 with `d_in` inputs.
fn weight(seed: u64, [d_in, d_out]: [usize; 2], device: &Device) -> Tensor<2> {
    let numbers: Vec<f32> = normals(seed, d_in * d_out).into_iter().map(|x| x / (d_in as f32).sqrt()).collect();
    leaf(&numbers, device).reshape([d_in, d_out]).cast(FloatDType::BF16)
}

/// An operation of a tracked `x`, `[n, d]`, and weights that are not.
type Op<'a> = dyn Fn(Kernels, Tensor<2>, &[Tensor<2>]) -> Tensor<1> + 'a;

/// Result and gradient of `x` for weights in bf16 and in f32: fused the same bits, plain the same but for rounding.
#[track_caller]
fn assert_same_bits(case: &str, op: &Op<'_>, [n, d]: [usize; 2], weights: &[Tensor<2>]) {
    let run = |kernels, weights: &[Tensor<2>]| {
        let x = leaf(&normals(5, n * d), &Device::flex().autodiff()).require_grad();
        let out = op(kernels, x.clone().reshape([n, d]), weights);
        let cotangent = leaf(&normals(6, out.dims()[0]), &x.device());
        let grads = (out.clone() * cotangent).sum().backward();
        (host(out), host(x.grad(&grads).expect("x has a gradient")))
    };
    let widened: Vec<Tensor<2>> = weights.iter().map(|weight| weight.clone().cast(FloatDType::F32)).collect();
    let (fused, fused_grad) = run(Kernels::Fused, weights);
    let bits = |numbers: &[f32]| numbers.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    let (expected, expected_grad) = run(Kernels::Fused, &widened);
    assert!(bits(&fused) == bits(&expected), "{case}: the result is another");
    assert!(bits(&fused_grad) == bits(&expected_grad), "{case}: the gradient is another");
    let (plain, plain_grad) = run(Kernels::Plain, weights);
    assert_near(case, &plain, &fused, VALUE * largest(&fused).max(1.0));
    assert_near(case, &plain_grad, &fused_grad, GRADIENT * largest(&fused_grad).max(0.1));
}

/// A weight with thin matrices in f32 beside it.
fn adapted(weight: &Tensor<2>) -> Adapted {
    let ([d_in, d_out], device) = (weight.dims(), weight.device());
    let a = leaf(&normals(9, d_in * 2), &device).reshape([d_in, 2]);
    let b = leaf(&normals(10, 2 * d_out), &device).reshape([2, d_out]);
    let low_rank = LowRank { a, b, parts: std::iter::once(0..d_out).collect(), scale: 0.5 };
    Adapted { weight: weight.clone(), low_rank: Some(low_rank) }
}

fn flat<const D: usize>(x: Tensor<D>) -> Tensor<1> {
    let n = x.shape().num_elements();
    x.reshape([n])
}

#[test]
fn linear_layers_have_the_bits_of_f32() {
    let device = Device::flex().autodiff();
    for [d_in, d_out] in SIZES {
        let weights = [weight(1, [d_in, d_out], &device)];
        let transposed = [weight(2, [d_out, d_in], &device).transpose()];
        let bias = leaf(&normals(3, d_out), &device);
        for n in ROWS {
            let case = format!("{n} rows, [{d_in}, {d_out}]");
            let with_bias = |kernels, x, w: &[Tensor<2>]| flat(linear(kernels, x, w[0].clone(), Some(bias.clone())));
            assert_same_bits(&case, &with_bias, [n, d_in], &weights);
            let without = |kernels, x, w: &[Tensor<2>]| flat(linear(kernels, x, w[0].clone(), None));
            assert_same_bits(&case, &without, [n, d_in], &transposed);
        }
    }
}

#[test]
fn a_head_gives_the_bits_of_f32() {
    let device = Device::flex().autodiff();
    for [d, vocab_size] in SIZES {
        let heads = [weight(1, [vocab_size, d], &device)];
        for n in ROWS {
            let targets = int_tensor(&integers(4, n, vocab_size), [n], &device);
            let case = format!("{n} rows, {vocab_size} tokens of {d}");
            let of_logits = |kernels, x, w: &[Tensor<2>]| flat(logits(kernels, x, w[0].clone()));
            assert_same_bits(&case, &of_logits, [n, d], &heads);
            let of_log_probs =
                |kernels, x, w: &[Tensor<2>]| token_log_probs(kernels, x, w[0].clone(), targets.clone(), 0.7);
            assert_same_bits(&case, &of_log_probs, [n, d], &heads);
            let loss = |kernels, x, w: &[Tensor<2>]| cross_entropy(kernels, x, w[0].clone(), targets.clone(), 3.0);
            assert_same_bits(&case, &loss, [n, d], &heads);
        }
    }
}

#[test]
fn logits_of_many_rows_of_a_large_vocabulary_have_the_bits_of_f32() {
    // More than are widened at a time.
    let head = weight(1, [4100, 17], &Device::flex().autodiff());
    let op = |kernels, x, w: &[Tensor<2>]| flat(logits(kernels, x, w[0].clone()));
    assert_same_bits("many rows", &op, [70, 17], &[head]);
}

#[test]
fn embeddings_have_the_bits_of_f32() {
    let device = Device::flex();
    let (tokens, table) = (weight(1, [50, 33], &device), leaf(&normals(2, 9 * 33), &device).reshape([9, 33]));
    let widened = tokens.clone().cast(FloatDType::F32);
    let ids = int_tensor(&integers(3, 18, 50), [2, 9], &device);
    for kernels in [Kernels::Fused, Kernels::Plain] {
        let [narrow, wide] = [&tokens, &widened].map(|tokens| {
            let placed = embed(kernels, tokens.clone(), table.clone(), ids.clone(), None, 0);
            let alone = lookup(kernels, tokens.clone(), ids.clone());
            assert_eq!((placed.dtype(), alone.dtype()), (DType::F32, DType::F32));
            (host(placed), host(alone))
        });
        assert_eq!(narrow, wide);
    }
}

#[test]
fn blocks_have_the_bits_of_f32() {
    let device = Device::flex().autodiff();
    let (d, d_ff) = (33, 65);
    let [gamma, beta, bias] = [1, 2, 3].map(|seed| leaf(&normals(seed, d), &device));
    let up_bias = leaf(&normals(4, d_ff), &device);
    let weights = [weight(5, [d, d_ff], &device), weight(6, [d, d_ff], &device), weight(7, [d_ff, d], &device)];
    let square = [weight(8, [d, d], &device)];
    let norm = NormWeights { gamma: gamma.clone(), beta, eps: 1e-5 };
    for n in [1, 24, 150] {
        let case = format!("{n} rows");
        let gated = |kernels, x: Tensor<2>, w: &[Tensor<2>]| {
            let [gate, up, down] = [0, 1, 2].map(|i| w[i].clone().into());
            let weights = GatedWeights { gate, up, down };
            both(gated_mlp_add_rms_norm(kernels, x.clone(), weights, x, gamma.clone(), 1e-5), true)
        };
        assert_same_bits(&case, &gated, [n, d], &weights);
        let gated_adapted = |kernels, x: Tensor<2>, w: &[Tensor<2>]| {
            let [gate, up, down] = [0, 1, 2].map(|i| adapted(&w[i]));
            let weights = GatedWeights { gate, up, down };
            both(gated_mlp_add_rms_norm(kernels, x.clone(), weights, x, gamma.clone(), 1e-5), true)
        };
        assert_same_bits(&format!("{case}, adapted"), &gated_adapted, [n, d], &weights);
        let mlp = |kernels, x: Tensor<2>, w: &[Tensor<2>]| {
            let up = Affine { weight: w[0].clone(), bias: up_bias.clone() };
            let down = Affine { weight: w[2].clone(), bias: bias.clone() };
            both(mlp_add_norm(kernels, x.clone(), up, Activation::GeluTanh, down, x, norm.clone()), true)
        };
        assert_same_bits(&case, &mlp, [n, d], &weights);
        let projection = |kernels, x: Tensor<2>, w: &[Tensor<2>]| {
            both(project_add_rms_norm(kernels, x.clone(), w[0].clone().into(), x, gamma.clone(), 1e-5), true)
        };
        assert_same_bits(&case, &projection, [n, d], &square);
        let linear_adapted = |kernels, x: Tensor<2>, w: &[Tensor<2>]| {
            flat(adapted_linear(kernels, x, adapted(&w[0]), Some(bias.clone())))
        };
        assert_same_bits(&format!("{case}, adapted"), &linear_adapted, [n, d], &square);
        let kept = |kernels, x: Tensor<2>, w: &[Tensor<2>]| {
            let layer = || Affine { weight: w[0].clone(), bias: bias.clone() };
            let (x, residual) = linear_keeping(kernels, x, layer());
            both(project_add_norm(kernels, x, layer(), residual, norm.clone()), true)
        };
        assert_same_bits(&case, &kept, [n, d], &square);
    }
}

#[test]
fn products_in_bf16_do_not_depend_on_the_number_of_threads() {
    let (n, d, vocab_size) = (200, 96, 1000);
    let run = |n_threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().expect("a thread pool");
        pool.install(|| {
            let device = Device::flex();
            let weight = weight(1, [d, vocab_size], &device);
            let x = |n: usize| leaf(&normals(2, n * d), &device).reshape([n, d]);
            let head = weight.clone().transpose();
            let of =
                |n| [linear(Kernels::Fused, x(n), weight.clone(), None), logits(Kernels::Fused, x(n), head.clone())];
            [of(2), of(8), of(40), of(n)].map(|both| both.map(host))
        })
    };
    let one = run(1);
    assert_eq!(one, run(2));
    assert_eq!(one, run(3));
}

#[test]
#[should_panic(expected = "a weight in BF16 is frozen")]
fn a_weight_in_bf16_takes_no_gradient() {
    let device = Device::flex().autodiff();
    let x = leaf(&normals(1, 8), &device).reshape([2, 4]);
    let _ = linear(Kernels::Fused, x, weight(2, [4, 4], &device).require_grad(), None);
}
