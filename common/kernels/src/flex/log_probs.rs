//! Log-probabilities of targets and entropies from hidden states, without the `[n, vocab_size]` logits.
//!
//! Logits live a tile at a time and transposed, one row a token of the vocabulary, so that the softmax runs down the
//! columns, a vector register full of positions at a time. Hidden states are rearranged once for all tiles.

use burn_flex::FlexTensor;
use rayon::prelude::*;

use super::gemm::{Mat, MatMut, Output, Packed, Threads, gemm, gemm_packed};
use super::simd::{add_assign, exp, fma, simd};
use super::stored::{Stored, widened, with_numbers};
use super::{contiguous, floats, indices, matrix_dims, tensor, unset, with_scratch};

/// Positions in a tile of the forward: two of the matrix kernel's 48.
const POSITIONS: usize = 96;
/// Tokens of the vocabulary in a tile.
const TOKENS: usize = 256;
/// Most positions that the backward takes at once.
const BLOCK: usize = 512;
/// Most logits, or gradients of logits, that are held at once: 64 MiB of them, and twice as many where the head learns,
/// whose gradient is as large and is gone through for each block.
const HELD: [usize; 2] = [1 << 24, 1 << 25];

/// Results of the forward, each `[n]`.
pub struct LogProbs {
    /// Log-probability of each target.
    pub of_targets: FlexTensor,
    /// Entropy of each distribution.
    pub entropy: FlexTensor,
    /// Log-sum-exp of each position's logits, for the backward.
    pub lse: FlexTensor,
}

/// The softmax of one tile of positions, over the tokens seen so far.
struct Running {
    highest: [f32; POSITIONS],
    /// `Σ exp(z − highest)`
    total: [f32; POSITIONS],
    /// `Σ exp(z − highest) · (z − highest)`
    weighted: [f32; POSITIONS],
}

/// Log-probabilities and entropies of the softmax of `scale · hidden · headᵀ`.
pub fn forward(hidden: &FlexTensor, head: &FlexTensor, targets: &FlexTensor, scale: f64) -> LogProbs {
    let (n, d_model) = matrix_dims(hidden);
    let (vocab_size, _) = matrix_dims(head);
    let targets = target_ids(targets, vocab_size);
    let (hidden, head) = (contiguous(hidden), contiguous(head));
    let [of_targets, entropy, lse] =
        with_numbers!(head of head => softmax_of_targets(floats(&hidden), head, d_model, &targets, scale as f32))
            .map(|numbers| tensor(numbers, [n]));
    LogProbs { of_targets, entropy, lse }
}

/// The three results of [`forward`].
fn softmax_of_targets<T: Stored>(
    hidden: &[f32],
    head: &[T],
    d_model: usize,
    targets: &[usize],
    scale: f32,
) -> [Vec<f32>; 3] {
    let n = targets.len();
    let (mut log_probs, mut entropy, mut lse) = (unset(n), unset(n), unset(n));
    log_probs
        .par_chunks_mut(POSITIONS)
        .zip(entropy.par_chunks_mut(POSITIONS))
        .zip(lse.par_chunks_mut(POSITIONS))
        .zip(targets.par_chunks(POSITIONS).zip(hidden.par_chunks(POSITIONS * d_model)))
        .for_each(|(((log_probs, entropy), lse), (targets, hidden))| {
            let n = targets.len();
            let mut running = Running {
                highest: [f32::NEG_INFINITY; POSITIONS],
                total: [0.0; POSITIONS],
                weighted: [0.0; POSITIONS],
            };
            let hidden = Packed::new(Mat::rows(hidden, n, d_model, d_model).t(), Threads::One);
            with_scratch(TOKENS * n, |logits| {
                for (i, head) in head.chunks(TOKENS * d_model).enumerate() {
                    let n_tokens = head.len() / d_model;
                    let logits = &mut logits[..n_tokens * n]; // [n_tokens, n]
                    logits_of_tile(logits, head, d_model, &hidden, scale);
                    add_tokens(&mut running, logits, n);
                    for (position, target) in targets.iter().enumerate() {
                        if (i * TOKENS..i * TOKENS + n_tokens).contains(target) {
                            log_probs[position] = logits[(target - i * TOKENS) * n + position];
                        }
                    }
                }
            });
            for position in 0..n {
                let log_total = running.total[position].ln();
                lse[position] = running.highest[position] + log_total;
                // z_target − highest is exact where it matters; log-sum-exp itself would round at the size of z.
                log_probs[position] = (log_probs[position] - running.highest[position]) - log_total;
                entropy[position] = log_total - running.weighted[position] / running.total[position];
            }
        });
    [log_probs, entropy, lse]
}

