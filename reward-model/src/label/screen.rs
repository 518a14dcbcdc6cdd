//! The terminal: prompt above, answers side by side, one key a decision.

use std::time::Duration;

use anyhow::Context;
use common::conversation::{Message, Role};
use common::data::records::Verdict;
use common::interrupt::Interrupt;
use common::view::{self, drawn};
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Style, Stylize};
use ratatui::text::{Line, Text};
use ratatui::widgets::{Block, Paragraph, Wrap};
use ratatui::{DefaultTerminal, Frame};

use super::desk::{Desk, Progress};
use super::questions::Question;

/// How long a key is waited for before the clock is drawn again.
const TICK: Duration = Duration::from_millis(100);

/// Columns below which answers stand above each other.
const NARROW: u16 = 72;

/// The longest prompt, in lines of the screen, that is shown whole.
const PROMPT_LINES: u16 = 8;

const KEYS: &str = " a/← A is better   b/→ B is better   t tie   x both bad   s skip   u undo   ↑↓ answers   [ ] prompt   q save and leave";

/// What a key asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Decide(Verdict),
    Skip,
    Undo,
    ScrollAnswers(i16),
    ScrollPrompt(i16),
    Leave,
    Interrupt,
}

/// How far the texts of a question are scrolled, in lines.
#[derive(Debug, Clone, Copy, Default)]
struct Scroll {
    prompt: u16,
    answers: u16,
}

/// Asks until there is nothing left, or the person leaves. A terminal that is closed is a request to stop.
///
/// # Errors
/// If the terminal cannot be used, a question not be sampled, or a decision not be written; the terminal is then as before.
pub(super) fn run(desk: &mut Desk, interrupt: Interrupt) -> anyhow::Result<()> {
    let mut terminal = ratatui::try_init().context("failed to take over the terminal")?;
    let mut scroll = Scroll::default();
    let mut serve = || -> anyhow::Result<()> {
        while !interrupt.requested() {
            desk.refill()?;
            let pressed = match show(&mut terminal, desk, &mut scroll) {
                Err(_) if !view::is_at_terminal() => {
                    interrupt.hang_up();
                    break;
                }
                pressed => pressed?,
            };
            let Some(key) = pressed else { continue };
            match action(key) {
                None => {}
                Some(Action::Leave) => break,
                Some(Action::Interrupt) => interrupt.request(),
                Some(Action::ScrollAnswers(by)) => scroll.answers = scroll.answers.saturating_add_signed(by),
                Some(Action::ScrollPrompt(by)) => scroll.prompt = scroll.prompt.saturating_add_signed(by),
                Some(act) => {
                    match act {
                        Action::Decide(verdict) => desk.decide(verdict, desk.seconds())?,
                        Action::Undo => desk.undo()?,
                        _ => desk.skip(),
                    }
                    scroll = Scroll::default();
                }
            }
        }
        Ok(())
    };
    let served = serve();
    // Nothing is left to try if the terminal has gone; `restore` would say so on it, and panic.
    let _ = ratatui::try_restore();
    view::let_go(terminal);
    served
}

/// Draws, and waits a moment for a key.
fn show(terminal: &mut DefaultTerminal, desk: &Desk, scroll: &mut Scroll) -> anyhow::Result<Option<KeyEvent>> {
    terminal.draw(|frame| draw(frame, desk, scroll)).context("failed to draw")?;
    view::read(TICK).context("failed to read the terminal")
}

