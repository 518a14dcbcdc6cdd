//! Long lists of numbers where they lie.

use std::ops::Range;

/// Numbers sent at a time: small enough that the ranks of a chain work at the same time, large enough that a message's fixed
/// cost does not count.
pub(crate) const BUCKET: usize = 1 << 18;

/// A list of numbers that lies in memory in pieces, one behind the other: gradients, one piece for each parameter. They are
/// exchanged where they are, since to copy half a gigabyte takes as long as to send it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Pieces(Vec<Vec<f32>>);

/// Neighbours of a list that are sent together: a range of one piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bucket {
    piece: usize,
    range: Range<usize>,
}

impl Bucket {
    pub(crate) const fn len(&self) -> usize {
        self.range.end - self.range.start
    }
}

impl From<Vec<Vec<f32>>> for Pieces {
    fn from(pieces: Vec<Vec<f32>>) -> Self {
        Self(pieces)
    }
}

impl Pieces {
    /// How many numbers there are.
    pub fn n(&self) -> usize {
        self.0.iter().map(Vec::len).sum()
    }

    /// The pieces in their order.
    pub fn iter(&self) -> impl Iterator<Item = &[f32]> {
        self.0.iter().map(Vec::as_slice)
    }

    /// The pieces themselves.
    pub fn into_vecs(self) -> Vec<Vec<f32>> {
        self.0
    }

    /// A copy in one piece.
    pub fn flat(&self) -> Vec<f32> {
        self.0.concat()
    }

    /// The numbers in `range` of all.
    pub fn copy_of(&self, range: Range<usize>) -> Vec<f32> {
        let mut copy = Vec::with_capacity(range.len());
        self.buckets(range).iter().for_each(|bucket| copy.extend(self.of(bucket)));
        copy
    }

    /// `range` of all numbers in buckets, which follow from the sizes of the pieces alone.
    pub(crate) fn buckets(&self, range: Range<usize>) -> Vec<Bucket> {
        let mut start = 0;
        let mut buckets = Vec::new();
        for (piece, numbers) in self.0.iter().enumerate() {
            let end = start + numbers.len();
            let own = range.start.clamp(start, end) - start..range.end.clamp(start, end) - start;
            let cuts = own.clone().step_by(BUCKET);
            buckets.extend(cuts.map(|cut| Bucket { piece, range: cut..own.end.min(cut + BUCKET) }));
            start = end;
        }
        buckets
    }

    pub(crate) fn of(&self, bucket: &Bucket) -> &[f32] {
        &self.0[bucket.piece][bucket.range.clone()]
    }

    pub(crate) fn of_mut(&mut self, bucket: &Bucket) -> &mut [f32] {
        &mut self.0[bucket.piece][bucket.range.clone()]
    }

    /// The numbers of a bucket, and those of another to write to; nothing for none.
    pub(crate) fn of_two(&mut self, read: Option<&Bucket>, written: Option<&Bucket>) -> (&[f32], &mut [f32]) {
        match (read, written) {
            (None, None) => (&[], &mut []),
            (Some(read), None) => (self.of(read), &mut []),
            (None, Some(written)) => (&[], self.of_mut(written)),
            (Some(read), Some(written)) if read.piece == written.piece => {
                let ranges = [read.range.clone(), written.range.clone()];
                let [read, written] = self.0[read.piece].get_disjoint_mut(ranges).expect("buckets do not overlap");
                (read, written)
            }
            (Some(read), Some(written)) => {
                let pieces = [read.piece, written.piece];
                let [first, second] = self.0.get_disjoint_mut(pieces).expect("the pieces are there");
                (&first[read.range.clone()], &mut second[written.range.clone()])
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_cut_where_pieces_end() {
        let list = Pieces::from(vec![vec![0.5; BUCKET + 2], Vec::new(), vec![1.5; 3]]);
        assert_eq!(list.n(), BUCKET + 5);
        let lengths = |range| list.buckets(range).iter().map(Bucket::len).collect::<Vec<_>>();
        assert_eq!(lengths(0..list.n()), [BUCKET, 2, 3]);
        assert_eq!(lengths(1..BUCKET + 3), [BUCKET, 1, 1]);
        assert_eq!(lengths(7..7), [0; 0]);
        assert_eq!(list.copy_of(BUCKET + 1..BUCKET + 4), [0.5, 1.5, 1.5]);
        assert_eq!(list.flat(), list.copy_of(0..list.n()));
    }
}
