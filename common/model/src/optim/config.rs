//! The `[optimizer]` section, and the learning rate of each step.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// How the learning rate changes after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// Half a cosine from `lr` to `min_lr`.
    #[default]
    Cosine,
    /// A straight line from `lr` to `min_lr`.
    Linear,
    /// `lr` throughout.
    Constant,
}

/// The `[optimizer]` section of every training stage.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct OptimizerConfig {
    /// Peak learning rate.
    #[schemars(extend("exclusiveMinimum" = 0), range(max = 1000))]
    pub lr: f64,
    /// Learning rate at the end of the schedule; at most `lr`.
    #[schemars(range(min = 0, max = 1000))]
    pub min_lr: f64,
    /// How the learning rate changes after the warm-up.
    pub schedule: Schedule,
    /// Optimiser steps over which the learning rate rises from 0 to `lr`.
    #[schemars(range(max = 1_000_000_000_000_u64))]
    pub warmup_steps: u64,
    /// Decoupled weight decay of AdamW; applies to weight matrices, not to biases and norms.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub weight_decay: f64,
    /// Decay rates of the first and second moment estimates (β₁, β₂).
    #[schemars(extend("minimum" = 0, "exclusiveMaximum" = 1))]
    pub betas: [f64; 2],
    /// Added to the square root of the second moment before dividing (ε).
    #[schemars(range(min = 1e-30, max = 1_000_000))]
    pub eps: f64,
    /// Global norm that gradients are clipped to; 0 disables clipping.
    #[schemars(range(min = 0, max = 1e30))]
    pub grad_clip: f64,
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            min_lr: 0.0,
            schedule: Schedule::Cosine,
            warmup_steps: 0,
            weight_decay: 0.1,
            betas: [0.9, 0.95],
            eps: 1e-8,
            grad_clip: 1.0,
        }
    }
}

impl OptimizerConfig {
    /// The defaults of reward models and PPO: `lr` 1e-5 falling in a straight line to 0, no weight decay, `eps` 1e-5.
    ///
    /// # Source
    /// lm-human-preferences, `launch.py`; "The N+ Implementation Details of RLHF with PPO", arXiv:2403.17031. The
    /// `betas` are PyTorch's, as there.
    pub fn rlhf() -> Self {
        Self {
            lr: 1e-5,
            schedule: Schedule::Linear,
            weight_decay: 0.0,
            betas: [0.9, 0.999],
            eps: 1e-5,
            ..Self::default()
        }
    }
}

/// Reads an [`OptimizerConfig`] whose missing keys take the values of [`OptimizerConfig::rlhf`]:
/// `#[serde(with = "RlhfDefaults")]`.
#[derive(Serialize, Deserialize)]
#[serde(remote = "OptimizerConfig", deny_unknown_fields, default = "OptimizerConfig::rlhf")]
pub struct RlhfDefaults {
    lr: f64,
    min_lr: f64,
    schedule: Schedule,
    warmup_steps: u64,
    weight_decay: f64,
    betas: [f64; 2],
    eps: f64,
    grad_clip: f64,
}

/// The learning rate at the end of the schedule is above the peak.
#[derive(Debug, Clone, PartialEq, Error)]
#[error("optimizer: `min_lr` must be at most `lr` {lr}, found {min_lr}")]
pub struct OptimizerConfigError {
    /// Peak learning rate.
    pub lr: f64,
    /// Learning rate at the end.
    pub min_lr: f64,
}

impl OptimizerConfig {
    /// Checks that the values fit together; their ranges are those of the schema.
    ///
    /// # Errors
    /// If `min_lr` is above `lr`.
    pub fn validate(&self) -> Result<(), OptimizerConfigError> {
        let Self { lr, min_lr, .. } = *self;
        if min_lr > lr { Err(OptimizerConfigError { lr, min_lr }) } else { Ok(()) }
    }

    /// The learning rate of step `step` (the first is 0) out of `n_steps`.
    ///
    /// During the warm-up `lr·(step + 1)/(warmup_steps + 1)`; after it, with `p` the fraction of the remaining steps
    /// already done, `min_lr + (lr − min_lr)·(1 + cos πp)/2` or `lr − (lr − min_lr)·p` or `lr`.
    ///
    /// # Source
    /// nanoGPT's `get_lr` for the cosine; the straight line is RLHF practice (`lr·(1 − (u − 1)/U)` from
    /// lm-human-preferences, whose `u` counts from 1).
    pub fn lr_at(&self, step: u64, n_steps: u64) -> f64 {
        if step < self.warmup_steps {
            return self.lr * (step + 1) as f64 / (self.warmup_steps + 1) as f64;
        }
        let remaining = n_steps.saturating_sub(self.warmup_steps).max(1);
        let progress = ((step - self.warmup_steps) as f64 / remaining as f64).min(1.0);
        let span = self.lr - self.min_lr;
        match self.schedule {
            Schedule::Cosine => self.min_lr + span * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()),
            Schedule::Linear => self.lr - span * progress,
            Schedule::Constant => self.lr,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schedule_warms_up_then_falls_to_its_minimum() {
        let config = OptimizerConfig { lr: 1.0, min_lr: 0.1, warmup_steps: 4, ..Default::default() };
        let lr: Vec<f64> = [0, 3, 4, 54, 104, 200].map(|step| config.lr_at(step, 104)).to_vec();
        let expected = [0.2, 0.8, 1.0, 0.55, 0.1, 0.1];
        assert!(lr.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{lr:?}");
        let linear = OptimizerConfig { schedule: Schedule::Linear, min_lr: 0.0, warmup_steps: 0, ..config };
        assert!((linear.lr_at(25, 100) - 0.75).abs() < 1e-12);
    }

    #[test]
    fn a_value_out_of_range_is_named() {
        let error = OptimizerConfig { lr: 0.1, min_lr: 0.2, ..Default::default() }.validate().expect_err("invalid");
        assert_eq!(error.to_string(), "optimizer: `min_lr` must be at most `lr` 0.1, found 0.2");
    }
}
