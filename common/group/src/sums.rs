//! Sums of long lists of numbers over all ranks, and lists of which every rank has a part.
//!
//! Of a list cut into parts each rank has its [`Share`].

use super::{Counted, Group, GroupError, Share};

/// Numbers sent at a time: small enough that the ranks of a chain work at the same time, large enough that a message's fixed
/// cost does not count.
const BUCKET: usize = 1 << 18;

const GRADIENTS: &str = "gradients";
const WEIGHTS: &str = "new weights";
const MOMENTS: &str = "the moments of its optimiser";

impl Group {
    /// The sum of the items of all ranks, each rank's `own` in turn: `((a + b) + c) + …` from the first item of rank 0 to the
    /// last of the last rank, number by number. Every rank has at least one item.
    ///
    /// Buckets go along the chain of ranks, each of which adds its own, and the sums go back: a rank sends and receives every
    /// number twice at most, however many ranks there are.
    ///
    /// # Errors
    /// If a rank has ended.
    ///
    /// # Panics
    /// If there is no item, or they differ in length.
    pub fn sum_in_order(&self, own: Vec<Vec<f32>>) -> Result<Vec<f32>, GroupError> {
        let mut sum = self.along_the_chain(own)?;
        let Some(transport) = &self.transport else { return Ok(sum) };
        let (rank, last) = (transport.rank(), transport.size() - 1);
        for bucket in sum.chunks_mut(BUCKET) {
            if rank < last {
                transport.receive_floats(rank + 1, bucket, GRADIENTS)?;
            }
            if rank > 0 {
                transport.send_floats(rank - 1, bucket, GRADIENTS)?;
            }
        }
        Ok(sum)
    }

    /// The same sum, of which every rank gets its part: the last rank, where the chain ends, looks at the whole and then
    /// hands out the parts. What it saw comes with them.
    ///
    /// A rank sends every number once; the last one sends what is not its own.
    ///
    /// # Errors
    /// If a rank has ended.
    ///
    /// # Panics
    /// If there is no item, or they differ in length.
    pub fn sum_in_order_by_parts(
        &self,
        own: Vec<Vec<f32>>,
        look: impl FnOnce(&[f32]) -> f64,
    ) -> Result<(Vec<f32>, f64), GroupError> {
        let sum = self.along_the_chain(own)?;
        let Some(transport) = &self.transport else {
            let seen = look(&sum);
            return Ok((sum, seen));
        };
        let (size, n) = (transport.size(), sum.len());
        let last = size - 1;
        if transport.rank() < last {
            drop(sum);
            let mut part = vec![0.0; self.share().of(n).len()];
            for bucket in part.chunks_mut(BUCKET) {
                transport.receive_floats(last, bucket, GRADIENTS)?;
            }
            return Ok((part, self.of_last(None)?));
        }
        for rank in 0..last {
            for bucket in sum[Share { rank, size }.of(n)].chunks(BUCKET) {
                transport.send_floats(rank, bucket, GRADIENTS)?;
            }
        }
        let seen = self.of_last(Some(look(&sum)))?;
        Ok((sum[self.share().of(n)].to_vec(), seen))
    }

    /// Of each list its sum over all ranks, in another order for every part: the fastest, and the same numbers on every rank,
    /// but others for another number of ranks.
    ///
    /// # Errors
    /// If a rank has ended.
    ///
    /// # Panics
    /// If the ranks give lists of different lengths.
    pub fn sum(&self, mut own: Vec<f32>) -> Result<Vec<f32>, GroupError> {
        self.sum_of_part_within(&mut own)?;
        self.complete_from_parts(&mut own)?;
        Ok(own)
    }

    /// This rank's part of the same sum, for which a rank sends all numbers but those of one part.
    ///
    /// # Errors
    /// As [`sum`](Self::sum).
    ///
    /// # Panics
    /// As [`sum`](Self::sum).
    pub fn sum_by_parts(&self, mut own: Vec<f32>) -> Result<Vec<f32>, GroupError> {
        self.sum_of_part_within(&mut own)?;
        Ok(own[self.share().of(own.len())].to_vec())
    }

