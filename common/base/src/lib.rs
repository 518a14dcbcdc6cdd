//! The foundation of every other crate: seeded random streams ([`rng`]), hashes ([`hash`]), files
//! that are whole or absent, or fail ([`files`]), means with intervals ([`stats`]), what is said
//! only once ([`once`]), and helpers of tests.

#![forbid(unsafe_code)]

pub mod files;
pub mod hash;
pub mod once;
pub mod rng;
pub mod stats;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
