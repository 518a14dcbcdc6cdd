//! What the tests that span stages share: a small text world, small configurations, and the programs run on them.
//!
//! Everything a test writes lies in a [`Lab`]; the programs run with that directory as their working directory, so that
//! paths in arguments and messages are short and the same everywhere.

#[path = "support/configs.rs"]
mod configs;
#[path = "support/world.rs"]
mod world;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use common::hf;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// How long to wait for something that takes a moment: far more than a busy machine needs.
const PATIENCE: Duration = Duration::from_mins(2);

/// Between two looks at a file that another process is about to write.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// What differs between two runs that are otherwise the same: names of metrics that a clock measures.
const CLOCK_METRICS: [&str; 3] = ["seconds", "train/tokens_per_second", "timing/"];

/// A training stage as its command line sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stage {
    /// The program, which is also the configuration's name.
    pub program: &'static str,
    /// Flags that name what the stage starts from.
    pub inputs: &'static [&'static str],
    /// Where [`Lab::prepare`] puts the stage's checkpoint.
    pub out: &'static str,
    /// The stages whose checkpoints it starts from.
    pub parents: &'static [Stage],
}

/// `pretrain train`.
pub const PRETRAIN: Stage =
    Stage { program: "pretrain", inputs: &["--tokenizer", "tokenizer"], out: "base", parents: &[] };

/// `sft train`.
pub const SFT: Stage = Stage { program: "sft", inputs: &["--init", "base"], out: "sft", parents: &[PRETRAIN] };

/// `reward-model train`.
pub const REWARD_MODEL: Stage =
    Stage { program: "reward-model", inputs: &["--init", "sft"], out: "reward", parents: &[SFT] };

/// `ppo train`.
pub const PPO: Stage = Stage {
    program: "ppo",
    inputs: &["--policy", "sft", "--reward-model", "reward"],
    out: "ppo",
    parents: &[SFT, REWARD_MODEL],
};

/// `dpo train`.
pub const DPO: Stage = Stage { program: "dpo", inputs: &["--init", "sft"], out: "dpo", parents: &[SFT] };

/// All of them, in their order.
pub const STAGES: [Stage; 5] = [PRETRAIN, SFT, REWARD_MODEL, PPO, DPO];

impl Stage {
    /// The arguments of `train` into `out`.
    pub fn train(&self, out: &str, more: &[&str]) -> Vec<String> {
        let config = format!("configs/{}.toml", self.program);
        let fixed = ["train", "--config", &config, "--out", out];
        fixed.iter().chain(self.inputs).chain(more).map(ToString::to_string).collect()
    }
}

/// A temporary directory with data and configurations for every stage.
#[derive(Debug)]
pub struct Lab {
    dir: TempDir,
}

impl Lab {
    /// Writes `data/` and `configs/`.
    ///
    /// # Panics
    /// If the disk is full or read-only.
    pub fn new() -> Self {
        let lab = Self { dir: tempfile::tempdir().expect("a temporary directory") };
        world::World::new().write(&lab);
        for (program, config) in configs::ALL {
            lab.write(&format!("configs/{program}.toml"), config);
        }
        lab
    }

    /// A lab with the tokenizer and every checkpoint that `stage` starts from.
    ///
    /// # Panics
    /// If a program fails.
    pub fn before(stage: Stage) -> Self {
        let lab = Self::new();
        lab.ok("pretrain", &["tokenizer", "--config", "configs/pretrain.toml", "--out", "tokenizer", "-q"]);
        for parent in stage.parents {
            lab.prepare(*parent);
        }
        lab
    }

    /// Trains `stage` into its usual directory, its parents first, unless that was done already.
    ///
    /// # Panics
    /// If a program fails.
    pub fn prepare(&self, stage: Stage) {
        if self.path(stage.out).join("manifest.json").exists() {
            return;
        }
        for parent in stage.parents {
            self.prepare(*parent);
        }
        self.ok(stage.program, &stage.train(stage.out, &["-q"]));
    }

    /// The directory itself.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A path in the lab.
    pub fn path(&self, relative: &str) -> PathBuf {
        self.dir.path().join(relative)
    }

