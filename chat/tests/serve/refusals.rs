//! What is refused, in OpenAI's form.

use std::io::Write;
use std::net::TcpStream;

use common::hash::sha256_of;
use serde_json::{Value, json};

use crate::server::{PATIENCE, Server, chat_body, read_until};

/// What a conversation may not have, and the parameter that is named for it.
fn of_conversations() -> Vec<(Value, u16, &'static str)> {
    let long = "x".repeat(200);
    let message = |fields: Value| json!({ "messages": [fields] });
    vec![
        (json!({ "top_k": 5 }), 400, "top_k"),
        (json!({ "logit_bias": { "5": 100 } }), 400, "logit_bias"),
        (json!({ "response_format": { "type": "json_object" } }), 400, "response_format"),
        (json!({ "tools": [{ "type": "function" }] }), 400, "tools"),
        (json!({ "temprature": 1 }), 400, "temprature"),
        (json!({ "temperature": "hot" }), 400, "temperature"),
        (json!({ "temperature": 2.5 }), 422, "temperature"),
        (json!({ "temperature": -0.1 }), 422, "temperature"),
        (json!({ "top_p": 1.5 }), 422, "top_p"),
        (json!({ "frequency_penalty": 3 }), 422, "frequency_penalty"),
        (json!({ "presence_penalty": -3 }), 422, "presence_penalty"),
        (json!({ "max_tokens": 0 }), 422, "max_tokens"),
        (json!({ "max_tokens": 65 }), 422, "max_tokens"),
        (json!({ "max_completion_tokens": 65 }), 422, "max_completion_tokens"),
        (json!({ "max_tokens": -1 }), 400, "max_tokens"),
        (json!({ "max_tokens": 3, "max_completion_tokens": 4 }), 400, "max_completion_tokens"),
        (json!({ "user": 3 }), 400, "user"),
        (json!({ "safety_identifier": ["u"] }), 400, "safety_identifier"),
        (json!({ "metadata": "u" }), 400, "metadata"),
        (json!({ "metadata": { "a": 1 } }), 400, "metadata"),
        (json!({ "n": 0 }), 422, "n"),
        (json!({ "n": 100 }), 422, "n"),
        (json!({ "stop": "" }), 422, "stop"),
        (json!({ "stop": ["a", "b", "c", "d", "e"] }), 422, "stop"),
        (json!({ "stop": 3 }), 400, "stop"),
        (json!({ "seed": 1.5 }), 400, "seed"),
        (json!({ "logprobs": 3 }), 400, "logprobs"),
        (json!({ "logprobs": true, "top_logprobs": 21 }), 422, "top_logprobs"),
        (json!({ "top_logprobs": 2 }), 422, "top_logprobs"),
        (json!({ "stream": 1 }), 400, "stream"),
        (json!({ "stream_options": { "include_usage": true } }), 422, "stream_options"),
        (json!({ "stream": true, "stream_options": { "shout": true } }), 400, "stream_options"),
        (json!({ "model": "gpt-4" }), 404, "model"),
        (json!({ "model": 4 }), 400, "model"),
        (json!({ "messages": null }), 400, "messages"),
        (json!({ "messages": "hi" }), 400, "messages"),
        (json!({ "messages": [] }), 422, "messages"),
        (message(json!({ "role": "tool", "content": "x" })), 400, "messages[0].role"),
        (message(json!({ "role": "user" })), 400, "messages[0].content"),
        (
            message(json!({ "role": "user", "content": [{ "type": "image_url", "image_url": {} }] })),
            400,
            "messages[0].content",
        ),
        (message(json!({ "role": "user", "content": "x", "tool_calls": [] })), 400, "messages[0].tool_calls"),
        (message(json!({ "role": "assistant", "content": "x" })), 422, "messages"),
        (message(json!({ "role": "user", "content": long })), 400, "messages"),
    ]
}

/// A server that takes little.
fn strict() -> Server {
    Server::start(&["--checkpoint", "lm", "--max-tokens", "64", "--max-body", "4096"])
}

