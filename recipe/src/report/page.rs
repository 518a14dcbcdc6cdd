//! `report.html`: the values that `page.html` lays out.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use minijinja::Environment;
use minijinja::value::Serde;
use plot::thousands;
use serde::Serialize;
use serde_json::Value;

use super::stages::{self, Section};
use super::text::{compact, counted, duration, mean_of, number, percent, policy_title, signed, title};
use super::{Source, StageSource};
use crate::people::Summary;
use crate::results::{AnswerRow, Policy, Results, ScoredAnswer};
use crate::steps::Step;
use common::stats::{Interval, METHOD};

/// Held-out prompts shown side by side; all of them are in `answers.jsonl`.
const N_ANSWERS: usize = 12;

#[derive(Serialize)]
struct Page {
    title: String,
    subtitle: String,
    version: String,
    facts: Vec<String>,
    comparison: Option<Comparison>,
    overview: Vec<OverviewRow>,
    doctor: Option<DoctorView>,
    stages: Vec<Section>,
    answers: Vec<PromptView>,
    answers_lede: String,
    /// The file that has the same numbers for programs.
    numbers_file: &'static str,
}

/// The first thing shown: how the models compare on the held-out prompts.
#[derive(Serialize)]
struct Comparison {
    verdict: String,
    /// The score by which the models are compared; empty where neither a gold score nor a reward model's is known.
    measure: &'static str,
    rows: Vec<PolicyRow>,
    axis_low: String,
    axis_high: String,
    /// Whether the reward model's score has a column beside the measure.
    has_score: bool,
    /// Whether the divergence from the SFT model is known of any.
    has_kl: bool,
    note: String,
}

#[derive(Serialize)]
struct PolicyRow {
    name: String,
    class: &'static str,
    mean: String,
    bounds: String,
    /// Per cent of the axis.
    left: f64,
    width: f64,
    center: f64,
    score: String,
    kl: String,
    words: String,
    ended: String,
}

#[derive(Serialize)]
struct OverviewRow {
    name: &'static str,
    /// Anchor of the stage's section, if it has one.
    id: Option<&'static str>,
    time: String,
    steps: String,
    tokens: String,
    result: String,
}

/// The checks before PPO.
#[derive(Serialize)]
struct DoctorView {
    lede: String,
    rows: Vec<CheckRow>,
}

#[derive(Serialize)]
struct CheckRow {
    verdict: String,
    stage: String,
    id: String,
    value: String,
    limit: String,
    reason: String,
    /// What it means and what to do, where it did not pass.
    advice: String,
}

#[derive(Serialize)]
struct PromptView {
    prompt: String,
    answers: Vec<AnswerView>,
}

#[derive(Serialize)]
struct AnswerView {
    name: &'static str,
    class: &'static str,
    marks: String,
    text: String,
}

/// The whole page as HTML.
pub fn render(source: &Source) -> Result<String> {
    let record = &source.record;
    let is_recipe = !record.recipe.is_empty();
    let mut facts = if is_recipe { vec![format!("recipe {}", record.recipe)] } else { Vec::new() };
    facts.push(format!("seed {}", record.seed));
    if !record.backend.is_empty() {
        let threads = if is_recipe { format!(", {}", counted(record.threads, "thread")) } else { String::new() };
        facts.push(format!("backend {}{threads}", record.backend));
    }
    facts.push(format!("{} in all", duration(source.total_seconds())));
    facts.push(format!("Kindling {}", record.version));
    let sections =
        source.stages.iter().map(|stage| stages::section(source, stage)).collect::<Result<Vec<Section>>>()?;
    let has_ppo = is_recipe && source.stage(Step::Ppo).is_some();
    let page = Page {
        title: if record.title.is_empty() { record.recipe.clone() } else { record.title.clone() },
        subtitle: if has_ppo {
            from_to_ppo(source)
        } else if is_recipe {
            "Training curves, key numbers and samples of every stage that has run.".to_owned()
        } else {
            "Training curves, key numbers and samples.".to_owned()
        },
        version: record.version.clone(),
        facts,
        comparison: source.results.as_ref().map(|results| comparison(results, record.gold.as_deref())),
        overview: overview(source),
        doctor: source.doctor.as_ref().map(doctor_view),
        stages: sections,
        answers: source.answers.iter().take(N_ANSWERS).map(prompt_view).collect(),
        answers_lede: answers_lede(source),
        numbers_file: if is_recipe { "report.json" } else { "metrics.jsonl" },
    };
    fill(include_str!("page.html"), &page)
}

