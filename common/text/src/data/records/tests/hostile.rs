//! Files that nobody should have written: an error that names the file, and neither a panic nor a full memory.

use proptest::prelude::*;

use super::*;

/// A reader of JSON records that keeps nothing of them.
type Reader = fn(&Path, ReadOptions) -> Result<(), DataError>;

const READERS: [(&str, Reader); 5] = [
    ("texts", |path, options| read_texts(path, &Separator::BlankLine, options).map(drop)),
    ("conversations", |path, options| read_conversations(path, options).map(drop)),
    ("pairs", |path, options| {
        let pairs = read_pairs(path, options)?;
        assert!(pairs.iter().all(|pair| pair.margin.is_none_or(f32::is_finite)), "{pairs:?}");
        Ok(())
    }),
    ("prompts", |path, options| read_prompts(path, options).map(drop)),
    ("answers", |path, options| read_answers(path, options).map(drop)),
];

fn limited(bytes: u64) -> ReadOptions {
    ReadOptions { max_record_bytes: RecordLimit::new(bytes).unwrap(), section: Some("data"), ..FAIL.into() }
}

#[test]
fn a_record_above_the_limit_is_refused_and_can_be_skipped() {
    let scratch = Scratch::new();
    let (long, short) = (format!("{{\"text\":\"{}\"}}", "x".repeat(300)), "{\"text\":\"y\"}");
    let words = format!("y\n\n{}\n\nz", "word\n".repeat(60));
    let texts: Vec<String> = ["y".to_owned(), "x".repeat(300)].into();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let parquet = parquet_file(&scratch, "message m { required binary text (UTF8); }", &texts, None);
    for (path, separator, place, left) in [
        (scratch.file("a.jsonl", format!("{short}\n{long}\n{short}\n")), "line", "line 2", 2),
        (scratch.file("b.jsonl", format!("{short}\n{long}")), "line", "line 2", 1),
        (scratch.file("a.jsonl.gz", gz(&format!("{short}\n{long}\n{short}\n"))), "line", "line 2", 2),
        (scratch.file("a.json", format!("[{short},\n{long},{short}]")), "line", "line 2", 2),
        (scratch.file("line.txt", format!("y\n{long}\nz")), "line", "line 2", 2),
        (scratch.file("blank.txt", &words), "blank-line", "line 3", 2),
        (scratch.file("end.txt", format!("y<|end|>\n{long}<|end|>z")), "<|end|>", "line 1", 2),
        (parquet, "line", "row 2", 1),
    ] {
        let separator = Separator::from(separator.to_owned());
        let read = |options| read_texts(&path, &separator, options);
        let error = read(limited(100)).unwrap_err().to_string();
        let expected =
            format!("{place}: it is longer than the limit of 100 bytes\nhint: raise `data.max_record_bytes`");
        assert!(error.contains(&expected), "{}: {error}", path.display());
        let skipped = read(ReadOptions { on_bad_record: SKIP, ..limited(100) });
        assert_eq!(skipped.unwrap().len(), left, "{}", path.display());
        assert!(read(limited(1000)).unwrap().len() > left, "{}", path.display());
    }
}

#[test]
fn a_line_that_is_longer_than_memory_is_refused_at_the_limit() {
    let scratch = Scratch::new();
    let path = scratch.0.path().join("a.jsonl.gz");
    let mut encoder = GzEncoder::new(fs::File::create(&path).unwrap(), Compression::best());
    encoder.write_all(b"{\"prompt\": \"").unwrap();
    let block = vec![b'a'; 1 << 20];
    (0..100).for_each(|_| encoder.write_all(&block).unwrap());
    encoder.finish().unwrap();
    let error = read_prompts(&path, FAIL).unwrap_err().to_string();
    assert!(error.contains("line 1: it is longer than the limit of 67108864 bytes\nhint: split the record"), "{error}");
}

