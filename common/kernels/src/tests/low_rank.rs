//! Layers with two thin matrices beside the weight, which is trained or not.

use burn::tensor::{Device, Tensor};
use proptest::prelude::*;

use super::{assert_agrees, assert_independent_of_threads, both, edge, host, leaf, normals};
use crate::{
    Adapted, GatedWeights, Kernels, LowRank, adapted_linear, gated_mlp_add_rms_norm, linear, project_add_rms_norm,
};

/// As of the gated layers' tests.
const EPS: f64 = 0.1;

/// The columns that have an adapter.
#[derive(Debug, Clone, Copy)]
enum Parts {
    All,
    /// As of queries, keys and values side by side.
    Three,
    /// Some columns before, between and behind have none.
    Two,
}

fn parts_of(parts: Parts, d_out: usize) -> Vec<std::ops::Range<usize>> {
    let all = match parts {
        Parts::All => std::iter::once(0..d_out).collect(),
        Parts::Three => vec![0..d_out / 2, d_out / 2..3 * d_out / 4, 3 * d_out / 4..d_out],
        Parts::Two => vec![d_out / 8..d_out / 3, d_out / 2..d_out - d_out / 8],
    };
    all.into_iter().filter(|part| !part.is_empty()).collect()
}

fn parts() -> impl Strategy<Value = Parts> {
    prop_oneof![Just(Parts::All), Just(Parts::Three), Just(Parts::Two)]
}

fn rank() -> impl Strategy<Value = usize> {
    prop_oneof![Just(1), Just(3), Just(16), Just(64)]
}

/// Shape, columns and rank of a layer, and whether its weight is trained.
#[derive(Debug, Clone, Copy)]
struct Layer {
    dims: [usize; 2],
    parts: Parts,
    /// 0 where nothing stands beside the weight.
    rank: usize,
    trained: bool,
}

impl Layer {
    fn parts(self) -> Vec<std::ops::Range<usize>> {
        parts_of(self.parts, self.dims[1])
    }

    /// Lengths of `A` and `B`.
    fn thin(self) -> [usize; 2] {
        let ([d_in, _], parts) = (self.dims, self.parts());
        [d_in * parts.len() * self.rank, self.rank * parts.iter().map(std::ops::Range::len).sum::<usize>()]
    }

    fn weight(self, seed: u64) -> Vec<f32> {
        let [d_in, d_out] = self.dims;
        normals(seed, d_in * d_out).into_iter().map(|x| x / (d_in as f32).sqrt()).collect()
    }

    /// The weight if it is trained, and `A` and `B` if they are there.
    ///
    /// `B` is small: a difference in the direction of all of a large `A` would be far from a slope.
    fn leaves(self, seed: u64) -> Vec<Vec<f32>> {
        let [a, b] = self.thin();
        let scaled = |seed, n, scale: f32| normals(seed, n).into_iter().map(|x| scale * x).collect();
        let [d_in, _] = self.dims;
        let thin = [scaled(seed ^ 8, a, 1.0 / (d_in as f32).sqrt()), scaled(seed ^ 9, b, 0.1)];
        let weight = self.trained.then(|| self.weight(seed));
        weight.into_iter().chain(thin).filter(|leaf| !leaf.is_empty()).collect()
    }

    /// Takes [`leaves`](Self::leaves) from `leaves`.
    fn take(self, seed: u64, leaves: &mut std::slice::Iter<'_, Tensor<1>>, device: &Device) -> Adapted {
        let mut next = || leaves.next().expect("a leaf").clone();
        let weight = if self.trained { next() } else { leaf(&self.weight(seed), device) }.reshape(self.dims);
        let [a, b] = self.thin();
        if a == 0 || b == 0 {
            return weight.into();
        }
        let (a, b) = (next().reshape([self.dims[0], a / self.dims[0]]), next().reshape([self.rank, b / self.rank]));
        Adapted { weight, low_rank: Some(LowRank { a, b, parts: self.parts(), scale: 1.5 }) }
    }
}

fn layer(dims: [usize; 2]) -> impl Strategy<Value = Layer> {
    (parts(), prop_oneof![Just(0), rank()], any::<bool>()).prop_map(move |(parts, rank, trained)| Layer {
        dims,
        parts,
        rank,
        trained,
    })
}

