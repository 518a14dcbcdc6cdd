//! The flags that mean the same in every program.

use std::ffi::OsString;
use std::io::Write;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Arg, ArgAction, Args, CommandFactory, Parser};
use serde::Serialize;

use crate::backend::{self, BackendError};
use crate::checkpoint::{self, AdapterPreview, Opening};
use crate::config::{self, Configuration, PathResolver, Sources};
use crate::exit::UsageError;
use crate::group::Group;
use crate::kernels::{Kernels, Precision, TrunkPrecision, memory};
use crate::logging;
use crate::model::LoraConfig;
use crate::out_dir::{self, OutDirError};
use crate::runtime::{self, Runtime, ThreadsError};

/// The flags of every command that trains.
#[derive(Debug, Clone, Args)]
#[command(arg(print_config_flag()))]
pub struct StageArgs {
    /// Configuration file (TOML)
    #[arg(long, value_name = "FILE")]
    pub config: PathBuf,

    /// Directory for the checkpoint, the metrics and the resolved configuration
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,

    /// Continue from the checkpoint in --out
    #[arg(long, conflicts_with = "overwrite")]
    pub resume: bool,

    /// Replace an earlier run in --out
    #[arg(long)]
    pub overwrite: bool,

    /// Override a key of the configuration; VALUE is TOML, or else a string (repeatable)
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,

    /// Folder that $DATA/ stands for in the paths of the configuration [env: KINDLING_DATA]
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,

    /// Show the run on the whole terminal: curves, samples, speed, memory, time left; q leaves the view and lets the run go on
    #[arg(long)]
    pub tui: bool,

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

    /// The flags of every training command
    #[command(flatten)]
    pub stage: StageArgs,
}

/// The flags of every command that computes with a model: device, precision, threads, verbosity.
#[derive(Debug, Clone, Args)]
pub struct RuntimeArgs {
    /// Device to compute on: flex, ndarray, wgpu, vulkan, metal, cuda or cpu, with :INDEX if there are several; `list`
    /// lists those available
    #[arg(long, value_name = "NAME[:INDEX]", default_value = "flex")]
    pub backend: String,

    /// Floating-point type of the model's computations; weights and optimiser state stay in f32
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    pub precision: Precision,

    /// Floating-point type in which the matrices of weights that are not trained lie in memory: all where nothing is trained,
    /// and those beside the adapters of [lora]
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    pub trunk: TrunkPrecision,

    /// Base of the adapters that are given, in place of the one that each names
    #[arg(long, value_name = "DIR")]
    base: Option<PathBuf>,

    /// Our own fused kernels where the backend has them, or plain tensor operations
    #[arg(long, value_name = "KIND", default_value = "fused")]
    kernels: Kernels,

    /// Threads and verbosity
    #[command(flatten)]
    pub process: ProcessArgs,
}

/// The flags of every command: threads and verbosity.
#[derive(Debug, Clone, Args)]
pub struct ProcessArgs {
    /// CPU threads [default: one per core]
    #[arg(long, value_name = "N", value_parser = threads)]
    pub threads: Option<NonZeroUsize>,

    /// Log more (-vv: everything)
    #[arg(short, long, action = ArgAction::Count, conflicts_with = "quiet")]
    pub verbose: u8,

    /// Log warnings and errors only
    #[arg(short, long)]
    pub quiet: bool,
}

/// The largest count that a flag takes: sums and products of a few such counts stay within 64 bits.
const MAX_COUNT: usize = 1_000_000_000;

/// More threads than any machine has cores for.
const MAX_THREADS: usize = 1024;

/// Parses a flag whose value is a count of at least 1.
///
/// # Errors
/// If `text` is not a whole number from 1 to 1,000,000,000.
pub fn at_least_1(text: &str) -> Result<NonZeroUsize, String> {
    count_up_to(MAX_COUNT, text)
}

