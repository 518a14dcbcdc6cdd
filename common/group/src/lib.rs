//! The processes that train one model together: who they are, and what they exchange.
//!
//! A [`Group`] has ranks from 0 on; rank 0 writes files and speaks. [`Group::alone`] is the usual single process, [`Group::join`]
//! asks the launcher (`mpirun`, `srun`) for the others, and [`threads`] makes a group of threads, for tests.
//!
//! # Invariants
//! - Every rank calls the same collective operations in the same order.
//! - What a rank computes is a [`Share`] of a list that all know: a block of neighbours, so that results in the order of the
//!   ranks are in the order of the list.
//! - [`Group::sum_in_order`] adds from the first to the last item of that list, wherever each lies: the number of ranks changes no
//!   bit of the result.

#![forbid(unsafe_code)]

#[cfg(feature = "mpi")]
mod mpi;
mod threads;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;
use serde::de::DeserializeOwned;

pub use threads::threads;

/// Numbers sent at a time: small enough that the ranks of a chain work at the same time, large enough that a message's fixed
/// cost does not count.
const BUCKET: usize = 1 << 18;

/// Set by launchers in each process that they start: Open MPI, MPICH and Intel MPI, Slurm with `PMIx`.
const LAUNCHED: [&str; 4] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMI_RANK", "PMIX_RANK"];

/// The number of a rank among those of its machine, as launchers give it.
const LOCAL_RANK: [&str; 4] = ["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "PALS_LOCAL_RANKID", "SLURM_LOCALID"];

/// Carries messages between two ranks, in order.
trait Transport: Send + Sync {
    fn rank(&self) -> usize;
    fn size(&self) -> usize;
    fn send_bytes(&self, to: usize, bytes: &[u8]) -> Result<(), GroupError>;
    fn receive_bytes(&self, from: usize) -> Result<Vec<u8>, GroupError>;
    fn send_floats(&self, to: usize, numbers: &[f32]) -> Result<(), GroupError>;
    /// Fills `numbers`, of which there are as many as were sent.
    fn receive_floats(&self, from: usize, numbers: &mut [f32]) -> Result<(), GroupError>;
    /// Ends every process of the group.
    fn abort(&self, code: u8);
}

/// The processes that train together, seen from one of them.
#[derive(Clone, Default)]
pub struct Group {
    /// `None` for a process that is alone.
    transport: Option<Arc<Counted>>,
}

/// A transport that counts what this rank sends.
struct Counted {
    transport: Box<dyn Transport>,
    bytes: AtomicU64,
}

impl Counted {
    fn rank(&self) -> usize {
        self.transport.rank()
    }

    fn size(&self) -> usize {
        self.transport.size()
    }

    fn send_bytes(&self, to: usize, bytes: &[u8]) -> Result<(), GroupError> {
        self.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.transport.send_bytes(to, bytes)
    }

    fn receive_bytes(&self, from: usize) -> Result<Vec<u8>, GroupError> {
        self.transport.receive_bytes(from)
    }

    fn send_floats(&self, to: usize, numbers: &[f32]) -> Result<(), GroupError> {
        self.bytes.fetch_add(size_of_val(numbers) as u64, Ordering::Relaxed);
        self.transport.send_floats(to, numbers)
    }

    fn receive_floats(&self, from: usize, numbers: &mut [f32]) -> Result<(), GroupError> {
        self.transport.receive_floats(from, numbers)
    }
}

impl fmt::Debug for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} of {}", self.rank(), self.size())
    }
}

/// One rank's share of any list: a block of neighbours, the blocks in the order of the ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    rank: usize,
    size: usize,
}

impl Share {
    /// All of the list.
    pub const WHOLE: Self = Self { rank: 0, size: 1 };

    /// The indices of this share in a list of `n`. Blocks differ by one at most; where there are fewer items than ranks, the
    /// last ranks have none.
    pub fn of(self, n: usize) -> Range<usize> {
        let (each, more) = (n / self.size, n % self.size);
        let start = self.rank * each + self.rank.min(more);
        start..start + each + usize::from(self.rank < more)
    }
}

