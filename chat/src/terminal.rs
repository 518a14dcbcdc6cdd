//! Showing what a model says.

use std::borrow::Cow;
use std::io::{self, IsTerminal, StdoutLock, Write};

/// Writes a piece of an answer at once.
///
/// A terminal is shown no control characters: a model must not move the cursor or change the window's title. Files and
/// pipes get the text as it is.
pub(crate) fn write(out: &mut StdoutLock<'_>, text: &str) -> io::Result<()> {
    let shown = if out.is_terminal() { visible(text) } else { Cow::Borrowed(text) };
    out.write_all(shown.as_bytes())?;
    out.flush()
}

/// The text with U+FFFD for every control character but line breaks and tabs.
fn visible(text: &str) -> Cow<'_, str> {
    let hidden = |c: char| c.is_control() && c != '\n' && c != '\t';
    if text.contains(hidden) { Cow::Owned(text.replace(hidden, "\u{fffd}")) } else { Cow::Borrowed(text) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_not_shown() {
        assert_eq!(visible("a\n\tb é"), "a\n\tb é");
        assert_eq!(visible("\x1b[2J\rx\u{9b}"), "\u{fffd}[2J\u{fffd}x\u{fffd}");
    }
}