    /// Writes a file, with the directories above it.
    ///
    /// # Panics
    /// If that fails.
    pub fn write(&self, relative: &str, content: impl AsRef<[u8]>) {
        let path = self.path(relative);
        std::fs::create_dir_all(path.parent().expect("lies in the lab")).expect("can be made");
        std::fs::write(path, content).expect("can be written");
    }

    /// A program that is to run in the lab, with an environment that says nothing about the user.
    pub fn command(&self, program: &str, args: &[impl AsRef<str>]) -> Command {
        self.within(Command::new(binary(program)), args)
    }

    /// [`command`](Self::command) for any other command.
    pub fn within(&self, mut command: Command, args: &[impl AsRef<str>]) -> Command {
        command.args(args.iter().map(AsRef::as_ref)).current_dir(self.dir());
        command.env("KINDLING_CACHE", self.path("cache")).env("COLUMNS", "100");
        for variable in ["RUST_LOG", "KINDLING_DATA", "RUST_BACKTRACE"] {
            command.env_remove(variable);
        }
        command
    }

    /// Runs a program to its end.
    ///
    /// # Panics
    /// If there is no such program, or it panicked.
    pub fn run(&self, program: &str, args: &[impl AsRef<str>]) -> Output {
        self.finish(self.command(program, args))
    }

    /// Runs a command to its end.
    ///
    /// # Panics
    /// If it cannot be started, or it panicked.
    pub fn finish(&self, mut command: Command) -> Output {
        let output = command.stdin(Stdio::null()).output().expect("the program starts");
        let text = |bytes| self.relative(&String::from_utf8(bytes).expect("programs write UTF-8"));
        let output = Output { status: output.status, stdout: text(output.stdout), stderr: text(output.stderr) };
        assert!(!output.stderr.contains("panicked"), "{command:?} panicked:\n{}", output.stderr);
        output
    }

    /// Runs a program that is to succeed and returns its stdout.
    ///
    /// # Panics
    /// If it fails.
    pub fn ok(&self, program: &str, args: &[impl AsRef<str>]) -> String {
        let output = self.run(program, args);
        let args: Vec<&str> = args.iter().map(AsRef::as_ref).collect();
        assert!(output.status.success(), "`{program} {}` failed:\n{}", args.join(" "), output.stderr);
        output.stdout
    }

    /// Starts a program and lets it run.
    ///
    /// # Panics
    /// If there is no such program.
    pub fn start(&self, program: &str, args: &[impl AsRef<str>]) -> Running {
        Self::running(self.command(program, args))
    }

