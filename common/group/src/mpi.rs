//! A group of processes, through the MPI library of the machine.

use std::time::{Duration, Instant};

use mpi::Threading;
use mpi::environment::Universe;
use mpi::point_to_point::{Destination as _, MatchedReceiveVec as _, Source as _};
use mpi::request::{Request, Scope, scope};
use mpi::topology::Communicator as _;

use super::{Group, GroupError, Transport};

/// How long a rank asks again and again whether a message has come, before it lets others compute between two looks.
const BUSY: Duration = Duration::from_micros(200);

/// Time between two looks after that.
const PAUSE: Duration = Duration::from_micros(50);

/// The universe ends MPI when it is dropped.
struct Mpi {
    universe: Universe,
    rank: usize,
    size: usize,
}

/// Starts MPI.
pub(super) fn join() -> Result<Group, GroupError> {
    // Not the thread that starts it, but one thread at a time uses it.
    let Some((universe, threading)) = mpi::initialize_with_threading(Threading::Serialized) else {
        return Err(GroupError::NotStarted { reason: "it is running already" });
    };
    if threading < Threading::Serialized {
        return Err(GroupError::NotStarted { reason: "the library was built without threads" });
    }
    let world = universe.world();
    let (rank, size) = (world.rank() as usize, world.size() as usize);
    Ok(Group::over(Mpi { universe, rank, size }))
}

/// Waits for a request without keeping a core busy: where there are more ranks than cores, others compute meanwhile.
fn wait<'a, D: ?Sized, S: Scope<'a>>(mut request: Request<'a, D, S>) {
    let start = Instant::now();
    while let Err(unfinished) = request.test() {
        request = unfinished;
        pause(start);
    }
}

fn pause(start: Instant) {
    if start.elapsed() < BUSY {
        std::thread::yield_now();
    } else {
        std::thread::sleep(PAUSE);
    }
}

impl Transport for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn send_bytes(&self, to: usize, bytes: &[u8]) -> Result<(), GroupError> {
        let world = self.universe.world();
        scope(|scope| wait(world.process_at_rank(to as i32).immediate_send(scope, bytes)));
        Ok(())
    }

    fn receive_bytes(&self, from: usize) -> Result<Vec<u8>, GroupError> {
        let (world, start) = (self.universe.world(), Instant::now());
        let process = world.process_at_rank(from as i32);
        let message = loop {
            match process.immediate_matched_probe() {
                Some(message) => break message,
                None => pause(start),
            }
        };
        Ok(message.matched_receive_vec().0)
    }

    fn send_floats(&self, to: usize, numbers: &[f32]) -> Result<(), GroupError> {
        let world = self.universe.world();
        scope(|scope| wait(world.process_at_rank(to as i32).immediate_send(scope, numbers)));
        Ok(())
    }

    fn receive_floats(&self, from: usize, numbers: &mut [f32]) -> Result<(), GroupError> {
        let world = self.universe.world();
        scope(|scope| wait(world.process_at_rank(from as i32).immediate_receive_into(scope, numbers)));
        Ok(())
    }

    fn abort(&self, code: u8) {
        self.universe.world().abort(i32::from(code));
    }
}
