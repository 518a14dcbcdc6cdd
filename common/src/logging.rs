//! Log messages and progress bars, both on stderr.

use std::borrow::Cow;
use std::io::{IsTerminal, Write};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::fmt::{FmtContext, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

/// The crates that log at the level asked for; the GPU libraries would say a lot at `info`.
const OURS: [&str; 19] = [
    "base",
    "bench",
    "book",
    "chat",
    "common",
    "compare",
    "dpo",
    "group",
    "kernels",
    "model",
    "plot",
    "ppo",
    "pretrain",
    "recipe",
    "reward_model",
    "score",
    "sft",
    "text",
    "toy",
];

/// Until a bar is shown: what is done at once needs none.
const SHOW_AFTER: Duration = Duration::from_millis(500);

/// Until the first line on the progress of work that has no bar; from line to line the time doubles, up to [`SAY_EVERY`].
const SAY_FIRST: Duration = Duration::from_secs(10);

/// Between two later lines.
const SAY_EVERY: Duration = Duration::from_mins(1);

/// Sends log messages to stderr, above the progress bars; with date and time where that is no terminal but a file.
///
/// `verbose` counts `-v`. The variable `RUST_LOG` goes before both flags. A second call does nothing.
pub fn init(verbose: u8, quiet: bool) {
    init_on(true, verbose, quiet);
}

/// [`init`] on a rank of a group: what all would say, the first alone says.
pub fn init_on(is_first: bool, verbose: u8, quiet: bool) {
    let level = match (quiet, verbose) {
        _ if !is_first => "error",
        (true, _) => "warn",
        (false, 0) => "info",
        (false, 1) => "debug",
        (false, _) => "trace",
    };
    let default = OURS.map(|name| format!("{name}={level}")).join(",") + if verbose > 1 { ",info" } else { ",warn" };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    if quiet || !is_first {
        bars().set_draw_target(ProgressDrawTarget::hidden());
    }
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(AboveBars)
        .event_format(Plain { is_dated: !std::io::stderr().is_terminal() });
    // An error means that logging was set up before, by a test or by the recipe that runs this stage.
    let _ = subscriber.try_init();
}

/// `1 pair is` or `3 pairs are`: a count with what is said of one and of many.
pub fn counted(n: usize, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}

/// A count with its digits in groups: `134,515,008`.
pub fn grouped(n: usize) -> String {
    let digits = n.to_string();
    let groups: Vec<&str> =
        digits.as_bytes().rchunks(3).rev().map(|group| std::str::from_utf8(group).unwrap_or("")).collect();
    groups.join(",")
}

/// The progress bars of this process. Anything else that goes to stderr goes through [`say`], so that text and bars do not
/// overwrite each other.
pub fn bars() -> &'static MultiProgress {
    static BARS: OnceLock<MultiProgress> = OnceLock::new();
    BARS.get_or_init(MultiProgress::new)
}

/// How far a piece of work is.
#[derive(Debug, Clone)]
pub struct Work {
    /// The work, such as `reference`.
    pub what: String,
    /// How many are done.
    pub done: usize,
    /// How many there are.
    pub all: usize,
    /// The things that it is done to, such as `pairs`.
    pub things: &'static str,
}

static WORK: Mutex<Option<Work>> = Mutex::new(None);

/// The work that a [`Progress`] is of, where there is one.
pub fn work() -> Option<Work> {
    WORK.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

fn publish(work: Option<Work>) {
    *WORK.lock().unwrap_or_else(PoisonError::into_inner) = work;
}

/// Shows how far a piece of work is, such as the scoring of pairs: a bar on a terminal, elsewhere a line after ten seconds
/// and then ever more seldom, up to one a minute.
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    is_shown: bool,
    work: Work,
    /// Bytes are counted one by one and told in MB.
    bytes_done: Option<u64>,
    began: Instant,
    said: Instant,
    /// From the last line to the next.
    pause: Duration,
}

/// Bytes of a megabyte, in which [`Progress::of_bytes`] tells its work.
const MB: u64 = 1_000_000;

impl Progress {
    /// Of the work `what` on `n` `things`.
    pub fn new(what: &str, n: usize, things: &'static str) -> Self {
        let template = format!("{{msg}} {{wide_bar}} {{pos}}/{{len}} {things}, {{eta}} left");
        Self::with(what, n as u64, &template, Work { what: what.to_owned(), done: 0, all: n, things }, None)
    }

    /// Of the work `what` on `n` bytes, with its speed.
    pub fn of_bytes(what: &str, n: u64) -> Self {
        let template = "{msg} {wide_bar} {decimal_bytes}/{decimal_total_bytes}, {decimal_bytes_per_sec}, {eta} left";
        let work = Work { what: what.to_owned(), done: 0, all: n.div_ceil(MB) as usize, things: "MB" };
        Self::with(what, n, template, work, Some(0))
    }

