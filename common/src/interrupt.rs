//! Ctrl-C and the other signals that ask a program to stop.

use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use crate::group::{Group, GroupError};

/// Signals that follow the first one so closely are the same request: `timeout` and job schedulers signal both the
/// process and its group, some of them twice.
const SAME_REQUEST: Duration = Duration::from_secs(1);

/// Ctrl-C, the same number on every system.
const SIGINT: i32 = 2;

/// A closed terminal, the same number on every system that has it.
const SIGHUP: i32 = 1;

/// The number of the signal that asked to stop; 0 until one does.
static SIGNAL: AtomicI32 = AtomicI32::new(0);
static NEVER: AtomicI32 = AtomicI32::new(0);

/// What is done before a second request ends the process.
static BEFORE_EXIT: OnceLock<fn()> = OnceLock::new();

/// How the program stops, as the user is told.
static STOPPING: OnceLock<Stopping> = OnceLock::new();

/// What the user is told at a request to stop.
#[derive(Debug, Clone, Copy)]
pub struct Stopping {
    /// At the first: what is done before the end.
    pub first: &'static str,
    /// At a second one, which ends the program at once.
    pub second: &'static str,
}

/// A training run, which saves.
const TRAINING: Stopping = Stopping { first: "finishing the step, then saving", second: "stopped without saving" };

/// Whether the user asked to stop.
///
/// The first SIGINT (Ctrl-C), SIGTERM or SIGHUP is noted, so that the step can be finished and saved; another one more
/// than a second later ends the program at once. A SIGHUP that is ignored, as under `nohup`, stays ignored.
#[derive(Debug, Clone, Copy)]
pub struct Interrupt {
    signal: &'static AtomicI32,
}

impl Interrupt {
    /// Catches the signals from now on. Every call gives the same flag, so that stages run in turn see one request.
    ///
    /// # Errors
    /// If the system refuses the handler.
    pub fn install() -> Result<Self, InterruptError> {
        Self::install_with(TRAINING)
    }

    /// [`install`](Self::install) in a program that stops in another way than a training run; the first call decides.
    ///
    /// # Errors
    /// If the system refuses the handler.
    pub fn install_with(stopping: Stopping) -> Result<Self, InterruptError> {
        static INSTALLED: Mutex<bool> = Mutex::new(false);
        let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
        if !*installed {
            STOPPING.get_or_init(|| stopping);
            watch().map_err(InterruptError)?;
            *installed = true;
        }
        Ok(Self { signal: &SIGNAL })
    }

    /// One that nobody triggers, for tests and for callers that handle signals themselves.
    pub fn never() -> Self {
        Self { signal: &NEVER }
    }

    /// One of its own, which [`request`](Self::request) sets and no signal does.
    #[cfg(any(test, feature = "testing"))]
    pub fn of_test() -> Self {
        Self { signal: Box::leak(Box::default()) }
    }

    /// Notes a Ctrl-C that a program reads as a key, as one that came as a signal.
    pub fn request(&self) {
        self.signal.store(SIGINT, Ordering::SeqCst);
    }

    /// Notes a terminal that was closed, as the signal that says so: it may be ignored, or come later.
    pub fn hang_up(&self) {
        self.signal.store(SIGHUP, Ordering::SeqCst);
    }

    /// Whether to finish the step, save and return.
    pub fn requested(&self) -> bool {
        self.signal.load(Ordering::SeqCst) != 0
    }

    /// Whether a process of `group` was asked to stop: a request to one is a request to all. Every process asks.
    ///
    /// # Errors
    /// If one has ended.
    pub fn requested_in(&self, group: &Group) -> Result<bool, GroupError> {
        let signal = group.gather(self.signal.load(Ordering::SeqCst))?.into_iter().max().unwrap_or_default();
        if signal != 0 {
            self.signal.store(signal, Ordering::SeqCst);
        }
        Ok(signal != 0)
    }

    /// The end of a program that was asked to stop, saved and returned.
    pub fn stopped(&self) -> Stopped {
        Stopped { signal: self.signal.load(Ordering::SeqCst) }
    }
}

/// The program was asked to stop, and what it had done is saved. Nothing is left to say: only the exit code tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("stopped by signal {signal}")]
pub struct Stopped {
    signal: i32,
}

impl Stopped {
    /// 128 and the number of the signal, as shells have it: 130 for SIGINT, 143 for SIGTERM.
    pub const fn exit_code(self) -> u8 {
        128 + self.signal as u8
    }
}

/// Has `what` done before a second request or a silent process of its group ends the process, such as giving back the terminal; the first call decides.
pub fn before_exit(what: fn()) {
    BEFORE_EXIT.get_or_init(|| what);
}

