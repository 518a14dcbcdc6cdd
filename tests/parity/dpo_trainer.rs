//! `dpo train` in lock-step with TRL's `DPOTrainer`: `fixtures/dpo.json`, written by `oracles/dpo.py`.

use clap::Parser;
use common::group::Group;
use common::interrupt::Interrupt;
use common::testing::byte_tokenizer;
use dpo::{Cli, Command};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;

use super::*;

/// Numbers of a step, relative to those above one: f32 against the oracle's f64, over five steps.
const STEPS: f64 = 2e-5;

/// Weights after five steps of at most 3e-3 each; Adam divides by gradients that f32 knows to a few digits.
const WEIGHTS: f32 = 2e-5;

/// The fixture's tensors whose names begin with `prefix`, without it.
fn tensors<'a>(fixture: &'a SafeTensors<'_>, prefix: &str) -> Vec<(String, TensorView<'a>)> {
    let strip = |name: &str| Some(name.strip_prefix(prefix)?.strip_prefix('/')?.to_owned());
    fixture.tensors().into_iter().filter_map(|(name, tensor)| Some((strip(&name)?, tensor))).collect()
}

fn numbers_of(tensor: &TensorView<'_>) -> Vec<f32> {
    tensor.data().chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

/// The tokens of a pair as the trainer was given them, prompt and answer in one row.
fn row(pair: &Value, answer: &str) -> Vec<u32> {
    let of = |name: &str| -> Vec<u32> { serde_json::from_value(pair[name].clone()).unwrap() };
    [of("prompt_ids"), of(answer)].concat()
}

#[test]
fn pairs_have_the_tokens_that_the_trainer_was_given() {
    let fixture = json_of(&fixtures().join("dpo.json"));
    for pair in fixture["pairs"].as_array().unwrap() {
        let text = |name: &str| pair[name].as_str().unwrap().to_owned();
        let record = common::data::records::Pair {
            prompt: vec![common::conversation::Message::new(common::conversation::Role::User, text("prompt"))],
            chosen: text("chosen"),
            rejected: text("rejected"),
            ..Default::default()
        };
        let encoded = common::score::EncodedPair::new(&record, &byte_tokenizer()).unwrap();
        assert_eq!((encoded.chosen, encoded.rejected), (row(pair, "chosen_ids"), row(pair, "rejected_ids")));
    }
}

#[test]
fn training_goes_in_step_with_the_trainer_of_trl() {
    let fixture = json_of(&fixtures().join("dpo.json"));
    let bytes = std::fs::read(fixtures().join("dpo.safetensors")).unwrap();
    let weights = SafeTensors::deserialize(&bytes).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    std::fs::create_dir(path("init")).unwrap();
    std::fs::write(path("init/config.json"), fixture["config"].to_string()).unwrap();
    let initial = safetensors::serialize(tensors(&weights, "initial"), None).unwrap();
    std::fs::write(path("init/model.safetensors"), initial).unwrap();
    byte_tokenizer().save(&path("init")).unwrap();
    let pairs = fixture["pairs"].as_array().unwrap();
    std::fs::write(
        path("pairs.jsonl"),
        pairs
            .iter()
            .map(|pair| {
                format!(
                    "{}\n",
                    json!({ "prompt": pair["prompt"], "chosen": pair["chosen"], "rejected": pair["rejected"] })
                )
            })
            .collect::<String>(),
    )
    .unwrap();
    for case in fixture["cases"].as_array().unwrap() {
        let name = case["name"].as_str().unwrap();
        let steps = case["steps"].as_array().unwrap();
        let mut config = format!(
            "[data]\ntrain = \"pairs.jsonl\"\nval = \"pairs.jsonl\"\n[train]\nsteps = {}\nbatch_size = {}\nmicro_batch_size = 1\n\
             [optimizer]\nlr = {}\nschedule = \"constant\"\n[run]\nlog_every = 1\n[dpo]\n",
            steps.len(),
            pairs.len(),
            fixture["lr"]
        );
        for (key, value) in case["dpo"].as_object().unwrap() {
            config += &format!("{key} = {value}\n");
        }
        std::fs::write(path("dpo.toml"), config).unwrap();
        let flag = |name: &str| path(name).display().to_string();
        let args = ["dpo", "train", "--config", &flag("dpo.toml"), "--init", &flag("init"), "--out", &flag(name)];
        let Command::Train(args) = Cli::parse_from(args).command else { panic!("another command") };
        dpo::train(&args, &Group::alone(), Interrupt::never()).unwrap();

        let lines = std::fs::read_to_string(path(name).join("metrics.jsonl")).unwrap();
        let lines = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let lines: Vec<Value> = lines.filter(|line| line["train/loss"].is_number()).collect();
        assert_eq!(lines.len(), steps.len());
        for (i, (ours, theirs)) in lines.iter().zip(steps).enumerate() {
            for (metric, expected) in theirs.as_object().unwrap() {
                // Of equal rewards TRL says that the chosen one is not higher.
                if i == 0 && metric == "rewards/accuracies" {
                    continue;
                }
                let own = if metric.contains('/') { metric.clone() } else { format!("train/{metric}") };
                let (found, expected) = (ours[&own].as_f64().unwrap(), expected.as_f64().unwrap());
                let off = (found - expected).abs() / expected.abs().max(1.0);
                assert!(off <= STEPS, "{name}, step {}: {metric}: {found}, expected {expected}", i + 1);
            }
        }
        let trained = std::fs::read(path(name).join("model.safetensors")).unwrap();
        let trained = SafeTensors::deserialize(&trained).unwrap();
        let expected = tensors(&weights, name);
        assert_eq!(trained.len(), expected.len());
        for (tensor, expected) in expected {
            let found = numbers_of(&trained.tensor(&tensor).unwrap());
            common::testing::assert_close(&found, &numbers_of(&expected), WEIGHTS);
        }
    }
}
