//! The state of a session of labelling: what is shown, what is decided, what can be taken back.

use std::fmt;
use std::time::{Duration, Instant};

use common::data::records::{Label, LabelFile, Verdict};

use super::questions::{Next, Question, Questions};

/// How long to look for a question before the screen is drawn again.
const PATIENCE: Duration = Duration::from_millis(20);

/// One annotator's session.
pub(super) struct Desk {
    file: LabelFile,
    questions: Questions,
    annotator: String,
    /// Decisions to make at most.
    limit: Option<usize>,
    shown: Option<(Question, Instant)>,
    /// Taken back, or passed over by an undo: the last is asked next.
    again: Vec<Question>,
    decided: Vec<(Question, Verdict)>,
    n_skipped: usize,
    is_over: bool,
    began: Instant,
}

impl Desk {
    /// A session of `annotator` that appends to `file`.
    pub(super) fn new(file: LabelFile, questions: Questions, annotator: String, limit: Option<usize>) -> Self {
        Self {
            file,
            questions,
            annotator,
            limit,
            shown: None,
            again: Vec::new(),
            decided: Vec::new(),
            n_skipped: 0,
            is_over: false,
            began: Instant::now(),
        }
    }

    /// What is to be decided now, if it is there.
    pub(super) fn question(&self) -> Option<&Question> {
        self.shown.as_ref().map(|(question, _)| question)
    }

    /// Whether nothing is left to decide.
    pub(super) const fn is_over(&self) -> bool {
        self.is_over
    }

    /// Puts the next question on the desk where there is none; one that is being sampled may not be there yet.
    pub(super) fn refill(&mut self) -> anyhow::Result<()> {
        if self.shown.is_some() || self.is_over {
            return Ok(());
        }
        if self.limit.is_some_and(|limit| self.decided.len() >= limit) {
            self.is_over = true;
            return Ok(());
        }
        let next = match self.again.pop() {
            Some(question) => Next::One(question),
            None => self.questions.next(PATIENCE)?,
        };
        match next {
            Next::One(question) => self.shown = Some((question, Instant::now())),
            Next::Soon => {}
            Next::None => self.is_over = true,
        }
        Ok(())
    }

    /// Waits for a question; `false` if there is none left.
    pub(super) fn wait(&mut self) -> anyhow::Result<bool> {
        while self.shown.is_none() && !self.is_over {
            self.refill()?;
        }
        Ok(self.shown.is_some())
    }

    /// Decides what is shown, after `seconds` of thought.
    pub(super) fn decide(&mut self, verdict: Verdict, seconds: Option<f64>) -> anyhow::Result<()> {
        let Some((question, _)) = &self.shown else { return Ok(()) };
        self.file.append(&Label {
            prompt: question.prompt.clone(),
            answers: question.answers.clone(),
            verdict,
            annotator: Some(self.annotator.clone()),
            seconds,
            models: None,
        })?;
        self.decided.extend(self.shown.take().map(|(question, _)| (question, verdict)));
        Ok(())
    }

    /// How long the question has been shown, to a tenth of a second.
    pub(super) fn seconds(&self) -> Option<f64> {
        self.shown.as_ref().map(|(_, since)| (since.elapsed().as_secs_f64() * 10.0).round() / 10.0)
    }

    /// Leaves the question for another session.
    pub(super) fn skip(&mut self) {
        self.n_skipped += usize::from(self.shown.take().is_some());
    }

    /// Takes the last decision of this session back and asks it again.
    pub(super) fn undo(&mut self) -> anyhow::Result<()> {
        let Some((question, _)) = self.decided.pop() else { return Ok(()) };
        self.file.undo()?;
        self.again.extend(self.shown.take().map(|(question, _)| question));
        self.shown = Some((question, Instant::now()));
        self.is_over = false;
        Ok(())
    }

    /// Decisions of this session, how many there can be, and the time so far.
    pub(super) fn progress(&self) -> (usize, usize, Duration) {
        let n = self.questions.n.saturating_sub(self.n_skipped);
        (self.decided.len(), self.limit.map_or(n, |limit| limit.min(n)), self.began.elapsed())
    }

