//! The comparison for people and programs: a table, `compare.md`, `compare.json`, a plot of each stage's losses.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use common::checkpoint::Stage;
use common::files::write_whole;
use common::kernels::Precision;
use plot::{Curve, Hue, Plot, Weight};
use serde::Serialize;
use serde_json::{Value, json};

use super::budget::Row;
use super::record::{Level, Records};

/// One backend's run.
pub struct Run {
    /// As `--backends` names it.
    pub name: String,
    /// Of its computations.
    pub precision: Precision,
    /// The records it left.
    pub records: Records,
    /// How its process ended, unless well.
    pub failure: Option<String>,
}

/// Everything that was found.
pub struct Comparison {
    /// The recipe's name.
    pub recipe: String,
    /// Steps of the loss curves.
    pub steps: u64,
    /// Stages compared.
    pub stages: Vec<Stage>,
    /// The reference first.
    pub runs: Vec<Run>,
    /// Levels of all backends but the first.
    pub rows: Vec<Row>,
}

/// A measure and what it is called.
const MEASURES: [(&str, &str); 6] = [
    ("tokens_per_s", "training, tokens/s"),
    ("first_step_s", "first step, s (with loading, compilation, autotune)"),
    ("decode_tokens_per_s", "decoding, tokens/s"),
    ("iteration_s", "a PPO iteration, s (with loading and the first compilation)"),
    ("peak_host_mib", "peak host memory so far, MiB"),
    ("device_mib", "device memory held, MiB"),
];

/// A measurement of one backend beside the reference's.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Speed {
    stage: Stage,
    measure: &'static str,
    #[serde(skip)]
    title: &'static str,
    backend: String,
    value: f64,
    /// By the first backend's value, where it has one.
    ratio: Option<f64>,
}

impl Comparison {
    /// Whether every backend came to its end within every budget.
    pub fn passed(&self) -> bool {
        self.rows.iter().all(|row| row.passed) && self.runs.iter().all(|run| run.failure.is_none())
    }

    fn speeds(&self) -> Vec<Speed> {
        let mut speeds = Vec::new();
        for &stage in &self.stages {
            for (measure, title) in MEASURES {
                for run in &self.runs {
                    let Some(value) = run.records.measured(stage, measure) else { continue };
                    let first = self.runs.first().and_then(|first| first.records.measured(stage, measure));
                    let ratio = first.filter(|&first| first > 0.0).map(|first| value / first);
                    speeds.push(Speed { stage, measure, title, backend: run.name.clone(), value, ratio });
                }
            }
        }
        speeds
    }

    fn header() -> [&'static str; 8] {
        ["stage", "level", "backend", "max abs", "max rel", "budget", "result", "where, or what else"]
    }

    fn cells(row: &Row) -> [String; 8] {
        let number = |x: f64| if x == 0.0 { "0".to_owned() } else { format!("{x:.1e}") };
        let is_tokens = row.level == Level::Tokens;
        let remark = row.first_excess.iter().chain(&row.note).map(String::as_str).collect::<Vec<_>>().join("; ");
        [
            row.stage.to_string(),
            row.level.title().to_owned(),
            row.backend.clone(),
            if is_tokens { String::new() } else { number(row.max_absolute) },
            if is_tokens { String::new() } else { number(row.max_relative) },
            row.budget.text(),
            if row.passed { "pass" } else { "FAIL" }.to_owned(),
            remark,
        ]
    }

    /// The table for the terminal.
    pub fn table(&self) -> String {
        let mut lines = vec![Self::header().map(str::to_owned)];
        lines.extend(self.rows.iter().map(Self::cells));
        let mut text = aligned(&lines);
        let mut lines = vec![["stage", "measure", "backend", "value", "ratio to the first"].map(str::to_owned)];
        lines.extend(self.speeds().iter().map(speed_cells));
        let _ = write!(text, "\n{}", aligned(&lines));
        for run in &self.runs {
            if let Some(failure) = &run.failure {
                let _ = writeln!(text, "\n{}: {failure}", run.name);
            }
        }
        let verdict = if self.passed() { "every level within its budget" } else { "a budget is exceeded" };
        let _ = writeln!(text, "\n{verdict}");
        text
    }