/// What a run that has come to PPO did, by the stages that it has.
fn from_to_ppo(source: &Source) -> String {
    let done = [(Step::Pretrain, "pretrained"), (Step::Sft, "fine-tuned"), (Step::RewardModel, "given a reward model")];
    let done: Vec<&str> =
        done.into_iter().filter(|&(step, _)| source.stage(step).is_some()).map(|(_, done)| done).collect();
    let from = if source.stage(Step::Pretrain).is_some() { "plain text" } else { "an existing model" };
    let done = if done.is_empty() { String::new() } else { done.join(", ") + " and " };
    format!("From {from} to an aligned chat model: {done}improved by PPO, on one machine.")
}

/// Fills an HTML template, which may include `head.html` and `figures.html`, with `values`.
///
/// # Errors
/// If the template is broken, or asks for what `values` lacks.
pub(crate) fn fill<T: Serialize>(template: &str, values: &T) -> Result<String> {
    let mut environment = Environment::new();
    for (name, text) in [
        ("style.css", include_str!("style.css")),
        ("head.html", include_str!("head.html")),
        ("figures.html", include_str!("figures.html")),
        ("page.html", template),
    ] {
        environment.add_template(name, text).context("the report's template is broken")?;
    }
    environment.get_template("page.html")?.render(Serde(values)).context("failed to render the report")
}

fn overview(source: &Source) -> Vec<OverviewRow> {
    let mut rows = Vec::new();
    for step in Step::ALL {
        let stage = source.stage(step);
        if source.record.current(step).is_none() {
            continue;
        }
        let last_step = |stage: &StageSource| stage.log.last("step").map_or(String::new(), thousands);
        rows.push(OverviewRow {
            name: title(step),
            id: stage.map(|stage| stage.step.name()),
            time: duration(stage.map_or_else(|| source.record.seconds(step), |stage| stage.seconds)),
            steps: stage.map_or(String::new(), last_step),
            tokens: stage.and_then(|stage| stage.log.tokens()).map_or(String::new(), thousands),
            result: stage.map_or_else(|| note(source, step), |stage| stages::result(source, stage)),
        });
    }
    rows
}

/// The examination before PPO, what did not pass first.
fn doctor_view(report: &Value) -> DoctorView {
    let text = |check: &Value, key: &str| check[key].as_str().unwrap_or_default().to_owned();
    let significant = |value: &Value| value.as_f64().map_or_else(String::new, ppo::doctor::significant);
    let checks = report["checks"].as_array().map_or(&[][..], Vec::as_slice);
    let with = |verdict: &str| checks.iter().filter(|check| check["verdict"] == verdict).collect::<Vec<_>>();
    let [failed, warned, passed] = ["fail", "warn", "pass"].map(with);
    let lede = format!(
        "What ppo doctor found before PPO began: {} passed, {} warned, {} failed.",
        counted(passed.len(), "check"),
        warned.len(),
        failed.len()
    );
    let rows = [failed, warned, passed].concat().into_iter().map(|check| {
        let verdict = text(check, "verdict");
        CheckRow {
            stage: text(check, "stage"),
            id: text(check, "id"),
            value: significant(&check["value"]),
            limit: significant(&check["limit"]),
            reason: text(check, "reason"),
            advice: if verdict == "pass" { String::new() } else { text(check, "meaning") + " " + &text(check, "hint") },
            verdict,
        }
    });
    DoctorView { lede, rows: rows.collect() }
}

fn note(source: &Source, step: Step) -> String {
    match step {
        Step::World => "stories, conversations and prompts, generated from the seed".to_owned(),
        Step::Tokenizer => "learned from the pretraining text".to_owned(),
        Step::Collect => match (&source.labels, source.record.samples_per_prompt) {
            (Some(labels), _) => people(labels),
            (None, Some(n)) => format!("answers of the fine-tuned model, {n} to a prompt, labelled"),
            (None, None) => "answers of the fine-tuned model, labelled".to_owned(),
        },
        Step::Evaluate => "every model’s answers to the held-out prompts".to_owned(),
        _ => String::new(),
    }
}

