//! Judgements as the page sends them.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::server::{Reply, Server};
use crate::support::checkpoints;

fn server(labels: Option<&Path>) -> Server {
    let models = ["--checkpoint", "lm", "--checkpoint", "a=lm", "--checkpoint", "b=lm"];
    let labels: Vec<&str> = labels.map(|path| ["--labels", path.to_str().unwrap()]).into_iter().flatten().collect();
    Server::start(&[&models[..], &labels].concat())
}

/// A judgement of three answers with the fields of `more`.
fn judge(server: &Server, more: &Value) -> Reply {
    let answers = [("lm", "x"), ("a", "y"), ("b", "x")].map(|(model, text)| json!({ "model": model, "text": text }));
    let mut body = json!({ "messages": [{ "role": "user", "content": "hi" }], "answers": answers, "verdict": 0 });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    server.post("/compare/judge", &body)
}

fn records(path: &Path) -> Vec<Value> {
    std::fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_judgement_is_a_record_for_each_two_answers_that_it_is_about() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("labels.jsonl");
    let server = server(Some(&path));
    // The third is the same text as the best, which is no preference.
    let kept = judge(&server, &json!({ "annotator": "mia", "seconds": 1.5 })).json()["kept"].clone();
    let expected = json!({
        "prompt": "hi", "chosen": "x", "rejected": "y", "shown_first": "chosen",
        "models": { "chosen": "lm", "rejected": "a" }, "annotator": "mia", "seconds": 1.5
    });
    assert_eq!(records(&path), [expected]);
    let all = judge(&server, &json!({ "verdict": "tie" })).json()["kept"].clone();
    assert_eq!(records(&path).len(), 1 + 3);

    let undo = |id: &Value| server.post("/compare/undo", &json!({ "id": id })).status;
    assert_eq!(undo(&kept), 409, "another came after it");
    assert_eq!(undo(&all), 200);
    assert_eq!(records(&path).len(), 1);
    assert_eq!(undo(&all), 409, "taken back already");
    assert_eq!(undo(&kept), 200, "the one before it");
    assert!(records(&path).is_empty());
    assert_eq!(undo(&kept), 409, "nothing is left");
    judge(&server, &json!({}));
    let all = judge(&server, &json!({ "verdict": "bad" })).json()["kept"].clone();
    assert!(records(&path)[1..].iter().all(|record| record["both_bad"] == true));
    assert_ne!(all, kept);

    // Another server's judgements are not those of a page that was open before.
    drop(server);
    let server = self::server(Some(&path));
    let number = |value: &Value| value.as_u64().unwrap();
    let later = judge(&server, &json!({})).json()["kept"].clone();
    assert!(number(&later) > number(&all) && number(&later) < 1 << 53, "{later}");
}

#[test]
fn a_judgement_that_was_answered_outlives_a_kill() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("labels.jsonl");
    for n in 1..=5 {
        let server = server(Some(&path));
        assert_eq!(judge(&server, &json!({ "annotator": format!("person {n}") })).status, 200);
        // With SIGKILL: nothing is written that was not before.
        drop(server);
        let said = records(&path);
        assert_eq!((said.len(), &said[n - 1]["annotator"]), (n, &json!(format!("person {n}"))));
    }
}

#[cfg(unix)]
#[test]
fn a_full_disk_is_told_to_the_client_and_in_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("labels.jsonl");
    let models = ["--checkpoint", "lm", "--checkpoint", "a=lm", "--checkpoint", "b=lm"];
    let server = Server::start_on_full_disk(&[&models[..], &["--labels", path.to_str().unwrap()]].concat());
    let mut n_kept = 0;
    let refused = loop {
        let reply = judge(&server, &json!({}));
        if reply.status != 200 {
            break reply;
        }
        n_kept += 1;
        assert!(n_kept < 100, "the disk is not full");
    };
    let error = refused.json()["error"].clone();
    assert_eq!((refused.status, &error["type"]), (500, &json!("server_error")), "{}", refused.text);
    let cause = error["message"].as_str().unwrap();
    assert!(cause.contains("labels.jsonl") && cause.contains("File too large"), "{cause}");
    server.log_with(&format!("the judgements cannot be changed: {cause}"));
    assert_eq!(records(&path).len(), n_kept, "no half record is left");
}

