//! What is asked: pairs of a file, or a policy's answers, sampled while one reads.

use std::collections::{HashMap, HashSet};
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, channel, sync_channel};
use std::time::Duration;

use anyhow::{Context, bail};
use common::checkpoint::Checkpoint;
use common::conversation::{self, Message};
use common::data::records::{Label, OnBadRecord, Prompt, read_labels, read_prompts};
use common::model::Gpt;
use common::rng::Streams;
use common::runtime::on_pool;
use common::score::Sampling;
use common::tokenizer::Tokenizer;

use crate::cli::LabelArgs;

/// Questions that wait, sampled before they are asked for.
const AHEAD: usize = 16;

/// Two answers to a prompt, in the order in which they are shown.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Question {
    /// Its place in the file that it comes from, or of its prompt.
    pub(super) number: u64,
    /// The turns up to the answer.
    pub(super) prompt: Vec<Message>,
    /// The answers.
    pub(super) answers: [String; 2],
}

/// The questions that are not decided yet, in order.
pub(super) struct Questions {
    from: Receiver<anyhow::Result<Question>>,
    /// How many there are at most.
    pub(super) n: usize,
}

/// Whether there is a question.
pub(super) enum Next {
    /// There is one.
    One(Question),
    /// It is being sampled.
    Soon,
    /// There is none left.
    None,
}

impl Questions {
    /// Opens what `args` name, without what `said` decides.
    pub(super) fn open(args: &LabelArgs, said: &[Label]) -> anyhow::Result<Self> {
        match (&args.pairs, &args.policy, &args.prompts) {
            (Some(pairs), ..) => Self::of_pairs(pairs, said, &Streams::new(args.seed)),
            (None, Some(policy), Some(prompts)) => Self::sampled(args, policy, prompts, said),
            _ => bail!("either `--pairs`, or `--policy` with `--prompts`, is needed"),
        }
    }

    /// The pairs of a file, each in an order drawn for it: where the better one stands must not tell which it is.
    fn of_pairs(path: &Path, said: &[Label], streams: &Streams) -> anyhow::Result<Self> {
        let mut said: HashSet<String> =
            said.iter().map(|label| Label::question(&label.prompt, &label.answers)).collect();
        let mut questions = Vec::new();
        for (number, Label { prompt, mut answers, .. }) in read_labels(path, OnBadRecord::Fail)?.into_iter().enumerate()
        {
            // What two people decided is asked once.
            if !said.insert(Label::question(&prompt, &answers)) {
                continue;
            }
            let number = number as u64;
            if streams.get("label/order", number).uniform() < 0.5 {
                answers.swap(0, 1);
            }
            questions.push(Question { number, prompt, answers });
        }
        let n = questions.len();
        let (to, from) = channel();
        for question in questions {
            // The receiver is here.
            drop(to.send(Ok(question)));
        }
        Ok(Self { from, n })
    }

    /// Two answers to each prompt that has no decision yet, sampled on a thread of its own.
    fn sampled(args: &LabelArgs, policy: &Path, prompts: &Path, said: &[Label]) -> anyhow::Result<Self> {
        let mut checkpoint = Checkpoint::open_with(policy, args.runtime.opening())?;
        let tokenizer = checkpoint.require_tokenizer()?.clone();
        let gpt = args.runtime.open()?.take_gpt(&mut checkpoint)?;
        let mut decided = HashMap::new();
        for label in said.iter().filter(|label| !label.repeat) {
            *decided.entry(label.prompt.clone()).or_insert(0_usize) += 1;
        }
        let is_open = |(_, prompt): &(usize, Prompt)| match decided.get_mut(&prompt.messages) {
            Some(n) if *n > 0 => {
                *n -= 1;
                false
            }
            _ => true,
        };
        let open: Vec<(usize, Prompt)> =
            read_prompts(prompts, OnBadRecord::Fail)?.into_iter().enumerate().filter(is_open).collect();
        let n = open.len();
        let (to, from) = sync_channel(AHEAD);
        let sampler = Sampler {
            gpt,
            tokenizer,
            temperature: args.temperature,
            max_tokens: args.max_tokens.get(),
            streams: Streams::new(args.seed),
        };
        let run = move || {
            if let Err(error) = on_pool(|| sampler.run(&open, &to)) {
                // Nobody listens any more if this cannot be sent.
                let _ = to.send(Err(error));
            }
        };
        std::thread::Builder::new().name("sampler".to_owned()).spawn(run).context("failed to start a thread")?;
        Ok(Self { from, n })
    }

