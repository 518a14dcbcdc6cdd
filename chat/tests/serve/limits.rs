//! Who waits for whom: slots, the queue, clients that leave, and the end.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::server::{PATIENCE, Server, chat_body, read_until};
use crate::support::checkpoints;

const RUNNING: &str = "kindling_answers_running{model=\"lm\"}";

/// An answer that takes far longer than any test.
fn endless(stream: bool) -> Value {
    chat_body("hi", &json!({ "stream": stream, "max_tokens": 60_000, "seed": 1 }))
}

/// A server whose model talks for long.
fn long_winded(n_slots: &str, more: &[&str]) -> Server {
    let flags = ["--checkpoint", "lm=long-winded", "--max-tokens", "60000", "--max-context", "65536"];
    Server::start(&[&flags[..], &["--slots", n_slots], more].concat())
}

/// The same with a slot.
fn one_slot(more: &[&str]) -> Server {
    long_winded("1", more)
}

/// Whether something came, or the end.
fn has_reply(stream: &TcpStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    (&*stream).read(&mut [0; 1]).is_ok()
}

#[test]
fn a_client_that_hangs_up_frees_its_slot() {
    let server = long_winded("2", &[]);
    for stream in [true, false, true] {
        // As long as the one that follows, and before it: that does not come to its end by itself.
        let first = server.open("/v1/chat/completions", &endless(false));
        server.wait_for(RUNNING, 1.0);
        let mut client = server.open("/v1/chat/completions", &endless(stream));
        if stream {
            read_until(&mut client, "\"content\":\"");
        }
        server.wait_for(RUNNING, 2.0);
        drop(client);
        server.wait_for(RUNNING, 1.0);
        // The slot is free: else this would wait for the end of the answer.
        assert_eq!(server.chat("hi", &json!({ "max_tokens": 2 })).status, 200);
        assert!(!has_reply(&first), "the one who hung up was answered to the end");
        drop(first);
        server.wait_for(RUNNING, 0.0);
    }
    server.log_with("POST /v1/chat/completions 499 model=lm");
    server.log_with("client_left");
    // One that waits gives its place up, too.
    let first = server.open("/v1/chat/completions", &endless(false));
    server.wait_for(RUNNING, 1.0);
    let running = server.open("/v1/chat/completions", &endless(true));
    server.wait_for(RUNNING, 2.0);
    let waiting = "kindling_answers_waiting{model=\"lm\"}";
    let waits = server.open("/v1/chat/completions", &endless(true));
    server.wait_for(waiting, 1.0);
    drop(waits);
    server.wait_for(waiting, 0.0);
    assert!(!has_reply(&first), "those who hung up were answered to the end");
    drop((first, running));
}

#[test]
fn a_client_that_does_not_say_what_it_wants_is_left() {
    let server = one_slot(&["--timeout", "1"]);
    for said in ["", "GET /health HT", "GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"] {
        let mut client = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        client.write_all(said.as_bytes()).unwrap();
        let mut reply = String::new();
        client.read_to_string(&mut reply).unwrap_or_else(|error| panic!("{error} after {said:?}"));
        assert_eq!(reply.starts_with("HTTP/1.1 200 "), said.ends_with("\r\n\r\n"), "{reply}");
    }
}

#[test]
fn a_full_queue_is_429_with_the_time_to_wait() {
    let server = one_slot(&["--queue", "1"]);
    let running = server.open("/v1/chat/completions", &endless(true));
    server.wait_for(RUNNING, 1.0);
    assert_eq!(server.chat("hi", &json!({ "n": 2 })).status, 429, "there is one place, for one answer");
    let waiting = server.open("/v1/chat/completions", &endless(true));
    server.wait_for("kindling_answers_waiting{model=\"lm\"}", 1.0);
    let refused = server.chat("hi", &json!({}));
    assert_eq!((refused.status, &refused.json()["error"]["type"]), (429, &json!("rate_limit_error")));
    assert!(refused.header("retry-after").unwrap().parse::<u64>().unwrap() > 0);
    assert_eq!(server.chat("hi", &json!({ "n": 3 })).status, 422, "never fits");
    drop((running, waiting));
    server.wait_for(RUNNING, 0.0);
    assert_eq!(server.chat("hi", &json!({ "max_tokens": 1, "n": 2 })).status, 200);
}

