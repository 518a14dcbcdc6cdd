//! Several runs on one page, stage by stage.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use common::checkpoint::Manifest;
use common::metrics::{Curves, MetricsLog, Sample, curves, number_text, read_samples};
use plot::{Curve, Hue, Weight, smooth, thousands};
use serde::Serialize;

use super::stages::{Figure, HALF_WIDTH, N_SAMPLES, figure};
use super::text::{duration, title};
use super::{Source, page};
use crate::inputs::flatten;
use crate::steps::Step;

/// Up to this many points a curve is drawn as it is, and not as a running mean.
const FEW: usize = 40;

/// What stands for a value that a run does not have.
const NOTHING: &str = "–";

#[derive(Serialize)]
struct Page {
    title: String,
    subtitle: &'static str,
    version: &'static str,
    hues: Vec<&'static str>,
    stages: Vec<Section>,
}

#[derive(Serialize)]
struct Section {
    id: &'static str,
    title: &'static str,
    runs: Vec<Name>,
    figures: Vec<Figure>,
    others: Vec<Figure>,
    differences: Vec<Row>,
    numbers: Vec<Row>,
    samples: Vec<Answers>,
}

/// A run in a legend.
#[derive(Clone, Serialize)]
struct Name {
    label: String,
    class: &'static str,
}

/// A line of a table, with a value of each run.
#[derive(Debug, PartialEq, Serialize)]
struct Row {
    name: String,
    values: Vec<String>,
}

#[derive(Serialize)]
struct Answers {
    prompt: String,
    answers: Vec<Answer>,
}

#[derive(Serialize)]
struct Answer {
    #[serde(flatten)]
    run: Name,
    step: String,
    text: String,
}

/// One stage of one of the runs that are compared.
struct Run {
    label: String,
    hue: Hue,
    step: Step,
    seconds: f64,
    log: MetricsLog,
    settings: BTreeMap<String, String>,
    samples: Vec<Sample>,
}

/// The page of the runs in `dirs`, each a recipe's or a stage's.
pub(super) fn render(dirs: &[PathBuf]) -> Result<String> {
    let mut runs = Vec::new();
    for (dir, hue) in dirs.iter().zip(Hue::ALL) {
        for stage in Source::open(dir)?.stages {
            runs.push(Run::read(dir, hue, stage.step, &stage.dir, stage.log, stage.seconds)?);
        }
    }
    let mut stages = Vec::new();
    for step in Step::ALL {
        let of_step: Vec<&Run> = runs.iter().filter(|run| run.step == step).collect();
        if !of_step.is_empty() {
            stages.push(section(step, &of_step)?);
        }
    }
    let page = Page {
        title: format!("{} runs side by side", dirs.len()),
        subtitle: "Curves, settings that differ, last numbers and samples.",
        version: env!("CARGO_PKG_VERSION"),
        hues: Hue::ALL.map(Hue::class).to_vec(),
        stages,
    };
    page::fill(include_str!("runs.html"), &page)
}

impl Run {
    fn read(label: &Path, hue: Hue, step: Step, dir: &Path, log: MetricsLog, seconds: f64) -> Result<Self> {
        let path = dir.join("config.toml");
        let text = common::files::read_if_there(&path)?.unwrap_or_default();
        let config = text.parse().with_context(|| format!("`{}` is damaged", path.display()))?;
        let mut settings = BTreeMap::new();
        flatten("", &config, &mut settings);
        if let Some(manifest) = Manifest::read(dir)? {
            settings.insert("backend".to_owned(), manifest.backend);
            for (i, parent) in manifest.parents.into_iter().enumerate() {
                settings.insert(format!("begins from ({})", i + 1), parent.path.display().to_string());
            }
        }
        let samples = read_samples(dir)?;
        Ok(Self { label: label.display().to_string(), hue, step, seconds, log, settings, samples })
    }

    fn name(&self) -> Name {
        Name { label: self.label.clone(), class: self.hue.class() }
    }
}

