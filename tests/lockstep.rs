//! Three iterations in lock-step with TRL's `PPOTrainer`: `fixtures/lockstep`, written by `oracles/lockstep.py`.
//!
//! Models, prompts and sampled tokens are TRL's; log-probabilities, values, scores, rewards, advantages, losses and steps are
//! ours, through the functions that `ppo train` calls.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::Device;
use common::hf::{self, HostModel};
use common::kernels::Kernels;
use common::model::{Gpt, NamedTensors, ScalarGpt};
use common::optim::{AdamW, OptimizerConfig};
use common::rng::Streams;
use common::score::{EncodedPrompt, Ensemble, FrozenModels, Response, log_probs, of_response_tokens};
use common::testing::byte_tokenizer;
use ppo::{Critic, Dialect, Iteration, Learner, PpoConfig, PpoSection, TrainConfig};
use serde_json::Value;

/// Twelve steps of Adam in f32 against f64; the steps themselves are up to 5e-3 a weight.
const CLOSE: f64 = 1e-3;

/// What is compared in every iteration, by TRL's names.
const LOGGED: [&str; 7] = [
    "objective/kl",
    "objective/entropy",
    "objective/scores",
    "loss/policy_avg",
    "loss/value_avg",
    "policy/clipfrac_avg",
    "val/clipfrac_avg",
];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/lockstep")
}

fn expected() -> Value {
    serde_json::from_slice(&std::fs::read(folder().join("expected.json")).unwrap()).unwrap()
}

fn model(name: &str) -> HostModel {
    hf::read(&folder().join(name)).unwrap().0
}

fn config(expected: &Value, dialect: Dialect) -> PpoConfig {
    let setting = |name: &str| expected["settings"][name].as_f64().unwrap();
    let optimizer = OptimizerConfig {
        lr: setting("learning_rate"),
        eps: setting("adam_epsilon"),
        grad_clip: 0.0,
        ..OptimizerConfig::rlhf()
    };
    let ppo = PpoSection {
        dialect,
        response_length: expected["response_length"].as_u64().unwrap() as usize,
        temperature: setting("temperature"),
        missing_eos_score: -setting("missing_eos_penalty"),
        kl_coef: setting("kl_coef"),
        gamma: setting("gamma"),
        lambda: setting("lam"),
        epochs: expected["settings"]["num_ppo_epochs"].as_u64().unwrap(),
        clip_range: setting("cliprange"),
        ..PpoSection::default()
    };
    let batch_size = expected["iterations"][0]["prompts"].as_array().unwrap().len();
    let steps = expected["iterations"].as_array().unwrap().len() as u64;
    let train = TrainConfig { steps, batch_size, ..TrainConfig::default() };
    PpoConfig { value_optimizer: optimizer.clone(), optimizer, ppo: ppo.resolved(), train, ..PpoConfig::default() }
}

fn ids(rows: &Value) -> Vec<Vec<u32>> {
    serde_json::from_value(rows.clone()).unwrap()
}

/// The responses that TRL sampled, as if `policy` had.
fn responses(policy: &Gpt, prompts: &[EncodedPrompt], sampled: &Value, end: u32, config: &PpoConfig) -> Vec<Response> {
    let ids = ids(sampled);
    let pairs: Vec<(&[u32], &[u32])> = prompts.iter().zip(&ids).map(|(prompt, ids)| (&*prompt.ids, &**ids)).collect();
    let temperature = config.ppo.temperature();
    let probs = of_response_tokens(&pairs, ids.len(), |batch| log_probs(policy, batch, temperature)).unwrap();
    let with_probs = ids.into_iter().zip(probs);
    with_probs
        .map(|(ids, log_probs)| Response { ended: ids.last() == Some(&end), ids, log_probs, ..Response::default() })
        .collect()
}

/// The largest difference of two sets of weights.
fn largest_difference(ours: &NamedTensors, theirs: &NamedTensors) -> f64 {
    assert!(ours.keys().eq(theirs.keys()), "{:?} {:?}", ours.keys(), theirs.keys());
    let pairs = ours.iter().flat_map(|(name, tensor)| tensor.data.iter().zip(&theirs[name].data));
    pairs.map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max)
}

