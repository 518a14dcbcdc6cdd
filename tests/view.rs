//! `--tui`, in a terminal of the test's own and without one.

#![cfg(unix)]
#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

#[path = "support/screen.rs"]
mod screen;

use std::process::Command;
use std::time::Duration;

use common::testing::{exit_code_in, outliving};
use common::view::View;
use pipeline_tests::{Lab, SFT, binary};
use rexpect::process::WaitStatus;
use rexpect::session::{PtySession, spawn_command};
use screen::Screen;

/// Longer than anything here takes on a busy machine.
const TIMEOUT: Duration = Duration::from_mins(2);

/// What a program writes when it takes the whole terminal and when it gives it back.
const TAKEN: &str = "\x1b[?1049h";
const GIVEN_BACK: &str = "\x1b[?1049l";

/// `sft train --tui` in a terminal, begun by the command `setting`; what the shell is told after it is `redirected`.
fn train(lab: &Lab, setting: &str, more: &[&str], redirected: &str) -> PtySession {
    let args = SFT.train("out", &[&["--tui"], more].concat());
    // A terminal of tests has no size of its own.
    let program = binary(SFT.program);
    let script = format!("{}; exec {setting} '{}' {} {redirected}", Screen::STTY, program.display(), args.join(" "));
    let mut command = lab.within(Command::new("sh"), &["-c", &script]);
    command.env("TERM", "xterm");
    spawn_command(command, Some(TIMEOUT.as_millis() as u64)).unwrap()
}

fn exit_code(session: &PtySession) -> i32 {
    match session.process().wait().unwrap() {
        WaitStatus::Exited(_, code) => code,
        status => panic!("{status:?}"),
    }
}

fn press(session: &mut PtySession, key: &str) {
    session.send(key).unwrap();
    session.flush().unwrap();
}

/// Waits until each of `parts` stands on the terminal; returns what was written until then.
#[track_caller]
fn shows(session: &mut PtySession, parts: &[&str]) -> String {
    String::from_utf8_lossy(&Screen::new().wait_for(session, TIMEOUT, parts)).into_owned()
}

const ENDLESS: [&str; 2] = ["--set", "train.steps=10000000"];

#[test]
fn ctrl_c_gives_the_terminal_back_saves_and_ends_with_130() {
    let lab = Lab::before(SFT);
    let mut session = train(&lab, "env", &ENDLESS, "");
    shows(&mut session, &["MiB", " log ", "q leave the view", "norm of the gradient"]);
    session.send_control('c').unwrap();
    session.exp_string(GIVEN_BACK).unwrap();
    // What was logged meanwhile stands in the terminal afterwards.
    for message in ["training conversations", "finishing the step", "saved in `out`", "continue with `--resume`"] {
        session.exp_string(message).unwrap();
    }
    session.exp_eof().unwrap();
    assert_eq!(exit_code(&session), 130);
    assert!(lab.saved_step("out").is_some());
}

#[test]
fn q_leaves_the_view_and_the_run_goes_on() {
    let lab = Lab::before(SFT);
    let mut session = train(&lab, "env", &ENDLESS, "");
    shows(&mut session, &["q leave the view"]);
    press(&mut session, "q");
    session.exp_string(GIVEN_BACK).unwrap();
    session.exp_string("val/loss").unwrap();
    session.exp_string("left").unwrap();
    session.send_control('c').unwrap();
    session.exp_string("continue with `--resume`").unwrap();
    session.exp_eof().unwrap();
    assert_eq!(exit_code(&session), 130);
}

#[test]
fn a_log_file_has_the_messages_and_the_terminal_the_view() {
    let lab = Lab::before(SFT);
    let mut session = train(&lab, "env", &[], "2> log");
    session.exp_string(TAKEN).unwrap();
    session.exp_string(GIVEN_BACK).unwrap();
    let rest = session.exp_eof().unwrap();
    assert_eq!(exit_code(&session), 0, "{rest}");
    assert!(!rest.contains("val/loss"), "what the file has is not told again: {rest}");
    let log = String::from_utf8(lab.bytes("log")).unwrap();
    assert!(log.contains(" step 12/12 ") && log.contains(" done at step 12"), "{log}");
    assert!(!log.contains('\x1b'), "{log}");
}

#[test]
fn an_error_is_told_after_the_terminal_was_given_back() {
    let lab = Lab::before(SFT);
    let mut session = train(&lab, "env", &["--set", "optimizer.lr=1e30"], "");
    session.exp_string(TAKEN).unwrap();
    session.exp_string(GIVEN_BACK).unwrap();
    session.exp_string("error: ").unwrap();
    session.exp_eof().unwrap();
    assert_eq!(exit_code(&session), 1);
}

