//! The command line from outside: help, errors, and what is printed where. Set `UPDATE_SNAPSHOTS` to rewrite the
//! expected texts in `snapshots/`.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use burn::tensor::Device;
use common::checkpoint::{Manifest, Snapshot, Stage, Weights, save};
use common::model::{Gpt, GptConfig, ScalarGpt};
use common::rng::Streams;
use common::testing::byte_tokenizer;
use common::tokenizer::Tokenizer;
use serde_json::Value;

struct Ran {
    stdout: String,
    stderr: String,
    code: i32,
}

/// Runs `chat` with `stdin`. The directory of checkpoints is called `DIR` in what it says.
fn chat(args: &[&str], stdin: &[u8]) -> Ran {
    let mut child = Command::new(env!("CARGO_BIN_EXE_chat"))
        .args(args)
        .current_dir(checkpoints())
        .env("COLUMNS", "100")
        .env_remove("RUST_LOG")
        .env_remove("RUST_BACKTRACE")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A program that fails at once does not read its input.
    let _ = child.stdin.take().unwrap().write_all(stdin);
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Ran { stdout: text(output.stdout), stderr: text(output.stderr), code: output.status.code().unwrap() }
}

/// What `args` print, which must succeed.
fn stdout(args: &[&str], stdin: &[u8]) -> String {
    let ran = chat(args, stdin);
    assert_eq!(ran.code, 0, "{args:?}: {}", ran.stderr);
    ran.stdout
}

#[track_caller]
fn assert_snapshot(name: &str, found: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots").join(name);
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        std::fs::write(&path, found).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(found, expected, "differs from `{}`", path.display());
}

/// A directory with the checkpoints `lm`, `reward-model`, `no-tokenizer` and `diverged`, made once.
fn checkpoints() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("chat-cli-{}", std::process::id()));
        let tokenizer = byte_tokenizer();
        let gpt = gpt(&tokenizer);
        let config = gpt.config().clone();
        let lm = |named| Weights::Lm { named, config: config.clone() };
        save_checkpoint(&dir.join("lm"), Stage::Sft, lm(gpt.to_named()), Some(&tokenizer));
        save_checkpoint(&dir.join("no-tokenizer"), Stage::Pretrain, lm(gpt.to_named()), None);
        let mut named = gpt.to_named();
        named.get_mut("head").unwrap().data.fill(f32::MAX);
        save_checkpoint(&dir.join("diverged"), Stage::Sft, lm(named), Some(&tokenizer));
        let named = ScalarGpt::new(gpt, &Streams::new(0)).to_named();
        let scalar = Weights::Scalar { named, config: config.clone(), score_bias: 0.0 };
        save_checkpoint(&dir.join("reward-model"), Stage::RewardModel, scalar, Some(&tokenizer));
        dir
    })
}

/// A model that says printable ASCII, so that what it says does not depend on how broken text is shown.
fn gpt(tokenizer: &Tokenizer) -> Gpt {
    let config = GptConfig {
        d_model: 16,
        n_layers: 1,
        n_heads: 2,
        d_ff: 32,
        max_seq_len: 96,
        tie_embeddings: false,
        ..GptConfig::gpt2(tokenizer.vocab_size())
    };
    let mut named = Gpt::new(&config, &Streams::new(4), &Device::flex()).to_named();
    let head = named.get_mut("head").unwrap();
    let mut rng = Streams::new(5).get("test", 0);
    // The final norm's offset is 1 everywhere, so a row's sum is added to its token's logit.
    for (id, row) in head.data.chunks_mut(16).enumerate() {
        let printable = tokenizer.decode(&[id as u32]).chars().all(|c| (' '..='~').contains(&c));
        let ordinary = printable && !tokenizer.is_special(id as u32);
        let shift = if ordinary { 0.0 } else { -3.0 };
        row.fill_with(|| shift + 0.5 * rng.normal() as f32);
    }
    named.get_mut("final_norm.beta").unwrap().data.fill(1.0);
    Gpt::from_named(&config, named, &Device::flex()).unwrap()
}

fn save_checkpoint(dir: &Path, stage: Stage, weights: Weights, tokenizer: Option<&Tokenizer>) {
    let manifest = Manifest::new(stage);
    save(dir, &Snapshot { weights, manifest, tokenizer, config_toml: "", value: None, state: None }).unwrap();
}

