//! Three iterations in lock-step with the PPO of other programs: `fixtures/lockstep` with TRL's `PPOTrainer`, written by
//! `oracles/lockstep.py`, and `fixtures/lockstep-openrlhf` with `OpenRLHF`'s trainer, by `oracles/lockstep_openrlhf.py`.
//!
//! Models, prompts and sampled tokens are theirs; log-probabilities, values, scores, rewards, advantages, losses and steps are
//! ours, through the functions that `ppo train` calls.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

use std::path::{Path, PathBuf};

use burn::module::Module;
use burn::tensor::Device;
use common::hf::{self, HostModel};
use common::kernels::Kernels;
use common::model::{Gpt, NamedTensors, ScalarGpt};
use common::optim::{AdamW, OptimizerConfig, Schedule};
use common::rng::Streams;
use common::score::{EncodedPrompt, Ensemble, FrozenModels, Response, log_probs, of_response_tokens};
use common::testing::byte_tokenizer;
use ppo::targets::Experience;
use ppo::{Critic, Dialect, Iteration, Learner, PpoConfig, PpoSection, TrainConfig, UpdateMetrics, ValueMetrics};
use serde_json::Value;

/// Twelve steps of Adam in f32 against f64; the steps themselves are up to 5e-3 a weight.
const CLOSE: f64 = 1e-3;

/// A recorded training.
struct Recording {
    folder: &'static str,
    dialect: Dialect,
    schedule: Schedule,
    /// What is compared in every iteration, by the recording's names.
    logged: &'static [(&'static str, Measure)],
}

type Measure = fn(&[Experience], &UpdateMetrics) -> f64;

const TRL: Recording = Recording {
    folder: "lockstep",
    dialect: Dialect::Trl,
    schedule: Schedule::Linear,
    logged: &[
        ("objective/kl", |batch, _| mean(batch, |one| one.rollout.kl())),
        ("objective/entropy", |batch, _| mean(batch, |one| -sum(&one.rollout.response.log_probs))),
        ("objective/scores", |batch, _| mean(batch, |one| f64::from(one.score))),
        ("loss/policy_avg", |_, update| update.policy_loss),
        ("loss/value_avg", |_, update| value(update).loss),
        ("policy/clipfrac_avg", |_, update| update.clip_frac),
        ("val/clipfrac_avg", |_, update| value(update).clip_frac),
    ],
};

const OPENRLHF: Recording = Recording {
    folder: "lockstep-openrlhf",
    dialect: Dialect::OpenRlhf,
    schedule: Schedule::Constant,
    logged: &[
        ("kl", |batch, _| mean(batch, |one| one.rollout.kl() / one.rollout.response.ids.len() as f64)),
        ("reward", |batch, _| mean(batch, |one| f64::from(one.score))),
        ("policy_loss", |_, update| update.policy_loss),
        ("critic_loss", |_, update| value(update).loss),
        ("ppo_clip_ratio", |_, update| update.clip_frac),
    ],
};

fn mean(batch: &[Experience], of: impl Fn(&Experience) -> f64) -> f64 {
    batch.iter().map(of).sum::<f64>() / batch.len() as f64
}

fn sum(numbers: &[f32]) -> f64 {
    numbers.iter().map(|&number| f64::from(number)).sum()
}