#[test]
fn a_second_ctrl_c_gives_the_terminal_back_and_stops_at_once() {
    let lab = Lab::before(SFT);
    // A step that takes longer than anybody waits.
    let long = ["--set", "train.batch_size=1000000", "--set", "train.micro_batch_size=4"];
    let mut session = train(&lab, "env", &long, "");
    // The step has begun.
    shows(&mut session, &["conversations"]);
    std::thread::sleep(Duration::from_millis(500));
    session.send_control('c').unwrap();
    // Two within a second are one request.
    std::thread::sleep(Duration::from_millis(1500));
    session.send_control('c').unwrap();
    session.exp_string(GIVEN_BACK).unwrap();
    let rest = session.exp_eof().unwrap();
    assert!(rest.contains("press Ctrl-C again") && rest.contains("stopped without saving"), "{rest}");
    assert_eq!(exit_code(&session), 130);
    assert_eq!(lab.saved_step("out"), None);
}

const CLOSED: &str = "a_terminal_that_is_closed_while_a_run_is_seen";

#[test]
#[ignore = "the program of the next test"]
fn a_terminal_that_is_closed_while_a_run_is_seen() {
    let args = SFT.train("out", &[&["--tui"], &ENDLESS[..]].concat());
    let mut session = spawn_command(outliving(&binary(SFT.program), &args), Some(TIMEOUT.as_millis() as u64)).unwrap();
    shows(&mut session, &["norm of the gradient"]);
    // The other end of the terminal goes with this process; dropping the session would kill the run first.
    std::process::exit(0);
}

#[test]
fn a_closed_terminal_saves_and_ends_with_129() {
    let lab = Lab::before(SFT);
    let terminal = lab.within(Command::new(std::env::current_exe().unwrap()), &["--exact", CLOSED, "--ignored"]);
    let output = lab.finish(terminal);
    assert!(output.status.success(), "{}", output.stderr);
    // Not within a moment on a machine that is busy: a run that spins ends never.
    assert_eq!(exit_code_in(lab.dir(), Duration::from_mins(1)), Some(129));
    assert!(lab.saved_step("out").is_some());
    // Another may write there now.
    lab.ok(SFT.program, &SFT.train("out", &["--overwrite", "-q"]));
}

const PANIC: &str = "a_program_that_panics_while_its_view_is_open";

#[test]
#[ignore = "the program of the next test"]
fn a_program_that_panics_while_its_view_is_open() {
    let _view = View::open().unwrap();
    std::thread::sleep(Duration::from_millis(600));
    panic!("on purpose");
}

#[test]
fn a_panic_is_told_after_the_terminal_was_given_back() {
    let program = std::env::current_exe().unwrap();
    // What the terminal is like is said before and after: raw mode would show.
    let script = format!(
        "stty rows 40 columns 130; stty -g; '{}' --exact {PANIC} --ignored --nocapture; echo ended with $?; stty -g",
        program.display()
    );
    let mut command = Command::new("sh");
    command.args(["-c", &script]).env("TERM", "xterm");
    let mut session = spawn_command(command, Some(TIMEOUT.as_millis() as u64)).unwrap();
    let before = session.exp_string(TAKEN).unwrap();
    session.exp_string("q leave the view").unwrap();
    session.exp_string(GIVEN_BACK).unwrap();
    let rest = session.exp_eof().unwrap();
    assert!(rest.contains("on purpose") && rest.contains("ended with 101"), "{rest}");
    let (settings, settings_after) = (before.lines().next().unwrap(), rest.lines().next_back().unwrap());
    assert_eq!(settings.trim(), settings_after.trim(), "{rest}");
}

#[test]
fn without_colours_none_is_written() {
    let lab = Lab::before(SFT);
    let drawn = |setting: &str| {
        let mut session = train(&lab, setting, &[&ENDLESS[..], &["--overwrite"]].concat(), "");
        let before = shows(&mut session, &["norm of the gradient"]);
        session.send_control('c').unwrap();
        before + &session.exp_eof().unwrap()
    };
    let is_coloured = |text: &str| text.contains("\x1b[38;5;");
    assert!(is_coloured(&drawn("env -u NO_COLOR")));
    let plain = drawn("env NO_COLOR=1");
    assert!(!is_coloured(&plain) && plain.contains(TAKEN), "{plain:?}");
}

#[test]
fn without_a_terminal_there_are_plain_lines() {
    let lab = Lab::before(SFT);
    let output = lab.run(SFT.program, &SFT.train("out", &["--tui"]));
    assert!(output.status.success(), "{}", output.stderr);
    assert!(output.stderr.contains("warning: `--tui` needs a terminal"), "{}", output.stderr);
    assert!(output.stderr.contains(" step 12/12 ") && !output.stderr.contains('\x1b'), "{}", output.stderr);
}