#[test]
fn a_small_file_of_too_many_records_is_refused() {
    let scratch = Scratch::new();
    let path = scratch.0.path().join("a.jsonl.gz");
    let mut encoder = GzEncoder::new(fs::File::create(&path).unwrap(), Compression::best());
    let block = b"{\"prompt\":\"a\"}\n".repeat(1000);
    (0..100).for_each(|_| encoder.write_all(&block).unwrap());
    encoder.finish().unwrap();
    let error = read_prompts(&path, limited(1000)).unwrap_err().to_string();
    assert!(error.contains("unpacks to more than 200 times its size"), "{error}");
    assert_eq!(read_prompts(&path, limited(2_000_000)).unwrap().len(), 100_000, "the limit can be raised");

    let texts = vec!["a long text that a dictionary holds once"; 3000];
    let table = parquet_file(&scratch, "message m { required binary text (UTF8); }", &texts, None);
    let error = read_texts(&table, &Separator::None, limited(1000)).unwrap_err().to_string();
    assert!(error.contains("unpacks to more than 200 times its size"), "{error}");
}

#[test]
fn nesting_and_numbers_beyond_all_bounds_are_bad_records() {
    let deep = "[".repeat(1 << 20);
    for line in [
        deep.clone(),
        format!("{{\"messages\":{deep}"),
        format!("{{\"prompt\":\"p\",\"x\":{}{}}}", "{\"a\":".repeat(10_000), "1".to_owned() + &"}".repeat(10_000)),
        "{\"prompt\":\"p\",\"margin\":1e999}".to_owned(),
        format!("{{\"prompt\":\"p\",\"margin\":{}}}", "9".repeat(100_000)),
        "{\"prompt\":\"\\ud800\"}".to_owned(),
        "{\"prompt\":\"\0\"}".to_owned(),
        "nul\0".to_owned(),
    ] {
        for (name, read) in READERS {
            let reason = reason(&line, |path, on_bad| read(path, on_bad.into()));
            assert!(reason.starts_with("it is not JSON: "), "{name}: {reason}");
        }
    }
}

#[test]
fn a_transcript_of_marks_alone_takes_no_longer_than_it_is() {
    // With one search of the whole rest for every turn this would read 10^11 bytes.
    let turns = "\n\nAssistant: a".repeat(100_000) + "\n\nHuman: q\n\nAssistant: ";
    let line = serde_json::json!({ "chosen": format!("{turns}b"), "rejected": format!("{turns}c") });
    let scratch = Scratch::new();
    let start = std::time::Instant::now();
    let read = read_pairs(&scratch.file("a.jsonl", line.to_string()), FAIL);
    assert!(start.elapsed().as_secs() < 10, "{:?}", start.elapsed());
    assert_eq!(read.unwrap()[0].prompt.len(), 100_001);
}

#[test]
fn folders_are_no_files() {
    let scratch = Scratch::new();
    let dir = scratch.0.path().join("a.jsonl");
    fs::create_dir(&dir).unwrap();
    let error = read_prompts(&dir, FAIL).unwrap_err().to_string();
    assert!(error.contains("a.jsonl` is not a file\nhint: name a file in it"), "{error}");
    let error = read_prompts(scratch.0.path(), FAIL).unwrap_err().to_string();
    assert!(error.contains("` is not a file\nhint: name a file in it"), "{error}");
}

/// The keys that any reader knows.
const KEYS: [&str; 15] = [
    "text",
    "messages",
    "prompt",
    "completion",
    "response",
    "chosen",
    "rejected",
    "margin",
    "responses",
    "annotator",
    "seconds",
    "role",
    "content",
    "conversations",
    "other",
];

fn json() -> impl Strategy<Value = Value> {
    let text = prop_oneof![
        Just(String::new()),
        Just("user".to_owned()),
        Just("assistant".to_owned()),
        Just("system".to_owned()),
        Just("\n\nHuman: a\n\nAssistant: b".to_owned()),
        any::<String>(),
    ];
    let number = prop_oneof![
        any::<f64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        Just(Value::from(u64::MAX)),
        Just(Value::from(1e39)),
        Just(Value::from(-1e308)),
        Just(Value::from(5e-324)),
    ];
    let leaf = prop_oneof![Just(Value::Null), any::<bool>().prop_map(Value::from), number, text.prop_map(Value::from)];
    leaf.prop_recursive(4, 24, 4, |inner| {
        let entry = (prop::sample::select(&KEYS[..]), inner.clone());
        prop_oneof![
            prop::collection::vec(inner, 0..4).prop_map(Value::from),
            prop::collection::vec(entry, 0..5).prop_map(object),
        ]
    })
}

fn object(entries: Vec<(&str, Value)>) -> Value {
    Value::Object(entries.into_iter().map(|(key, value)| (key.to_owned(), value)).collect())
}

