//! Work in rows that shows how far it is and ends when the user asks to stop.

use std::ops::ControlFlow;
use std::sync::{Mutex, PoisonError};

use crate::interrupt::Interrupt;
use crate::logging::Progress;

/// How far a piece of work is, shown as a [`Progress`], and whether the user asked to stop: what looks on while responses are
/// sampled and scored (`score::Watch`).
#[derive(Debug)]
pub struct Pace {
    progress: Mutex<Progress>,
    interrupt: Interrupt,
}

impl Pace {
    /// Of the work `what` on `n` `things`.
    pub fn new(what: &str, n: usize, things: &'static str, interrupt: Interrupt) -> Self {
        Self { progress: Mutex::new(Progress::new(what, n, things)), interrupt }
    }

    /// Notes that `n` more are done; `Break` where the user asked to stop.
    pub fn done(&self, n: usize) -> ControlFlow<()> {
        if n > 0 {
            self.progress.lock().unwrap_or_else(PoisonError::into_inner).add(n);
        }
        if self.interrupt.requested() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_goes_on_until_the_user_asks_to_stop() {
        let interrupt = Interrupt::of_test();
        let pace = Pace::new("scoring", 3, "answers", interrupt);
        assert_eq!([pace.done(1), pace.done(0)], [ControlFlow::Continue(()); 2]);
        interrupt.request();
        assert_eq!([pace.done(1), pace.done(0)], [ControlFlow::Break(()); 2]);
    }
}
