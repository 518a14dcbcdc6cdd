//! Flags only.

use std::path::PathBuf;

use clap::Args;
use common::checkpoint::Stage;
use common::cli::{RuntimeArgs, without_base};
use common::kernels::fault::Fault;

/// Flags of `recipe compare`.
#[derive(Debug, Args)]
#[command(
    // The backends are those of `--backends`.
    mut_arg("backend", |arg| arg.hide(true).conflicts_with("backends")),
    mut_arg("base", without_base),
    after_help = "The first backend is the reference; each runs in a process of its own. Exits with 1 if a budget is exceeded.\n\n\
        Example:\n  \
        recipe compare configs/tiny --backends flex,ndarray --steps 20\n  \
        recipe compare configs/tiny --backends flex,wgpu --stages pretrain --set pretrain.model.n_layers=2\n  \
        recipe compare configs/tiny --backends flex,cuda --precision bf16"
)]
pub struct CompareArgs {
    /// Folder of the recipe, or the name of one in configs/; `tiny` is in this program as well
    #[arg(value_name = "RECIPE")]
    pub recipe: String,

    /// Backends to compare, the reference first, as `--backend` takes them
    #[arg(long, value_name = "NAMES", value_delimiter = ',', required = true)]
    pub backends: Vec<String>,

    /// Compare these stages only: pretrain, sft, reward-model, ppo
    #[arg(long, alias = "stage", value_name = "STAGES", value_delimiter = ',', value_parser = stage)]
    pub stages: Vec<Stage>,

    /// Steps of the loss curves
    #[arg(long, value_name = "N", default_value = "50", value_parser = clap::value_parser!(u64).range(2..=1_000_000_000))]
    pub steps: u64,

    /// Directory for the tables, plots and records of the backends [default: runs/compare-RECIPE]
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,

    /// Folder that $DATA/ stands for in the paths of the recipe [env: KINDLING_DATA]
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,

    /// Random seed of all stages, instead of the recipe's
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64))]
    pub seed: Option<u64>,

    /// Override a key of a stage's configuration, or of recipe.toml with `recipe.`; VALUE is TOML, or else a string
    /// (repeatable)
    #[arg(long = "set", value_name = "STAGE.KEY=VALUE")]
    pub overrides: Vec<String>,

    /// Replace an earlier comparison in --out
    #[arg(long)]
    pub overwrite: bool,

    /// Makes an operation of one backend wrong: a test of the comparison itself
    #[arg(long, value_name = "BACKEND=OPERATION", hide = true)]
    pub plant: Option<String>,

    /// Threads, kernels and precision of every backend but the CPU's, which compute in f32 whatever it is
    #[command(flatten)]
    pub runtime: RuntimeArgs,
}

/// Flags of the process that one backend runs in.
#[derive(Debug, Args)]
pub struct ProbeArgs {
    /// Plan of the computations: the file that `recipe compare` wrote
    #[arg(long, value_name = "FILE")]
    pub plan: PathBuf,

    /// Where the records and checkpoints go
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,

    /// Directory of the reference, unless this is it
    #[arg(long, value_name = "DIR")]
    pub reference: Option<PathBuf>,

    /// Operation to make wrong
    #[arg(long, value_name = "OPERATION")]
    pub plant: Option<Fault>,

    /// Device, precision, threads and verbosity
    #[command(flatten)]
    pub runtime: RuntimeArgs,
}

/// Reads the name of a stage.
fn stage(text: &str) -> Result<Stage, String> {
    serde_json::from_value(text.into()).map_err(|_| "expected `pretrain`, `sft`, `reward-model` or `ppo`".to_owned())
}
