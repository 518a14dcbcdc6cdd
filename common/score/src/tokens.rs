//! One number for every token of a response: log-probabilities and values.

use std::ops::ControlFlow;

use burn::tensor::{Device, IndexingUpdateOp, Int, Tensor, TensorData, TensorReadError};
use group::Share;
use model::{Gpt, Layout, ScalarGpt, loss};
use text::data::collate;

use crate::{ScoreError, UNWATCHED, Watch, by_length};

/// The numbers of some responses, each with the response's place.
pub type Numbered = Vec<(usize, Vec<f32>)>;

/// Prompts with their responses in one right-padded batch, and where the response tokens are predicted.
///
/// The state *before* a token predicts it and holds its value: position `n_prompt − 1` for the first token of a
/// response. The last token is therefore no input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResponseBatch {
    ids: Vec<i32>,
    rows: usize,
    seq: usize,
    /// Indices into `[rows · seq]`, response after response.
    positions: Vec<i64>,
    /// The response tokens themselves.
    targets: Vec<i64>,
}

impl ResponseBatch {
    /// Collates prompts and the responses to them.
    ///
    /// # Panics
    /// If a prompt or a response is empty.
    pub fn new<'a>(responses: impl IntoIterator<Item = (&'a [u32], &'a [u32])>) -> Self {
        let responses: Vec<_> = responses.into_iter().collect();
        let rows: Vec<Vec<u32>> =
            responses.iter().map(|(prompt, response)| [prompt, &response[..response.len() - 1]].concat()).collect();
        // The padding id is arbitrary: no position that is read comes after it.
        let padded = collate::right_pad(&rows, 0);
        let mut positions = Vec::new();
        let mut targets = Vec::new();
        for (i, (prompt, response)) in responses.iter().enumerate() {
            let first = i * padded.seq + prompt.len() - 1;
            positions.extend((first..first + response.len()).map(|position| position as i64));
            targets.extend(response.iter().map(|&id| i64::from(id)));
        }
        Self { ids: padded.ids, rows: padded.batch, seq: padded.seq, positions, targets }
    }

    /// Response tokens of all rows.
    pub fn n_tokens(&self) -> usize {
        self.targets.len()
    }

    /// `[rows, seq]`
    fn inputs(&self, device: &Device) -> Tensor<2, Int> {
        Tensor::from_data(TensorData::new(self.ids.clone(), [self.rows, self.seq]), device)
    }

    /// Indices into `[rows · seq]` of the states before the response tokens, `[n_tokens]`.
    fn positions(&self, device: &Device) -> Tensor<1, Int> {
        Tensor::from_data(TensorData::new(self.positions.clone(), [self.n_tokens()]), device)
    }

    /// The response tokens, `[n_tokens]`.
    fn targets(&self, device: &Device) -> Tensor<1, Int> {
        Tensor::from_data(TensorData::new(self.targets.clone(), [self.n_tokens()]), device)
    }
}

/// Log-probabilities of the response tokens in nats, with gradient on an autodiff device.
///
/// # Shapes
/// - returns `[n_tokens]`, response after response
pub fn log_probs(gpt: &Gpt, batch: &ResponseBatch, temperature: f64) -> Tensor<1> {
    loss::token_log_probs(gpt, states(gpt, batch), batch.targets(&gpt.device()), temperature)
}

/// [`log_probs`], and entropies of the distributions that the tokens were drawn from, in nats and without gradient.
///
/// # Shapes
/// - returns `([n_tokens], [n_tokens])`
pub fn log_probs_and_entropy(gpt: &Gpt, batch: &ResponseBatch, temperature: f64) -> (Tensor<1>, Tensor<1>) {
    loss::token_log_probs_and_entropy(gpt, states(gpt, batch), batch.targets(&gpt.device()), temperature)
}

/// Sums of numbers of response tokens over each response, with gradient where they have one.
///
/// # Shapes
/// - `of_tokens`: `[n_tokens]`, response after response
/// - returns `[rows]`
///
/// # Panics
/// If there is not one number a response token.
pub fn sum_by_response(batch: &ResponseBatch, of_tokens: Tensor<1>) -> Tensor<1> {
    let device = of_tokens.device();
    let rows: Vec<i64> = batch.positions.iter().map(|position| position / batch.seq as i64).collect();
    let rows = Tensor::from_data(TensorData::new(rows, [batch.n_tokens()]), &device);
    Tensor::zeros([batch.rows], &device).select_assign(0, rows, of_tokens, IndexingUpdateOp::Add)
}

