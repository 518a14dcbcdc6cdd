//! What a process says once, however often it comes to it.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

/// Whether `what` has not been asked for before in this process: for messages that several readers of one file would repeat.
pub fn is_new(what: &str) -> bool {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    SAID.lock().unwrap_or_else(PoisonError::into_inner).insert(what.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_is_new() {
        assert_eq!(["once a", "once b", "once a"].map(is_new), [true, true, false]);
    }
}
