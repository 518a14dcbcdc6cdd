//! What every command line does the same way: flags, logging, threads, Ctrl-C, the output directory, the exit code.
//!
//! Exit codes: 0 done (also after Ctrl-C, once the step is saved), 1 failed, 2 wrong usage, 130 stopped at once by a
//! second Ctrl-C. *Wrong usage* is what the command line alone gets wrong (clap, or [`UsageError`]); a directory that
//! is not empty or holds nothing to resume is the state of the disk, so that is 1.

use std::ffi::OsString;
use std::io::Write;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::Device;
use clap::{ArgAction, Args, Parser};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::{FmtContext, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

use crate::backend::{self, BackendError};
use crate::kernels::{Kernels, Precision, memory};
use crate::metrics::bars;

/// The flags of every command that trains.
#[derive(Debug, Clone, Args)]
pub struct StageArgs {
    /// What to do, as TOML
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

    /// On what to run
    #[command(flatten)]
    pub runtime: RuntimeArgs,
}

/// The flags of every command: on what it runs and how much it says.
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

/// Reads a flag that counts something there must be at least one of.
///
/// # Errors
/// If `text` is no such number.
pub fn at_least_1(text: &str) -> Result<NonZeroUsize, String> {
    text.parse().map_err(|_| "expected a whole number of at least 1".to_owned())
}

impl StageArgs {
    /// [`prepare_out`] with these flags.
    ///
    /// # Errors
    /// As [`prepare_out`].
    pub fn prepare_out(&self, inputs: &[&Path]) -> Result<(), StageError> {
        prepare_out(&self.out, self.resume, self.overwrite, inputs)
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
    /// As [`backend::open`], and if the device cannot compute in the precision asked for.
    pub fn open(&self) -> Result<Device, BackendError> {
        let device = backend::open(&self.backend)?;
        backend::check_precision(&self.backend, &device, self.precision)?;
        Ok(device)
    }

    /// The backend as a checkpoint records it: as given, with the adapter found, and the precision unless it is f32.
    pub fn backend_label(&self, device: &Device) -> String {
        let label = backend::label(&self.backend, device);
        if self.precision == Precision::F32 { label } else { format!("{label}, {}", self.precision.name()) }
    }

    /// Starts logging and sets the number of threads and what becomes of freed memory: what `main` does first.
    ///
    /// # Errors
    /// If the thread pool runs already with another number of threads.
    pub fn start(&self) -> Result<(), StageError> {
        memory::keep_freed();
        init_logging(self.verbose, self.quiet);
        set_threads(self.threads)
    }
}

/// Reads the command line; `--backend list`, wherever it stands, prints the backends instead and ends the program.
pub fn parse<C: Parser>() -> C {
    if asks_for_backends(std::env::args_os().skip(1)) {
        init_logging(0, true);
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

/// Runs `work` on a thread of the pool that everything computes on.
///
/// An operation that starts outside of the pool puts its thread to sleep and wakes another, hundreds of times a step;
/// one that starts inside begins at once, and the other threads join in.
pub fn on_pool<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    rayon::scope(|_| work())
}

/// Sends log messages to stderr, above the progress bars.
///
/// `verbose` counts `-v`. The variable `RUST_LOG` goes before both flags. A second call does nothing.
pub fn init_logging(verbose: u8, quiet: bool) {
    let level = match (quiet, verbose) {
        (true, _) => "warn",
        (false, 0) => "info",
        (false, 1) => "debug",
        (false, _) => "trace",
    };
    // Our crates at the level asked for; the GPU libraries would say a lot at `info`.
    let ours = ["common", "pretrain", "sft", "reward_model", "ppo", "chat", "recipe"];
    let default = ours.map(|name| format!("{name}={level}")).join(",") + if verbose > 1 { ",info" } else { ",warn" };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(AboveBars).event_format(Plain);
    // An error means that logging was set up before, by a test or by the recipe that runs this stage.
    let _ = subscriber.try_init();
}

/// Sets the number of threads of everything that computes on the CPU: our kernels and Burn's flex backend.
///
/// `None` takes one for each core. `ndarray` multiplies matrices with threads of its own, which only the variable
/// `MATMUL_NUM_THREADS` counts.
///
/// # Errors
/// If the pool runs already with another number of threads.
pub fn set_threads(threads: Option<NonZeroUsize>) -> Result<(), StageError> {
    /// As large as that of the main thread, whose work [`on_pool`] hands over.
    const STACK: usize = 8 << 20;
    // 0 is one for each core.
    let wanted = threads.map_or(0, NonZeroUsize::get);
    let built = rayon::ThreadPoolBuilder::new().num_threads(wanted).stack_size(STACK).build_global();
    if built.is_err() && wanted != 0 && rayon::current_num_threads() != wanted {
        return Err(StageError::Threads { wanted, running: rayon::current_num_threads() });
    }
    Ok(())
}

/// The number of threads of everything that computes on the CPU.
pub fn n_threads() -> usize {
    rayon::current_num_threads()
}

/// Whether the user asked to stop. The first Ctrl-C or SIGTERM is noted, so that the step can be finished and saved;
/// the second ends the program at once, with exit code 130.
#[derive(Debug, Clone, Copy)]
pub struct Interrupt {
    flag: &'static AtomicBool,
}

static STOP: AtomicBool = AtomicBool::new(false);
static NEVER: AtomicBool = AtomicBool::new(false);

impl Interrupt {
    /// Catches the signals from now on. Every call gives the same flag, so that stages run in turn see one request.
    ///
    /// # Errors
    /// If the system refuses the handler.
    pub fn install() -> Result<Self, StageError> {
        static INSTALLED: std::sync::Mutex<bool> = std::sync::Mutex::new(false);
        let mut installed = INSTALLED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if !*installed {
            ctrlc::set_handler(|| {
                if STOP.swap(true, Ordering::SeqCst) {
                    std::process::exit(130);
                }
                tracing::warn!("finishing the step, then saving; press Ctrl-C again to stop at once");
            })
            .map_err(|source| StageError::Signals { source })?;
            *installed = true;
        }
        Ok(Self { flag: &STOP })
    }

    /// One that nobody triggers, for tests and for callers that handle signals themselves.
    pub fn never() -> Self {
        Self { flag: &NEVER }
    }

    /// Whether to finish the step, save and return.
    pub fn requested(&self) -> bool {
        self.flag.load(Ordering::SeqCst)
    }
}

/// Wrong usage that clap cannot see, such as flags that depend on another's value: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// Prints what went wrong, if anything did, and gives the exit code.
///
/// The chain becomes `error: outer: inner`; the lines `hint: …` of all its errors follow.
pub fn report(result: anyhow::Result<()>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    let text = error_text(&error);
    // Nothing is left to try if stderr itself is gone.
    let _ = bars().suspend(|| writeln!(std::io::stderr(), "{text}"));
    ExitCode::from(if error.chain().any(<dyn std::error::Error>::is::<UsageError>) { 2 } else { 1 })
}

/// The error chain on one line where it fits, hints last.
fn error_text(error: &anyhow::Error) -> String {
    let mut text = String::from("error: ");
    let mut hints = Vec::new();
    let mut outer = String::new();
    for cause in error.chain() {
        let full = cause.to_string();
        let mut message = Vec::new();
        for line in full.lines() {
            match line.strip_prefix("hint: ") {
                Some(hint) if !hints.contains(&hint.to_owned()) => hints.push(hint.to_owned()),
                Some(_) => {}
                None => message.push(line),
            }
        }
        let message = message.join("\n");
        // Many errors print their source themselves.
        if outer.ends_with(&message) {
            continue;
        }
        if !outer.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&message);
        outer = message;
    }
    for hint in hints {
        text.push_str("\nhint: ");
        text.push_str(&hint);
    }
    text
}

/// The names that a run or a tokenizer writes: a directory of these alone is ours.
const OUR_FILES: [&str; 17] = [
    "config.toml",
    "manifest.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "metrics.jsonl",
    "samples.jsonl",
    "rollouts.jsonl",
    "report.html",
    "report.json",
    "compare.json",
    "compare.md",
    "state",
    "value",
    "data",
];

/// Makes `out` ready to be written to: it exists and is empty, or with `resume` holds a checkpoint.
///
/// `overwrite` empties it, but only if it is ours: it has a `manifest.json`, or nothing but files that a run or a
/// tokenizer writes, `config.toml` or `tokenizer.json` among them. Read the config first, because it may lie in `out`.
///
/// # Errors
/// If `out` is not empty and neither flag is given, there is nothing to resume, it is not ours to overwrite, or one
/// of `inputs` (checkpoints, data, the tokenizer) lies in what would be deleted.
pub fn prepare_out(out: &Path, resume: bool, overwrite: bool, inputs: &[&Path]) -> Result<(), StageError> {
    let failed = |source| StageError::Io { path: out.to_owned(), source };
    if resume {
        return if out.join("manifest.json").is_file() {
            Ok(())
        } else {
            Err(StageError::NothingToResume { out: out.to_owned() })
        };
    }
    if out.exists() && !out.is_dir() {
        return Err(StageError::NotADirectory { out: out.to_owned() });
    }
    let entries = entry_names(out).map_err(failed)?;
    if entries.is_empty() {
        return std::fs::create_dir_all(out).map_err(failed);
    }
    if !overwrite {
        return Err(StageError::NotEmpty { out: out.to_owned() });
    }
    let has = |name: &str| entries.iter().any(|entry| entry == name);
    let only_ours = entries.iter().all(|entry| OUR_FILES.contains(&entry.as_str()));
    if !(has("manifest.json") || only_ours && (has("config.toml") || has("tokenizer.json"))) {
        return Err(StageError::NotOurs { out: out.to_owned() });
    }
    let target = out.canonicalize().map_err(failed)?;
    for input in inputs {
        if input.canonicalize().is_ok_and(|input| input.starts_with(&target)) {
            return Err(StageError::InputInside { out: out.to_owned(), input: (*input).to_owned() });
        }
    }
    for entry in entries {
        let path = target.join(entry);
        let is_dir = path.symlink_metadata().map_err(failed)?.is_dir();
        if is_dir { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) }.map_err(failed)?;
    }
    Ok(())
}

fn entry_names(dir: &Path) -> std::io::Result<Vec<String>> {
    if !dir.exists() {
        return Ok(Vec::new());
    }
    std::fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

/// Why a stage cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StageError {
    /// `--out` holds something.
    #[error(
        "output directory `{}` is not empty\nhint: pass `--resume` to go on from it, `--overwrite` to replace it, or another `--out`",
        out.display()
    )]
    NotEmpty {
        /// The directory.
        out: PathBuf,
    },
    /// `--out` is a file.
    #[error("output directory `{}` is a file", out.display())]
    NotADirectory {
        /// The file.
        out: PathBuf,
    },
    /// `--resume` without a checkpoint.
    #[error(
        "nothing to resume: `{}` holds no checkpoint\nhint: start without `--resume`; add `--overwrite` if an earlier run stopped before its first save",
        out.display()
    )]
    NothingToResume {
        /// The directory.
        out: PathBuf,
    },
    /// `--overwrite` on a directory that no run of ours wrote.
    #[error(
        "refusing to overwrite `{}`: it was not written by this program\nhint: pass an empty `--out`, or delete the directory yourself",
        out.display()
    )]
    NotOurs {
        /// The directory.
        out: PathBuf,
    },
    /// `--overwrite` would delete what the run reads.
    #[error("refusing to overwrite `{}`: the input `{}` lies in it\nhint: pass another `--out`", out.display(), input.display())]
    InputInside {
        /// The directory.
        out: PathBuf,
        /// What would be lost.
        input: PathBuf,
    },
    /// The disk says no.
    #[error("failed to prepare the output directory `{}`: {source}", path.display())]
    Io {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The pool cannot change its size any more.
    #[error("cannot use {wanted} threads: {running} are running already")]
    Threads {
        /// Asked for.
        wanted: usize,
        /// Running.
        running: usize,
    },
    /// The system refused the handler.
    #[error("failed to catch Ctrl-C: {source}")]
    Signals {
        /// Why.
        source: ctrlc::Error,
    },
}