/// Only states before response tokens meet the vocabulary: `[n_tokens, d_model]`.
fn states(gpt: &Gpt, batch: &ResponseBatch) -> Tensor<2> {
    let device = gpt.device();
    let hidden = gpt.hidden(batch.inputs(&device), &Layout::right_padded());
    let [rows, seq, d_model] = hidden.dims();
    hidden.reshape([rows * seq, d_model]).select(0, batch.positions(&device))
}

/// Values of the states before the response tokens, with gradient on an autodiff device.
///
/// # Shapes
/// - returns `[n_tokens]`, response after response
pub fn values(model: &ScalarGpt, batch: &ResponseBatch) -> Tensor<1> {
    let device = model.device();
    model.forward_at(batch.inputs(&device), &Layout::right_padded(), batch.positions(&device), None)
}

/// Computes a number for every response token, `batch_size` responses at a time, on the host response by response.
///
/// `responses` are pairs of prompt and response; neither their order nor the batch size changes a number beyond
/// rounding.
///
/// # Errors
/// If the device cannot be read.
///
/// # Panics
/// If a prompt or response is empty, `batch_size` is 0, or `compute` does not return `[n_tokens]`.
pub fn of_response_tokens(
    responses: &[(&[u32], &[u32])],
    batch_size: usize,
    compute: impl Fn(&ResponseBatch) -> Tensor<1>,
) -> Result<Vec<Vec<f32>>, TensorReadError> {
    let numbered = share_of_responses(responses, batch_size, Share::WHOLE, UNWATCHED, compute)?;
    Ok(in_place(responses.len(), numbered.unwrap_or_default()))
}

/// [`of_response_tokens`], with `watch` looking on.
///
/// # Errors
/// If the device cannot be read, or `watch` breaks it off.
///
/// # Panics
/// As there.
pub fn of_response_tokens_watched(
    responses: &[(&[u32], &[u32])],
    batch_size: usize,
    watch: Watch<'_>,
    compute: impl Fn(&ResponseBatch) -> Tensor<1>,
) -> Result<Vec<Vec<f32>>, ScoreError> {
    let numbered = of_share_of_responses(responses, batch_size, Share::WHOLE, watch, compute)?;
    Ok(in_place(responses.len(), numbered))
}

fn in_place(n: usize, numbered: Numbered) -> Vec<Vec<f32>> {
    let mut all = vec![Vec::new(); n];
    for (i, of_response) in numbered {
        all[i] = of_response;
    }
    all
}

/// One rank's share of the batches that [`of_response_tokens`] makes: the numbers of its responses, each with the response's.
///
/// # Errors
/// As [`of_response_tokens_watched`].
///
/// # Panics
/// As there.
pub fn of_share_of_responses(
    responses: &[(&[u32], &[u32])],
    batch_size: usize,
    share: Share,
    watch: Watch<'_>,
    compute: impl Fn(&ResponseBatch) -> Tensor<1>,
) -> Result<Numbered, ScoreError> {
    share_of_responses(responses, batch_size, share, watch, compute)?.ok_or(ScoreError::Stopped)
}

