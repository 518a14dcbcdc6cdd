//! Labels of people from outside: decided at a terminal of the test's own, by the gold score, compared and learned from.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

use std::fmt::Write as _;
use std::path::Path;

use common::checkpoint::Stage;
use common::testing::{byte_tokenizer, run, save_tiny};
use serde_json::{Value, json};
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_reward-model");

/// Forty pairs, of which the better answer is the one of more `a`.
fn workplace() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut lines = String::new();
    for i in 0..40 {
        let (a, b) = ("a".repeat(3 + i % 5), "b".repeat(2 + i % 3));
        writeln!(lines, "{}", json!({ "prompt": format!("say {i}"), "chosen": a, "rejected": b })).unwrap();
    }
    std::fs::write(dir.path().join("pairs.jsonl"), lines).unwrap();
    dir
}

fn records(path: &Path) -> Vec<Value> {
    std::fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn the_gold_score_labels_a_policys_answers_and_goes_on_where_it_stopped() {
    let dir = tempfile::tempdir().unwrap();
    save_tiny(&dir.path().join("sft"), Stage::Sft, &byte_tokenizer(), 3);
    let prompts: String = ["Mia", "Tom", "a fox", "an owl", "Ben", "Lily"]
        .iter()
        .map(|who| format!("{}\n", json!({ "prompt": format!("Tell me a story about {who}.") })))
        .collect();
    std::fs::write(dir.path().join("prompts.jsonl"), prompts).unwrap();
    let label = |out: &str, more: &[&str]| {
        let args = [
            "label",
            "--policy",
            "sft",
            "--prompts",
            "prompts.jsonl",
            "--by",
            "gold",
            "--max-tokens",
            "12",
            "--out",
            out,
        ];
        run(PROGRAM, &[&args[..], more].concat(), dir.path())
    };
    let (code, stdout, stderr) = label("whole.jsonl", &[]);
    assert_eq!((code, stdout.as_str()), (0, ""), "{stderr}");
    assert!(stderr.contains("6 decisions"), "{stderr}");
    for limit in ["2", "5", "6"] {
        let (code, _, stderr) = label("new/parts.jsonl", &["--limit", limit]);
        assert_eq!(code, 0, "{stderr}");
    }
    let whole = records(&dir.path().join("whole.jsonl"));
    assert_eq!(whole, records(&dir.path().join("new/parts.jsonl")));
    assert!(whole.iter().all(|record| record["annotator"] == "gold" && record.get("seconds").is_none()), "{whole:#?}");
}

#[test]
fn people_need_a_terminal_and_labels_a_question() {
    let dir = workplace();
    let (code, _, stderr) = run(PROGRAM, &["label", "--pairs", "pairs.jsonl", "--out", "labels.jsonl"], dir.path());
    assert!(code == 1 && stderr.contains("there is no terminal to decide at\nhint: "), "{stderr}");
    assert!(!dir.path().join("labels.jsonl").exists());
    let (code, _, stderr) = run(PROGRAM, &["label", "--out", "labels.jsonl"], dir.path());
    assert_eq!(code, 2, "{stderr}");
    let args = ["label", "--pairs", "pairs.jsonl", "--out", "pairs.jsonl", "--by", "gold"];
    let (code, _, stderr) = run(PROGRAM, &args, dir.path());
    assert!(code == 1 && stderr.contains("is both `--pairs` and `--out`"), "{stderr}");
}

/// `reward-model label` in a terminal of its own.
#[cfg(unix)]
mod terminal {
    use std::process::Command;

    use common::testing::{exit_code_in, outliving};
    use rexpect::process::WaitStatus;
    use rexpect::session::{PtySession, spawn_command};

    use super::*;

    /// Longer than anything here takes on a busy machine, in milliseconds.
    const TIMEOUT: u64 = 60_000;

    fn session(dir: &Path, annotator: &str) -> PtySession {
        // A terminal of tests has no size of its own.
        let label = format!("'{PROGRAM}' label --pairs pairs.jsonl --out labels.jsonl --annotator {annotator}");
        let mut command = Command::new("sh");
        command.args(["-c", &format!("stty rows 30 columns 100; exec {label}")]);
        command.current_dir(dir).env("TERM", "xterm").env_remove("RUST_LOG");
        spawn_command(command, Some(TIMEOUT)).unwrap()
    }

    fn exit_code(session: &PtySession) -> i32 {
        match session.process().wait().unwrap() {
            WaitStatus::Exited(_, code) => code,
            status => panic!("{status:?}"),
        }
    }

    /// Presses a key and waits until `n` decisions are on the disk.
    fn press(session: &mut PtySession, key: &str, dir: &Path, n: usize) {
        session.send(key).unwrap();
        session.flush().unwrap();
        for _ in 0..600 {
            let text = std::fs::read_to_string(dir.join("labels.jsonl")).unwrap_or_default();
            if text.lines().count() == n {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        panic!("`{key}` does not lead to {n} labels");
    }

    #[test]
    fn forty_decisions_train_a_reward_model() {
        let dir = workplace();
        save_tiny(&dir.path().join("sft"), Stage::Sft, &byte_tokenizer(), 3);
        // Where each answer stands is drawn, so the key is found by the record that it makes.
        let mut first = session(dir.path(), "mia");
        first.exp_string("0 of 40 decided").unwrap();
        let mut n = 0;
        while n < 25 {
            n += 1;
            press(&mut first, "a", dir.path(), n);
            let last = records(&dir.path().join("labels.jsonl")).pop().unwrap();
            if last["chosen"].as_str().unwrap().starts_with('b') {
                press(&mut first, "u", dir.path(), n - 1);
                press(&mut first, "b", dir.path(), n);
            }
        }
        first.process_mut().kill("SIGKILL".parse().unwrap()).unwrap();
        assert_eq!(records(&dir.path().join("labels.jsonl")).len(), 25, "a kill loses no label");

        let mut second = session(dir.path(), "mia");
        // Two of the 25 were asked for a second time.
        second.exp_string("23 of 40 decided").unwrap();
        while n < 43 {
            n += 1;
            press(&mut second, if n % 5 == 0 { "t" } else { "a" }, dir.path(), n);
        }
        second.send("q").unwrap();
        second.flush().unwrap();
        second.exp_eof().unwrap();
        assert_eq!(exit_code(&second), 0);

        let labels = records(&dir.path().join("labels.jsonl"));
        let questions: std::collections::BTreeSet<String> =
            labels.iter().map(|label| label["prompt"].as_str().unwrap().to_owned()).collect();
        assert_eq!(questions.len(), 40, "each question is decided");
        let repeats: Vec<usize> = (0..labels.len()).filter(|&i| labels[i].get("repeat").is_some()).collect();
        assert_eq!(repeats, [10, 21, 35]);
        assert!(labels[..25].iter().all(|label| label["chosen"].as_str().unwrap().starts_with('a')));
        assert!(labels.iter().all(|label| label["annotator"] == "mia" && label["seconds"].is_f64()), "{labels:#?}");
        assert_eq!(labels.iter().filter(|label| label.get("tied").is_some()).count(), 3);
        std::fs::write(
            dir.path().join("config.toml"),
            "[data]\ntrain = ['labels.jsonl']\nval = ['labels.jsonl']\n[train]\nsteps = 2\nbatch_size = 8\n[normalisation]\nsamples = 4\nmax_tokens = 4\n",
        )
        .unwrap();
        let args = ["train", "--config", "config.toml", "--init", "sft", "--out", "rm"];
        let (code, _, stderr) = run(PROGRAM, &args, dir.path());
        assert!(code == 0 && stderr.contains("37 training pairs"), "{stderr}");
        let args = ["label", "--pairs", "pairs.jsonl", "--out", "tom.jsonl", "--by", "gold"];
        let (code, _, stderr) = run(PROGRAM, &args, dir.path());
        assert!(code == 1 && stderr.contains("the gold score is not defined"), "{stderr}");
    }

    #[test]
    fn ctrl_c_leaves_the_terminal_as_it_was_and_ends_with_130() {
        let dir = workplace();
        let mut session = session(dir.path(), "tom");
        session.exp_string("0 of 40 decided").unwrap();
        session.send_control('c').unwrap();
        // The alternate screen is left.
        session.exp_string("\x1b[?1049l").unwrap();
        session.exp_string("the same command goes on").unwrap();
        session.exp_eof().unwrap();
        assert_eq!(exit_code(&session), 130);
    }

    const CLOSED: &str = "terminal::a_terminal_that_is_closed_after_one_decision";

    #[test]
    #[ignore = "the program of the next test"]
    fn a_terminal_that_is_closed_after_one_decision() {
        let args = ["label", "--pairs", "pairs.jsonl", "--out", "labels.jsonl"];
        let mut session = spawn_command(outliving(Path::new(PROGRAM), &args), Some(TIMEOUT)).unwrap();
        session.exp_string("0 of 40 decided").unwrap();
        press(&mut session, "a", Path::new("."), 1);
        // The other end of the terminal goes with this process; dropping the session would kill the program first.
        std::process::exit(0);
    }

    #[test]
    fn a_closed_terminal_ends_it_with_129_and_loses_no_label() {
        let dir = workplace();
        let mut terminal = Command::new(std::env::current_exe().unwrap());
        terminal.args(["--exact", CLOSED, "--ignored"]).current_dir(dir.path()).env_remove("RUST_LOG");
        let output = terminal.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert_eq!(exit_code_in(dir.path(), std::time::Duration::from_secs(5)), Some(129));
        assert_eq!(records(&dir.path().join("labels.jsonl")).len(), 1);
        // Another may write to the file now: it comes as far as the questions.
        let args = ["label", "--pairs", "pairs.jsonl", "--out", "labels.jsonl", "--by", "gold"];
        let (_, _, stderr) = run(PROGRAM, &args, dir.path());
        assert!(stderr.contains("the gold score is not defined"), "{stderr}");
    }
}

#[test]
fn two_people_agree_as_far_as_they_agree() {
    let dir = workplace();
    let pairs = std::fs::read_to_string(dir.path().join("pairs.jsonl")).unwrap();
    let of = |name: &str, swap: &dyn Fn(usize) -> bool| {
        let lines = pairs.lines().enumerate().map(|(i, line)| {
            let mut record: Value = serde_json::from_str(line).unwrap();
            if swap(i) {
                (record["chosen"], record["rejected"]) = (record["rejected"].take(), record["chosen"].take());
            }
            record["annotator"] = name.into();
            format!("{record}\n")
        });
        std::fs::write(dir.path().join(format!("{name}.jsonl")), lines.collect::<String>()).unwrap();
    };
    of("mia", &|_| false);
    of("tom", &|i| i % 4 == 0);
    let (code, stdout, stderr) = run(PROGRAM, &["agreement", "mia.jsonl", "tom.jsonl"], dir.path());
    assert_eq!(code, 0, "{stderr}");
    let agreement: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!((&agreement["pairs"][0]["pairs"], &agreement["pairs"][0]["agreement"]), (&json!(40), &json!(0.75)));
    // Mia always prefers `a…`: what she says tells nothing that chance would not.
    assert_eq!(agreement["pairs"][0]["kappa"], json!(0.0));
    let (code, _, stderr) = run(PROGRAM, &["agreement", "mia.jsonl"], dir.path());
    assert!(code == 1 && stderr.contains("hint: have several people"), "{stderr}");
}