fn value(update: &UpdateMetrics) -> &ValueMetrics {
    update.value.as_ref().unwrap()
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

fn model(folder: &str) -> HostModel {
    hf::read(&fixtures().join(folder)).unwrap().0
}

impl Recording {
    fn expected(&self) -> Value {
        serde_json::from_slice(&std::fs::read(fixtures().join(self.folder).join("expected.json")).unwrap()).unwrap()
    }

    fn config(&self, expected: &Value, dialect: Dialect) -> PpoConfig {
        let settings = &expected["settings"];
        let setting = |name: &str| settings[name].as_f64().unwrap();
        let rlhf = OptimizerConfig::rlhf();
        let optimizer = OptimizerConfig {
            lr: setting("learning_rate"),
            schedule: self.schedule,
            betas: serde_json::from_value(settings["adam_betas"].clone()).unwrap_or(rlhf.betas),
            eps: setting("adam_epsilon"),
            grad_clip: 0.0,
            ..rlhf
        };
        let ppo = PpoSection {
            dialect,
            response_length: expected["response_length"].as_u64().unwrap() as usize,
            temperature: setting("temperature"),
            missing_eos_score: settings["missing_eos_penalty"].as_f64().map_or(0.0, |penalty| -penalty),
            kl_coef: setting("kl_coef"),
            gamma: setting("gamma"),
            lambda: setting("lam"),
            epochs: settings["num_ppo_epochs"].as_u64().unwrap(),
            clip_range: setting("cliprange"),
            ..PpoSection::default()
        };
        let batch_size = expected["iterations"][0]["prompts"].as_array().unwrap().len();
        let steps = expected["iterations"].as_array().unwrap().len() as u64;
        let train = TrainConfig { steps, batch_size, ..TrainConfig::default() };
        PpoConfig { value_optimizer: optimizer.clone(), optimizer, ppo: ppo.resolved(), train, ..PpoConfig::default() }
    }
}

fn ids(rows: &Value) -> Vec<Vec<u32>> {
    serde_json::from_value(rows.clone()).unwrap()
}

/// The responses that the other program sampled, as if `policy` had.
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

/// What we log in every iteration, in the order of the recording, and how far policy and value model end from its own.
fn trained(recording: &Recording, dialect: Dialect) -> (Vec<Vec<f64>>, [f64; 2]) {
    let expected = recording.expected();
    let config = recording.config(&expected, dialect);
    let (policy, reward_model) = (model("lockstep/policy"), model("lockstep/reward-model"));
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
        logged.push(recording.logged.iter().map(|(_, measure)| measure(&batch, &update)).collect());
    }
    let end = |name: &str| model(&format!("{}/{name}-after", recording.folder)).tensors;
    let policy = largest_difference(&learner.policy.to_named(), &end("policy"));
    let value = largest_difference(&learner.critic.unwrap().model.to_named(), &end("value"));
    (logged, [policy, value])
}

fn in_lockstep(recording: &Recording) {
    let (logged, differences) = trained(recording, recording.dialect);
    let expected = recording.expected();
    for (step, ours) in logged.iter().enumerate() {
        for ((name, _), ours) in recording.logged.iter().zip(ours) {
            let theirs = expected["iterations"][step]["logged"][name].as_f64().unwrap();
            println!("iteration {step}: {name}: {ours} here, {theirs} there");
            assert!((ours - theirs).abs() <= CLOSE, "iteration {step}: {name}: {ours} here, {theirs} there");
        }
    }
    println!("weights: {differences:?}");
    assert!(differences.iter().all(|&difference| difference <= CLOSE), "weights: {differences:?}");
}

#[test]
fn three_iterations_are_those_of_trl() {
    in_lockstep(&TRL);
}

#[test]
fn three_iterations_are_those_of_openrlhf() {
    in_lockstep(&OPENRLHF);
}

#[test]
fn other_dialects_go_another_way() {
    use Dialect::{Kindling, LmHumanPreferences, NPlus, OpenRlhf, Trl, Verl};
    // verl goes OpenRLHF's way as long as nothing reaches the limits by which they differ.
    for (recording, others) in
        [(TRL, [Kindling, LmHumanPreferences, OpenRlhf, Verl]), (OPENRLHF, [Kindling, LmHumanPreferences, NPlus, Trl])]
    {
        for dialect in others {
            let (_, differences) = trained(&recording, dialect);
            assert!(differences.iter().any(|&difference| difference > 5.0 * CLOSE), "{dialect:?}: {differences:?}");
        }
    }
}
