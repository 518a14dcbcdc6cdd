//! Showing what a model says.

use std::borrow::Cow;
use std::io::{self, IsTerminal, StdoutLock, Write};

use common::view::visible;

/// Writes a piece of an answer at once.
///
/// A terminal is shown no control characters: a model must not move the cursor or change the window's title. Files and
/// pipes get the text as it is.
pub(crate) fn write(out: &mut StdoutLock<'_>, text: &str) -> io::Result<()> {
    let shown = if out.is_terminal() { visible(text) } else { Cow::Borrowed(text) };
    out.write_all(shown.as_bytes())?;
    out.flush()
}