/// [`of_share_of_responses`]; `None` if `watch` broke it off.
fn share_of_responses(
    responses: &[(&[u32], &[u32])],
    batch_size: usize,
    share: Share,
    watch: Watch<'_>,
    compute: impl Fn(&ResponseBatch) -> Tensor<1>,
) -> Result<Option<Numbered>, TensorReadError> {
    let batches = by_length(responses.iter().map(|(prompt, response)| prompt.len() + response.len()), batch_size);
    let mut all = Vec::new();
    for batch in &batches[share.of(batches.len())] {
        let numbers = compute(&ResponseBatch::new(batch.iter().map(|&i| responses[i])));
        let numbers = numbers.try_into_vec_as::<f32>()?;
        let mut rest = numbers.as_slice();
        for &i in batch {
            let (of_response, others) = rest.split_at(responses[i].1.len());
            all.push((i, of_response.to_vec()));
            rest = others;
        }
        if watch(batch.len()) == ControlFlow::Break(()) {
            return Ok(None);
        }
    }
    Ok(Some(all))
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::rng::Streams;
    use base::testing::assert_close;
    use model::GptConfig;

    // Sums of a few dozen f32 products of order one, in another order.
    const REORDERED: f32 = 1e-5;

    fn models() -> (Gpt, ScalarGpt) {
        let config =
            GptConfig { d_model: 16, n_layers: 2, n_heads: 2, d_ff: 32, max_seq_len: 32, ..GptConfig::gpt2(41) };
        let streams = Streams::new(3);
        let gpt = Gpt::new(&config, &streams, &Device::flex());
        (gpt.clone(), ScalarGpt::new(gpt, &streams))
    }

    /// Prompts and responses of these lengths.
    fn responses(lengths: &[(usize, usize)]) -> Vec<(Vec<u32>, Vec<u32>)> {
        let mut rng = Streams::new(5).get("test", 0);
        let mut ids = |n: usize| (0..n).map(|_| rng.below(41) as u32).collect();
        lengths.iter().map(|&(prompt, response)| (ids(prompt), ids(response))).collect()
    }

    fn pairs(responses: &[(Vec<u32>, Vec<u32>)]) -> Vec<(&[u32], &[u32])> {
        responses.iter().map(|(prompt, response)| (&**prompt, &**response)).collect()
    }

    #[test]
    fn a_response_token_is_predicted_by_the_state_before_it() {
        let rows: [(&[u32], &[u32]); 2] = [(&[1, 2, 3], &[7]), (&[1, 4], &[8, 9, 5])];
        let batch = ResponseBatch::new(rows);
        assert_eq!((batch.rows, batch.seq, batch.n_tokens()), (2, 4, 4));
        assert_eq!(batch.ids, [1, 2, 3, 0, 1, 4, 8, 9]);
        assert_eq!(batch.positions, [2, 5, 6, 7]);
        assert_eq!(batch.targets, [7, 8, 9, 5]);
    }

    #[test]
    fn no_number_depends_on_the_padding_id() {
        let (gpt, scalar) = models();
        let responses = responses(&[(3, 1), (2, 9), (12, 4)]);
        let batch = ResponseBatch::new(pairs(&responses));
        let mut other = batch.clone();
        for (i, (prompt, response)) in responses.iter().enumerate() {
            other.ids[i * batch.seq + prompt.len() + response.len() - 1..(i + 1) * batch.seq].fill(40);
        }
        assert_ne!(batch, other);
        let numbers = |batch: &ResponseBatch| {
            [log_probs(&gpt, batch, 0.7), values(&scalar, batch)].map(|tensor| tensor.try_into_vec_as::<f32>().unwrap())
        };
        assert_eq!(numbers(&batch), numbers(&other));
    }

    #[test]
    fn neither_order_nor_batch_size_changes_a_number() {
        let (gpt, scalar) = models();
        let responses = responses(&[(3, 1), (2, 9), (12, 4), (1, 1), (7, 20)]);
        let pairs = pairs(&responses);
        for compute in
            [&(|batch: &ResponseBatch| log_probs(&gpt, batch, 0.7)) as &dyn Fn(&ResponseBatch) -> Tensor<1>, &|batch| {
                values(&scalar, batch)
            }]
        {
            let alone = of_response_tokens(&pairs, 1, compute).unwrap();
            let lengths: Vec<usize> = alone.iter().map(Vec::len).collect();
            assert_eq!(lengths, [1, 9, 4, 1, 20]);
            for batch_size in [2, 5, 100] {
                let together = of_response_tokens(&pairs, batch_size, compute).unwrap();
                for (alone, together) in alone.iter().zip(&together) {
                    assert_close(together, alone, REORDERED);
                }
            }
        }
    }

    #[test]
    fn sums_are_over_each_response_and_so_is_their_gradient() {
        let rows: [(&[u32], &[u32]); 3] = [(&[1, 2, 3], &[7]), (&[1, 4], &[8, 9, 5]), (&[1], &[6, 6])];
        let batch = ResponseBatch::new(rows);
        let of_tokens = Tensor::<1>::from_floats([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &Device::flex().autodiff());
        let of_tokens = of_tokens.require_grad();
        let sums = sum_by_response(&batch, of_tokens.clone());
        let host = |tensor: Tensor<1>| tensor.try_into_vec_as::<f32>().unwrap();
        assert_eq!(host(sums.clone()), [1.0, 9.0, 11.0]);
        let weights = Tensor::from_floats([1.0, 10.0, 100.0], &sums.device());
        let gradient = of_tokens.grad(&(sums * weights).sum().backward()).unwrap();
        assert_eq!(host(gradient), [1.0, 10.0, 10.0, 10.0, 100.0, 100.0]);
    }

    #[test]
    fn log_probs_are_those_with_entropy() {
        let (gpt, _) = models();
        let responses = responses(&[(3, 1), (2, 9)]);
        let batch = ResponseBatch::new(pairs(&responses));
        let host = |tensor: Tensor<1>| tensor.try_into_vec_as::<f32>().unwrap();
        let (with_entropy, entropy) = log_probs_and_entropy(&gpt, &batch, 0.7);
        assert_eq!(host(log_probs(&gpt, &batch, 0.7)), host(with_entropy));
        assert!(host(entropy).iter().all(|&nats| nats > 0.0 && nats <= 41.0_f32.ln() + REORDERED));
    }
}
