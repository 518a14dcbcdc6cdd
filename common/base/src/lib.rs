//! What every other crate stands on: seeded random streams ([`rng`]), hashes ([`hash`]), files
//! that are whole or absent, or fail ([`files`]), and helpers of tests.

pub mod files;
pub mod hash;
pub mod rng;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
