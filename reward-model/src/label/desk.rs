//! The state of a session of labelling: what is shown, what is decided, what can be taken back.

use std::fmt;
use std::time::{Duration, Instant};

use common::data::records::{Label, LabelFile, Verdict};

use common::rng::Streams;

use super::questions::{Next, Question, Questions};

/// How long to look for a question before the screen is drawn again.
const PATIENCE: Duration = Duration::from_millis(20);

/// A question is asked again after this many others at the earliest.
const APART: usize = 4;

/// Who decides how much.
pub(super) struct Session {
    /// The person's name.
    pub(super) annotator: String,
    /// Their decisions in earlier sessions.
    pub(super) n_before: usize,
    /// Decisions to make at most, without those of earlier sessions.
    pub(super) limit: Option<usize>,
    /// After so many decisions one of them is asked again; 0 never.
    pub(super) repeat_every: usize,
    /// Which one, and in which order its answers stand.
    pub(super) streams: Streams,
}

/// A question, and whether it was decided before.
type Asked = (Question, bool);

/// One annotator's session.
pub(super) struct Desk {
    file: LabelFile,
    questions: Questions,
    session: Session,
    shown: Option<(Asked, Instant)>,
    /// Taken back, or passed over by an undo: the last is asked next.
    again: Vec<Asked>,
    decided: Vec<(Asked, Verdict)>,
    n_skipped: usize,
    /// Questions that were asked a second time, by their numbers.
    repeated: Vec<u64>,
    /// Something to say about the last key.
    note: &'static str,
    is_over: bool,
    began: Instant,
}

impl Desk {
    /// A session that appends to `file`.
    pub(super) fn new(file: LabelFile, questions: Questions, session: Session) -> Self {
        Self {
            file,
            questions,
            session,
            shown: None,
            again: Vec::new(),
            decided: Vec::new(),
            n_skipped: 0,
            repeated: Vec::new(),
            note: "",
            is_over: false,
            began: Instant::now(),
        }
    }

    /// What is to be decided now, if it is there.
    pub(super) fn question(&self) -> Option<&Question> {
        self.shown.as_ref().map(|((question, _), _)| question)
    }

    /// Whether nothing is left to decide.
    pub(super) const fn is_over(&self) -> bool {
        self.is_over
    }

    /// Whether it is over because as much was decided as was asked for.
    pub(super) fn is_at_limit(&self) -> bool {
        self.is_over && self.session.limit.is_some_and(|limit| self.n_decided() >= limit)
    }

    /// Puts the next question on the desk where there is none; one that is being sampled may not be there yet.
    pub(super) fn refill(&mut self) -> anyhow::Result<()> {
        if self.shown.is_some() || self.is_over {
            return Ok(());
        }
        if let Some(asked) = self.again.pop() {
            self.show(asked);
            return Ok(());
        }
        if self.session.limit.is_some_and(|limit| self.n_decided() >= limit) {
            self.is_over = true;
            return Ok(());
        }
        if let Some(question) = self.to_repeat() {
            self.repeated.push(question.number);
            self.show((question, true));
            return Ok(());
        }
        match self.questions.next(PATIENCE)? {
            Next::One(question) => self.show((question, false)),
            Next::Soon => {}
            Next::None => self.is_over = true,
        }
        Ok(())
    }

    fn show(&mut self, asked: Asked) {
        self.shown = Some((asked, Instant::now()));
    }

    /// Decisions of this session about questions that are new.
    fn n_decided(&self) -> usize {
        self.decided.iter().filter(|((_, is_repeat), _)| !is_repeat).count()
    }

    /// The question to ask again now, its answers in an order drawn anew.
    fn to_repeat(&self) -> Option<Question> {
        let n = self.n_decided();
        let is_due = self.session.repeat_every > 0 && n / self.session.repeat_every > self.repeated.len();
        let candidates: Vec<&Question> = self
            .decided
            .iter()
            .filter(|((question, is_repeat), _)| !is_repeat && !self.repeated.contains(&question.number))
            .map(|((question, _), _)| question)
            .take(n.saturating_sub(APART))
            .collect();
        if !is_due || candidates.is_empty() {
            return None;
        }
        let mut rng = self.session.streams.get("label/repeat", n as u64);
        let mut question = candidates[rng.below(candidates.len())].clone();
        if rng.uniform() < 0.5 {
            question.answers.swap(0, 1);
        }
        Some(question)
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
        self.note = "";
        let Some(((question, repeat), _)) = &self.shown else { return Ok(()) };
        self.file.append(&Label {
            prompt: question.prompt.clone(),
            answers: question.answers.clone(),
            verdict,
            annotator: Some(self.session.annotator.clone()),
            seconds,
            models: None,
            repeat: *repeat,
        })?;
        self.decided.extend(self.shown.take().map(|(asked, _)| (asked, verdict)));
        Ok(())
    }

    /// How long the question has been shown, to a tenth of a second.
    pub(super) fn seconds(&self) -> Option<f64> {
        self.shown.as_ref().map(|(_, since)| (since.elapsed().as_secs_f64() * 10.0).round() / 10.0)
    }

    /// Leaves the question for another session.
    pub(super) fn skip(&mut self) {
        self.note = "";
        self.n_skipped += usize::from(self.shown.take().is_some_and(|((_, is_repeat), _)| !is_repeat));
    }

