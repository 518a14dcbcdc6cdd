//! Scores of whole token rows, read at their last token.

use std::ops::ControlFlow;

use burn::tensor::{Int, Tensor, TensorData, TensorReadError};

use group::Share;
use model::{Layout, ScalarGpt};
use text::data::collate;

use crate::{ScoreError, UNWATCHED, Watch};

/// The score of each row: the model's number at its last token, score bias included.
///
/// Rows are computed `batch_size` at a time with neighbours in length together, so that little is padded; the scores
/// come back in the order of the rows, and neither order nor padding changes them beyond rounding.
///
/// # Errors
/// If the device cannot be read.
///
/// # Panics
/// If a row is empty or exceeds the model's context, or `batch_size` is 0.
pub fn score_rows(model: &ScalarGpt, rows: &[&[u32]], batch_size: usize) -> Result<Vec<f32>, TensorReadError> {
    let scores = share_of_rows(model, rows, batch_size, Share::WHOLE, UNWATCHED)?.unwrap_or_default();
    Ok(in_place(rows.len(), scores))
}

/// [`score_rows`], with `watch` looking on.
///
/// # Errors
/// If the device cannot be read, or `watch` breaks it off.
///
/// # Panics
/// As there.
pub fn score_rows_watched(
    model: &ScalarGpt,
    rows: &[&[u32]],
    batch_size: usize,
    watch: Watch<'_>,
) -> Result<Vec<f32>, ScoreError> {
    Ok(in_place(rows.len(), score_share_of_rows(model, rows, batch_size, Share::WHOLE, watch)?))
}

fn in_place(n: usize, numbered: Vec<(usize, f32)>) -> Vec<f32> {
    let mut scores = vec![0.0; n];
    for (i, score) in numbered {
        scores[i] = score;
    }
    scores
}

/// The scores of one rank's share of the batches that [`score_rows`] makes, each with the number of its row.
///
/// # Errors
/// As [`score_rows_watched`].
///
/// # Panics
/// As there.
pub(crate) fn score_share_of_rows(
    model: &ScalarGpt,
    rows: &[&[u32]],
    batch_size: usize,
    share: Share,
    watch: Watch<'_>,
) -> Result<Vec<(usize, f32)>, ScoreError> {
    share_of_rows(model, rows, batch_size, share, watch)?.ok_or(ScoreError::Stopped)
}

/// [`score_share_of_rows`]; `None` if `watch` broke it off.
fn share_of_rows(
    model: &ScalarGpt,
    rows: &[&[u32]],
    batch_size: usize,
    share: Share,
    watch: Watch<'_>,
) -> Result<Option<Vec<(usize, f32)>>, TensorReadError> {
    let device = model.device();
    let batches = by_length(rows.iter().map(|row| row.len()), batch_size);
    let mut scores = Vec::new();
    for batch in &batches[share.of(batches.len())] {
        let batch_rows: Vec<Vec<u32>> = batch.iter().map(|&i| rows[i].to_vec()).collect();
        let padded = collate::right_pad(&batch_rows, 0);
        let (n, seq) = (padded.batch, padded.seq);
        let last: Vec<i64> = batch_rows.iter().enumerate().map(|(i, row)| (i * seq + row.len() - 1) as i64).collect();
        let ids = Tensor::<2, Int>::from_data(TensorData::new(padded.ids, [n, seq]), &device);
        let last = Tensor::from_data(TensorData::new(last, [n]), &device);
        let of_batch = model.forward_at(ids, &Layout::right_padded(), last, None).try_into_vec_as::<f32>()?;
        scores.extend(batch.iter().copied().zip(of_batch));
        if watch(n) == ControlFlow::Break(()) {
            return Ok(None);
        }
    }
    Ok(Some(scores))
}

/// Indices of rows of the given lengths, sorted by length and cut into batches of at most `batch_size`.
///
/// Longest first, because what needs most memory should run (or fail) first; equal lengths keep their order.
///
/// # Panics
/// If `batch_size` is 0.
pub fn by_length(lengths: impl IntoIterator<Item = usize>, batch_size: usize) -> Vec<Vec<usize>> {
    let lengths: Vec<usize> = lengths.into_iter().collect();
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(lengths[i]));
    order.chunks(batch_size).map(<[usize]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use base::rng::Streams;
    use burn::tensor::Device;
    use model::{Gpt, GptConfig};

    // Sums of a few dozen f32 products of order one, in another order.
    const REORDERED: f32 = 1e-5;

    #[test]
    fn batches_hold_neighbours_in_length() {
        assert_eq!(by_length([3, 9, 4, 9, 1], 2), [vec![1, 3], vec![2, 0], vec![4]]);
        assert!(by_length([], 2).is_empty());
    }

    #[test]
    fn neither_padding_nor_batch_changes_a_score() {
        let streams = Streams::new(3);
        let config =
            GptConfig { d_model: 16, n_layers: 2, n_heads: 2, d_ff: 32, max_seq_len: 32, ..GptConfig::gpt2(41) };
        let model = ScalarGpt::new(Gpt::new(&config, &streams, &Device::flex()), &streams).with_score_bias(0.25);
        let mut rng = streams.get("test", 0);
        let rows: Vec<Vec<u32>> =
            [5, 1, 32, 7, 7, 20].iter().map(|&n| (0..n).map(|_| rng.below(41) as u32).collect()).collect();
        let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
        let together = score_rows(&model, &rows, 4).expect("the device can be read");
        for (row, together) in rows.iter().zip(together) {
            let ids: Vec<i32> = row.iter().map(|&id| id as i32).collect();
            let ids = Tensor::from_data(TensorData::new(ids, [1, row.len()]), &Device::flex());
            let all = model.forward(ids, &Layout::right_padded()).try_into_vec_as::<f32>().expect("readable");
            assert!((all[row.len() - 1] - together).abs() < REORDERED, "{} and {together}", all[row.len() - 1]);
        }
    }
    #[test]
    fn a_watch_is_told_of_every_row_and_ends_the_work() {
        let streams = Streams::new(3);
        let config =
            GptConfig { d_model: 16, n_layers: 1, n_heads: 2, d_ff: 32, max_seq_len: 32, ..GptConfig::gpt2(41) };
        let model = ScalarGpt::new(Gpt::new(&config, &streams, &Device::flex()), &streams);
        let rows: Vec<Vec<u32>> = [3, 9, 4, 9, 1].iter().map(|&n| (0..n).collect()).collect();
        let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
        let told = Mutex::new(Vec::new());
        let until = |n: usize| {
            move |told: &mut Vec<usize>, of| {
                told.push(of);
                if told.len() < n { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
            }
        };
        let watched = |n| score_rows_watched(&model, &rows, 2, &|of| until(n)(&mut told.lock().unwrap(), of));
        assert_eq!(watched(4).unwrap(), score_rows(&model, &rows, 2).unwrap());
        assert_eq!(std::mem::take(&mut *told.lock().unwrap()), [2, 2, 1]);
        assert!(matches!(watched(2), Err(ScoreError::Stopped)));
        assert_eq!(*told.lock().unwrap(), [2, 2]);
    }
}
