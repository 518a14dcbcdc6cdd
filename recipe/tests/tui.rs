//! `recipe run --tui`, in a terminal of the test's own.

#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test that unwraps fails with the error in its message")]

mod lab;
#[path = "../../tests/support/screen.rs"]
mod screen;

use std::process::Command;
use std::time::Duration;

use lab::{Lab, n_skipped};
use rexpect::process::WaitStatus;
use rexpect::session::{PtySession, spawn_command};
use screen::Screen;

/// Longer than anything here takes on a busy machine.
const TIMEOUT: Duration = Duration::from_mins(2);

/// What a program writes when it takes the whole terminal and when it gives it back.
const TAKEN: &str = "\x1b[?1049h";
const GIVEN_BACK: &str = "\x1b[?1049l";

/// `recipe run --tui` in a terminal.
fn run(lab: &Lab, more: &[&str]) -> PtySession {
    let recipe = lab.command(&[&["--tui"], more].concat());
    let words = std::iter::once(recipe.get_program()).chain(recipe.get_args());
    let words: Vec<String> = words.map(|word| format!("'{}'", word.to_str().unwrap())).collect();
    let mut command = Command::new("sh");
    // A terminal of tests has no size of its own.
    command.args(["-c", &format!("{}; exec {}", Screen::STTY, words.join(" "))]);
    command.current_dir(recipe.get_current_dir().unwrap()).env("TERM", "xterm");
    for (name, value) in recipe.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    spawn_command(command, Some(TIMEOUT.as_millis() as u64)).unwrap()
}

fn exit_code(session: &PtySession) -> i32 {
    match session.process().wait().unwrap() {
        WaitStatus::Exited(_, code) => code,
        status => panic!("{status:?}"),
    }
}

#[test]
fn one_view_shows_stage_after_stage_and_changes_none_of_their_results() {
    // Each takes a second or two on a fast machine: the view is drawn four times a second.
    let longer = ["--set", "pretrain.train.steps=8000", "--set", "sft.train.steps=1200"];
    let lab = Lab::new();
    let mut session = run(&lab, &longer);
    session.exp_string(TAKEN).unwrap();
    let mut screen = Screen::new();
    screen.wait_for(&mut session, TIMEOUT, &["out/pretrain   step "]);
    screen.wait_for(&mut session, TIMEOUT, &["out/sft   step "]);
    let during = session.exp_string(GIVEN_BACK).unwrap();
    let after = session.exp_eof().unwrap();
    assert_eq!(exit_code(&session), 0, "{after}");
    assert!(!during.contains(TAKEN) && !after.contains(TAKEN), "it was taken once: {after}");
    // What was logged and the results stand in the terminal afterwards.
    for part in ["[3/9] pretrain", "[9/9] report", "gold score on held-out prompts", "report: "] {
        assert!(after.contains(part), "no `{part}`: {after}");
    }

    let plain = Lab::new();
    plain.run(&longer);
    for file in ["ppo/model.safetensors", "reward-model/model.safetensors", "answers.jsonl"] {
        assert!(lab.bytes(file) == plain.bytes(file), "`{file}` differs");
    }
}

#[test]
fn ctrl_c_gives_the_terminal_back_and_the_same_command_goes_on() {
    let lab = Lab::new();
    let long = ["--set", "sft.train.steps=100000"];
    let mut session = run(&lab, &long);
    session.exp_string(TAKEN).unwrap();
    Screen::new().wait_for(&mut session, TIMEOUT, &["out/sft   step "]);
    session.send_control('c').unwrap();
    session.exp_string(GIVEN_BACK).unwrap();
    let after = session.exp_eof().unwrap();
    assert_eq!(exit_code(&session), 130, "{after}");
    assert!(after.contains("run the same command again to continue"), "{after}");

    let mut session = run(&lab, &long);
    session.exp_string(TAKEN).unwrap();
    Screen::new().wait_for(&mut session, TIMEOUT, &["out/sft   step "]);
    session.send("q").unwrap();
    session.flush().unwrap();
    session.exp_string(GIVEN_BACK).unwrap();
    let said = session.exp_string("left").unwrap();
    assert!(n_skipped(&said) == 3 && said.contains("sft: resuming"), "{said}");
    session.send_control('c').unwrap();
    session.exp_eof().unwrap();
    assert_eq!(exit_code(&session), 130);
}

#[test]
fn an_error_of_a_stage_is_told_after_the_terminal_was_given_back() {
    let lab = Lab::new();
    let mut session = run(&lab, &["--set", "sft.optimizer.lr=1e30"]);
    session.exp_string(TAKEN).unwrap();
    session.exp_string(GIVEN_BACK).unwrap();
    let after = session.exp_eof().unwrap();
    assert!(after.contains("error: ") && after.contains("sft"), "{after}");
    assert_eq!(exit_code(&session), 1, "{after}");
}
