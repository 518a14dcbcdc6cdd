//! A model of preferences.

pub mod loss;
