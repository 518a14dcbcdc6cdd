//! Line plots as SVG text to be placed inside the page.
//!
//! Colours are CSS variables with a fallback, so a plot follows the page's light or dark scheme and still shows outside it.

#![forbid(unsafe_code)]

mod file;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

/// Most points drawn of one curve; longer ones are averaged in buckets.
const MAX_POINTS: usize = 400;
/// Up to this many points each is marked with a dot.
const MAX_DOTS: usize = 40;
/// Drawn larger than shown, because the SVG backend rounds coordinates to whole pixels.
const SCALE: u32 = 4;

/// Which colour of the page a curve takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hue {
    /// The page's accent: what the reader came for.
    Ember,
    /// The second voice.
    Slate,
    /// The third.
    Moss,
    /// The fourth.
    Plum,
    /// The fifth.
    Ochre,
    /// The sixth.
    Teal,
    /// The seventh.
    Rose,
    /// The eighth.
    Stone,
}

/// How loudly a curve is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weight {
    /// Thin and pale: a noisy per-step value.
    Faint,
    /// Thick, with a dot for each point where they are few: held-out values.
    Strong,
    /// Thick, without dots: a running mean.
    Trend,
    /// Dots alone: held-out values beside a trend.
    Dots,
    /// A pale area whose outline the points are, forth along one edge and back along the other.
    Band,
}

/// One line of a plot.
#[derive(Clone, Debug)]
pub struct Curve {
    /// Legend text.
    pub label: String,
    /// `(x, y)` in drawing order.
    pub points: Vec<(f64, f64)>,
    /// Colour.
    pub hue: Hue,
    /// Stroke.
    pub weight: Weight,
}

impl Weight {
    /// Suffix of the legend's CSS class for this stroke.
    pub fn class(self) -> &'static str {
        match self {
            Self::Faint => " faint",
            Self::Dots => " dots",
            Self::Band => " band",
            Self::Strong | Self::Trend => "",
        }
    }
}

/// A plot of curves over a common pair of axes.
#[derive(Clone, Debug)]
pub struct Plot<'a> {
    /// Text under the horizontal axis, with its unit.
    pub x_label: &'a str,
    /// Text beside the vertical axis, with its unit.
    pub y_label: &'a str,
    /// The lines, drawn in order.
    pub curves: &'a [Curve],
    /// Width in CSS pixels.
    pub width: u32,
    /// Height in CSS pixels.
    pub height: u32,
}

