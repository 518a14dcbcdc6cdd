//! Clients that others wrote.

use std::path::Path;
use std::process::{Command, Stdio};

use common::testing::python_with;
use serde_json::Value;

use crate::server::{Server, chat_body};

/// A server with a key, and the file that it is in.
fn server() -> (Server, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("key");
    std::fs::write(&file, "open-sesame").unwrap();
    (Server::start(&["--checkpoint", "lm", "--api-key-file", file.to_str().unwrap()]), dir)
}

#[test]
fn openais_own_client_works_unchanged() {
    let Some(mut python) = python_with("openai") else { return };
    let (server, _dir) = server();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/serve/openai_client.py");
    let output = python.arg(script).args([&server.url(""), "open-sesame"]).output().unwrap();
    assert!(output.status.success(), "{}\n{}", String::from_utf8_lossy(&output.stderr), server.log());
}

#[test]
fn curl_works_unchanged() {
    if Command::new("curl").arg("--version").stdout(Stdio::null()).status().is_err() {
        eprintln!("skipped: there is no `curl`");
        return;
    }
    let (server, _dir) = server();
    let curl = |more: &Value| {
        let body = chat_body("hi", more).to_string();
        let headers = ["-H", "Content-Type: application/json", "-H", "Authorization: Bearer open-sesame"];
        let output = Command::new("curl")
            .args(["-sS", "--fail-with-body", "--no-buffer", &server.url("/v1/chat/completions"), "-d", &body])
            .args(headers)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    let whole: Value = serde_json::from_str(&curl(&serde_json::json!({ "max_tokens": 4 }))).unwrap();
    assert_eq!(whole["usage"]["completion_tokens"], 4);
    let stream = curl(&serde_json::json!({ "max_tokens": 4, "stream": true }));
    assert!(stream.ends_with("data: [DONE]\n\n"), "{stream}");
}
