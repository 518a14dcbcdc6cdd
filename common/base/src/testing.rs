//! Helpers for the tests of several crates (feature `testing`).

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The file or folder `relative` to the folder `shared` beside the workspace, which holds real data and recorded numbers.
///
/// Says on stderr that the test is skipped, and returns `None`, where there is none.
pub fn shared(relative: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared").join(relative);
    if path.exists() {
        return Some(path);
    }
    #[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
    {
        eprintln!("skipped: there is no `{}`", path.display());
    }
    None
}

/// Python, from the variable `KINDLING_PYTHON` or the path, if it has `module`; else says on stderr that the test is skipped.
pub fn python_with(module: &str) -> Option<Command> {
    let python = std::env::var_os("KINDLING_PYTHON").unwrap_or_else(|| "python3".into());
    let has = Command::new(&python).args(["-c", &format!("import {module}")]).stderr(Stdio::null()).status();
    if has.is_ok_and(|status| status.success()) {
        return Some(Command::new(python));
    }
    #[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
    {
        let shown = Path::new(&python).display();
        eprintln!("skipped: `{shown}` has no `{module}` (KINDLING_PYTHON names another Python)");
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
/// All that `insta` or `snapbox` would be used for here: one text a file, reviewed as a diff of git.
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
