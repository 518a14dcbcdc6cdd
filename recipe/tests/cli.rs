//! The command line from outside: help, errors, what is printed where. Set `UPDATE_SNAPSHOTS` to rewrite the expected
//! texts in `snapshots/`.

#![allow(clippy::unwrap_used, reason = "a test that unwraps fails with the error in its message")]

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;

struct Ran {
    stdout: String,
    stderr: String,
    code: i32,
}

/// Runs `recipe` in `dir`, which is called `DIR` in what it says.
fn recipe(dir: &Path, args: &[&str]) -> Ran {
    let output = Command::new(env!("CARGO_BIN_EXE_recipe"))
        .args(args)
        .current_dir(dir)
        .env("COLUMNS", "100")
        .env_remove("KINDLING_DATA")
        .env_remove("RUST_LOG")
        .env_remove("RUST_BACKTRACE")
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().replace(&dir.display().to_string(), "DIR");
    Ran { stdout: text(output.stdout), stderr: text(output.stderr), code: output.status.code().unwrap() }
}

#[track_caller]
fn assert_snapshot(name: &str, found: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots").join(name);
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        fs::write(&path, found).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(found, expected, "differs from `{}`", path.display());
}

#[test]
fn help_has_an_example_and_version_a_number() {
    let dir = tempfile::tempdir().unwrap();
    for (name, args) in [
        ("help.txt", vec!["--help"]),
        ("run-help.txt", vec!["run", "--help"]),
        ("world-help.txt", vec!["world", "--help"]),
    ] {
        let ran = recipe(dir.path(), &args);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        assert!(ran.stdout.contains("Example:"), "{}", ran.stdout);
        assert_snapshot(name, &ran.stdout);
    }
    assert_eq!(recipe(dir.path(), &["--version"]).stdout, format!("recipe {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn errors_say_what_was_found_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    file("empty/recipe.toml", "");
    file("typo/recipe.toml", "seed = 1\n[evalute]\nprompts = \"p\"\n");
    file("data/recipe.toml", "[evaluate]\nprompts = \"$DATA/p.jsonl\"\n");
    file("judge/recipe.toml", "[collect]\nprompts = \"p.jsonl\"\n");
    file("world/recipe.toml", "[world]\nstories = 10\n");
    file("lexicon/recipe.toml", "stages = [\"pretrain\"]\n[gold]\nkind = \"lexicon\"\nwords = \"no.json\"\n");
    file("filled/notes.txt", "mine");
    file("filled-world/notes.txt", "mine");
    fs::create_dir(dir.path().join("nothing")).unwrap();
    let mut text = String::new();
    for (args, code) in [
        (&["run", "no-such", "--out", "o"][..], 1),
        (&["run", "nothing", "--out", "o"], 1),
        (&["run", "typo", "--out", "o"], 1),
        (&["run", "data", "--out", "o"], 1),
        (&["run", "judge", "--out", "o"], 1),
        (&["run", "lexicon", "--out", "o"], 1),
        (&["run", "world", "--out", "o", "--data", "d"], 1),
        (&["run", "empty", "--out", "filled"], 1),
        (&["run", "empty", "--out", "o", "--stages", "world"], 1),
        (&["run", "empty", "--out", "o", "--stages", "pretrian"], 2),
        (&["run", "empty", "--out", "o", "--set", "train.steps=3"], 2),
        (&["run", "empty", "--out", "o", "--set", "recipe.sede=3"], 1),
        (&["run", "empty", "--out", "o"], 1),
        (&["run", "empty"], 2),
        (&["world", "--out", "filled-world"], 1),
        (&["world", "--out", "w", "--stories", "0"], 1),
    ] {
        let ran = recipe(dir.path(), args);
        assert_eq!((ran.code, ran.stdout.as_str()), (code, ""), "{args:?}: {}", ran.stderr);
        assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
        writeln!(text, "$ recipe {}\n{}", args.join(" "), ran.stderr).unwrap();
    }
    assert_snapshot("errors.txt", &text);
    assert_eq!(fs::read_to_string(dir.path().join("filled/notes.txt")).unwrap(), "mine");
}

#[test]
fn a_world_is_written_as_files_and_described_on_stdout() {
    let dir = tempfile::tempdir().unwrap();
    let ran = recipe(dir.path(), &["world", "--out", "w", "--seed", "5", "--stories", "240"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let summary: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(summary["files"].as_array().unwrap().len(), fs::read_dir(dir.path().join("w")).unwrap().count());
    let again = recipe(dir.path(), &["world", "--out", "w", "--seed", "5", "--stories", "240", "--overwrite"]);
    assert_eq!((again.code, again.stdout), (0, ran.stdout));
}
