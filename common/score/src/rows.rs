//! Scores of whole token rows, read at their last token.

use burn::tensor::{Int, Tensor, TensorData, TensorReadError};

use group::Share;
use model::{Layout, ScalarGpt};
use text::data::collate;

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
    let mut scores = vec![0.0; rows.len()];
    for (i, score) in score_share_of_rows(model, rows, batch_size, Share::WHOLE)? {
        scores[i] = score;
    }
    Ok(scores)
}

/// The scores of one rank's share of the batches that [`score_rows`] makes, each with the number of its row.
///
/// # Errors
/// As there.
///
/// # Panics
/// As there.
pub(crate) fn score_share_of_rows(
    model: &ScalarGpt,
    rows: &[&[u32]],
    batch_size: usize,
    share: Share,
) -> Result<Vec<(usize, f32)>, TensorReadError> {
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
    }
    Ok(scores)
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
}