#[cfg(unix)]
#[test]
fn a_judgement_for_a_file_that_was_removed_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let [path, aside] = ["labels.jsonl", "aside"].map(|name| dir.path().join(name));
    let server = server(Some(&path));
    let kept = judge(&server, &json!({})).json()["kept"].clone();
    std::fs::rename(&path, &aside).unwrap();
    let refused = || {
        for reply in [judge(&server, &json!({})), server.post("/compare/undo", &json!({ "id": kept }))] {
            let error = reply.json()["error"].clone();
            assert_eq!((reply.status, &error["type"]), (500, &json!("server_error")), "{}", reply.text);
            let message = error["message"].as_str().unwrap();
            assert!(message.contains("labels.jsonl`: the file was removed or replaced"), "{message}");
            assert!(message.contains("start this program again"), "{message}");
            server.log_with(message);
        }
    };
    refused();
    assert!(!path.exists());
    std::fs::write(&path, "").unwrap();
    refused();
    assert_eq!((records(&path).len(), records(&aside).len()), (0, 1), "another file, and the one that was put aside");
    std::fs::rename(&aside, &path).unwrap();
    assert_eq!(judge(&server, &json!({})).status, 200, "it is back");
    assert_eq!(records(&path).len(), 2);
}

#[test]
fn what_could_not_be_read_back_is_not_kept() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("labels.jsonl");
    let server = server(Some(&path));
    let message = |role: &str, content: &str| json!({ "role": role, "content": content });
    let answer = json!({ "model": "lm", "text": "x" });
    let twice = json!([answer, answer]);
    for (more, status, param) in [
        (json!({ "messages": [] }), 422, "messages"),
        (json!({ "messages": [message("user", " \n")] }), 422, "messages"),
        (json!({ "messages": [message("user", "hi"), message("assistant", "ho")] }), 422, "messages"),
        (json!({ "messages": [message("user", "hi"), message("system", "late")] }), 422, "messages"),
        (json!({ "answers": [] }), 422, "answers"),
        (json!({ "answers": [answer] }), 422, "answers"),
        (json!({ "answers": vec![answer.clone(); 5] }), 422, "answers"),
        (json!({ "answers": [answer, { "model": "none", "text": "y" }] }), 404, "model"),
        (json!({ "answers": [answer, { "model": "lm" }] }), 400, "answers"),
        (json!({ "answers": twice }), 422, "verdict"),
        (json!({ "verdict": 3 }), 422, "verdict"),
        (json!({ "verdict": -1 }), 400, "verdict"),
        (json!({ "verdict": "good" }), 400, "verdict"),
        (json!({ "verdict": null }), 422, "verdict"),
        (json!({ "annotator": "\u{1b}[2J" }), 422, "annotator"),
        (json!({ "annotator": "x".repeat(65) }), 422, "annotator"),
        (json!({ "seconds": -1 }), 422, "seconds"),
        (json!({ "seconds": 1e308 }), 422, "seconds"),
        (json!({ "seconds": "long" }), 400, "seconds"),
        (json!({ "shout": true }), 400, "shout"),
    ] {
        let reply = judge(&server, &more);
        assert_eq!((reply.status, &reply.json()["error"]["param"]), (status, &json!(param)), "{more}: {}", reply.text);
    }
    assert_eq!(server.post("/compare/undo", &json!({})).status, 409);
    assert!(records(&path).is_empty());
    // Every text that comes from a model can be kept.
    let odd = json!([{ "model": "lm", "text": "" }, { "model": "a", "text": "\u{0}\u{2028}\"\n\u{fffd}" }]);
    assert_eq!(judge(&server, &json!({ "answers": odd, "verdict": 1 })).status, 200);
    drop(server);
    let again = self::server(Some(&path));
    assert!(again.log().contains("which has 1 so far"), "{}", again.log());
}

