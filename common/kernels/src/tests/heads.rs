//! Attention with and without a cache, and rotary positions, with as many heads of keys as of queries and with fewer.

use burn::tensor::{Device, Tensor};
use proptest::prelude::*;

use super::{
    Rows, VALUE, assert_agrees, assert_independent_of_threads, assert_near, edge, first_keys, host, int_tensor,
    integers, leaf, normals, rows,
};
use crate::{Angles, Heads, Kernels, attention, attention_cached, rotate};

fn heads() -> impl Strategy<Value = Heads> {
    (1usize..4, 1usize..4).prop_map(|(keys, group)| Heads { queries: keys * group, keys })
}

/// Columns of the projection.
fn width(heads: Heads, d_head: usize) -> usize {
    (heads.queries + 2 * heads.keys) * d_head
}

fn attention_op(
    [batch, seq, d_head]: [usize; 3],
    heads: Heads,
    first: Option<Vec<usize>>,
    transposed: bool,
) -> impl Fn(Kernels, &[Tensor<1>]) -> Tensor<1> + Sync {
    move |kernels, leaves| {
        let device = leaves[0].device();
        let first = first.as_ref().map(|first| int_tensor(first, [batch, seq], &device));
        let width = width(heads, d_head);
        let qkv = if transposed {
            leaves[0].clone().reshape([seq, batch, width]).swap_dims(0, 1)
        } else {
            leaves[0].clone().reshape([batch, seq, width])
        };
        attention(kernels, qkv, first, heads, None).reshape([batch * seq * heads.queries * d_head])
    }
}

/// Some angle for each position of each of `n_rows` rows.
fn angles(seed: u64, [n_rows, seq, half]: [usize; 3], device: &Device) -> Angles {
    let angles = leaf(&normals(seed, n_rows * seq * half), device).reshape([n_rows, seq, half]) * 3.0;
    Angles { cos: angles.clone().cos(), sin: angles.sin() }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn fused_attention_agrees(
        batch in 1usize..4, seq in edge(), heads in heads(), d_head in prop_oneof![Just(1), Just(8), Just(17), Just(64)],
        rows in rows(), transposed: bool, seed: u64,
    ) {
        let first = first_keys(rows, seed, batch, seq);
        let op = attention_op([batch, seq, d_head], heads, first, transposed);
        assert_agrees(&op, &[normals(seed, batch * seq * width(heads, d_head))]);
    }

    #[test]
    fn decoding_agrees_with_attention_over_the_whole_sequence(
        batch in 1usize..4, prompt in edge(), heads in heads(), d_head in prop_oneof![Just(3), Just(16), Just(40)],
        kernels in prop_oneof![Just(Kernels::Plain), Just(Kernels::Fused)], seed: u64,
    ) {
        let device = Device::flex();
        let (seq, width) = (prompt + 3, width(heads, d_head));
        let qkv = leaf(&normals(seed, batch * seq * width), &device).reshape([batch, seq, width]);
        let whole = attention(Kernels::Plain, qkv.clone(), None, heads, None);
        let mut keys = Tensor::<4>::full([batch, heads.keys, d_head, seq + 2], 7.0, &device);
        let mut values = keys.clone().transpose();
        // Row `b` has `prompts[b]` tokens; padding behind them is overwritten by what comes after the prompt.
        let prompts: Vec<usize> = integers(seed, batch, prompt).into_iter().map(|n| n + 1).collect();
        let mut cached = vec![0; batch];
        for new in [prompt, 1, 2] {
            let of_row = |x: &Tensor<3>, row: usize| x.clone().slice([row..row + 1, cached[row]..cached[row] + new]);
            let of_rows = |x: &Tensor<3>| Tensor::cat((0..batch).map(|row| of_row(x, row)).collect(), 0);
            let (out, new_keys, new_values) = attention_cached(kernels, of_rows(&qkv), keys, values, &cached);
            (keys, values) = (new_keys, new_values);
            assert_near("decoded", &host(out), &host(of_rows(&whole)), VALUE * 10.0);
            cached = if new == prompt && cached[0] == 0 { prompts.clone() } else { cached.iter().map(|n| n + new).collect() };
        }
    }

    #[test]
    fn fused_rotation_agrees(
        batch in 1usize..4, seq in edge(), heads in heads(), half in 1usize..20, behind in prop_oneof![Just(0), Just(5)],
        for_each_row: bool, seed: u64,
    ) {
        let n = batch * seq * width(heads, 2 * half + behind);
        let op = |kernels, leaves: &[Tensor<1>]| {
            let n_rows = if for_each_row { batch } else { 1 };
            let angles = angles(seed, [n_rows, seq, half], &leaves[0].device());
            let qkv = leaves[0].clone().reshape([batch, seq, n / batch / seq]);
            rotate(kernels, qkv, heads, &angles).reshape([n])
        };
        assert_agrees(&op, &[normals(seed, n)]);
    }
}

#[test]
fn a_rotation_leaves_a_projection_alone_that_others_hold() {
    let device = Device::flex();
    let qkv = leaf(&normals(1, 2 * 12), &device).reshape([1, 2, 12]);
    let turned = rotate(Kernels::Fused, qkv.clone(), 1.into(), &angles(2, [1, 2, 2], &device));
    assert_eq!(host(qkv.clone()), normals(1, 2 * 12));
    assert_ne!(host(turned), host(qkv));
}

#[test]
fn attention_does_not_depend_on_the_number_of_threads() {
    let first = first_keys(Rows::Packed, 5, 3, 200);
    let op = attention_op([3, 200, 24], 4.into(), first.clone(), false);
    assert_independent_of_threads(&op, &[normals(5, 3 * 200 * 3 * 96)]);
    let op = attention_op([3, 200, 24], Heads { queries: 6, keys: 2 }, first, false);
    assert_independent_of_threads(&op, &[normals(5, 3 * 200 * 10 * 24)]);
    let turn = |kernels, leaves: &[Tensor<1>]| {
        let angles = angles(3, [1, 200, 12], &leaves[0].device());
        rotate(kernels, leaves[0].clone().reshape([3, 200, 240]), Heads { queries: 6, keys: 2 }, &angles)
            .reshape([3 * 200 * 240])
    };
    assert_independent_of_threads(&turn, &[normals(5, 3 * 200 * 240)]);
}
