//! Faults, planted in a set-up that has none.

use std::path::Path;

use burn::tensor::{Device, Int, Tensor, TensorData};
use common::checkpoint::{Checkpoint, Stage, Weights};
use common::data::records::OnBadRecord;
use common::model::loss::token_log_probs;
use common::model::{Gpt, GptConfig, Layout, NamedTensors, ScalarGpt};
use common::rng::Streams;
use common::score::{
    Ensemble, FrozenModels, Prompts, Rollout, Sampling, TooLong, log_probs, of_response_tokens, values,
};
use common::testing::save_weights;
use common::tokenizer::{Tokenizer, TokenizerConfig, TokenizerKind};
use ppo::doctor::{Blame, Check, cached_is_uncached, kl_of_itself, ratio_is_one, values_finite};
use serde_json::{Value, json};

use crate::setup::{Setup, copy};

/// As `ppo.ratio_tolerance` is by default.
const TOLERANCE: f64 = 1e-3;

/// A fault in files: its name, the flags of the examination, and the check with its stage that should name it.
pub type InFiles = (&'static str, Vec<&'static str>, &'static str, Blame);

/// A fault in numbers: its name, what the check says, and the check with its stage that should name it.
pub type InNumbers = (&'static str, Check, &'static str, Blame);

/// The pairs of the set-up, which a reward model that was not trained by it does not name.
const PAIRS: [&str; 4] = ["--pairs", "pairs.val.jsonl", "--train-pairs", "pairs.train.jsonl"];

/// Plants every fault that lies in files or settings.
pub fn files(setup: &Setup) -> Vec<InFiles> {
    let with_pairs = |flags: [&'static str; 2]| [&flags[..], &PAIRS].concat();
    let mut faults = vec![
        (
            "an untrained reward model",
            with_pairs(["--reward-model", "rm.untrained"]),
            "held-out-accuracy",
            Blame::RewardModel,
        ),
        ("swapped labels", with_pairs(["--reward-model", "rm.swapped"]), "held-out-accuracy", Blame::RewardModel),
        ("scores of another scale", with_pairs(["--reward-model", "rm.scaled"]), "score-scale", Blame::RewardModel),
        (
            "a reward model that counts tokens",
            with_pairs(["--reward-model", "rm.longer"]),
            "order-repeated",
            Blame::RewardModel,
        ),
        (
            "the same, of preferred length",
            with_pairs(["--reward-model", "rm.longer"]),
            "accuracy-by-length",
            Blame::RewardModel,
        ),
        (
            "a reward model that likes silence",
            with_pairs(["--reward-model", "rm.shorter"]),
            "order-empty",
            Blame::RewardModel,
        ),
        ("a weight that is NaN", vec!["--reward-model", "rm.nan"], "reward-model-loads", Blame::RewardModel),
        ("an SFT model as the reward model", vec!["--reward-model", "sft"], "reward-model-loads", Blame::RewardModel),
        ("another tokenizer", vec!["--reward-model", "rm.other"], "same-tokenizer", Blame::Tokenizer),
        ("padding that is the end", vec!["--reward-model", "rm.padded"], "pad-is-not-end", Blame::Tokenizer),
        ("the same in its tokenizer", vec!["--reward-model", "rm.padded-text"], "pad-is-not-end", Blame::Tokenizer),
        (
            "an untrained SFT model",
            vec!["--policy", "sft.untrained", "--set", "ppo.response_length=6"],
            "answers-end",
            Blame::Sft,
        ),
        ("an SFT model that never ends", vec!["--policy", "sft.endless"], "answers-end", Blame::Sft),
        ("a policy that always answers alike", vec!["--set", "ppo.temperature=0.001"], "temperature", Blame::Ppo),
        (
            "an SFT model that was ruined",
            [&["--policy", "sft.ruined"], &PAIRS[..]].concat(),
            "held-out-loss",
            Blame::Sft,
        ),
        ("held-out pairs that repeat", vec!["--pairs", "pairs.val.repeated.jsonl"], "pairs-duplicates", Blame::Data),
        ("a damaged policy", vec!["--policy", "sft.damaged"], "policy-loads", Blame::Sft),
        ("prompts that are too long", vec!["--data", "prompts.long.jsonl"], "prompts-fit", Blame::Data),
        ("held-out pairs from the training pairs", vec!["--pairs", "pairs.train.jsonl"], "pairs-leak", Blame::Data),
        ("pairs that repeat", vec!["--train-pairs", "pairs.repeated.jsonl"], "pairs-duplicates", Blame::Data),
        ("pairs of equal answers", vec!["--train-pairs", "pairs.tied.jsonl"], "pairs-ties", Blame::Data),
        ("pairs in both orders", vec!["--train-pairs", "pairs.both.jsonl"], "pairs-contradictions", Blame::Data),
        ("a reward for being cut off", vec!["--set", "ppo.missing_eos_score=5"], "missing-eos-score", Blame::Ppo),
    ];
    if common::capacity::available().is_some() {
        let settings = vec!["--set", "train.batch_size=1000000", "--set", "train.rollout_batch_size=1000000"];
        faults.push(("a batch that fits no machine", settings, "memory", Blame::Ppo));
    }
    plant_reward_models(setup);
    plant_policies(setup);
    plant_data(setup);
    faults
}

fn tokenizer(setup: &Setup) -> Tokenizer {
    Checkpoint::open(&setup.path("sft")).unwrap().require_tokenizer().unwrap().clone()
}

fn plant_reward_models(setup: &Setup) {
    let tokenizer = tokenizer(setup);
    let save = |name: &str, model: &ScalarGpt| {
        let (named, config, score_bias) = (model.to_named(), model.config().clone(), model.score_bias());
        save_weights(&setup.path(name), Stage::RewardModel, &tokenizer, Weights::Scalar { named, config, score_bias });
    };
    let rm = Checkpoint::open(&setup.path("rm")).unwrap().load_scalar(&Device::flex()).unwrap();
    // A reward model of swapped labels has learned the same with the opposite sign.
    save("rm.swapped", &rm.clone().with_gain(-1.0).with_score_bias(-rm.score_bias()));
    save("rm.scaled", &rm.clone().with_gain(50.0));
    let untrained = Gpt::new(rm.config(), &Streams::new(98), &Device::flex());
    let untrained = ScalarGpt::new(untrained, &Streams::new(98));
    // Of the scale that it is normalised to, so that only its order is wrong.
    save("rm.untrained", &untrained);
    save("rm.longer", &counter(&tokenizer, 1.0));
    save("rm.shorter", &counter(&tokenizer, -1.0));
    let other = TokenizerConfig { kind: TokenizerKind::Byte, ..TokenizerConfig::default() };
    let other = Tokenizer::train(&other, std::iter::empty::<&str>(), true).unwrap();
    let config = (setup.world.model)(other.vocab_size());
    let model = ScalarGpt::new(Gpt::new(&config, &Streams::new(1), &Device::flex()), &Streams::new(1));
    let weights = Weights::Scalar { named: model.to_named(), config, score_bias: 0.0 };
    save_weights(&setup.path("rm.other"), Stage::RewardModel, &other, weights);

    copy(&setup.path("rm"), &setup.path("rm.nan"));
    std::fs::remove_file(setup.path("rm.nan/manifest.json")).unwrap();
    let path = setup.path("rm.nan/model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();

    copy(&setup.path("rm"), &setup.path("rm.padded"));
    let end = tokenizer.specials().end;
    edit_json(&setup.path("rm.padded/config.json"), |config| config["pad_token_id"] = json!(end));

    copy(&setup.path("rm"), &setup.path("rm.padded-text"));
    edit_json(&setup.path("rm.padded-text/config.json"), |config| config["pad_token_id"] = Value::Null);
    edit_json(&setup.path("rm.padded-text/tokenizer_config.json"), |config| {
        config["pad_token"] = json!(tokenizer.token_text(end).unwrap());
    });
}

/// A reward model whose score is the number of tokens before the last one, times `sign`, and a constant.
///
/// Positions say the number in one feature, nothing else says anything, and a large constant in two others keeps the norm from taking
/// the feature's size away.
fn counter(tokenizer: &Tokenizer, sign: f32) -> ScalarGpt {
    let config = GptConfig {
        d_model: 16,
        n_layers: 1,
        n_heads: 2,
        d_ff: 32,
        max_seq_len: 64,
        ..GptConfig::gpt2(tokenizer.vocab_size())
    };
    let model = ScalarGpt::new(Gpt::new(&config, &Streams::new(1), &Device::flex()), &Streams::new(1));
    let mut named: NamedTensors = model.to_named();
    for (path, tensor) in &mut named {
        tensor.data.fill(if path.ends_with("gamma") { 1.0 } else { 0.0 });
        if path == "trunk.position_embedding" {
            for (position, row) in tensor.data.chunks_exact_mut(config.d_model).enumerate() {
                let n = position as f32 / 16.0;
                (row[0], row[1], row[2], row[3]) = (n, -n, 5.0, -5.0);
            }
        } else if path == "score.weight" {
            (tensor.data[0], tensor.data[1]) = (5.0 * sign, -5.0 * sign);
        }
    }
    let model = ScalarGpt::from_named(&config, named, 0.0, &Device::flex()).unwrap();
    // About the mean of a healthy answer's length, as normalisation would.
    model.with_score_bias(f64::from(-sign) * 6.3)
}

fn plant_policies(setup: &Setup) {
    let config = (setup.world.model)(tokenizer(setup).vocab_size());
    let untrained = Gpt::new(&config, &Streams::new(77), &Device::flex());
    let weights = Weights::Lm { named: untrained.to_named(), config };
    save_weights(&setup.path("sft.untrained"), Stage::Sft, &tokenizer(setup), weights);

    let answer = |i: usize| format!("a{}.", "stuvwxyz".chars().cycle().skip(i % 8).take(45).collect::<String>());
    setup.write("sft.endless.jsonl", (0..64).map(|i| json!({ "prompt": "astu?", "completion": answer(i) })));
    setup.train_sft("sft.endless", "sft.endless.jsonl");

    // Sure of one letter where several are as likely; its answers end as before.
    let sft = Checkpoint::open(&setup.path("sft")).unwrap();
    let (mut named, config) = (sft.named().clone(), sft.model_config().clone());
    named.get_mut("final_norm.gamma").unwrap().data.iter_mut().for_each(|weight| *weight *= 30.0);
    save_weights(&setup.path("sft.ruined"), Stage::Sft, &tokenizer(setup), Weights::Lm { named, config });

    copy(&setup.path("sft"), &setup.path("sft.damaged"));
    let path = setup.path("sft.damaged/model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
}

fn plant_data(setup: &Setup) {
    setup.write("prompts.long.jsonl", (0..8).map(|i| json!({ "prompt": "s".repeat(30 + i) })));
    let pairs = setup.records("pairs.train.jsonl");
    setup.write("pairs.repeated.jsonl", (0..3).flat_map(|_| pairs.clone()));
    let held_out = setup.records("pairs.val.jsonl");
    setup.write("pairs.val.repeated.jsonl", (0..3).flat_map(|_| held_out.clone()));
    let both = |pair: &Value| {
        let reversed = json!({ "prompt": pair["prompt"], "chosen": pair["rejected"], "rejected": pair["chosen"] });
        [pair.clone(), reversed]
    };
    setup.write("pairs.both.jsonl", pairs.iter().flat_map(both));
    let tied = |pair: &Value| {
        let chosen = pair["chosen"].as_str().unwrap();
        json!({ "prompt": pair["prompt"], "chosen": chosen, "rejected": format!("{chosen} ") })
    };
    setup.write("pairs.tied.jsonl", pairs.iter().map(tied));
}

fn edit_json(path: &Path, edit: impl Fn(&mut Value)) {
    let mut json: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    edit(&mut json);
    std::fs::write(path, json.to_string()).unwrap();
}

/// Plants every fault that lies in code, in the numbers that it would give.
pub fn numbers(setup: &Setup) -> Vec<InNumbers> {
    const TEMPERATURE: f64 = 0.7;
    let sft = Checkpoint::open(&setup.path("sft")).unwrap();
    let (policy, tokenizer) = (sft.load_gpt(&Device::flex()).unwrap(), sft.require_tokenizer().unwrap());
    let rollouts = rollouts(setup, &policy, tokenizer, TEMPERATURE, policy.clone());
    let responses: Vec<(&[u32], &[u32])> = rollouts.iter().map(Rollout::ids).collect();
    let sampled: Vec<&[f32]> = rollouts.iter().map(|rollout| &*rollout.response.log_probs).collect();
    let again =
        |temperature: f64| of_response_tokens(&responses, 16, |batch| log_probs(&policy, batch, temperature)).unwrap();
    assert_eq!(ratio_is_one(&sampled, &again(TEMPERATURE), TOLERANCE).verdict, ppo::doctor::Verdict::Pass);

    // The reference is asked about the tokens at another temperature: the rollouts of a policy against itself at 1.
    let mut at_one = rollouts.clone();
    for (rollout, log_probs) in at_one.iter_mut().zip(again(1.0)) {
        rollout.ref_log_probs = log_probs;
    }
    let untrained = Checkpoint::open(&setup.path("base")).unwrap().load_gpt(&Device::flex()).unwrap();
    let other = self::rollouts(setup, &policy, tokenizer, TEMPERATURE, untrained);
    // Positions that begin one later where the cache is not used.
    let shifted: Vec<(&[u32], &[u32])> = responses.iter().map(|(prompt, response)| (&prompt[1..], *response)).collect();
    let shifted = of_response_tokens(&shifted, 16, |batch| log_probs(&policy, batch, TEMPERATURE)).unwrap();
    vec![
        (
            "temperature missing in one log-probability",
            ratio_is_one(&sampled, &again(1.0), TOLERANCE),
            "ratio-is-one",
            Blame::Ppo,
        ),
        ("temperature missing in the reference", kl_of_itself(&at_one, TOLERANCE), "kl-of-itself", Blame::Ppo),
        ("a reference that is another model", kl_of_itself(&other, TOLERANCE), "kl-of-itself", Blame::Ppo),
        (
            "dropout left on",
            ratio_is_one(&sampled, &dropped(&sft, &responses, TEMPERATURE), TOLERANCE),
            "ratio-is-one",
            Blame::Ppo,
        ),
        (
            "positions that differ with the cache",
            cached_is_uncached(&sampled, &shifted, TOLERANCE),
            "cached-is-uncached",
            Blame::Ppo,
        ),
        ("a value head with NaN", values_finite(&values_of_nan(setup, &responses)), "values-finite", Blame::Ppo),
    ]
}

/// Answers of `policy`, scored by the set-up's reward model.
fn rollouts(setup: &Setup, policy: &Gpt, tokenizer: &Tokenizer, temperature: f64, reference: Gpt) -> Vec<Rollout> {
    let files = [setup.path("prompts.jsonl")];
    let prompts = Prompts::read(&files, tokenizer, 64, 24, OnBadRecord::Fail.into(), TooLong::Fail).unwrap();
    let prompts = &prompts.encoded[..32];
    let sampling = Sampling::new(temperature, 24, Streams::new(5), tokenizer, 32);
    let responses = sampling.answer(policy, prompts, 0).unwrap();
    let reward_model = Checkpoint::open(&setup.path("rm")).unwrap().load_scalar(&Device::flex()).unwrap();
    let (further, ensemble) = (Vec::new(), Ensemble::default());
    let frozen = FrozenModels { reference, reward_model, further, ensemble, gold: None, batch_size: 16 };
    frozen.rollouts(prompts, responses, temperature).unwrap()
}

/// Log-probabilities by a policy that drops activations.
fn dropped(sft: &Checkpoint, responses: &[(&[u32], &[u32])], temperature: f64) -> Vec<Vec<f32>> {
    let mut config = sft.model_config().clone();
    config.dropout = 0.1;
    let policy = Gpt::from_named(&config, sft.named().clone(), &Device::flex()).unwrap();
    let mut rng = Streams::new(8).get("dropout", 0);
    let tensor = |ids: &[u32]| {
        let ids: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
        Tensor::<1, Int>::from_data(TensorData::from(ids.as_slice()), &Device::flex())
    };
    let mut of_response = |(prompt, response): &(&[u32], &[u32])| {
        let row = [prompt, &response[..response.len() - 1]].concat();
        let seq = row.len();
        let hidden =
            policy.hidden_with_dropout(tensor(&row).reshape([1, seq]), &Layout::right_padded(), Some(&mut rng));
        let states = hidden.reshape([seq, config.d_model]).narrow(0, prompt.len() - 1, response.len());
        let log_probs = token_log_probs(&policy, states, tensor(response), temperature);
        log_probs.try_into_vec_as::<f32>().unwrap()
    };
    responses.iter().map(&mut of_response).collect()
}

/// Values of a model with one weight of its head that is NaN.
fn values_of_nan(setup: &Setup, responses: &[(&[u32], &[u32])]) -> Vec<Vec<f32>> {
    let rm = Checkpoint::open(&setup.path("rm")).unwrap();
    let mut named = rm.named().clone();
    named.get_mut("score.weight").unwrap().data[0] = f32::NAN;
    let model = ScalarGpt::from_named(rm.model_config(), named, 0.0, &Device::flex()).unwrap();
    of_response_tokens(responses, 16, |batch| values(&model, batch)).unwrap()
}