/// stderr, written to while the bars step aside.
#[derive(Clone, Copy)]
struct AboveBars;

impl Write for AboveBars {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        bars().suspend(|| std::io::stderr().write(bytes))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        std::io::stderr().flush()
    }
}

impl MakeWriter<'_> for AboveBars {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        *self
    }
}

/// A message as a person wrote it; its level only where it is not `info`, in the style of the error line.
struct Plain;

impl<S, N> FormatEvent<S, N> for Plain
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &tracing::Event<'_>,
    ) -> std::fmt::Result {
        match *event.metadata().level() {
            tracing::Level::ERROR => writer.write_str("error: ")?,
            tracing::Level::WARN => writer.write_str("warning: ")?,
            tracing::Level::INFO => {}
            level => write!(writer, "{} {}: ", level.as_str().to_lowercase(), event.metadata().target())?,
        }
        context.field_format().format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

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

    #[test]
    fn a_chain_is_one_line_and_its_hints_come_last() {
        let inner = anyhow::anyhow!("file is short\nhint: copy it again");
        let error = inner.context("failed to load `a`\nhint: pass another").context("failed to start");
        assert_eq!(
            error_text(&error),
            "error: failed to start: failed to load `a`: file is short\nhint: pass another\nhint: copy it again"
        );
    }

    #[test]
    fn a_source_that_the_outer_message_repeats_is_not_said_twice() {
        let missing = std::fs::read("/does/not/exist").expect_err("missing");
        let reason = missing.to_string();
        let error = StageError::Io { path: "o".into(), source: missing };
        assert_eq!(error_text(&error.into()), format!("error: failed to prepare the output directory `o`: {reason}"));
    }

    #[test]
    fn exit_codes_tell_wrong_usage_from_failure() {
        let code = |code: ExitCode| format!("{code:?}");
        assert_eq!(code(report(Ok(()))), code(ExitCode::SUCCESS));
        assert_eq!(code(report(Err(anyhow::anyhow!("failed")))), code(ExitCode::from(1)));
        let usage = Err(UsageError("`--ids` and `--data`".into())).context("outer");
        assert_eq!(code(report(usage)), code(ExitCode::from(2)));
    }

    #[test]
    fn out_must_be_empty_or_named_for_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let out = dir.path().join("runs/sft");
        prepare_out(&out, false, false, &[]).expect("made");
        prepare_out(&out, false, false, &[]).expect("still empty");
        let nothing = prepare_out(&out, true, false, &[]).expect_err("no checkpoint");
        assert!(matches!(nothing, StageError::NothingToResume { .. }));
        std::fs::write(out.join("config.toml"), "").expect("written");
        assert!(matches!(prepare_out(&out, false, false, &[]), Err(StageError::NotEmpty { .. })));
        std::fs::write(out.join("manifest.json"), "{}").expect("written");
        prepare_out(&out, true, false, &[]).expect("a checkpoint");
        assert!(matches!(prepare_out(&out, false, true, &[&out]), Err(StageError::InputInside { .. })));
        prepare_out(&out, false, true, &[dir.path()]).expect("ours");
        assert_eq!(entry_names(&out).expect("there").len(), 0);
    }

    #[test]
    fn overwrite_refuses_a_directory_that_is_not_ours() {
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::write(dir.path().join("thesis.tex"), "").expect("written");
        assert!(matches!(prepare_out(dir.path(), false, true, &[]), Err(StageError::NotOurs { .. })));
        std::fs::write(dir.path().join("config.toml"), "").expect("written");
        assert!(matches!(prepare_out(dir.path(), false, true, &[]), Err(StageError::NotOurs { .. })));
        assert!(dir.path().join("thesis.tex").exists());
        std::fs::remove_file(dir.path().join("thesis.tex")).expect("removed");
        prepare_out(dir.path(), false, true, &[]).expect("a run stopped before its first save");
        let file = dir.path().join("file");
        std::fs::write(&file, "").expect("written");
        assert!(matches!(prepare_out(&file, false, true, &[]), Err(StageError::NotADirectory { .. })));
    }
}