/// `logits = scale · head · hidden` for some tokens of the vocabulary, `[n_tokens, n]`.
fn logits_of_tile<T: Stored>(logits: &mut [f32], head: &[T], d_model: usize, hidden: &Packed, scale: f32) {
    let n_tokens = head.len() / d_model;
    let n = logits.len() / n_tokens;
    let logits = MatMut::rows(logits, n_tokens, n, n);
    widened(head, |head| {
        let head = Mat::rows(head, n_tokens, d_model, d_model);
        gemm_packed(logits, Output::Overwrite, head, hidden, scale, Threads::One);
    });
}

simd! {
    /// Turns logits `[n_tokens, n]` into the gradients they get from the log-sum-exp: `−p · grad · scale`.
    fn slopes_of_logits(slopes: &mut [f32], lse: &[f32], grad: &[f32], scale: f32) {
        for slopes in slopes.chunks_exact_mut(lse.len()) {
            for ((slope, lse), grad) in slopes.iter_mut().zip(lse).zip(grad) {
                *slope = exp(*slope - lse) * (-scale * grad);
            }
        }
    }

    /// Takes a tile of logits `[n_tokens, n]` into the running softmax.
    fn add_tokens(running: &mut Running, logits: &[f32], n: usize) {
        let before = running.highest;
        let highest = &mut running.highest[..n];
        for logits in logits.chunks_exact(n) {
            for (highest, logit) in highest.iter_mut().zip(logits) {
                *highest = if *logit > *highest { *logit } else { *highest };
            }
        }
        let (total, weighted) = (&mut running.total[..n], &mut running.weighted[..n]);
        for position in 0..n {
            // Nothing to rescale before the first tile.
            if before[position] > f32::NEG_INFINITY {
                let rise = highest[position] - before[position];
                let factor = exp(-rise);
                weighted[position] = factor * (weighted[position] - rise * total[position]);
                total[position] *= factor;
            }
        }
        for logits in logits.chunks_exact(n) {
            for (((total, weighted), highest), logit) in total.iter_mut().zip(&mut *weighted).zip(&*highest).zip(logits) {
                let below = logit - highest;
                let weight = exp(below);
                *total += weight;
                *weighted = fma(weight, below, *weighted);
            }
        }
    }
}

/// Gradients of `hidden` and `head` for the gradient `grad` of the log-probabilities.
///
/// Logits are computed again, a block of positions at a time, from the log-sum-exp. A task has its own tokens of the
/// vocabulary, so that nobody else adds to its rows of the head's gradient, which is computed if the head `learns`.
pub fn backward(
    hidden: &FlexTensor,
    head: &FlexTensor,
    targets: &FlexTensor,
    scale: f64,
    lse: &FlexTensor,
    grad: &FlexTensor,
    learns: bool,
) -> (FlexTensor, Option<FlexTensor>) {
    let (n, d_model) = matrix_dims(hidden);
    let (vocab_size, _) = matrix_dims(head);
    let targets = target_ids(targets, vocab_size);
    let (hidden, head, lse, grad) = (contiguous(hidden), contiguous(head), contiguous(lse), contiguous(grad));
    let (hidden, lse, grad) = (floats(&hidden), floats(&lse), floats(&grad));
    let (hidden_grad, head_grad) = with_numbers!(head of head => {
        gradients(hidden, head, d_model, &targets, scale as f32, lse, grad, learns)
    });
    (tensor(hidden_grad, [n, d_model]), head_grad.map(|grad| tensor(grad, [vocab_size, d_model])))
}