impl Plot<'_> {
    /// Draws the plot as an `<svg>` element; `None` if no curve has a point.
    ///
    /// # Errors
    /// If the drawing backend fails.
    pub fn to_svg(&self) -> Result<Option<String>> {
        let points = || self.curves.iter().flat_map(|curve| curve.points.iter()).filter(|p| is_finite(p));
        let Some((x_range, y_range)) = range(points().map(|p| p.0)).zip(range(points().map(|p| p.1))) else {
            return Ok(None);
        };
        let y_range = padded(y_range, 0.06);
        let x_range = if x_range.0 < x_range.1 { x_range } else { padded(x_range, 0.5) };

        let mut svg = String::new();
        {
            let size = (self.width * SCALE, self.height * SCALE);
            let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
            self.draw(&root, x_range, y_range)?;
            root.present().map_err(drawing)?;
        }
        Ok(Some(themed(&svg, self)))
    }

    fn draw(&self, root: &Canvas<'_>, x_range: (f64, f64), y_range: (f64, f64)) -> Result<()> {
        let px = |n: u32| (n * SCALE) as i32;
        let text = |points: u32| ("sans-serif", f64::from(points * SCALE) * 1.24).into_font().color(&paint(INK));
        let mut chart = ChartBuilder::on(root)
            .margin_top(px(10))
            .margin_right(px(14))
            .margin_bottom(px(2))
            .margin_left(px(2))
            .x_label_area_size(px(38))
            .y_label_area_size(px(58))
            .build_cartesian_2d(x_range.0..x_range.1, y_range.0..y_range.1)
            .map_err(drawing)?;
        let decimals = decimals(y_range.1 - y_range.0);
        chart
            .configure_mesh()
            .disable_x_mesh()
            .x_labels(6)
            .y_labels(7)
            .light_line_style(TRANSPARENT)
            .bold_line_style(paint(GRID).stroke_width(SCALE))
            .axis_style(paint(GRID).stroke_width(SCALE))
            .x_label_style(text(11))
            .y_label_style(text(11))
            .axis_desc_style(text(12))
            .x_label_formatter(&|x| thousands(*x))
            .y_label_formatter(&|y| fixed(*y, decimals))
            .x_desc(self.x_label)
            .y_desc(self.y_label)
            .draw()
            .map_err(drawing)?;
        for curve in self.curves {
            if curve.weight == Weight::Band {
                let outline: Vec<_> = curve.points.iter().copied().filter(is_finite).collect();
                let area = Polygon::new(outline, paint(curve.hue.rgb()).mix(0.15).filled());
                chart.draw_series([area]).map_err(drawing)?;
                continue;
            }
            let points = thin(&curve.points.iter().copied().filter(is_finite).collect::<Vec<_>>());
            let color = paint(curve.hue.rgb());
            let (color, width) = match curve.weight {
                Weight::Faint => (color.mix(0.5), SCALE * 5 / 4),
                _ => (color, 2 * SCALE),
            };
            let has_dots = match curve.weight {
                Weight::Strong => points.len() <= MAX_DOTS,
                weight => weight == Weight::Dots,
            };
            if has_dots {
                let dots = points.iter().map(|&point| Circle::new(point, px(3), color.filled()));
                chart.draw_series(dots).map_err(drawing)?;
            }
            if curve.weight != Weight::Dots {
                chart.draw_series(LineSeries::new(points, color.stroke_width(width))).map_err(drawing)?;
            }
        }
        Ok(())
    }
}

type Canvas<'a> = DrawingArea<SVGBackend<'a>, plotters::coord::Shift>;

fn is_finite(&(x, y): &(f64, f64)) -> bool {
    x.is_finite() && y.is_finite()
}

impl Hue {
    /// All of them, the ones that are told apart most easily first.
    pub const ALL: [Self; 8] =
        [Self::Ember, Self::Slate, Self::Moss, Self::Plum, Self::Ochre, Self::Teal, Self::Rose, Self::Stone];

    /// Name of the page's CSS class for this colour.
    pub fn class(self) -> &'static str {
        match self {
            Self::Ember => "ember",
            Self::Slate => "slate",
            Self::Moss => "moss",
            Self::Plum => "plum",
            Self::Ochre => "ochre",
            Self::Teal => "teal",
            Self::Rose => "rose",
            Self::Stone => "stone",
        }
    }

    fn rgb(self) -> RGBColor {
        match self {
            Self::Ember => EMBER,
            Self::Slate => SLATE,
            Self::Moss => MOSS,
            Self::Plum => PLUM,
            Self::Ochre => OCHRE,
            Self::Teal => TEAL,
            Self::Rose => ROSE,
            Self::Stone => STONE,
        }
    }
}

/// Averages neighbouring points so that at most [`MAX_POINTS`] remain; the last point is kept as it is.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let bucket = points.len().div_ceil(MAX_POINTS);
    if bucket <= 1 {
        return points.to_vec();
    }
    let mut thinned: Vec<(f64, f64)> = points
        .chunks(bucket)
        .map(|chunk| {
            let n = chunk.len() as f64;
            (chunk.iter().map(|p| p.0).sum::<f64>() / n, chunk.iter().map(|p| p.1).sum::<f64>() / n)
        })
        .collect();
    thinned.extend(points.last());
    thinned
}