    /// Starts a command and lets it run.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn running(mut command: Command) -> Running {
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("starts");
        let (sender, lines) = channel();
        let stderr = child.stderr.take().expect("piped");
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                // The test may have seen enough; the program must not be stopped by a full pipe.
                let _ = sender.send(line);
            }
        });
        Running { child, lines, heard: Vec::new() }
    }

    /// `text` with the lab's own directory written as `LAB`.
    pub fn relative(&self, text: &str) -> String {
        text.replace(&self.dir().display().to_string(), "LAB")
    }

    /// The bytes of a file.
    ///
    /// # Panics
    /// If it cannot be read.
    pub fn bytes(&self, relative: &str) -> Vec<u8> {
        std::fs::read(self.path(relative)).unwrap_or_else(|error| panic!("`{relative}`: {error}"))
    }

    /// A JSON file.
    ///
    /// # Panics
    /// If it cannot be read.
    pub fn json(&self, relative: &str) -> Value {
        serde_json::from_slice(&self.bytes(relative)).unwrap_or_else(|error| panic!("`{relative}`: {error}"))
    }

    /// The objects of a JSONL file.
    ///
    /// # Panics
    /// If it cannot be read.
    pub fn lines(&self, relative: &str) -> Vec<Value> {
        let bytes = self.bytes(relative);
        let text = std::str::from_utf8(&bytes).expect("UTF-8");
        text.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("`{relative}`: {e}"))).collect()
    }

    /// The largest difference of two weights of two checkpoints.
    ///
    /// # Panics
    /// If they cannot be read or hold different tensors.
    pub fn largest_difference(&self, a: &str, b: &str) -> f32 {
        let read = |out: &str| hf::read_file(&self.path(out).join("model.safetensors"), |_| true).expect("weights").0;
        let (of_a, of_b) = (read(a), read(b));
        assert!(of_a.keys().eq(of_b.keys()), "`{a}` and `{b}` hold different tensors");
        let pairs = of_a.values().zip(of_b.values()).flat_map(|(a, b)| a.data.iter().zip(&b.data));
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    /// The step of the checkpoint in `out`, once there is one.
    pub fn saved_step(&self, out: &str) -> Option<u64> {
        let text = std::fs::read(self.path(out).join("manifest.json")).ok()?;
        serde_json::from_slice::<Value>(&text).ok()?["step"].as_u64()
    }

    /// Everything in a checkpoint that two equal runs have in common, file by file: bytes of tensors and of the
    /// tokenizer, and JSON without what a clock measured.
    ///
    /// # Panics
    /// If a file cannot be read.
    pub fn contents(&self, out: &str) -> BTreeMap<String, Content> {
        let mut contents = BTreeMap::new();
        for file in files_below(&self.path(out)) {
            let name = file.strip_prefix(self.path(out)).expect("below").display().to_string();
            let path = format!("{out}/{name}");
            let content = match name.as_str() {
                "manifest.json" | "state/state.json" => Content::Json(vec![without_clock(self.json(&path))]),
                _ if file.extension().is_some_and(|ending| ending == "jsonl") => {
                    Content::Json(self.lines(&path).into_iter().map(without_clock).collect())
                }
                _ => Content::Bytes(self.bytes(&path)),
            };
            contents.insert(name, content);
        }
        contents
    }

    /// Checks that two checkpoints have the same [`contents`](Self::contents).
    ///
    /// # Panics
    /// If they differ, naming every file that does.
    #[track_caller]
    pub fn assert_same(&self, a: &str, b: &str) {
        let (of_a, of_b) = (self.contents(a), self.contents(b));
        let names = |of: &BTreeMap<String, Content>| of.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&of_a), names(&of_b), "`{a}` and `{b}` hold different files");
        let mut report = String::new();
        for ((name, in_a), in_b) in of_a.iter().zip(of_b.values()) {
            if in_a != in_b {
                writeln!(report, "`{name}` differs{}", first_difference(in_a, in_b)).expect("memory");
            }
        }
        assert!(report.is_empty(), "`{a}` and `{b}`:\n{report}");
    }
}

impl Default for Lab {
    fn default() -> Self {
        Self::new()
    }
}

/// What a program left behind.
#[derive(Debug, Clone)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Results.
    pub stdout: String,
    /// Everything else, with the lab's directory written as `LAB`.
    pub stderr: String,
}

/// What a file holds, as far as it is to be the same in two runs.
#[derive(Clone, PartialEq)]
pub enum Content {
    /// Of a file that is compared as it is.
    Bytes(Vec<u8>),
    /// Objects without what a clock measured.
    Json(Vec<Value>),
}

/// A program that runs. It is killed when this is dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    lines: Receiver<String>,
    heard: Vec<String>,
}