#[test]
fn each_person_is_asked_every_pair_of_a_file_once() {
    let dir = tempfile::tempdir().unwrap();
    let [labels, questions] = ["labels.jsonl", "questions.jsonl"].map(|name| dir.path().join(name));
    let pair = |i: usize| json!({ "prompt": format!("p{i}"), "tied": [format!("a{i}"), format!("b{i}")] });
    std::fs::write(&questions, (0..3).map(|i| format!("{}\n", pair(i))).collect::<String>()).unwrap();
    let server = || {
        let files = ["--labels", labels.to_str().unwrap(), "--questions", questions.to_str().unwrap()];
        Server::start(&[&["--checkpoint", "lm"], &files[..]].concat())
    };
    let running = server();
    assert_eq!(running.get("/about", &[]).json()["questions"], 3);
    let next = |server: &Server, who: &str, after: Value| {
        server.post("/compare/question", &json!({ "annotator": who, "after": after })).json()
    };
    let judge = |server: &Server, who: &str, question: &Value| {
        let answers = [1, 0].map(|i| json!({ "text": question["answers"][i] }));
        let messages = &question["messages"];
        let body = json!({ "messages": messages, "answers": answers, "verdict": 0, "annotator": who });
        server.post("/compare/judge", &body).json()["kept"].clone()
    };
    let first = next(&running, "mia", Value::Null);
    let expected = json!({ "number": 0, "messages": [{ "role": "user", "content": "p0" }], "answers": ["a0", "b0"] });
    assert_eq!(first, json!({ "question": expected, "n": 3, "judged": 0 }));
    judge(&running, "mia", &first["question"]);
    let expected =
        json!({ "prompt": "p0", "chosen": "b0", "rejected": "a0", "shown_first": "chosen", "annotator": "mia" });
    assert_eq!(records(&labels), [expected]);
    assert_eq!(next(&running, "tom", Value::Null)["question"]["number"], 0, "nobody's judgement is another's");
    // One that is skipped comes again after the others.
    assert_eq!(next(&running, "mia", json!(1))["question"]["number"], 2);
    let last = next(&running, "mia", json!(1))["question"].clone();
    judge(&running, "mia", &last);
    let skipped = next(&running, "mia", json!(2));
    assert_eq!((&skipped["question"]["number"], &skipped["judged"]), (&json!(1), &json!(2)));
    let kept = judge(&running, "mia", &skipped["question"]);
    assert_eq!(next(&running, "mia", json!(1)), json!({ "question": null, "n": 3, "judged": 3 }));
    assert_eq!(running.post("/compare/undo", &json!({ "id": kept })).status, 200);
    assert_eq!(next(&running, "mia", json!(1))["question"]["number"], 1, "what is taken back is asked again");
    // Another server goes on where this one stopped.
    drop(running);
    let again = server();
    assert_eq!(next(&again, "mia", Value::Null)["question"]["number"], 1);
    assert_eq!(next(&again, "mia", json!(usize::MAX))["question"]["number"], 1);
}

#[test]
fn a_file_has_one_server() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("labels.jsonl");
    let _server = server(Some(&path));
    let mut second = Command::new(env!("CARGO_BIN_EXE_chat"));
    second.args(["serve", "--port", "0", "--checkpoint", "lm", "--labels", path.to_str().unwrap()]);
    let refused = second.current_dir(checkpoints()).output().unwrap();
    assert_eq!(refused.status.code(), Some(1));
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(said.contains("failed to open the labels") && said.contains("another program"), "{said}");
}

#[test]
fn judgements_without_a_file_are_not_kept() {
    let server = server(None);
    assert_eq!(judge(&server, &json!({})).json(), json!({ "kept": null, "scores": null }));
    assert_eq!(
        server.get("/about", &[]).json(),
        json!({ "base": [], "labels": false, "training": false, "questions": 0 })
    );
    assert_eq!(server.post("/compare/question", &json!({})).status, 404);
    assert_eq!(server.get("/training/runs", &[]).status, 404);
}

#[test]
fn only_runs_below_the_folder_are_shown() {
    let dir = tempfile::tempdir().unwrap();
    for run in ["", "runs/sft", "secret"] {
        std::fs::create_dir_all(dir.path().join(run)).unwrap();
        std::fs::write(dir.path().join(run).join("metrics.jsonl"), "{\"step\":1}\n").unwrap();
    }
    std::fs::write(dir.path().join("runs/sft/samples.jsonl"), "{\"step\":1,\"text\":\"hi\"}\n").unwrap();
    let folder = dir.path().join("runs");
    let server = Server::start(&["--checkpoint", "lm", "--runs", folder.to_str().unwrap()]);
    let runs = server.get("/training/runs", &[]).json()["runs"].clone();
    assert_eq!((runs.as_array().unwrap().len(), &runs[0]["name"]), (1, &json!("sft")));
    let rows = server.post("/training/rows", &json!({ "run": "sft" })).json();
    assert_eq!(rows, json!({ "rows": [{ "step": 1 }], "from": 0, "next": 11, "is_all": true }));
    let samples = server.post("/training/samples", &json!({ "run": "sft" })).json();
    assert_eq!(samples, json!({ "samples": [{ "step": 1, "text": "hi" }] }));
    let absolute = dir.path().join("secret");
    for name in ["..", "../secret", "sft/../../secret", "", ".", "./sft", "sft\0", absolute.to_str().unwrap()] {
        for path in ["/training/rows", "/training/samples"] {
            let reply = server.post(path, &json!({ "run": name }));
            assert_eq!((reply.status, &reply.json()["error"]["param"]), (404, &json!("run")), "{name:?}");
        }
    }
}