/// What people's labels came to, in a line.
fn people(labels: &Summary) -> String {
    let Summary { decisions, preferences, people, gold_accuracy, agreement } = labels;
    let by: Vec<String> = people.iter().map(|(name, n)| format!("{name} {n}")).collect();
    let mut text = format!("{decisions} decisions of people ({}), {preferences} of them for one answer", by.join(", "));
    if let Some(accuracy) = gold_accuracy {
        text.push_str(&format!("; {} of these in the order of the gold scores", percent(*accuracy)));
    }
    if let Some(alpha) = agreement["alpha"].as_f64() {
        text.push_str(&format!("; Krippendorff’s alpha {alpha:.2} over {} shared pairs", agreement["shared"]));
    }
    for (name, again) in agreement["consistency"].as_object().into_iter().flatten() {
        if let Some(share) = again["agreement"].as_f64() {
            let (share, n) = (percent(share), &again["repeats"]);
            text.push_str(&format!("; {name} decides {share} of {n} pairs alike when asked again"));
        }
    }
    text
}

/// The models side by side, by their gold score where it is known, else by the reward model's.
fn comparison(results: &Results, scorer: Option<&str>) -> Comparison {
    let (measure, scores) = measure(results);
    let (low, high) = axis(scores).unwrap_or((0.0, 1.0));
    let share = |value: f64| ((value - low) / (high - low) * 100.0).clamp(0.0, 100.0);
    let has_gold = !results.gold.is_empty();
    let row = |model: Model| PolicyRow {
        name: model.name,
        class: model.class,
        mean: model.measure.map_or(String::new(), |interval| number(interval.mean, 3)),
        bounds: model.measure.map_or(String::new(), |interval| {
            if interval.has_width() {
                format!("{} to {}", number(interval.low, 3), number(interval.high, 3))
            } else {
                "none of one prompt".to_owned()
            }
        }),
        left: model.measure.map_or(0.0, |interval| share(interval.low)),
        width: model.measure.map_or(0.0, |interval| share(interval.high) - share(interval.low)),
        center: model.measure.map_or(0.0, |interval| share(interval.mean)),
        score: model.score.map_or(String::new(), |score| signed(score.mean)),
        kl: model.kl.map_or(String::new(), |kl| number(kl, 2)),
        words: format!("{:.0}", model.words.mean),
        ended: model.ended.map_or(String::new(), |ended| percent(ended.mean)),
    };
    let rows: Vec<PolicyRow> = models(results, scores).into_iter().map(row).collect();
    Comparison {
        verdict: verdict(results),
        measure,
        has_kl: rows.iter().any(|row| !row.kl.is_empty()),
        rows,
        axis_low: compact(low),
        axis_high: compact(high),
        has_score: has_gold && !results.score.is_empty(),
        note: comparison_note(results, scorer),
    }
}

/// What a row of the comparison says.
struct Model {
    name: String,
    class: &'static str,
    measure: Option<Interval>,
    score: Option<Interval>,
    /// Nats away from the SFT model.
    kl: Option<f64>,
    words: Interval,
    ended: Option<Interval>,
}

/// The policies, the SFT model's best answers of several behind it.
fn models(results: &Results, scores: &BTreeMap<Policy, Interval>) -> Vec<Model> {
    let kl_of = |stage: &serde_json::Map<String, Value>| stage.get("kl_mean").and_then(mean_of);
    let mut models = Vec::new();
    for (&policy, &words) in &results.words {
        models.push(Model {
            name: policy_title(policy).to_owned(),
            class: policy.name(),
            measure: scores.get(&policy).copied(),
            score: results.score.get(&policy).copied(),
            kl: match policy {
                Policy::Base | Policy::Sft => None,
                Policy::Ppo => kl_of(&results.ppo),
                Policy::Rloo => kl_of(&results.rloo),
                Policy::Dpo => kl_of(&results.dpo),
            },
            words,
            ended: results.ended.get(&policy).copied(),
        });
        let best_of = results.best_of.iter().filter(|_| policy == Policy::Sft);
        models.extend(best_of.map(|best| Model {
            name: format!("SFT, best of {}", best.n),
            class: policy.name(),
            measure: if results.gold.is_empty() { Some(best.score) } else { best.gold },
            score: Some(best.score),
            kl: Some(best.kl),
            words: best.words,
            ended: Some(best.ended),
        }));
    }
    models
}

/// The score by which the models are compared, and its values.
fn measure(results: &Results) -> (&'static str, &BTreeMap<Policy, Interval>) {
    match (results.gold.is_empty(), results.score.is_empty()) {
        (false, _) => ("gold score", &results.gold),
        (true, false) => ("reward model’s score", &results.score),
        (true, true) => ("", &results.gold),
    }
}