/// The two results of [`backward`].
fn gradients<T: Stored>(
    hidden: &[f32],
    head: &[T],
    d_model: usize,
    targets: &[usize],
    scale: f32,
    lse: &[f32],
    grad: &[f32],
    learns: bool,
) -> (Vec<f32>, Option<Vec<f32>>) {
    let (n, vocab_size) = (targets.len(), head.len() / d_model);
    let mut hidden_grad = unset(n * d_model);
    let mut head_grad = if learns { vec![0.0; vocab_size * d_model] } else { Vec::new() };
    let block = block_of(n, vocab_size, learns);
    let mut slopes = unset(vocab_size * block);
    for start in (0..n).step_by(block) {
        let n = block.min(n - start);
        let span = start..start + n;
        let (targets, lse, grad) = (&targets[span.clone()], &lse[span.clone()], &grad[span]);
        let hidden = &hidden[start * d_model..][..n * d_model];
        let hidden = Mat::rows(hidden, n, d_model, d_model);
        let (columns, hidden) = (Packed::new(hidden.t(), Threads::All), Packed::new(hidden, Threads::All));
        let slopes = &mut slopes[..vocab_size * n]; // [vocab_size, n]
        let mut head_grads: Vec<Option<&mut [f32]>> = head_grad.chunks_mut(TOKENS * d_model).map(Some).collect();
        head_grads.resize_with(vocab_size.div_ceil(TOKENS), || None);
        slopes.par_chunks_mut(TOKENS * n).zip(head_grads).zip(head.par_chunks(TOKENS * d_model)).enumerate().for_each(
            |(i, ((slopes, head_grad), head))| {
                let n_tokens = head.len() / d_model;
                logits_of_tile(slopes, head, d_model, &columns, scale);
                slopes_of_logits(slopes, lse, grad, scale);
                for (position, target) in targets.iter().enumerate() {
                    if (i * TOKENS..i * TOKENS + n_tokens).contains(target) {
                        slopes[(target - i * TOKENS) * n + position] += grad[position] * scale;
                    }
                }
                let Some(head_grad) = head_grad else { return };
                let slopes = Mat::rows(slopes, n_tokens, n, n);
                let head_grad = MatMut::rows(head_grad, n_tokens, d_model, d_model);
                gemm_packed(head_grad, Output::Accumulate, slopes, &hidden, 1.0, Threads::One);
            },
        );
        gemm(
            MatMut::rows(&mut hidden_grad[start * d_model..], n, d_model, d_model),
            Output::Overwrite,
            Mat::rows(slopes, vocab_size, n, n).t(),
            Mat::rows(head, vocab_size, d_model, d_model),
            1.0,
            Threads::All,
        );
    }
    (hidden_grad, learns.then_some(head_grad))
}

/// Positions whose logits are held at once, if the head `learns` or not.
fn block_of(n: usize, vocab_size: usize, learns: bool) -> usize {
    (HELD[usize::from(learns)] / vocab_size.max(1) / 64 * 64).clamp(64, BLOCK).min(n.max(1))
}

/// A cross-entropy and its gradients.
#[derive(Debug, Clone)]
pub struct CrossEntropy {
    /// `−Σ log p_target · weight`, `[1]`
    pub loss: FlexTensor,
    /// Of the hidden states.
    pub hidden_grad: FlexTensor,
    /// Of the head, where it learns.
    pub head_grad: Option<FlexTensor>,
}

/// `−Σ log p_target · weight`, without gradients.
pub fn cross_entropy(hidden: &FlexTensor, head: &FlexTensor, targets: &FlexTensor, weight: f64) -> FlexTensor {
    let log_probs = forward(hidden, head, targets, 1.0).of_targets;
    let sum: f64 = floats(&log_probs).iter().map(|&log_prob| f64::from(log_prob)).sum();
    tensor(vec![(-sum * weight) as f32], [1])
}