/// The meaning of a key.
fn action(key: KeyEvent) -> Option<Action> {
    if key.modifiers.contains(KeyModifiers::CONTROL) {
        return (key.code == KeyCode::Char('c')).then_some(Action::Interrupt);
    }
    Some(match key.code {
        KeyCode::Char('a' | 'A' | '1') | KeyCode::Left => Action::Decide(Verdict::First),
        KeyCode::Char('b' | 'B' | '2') | KeyCode::Right => Action::Decide(Verdict::Second),
        KeyCode::Char('t' | 'T' | '=') => Action::Decide(Verdict::Tie),
        KeyCode::Char('x' | 'X') => Action::Decide(Verdict::BothBad),
        KeyCode::Char('s' | 'S') => Action::Skip,
        KeyCode::Char('u' | 'U') | KeyCode::Backspace => Action::Undo,
        KeyCode::Up => Action::ScrollAnswers(-1),
        KeyCode::Down => Action::ScrollAnswers(1),
        KeyCode::PageUp => Action::ScrollAnswers(-10),
        KeyCode::PageDown => Action::ScrollAnswers(10),
        KeyCode::Char('[') => Action::ScrollPrompt(-1),
        KeyCode::Char(']') => Action::ScrollPrompt(1),
        KeyCode::Char('q' | 'Q') | KeyCode::Esc => Action::Leave,
        _ => return None,
    })
}

fn draw(frame: &mut Frame, desk: &Desk, scroll: &mut Scroll) {
    let keys = Paragraph::new(KEYS).wrap(Wrap { trim: true }).dim();
    let keys_height = keys.line_count(frame.area().width).min(3) as u16;
    let [head, body, foot] =
        Layout::vertical([Constraint::Length(1), Constraint::Min(3), Constraint::Length(keys_height)])
            .areas(frame.area());
    frame.render_widget(Line::from(pace(desk)).bold(), head);
    frame.render_widget(keys, foot);
    if let Some(question) = desk.question() {
        draw_question(frame, body, question, scroll);
        return;
    }
    let text = if desk.is_at_limit() {
        "That was the last one of `--limit`. u takes the last decision back, q leaves."
    } else if desk.is_over() {
        "Nothing is left to decide. u takes the last decision back, q leaves."
    } else {
        "The policy is writing two answers …"
    };
    frame.render_widget(Paragraph::new(text).wrap(Wrap { trim: true }).block(Block::bordered()), body);
}

fn draw_question(frame: &mut Frame, area: Rect, question: &Question, scroll: &mut Scroll) {
    let prompt = Paragraph::new(turns(&question.prompt)).wrap(Wrap { trim: false });
    let inner_width = area.width.saturating_sub(2);
    let prompt_lines = prompt.line_count(inner_width) as u16;
    let prompt_height = prompt_lines.min(PROMPT_LINES).min(area.height / 3).max(1) + 2;
    let [above, below] = Layout::vertical([Constraint::Length(prompt_height), Constraint::Min(3)]).areas(area);
    let hidden = prompt_lines.saturating_sub(prompt_height - 2);
    scroll.prompt = scroll.prompt.min(hidden);
    frame.render_widget(prompt.block(pane(" prompt ", scroll.prompt < hidden)).scroll((scroll.prompt, 0)), above);

    let halves = [Constraint::Fill(1), Constraint::Fill(1)];
    let [left, right] = if area.width < NARROW {
        Layout::vertical(halves).areas(below)
    } else {
        Layout::horizontal(halves).areas(below)
    };
    let panes = [(left, " A "), (right, " B ")];
    let texts = question.answers.each_ref().map(|answer| Paragraph::new(drawn(answer)).wrap(Wrap { trim: false }));
    let panes = panes.into_iter().zip(texts).map(|((area, name), text)| {
        let lines = text.line_count(area.width.saturating_sub(2)) as u16;
        (area, name, text, lines.saturating_sub(area.height.saturating_sub(2)))
    });
    let panes: Vec<_> = panes.collect();
    scroll.answers = scroll.answers.min(panes.iter().map(|(.., hidden)| *hidden).max().unwrap_or(0));
    for (area, name, text, hidden) in panes {
        // The shorter answer stays at its end while the other one goes on.
        let scrolled = scroll.answers.min(hidden);
        frame.render_widget(text.block(pane(name, scrolled < hidden)).scroll((scrolled, 0)), area);
    }
}