#[test]
fn others_get_their_tokens_beside_a_long_prompt_and_a_slow_reader() {
    let server = long_winded("3", &[]);
    let slow = server.open("/v1/chat/completions", &endless(true)); // which never reads
    let long = server.open("/v1/chat/completions", &chat_body(&"x".repeat(40_000), &json!({ "max_tokens": 1 })));
    server.wait_for(RUNNING, 1.0);
    let began = Instant::now();
    for _ in 0..3 {
        assert_eq!(server.chat("hi", &json!({ "max_tokens": 5 })).status, 200);
    }
    assert!(!has_reply(&long), "the long prompt was read within {:?}: too short for this test", began.elapsed());
    drop((slow, long));
}

#[test]
fn an_answer_that_takes_too_long_is_broken_off() {
    let server = one_slot(&["--timeout", "1"]);
    let late = server.post("/v1/chat/completions", &endless(false));
    assert_eq!((late.status, &late.json()["error"]["code"]), (504, &json!("timeout")));
    let late = server.post("/v1/chat/completions", &endless(true)).text;
    assert!(late.contains("\"timeout\"") && !late.contains("[DONE]"));
    server.wait_for(RUNNING, 0.0);
}

#[test]
fn a_body_that_takes_too_long_is_not_waited_for() {
    let server = one_slot(&["--timeout", "1"]);
    let mut client = half_said(&server);
    let reply = read_until(&mut client, "more than 1 s");
    assert!(reply.starts_with("HTTP/1.1 408 "), "{reply}");
    // Byte by byte it has no longer.
    let mut client = half_said(&server);
    client.set_nonblocking(true).unwrap();
    let (began, mut reply) = (Instant::now(), [0; 12]);
    while client.peek(&mut reply).is_err() {
        assert!(began.elapsed() < PATIENCE, "the body is waited for");
        client.write_all(b" ").unwrap();
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(&reply, b"HTTP/1.1 408");
}

/// A client that has sent the head of a request, and so much of its body.
fn half_said(server: &Server) -> TcpStream {
    let mut client = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";
    write!(client, "{head}Content-Length: 10000\r\n\r\n{{\"prompt\":").unwrap();
    client
}

#[test]
fn a_client_that_leaves_in_the_midst_of_its_body_is_no_bad_request() {
    let server = one_slot(&[]);
    drop(half_said(&server));
    let log = server.log_with("POST /v1/completions ");
    let line = log.lines().find(|line| line.contains("POST")).unwrap();
    assert!(line.contains("POST /v1/completions 499 ") && line.ends_with(" client_left"), "{line}");
    // One that stays to read has made a mistake.
    let mut client = TcpStream::connect(("127.0.0.1", server.port)).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n";
    write!(client, "{head}Transfer-Encoding: chunked\r\n\r\nno length\r\n").unwrap();
    assert!(read_until(&mut client, "the body").starts_with("HTTP/1.1 400 "));
    server.log_with("POST /v1/completions 400 ");
}

#[cfg(unix)]
#[test]
fn a_signal_while_the_models_are_loaded_ends_the_program_at_once() {
    use rustix::process::{Pid, Signal, kill_process};

    let dir = tempfile::tempdir().unwrap();
    for file in checkpoints().join("lm").read_dir().unwrap().map(|file| file.unwrap().path()) {
        std::fs::copy(&file, dir.path().join(file.file_name().unwrap())).unwrap();
    }
    // A disk that never comes to the end of this file.
    let slow = dir.path().join("manifest.json");
    std::fs::remove_file(&slow).unwrap();
    assert!(Command::new("mkfifo").arg(&slow).status().unwrap().success());
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130)] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_chat"))
            .args(["serve", "--port", "0", "--checkpoint"])
            .arg(dir.path())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // Waits until somebody reads it.
        let writing = std::fs::File::options().write(true).open(&slow).unwrap();
        kill_process(Pid::from_raw(child.id() as i32).unwrap(), signal).unwrap();
        let began = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if began.elapsed() > PATIENCE {
                child.kill().unwrap();
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        assert_eq!(status.code(), Some(code));
        drop(writing);
    }
}