#[test]
fn a_parameter_that_cannot_be_honoured_is_an_error() {
    let server = strict();
    for (more, status, param) in of_conversations() {
        let reply = server.chat("hi", &more);
        let error = &reply.json()["error"];
        assert_eq!((reply.status, error["param"].as_str()), (status, Some(param)), "{more}: {}", reply.text);
        assert!(error["message"].as_str().is_some_and(|message| !message.is_empty() && !message.contains('\n')));
        assert_eq!(error["type"], "invalid_request_error");
    }
    let text = [
        (json!({ "prompt": null }), 400, "prompt"),
        (json!({ "prompt": 3 }), 400, "prompt"),
        (json!({ "prompt": [] }), 422, "prompt"),
        (json!({ "prompt": ["a", 3] }), 400, "prompt"),
        (json!({ "prompt": [[1], [999_999]] }), 422, "prompt"),
        (json!({ "prompt": "x", "echo": true }), 400, "echo"),
        (json!({ "prompt": "x", "suffix": "y" }), 400, "suffix"),
        (json!({ "prompt": "x", "best_of": 3 }), 400, "best_of"),
        (json!({ "prompt": "x", "logprobs": 6 }), 422, "logprobs"),
        (json!({ "prompt": "x", "logprobs": true }), 400, "logprobs"),
        (json!({ "prompt": "x", "max_completion_tokens": 6 }), 400, "max_completion_tokens"),
        (json!({ "prompt": "x", "n": 200 }), 422, "n"),
        (json!({ "prompt": "x", "user": {} }), 400, "user"),
    ];
    for (body, status, param) in text {
        let reply = server.post("/v1/completions", &body);
        assert_eq!(
            (reply.status, reply.json()["error"]["param"].as_str()),
            (status, Some(param)),
            "{body}: {}",
            reply.text
        );
    }
    let harmless = json!({
        "user": "u", "metadata": { "a": "b" }, "store": false, "logit_bias": {}, "tools": [], "stop": null,
        "response_format": { "type": "text" }, "tool_choice": null, "max_tokens": 1, "seed": -1, "model": null,
        "max_completion_tokens": 1, "safety_identifier": "s",
    });
    assert_eq!(server.chat("hi", &harmless).status, 200);
    let said = |more| server.chat("hi", &more).json()["error"]["message"].clone();
    assert_eq!(said(json!({ "top_k": 5 })), "the parameter `top_k` is not supported");
    assert_eq!(
        said(json!({ "tools": [{}] })),
        "the parameter `tools` is not supported; only its default `[]` is accepted"
    );
}

#[test]
fn an_answer_longer_than_the_context_leaves_room_for_is_an_error() {
    let server = strict();
    let prompt = "x".repeat(50); // with four marks, in a context of 96 tokens
    for name in ["max_tokens", "max_completion_tokens"] {
        let refused = server.chat(&prompt, &json!({ name: 43 }));
        let error = &refused.json()["error"];
        assert_eq!(
            (refused.status, &error["param"], &error["code"]),
            (400, &json!(name), &json!("context_length_exceeded"))
        );
        assert_eq!(server.chat(&prompt, &json!({ name: 42 })).status, 200);
    }
    assert_eq!(server.chat(&prompt, &json!({})).status, 200, "what is not asked for is as long as there is room");
}

