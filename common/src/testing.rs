//! Helpers for the tests of several crates (feature `testing`).

use std::path::Path;
use std::process::Command;
#[cfg(unix)]
use std::time::{Duration, Instant};

pub use base::testing::{assert_close, assert_snapshot, python_with, run, shared};
use burn::tensor::Device;

use crate::checkpoint::{self, Manifest, Snapshot, Stage, Weights};
use crate::model::{Gpt, GptConfig, ScalarGpt};
use crate::rng::Streams;
use crate::tokenizer::{Tokenizer, TokenizerConfig, TokenizerKind};

/// A command that runs another in its terminal and tells [`exit_code_in`] how that ended, also once the terminal is closed.
#[cfg(unix)]
pub fn outliving(program: &Path, args: &[impl AsRef<str>]) -> Command {
    // A terminal of tests has no size of its own. The outer shell leads the session: the system tells it alone that the
    // terminal is closed, and everyone else as it dies of that.
    const SCRIPT: &str =
        r#"stty rows 40 columns 130; echo $$ > group; sh -c 'trap : HUP; "$@"; echo $? > new; mv new code' sh "$@"; :"#;
    let mut command = Command::new("sh");
    command.args(["-c", SCRIPT, "sh"]).arg(program).args(args.iter().map(AsRef::as_ref)).env("TERM", "xterm");
    command
}

/// The exit code of what [`outliving`] ran in `dir`. A program that does not end in time is killed: there is none.
///
/// # Panics
/// If nothing was run there.
#[cfg(unix)]
pub fn exit_code_in(dir: &Path, in_time: Duration) -> Option<i32> {
    let began = Instant::now();
    while began.elapsed() < in_time {
        if let Ok(code) = std::fs::read_to_string(dir.join("code")) {
            return code.trim().parse().ok();
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let group = std::fs::read_to_string(dir.join("group")).expect("the program was started");
    // It may have ended just now.
    let _ = Command::new("kill").args(["-9", "--", &format!("-{}", group.trim())]).status();
    None
}

/// Whether programs can be started together; says why not.
pub fn has_mpirun() -> bool {
    let reason = if cfg!(not(feature = "mpi")) {
        "the feature `mpi` is off"
    } else if Command::new("mpirun").arg("--version").output().is_err() {
        "there is no `mpirun`"
    } else {
        return true;
    };
    println!("skipped: {reason}");
    false
}

/// `mpirun` with more processes than cores, as root in a container, where one process may not read another's memory.
pub fn mpirun() -> Command {
    let mut command = Command::new("mpirun");
    command.args(["--oversubscribe", "--bind-to", "none"]);
    command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    command.env("OMPI_MCA_btl_vader_single_copy_mechanism", "none").env("OMPI_MCA_rmaps_base_oversubscribe", "1");
    command
}

/// A model of one small layer with a context of 64 tokens: it runs in no time and knows nothing.
pub fn tiny_config(vocab_size: usize) -> GptConfig {
    GptConfig { d_model: 16, n_layers: 1, n_heads: 2, d_ff: 32, max_seq_len: 64, ..GptConfig::gpt2(vocab_size) }
}

/// A tokenizer that needs no text.
///
/// # Panics
/// If it cannot be made.
pub fn byte_tokenizer() -> Tokenizer {
    let config = TokenizerConfig { kind: TokenizerKind::Byte, ..TokenizerConfig::default() };
    Tokenizer::train(&config, std::iter::empty::<&str>(), true).expect("bytes need no text")
}

/// Writes a checkpoint with the random weights of `seed` and [`tiny_config`]: a reward model for that stage, else a
/// language model.
///
/// # Panics
/// If it cannot be written.
pub fn save_tiny(dir: &Path, stage: Stage, tokenizer: &Tokenizer, seed: u64) {
    let streams = Streams::new(seed);
    let config = tiny_config(tokenizer.vocab_size());
    let gpt = Gpt::new(&config, &streams, &Device::flex());
    let weights = if stage == Stage::RewardModel {
        Weights::Scalar { named: ScalarGpt::new(gpt, &streams).to_named(), config, score_bias: 0.0 }
    } else {
        Weights::Lm { named: gpt.to_named(), config }
    };
    save_weights(dir, stage, tokenizer, weights);
}

/// Writes a checkpoint with the given weights.
///
/// # Panics
/// If it cannot be written.
pub fn save_weights(dir: &Path, stage: Stage, tokenizer: &Tokenizer, weights: Weights) {
    let snapshot = Snapshot {
        weights,
        manifest: Manifest::new(stage),
        tokenizer: Some(tokenizer),
        config_toml: "",
        value: None,
        state: None,
    };
    checkpoint::save(dir, &snapshot).expect("the checkpoint can be written");
}

/// Starts a program that trains into `out` and kills it (no signal it could handle) once it has saved a checkpoint.
///
/// Returns the step of the checkpoint that is left.
///
/// # Panics
/// If the program ends before, which a test prevents by asking for many steps.
pub fn kill_after_first_save(program: &str, args: &[&str], dir: &Path, out: &str) -> u64 {
    let manifest = dir.join(out).join(checkpoint::MANIFEST_FILE);
    let mut child = Command::new(program)
        .args(args)
        .current_dir(dir)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("the program starts");
    while !manifest.is_file() {
        assert_eq!(child.try_wait().expect("it can be asked"), None, "it ended before it was killed");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    child.kill().expect("it can be killed");
    assert!(!child.wait().expect("it ends").success(), "it ended before it was killed");
    let manifest = Manifest::read(&dir.join(out)).expect("a whole manifest").expect("a checkpoint of ours");
    manifest.step
}