/// A layer of which something is trained, so that its operation is on the tape.
fn adapted(d_in: usize, d_out: usize) -> impl Strategy<Value = Layer> {
    layer([d_in, d_out]).prop_filter("an adapter without columns", |layer| layer.rank > 0 && layer.thin()[1] > 0)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn fused_adapted_linear_agrees(
        n in edge(),
        layer in (edge(), edge()).prop_flat_map(|(d_in, d_out)| adapted(d_in, d_out)),
        has_bias: bool, tracked: bool, seed: u64,
    ) {
        let [d_in, d_out] = layer.dims;
        let op = move |kernels, leaves: &[Tensor<1>]| {
            let (device, mut leaves) = (leaves[0].device(), leaves.iter());
            let x = if tracked { leaves.next().expect("x").clone() } else { leaf(&normals(seed, n * d_in), &device) };
            let bias = has_bias.then(|| leaves.next().expect("bias").clone());
            let layer = layer.take(seed, &mut leaves, &device);
            adapted_linear(kernels, x.reshape([d_in, n]).transpose(), layer, bias).reshape([n * d_out])
        };
        let mut leaves = if tracked { vec![normals(seed, n * d_in)] } else { Vec::new() };
        leaves.extend(has_bias.then(|| normals(seed ^ 2, d_out)));
        leaves.extend(layer.leaves(seed));
        assert_agrees(&op, &leaves);
    }

    #[test]
    fn fused_adapted_projections_agree(
        n in edge(),
        layer in (edge(), edge()).prop_flat_map(|(d_in, d)| layer([d_in, d])),
        tracked: bool, uses_sum: bool, seed: u64,
    ) {
        let [d_in, d] = layer.dims;
        prop_assume!(d > 2);
        let op = move |kernels, leaves: &[Tensor<1>]| {
            let (device, mut leaves) = (leaves[0].device(), leaves.iter());
            let mut next = || leaves.next().expect("a leaf").clone();
            let (residual, gamma) = (next().reshape([n, d]), next());
            let x = if tracked { next() } else { leaf(&normals(seed, n * d_in), &device) }.reshape([d_in, n]).transpose();
            let layer = layer.take(seed ^ 3, &mut leaves, &device);
            both(project_add_rms_norm(kernels, x, layer, residual, gamma, EPS), uses_sum)
        };
        let mut leaves = vec![normals(seed ^ 2, n * d), normals(seed ^ 4, d)];
        leaves.extend(tracked.then(|| normals(seed, n * d_in)));
        leaves.extend(layer.leaves(seed ^ 3));
        assert_agrees(&op, &leaves);
    }

    #[test]
    fn fused_adapted_feed_forward_layers_agree(
        n in edge(),
        layers in (edge(), edge()).prop_flat_map(|(d, d_ff)| [layer([d, d_ff]), layer([d, d_ff]), layer([d_ff, d])]),
        tracked: bool, uses_sum: bool, seed: u64,
    ) {
        let [d_ff, d] = layers[2].dims;
        prop_assume!(d > 2);
        let leaves = mlp_leaves(seed, n, layers, tracked);
        let op = move |kernels, leaves: &[Tensor<1>]| mlp_op(kernels, leaves, seed, [n, d, d_ff], layers, tracked, uses_sum);
        assert_agrees(&op, &leaves);
    }
}

fn mlp_op(
    kernels: Kernels,
    leaves: &[Tensor<1>],
    seed: u64,
    [n, d, _]: [usize; 3],
    layers: [Layer; 3],
    tracked: bool,
    uses_sum: bool,
) -> Tensor<1> {
    let (device, mut leaves) = (leaves[0].device(), leaves.iter());
    let mut next = || leaves.next().expect("a leaf").clone();
    let (residual, gamma) = (next().reshape([n, d]), next());
    let x = if tracked { next() } else { leaf(&normals(seed, n * d), &device) }.reshape([d, n]).transpose();
    let [gate, up, down] = [0, 1, 2].map(|i| layers[i].take(seed ^ (5 + i as u64), &mut leaves, &device));
    both(gated_mlp_add_rms_norm(kernels, x, GatedWeights { gate, up, down }, residual, gamma, EPS), uses_sum)
}