#[test]
fn a_body_that_is_no_request_is_an_error() {
    let server = strict();
    let deep = "[".repeat(2000);
    for (body, content_type, status) in [
        ("{", "application/json", 400),
        ("", "application/json", 400),
        ("[]", "application/json", 400),
        ("\"\\ud800\"", "application/json", 400),
        (deep.as_str(), "application/json; charset=utf-8", 400),
        ("{\"messages\": [], \"temperature\": 1e999}", "application/json", 400),
        ("{}", "APPLICATION/JSON", 400), // which lacks messages
        ("{}", "Application/Json ; charset=utf-8", 400),
        ("{}", "text/plain", 415),
        ("{}", "application/jsonl", 415),
    ] {
        let reply = server.send("/v1/chat/completions", body.as_bytes(), &[("content-type", content_type)]);
        assert_eq!(
            (reply.status, reply.json()["error"]["type"].as_str()),
            (status, Some("invalid_request_error")),
            "{body:.40}"
        );
    }
    assert_eq!(server.send("/v1/chat/completions", &[0xff; 9], &[("content-type", "application/json")]).status, 400);
    let send = |body: &str| server.send("/v1/completions", body.as_bytes(), &[("content-type", "application/json")]);
    let said = |body: &str| send(body).json()["error"]["message"].as_str().unwrap().to_owned();
    assert_eq!(said("{\"seed\": -1e999}"), "a number in the body is too large at line 1 column 15");
    assert!(said("{\"seed\": 1e}").starts_with("the body is no JSON: "));
    let large = server.chat(&"x".repeat(5000), &json!({}));
    assert_eq!((large.status, large.json()["error"]["type"].as_str()), (413, Some("invalid_request_error")));
    for (path, status) in
        [("/v1/chat/completions", 405), ("/v1/nothing", 404), ("/v1/models/nothing", 404), ("/v1/models/%ff", 400)]
    {
        let reply = server.get(path, &[]);
        assert_eq!(
            (reply.status, reply.json()["error"]["type"].as_str()),
            (status, Some("invalid_request_error")),
            "{path}"
        );
    }
    let score = server.post("/score", &json!({ "messages": [{ "role": "user", "content": "x" }] }));
    assert_eq!(score.status, 404, "{}", score.text);
    assert!(!server.log().contains("panicked"), "{}", server.log());
}

#[test]
fn a_score_needs_an_answer_that_fits() {
    let server = Server::start(&["--checkpoint", "lm", "--reward-model", "reward-model"]);
    let ask =
        |answer: Value| server.post("/score", &json!({ "messages": [{ "role": "user", "content": "x" }, answer] }));
    for (answer, status) in [
        (json!({ "role": "user", "content": "y" }), 422),
        (json!({ "role": "assistant", "content": "y".repeat(300) }), 400),
        (json!({ "role": "assistant", "content": "y" }), 200),
    ] {
        assert_eq!(ask(answer).status, status);
    }
    assert_eq!(server.post("/score", &json!({ "messages": [] })).status, 422);
    assert_eq!(server.post("/score", &json!({ "messages": [], "shout": 1 })).status, 400);
}

#[test]
fn without_the_key_only_the_health_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("key");
    std::fs::write(&file, "open-sesame\n").unwrap();
    let server = Server::start(&["--checkpoint", "lm", "--api-key-file", file.to_str().unwrap()]);
    let get = |path: &str, key: &str| server.get(path, &[("authorization", key)]).status;
    for wrong in ["Bearer open-sesam", "Bearer open-sesame2", "Bearer ", "open-sesame", "Basic open-sesame", ""] {
        for path in ["/v1/models", "/metrics", "/v1/nothing"] {
            assert_eq!(get(path, wrong), 401, "{wrong} {path}");
        }
    }
    // One whose hash begins as that of the key: all of it counts.
    let begins = |key: &str| sha256_of(key.as_bytes())[..4].to_owned();
    let hash = begins("open-sesame");
    let alike = (0..1 << 24).map(|i| format!("key-{i}")).find(|key| begins(key) == hash).unwrap();
    assert_eq!(get("/v1/models", &format!("Bearer {alike}")), 401);
    let refused = server.chat("hi", &json!({ "max_tokens": 1 }));
    assert_eq!((refused.status, refused.header("www-authenticate")), (401, Some("Bearer")));
    assert_eq!(refused.json()["error"]["code"], "invalid_api_key");
    assert_eq!((get("/v1/models", "Bearer open-sesame"), get("/v1/models", "bearer open-sesame")), (200, 200));
    assert_eq!(server.get("/health", &[]).status, 200);
    // Behind a proxy the name may be another.
    assert_eq!(
        server.get("/v1/models", &[("authorization", "Bearer open-sesame"), ("host", "chat.example")]).status,
        200
    );
    assert!(!server.log().contains("sesame"), "{}", server.log());
}

