//! Sums of long lists of numbers over all ranks, and lists of which every rank has a part.
//!
//! Of a list cut into parts each rank has its [`Share`].

use super::pieces::{BUCKET, Bucket, Pieces};
use super::{Counted, Group, GroupError, Share};

const GRADIENTS: &str = "gradients";
const WEIGHTS: &str = "new weights";
const MOMENTS: &str = "the moments of its optimiser";

impl Group {
    /// The sum of the items of all ranks, each rank's `own` in turn: `((a + b) + c) + …` from the first item of rank 0 to the
    /// last of the last rank, number by number. Every rank has at least one item. `look` sees each bucket of an item before it
    /// is added up.
    ///
    /// Buckets go along the chain of ranks, each of which adds its own, and the sums come back as they are made, while later
    /// buckets are on their way: a rank sends and receives every number twice at most, however many ranks there are, and each
    /// link carries both directions at a time.
    ///
    /// # Errors
    /// If a rank has ended.
    ///
    /// # Panics
    /// If there is no item, or they differ in length.
    pub fn sum_in_order(&self, own: Vec<Pieces>, look: impl FnMut(&[f32])) -> Result<Pieces, GroupError> {
        let mut chain = Chain::of(own, look);
        let (rank, last) = (self.rank(), self.size() - 1);
        // Behind this rank a bucket goes to the last one and comes back, which takes a turn for each link.
        let behind = last - rank;
        for turn in 0..chain.buckets.len() + last {
            if let (Some(transport), 1..) = (&self.transport, rank) {
                let (sum, before) = (chain.bucket(turn, behind + 1), chain.bucket(turn, 0));
                let received = &mut chain.before[..before.as_ref().map_or(0, Bucket::len)];
                let sent = sum.as_ref().map_or(&[][..], |sum| chain.sum.of(sum));
                transport.exchange_floats(rank - 1, sent, rank - 1, received, GRADIENTS)?;
            }
            chain.add(turn, rank > 0);
            if let (Some(transport), 1..) = (&self.transport, behind) {
                let (own, sum) = (chain.bucket(turn, 0), chain.bucket(turn, behind));
                let (sent, received) = chain.sum.of_two(own.as_ref(), sum.as_ref());
                transport.exchange_floats(rank + 1, sent, rank + 1, received, GRADIENTS)?;
            }
        }
        Ok(chain.sum)
    }

    /// The same sum, of which every rank gets its part: the last rank, where the chain ends, measures the whole and then
    /// hands out the parts. What it measured comes with them.
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
        own: Vec<Pieces>,
        look: impl FnMut(&[f32]),
        measure: impl FnOnce(Pieces) -> (Pieces, f64),
    ) -> Result<(Vec<f32>, f64), GroupError> {
        let mut chain = Chain::of(own, look);
        let (rank, last, n) = (self.rank(), self.size() - 1, chain.sum.n());
        for turn in 0..chain.buckets.len() {
            let bucket = chain.buckets[turn].clone();
            if let (Some(transport), 1..) = (&self.transport, rank) {
                transport.receive_floats(rank - 1, &mut chain.before[..bucket.len()], GRADIENTS)?;
            }
            chain.add(turn, rank > 0);
            if let (Some(transport), true) = (&self.transport, rank < last) {
                transport.send_floats(rank + 1, chain.sum.of(&bucket), GRADIENTS)?;
            }
        }
        let (sum, own) = (chain.sum, self.share().of(n));
        let Some(transport) = &self.transport else {
            let (sum, measured) = measure(sum);
            return Ok((sum.copy_of(own), measured));
        };
        if rank < last {
            let buckets = sum.buckets(own.clone());
            drop(sum);
            let mut part = vec![0.0; own.len()];
            let mut rest = part.as_mut_slice();
            for bucket in &buckets {
                let room = rest.split_off_mut(..bucket.len()).expect("buckets are as long as the part");
                transport.receive_floats(last, room, GRADIENTS)?;
            }
            return Ok((part, self.of_last(None)?));
        }
        for rank in 0..last {
            for bucket in sum.buckets(Share { rank, size: last + 1 }.of(n)) {
                transport.send_floats(rank, sum.of(&bucket), GRADIENTS)?;
            }
        }
        let (sum, measured) = measure(sum);
        Ok((sum.copy_of(own), self.of_last(Some(measured))?))
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
}