#[test]
fn help_is_as_documented() {
    for (name, args) in [("help.txt", &["--help"][..]), ("generate-help.txt", &["generate", "--help"])] {
        assert_snapshot(name, &stdout(args, b""));
    }
    assert_eq!(stdout(&["--version"], b""), format!("chat {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn errors_are_as_documented() {
    let generate = |rest: &[&'static str]| [&["generate"], rest].concat();
    let lm = |rest: &[&'static str]| [&["generate", "--checkpoint", "lm", "--prompt", "hi"], rest].concat();
    let cases: Vec<(&str, Vec<&str>, i32)> = vec![
        ("no checkpoint", generate(&["--prompt", "hi"]), 2),
        ("no prompt", generate(&["--checkpoint", "lm"]), 2),
        ("unknown flag", lm(&["--temprature", "1"]), 2),
        ("not a number", lm(&["--top-k", "many"]), 2),
        ("negative temperature", lm(&["--temperature", "-1"]), 2),
        ("infinite temperature", lm(&["--temperature", "inf"]), 2),
        ("top-p of 0", lm(&["--top-p", "0"]), 2),
        ("top-p above 1", lm(&["--top-p", "1.01"]), 2),
        ("no tokens", lm(&["--max-tokens", "0"]), 2),
        ("no beams", lm(&["--beams", "0"]), 2),
        ("beams that sample", lm(&["--beams", "4", "--temperature", "0.7"]), 2),
        ("length penalty without beams", lm(&["--length-penalty", "2"]), 2),
        ("penalty of 0", lm(&["--repetition-penalty", "0"]), 2),
        ("empty stop text", lm(&["--stop", ""]), 2),
        ("system message of plain text", lm(&["--raw", "--system", "be kind"]), 2),
        ("empty prompt", generate(&["--checkpoint", "lm", "--prompt", " "]), 2),
        ("both a conversation and a command", vec!["--checkpoint", "lm", "generate"], 2),
        ("missing directory", generate(&["--checkpoint", "nowhere", "--prompt", "hi"]), 1),
        ("reward model", generate(&["--checkpoint", "reward-model", "--prompt", "hi"]), 1),
        ("no tokenizer", generate(&["--checkpoint", "no-tokenizer", "--prompt", "hi"]), 1),
        ("logits that overflow", generate(&["--checkpoint", "diverged", "--prompt", "hi"]), 1),
        ("unknown backend", lm(&["--backend", "flx"]), 1),
        ("a conversation with a reward model", vec!["--checkpoint", "reward-model"], 1),
    ];
    let mut found = String::new();
    for (what, args, code) in cases {
        let ran = chat(&args, b"");
        assert_eq!(ran.code, code, "{what}: {}", ran.stderr);
        assert_eq!(ran.stdout, "", "{what}");
        writeln!(found, "# {what}\n$ chat {}\n{}", args.join(" "), ran.stderr).unwrap();
    }
    let long = "x".repeat(200);
    let ran = chat(&["generate", "--checkpoint", "lm", "--prompt", &long], b"");
    assert_eq!(ran.code, 1);
    writeln!(found, "# over-long prompt\n{}", ran.stderr).unwrap();
    let ran = chat(&["generate", "--checkpoint", "lm", "--prompt", "-"], b"caf\xe9");
    assert_eq!(ran.code, 1);
    write!(found, "# invalid UTF-8\n{}", ran.stderr).unwrap();
    assert_snapshot("errors.txt", &found);
}

#[test]
fn the_answer_and_nothing_else_is_on_stdout() {
    let args = ["generate", "--checkpoint", "lm", "--prompt", "hi", "--max-tokens", "12", "-v"];
    let ran = chat(&args, b"");
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let answer = ran.stdout.strip_suffix('\n').unwrap();
    assert!(!answer.is_empty() && answer.len() <= 12 && !answer.contains('\n'), "{answer:?}");
    assert!(ran.stderr.contains("loaded `lm`"), "{}", ran.stderr);
}

#[test]
fn json_holds_tokens_and_log_probs() {
    let tokenizer = byte_tokenizer();
    let base = ["generate", "--checkpoint", "lm", "--prompt", "hi", "--max-tokens", "12"];
    let json: Value = serde_json::from_str(&stdout(&[&base[..], &["--json"]].concat(), b"")).unwrap();
    let ids: Vec<u32> = json["token_ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
    assert_eq!(json["text"], tokenizer.decode(&ids));
    assert_eq!(format!("{}\n", json["text"].as_str().unwrap()), stdout(&base, b""), "plain and JSON answers differ");
    assert_eq!(json["log_probs"].as_array().unwrap().len(), ids.len());
    assert!(json["log_probs"].as_array().unwrap().iter().all(|p| p.as_f64().unwrap() <= 0.0));
    assert_eq!(json["finish_reason"], "length");
    let specials = tokenizer.specials();
    let prompt = [specials.bos, specials.user, b'h'.into(), b'i'.into(), specials.end, specials.assistant];
    assert_eq!(json["prompt_token_ids"], serde_json::json!(prompt));
}

#[test]
fn raw_text_follows_the_begin_token_alone() {
    let json = stdout(&["generate", "--checkpoint", "lm", "--prompt", "hi", "--raw", "--json"], b"");
    let json: Value = serde_json::from_str(&json).unwrap();
    let bos = byte_tokenizer().specials().bos;
    assert_eq!(json["prompt_token_ids"], serde_json::json!([bos, u32::from(b'h'), u32::from(b'i')]));
}

#[test]
fn a_stop_text_ends_the_answer_and_is_not_in_it() {
    let base = ["generate", "--checkpoint", "lm", "--prompt", "hi", "--max-tokens", "30", "--json"];
    for search in [&["--temperature", "0"][..], &["--beams", "3"], &["--seed", "9"]] {
        let whole: Value = serde_json::from_str(&stdout(&[&base[..], search].concat(), b"")).unwrap();
        let text = whole["text"].as_str().unwrap();
        let stop = &text[5..8];
        let ended: Value =
            serde_json::from_str(&stdout(&[&base[..], search, &["--stop", stop]].concat(), b"")).unwrap();
        let at = text.find(stop).unwrap();
        assert_eq!(ended["text"], text[..at]);
        assert_eq!(ended["finish_reason"], "stop");
        assert_eq!(ended["token_ids"].as_array().unwrap().len(), at + 3, "one token a byte, with the stop text's own");
    }
}

#[test]
fn the_same_seed_gives_the_same_answer_and_greedy_needs_none() {
    let answer = |rest: &[&str]| stdout(&[&["generate", "--checkpoint", "lm", "--prompt", "hi"], rest].concat(), b"");
    assert_eq!(answer(&["--seed", "3"]), answer(&["--seed", "3"]));
    assert_ne!(answer(&["--seed", "3"]), answer(&["--seed", "4"]));
    assert_eq!(answer(&["--temperature", "0", "--seed", "3"]), answer(&["--temperature", "0"]));
    assert_eq!(answer(&["--seed", "3"]), answer(&["--seed", "3", "--kernels", "plain"]));
}

#[test]
fn a_prompt_from_standard_input_is_the_prompt() {
    let answer = |prompt, stdin: &[u8]| stdout(&["generate", "--checkpoint", "lm", "--prompt", prompt], stdin);
    assert_eq!(answer("-", b"hello\n"), answer("hello", b""));
    assert_eq!(answer("-", b"two\r\nlines\r\n"), answer("two\r\nlines", b""));
}

#[test]
fn a_pipe_is_a_conversation_of_one_line_messages() {
    let base = ["--checkpoint", "lm", "--max-tokens", "8", "--temperature", "0"];
    let ran = chat(&base, b"hi\n\nwho\n/help\n/unknown\n");
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let answers: Vec<&str> = ran.stdout.lines().collect();
    assert_eq!(answers.len(), 2, "{:?}", ran.stdout);
    assert!(ran.stderr.contains("/reset") && ran.stderr.contains("unknown command `/unknown`"), "{}", ran.stderr);
    // The first answer is that of `generate`; the second has seen the first turn, unless that was forgotten.
    let alone = |prompt| {
        stdout(&["generate", "--checkpoint", "lm", "--prompt", prompt, "--max-tokens", "8", "--temperature", "0"], b"")
    };
    assert_eq!(format!("{}\n", answers[0]), alone("hi"));
    let reset = stdout(&base, b"hi\n/reset\nwho\n");
    assert_eq!(reset.lines().nth(1).map(|line| format!("{line}\n")), Some(alone("who")));
    assert_eq!(stdout(&base, b"/quit\nhi\n"), "");
}

#[test]
fn the_system_message_counts() {
    let base = ["--checkpoint", "lm", "--max-tokens", "8", "--temperature", "0"];
    let with = stdout(&[&base[..], &["--system", "rhyme"]].concat(), b"hi\n");
    assert_eq!(with, stdout(&base, b"/system rhyme\nhi\n"));
    assert_eq!(stdout(&base, b"hi\n"), stdout(&[&base[..], &["--system", "rhyme"]].concat(), b"/system\nhi\n"));
    assert_eq!(with, stdout(&[&["generate", "--prompt", "hi", "--system", "rhyme"], &base[..]].concat(), b""));
}

#[test]
fn a_long_conversation_forgets_its_oldest_turns() {
    let lines = "a message of this length\n".repeat(9);
    let ran = chat(&["--checkpoint", "lm", "--max-tokens", "20"], lines.as_bytes());
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    assert_eq!(ran.stdout.lines().count(), 9);
    assert!(ran.stderr.contains("forgot its"), "{}", ran.stderr);
    // A single message that is too long is refused; the conversation goes on.
    let ran = chat(&["--checkpoint", "lm"], format!("{}\nhi\n", "x".repeat(100)).as_bytes());
    assert_eq!((ran.code, ran.stdout.lines().count()), (0, 1), "{}", ran.stderr);
    assert!(ran.stderr.contains("the message is too long"), "{}", ran.stderr);
}

#[test]
fn a_reader_that_has_had_enough_is_no_error() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_chat"))
        .args(["generate", "--checkpoint", "lm", "--prompt", "hi"])
        .current_dir(checkpoints())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
}
