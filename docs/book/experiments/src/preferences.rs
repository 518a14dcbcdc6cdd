//! What a reward model's loss makes of the difference of two scores.

use anyhow::{Context, Result};
use burn::tensor::Tensor;
use common::backend;
use reward_model::loss::pairwise_loss;

/// Probability of the label, loss and slope by the chosen answer's score, for differences from −4 to 4.
pub(crate) fn table() -> Result<String> {
    let line = |&difference: &f32| {
        let [loss, slope] = loss_and_slope(difference)?;
        Ok(format!("{difference:>10} {:>12.3} {loss:>7.3} {slope:>9.3}\n", (-f64::from(loss)).exp()))
    };
    let lines: Result<String> = [-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0].iter().map(line).collect();
    Ok(format!("difference  probability    loss     slope\n{}", lines?))
}

/// The loss of one pair whose chosen answer scores `difference` above the rejected one, and its slope.
pub(crate) fn loss_and_slope(difference: f32) -> Result<[f32; 2]> {
    let device = backend::open(backend::DEFAULT)?.autodiff();
    let chosen = Tensor::<1>::from_floats([difference], &device).require_grad();
    let loss = pairwise_loss(chosen.clone(), Tensor::from_floats([0.0], &device), None);
    let gradients = loss.backward();
    let slope = chosen.grad(&gradients).context("the loss depends on the score")?;
    Ok([loss.into_scalar(), slope.into_scalar()])
}
