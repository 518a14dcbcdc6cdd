//! Our RLHF targets and objectives against TRL's own lines: `fixtures/ppo.json`, written by `oracles/ppo.py`.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

use burn::tensor::{Device, Tensor};
use common::testing::assert_close;
use ppo::advantage::{gae, whiten};
use ppo::kl::{AdaptiveController, k1, k3};
use ppo::loss::{policy_loss, value_loss};
use ppo::rewards::kl_shaped;
use reward_model::loss::{centring_penalty, pairwise_loss};
use serde_json::Value;

/// A few f32 roundings of numbers near one, against the oracle's f64.
const ROUNDING: f32 = 1e-5;

fn fixture() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/ppo.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn number(value: &Value) -> f32 {
    value.as_f64().unwrap() as f32
}

fn row(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(number).collect()
}

fn rows(value: &Value) -> Vec<Vec<f32>> {
    value.as_array().unwrap().iter().map(row).collect()
}

#[allow(deprecated)] // Burn calls ndarray superseded by flex; it stays the second opinion here
fn devices() -> [Device; 2] {
    [Device::flex().autodiff(), Device::ndarray().autodiff()]
}

fn host(tensor: Tensor<1>) -> Vec<f32> {
    tensor.try_into_vec_as::<f32>().unwrap()
}

#[test]
fn rewards_advantages_and_returns_are_those_of_trl() {
    let case = &fixture()["rewards"];
    let [log_probs, ref_log_probs, values] = ["logprobs", "ref_logprobs", "values"].map(|name| rows(&case[name]));
    let mut all_advantages = Vec::new();
    for (i, score) in row(&case["scores"]).into_iter().enumerate() {
        assert_close(&k1(&log_probs[i], &ref_log_probs[i]), &row(&case["k1"][i]), ROUNDING);
        assert_close(&k3(&log_probs[i], &ref_log_probs[i]), &row(&case["k3"][i]), ROUNDING);
        let rewards = kl_shaped(&log_probs[i], &ref_log_probs[i], score, number(&case["kl_coef"]));
        assert_close(&rewards, &row(&case["rewards"][i]), ROUNDING);
        let advantages = gae(&rewards, &values[i], number(&case["gamma"]), number(&case["lam"]));
        let returns: Vec<f32> = advantages.iter().zip(&values[i]).map(|(a, v)| a + v).collect();
        assert_close(&returns, &row(&case["returns"][i]), ROUNDING);
        all_advantages.extend(advantages);
    }
    assert_close(&whiten(&all_advantages, true), &rows(&case["whitened_advantages"]).concat(), ROUNDING);
    let unshifted = rows(&case["values_whitened_without_shift"]).concat();
    assert_close(&whiten(&values.concat(), false), &unshifted, ROUNDING);
}

#[test]
fn clipped_losses_and_their_gradients_are_those_of_trl() {
    let case = &fixture()["losses"];
    for device in devices() {
        let tensor = |name: &str| Tensor::<1>::from_floats(rows(&case[name]).concat().as_slice(), &device);
        let log_probs = tensor("new_logprobs").require_grad();
        let n_tokens = log_probs.dims()[0];
        let policy = policy_loss(
            log_probs.clone(),
            tensor("mb_logprobs"),
            tensor("mb_advantage"),
            number(&case["cliprange"]),
            n_tokens,
        );
        let grad = log_probs.grad(&policy.loss.backward()).unwrap();
        assert_close(&host(grad), &rows(&case["pg_grad"]).concat(), ROUNDING);
        assert_close(&host(policy.loss), &[number(&case["pg_loss"])], ROUNDING);
        assert_close(&host(policy.clip_frac), &[number(&case["pg_clipfrac"])], ROUNDING);
        assert_close(&host(policy.approx_kl), &[number(&case["approx_kl"])], ROUNDING);
        assert_close(&host(policy.ratio_mean), &[number(&case["ratio_mean"])], ROUNDING);
        assert_close(&host(policy.ratio_max), &[number(&case["ratio_max"])], ROUNDING);

        let values = tensor("vpred").require_grad();
        let clip_range = number(&case["cliprange_value"]);
        let value = value_loss(values.clone(), tensor("mb_values"), tensor("mb_return"), clip_range, n_tokens);
        let grad = values.grad(&value.loss.backward()).unwrap();
        assert_close(&host(grad), &rows(&case["vf_grad"]).concat(), ROUNDING);
        assert_close(&host(value.loss), &[number(&case["vf_loss"])], ROUNDING);
        assert_close(&host(value.clip_frac), &[number(&case["vf_clipfrac"])], ROUNDING);
    }
}

#[test]
fn pairwise_losses_and_their_gradients_are_those_of_trl() {
    for case in fixture()["pairwise"].as_array().unwrap() {
        for device in devices() {
            let tensor = |name: &str| Tensor::<1>::from_floats(row(&case[name]).as_slice(), &device);
            let (chosen, rejected) = (tensor("chosen").require_grad(), tensor("rejected").require_grad());
            let margin = case["margin"].is_array().then(|| tensor("margin"));
            let loss = pairwise_loss(chosen.clone(), rejected.clone(), margin);
            let grads = loss.backward();
            assert_close(&host(loss.clone()), &[number(&case["loss"])], ROUNDING);
            assert_close(&host(chosen.grad(&grads).unwrap()), &row(&case["grad_chosen"]), ROUNDING);
            assert_close(&host(rejected.grad(&grads).unwrap()), &row(&case["grad_rejected"]), ROUNDING);
            let centring = centring_penalty(chosen, rejected);
            assert_close(&host(centring), &[number(&case["centring"])], 10.0 * ROUNDING);
        }
    }
}

#[test]
fn the_kl_coefficient_moves_as_in_lm_human_preferences() {
    let case = &fixture()["adaptive"];
    let mut controller =
        AdaptiveController::new(number(&case["init"]), number(&case["target"]), number(&case["horizon"]));
    for step in case["steps"].as_array().unwrap() {
        let value = controller.update(number(&step["kl"]), step["n_episodes"].as_u64().unwrap() as usize);
        assert_close(&[value], &[number(&step["value"])], 1e-6);
    }
}
