//! A server of the program under test, and clients of it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::checkpoints;

/// Longer than anything here takes on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_mins(2);

/// `chat serve` on a free port; ends with the value.
pub(crate) struct Server {
    child: Child,
    pub(crate) port: u16,
    log: Arc<Mutex<String>>,
    reader: Option<JoinHandle<()>>,
    agent: ureq::Agent,
}

/// A response.
#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    headers: ureq::http::HeaderMap,
    pub(crate) text: String,
}

impl Reply {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }

    /// The JSON of each server-sent event, which must end with `[DONE]`.
    pub(crate) fn events(&self) -> Vec<Value> {
        let mut data: Vec<&str> = self.text.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
        assert_eq!(data.pop(), Some("[DONE]"), "{}", self.text);
        data.into_iter().map(|data| serde_json::from_str(data).unwrap()).collect()
    }
}

impl Server {
    /// Starts `chat serve` with `args` in the directory of the checkpoints, and waits until it listens.
    pub(crate) fn start(args: &[&str]) -> Self {
        Self::start_by(Command::new(env!("CARGO_BIN_EXE_chat")), args)
    }

    /// The same on a disk that has no room for files of more than a KiB: a limit on their size, with the signal that comes
    /// with it ignored, is what a program sees of a full disk.
    #[cfg(unix)]
    pub(crate) fn start_on_full_disk(args: &[&str]) -> Self {
        let mut shell = Command::new("bash");
        let script = "trap '' XFSZ; ulimit -f 1; exec \"$0\" \"$@\"";
        shell.args(["-c", script]).arg(env!("CARGO_BIN_EXE_chat"));
        Self::start_by(shell, args)
    }

    fn start_by(mut command: Command, args: &[&str]) -> Self {
        let mut child = command
            .args(["serve", "--port", "0", "--threads", "2"])
            .args(args)
            .current_dir(checkpoints())
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut port = None;
        for line in &mut lines {
            let line = line.unwrap();
            port = line.split_once("listening on http://").and_then(|(_, at)| at.rsplit(':').next()?.parse().ok());
            *log.lock().unwrap() += &format!("{line}\n");
            if port.is_some() {
                break;
            }
        }
        let port = port.unwrap_or_else(|| panic!("the server did not start: {}", log.lock().unwrap()));
        let reader = std::thread::spawn({
            let log = Arc::clone(&log);
            move || lines.map_while(Result::ok).for_each(|line| *log.lock().unwrap() += &format!("{line}\n"))
        });
        let config = ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(PATIENCE));
        Self { child, port, log, reader: Some(reader), agent: config.build().into() }
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// The log, once it has `wanted`.
    #[track_caller]
    pub(crate) fn log_with(&self, wanted: &str) -> String {
        let began = Instant::now();
        loop {
            let log = self.log();
            if log.contains(wanted) {
                return log;
            }
            assert!(began.elapsed() < PATIENCE, "no `{wanted}` in the log: {log}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Reply {
        self.send(path, body.to_string().as_bytes(), &[("content-type", "application/json")])
    }

    /// As [`post`](Self::post), for a server that may be gone: `None` if the response does not come whole.
    pub(crate) fn try_post(&self, path: &str, body: &Value) -> Option<Reply> {
        let request = self.agent.post(self.url(path)).header("content-type", "application/json");
        let mut response = request.send(body.to_string().as_bytes()).ok()?;
        let text = response.body_mut().read_to_string().ok()?;
        Some(Reply { status: response.status().as_u16(), headers: response.headers().clone(), text })
    }

    pub(crate) fn send(&self, path: &str, body: &[u8], headers: &[(&str, &str)]) -> Reply {
        let request = headers.iter().fold(self.agent.post(self.url(path)), |request, (k, v)| request.header(*k, *v));
        reply(request.send(body).unwrap())
    }

    pub(crate) fn get(&self, path: &str, headers: &[(&str, &str)]) -> Reply {
        let request = headers.iter().fold(self.agent.get(self.url(path)), |request, (k, v)| request.header(*k, *v));
        reply(request.call().unwrap())
    }

    /// A conversation of one message, answered with the fields of `more`.
    pub(crate) fn chat(&self, message: &str, more: &Value) -> Reply {
        self.post("/v1/chat/completions", &chat_body(message, more))
    }

    /// Sends a request whose response is not waited for.
    pub(crate) fn open(&self, path: &str, body: &Value) -> TcpStream {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let body = body.to_string();
        let head = format!(
            "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        stream.write_all((head + &body).as_bytes()).unwrap();
        stream
    }

    /// A number of `/metrics`, 0 where there is none.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics", &[]).text;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(0.0, |number| number.parse().unwrap())
    }

    /// Waits until a number of `/metrics` is `expected`.
    #[track_caller]
    pub(crate) fn wait_for(&self, name: &str, expected: f64) {
        let began = Instant::now();
        while self.metric(name) != expected {
            assert!(began.elapsed() < PATIENCE, "`{name}` is {}, not {expected}: {}", self.metric(name), self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Asks the program to stop.
    #[cfg(unix)]
    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.child.id() as i32).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Waits for the end; the exit code and the log.
    pub(crate) fn wait(mut self) -> (Option<i32>, String) {
        let code = self.child.wait().unwrap().code();
        self.reader.take().unwrap().join().unwrap();
        (code, self.log())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn reply(mut response: ureq::http::Response<ureq::Body>) -> Reply {
    let text = response.body_mut().read_to_string().unwrap();
    Reply { status: response.status().as_u16(), headers: response.headers().clone(), text }
}

/// The body of a conversation of one message with the fields of `more`.
pub(crate) fn chat_body(message: &str, more: &Value) -> Value {
    let mut body = json!({ "model": "lm", "messages": [{ "role": "user", "content": message }] });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// Reads until `wanted` has come.
pub(crate) fn read_until(stream: &mut TcpStream, wanted: &str) -> String {
    let (mut read, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        let n = stream.read(&mut buffer).unwrap();
        read.extend_from_slice(&buffer[..n]);
        let text = String::from_utf8_lossy(&read).into_owned();
        if text.contains(wanted) {
            return text;
        }
        assert!(n > 0, "the response ended without `{wanted}`: {text}");
    }
}

/// What `chat generate --json` prints for `args`: an object for each sample.
pub(crate) fn generate(args: &[&str]) -> Vec<Value> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_chat"));
    command.args(["generate", "--json", "--temperature", "1", "--top-p", "1"]).args(args).current_dir(checkpoints());
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}