fn threads(text: &str) -> Result<NonZeroUsize, String> {
    count_up_to(MAX_THREADS, text)
}

fn count_up_to(max: usize, text: &str) -> Result<NonZeroUsize, String> {
    let count = text.parse().ok().filter(|count: &NonZeroUsize| count.get() <= max);
    count.ok_or_else(|| format!("expected a whole number from 1 to {max}"))
}

impl StageArgs {
    /// [`out_dir::prepare`] with these flags.
    ///
    /// # Errors
    /// As [`out_dir::prepare`].
    pub fn prepare_out(&self, inputs: &[&Path]) -> Result<(), OutDirError> {
        out_dir::prepare(&self.out, self.resume, self.overwrite, inputs)
    }

    /// How an interrupted run is continued exactly: with the floating-point types it computed with.
    pub fn how_to_continue(&self) -> String {
        let RuntimeArgs { precision, trunk, .. } = self.runtime;
        let mut flags = "--resume".to_owned();
        if precision != Precision::F32 {
            flags += &format!(" --precision {}", precision.name());
        }
        if trunk != TrunkPrecision::F32 {
            flags += &format!(" --trunk {}", trunk.name());
        }
        format!("continue with `{flags}`")
    }

    /// [`RuntimeArgs::check_base`] for a command that starts from `dirs`, or goes on from what is in `--out`.
    ///
    /// # Errors
    /// As there.
    pub fn check_base<'a>(&'a self, dirs: impl IntoIterator<Item = &'a Path>) -> Result<(), UsageError> {
        let own = self.resume.then_some(self.out.as_path()).filter(|out| out.is_dir());
        self.runtime.check_base(dirs.into_iter().chain(own))
    }
}

impl RuntimeArgs {
    /// Which implementation of the model's operations to use.
    pub const fn kernels(&self) -> Kernels {
        self.kernels
    }

    /// Directory of the base of adapters, in place of the one that each names.
    pub fn base(&self) -> Option<&Path> {
        self.base.as_deref()
    }

    /// How checkpoints are opened.
    pub fn opening(&self) -> Opening<'_> {
        Opening { base: self.base(), trunk: self.trunk }
    }

    /// Refuses a trunk in bf16 where all weights are trained, that is, without `lora`.
    ///
    /// # Errors
    /// [`UsageError`].
    pub fn check_trunk(&self, lora: Option<&LoraConfig>) -> Result<(), UsageError> {
        if self.trunk == TrunkPrecision::F32 || lora.is_some() {
            return Ok(());
        }
        Err(UsageError(
            "`--trunk bf16` is for weights that are not trained, and here all are\nhint: leave it out, or train adapters \
             beside them, with a section `[lora]`"
                .to_owned(),
        ))
    }

    /// Refuses `--base` where none of the checkpoints in `dirs`, all that are given, is an adapter.
    ///
    /// # Errors
    /// [`UsageError`].
    pub fn check_base<'a>(&self, dirs: impl IntoIterator<Item = &'a Path>) -> Result<(), UsageError> {
        let Some(base) = self.base() else { return Ok(()) };
        let dirs: Vec<&Path> = dirs.into_iter().collect();
        // One that is not there is named where it is loaded.
        if dirs.iter().any(|dir| !dir.is_dir() || checkpoint::is_adapter(dir)) {
            return Ok(());
        }
        let names: Vec<String> = dirs.iter().map(|dir| format!("`{}`", dir.display())).collect();
        let found = match &*names {
            [] => "no checkpoint is given".to_owned(),
            [one] => format!("{one} is none: all of its weights are its own"),
            several => format!("none is given: the weights of {} are their own", several.join(", ")),
        };
        Err(UsageError(format!(
            "`--base {}` says where the base of an adapter lies, but {found}\nhint: leave out `--base`",
            base.display()
        )))
    }

    /// These flags for the checkpoints in `dirs`, which were written by the program itself: `--base` counts only where one
    /// is an adapter whose base is no longer where it says.
    #[must_use]
    pub fn among_own<'a>(&self, dirs: impl IntoIterator<Item = &'a Path>) -> Self {
        let base = self.base.clone().filter(|_| dirs.into_iter().any(AdapterPreview::lacks_base));
        Self { base, ..self.clone() }
    }

    /// Opens the device, without autodiff.
    ///
    /// # Errors
    /// As [`Runtime::open`].
    pub fn open(&self) -> Result<Runtime, BackendError> {
        Runtime::open(&self.backend, self.kernels, self.precision, self.trunk)
    }

    /// Runs a command's work: logging and threads are set up before.
    ///
    /// # Errors
    /// As [`ProcessArgs::start`] and `work`.
    pub fn run(&self, work: impl FnOnce() -> anyhow::Result<()> + Send) -> anyhow::Result<()> {
        self.start()?;
        runtime::on_pool(work)
    }

    /// As [`ProcessArgs::start`].
    ///
    /// # Errors
    /// As there.
    pub fn start(&self) -> anyhow::Result<()> {
        self.process.start()
    }
}