/// Does what [`before_exit`] was told, before the process ends at once.
pub(crate) fn prepare_exit() {
    if let Some(what) = BEFORE_EXIT.get() {
        what();
    }
}

/// A Ctrl-C that a program reads as a key, for a program that catches the signal.
#[cfg(unix)]
pub fn raise() {
    use rustix::process::{Signal, getpid, kill_process};

    // It is this very process, which exists.
    let _ = kill_process(getpid(), Signal::INT);
}

/// A Ctrl-C that a program reads as a key: the step is finished.
#[cfg(not(unix))]
pub fn raise() {
    SIGNAL.store(SIGINT, Ordering::SeqCst);
}

/// The requests to stop so far.
#[derive(Debug, Default)]
struct Requests {
    first: Option<Instant>,
}

/// Response to a signal.
#[derive(Debug, PartialEq, Eq)]
enum Action {
    FinishTheStep,
    Nothing,
    StopAtOnce,
}

impl Requests {
    fn note(&mut self, at: Instant) -> Action {
        match self.first {
            None => {
                self.first = Some(at);
                Action::FinishTheStep
            }
            Some(first) if at.duration_since(first) <= SAME_REQUEST => Action::Nothing,
            Some(_) => Action::StopAtOnce,
        }
    }

    fn handle(&mut self, signal: i32) {
        match self.note(Instant::now()) {
            Action::FinishTheStep => {
                SIGNAL.store(signal, Ordering::SeqCst);
                let again = if signal == SIGINT { "press Ctrl-C again" } else { "signal once more" };
                let Stopping { first, .. } = STOPPING.get_or_init(|| TRAINING);
                tracing::warn!("{first}; {again} to stop at once");
            }
            Action::Nothing => {}
            Action::StopAtOnce => {
                tracing::warn!("{}", STOPPING.get_or_init(|| TRAINING).second);
                prepare_exit();
                std::process::exit(i32::from(Stopped { signal }.exit_code()));
            }
        }
    }
}

/// Handles the signals on a thread of its own.
#[cfg(unix)]
fn watch() -> std::io::Result<()> {
    use signal_hook::consts::SIGTERM;

    let mut wanted = vec![SIGINT, SIGTERM];
    if !is_ignored(SIGHUP) {
        wanted.push(SIGHUP);
    }
    let mut signals = signal_hook::iterator::Signals::new(wanted)?;
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        let mut requests = Requests::default();
        signals.forever().for_each(|signal| requests.handle(signal));
    })?;
    Ok(())
}

/// Whether the process was started with `signal` ignored. Where the system does not say, it counts as ignored, so that
/// no handler of ours undoes `nohup`.
#[cfg(unix)]
fn is_ignored(signal: i32) -> bool {
    let mask = std::fs::read_to_string("/proc/self/status").ok().and_then(|status| ignored_mask(&status));
    mask.is_none_or(|mask| mask >> (signal - 1) & 1 == 1)
}

/// The bits of the ignored signals in `/proc/self/status`, the first signal lowest.
#[cfg(unix)]
fn ignored_mask(status: &str) -> Option<u64> {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"))?;
    u64::from_str_radix(mask.trim(), 16).ok()
}

#[cfg(not(unix))]
fn watch() -> std::io::Result<()> {
    let mut requests = Requests::default();
    ctrlc::set_handler(move || requests.handle(SIGINT)).map_err(std::io::Error::other)
}

/// The system refused the handler.
#[derive(Debug, thiserror::Error)]
#[error("failed to catch Ctrl-C: {0}")]
pub struct InterruptError(#[source] std::io::Error);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_within_a_second_are_one_request_and_a_later_one_stops_at_once() {
        let start = Instant::now();
        let mut requests = Requests::default();
        let mut after = |millis| requests.note(start + Duration::from_millis(millis));
        assert_eq!(after(0), Action::FinishTheStep);
        assert_eq!([after(20), after(1000)], [Action::Nothing, Action::Nothing]);
        assert_eq!(after(1001), Action::StopAtOnce);
    }

    #[test]
    fn exit_codes_are_those_of_shells() {
        assert_eq!([2, 15].map(|signal| Stopped { signal }.exit_code()), [130, 143]);
        assert!(!Interrupt::never().requested());
    }

    #[cfg(unix)]
    #[test]
    fn an_ignored_signal_is_read_from_the_status() {
        let status = "Name:\tx\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000001001\nSigCgt:\t0000000000000000\n";
        assert_eq!(ignored_mask(status), Some(0x1001));
        assert_eq!(ignored_mask("Name:\tx\n"), None);
    }
}
