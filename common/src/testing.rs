//! What tests of several crates share (feature `testing`).

use std::path::{Path, PathBuf};
use std::process::Command;

use burn::tensor::Device;

use crate::checkpoint::{self, Manifest, Snapshot, Stage, Weights};
use crate::model::{Gpt, GptConfig, ScalarGpt};
use crate::rng::Streams;
use crate::tokenizer::{Tokenizer, TokenizerConfig, TokenizerKind};

/// The file or folder `relative` to the folder `shared` beside the workspace, which holds real data and recorded numbers.
///
/// Says on stderr that the test is skipped, and returns `None`, where there is none.
pub fn shared(relative: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared").join(relative);
    if path.exists() {
        return Some(path);
    }
    #[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
    {
        eprintln!("skipped: there is no `{}`", path.display());
    }
    None
}

/// Checks that two slices have equal lengths and that no two numbers differ by more than `tolerance`.
///
/// # Panics
/// If not, with the place and the numbers of the largest difference.
#[track_caller]
pub fn assert_close(actual: &[f32], expected: &[f32], tolerance: f32) {
    assert_eq!(actual.len(), expected.len(), "lengths differ");
    // `total_cmp` puts NaN above every number, so it is found too.
    let difference = |i: &usize| (actual[*i] - expected[*i]).abs();
    let worst =
        (0..actual.len()).filter(|&i| actual[i] != expected[i]).max_by(|a, b| difference(a).total_cmp(&difference(b)));
    if let Some(i) = worst {
        assert!(
            difference(&i) <= tolerance,
            "at {i}: found {}, expected {}, difference {} > {tolerance}",
            actual[i],
            expected[i],
            difference(&i)
        );
    }
}

/// Compares `actual` with the committed text at `path`; writes it there where the variable `UPDATE_SNAPSHOTS` is `1`.
///
/// # Panics
/// If they differ, with both texts.
#[track_caller]
pub fn assert_snapshot(path: &Path, actual: &str) {
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some_and(|value| value == "1") {
        let dir = path.parent().expect("a snapshot lies in a directory");
        std::fs::create_dir_all(dir).and_then(|()| std::fs::write(path, actual)).expect("the snapshot can be written");
        return;
    }
    let expected = std::fs::read_to_string(path).unwrap_or_default();
    assert!(
        actual == expected,
        "`{}` differs; if this is intended, renew it with UPDATE_SNAPSHOTS=1\n--- expected\n{expected}--- found\n{actual}---",
        path.display()
    );
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

/// Runs a program and returns its exit code, stdout and stderr, in which `dir` is written as `DIR`.
///
/// # Panics
/// If the program cannot be started or writes no UTF-8.
pub fn run(program: &str, args: &[&str], dir: &Path) -> (i32, String, String) {
    let output = Command::new(program)
        .args(args)
        .current_dir(dir)
        .env("COLUMNS", "100")
        .env_remove("RUST_LOG")
        .env_remove("RUST_BACKTRACE")
        .env_remove("KINDLING_DATA")
        .output()
        .expect("the program starts");
    let text = |bytes| {
        let text = String::from_utf8(bytes).expect("programs write UTF-8");
        text.replace(&dir.display().to_string(), "DIR")
    };
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_slices_are_close() {
        assert_close(&[1.0, f32::INFINITY], &[1.0, f32::INFINITY], 0.0);
        assert_close(&[1.0], &[1.25], 0.25);
    }

    #[test]
    #[should_panic(expected = "at 1")]
    fn nan_is_close_to_nothing() {
        assert_close(&[1.0, f32::NAN], &[1.0, 2.0], 1.0);
    }
}
