//! Several processes train the weights of one, to the byte; whichever fails or is stopped, all end, and the last checkpoint
//! goes on with any number of them.
//!
//! The sums are tested with groups of threads. With the feature `mpi`, and where there is an `mpirun`, the programs
//! themselves run under it.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

mod corpus;
mod faults;
mod many;
mod memory;
mod mpirun;
mod silent;
mod together;
