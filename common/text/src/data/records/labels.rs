//! What people say of two answers, as they say it: read with everything that reward models learn nothing from, and
//! written one decision at a time.

use std::fs::{File, Metadata, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use base::files::FileError;
use serde::de::IgnoredAny;
use serde_json::{Map, Value, json};

use super::json::{self, Record};
use super::pairs::{check_prompt, origin_of, said_in};
use super::{OnBadRecord, ReadOptions, kind, prompt_of};
use crate::conversation::{Message, Role};
use crate::data::DataError;

/// The ending of files of decisions.
pub const ENDING: &str = "jsonl";

/// The key of two answers of which neither is preferred.
pub(super) const TIED: &str = "tied";

/// The key that says so of answers of which neither is good.
const BOTH_BAD: &str = "both_bad";

/// The key of a decision that somebody was asked for a second time.
const REPEAT: &str = "repeat";

/// A prompt and two answers of which neither is better.
type Tied = (Vec<Message>, [String; 2]);

/// A decision about two answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The first is better.
    First,
    /// The second is better.
    Second,
    /// They are equally good.
    Tie,
    /// They are equally bad.
    BothBad,
}

/// Two answers to a prompt, and what was decided about them.
#[derive(Debug, Clone, PartialEq)]
pub struct Label {
    /// The turns up to the answer.
    pub prompt: Vec<Message>,
    /// The answers, in the order in which they were shown.
    pub answers: [String; 2],
    /// The decision.
    pub verdict: Verdict,
    /// Who decided.
    pub annotator: Option<String>,
    /// How long it took.
    pub seconds: Option<f64>,
    /// Which models the answers come from, in their order.
    pub models: Option<[String; 2]>,
    /// Whether the same person had decided it before, and was asked again to see whether they decide alike.
    pub repeat: bool,
}

impl Label {
    /// The record of this decision: a preference pair, or `{"prompt", "tied"}`, which no program takes for one.
    pub fn to_record(&self) -> Map<String, Value> {
        let [first, second] = &self.answers;
        let prompt = match self.prompt.as_slice() {
            [Message { role: Role::User, content }] => json!(content),
            messages => json!(messages),
        };
        let mut record = Map::from_iter([("prompt".to_owned(), prompt)]);
        let mut put = |key: &str, value: Value| drop(record.insert(key.to_owned(), value));
        let models = self.models.as_ref();
        match self.verdict {
            Verdict::First | Verdict::Second => {
                let is_first = self.verdict == Verdict::First;
                let (chosen, rejected) = if is_first { (first, second) } else { (second, first) };
                put("chosen", json!(chosen));
                put("rejected", json!(rejected));
                put("shown_first", json!(if is_first { "chosen" } else { "rejected" }));
                if let Some([a, b]) = models {
                    let (chosen, rejected) = if is_first { (a, b) } else { (b, a) };
                    put("models", json!({ "chosen": chosen, "rejected": rejected }));
                }
            }
            Verdict::Tie | Verdict::BothBad => {
                put(TIED, json!([first, second]));
                if self.verdict == Verdict::BothBad {
                    put(BOTH_BAD, json!(true));
                }
                if let Some(models) = models {
                    put("models", json!(models));
                }
            }
        }
        if self.repeat {
            put(REPEAT, json!(true));
        }
        if let Some(annotator) = &self.annotator {
            put("annotator", json!(annotator));
        }
        if let Some(seconds) = self.seconds {
            put("seconds", json!(seconds));
        }
        record
    }

    /// What was asked: the same for the same prompt and the same two answers, in whatever order they were shown.
    pub fn question(prompt: &[Message], answers: &[String; 2]) -> String {
        let [a, b] = answers;
        let (a, b) = if a <= b { (a, b) } else { (b, a) };
        json!([prompt, a, b]).to_string()
    }
}

/// Reads decisions: pairs in every form of [`read_pairs`](super::read_pairs), whose better answer comes first, and
/// `{"prompt", "tied"}`.
///
/// # Errors
/// As [`read_texts`](super::read_texts).
pub fn read_labels(path: &Path, options: impl Into<ReadOptions>) -> Result<Vec<Label>, DataError> {
    Ok(json::read(path, options.into(), labels_of)?.into_iter().flatten().collect())
}

