//! The end of a program: the error on stderr and the exit code.
//!
//! 0 done, 1 failed, 2 wrong usage, 129, 130 or 143 stopped by a closed terminal (SIGHUP), Ctrl-C or SIGTERM with the work saved. *Wrong usage* is what the command line alone gets wrong (clap, or [`UsageError`]); a
//! directory that is not empty or holds nothing to resume is the state of the disk, so that is 1.

use std::process::ExitCode;

use crate::interrupt::Stopped;
use crate::logging::say;
use crate::view::visible;

/// Wrong usage that clap cannot see, such as flags that depend on another's value: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// Prints what went wrong, if anything did, and gives the exit code.
///
/// The chain becomes `error: outer: inner`; the lines `hint: …` of all its errors follow. A reader of stdout that has
/// had enough, as `head` has, is no error.
pub fn report(result: anyhow::Result<()>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    if let Some(stopped) = error.downcast_ref::<Stopped>() {
        return ExitCode::from(stopped.exit_code());
    }
    let io_kind = |cause: &(dyn std::error::Error + 'static)| cause.downcast_ref().map(std::io::Error::kind);
    if error.chain().any(|cause| io_kind(cause) == Some(std::io::ErrorKind::BrokenPipe)) {
        return ExitCode::SUCCESS;
    }
    ExitCode::from(say_error(&error))
}

/// Prints what went wrong and gives the number of the exit code.
pub(crate) fn say_error(error: &anyhow::Error) -> u8 {
    // Nothing is left to try if stderr itself is gone.
    say(&error_text(error));
    if error.chain().any(<dyn std::error::Error>::is::<UsageError>) { 2 } else { 1 }
}

/// The error chain on one line where it fits, hints last.
fn error_text(error: &anyhow::Error) -> String {
    let mut text = String::from("error: ");
    let mut hints = Vec::new();
    let mut outer = String::new();
    for cause in error.chain() {
        let full = cause.to_string();
        let mut message = Vec::new();
        for line in full.lines() {
            match line.strip_prefix("hint: ") {
                Some(hint) if !hints.contains(&hint.to_owned()) => hints.push(hint.to_owned()),
                Some(_) => {}
                None => message.push(line),
            }
        }
        let message = message.join("\n");
        // Many errors print their source themselves.
        if outer.ends_with(&message) {
            continue;
        }
        if !outer.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&message);
        outer = message;
    }
    for hint in hints {
        text.push_str("\nhint: ");
        text.push_str(&hint);
    }
    // What data and names hold must not steer the terminal.
    visible(&text).into_owned()
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn an_error_does_not_steer_the_terminal() {
        assert_eq!(error_text(&anyhow::anyhow!("no `\x1b[2J`")), "error: no `\u{fffd}[2J`");
    }

    #[test]
    fn a_chain_is_one_line_and_its_hints_come_last() {
        let inner = anyhow::anyhow!("file is short\nhint: copy it again");
        let error = inner.context("failed to load `a`\nhint: pass another").context("failed to start");
        assert_eq!(
            error_text(&error),
            "error: failed to start: failed to load `a`: file is short\nhint: pass another\nhint: copy it again"
        );
    }

    #[test]
    fn a_source_that_the_outer_message_repeats_is_not_said_twice() {
        let missing = std::fs::read("/does/not/exist").expect_err("missing");
        let reason = missing.to_string();
        let error = crate::checkpoint::CheckpointError::Write { path: "o".into(), source: missing };
        let expected = format!("error: failed to write `o`; any checkpoint saved before is kept: {reason}");
        assert_eq!(error_text(&error.into()), expected);
    }

    #[test]
    fn exit_codes_tell_wrong_usage_from_failure() {
        let code = |code: ExitCode| format!("{code:?}");
        assert_eq!(code(report(Ok(()))), code(ExitCode::SUCCESS));
        assert_eq!(code(report(Err(anyhow::anyhow!("failed")))), code(ExitCode::from(1)));
        let usage = Err(UsageError("`--ids` and `--data`".into())).context("outer");
        assert_eq!(code(report(usage)), code(ExitCode::from(2)));
    }
}