impl ProcessArgs {
    /// Whether no progress bar is to be shown.
    pub fn hides_bars(&self) -> bool {
        self.quiet || logging::is_diverted()
    }

    /// Starts logging and sets the number of threads and the policy for freed memory: the first thing a command does that is
    /// one process.
    ///
    /// # Errors
    /// If the thread pool runs already with another number of threads, or several processes were started.
    pub fn start(&self) -> anyhow::Result<()> {
        Group::check_alone()?;
        Ok(self.start_on(true)?)
    }

    /// [`start`](Self::start) on a rank of a group, of which the first alone logs.
    ///
    /// # Errors
    /// As there.
    pub fn start_on(&self, is_first: bool) -> Result<(), ThreadsError> {
        memory::keep_freed();
        logging::init_on(is_first, self.verbose, self.quiet);
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

/// Reads the command line and carries it out with `run`, or with `print` where it says `--print-config`.
///
/// # Errors
/// As `run` and `print`.
pub fn carry_out<C: Parser>(
    run: impl FnOnce(C) -> anyhow::Result<()>,
    print: impl FnOnce(&ConfigSource) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    match ConfigSource::asked_for::<C>(std::env::args_os()) {
        Some(source) => print(&source),
        None => run(parse()),
    }
}

/// The flag `--print-config`; [`carry_out`] looks for it, and no command reads it.
pub fn print_config_flag() -> Arg {
    let help = "Print the configuration with defaults and comments, then exit; no other flag is needed";
    Arg::new("print_config").long("print-config").action(ArgAction::SetTrue).help(help)
}

/// The flag `--base` of a command that draws its weights: neither listed nor taken.
pub fn without_base(flag: Arg) -> Arg {
    let refuse = |_: &str| Err::<PathBuf, _>("this command starts from no checkpoint, so no adapter has a base");
    flag.hide(true).value_parser(refuse)
}

/// Which configuration `--print-config` is to print: a file with overrides, or the defaults with overrides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigSource {
    config: Option<PathBuf>,
    overrides: Vec<String>,
    data: Option<PathBuf>,
}

impl ConfigSource {
    /// The flags of a subcommand with `--print-config`, for which no other flag is required. Ends the program with clap's
    /// message if they are wrong.
    fn asked_for<C: CommandFactory>(args: impl Iterator<Item = OsString>) -> Option<Self> {
        let args: Vec<OsString> = args.collect();
        if !args.iter().take_while(|arg| *arg != "--").any(|arg| arg == "--print-config") {
            return None;
        }
        let command = C::command().mut_subcommands(|command| command.mut_args(|arg| arg.required(false)));
        let matches = command.get_matches_from(args);
        let (_, flags) = matches.subcommand()?;
        Some(Self {
            config: flags.get_one("config").cloned(),
            overrides: flags.get_many("overrides").into_iter().flatten().cloned().collect(),
            data: flags.get_one("data").cloned(),
        })
    }

