//! Equal rows of unequal ones.

/// Token ids in rows of equal length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Padded {
    /// Token ids, `[batch, seq]`, row after row.
    pub ids: Vec<i32>,
    /// Number of rows.
    pub batch: usize,
    /// Length of each row: that of the longest.
    pub seq: usize,
}

/// Rows padded behind to the longest: for training and scoring.
///
/// # Panics
/// If there is no row, or none has an id.
pub fn right_pad(rows: &[Vec<u32>], pad: u32) -> Padded {
    let seq = rows.iter().map(Vec::len).max().unwrap_or(0);
    assert!(seq > 0, "{} rows without an id make no batch", rows.len());
    let mut ids = vec![pad as i32; rows.len() * seq];
    for (padded, row) in ids.chunks_mut(seq).zip(rows) {
        padded.iter_mut().zip(row).for_each(|(padded, &id)| *padded = id as i32);
    }
    Padded { ids, batch: rows.len(), seq }
}

/// Token ids to learn from, and which of them are trained on.
#[derive(Debug, Clone, Copy)]
pub struct Example<'a> {
    /// Token ids.
    pub ids: &'a [u32],
    /// Whether the model is trained to predict the id at the same place.
    pub trained: &'a [bool],
}

/// Rows of inputs with, at each position, the id that comes next.
///
/// An example of `n` ids takes `n − 1` positions: its last id is never an input, its first never a target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainingRows {
    /// Input ids, `[batch, seq]`, row after row.
    pub ids: Vec<i32>,
    /// The id that follows each input in its example, `[batch, seq]`; at padding, the padding id.
    pub targets: Vec<i32>,
    /// Whether the loss counts the target, `[batch, seq]`; never at padding.
    pub trained: Vec<bool>,
    /// The position in its row at which each position's example begins, `[batch, seq]`: the first key it may see.
    /// A padded position sees itself alone.
    pub first_key: Vec<u32>,
    /// Number of rows.
    pub batch: usize,
    /// Length of each row.
    pub seq: usize,
}

/// Several examples a row of at most `max_seq` positions, none of which sees another's.
///
/// Each example goes into the first row that still has room for it. Rows are as long as the fullest.
///
/// # Panics
/// If an example takes more than `max_seq` positions, or none has two ids.
pub fn pack(examples: &[Example<'_>], max_seq: usize, pad: u32) -> TrainingRows {
    let mut rows: Vec<Vec<usize>> = Vec::new();
    let mut lengths: Vec<usize> = Vec::new();
    for (i, example) in examples.iter().enumerate() {
        let n = example.n_positions();
        assert!(n <= max_seq, "an example of {n} positions does not fit into {max_seq}");
        if let Some(row) = lengths.iter().position(|length| length + n <= max_seq) {
            rows[row].push(i);
            lengths[row] += n;
        } else {
            rows.push(vec![i]);
            lengths.push(n);
        }
    }
    training_rows(examples, &rows, lengths.into_iter().max().unwrap_or(0), pad)
}

impl Example<'_> {
    fn n_positions(&self) -> usize {
        assert_eq!(self.ids.len(), self.trained.len(), "one mark an id");
        self.ids.len().saturating_sub(1)
    }
}

fn training_rows(examples: &[Example<'_>], rows: &[Vec<usize>], seq: usize, pad: u32) -> TrainingRows {
    assert!(seq > 0, "{} examples of fewer than two ids make no batch", examples.len());
    let n = rows.len() * seq;
    let mut out = TrainingRows {
        ids: vec![pad as i32; n],
        targets: vec![pad as i32; n],
        trained: vec![false; n],
        first_key: (0..n).map(|at| (at % seq) as u32).collect(),
        batch: rows.len(),
        seq,
    };
    for (b, row) in rows.iter().enumerate() {
        let mut start = 0;
        for Example { ids, trained } in row.iter().map(|&i| examples[i]) {
            for t in 0..ids.len().saturating_sub(1) {
                let at = b * seq + start + t;
                out.ids[at] = ids[t] as i32;
                out.targets[at] = ids[t + 1] as i32;
                out.trained[at] = trained[t + 1];
                out.first_key[at] = start as u32;
            }
            start += ids.len().saturating_sub(1);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn padding_stands_behind() {
        let padded = right_pad(&[vec![1, 2, 3], vec![4]], 9);
        assert_eq!(padded, Padded { ids: vec![1, 2, 3, 4, 9, 9], batch: 2, seq: 3 });
    }

    #[test]
    fn packing_by_hand() {
        let examples = [
            Example { ids: &[1, 2, 3], trained: &[false, false, true] },
            Example { ids: &[4, 5, 6, 7], trained: &[false, true, false, true] },
            Example { ids: &[8, 9], trained: &[false, true] },
        ];
        let rows = pack(&examples, 4, 0);
        // The first row has two positions of four left, too few for the second example and enough for the third.
        assert_eq!((rows.batch, rows.seq), (2, 3));
        assert_eq!(rows.ids, [1, 2, 8, 4, 5, 6]);
        assert_eq!(rows.targets, [2, 3, 9, 5, 6, 7]);
        assert_eq!(rows.trained, [false, true, true, true, false, true]);
        assert_eq!(rows.first_key, [0, 0, 2, 0, 0, 0]);
    }

    proptest! {
        #[test]
        fn packing_loses_nothing_and_mixes_nothing(
            items in prop::collection::vec(prop::collection::vec((1..1000u32, any::<bool>()), 2..12), 1..20),
            room in 0..20usize,
        ) {
            let (ids, trained): (Vec<Vec<u32>>, Vec<Vec<bool>>) = items.iter().map(|item| item.iter().copied().unzip()).unzip();
            let examples: Vec<_> = ids.iter().zip(&trained).map(|(ids, trained)| Example { ids, trained }).collect();
            let longest = ids.iter().map(Vec::len).max().unwrap() - 1;
            let rows = pack(&examples, longest + room, 0);
            prop_assert!(rows.seq <= longest + room);

            // Read the examples back from where `first_key` says that they begin.
            let mut found = Vec::new();
            for b in 0..rows.batch {
                let row = |v: &[i32]| v[b * rows.seq..(b + 1) * rows.seq].to_vec();
                let (inputs, targets) = (row(&rows.ids), row(&rows.targets));
                let first_key = &rows.first_key[b * rows.seq..(b + 1) * rows.seq];
                for start in (0..rows.seq).filter(|&t| first_key[t] == t as u32 && inputs[t] != 0) {
                    let end = (start..rows.seq).take_while(|&t| first_key[t] == start as u32).last().unwrap();
                    let mut ids = inputs[start..=end].to_vec();
                    prop_assert_eq!(&ids[1..], &targets[start..end]);
                    ids.push(targets[end]);
                    let trained = rows.trained[b * rows.seq + start..=b * rows.seq + end].to_vec();
                    found.push((ids, trained));
                }
            }
            let mut expected: Vec<(Vec<i32>, Vec<bool>)> = ids
                .iter()
                .zip(&trained)
                .map(|(ids, trained)| (ids.iter().map(|&id| id as i32).collect(), trained[1..].to_vec()))
                .collect();
            found.sort();
            expected.sort();
            prop_assert_eq!(found, expected);
        }
    }
}