/// What we log in every iteration, in the order of [`LOGGED`], and how far policy and value model end from TRL's.
fn trained(dialect: Dialect) -> (Vec<[f64; 7]>, [f64; 2]) {
    let expected = expected();
    let config = config(&expected, dialect);
    let (policy, reward_model) = (model("policy"), model("reward-model"));
    let (plain, autodiff) = (Device::flex(), Device::flex().autodiff());
    let gpt = |device: &Device| Gpt::from_named(&policy.config, policy.tensors.clone(), device).unwrap();
    let scalar = |device: &Device| {
        ScalarGpt::from_named(&reward_model.config, reward_model.tensors.clone(), 0.0, device).unwrap()
    };
    let style = config.ppo.switches().adam_style;
    let optimizer = |config: &OptimizerConfig| AdamW::new(config, Kernels::Plain).with_style(style);
    let mut learner = Learner {
        policy: gpt(&autodiff),
        policy_optimizer: optimizer(&config.optimizer),
        critic: Some(Critic { model: scalar(&autodiff), optimizer: optimizer(&config.value_optimizer) }),
    };
    let (further, ensemble) = (Vec::new(), Ensemble::default());
    let frozen = FrozenModels {
        reference: gpt(&plain),
        reward_model: scalar(&plain),
        further,
        ensemble,
        gold: None,
        batch_size: 4,
    };
    let (streams, tokenizer) = (Streams::new(1), byte_tokenizer());
    let sampling = config.sampling(streams, &tokenizer);
    let iteration = Iteration { config: &config, sampling: &sampling, frozen: &frozen, streams };
    let (kl_coef, end) = (config.ppo.kl_coef as f32, expected["end"].as_u64().unwrap() as u32);
    let mut logged = Vec::new();
    for (step, given) in (0..).zip(expected["iterations"].as_array().unwrap()) {
        let prompts: Vec<EncodedPrompt> =
            ids(&given["prompts"]).into_iter().map(|ids| EncodedPrompt { ids, text: String::new() }).collect();
        let responses = responses(&learner.policy.valid(), &prompts, &given["responses"], end, &config);
        let batch = iteration.experience(&learner, &prompts, responses, kl_coef).unwrap();
        let (next, update) = learner.update(&batch, &config, streams, step, kl_coef).unwrap();
        learner = next;
        let mean = |of: &dyn Fn(usize) -> f64| (0..batch.len()).map(of).sum::<f64>() / batch.len() as f64;
        let value = update.value.unwrap();
        logged.push([
            mean(&|i| batch[i].rollout.kl()),
            mean(&|i| -batch[i].rollout.response.log_probs.iter().map(|&p| f64::from(p)).sum::<f64>()),
            mean(&|i| f64::from(batch[i].score)),
            update.policy_loss,
            value.loss,
            update.clip_frac,
            value.clip_frac,
        ]);
    }
    let policy = largest_difference(&learner.policy.to_named(), &model("policy-after").tensors);
    let value = largest_difference(&learner.critic.unwrap().model.to_named(), &model("value-after").tensors);
    (logged, [policy, value])
}

#[test]
fn three_iterations_are_those_of_trl() {
    let (logged, differences) = trained(Dialect::Trl);
    let expected = expected();
    for (step, ours) in logged.iter().enumerate() {
        for (name, ours) in LOGGED.iter().zip(ours) {
            let theirs = expected["iterations"][step]["logged"][name].as_f64().unwrap();
            println!("iteration {step}: {name}: {ours} here, {theirs} there");
            assert!((ours - theirs).abs() <= CLOSE, "iteration {step}: {name}: {ours} here, {theirs} there");
        }
    }
    println!("weights: {differences:?}");
    assert!(differences.iter().all(|&difference| difference <= CLOSE), "weights: {differences:?}");
}

#[test]
fn other_dialects_go_another_way() {
    for dialect in [Dialect::Kindling, Dialect::LmHumanPreferences, Dialect::OpenRlhf, Dialect::Verl] {
        let (_, differences) = trained(dialect);
        assert!(differences.iter().any(|&difference| difference > 5.0 * CLOSE), "{dialect:?}: {differences:?}");
    }
}
