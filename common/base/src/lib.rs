//! What every other crate stands on: seeded random streams ([`rng`]), hashes ([`hash`]), and helpers of tests.

pub mod hash;
pub mod rng;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
