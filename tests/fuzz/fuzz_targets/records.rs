//! Files of records and documents, in every format.
//!
//! An input is three bytes, which choose format and options, and the file.

#![no_main]

use std::fmt::Debug;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use fuzz::{check_error, file, mutate};
use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use serde_json::{Value, json};
use text::conversation::{Message, Role};
use text::data::records::{Answers, OnBadRecord, Pair, ReadOptions, RecordLimit, Separator, Summary};
use text::data::{DataError, ids, records};

/// How many bytes choose.
const N_CHOICES: usize = 3;

const ENDINGS: [&str; 8] = [".jsonl", ".json", ".txt", ".jsonl.gz", ".json.gz", ".txt.gz", ".parquet", ".ids.json"];
const SEPARATORS: [&str; 5] = ["blank-line", "line", "none", "<|endoftext|>", "\n\n"];
const LIMITS: [u64; 4] = [64 << 20, 100, 7, 1];

const WORDS: [&str; 28] = [
    "text",
    "messages",
    "role",
    "content",
    "user",
    "assistant",
    "system",
    "prompt",
    "completion",
    "response",
    "responses",
    "chosen",
    "rejected",
    "margin",
    "annotator",
    "seconds",
    "\n\nHuman: a",
    "\n\nAssistant: b",
    "\n\nAssistant:",
    "instruction",
    "output",
    "conversations",
    "label",
    "\u{feff}",
    " ",
    "\n",
    "[",
    "]",
];

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    if size <= N_CHOICES || seed % 8 == 0 {
        return libfuzzer_sys::fuzzer_mutate(data, size, max_size);
    }
    let file = &data[N_CHOICES..size];
    let is_record = |line: &&[u8]| serde_json::from_slice::<Value>(line).is_ok_and(|value| value.is_object());
    let lines: Vec<&[u8]> = file.split(|byte| *byte == b'\n').collect();
    let chosen = lines.iter().position(|line| is_record(&line)).map(|first| {
        let n = lines[first..].iter().take_while(|line| is_record(line)).count();
        first + seed as usize / 8 % n
    });
    let Some(chosen) = chosen else {
        return N_CHOICES + mutate(&mut data[N_CHOICES..], size - N_CHOICES, max_size - N_CHOICES, seed, &WORDS);
    };
    // One line is mutated as the record that it is.
    let start = lines[..chosen].iter().map(|line| line.len() + 1).sum::<usize>();
    let (before, line) = (file[..start].to_vec(), lines[chosen].to_vec());
    let after = file[start + line.len()..].to_vec();
    let room = max_size - N_CHOICES - before.len() - after.len();
    let mut changed = line.clone();
    changed.resize(room.max(line.len()), 0);
    let n = mutate(&mut changed, line.len(), room, seed, &WORDS);
    let file = [before, changed[..n].to_vec(), after].concat();
    data[N_CHOICES..N_CHOICES + file.len()].copy_from_slice(&file);
    N_CHOICES + file.len()
});

fuzz_target!(|data: &[u8]| {
    let Some((choices, content)) = data.split_first_chunk::<N_CHOICES>() else { return };
    let choice = |at: usize, n: usize| usize::from(choices[at]) % n;
    let ending = ENDINGS[choice(0, ENDINGS.len())];
    let options = ReadOptions {
        on_bad_record: if choices[1] % 2 == 0 { OnBadRecord::Fail } else { OnBadRecord::Skip },
        max_record_bytes: RecordLimit::new(LIMITS[choice(2, LIMITS.len())]).expect("not 0"),
        section: (choices[1] % 4 < 2).then_some("data"),
    };
    let separator = Separator::from(SEPARATORS[choice(1, 20) / 4].to_owned());
    let path = file(&format!("data{ending}"));
    // Half of the packed files are packed well.
    let packs = ending.ends_with(".gz") && choices[2] < 128;
    std::fs::write(&path, if packs { gzip(content) } else { content.to_vec() }).expect("written");
    if ending == ".ids.json" {
        match ids::read(&path, 100, 50) {
            Err(error) => check_error(&error),
            Ok(rows) => assert!(rows.iter().all(|row| (1..=50).contains(&row.len()) && row.iter().all(|id| *id < 100))),
        }
        return;
    }
    let limit = options.max_record_bytes.bytes() as usize;
    let texts = records::read_texts(&path, &separator, options);
    agree(&texts, records::check_texts(&path, &separator, options));
    if let Ok(texts) = &texts {
        assert!(texts.iter().all(|text| !text.trim().is_empty() && text.len() <= limit), "an empty text or a long one");
    }
    if packs {
        // Packed and not, a file is the same.
        let plain = write(ending.trim_end_matches(".gz"), content);
        let plain = records::read_texts(&plain, &separator, options);
        assert_eq!(plain.ok(), texts.as_ref().ok().cloned(), "packed and not");
    }
    if ending.contains(".json") {
        check_json(&path, options, content);
    }
});