/// A record that a reader accepts, or one that is wrong in few places only.
fn record() -> impl Strategy<Value = Value> {
    let message = (prop::sample::select(&["system", "user", "assistant", "tool"][..]), "[ a-c]{0,3}")
        .prop_map(|(role, content)| serde_json::json!({ "role": role, "content": content }));
    let messages = prop::collection::vec(message, 0..4).prop_map(Value::from);
    let value = prop_oneof![3 => messages, 3 => "[a-c]{0,2}".prop_map(Value::from), 2 => json()];
    let responses = prop::collection::vec("[a-c]{0,2}", 0..5).prop_map(Value::from);
    let entry = prop_oneof![
        6 => (prop::sample::select(&KEYS[..]), value),
        1 => (Just("responses"), responses),
    ];
    prop::collection::vec(entry, 0..6).prop_map(object)
}

/// Asserts that `result` is fine, or an error that names the file, and the line if `line` is given.
fn check(result: Result<(), DataError>, line: Option<usize>) -> Result<(), TestCaseError> {
    let Err(error) = result else { return Ok(()) };
    let text = error.to_string();
    prop_assert!(text.contains("strange"), "{}", text);
    if let (Some(line), DataError::BadRecord { number, .. }) = (line, &error) {
        prop_assert_eq!(*number, line, "{}", text);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn any_json_is_a_record_or_a_line_with_a_fault(value in prop_oneof![json(), record(), record()]) {
        let scratch = Scratch::new();
        let lines = scratch.file("strange.jsonl", format!("\n\n{value}\n"));
        let array = scratch.file("strange.json", format!("\n[\n{value}]"));
        for (_, read) in READERS {
            check(read(&lines, FAIL.into()), Some(3))?;
            check(read(&array, FAIL.into()), Some(3))?;
            check(read(&lines, SKIP.into()), None)?;
        }
    }

    #[test]
    fn any_bytes_are_read_or_refused(
        bytes in prop_oneof![
            prop::collection::vec(any::<u8>(), 0..200),
            "[\\[\\]{}\",:\\\\ \n\r\u{feff}\u{0}a-c<|>1]{0,120}".prop_map(String::into_bytes),
        ],
        limit in prop_oneof![Just(1 << 20), 1..50_u64],
    ) {
        let scratch = Scratch::new();
        let packed = gz(&String::from_utf8_lossy(&bytes));
        for (name, content) in [
            ("strange.jsonl", &bytes), ("strange.json", &bytes), ("strange.json.gz", &packed),
            ("strange.jsonl.gz", &bytes), ("strange.parquet", &bytes), ("strange.txt", &bytes),
        ] {
            let path = scratch.file(name, content);
            for on_bad_record in [FAIL, SKIP] {
                let options = ReadOptions { on_bad_record, ..limited(limit) };
                for separator in ["blank-line", "line", "none", "<|a|>", "\n\n", "aa"] {
                    let separator = Separator::from(separator.to_owned());
                    check(read_texts(&path, &separator, options).map(drop), None)?;
                }
                check(read_prompts(&path, options).map(drop), None)?;
            }
        }
    }

    #[test]
    fn text_is_cut_as_one_would_with_all_of_it_at_hand(
        text in "[ab\n\r ]{0,60}",
        separator in prop::sample::select(&["blank-line", "line", "none", "a", "\n\n", "ab", "aba"][..]),
    ) {
        let scratch = Scratch::new();
        let separator = Separator::from(separator.to_owned());
        let read = read_texts(&scratch.file("strange.txt", &text), &separator, FAIL).unwrap_or_default();
        let trim = |part: &str| part.trim_matches(['\r', '\n']).to_owned();
        let expected: Vec<String> = match &separator {
            Separator::None => vec![text.clone()],
            Separator::Line => text.lines().map(str::to_owned).collect(),
            Separator::Text(mark) => text.split(mark.as_str()).map(trim).collect(),
            Separator::BlankLine => {
                let lines: Vec<&str> = text.lines().collect();
                lines.split(|line| line.trim().is_empty()).map(|lines| lines.join("\n")).collect()
            }
        };
        let expected: Vec<String> = expected.into_iter().filter(|part| !part.trim().is_empty()).collect();
        prop_assert_eq!(read, expected);
    }
}
