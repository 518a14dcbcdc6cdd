//! `--tui`: a run on the whole terminal while it goes on.
//!
//! A thread of its own draws what [`live`] keeps and what is logged, and reads the keys. However the program ends, the
//! terminal is given back first: at the end of a run, before an error is told, in a panic, and before a second signal
//! ends the process.

mod screen;

use std::collections::VecDeque;
use std::io::{self, IsTerminal, stderr, stdin, stdout};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, Once, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use indicatif::ProgressDrawTarget;
use ratatui::Terminal;
use ratatui::backend::{Backend, CrosstermBackend};
use ratatui::crossterm::cursor::Show;
use ratatui::crossterm::event::{self, KeyCode, KeyEvent, KeyModifiers};
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode};

use crate::interrupt;
use crate::kernels::memory;
pub use crate::logging::visible;
use crate::logging::{self, bars, say};
use crate::metrics::live;
use screen::{Page, Shown};

/// Between two pictures.
const TICK: Duration = Duration::from_millis(250);

/// Log messages that are kept while the view is open.
const MAX_LINES: usize = 1000;

/// Name of the thread that draws.
const THREAD: &str = "view";

/// Has the terminal given back in a panic and before a signal ends the process.
static GIVEN_BACK: Once = Once::new();

static IS_OPEN: AtomicBool = AtomicBool::new(false);

/// Held while the terminal is drawn on or given back.
static TERMINAL: Mutex<()> = Mutex::new(());

/// What was logged since the view was opened.
static LINES: Mutex<VecDeque<String>> = Mutex::new(VecDeque::new());

/// [`visible`], for a screen that gives a tab no width: it is four spaces.
pub fn drawn(text: &str) -> String {
    visible(text).replace('\t', "    ")
}

/// Whether somebody sits at a terminal, with nothing in between.
pub fn is_at_terminal() -> bool {
    stdin().is_terminal() && stdout().is_terminal()
}

/// Lets go of a terminal. Where it has gone, ratatui would say on it that the cursor stays hidden, and panic.
pub fn let_go<B: Backend>(mut terminal: Terminal<B>) {
    if terminal.show_cursor().is_err() {
        std::mem::forget(terminal);
    }
}

/// The view while it is open; dropping it gives the terminal back.
#[derive(Debug)]
pub struct View {
    drawing: Option<JoinHandle<()>>,
}

impl View {
    /// Takes over the terminal. Where there is none, a warning says so, and the run shows itself in plain lines.
    ///
    /// # Errors
    /// If the terminal refuses; it is then as before.
    pub fn open() -> io::Result<Self> {
        if !is_at_terminal() {
            tracing::warn!("`--tui` needs a terminal for stdin and stdout: plain lines instead");
            return Ok(Self { drawing: None });
        }
        GIVEN_BACK.call_once(|| {
            interrupt::before_exit(leave);
            let earlier = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                leave();
                earlier(panic);
            }));
        });
        live::watch();
        IS_OPEN.store(true, Ordering::SeqCst);
        let opened = take_over()
            .and_then(|terminal| thread::Builder::new().name(THREAD.to_owned()).spawn(move || serve(terminal)));
        match opened {
            Ok(drawing) => Ok(Self { drawing: Some(drawing) }),
            Err(error) => {
                leave();
                Err(error)
            }
        }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        leave();
        if let Some(drawing) = self.drawing.take() {
            // Of a thread that panicked the message was told.
            let _ = drawing.join();
        }
    }
}

fn take_over() -> io::Result<Terminal<CrosstermBackend<io::Stdout>>> {
    bars().set_draw_target(ProgressDrawTarget::hidden());
    logging::divert(Some(keep));
    enable_raw_mode()?;
    execute!(stdout(), EnterAlternateScreen)?;
    Terminal::new(CrosstermBackend::new(stdout()))
}