fn section(step: Step, runs: &[&Run]) -> Result<Section> {
    let names: BTreeSet<String> = runs.iter().flat_map(|run| run.log.last_values().into_keys()).collect();
    let plots = curves(names.iter().map(String::as_str));
    let (mut figures, mut others) = (Vec::new(), Vec::new());
    for plot in &plots {
        let is_other = plot.train.as_ref() == Some(&plot.title);
        let (title, held_out) = (capitalised(&plot.title), format!("{}, held out.", capitalised(&plot.title)));
        let of_training = plot.train.as_deref().map(|name| overlay(runs, name, &format!("{title}.")));
        let of_held_out = plot.held_out.as_deref().map(|name| overlay(runs, name, &held_out));
        let drawn = of_training.into_iter().chain(of_held_out).collect::<Result<Vec<_>>>()?;
        if is_other { &mut others } else { &mut figures }.extend(drawn.into_iter().flatten());
    }
    Ok(Section {
        id: step.name(),
        title: title(step),
        runs: runs.iter().map(|run| run.name()).collect(),
        figures,
        others,
        differences: differences(&runs.iter().map(|run| &run.settings).collect::<Vec<_>>()),
        numbers: numbers(runs, &plots),
        samples: answers(runs),
    })
}

fn capitalised(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_uppercase().chain(letters).collect())
}

/// A metric of all runs; of many points the running mean, with the points themselves behind it.
fn overlay(runs: &[&Run], metric: &str, title: &str) -> Result<Option<Figure>> {
    let (mut behind, mut before) = (Vec::new(), Vec::new());
    for run in runs {
        let points = run.log.series(metric);
        let Some(&(_, last)) = points.last() else { continue };
        let (label, hue) = (format!("{}: {}", run.label, number_text(last)), run.hue);
        if points.len() <= FEW {
            before.push(Curve { label, points, hue, weight: Weight::Strong });
            continue;
        }
        before.push(Curve { label, points: smooth(&points, 20), hue, weight: Weight::Trend });
        behind.push(Curve { label: String::new(), points, hue, weight: Weight::Faint });
    }
    behind.append(&mut before);
    let mut drawn = figure(&behind, metric, title, "", HALF_WIDTH)?;
    if let Some(figure) = &mut drawn {
        figure.keys.retain(|key| !key.label.is_empty());
    }
    Ok(drawn)
}

/// The settings that are not the same in all runs.
fn differences(settings: &[&BTreeMap<String, String>]) -> Vec<Row> {
    let names: BTreeSet<&String> = settings.iter().flat_map(|of_run| of_run.keys()).collect();
    let value =
        |name: &String, of_run: &BTreeMap<String, String>| of_run.get(name).map_or(NOTHING, String::as_str).to_owned();
    names
        .into_iter()
        .map(|name| Row { name: name.clone(), values: settings.iter().map(|of_run| value(name, of_run)).collect() })
        .filter(|row| settings.len() == 1 || row.values.iter().any(|value| *value != row.values[0]))
        .collect()
}

fn numbers(runs: &[&Run], plots: &[Curves]) -> Vec<Row> {
    let row = |name: &str, value: &dyn Fn(&Run) -> Option<String>| Row {
        name: name.to_owned(),
        values: runs.iter().map(|run| value(run).unwrap_or_else(|| NOTHING.to_owned())).collect(),
    };
    let mut rows = vec![
        row("steps", &|run| run.log.last("step").map(thousands)),
        row("tokens", &|run| run.log.tokens().map(thousands)),
        row("time", &|run| Some(duration(run.seconds))),
    ];
    for name in plots.iter().flat_map(|plot| plot.train.iter().chain(&plot.held_out)) {
        rows.push(row(name, &|run| run.log.last(name).map(number_text)));
        if name == "val/loss" {
            rows.push(row("lowest val/loss", &|run| run.log.min(name).map(number_text)));
        }
    }
    rows
}

/// What each run sampled last, for the prompts of the first one that sampled anything.
fn answers(runs: &[&Run]) -> Vec<Answers> {
    let last = |run: &Run| {
        let step = run.samples.iter().map(|sample| sample.step).max();
        run.samples.iter().filter(|sample| Some(sample.step) == step).cloned().collect::<Vec<Sample>>()
    };
    let of_runs: Vec<(Name, Vec<Sample>)> = runs.iter().map(|run| (run.name(), last(run))).collect();
    let first = of_runs.iter().find(|(_, samples)| !samples.is_empty());
    let prompts = first.into_iter().flat_map(|(_, samples)| samples).map(|sample| &sample.prompt).take(N_SAMPLES);
    let answer = |prompt: &String, (run, samples): &(Name, Vec<Sample>)| {
        let sample = samples.iter().find(|sample| sample.prompt == *prompt)?;
        Some(Answer { run: run.clone(), step: thousands(sample.step as f64), text: sample.text.clone() })
    };
    prompts
        .map(|prompt| Answers {
            prompt: prompt.clone(),
            answers: of_runs.iter().filter_map(|run| answer(prompt, run)).collect(),
        })
        .collect()
}