    /// Sums this rank's part within `numbers`; the rest is not what it was.
    ///
    /// The sum of part `p` begins on rank `p + 1` and goes round the ring to rank `p`.
    fn sum_of_part_within(&self, numbers: &mut [f32]) -> Result<(), GroupError> {
        let Some(transport) = &self.transport else { return Ok(()) };
        let ring = Ring::of(transport);
        let mut before = vec![0.0; BUCKET.min(numbers.len())];
        for round in 1..ring.size {
            let parts = [ring.part(round, numbers.len()), ring.part(round + 1, numbers.len())];
            let [sent, received] = numbers.get_disjoint_mut(parts).expect("parts do not overlap");
            for (sent, received) in buckets(sent, received) {
                let before = &mut before[..received.len()];
                transport.exchange_floats(ring.next(), sent, ring.previous(), before, GRADIENTS)?;
                add(received, before);
            }
        }
        Ok(())
    }

    /// Completes `numbers`, of which each rank has its part, round the ring.
    ///
    /// # Errors
    /// If a rank has ended.
    ///
    /// # Panics
    /// If the ranks give lists of different lengths.
    pub fn complete_from_parts(&self, numbers: &mut [f32]) -> Result<(), GroupError> {
        let Some(transport) = &self.transport else { return Ok(()) };
        let ring = Ring::of(transport);
        for round in 0..ring.size - 1 {
            let parts = [ring.part(round, numbers.len()), ring.part(round + 1, numbers.len())];
            let [sent, received] = numbers.get_disjoint_mut(parts).expect("parts do not overlap");
            for (sent, received) in buckets(sent, received) {
                transport.exchange_floats(ring.next(), sent, ring.previous(), received, WEIGHTS)?;
            }
        }
        Ok(())
    }

    /// Copies `numbers` from a rank to rank 0, which gives room for them; the other ranks need not ask.
    ///
    /// # Errors
    /// If a rank has ended.
    pub fn to_first(&self, from: usize, numbers: &mut [f32]) -> Result<(), GroupError> {
        let Some(transport) = &self.transport else { return Ok(()) };
        for bucket in numbers.chunks_mut(BUCKET).filter(|_| from > 0) {
            if transport.rank() == 0 {
                transport.receive_floats(from, bucket, MOMENTS)?;
            } else if transport.rank() == from {
                transport.send_floats(0, bucket, MOMENTS)?;
            }
        }
        Ok(())
    }

    /// What the last rank gives.
    fn of_last(&self, own: Option<f64>) -> Result<f64, GroupError> {
        Ok(self.gather(own)?.pop().flatten().expect("the last rank gives it"))
    }

    /// On the last rank the sum of the items of all, on the others what the chain had come to there.
    fn along_the_chain(&self, own: Vec<Vec<f32>>) -> Result<Vec<f32>, GroupError> {
        let mut own = own.into_iter();
        let mut sum = own.next().expect("every rank has an item");
        let Some(transport) = &self.transport else {
            own.for_each(|item| add(&mut sum, &item));
            return Ok(sum);
        };
        let (rank, last) = (transport.rank(), transport.size() - 1);
        let (rest, n): (Vec<Vec<f32>>, usize) = (own.collect(), sum.len());
        let mut before = vec![0.0; BUCKET.min(n)];
        for start in (0..n).step_by(BUCKET) {
            let bucket = start..n.min(start + BUCKET);
            if rank > 0 {
                let before = &mut before[..bucket.len()];
                transport.receive_floats(rank - 1, before, GRADIENTS)?;
                add(&mut sum[bucket.clone()], before);
            }
            for item in &rest {
                add(&mut sum[bucket.clone()], &item[bucket.clone()]);
            }
            if rank < last {
                transport.send_floats(rank + 1, &sum[bucket], GRADIENTS)?;
            }
        }
        Ok(sum)
    }
}

