//! Rotary positions of queries and keys, in place.

use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::simd::{fma, simd};
use super::{contiguous, exclusive, floats};
use crate::Heads;

/// Numbers of the projection handled by one task, about.
const TASK: usize = 1 << 16;

/// Whether channels are turned by their angles, or back: what a gradient needs, as the transpose of a rotation is its
/// inverse.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// By the angles.
    Forward,
    /// By their negatives.
    Back,
}

/// Turns the queries and keys of `qkv` by the angles of their positions.
pub fn rotate(qkv: FlexTensor, heads: Heads, cos: &FlexTensor, sin: &FlexTensor, direction: Direction) -> FlexTensor {
    let [_, seq, width] = qkv.layout().shape().dims();
    let [n_rows, _, half] = cos.layout().shape().dims();
    let (cos, sin) = (contiguous(cos), contiguous(sin));
    let (cos, sin) = (floats(&cos), floats(&sin));
    let d_head = heads.d_head(width);
    let n_turned = (heads.queries + heads.keys) * d_head;
    let sign = if direction == Direction::Forward { 1.0 } else { -1.0 };
    let mut qkv = exclusive(qkv);
    let numbers = qkv.storage_mut::<f32>();
    let n_each = (TASK / width).max(1);
    let turn = |(i, positions): (usize, &mut [f32])| {
        for (j, position) in positions.chunks_exact_mut(width).enumerate() {
            let at = i * n_each + j;
            let angles = if n_rows == 1 { at % seq } else { at } * half;
            turn_heads(&mut position[..n_turned], d_head, &cos[angles..][..half], &sin[angles..][..half], sign);
        }
    };
    if numbers.len() <= TASK {
        numbers.chunks_mut(n_each * width).enumerate().for_each(turn);
    } else {
        numbers.par_chunks_mut(n_each * width).enumerate().for_each(turn);
    }
    qkv
}

simd! {
    /// Turns each head's channels by the angles of one position.
    pub fn turn_heads(heads: &mut [f32], d_head: usize, cos: &[f32], sin: &[f32], sign: f32) {
        let half = cos.len();
        for head in heads.chunks_exact_mut(d_head) {
            let (first, second) = head[..2 * half].split_at_mut(half);
            for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                let sin = sign * sin;
                let turned = fma(*a, *cos, -(*b * sin));
                *b = fma(*b, *cos, *a * sin);
                *a = turned;
            }
        }
    }
}