/// What a file says to which decisions are appended.
#[derive(Debug)]
pub struct Appended {
    /// The decisions of its whole records.
    pub labels: Vec<Label>,
    /// Where they end, in bytes.
    pub end: u64,
    /// Whether the beginning of another record follows, which a program leaves that is killed while it writes.
    pub is_torn: bool,
}

/// Reads decisions as [`read_labels`], from a file that a program may have been writing when it was killed.
///
/// # Errors
/// If the file cannot be read, or anything but its last line is malformed, or that line is not the beginning of a record.
pub fn read_appended(path: &Path) -> Result<Appended, DataError> {
    let text = std::fs::read(path).map_err(FileError::read(path))?;
    if text.trim_ascii().is_empty() {
        return Ok(Appended { labels: Vec::new(), end: text.len() as u64, is_torn: false });
    }
    match read_labels(path, OnBadRecord::Fail) {
        Ok(labels) => Ok(Appended { labels, end: text.len() as u64, is_torn: false }),
        Err(error) => {
            let (whole, last) = text.split_at(text.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1));
            match records_of(whole).filter(|_| is_beginning(last)) {
                Some(labels) => Ok(Appended { labels, end: whole.len() as u64, is_torn: true }),
                None => Err(error),
            }
        }
    }
}

/// Whether a record begins in `line` and does not end in it.
fn is_beginning(line: &[u8]) -> bool {
    line.starts_with(b"{") && serde_json::from_slice::<IgnoredAny>(line).is_err_and(|error| error.is_eof())
}

/// The decisions in whole lines; `None` if one of them is malformed.
fn records_of(lines: &[u8]) -> Option<Vec<Label>> {
    let records = lines.split(|byte| *byte == b'\n').filter_map(json::object);
    let labels = records.map(|record| record.and_then(|record| labels_of(&record)));
    Some(labels.collect::<Result<Vec<_>, _>>().ok()?.concat())
}

fn last_byte(file: &mut File) -> std::io::Result<u8> {
    let mut byte = [0];
    file.seek(SeekFrom::End(-1))?;
    file.read_exact(&mut byte)?;
    Ok(byte[0])
}

fn labels_of(record: &Record) -> Result<Vec<Label>, String> {
    let repeat = is_repeat(record);
    if let Some((prompt, answers)) = tied_of(record)? {
        let both_bad = record.get(BOTH_BAD).and_then(Value::as_bool) == Some(true);
        let origin = origin_of(record);
        return Ok(vec![Label {
            prompt,
            answers,
            verdict: if both_bad { Verdict::BothBad } else { Verdict::Tie },
            annotator: origin.annotator,
            seconds: origin.seconds,
            models: None,
            repeat,
        }]);
    }
    let label = |pair: super::Pair| Label {
        prompt: pair.prompt,
        answers: [pair.chosen, pair.rejected],
        verdict: Verdict::First,
        annotator: pair.annotator,
        seconds: pair.seconds,
        models: None,
        repeat,
    };
    Ok(said_in(record)?.into_iter().map(label).collect())
}

/// Whether a record is of a question that was asked before.
pub(super) fn is_repeat(record: &Record) -> bool {
    record.get(REPEAT).and_then(Value::as_bool) == Some(true)
}

/// Prompt and answers of a record that says that neither answer is better; `None` for any other record.
pub(super) fn tied_of(record: &Record) -> Result<Option<Tied>, String> {
    let tied = match record.get(TIED) {
        None => return Ok(None),
        Some(_) if record.contains_key("chosen") || record.contains_key("rejected") => {
            return Err(format!("it has both `{TIED}` and `chosen` or `rejected`, expected one of them"));
        }
        Some(Value::Array(tied)) => tied,
        Some(other) => return Err(format!("`{TIED}` is {}, expected a list of two strings", kind(other))),
    };
    let [Value::String(a), Value::String(b)] = tied.as_slice() else {
        return Err(format!("`{TIED}` is not a list of two strings"));
    };
    let prompt = prompt_of(record)?;
    check_prompt(&prompt)?;
    Ok(Some((prompt, [a.clone(), b.clone()])))
}

