//! A checkpoint with an adapter to one with weights of its own.

use std::path::{Path, PathBuf};

use anyhow::Context;
use common::checkpoint::{self, Checkpoint, Manifest, Opening, Snapshot, Stage, Weights};
use common::files::read_if_there;
use common::out_dir::{self, OutLock};

use crate::cli::MergeArgs;

/// Carries out `chat merge`: the result is of the stage that wrote the adapter, and can be trained further or converted.
///
/// An adapter of another program has no stage; its language model counts as one of `sft`.
pub(crate) fn run(args: &MergeArgs) -> anyhow::Result<()> {
    args.process.start()?;
    // In f32, whatever it was trained beside.
    let opening = Opening { base: args.base.as_deref(), ..Opening::default() };
    let mut checkpoint = Checkpoint::open_with(&args.checkpoint, opening).context("failed to load the adapter")?;
    let weights = checkpoint.take_merged()?;
    let _lock = OutLock::take(&args.out)?;
    let base: PathBuf = checkpoint.base().path;
    let inputs: [&Path; 2] = [&args.checkpoint, &base];
    out_dir::prepare_new(&args.out, args.overwrite, &inputs)?;
    let stage = match weights {
        Weights::Scalar { .. } => Stage::RewardModel,
        _ => Stage::Sft,
    };
    let manifest = checkpoint.manifest().cloned().unwrap_or_else(|| Manifest::new(stage));
    let config_toml = read_if_there(&args.checkpoint.join(checkpoint::CONFIG_FILE))?.unwrap_or_default();
    let snapshot = Snapshot {
        weights,
        manifest: Manifest { parents: vec![checkpoint.as_parent(), checkpoint.base()], ..manifest },
        tokenizer: checkpoint.tokenizer(),
        config_toml: &config_toml,
        value: None,
        state: None,
    };
    checkpoint::save(&args.out, &snapshot).context("failed to save the merged checkpoint")?;
    tracing::info!("`{}` with its adapter in its weights is in `{}`", base.display(), args.out.display());
    Ok(())
}
