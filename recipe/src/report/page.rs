//! `report.html`: the values that `page.html` lays out.

use anyhow::{Context, Result};
use minijinja::Environment;
use minijinja::value::Serde;
use serde::Serialize;

use super::plot::thousands;
use super::stages::{self, Section};
use super::{Source, StageSource};
use crate::evaluation::{Answer, Evaluation, Policy};
use crate::stats::METHOD;
use crate::steps::Step;

/// Held-out prompts shown side by side; all of them are in `answers.jsonl`.
const N_ANSWERS: usize = 12;

#[derive(Serialize)]
struct Page {
    title: String,
    subtitle: &'static str,
    version: String,
    facts: Vec<String>,
    gold: Option<Gold>,
    overview: Vec<OverviewRow>,
    stages: Vec<Section>,
    answers: Vec<Answers>,
    answers_lede: String,
}

/// The first thing shown: what it was all for.
#[derive(Serialize)]
struct Gold {
    verdict: String,
    rows: Vec<GoldRow>,
    axis_low: String,
    axis_high: String,
    has_score: bool,
    note: String,
}

#[derive(Serialize)]
struct GoldRow {
    name: &'static str,
    class: &'static str,
    mean: String,
    bounds: String,
    /// Per cent of the axis.
    left: f64,
    width: f64,
    center: f64,
    score: String,
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

#[derive(Serialize)]
struct Answers {
    prompt: String,
    answers: Vec<AnswerCell>,
}

#[derive(Serialize)]
struct AnswerCell {
    name: &'static str,
    class: &'static str,
    marks: String,
    text: String,
}

/// The whole page as HTML.
pub fn render(source: &Source) -> Result<String> {
    let record = &source.record;
    let mut facts = vec![format!("recipe {}", record.recipe), format!("seed {}", record.seed)];
    if !record.backend.is_empty() {
        facts.push(format!("backend {}, {} threads", record.backend, record.threads));
    }
    facts.push(format!("{} in all", duration(source.total_seconds())));
    facts.push(format!("Kindling {}", record.version));
    let sections =
        source.stages.iter().map(|stage| stages::section(source, stage)).collect::<Result<Vec<Section>>>()?;
    let has_ppo = source.stage(Step::Ppo).is_some();
    let page = Page {
        title: if record.title.is_empty() { record.recipe.clone() } else { record.title.clone() },
        subtitle: if has_ppo {
            "From plain text to an aligned chat model: pretrained, fine-tuned, given a reward model and improved by PPO, on one machine."
        } else {
            "Training curves, key numbers and samples of every stage that has run."
        },
        version: record.version.clone(),
        facts,
        gold: source.evaluation.as_ref().and_then(|evaluation| gold(evaluation, record.gold.as_deref())),
        overview: overview(source),
        stages: sections,
        answers: source.answers.iter().take(N_ANSWERS).map(answers).collect(),
        answers_lede: answers_lede(source),
    };
    let mut environment = Environment::new();
    environment.add_template("page.html", include_str!("page.html")).context("the report's template is broken")?;
    environment.get_template("page.html")?.render(Serde(&page)).context("failed to render the report")
}

fn overview(source: &Source) -> Vec<OverviewRow> {
    let mut rows = Vec::new();
    for step in Step::ALL {
        let stage = source.stage(step);
        if !source.record.steps.contains_key(&step) {
            continue;
        }
        let last_step = |stage: &StageSource| stage.log.last("step").map_or(String::new(), thousands);
        rows.push(OverviewRow {
            name: title(step),
            id: stage.map(|stage| stage.step.name()),
            time: duration(stage.map_or_else(|| source.record.seconds(step), |stage| stage.seconds)),
            steps: stage.map_or(String::new(), last_step),
            tokens: stage.and_then(|stage| stage.log.tokens()).map_or(String::new(), thousands),
            result: stage.map_or_else(|| note(step).to_owned(), |stage| stages::result(source, stage)),
        });
    }
    rows
}

/// Heading of a step.
pub fn title(step: Step) -> &'static str {
    match step {
        Step::World => "Data",
        Step::Tokenizer => "Tokenizer",
        Step::Pretrain => "Pretraining",
        Step::Sft => "Supervised fine-tuning",
        Step::Collect => "Preference pairs",
        Step::RewardModel => "Reward model",
        Step::Ppo => "PPO",
        Step::Evaluate => "Evaluation",
    }
}

fn note(step: Step) -> &'static str {
    match step {
        Step::World => "stories, conversations and prompts, generated from the seed",
        Step::Tokenizer => "learned from the pretraining text",
        Step::Collect => "answers of the fine-tuned model, two to a prompt, labelled",
        Step::Evaluate => "every model’s answers to the held-out prompts",
        _ => "",
    }
}

