//! Each fused operation against its plain version, against finite differences, and against itself on other numbers
//! of threads.

use burn::tensor::{Device, Int, Tensor, TensorData};
use proptest::prelude::*;

mod batch;
mod bf16;
mod gated;
mod heads;
mod low_rank;
use super::{
    Activation, AdamWParam, AdamWStep, Affine, Kernels, NormWeights, adamw_update, add_layer_norm, attention,
    bias_activation, cross_entropy, embed, is_fused, layer_norm, linear, linear_keeping, logits, mlp_add_norm,
    project_add_norm, sum_of_squares, token_log_probs, token_log_probs_and_entropy,
};
use base::rng::Streams;

/// Values of order one, computed in another order of additions.
const VALUE: f32 = 1e-5;
/// Gradients, relative to the largest of their tensor: sums of up to a few thousand such values.
const GRADIENT: f32 = 1e-4;
/// A central difference in f32 with a step of 1e-2 has an error of about 1e-7 / 1e-2 from rounding and 1e-4 from
/// the third derivative, relative to the numbers summed.
const DIFFERENCE: f64 = 1e-2;

/// `n` standard normal numbers.
fn normals(seed: u64, n: usize) -> Vec<f32> {
    let mut rng = Streams::new(seed).get("kernels/tests", 0);
    (0..n).map(|_| rng.normal() as f32).collect()
}

/// `n` integers below `below`.
fn integers(seed: u64, n: usize, below: usize) -> Vec<usize> {
    let mut rng = Streams::new(seed).get("kernels/tests/integers", 0);
    (0..n).map(|_| rng.below(below)).collect()
}

fn int_tensor<const D: usize>(values: &[usize], shape: [usize; D], device: &Device) -> Tensor<D, Int> {
    let values: Vec<i64> = values.iter().map(|&value| value as i64).collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

fn leaf(values: &[f32], device: &Device) -> Tensor<1> {
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), device)
}

fn host<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().expect("an f32 tensor")
}

/// An operation from flat leaves to a flat output.
type Op<'a> = dyn Fn(Kernels, &[Tensor<1>]) -> Tensor<1> + Sync + 'a;

/// The output and the gradients of `Σ cotangent · output`.
fn run(op: &Op<'_>, kernels: Kernels, leaves: &[Vec<f32>]) -> (Vec<f32>, Vec<Vec<f32>>) {
    let device = Device::flex().autodiff();
    let leaves: Vec<Tensor<1>> = leaves.iter().map(|values| leaf(values, &device).require_grad()).collect();
    let out = op(kernels, &leaves);
    let n = out.dims()[0];
    let loss = (out.clone() * leaf(&normals(99, n), &device)).sum();
    let grads = loss.backward();
    let grads = leaves.iter().map(|leaf| host(leaf.grad(&grads).expect("each leaf has a gradient"))).collect();
    (host(out), grads)
}

/// `Σ cotangent · output` of the fused version, without autodiff.
fn fused_loss(op: &Op<'_>, leaves: &[Vec<f32>]) -> f64 {
    let device = Device::flex();
    let leaves: Vec<Tensor<1>> = leaves.iter().map(|values| leaf(values, &device)).collect();
    let out = host(op(Kernels::Fused, &leaves));
    out.iter().zip(normals(99, out.len())).map(|(out, cotangent)| f64::from(*out) * f64::from(cotangent)).sum()
}

fn assert_near(what: &str, found: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
        let close = (found - expected).abs() <= tolerance;
        assert!(close, "{what}[{i}]: {found}, expected {expected}, tolerance {tolerance}");
    }
}

fn largest(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |largest, x| largest.max(x.abs()))
}

