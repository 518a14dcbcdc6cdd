//! The operations of this module as ordinary tensor operations: the definition of what the fused ones compute.

use burn::tensor::{Bool, DType, FloatDType, IndexingUpdateOp, Int, Tensor, TensorData, activation, module, s};

use super::attention::{Angles, Heads};
use super::fault::{self, Fault};
use super::{Activation, AdamWParam};

pub(super) fn linear<const D: usize>(x: Tensor<D>, weight: Tensor<2>, bias: Option<Tensor<1>>) -> Tensor<D> {
    let weight = in_type(weight, x.dtype());
    burn::tensor::module::linear(x, weight, bias)
}

pub(super) fn bias_activation<const D: usize>(x: Tensor<D>, bias: Tensor<1>, activation: Activation) -> Tensor<D> {
    fault::apply(Fault::Activation, activate(x + bias.unsqueeze(), activation))
}

pub(super) fn activate<const D: usize>(x: Tensor<D>, activation: Activation) -> Tensor<D> {
    match activation {
        Activation::Relu => activation::relu(x),
        Activation::GeluTanh => {
            // √(2/π)
            let slope = (2.0 / std::f64::consts::PI).sqrt();
            let inner = (x.clone() + x.clone().square() * x.clone() * 0.044_715) * slope;
            x * 0.5 * (inner.tanh() + 1.0)
        }
        Activation::Gelu => {
            let inner = (x.clone() * std::f64::consts::FRAC_1_SQRT_2).erf();
            x * 0.5 * (inner + 1.0)
        }
        Activation::Silu => x.clone() * activation::sigmoid(x),
    }
}

pub(super) fn rms_norm<const D: usize>(x: Tensor<D>, gamma: Tensor<1>, eps: f64) -> Tensor<D> {
    let mean_square = x.clone().square().mean_dim(D - 1); // [.., 1]
    x / (mean_square + eps).sqrt() * gamma.unsqueeze()
}

pub(super) fn rotate(qkv: &Tensor<3>, heads: Heads, angles: &Angles) -> Tensor<3> {
    let ([batch, seq, width], [n_rows, _, half]) = (qkv.dims(), angles.cos.dims());
    let d_head = heads.d_head(width);
    let n_turned = heads.queries + heads.keys;
    let x = qkv.clone().slice(s![.., .., 0..n_turned * d_head]).reshape([batch, seq, n_turned, d_head]);
    let [cos, sin] = [&angles.cos, &angles.sin].map(|table| table.clone().reshape([n_rows, seq, 1, half]));
    let a = x.clone().slice(s![.., .., .., 0..half]);
    let b = x.clone().slice(s![.., .., .., half..2 * half]);
    let mut parts = vec![a.clone() * cos.clone() - b.clone() * sin.clone(), b * cos + a * sin];
    if 2 * half < d_head {
        parts.push(x.slice(s![.., .., .., 2 * half..d_head]));
    }
    let turned = Tensor::cat(parts, 3).reshape([batch, seq, n_turned * d_head]);
    Tensor::cat(vec![turned, qkv.clone().slice(s![.., .., n_turned * d_head..width])], 2)
}

pub(super) fn layer_norm<const D: usize>(x: Tensor<D>, gamma: Tensor<1>, beta: Tensor<1>, eps: f64) -> Tensor<D> {
    let centred = x.clone() - x.mean_dim(D - 1);
    let variance = centred.clone().square().mean_dim(D - 1); // [.., 1]
    fault::apply(Fault::LayerNorm, centred / (variance + eps).sqrt() * gamma.unsqueeze() + beta.unsqueeze())
}

pub(super) fn embed(
    tokens: Tensor<2>,
    position_table: Tensor<2>,
    ids: Tensor<2, Int>,
    positions: Option<&[usize]>,
    start: usize,
) -> Tensor<3> {
    let ([batch, seq], [_, d], device) = (ids.dims(), position_table.dims(), ids.device());
    let placed = match positions {
        // [1, seq, d]
        None => position_table.slice([start..start + seq, 0..d]).unsqueeze::<3>(),
        Some(positions) => {
            let positions: Vec<i64> = positions.iter().map(|&position| position as i64).collect();
            let positions = Tensor::from_data(TensorData::new(positions, [batch, seq]), &device);
            module::embedding(position_table, positions)
        }
    };
    in_type(module::embedding(tokens, ids), placed.dtype()) + placed
}

pub(super) fn lookup(tokens: Tensor<2>, ids: Tensor<2, Int>) -> Tensor<3> {
    in_f32(module::embedding(tokens, ids))
}