/// The frame of a text, which says whether there is more of it below.
fn pane(name: &str, has_more: bool) -> Block<'_> {
    let block = Block::bordered().title(name);
    if has_more { block.title_bottom(Line::from(" ↓ more ").right_aligned()) } else { block }
}

/// The turns of a prompt; a single message stands without its role.
fn turns(prompt: &[Message]) -> Text<'_> {
    if let [only] = prompt {
        return Text::raw(drawn(&only.content));
    }
    let mut text = Text::default();
    for message in prompt {
        let role = match message.role {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
        };
        text.push_line(Line::styled(format!("{role}:"), Style::new().bold()));
        text.extend(Text::raw(drawn(&message.content)));
    }
    text
}

/// How far the person is and how fast, or what there is to say about the last key.
fn pace(desk: &Desk) -> String {
    let Progress { n_before, n_now, n_all, n_skipped, n_left, time } = desk.progress();
    let mut text = format!(" {} of {n_all} decided", n_before + n_now);
    if n_skipped > 0 {
        text.push_str(&format!(", {n_skipped} skipped"));
    }
    if !desk.note().is_empty() {
        text.push_str(&format!("   {}", desk.note()));
    } else if n_now > 0 {
        let each = time.as_secs_f64() / n_now as f64;
        text.push_str(&format!("   {each:.1} s each"));
        if n_left > 0 {
            text.push_str(&format!("   {} left", time_left(each * n_left as f64)));
        }
    }
    text
}

