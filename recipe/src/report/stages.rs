//! The report's section on each training stage: what it does, its curves, its key numbers, its samples.

use std::borrow::Cow;

use anyhow::Result;
use common::metrics::{first_and_last, names, read_samples};
use common::stats::Interval;
use plot::{Curve, Hue, Plot, Weight, smooth, thousands};
use serde::Serialize;
use serde_json::{Map, Value};

use super::text::{duration, mean_of, number, percent, signed, title};
use super::{Source, StageSource};
use crate::gold::GoldKind;
use crate::steps::Step;

/// Samples shown of the first and of the last step that has any.
pub(super) const N_SAMPLES: usize = 3;
/// Width in CSS pixels of a figure that stands alone, and of one of two side by side.
const FULL_WIDTH: u32 = 720;
pub(super) const HALF_WIDTH: u32 = 440;

/// One section of the page.
#[derive(Serialize)]
pub struct Section {
    id: &'static str,
    number: String,
    title: &'static str,
    lede: String,
    figures: Vec<Figure>,
    numbers: Vec<Number>,
    samples: Vec<SampleText>,
    config: String,
}

#[derive(Serialize)]
pub(super) struct Figure {
    svg: String,
    title: String,
    caption: String,
    pub(super) keys: Vec<Key>,
}

#[derive(Serialize)]
pub(super) struct Key {
    pub(super) label: String,
    class: String,
}

#[derive(Serialize)]
struct Number {
    label: Cow<'static, str>,
    value: String,
    note: String,
}

#[derive(Serialize)]
struct SampleText {
    step: String,
    /// Whether the text goes on from the prompt, with no break between.
    goes_on: bool,
    prompt: String,
    text: String,
}

/// One value of PPO over its steps.
struct Trend {
    /// Of each rollout.
    name: &'static str,
    /// The same on held-out prompts, if it is measured.
    held_out: &'static str,
    unit: &'static str,
    title: &'static str,
    caption: &'static str,
    hue: Hue,
}

const TRENDS: [Trend; 6] = [
    Trend {
        name: names::OBJECTIVE_SCORE,
        held_out: names::VAL_SCORE,
        unit: "score",
        title: "Reward model’s score.",
        caption: "Mean over the rollout; 0 is the fine-tuned model. This is what PPO maximises. An answer without an end counts \
                  as `ppo.missing_eos_score` here, and by its own score in the table at the top.",
        hue: Hue::Ember,
    },
    Trend {
        name: names::GOLD_SCORE,
        held_out: names::GOLD_VAL_SCORE,
        unit: "gold score",
        title: "Gold score.",
        caption: "Mean over the same answers. PPO does not see it.",
        hue: Hue::Ember,
    },
    Trend {
        name: names::OBJECTIVE_KL,
        held_out: names::VAL_KL,
        unit: "nats",
        title: "KL from the fine-tuned model.",
        caption: "Summed over an answer, averaged over answers; on sampled tokens (k1).",
        hue: Hue::Slate,
    },
    Trend {
        name: names::POLICY_ENTROPY,
        held_out: "",
        unit: "nats",
        title: "Entropy.",
        caption: "Of the next-token distribution, mean over answer tokens.",
        hue: Hue::Slate,
    },
    Trend {
        name: names::ROLLOUT_RESPONSE_LENGTH,
        held_out: names::VAL_RESPONSE_LENGTH,
        unit: "tokens",
        title: "Length of an answer.",
        caption: "Mean, the end mark included.",
        hue: Hue::Slate,
    },
    Trend {
        name: names::ROLLOUT_EOS_RATE,
        held_out: names::VAL_EOS_RATE,
        unit: "share",
        title: "Answers that end.",
        caption: "Share that stop by themselves before the limit.",
        hue: Hue::Slate,
    },
];

impl Trend {
    /// Every rollout faint, their running mean strong, held-out values as dots.
    fn figure(&self, stage: &StageSource) -> Result<Option<Figure>> {
        let points = stage.log.series(self.name);
        let Some(&(_, last)) = points.last() else { return Ok(None) };
        let other = if self.hue == Hue::Ember { Hue::Slate } else { Hue::Ember };
        let curve = |label: String, points, hue, weight| Curve { label, points, hue, weight };
        let trend = smooth(&points, 20);
        let mut curves = vec![
            curve(format!("each rollout, {last:.3} at the end"), points, self.hue, Weight::Faint),
            curve("running mean".to_owned(), trend, self.hue, Weight::Trend),
        ];
        let held_out = stage.log.series(self.held_out);
        if !held_out.is_empty() {
            curves.push(curve("held-out prompts".to_owned(), held_out, other, Weight::Dots));
        }
        figure(&curves, self.unit, self.title, self.caption, HALF_WIDTH)
    }
}