/// Fused = plain in values and gradients, and the gradients are those of the fused forward.
fn assert_agrees(op: &Op<'_>, leaves: &[Vec<f32>]) {
    let (plain, plain_grads) = run(op, Kernels::Plain, leaves);
    let (fused, fused_grads) = run(op, Kernels::Fused, leaves);
    assert_near("value", &fused, &plain, VALUE * largest(&plain).max(1.0));
    for (i, (fused, plain)) in fused_grads.iter().zip(&plain_grads).enumerate() {
        assert_near(&format!("gradient {i}"), fused, plain, GRADIENT * largest(plain).max(0.1));
    }
    for (i, grad) in fused_grads.iter().enumerate() {
        let direction = normals(7 + i as u64, leaves[i].len());
        let moved = |step: f32| {
            let mut leaves = leaves.to_vec();
            for (x, d) in leaves[i].iter_mut().zip(&direction) {
                *x += step * d;
            }
            fused_loss(op, &leaves)
        };
        let central = |step: f32| (moved(step) - moved(-step)) / (2.0 * f64::from(step));
        // Richardson's extrapolation: where a norm divides by little, the error in step² alone would be some percent. There
        // the next term is too at the longer step, while the shorter one has less of it and more of f32's rounding.
        let differences = [5e-3, 1.25e-3].map(|step| (4.0 * central(step) - central(2.0 * step)) / 3.0);
        let slope: f64 = grad.iter().zip(&direction).map(|(g, d)| f64::from(*g) * f64::from(*d)).sum();
        let size: f64 = grad.iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        assert!(
            differences.iter().any(|difference| (difference - slope).abs() <= DIFFERENCE * size.max(1.0)),
            "leaf {i}: {slope}, by differences {differences:?}"
        );
    }
}

/// The same bits on pools of 1, 2 and 3 threads.
fn assert_independent_of_threads(op: &Op<'_>, leaves: &[Vec<f32>]) {
    let bits = |n_threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n_threads).build().expect("a thread pool");
        let (out, grads) = pool.install(|| run(op, Kernels::Fused, leaves));
        let all = out.into_iter().chain(grads.into_iter().flatten());
        all.map(f32::to_bits).collect::<Vec<_>>()
    };
    let one = bits(1);
    assert!(one == bits(2), "2 threads differ from 1");
    assert!(one == bits(3), "3 threads differ from 1");
}

/// Sizes at and around the edges of tiles.
fn edge() -> impl Strategy<Value = usize> {
    prop_oneof![Just(1), Just(2), Just(7), Just(16), Just(33), Just(63), Just(64), Just(65), Just(97), Just(130)]
}

/// Patterns of first keys for `[batch, seq]`.
#[derive(Debug, Clone, Copy)]
enum Rows {
    RightPadded,
    LeftPadded,
    Packed,
}

fn first_keys(rows: Rows, seed: u64, batch: usize, seq: usize) -> Option<Vec<usize>> {
    let draws = integers(seed, batch * seq, seq.max(1));
    match rows {
        Rows::RightPadded => None,
        Rows::LeftPadded => Some((0..batch * seq).map(|i| draws[i / seq * seq].min(i % seq)).collect()),
        Rows::Packed => {
            let mut first = Vec::new();
            for (i, draw) in draws.into_iter().enumerate() {
                let starts = i % seq == 0 || draw < 1 + seq / 20;
                first.push(if starts { i % seq } else { *first.last().expect("a row starts with a document") });
            }
            Some(first)
        }
    }
}

fn rows() -> impl Strategy<Value = Rows> {
    prop_oneof![Just(Rows::RightPadded), Just(Rows::LeftPadded), Just(Rows::Packed)]
}

/// The norm, and the sum too if it is used further.
fn both((normed, sum): (Tensor<2>, Tensor<2>), uses_sum: bool) -> Tensor<1> {
    let n = normed.shape().num_elements();
    let normed = normed.reshape([n]);
    if uses_sum { Tensor::cat(vec![normed, sum.reshape([n])], 0) } else { normed }
}

/// A feed-forward layer of GELU whose residual is its own input or the last leaf.
fn mlp_op(kernels: Kernels, leaves: &[Tensor<1>], dims: [usize; 3], same: bool, uses_sum: bool) -> Tensor<1> {
    let [n, d, d_ff] = dims;
    let x = leaves[0].clone().reshape([n, d]);
    let up = Affine { weight: leaves[1].clone().reshape([d, d_ff]), bias: leaves[2].clone() };
    let down = Affine { weight: leaves[3].clone().reshape([d_ff, d]), bias: leaves[4].clone() };
    let norm = NormWeights { gamma: leaves[5].clone(), beta: leaves[6].clone(), eps: 1e-5 };
    let residual = if same { x.clone() } else { leaves[7].clone().reshape([d, n]).transpose() };
    both(mlp_add_norm(kernels, x, up, Activation::GeluTanh, down, residual, norm), uses_sum)
}