    fn with(what: &str, n: u64, template: &str, work: Work, bytes_done: Option<u64>) -> Self {
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let target = ProgressDrawTarget::hidden();
        let bar = ProgressBar::with_draw_target(Some(n), target).with_style(style).with_message(what.to_owned());
        let now = Instant::now();
        Self { bar, is_shown: false, work, bytes_done, began: now, said: now, pause: SAY_FIRST }
    }

    /// Notes that `n` more are done.
    pub fn add(&mut self, n: usize) {
        self.bar.inc(n as u64);
        match &mut self.bytes_done {
            None => self.work.done += n,
            Some(bytes) => {
                *bytes += n as u64;
                self.work.done = (*bytes / MB) as usize;
            }
        }
        if !self.is_shown && self.began.elapsed() >= SHOW_AFTER {
            self.is_shown = true;
            self.bar = bars().add(self.bar.clone());
        }
        if self.is_shown {
            publish(Some(self.work.clone()));
        }
        if bars().is_hidden() && !is_diverted() && self.said.elapsed() >= self.pause {
            self.said = Instant::now();
            self.pause = (2 * self.pause).min(SAY_EVERY);
            let Work { what, done, all, things } = &self.work;
            let per_second = *done as f64 / self.began.elapsed().as_secs_f64();
            let left = all.saturating_sub(*done) as f64 / per_second;
            let speed = if self.bytes_done.is_some() { format!(", {per_second:.1} MB/s") } else { String::new() };
            tracing::info!("{what}: {done}/{all} {things}{speed}, {left:.0} s left");
        }
    }

    /// Notes that `n` bytes need no work: they do not count for the speed.
    pub fn leave_out(&mut self, n: u64) {
        let all = self.bar.length().unwrap_or_default().saturating_sub(n);
        self.bar.set_length(all);
        self.work.all = all.div_ceil(MB) as usize;
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.is_shown {
            publish(None);
        }
        self.bar.finish_and_clear();
        bars().remove(&self.bar);
    }
}

/// Receives lines in the place of a terminal.
static DIVERTED: Mutex<Option<fn(&str)>> = Mutex::new(None);

/// Gives messages to `to` in place of the terminal, or again to the terminal; a file has them in any case.
pub fn divert(to: Option<fn(&str)>) {
    *DIVERTED.lock().unwrap_or_else(PoisonError::into_inner) = to;
}

/// Whether something else than messages and bars has the terminal.
pub fn is_diverted() -> bool {
    DIVERTED.lock().unwrap_or_else(PoisonError::into_inner).is_some()
}

/// Writes a line to stderr, above the progress bars, or to where [`divert`] sends it.
///
/// That nobody can read it, because the terminal was closed or the reader of a pipe has gone, is no reason to stop: what
/// runs is to be saved. `MultiProgress::suspend` would panic at it.
pub fn say(line: &str) {
    let line = line.trim_end_matches('\n');
    let diverted = *DIVERTED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(to) = diverted {
        to(line);
        if std::io::stderr().is_terminal() {
            return;
        }
    }
    let _ = if bars().is_hidden() { writeln!(std::io::stderr(), "{line}") } else { bars().println(line) };
}

/// The text as a terminal may be given it: with U+FFFD for every control character but line breaks and tabs, which could
/// move the cursor or change the window's title, and for those that turn the direction of writing, by which a text can
/// look like another one or change what stands beside it.
///
/// # Source
/// Unicode Standard Annex #9, section 2: the explicit directional embeddings, overrides and isolates.
pub fn visible(text: &str) -> Cow<'_, str> {
    let turns = |c| matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let hidden = |c: char| turns(c) || (c.is_control() && c != '\n' && c != '\t');
    if text.contains(hidden) { Cow::Owned(text.replace(hidden, "\u{fffd}")) } else { Cow::Borrowed(text) }
}

/// stderr by [`say`].
#[derive(Clone, Copy)]
struct AboveBars;

impl Write for AboveBars {
    /// A message comes in one piece. An error here would be said by the library on stderr, which would panic.
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        // What models and data say must not steer the terminal.
        say(&visible(&String::from_utf8_lossy(bytes)));
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for AboveBars {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        *self
    }
}

/// A message as a person wrote it; its level only where it is not `info`, in the style of the error line.
struct Plain {
    /// Whether date and time stand before it.
    is_dated: bool,
}

impl<S, N> FormatEvent<S, N> for Plain
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &tracing::Event<'_>,
    ) -> std::fmt::Result {
        if self.is_dated {
            write!(writer, "{} ", chrono::Local::now().format("%Y-%m-%d %H:%M:%S"))?;
        }
        match *event.metadata().level() {
            tracing::Level::ERROR => writer.write_str("error: ")?,
            tracing::Level::WARN => writer.write_str("warning: ")?,
            tracing::Level::INFO => {}
            level => write!(writer, "{} {}: ", level.as_str().to_lowercase(), event.metadata().target())?,
        }
        context.field_format().format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_of_counts_are_grouped() {
        assert_eq!([0, 999, 1000, 134_515_008].map(grouped), ["0", "999", "1,000", "134,515,008"]);
    }
}
