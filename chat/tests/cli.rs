//! The command line from outside: help, errors, and what is printed where. Set `UPDATE_SNAPSHOTS` to rewrite the
//! expected texts in `snapshots/`.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

mod support;

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use common::hf::{self, Head, TokenIds};
use common::testing::byte_tokenizer;
use common::tokenizer::Tokenizer;
use serde_json::Value;
use support::{checkpoints, saying};

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

#[test]
fn help_is_as_documented() {
    for (name, args) in [
        ("help.txt", &["--help"][..]),
        ("generate-help.txt", &["generate", "--help"]),
        ("merge-help.txt", &["merge", "--help"]),
        ("serve-help.txt", &["serve", "--help"]),
    ] {
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
        ("penalty below f32", lm(&["--repetition-penalty", "1e-300"]), 2),
        ("beams beyond count", lm(&["--beams", "18446744073709551615"]), 2),
        ("length penalty that overflows", lm(&["--beams", "3", "--length-penalty", "1e6"]), 2),
        ("no samples", lm(&["--num-samples", "0"]), 2),
        ("samples of the likeliest answer", lm(&["--num-samples", "2", "--temperature", "0"]), 2),
        ("samples of beam search", lm(&["--num-samples", "2", "--beams", "2"]), 2),
        ("empty stop text", lm(&["--stop", ""]), 2),
        ("system message of plain text", lm(&["--raw", "--system", "be kind"]), 2),
        ("empty prompt", generate(&["--checkpoint", "lm", "--prompt", " "]), 2),
        ("both a conversation and a command", vec!["--checkpoint", "lm", "generate"], 2),
        ("a folder of checkpoints", generate(&["--checkpoint", ".", "--prompt", "hi"]), 1),
        ("missing directory", generate(&["--checkpoint", "nowhere", "--prompt", "hi"]), 1),
        ("reward model", generate(&["--checkpoint", "reward-model", "--prompt", "hi"]), 1),
        ("no tokenizer", generate(&["--checkpoint", "no-tokenizer", "--prompt", "hi"]), 1),
        ("logits that overflow", generate(&["--checkpoint", "diverged", "--prompt", "hi"]), 1),
        ("unknown backend", lm(&["--backend", "flx"]), 1),
        ("a conversation with a reward model", vec!["--checkpoint", "reward-model"], 1),
        ("a server without a model", vec!["serve"], 2),
        ("a server of two models with one name", vec!["serve", "--checkpoint", "lm", "--checkpoint", "lm=diverged"], 2),
        ("a server of a model without a name", vec!["serve", "--checkpoint", "two words=lm"], 2),
        ("a server with no slot", vec!["serve", "--checkpoint", "lm", "--slots", "0"], 2),
        ("a server for every page", vec!["serve", "--checkpoint", "lm", "--allow-origin", "*"], 2),
        (
            "a server whose judgements go to what is judged",
            vec!["serve", "--checkpoint", "lm", "--labels", "lm/config.json", "--questions", "./lm/config.json"],
            2,
        ),
        ("a server with a key from nowhere", vec!["serve", "--checkpoint", "lm", "--api-key-file", "nowhere"], 1),
        ("a server of a reward model", vec!["serve", "--checkpoint", "reward-model", "--port", "0"], 1),
        (
            "a server that scores with no reward model",
            vec!["serve", "--checkpoint", "lm", "--reward-model", "lm", "--port", "0", "-q"],
            1,
        ),
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
}

#[test]
fn a_message_without_an_answer_leaves_an_empty_line() {
    let base = ["--checkpoint", "lm", "--temperature", "0", "--max-tokens", "8"];
    let ran = chat(&base, format!("hi\n{}\nhi\n", "x".repeat(100)).as_bytes());
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let answers: Vec<&str> = ran.stdout.lines().collect();
    assert_eq!((answers.len(), answers[1]), (3, ""), "{:?}", ran.stdout);
    assert!(!answers[0].is_empty() && !answers[2].is_empty());
    assert!(ran.stderr.contains("error: line 2: the message is too long: 10"), "{}", ran.stderr);
}

#[test]
fn a_conversation_says_which_model_answers_and_what_its_commands_did() {
    let ran = chat(&["--checkpoint", "lm", "--system", "rhyme"], b"/reset\n/system\n/reset\n/system be kind\n");
    let said: Vec<&str> = ran.stderr.lines().collect();
    assert!(said[0].contains(" `lm`: stage `sft`, step 0, ") && said[0].ends_with(" parameters"), "{}", ran.stderr);
    let expected = [
        "(a new conversation, with the same system message)",
        "(no system message)",
        "(a new conversation)",
        "(system message set)",
    ];
    assert_eq!(said[1..], expected);
    assert_eq!(chat(&["--checkpoint", "lm", "-q"], b"hi\n").stderr, "");
}

#[test]
fn the_last_position_of_the_context_is_used_and_none_beyond() {
    // `<|bos|>` and as many bytes; the context holds 96 tokens.
    let ran = |n_tokens: usize, rest: &[&str]| {
        let prompt = "x".repeat(n_tokens - 1);
        chat(&[&["generate", "--checkpoint", "lm", "--raw", "--json", "--prompt", &prompt], rest].concat(), b"")
    };
    for search in [&["--temperature", "0"][..], &["--beams", "3"], &["--max-tokens", "18446744073709551615"]] {
        let last = ran(95, search);
        let json: Value = serde_json::from_str(&last.stdout).unwrap();
        assert_eq!(json["token_ids"].as_array().unwrap().len(), 1, "{search:?}");
        for n_tokens in [96, 97] {
            let refused = ran(n_tokens, search);
            assert_eq!((refused.code, refused.stdout.as_str()), (1, ""));
            assert!(
                refused.stderr.contains(&format!("the prompt is too long: {n_tokens} tokens")),
                "{}",
                refused.stderr
            );
        }
    }
    let samples = ran(95, &["--num-samples", "3"]).stdout;
    assert_eq!(samples.lines().count(), 3);
}

#[test]
fn a_sample_of_a_seed_is_the_same_however_many_there_are() {
    let ask = |n: &str, rest: &[&str]| {
        let base = ["generate", "--checkpoint", "lm", "--prompt", "hi", "--max-tokens", "30", "--num-samples", n];
        stdout(&[&base[..], rest].concat(), b"")
    };
    let json = |n: &str, rest: &[&str]| -> Vec<Value> {
        let lines = ask(n, &[rest, &["--json"]].concat());
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let forty = json("40", &["--seed", "3"]);
    assert_eq!(
        forty.iter().map(|sample| sample["sample"].as_u64().unwrap()).collect::<Vec<_>>(),
        (0..40).collect::<Vec<_>>()
    );
    let texts: Vec<&str> = forty.iter().map(|sample| sample["text"].as_str().unwrap()).collect();
    assert!(texts[1..].iter().all(|text| *text != texts[0]), "{texts:?}");
    // Tokens and log-probabilities, bit by bit.
    for n in [2, 5, 33] {
        assert_eq!(json(&n.to_string(), &["--seed", "3"]), forty[..n]);
    }
    assert_eq!(json("1", &["--seed", "3"])[0]["token_ids"], forty[0]["token_ids"]);
    assert_ne!(json("2", &["--seed", "4"])[1]["text"], forty[1]["text"]);
    assert_eq!(ask("3", &["--seed", "3"]), format!("{}\n", texts[..3].join("\n---\n")));
    // A stop text ends each sample on its own.
    let stop = &texts[1][5..7];
    for (sample, text) in json("4", &["--seed", "3", "--stop", stop]).iter().zip(&texts) {
        assert_eq!(sample["text"].as_str().unwrap(), text.split(stop).next().unwrap());
    }
}

#[test]
fn extreme_numbers_are_answered_or_refused() {
    let base = ["generate", "--checkpoint", "lm", "--prompt", "hi", "--json"];
    let greedy: Value = serde_json::from_str(&stdout(&[&base[..], &["--temperature", "0"]].concat(), b"")).unwrap();
    for temperature in ["1e-5", "1e-12", "1e-300", "5e-324"] {
        let near: Value =
            serde_json::from_str(&stdout(&[&base[..], &["--temperature", temperature, "--top-p", "1"]].concat(), b""))
                .unwrap();
        assert_eq!(near["token_ids"], greedy["token_ids"], "{temperature}");
    }
    let numbers =
        ["0", "1", "1e-300", "1e300", "1e308", "-1e308", "1e-45", "3e38", "18446744073709551615", "-1", "NaN", "inf"];
    for flag in ["--max-tokens", "--temperature", "--top-k", "--top-p", "--repetition-penalty", "--beams", "--seed"] {
        for number in numbers {
            let ran = chat(&[&base[..], &[flag, number]].concat(), b"");
            assert!([0, 2].contains(&ran.code), "{flag} {number}: {}", ran.stderr);
            assert!(!ran.stderr.contains("panicked"), "{flag} {number}: {}", ran.stderr);
            if ran.code == 0 {
                let json: Value = serde_json::from_str(&ran.stdout).unwrap();
                let log_probs = json["log_probs"].as_array().unwrap();
                assert!(log_probs.iter().all(Value::is_number), "{flag} {number}: {log_probs:?}");
            }
        }
    }
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

/// A directory as transformers writes it, with the tokenizer that `tests/oracles/chat_templates.py` recorded as `name` and
/// another end-of-text token, whose model says `said` and nothing else.
fn foreign(dir: &Path, name: &str, eos: &str, said: &str) -> Tokenizer {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/chat_templates.json");
    let mut recorded: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let Value::Object(mut directory) = recorded["directories"][name].take() else { panic!("`{name}` is not recorded") };
    let mut file = recorded["tokenizers"][directory["tokenizer"].as_str().unwrap()]["file"].take();
    for token in directory["added"].as_array_mut().unwrap() {
        for flag in ["normalized", "single_word", "lstrip", "rstrip"] {
            token[flag] = false.into();
        }
        file["added_tokens"].as_array_mut().unwrap().push(token.take());
    }
    directory["settings"]["eos_token"] = eos.into();
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("tokenizer.json"), file.to_string()).unwrap();
    std::fs::write(dir.join("tokenizer_config.json"), directory["settings"].to_string()).unwrap();
    let tokenizer = Tokenizer::load(dir).unwrap();
    let said = tokenizer.token_id(said).unwrap();
    let (config, named) = saying(&tokenizer, 96, |id| [f32::from(u8::from(id == said)); 16]);
    hf::write(dir, &config, Head::Lm, &named, &TokenIds::default()).unwrap();
    tokenizer
}

#[test]
fn an_answer_ends_where_the_template_of_a_foreign_model_ends_a_turn() {
    let dir = tempfile::tempdir().unwrap();
    for (name, eos, end_of_turn) in
        [("llama3", "<|end_of_text|>", "<|eot_id|>"), ("qwen3", "<|endoftext|>", "<|im_end|>")]
    {
        for said in [end_of_turn, eos] {
            let checkpoint = dir.path().join(name).display().to_string();
            let tokenizer = foreign(Path::new(&checkpoint), name, eos, said);
            let args = ["generate", "--checkpoint", &checkpoint, "--prompt", "hi", "--temperature", "0", "--json"];
            let json: Value = serde_json::from_str(&stdout(&args, b"")).unwrap();
            assert_eq!(json["token_ids"], serde_json::json!([tokenizer.token_id(said)]), "{name}, {said}");
            assert_eq!((&json["text"], &json["finish_reason"]), (&"".into(), &"stop".into()), "{name}, {said}");
        }
    }
}

/// `chat` in a terminal of its own.
#[cfg(unix)]
mod terminal {
    use rexpect::process::WaitStatus;
    use rexpect::session::{PtySession, spawn_command};

    use super::*;

    /// Longer than anything here takes on a busy machine, in milliseconds.
    const TIMEOUT: u64 = 60_000;

    /// The start of an answer, behind the message `hi`, with whatever the line editor writes between.
    const ANSWER: &str = "hi[^\\n]*\\n[ -~]{20}";

    /// A conversation with a model whose answers take much longer than a key press.
    fn conversation() -> PtySession {
        let mut command = Command::new(env!("CARGO_BIN_EXE_chat"));
        command.args(["--checkpoint", "long-winded", "--max-tokens", "60000"]).current_dir(checkpoints());
        command.env("TERM", "xterm").env_remove("RUST_LOG");
        let mut session = spawn_command(command, Some(TIMEOUT)).unwrap();
        session.exp_string("/help lists the commands, Ctrl-D leaves").unwrap();
        session.exp_string("> ").unwrap();
        session
    }

    fn exit_code(session: &PtySession) -> i32 {
        match session.process().wait().unwrap() {
            WaitStatus::Exited(_, code) => code,
            status => panic!("{status:?}"),
        }
    }

    #[test]
    fn ctrl_c_ends_an_answer_and_the_conversation_goes_on() {
        let mut session = conversation();
        // The second answer comes within a second of the first Ctrl-C: each answer counts its own.
        for _ in 0..2 {
            session.send_line("hi").unwrap();
            session.exp_regex(ANSWER).unwrap();
            session.send_control('c').unwrap();
            session.exp_string("(broken off)").unwrap();
            session.exp_string("> ").unwrap();
        }
        session.send_line("/quit").unwrap();
        session.exp_eof().unwrap();
        assert_eq!(exit_code(&session), 0);
    }

    #[test]
    fn ctrl_c_at_the_prompt_says_how_to_leave_and_ctrl_d_leaves() {
        let mut session = conversation();
        for _ in 0..2 {
            session.send_control('c').unwrap();
            session.exp_string("Ctrl-D or /quit leaves").unwrap();
            session.exp_string("> ").unwrap();
        }
        session.send_control('d').unwrap();
        session.exp_eof().unwrap();
        assert_eq!(exit_code(&session), 0);
    }
}