    /// Prints the configuration to stdout. Paths of a file's configuration are made absolute, so that the output can be
    /// passed back as `--config` from anywhere; `$DATA/` stays where no data folder is given. `sources` are the paths.
    ///
    /// # Errors
    /// If the file cannot be read or does not fit `T`, or stdout is closed.
    pub fn print<T: Configuration + Default>(&self, sources: impl Fn(&mut T) -> Sources<'_>) -> anyhow::Result<()> {
        let mut config: T = match &self.config {
            Some(path) => config::load(path, &self.overrides)?,
            None => config::parse("", Path::new("the defaults"), &self.overrides)?,
        };
        if let Some(path) = &self.config {
            let resolver = PathResolver::new(path, self.data.as_deref());
            for file in sources(&mut config).into_iter().flat_map(|(_, files)| files) {
                resolver.resolve_if_known(file)?;
            }
        }
        std::io::stdout().write_all(config::print(&config).as_bytes()).context("failed to write the configuration")
    }
}

/// Prints a command's result: one line of JSON on stdout.
///
/// # Errors
/// If stdout is closed.
pub fn print_json<T: Serialize>(result: &T) -> anyhow::Result<()> {
    writeln!(std::io::stdout(), "{}", serde_json::to_string(result)?).context("failed to write the result")
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
        assert_eq!(args.runtime.process.threads.map(NonZeroUsize::get), Some(2));
        assert_eq!((args.runtime.kernels(), args.runtime.process.verbose), (Kernels::Plain, 2));
    }

    #[test]
    fn the_list_of_backends_is_asked_for_anywhere_before_a_double_dash() {
        let asks = |args: &[&str]| asks_for_backends(args.iter().map(OsString::from));
        assert!(asks(&["train", "--backend", "list"]) && asks(&["--backend=list"]));
        assert!(!asks(&["--backend", "flex", "list"]) && !asks(&["--", "--backend", "list"]) && !asks(&[]));
    }

    #[test]
    fn a_base_needs_an_adapter_that_stands_on_it() {
        let dir = tempfile::tempdir().unwrap();
        let [model, adapter, gone] = ["model", "adapter", "gone"].map(|name| dir.path().join(name));
        for made in [&model, &adapter] {
            std::fs::create_dir(made).unwrap();
        }
        std::fs::write(adapter.join("adapter_config.json"), "{}").unwrap();
        let check = |flags: &[&str], dirs: &[&PathBuf]| {
            let args = parse(&[&["--base", "b"], flags].concat()).unwrap();
            args.check_base(dirs.iter().map(|dir| &***dir)).map_err(|error| error.to_string())
        };
        let refused = |dirs: &[&PathBuf]| check(&[], dirs).unwrap_err();
        assert!(refused(&[&model]).contains("model` is none: all of its weights are its own\nhint: "));
        assert!(
            refused(&[]).contains("no checkpoint is given") && refused(&[&model, &model]).contains("none is given")
        );
        assert_eq!(check(&[], &[&model, &adapter]), Ok(()));
        assert_eq!(check(&[], &[&gone]), Ok(()), "said where it is loaded");
        let resumed = ["--out", adapter.to_str().unwrap(), "--resume"];
        let args = Cli::try_parse_from(["sft", "--config", "c", "--base", "b"].iter().chain(&resumed)).unwrap().stage;
        assert!(args.check_base([&*model]).is_ok(), "it goes on from an adapter");
        assert!(parse(&[]).unwrap().check_base([&*model]).is_ok());
    }

    #[test]
    fn contradictory_flags_are_wrong_usage() {
        for flags in [&["--resume", "--overwrite"][..], &["-v", "-q"], &["--threads", "0"], &["--kernels", "fast"]] {
            assert_eq!(parse(flags).expect_err("refused").exit_code(), 2, "{flags:?}");
        }
    }
}
