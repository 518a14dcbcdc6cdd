//! A group of processes, through the MPI library of the machine.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mpi::Threading;
use mpi::environment::Universe;
use mpi::point_to_point::{Destination as _, Source as _};
use mpi::request::{Request, Scope, StaticScope, scope};
use mpi::topology::Communicator as _;
use mpi::traits::Equivalence as _;

use super::beats::{Beats, EVERY, PATIENCE};
use super::{FIRST_SPEAKS, Group, GroupError, Transport};

/// How long a rank asks again and again whether a message has come, before it lets others compute between two looks.
const BUSY: Duration = Duration::from_micros(200);

/// Time between two looks after that.
const PAUSE: Duration = Duration::from_micros(50);

/// Numbers in a message at most: the library counts them in 31 bits.
const LARGEST: usize = 1 << 28;

/// Time between two looks for signs of life.
const LOOK: Duration = Duration::from_millis(100);

/// How long a rank that gives up waits for its own exchange to let go of the library.
const LET_GO: Duration = Duration::from_secs(2);

/// How long MPI may take to start: it waits for every process, and for ever for one that ended or was stopped before. Set
/// with the variable below, in seconds; 0 is for ever.
const START: Duration = Duration::from_secs(25);
const START_VARIABLE: &str = "KINDLING_MPI_START_TIMEOUT";

/// The kinds of messages: what is exchanged, and signs of life.
const DATA: i32 = 0;
const BEAT: i32 = 1;

/// A sign of life, and the last one.
static HERE: [u8; 1] = [0];
static LEAVES: [u8; 1] = [1];