/// `x` as it is, or in the type of what it is computed with.
pub(super) fn in_type<const D: usize>(x: Tensor<D>, dtype: DType) -> Tensor<D> {
    if x.dtype() == dtype { x } else { x.cast(FloatDType::from(dtype)) }
}

pub(super) fn attention(
    qkv: &Tensor<3>,
    first_key: Option<Tensor<2, Int>>,
    heads: Heads,
    dropout: Option<Tensor<4>>,
) -> Tensor<3> {
    let [batch, seq, _] = qkv.dims();
    let (device, n_heads) = (qkv.device(), heads.queries);
    let [queries, keys, values] = split_heads(qkv, heads); // [batch, heads, seq, d_head]
    let [keys, values] = [keys, values].map(|x| for_each_query(x, heads));
    let columns = Tensor::<1, Int>::arange(0..seq as i64, &device).reshape([1, 1, seq]);
    let rows = columns.clone().reshape([1, seq, 1]);
    let mut hidden = columns.clone().greater(rows.expand([1, seq, seq])); // [1, seq, seq]
    if let Some(first_key) = first_key {
        let before =
            columns.expand([batch, seq, seq]).lower(first_key.reshape([batch, seq, 1]).expand([batch, seq, seq]));
        hidden = hidden.expand([batch, seq, seq]).bool_or(before);
    }
    let [n_masks, _, _] = hidden.dims();
    let hidden = hidden.reshape([n_masks, 1, seq, seq]).expand([batch, n_heads, seq, seq]);
    weigh(queries, keys, values, hidden, dropout)
}

pub(super) fn attention_cached(
    qkv: &Tensor<3>,
    keys: Tensor<4>,
    values: Tensor<4>,
    cached: &[usize],
    heads: Heads,
) -> (Tensor<3>, Tensor<4>, Tensor<4>) {
    let [batch, new, _] = qkv.dims();
    let device = qkv.device();
    let [queries, new_keys, new_values] = split_heads(qkv, heads); // [batch, heads, new, d_head]
    let (keys, values) = append(keys, values, new_keys, new_values, cached);
    let n_keys = cached.iter().max().map_or(0, |&longest| longest + new);
    let hidden: Vec<bool> = cached
        .iter()
        .flat_map(|&cached| (cached..cached + new).flat_map(move |query| (0..n_keys).map(move |key| key > query)))
        .collect();
    let hidden = Tensor::<3, Bool>::from_data(TensorData::new(hidden, [batch, new, n_keys]), &device)
        .reshape([batch, 1, new, n_keys])
        .expand([batch, heads.queries, new, n_keys]);
    let seen_keys = for_each_query(keys.clone().slice(s![.., .., .., 0..n_keys]).transpose(), heads);
    let seen_values = for_each_query(values.clone().slice(s![.., .., 0..n_keys, ..]), heads);
    (weigh(queries, seen_keys, seen_values, hidden, None), keys, values)
}

/// Writes new keys and values into the cache, each row's behind its `cached` earlier positions.
///
/// # Shapes
/// - `keys`: `[batch, n_heads, d_head, capacity]`, `values`: `[batch, n_heads, capacity, d_head]`
/// - `new_keys`, `new_values`: `[batch, n_heads, new, d_head]`
fn append(
    keys: Tensor<4>,
    values: Tensor<4>,
    new_keys: Tensor<4>,
    new_values: Tensor<4>,
    cached: &[usize],
) -> (Tensor<4>, Tensor<4>) {
    let [batch, n_heads, new, d_head] = new_keys.dims();
    if let Some(&start) = cached.first().filter(|&first| cached.iter().all(|start| start == first)) {
        let keys = keys.slice_assign(s![.., .., .., start..start + new], new_keys.transpose());
        return (keys, values.slice_assign(s![.., .., start..start + new, ..], new_values));
    }
    // [row, head, position] of each vector of values, and with the dimension of each number of the keys
    let vectors = (0..batch).flat_map(|row| {
        (0..n_heads).flat_map(move |head| (cached[row]..cached[row] + new).map(move |position| [row, head, position]))
    });
    let of_values: Vec<i64> = vectors.clone().flatten().map(|index| index as i64).collect();
    let of_keys: Vec<i64> = vectors
        .flat_map(|[row, head, position]| (0..d_head).flat_map(move |dim| [row, head, dim, position]))
        .map(|index| index as i64)
        .collect();
    let (n, device) = (batch * n_heads * new, keys.device());
    let of_keys = Tensor::<2, Int>::from_data(TensorData::new(of_keys, [n * d_head, 4]), &device);
    let of_values = Tensor::<2, Int>::from_data(TensorData::new(of_values, [n, 3]), &device);
    let keys = keys.scatter_nd(of_keys, new_keys.reshape([n * d_head]), IndexingUpdateOp::Assign);
    (keys, values.scatter_nd(of_values, new_values.reshape([n, d_head]), IndexingUpdateOp::Assign))
}