#[cfg(unix)]
#[test]
fn a_key_comes_from_a_short_file() {
    let dir = tempfile::tempdir().unwrap();
    // A server that takes the key ends there.
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let [long, key] = ["long", "key"].map(|name| dir.path().join(name).to_str().unwrap().to_owned());
    std::fs::write(&long, "x".repeat(4097)).unwrap();
    for (file, reason) in
        [("/dev/zero", "it is not a file"), (".", "it is not a file"), (&*long, "more than 4096 bytes")]
    {
        let mut serve = std::process::Command::new(env!("CARGO_BIN_EXE_chat"));
        serve.args(["serve", "--port", &port, "--checkpoint", "lm", "--api-key-file", file]);
        let refused = serve.current_dir(crate::support::checkpoints()).output().unwrap();
        let said = String::from_utf8(refused.stderr).unwrap();
        assert_eq!(refused.status.code(), Some(1), "{file}: {said}");
        let expected = format!("error: `{file}` holds no API key: it ");
        assert!(said.starts_with(&expected) && said.contains(reason) && said.contains("\nhint: "), "{file}: {said}");
    }
    // One that is as long as can be.
    std::fs::write(&key, "x".repeat(4095) + "\n").unwrap();
    let server = Server::start(&["--checkpoint", "lm", "--api-key-file", &key]);
    let bearer = format!("Bearer {}", "x".repeat(4095));
    assert_eq!(server.get("/v1/models", &[("authorization", &bearer)]).status, 200);
}

#[test]
fn pages_of_other_sites_are_let_in_only_when_asked_to() {
    let server = Server::start(&["--checkpoint", "lm"]);
    let reply = server.get("/v1/models", &[("origin", "https://evil.example")]);
    assert_eq!((reply.status, reply.header("access-control-allow-origin")), (200, None));
    assert_eq!(server.get("/v1/models", &[("host", "evil.example")]).status, 421);
    assert_eq!(server.get("/v1/models", &[("host", "localhost:99")]).status, 200);
    // What stands before the server may have looked at the other one.
    for hosts in [["localhost", "evil.example"], ["localhost", "localhost"]] {
        let mut client = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        write!(client, "GET /health HTTP/1.1\r\nHost: {}\r\nHost: {}\r\n\r\n", hosts[0], hosts[1]).unwrap();
        let reply = read_until(&mut client, "more than once");
        assert!(reply.starts_with("HTTP/1.1 400 ") && reply.contains("invalid_request_error"), "{reply}");
    }

    let server = Server::start(&["--checkpoint", "lm", "--allow-origin", "https://chat.example"]);
    let allowed = |origin: &str| {
        server.get("/v1/models", &[("origin", origin)]).header("access-control-allow-origin").map(str::to_owned)
    };
    assert_eq!(allowed("https://chat.example").as_deref(), Some("https://chat.example"));
    assert_eq!(allowed("https://evil.example"), None);
}

#[test]
fn the_log_has_a_line_a_request_and_texts_only_when_asked_to() {
    let server = Server::start(&["--checkpoint", "lm"]);
    server.chat("a secret", &json!({ "max_tokens": 3 }));
    server.get("/v1/a-path-of-theirs", &[]);
    let log = server.log_with("GET other 404");
    let line = log.lines().find(|line| line.contains(" POST /v1/chat/completions 200 model=lm")).unwrap();
    assert!(line.contains("prompt_tokens=12 completion_tokens=3 first_token="), "{line}");
    assert!(!log.contains("secret") && !log.contains("theirs"), "{log}");

    let server = Server::start(&["--checkpoint", "lm", "--log-text"]);
    let reply = server.post("/v1/chat/completions", &chat_body("a\nsecret", &json!({ "max_tokens": 3 }))).json();
    let answer = reply["choices"][0]["message"]["content"].as_str().unwrap();
    let log = server.log_with("POST");
    let line = log.lines().find(|line| line.contains(" POST")).unwrap();
    assert!(
        line.contains(r#"prompt=[{"role":"user","content":"a\nsecret"}]"#)
            && line.contains(&format!("answer={answer:?}")),
        "{line}"
    );
}
