//! The stages in turn, from plain text to an aligned model, and the report on them.
pub mod evaluation;
pub mod report;
pub mod stats;
pub mod steps;