fn mlp_leaves(seed: u64, n: usize, layers: [Layer; 3], tracked: bool) -> Vec<Vec<f32>> {
    let [_, d] = layers[2].dims;
    let mut leaves = vec![normals(seed ^ 2, n * d), normals(seed ^ 4, d)];
    leaves.extend(tracked.then(|| normals(seed, n * d)));
    leaves.extend((0..3).flat_map(|i| layers[i].leaves(seed ^ (5 + i as u64))));
    leaves
}

#[test]
fn adapted_layers_do_not_depend_on_the_number_of_threads() {
    let [n, d, d_ff] = [700, 96, 260];
    let of = |dims, parts| Layer { dims, parts, rank: 16, trained: false };
    let layers = [of([d, d_ff], Parts::All), of([d, d_ff], Parts::Two), of([d_ff, d], Parts::All)];
    let op = |kernels, leaves: &[Tensor<1>]| mlp_op(kernels, leaves, 8, [n, d, d_ff], layers, true, true);
    assert_independent_of_threads(&op, &mlp_leaves(8, n, layers, true));
    let layer = of([d, d_ff], Parts::Three);
    let steps = |kernels, leaves: &[Tensor<1>]| {
        let device = leaves[0].device();
        let (x, mut rest) = (leaves[0].clone().reshape([n, d]), leaves[1..].iter());
        adapted_linear(kernels, x, layer.take(9, &mut rest, &device), None).reshape([n * d_ff])
    };
    let leaves = [vec![normals(1, n * d)], layer.leaves(9)].concat();
    assert_independent_of_threads(&steps, &leaves);
}

/// As an adapter begins: the policy of PPO is its reference then, to the bit.
#[test]
fn a_zero_b_leaves_the_bits_of_the_layer_as_they_are() {
    let (d, d_ff) = (96, 260);
    for device in [Device::flex(), Device::flex().autodiff()] {
        for n in [1, 3, 40, 64, 65, 300] {
            let x = leaf(&normals(1, n * d), &device).reshape([n, d]);
            let bias = leaf(&normals(2, d_ff), &device);
            let of = |dims: [usize; 2], adapted: bool| {
                let layer = Layer { dims, parts: Parts::Three, rank: 16, trained: true };
                let leaves: Vec<_> = layer.leaves(3).iter().map(|values| leaf(values, &device)).collect();
                let mut layer = layer.take(3, &mut leaves.iter(), &device);
                match &mut layer.low_rank {
                    Some(low_rank) if adapted => low_rank.b = low_rank.b.zeros_like(),
                    low_rank => *low_rank = None,
                }
                layer
            };
            let run = |adapted: bool| {
                let y = match of([d, d_ff], adapted) {
                    layer if adapted => adapted_linear(Kernels::Fused, x.clone(), layer, Some(bias.clone())),
                    layer => linear(Kernels::Fused, x.clone(), layer.weight, Some(bias.clone())),
                };
                let gamma = bias.clone().slice(0..d);
                let proj = of([d, d], adapted);
                let projected = project_add_rms_norm(Kernels::Fused, x.clone(), proj, x.clone(), gamma.clone(), EPS);
                let [gate, up] = [(); 2].map(|()| of([d, d_ff], adapted));
                let weights = GatedWeights { gate, up, down: of([d_ff, d], adapted) };
                let of_mlp = gated_mlp_add_rms_norm(Kernels::Fused, x.clone(), weights, x.clone(), gamma, EPS);
                [host(y.reshape([n * d_ff])), host(both(projected, true)), host(both(of_mlp, true))].concat()
            };
            assert_eq!(run(true), run(false), "{n} rows");
        }
    }
}

#[test]
#[should_panic(expected = "thin matrices and weight disagree")]
fn thin_matrices_of_another_layer_are_refused() {
    let device = Device::flex();
    let matrix = |rows: usize, cols: usize| leaf(&normals(1, rows * cols), &device).reshape([rows, cols]);
    let low_rank = LowRank { a: matrix(8, 4), b: matrix(2, 5), parts: vec![0..3, 3..6], scale: 1.0 };
    let layer = Adapted { weight: matrix(8, 6), low_rank: Some(low_rank) };
    let _ = adapted_linear(Kernels::Fused, matrix(3, 8), layer, None);
}