/// Why the ranks cannot go on together.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// Several processes were started, and this program cannot talk to the others.
    #[error(
        "this program was started as one of several processes, but was built without MPI\nhint: build it with `cargo build \
         --release --features mpi`, or start it without `mpirun`"
    )]
    NotBuilt,
    /// The MPI library gave no environment.
    #[error("MPI could not be started: {reason}")]
    NotStarted {
        /// In words.
        reason: &'static str,
    },
    /// Another rank has ended.
    #[error("rank {rank} has ended")]
    Gone {
        /// Which.
        rank: usize,
    },
    /// A message cannot be read: the ranks run different programs.
    #[error("a message of another rank cannot be read: {reason}\nhint: start the same program on every machine")]
    Message {
        /// What is wrong with it.
        reason: String,
    },
    /// Ranks disagree about something that must be the same.
    #[error("rank {rank} differs from rank 0: {name} is {there}, and {at_first} on rank 0")]
    Differ {
        /// The first rank that differs.
        rank: usize,
        /// What differs.
        name: String,
        /// Its value there.
        there: String,
        /// Its value on rank 0.
        at_first: String,
    },
}

impl Group {
    /// The single process.
    pub fn alone() -> Self {
        Self::default()
    }

    /// The processes that a launcher started together with this one; without a launcher the process is alone.
    ///
    /// # Errors
    /// If there are others, and this program was built without MPI or the library does not start.
    pub fn join() -> Result<Self, GroupError> {
        if !LAUNCHED.iter().any(|name| std::env::var_os(name).is_some()) {
            return Ok(Self::alone());
        }
        #[cfg(feature = "mpi")]
        return mpi::join();
        #[cfg(not(feature = "mpi"))]
        if std::env::var("OMPI_COMM_WORLD_SIZE").or_else(|_| std::env::var("PMI_SIZE")).is_ok_and(|size| size != "1") {
            return Err(GroupError::NotBuilt);
        }
        #[cfg(not(feature = "mpi"))]
        Ok(Self::alone())
    }

    fn over(transport: impl Transport + 'static) -> Self {
        if transport.size() == 1 {
            return Self::alone();
        }
        Self { transport: Some(Arc::new(Counted { transport: Box::new(transport), bytes: AtomicU64::new(0) })) }
    }

    /// The number of this process; the first is 0.
    pub fn rank(&self) -> usize {
        self.transport.as_ref().map_or(0, |transport| transport.rank())
    }

    /// How many processes there are.
    pub fn size(&self) -> usize {
        self.transport.as_ref().map_or(1, |transport| transport.size())
    }

    /// Whether this is the rank that writes and speaks.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Whether there is no other process.
    pub const fn is_alone(&self) -> bool {
        self.transport.is_none()
    }

    /// Bytes that this rank has sent to others.
    pub fn bytes_sent(&self) -> u64 {
        self.transport.as_ref().map_or(0, |transport| transport.bytes.load(Ordering::Relaxed))
    }

    /// This rank's share of any list.
    pub fn share(&self) -> Share {
        Share { rank: self.rank(), size: self.size() }
    }

    /// What each rank gives, in the order of the ranks.
    ///
    /// # Errors
    /// If a rank has ended or runs another program.
    pub fn gather<T: Serialize + DeserializeOwned>(&self, own: T) -> Result<Vec<T>, GroupError> {
        let Some(transport) = &self.transport else { return Ok(vec![own]) };
        let mut message = Vec::new();
        ciborium::into_writer(&own, &mut message).map_err(|error| unreadable(&error))?;
        let all = if transport.rank() == 0 {
            let mut all = frame(&message);
            for from in 1..transport.size() {
                all.extend(frame(&transport.receive_bytes(from)?));
            }
            all
        } else {
            transport.send_bytes(0, &message)?;
            Vec::new()
        };
        let all = self.broadcast(all)?;
        frames(&all)?
            .into_iter()
            .map(|message| ciborium::from_reader(message).map_err(|error| unreadable(&error)))
            .collect()
    }

    /// The items of a list of which each rank gives its [`Share`], or any others, by their indices.
    ///
    /// # Errors
    /// As [`gather`](Self::gather), and if an item is missing.
    pub fn in_order<T: Serialize + DeserializeOwned>(&self, own: Vec<(usize, T)>) -> Result<Vec<T>, GroupError> {
        let mut all: Vec<(usize, T)> = self.gather(own)?.into_iter().flatten().collect();
        all.sort_by_key(|(i, _)| *i);
        if all.iter().enumerate().any(|(i, (index, _))| i != *index) {
            return Err(GroupError::Message { reason: "a part of a result is missing".to_owned() });
        }
        Ok(all.into_iter().map(|(_, item)| item).collect())
    }

