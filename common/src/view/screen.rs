//! What the view looks like.

use std::collections::VecDeque;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::symbols::Marker;
use ratatui::text::{Line, Text};
use ratatui::widgets::{Axis, Block, Chart, Dataset, GraphType, LineGauge, Paragraph, Wrap};

use super::drawn;
use crate::kernels::memory::Usage;
use crate::logging::Work;
use crate::metrics::live::Live;
use crate::metrics::{Curves, curves, duration_text, number_text, rate_text};

/// The smallest plot that can be read, in columns and lines.
const PLOT: (u16, u16) = (40, 9);

/// Columns from which samples and log stand side by side.
const WIDE: u16 = 100;

const KEYS: &str = " ← → curves   ↑ ↓ samples   q leave the view, the run goes on   Ctrl-C save and stop";

/// All that is shown.
pub(super) struct Shown<'a> {
    pub(super) live: &'a Live,
    /// What was logged, the latest last.
    pub(super) lines: &'a VecDeque<String>,
    /// Work besides training, such as sampling answers.
    pub(super) work: Option<&'a Work>,
    pub(super) memory: Usage,
}

/// The part of it that the person looks at.
#[derive(Debug, Default)]
pub(super) struct Page {
    /// Page of plots, from 0.
    pub(super) curves: usize,
    /// Lines that the samples are scrolled by.
    pub(super) sample: u16,
}

pub(super) fn draw(frame: &mut Frame, shown: &Shown<'_>, page: &mut Page) {
    let area = frame.area();
    let head = Paragraph::new(head(shown)).wrap(Wrap { trim: false }).bold();
    let head_height = (head.line_count(area.width) as u16).clamp(1, 3);
    let foot = Paragraph::new(KEYS).wrap(Wrap { trim: false }).dim();
    let foot_height = (foot.line_count(area.width) as u16).clamp(1, 2);
    let lengths =
        [Constraint::Length(head_height), Constraint::Length(1), Constraint::Fill(1), Constraint::Length(foot_height)];
    let [above, gauge, body, below] = Layout::vertical(lengths).areas(area);
    frame.render_widget(head, above);
    let ratio = shown.live.step as f64 / shown.live.total_steps.max(1) as f64;
    let bar = LineGauge::default().ratio(ratio.clamp(0.0, 1.0)).filled_symbol("━").unfilled_symbol("╌");
    frame.render_widget(bar.filled_style(Color::Cyan), gauge);
    frame.render_widget(foot, below);

    let plots = curves(shown.live.series.keys().map(String::as_str));
    let has_plots = !plots.is_empty() && body.height >= PLOT.1 + 5;
    let shares = if has_plots {
        [Constraint::Fill(3), Constraint::Fill(2)]
    } else {
        [Constraint::Length(0), Constraint::Fill(1)]
    };
    let [upper, lower] = Layout::vertical(shares).areas(body);
    if has_plots {
        draw_plots(frame, upper, shown.live, &plots, page);
    }
    let has_samples = !shown.live.samples.is_empty() && (lower.width >= WIDE || lower.height >= 12);
    if !has_samples {
        return draw_log(frame, lower, shown.lines);
    }
    let halves = [Constraint::Fill(1), Constraint::Fill(1)];
    let [samples, log] =
        if lower.width >= WIDE { Layout::horizontal(halves) } else { Layout::vertical(halves) }.areas(lower);
    draw_samples(frame, samples, shown.live, page);
    draw_log(frame, log, shown.lines);
}

/// What runs, how far and how fast it is, and what it takes.
fn head(shown: &Shown<'_>) -> String {
    let Live { out, step, total_steps, tokens_per_second, seconds, seconds_left, .. } = shown.live;
    let mut parts = Vec::new();
    if *total_steps > 0 {
        parts.push(format!("{}   step {step} of {total_steps}", out.display()));
        parts.extend(tokens_per_second.map(rate_text));
    }
    let mib = |bytes: usize| bytes >> 20;
    parts.push(format!("{} MiB ({} at most)", mib(shown.memory.resident_bytes), mib(shown.memory.peak_bytes)));
    if *total_steps > 0 {
        parts.push(duration_text(*seconds));
        parts.extend(seconds_left.map(|left| format!("{} left", duration_text(left))));
    }
    parts.extend(shown.work.map(|work| format!("{}: {} of {} {}", work.what, work.done, work.all, work.things)));
    format!(" {}", parts.join("   "))
}

/// As many plots as fit, page by page.
fn draw_plots(frame: &mut Frame, area: Rect, live: &Live, plots: &[Curves], page: &mut Page) {
    let n_columns = usize::from((area.width / PLOT.0).clamp(1, 3)).min(plots.len());
    let n_rows = usize::from((area.height / PLOT.1).clamp(1, 3)).min(plots.len().div_ceil(n_columns));
    let n_pages = plots.len().div_ceil(n_columns * n_rows);
    page.curves = page.curves.min(n_pages - 1);
    let of_page = plots.chunks(n_columns * n_rows).nth(page.curves).unwrap_or_default();
    let rows = Layout::vertical(vec![Constraint::Fill(1); n_rows]).split(area);
    for (row_idx, (of_row, row)) in of_page.chunks(n_columns).zip(rows.iter()).enumerate() {
        let columns = Layout::horizontal(vec![Constraint::Fill(1); n_columns]).split(*row);
        for (column_idx, (plot, area)) in of_row.iter().zip(columns.iter()).enumerate() {
            let is_first = row_idx == 0 && column_idx == 0;
            let pages = (n_pages > 1 && is_first).then(|| format!(" {}/{n_pages} ", page.curves + 1));
            draw_plot(frame, *area, live, plot, pages);
        }
    }
}