/// Mean over a centred window of about a `1/parts` share of the points, three at least: the trend beside a noisy curve.
pub fn smooth(points: &[(f64, f64)], parts: usize) -> Vec<(f64, f64)> {
    let reach = (points.len() / (2 * parts.max(1))).max(1);
    (0..points.len())
        .map(|i| {
            let window = &points[i.saturating_sub(reach)..(i + reach + 1).min(points.len())];
            (points[i].0, window.iter().map(|p| p.1).sum::<f64>() / window.len() as f64)
        })
        .collect()
}

/// A whole number with commas: `12,000`; fractions keep two digits.
pub fn thousands(value: f64) -> String {
    if value.fract().abs() > 1e-9 {
        return format!("{value:.2}");
    }
    let digits = format!("{:.0}", value.abs());
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    if value < 0.0 { format!("−{text}") } else { text }
}

const INK: RGBColor = RGBColor(0x01, 0x01, 0x01);
const GRID: RGBColor = RGBColor(0x02, 0x02, 0x02);
const EMBER: RGBColor = RGBColor(0x03, 0x03, 0x03);
const SLATE: RGBColor = RGBColor(0x04, 0x04, 0x04);
const MOSS: RGBColor = RGBColor(0x05, 0x05, 0x05);
const PLUM: RGBColor = RGBColor(0x06, 0x06, 0x06);
const OCHRE: RGBColor = RGBColor(0x07, 0x07, 0x07);
const TEAL: RGBColor = RGBColor(0x08, 0x08, 0x08);
const ROSE: RGBColor = RGBColor(0x09, 0x09, 0x09);
const STONE: RGBColor = RGBColor(0x0a, 0x0a, 0x0a);
/// Marker colours as the backend writes them, and what stands in their place in the page.
const THEME: [(&str, &str); 10] = [
    ("\"#010101\"", "\"var(--plot-ink, #555)\""),
    ("\"#020202\"", "\"var(--plot-grid, #ddd)\""),
    ("\"#030303\"", "\"var(--ember, #c8501e)\""),
    ("\"#040404\"", "\"var(--slate, #4a6785)\""),
    ("\"#050505\"", "\"var(--moss, #5f7d3c)\""),
    ("\"#060606\"", "\"var(--plum, #7d3c6e)\""),
    ("\"#070707\"", "\"var(--ochre, #a57c0b)\""),
    ("\"#080808\"", "\"var(--teal, #1f8585)\""),
    ("\"#090909\"", "\"var(--rose, #c2476b)\""),
    ("\"#0A0A0A\"", "\"var(--stone, #7a7268)\""),
];

fn paint(color: RGBColor) -> RGBAColor {
    color.to_rgba()
}

/// Puts CSS variables in place of the marker colours and lets the page set the size.
fn themed(svg: &str, plot: &Plot<'_>) -> String {
    let size = format!("width=\"{}\" height=\"{}\"", plot.width * SCALE, plot.height * SCALE);
    let label = format!("{} by {}", plot.y_label, plot.x_label).replace(['"', '<', '>', '&'], "");
    let mut text = svg
        .replacen(&size, &format!("role=\"img\" aria-label=\"{label}\" preserveAspectRatio=\"xMidYMid meet\""), 1)
        .replace(
            "<polyline fill=\"none\"",
            "<polyline fill=\"none\" stroke-linejoin=\"round\" stroke-linecap=\"round\"",
        );
    for (marker, variable) in THEME {
        text = text.replace(marker, variable);
    }
    text
}

fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.fold(None, |range, value| match range {
        None => Some((value, value)),
        Some((low, high)) => Some((f64::min(low, value), f64::max(high, value))),
    })
}

fn padded((low, high): (f64, f64), share: f64) -> (f64, f64) {
    let pad = if high > low { (high - low) * share } else { low.abs().max(1.0) * 0.1 };
    (low - pad, high + pad)
}

