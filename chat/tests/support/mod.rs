//! Checkpoints to talk to.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use burn::tensor::Device;
use common::checkpoint::{Manifest, Snapshot, Stage, Weights, save};
use common::model::{Gpt, GptConfig, NamedTensors, ScalarGpt};
use common::rng::Streams;
use common::testing::byte_tokenizer;
use common::tokenizer::Tokenizer;

/// What the reward model adds to each score.
pub(crate) const SCORE_BIAS: f64 = 0.75;

/// A directory with the checkpoints `lm`, `long-winded`, `reward-model`, `no-tokenizer` and `diverged`, made once.
pub(crate) fn checkpoints() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("chat-cli-{}", std::process::id()));
        let tokenizer = byte_tokenizer();
        let long_winded = gpt(&tokenizer, 1 << 16);
        let weights = Weights::Lm { named: long_winded.to_named(), config: long_winded.config().clone() };
        save_checkpoint(&dir.join("long-winded"), Stage::Sft, weights, Some(&tokenizer));
        let gpt = gpt(&tokenizer, 96);
        let config = gpt.config().clone();
        let lm = |named| Weights::Lm { named, config: config.clone() };
        save_checkpoint(&dir.join("lm"), Stage::Sft, lm(gpt.to_named()), Some(&tokenizer));
        save_checkpoint(&dir.join("base"), Stage::Pretrain, lm(gpt.to_named()), Some(&tokenizer));
        save_checkpoint(&dir.join("no-tokenizer"), Stage::Pretrain, lm(gpt.to_named()), None);
        let mut named = gpt.to_named();
        named.get_mut("head").unwrap().data.fill(f32::MAX);
        save_checkpoint(&dir.join("diverged"), Stage::Sft, lm(named), Some(&tokenizer));
        let named = ScalarGpt::new(gpt, &Streams::new(0)).to_named();
        let scalar = Weights::Scalar { named, config: config.clone(), score_bias: SCORE_BIAS };
        save_checkpoint(&dir.join("reward-model"), Stage::RewardModel, scalar, Some(&tokenizer));
        dir
    })
}

/// A model that says printable ASCII, so that what it says does not depend on how broken text is shown.
pub(crate) fn gpt(tokenizer: &Tokenizer, max_seq_len: usize) -> Gpt {
    let mut rng = Streams::new(5).get("test", 0);
    let (config, named) = saying(tokenizer, max_seq_len, |id| {
        let printable = tokenizer.decode(&[id]).chars().all(|c| (' '..='~').contains(&c));
        let ordinary = printable && !tokenizer.is_special(id);
        let shift = if ordinary { 0.0 } else { -3.0 };
        std::array::from_fn(|_| shift + 0.5 * rng.normal() as f32)
    });
    Gpt::from_named(&config, named, &Device::flex()).unwrap()
}

/// A model whose final norm has an offset of 1 everywhere, so that the sum of a token's `row` in the output layer is added
/// to its logit.
pub(crate) fn saying(
    tokenizer: &Tokenizer,
    max_seq_len: usize,
    mut row: impl FnMut(u32) -> [f32; 16],
) -> (GptConfig, NamedTensors) {
    let config = GptConfig {
        d_model: 16,
        n_layers: 1,
        n_heads: 2,
        d_ff: 32,
        max_seq_len,
        tie_embeddings: false,
        ..GptConfig::gpt2(tokenizer.vocab_size())
    };
    let mut named = Gpt::new(&config, &Streams::new(4), &Device::flex()).to_named();
    named.get_mut("head").unwrap().data = (0..config.vocab_size as u32).flat_map(&mut row).collect();
    named.get_mut("final_norm.beta").unwrap().data.fill(1.0);
    (config, named)
}

pub(crate) fn save_checkpoint(dir: &Path, stage: Stage, weights: Weights, tokenizer: Option<&Tokenizer>) {
    let manifest = Manifest::new(stage);
    save(dir, &Snapshot { weights, manifest, tokenizer, config_toml: "", value: None, state: None }).unwrap();
}
