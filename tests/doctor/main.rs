//! The proof of `ppo doctor`: faults that are planted are named with the stage to mend, and healthy set-ups pass.
//!
//! The worlds are small and their models real: each is trained for seconds, SFT and reward model. A fault of files is planted in
//! files, one of numbers in the numbers that the check is a function of.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

mod planted;
mod setup;

use common::model::GptConfig;
use common::tokenizer::TokenizerKind;
use ppo::doctor::{ALARMS, Blame, Check, Report, Verdict};
use setup::{BASE, Setup, World, small};

/// Ten worlds that differ in data, tokenizer, architecture, size and settings.
fn healthy() -> [World; 10] {
    [
        World { name: "other letters", subjects: "xy", letters: "klmnop", seed: 2, ..BASE },
        World {
            name: "digits, long answers, gpt2",
            subjects: "12",
            letters: "3456789",
            n_letters: 6..10,
            model: |vocab_size| small(&GptConfig::gpt2(vocab_size)),
            seed: 3,
            ..BASE
        },
        World { name: "bytes", tokenizer: TokenizerKind::Byte, seed: 4, ..BASE },
        World {
            name: "merged tokens",
            tokenizer: TokenizerKind::Bpe,
            sft_steps: 120,
            reward_steps: 200,
            seed: 5,
            ..BASE
        },
        World {
            name: "wide",
            model: |vocab_size| GptConfig { d_model: 64, d_ff: 96, ..small(&GptConfig::llama(vocab_size)) },
            seed: 6,
            ..BASE
        },
        World {
            name: "three layers",
            model: |vocab_size| GptConfig {
                n_layers: 3,
                d_model: 24,
                n_heads: 2,
                ..small(&GptConfig::llama(vocab_size))
            },
            seed: 7,
            ..BASE
        },
        World { name: "transformer", model: |vocab_size| small(&GptConfig::transformer(vocab_size)), seed: 8, ..BASE },
        World {
            name: "grouped queries",
            model: |vocab_size| GptConfig { n_kv_heads: Some(2), ..small(&GptConfig::llama(vocab_size)) },
            seed: 9,
            ..BASE
        },
        World {
            name: "gpt-neox, few pairs",
            model: |vocab_size| small(&GptConfig::gpt_neox(vocab_size)),
            n_pairs: 900,
            seed: 10,
            ..BASE
        },
        World { name: "cool, many flaws", temperature: 0.8, flawed: 0.5, seed: 11, ..BASE },
    ]
}

#[test]
fn healthy_set_ups_pass_without_a_false_alarm_before_and_during() {
    for world in healthy() {
        let setup = Setup::new(world);
        let name = setup.world.name;
        let report = setup.examine(&[]);
        let others: Vec<&Check> = report.checks.iter().filter(|check| check.verdict != Verdict::Pass).collect();
        assert!(others.is_empty(), "{name}: {others:#?}");
        let trained = setup.train_ppo("ppo", &[]).map_err(|error| error.to_string());
        assert_eq!(trained, Ok(()), "{name}");
    }
}

/// What is wrong with `report` unless it names `id` as failed, and no check of another stage fails before.
///
/// A fault has consequences: a model that never ends has strange scores. Checks stand in the order in which a run uses what they
/// look at, so that the cause comes first.
fn misnamed(fault: &str, report: &Report, id: &str, stage: Blame) -> Option<String> {
    let failed: Vec<&Check> = report.with(Verdict::Fail).collect();
    let is_named = failed.iter().any(|check| check.id == id) && failed[0].stage == stage;
    let told: Vec<String> =
        failed.iter().map(|check| format!("\n  {} ({}): {}", check.id, check.stage, check.reason)).collect();
    let others = report.with(Verdict::Warn).map(|check| format!("\n  warned: {}: {}", check.id, check.reason));
    (!is_named)
        .then(|| format!("{fault}: expected `{id}` ({stage}), found{}{}\n", told.concat(), others.collect::<String>()))
}

#[track_caller]
fn assert_fails(fault: &str, check: &Check, id: &str, stage: Blame) {
    assert_eq!((check.verdict, check.id, check.stage), (Verdict::Fail, id, stage), "{fault}: {}", check.reason);
}

#[test]
fn planted_faults_are_named_with_the_stage_to_mend() {
    let setup = Setup::new(BASE);
    let misnamed: Vec<String> = planted::files(&setup)
        .into_iter()
        .filter_map(|(fault, flags, id, stage)| misnamed(fault, &setup.examine(&flags), id, stage))
        .collect();
    assert!(misnamed.is_empty(), "{}", misnamed.concat());
    for (fault, check, id, stage) in planted::numbers(&setup) {
        assert_fails(fault, &check, id, stage);
    }
}

#[test]
fn what_does_not_apply_is_no_fault_and_what_harms_nobody_here_warns() {
    let setup = Setup::new(World { sft_steps: 60, reward_steps: 30, ..BASE });
    let of = |flags: &[&str], id: &str| {
        let checks = setup.examine(flags).checks;
        checks.into_iter().find(|check| check.id == id).unwrap()
    };
    let check = of(&["--set", "ppo.dialect=trl"], "missing-eos-score");
    assert!(check.verdict == Verdict::Pass && check.reason.contains("in this dialect"), "{}", check.reason);
    setup::copy(&setup.path("sft"), &setup.path("sft.padded"));
    let path = setup.path("sft.padded/config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["pad_token_id"] = config["eos_token_id"].clone();
    std::fs::write(&path, config.to_string()).unwrap();
    let check = of(&["--policy", "sft.padded"], "pad-is-not-end");
    assert!(check.verdict == Verdict::Warn && check.reason.contains("the policy's config.json"), "{}", check.reason);
}

#[test]
fn a_learning_rate_a_hundred_times_too_high_is_named_at_its_first_step() {
    let setup = Setup::new(World { sft_steps: 60, reward_steps: 30, ..BASE });
    let error = setup.train_ppo("fast", &["--set", "optimizer.lr=0.03"]).unwrap_err().to_string();
    let named = ALARMS.iter().find(|alarm| error.contains(&format!("alarm `{}` at step 1", alarm.id)));
    let named = named.unwrap_or_else(|| panic!("{error}"));
    assert!(["ratio", "approx-kl", "clip-fraction"].contains(&named.id) && named.stage == Blame::Ppo, "{error}");
    assert!(named.hint.contains("`optimizer.lr`"), "{}", named.hint);
}