    /// What this session came to.
    pub(super) fn tally(&self) -> Tally {
        let n = |verdict| self.decided.iter().filter(|(_, decided)| *decided == verdict).count();
        Tally {
            preferences: n(Verdict::First) + n(Verdict::Second),
            ties: n(Verdict::Tie),
            both_bad: n(Verdict::BothBad),
            skipped: self.n_skipped,
        }
    }
}

/// The decisions of a session by kind.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Tally {
    preferences: usize,
    ties: usize,
    both_bad: usize,
    skipped: usize,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { preferences, ties, both_bad, skipped } = self;
        let n = preferences + ties + both_bad;
        write!(f, "{n} decisions (preferences: {preferences}, ties: {ties}, both bad: {both_bad}; skipped: {skipped})")
    }
}

#[cfg(test)]
pub(super) mod tests {
    use common::data::records::{OnBadRecord, read_labels};
    use tempfile::TempDir;

    use super::*;
    use crate::cli::LabelArgs;

    /// A desk with `n` questions, and the directory of its files.
    pub(in crate::label) fn desk(n: usize, limit: Option<usize>) -> (Desk, TempDir) {
        use clap::Parser;

        #[derive(Parser)]
        struct Command {
            #[command(flatten)]
            args: LabelArgs,
        }
        let dir = tempfile::tempdir().expect("a directory");
        let (pairs, out) = (dir.path().join("pairs.jsonl"), dir.path().join("labels.jsonl"));
        let line = |i: usize| format!("{{\"prompt\":\"p{i}\",\"chosen\":\"good\",\"rejected\":\"bad\"}}\n");
        std::fs::write(&pairs, (0..n).map(line).collect::<String>()).expect("written");
        let [pairs, out] = [pairs, out].map(|path| path.display().to_string());
        let args = Command::parse_from(["label", "--pairs", &pairs, "--out", &out]).args;
        let questions = Questions::open(&args, &[]).expect("pairs");
        let (file, _) = LabelFile::open(&args.out).expect("created");
        (Desk::new(file, questions, "mia".to_owned(), limit), dir)
    }

    fn prompt(desk: &Desk) -> Option<&str> {
        desk.question().map(|question| question.prompt[0].content.as_str())
    }

    #[test]
    fn decisions_follow_each_other_and_can_be_taken_back() {
        let (mut desk, dir) = desk(3, None);
        assert!(desk.wait().expect("a question") && prompt(&desk) == Some("p0"));
        desk.decide(Verdict::First, Some(1.5)).expect("written");
        assert!(desk.wait().expect("a question") && prompt(&desk) == Some("p1"));
        desk.undo().expect("undone");
        assert_eq!(prompt(&desk), Some("p0"));
        desk.decide(Verdict::Tie, None).expect("written");
        assert!(desk.wait().expect("a question") && prompt(&desk) == Some("p1"));
        desk.skip();
        assert!(desk.wait().expect("a question") && prompt(&desk) == Some("p2"));
        desk.decide(Verdict::BothBad, None).expect("written");
        assert!(!desk.wait().expect("the end") && desk.is_over());
        assert_eq!(desk.tally(), Tally { preferences: 0, ties: 1, both_bad: 1, skipped: 1 });
        let said = read_labels(&dir.path().join("labels.jsonl"), OnBadRecord::Fail).expect("records");
        assert_eq!(said.iter().map(|label| label.verdict).collect::<Vec<_>>(), [Verdict::Tie, Verdict::BothBad]);
        // The end can be taken back too.
        desk.undo().expect("undone");
        assert!(prompt(&desk) == Some("p2") && !desk.is_over());
    }

    #[test]
    fn a_limit_ends_the_session() {
        let (mut desk, _dir) = desk(3, Some(1));
        assert!(desk.wait().expect("a question"));
        desk.decide(Verdict::First, None).expect("written");
        assert!(!desk.wait().expect("the end"));
        assert_eq!((desk.progress().0, desk.progress().1), (1, 1));
    }
}
