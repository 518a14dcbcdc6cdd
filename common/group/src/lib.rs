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
mod beats;
#[cfg(feature = "mpi")]
mod mpi;
mod pieces;
mod sums;
mod threads;

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

pub use pieces::Pieces;
pub use threads::threads;

/// What [`Group::gather`] sends.
const RESULTS: &str = "results";

/// Set by launchers in each process that they start: Open MPI, MPICH and Intel MPI, Slurm with `PMIx`.
const LAUNCHED: [&str; 4] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMI_RANK", "PMIX_RANK"];

/// Between the first rank that says what all know, which ends them, and the others.
const FIRST_SPEAKS: Duration = Duration::from_secs(3);

/// The number of a rank among those of its machine, as launchers give it.
const LOCAL_RANK: [&str; 4] = ["OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "PALS_LOCAL_RANKID", "SLURM_LOCALID"];

/// The first of the variables that is set.
fn launched(names: [&str; 2]) -> Option<String> {
    names.iter().find_map(|name| std::env::var(name).ok())
}

/// Whether the launcher says that there are other processes.
fn is_one_of_several() -> bool {
    launched(["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"]).is_some_and(|size| size != "1")
}

/// Carries messages between two ranks, in order. `what` they are is for the message about a rank that does not answer.
trait Transport: Send + Sync {
    fn rank(&self) -> usize;
    fn size(&self) -> usize;
    fn send_bytes(&self, to: usize, bytes: &[u8], what: &'static str) -> Result<(), GroupError>;
    fn receive_bytes(&self, from: usize, what: &'static str) -> Result<Vec<u8>, GroupError>;
    fn send_floats(&self, to: usize, numbers: &[f32], what: &'static str) -> Result<(), GroupError>;
    /// Fills `numbers`, of which there are as many as were sent.
    fn receive_floats(&self, from: usize, numbers: &mut [f32], what: &'static str) -> Result<(), GroupError>;
    /// Sends to one and receives from another at the same time, so that all ranks may do so in a ring.
    fn exchange_floats(
        &self,
        to: usize,
        sent: &[f32],
        from: usize,
        received: &mut [f32],
        what: &'static str,
    ) -> Result<(), GroupError>;
    /// How long another rank may be silent; see [`Group::set_patience`].
    fn set_patience(&self, _patience: Option<Duration>) {}
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

    fn count<T>(&self, sent: &[T]) {
        self.bytes.fetch_add(size_of_val(sent) as u64, Ordering::Relaxed);
    }

    fn send_bytes(&self, to: usize, bytes: &[u8], what: &'static str) -> Result<(), GroupError> {
        self.count(bytes);
        self.transport.send_bytes(to, bytes, what)
    }

    fn receive_bytes(&self, from: usize, what: &'static str) -> Result<Vec<u8>, GroupError> {
        self.transport.receive_bytes(from, what)
    }

    fn send_floats(&self, to: usize, numbers: &[f32], what: &'static str) -> Result<(), GroupError> {
        self.count(numbers);
        self.transport.send_floats(to, numbers, what)
    }

    fn receive_floats(&self, from: usize, numbers: &mut [f32], what: &'static str) -> Result<(), GroupError> {
        self.transport.receive_floats(from, numbers, what)
    }

    fn exchange_floats(
        &self,
        to: usize,
        sent: &[f32],
        from: usize,
        received: &mut [f32],
        what: &'static str,
    ) -> Result<(), GroupError> {
        self.count(sent);
        self.transport.exchange_floats(to, sent, from, received, what)
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

    /// The shares of `size` ranks, in their order.
    pub fn all(size: usize) -> impl Iterator<Item = Self> {
        (0..size).map(move |rank| Self { rank, size })
    }

    /// Whether this is all of any list.
    pub const fn is_whole(self) -> bool {
        self.size == 1
    }

    /// How much of a long list it is.
    pub fn fraction(self) -> f64 {
        1.0 / self.size as f64
    }

    /// Whether it is the first rank's.
    pub const fn is_first(self) -> bool {
        self.rank == 0
    }

    /// Whether it is the last rank's.
    pub const fn is_last(self) -> bool {
        self.rank + 1 == self.size
    }

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
    /// Several processes were started of a command that is one.
    #[error("this command is one process, and was started as one of several\nhint: start it without `mpirun`")]
    OneProcess,
    /// The MPI library gave no environment.
    #[error("MPI could not be started: {reason}")]
    NotStarted {
        /// In words.
        reason: &'static str,
    },
    /// MPI waits for a process that does not come.
    #[error(
        "not every process had started MPI after {seconds} seconds\nhint: look after the other processes; on machines that need \
         longer, set KINDLING_MPI_START_TIMEOUT to more seconds"
    )]
    NotAllStarted {
        /// How long they were waited for.
        seconds: u64,
    },
    /// Another rank has ended.
    #[error("rank {rank} has ended")]
    Gone {
        /// Which.
        rank: usize,
    },
    /// Another rank is there and does nothing, or the network to it is gone.
    #[error(
        "rank {rank} has not answered for {seconds:.0} seconds, while rank {own} {doing}\nhint: look after the process of that rank \
         and the network of its machine; `--resume` goes on from the last checkpoint, and `run.group_timeout` is how long to wait"
    )]
    Silent {
        /// Which.
        rank: usize,
        /// For how long.
        seconds: f64,
        /// The rank that noticed.
        own: usize,
        /// What that was waiting for.
        doing: String,
    },
    /// A message cannot be read: the ranks run different programs.
    #[error("a message of another rank cannot be read: {reason}\nhint: start the same program on every machine")]
    Message {
        /// What is wrong with it.
        reason: String,
    },
    /// Ranks that computed the same have other weights.
    #[error(
        "rank {rank} differs from rank 0: the checksum of the weights after step {step} is {there}, and {at_first} on rank 0\nhint: all \
         processors have to be of one kind (AVX2 or AVX-512); if they are, look for faulty memory; `--resume` goes on from the last \
         checkpoint"
    )]
    Diverged {
        /// The first rank that differs.
        rank: usize,
        /// After which step.
        step: u64,
        /// The checksum there.
        there: String,
        /// That of rank 0.
        at_first: String,
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

    /// The processes that a launcher started together with this one; without a launcher the process is alone. Where a rank
    /// does not answer any more, `say` tells the user and gives the exit code with which all end.
    ///
    /// # Errors
    /// If there are others, and this program was built without MPI or the library does not start.
    pub fn join(say: fn(GroupError) -> u8) -> Result<Self, GroupError> {
        if !LAUNCHED.iter().any(|name| std::env::var_os(name).is_some()) {
            return Ok(Self::alone());
        }
        #[cfg(feature = "mpi")]
        return mpi::join(say);
        #[cfg(not(feature = "mpi"))]
        let _ = say;
        #[cfg(not(feature = "mpi"))]
        if is_one_of_several() {
            return Err(GroupError::NotBuilt);
        }
        #[cfg(not(feature = "mpi"))]
        Ok(Self::alone())
    }

    /// Checks that a launcher did not start several processes, of which each would do the same.
    ///
    /// # Errors
    /// If it did; the first rank says so, and ends the others meanwhile.
    pub fn check_alone() -> Result<(), GroupError> {
        if !is_one_of_several() {
            return Ok(());
        }
        if launched(["OMPI_COMM_WORLD_RANK", "PMI_RANK"]).is_some_and(|rank| rank != "0") {
            std::thread::sleep(FIRST_SPEAKS);
        }
        Err(GroupError::OneProcess)
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

    /// How long another rank may be silent, computing or not, until all end; `None` is for ever. Until it is set, 20 seconds.
    pub fn set_patience(&self, patience: Option<Duration>) {
        if let Some(transport) = &self.transport {
            transport.transport.set_patience(patience);
        }
    }

    /// This rank's share of any list.
    pub fn share(&self) -> Share {
        Share { rank: self.rank(), size: self.size() }
    }

    /// The shares of all ranks in their order.
    pub fn shares(&self) -> impl Iterator<Item = Share> + use<> {
        Share::all(self.size())
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
                all.extend(frame(&transport.receive_bytes(from, RESULTS)?));
            }
            all
        } else {
            transport.send_bytes(0, &message, RESULTS)?;
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
        let message = if rank == 0 { message } else { transport.receive_bytes(rank - distance, RESULTS)? };
        let mut step = (2 * distance).max(1);
        while rank + step < size {
            transport.send_bytes(rank + step, &message, RESULTS)?;
            step *= 2;
        }
        Ok(message)
    }
}

/// The number of this process among those of its machine, from 0, as the launcher gives it; 0 without one.
pub fn local_rank() -> usize {
    LOCAL_RANK.iter().find_map(|name| std::env::var(name).ok()?.parse().ok()).unwrap_or(0)
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
