//! Attention written out in loops, on the queries, keys and values of a trained model, beside the function that training calls.

use std::path::Path;

use anyhow::{Context, Result};
use common::kernels::Kernels;
use common::kernels::tap::{Call, Operation};

use crate::inside::{Traced, host};

/// Tokens printed of each head.
const N_TOKENS: usize = 3;

/// For each layer and head, the tokens that the last one attends to, and how far the loops are from the kernel.
pub(crate) fn attention(checkpoint: &Path, text: &str) -> Result<String> {
    let traced = Traced::of(checkpoint, text)?;
    let mut printed = String::new();
    let mut furthest = 0.0_f32;
    for (layer, call) in traced.calls.iter().filter(|call| is_attention(call)).enumerate() {
        let Operation::Attention { heads, .. } = call.operation else { continue };
        let qkv = host(&call.operands[0].flat)?;
        let result = call.operation.apply(Kernels::Fused, &call.operands);
        let expected = host(&result.first().context("attention returns one tensor")?.flat)?;
        let d_head = heads.d_head(qkv.len() / traced.ids.len());
        for head in 0..heads.queries {
            let (weights, output) = one_head(&qkv, head, heads.queries, d_head, traced.ids.len());
            let columns = (traced.ids.len() - 1) * heads.queries * d_head + head * d_head;
            let distances = output.iter().zip(&expected[columns..]).map(|(a, b)| (a - b).abs());
            furthest = distances.fold(furthest, f32::max);
            printed += &format!("layer {layer}, head {head}: {}\n", traced.largest(&weights, N_TOKENS));
        }
    }
    Ok(format!("{printed}loops and kernel differ by less than 0.0001: {}\n", furthest < 1e-4))
}

fn is_attention(call: &Call) -> bool {
    matches!(call.operation, Operation::Attention { .. })
}

/// `softmax(q·Kᵀ/√d_head)·V` for the query of the last position: the weights, and what they mix.
///
/// # Shapes
/// - `qkv`: `[seq, 3 · n_heads · d_head]`, queries, keys and values side by side, each head after head
/// - returns `[seq]` and `[d_head]`
fn one_head(qkv: &[f32], head: usize, n_heads: usize, d_head: usize, seq: usize) -> (Vec<f32>, Vec<f32>) {
    let width = 3 * n_heads * d_head;
    let vector = |position: usize, part: usize| {
        let start = position * width + (part * n_heads + head) * d_head;
        &qkv[start..start + d_head]
    };
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f32>();
    let query = vector(seq - 1, 0);
    let scores: Vec<f32> = (0..seq).map(|i| dot(query, vector(i, 1)) / (d_head as f32).sqrt()).collect();
    let max = scores.iter().copied().fold(f32::MIN, f32::max);
    let exponentials: Vec<f32> = scores.iter().map(|score| (score - max).exp()).collect();
    let sum: f32 = exponentials.iter().sum();
    let weights: Vec<f32> = exponentials.iter().map(|x| x / sum).collect();
    let mut mixed = vec![0.0; d_head];
    for (i, weight) in weights.iter().enumerate() {
        for (total, value) in mixed.iter_mut().zip(vector(i, 2)) {
            *total += weight * value;
        }
    }
    (weights, mixed)
}
