//! What stands on the terminal of a test.

use std::num::NonZero;
use std::time::{Duration, Instant};

use rexpect::session::PtySession;

/// A terminal of 130 columns and 40 rows, which follows what a program writes.
///
/// A view writes only what changes: what stands there whole may have been written in parts, so that a test which waits for
/// words in what is written may wait for ever.
pub struct Screen(vt100::Parser);

impl Screen {
    /// How large the terminal has to be.
    pub const STTY: &str = "stty rows 40 columns 130";

    pub fn new() -> Self {
        let [rows, columns] = [40, 130].map(|n| NonZero::new(n).expect("not zero"));
        Self(vt100::Parser::new(rows, columns, 0))
    }

    /// Follows what `session` writes until each of `wanted` stands there at once; returns what was written.
    ///
    /// # Panics
    ///
    /// If it takes longer than `timeout`, or the program ends before.
    #[track_caller]
    pub fn wait_for(&mut self, session: &mut PtySession, timeout: Duration, wanted: &[&str]) -> Vec<u8> {
        let began = Instant::now();
        let mut written = Vec::new();
        loop {
            // The reader takes every byte for a character.
            while let Some(c) = session.try_read() {
                let byte = u8::try_from(u32::from(c)).expect("a byte");
                self.0.process(&[byte]);
                written.push(byte);
            }
            let text = self.0.screen().contents();
            if wanted.iter().all(|part| text.contains(part)) {
                return written;
            }
            assert!(began.elapsed() < timeout, "not all of {wanted:?} in:\n{text}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
