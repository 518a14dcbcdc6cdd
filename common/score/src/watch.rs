//! Work that somebody looks at while it goes on.

use std::ops::ControlFlow;

/// Told after each batch how many rows are done with it; `Break` ends the work, which then gives [`ScoreError::Stopped`](crate::ScoreError::Stopped).
///
/// In a group of processes one that breaks off leaves the others waiting: the work of a group is watched without breaking it off.
pub type Watch<'a> = &'a (dyn Fn(usize) -> ControlFlow<()> + Sync);

/// Of work that nobody looks at.
pub const UNWATCHED: Watch<'static> = &|_| ControlFlow::Continue(());