/// So many seconds, roughly.
fn time_left(seconds: f64) -> String {
    match seconds / 60.0 {
        minutes if minutes < 1.0 => "less than a minute".to_owned(),
        minutes if minutes < 90.0 => format!("about {minutes:.0} min"),
        minutes => format!("about {:.1} h", minutes / 60.0),
    }
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::desk::tests::desk;
    use super::*;

    fn screen(desk: &Desk, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a screen");
        terminal.draw(|frame| draw(frame, desk, &mut Scroll::default())).expect("drawn");
        let buffer = terminal.backend().buffer().clone();
        let line = |y| (0..width).map(|x| buffer[(x, y)].symbol().to_owned()).collect::<String>();
        (0..height).map(line).collect()
    }

    #[test]
    fn answers_stand_side_by_side_and_on_a_narrow_screen_above_each_other() {
        let (mut desk, _dir) = desk(2, None);
        assert!(screen(&desk, 100, 20)[1..].concat().contains("The policy is writing"));
        desk.wait().expect("a question");
        let wide = screen(&desk, 100, 20);
        assert!(wide[0].starts_with(" 2 of 4 decided"), "{wide:#?}"); // two in an earlier session
        assert!(wide.iter().any(|line| line.contains(" A ") && line.contains(" B ")), "{wide:#?}");
        assert!(wide.iter().any(|line| line.contains("good") && line.contains("bad")), "{wide:#?}");
        let narrow = screen(&desk, 50, 20);
        assert!(!narrow.iter().any(|line| line.contains("good") && line.contains("bad")), "{narrow:#?}");
        assert!(narrow.concat().contains("good") && narrow.concat().contains("bad"), "{narrow:#?}");
        desk.undo().expect("nothing to do");
        assert!(screen(&desk, 100, 20)[0].contains("nothing of this session to take back"));
        // No screen is too small to be drawn.
        for (width, height) in [(1, 1), (10, 3), (72, 5)] {
            screen(&desk, width, height);
        }
    }

    #[test]
    fn an_answer_cannot_move_the_cursor() {
        let mut terminal = Terminal::new(TestBackend::new(80, 16)).expect("a screen");
        let question = Question {
            number: 0,
            prompt: vec![Message::new(Role::User, "p\x1b[2J\u{2066}")],
            answers: ["\x1b]0;title\x07a".to_owned(), "b\u{9b}\r\u{202e}".to_owned()],
        };
        let mut scroll = Scroll::default();
        terminal.draw(|frame| draw_question(frame, frame.area(), &question, &mut scroll)).expect("drawn");
        let symbols = terminal.backend().buffer().content().iter().map(ratatui::buffer::Cell::symbol);
        let shown: String = symbols.collect();
        for text in ["p\u{fffd}[2J\u{fffd}", "\u{fffd}]0;title\u{fffd}a", "b\u{fffd}\u{fffd}\u{fffd}"] {
            assert!(shown.contains(text), "{text}: {shown}");
        }
        assert!(!shown.contains(|c: char| c.is_control() || matches!(c, '\u{202e}' | '\u{2066}')), "{shown:?}");
    }

    #[test]
    fn each_text_says_whether_there_is_more_of_it() {
        let lines = |n: usize| (0..n).map(|i| format!("line {i}.")).collect::<Vec<_>>().join("\n");
        let question =
            Question { number: 0, prompt: vec![Message::new(Role::User, lines(9))], answers: [lines(30), lines(12)] };
        let shown = |prompt, answers| {
            let mut terminal = Terminal::new(TestBackend::new(100, 20)).expect("a screen");
            let mut scroll = Scroll { prompt, answers };
            terminal.draw(|frame| draw_question(frame, frame.area(), &question, &mut scroll)).expect("drawn");
            let buffer = terminal.backend().buffer().clone();
            let line = |y, columns: std::ops::Range<u16>| {
                columns.map(|x| buffer[(x, y)].symbol().to_owned()).collect::<String>()
            };
            let more = |y, columns| line(y, columns).contains("↓ more");
            (more(7, 0..100), more(19, 0..50), more(19, 50..100), line(18, 50..100))
        };
        // Six lines of the prompt have room, and ten of each answer.
        let (prompt, left, right, _) = shown(0, 0);
        assert_eq!([prompt, left, right], [true, true, true]);
        let (prompt, left, right, last) = shown(3, 2);
        assert_eq!([prompt, left, right], [false, true, false]);
        assert!(last.contains("line 11."), "{last}");
        let (_, left, right, last) = shown(3, 99);
        assert!(!left && !right && last.contains("line 11."), "the shorter one stays in sight: {last}");
    }

    #[test]
    fn a_skipped_question_is_told_and_still_counts() {
        let (mut desk, _dir) = desk(3, None);
        desk.wait().expect("a question");
        desk.skip();
        assert_eq!(pace(&desk), " 2 of 5 decided, 1 skipped"); // two in an earlier session
        desk.wait().expect("a question");
        desk.decide(Verdict::First, None).expect("written");
        let text = pace(&desk);
        assert!(
            text.starts_with(" 3 of 5 decided, 1 skipped   ") && text.ends_with(" s each   less than a minute left"),
            "{text}"
        );
        desk.wait().expect("a question");
        desk.decide(Verdict::First, None).expect("written");
        let text = pace(&desk);
        assert!(text.starts_with(" 4 of 5 decided, 1 skipped   ") && text.ends_with(" s each"), "{text}");
        let left = [0.0, 59.0, 61.0, 5400.0].map(time_left);
        assert_eq!(left, ["less than a minute", "less than a minute", "about 1 min", "about 1.5 h"]);
    }

    #[test]
    fn keys_have_their_meanings() {
        let press = |code| action(KeyEvent::new(code, KeyModifiers::NONE));
        assert_eq!(press(KeyCode::Left), Some(Action::Decide(Verdict::First)));
        assert_eq!(press(KeyCode::Char('b')), Some(Action::Decide(Verdict::Second)));
        assert_eq!(press(KeyCode::Char('z')), None);
        let control = |c| action(KeyEvent::new(KeyCode::Char(c), KeyModifiers::CONTROL));
        assert_eq!((control('c'), control('a')), (Some(Action::Interrupt), None));
    }
}