fn comparison_note(results: &Results, scorer: Option<&str>) -> String {
    let mut note = Vec::new();
    if !results.gold.is_empty() {
        note.extend(scorer.map(|scorer| format!("Gold score: {scorer}.")));
        note.push("No model is trained on it directly.".to_owned());
    }
    if !results.score.is_empty() {
        note.push(
            "The reward model’s score is the proxy that PPO maximises, scaled so that the fine-tuned model’s answers have \
             mean 0 and deviation 1."
                .to_owned(),
        );
        if results.gold.is_empty() {
            note.push("A higher one need not be a better answer: read the answers below.".to_owned());
        }
    }
    if !results.best_of.is_empty() {
        note.push(
            "Best of n: the reward model’s choice among n answers of the fine-tuned model, estimated from all its answers to a \
             prompt; its KL is log n − (n − 1)/n."
                .to_owned(),
        );
    }
    if let Some(best) = results.best_of.last()
        && let (Some(gold), Some(perfect)) = (best.gold, best.gold_of_perfect_choice)
    {
        note.push(format!(
            "Were the best of {} chosen by the gold score itself, they would have {} and not {}: the difference is what the \
             reward model does not see.",
            best.n,
            number(perfect.mean, 3),
            number(gold.mean, 3)
        ));
    }
    if !measure(results).1.is_empty() {
        note.push(format!("Intervals: {METHOD}."));
    }
    note.join(" ")
}

/// Ends of the axis: 0 to 1 where all scores lie inside, otherwise round numbers about them.
fn axis(scores: &BTreeMap<Policy, Interval>) -> Option<(f64, f64)> {
    let low = scores.values().map(|interval| interval.low).min_by(f64::total_cmp)?;
    let high = scores.values().map(|interval| interval.high).max_by(f64::total_cmp)?;
    if low >= 0.0 && high <= 1.0 {
        return Some((0.0, 1.0));
    }
    let unit = 10f64.powf((high - low).max(1e-6).log10().floor());
    Some(((low / unit).floor() * unit, (high / unit).ceil() * unit))
}

/// One sentence with the result, whatever it was.
fn verdict(results: &Results) -> String {
    let (measure, scores) = measure(results);
    let of = |policy| scores.get(&policy).copied();
    let (Some(sft), Some(ppo)) = (of(Policy::Sft), of(Policy::Ppo)) else {
        return of(Policy::Sft).or_else(|| of(Policy::Base)).map_or_else(String::new, |interval| {
            let mean = number(interval.mean, 3);
            format!("The last model’s mean {measure} over {} held-out prompts is {mean}.", interval.n)
        });
    };
    let moved = if ppo.mean >= sft.mean { "raised" } else { "lowered" };
    let sure = if !(ppo.has_width() && sft.has_width()) {
        "but one prompt has no interval"
    } else if ppo.is_apart_from(&sft) {
        "the 95 % intervals do not overlap"
    } else {
        "but the 95 % intervals overlap"
    };
    let kl = results
        .ppo
        .get("kl_mean")
        .and_then(mean_of)
        .map_or_else(String::new, |kl| format!(", {} nats of KL from the fine-tuned model", number(kl, 1)));
    format!(
        "PPO {moved} the mean {measure} over {} held-out prompts from {} to {}{kl}; {sure}.",
        ppo.n,
        number(sft.mean, 3),
        number(ppo.mean, 3)
    )
}

fn prompt_view(row: &AnswerRow) -> PromptView {
    PromptView {
        prompt: row.prompt.clone(),
        answers: row
            .answers
            .iter()
            .map(|(&policy, answer)| AnswerView {
                name: policy_title(policy),
                class: policy.name(),
                marks: marks(answer),
                text: if answer.ended { answer.text.clone() } else { format!("{} …", answer.text.trim_end()) },
            })
            .collect(),
    }
}

fn marks(answer: &ScoredAnswer) -> String {
    let gold = answer.gold.map(|gold| format!("gold {}", number(gold, 2)));
    let score = answer.score.map(|score| format!("score {}", signed(score)));
    let cut = (!answer.ended).then(|| "cut at the limit".to_owned());
    [gold, score, cut].into_iter().flatten().collect::<Vec<_>>().join(" · ")
}

fn answers_lede(source: &Source) -> String {
    let shown = source.answers.len().min(N_ANSWERS);
    let all = source.answers.len();
    let base = if source.stage(Step::Pretrain).is_some() {
        " The base model has only seen plain text: it goes on from the request rather than answering it."
    } else if source.answers.iter().any(|row| row.answers.contains_key(&Policy::Base)) {
        " The base model is the one that the run started from."
    } else {
        ""
    };
    format!(
        "The first {shown} of {all} held-out prompts, not chosen by hand, answered by each model with the same random \
         numbers.{base} All answers are in answers.jsonl."
    )
}