    /// Something to say about the last key; empty if there is nothing.
    pub(super) const fn note(&self) -> &'static str {
        self.note
    }

    /// Takes the last decision of this session back and asks it again.
    pub(super) fn undo(&mut self) -> anyhow::Result<()> {
        self.note = "";
        let Some((asked, _)) = self.decided.pop() else {
            self.note = "nothing of this session to take back";
            return Ok(());
        };
        self.file.undo()?;
        self.again.extend(self.shown.take().map(|(asked, _)| asked));
        self.show(asked);
        self.is_over = false;
        Ok(())
    }

    /// How far the person is.
    pub(super) fn progress(&self) -> Progress {
        let n_now = self.n_decided();
        let bounded = |n: usize| self.session.limit.map_or(n, |limit| limit.min(n));
        Progress {
            n_before: self.session.n_before,
            n_now,
            n_all: self.session.n_before + bounded(self.questions.n),
            n_skipped: self.n_skipped,
            n_left: bounded(self.questions.n.saturating_sub(self.n_skipped)).saturating_sub(n_now),
            time: self.began.elapsed(),
        }
    }

    /// What this session came to.
    pub(super) fn tally(&self) -> Tally {
        let n =
            |verdict| self.decided.iter().filter(|((_, is_repeat), decided)| !is_repeat && *decided == verdict).count();
        Tally {
            preferences: n(Verdict::First) + n(Verdict::Second),
            ties: n(Verdict::Tie),
            both_bad: n(Verdict::BothBad),
            skipped: self.n_skipped,
            repeated: self.decided.len() - self.n_decided(),
        }
    }
}

/// Decisions in earlier sessions and in this one, how many there are to make, and the time of this session.
pub(super) struct Progress {
    pub(super) n_before: usize,
    pub(super) n_now: usize,
    pub(super) n_all: usize,
    pub(super) n_skipped: usize,
    /// Those that this session can still come to.
    pub(super) n_left: usize,
    pub(super) time: Duration,
}

/// The decisions of a session by kind.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Tally {
    preferences: usize,
    ties: usize,
    both_bad: usize,
    skipped: usize,
    repeated: usize,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { preferences, ties, both_bad, skipped, repeated } = self;
        let n = preferences + ties + both_bad;
        write!(f, "{n} decisions (preferences: {preferences}, ties: {ties}, both bad: {both_bad}; skipped: {skipped}")?;
        if *repeated > 0 {
            write!(f, "; asked again: {repeated}")?;
        }
        write!(f, ")")
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
        desk_with(n, limit, 0)
    }

    fn desk_with(n: usize, limit: Option<usize>, repeat_every: usize) -> (Desk, TempDir) {
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
        let streams = Streams::new(0);
        let session = Session { annotator: "mia".to_owned(), n_before: 2, limit, repeat_every, streams };
        (Desk::new(file, questions, session), dir)
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
        assert_eq!(desk.tally(), Tally { preferences: 0, ties: 1, both_bad: 1, skipped: 1, repeated: 0 });
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
        let Progress { n_before, n_now, n_all, .. } = desk.progress();
        assert_eq!((n_before, n_now, n_all, desk.is_at_limit()), (2, 1, 3, true));
    }

    #[test]
    fn only_what_this_session_decided_can_be_taken_back() {
        let (mut desk, _dir) = desk(1, None);
        assert!(desk.wait().expect("a question") && desk.note().is_empty());
        desk.undo().expect("nothing to do");
        assert!(desk.note().contains("nothing") && prompt(&desk) == Some("p0"));
        desk.decide(Verdict::Tie, None).expect("written");
        assert_eq!(desk.note(), "");
    }

    #[test]
    fn one_in_so_many_questions_is_asked_again_and_counts_by_itself() {
        let (mut desk, dir) = desk_with(20, None, 5);
        let mut asked = Vec::new();
        while desk.wait().expect("a question") {
            asked.push(prompt(&desk).expect("shown").to_owned());
            desk.decide(Verdict::First, None).expect("written");
        }
        let said = read_labels(&dir.path().join("labels.jsonl"), OnBadRecord::Fail).expect("records");
        let repeats: Vec<usize> = (0..said.len()).filter(|&i| said[i].repeat).collect();
        assert_eq!(repeats, [5, 11, 17, 23]);
        for i in repeats {
            let first = asked.iter().position(|prompt| *prompt == asked[i]).expect("asked before");
            assert!(i - first > APART, "{asked:?}");
            assert_eq!(asked.iter().filter(|prompt| **prompt == asked[i]).count(), 2, "{asked:?}");
        }
        assert_eq!((desk.progress().n_now, desk.tally().repeated), (20, 4));
        // The answer on the left was preferred each time; who prefers a side differs where the sides were changed.
        let (mut desk, dir) = desk_with(40, None, 2);
        while desk.wait().expect("a question") {
            desk.decide(Verdict::First, None).expect("written");
        }
        let all = read_labels(&dir.path().join("labels.jsonl"), OnBadRecord::Fail).expect("records");
        let (again, first): (Vec<_>, Vec<_>) = all.iter().partition(|label| label.repeat);
        let is_turned = |label: &&&Label| {
            first.iter().any(|before| before.prompt == label.prompt && before.answers[0] != label.answers[0])
        };
        let n_turned = again.iter().filter(is_turned).count();
        assert!((1..again.len()).contains(&n_turned), "{n_turned} of {}", again.len());
        // A decision that was asked for again can be taken back like any other.
        let (mut desk, dir) = desk_with(20, None, 5);
        while desk.wait().expect("a question") {
            desk.decide(Verdict::First, None).expect("written");
        }
        desk.undo().expect("undone");
        assert!(desk.question().is_some());
        desk.decide(Verdict::Tie, None).expect("written");
        let said = read_labels(&dir.path().join("labels.jsonl"), OnBadRecord::Fail).expect("records");
        assert!(said.len() == 24 && said[23].repeat && said[23].verdict == Verdict::Tie);
    }
}