/// `−Σ log p_target · weight` with its gradients, from one computation of the logits: what they will be multiplied by
/// is known beforehand, so the backward need not compute them again.
///
/// That of the head is computed if it `learns`.
///
/// With `e = exp(z − max z)`: `∂hidden_i = w (Σ_v e_vi head_v / Σ_v e_vi − head_target)`, and the head's likewise.
pub fn cross_entropy_with_gradients(
    hidden: &FlexTensor,
    head: &FlexTensor,
    targets: &FlexTensor,
    weight: f64,
    learns: bool,
) -> CrossEntropy {
    let (n, d_model) = matrix_dims(hidden);
    let (vocab_size, _) = matrix_dims(head);
    let targets = target_ids(targets, vocab_size);
    let (hidden, head) = (contiguous(hidden), contiguous(head));
    let (loss, hidden_grad, head_grad) = with_numbers!(head of head => {
        loss_with_gradients(floats(&hidden), head, d_model, &targets, weight, learns)
    });
    CrossEntropy {
        loss: tensor(vec![loss as f32], [1]),
        hidden_grad: tensor(hidden_grad, [n, d_model]),
        head_grad: head_grad.map(|grad| tensor(grad, [vocab_size, d_model])),
    }
}

/// The three results of [`cross_entropy_with_gradients`].
fn loss_with_gradients<T: Stored>(
    hidden: &[f32],
    head: &[T],
    d_model: usize,
    targets: &[usize],
    weight: f64,
    learns: bool,
) -> (f64, Vec<f32>, Option<Vec<f32>>) {
    let (n, vocab_size) = (targets.len(), head.len() / d_model);
    let mut hidden_grad = unset(n * d_model);
    // Of a frozen head no more than room for a row, which `subtract_target` writes.
    let rows = if learns { vocab_size } else { 1 };
    let mut head_grad = if n == 0 { vec![0.0; rows * d_model] } else { unset(rows * d_model) };
    let block = block_of(n, vocab_size, learns);
    let n_tiles = vocab_size.div_ceil(TOKENS);
    let mut exps = unset(vocab_size * block);
    let mut scaled = unset(d_model * block);
    let mut per_tile = unset(n_tiles * block);
    let mut sum = 0.0f64;
    for start in (0..n).step_by(block) {
        let n = block.min(n - start);
        let targets = &targets[start..start + n];
        let hidden = &hidden[start * d_model..][..n * d_model];
        let exps = &mut exps[..vocab_size * n]; // [vocab_size, n]
        let per_tile = &mut per_tile[..n_tiles * n]; // [n_tiles, n]
        let mut factors = exponentials_of_block(hidden, head, targets, (&mut *exps, per_tile), &mut sum);
        for factor in &mut factors {
            sum += f64::from(*factor).ln();
            *factor = weight as f32 / *factor;
        }
        if learns {
            let scaled = &mut scaled[..n * d_model];
            for ((scaled, hidden), factor) in
                scaled.chunks_exact_mut(d_model).zip(hidden.chunks_exact(d_model)).zip(&factors)
            {
                scaled.iter_mut().zip(hidden).for_each(|(scaled, hidden)| *scaled = hidden * factor);
            }
            let scaled = Packed::new(Mat::rows(scaled, n, d_model, d_model), Threads::All);
            let output = if start == 0 { Output::Overwrite } else { Output::Accumulate };
            exps.par_chunks(TOKENS * n).zip(head_grad.par_chunks_mut(TOKENS * d_model)).for_each(
                |(exps, head_grad)| {
                    let n_tokens = exps.len() / n;
                    let out = MatMut::rows(head_grad, n_tokens, d_model, d_model);
                    gemm_packed(out, output, Mat::rows(exps, n_tokens, n, n), &scaled, 1.0, Threads::One);
                },
            );
        }
        let hidden_grad = &mut hidden_grad[start * d_model..][..n * d_model];
        gemm(
            MatMut::rows(hidden_grad, n, d_model, d_model),
            Output::Overwrite,
            Mat::rows(exps, vocab_size, n, n).t(),
            Mat::rows(head, vocab_size, d_model, d_model),
            1.0,
            Threads::All,
        );
        let rows = hidden_grad.chunks_exact_mut(d_model).zip(hidden.chunks_exact(d_model));
        for (((hidden_grad, hidden), &target), &factor) in rows.zip(targets).zip(&factors) {
            let span = target * d_model..(target + 1) * d_model;
            let of_head = if learns { span.clone() } else { 0..d_model };
            subtract_target(hidden_grad, &mut head_grad[of_head], hidden, &head[span], factor, weight as f32);
        }
    }
    (sum * weight, hidden_grad, learns.then_some(head_grad))
}

