//! Every key of every configuration: its entry in docs/configuration.md, `--print-config`, and what its extremes do.
//!
//! The keys are read from the configurations' schemas, so that a new key is covered from its first day.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

#[path = "configuration/extremes.rs"]
mod extremes;
#[path = "configuration/reference.rs"]
mod reference;

use std::path::{Path, PathBuf};

use common::config::{Section, parse, print, sections};
use common::testing::assert_snapshot;
use dpo::DpoConfig;
use ppo::PpoConfig;
use pretrain::PretrainConfig;
use recipe::RecipeConfig;
use reward_model::RewardModelConfig;
use schemars::JsonSchema;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sft::SftConfig;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// The sections of every configuration, by file.
fn all_sections() -> [(&'static str, Vec<Section>); 6] {
    [
        ("pretrain.toml", sections::<PretrainConfig>()),
        ("sft.toml", sections::<SftConfig>()),
        ("reward-model.toml", sections::<RewardModelConfig>()),
        ("ppo.toml and rloo.toml", sections::<PpoConfig>()),
        ("dpo.toml", sections::<DpoConfig>()),
        ("recipe.toml", sections::<RecipeConfig>()),
    ]
}

#[test]
fn the_reference_lists_every_key() {
    assert_snapshot(&root().join("docs/configuration.md"), &reference::markdown(&all_sections()));
}

#[test]
fn every_key_says_what_it_means() {
    for (file, sections) in all_sections() {
        for section in &sections {
            assert!(
                section.path.is_empty() || section.doc.ends_with('.'),
                "{file}: [{}]: {}",
                section.path,
                section.doc
            );
            for key in &section.keys {
                let (path, doc) = (section.dotted(key), &key.doc);
                assert!(doc.starts_with(|c: char| c.is_uppercase() || c == 'λ' || c == '`'), "{file}: {path}: {doc}");
                assert!(doc.ends_with('.') || doc.ends_with(')'), "{file}: {path}: {doc}");
                assert!(!doc.contains("[`"), "{file}: {path}: a link that nobody can follow: {doc}");
            }
        }
    }
}

/// Prints `config`, reads the text back and compares.
fn round_trip<T>(config: &T)
where
    T: DeserializeOwned + JsonSchema + Serialize + PartialEq + std::fmt::Debug,
{
    let text = print(config);
    let back: T = parse(&text, Path::new("printed.toml"), &[]).unwrap_or_else(|error| panic!("{error}\n{text}"));
    assert_eq!(&back, config, "{text}");
}

/// [`round_trip`] of the defaults and of the file `name` of every recipe of ours.
fn round_trips<T>(name: &str)
where
    T: DeserializeOwned + JsonSchema + Serialize + PartialEq + Default + std::fmt::Debug,
{
    round_trip(&T::default());
    for folder in std::fs::read_dir(root().join("configs")).unwrap() {
        let path = folder.unwrap().path().join(name);
        if path.is_file() {
            round_trip(&common::config::load::<T>(&path, &[]).unwrap());
        }
    }
}

#[test]
fn a_printed_configuration_reads_back_as_itself() {
    round_trips::<PretrainConfig>("pretrain.toml");
    round_trips::<SftConfig>("sft.toml");
    round_trips::<RewardModelConfig>("reward-model.toml");
    round_trips::<PpoConfig>("ppo.toml");
    round_trips::<PpoConfig>("rloo.toml");
    round_trips::<DpoConfig>("dpo.toml");
    round_trips::<RecipeConfig>("recipe.toml");
}

/// The configuration in the file `name` of two recipes.
fn both<T: DeserializeOwned + JsonSchema + Serialize + PartialEq + Default>(name: &str) -> [T; 2] {
    ["tiny", "llama-small"]
        .map(|recipe| common::config::load(&root().join("configs").join(recipe).join(name), &[]).unwrap())
}

/// configs/llama-small compares architectures, and may differ from configs/tiny in nothing else than what its README names.
#[test]
fn llama_small_is_tiny_but_for_the_model_and_its_learning_rate() {
    let [tiny, mut llama] = both::<PretrainConfig>("pretrain.toml");
    assert_ne!(llama.model, tiny.model);
    llama.model = tiny.model.clone();
    llama.optimizer.lr = tiny.optimizer.lr;
    assert_eq!(llama, tiny);
    let [tiny, llama] = both::<SftConfig>("sft.toml");
    assert_eq!(llama, tiny);
    let [tiny, llama] = both::<RewardModelConfig>("reward-model.toml");
    assert_eq!(llama, tiny);
    let [tiny, llama] = both::<PpoConfig>("ppo.toml");
    assert_eq!(llama, tiny);
    let [mut tiny, llama] = both::<RecipeConfig>("recipe.toml");
    (tiny.title, tiny.overoptimise) = (llama.title.clone(), None);
    assert_eq!(llama, tiny);
}
