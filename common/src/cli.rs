//! The flags that mean the same in every program.

use std::ffi::OsString;
use std::io::Write;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use clap::{ArgAction, Args, Parser};

use crate::backend::{self, BackendError};
use crate::kernels::{Kernels, Precision, memory};
use crate::logging;
use crate::out_dir::{self, OutDirError};
use crate::runtime::{self, Runtime, ThreadsError};

/// The flags of every command that trains.
#[derive(Debug, Clone, Args)]
pub struct StageArgs {
    /// Configuration file (TOML)
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,

    /// Where the checkpoint, the metrics and the resolved config go
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,

    /// Go on from the checkpoint in --out
    #[arg(long, conflicts_with = "overwrite")]
    pub resume: bool,

    /// Replace what an earlier run left in --out
    #[arg(long)]
    pub overwrite: bool,

    /// Override one value of the config; VALUE is TOML, or a string (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,

    /// Where paths of the config that begin with `$DATA/` lie; else the variable `KINDLING_DATA` says
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,

    /// Device, precision, threads and verbosity
    #[command(flatten)]
    pub runtime: RuntimeArgs,
}

/// The flags of a command that trains a model further.
#[derive(Debug, Clone, Args)]
pub struct InitArgs {
    /// Checkpoint to start from: stage pretrain or sft, or a Hugging Face directory
    #[arg(long, value_name = "DIR")]
    pub init: PathBuf,

    /// What every stage takes
    #[command(flatten)]
    pub stage: StageArgs,
}

/// The flags of every command: device, precision, threads, verbosity.
#[derive(Debug, Clone, Args)]
pub struct RuntimeArgs {
    /// Device to run on: flex, ndarray, wgpu, vulkan, metal, cuda or cpu, with :INDEX where there are several; `list`
    /// shows what is there
    #[arg(long, value_name = "NAME[:INDEX]", default_value = "flex")]
    pub backend: String,

    /// Float type of the model's computations, where the device has it; weights and optimiser stay in f32
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    pub precision: Precision,

    /// CPU threads [default: one for each core]
    #[arg(long, value_name = "N", value_parser = at_least_1)]
    pub threads: Option<NonZeroUsize>,

    /// Fused kernels of our own where the backend has them, or plain tensor operations
    #[arg(long, value_name = "KIND", default_value = "fused")]
    kernels: Kernels,

    /// Say more (-vv: still more)
    #[arg(short, long, action = ArgAction::Count, conflicts_with = "quiet")]
    pub verbose: u8,

    /// Say nothing but warnings and errors
    #[arg(short, long)]
    pub quiet: bool,
}

/// Parses a flag whose value is a count of at least 1.
///
/// # Errors
/// If `text` is not a whole number of at least 1.
pub fn at_least_1(text: &str) -> Result<NonZeroUsize, String> {
    text.parse().map_err(|_| "expected a whole number of at least 1".to_owned())
}

impl StageArgs {
    /// [`out_dir::prepare`] with these flags.
    ///
    /// # Errors
    /// As [`out_dir::prepare`].
    pub fn prepare_out(&self, inputs: &[&Path]) -> Result<(), OutDirError> {
        out_dir::prepare(&self.out, self.resume, self.overwrite, inputs)
    }
}

impl RuntimeArgs {
    /// Which implementation of the model's operations to use.
    pub const fn kernels(&self) -> Kernels {
        self.kernels
    }

    /// Opens the device, without autodiff.
    ///
    /// # Errors
    /// As [`Runtime::open`].
    pub fn open(&self) -> Result<Runtime, BackendError> {
        Runtime::open(&self.backend, self.kernels, self.precision)
    }

    /// Runs a command's work: logging and threads are set up before.
    ///
    /// # Errors
    /// As [`start`](Self::start) and `work`.
    pub fn run(&self, work: impl FnOnce() -> anyhow::Result<()> + Send) -> anyhow::Result<()> {
        self.start()?;
        runtime::on_pool(work)
    }

    /// Starts logging and sets the number of threads and the policy for freed memory: the first thing a command does.
    ///
    /// # Errors
    /// If the thread pool runs already with another number of threads.
    pub fn start(&self) -> Result<(), ThreadsError> {
        memory::keep_freed();
        logging::init(self.verbose, self.quiet);
        runtime::set_threads(self.threads)
    }
}

/// Reads the command line; `--backend list`, wherever it stands, prints the backends instead and ends the program.
pub fn parse<C: Parser>() -> C {
    if asks_for_backends(std::env::args_os().skip(1)) {
        logging::init(0, true);
        // Nothing is left to try if stdout is gone.
        let _ = std::io::stdout().write_all(backend::table().as_bytes());
        std::process::exit(0);
    }
    C::parse()
}

fn asks_for_backends(args: impl Iterator<Item = OsString>) -> bool {
    let args: Vec<OsString> = args.take_while(|arg| arg != "--").collect();
    args.iter().any(|arg| arg == "--backend=list") || args.windows(2).any(|pair| pair == ["--backend", "list"])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        stage: StageArgs,
    }

    fn parse(flags: &[&str]) -> Result<StageArgs, clap::Error> {
        let base = ["sft", "--config", "c.toml", "--out", "o"];
        Cli::try_parse_from(base.iter().chain(flags)).map(|cli| cli.stage)
    }

    #[test]
    fn flags_parse_with_their_defaults() {
        let args = parse(&[]).expect("valid");
        assert_eq!(args.runtime.backend, crate::backend::DEFAULT);
        assert!(!args.resume && !args.overwrite && args.runtime.kernels() == Kernels::Fused);
        let flags =
            ["--set", "a.b=1", "--set", "c=d", "--threads", "2", "--kernels", "plain", "-vv", "--backend", "wgpu:1"];
        let args = parse(&flags).expect("valid");
        assert_eq!(args.overrides, ["a.b=1", "c=d"]);
        assert_eq!(args.runtime.threads.map(NonZeroUsize::get), Some(2));
        assert_eq!((args.runtime.kernels(), args.runtime.verbose), (Kernels::Plain, 2));
    }

    #[test]
    fn the_list_of_backends_is_asked_for_anywhere_before_a_double_dash() {
        let asks = |args: &[&str]| asks_for_backends(args.iter().map(OsString::from));
        assert!(asks(&["train", "--backend", "list"]) && asks(&["--backend=list"]));
        assert!(!asks(&["--backend", "flex", "list"]) && !asks(&["--", "--backend", "list"]) && !asks(&[]));
    }

    #[test]
    fn contradictory_flags_are_wrong_usage() {
        for flags in [&["--resume", "--overwrite"][..], &["-v", "-q"], &["--threads", "0"], &["--kernels", "fast"]] {
            assert_eq!(parse(flags).expect_err("refused").exit_code(), 2, "{flags:?}");
        }
    }
}