/// `exp(z − max z)` of a block's logits, `[vocab_size, n]`, and their sum over the vocabulary for each position.
///
/// `exps` takes the former, `per_tile` has room for `[n_tiles, n]` numbers. `−(z_target − max z)` of every position is added
/// to `sum`.
fn exponentials_of_block<T: Stored>(
    hidden: &[f32],
    head: &[T],
    targets: &[usize],
    (exps, per_tile): (&mut [f32], &mut [f32]),
    sum: &mut f64,
) -> Vec<f32> {
    let n = targets.len();
    let d_model = hidden.len() / n;
    let columns = Packed::new(Mat::rows(hidden, n, d_model, d_model).t(), Threads::All);
    let tiles = exps.par_chunks_mut(TOKENS * n).zip(per_tile.par_chunks_mut(n));
    tiles.zip(head.par_chunks(TOKENS * d_model)).for_each(|((logits, highest), head)| {
        logits_of_tile(logits, head, d_model, &columns, 1.0);
        highest.fill(f32::NEG_INFINITY);
        take_highest(highest, logits);
    });
    let mut highest = vec![f32::NEG_INFINITY; n];
    take_highest(&mut highest, per_tile);
    for (position, target) in targets.iter().enumerate() {
        *sum -= f64::from(exps[target * n + position] - highest[position]);
    }
    exps.par_chunks_mut(TOKENS * n).zip(per_tile.par_chunks_mut(n)).for_each(|(logits, total)| {
        total.fill(0.0);
        exponentials(logits, &highest, total);
    });
    let mut totals = vec![0.0; n];
    for total in per_tile.chunks_exact(n) {
        add_assign(&mut totals, total);
    }
    totals
}

simd! {
    /// Takes the rows of `numbers` into the largest number of each column.
    fn take_highest(highest: &mut [f32], numbers: &[f32]) {
        for row in numbers.chunks_exact(highest.len()) {
            for (highest, number) in highest.iter_mut().zip(row) {
                *highest = if *number > *highest { *number } else { *highest };
            }
        }
    }

    /// Turns logits into `exp(z − highest)` and adds the rows to `total`.
    fn exponentials(logits: &mut [f32], highest: &[f32], total: &mut [f32]) {
        for row in logits.chunks_exact_mut(highest.len()) {
            for ((logit, highest), total) in row.iter_mut().zip(highest).zip(total.iter_mut()) {
                *logit = exp(*logit - highest);
                *total += *logit;
            }
        }
    }

    /// Scales the gradient of a hidden state, then takes what the target contributes from both gradients.
    fn subtract_target<T: Stored>(
        hidden_grad: &mut [f32],
        head_grad: &mut [f32],
        hidden: &[f32],
        head: &[T],
        factor: f32,
        weight: f32,
    ) {
        for (((hidden_grad, head_grad), hidden), head) in hidden_grad.iter_mut().zip(head_grad).zip(hidden).zip(head) {
            *hidden_grad = fma(-weight, head.widen(), *hidden_grad * factor);
            *head_grad = fma(-weight, *hidden, *head_grad);
        }
    }
}

/// The targets as indices.
///
/// # Panics
/// If one is not below `vocab_size`.
fn target_ids(targets: &FlexTensor, vocab_size: usize) -> Vec<usize> {
    let targets = indices(targets);
    let wrong = targets.iter().find(|&&target| target >= vocab_size);
    assert!(wrong.is_none(), "target {wrong:?} in a vocabulary of {vocab_size}");
    targets
}
