//! Preferences of people: two answers side by side, one key a decision.

mod desk;
mod questions;
mod screen;

use anyhow::{Context, bail};
use clap::ValueEnum;
use common::data::records::{Label, LabelFile, Verdict};
use common::interrupt::{Interrupt, Stopping};
use common::rng::Streams;
use common::view::is_at_terminal;

use crate::cli::LabelArgs;
use desk::{Desk, Session};
use questions::{Question, Questions};

/// Who decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum By {
    /// Whoever sits at the terminal
    Person,
    /// The gold score of the generated world
    Gold,
}

/// Carries out `reward-model label`.
///
/// The terminal is read on this thread, answers are sampled on the pool: a key never waits for a token.
///
/// # Errors
/// If the policy, the questions or the file of labels cannot be used, or there is no terminal for a person to decide at.
pub(crate) fn run(args: &LabelArgs) -> anyhow::Result<()> {
    args.runtime.start()?;
    args.runtime.check_base(args.policy.as_deref())?;
    let interrupt =
        Interrupt::install_with(Stopping { first: "stopping; every decision is kept", second: "stopped at once" })?;
    if args.by == By::Person && !is_at_terminal() {
        bail!(
            "there is no terminal to decide at\nhint: run the command in a terminal, without pipes; `--by gold` decides without \
             a person"
        );
    }
    if let Some(pairs) = &args.pairs
        && pairs.canonicalize().is_ok_and(|pairs| args.out.canonicalize().is_ok_and(|out| pairs == out))
    {
        bail!("`{}` is both `--pairs` and `--out`\nhint: name another file to write to", pairs.display());
    }
    let annotator = annotator(args);
    if let Some(folder) = args.out.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("failed to make `{}`", folder.display()))?;
    }
    let is_new = !args.out.exists();
    let (file, said) = LabelFile::open(&args.out)?;
    let said: Vec<Label> =
        said.into_iter().filter(|label| label.annotator.as_deref() == Some(annotator.as_str())).collect();
    let questions = Questions::open(args, &said).inspect_err(|_| {
        if is_new {
            // The error that is told is the one that matters.
            let _ = std::fs::remove_file(&args.out);
        }
    })?;
    let n_before = said.iter().filter(|label| !label.repeat).count();
    if n_before > 0 {
        tracing::info!("{n_before} decisions of `{annotator}` in `{}` already", args.out.display());
    }
    let limit = args.limit.map(|limit| limit.get().saturating_sub(n_before));
    let (repeat_every, streams) = (args.repeat_every, Streams::new(args.seed));
    let mut desk = Desk::new(file, questions, Session { annotator, n_before, limit, repeat_every, streams });
    match args.by {
        By::Gold => decide_by_gold(&mut desk, args, interrupt)?,
        By::Person => screen::run(&mut desk, interrupt)?,
    }
    let tally = desk.tally();
    tracing::info!("{tally} in `{}`", args.out.display());
    if interrupt.requested() {
        tracing::info!("the same command goes on");
        return Err(interrupt.stopped().into());
    }
    Ok(())
}

/// Who decides, by name.
fn annotator(args: &LabelArgs) -> String {
    let user = || ["USER", "USERNAME"].into_iter().find_map(|name| std::env::var(name).ok());
    match (&args.annotator, args.by) {
        (Some(name), _) => name.clone(),
        (None, By::Gold) => "gold".to_owned(),
        (None, By::Person) => user().unwrap_or_else(|| "anonymous".to_owned()),
    }
}

/// Decides every question by the gold score, or by the labeller that errs, without a screen.
fn decide_by_gold(desk: &mut Desk, args: &LabelArgs, interrupt: Interrupt) -> anyhow::Result<()> {
    let streams = Streams::new(args.seed);
    while !interrupt.requested() && desk.wait()? {
        let Some(question) = desk.question() else { break };
        let verdict = gold_verdict(question, args.label_temperature, &streams)?;
        desk.decide(verdict, None)?;
    }
    Ok(())
}

/// Which of two answers the gold score prefers.
fn gold_verdict(question: &Question, temperature: f64, streams: &Streams) -> anyhow::Result<Verdict> {
    let prompt = question.prompt.last().map_or("", |message| message.content.as_str());
    let gold = |answer: &str| {
        toy::gold::score(prompt, answer).with_context(|| {
            format!("the gold score is not defined for answers to `{prompt}`\nhint: `--by gold` knows the requests of the generated world alone")
        })
    };
    let [a, b] = [gold(&question.answers[0])?, gold(&question.answers[1])?];
    let first_wins = if temperature > 0.0 {
        toy::label_pair(a, b, temperature, &mut streams.get("label/gold", question.number))
    } else if a == b {
        return Ok(Verdict::Tie);
    } else {
        a > b
    };
    Ok(if first_wins { Verdict::First } else { Verdict::Second })
}

#[cfg(test)]
mod tests {
    use common::conversation::{Message, Role};

    use super::*;

    #[test]
    fn gold_prefers_the_answer_that_does_what_was_asked() {
        let good =
            "On a warm day, Mia went to the park. Soon, Mia found an orange kite under a bench. Mia was very happy.";
        let mut question = Question {
            number: 0,
            prompt: vec![Message::new(Role::User, "Tell me a story about Mia.")],
            answers: ["boat boat".to_owned(), good.to_owned()],
        };
        let streams = Streams::new(0);
        let verdict = |question: &Question| gold_verdict(question, 0.0, &streams).expect("a request of the world");
        assert_eq!(verdict(&question), Verdict::Second);
        question.answers.swap(0, 1);
        assert_eq!(verdict(&question), Verdict::First);
        question.answers[1] = question.answers[0].clone();
        assert_eq!(verdict(&question), Verdict::Tie);
        question.prompt[0].content = "What is the time?".to_owned();
        assert!(gold_verdict(&question, 0.0, &streams).is_err());
    }
}
