//! The price of divergence: the estimators, which [`common::score::kl`] defines, and the controller of the coefficient.

pub use common::score::kl::{k1, k2, k3};

use crate::dialect::KlEstimator;

/// The divergence of each token by `estimator`, within `±clip` unless that is 0.
///
/// # Panics
/// If the slices differ in length.
pub fn estimate(estimator: KlEstimator, log_probs: &[f32], ref_log_probs: &[f32], clip: f32) -> Vec<f32> {
    let estimate = match estimator {
        KlEstimator::K1 => k1,
        KlEstimator::K2 => k2,
        KlEstimator::K3 => k3,
    };
    let kl = estimate(log_probs, ref_log_probs);
    if clip > 0.0 { kl.into_iter().map(|kl| kl.clamp(-clip, clip)).collect() } else { kl }
}

/// Moves the KL coefficient so that the divergence stays near a target.
///
/// `e = clip(KL/target − 1, −0.2, 0.2)`, then `β ← β·(1 + e·n_episodes/horizon)`: proportional control in log space.
///
/// # Source
/// Ziegler et al., arXiv:1909.08593, section 2.2; `AdaptiveKLController` in lm-human-preferences, `train_policy.py`.
/// Its `launch.py` starts at 0.15 with target 6, and the horizon is 10000 by default.
#[derive(Debug, Clone, PartialEq)]
pub struct AdaptiveController {
    /// The present coefficient β: reward per nat.
    pub value: f32,
    target: f32,
    horizon: f32,
}

impl AdaptiveController {
    /// A controller that starts at coefficient `init`.
    ///
    /// `target` is in nats, summed over a response and averaged over responses, as `objective/kl`; `horizon` is in
    /// episodes (responses): a divergence 20 % or more off the target over that many of them changes the
    /// coefficient by about a fifth.
    ///
    /// # Panics
    /// If `target` or `horizon` is not positive.
    pub fn new(init: f32, target: f32, horizon: f32) -> Self {
        assert!(target > 0.0 && horizon > 0.0, "target {target} and horizon {horizon} must be positive");
        Self { value: init, target, horizon }
    }

    /// Moves the coefficient after `n_episodes` responses of mean divergence `kl`, and returns it.
    pub fn update(&mut self, kl: f32, n_episodes: usize) -> f32 {
        let error = (kl / self.target - 1.0).clamp(-0.2, 0.2);
        self.value *= 1.0 + error * n_episodes as f32 / self.horizon;
        self.value
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::testing::assert_close;
    use proptest::prelude::*;

    #[test]
    fn controller_matches_hand_worked_steps() {
        let mut controller = AdaptiveController::new(0.15, 6.0, 10_000.0);
        // KL 6.6: e = 0.1, factor 1 + 0.1·512/10000 = 1.00512.
        assert_close(&[controller.update(6.6, 512)], &[0.150_768], 1e-7);
        // KL 60 counts as e = 0.2: factor 1.01024.
        assert_close(&[controller.update(60.0, 512)], &[0.150_768 * 1.010_24], 1e-7);
        // KL 0 counts as e = −0.2: factor 0.98976.
        assert_close(&[controller.update(0.0, 512)], &[0.150_768 * 1.010_24 * 0.989_76], 1e-7);
    }

    #[test]
    fn controller_rests_at_its_target() {
        let mut controller = AdaptiveController::new(0.05, 4.0, 1_000.0);
        assert_eq!(controller.update(4.0, 256), 0.05);
        assert_eq!(controller.value, 0.05);
    }

    proptest! {
        #[test]
        fn controller_moves_against_the_error(kl in 0.0_f32..50.0, n_episodes in 1..2_000_usize) {
            let mut controller = AdaptiveController::new(0.1, 6.0, 10_000.0);
            let after = controller.update(kl, n_episodes);
            let against = if kl > 6.0 { after >= 0.1 } else { after <= 0.1 };
            prop_assert!(against, "{kl} {after}");
        }
    }
}
