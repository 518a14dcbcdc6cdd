mod hostile;

use std::fmt::Debug;
use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use flate2::Compression;
use flate2::write::GzEncoder;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

use super::*;
use base::testing::shared;

struct Scratch(tempfile::TempDir);

impl Scratch {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.path().join(name);
        fs::write(&path, content).unwrap();
        path
    }
}

fn gz(content: &str) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(content.as_bytes()).unwrap();
    encoder.finish().unwrap()
}

const FAIL: OnBadRecord = OnBadRecord::Fail;
const SKIP: OnBadRecord = OnBadRecord::Skip;

fn user(content: &str) -> Message {
    Message::new(Role::User, content)
}

fn assistant(content: &str) -> Message {
    Message::new(Role::Assistant, content)
}

/// The reason in the error for a file of one bad line behind a good one.
fn reason<T: Debug>(line: &str, read: impl Fn(&Path, OnBadRecord) -> Result<T, DataError>) -> String {
    let scratch = Scratch::new();
    match read(&scratch.file("bad.jsonl", format!("\n{line}\n")), FAIL) {
        Err(DataError::BadRecord { number: 2, unit: "line", reason, .. }) => reason,
        other => panic!("{line}: {other:?}"),
    }
}

#[test]
fn text_files_are_cut_where_the_separator_says() {
    let scratch = Scratch::new();
    let text = "\u{feff}a\r\nb\r\n \t\r\n\n  c\n<|endoftext|>\nd<|endoftext|>";
    let path = scratch.file("a.txt", text);
    let read = |separator: &str| read_texts(&path, &Separator::from(separator.to_owned()), FAIL).unwrap();
    assert_eq!(read("blank-line"), ["a\nb", "  c\n<|endoftext|>\nd<|endoftext|>"]);
    assert_eq!(read("line"), ["a", "b", "  c", "<|endoftext|>", "d<|endoftext|>"]);
    assert_eq!(read("none"), [&text[3..]]);
    assert_eq!(read("<|endoftext|>"), ["a\r\nb\r\n \t\r\n\n  c", "d"]);
    let packed = scratch.file("A.TXT.GZ", gz("x\n\ny"));
    assert_eq!(read_texts(&packed, &Separator::BlankLine, FAIL).unwrap(), ["x", "y"]);
}

#[test]
fn separators_have_names() {
    for name in ["blank-line", "line", "none", "<|endoftext|>"] {
        assert_eq!(String::from(Separator::from(name.to_owned())), name);
    }
    assert_eq!(Separator::default(), Separator::from("blank-line".to_owned()));
}

#[test]
fn json_lines_give_texts() {
    let scratch = Scratch::new();
    let lines = "\u{feff}{\"text\": \"a\\n\\nb\", \"more\": 1}\n\n{\"text\":\"c\"}";
    for path in [scratch.file("a.jsonl", lines), scratch.file("a.jsonl.gz", gz(lines))] {
        assert_eq!(read_texts(&path, &Separator::BlankLine, FAIL).unwrap(), ["a\n\nb", "c"]);
    }
}

