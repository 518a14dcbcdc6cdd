//! Every key at the extremes of its type, just outside its range, with a wrong type, and missing: through reading and
//! validation, in this process. Each is a configuration that can be written down again, or one error that names the key.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use common::config::{Key, Kind, Section, parse, print, sections, to_toml};
use dpo::DpoConfig;
use ppo::PpoConfig;
use pretrain::PretrainConfig;
use recipe::RecipeConfig;
use reward_model::RewardModelConfig;
use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sft::SftConfig;

/// What any key is tried with, as TOML.
const VALUES: [&str; 24] = [
    "0",
    "1",
    "-1",
    "-0.0",
    "0.5",
    "1e-300",
    "1e308",
    "-1e308",
    "1e999",
    "nan",
    "inf",
    "-inf",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "99999999999999999999999999999999999999999",
    "true",
    "\"\"",
    "\"text\"",
    "[]",
    "[1.0]",
    "[1e-300, 0.9]",
    "{ a = 1 }",
    "1979-05-27",
];

/// A configuration as a test needs it: read, validated, and what follows from its numbers alone.
trait Checked: DeserializeOwned + JsonSchema + Serialize + Default {
    /// The least that makes the configuration valid.
    const BASE: &'static str;

    fn validate(&self) -> anyhow::Result<()>;
}

impl Checked for PretrainConfig {
    const BASE: &'static str = "[data]\ntrain = [\"a.txt\"]\n";

    fn validate(&self) -> anyhow::Result<()> {
        self.validate()?;
        self.model.resolve(1000)?;
        Ok(())
    }
}

impl Checked for SftConfig {
    const BASE: &'static str = "[data]\ntrain = [\"a.jsonl\"]\nval = [\"b.jsonl\"]\n";

    fn validate(&self) -> anyhow::Result<()> {
        self.train.amount().n_steps(usize::MAX);
        self.validate()
    }
}

impl Checked for RewardModelConfig {
    const BASE: &'static str = SftConfig::BASE;

    fn validate(&self) -> anyhow::Result<()> {
        self.train.amount().n_steps(usize::MAX);
        self.validate()
    }
}

impl Checked for DpoConfig {
    const BASE: &'static str = SftConfig::BASE;

    fn validate(&self) -> anyhow::Result<()> {
        self.train.amount().n_steps(usize::MAX);
        self.validate()
    }
}

impl Checked for PpoConfig {
    const BASE: &'static str = "[data]\ntrain = [\"a.jsonl\"]\nval = [\"b.jsonl\"]\n[ptx.data]\ntrain = [\"c.txt\"]\n";

    fn validate(&self) -> anyhow::Result<()> {
        self.validate()
    }
}

impl Checked for RecipeConfig {
    const BASE: &'static str = "[world]\n[gold]\nkind = \"world\"\n[collect]\nprompts = \"a\"\n[evaluate]\nprompts = \"b\"\n[overoptimise]\nprompts = \"c\"\n";

    fn validate(&self) -> anyhow::Result<()> {
        self.validate()
    }
}

/// The outcome of reading `T::BASE` with `overrides`: the configuration, or the error as a user reads it.
fn read<T: Checked>(overrides: &[String]) -> Result<T, String> {
    let read = catch_unwind(AssertUnwindSafe(|| {
        let config: T = parse(T::BASE, Path::new("base.toml"), overrides).map_err(|error| error.to_string())?;
        config.validate().map_err(|error| format!("{error:#}"))?;
        Ok(config)
    }));
    read.unwrap_or_else(|_| panic!("{overrides:?}: panicked"))
}

/// Checks one override: an error names the key, a configuration can be written and printed and has no number that JSON
/// lacks.
fn try_value<T: Checked>(section: &Section, key: &Key, value: &str) {
    let path = section.dotted(key);
    match read::<T>(&[format!("{path}={value}")]) {
        Err(error) => {
            assert!(
                error.contains(&key.name) || error.contains("the sizes make"),
                "{path}={value}: the error does not name the key: {error}"
            );
            assert!(!error.contains("hint: hint"), "{error}");
        }
        Ok(config) => {
            let text = to_toml(&config).unwrap_or_else(|error| panic!("{path}={value}: accepted, but {error}"));
            parse::<T>(&text, Path::new("resolved.toml"), &[])
                .unwrap_or_else(|error| panic!("{path}={value}: {error}"));
            parse::<T>(&print(&config), Path::new("printed.toml"), &[])
                .unwrap_or_else(|e| panic!("{path}={value}: {e}"));
            let within = matches!(&key.kind, Kind::Integer { .. } | Kind::Number(_) | Kind::List(..));
            assert!(!within || !text.contains("nan") && !text.contains("inf"), "{path}={value}: {text}");
        }
    }
}

/// Values at and just outside the key's own range.
fn bounds(key: &Key) -> Vec<String> {
    match &key.kind {
        Kind::Integer { min, max } => [*min, min - 1, *max, max + 1].map(|n| n.to_string()).to_vec(),
        Kind::Number(interval) => {
            let ends = interval.ends().into_iter().flatten();
            ends.flat_map(|end| [end, end.next_up(), end.next_down()]).map(|x| format!("{x:e}")).collect()
        }
        _ => Vec::new(),
    }
}

fn campaign<T: Checked>() {
    let sections = sections::<T>();
    for section in &sections {
        for key in &section.keys {
            for value in VALUES {
                try_value::<T>(section, key, value);
            }
            for value in bounds(key) {
                try_value::<T>(section, key, &value);
            }
        }
    }
    // A key that is absent has its default, unless it is required.
    let whole = print(&read::<T>(&[]).unwrap_or_else(|error| panic!("{error}")));
    for (i, line) in whole.lines().enumerate().filter(|(_, line)| !line.starts_with(['#', '[']) && line.contains(" = "))
    {
        let without: String =
            whole.lines().enumerate().filter(|(at, _)| *at != i).flat_map(|(_, line)| [line, "\n"]).collect();
        let parsed = parse::<T>(&without, Path::new("without.toml"), &[]).map_err(|error| error.to_string());
        if let Err(error) = parsed.and_then(|config| config.validate().map_err(|error| format!("{error:#}"))) {
            let name = line.split(" = ").next().unwrap();
            assert!(error.contains(&format!("{name}`")), "without `{name}`: {error}");
        }
    }
}

#[test]
fn pretraining() {
    campaign::<PretrainConfig>();
}

#[test]
fn fine_tuning() {
    campaign::<SftConfig>();
}

#[test]
fn reward_models() {
    campaign::<RewardModelConfig>();
}

#[test]
fn proximal_policy_optimisation() {
    campaign::<PpoConfig>();
}

#[test]
fn direct_preference_optimisation() {
    campaign::<DpoConfig>();
}

#[test]
fn recipes() {
    campaign::<RecipeConfig>();
}

#[test]
fn an_error_names_file_line_key_and_range() {
    let read = |text: &str| parse::<SftConfig>(text, Path::new("sft.toml"), &[]).unwrap_err().to_string();
    let error = read("seed = 1\n[train]\nbatch_size = 0\n");
    for part in ["`sft.toml`", "line 3", "batch_size = 0", "`train.batch_size`", "a whole number from 1 to 1_000_000"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    let error = read("[optimizer]\nbetas = [0.9, 1.0]\n");
    assert!(error.contains("`optimizer.betas`") && error.contains("below 1"), "{error}");
    let error = read("[optimizer]\nlr = nan\n");
    assert!(error.contains("`optimizer.lr` to be a number above 0 and at most 1000"), "{error}");
}