    /// The next question, waited for `patience` long.
    pub(super) fn next(&self, patience: Duration) -> anyhow::Result<Next> {
        match self.from.recv_timeout(patience) {
            Ok(question) => question.map(Next::One),
            Err(RecvTimeoutError::Timeout) => Ok(Next::Soon),
            Err(RecvTimeoutError::Disconnected) => Ok(Next::None),
        }
    }
}

struct Sampler {
    gpt: Gpt,
    tokenizer: Tokenizer,
    temperature: f64,
    max_tokens: usize,
    streams: Streams,
}

impl Sampler {
    /// Samples until the prompts or the listener's patience end. Two equal answers are no question.
    fn run(&self, prompts: &[(usize, Prompt)], to: &SyncSender<anyhow::Result<Question>>) -> anyhow::Result<()> {
        let sampling = Sampling::new(self.temperature, self.max_tokens, self.streams, &self.tokenizer, 2);
        for (number, prompt) in prompts {
            let ids = conversation::encode_prompt(&self.tokenizer, &prompt.messages)?;
            // The same answers whichever prompts are left, so that a run that goes on asks what it would have asked.
            let number = *number as u64;
            let mut answers = sampling
                .answer(&self.gpt, &[&ids, &ids], 2 * number)
                .with_context(|| format!("failed to answer prompt {}", number + 1))?
                .into_iter()
                .map(|answer| answer.text);
            let (Some(a), Some(b)) = (answers.next(), answers.next()) else { continue };
            if a == b {
                continue;
            }
            let question = Question { number, prompt: prompt.messages.clone(), answers: [a, b] };
            if to.send(Ok(question)).is_err() {
                return Ok(());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use common::conversation::Role;
    use common::data::records::Verdict;

    use super::*;

    fn all(questions: &Questions) -> Vec<Question> {
        let next = || match questions.next(Duration::ZERO).expect("no error") {
            Next::One(question) => Some(question),
            Next::Soon | Next::None => None,
        };
        std::iter::from_fn(next).collect()
    }

    #[test]
    fn pairs_are_asked_once_and_the_better_one_stands_on_either_side() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("pairs.jsonl");
        let line = |i: usize| format!("{{\"prompt\":\"p{i}\",\"chosen\":\"good\",\"rejected\":\"bad\"}}\n");
        std::fs::write(&path, (0..40).map(line).collect::<String>()).expect("written");
        let questions = Questions::of_pairs(&path, &[], &Streams::new(0)).expect("pairs");
        let asked = all(&questions);
        let n_first = asked.iter().filter(|question| question.answers[0] == "good").count();
        assert!(questions.n == 40 && asked.len() == 40 && (8..=32).contains(&n_first), "{n_first} of {}", asked.len());

        let said = Label {
            prompt: vec![Message::new(Role::User, "p7")],
            answers: ["bad".to_owned(), "good".to_owned()],
            verdict: Verdict::Tie,
            annotator: None,
            seconds: None,
            models: None,
            repeat: false,
        };
        let left = all(&Questions::of_pairs(&path, &[said], &Streams::new(0)).expect("pairs"));
        let expected: Vec<Question> = asked.into_iter().filter(|question| question.number != 7).collect();
        assert_eq!(left, expected);
    }
}