#[cfg(unix)]
#[test]
fn nobody_new_is_let_in_while_running_requests_finish() {
    // Longer than the patience below.
    let server = one_slot(&["--grace", "600"]);
    let mut client = server.open("/v1/chat/completions", &endless(true));
    read_until(&mut client, "\"content\":\"");
    server.signal(rustix::process::Signal::TERM);
    let began = Instant::now();
    while TcpStream::connect(("127.0.0.1", server.port)).is_ok() {
        assert!(began.elapsed() < PATIENCE, "new clients are let in after the signal: {}", server.log());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(unix)]
#[test]
fn a_signal_lets_running_requests_finish() {
    use rustix::process::Signal;

    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130)] {
        let server = one_slot(&[]);
        let body = chat_body("hi", &json!({ "stream": true, "max_tokens": 3000 }));
        let mut client = server.open("/v1/chat/completions", &body);
        read_until(&mut client, "\"content\":\"");
        server.signal(signal);
        let rest = read_until(&mut client, "[DONE]");
        assert!(rest.contains("\"finish_reason\":\"length\""), "{rest}");
        let port = server.port;
        let (found, log) = server.wait();
        assert_eq!(found, Some(code), "{log}");
        assert!(log.contains("no more requests are taken") && !log.contains("error"), "{log}");
        assert!(TcpStream::connect(("127.0.0.1", port)).is_err());
    }
}

#[cfg(unix)]
#[test]
fn what_runs_beyond_the_grace_is_broken_off() {
    let server = one_slot(&["--grace", "1"]);
    let mut client = server.open("/v1/chat/completions", &endless(true));
    read_until(&mut client, "\"content\":\"");
    let began = Instant::now();
    server.signal(rustix::process::Signal::TERM);
    let rest = read_until(&mut client, "the server is stopping");
    assert!(rest.contains("\"error\"") && !rest.contains("[DONE]"), "{rest}");
    let (code, log) = server.wait();
    assert_eq!(code, Some(143), "{log}");
    assert!(began.elapsed() > Duration::from_secs(1) && log.contains("are broken off"), "{log}");
}

#[test]
fn metrics_count_requests_and_tokens() {
    let server = Server::start(&["--checkpoint", "lm"]);
    for _ in 0..3 {
        server.chat("hi", &json!({ "max_tokens": 4 }));
    }
    server.chat("hi", &json!({ "shout": true }));
    let metrics = server.get("/metrics", &[]);
    assert!(metrics.header("content-type").unwrap().starts_with("text/plain"));
    for (name, expected) in [
        ("kindling_requests_total{route=\"/v1/chat/completions\",status=\"200\"}", 3.0),
        ("kindling_requests_total{route=\"/v1/chat/completions\",status=\"400\"}", 1.0),
        ("kindling_prompt_tokens_total{model=\"lm\"}", 18.0),
        ("kindling_completion_tokens_total{model=\"lm\"}", 12.0),
        ("kindling_first_token_seconds_count{model=\"lm\"}", 3.0),
        ("kindling_request_seconds_count{route=\"/v1/chat/completions\"}", 4.0),
        (RUNNING, 0.0),
    ] {
        assert_eq!(server.metric(name), expected, "{name}: {}", metrics.text);
    }
}
