//! Rows of a batch: what they do not depend on.

use burn::tensor::Device;

use super::{host, integers, leaf, normals};
use crate::{BATCH_INVARIANT_ROWS, Kernels, attention_cached, linear, logits};

#[test]
fn rows_keep_their_bits_in_any_batch_within_the_range() {
    let device = Device::flex();
    let (n, d, d_out, n_heads) = (*BATCH_INVARIANT_ROWS.end(), 96, 700, 4);
    let cached: Vec<usize> = integers(5, n, 40);
    let run = |rows: std::ops::Range<usize>| {
        let n_rows = rows.len();
        let x = leaf(&normals(1, n * d), &device).reshape([n, d]).slice([rows.clone()]);
        let weight = leaf(&normals(2, d * d_out), &device);
        // More than the second cache holds.
        let large = leaf(&normals(8, d * 2 * d_out), &device).reshape([d, 2 * d_out]);
        let bias = leaf(&normals(3, d_out), &device);
        let qkv = leaf(&normals(4, n * 3 * d), &device).reshape([n, 1, 3 * d]).slice([rows.clone()]);
        let keys = leaf(&normals(6, n * d * 48), &device).reshape([n, n_heads, d / n_heads, 48]).slice([rows.clone()]);
        let values =
            leaf(&normals(7, n * d * 48), &device).reshape([n, n_heads, 48, d / n_heads]).slice([rows.clone()]);
        let mixed = attention_cached(Kernels::Fused, qkv, keys, values, &cached[rows]).0;
        [
            host(linear(Kernels::Fused, x.clone(), weight.clone().reshape([d, d_out]), Some(bias))),
            host(linear(Kernels::Fused, x.clone(), large, None)),
            host(logits(Kernels::Fused, x, weight.reshape([d_out, d]))),
            host(mixed.reshape([n_rows * d])),
        ]
    };
    let all = run(0..n);
    for n_rows in BATCH_INVARIANT_ROWS {
        for first in [0, (n - n_rows) / 2, n - n_rows] {
            for (some, all) in run(first..first + n_rows).iter().zip(&all) {
                let width = all.len() / n;
                assert!(*some == all[first * width..(first + n_rows) * width], "rows {first} to {}", first + n_rows);
            }
        }
    }
}
