//! Root-mean-square norms, gates, the feed-forward layer with a gate, and embeddings without positions.

use burn::tensor::Tensor;
use proptest::prelude::*;

use super::{assert_agrees, assert_independent_of_threads, both, edge, int_tensor, integers, normals};
use crate::{
    Activation, GatedWeights, Kernels, add_rms_norm, gate, gated_mlp_add_rms_norm, logits, lookup,
    project_add_rms_norm, rms_norm_keeping,
};

/// Large, so that a row of small numbers is not divided by so little that no difference has a meaning.
const EPS: f64 = 0.1;

fn weight(seed: u64, d_in: usize, d_out: usize) -> Vec<f32> {
    normals(seed, d_in * d_out).into_iter().map(|x| x / (d_in as f32).sqrt()).collect()
}

fn mlp_op(kernels: Kernels, leaves: &[Tensor<1>], [n, d, d_ff]: [usize; 3], uses_sum: bool) -> Tensor<1> {
    let x = leaves[0].clone().reshape([d, n]).transpose();
    let matrix = |i: usize, shape: [usize; 2]| leaves[i].clone().reshape(shape);
    let [gate, up, down] = [(1, [d, d_ff]), (2, [d, d_ff]), (3, [d_ff, d])].map(|(i, shape)| matrix(i, shape).into());
    let weights = GatedWeights { gate, up, down };
    both(gated_mlp_add_rms_norm(kernels, x, weights, matrix(4, [n, d]), leaves[5].clone(), EPS), uses_sum)
}

fn mlp_leaves(seed: u64, [n, d, d_ff]: [usize; 3]) -> Vec<Vec<f32>> {
    let [gate, up, down] = [weight(seed ^ 1, d, d_ff), weight(seed ^ 2, d, d_ff), weight(seed ^ 3, d_ff, d)];
    vec![normals(seed, n * d), gate, up, down, normals(seed ^ 4, n * d), normals(seed ^ 5, d)]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn fused_rms_norm_agrees(n in edge(), d in edge(), uses_x: bool, seed: u64) {
        prop_assume!(d > 2);
        let op = move |kernels, leaves: &[Tensor<1>]| {
            let x = leaves[0].clone().reshape([d, n]).transpose();
            both(rms_norm_keeping(kernels, x, leaves[1].clone(), EPS), uses_x)
        };
        assert_agrees(&op, &[normals(seed, n * d), normals(seed ^ 1, d)]);
    }

    #[test]
    fn fused_add_rms_norm_agrees(n in edge(), d in edge(), uses_sum: bool, seed: u64) {
        prop_assume!(d > 2);
        let op = move |kernels, leaves: &[Tensor<1>]| {
            let x = leaves[0].clone().reshape([n, d]);
            let residual = leaves[1].clone().reshape([d, n]).transpose();
            both(add_rms_norm(kernels, x, residual, leaves[2].clone(), EPS), uses_sum)
        };
        assert_agrees(&op, &[normals(seed, n * d), normals(seed ^ 3, n * d), normals(seed ^ 1, d)]);
    }

    #[test]
    fn fused_project_add_rms_norm_agrees(n in edge(), d_in in edge(), d in edge(), uses_sum: bool, seed: u64) {
        prop_assume!(d > 2);
        let op = move |kernels, leaves: &[Tensor<1>]| {
            let x = leaves[0].clone().reshape([d_in, n]).transpose();
            let (weight, residual) = (leaves[1].clone().reshape([d_in, d]), leaves[2].clone().reshape([n, d]));
            both(project_add_rms_norm(kernels, x, weight.into(), residual, leaves[3].clone(), EPS), uses_sum)
        };
        let leaves = [normals(seed, n * d_in), weight(seed ^ 1, d_in, d), normals(seed ^ 2, n * d), normals(seed ^ 3, d)];
        assert_agrees(&op, &leaves);
    }

    #[test]
    fn fused_gate_agrees(n in edge(), d in edge(), transposed: bool, seed: u64) {
        let op = move |kernels, leaves: &[Tensor<1>]| {
            let of = |i: usize| leaves[i].clone();
            let first = if transposed { of(0).reshape([d, n]).transpose() } else { of(0).reshape([n, d]) };
            gate(kernels, first, of(1).reshape([n, d]), Activation::Silu).reshape([n * d])
        };
        assert_agrees(&op, &[normals(seed, n * d), normals(seed ^ 1, n * d)]);
    }

    #[test]
    fn fused_gated_mlp_add_rms_norm_agrees(n in edge(), d in edge(), d_ff in edge(), uses_sum: bool, seed: u64) {
        prop_assume!(d > 2);
        let op = move |kernels, leaves: &[Tensor<1>]| mlp_op(kernels, leaves, [n, d, d_ff], uses_sum);
        assert_agrees(&op, &mlp_leaves(seed, [n, d, d_ff]));
    }

    #[test]
    fn fused_lookup_agrees(batch in 1usize..4, seq in edge(), d in edge(), tied: bool, seed: u64) {
        let ids = integers(seed, batch * seq, 11);
        let op = |kernels, leaves: &[Tensor<1>]| {
            let tokens = leaves[0].clone().reshape([11, d]);
            let x = lookup(kernels, tokens.clone(), int_tensor(&ids, [batch, seq], &tokens.device()));
            let x = x.reshape([batch * seq, d]);
            // As output weights: their gradient comes first, and that of the embedding is added to it.
            let x = if tied { logits(kernels, x, tokens) } else { x };
            let [n, width] = x.dims();
            x.reshape([n * width])
        };
        assert_agrees(&op, &[normals(seed, 11 * d)]);
    }
}

#[test]
fn a_large_gate_is_finite_and_passes_its_gradient() {
    let op = |kernels, leaves: &[Tensor<1>]| gate(kernels, leaves[0].clone(), leaves[1].clone(), Activation::Silu);
    let (values, grads) = super::run(&op, Kernels::Fused, &[vec![1e20, -1e20, 90.0, -90.0], vec![1.0; 4]]);
    let cotangent = normals(99, 4);
    assert_eq!(values, [1e20, 0.0, 90.0, 0.0]);
    assert_eq!(grads[0], [cotangent[0], 0.0, cotangent[2], 0.0]);
}

#[test]
fn gated_layers_do_not_depend_on_the_number_of_threads() {
    let dims = [700, 96, 260];
    let op = |kernels, leaves: &[Tensor<1>]| mlp_op(kernels, leaves, dims, true);
    assert_independent_of_threads(&op, &mlp_leaves(6, dims));
    let [n, d, _] = dims;
    let steps = |kernels, leaves: &[Tensor<1>]| {
        let x = leaves[0].clone().reshape([n, d]);
        let (x, sum) = add_rms_norm(kernels, x.clone(), x, leaves[1].clone(), EPS);
        let weight = leaves[2].clone().reshape([d, d]).into();
        let (x, sum) = project_add_rms_norm(kernels, x, weight, sum, leaves[1].clone(), EPS);
        let (x, sum) = (x.reshape([n * d]), sum.reshape([n * d]));
        gate(kernels, x, sum, Activation::Silu)
    };
    assert_independent_of_threads(&steps, &[normals(1, n * d), normals(2, d), weight(3, d, d)]);
}
