//! `overoptimise.html`: the values that `page.html` lays out.

use anyhow::Result;
use common::score::Ensemble;
use plot::{Hue, Plot, Weight, thousands};
use serde::Serialize;

use super::curves::{Curve, MeanPoint};
use super::design::{Axis, Design, Judge};
use super::fit::Estimate;
use super::results::{Finding, Method, NamedCurve, Results, nats};
use crate::report::{duration, fill};

const HUES: [Hue; 4] = [Hue::Ember, Hue::Slate, Hue::Moss, Hue::Plum];

#[derive(Serialize)]
struct Page<'a> {
    title: &'a str,
    version: &'a str,
    facts: Vec<String>,
    findings: &'a [Finding],
    sections: Vec<Section>,
    judges: Vec<[String; 2]>,
    fits: Vec<FitRow>,
}

/// Figures about one question.
#[derive(Serialize)]
struct Section {
    /// How the names of its figures' files begin.
    name: &'static str,
    title: &'static str,
    lede: &'static str,
    figures: Vec<Figure>,
}

#[derive(Serialize)]
struct Figure {
    svg: String,
    /// The same as a file.
    file: String,
    title: String,
    keys: Vec<Key>,
}

#[derive(Serialize)]
struct Key {
    label: String,
    class: &'static str,
}

#[derive(Serialize)]
struct FitRow {
    method: String,
    judge: String,
    alpha: String,
    beta: String,
    r_squared: String,
    turn: String,
    best: String,
    last: String,
}

/// What a curve is drawn of.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Value {
    Gold,
    Proxy,
}

impl Value {
    fn of(self, point: &MeanPoint) -> [f64; 3] {
        if self == Self::Gold { point.gold } else { point.proxy }
    }

    fn name(self) -> &'static str {
        if self == Self::Gold { "gain in gold score" } else { "gain in the reward model’s score" }
    }
}

/// What stands in the output directory.
pub(crate) struct Rendered {
    /// The whole page as HTML.
    pub html: String,
    /// Each figure with its file name.
    pub figures: Vec<(String, String)>,
}

/// The page, and its figures as files.
///
/// # Errors
/// If a plot cannot be drawn.
pub(crate) fn render(results: &Results, design: &Design) -> Result<Rendered> {
    let page = Page {
        title: if results.title.is_empty() { &results.recipe } else { &results.title },
        version: &results.version,
        facts: facts(results),
        findings: &results.findings,
        sections: sections(results, design)?,
        judges: results.judges.iter().map(|judge| [judge.judge.title(), accuracies(&judge.accuracy)]).collect(),
        fits: results.curves.iter().map(row).collect(),
    };
    let html = fill(include_str!("page.html"), &page)?;
    let named = |section: Section| {
        section.figures.into_iter().map(move |figure| (file_name(section.name, &figure.title), figure.file))
    };
    Ok(Rendered { html, figures: page.sections.into_iter().flat_map(named).collect() })
}

/// `penalty-ppo-gold.svg` for the figure "PPO, gold." of a section.
fn file_name(section: &str, title: &str) -> String {
    let words = title.to_lowercase().replace(['.', ','], "").replace(' ', "-");
    format!("{section}-{words}.svg")
}

fn facts(results: &Results) -> Vec<String> {
    let seeds: Vec<String> = results.seeds.iter().map(u64::to_string).collect();
    vec![
        format!("recipe {}", results.recipe),
        format!("seeds {}", seeds.join(", ")),
        format!("{} answers to each of {} prompts", results.pool, results.prompts),
        format!("{} preference pairs", thousands(results.pairs as f64)),
        format!("gold score before {:.3}", results.gold.mean),
        format!("{} of work", duration(results.seconds)),
        format!("Kindling {}", results.version),
    ]
}

fn sections(results: &Results, design: &Design) -> Result<Vec<Section>> {
    let centre = &design.centre;
    let named = |methods: Vec<Method>| -> Vec<(String, &Curve)> {
        methods.into_iter().filter_map(|method| Some((method.title(), results.curve(method, centre)?))).collect()
    };
    let ppo = results.first_ppo(design);
    let methods = results.methods(design);
    let of_kind = |is_it: fn(&Method) -> bool| methods.iter().copied().filter(is_it).collect::<Vec<_>>();
    let rloo = of_kind(|method| matches!(method, Method::Rloo(_)));
    let all = named([vec![Method::BestOfN], ppo.into_iter().collect(), rloo, vec![Method::Dpo]].concat());
    let penalties = named(of_kind(|method| matches!(method, Method::Ppo(_))));
    let ensembles = named([vec![Method::BestOfN], Ensemble::ALL.map(Method::Ensemble).to_vec()].concat());
    let mut sections = vec![Section {
        name: "methods",
        title: "Four ways to optimise",
        lede: "The same reward model, and for DPO its pairs: how much gold each method gains on its way from the initial policy, and what \
               the reward model says of it.",
        figures: figures(&[("Gold.", &all, Value::Gold), ("Proxy.", &all, Value::Proxy)])?,
    }];
    if penalties.len() > 1 {
        sections.push(Section {
            name: "penalty",
            title: "The KL penalty",
            lede: "A higher coefficient stops a policy earlier on its way; whether it also takes a better way is seen where the curves part.",
            figures: figures(&[("PPO, gold.", &penalties, Value::Gold), ("PPO, proxy.", &penalties, Value::Proxy)])?,
        });
    }
    for (axis, name, title, lede) in [
        (Axis::Pairs, "pairs", "More pairs", "Reward models that learnt from fewer preference pairs."),
        (Axis::Size, "size", "Larger reward models", "Reward models of other sizes, on the same pairs."),
        (
            Axis::WrongLabels,
            "wrong-labels",
            "Wrong labels",
            "Reward models whose pairs are labelled wrongly more or less often.",
        ),
    ] {
        let of = |method: Method| -> Vec<(String, &Curve)> {
            let judges = design.along(axis).into_iter();
            judges.filter_map(|judge| Some((label(axis, judge), results.curve(method, judge)?))).collect()
        };
        let best = of(Method::BestOfN);
        if best.len() < 2 {
            continue;
        }
        let of_ppo = ppo.map(of).filter(|curves| curves.len() > 1).unwrap_or_default();
        let drawn = figures(&[("Best-of-n, gold.", &best, Value::Gold), ("PPO, gold.", &of_ppo, Value::Gold)])?;
        sections.push(Section { name, title, lede, figures: drawn });
    }
    if ensembles.len() > 1 {
        sections.push(Section {
            name: "ensembles",
            title: "Ensembles",
            lede: "Best-of-n by the reward models of all seeds together: by their mean, by the lowest of them, and by the mean less half \
                   the variance.",
            figures: figures(&[("Gold.", &ensembles, Value::Gold)])?,
        });
    }
    Ok(sections)
}