/// The packed projection to queries, keys and values, each `[batch, heads, seq, d_head]` with its own number of heads.
fn split_heads(qkv: &Tensor<3>, heads: Heads) -> [Tensor<4>; 3] {
    let [batch, seq, width] = qkv.dims();
    let d_head = heads.d_head(width);
    let Heads { queries, keys } = heads;
    [(0, queries), (queries, keys), (queries + keys, keys)].map(|(first, n_heads)| {
        qkv.clone()
            .slice(s![.., .., first * d_head..(first + n_heads) * d_head])
            .reshape([batch, seq, n_heads, d_head])
            .swap_dims(1, 2)
    })
}

/// Keys or values, `[batch, heads, n, d_head]`, once for each head of queries.
fn for_each_query(x: Tensor<4>, heads: Heads) -> Tensor<4> {
    let ([batch, n_heads, n, d_head], group) = (x.dims(), heads.group());
    if group == 1 {
        return x;
    }
    x.reshape([batch, n_heads, 1, n, d_head]).expand([batch, n_heads, group, n, d_head]).reshape([
        batch,
        heads.queries,
        n,
        d_head,
    ])
}

/// Softmax attention; `hidden` marks what a query does not see. Returns `[batch, queries, d_model]`.
fn weigh(
    queries: Tensor<4>,
    keys: Tensor<4>,
    values: Tensor<4>,
    hidden: Tensor<4, Bool>,
    dropout: Option<Tensor<4>>,
) -> Tensor<3> {
    let [batch, n_heads, n_queries, d_head] = queries.dims();
    let dtype = values.dtype();
    let scores = in_f32(queries.matmul(keys.transpose()) / (d_head as f64).sqrt());
    let mut weights = activation::softmax(scores.mask_fill(hidden, f32::NEG_INFINITY), 3);
    if let Some(dropout) = dropout {
        weights = weights * dropout;
    }
    if dtype != DType::F32 {
        weights = weights.cast(FloatDType::from(dtype));
    }
    let mixed = weights.matmul(values).swap_dims(1, 2).reshape([batch, n_queries, n_heads * d_head]);
    fault::apply(Fault::Attention, mixed)
}

/// `x`, or a copy of it in f32 where it has fewer bits: exponentials and long sums need them.
fn in_f32<const D: usize>(x: Tensor<D>) -> Tensor<D> {
    in_type(x, DType::F32)
}

pub(super) fn logits(hidden: Tensor<2>, head: Tensor<2>) -> Tensor<2> {
    let head = in_type(head, hidden.dtype());
    hidden.matmul(head.transpose())
}

/// `[n, vocab_size]`
pub(super) fn log_probs(hidden: Tensor<2>, head: Tensor<2>, scale: f64) -> Tensor<2> {
    let mut logits = in_f32(self::logits(hidden, head));
    if scale != 1.0 {
        logits = logits * scale;
    }
    activation::log_softmax(logits, 1)
}

/// One of each row of `log_probs`: `[n]`.
pub(super) fn of_targets(log_probs: Tensor<2>, targets: Tensor<1, Int>) -> Tensor<1> {
    let [n, _] = log_probs.dims();
    log_probs.gather(1, targets.reshape([n, 1])).reshape([n])
}

/// Of each row of `log_probs`, without gradient: `[n]`.
pub(super) fn entropy(log_probs: Tensor<2>) -> Tensor<1> {
    let [n, _] = log_probs.dims();
    let log_probs = log_probs.detach();
    -(log_probs.clone().exp() * log_probs).sum_dim(1).reshape([n])
}

pub(super) fn adamw_update(param: AdamWParam) -> [Tensor<1>; 3] {
    let AdamWParam { param, grad, m, v, step } = param;
    let grad = grad * step.grad_scale;
    let m = m * step.beta_1 + grad.clone() * (1.0 - step.beta_1);
    let v = v * step.beta_2 + grad.square() * (1.0 - step.beta_2);
    let [correction_1, correction_2] = step.corrections();
    let direction = (m.clone() / correction_1) / ((v.clone() / correction_2).sqrt() + step.eps);
    [param * (1.0 - step.lr * step.weight_decay) - direction * step.lr, m, v]
}

pub(super) fn sum_of_squares(x: Tensor<1>) -> f64 {
    f64::from(x.square().sum().into_scalar::<f32>())
}