fn check_json(path: &Path, options: ReadOptions, content: &[u8]) {
    let conversations = records::read_conversations(path, options);
    agree(&conversations, records::check_conversations(path, options));
    let pairs = records::read_pairs(path, options);
    if let Err(error) = &pairs {
        check_error(error);
    }
    let prompts = records::read_prompts(path, options);
    agree(&prompts, records::check_prompts(path, options));
    let answers = records::read_answers(path, options);

    for conversation in conversations.iter().flatten() {
        assert!(conversation.messages.iter().any(|message| message.role == Role::Assistant));
        check_messages(&conversation.messages);
        let again = write(".jsonl", &line(json!({ "messages": conversation.messages })));
        let again = records::read_conversations(&again, OnBadRecord::Fail).expect("what was read");
        assert_eq!(again, [conversation.clone()]);
    }
    for pair in pairs.iter().flatten() {
        check_pair(pair);
    }
    for prompt in prompts.iter().flatten() {
        check_messages(&prompt.messages);
        assert_eq!(
            prompt.messages.last().map(|message| (message.role, &message.content)),
            Some((Role::User, &prompt.text))
        );
    }
    match &answers {
        Err(error) => check_error(error),
        Ok(answers) => {
            for record in answers {
                match &record.answers {
                    Answers::One { prompt, .. } => check_messages(prompt),
                    Answers::Two(pair) => check_pair(pair),
                }
                // What `score` writes is the record with a number: it is read again.
                let again = write(".jsonl", &line(Value::Object(record.fields.clone())));
                let again = records::read_answers(&again, OnBadRecord::Fail).expect("what was read");
                assert_eq!(again, [record.clone()]);
            }
        }
    }
    // The lines of a file as one array are the same records.
    let is_lines = path.to_string_lossy().ends_with(".jsonl");
    let lines: Option<Vec<Value>> = std::str::from_utf8(content).ok().filter(|_| is_lines).and_then(|text| {
        text.lines().filter(|line| !line.trim().is_empty()).map(|line| serde_json::from_str(line).ok()).collect()
    });
    if let (Some(lines), Ok(prompts)) = (lines, prompts)
        && options.max_record_bytes == RecordLimit::default()
    {
        let array = write(".json", Value::Array(lines).to_string().as_bytes());
        assert_eq!(records::read_prompts(&array, options).expect("the same records"), prompts);
    }
}

fn check_messages(messages: &[Message]) {
    assert!(!messages.is_empty());
    let is_empty = |message: &Message| message.content.trim().is_empty() && message.role != Role::System;
    assert!(!messages.iter().any(is_empty), "an empty message");
    assert!(messages.iter().skip(1).all(|message| message.role != Role::System), "a late system message");
}

fn check_pair(pair: &Pair) {
    check_messages(&pair.prompt);
    assert_ne!(pair.prompt.last().map(|message| message.role), Some(Role::Assistant));
    assert_ne!(pair.chosen, pair.rejected);
    assert!(pair.margin.is_none_or(f32::is_finite) && pair.seconds.is_none_or(f64::is_finite));
}

/// Reading and checking find the same.
fn agree<T: Debug>(read: &Result<Vec<T>, DataError>, checked: Result<Summary, DataError>) {
    match (read, checked) {
        (Ok(items), Ok(summary)) => assert_eq!(items.len(), summary.n_records),
        (Err(read), Err(checked)) => {
            check_error(read);
            assert_eq!(read.to_string(), checked.to_string());
        }
        (read, checked) => panic!("read gives {read:?}, check {checked:?}"),
    }
}

fn line(value: Value) -> Vec<u8> {
    format!("{value}\n").into_bytes()
}

fn write(ending: &str, content: &[u8]) -> PathBuf {
    let path = file(&format!("again{ending}"));
    std::fs::write(&path, content).expect("written");
    path
}

fn gzip(content: &[u8]) -> Vec<u8> {
    let mut packed = GzEncoder::new(Vec::new(), Compression::fast());
    packed.write_all(content).expect("in memory");
    packed.finish().expect("in memory")
}