/// Training as a line, held-out data as dots: they differ without colours too.
fn draw_plot(frame: &mut Frame, area: Rect, live: &Live, plot: &Curves, pages: Option<String>) {
    let points = |name: &Option<String>| {
        let series = name.as_ref().and_then(|name| live.series.get(name)).map_or(&[][..], Vec::as_slice);
        (thin(series, usize::from(area.width) * 2), series.last().map(|last| number_text(last.1)))
    };
    let ((train, last), (held_out, last_held_out)) = (points(&plot.train), points(&plot.held_out));
    let mut title = format!(" {}", plot.title);
    title.extend(last.map(|last| format!("  {last}")));
    title.extend(last_held_out.map(|last| format!("  held out {last} •")));
    let mut block = Block::bordered().title(title + " ");
    if let Some(pages) = pages {
        block = block.title(Line::from(pages).right_aligned());
    }
    let all = || train.iter().chain(&held_out);
    let [x_bounds, y_bounds] = [bounds(all().map(|point| point.0)), bounds(all().map(|point| point.1))];
    let labels = |[low, high]: [f64; 2]| [number_text(low), number_text(high)];
    let steps = x_bounds.map(|step| format!("{step:.0}"));
    let line = Dataset::default().marker(Marker::Braille).graph_type(GraphType::Line).style(Color::Cyan).data(&train);
    let dots =
        Dataset::default().marker(Marker::Dot).graph_type(GraphType::Scatter).style(Color::Yellow).data(&held_out);
    let chart = Chart::new(vec![line, dots])
        .block(block)
        .x_axis(Axis::default().bounds(x_bounds).labels(steps).style(Style::new().dim()))
        .y_axis(Axis::default().bounds(y_bounds).labels(labels(y_bounds)).style(Style::new().dim()));
    frame.render_widget(chart, area);
}

/// At most about `n` points, means of neighbours.
fn thin(series: &[(f64, f64)], n: usize) -> Vec<(f64, f64)> {
    let mean = |part: &[(f64, f64)], of: fn(&(f64, f64)) -> f64| part.iter().map(of).sum::<f64>() / part.len() as f64;
    series
        .chunks(series.len().div_ceil(n.max(1)).max(1))
        .map(|part| (mean(part, |p| p.0), mean(part, |p| p.1)))
        .collect()
}

/// The range of `values`, or about the only one.
fn bounds(values: impl Iterator<Item = f64>) -> [f64; 2] {
    let [low, high] =
        values.fold([f64::INFINITY, f64::NEG_INFINITY], |[low, high], value| [low.min(value), high.max(value)]);
    match high - low {
        width if width > 0.0 => [low, high],
        0.0 => [low - 0.5, high + 0.5],
        _ => [0.0, 1.0],
    }
}

fn draw_samples(frame: &mut Frame, area: Rect, live: &Live, page: &mut Page) {
    let mut text = Text::default();
    for (i, sample) in live.samples.iter().enumerate() {
        if i > 0 {
            text.push_line("");
        }
        text.extend(Text::raw(drawn(&sample.prompt)).dim());
        text.extend(Text::raw(drawn(&sample.text)));
    }
    let step = live.samples.last().map_or(0, |sample| sample.step);
    let text = Paragraph::new(text).wrap(Wrap { trim: false });
    let hidden = (text.line_count(area.width.saturating_sub(2)) as u16).saturating_sub(area.height.saturating_sub(2));
    page.sample = page.sample.min(hidden);
    let mut block = Block::bordered().title(format!(" sampled at step {step} "));
    if page.sample < hidden {
        block = block.title_bottom(Line::from(" ↓ more ").right_aligned());
    }
    frame.render_widget(text.block(block).scroll((page.sample, 0)), area);
}