/// Everything the page says about one stage.
pub fn section(source: &Source, stage: &StageSource) -> Result<Section> {
    let position = source.stages.iter().position(|other| other.step == stage.step).map_or(0, |i| i + 1);
    let samples = first_and_last(&read_samples(&stage.dir)?, N_SAMPLES);
    Ok(Section {
        id: stage.step.name(),
        number: if source.record.recipe.is_empty() {
            String::new()
        } else {
            format!("Stage {position} of {}", source.stages.len())
        },
        title: title(stage.step),
        lede: lede(stage.step, source.record.gold.is_some()),
        figures: figures(stage)?,
        numbers: numbers(source, stage),
        samples: samples
            .into_iter()
            .map(|sample| SampleText {
                step: thousands(sample.step as f64),
                goes_on: stage.step == Step::Pretrain,
                prompt: sample.prompt,
                text: sample.text,
            })
            .collect(),
        config: stage.config()?,
    })
}

/// The stage in one line of the overview.
pub fn result(source: &Source, stage: &StageSource) -> String {
    let log = &stage.log;
    let evaluated =
        |name: &str| source.results.as_ref().and_then(|results| results.reward_model.get(name)).and_then(mean_of);
    match stage.step {
        Step::RewardModel => match evaluated("accuracy").or_else(|| log.last("val/accuracy")) {
            Some(accuracy) => format!("picks the preferred answer in {} of held-out pairs", percent(accuracy)),
            None => String::new(),
        },
        Step::Ppo | Step::Rloo => match (log.last("objective/score"), log.last("objective/kl")) {
            (Some(score), Some(kl)) => {
                format!("last rollout: reward model’s score {} at {} nats of KL", signed(score), number(kl, 1))
            }
            _ => String::new(),
        },
        Step::Dpo => match log.last("val/accuracy") {
            Some(accuracy) => {
                format!("its implicit reward prefers the chosen answer in {} of held-out pairs", percent(accuracy))
            }
            None => String::new(),
        },
        _ => match (log.series("val/loss").first(), log.min("val/loss")) {
            (Some(&(_, first)), Some(best)) => format!("held-out loss {first:.3} → {best:.3} nats per token"),
            _ => log.last("train/loss").map_or(String::new(), |loss| format!("training loss {loss:.3} nats per token")),
        },
    }
}

fn lede(step: Step, knows_gold: bool) -> String {
    let text = match step {
        Step::Pretrain => {
            "The model learns to predict the next token of plain text. Afterwards it can continue a story, but nobody has told \
             it what a request is."
        }
        Step::Sft => {
            "Fine-tuning on conversations. The loss counts the assistant’s words and the end mark only, so the model learns to \
             answer, not to ask. It imitates all the answers it is shown, the poor ones too."
        }
        Step::RewardModel => {
            "The same network with one number for an output. It sees pairs of answers to one request and learns to score the \
             preferred one higher, by the loss −log σ(chosen − rejected). An accuracy of 50\u{a0}% would be guessing; labels that \
             contradict one another keep it below 100\u{a0}%."
        }
        Step::Ppo if knows_gold => {
            "The fine-tuned model answers requests, the reward model scores the answers, and PPO makes the better ones likelier \
             while it pays for every nat it moves away from where it began. PPO never sees the gold score, so that curve is the \
             one to watch: a score that rises while the gold falls means that the policy exploits the reward model’s mistakes."
        }
        Step::Ppo => {
            "The fine-tuned model answers requests, the reward model scores the answers, and PPO makes the better ones likelier \
             while it pays for every nat it moves away from where it began."
        }
        Step::Rloo => {
            "The fine-tuned model answers each request several times and the reward model scores the answers. An answer becomes \
             likelier the more its score exceeds that of the others to the same request, which takes the place of a value model."
        }
        Step::Dpo => {
            "The fine-tuned model learns from the preference pairs themselves: it makes the preferred answer of each likelier than \
             the other one, measured from where it began. β times the log-probability that an answer gained is its implicit reward. \
             No reward model is used, and no answer is sampled."
        }
        _ => "",
    };
    text.to_owned()
}

