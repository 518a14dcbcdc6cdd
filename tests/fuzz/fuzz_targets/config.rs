//! The stages' configurations: TOML, and `--set` flags over it.
//!
//! An input is a byte that chooses the stage, lines that begin with `--set `, and the file.

#![no_main]

use std::fmt::Debug;
use std::path::Path;

use common::config::{Configuration, Section, parse, print, sections, to_toml};
use fuzz::{Numbers, check_error};
use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use ppo::PpoConfig;
use pretrain::PretrainConfig;
use recipe::RecipeConfig;
use reward_model::RewardModelConfig;
use serde_json::Value;
use sft::SftConfig;

/// What begins a line with a flag.
const FLAG: &str = "--set ";

const VALUES: [&str; 40] = [
    "0",
    "1",
    "-1",
    "2",
    "3",
    "0.5",
    "-0.0",
    "1e-300",
    "1e300",
    "-1e300",
    "1e39",
    "5e-324",
    "nan",
    "-nan",
    "inf",
    "-inf",
    "9223372036854775807",
    "-9223372036854775808",
    "18446744073709551615",
    "340282366920938463463374607431768211456",
    "4294967296",
    "0x7fffffffffffffff",
    "1_000",
    "true",
    "\"\"",
    "\"a\"",
    "'$DATA/x'",
    "\"\\u0000\"",
    "[]",
    "[1]",
    "[\"a\"]",
    "[[1]]",
    "{}",
    "{ a = 1 }",
    "1979-05-27",
    "\"none\"",
    "\"\"\"a\nb\"\"\"",
    "[0.9, 0.999]",
    "\"*\"",
    "[nan, 1]",
];

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let mut numbers = Numbers(u64::from(seed));
    let text = data[..size].split_first().and_then(|(_, text)| std::str::from_utf8(text).ok());
    let (Some(text), 1..) = (text, numbers.below(4)) else { return fuzzer_mutate(data, size, max_size) };
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let at = numbers.below(lines.len() + 1);
    match numbers.below(4) {
        0 | 1 => lines.insert(0, format!("{FLAG}{}={}", key(data[0], &mut numbers), numbers.pick(&VALUES))),
        2 if at < lines.len() => match lines[at].split_once('=') {
            Some((key, _)) => lines[at] = format!("{key}= {}", numbers.pick(&VALUES)),
            None => drop(lines.remove(at)),
        },
        _ => lines.insert(at, format!("{} = {}", key(data[0], &mut numbers), numbers.pick(&VALUES))),
    }
    let text = lines.join("\n");
    if text.len() + 1 > max_size {
        return fuzzer_mutate(data, size, max_size);
    }
    data[1..=text.len()].copy_from_slice(text.as_bytes());
    1 + text.len()
});

/// A key of the stage that `choice` names, dotted.
fn key(choice: u8, numbers: &mut Numbers) -> String {
    let sections: Vec<Section> = match choice % 5 {
        0 => sections::<PretrainConfig>(),
        1 => sections::<SftConfig>(),
        2 => sections::<RewardModelConfig>(),
        3 => sections::<PpoConfig>(),
        _ => sections::<RecipeConfig>(),
    };
    let section = numbers.pick(&sections);
    if section.keys.is_empty() { section.path.clone() } else { section.dotted(numbers.pick(&section.keys)) }
}

fuzz_target!(|data: &[u8]| {
    let Some((choice, text)) = data.split_first() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    let n_flags = text.lines().take_while(|line| line.starts_with(FLAG)).count();
    let flags: Vec<String> = text.lines().take(n_flags).map(|line| line[FLAG.len()..].to_owned()).collect();
    let file: String = text.split_inclusive('\n').skip(n_flags).collect();
    match choice % 5 {
        0 => {
            if let Some(config) = check(&file, &flags, PretrainConfig::validate) {
                for vocab_size in [1, 50_257, 1 << 24] {
                    match config.model.resolve(vocab_size) {
                        Err(error) => check_error(&error),
                        Ok(model) => {
                            model.validate().expect("a model that was resolved");
                            let _ = config.seq_len(&model).map_err(|error| check_error(&*error));
                        }
                    }
                }
            }
        }
        1 => drop(check(&file, &flags, SftConfig::validate)),
        2 => drop(check(&file, &flags, RewardModelConfig::validate)),
        3 => {
            if let Some(config) = check(&file, &flags, PpoConfig::validate) {
                assert!(config.micro_batch_size() > 0);
            }
        }
        _ => drop(check(&file, &flags, RecipeConfig::validate)),
    }
});

/// Checks one configuration; returns it if it is valid.
fn check<T: Configuration + Debug + PartialEq>(
    file: &str,
    flags: &[String],
    validate: fn(&T) -> anyhow::Result<()>,
) -> Option<T> {
    let path = Path::new("fuzz.toml");
    let config: T = match parse(file, path, flags) {
        Err(error) => {
            check_error(&error);
            return None;
        }
        Ok(config) => config,
    };
    // A number that is not finite would be `null`.
    let json = serde_json::to_value(&config).expect("a configuration is JSON");
    assert!(!has_null(&json), "null in {json}");
    let written = to_toml(&config).expect("what was read can be written");
    assert_eq!(parse::<T>(&written, path, &[]).expect("what was written"), config);
    assert_eq!(parse::<T>(&print(&config), path, &[]).expect("what was printed"), config);
    match validate(&config) {
        Ok(()) => Some(config),
        Err(error) => {
            check_error(&*error);
            None
        }
    }
}

fn has_null(json: &Value) -> bool {
    match json {
        Value::Null => true,
        Value::Array(items) => items.iter().any(has_null),
        Value::Object(entries) => entries.values().any(has_null),
        _ => false,
    }
}