/// The latest messages, cut to about two lines each.
fn draw_log(frame: &mut Frame, area: Rect, lines: &VecDeque<String>) {
    // Each takes a line or more.
    let latest = lines.iter().skip(lines.len().saturating_sub(usize::from(area.height)));
    let most = 2 * usize::from(area.width.saturating_sub(2)).saturating_sub(1);
    let latest = latest.map(|line| match line.char_indices().nth(most) {
        Some((end, _)) => format!("{}…", drawn(&line[..end])),
        None => drawn(line),
    });
    let text = Paragraph::new(latest.map(Line::from).collect::<Vec<_>>()).wrap(Wrap { trim: false });
    let hidden =
        text.line_count(area.width.saturating_sub(2)).saturating_sub(usize::from(area.height.saturating_sub(2)));
    frame.render_widget(text.block(Block::bordered().title(" log ")).scroll((hidden as u16, 0)), area);
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;
    use crate::metrics::Sample;

    fn live() -> Live {
        let falling: Vec<(f64, f64)> = (1..=500).map(|i| (f64::from(i), 3.0 / f64::from(i))).collect();
        let held_out = falling.iter().step_by(100).copied().collect();
        Live {
            out: "runs/sft".into(),
            step: 500,
            total_steps: 2000,
            tokens_per_second: Some(12_300.0),
            seconds: 65.0,
            seconds_left: Some(187.0),
            series: [
                ("train/loss".to_owned(), falling.clone()),
                ("val/loss".to_owned(), held_out),
                ("train/lr".to_owned(), vec![(1.0, 1e-3); 3]),
                ("train/grad_norm".to_owned(), falling),
            ]
            .into(),
            samples: vec![Sample {
                step: 400,
                prompt: "Who is there?".to_owned(),
                text: "An owl.\x1b[2J\u{202e}".to_owned(),
            }],
            ..Live::default()
        }
    }

    fn screen(live: &Live, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a screen");
        let memory = Usage { cpu_seconds: 1.0, peak_bytes: 600 << 20, resident_bytes: 500 << 20 };
        let lines = ["checkpoint saved".to_owned(), "val/loss 0.006".to_owned()].into();
        let work = Work { what: "reference".to_owned(), done: 3, all: 9, things: "pairs" };
        let shown = Shown { live, lines: &lines, work: Some(&work), memory };
        terminal.draw(|frame| draw(frame, &shown, &mut Page::default())).expect("drawn");
        let buffer = terminal.backend().buffer();
        let steers = |c: char| c.is_control() || c == '\u{202e}';
        assert!(!buffer.content().iter().flat_map(|cell| cell.symbol().chars()).any(steers));
        let line = |y| (0..width).map(|x| buffer[(x, y)].symbol().to_owned()).collect::<String>();
        (0..height).map(line).collect()
    }

    #[test]
    fn curves_samples_speed_memory_time_and_log_are_there() {
        let screen = screen(&live(), 120, 36).join("\n");
        for part in [
            "runs/sft   step 500 of 2000   12.3k tokens/s   500 MiB (600 at most)   1m05s   3m07s left",
            "reference: 3 of 9 pairs",
            "━",
            "25%",
            " loss  0.006  held out 0.007 •",
            " learning rate  0.001",
            "norm of the gradient",
            "sampled at step 400",
            "Who is there?",
            "An owl.\u{fffd}[2J\u{fffd}",
            "checkpoint saved",
            "q leave the view, the run goes on",
        ] {
            assert!(screen.contains(part), "{part} is missing:\n{screen}");
        }
        assert!(screen.chars().any(|c| ('\u{2801}'..='\u{28ff}').contains(&c)), "no line is drawn:\n{screen}");
    }

    #[test]
    fn samples_that_are_seen_whole_have_no_more() {
        // Eleven lines in all.
        let sample = |i| Sample { step: 1, prompt: format!("p{i}"), text: "a\nb".to_owned() };
        let live = Live { samples: (0..3).map(sample).collect(), ..Live::default() };
        let shown = |height, scrolled| {
            let mut terminal = Terminal::new(TestBackend::new(40, height)).expect("a screen");
            let mut page = Page { sample: scrolled, ..Page::default() };
            terminal.draw(|frame| draw_samples(frame, frame.area(), &live, &mut page)).expect("drawn");
            let buffer = terminal.backend().buffer();
            buffer.content().iter().map(ratatui::buffer::Cell::symbol).collect::<String>()
        };
        for (height, scrolled, has_more) in [(13, 0, false), (12, 0, true), (12, 1, false), (12, 9, false)] {
            assert_eq!(shown(height, scrolled).contains("↓ more"), has_more, "{scrolled} of {height}");
        }
    }

    #[test]
    fn a_small_screen_keeps_what_matters_and_none_is_too_small() {
        let narrow = screen(&live(), 60, 30).join("\n");
        assert!(narrow.contains(" loss ") && narrow.contains("val/loss 0.006"), "{narrow}");
        let low = screen(&live(), 100, 10).join("\n");
        assert!(low.contains("step 500 of 2000") && low.contains("val/loss 0.006") && !low.contains("╌ loss"), "{low}");
        for (width, height) in [(1, 1), (3, 2), (10, 3), (40, 14), (41, 15), (200, 4), (4, 60)] {
            screen(&live(), width, height);
            screen(&Live::default(), width, height);
        }
    }

    #[test]
    fn long_curves_are_thinned_and_flat_ones_have_a_range() {
        let long: Vec<(f64, f64)> = (0..10_000).map(|i| (f64::from(i), 2.0)).collect();
        let thinned = thin(&long, 80);
        assert!(thinned.len() <= 80 && thinned.iter().all(|point| point.1 == 2.0), "{}", thinned.len());
        assert_eq!(thin(&[], 80), []);
        assert_eq!(bounds([2.0, 2.0].into_iter()), [1.5, 2.5]);
        assert_eq!(bounds(std::iter::empty()), [0.0, 1.0]);
    }
}
