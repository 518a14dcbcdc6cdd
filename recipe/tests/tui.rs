//! `recipe run --tui`, in a terminal of the test's own.

#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "a test that unwraps fails with the error in its message")]

mod lab;

use std::process::Command;
use std::time::{Duration, Instant};

use lab::{Lab, n_skipped};
use rexpect::process::WaitStatus;
use rexpect::session::{PtySession, spawn_command};

/// Longer than anything here takes on a busy machine, in milliseconds.
const TIMEOUT: u64 = 120_000;

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
    command.args(["-c", &format!("stty rows 40 columns 130; exec {}", words.join(" "))]);
    command.current_dir(recipe.get_current_dir().unwrap()).env("TERM", "xterm");
    for (name, value) in recipe.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    spawn_command(command, Some(TIMEOUT)).unwrap()
}

/// What stands on the terminal, from what was written to it: only what changes is written, so that a text comes in parts.
struct Screen {
    lines: Vec<Vec<char>>,
    at: (usize, usize),
}

impl Screen {
    fn new() -> Self {
        Self { lines: vec![vec![' '; 130]; 40], at: (0, 0) }
    }

    /// Follows what `session` writes until the first line has `wanted`.
    #[track_caller]
    fn wait_for(&mut self, session: &mut PtySession, wanted: &str) {
        let began = Instant::now();
        while !self.first_line().contains(wanted) {
            assert!(began.elapsed().as_millis() < u128::from(TIMEOUT), "no `{wanted}`: {}", self.first_line());
            match session.try_read() {
                Some(c) => self.take(c, session),
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    fn first_line(&self) -> String {
        self.lines[0].iter().collect()
    }

    fn take(&mut self, c: char, session: &mut PtySession) {
        let mut next = || {
            loop {
                match session.try_read() {
                    Some(c) => return c,
                    None => std::thread::sleep(Duration::from_millis(1)),
                }
            }
        };
        let (row, column) = self.at;
        match c {
            '\x1b' => {
                if next() != '[' {
                    return;
                }
                let mut numbers = String::new();
                let end = loop {
                    match next() {
                        c @ ('0'..='?') => numbers.push(c),
                        c => break c,
                    }
                };
                if end == 'H' {
                    let mut numbers = numbers.split(';').map(|n| n.parse::<usize>().unwrap_or(1) - 1);
                    self.at = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
                }
            }
            // The reader takes every byte for a character: all but the first of a longer one are passed over.
            '\u{80}'..='\u{bf}' => {}
            c if c < ' ' => {}
            c => {
                if let Some(cell) = self.lines.get_mut(row).and_then(|line| line.get_mut(column)) {
                    *cell = c;
                }
                self.at.1 += 1;
            }
        }
    }
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
    screen.wait_for(&mut session, "out/pretrain   step ");
    screen.wait_for(&mut session, "out/sft   step ");
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
    Screen::new().wait_for(&mut session, "out/sft   step ");
    session.send_control('c').unwrap();
    session.exp_string(GIVEN_BACK).unwrap();
    let after = session.exp_eof().unwrap();
    assert_eq!(exit_code(&session), 130, "{after}");
    assert!(after.contains("run the same command again to continue"), "{after}");

    let mut session = run(&lab, &long);
    session.exp_string(TAKEN).unwrap();
    Screen::new().wait_for(&mut session, "out/sft   step ");
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