/// A file of decisions that grows by whole records: one that was appended is on the disk.
#[derive(Debug)]
pub struct LabelFile {
    path: PathBuf,
    file: File,
    id: FileId,
    /// Where each record of this session begins.
    starts: Vec<u64>,
    end: u64,
}

/// What tells a file from others, whatever their names.
#[cfg(unix)]
type FileId = (u64, u64);

#[cfg(unix)]
fn file_id(metadata: &Metadata) -> FileId {
    use std::os::unix::fs::MetadataExt as _;
    (metadata.dev(), metadata.ino())
}

/// Elsewhere there may be nothing but the name: whether a file has it.
#[cfg(not(unix))]
type FileId = bool;

#[cfg(not(unix))]
fn file_id(metadata: &Metadata) -> FileId {
    metadata.is_file()
}

impl LabelFile {
    /// Opens the file at `path` to append to it, or creates it; what it says already is returned too.
    ///
    /// A last record that is cut off, as a program leaves it that is killed while it writes, goes; one that lacks its line break
    /// alone gets it. A file that holds anything else is left as it is.
    ///
    /// # Errors
    /// If the name does not end in `.jsonl`, the file cannot be read or written or is none, another program has it open to
    /// write, or a record is malformed.
    pub fn open(path: &Path) -> Result<(Self, Vec<Label>), DataError> {
        if path.extension().is_none_or(|ending| ending != ENDING) {
            return Err(DataError::LabelsName(path.to_owned()));
        }
        // A device may have no end.
        if path.metadata().is_ok_and(|is| !is.is_file()) {
            return Err(DataError::NotAFile(path.to_owned()));
        }
        let write = |source| DataError::from(FileError::write(path)(source));
        let mut file = OpenOptions::new().read(true).append(true).create(true).open(path).map_err(write)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(DataError::LabelsInUse(path.to_owned())),
            Err(TryLockError::Error(source)) => return Err(write(source)),
        }
        let Appended { labels, mut end, is_torn } = read_appended(path)?;
        if is_torn {
            tracing::warn!("`{}` ends in the middle of a record, which is cut off", path.display());
            file.set_len(end).and_then(|()| file.sync_all()).map_err(write)?;
        } else if !labels.is_empty() && last_byte(&mut file).map_err(FileError::read(path))? != b'\n' {
            file.write_all(b"\n").and_then(|()| file.sync_all()).map_err(write)?;
            end += 1;
        }
        let id = file_id(&path.metadata().map_err(FileError::read(path))?);
        Ok((Self { path: path.to_owned(), file, id, starts: Vec::new(), end }, labels))
    }

    /// Appends a decision and waits until it is on the disk.
    ///
    /// # Errors
    /// If it cannot be written, or the file was removed or replaced; it is then as before.
    pub fn append(&mut self, label: &Label) -> Result<(), DataError> {
        self.is_in_place()?;
        let line = format!("{}\n", Value::Object(label.to_record()));
        let written = self.file.write_all(line.as_bytes()).and_then(|()| self.file.sync_data());
        if let Err(source) = written {
            // Only the first failure matters.
            let _ = self.file.set_len(self.end);
            return Err(FileError::write(&self.path)(source).into());
        }
        self.starts.push(self.end);
        self.end += line.len() as u64;
        Ok(())
    }

    /// Refuses a file that has lost its name, or whose name is another's: nobody would find what is written to it.
    fn is_in_place(&self) -> Result<(), DataError> {
        let is_there = self.path.metadata().is_ok_and(|metadata| file_id(&metadata) == self.id);
        let gone = "the file was removed or replaced; put it back, or start this program again to have a new one";
        is_there.then_some(()).ok_or_else(|| FileError::write(&self.path)(std::io::Error::other(gone)).into())
    }

    /// Takes the last decision of this session back; `false` if there is none.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn undo(&mut self) -> Result<bool, DataError> {
        self.is_in_place()?;
        let Some(start) = self.starts.pop() else { return Ok(false) };
        let cut = self.file.set_len(start).and_then(|()| self.file.seek(SeekFrom::End(0)));
        cut.and_then(|_| self.file.sync_all()).map_err(FileError::write(&self.path))?;
        self.end = start;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::records::read_pairs;

    fn label(verdict: Verdict) -> Label {
        Label {
            prompt: vec![Message::new(Role::User, "q")],
            answers: ["a".to_owned(), "b".to_owned()],
            verdict,
            annotator: Some("mia".to_owned()),
            seconds: Some(2.5),
            models: Some(["sft".to_owned(), "ppo".to_owned()]),
            repeat: false,
        }
    }

    #[test]
    fn what_is_no_file_of_decisions_is_refused_and_left_as_it_is() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = |name: &str| dir.path().join(name);
        for name in ["/dev/full", "y.jsonl.gz", "y.txt", "y"] {
            let opened = LabelFile::open(&path(name)).map(drop);
            assert!(matches!(opened, Err(DataError::LabelsName(_))), "{name}: {opened:?}");
            assert!(name.starts_with('/') || !path(name).exists(), "{name}");
        }
        std::fs::create_dir(path("folder.jsonl")).expect("made");
        let opened = LabelFile::open(&path("folder.jsonl")).map(drop);
        assert!(matches!(opened, Err(DataError::NotAFile(_))), "{opened:?}");
        let record = r#"{"prompt":"q","chosen":"a","rejected":"b"}"#;
        for (i, text) in [
            "Some prose without an end".to_owned(),
            "Some prose\nof two lines".to_owned(),
            format!("[{record}, {record}]"),
            format!("[\n  {record},\n  {record}\n]"),
            format!("{record}\nprose"),
            format!("{record}\n[{record}"),
            "prose\n{\"prompt\":".to_owned(),
            "{\n  \"version\": \"1.0\"".to_owned(),
        ]
        .iter()
        .enumerate()
        {
            let path = path(&format!("{i}.jsonl"));
            std::fs::write(&path, text).expect("written");
            assert!(LabelFile::open(&path).is_err(), "{text}");
            assert_eq!(std::fs::read_to_string(&path).expect("there"), *text);
        }
    }

    #[test]
    fn nothing_is_written_to_a_file_that_was_removed() {
        let dir = tempfile::tempdir().expect("a directory");
        let [path, away] = ["labels.jsonl", "away.jsonl"].map(|name| dir.path().join(name));
        let (mut file, _) = LabelFile::open(&path).expect("created");
        file.append(&label(Verdict::Tie)).expect("written");
        std::fs::rename(&path, &away).expect("moved");
        assert!(file.append(&label(Verdict::Tie)).is_err() && file.undo().is_err());
        std::fs::write(&path, "another").expect("written");
        assert!(cfg!(not(unix)) || file.append(&label(Verdict::Tie)).is_err());
        std::fs::rename(&away, &path).expect("moved back");
        file.append(&label(Verdict::First)).expect("written");
        assert_eq!(read_labels(&path, OnBadRecord::Fail).expect("whole records").len(), 2);
    }

    #[test]
    fn a_last_record_without_a_line_break_is_whole() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("labels.jsonl");
        let record = r#"{"prompt":"q","chosen":"a","rejected":"b"}"#;
        std::fs::write(&path, format!("{record}\n{record}")).expect("written");
        let (mut file, said) = LabelFile::open(&path).expect("whole");
        assert_eq!(said.len(), 2);
        file.append(&label(Verdict::Tie)).expect("written");
        assert_eq!(read_labels(&path, OnBadRecord::Fail).expect("whole records").len(), 3);
        assert!(file.undo().expect("undone"));
        assert_eq!(std::fs::read_to_string(&path).expect("there"), format!("{record}\n{record}\n"));
    }

    #[test]
    fn records_say_what_was_decided_and_by_whom() {
        let of = |verdict| Value::Object(label(verdict).to_record()).to_string();
        assert_eq!(
            of(Verdict::Second),
            r#"{"prompt":"q","chosen":"b","rejected":"a","shown_first":"rejected","models":{"chosen":"ppo","rejected":"sft"},"annotator":"mia","seconds":2.5}"#
        );
        assert_eq!(
            of(Verdict::BothBad),
            r#"{"prompt":"q","tied":["a","b"],"both_bad":true,"models":["sft","ppo"],"annotator":"mia","seconds":2.5}"#
        );
        let mut turns = label(Verdict::First);
        turns.prompt.insert(0, Message::new(Role::System, "s"));
        assert_eq!(turns.to_record()["prompt"][0]["role"], "system");
    }

    #[test]
    fn decisions_are_kept_and_taken_back_and_reward_models_learn_from_the_decided() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("labels.jsonl");
        let (mut file, said) = LabelFile::open(&path).expect("created");
        assert!(said.is_empty() && !file.undo().expect("nothing to undo"));
        for verdict in [Verdict::First, Verdict::Tie, Verdict::Second, Verdict::BothBad] {
            file.append(&label(verdict)).expect("written");
        }
        assert!(file.undo().expect("undone"));
        let error = LabelFile::open(&path).expect_err("in use").to_string();
        assert!(error.contains("another program"), "{error}");
        drop(file);

        let (mut file, said) = LabelFile::open(&path).expect("there");
        let verdicts: Vec<Verdict> = said.iter().map(|label| label.verdict).collect();
        // A record has the chosen answer first.
        assert_eq!(verdicts, [Verdict::First, Verdict::Tie, Verdict::First]);
        assert_eq!((said[2].answers[0].as_str(), said[2].annotator.as_deref()), ("b", Some("mia")));
        assert!(!file.undo().expect("of another session"));
        // What somebody is asked again measures the person, and is not learned from twice.
        file.append(&Label { repeat: true, ..label(Verdict::Second) }).expect("written");
        let said = read_labels(&path, OnBadRecord::Fail).expect("records");
        assert_eq!(said.iter().map(|label| label.repeat).collect::<Vec<_>>(), [false, false, false, true]);
        let pairs = read_pairs(&path, OnBadRecord::Fail).expect("a tie is no fault");
        assert_eq!(pairs.iter().map(|pair| pair.chosen.as_str()).collect::<Vec<_>>(), ["a", "b"]);
    }

    #[test]
    fn a_record_that_was_cut_by_a_kill_is_written_anew() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("labels.jsonl");
        std::fs::write(&path, "{\"prompt\":\"q\",\"chosen\":\"a\",\"rejected\":\"b\"}\n{\"prompt\":\"r\",\"cho")
            .expect("written");
        let (mut file, said) = LabelFile::open(&path).expect("mended");
        assert_eq!(said.len(), 1);
        file.append(&label(Verdict::Tie)).expect("written");
        assert_eq!(read_labels(&path, OnBadRecord::Fail).expect("whole records").len(), 2);
    }

    #[test]
    fn a_question_is_the_same_in_either_order() {
        let prompt = [Message::new(Role::User, "q")];
        let key = |a: &str, b: &str| Label::question(&prompt, &[a.to_owned(), b.to_owned()]);
        assert_eq!(key("a", "b"), key("b", "a"));
        assert_ne!(key("a", "b"), key("a", "c"));
    }

    #[test]
    fn ties_are_two_answers_and_nothing_else() {
        for (record, reason) in [
            (r#"{"prompt": "q", "tied": "a"}"#, "is a string, expected a list of two strings"),
            (r#"{"prompt": "q", "tied": ["a"]}"#, "is not a list of two strings"),
            (r#"{"prompt": "q", "tied": ["a", "b"], "chosen": "a"}"#, "both `tied` and `chosen`"),
            (r#"{"tied": ["a", "b"]}"#, "`prompt` is missing"),
        ] {
            let record: Record = serde_json::from_str(record).expect("JSON");
            let error = labels_of(&record).expect_err(reason);
            assert!(error.contains(reason), "{error}");
        }
    }
}