    /// The items `0..n` in their order, of which each rank computes its [`Share`].
    ///
    /// # Errors
    /// As `compute`, and if a rank has ended.
    pub fn map_shared<T, E>(&self, n: usize, mut compute: impl FnMut(usize) -> Result<T, E>) -> Result<Vec<T>, E>
    where
        T: Serialize + DeserializeOwned,
        E: From<GroupError>,
    {
        let own: Vec<T> = self.share().of(n).map(&mut compute).collect::<Result<_, E>>()?;
        Ok(self.gather(own)?.into_iter().flatten().collect())
    }

    /// Waits until every rank has come here.
    ///
    /// # Errors
    /// If a rank has ended.
    pub fn wait_for_all(&self) -> Result<(), GroupError> {
        self.gather(()).map(|_| ())
    }

    /// Does `work` on rank 0, and then on the others, which find what it left.
    ///
    /// # Errors
    /// As `work`, and if a rank has ended.
    pub fn first_alone<T, E: From<GroupError>>(&self, work: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
        if self.is_first() {
            let done = work()?;
            self.wait_for_all()?;
            Ok(done)
        } else {
            self.wait_for_all()?;
            work()
        }
    }

    /// Checks that `facts`, names with values, are the same on every rank.
    ///
    /// # Errors
    /// [`GroupError::Differ`] on every rank, naming the first difference.
    pub fn check_same(&self, facts: &[(String, String)]) -> Result<(), GroupError> {
        if self.is_alone() {
            return Ok(());
        }
        let all = self.gather(facts.to_vec())?;
        let of = |facts: &[(String, String)], name: &str| {
            facts.iter().find(|(fact, _)| fact == name).map_or_else(|| "not set".to_owned(), |(_, value)| value.clone())
        };
        for (rank, others) in all.iter().enumerate().skip(1) {
            for (name, _) in all[0].iter().chain(others) {
                let (at_first, there) = (of(&all[0], name), of(others, name));
                if at_first != there {
                    return Err(GroupError::Differ { rank, name: name.clone(), there, at_first });
                }
            }
        }
        Ok(())
    }

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
                transport.receive_floats(rank - 1, before)?;
                add(&mut sum[bucket.clone()], before);
            }
            for item in &rest {
                add(&mut sum[bucket.clone()], &item[bucket.clone()]);
            }
            if rank < last {
                transport.send_floats(rank + 1, &sum[bucket])?;
            }
        }
        for bucket in sum.chunks_mut(BUCKET) {
            if rank < last {
                transport.receive_floats(rank + 1, bucket)?;
            }
            if rank > 0 {
                transport.send_floats(rank - 1, bucket)?;
            }
        }
        Ok(sum)
    }

    /// Ends all processes of the group with this exit code; returns where the process is alone.
    pub fn abort(&self, code: u8) {
        if let Some(transport) = &self.transport {
            transport.transport.abort(code);
        }
    }

    /// What rank 0 gives, along a tree: each rank that has it hands it on to one as far away as there are ranks that have it.
    fn broadcast(&self, message: Vec<u8>) -> Result<Vec<u8>, GroupError> {
        let Some(transport) = &self.transport else { return Ok(message) };
        let (rank, size) = (transport.rank(), transport.size());
        // The highest bit of a rank leads to the one that it hears from.
        let distance = if rank == 0 { 0 } else { 1 << rank.ilog2() };
        let message = if rank == 0 { message } else { transport.receive_bytes(rank - distance)? };
        let mut step = (2 * distance).max(1);
        while rank + step < size {
            transport.send_bytes(rank + step, &message)?;
            step *= 2;
        }
        Ok(message)
    }
}

/// The number of this process among those of its machine, from 0, as the launcher gives it; 0 without one.
pub fn local_rank() -> usize {
    LOCAL_RANK.iter().find_map(|name| std::env::var(name).ok()?.parse().ok()).unwrap_or(0)
}

/// Adds `numbers` to those of `sum`.
fn add(sum: &mut [f32], numbers: &[f32]) {
    assert_eq!(sum.len(), numbers.len(), "items of a sum have one length");
    sum.iter_mut().zip(numbers).for_each(|(sum, number)| *sum += number);
}

/// A message behind its length.
fn frame(message: &[u8]) -> Vec<u8> {
    [&(message.len() as u64).to_le_bytes(), message].concat()
}