/// A reward model among those that differ from it along `axis`.
fn label(axis: Axis, judge: &Judge) -> String {
    match axis {
        Axis::Pairs => judge.pairs.map_or("all pairs".to_owned(), |pairs| format!("{} pairs", thousands(pairs as f64))),
        Axis::Size => judge.size.clone().unwrap_or_else(|| "the policy’s size".to_owned()),
        Axis::WrongLabels => format!("{} % wrong", super::design::per_cent(judge.wrong_labels)),
    }
}

/// Curves with what the legend calls them.
type Labelled<'a> = [(String, &'a Curve)];

fn figures(wanted: &[(&str, &Labelled<'_>, Value)]) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for (title, curves, value) in wanted {
        let mut drawn = Vec::new();
        for ((label, curve), hue) in curves.iter().zip(HUES) {
            drawn.extend(drawings(label, curve, *value, hue));
        }
        let plot =
            Plot { x_label: "√KL, in √nats", y_label: value.name(), curves: &drawn, width: 460, height: 300 };
        if let Some((svg, file)) = plot.to_svg()?.zip(plot.to_file()?) {
            let keys =
                curves.iter().zip(HUES).map(|((label, _), hue)| Key { label: label.clone(), class: hue.class() });
            figures.push(Figure { svg, file, title: (*title).to_owned(), keys: keys.collect() });
        }
    }
    Ok(figures)
}

/// The band of the seeds, their mean, and the fitted form.
fn drawings(label: &str, curve: &Curve, value: Value, hue: Hue) -> Vec<plot::Curve> {
    let d = |point: &MeanPoint| point.kl.max(0.0).sqrt();
    let line = |points, weight| plot::Curve { label: label.to_owned(), points, hue, weight };
    let edge = |i: usize| curve.mean.iter().map(move |point| (d(point), value.of(point)[i]));
    let mut drawn = Vec::new();
    if curve.seeds.len() > 1 {
        let back: Vec<(f64, f64)> = edge(2).collect();
        drawn.push(line(edge(1).chain(back.into_iter().rev()).collect(), Weight::Band));
    }
    let strong = if curve.mean.len() > 20 { Weight::Trend } else { Weight::Strong };
    drawn.push(line(edge(0).collect(), strong));
    if let Some(fit) = curve.fit.filter(|_| value == Value::Gold) {
        let reach = curve.reach().sqrt();
        let points = (0..=60).map(|i| reach * f64::from(i) / 60.0);
        let fitted = points.map(|d| (d, fit.form.reward(d, fit.alpha.value, fit.beta.value)));
        drawn.push(line(fitted.collect(), Weight::Faint));
    }
    drawn
}

fn row(named: &NamedCurve) -> FitRow {
    let NamedCurve { method, judge, curve } = named;
    let estimate =
        |of: Option<Estimate>| of.map_or(String::new(), |of| signed(of.value) + &format!(" ± {:.3}", of.error));
    let at = |point: MeanPoint| format!("{} at {}", signed(point.gold[0]), nats(point.kl));
    let turn = match (curve.turn(), curve.fit.and_then(|fit| fit.turn_kl)) {
        _ if curve.fit.is_none() => "–".to_owned(),
        _ if !curve.gains() => "gains nothing".to_owned(),
        (Some(kl), _) => format!("{kl:.1}"),
        (None, Some(kl)) if kl < 1000.0 => format!("> {:.1}, fit {kl:.0}", curve.reach()),
        (None, _) => format!("> {:.1}", curve.reach()),
    };
    FitRow {
        method: method.title(),
        judge: judge.title(),
        alpha: estimate(curve.fit.map(|fit| fit.alpha)),
        beta: estimate(curve.fit.map(|fit| fit.beta)),
        r_squared: curve.fit.and_then(|fit| fit.r_squared).map_or(String::new(), |share| format!("{share:.2}")),
        turn,
        best: at(curve.best()),
        last: at(curve.last()),
    }
}

fn signed(value: f64) -> String {
    format!("{value:+.3}").replace('-', "−")
}

fn accuracies(of_seeds: &[common::stats::Interval]) -> String {
    let each: Vec<String> = of_seeds.iter().map(|interval| format!("{:.3}", interval.mean)).collect();
    each.join(", ")
}
