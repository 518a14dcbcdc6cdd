//! Proximal policy optimisation against a reward model.

pub mod advantage;
pub mod kl;
pub mod loss;
pub mod rewards;