/// The library, and this rank's place.
struct World {
    /// Ends MPI when it is dropped.
    universe: Universe,
    /// One thread at a time calls the library.
    calls: Mutex<()>,
    rank: usize,
    size: usize,
    /// What the rank waits for.
    waiting: Mutex<Option<(&'static str, usize)>>,
    /// In milliseconds; 0 is for ever.
    patience: AtomicU64,
    /// Whether the group is no longer used here.
    leaves: AtomicBool,
}

struct Mpi {
    world: Arc<World>,
    /// The thread that tells the others that this rank is there, and watches them.
    watch: Option<JoinHandle<()>>,
}

/// Starts MPI; `say` tells the user of a rank that does not answer.
pub(super) fn join(say: fn(GroupError) -> u8) -> Result<Group, GroupError> {
    let has_started = Arc::new(AtomicBool::new(false));
    end_unless(has_started.clone(), say);
    // Not the thread that starts it, but one thread at a time uses it.
    let started = mpi::initialize_with_threading(Threading::Serialized);
    has_started.store(true, Ordering::SeqCst);
    let Some((universe, threading)) = started else {
        return Err(GroupError::NotStarted { reason: "it is running already" });
    };
    if threading < Threading::Serialized {
        return Err(GroupError::NotStarted { reason: "the library was built without threads" });
    }
    let (rank, size) = (universe.world().rank() as usize, universe.world().size() as usize);
    let world = Arc::new(World {
        universe,
        calls: Mutex::new(()),
        rank,
        size,
        waiting: Mutex::new(None),
        patience: AtomicU64::new(PATIENCE.as_millis() as u64),
        leaves: AtomicBool::new(false),
    });
    let watched = world.clone();
    let thread = std::thread::Builder::new().name("group".to_owned());
    let watch = (size > 1).then(|| thread.spawn(move || watched.watch(say))).transpose();
    let watch = watch.map_err(|_| GroupError::NotStarted { reason: "there is no thread for signs of life" })?;
    Ok(Group::over(Mpi { world, watch }))
}

/// Ends this process, and with it all, unless MPI has started in time.
fn end_unless(has_started: Arc<AtomicBool>, say: fn(GroupError) -> u8) {
    let seconds = std::env::var(START_VARIABLE).ok().and_then(|seconds| seconds.parse().ok());
    let patience = seconds.map_or(START, Duration::from_secs);
    if patience.is_zero() {
        return;
    }
    // Without the thread it is as it is without this.
    let _ = std::thread::Builder::new().name("start".to_owned()).spawn(move || {
        let began = Instant::now();
        while began.elapsed() < patience {
            std::thread::sleep(LOOK);
            if has_started.load(Ordering::SeqCst) {
                return;
            }
        }
        std::process::exit(i32::from(say(GroupError::NotAllStarted { seconds: patience.as_secs() })));
    });
}

fn pause(start: Instant) {
    if start.elapsed() < BUSY {
        std::thread::yield_now();
    } else {
        std::thread::sleep(PAUSE);
    }
}

impl World {
    fn calls(&self) -> MutexGuard<'_, ()> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The right to call the library, if it can be had within [`EVERY`].
    fn calls_soon(&self) -> Option<MutexGuard<'_, ()>> {
        let start = Instant::now();
        loop {
            match self.calls.try_lock() {
                Ok(calls) => return Some(calls),
                Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) if start.elapsed() >= EVERY => return None,
                Err(TryLockError::WouldBlock) => std::thread::sleep(PAUSE),
            }
        }
    }

    /// What this rank waits for, and for which rank.
    fn waiting(&self) -> Option<(&'static str, usize)> {
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_waiting(&self, waiting: Option<(&'static str, usize)>) {
        *self.waiting.lock().unwrap_or_else(PoisonError::into_inner) = waiting;
    }

    /// Does `work`, which waits for `what` from, or to be taken by, `rank`.
    fn wait_for<T>(&self, rank: usize, what: &'static str, work: impl FnOnce() -> T) -> T {
        self.set_waiting(Some((what, rank)));
        let done = work();
        self.set_waiting(None);
        done
    }

    /// Waits for a request without keeping a core busy: where there are more ranks than cores, others compute meanwhile.
    ///
    /// It does not give up: the thread that watches the others ends the process.
    fn complete<'a, D: ?Sized, S: Scope<'a>>(&self, mut request: Request<'a, D, S>) {
        let start = Instant::now();
        loop {
            let calls = self.calls();
            match request.test() {
                Ok(_) => return,
                Err(unfinished) => request = unfinished,
            }
            drop(calls);
            pause(start);
        }
    }

    fn send<T: mpi::traits::Equivalence>(&self, to: usize, numbers: &[T]) {
        let world = self.universe.world();
        scope(|scope| {
            let request = {
                let _calls = self.calls();
                world.process_at_rank(to as i32).immediate_send_with_tag(scope, numbers, DATA)
            };
            self.complete(request);
        });
    }

    fn receive(&self, from: usize, numbers: &mut [f32]) {
        let world = self.universe.world();
        scope(|scope| {
            let request = {
                let _calls = self.calls();
                world.process_at_rank(from as i32).immediate_receive_into_with_tag(scope, numbers, DATA)
            };
            self.complete(request);
        });
    }

    fn receive_bytes(&self, from: usize) -> Vec<u8> {
        let (world, start) = (self.universe.world(), Instant::now());
        let process = world.process_at_rank(from as i32);
        let (message, status) = loop {
            let calls = self.calls();
            if let Some(found) = process.immediate_matched_probe_with_tag(DATA) {
                break found;
            }
            drop(calls);
            pause(start);
        };
        let n = usize::try_from(status.count(u8::equivalent_datatype())).unwrap_or_default();
        let mut bytes = vec![0; n];
        scope(|scope| {
            let request = {
                let _calls = self.calls();
                message.immediate_matched_receive_into(scope, &mut bytes[..])
            };
            self.complete(request);
        });
        bytes
    }

    /// Sends numbers to one rank and receives some from another, where there are any.
    fn exchange(&self, to: usize, sent: &[f32], from: usize, received: &mut [f32]) {
        let world = self.universe.world();
        scope(|scope| {
            let (send, receive) = {
                let _calls = self.calls();
                let (to, from) = (world.process_at_rank(to as i32), world.process_at_rank(from as i32));
                let receive =
                    (!received.is_empty()).then(|| from.immediate_receive_into_with_tag(scope, received, DATA));
                ((!sent.is_empty()).then(|| to.immediate_send_with_tag(scope, sent, DATA)), receive)
            };
            if let Some(request) = receive {
                self.complete(request);
            }
            if let Some(request) = send {
                self.complete(request);
            }
        });
    }

    /// Tells the others that this rank is there, until it leaves and they do, and ends all if one of them is silent.
    fn watch(&self, say: fn(GroupError) -> u8) {
        let mut beats = Beats::new(self.rank, self.size, Instant::now());
        let mut sending: BTreeMap<usize, Request<'static, [u8; 1], StaticScope>> = BTreeMap::new();
        let (mut last_beat, mut has_said_that_it_leaves) = (None::<Instant>, false);
        loop {
            let leaves = self.leaves.load(Ordering::SeqCst);
            // A call can wait inside the library for a process that was stopped there. Then nothing is heard of anybody.
            let calls = self.calls_soon();
            let is_stuck = calls.is_none();
            if let Some(_calls) = calls {
                let world = self.universe.world();
                while let Some((message, status)) = world.any_process().immediate_matched_probe_with_tag(BEAT) {
                    let (sign, _) = message.matched_receive::<u8>();
                    beats.note(status.source_rank() as usize, [sign] == LEAVES, Instant::now());
                }
                sending = sending.into_iter().filter_map(|(to, request)| Some((to, request.test().err()?))).collect();
                let sign = match last_beat {
                    // The last sign comes behind all others.
                    _ if leaves => (!has_said_that_it_leaves && sending.is_empty()).then_some(&LEAVES),
                    Some(last) => (last.elapsed() >= EVERY).then_some(&HERE),
                    None => Some(&HERE),
                };
                if let Some(sign) = sign {
                    last_beat = Some(Instant::now());
                    has_said_that_it_leaves = leaves;
                    for to in beats.partners() {
                        // One that takes none for now gets the next.
                        sending.entry(to).or_insert_with(|| {
                            world.process_at_rank(to as i32).immediate_send_with_tag(StaticScope, sign, BEAT)
                        });
                    }
                }
            }
            if has_said_that_it_leaves && beats.all_have_left() && sending.is_empty() {
                return;
            }
            let patience = self.patience.load(Ordering::Relaxed);
            let patience = (patience > 0).then(|| Duration::from_millis(patience));
            if let Some((rank, silence)) = beats.silent(patience, Instant::now()) {
                let peer = self.waiting().map(|(_, peer)| peer).filter(|_| is_stuck);
                self.end(peer.unwrap_or(rank), silence, say);
            }
            std::thread::park_timeout(if leaves { PAUSE } else { LOOK });
        }
    }

    /// Ends all ranks because `rank` is silent.
    fn end(&self, rank: usize, silence: Duration, say: fn(GroupError) -> u8) -> ! {
        if self.rank > 1 {
            std::thread::sleep(FIRST_SPEAKS);
        }
        let doing = self.waiting().map_or_else(
            || "was computing".to_owned(),
            |(what, peer)| format!("was exchanging {what} with rank {peer}"),
        );
        let code = say(GroupError::Silent { rank, seconds: silence.as_secs_f64(), own: self.rank, doing });
        let start = Instant::now();
        while start.elapsed() < LET_GO {
            if let Ok(_calls) = self.calls.try_lock() {
                self.universe.world().abort(i32::from(code));
            }
            std::thread::sleep(PAUSE);
        }
        std::process::exit(i32::from(code));
    }
}

impl Drop for Mpi {
    fn drop(&mut self) {
        self.world.leaves.store(true, Ordering::SeqCst);
        if let Some(watch) = self.watch.take() {
            watch.thread().unpark();
            // A panic there was said, and this is the end.
            let _ = watch.join();
        }
    }
}

impl Transport for Mpi {
    fn rank(&self) -> usize {
        self.world.rank
    }

    fn size(&self) -> usize {
        self.world.size
    }

    fn send_bytes(&self, to: usize, bytes: &[u8], what: &'static str) -> Result<(), GroupError> {
        self.world.wait_for(to, what, || self.world.send(to, bytes));
        Ok(())
    }

    fn receive_bytes(&self, from: usize, what: &'static str) -> Result<Vec<u8>, GroupError> {
        Ok(self.world.wait_for(from, what, || self.world.receive_bytes(from)))
    }

    fn send_floats(&self, to: usize, numbers: &[f32], what: &'static str) -> Result<(), GroupError> {
        self.world.wait_for(to, what, || self.world.send(to, numbers));
        Ok(())
    }

    fn receive_floats(&self, from: usize, numbers: &mut [f32], what: &'static str) -> Result<(), GroupError> {
        self.world.wait_for(from, what, || self.world.receive(from, numbers));
        Ok(())
    }

    fn exchange_floats(
        &self,
        to: usize,
        sent: &[f32],
        from: usize,
        received: &mut [f32],
        what: &'static str,
    ) -> Result<(), GroupError> {
        self.world.wait_for(from, what, || {
            let (mut sent, mut received) = (sent.chunks(LARGEST), received.chunks_mut(LARGEST));
            loop {
                let (send, receive) = (sent.next(), received.next());
                if send.is_none() && receive.is_none() {
                    return;
                }
                self.world.exchange(to, send.unwrap_or_default(), from, receive.unwrap_or_default());
            }
        });
        Ok(())
    }

    fn set_patience(&self, patience: Option<Duration>) {
        let millis = patience.map_or(0, |patience| patience.as_millis().try_into().unwrap_or(u64::MAX));
        self.world.patience.store(millis, Ordering::Relaxed);
    }

    fn abort(&self, code: u8) {
        let _calls = self.world.calls();
        self.world.universe.world().abort(i32::from(code));
    }
}