    /// Writes `compare.json`, `compare.md` and the plots into `out`.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write(&self, out: &Path) -> Result<()> {
        let mut markdown = self.markdown();
        for &stage in &self.stages {
            if let Some(svg) = self.plot(stage)? {
                let name = format!("loss-{stage}.svg");
                write_whole(&out.join(&name), svg)?;
                let _ = writeln!(markdown, "\n![Losses of {stage}]({name})");
            }
        }
        write_whole(&out.join("compare.md"), markdown)?;
        Ok(write_whole(&out.join("compare.json"), serde_json::to_string_pretty(&self.json())?)?)
    }

    fn json(&self) -> Value {
        let backends: Vec<Value> = self
            .runs
            .iter()
            .map(|run| json!({ "name": run.name, "device": run.records.backend, "precision": run.precision.name(), "failure": run.failure }))
            .collect();
        let curve = |run: &Run, stage: Stage| {
            let losses = run.records.find(stage, Level::Curve, "train/loss")?;
            Some(json!({ "stage": stage, "backend": run.name, "losses": losses.data }))
        };
        let curves: Vec<Value> =
            self.stages.iter().flat_map(|&stage| self.runs.iter().filter_map(move |run| curve(run, stage))).collect();
        json!({
            "recipe": self.recipe,
            "steps": self.steps,
            "passed": self.passed(),
            "backends": backends,
            "levels": self.rows,
            "speed": self.speeds(),
            "curves": curves,
        })
    }

    fn markdown(&self) -> String {
        let mut text = format!("# Backends on the recipe `{}`\n\n", self.recipe);
        for (i, run) in self.runs.iter().enumerate() {
            let role = if i == 0 { ", the reference" } else { "" };
            let device = if run.records.backend.is_empty() { "no device" } else { &run.records.backend };
            let failure = run.failure.as_deref().map_or(String::new(), |failure| format!(": {failure}"));
            let _ = writeln!(text, "- `{}`{role} ({device}; {}){failure}", run.name, run.precision.name());
        }
        let verdict = if self.passed() { "Every level is within its budget." } else { "**A budget is exceeded.**" };
        let _ = writeln!(text, "\n{verdict} Loss curves have {} steps.\n", self.steps);
        text.push_str(&markdown_table(&Self::header(), &self.rows.iter().map(Self::cells).collect::<Vec<_>>()));
        text.push_str("\n## Speed and memory\n\n");
        let header = ["stage", "measure", "backend", "value", "ratio to the first"];
        text.push_str(&markdown_table(&header, &self.speeds().iter().map(speed_cells).collect::<Vec<_>>()));
        text
    }

    /// The losses of all backends over the steps of a stage.
    fn plot(&self, stage: Stage) -> Result<Option<String>> {
        const HUES: [Hue; 4] = [Hue::Slate, Hue::Ember, Hue::Moss, Hue::Plum];
        let curves: Vec<Curve> = self
            .runs
            .iter()
            .enumerate()
            .filter_map(|(i, run)| {
                let losses = run.records.find(stage, Level::Curve, "train/loss")?;
                let points = losses.data.iter().enumerate().map(|(step, &loss)| ((step + 1) as f64, f64::from(loss)));
                // The reference thick and below, so that a curve that follows it lies on it.
                let weight = if i == 0 { Weight::Trend } else { Weight::Faint };
                Some(Curve { label: run.name.clone(), points: points.collect(), hue: HUES[i % HUES.len()], weight })
            })
            .collect();
        let names: Vec<&str> = curves.iter().map(|curve| curve.label.as_str()).collect();
        let label = format!("step ({})", names.join(", "));
        Plot { x_label: &label, y_label: "training loss", curves: &curves, width: 720, height: 320 }.to_svg()
    }
}

fn speed_cells(speed: &Speed) -> [String; 5] {
    let value = if speed.value < 10.0 { format!("{:.2}", speed.value) } else { format!("{:.0}", speed.value) };
    let ratio = speed.ratio.map_or(String::new(), |ratio| format!("{ratio:.2}"));
    [speed.stage.to_string(), speed.title.to_owned(), speed.backend.clone(), value, ratio]
}

/// Columns as wide as their widest cell, the last as wide as it likes.
fn aligned<const N: usize>(lines: &[[String; N]]) -> String {
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
    let mut text = String::new();
    for line in lines {
        let cells: Vec<String> =
            line.iter().enumerate().map(|(i, cell)| format!("{cell:<0$}", width(i)).replace('\n', " ")).collect();
        let _ = writeln!(text, "{}", cells.join("  ").trim_end());
    }
    text
}

fn markdown_table<const N: usize>(header: &[&str; N], lines: &[[String; N]]) -> String {
    let mut text = format!("| {} |\n|{}\n", header.join(" | "), " --- |".repeat(N));
    for line in lines {
        let cells: Vec<String> = line.iter().map(|cell| cell.replace('|', "\\|")).collect();
        let _ = writeln!(text, "| {} |", cells.join(" | "));
    }
    text
}