impl Running {
    /// The number of the process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line of stderr that contains `text`.
    ///
    /// # Panics
    /// If the program ends or a long time passes without one.
    #[track_caller]
    pub fn hears(&mut self, text: &str) {
        let end = Instant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let Ok(line) = self.lines.recv_timeout(left) else {
                panic!("stderr never said `{text}`:\n{}", self.heard.join("\n"));
            };
            self.heard.push(line);
            if self.heard.last().is_some_and(|line| line.contains(text)) {
                return;
            }
        }
    }

    /// Waits until `condition` holds; false if the program ended before.
    ///
    /// # Panics
    /// If a long time passes without either.
    pub fn until(&mut self, mut condition: impl FnMut() -> bool) -> bool {
        let end = Instant::now() + PATIENCE;
        while !condition() {
            if self.child.try_wait().expect("our child").is_some() {
                return condition();
            }
            assert!(Instant::now() < end, "nothing happened for {PATIENCE:?}:\n{}", self.stderr());
            std::thread::sleep(LOOK_EVERY);
        }
        true
    }

    /// Sends a signal, unless the program has ended.
    ///
    /// # Panics
    /// If the system refuses.
    pub fn signal(&mut self, signal: Signal) {
        if self.child.try_wait().expect("our child").is_none() {
            let pid = Pid::from_raw(self.child.id().cast_signed()).expect("not 0");
            kill_process(pid, signal).expect("our child");
        }
    }

    /// Waits for the end.
    ///
    /// # Panics
    /// If it does not come, or the program panicked.
    pub fn ends(&mut self) -> ExitStatus {
        assert!(self.until_ended(), "still running after {PATIENCE:?}:\n{}", self.stderr());
        let stderr = self.stderr();
        assert!(!stderr.contains("panicked"), "{stderr}");
        self.child.wait().expect("our child")
    }

    /// Everything it wrote to stderr so far.
    pub fn stderr(&mut self) -> String {
        self.heard.extend(self.lines.try_iter());
        self.heard.join("\n")
    }

    fn until_ended(&mut self) -> bool {
        let end = Instant::now() + PATIENCE;
        // The thread that reads stderr drops its end when the program closes it.
        loop {
            match self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) => self.heard.push(line),
                Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => return true,
                Err(std::sync::mpsc::RecvTimeoutError::Timeout) => return false,
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended long ago.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The program `name`, which Cargo puts beside the directory of the tests' own executables.
///
/// # Panics
/// If it was not built: `cargo test --workspace` builds it, `cargo test -p pipeline-tests` does not.
pub fn binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("this program has a path");
    let directory = test.parent().and_then(Path::parent).expect("target/PROFILE/deps/TEST");
    let path = directory.join(name).with_extension(std::env::consts::EXE_EXTENSION);
    assert!(path.is_file(), "there is no `{}`; run `cargo build --release -p {name}`", path.display());
    path
}

/// Compares `actual` with the committed file `tests/snapshots/NAME.txt`; writes it where the variable
/// `UPDATE_SNAPSHOTS` is `1`.
///
/// # Panics
/// If they differ.
#[track_caller]
pub fn assert_snapshot(name: &str, actual: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("snapshots").join(format!("{name}.txt"));
    common::testing::assert_snapshot(&path, actual);
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap_or_else(|error| panic!("`{}`: {error}", dir.display())) {
        let path = entry.expect("readable").path();
        if path.is_dir() { files.extend(files_below(&path)) } else { files.push(path) }
    }
    files.sort();
    files
}

/// `value` without the entries that a clock measured, and without the hash of the file that holds some of them.
fn without_clock(mut value: Value) -> Value {
    let from_clock = |name: &String| CLOCK_METRICS.iter().any(|clock| name.starts_with(clock));
    let drop_from = |object: &mut Value| {
        if let Value::Object(object) = object {
            object.retain(|name, _| !from_clock(name));
        }
    };
    drop_from(&mut value);
    drop_from(&mut value["metrics"]);
    if let Some(files) = value["files_sha256"].as_object_mut() {
        files.remove("state/state.json");
    }
    value
}

fn first_difference(a: &Content, b: &Content) -> String {
    match (a, b) {
        (Content::Json(a), Content::Json(b)) => {
            let at = a.iter().zip(b).position(|(a, b)| a != b).unwrap_or(a.len().min(b.len()));
            let line = |of: &[Value]| of.get(at).map_or("nothing".to_owned(), Value::to_string);
            format!(" in object {at}: {} and {}", line(a), line(b))
        }
        (Content::Bytes(a), Content::Bytes(b)) => {
            let at = a.iter().zip(b).position(|(a, b)| a != b).unwrap_or(a.len().min(b.len()));
            format!(" from byte {at} on; {} and {} bytes", a.len(), b.len())
        }
        _ => String::new(),
    }
}
