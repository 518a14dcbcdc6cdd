//! Ctrl-C and the other signals that ask a program to stop.

use std::sync::atomic::{AtomicBool, Ordering};

/// Whether the user asked to stop. The first Ctrl-C or SIGTERM is noted, so that the step can be finished and saved;
/// the second ends the program at once, with exit code 130.
#[derive(Debug, Clone, Copy)]
pub struct Interrupt {
    flag: &'static AtomicBool,
}

static STOP: AtomicBool = AtomicBool::new(false);
static NEVER: AtomicBool = AtomicBool::new(false);

impl Interrupt {
    /// Catches the signals from now on. Every call gives the same flag, so that stages run in turn see one request.
    ///
    /// # Errors
    /// If the system refuses the handler.
    pub fn install() -> Result<Self, InterruptError> {
        static INSTALLED: std::sync::Mutex<bool> = std::sync::Mutex::new(false);
        let mut installed = INSTALLED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if !*installed {
            ctrlc::set_handler(|| {
                if STOP.swap(true, Ordering::SeqCst) {
                    std::process::exit(130);
                }
                tracing::warn!("finishing the step, then saving; press Ctrl-C again to stop at once");
            })
            .map_err(InterruptError)?;
            *installed = true;
        }
        Ok(Self { flag: &STOP })
    }

    /// One that nobody triggers, for tests and for callers that handle signals themselves.
    pub fn never() -> Self {
        Self { flag: &NEVER }
    }

    /// Whether to finish the step, save and return.
    pub fn requested(&self) -> bool {
        self.flag.load(Ordering::SeqCst)
    }
}

/// The system refused the handler.
#[derive(Debug, thiserror::Error)]
#[error("failed to catch Ctrl-C: {0}")]
pub struct InterruptError(#[source] ctrlc::Error);
