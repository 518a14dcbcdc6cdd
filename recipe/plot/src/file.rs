//! Plots as files of their own.

use std::fmt::Write as _;

use anyhow::Result;

use crate::{Hue, Plot, THEME, Weight};

/// Height of a line of the legend, in CSS pixels.
const LINE: u32 = 20;
/// Where the legend begins, under the vertical axis, in CSS pixels.
const LEFT: u32 = 62;
/// About the width of a letter, in CSS pixels: nobody measures text here.
const LETTER: u32 = 8;

impl Plot<'_> {
    /// Draws the plot as the text of an SVG file: size, background and colours stand in it, and below it a legend where curves
    /// have labels. `None` if no curve has a point.
    ///
    /// # Errors
    /// If the drawing backend fails.
    pub fn to_file(&self) -> Result<Option<String>> {
        let Some(svg) = self.to_svg()? else { return Ok(None) };
        let keys = self.keys();
        let width = self.width;
        let opening = |height: u32| format!("<svg width=\"{width}\" height=\"{height}\" style=\"background:#fff\" ");
        let drawn = svg.replacen("<svg ", &opening(self.height), 1);
        if keys.is_empty() {
            return Ok(Some(with_colours(&drawn)));
        }
        let longest = keys.iter().map(|(label, _)| label.chars().count() as u32).max().unwrap_or_default();
        let columns = if 30 + longest * LETTER <= (width - LEFT) / 2 { 2 } else { 1 };
        let height = self.height + LINE * keys.len().div_ceil(columns) as u32 + LINE / 2;
        let mut text = opening(height) + "xmlns=\"http://www.w3.org/2000/svg\">\n" + &drawn + "\n";
        for (i, (label, hue)) in keys.into_iter().enumerate() {
            let x = LEFT + (i % columns) as u32 * (width - LEFT) / columns as u32;
            let y = self.height + LINE / 2 + (i / columns) as u32 * LINE;
            let colour =
                THEME.iter().find(|(_, variable)| variable.contains(hue.class())).map_or("", |(_, with)| *with);
            let label = label.replace('&', "&amp;").replace('<', "&lt;");
            writeln!(
                text,
                "<line x1=\"{x}\" y1=\"{y}\" x2=\"{}\" y2=\"{y}\" stroke={colour} stroke-width=\"3\"/>",
                x + 22
            )?;
            let place = format!("x=\"{}\" y=\"{y}\" dy=\"0.35em\"", x + 30);
            writeln!(text, "<text {place} font-family=\"sans-serif\" font-size=\"13\" fill=\"#555\">{label}</text>")?;
        }
        Ok(Some(with_colours(&(text + "</svg>\n"))))
    }

    /// What the legend names: each label once, with its colour.
    fn keys(&self) -> Vec<(&str, Hue)> {
        let mut keys: Vec<(&str, Hue)> = Vec::new();
        for curve in self.curves.iter().filter(|curve| !matches!(curve.weight, Weight::Band | Weight::Faint)) {
            if !curve.label.is_empty() && !keys.contains(&(&curve.label, curve.hue)) {
                keys.push((&curve.label, curve.hue));
            }
        }
        keys
    }
}

/// Puts the colours themselves in place of the page's variables.
fn with_colours(svg: &str) -> String {
    let mut text = svg.to_owned();
    while let Some(start) = text.find("var(") {
        let Some(length) = text[start..].find(')') else { break };
        let colour = text[start..start + length].rsplit(' ').next().unwrap_or_default().to_owned();
        text.replace_range(start..=start + length, &colour);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Curve;

    fn plot_of(curves: &[Curve]) -> String {
        Plot { x_label: "x", y_label: "y", curves, width: 320, height: 200 }.to_file().unwrap().unwrap()
    }

    #[test]
    fn a_file_has_its_colours_and_names_each_curve_once() {
        let points = vec![(0.0, 1.0), (1.0, 2.0)];
        let curve = |label: &str, hue, weight| Curve { label: label.to_owned(), points: points.clone(), hue, weight };
        let labelled = [
            curve("a < b", Hue::Ember, Weight::Band),
            curve("a < b", Hue::Ember, Weight::Strong),
            curve("a < b", Hue::Ember, Weight::Faint),
            curve("c", Hue::Teal, Weight::Trend),
            curve("d", Hue::Moss, Weight::Trend),
        ];
        let svg = plot_of(&labelled);
        assert!(svg.starts_with("<svg width=\"320\" height=\"250\"") && !svg.contains("var("), "{svg}");
        assert_eq!(svg.matches(">a &lt; b</text>").count(), 1, "{svg}");
        assert!(svg.contains("stroke=\"#1f8585\" stroke-width=\"3\""), "{svg}");

        let svg =
            plot_of(&[curve("a label that is too long for half", Hue::Ember, Weight::Strong), labelled[3].clone()]);
        assert_eq!(svg.matches("<text x=\"92\"").count(), 2, "one below the other: {svg}");

        let svg = plot_of(&[curve("", Hue::Ember, Weight::Strong)]);
        assert!(svg.starts_with("<svg width=\"320\" height=\"200\"") && svg.matches("<svg").count() == 1, "{svg}");
        assert!(svg.contains("#c8501e") && !svg.contains("var("), "{svg}");
    }
}