fn parquet_file(scratch: &Scratch, schema: &str, texts: &[&str], levels: Option<&[i16]>) -> PathBuf {
    let path = scratch.0.path().join("a.parquet");
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let mut writer = SerializedFileWriter::new(fs::File::create(&path).unwrap(), schema, Arc::default()).unwrap();
    let mut group = writer.next_row_group().unwrap();
    while let Some(mut column) = group.next_column().unwrap() {
        let values: Vec<ByteArray> = texts.iter().map(|text| ByteArray::from(*text)).collect();
        column.typed::<ByteArrayType>().write_batch(&values, levels, None).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
    path
}

#[test]
fn parquets_text_column_gives_texts() {
    let scratch = Scratch::new();
    let both = "message m { required binary id (UTF8); required binary text (UTF8); }";
    let path = parquet_file(&scratch, both, &["a", "é\n", " "], None);
    assert_eq!(read_texts(&path, &Separator::None, SKIP).unwrap(), ["a", "é\n"]);
    let error = read_texts(&path, &Separator::None, FAIL).unwrap_err().to_string();
    assert!(error.contains("row 3: `text` is empty"), "{error}");

    let path = parquet_file(&scratch, "message m { optional binary text (UTF8); }", &["a"], Some(&[0, 1]));
    assert_eq!(read_texts(&path, &Separator::None, SKIP).unwrap(), ["a"]);
    let path = parquet_file(&scratch, "message m { required binary body (UTF8); }", &["a"], None);
    assert!(read_texts(&path, &Separator::None, FAIL).unwrap_err().to_string().contains("no column `text`"));
    let whole = fs::read(&path).unwrap();
    let cut = scratch.file("cut.parquet", &whole[..whole.len() - 9]);
    assert!(matches!(read_texts(&cut, &Separator::None, FAIL), Err(DataError::Parquet { .. })));
}

#[test]
fn conversations_are_messages_or_prompt_and_completion() {
    let scratch = Scratch::new();
    let lines = r#"{"messages":[{"role":"system","content":""},{"role":"user","content":"a"},{"role":"assistant","content":"b","x":1}]}
{"prompt":"a","completion":"b"}
{"prompt":"a","response":" b","topic":"t"}
{"prompt":[{"role":"user","content":"a"}],"completion":[{"role":"assistant","content":"b"}]}"#;
    let read = read_conversations(&scratch.file("a.jsonl", lines), FAIL).unwrap();
    assert_eq!(read[0].messages, [Message::new(Role::System, ""), user("a"), assistant("b")]);
    assert_eq!(read[1].messages, [user("a"), assistant("b")]);
    assert_eq!(read[2].messages, [user("a"), assistant(" b")]);
    assert_eq!(read[3].messages, read[1].messages);
}

#[test]
fn bad_conversations_say_why() {
    for (line, expected) in [
        ("[1]", "it is a list, expected a JSON object"),
        ("{\"prompt\":", "it is not JSON: EOF while parsing a value at column 10"),
        ("{}", "expected `messages`, or `prompt` with `completion` or `response`; the record has no key"),
        (r#"{"prompt":"a"}"#, "expected `messages`, or `prompt` with `completion` or `response`; found `prompt`"),
        (
            r#"{"instruction":"a","input":"","output":"b"}"#,
            "expected `messages`, or `prompt` with `completion` or `response`; found `instruction`, `input`, `output` \
             (Alpaca's form: `instruction` and `input` joined are `prompt`, `output` is `completion`)",
        ),
        (
            r#"{"conversations":[{"from":"human","value":"a"}]}"#,
            "expected `messages`, or `prompt` with `completion` or `response`; found `conversations` (ShareGPT's \
             form: rename `conversations` to `messages`, `from` to `role`, `value` to `content`, and the roles `human` \
             to `user`, `gpt` to `assistant`)",
        ),
        (r#"{"prompt":"","completion":"b"}"#, "`prompt` is empty"),
        (r#"{"prompt":"a","response":" \n"}"#, "`response` is empty"),
        (
            r#"{"prompt":"a","completion":"b","response":"c"}"#,
            "it has both `completion` and `response`, expected one of them",
        ),
        (r#"{"prompt":"a","completion":3}"#, "`completion` is a number, expected a string"),
        (r#"{"messages":"a"}"#, "`messages` is a string, expected a list of messages"),
        (r#"{"messages":[]}"#, "`messages`: the conversation has no message"),
        (
            r#"{"messages":[{"role":"user","content":"a"}]}"#,
            "it has no assistant message, so there is nothing to learn from",
        ),
        (r#"{"messages":["a"]}"#, "message 1 of `messages`: it is a string, expected an object"),
        (
            r#"{"messages":[{"role":"tool","content":"a"}]}"#,
            "message 1 of `messages`: unknown role `tool`, expected `system`, `user` or `assistant`",
        ),
        (
            r#"{"messages":[{"role":"user","content":null}]}"#,
            "message 1 of `messages`: `content` is null, expected a string",
        ),
        (
            r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":""}]}"#,
            "`messages`: message 2 (of role `assistant`) is empty",
        ),
        (
            r#"{"messages":[{"role":"user","content":"a"},{"role":"system","content":"b"}]}"#,
            "`messages`: message 2 (counted from 1) is of role `system`",
        ),
    ] {
        assert_eq!(reason(line, read_conversations), expected);
    }
}

#[test]
fn pairs_come_in_three_ways() {
    let scratch = Scratch::new();
    let lines = r#"{"prompt":"p","chosen":"c","rejected":"r","margin":0.5}
{"prompt":[{"role":"user","content":"p"}],"chosen":[{"role":"assistant","content":"c"}],"rejected":"r"}
{"chosen":[{"role":"user","content":"p"},{"role":"assistant","content":"c"}],"rejected":[{"role":"user","content":"p"},{"role":"assistant","content":"r"}],"margin":null}
{"chosen":"\n\nHuman: p\n\nAssistant: c","rejected":"\n\nHuman: p\n\nAssistant: r"}"#;
    let read = read_pairs(&scratch.file("a.jsonl", lines), FAIL).unwrap();
    assert_eq!(read[0].margin, Some(0.5));
    for pair in &read {
        assert_eq!(
            (pair.prompt.as_slice(), pair.chosen.as_str(), pair.rejected.as_str()),
            ([user("p")].as_slice(), "c", "r")
        );
    }
}

#[test]
fn whole_conversations_begin_with_their_prompt() {
    let scratch = Scratch::new();
    let lines = r#"{"prompt":"p","prompt_id":"1","chosen":[{"content":"p","role":"user"},{"content":"c","role":"assistant"}],"rejected":[{"content":"p ","role":"user"},{"content":"r","role":"assistant"}],"messages":[],"score_chosen":8.5}
{"prompt":"p","chosen":[{"role":"system","content":"s"},{"role":"user","content":"p"},{"role":"assistant","content":"c"}],"rejected":[{"role":"system","content":"s"},{"role":"user","content":"p"},{"role":"assistant","content":""}]}
{"prompt":[{"role":"user","content":"p"}],"chosen":[{"role":"user","content":"p"},{"role":"assistant","content":"a"},{"role":"user","content":"q"},{"role":"assistant","content":"c"}],"rejected":[{"role":"user","content":"p"},{"role":"assistant","content":"a"},{"role":"user","content":"q"},{"role":"assistant","content":"r"}]}
{"prompt":null,"chosen":[{"role":"user","content":"p"},{"role":"assistant","content":"c"}],"rejected":[{"role":"user","content":"p"},{"role":"assistant","content":"r"}]}"#;
    let path = scratch.file("a.jsonl", lines.replace("\"p \"", "\"p\""));
    let read = read_pairs(&path, FAIL).unwrap();
    assert_eq!(read[0].prompt, [user("p")]);
    assert_eq!((read[0].chosen.as_str(), read[0].rejected.as_str()), ("c", "r"));
    assert_eq!(
        (&read[1].prompt[..], read[1].rejected.as_str()),
        (&[Message::new(Role::System, "s"), user("p")][..], "")
    );
    assert_eq!(read[2].prompt, [user("p"), assistant("a"), user("q")]);
    assert_eq!(read[3].prompt, [user("p")]);
}

#[test]
fn a_ranked_list_gives_every_pair_of_its_responses() {
    let scratch = Scratch::new();
    let lines = r#"{"prompt":"p","responses":["a","b","c"],"annotator":"x","seconds":1.5}
{"prompt":"q","chosen":"a","rejected":"b","annotator":7}"#;
    let read = read_pairs(&scratch.file("a.jsonl", lines), FAIL).unwrap();
    let texts: Vec<_> = read.iter().map(|pair| (pair.chosen.as_str(), pair.rejected.as_str(), pair.record)).collect();
    assert_eq!(texts, [("a", "b", 0), ("a", "c", 0), ("b", "c", 0), ("a", "b", 1)]);
    assert!(read[..3].iter().all(|pair| pair.prompt == [user("p")] && pair.annotator.as_deref() == Some("x")));
    assert_eq!((read[0].seconds, read[3].seconds, read[3].annotator.as_deref()), (Some(1.5), None, Some("7")));
}

#[test]
fn transcripts_part_at_the_last_answer_that_begins_alike() {
    let chosen = "\n\nHuman: a\nb\n\nAssistant: same\n\nHuman: Ä?\n\nAssistant: alike é";
    let rejected = "\n\nHuman: a\nb\n\nAssistant: same\n\nHuman: Ä?\n\nAssistant: alike è ";
    let line = serde_json::json!({ "chosen": chosen, "rejected": rejected }).to_string();
    let scratch = Scratch::new();
    let read = read_pairs(&scratch.file("a.jsonl", line), FAIL).unwrap().remove(0);
    assert_eq!(read.prompt, [user("a\nb"), assistant("same"), user("Ä?")]);
    assert_eq!((read.chosen.as_str(), read.rejected.as_str()), ("alike é", "alike è"));
}

#[test]
fn bad_pairs_say_why() {
    for (line, expected) in [
        (r#"{"prompt":"p","chosen":"c"}"#, "`rejected` is missing"),
        (
            r#"{"prompt":"p","completion":"c","label":true}"#,
            "expected `prompt`, `chosen` and `rejected`; `chosen` and `rejected` that are conversations or transcripts \
             with the same beginning; or `prompt` and `responses`, the best first; found `prompt`, `completion`, \
             `label` (KTO's form: single answers with a `label` are no pairs)",
        ),
        (
            r#"{"prompt":"p","chosen":[{"role":"user","content":"q"},{"role":"assistant","content":"c"}],"rejected":"r"}"#,
            "`chosen` is a conversation that does not begin with `prompt`",
        ),
        (
            r#"{"prompt":"p","chosen":[{"role":"user","content":"p"}],"rejected":"r"}"#,
            "`chosen` ends with a message of role `user`, expected `assistant`",
        ),
        (
            r#"{"prompt":"p","chosen":[{"role":"system","content":"s"},{"role":"user","content":"p"},{"role":"assistant","content":"c"}],"rejected":"r"}"#,
            "`chosen` and `rejected` differ before their last messages",
        ),
        (r#"{"prompt":"p","responses":["a"]}"#, "`responses` has length 1, expected 2 to 64"),
        (r#"{"prompt":"p","responses":["a","b","a"]}"#, "responses 1 and 3 of `responses` are equal"),
        (r#"{"prompt":"p","responses":["a",2]}"#, "response 2 of `responses` is a number, expected a string"),
        (r#"{"prompt":"p","responses":{}}"#, "`responses` is an object, expected a list of strings"),
        (
            r#"{"prompt":"p","responses":["a","b"],"margin":1}"#,
            "`margin` belongs to a pair, not to a list of `responses`",
        ),
        (
            r#"{"prompt":"p","chosen":"c","rejected":"r","margin":1e39}"#,
            "`margin` is 1e+39, expected a number from -1e30 to 1e30",
        ),
        (
            r#"{"prompt":"p","chosen":"c","rejected":"r","margin":-1e308}"#,
            "`margin` is -1e+308, expected a number from -1e30 to 1e30",
        ),
        (
            r#"{"prompt":"p","chosen":"c","rejected":"r","margin":1e400}"#,
            "it is not JSON: number out of range at column 56",
        ),
        (r#"{"prompt":"p","chosen":"c","rejected":"c"}"#, "`chosen` and `rejected` are equal"),
        (r#"{"prompt":" ","chosen":"c","rejected":"r"}"#, "`prompt` is empty"),
        (r#"{"prompt":"p","chosen":"c","rejected":"r","margin":"1"}"#, "`margin` is a string, expected a number"),
        (
            r#"{"chosen":"c","rejected":"r"}"#,
            "expected `prompt`, or transcripts that share a beginning with `\\n\\nHuman:` and `\\n\\nAssistant:`",
        ),
        (r#"{"chosen":"x\n\nAssistant: c","rejected":"x\n\nAssistant: r"}"#, "a transcript begins with `\\n\\nHuman:`"),
        (
            r#"{"chosen":[{"role":"user","content":"p"}],"rejected":[{"role":"user","content":"q"}]}"#,
            "`chosen` ends with a message of role `user`, expected `assistant`",
        ),
        (
            r#"{"chosen":[{"role":"assistant","content":"p"}],"rejected":[{"role":"assistant","content":"q"}]}"#,
            "the prompt: the conversation has no message",
        ),
        (
            r#"{"prompt":[{"role":"assistant","content":"p"}],"chosen":"c","rejected":"r"}"#,
            "the prompt ends with the assistant's message: there is nothing to answer",
        ),
    ] {
        assert_eq!(reason(line, read_pairs), expected);
    }
}

#[test]
fn prompts_are_strings_or_messages() {
    let scratch = Scratch::new();
    let lines = r#"{"prompt":"a","chosen":"x"}
{"prompt":[{"role":"system","content":"s"},{"role":"user","content":"b"}]}"#;
    let read = read_prompts(&scratch.file("a.jsonl", lines), FAIL).unwrap();
    assert_eq!(read[0], Prompt { messages: vec![user("a")], text: "a".to_owned() });
    assert_eq!((read[1].text.as_str(), read[1].messages.len()), ("b", 2));
    assert_eq!(
        reason(r#"{"prompt":3}"#, read_prompts),
        "`prompt` is a number, expected a string or a list of messages"
    );
    let ends_wrong = r#"{"prompt":[{"role":"assistant","content":"b"}]}"#;
    assert_eq!(reason(ends_wrong, read_prompts), "`prompt` does not end with the user's message");
}

#[test]
fn bad_records_stop_or_are_skipped() {
    let scratch = Scratch::new();
    let path = scratch.file("a.jsonl", b"{\"prompt\":\"a\"}\n\xff\n{}\n{\"prompt\":\"b\"}\n");
    let error = read_prompts(&path, FAIL).unwrap_err().to_string();
    assert!(error.contains("a.jsonl`, line 2: it is not valid UTF-8\nhint: "), "{error}");
    assert_eq!(read_prompts(&path, SKIP).unwrap().len(), 2);
    let path = scratch.file("bad.jsonl", "{}\n{}\n");
    assert!(matches!(read_prompts(&path, SKIP), Err(DataError::AllBad { n_skipped: 2, .. })));
}

#[test]
fn an_array_of_records_is_a_file_of_records() {
    let scratch = Scratch::new();
    let array = "\u{feff}[\r\n  {\"prompt\": \"a, ]\\\"}\"},\n  {\"prompt\": \"b\", \"x\": [[], {}]}\n]\n";
    for path in [scratch.file("a.json", array), scratch.file("a.json.gz", gz(array))] {
        let texts: Vec<_> = read_prompts(&path, FAIL).unwrap().into_iter().map(|prompt| prompt.text).collect();
        assert_eq!(texts, ["a, ]\"}", "b"]);
    }
    // Two arrays, as joined files are; and objects a line under the same name.
    for text in ["[{\"prompt\":\"a\"}]\u{feff}\n[{\"prompt\":\"b\"}]", "{\"prompt\":\"a\"}\n{\"prompt\":\"b\"}"] {
        assert_eq!(read_prompts(&scratch.file("a.json", text), FAIL).unwrap().len(), 2);
    }
    assert_eq!(read_texts(&scratch.file("t.json", "[{\"text\":\"a\"}]"), &Separator::None, FAIL).unwrap(), ["a"]);
    assert!(matches!(read_prompts(&scratch.file("a.json", "[]"), FAIL), Err(DataError::Empty(_))));
    for (text, line, reason) in [
        ("[\n{\"prompt\":\"a\"},\n\n{}]", 4, "expected `prompt`; the record has no key"),
        ("[{\"prompt\":\"a\"},\n]", 2, "an element of the array is missing"),
        ("[{\"prompt\":\"a\"},,{}]", 1, "an element of the array is missing"),
        ("[{\"prompt\":\"a\"},\n{\"prompt\":\"b\"}", 2, "the file ends within the array: `]` is missing"),
        ("[{\"prompt\":\"a\"}]\n{}", 2, "something other than an array follows the array"),
        ("[3]", 1, "it is a number, expected a JSON object"),
    ] {
        let error = read_prompts(&scratch.file("a.json", text), FAIL).unwrap_err().to_string();
        assert!(error.contains(&format!("a.json`, line {line}: {reason}\n")), "{text}: {error}");
    }
}

#[test]
fn joined_files_may_differ_in_line_breaks_and_byte_order_marks() {
    let scratch = Scratch::new();
    let lines = "{\"prompt\":\"a\"}\r\n\u{feff}{\"prompt\":\"b\"}\n\u{feff}\r\n{\"prompt\":\"c\"}";
    assert_eq!(read_prompts(&scratch.file("a.jsonl", lines), FAIL).unwrap().len(), 3);
    let text = "a\r\n\r\n\u{feff}b\r\n\u{feff}\n<|e|>\n\u{feff}\nc";
    let path = scratch.file("a.txt", text);
    let read = |separator: &str| read_texts(&path, &Separator::from(separator.to_owned()), FAIL).unwrap();
    assert_eq!(read("blank-line"), ["a", "b", "<|e|>", "c"]);
    assert_eq!(read("line"), ["a", "b", "<|e|>", "c"]);
    assert_eq!(read("<|e|>"), ["a\r\n\r\n\u{feff}b\r\n\u{feff}", "c"]);
}

#[test]
fn hints_name_only_keys_that_the_reader_has() {
    let scratch = Scratch::new();
    let path = scratch.file("a.jsonl", "{}");
    let by_flag = read_prompts(&path, FAIL).unwrap_err().to_string();
    assert!(by_flag.ends_with("\nhint: fix the record"), "{by_flag}");
    let configured =
        read_prompts(&path, ReadOptions { section: Some("ptx.data"), ..FAIL.into() }).unwrap_err().to_string();
    assert!(configured.ends_with("fix the record, or skip such records with `ptx.data.on_bad_record = \"skip\"`"));
}

#[test]
fn checks_find_what_reading_finds() {
    let scratch = Scratch::new();
    let good = scratch.file("a.jsonl", r#"{"prompt":"a","completion":"b","chosen":"c","rejected":"d","text":"e"}"#);
    let bad = scratch.file("b.jsonl", "{\"x\":1}\n{\"prompt\":\"a\",\"completion\":\"b\"}");
    let one = Summary { n_records: 1, n_skipped: 0 };
    assert_eq!(check_texts(&good, &Separator::None, FAIL).unwrap(), one);
    assert_eq!(check_conversations(&good, FAIL).unwrap(), one);
    assert_eq!(check_pairs(&good, FAIL).unwrap(), one);
    assert_eq!(check_conversations(&bad, SKIP).unwrap(), Summary { n_records: 1, n_skipped: 1 });
    let (read, check) = (read_conversations(&bad, FAIL).unwrap_err(), check_conversations(&bad, FAIL).unwrap_err());
    assert_eq!(read.to_string(), check.to_string());
    assert!(check_pairs(&bad, SKIP).unwrap_err().to_string().contains("all 2 records of"));
}

#[test]
fn files_that_are_none_are_errors() {
    let scratch = Scratch::new();
    let missing = scratch.0.path().join("none.jsonl");
    assert!(matches!(read_prompts(&missing, FAIL), Err(DataError::File(_))));
    assert!(matches!(read_prompts(&scratch.file("a.csv", ""), FAIL), Err(DataError::Format { .. })));
    assert!(matches!(read_prompts(&scratch.file("a.txt", "x"), FAIL), Err(DataError::Format { .. })));
    for name in ["a.jsonl", "a.txt", "a.parquet"] {
        let path = scratch.file(name, "");
        assert!(matches!(read_texts(&path, &Separator::BlankLine, SKIP), Err(DataError::Empty(_))), "{name}");
    }
    let blank = scratch.file("blank.txt", " \n\n ");
    assert!(matches!(read_texts(&blank, &Separator::None, FAIL), Err(DataError::Empty(_))));
    let latin1 = scratch.file("latin1.txt", b"ok\ncaf\xe9\n");
    let error = read_texts(&latin1, &Separator::BlankLine, FAIL).unwrap_err();
    assert!(error.to_string().contains("latin1.txt`, line 2: it is not valid UTF-8\nhint: fix"), "{error}");
    let whole = gz("{\"text\":\"a\"}\n");
    let cut = scratch.file("cut.jsonl.gz", &whole[..whole.len() - 6]);
    assert!(matches!(read_texts(&cut, &Separator::BlankLine, FAIL), Err(DataError::File(_))));
    let plain = scratch.file("plain.jsonl.gz", "{}");
    assert!(matches!(read_texts(&plain, &Separator::BlankLine, FAIL), Err(DataError::File(_))));
}

#[test]
fn real_files_have_as_many_records_as_their_readme_says() {
    let Some(data) = shared("data") else { return };
    let end_of_text = Separator::Text("<|endoftext|>".to_owned());
    let texts = |name: &str, separator: &Separator| read_texts(&data.join(name), separator, FAIL).unwrap();
    assert_eq!(texts("stories/pretrain.txt", &end_of_text).len(), 2109);
    assert_eq!(texts("stories/pretrain.val.txt", &end_of_text).len(), 119);
    assert_eq!(texts("stories/storybooks.txt", &end_of_text).len(), 711);
    assert_eq!(texts("shakespeare/input.txt", &Separator::None)[0].chars().count(), 1_115_394);
    assert!(texts("chitchat/pretrain.txt.gz", &Separator::BlankLine).len() > 1000);

    let conversations = |name: &str, on_bad: OnBadRecord| read_conversations(&data.join(name), on_bad);
    assert_eq!(conversations("stories/sft.train.jsonl", FAIL).unwrap().len(), 2631);
    assert_eq!(conversations("stories/sft.val.jsonl", FAIL).unwrap().len(), 148);
    // 32 of its 7,097 records have an empty prompt or response.
    let error = conversations("chitchat/sft.train.jsonl.gz", FAIL).unwrap_err();
    assert!(matches!(error, DataError::BadRecord { number: 536, .. }), "{error}");
    assert_eq!(conversations("chitchat/sft.train.jsonl.gz", SKIP).unwrap().len(), 7097 - 32);
    assert_eq!(conversations("chitchat/sft.val.jsonl.gz", FAIL).unwrap().len(), 400);

    let pairs = |name: &str| read_pairs(&data.join(name), FAIL).unwrap();
    assert_eq!(pairs("stories/prefs.train.jsonl").len(), 2403);
    assert_eq!(pairs("stories/prefs.test.jsonl").len(), 119);
    assert_eq!(pairs("chitchat/prefs.train.jsonl.gz").len(), 2358);
    assert_eq!(pairs("chitchat/prefs.test.jsonl.gz").len(), 531);
    let people = pairs("hh-harmless/harmless-base.test.jsonl.gz");
    assert_eq!(people.len(), 2312);
    assert!(
        people.iter().all(|pair| pair.prompt[0].role == Role::User && pair.prompt.last().unwrap().role == Role::User)
    );
    // The share that the README gives for always taking the longer one.
    let longer = people.iter().filter(|pair| pair.chosen.len() > pair.rejected.len()).count();
    assert!((longer as f64 / 2312.0 - 0.442).abs() < 0.01, "{longer}");

    assert_eq!(read_prompts(&data.join("stories/prefs.test.jsonl"), FAIL).unwrap().len(), 119);
}
