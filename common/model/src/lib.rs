//! The one transformer of Kindling: configuration, forward pass, key/value cache and scalar heads.

#![forbid(unsafe_code)]

mod adapter;
mod block;
mod cache;
mod config;
pub mod footprint;
pub mod generate;
mod gpt;
pub mod hf;
mod layout;
pub mod loss;
mod named;
pub mod optim;
pub mod params;
mod positions;
mod recompute;
pub mod reduce;
mod scalar;

#[cfg(test)]
mod tests;

pub use adapter::{ALL_LINEAR, AdapterPlace, Adapters, LoraConfig, LoraConfigError};
pub use cache::{CHUNK, Cache};
pub use config::{Activation, GptConfig, ModelConfigError, ModelSection, NormKind, NormPlacement, Positions, Preset};
pub use gpt::Gpt;
pub use layout::Layout;
pub use named::{HostTensor, NamedError, NamedTensors, param_paths};
pub use positions::{RopeScaling, RopeScalingError, RopeScalingSection, RopeType, Rotary, sinusoid_table};
pub use scalar::ScalarGpt;