/// Gives the terminal back, if the view is open, with the messages that stood in it: what follows is plain lines. To be
/// called before results are written to stdout.
pub fn leave() {
    if !IS_OPEN.swap(false, Ordering::SeqCst) {
        return;
    }
    // The thread that draws comes here with a key, or in a panic while it holds the lock.
    let is_drawing = thread::current().name() == Some(THREAD);
    let _held = (!is_drawing).then(|| TERMINAL.lock().unwrap_or_else(PoisonError::into_inner));
    // Nothing is left to try if the terminal has gone.
    let _ = disable_raw_mode();
    let _ = execute!(stdout(), LeaveAlternateScreen, Show);
    logging::divert(None);
    bars().set_draw_target(ProgressDrawTarget::stderr());
    // Elsewhere they were written as they came. A thread that panicked may hold them.
    if stderr().is_terminal()
        && let Ok(mut lines) = LINES.try_lock()
    {
        lines.drain(..).for_each(|line| say(&line));
    }
}

/// Keeps a log message for the view.
fn keep(line: &str) {
    let mut lines = LINES.lock().unwrap_or_else(PoisonError::into_inner);
    lines.extend(line.lines().map(str::to_owned));
    let too_many = lines.len().saturating_sub(MAX_LINES);
    lines.drain(..too_many);
}

/// Draws and reads keys until the view is left. A terminal that fails, as one that was closed does, is left: the run
/// matters more.
fn serve(mut terminal: Terminal<CrosstermBackend<io::Stdout>>) {
    let mut page = Page::default();
    while IS_OPEN.load(Ordering::SeqCst) {
        let read = draw(&mut terminal, &mut page).and_then(|()| read(TICK));
        match read {
            Ok(Some(key)) => press(key, &mut page),
            Ok(None) => {}
            Err(_) => leave(),
        }
    }
    let_go(terminal);
}

/// The key that is pressed within `wait`, if one is.
///
/// # Errors
/// If the terminal fails.
pub fn read(wait: Duration) -> io::Result<Option<KeyEvent>> {
    if !event::poll(wait)? {
        return Ok(None);
    }
    let key = event::read()?.as_key_press_event();
    Ok(key)
}

fn draw(terminal: &mut Terminal<CrosstermBackend<io::Stdout>>, page: &mut Page) -> io::Result<()> {
    let _held = TERMINAL.lock().unwrap_or_else(PoisonError::into_inner);
    if !IS_OPEN.load(Ordering::SeqCst) {
        return Ok(());
    }
    let lines = LINES.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let (work, memory) = (logging::work(), memory::usage());
    let drawn = live::look(|live| {
        terminal
            .draw(|frame| screen::draw(frame, &Shown { live, lines: &lines, work: work.as_ref(), memory }, page))
            .map(|_| ())
    });
    drawn.unwrap_or(Ok(()))
}

fn press(key: KeyEvent, page: &mut Page) {
    if key.modifiers.contains(KeyModifiers::CONTROL) {
        if key.code == KeyCode::Char('c') {
            interrupt::raise();
        }
        return;
    }
    match key.code {
        KeyCode::Char('q' | 'Q') => leave(),
        KeyCode::Left | KeyCode::BackTab => page.curves = page.curves.saturating_sub(1),
        KeyCode::Right | KeyCode::Tab => page.curves += 1,
        KeyCode::Up => page.sample = page.sample.saturating_sub(1),
        KeyCode::Down => page.sample += 1,
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_that_steer_a_terminal_are_not_shown() {
        assert_eq!(visible("a\n\tb é שלום"), "a\n\tb é שלום");
        assert_eq!(drawn("if x:\n\treturn\t1"), "if x:\n    return    1");
        assert_eq!(visible("\x1b[2J\rx\u{9b}"), "\u{fffd}[2J\u{fffd}x\u{fffd}");
        for turn in ('\u{202a}'..='\u{202e}').chain('\u{2066}'..='\u{2069}') {
            assert_eq!(visible(&format!("a{turn}b")), "a\u{fffd}b", "{turn:?}");
        }
    }
}