fn mlp_leaves(seed: u64, [n, d, d_ff]: [usize; 3]) -> Vec<Vec<f32>> {
    let weight = |seed, d_in: usize, d_out| -> Vec<f32> {
        normals(seed, d_in * d_out).into_iter().map(|x| x / (d_in as f32).sqrt()).collect()
    };
    let (up, down) = (weight(seed ^ 1, d, d_ff), weight(seed ^ 3, d_ff, d));
    let [bias, gamma, beta] = [4, 5, 6].map(|i| normals(seed ^ i, d));
    vec![normals(seed, n * d), up, normals(seed ^ 2, d_ff), down, bias, gamma, beta, normals(seed ^ 7, n * d)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn fused_linear_agrees(n in edge(), d_in in edge(), d_out in edge(), has_bias: bool, transposed: bool, seed: u64) {
        let op = move |kernels, leaves: &[Tensor<1>]| {
            let x = leaves[0].clone();
            let x = if transposed { x.reshape([d_in, n]).transpose() } else { x.reshape([n, d_in]) };
            let weight = leaves[1].clone();
            let weight = if transposed { weight.reshape([d_out, d_in]).transpose() } else { weight.reshape([d_in, d_out]) };
            linear(kernels, x, weight, leaves.get(2).cloned()).reshape([n * d_out])
        };
        let mut leaves = vec![normals(seed, n * d_in), normals(seed ^ 1, d_in * d_out)];
        if has_bias {
            leaves.push(normals(seed ^ 2, d_out));
        }
        assert_agrees(&op, &leaves);
    }

    #[test]
    fn fused_bias_activation_agrees(n in edge(), d in edge(), seed: u64) {
        let op = move |kernels, leaves: &[Tensor<1>]| {
            let x = leaves[0].clone().reshape([d, n]).transpose();
            bias_activation(kernels, x, leaves[1].clone(), Activation::GeluTanh).reshape([n * d])
        };
        assert_agrees(&op, &[normals(seed, n * d), normals(seed ^ 1, d)]);
    }

    #[test]
    fn fused_relu_agrees(n in edge(), d in edge(), seed: u64) {
        let op = move |kernels, leaves: &[Tensor<1>]| {
            let x = leaves[0].clone().reshape([n, d]);
            bias_activation(kernels, x, leaves[1].clone(), Activation::Relu).reshape([n * d])
        };
        // Away from the kink, where a difference has no meaning.
        let x = normals(seed, n * d).into_iter().map(|x| x + 0.5f32.copysign(x)).collect();
        assert_agrees(&op, &[x, vec![0.0; d]]);
    }

    #[test]
    fn fused_layer_norm_agrees(n in edge(), d in edge(), seed: u64) {
        prop_assume!(d > 2); // of two numbers the norm is ±1: no gradient to compare
        let op = move |kernels, leaves: &[Tensor<1>]| {
            let x = leaves[0].clone().reshape([d, n]).transpose();
            layer_norm(kernels, x, leaves[1].clone(), leaves[2].clone(), 1e-5).reshape([n * d])
        };
        assert_agrees(&op, &[normals(seed, n * d), normals(seed ^ 1, d), normals(seed ^ 2, d)]);
    }

    #[test]
    fn fused_add_layer_norm_agrees(n in edge(), d in edge(), seed: u64) {
        prop_assume!(d > 2);
        let op = move |kernels, leaves: &[Tensor<1>]| {
            let x = leaves[0].clone().reshape([n, d]);
            let residual = leaves[1].clone().reshape([d, n]).transpose();
            let (normed, sum) = add_layer_norm(kernels, x, residual, leaves[2].clone(), leaves[3].clone(), 1e-5);
            Tensor::cat(vec![normed.reshape([n * d]), sum.reshape([n * d])], 0)
        };
        assert_agrees(&op, &[normals(seed, n * d), normals(seed ^ 3, n * d), normals(seed ^ 1, d), normals(seed ^ 2, d)]);
    }

    #[test]
    fn fused_linear_keeping_agrees(n in edge(), d in edge(), d_out in edge(), seed: u64) {
        let op = move |kernels, leaves: &[Tensor<1>]| {
            let x = leaves[0].clone().reshape([n, d]);
            let layer = Affine { weight: leaves[1].clone().reshape([d, d_out]), bias: leaves[2].clone() };
            let (out, x) = linear_keeping(kernels, x, layer);
            Tensor::cat(vec![out.reshape([n * d_out]), x.reshape([n * d])], 0)
        };
        assert_agrees(&op, &[normals(seed, n * d), normals(seed ^ 1, d * d_out), normals(seed ^ 2, d_out)]);
    }

    #[test]
    fn fused_project_add_norm_agrees(n in edge(), d_in in edge(), d in edge(), uses_sum: bool, seed: u64) {
        prop_assume!(d > 2);
        let op = move |kernels, leaves: &[Tensor<1>]| {
            let x = leaves[0].clone().reshape([d_in, n]).transpose();
            let layer = Affine { weight: leaves[1].clone().reshape([d_in, d]), bias: leaves[2].clone() };
            let residual = leaves[3].clone().reshape([d, n]).transpose();
            let norm = NormWeights { gamma: leaves[4].clone(), beta: leaves[5].clone(), eps: 1e-5 };
            both(project_add_norm(kernels, x, layer, residual, norm), uses_sum)
        };
        let weight = normals(seed ^ 1, d_in * d).into_iter().map(|x| x / (d_in as f32).sqrt()).collect();
        let [bias, gamma, beta] = [2, 4, 5].map(|i| normals(seed ^ i, d));
        assert_agrees(&op, &[normals(seed, n * d_in), weight, bias, normals(seed ^ 3, n * d), gamma, beta]);
    }

    #[test]
    fn fused_mlp_add_norm_agrees(n in edge(), d in edge(), d_ff in edge(), uses_sum: bool, same: bool, seed: u64) {
        prop_assume!(d > 2);
        let op = move |kernels, leaves: &[Tensor<1>]| mlp_op(kernels, leaves, [n, d, d_ff], same, uses_sum);
        let mut leaves = mlp_leaves(seed, [n, d, d_ff]);
        if same {
            leaves.pop();
        }
        assert_agrees(&op, &leaves);
    }

    #[test]
    fn fused_embedding_agrees(batch in 1usize..4, seq in edge(), d in edge(), tied: bool, padded: bool, seed: u64) {
        let (n_tokens, n_positions) = (11, seq + 3);
        let ids = integers(seed, batch * seq, n_tokens);
        let positions = integers(seed ^ 1, batch * seq, n_positions);
        let op = |kernels, leaves: &[Tensor<1>]| {
            let (tokens, position_table) = (leaves[0].clone().reshape([n_tokens, d]), leaves[1].clone().reshape([n_positions, d]));
            let ids = int_tensor(&ids, [batch, seq], &tokens.device());
            let x = embed(kernels, tokens.clone(), position_table, ids, padded.then_some(&positions), 2);
            let x = x.reshape([batch * seq, d]);
            // As output weights: their gradient comes first, and that of the embedding is added to it.
            let x = if tied { logits(kernels, x, tokens) } else { x };
            let [n, width] = x.dims();
            x.reshape([n * width])
        };
        assert_agrees(&op, &[normals(seed, n_tokens * d), normals(seed ^ 2, n_positions * d)]);
    }

    #[test]
    fn fused_log_probs_agree(
        n in edge(), d_model in edge(), vocab_size in prop_oneof![Just(1), Just(5), Just(255), Just(257), Just(600)],
        temperature in prop_oneof![Just(1.0), Just(0.7)], seed: u64,
    ) {
        let targets = integers(seed, n, vocab_size);
        let op = |kernels, leaves: &[Tensor<1>]| {
            let hidden = leaves[0].clone().reshape([d_model, n]).transpose();
            let head = leaves[1].clone().reshape([vocab_size, d_model]);
            let targets = int_tensor(&targets, [n], &hidden.device());
            token_log_probs(kernels, hidden, head, targets, temperature)
        };
        let scale = 2.0 / (d_model as f32).sqrt();
        let head = normals(seed ^ 1, vocab_size * d_model).into_iter().map(|x| x * scale).collect();
        let leaves = [normals(seed, n * d_model), head];
        assert_agrees(&op, &leaves);
        let device = Device::flex();
        let entropy = |kernels| {
            let hidden = leaf(&leaves[0], &device).reshape([n, d_model]);
            let head = leaf(&leaves[1], &device).reshape([vocab_size, d_model]);
            let targets = int_tensor(&targets, [n], &device);
            host(token_log_probs_and_entropy(kernels, hidden, head, targets, temperature).1)
        };
        assert_near("entropy", &entropy(Kernels::Fused), &entropy(Kernels::Plain), 1e-5 * 10.0);
    }

    #[test]
    fn fused_cross_entropy_agrees(
        n in edge(), d_model in edge(), vocab_size in prop_oneof![Just(1), Just(5), Just(255), Just(257), Just(600)],
        factor in prop_oneof![Just(1.0), Just(-0.5)], seed: u64,
    ) {
        let targets = integers(seed, n, vocab_size);
        let op = |kernels, leaves: &[Tensor<1>]| {
            let hidden = leaves[0].clone().reshape([d_model, n]).transpose();
            let head = leaves[1].clone().reshape([vocab_size, d_model]);
            let targets = int_tensor(&targets, [n], &hidden.device());
            cross_entropy(kernels, hidden, head, targets, n as f64 / 4.0) * factor
        };
        let scale = 2.0 / (d_model as f32).sqrt();
        let head = normals(seed ^ 1, vocab_size * d_model).into_iter().map(|x| x * scale).collect();
        assert_agrees(&op, &[normals(seed, n * d_model), head]);
    }

    #[test]
    fn fused_logits_agree(n in edge(), d_model in edge(), vocab_size in edge(), transposed: bool, seed: u64) {
        let op = move |kernels, leaves: &[Tensor<1>]| {
            let hidden = leaves[0].clone();
            let hidden = if transposed { hidden.reshape([d_model, n]).transpose() } else { hidden.reshape([n, d_model]) };
            let head = leaves[1].clone().reshape([vocab_size, d_model]);
            logits(kernels, hidden, head).reshape([n * vocab_size])
        };
        assert_agrees(&op, &[normals(seed, n * d_model), normals(seed ^ 1, vocab_size * d_model)]);
    }

    #[test]
    fn fused_adamw_agrees(sizes in proptest::collection::vec(prop_oneof![Just(1usize), Just(65), Just(40_000)], 1..4), seed: u64) {
        let device = Device::flex();
        let numbers = |seed: u64| -> Vec<Tensor<1>> {
            sizes.iter().zip(seed..).map(|(&n, seed)| leaf(&normals(seed, n), &device)).collect()
        };
        let run = |kernels| {
            let zeros = || Tensor::<1>::zeros([1], &device);
            let mut state: Vec<[Tensor<1>; 3]> =
                numbers(seed).into_iter().zip(&sizes).map(|(x, &n)| [x, zeros().expand([n]), zeros().expand([n])]).collect();
            for step in 1..=3 {
                let params = state.into_iter().zip(numbers(seed ^ step)).zip([0.1, 0.0, 0.2]);
                let params = params.map(|(([param, m, v], grad), weight_decay)| AdamWParam {
                    param, grad, m, v,
                    step: AdamWStep {
                        lr: 1e-2, beta_1: 0.9, beta_2: 0.95, eps: 1e-8, weight_decay, step, grad_scale: 0.5,
                    },
                });
                state = adamw_update(kernels, params.collect());
            }
            state.into_iter().flatten().map(host).collect::<Vec<_>>()
        };
        for (fused, plain) in run(Kernels::Fused).iter().zip(&run(Kernels::Plain)) {
            assert_near("adamw", fused, plain, 1e-6 * largest(plain).max(1.0));
        }
        let all = numbers(seed);
        let squares: f64 = all.iter().flat_map(|x| host(x.clone())).map(|x| f64::from(x).powi(2)).sum();
        assert!((sum_of_squares(Kernels::Fused, &all) - squares).abs() <= 1e-12 * squares);
        assert!((sum_of_squares(Kernels::Plain, &all) - squares).abs() <= 1e-5 * squares);
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let (n, d, vocab_size) = (700, 96, 1000);
    let targets = integers(1, n, vocab_size);
    let log_probs = |kernels, leaves: &[Tensor<1>]| {
        let (hidden, head) = (leaves[0].clone().reshape([n, d]), leaves[1].clone().reshape([vocab_size, d]));
        let targets = int_tensor(&targets, [n], &hidden.device());
        token_log_probs(kernels, hidden, head, targets, 1.0)
    };
    assert_independent_of_threads(&log_probs, &[normals(1, n * d), normals(2, vocab_size * d)]);
    let loss = |kernels, leaves: &[Tensor<1>]| {
        let (hidden, head) = (leaves[0].clone().reshape([n, d]), leaves[1].clone().reshape([vocab_size, d]));
        let targets = int_tensor(&targets, [n], &hidden.device());
        cross_entropy(kernels, hidden, head, targets, 7.0)
    };
    assert_independent_of_threads(&loss, &[normals(1, n * d), normals(2, vocab_size * d)]);
    // Few rows, and a matrix that is cut into pieces.
    let few = |kernels, leaves: &[Tensor<1>]| {
        let x = leaves[0].clone().reshape([3, 8 * d]);
        let x = linear(kernels, x, leaves[1].clone().reshape([8 * d, vocab_size]), None);
        let head = leaves[1].clone().reshape([8 * d, vocab_size]);
        logits(kernels, x, head).reshape([3 * 8 * d])
    };
    assert_independent_of_threads(&few, &[normals(1, 3 * 8 * d), normals(2, 8 * d * vocab_size)]);
    let mlp = |kernels, leaves: &[Tensor<1>]| {
        let x = leaves[0].clone().reshape([n, d]);
        let (x, sum) = add_layer_norm(kernels, x.clone(), x, leaves[2].clone(), leaves[2].clone(), 1e-5);
        let x = linear(kernels, x, leaves[1].clone().reshape([d, 4 * d]), Some(leaves[3].clone()));
        let x = bias_activation(kernels, x, leaves[3].clone(), Activation::GeluTanh);
        let x = linear(kernels, x, leaves[1].clone().reshape([4 * d, d]), None);
        (x + sum).reshape([n * d])
    };
    let leaves = [normals(1, n * d), normals(2, 4 * d * d), normals(3, d), normals(4, 4 * d)];
    assert_independent_of_threads(&mlp, &leaves);
    let block = |kernels, leaves: &[Tensor<1>]| mlp_op(kernels, leaves, [n, d, 4 * d], false, true);
    assert_independent_of_threads(&block, &mlp_leaves(6, [n, d, 4 * d]));
    let kept = |kernels, leaves: &[Tensor<1>]| {
        let layer = Affine { weight: leaves[1].clone().reshape([d, 4 * d]), bias: leaves[3].clone() };
        let (out, x) = linear_keeping(kernels, leaves[0].clone().reshape([n, d]), layer);
        let layer = Affine { weight: leaves[1].clone().reshape([4 * d, d]), bias: leaves[2].clone() };
        let norm = NormWeights { gamma: leaves[2].clone(), beta: leaves[2].clone(), eps: 1e-5 };
        both(project_add_norm(kernels, out, layer, x, norm), true)
    };
    assert_independent_of_threads(&kept, &leaves);
    let ids = integers(8, n, 50);
    let embedded = |kernels, leaves: &[Tensor<1>]| {
        let tokens = leaves[0].clone().reshape([n, d]);
        let ids = int_tensor(&ids, [7, n / 7], &tokens.device());
        embed(kernels, tokens, leaves[1].clone().reshape([4 * d, d]), ids, None, 3).reshape([n * d])
    };
    assert_independent_of_threads(&embedded, &leaves[..2]);
}

#[test]
fn extreme_logits_stay_finite() {
    let device = Device::flex();
    for size in [1e4f32, 1e10, 1e18] {
        for kernels in [Kernels::Plain, Kernels::Fused] {
            let hidden = leaf(&[size, 0.0, -size, size], &device).reshape([2, 2]);
            let head = leaf(&[size, 0.0, -size, 0.0, 0.0, size, 1.0, 1.0], &device).reshape([4, 2]);
            let targets = int_tensor(&[0, 2], [2], &device);
            let (log_probs, entropy) = token_log_probs_and_entropy(kernels, hidden, head, targets, 1.0);
            assert!(host(log_probs).iter().all(|x| x.is_finite() && *x <= 0.0), "{kernels:?} {size}");
            if kernels == Kernels::Fused {
                // The plain version has 0 · −∞ only where log-softmax itself is infinite; it is not asked about here.
                assert!(host(entropy).iter().all(|x| x.is_finite() && *x >= 0.0), "{kernels:?} {size}");
            }
        }
        let qkv = leaf(&normals(3, 70 * 12), &device).reshape([1, 70, 12]) * size;
        let out = host(attention(Kernels::Fused, qkv, None, 2, None));
        assert!(out.iter().all(|x| x.is_finite()), "{size}");
    }
}

#[test]
fn the_flex_backend_is_fused_with_and_without_autodiff() {
    for device in [Device::flex(), Device::flex().autodiff()] {
        let x = leaf(&[1.0], &device);
        assert!(is_fused(Kernels::Fused, &x));
        assert!(!is_fused(Kernels::Plain, &x));
        assert!(!is_fused(Kernels::Fused, &x.cast(burn::tensor::DType::F64)));
    }
}

#[test]
fn a_relu_layer_passes_gradients_of_what_it_lets_through() {
    // One row of two: x = (1, 2), hidden (1, −1) becomes (1, 0), so only the first hidden number passes a gradient on.
    let op = |kernels, leaves: &[Tensor<1>]| {
        let matrix = |i: usize| leaves[i].clone().reshape([2, 2]);
        let up = Affine { weight: matrix(1), bias: leaves[2].clone() };
        let down = Affine { weight: matrix(1), bias: leaves[2].clone() };
        let norm = NormWeights { gamma: leaves[3].clone(), beta: leaves[3].clone(), eps: 1.0 };
        let x = leaves[0].clone().reshape([1, 2]);
        let (normed, sum) = mlp_add_norm(kernels, x.clone(), up, Activation::Relu, down, x, norm);
        Tensor::cat(vec![normed.reshape([2]), sum.reshape([2])], 0)
    };
    let leaves = [vec![1.0, 2.0], vec![1.0, 1.0, 0.0, -1.0], vec![0.0, 0.0], vec![1.0, 0.5]];
    let (plain, plain_grads) = run(&op, Kernels::Plain, &leaves);
    let (fused, fused_grads) = run(&op, Kernels::Fused, &leaves);
    assert_near("value", &fused, &plain, VALUE);
    assert_eq!(&fused[2..], [2.0, 3.0]);
    for (fused, plain) in fused_grads.iter().zip(&plain_grads) {
        assert_near("gradient", fused, plain, VALUE);
    }
}

#[test]
fn the_slope_of_gelu_is_finite_everywhere() {
    let op = |kernels, leaves: &[Tensor<1>]| {
        bias_activation(kernels, leaves[0].clone().reshape([1, 4]), leaves[1].clone(), Activation::GeluTanh)
            .reshape([4])
    };
    let (_, grads) = run(&op, Kernels::Fused, &[vec![1e20, -1e20, 40.0, -40.0], vec![0.0; 4]]);
    let cotangent = normals(99, 4);
    assert_eq!(grads[0], [cotangent[0], 0.0, cotangent[2], 0.0]);
}

#[test]
fn a_nan_is_not_hidden() {
    let device = Device::flex();
    let nan = |n: usize| leaf(&vec![f32::NAN; n], &device);
    assert!(host(bias_activation(Kernels::Fused, nan(40).reshape([2, 20]), nan(20), Activation::Relu))[0].is_nan());
    assert!(host(bias_activation(Kernels::Fused, nan(40).reshape([2, 20]), nan(20), Activation::GeluTanh))[0].is_nan());
    assert!(host(attention(Kernels::Fused, nan(60).reshape([1, 5, 12]), None, 2, None))[0].is_nan());
    let log_probs = token_log_probs(
        Kernels::Fused,
        nan(4).reshape([1, 4]),
        nan(8).reshape([2, 4]),
        int_tensor(&[0], [1], &device),
        1.0,
    );
    assert!(host(log_probs)[0].is_nan());
    for device in [Device::flex(), Device::flex().autodiff()] {
        let hidden = leaf(&[f32::NAN; 4], &device);
        let hidden = if device.is_autodiff() { hidden.require_grad() } else { hidden }.reshape([1, 4]);
        let head = leaf(&[1.0; 8], &device).reshape([2, 4]);
        let loss = cross_entropy(Kernels::Fused, hidden, head, int_tensor(&[0], [1], &device), 1.0);
        assert!(host(loss)[0].is_nan());
    }
}

#[test]
fn a_sliced_tensor_is_read_where_it_lies() {
    let device = Device::flex();
    let x = leaf(&normals(1, 400), &device).reshape([10, 40]).slice([2..9, 5..30]);
    let gamma = leaf(&normals(2, 60), &device).slice(10..35);
    let run = |kernels| host(layer_norm(kernels, x.clone(), gamma.clone(), gamma.clone(), 1e-5));
    assert_near("sliced", &run(Kernels::Fused), &run(Kernels::Plain), VALUE * 10.0);
}

#[test]
#[should_panic(expected = "sees no key")]
fn a_first_key_after_its_query_is_refused() {
    let device = Device::flex();
    let qkv = leaf(&normals(1, 24), &device).reshape([1, 2, 12]);
    let _ = attention(Kernels::Fused, qkv, Some(int_tensor(&[1, 0], [1, 2], &device)), 2, None);
}