fn figures(stage: &StageSource) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    match stage.step {
        Step::Ppo | Step::Rloo => {
            for trend in TRENDS {
                figures.extend(trend.figure(stage)?);
            }
        }
        Step::RewardModel => {
            figures.extend(train_and_val(stage, "loss", "nats per pair", "Loss.", HALF_WIDTH)?);
            figures.extend(train_and_val(stage, "accuracy", "share of pairs", "Accuracy.", HALF_WIDTH)?);
        }
        Step::Dpo => {
            figures.extend(train_and_val(stage, "loss", "loss of a pair", "Loss.", HALF_WIDTH)?);
            figures.extend(curves_of(
                stage,
                names::REWARDS_MARGINS,
                names::VAL_MARGIN,
                "reward",
                "Margin.",
                HALF_WIDTH,
            )?);
        }
        _ => figures.extend(train_and_val(stage, "loss", "nats per token", "Loss.", FULL_WIDTH)?),
    }
    Ok(figures)
}

/// `train/<name>` faint, `val/<name>` strong.
fn train_and_val(stage: &StageSource, name: &str, unit: &str, title: &str, width: u32) -> Result<Option<Figure>> {
    curves_of(stage, &format!("train/{name}"), &format!("val/{name}"), unit, title, width)
}

/// What is measured in training faint, the same of held-out data strong.
fn curves_of(
    stage: &StageSource,
    train: &str,
    val: &str,
    unit: &str,
    title: &str,
    width: u32,
) -> Result<Option<Figure>> {
    let (train, val) = (stage.log.series(train), stage.log.series(val));
    let mut curves = Vec::new();
    if !train.is_empty() {
        curves.push(Curve { label: "training".to_owned(), points: train, hue: Hue::Slate, weight: Weight::Faint });
    }
    if let Some(&(_, last)) = val.last() {
        let label = format!("held out, {last:.3} at the end");
        curves.push(Curve { label, points: val, hue: Hue::Ember, weight: Weight::Strong });
    }
    figure(&curves, unit, title, "", width)
}

/// A figure over the steps; `None` where there is nothing to draw.
pub(super) fn figure(curves: &[Curve], unit: &str, title: &str, caption: &str, width: u32) -> Result<Option<Figure>> {
    let plot = Plot { x_label: "step", y_label: unit, curves, width, height: width * 9 / 20 + 20 };
    let Some(svg) = plot.to_svg()? else { return Ok(None) };
    let keys = curves
        .iter()
        .map(|curve| Key {
            label: curve.label.clone(),
            class: format!("{}{}", curve.hue.class(), curve.weight.class()),
        })
        .collect();
    Ok(Some(Figure { svg, title: title.to_owned(), caption: caption.to_owned(), keys }))
}

/// How far a reward model agrees with each person who labelled.
fn by_people(results: &Map<String, Value>) -> Vec<Number> {
    let people = results.get("annotators").and_then(Value::as_object);
    let number = |(name, of): (&String, &Value)| {
        let Interval { mean, low, high, n } = serde_json::from_value(of["accuracy"].clone()).ok()?;
        Some(Number {
            label: format!("Agrees with {name}").into(),
            value: percent(mean),
            note: format!(
                "of {n} {} held out from training; 95\u{a0}% {} to {}",
                if n == 1 { "label" } else { "labels" },
                percent(low),
                percent(high)
            ),
        })
    };
    people.into_iter().flatten().filter_map(number).collect()
}

/// What stands beside the reward model's accuracy against the gold order, and beside the share of labels that follow it.
fn label_notes(source: &Source) -> (&'static str, &'static str) {
    let has = |step| source.record.steps.contains_key(&step);
    let is_of_world = source.record.gold.as_deref() == Some(GoldKind::World.describe());
    if source.labels.is_some() {
        ("by the gold score, which people did not see", "decided by people")
    } else if has(Step::World) || has(Step::Collect) || is_of_world {
        ("the labels’ noise taken out", "the labeller errs like people")
    } else {
        ("another judge than that behind the labels", "these were not made from it")
    }
}