/// A number with so many decimals; what rounds to 0 has no sign.
fn fixed(value: f64, decimals: usize) -> String {
    let text = format!("{value:.decimals$}");
    if text.trim_matches(['-', '0', '.']).is_empty() { text.trim_start_matches('-').to_owned() } else { text }
}

/// Decimals that tell the labels over `span` apart.
fn decimals(span: f64) -> usize {
    let step = span / 5.0;
    if step >= 1.0 { 0 } else { (-step.log10()).ceil().clamp(1.0, 6.0) as usize }
}

#[allow(clippy::needless_pass_by_value, reason = "used as a function value in `map_err`")]
fn drawing<E: std::fmt::Display>(error: E) -> anyhow::Error {
    anyhow!("failed to draw a plot: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn curve(points: Vec<(f64, f64)>) -> Curve {
        Curve { label: "loss".to_owned(), points, hue: Hue::Ember, weight: Weight::Strong }
    }

    #[test]
    fn a_plot_has_axes_and_follows_the_page_colours() {
        let curves = [curve((0..50).map(|i| (f64::from(i) * 100.0, 3.0 - f64::from(i) * 0.02)).collect())];
        let plot = Plot { x_label: "step", y_label: "loss <nats>", curves: &curves, width: 640, height: 300 };
        let svg = plot.to_svg().unwrap().unwrap();
        assert!(svg.starts_with("<svg role=\"img\""), "{svg}");
        assert!(svg.contains("loss &lt;nats&gt;") && svg.contains("4,000"), "{svg}");
        assert!(svg.contains("var(--ember") && !svg.contains("#030303"), "{svg}");
    }

    #[test]
    fn nothing_to_draw_is_no_plot_and_one_point_is_one() {
        let draw =
            |curves: &[Curve]| Plot { x_label: "x", y_label: "y", curves, width: 320, height: 200 }.to_svg().unwrap();
        assert!(draw(&[]).is_none());
        assert!(draw(&[curve(vec![(1.0, f64::NAN)])]).is_none());
        assert!(draw(&[curve(vec![(0.0, 1.0)])]).is_some());
    }

    #[test]
    fn zero_has_no_sign() {
        assert_eq!([-1e-9, -0.06, -10.0, 0.0].map(|value| fixed(value, 1)), ["0.0", "-0.1", "-10.0", "0.0"]);
        assert_eq!(fixed(-0.4, 0), "0");
    }

    #[test]
    fn a_band_is_an_area() {
        let band = Curve { weight: Weight::Band, ..curve(vec![(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0)]) };
        let plot = Plot { x_label: "x", y_label: "y", curves: &[band], width: 320, height: 200 };
        let svg = plot.to_svg().unwrap().unwrap();
        assert!(svg.contains("<polygon opacity=\"0.15\" fill=\"var(--ember"), "{svg}");
    }

    #[test]
    fn thinning_keeps_the_last_point_and_the_mean() {
        let points: Vec<(f64, f64)> = (0..1000).map(|i| (f64::from(i), 1.5)).collect();
        let thinned = thin(&points);
        assert!(thinned.len() <= MAX_POINTS + 1);
        assert_eq!(thinned.last(), Some(&(999.0, 1.5)));
        assert!(thinned.iter().all(|p| p.1 == 1.5));
    }

    #[test]
    fn smoothing_a_line_changes_only_its_ends() {
        let points: Vec<(f64, f64)> = (0..20).map(|i| (f64::from(i), f64::from(i))).collect();
        let smoothed = smooth(&points, 5); // reach 2
        assert_eq!(smoothed[10], (10.0, 10.0));
        assert_eq!(smoothed[0], (0.0, 1.0));
    }

    #[test]
    fn thousands_are_grouped() {
        assert_eq!(thousands(0.0), "0");
        assert_eq!(thousands(12_345.0), "12,345");
        assert_eq!(thousands(-1_000_000.0), "−1,000,000");
        assert_eq!(thousands(2.5), "2.50");
    }
}