/// All ranks in a circle.
struct Ring {
    rank: usize,
    size: usize,
}

impl Ring {
    fn of(transport: &Counted) -> Self {
        Self { rank: transport.rank(), size: transport.size() }
    }

    const fn next(&self) -> usize {
        (self.rank + 1) % self.size
    }

    const fn previous(&self) -> usize {
        (self.rank + self.size - 1) % self.size
    }

    /// The part, of a list of `n`, of the rank that is `distance` places before this one.
    fn part(&self, distance: usize, n: usize) -> std::ops::Range<usize> {
        Share { rank: (self.rank + 2 * self.size - distance) % self.size, size: self.size }.of(n)
    }
}

/// Two lists in buckets, as many of the one as of the other: the last of one may be empty.
fn buckets<'a>(sent: &'a [f32], received: &'a mut [f32]) -> impl Iterator<Item = (&'a [f32], &'a mut [f32])> {
    let n = sent.len().max(received.len()).div_ceil(BUCKET);
    let (mut sent, mut received) = (sent.chunks(BUCKET), received.chunks_mut(BUCKET));
    (0..n).map(move |_| (sent.next().unwrap_or_default(), received.next().unwrap_or_default()))
}

/// Adds `numbers` to those of `sum`.
fn add(sum: &mut [f32], numbers: &[f32]) {
    assert_eq!(sum.len(), numbers.len(), "items of a sum have one length");
    sum.iter_mut().zip(numbers).for_each(|(sum, number)| *sum += number);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::threads;

    /// Numbers of many magnitudes, whose sum depends on the order.
    fn item(i: usize, len: usize) -> Vec<f32> {
        (0..len).map(|j| ((i * 7919 + j * 104_729) % 2003) as f32 * 10.0_f32.powi((i % 7) as i32 - 3)).collect()
    }

    fn sum_over(n_ranks: usize, n_items: usize, len: usize) -> Vec<Vec<f32>> {
        threads(n_ranks, |group| {
            let own = group.share().of(n_items).map(|i| item(i, len)).collect();
            group.sum_in_order(own).expect("all ranks are there")
        })
    }

    #[test]
    fn a_sum_has_the_same_bits_for_any_number_of_ranks() {
        let len = BUCKET + 3;
        for n_items in [5, 8] {
            let alone = sum_over(1, n_items, len).remove(0);
            let mut reversed = item(n_items - 1, len);
            (0..n_items - 1).rev().for_each(|i| add(&mut reversed, &item(i, len)));
            assert_ne!(alone, reversed, "the order is to matter");
            for n_ranks in [2, 3, 4, 5] {
                assert!(sum_over(n_ranks, n_items, len).iter().all(|sum| *sum == alone), "{n_ranks} ranks");
            }
        }
    }

    #[test]
    fn the_parts_of_a_sum_have_the_bits_of_the_whole_and_each_rank_has_its_own() {
        for len in [1, 2, 1000, 3 * BUCKET + 1] {
            let alone = sum_over(1, 5, len).remove(0);
            for n_ranks in [1, 2, 3, 5] {
                let parts = threads(n_ranks, |group| {
                    let own = group.share().of(5).map(|i| item(i, len)).collect();
                    group.sum_in_order_by_parts(own, |sum| f64::from(sum[len - 1])).expect("all ranks are there")
                });
                assert!(parts.iter().all(|(_, seen)| *seen == f64::from(alone[len - 1])), "{n_ranks} ranks");
                for (rank, (part, _)) in parts.iter().enumerate() {
                    assert_eq!(part, &alone[Share { rank, size: n_ranks }.of(len)], "rank {rank} of {n_ranks}");
                }
            }
        }
    }

    #[test]
    fn a_fast_sum_is_the_same_on_every_rank_and_close_to_that_in_order() {
        for len in [1, 2, 7, 1000, 3 * BUCKET + 1] {
            // Whole numbers, which add up exactly in any order.
            let own = |rank: usize| (0..len).map(|j| ((rank * 31 + j * 17) % 101) as f32).collect::<Vec<f32>>();
            for n_ranks in [1, 2, 3, 5] {
                let mut expected = own(0);
                (1..n_ranks).for_each(|rank| add(&mut expected, &own(rank)));
                let sums = threads(n_ranks, |group| {
                    let whole = group.sum(own(group.rank())).expect("all ranks are there");
                    (whole, group.sum_by_parts(own(group.rank())).expect("all ranks are there"))
                });
                for (rank, (whole, part)) in sums.iter().enumerate() {
                    assert_eq!(*whole, expected, "{n_ranks} ranks, {len} numbers");
                    assert_eq!(*part, expected[Share { rank, size: n_ranks }.of(len)]);
                }
            }
        }
    }

    #[test]
    fn parts_come_together_on_every_rank() {
        let whole = item(3, 11);
        for n_ranks in [1, 2, 3, 12] {
            let everywhere = threads(n_ranks, |group| {
                let mut numbers = vec![0.0; 11];
                let own = group.share().of(11);
                numbers[own.clone()].copy_from_slice(&whole[own]);
                group.complete_from_parts(&mut numbers).expect("all ranks are there");
                numbers
            });
            assert!(everywhere.iter().all(|numbers| *numbers == whole), "{n_ranks} ranks");
        }
    }

    #[test]
    fn the_first_gets_the_numbers_of_any_rank() {
        let got = threads(3, |group| {
            let mut numbers = [group.rank() as f32; 3].to_vec();
            group.to_first(2, &mut numbers).expect("all ranks are there");
            let mut own = vec![group.rank() as f32];
            group.to_first(0, &mut own).expect("all ranks are there");
            (numbers[2], own[0])
        });
        assert_eq!(got, [(2.0, 0.0), (1.0, 1.0), (2.0, 2.0)]);
    }

    #[test]
    fn a_number_that_is_none_reaches_every_rank() {
        let sums = threads(3, |group| {
            let number = if group.rank() == 1 { f32::NAN } else { 1.0 };
            group.sum_in_order(vec![vec![1.0, number]]).expect("all ranks are there")
        });
        assert!(sums.iter().all(|sum| sum[0] == 3.0 && sum[1].is_nan()), "{sums:?}");
    }

    /// Bytes that each of four ranks sends for 1000 numbers.
    fn sent(exchange: impl Fn(&Group) + Sync) -> Vec<u64> {
        threads(4, |group| {
            exchange(&group);
            group.bytes_sent()
        })
    }

    #[test]
    fn a_rank_sends_each_number_twice_and_the_ends_of_the_chain_once() {
        let whole = sent(|group| {
            group.sum_in_order(vec![vec![0.5; 1000], vec![0.25; 1000]]).expect("all ranks are there");
        });
        assert_eq!(whole, [4000, 8000, 8000, 4000]);
    }

    #[test]
    fn for_parts_a_rank_sends_each_number_once_or_all_but_a_part() {
        let in_order = sent(|group| {
            group.sum_in_order_by_parts(vec![vec![0.5; 1000]], |_| 0.0).expect("all ranks are there");
        });
        // Besides, the number that the last one saw.
        assert!(in_order.iter().zip([4000, 4000, 4000, 3000]).all(|(sent, n)| (n..n + 100).contains(sent)));
        let fast = sent(|group| {
            group.sum_by_parts(vec![0.5; 1000]).expect("all ranks are there");
        });
        assert_eq!(fast, [3000; 4]);
        let both = sent(|group| {
            group.sum(vec![0.5; 1000]).expect("all ranks are there");
        });
        assert_eq!(both, [6000; 4]);
    }
}