fn gold(evaluation: &Evaluation, scorer: Option<&str>) -> Option<Gold> {
    let (low, high) = axis(evaluation)?;
    let share = |value: f64| ((value - low) / (high - low) * 100.0).clamp(0.0, 100.0);
    let rows = evaluation
        .gold
        .iter()
        .map(|(&policy, interval)| GoldRow {
            name: policy_title(policy),
            class: policy.name(),
            mean: format!("{:.3}", interval.mean),
            bounds: format!("{:.3} to {:.3}", interval.low, interval.high),
            left: share(interval.low),
            width: share(interval.high) - share(interval.low),
            center: share(interval.mean),
            score: evaluation.score.get(&policy).map_or(String::new(), |score| signed(score.mean)),
            words: evaluation.words.get(&policy).map_or(String::new(), |words| format!("{:.0}", words.mean)),
            ended: evaluation.ended.get(&policy).map_or(String::new(), |ended| percent(ended.mean)),
        })
        .collect();
    let scorer = scorer.map_or_else(String::new, |scorer| format!("Gold score: {scorer}. "));
    Some(Gold {
        verdict: verdict(evaluation),
        rows,
        axis_low: compact(low),
        axis_high: compact(high),
        has_score: !evaluation.score.is_empty(),
        note: format!(
            "{scorer}No model is trained on it directly. The reward model’s score is the proxy that PPO maximises, scaled so that \
             the fine-tuned model’s answers have mean 0 and deviation 1. Intervals: {METHOD}."
        ),
    })
}

/// Ends of the gold axis: 0 to 1 where all scores lie inside, otherwise round numbers about them.
fn axis(evaluation: &Evaluation) -> Option<(f64, f64)> {
    let low = evaluation.gold.values().map(|interval| interval.low).min_by(f64::total_cmp)?;
    let high = evaluation.gold.values().map(|interval| interval.high).max_by(f64::total_cmp)?;
    if low >= 0.0 && high <= 1.0 {
        return Some((0.0, 1.0));
    }
    let unit = 10f64.powf((high - low).max(1e-6).log10().floor());
    Some(((low / unit).floor() * unit, (high / unit).ceil() * unit))
}

/// One sentence with the result, whatever it was.
fn verdict(evaluation: &Evaluation) -> String {
    let of = |policy| evaluation.gold.get(&policy).copied();
    let (Some(sft), Some(ppo)) = (of(Policy::Sft), of(Policy::Ppo)) else {
        return of(Policy::Sft).or_else(|| of(Policy::Base)).map_or_else(String::new, |interval| {
            format!("The last model’s mean gold score over {} held-out prompts is {:.3}.", interval.n, interval.mean)
        });
    };
    let moved = if ppo.mean >= sft.mean { "raised" } else { "lowered" };
    let sure =
        if ppo.is_apart_from(&sft) { "the 95 % intervals do not overlap" } else { "but the 95 % intervals overlap" };
    let kl = evaluation
        .ppo
        .get("kl_mean")
        .and_then(mean_of)
        .map_or_else(String::new, |kl| format!(", {kl:.1} nats of KL from the fine-tuned model"));
    format!(
        "PPO {moved} the mean gold score over {} held-out prompts from {:.3} to {:.3}{kl}; {sure}.",
        ppo.n, sft.mean, ppo.mean
    )
}

/// The mean of a value printed by `ppo eval`: a number, or an object with `mean`.
pub fn mean_of(value: &serde_json::Value) -> Option<f64> {
    value.as_f64().or_else(|| value.get("mean")?.as_f64())
}

fn answers(row: &crate::evaluation::AnswerRow) -> Answers {
    Answers {
        prompt: row.prompt.clone(),
        answers: row
            .answers
            .iter()
            .map(|(&policy, answer)| AnswerCell {
                name: policy_title(policy),
                class: policy.name(),
                marks: marks(answer),
                text: if answer.ended { answer.text.clone() } else { format!("{} …", answer.text.trim_end()) },
            })
            .collect(),
    }
}

fn marks(answer: &Answer) -> String {
    let gold = answer.gold.map(|gold| format!("gold {gold:.2}"));
    let score = answer.score.map(|score| format!("score {}", signed(score)));
    let cut = (!answer.ended).then(|| "cut at the limit".to_owned());
    [gold, score, cut].into_iter().flatten().collect::<Vec<_>>().join(" · ")
}

fn answers_lede(source: &Source) -> String {
    let shown = source.answers.len().min(N_ANSWERS);
    let all = source.answers.len();
    format!(
        "The first {shown} of {all} held-out prompts, not chosen by hand, answered by each model with the same random numbers. \
         The base model has only seen plain text: it goes on from the request rather than answering it. All answers are in answers.jsonl."
    )
}

fn policy_title(policy: Policy) -> &'static str {
    match policy {
        Policy::Base => "Base",
        Policy::Sft => "SFT",
        Policy::Ppo => "PPO",
    }
}

/// `1 h 2 min`, `3 min 12 s` or `4.2 s`.
pub fn duration(seconds: f64) -> String {
    if seconds < 10.0 {
        return format!("{seconds:.1} s");
    }
    let whole = seconds.round() as u64;
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m} min {s} s"),
        (h, m, _) => format!("{h} h {m} min"),
    }
}

/// A share as a percentage.
pub fn percent(share: f64) -> String {
    format!("{:.1}\u{a0}%", share * 100.0)
}

/// With its sign, a true minus.
pub fn signed(value: f64) -> String {
    if value < 0.0 { format!("−{:.2}", value.abs()) } else { format!("+{value:.2}") }
}

fn compact(value: f64) -> String {
    let text = format!("{value:.2}");
    text.trim_end_matches('0').trim_end_matches('.').replace('-', "−")
}
