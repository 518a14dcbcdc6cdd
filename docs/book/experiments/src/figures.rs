//! The book's figures.

use std::path::Path;

use anyhow::{Context, Result};
use common::files;
use common::metrics::{MetricsLog, names};
use common::model::sinusoid_table;
use plot::{Curve, Hue, Plot, Weight};

use crate::numbers::objective;
use crate::preferences::loss_and_slope;

/// Width and height in CSS pixels.
const SIZE: (u32, u32) = (720, 320);

/// A figure: its file, the labels of its axes and its curves.
type Figure = (&'static str, [&'static str; 2], Vec<Curve>);

/// Draws every figure into `out` and names the files.
pub(crate) fn draw(run: &Path, out: &Path) -> Result<String> {
    std::fs::create_dir_all(out).with_context(|| format!("failed to make `{}`", out.display()))?;
    let mut printed = String::new();
    for (name, [x_label, y_label], curves) in equations()?.into_iter().chain(training(run)?) {
        let plot = Plot { x_label, y_label, curves: &curves, width: SIZE.0, height: SIZE.1 };
        let svg = plot.to_file()?.with_context(|| format!("`{name}` has no points"))?;
        let path = out.join(name);
        files::write_whole(&path, svg)?;
        printed += &format!("{}\n", path.display());
    }
    Ok(printed)
}

/// The figures that follow from an equation.
fn equations() -> Result<Vec<Figure>> {
    const D_MODEL: usize = 64;
    let table = sinusoid_table(128, D_MODEL);
    let channel = |i: usize, hue| {
        let points = (0..128).map(|position| (position as f64, f64::from(table[position * D_MODEL + i])));
        curve(points.collect(), hue)
    };
    let over = |low: i32, high: i32, scale: f64| (low..=high).map(move |i| f64::from(i) * scale);
    let loss = over(-40, 40, 0.1).map(|x| Ok((x, f64::from(loss_and_slope(x as f32)?[0])))).collect::<Result<_>>()?;
    let clipped = |advantage, hue| {
        let points = over(20, 180, 0.01).map(|x| Ok((x, f64::from(objective(x as f32, advantage)?[0]))));
        Ok(curve(points.collect::<Result<_>>()?, hue))
    };
    let difference = "score of the chosen answer less that of the other";
    let channels = vec![channel(0, Hue::Ember), channel(16, Hue::Slate), channel(32, Hue::Moss)];
    let objectives: Result<Vec<Curve>> =
        [(1.0, Hue::Ember), (-1.0, Hue::Slate)].map(|(a, hue)| clipped(a, hue)).into_iter().collect();
    Ok(vec![
        ("sinusoids.svg", ["position", "value"], channels),
        ("pairwise-loss.svg", [difference, "nats"], vec![curve(loss, Hue::Ember)]),
        ("clip.svg", ["ratio", "objective"], objectives?),
    ])
}

/// The figures of a run.
fn training(run: &Path) -> Result<Vec<Figure>> {
    let [pretrain, ppo] = ["pretrain", "ppo"].map(|stage| MetricsLog::read(&run.join(stage)));
    let (pretrain, ppo) = (pretrain?, ppo?);
    let faint = |points| Curve { weight: Weight::Faint, ..curve(points, Hue::Slate) };
    let losses = vec![faint(pretrain.series(names::TRAIN_LOSS)), curve(pretrain.series(names::VAL_LOSS), Hue::Ember)];
    let judged =
        vec![curve(ppo.series(names::VAL_SCORE), Hue::Slate), curve(ppo.series(names::GOLD_VAL_SCORE), Hue::Ember)];
    Ok(vec![
        ("pretraining.svg", ["step", "nats per token"], losses),
        ("ppo.svg", ["step", "score, and gold score"], judged),
        ("kl.svg", ["step", "nats per answer"], vec![curve(ppo.series(names::OBJECTIVE_KL), Hue::Ember)]),
    ])
}

fn curve(points: Vec<(f64, f64)>, hue: Hue) -> Curve {
    Curve { label: String::new(), points, hue, weight: Weight::Strong }
}