fn numbers(source: &Source, stage: &StageSource) -> Vec<Number> {
    let log = &stage.log;
    let mut numbers = Vec::new();
    let mut push = |label: &'static str, value: Option<String>, note: &str| {
        numbers.extend(value.map(|value| Number { label: label.into(), value, note: note.to_owned() }));
    };
    match stage.step {
        Step::RewardModel => {
            let evaluated = |name: &str| source.results.as_ref()?.reward_model.get(name).and_then(Value::as_f64);
            push("Accuracy on the test labels", evaluated("accuracy").map(percent), "pairs never trained on");
            let (of_gold, of_labels) = label_notes(source);
            push("Accuracy against the gold order", evaluated("gold_accuracy").map(percent), of_gold);
            push(
                "Always the longer answer",
                evaluated("longer_wins_accuracy").map(percent),
                "the baseline to beat, on labels",
            );
            push("Labels that follow the gold", evaluated("label_agreement").map(percent), of_labels);
            push("Test pairs", evaluated("pairs").map(thousands), "");
            push("Held-out loss", log.last("val/loss").map(|loss| format!("{loss:.3}")), "guessing costs ln 2 = 0.693");
        }
        Step::Ppo | Step::Rloo => {
            let change = |name: &str, digits: usize| {
                let series = log.series(name);
                let ((_, first), (_, last)) = (*series.first()?, *series.last()?);
                Some(format!("{} → {}", number(first, digits), number(last, digits)))
            };
            push("Reward model’s score", change("objective/score", 2), "first rollout → last");
            push("Gold score", change(names::GOLD_SCORE, 3), "first rollout → last");
            let evaluated = |name: &str| {
                let results = source.results.as_ref()?;
                let of_stage = if stage.step == Step::Rloo { &results.rloo } else { &results.ppo };
                of_stage.get(name).and_then(mean_of)
            };
            let nats = |kl: f64| format!("{} nats", number(kl, 2));
            push(
                "KL from SFT",
                log.last("objective/kl").map(nats),
                "summed over an answer; last rollout, training prompts",
            );
            push("KL from SFT at the end", evaluated("kl_mean").map(nats), "of the final policy, held-out prompts");
            push("Wins against SFT", evaluated("win_rate").map(percent), "by the reward model, held-out prompts");
            push("Answers that end", log.last("rollout/eos_rate").map(percent), "last rollout");
            push("Ratios clipped", log.last("policy/clip_frac").map(percent), "of the last update’s tokens");
            push(
                "Returns explained by the critic",
                log.last("value/explained_variance").map(percent),
                "share of their variance",
            );
        }
        Step::Dpo => {
            let evaluated = |name: &str| source.results.as_ref()?.dpo.get(name).and_then(mean_of);
            push(
                "Chosen above rejected",
                evaluated("accuracy").or_else(|| log.last("val/accuracy")).map(percent),
                "by the implicit reward, held-out pairs",
            );
            let margin = evaluated("margin_mean").or_else(|| log.last("val/margin"));
            push("Margin", margin.map(signed), "of the implicit reward, held-out pairs");
            push("Held-out loss", log.last("val/loss").map(|loss| format!("{loss:.3}")), "of a pair");
            push(
                "KL from SFT at the end",
                evaluated("kl_mean").map(|kl| format!("{} nats", number(kl, 2))),
                "summed over an answer, held-out prompts",
            );
            push("Wins against SFT", evaluated("win_rate").map(percent), "by the reward model, held-out prompts");
        }
        _ => {
            push("Best held-out loss", log.min("val/loss").map(|loss| format!("{loss:.3}")), "nats per token");
            push("Perplexity", log.min("val/loss").map(|loss| format!("{:.2}", loss.exp())), "exp of that loss");
            push("Tokens guessed right", log.last("val/accuracy").map(percent), "of the answers, held out");
            push("Bits per byte", log.min("val/bits_per_byte").map(|bits| format!("{bits:.3}")), "held out");
        }
    }
    let speed = log.last("train/tokens_per_second").map(|speed| format!("{} tokens/s", thousands(speed.round())));
    push("Time", Some(duration(stage.seconds)), speed.as_deref().unwrap_or(""));
    if let (Step::RewardModel, Some(results)) = (stage.step, &source.results) {
        numbers.extend(by_people(&results.reward_model));
    }
    numbers
}