/// A rank's place in the chain along which a sum is made in order.
struct Chain<L> {
    /// This rank's first item, which becomes the sum.
    sum: Pieces,
    /// Its others.
    rest: Vec<Pieces>,
    buckets: Vec<Bucket>,
    /// What the chain had come to before this rank, of one bucket.
    before: Vec<f32>,
    look: L,
}

impl<L: FnMut(&[f32])> Chain<L> {
    fn of(own: Vec<Pieces>, look: L) -> Self {
        let mut own = own.into_iter();
        let sum = own.next().expect("every rank has an item");
        let buckets = sum.buckets(0..sum.n());
        let before = vec![0.0; buckets.iter().map(Bucket::len).max().unwrap_or_default()];
        Self { sum, rest: own.collect(), buckets, before, look }
    }

    /// The bucket that began so many turns ago, if one did.
    fn bucket(&self, turn: usize, ago: usize) -> Option<Bucket> {
        self.buckets.get(turn.checked_sub(ago)?).cloned()
    }

    /// Adds this rank's items to what came `before` it, if anything did, in the bucket of a turn.
    fn add(&mut self, turn: usize, has_before: bool) {
        let Some(bucket) = self.buckets.get(turn) else { return };
        let sum = self.sum.of_mut(bucket);
        (self.look)(sum);
        if has_before {
            add(sum, &self.before[..bucket.len()]);
        }
        for item in &self.rest {
            let item = item.of(bucket);
            (self.look)(item);
            add(sum, item);
        }
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

    /// A list in pieces of different lengths, none among them.
    fn in_pieces(numbers: &[f32]) -> Pieces {
        let (first, rest) = numbers.split_at(numbers.len() / 3);
        vec![first.to_vec(), Vec::new(), rest.to_vec()].into()
    }

    fn sum_over(n_ranks: usize, n_items: usize, len: usize) -> Vec<Vec<f32>> {
        threads(n_ranks, |group| {
            let own = group.share().of(n_items).map(|i| in_pieces(&item(i, len))).collect();
            group.sum_in_order(own, |_| ()).expect("all ranks are there").flat()
        })
    }

    #[test]
    fn a_sum_has_the_same_bits_for_any_number_of_ranks() {
        // Fewer buckets than ranks, and more, several of them in a piece.
        for (n_items, len) in [(5, BUCKET + 3), (8, 5 * BUCKET + 3)] {
            let alone = sum_over(1, n_items, len).remove(0);
            let mut in_turn = item(0, len);
            (1..n_items).for_each(|i| add(&mut in_turn, &item(i, len)));
            assert_eq!(alone, in_turn);
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
                    let own = group.share().of(5).map(|i| in_pieces(&item(i, len))).collect();
                    let measure = |sum: Pieces| {
                        let last = f64::from(sum.flat()[len - 1]);
                        (sum, last)
                    };
                    group.sum_in_order_by_parts(own, |_| (), measure).expect("all ranks are there")
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
            let mut seen = Vec::new();
            let own = vec![Pieces::from(vec![vec![1.0, number]])];
            let sum = group.sum_in_order(own, |numbers| seen.extend(numbers.to_vec())).expect("all ranks are there");
            (sum.flat(), seen[1].is_nan())
        });
        assert!(sums.iter().all(|(sum, _)| sum[0] == 3.0 && sum[1].is_nan()), "{sums:?}");
        assert_eq!(
            sums.iter().map(|(_, is_seen)| *is_seen).collect::<Vec<_>>(),
            [false, true, false],
            "each rank sees its own"
        );
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
            let own = [0.5, 0.25].map(|x| in_pieces(&[x; 1000]));
            group.sum_in_order(own.to_vec(), |_| ()).expect("all ranks are there");
        });
        assert_eq!(whole, [4000, 8000, 8000, 4000]);
    }

    #[test]
    fn for_parts_a_rank_sends_each_number_once_or_all_but_a_part() {
        let in_order = sent(|group| {
            let own = vec![in_pieces(&[0.5; 1000])];
            group.sum_in_order_by_parts(own, |_| (), |sum| (sum, 0.0)).expect("all ranks are there");
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