/// The messages that [`frame`] put one behind the other.
fn frames(mut bytes: &[u8]) -> Result<Vec<&[u8]>, GroupError> {
    let mut all = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk::<8>() {
        let cut_short = || GroupError::Message { reason: "it is cut short".to_owned() };
        let (message, rest) = rest.split_at_checked(u64::from_le_bytes(*length) as usize).ok_or_else(cut_short)?;
        all.push(message);
        bytes = rest;
    }
    Ok(all)
}

fn unreadable(error: &impl ToString) -> GroupError {
    GroupError::Message { reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn a_number_that_is_none_reaches_every_rank() {
        let sums = threads(3, |group| {
            let number = if group.rank() == 1 { f32::NAN } else { 1.0 };
            group.sum_in_order(vec![vec![1.0, number]]).expect("all ranks are there")
        });
        assert!(sums.iter().all(|sum| sum[0] == 3.0 && sum[1].is_nan()), "{sums:?}");
    }

    #[test]
    fn a_rank_sends_each_number_twice_and_the_ends_of_the_chain_once() {
        let len = 1000;
        let sent = threads(4, |group| {
            group.sum_in_order(vec![vec![0.5; len], vec![0.25; len]]).expect("all ranks are there");
            group.bytes_sent()
        });
        assert_eq!(sent, [4000, 8000, 8000, 4000]);
    }

    #[test]
    fn shares_are_blocks_in_the_order_of_the_ranks() {
        for (n, size) in [(10, 3), (2, 4), (0, 2), (8, 8)] {
            let blocks: Vec<usize> = (0..size).flat_map(|rank| Share { rank, size }.of(n)).collect();
            assert!(blocks.iter().copied().eq(0..n), "{blocks:?}");
        }
        assert_eq!(Share { rank: 1, size: 3 }.of(10), 4..7);
    }

    #[test]
    fn gathered_values_are_in_the_order_of_the_ranks_and_keep_their_bits() {
        for n in 1..=9 {
            let given =
                |rank: usize| (rank, vec![f32::NEG_INFINITY, -0.0, 0.1 / (rank as f32 + 1.0)], "ä".repeat(rank));
            let expected: Vec<_> = (0..n).map(given).collect();
            for all in threads(n, |group| group.gather(given(group.rank())).expect("gathers")) {
                assert_eq!(all, expected);
                assert!(all.iter().all(|(_, numbers, _)| numbers[1].is_sign_negative()));
            }
            let nan = threads(n, |group| group.gather(f32::NAN).expect("gathers"));
            assert!(nan.iter().flatten().all(|number| number.is_nan()));
        }
    }

    #[test]
    fn items_come_back_in_order_and_a_missing_one_is_noticed() {
        let all = threads(3, |group| {
            // Dealt like cards.
            let own: Vec<_> = (group.rank()..7).step_by(3).map(|i| (i, i * i)).collect();
            let whole = group.in_order(own.clone()).expect("complete");
            let lacking = own.into_iter().filter(|(i, _)| *i != 4).collect();
            (whole, group.in_order(lacking).is_err())
        });
        assert!(all.iter().all(|(whole, noticed)| *whole == [0, 1, 4, 9, 16, 25, 36] && *noticed));
    }

    #[test]
    fn a_difference_is_named_on_every_rank() {
        let errors = threads(3, |group| {
            let lr = if group.rank() == 2 { "0.2" } else { "0.1" };
            let facts =
                [("`seed`", "1"), ("`optimizer.lr`", lr)].map(|(name, value)| (name.to_owned(), value.to_owned()));
            group.check_same(&facts).expect_err("differs").to_string()
        });
        let expected = "rank 2 differs from rank 0: `optimizer.lr` is 0.2, and 0.1 on rank 0";
        assert!(errors.iter().all(|error| error == expected), "{errors:?}");
    }

    #[test]
    fn who_waits_for_a_rank_that_ended_is_told_which() {
        let ends = threads(3, |group| {
            if group.rank() == 1 {
                return String::new();
            }
            group.gather(0).expect_err("rank 1 is gone").to_string()
        });
        assert_eq!(ends[0], "rank 1 has ended");
        assert!(ends[2].ends_with("has ended"), "{}", ends[2]);
    }

    #[test]
    fn the_first_is_done_before_the_others_begin() {
        let order = std::sync::Mutex::new(Vec::new());
        threads(4, |group| {
            group.first_alone(|| -> Result<(), GroupError> {
                order.lock().expect("no panic").push(group.rank());
                Ok(())
            })
        });
        assert_eq!(order.lock().expect("no panic")[0], 0);
    }
}
