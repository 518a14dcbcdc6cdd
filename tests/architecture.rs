//! The guide's invariants that can be read off the source: who may know whom, and what may stand where.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Crates that train; they meet in checkpoints, not in code.
const STAGES: [&str; 5] = ["pretrain", "sft", "reward-model", "ppo", "dpo"];

/// The longest a source file may be.
const MAX_LINES: usize = 600;

/// A `main` parses, runs and reports; anything else belongs where it can be tested.
const MAX_LINES_OF_MAIN: usize = 20;

/// What each crate may use of the others; stages know `common` alone, but for the gold score that can label pairs.
const LIBRARIES: [(&str, &[&str]); 14] = [
    ("base", &[]),
    ("group", &[]),
    ("kernels", &[]),
    ("text", &["base"]),
    ("model", &["base", "group", "kernels"]),
    ("score", &["base", "group", "kernels", "model", "text"]),
    ("common", &["base", "group", "kernels", "model", "score", "text"]),
    ("toy", &["common"]),
    ("reward-model", &["common", "toy"]),
    ("plot", &[]),
    ("bench", &["common", "ppo", "pretrain"]),
    ("book", &["common", "plot", "ppo", "reward-model"]),
    ("compare", &["common", "plot", "ppo", "pretrain", "reward-model", "sft"]),
    ("recipe", &["bench", "common", "compare", "dpo", "plot", "ppo", "pretrain", "reward-model", "sft", "toy"]),
];

/// What each module of `common` may use of the others and of the crates that `common` re-exports.
const EDGES: [(&str, &[&str]); 17] = [
    ("backend", &["config", "group", "kernels"]),
    ("capacity", &["model", "kernels", "group", "reduce", "hf"]),
    ("checkpoint", &["files", "hash", "hf", "kernels", "model", "rng", "tokenizer"]),
    ("cli", &["backend", "checkpoint", "config", "exit", "group", "kernels", "logging", "model", "out_dir", "runtime"]),
    ("config", &["files"]),
    ("corpus", &["config", "data", "group", "interrupt", "logging", "loss", "model", "rng", "tokenizer"]),
    ("exit", &["interrupt", "logging", "view"]),
    ("interrupt", &["group"]),
    ("lib", &[]),
    ("logging", &[]),
    ("metrics", &["files", "logging"]),
    ("out_dir", &[]),
    ("pace", &["interrupt", "logging"]),
    ("runtime", &["backend", "checkpoint", "group", "hf", "kernels", "model", "optim", "rng"]),
    (
        "session",
        &[
            "checkpoint",
            "cli",
            "config",
            "data",
            "exit",
            "files",
            "group",
            "hf",
            "interrupt",
            "kernels",
            "logging",
            "metrics",
            "model",
            "optim",
            "out_dir",
            "reduce",
            "rng",
            "runtime",
            "tokenizer",
            "view",
        ],
    ),
    ("testing", &["checkpoint", "model", "rng", "tokenizer"]),
    ("view", &["interrupt", "kernels", "logging", "metrics"]),
];

/// Pure functions: no files, clocks, environment or configuration.
const PURE: [&str; 16] = [
    "common/model/src/adapter.rs",
    "common/model/src/block.rs",
    "common/model/src/cache.rs",
    "common/model/src/gpt.rs",
    "common/model/src/layout.rs",
    "common/model/src/loss.rs",
    "common/model/src/named.rs",
    "common/model/src/params.rs",
    "common/model/src/positions.rs",
    "common/model/src/scalar.rs",
    "dpo/src/loss.rs",
    "ppo/src/advantage.rs",
    "ppo/src/kl.rs",
    "ppo/src/loss.rs",
    "ppo/src/rewards.rs",
    "reward-model/src/loss.rs",
];

/// The maths of a stage: besides `common` they know only each other.
const MATHS: [&str; 6] = [
    "dpo/src/loss.rs",
    "ppo/src/advantage.rs",
    "ppo/src/kl.rs",
    "ppo/src/loss.rs",
    "ppo/src/rewards.rs",
    "reward-model/src/loss.rs",
];

/// A source file of the workspace.
struct Source {
    /// From the workspace's root, with `/`.
    path: String,
    text: String,
}

impl Source {
    /// Whether the file is tests and nothing else.
    fn is_test(&self) -> bool {
        self.path.starts_with("tests/") || self.path.contains("/tests/") || self.path.ends_with("/tests.rs")
    }

    /// The lines that are compiled into the program, with their numbers: no comments, no tests.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let end = self.text.find("\n#[cfg(test)]\nmod tests {").unwrap_or(self.text.len());
        self.text[..end]
            .lines()
            .enumerate()
            .map(|(i, line)| (i + 1, line.split("//").next().unwrap_or_default()))
            .filter(|(_, line)| !line.trim().is_empty())
    }

    fn lies_in(&self, place: &str) -> bool {
        self.path == place || place.ends_with('/') && self.path.starts_with(place)
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests lies in the workspace").to_owned()
}

/// Every Rust file of the workspace's members.
fn sources() -> Vec<Source> {
    let mut sources = Vec::new();
    let root = root();
    for package in packages() {
        let manifest = package["manifest_path"].as_str().unwrap();
        collect(Path::new(manifest).parent().unwrap(), &root, &mut sources);
    }
    // Crates lie inside of others.
    sources.sort_by(|a: &Source, b| a.path.cmp(&b.path));
    sources.dedup_by(|a, b| a.path == b.path);
    assert!(sources.len() > 50, "only {} files found", sources.len());
    sources
}

fn collect(dir: &Path, root: &Path, sources: &mut Vec<Source>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            // Fuzzing builds within `tests/fuzz` unless told otherwise.
            if !path.ends_with("target") {
                collect(&path, root, sources);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            let path = path.strip_prefix(root).unwrap().to_str().unwrap().replace('\\', "/");
            sources.push(Source { path, text });
        }
    }
}

/// What Cargo says of the workspace's members.
fn packages() -> Vec<Value> {
    let metadata: Value =
        serde_json::from_slice(&cargo(&["metadata", "--format-version", "1", "--no-deps", "--offline"])).unwrap();
    metadata["packages"].as_array().unwrap().clone()
}

/// What `cargo` prints.
fn cargo(args: &[&str]) -> Vec<u8> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo).args(args).current_dir(root()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// The features with which each dependency from outside is compiled, for programs and for build scripts.
fn features(selection: &[&str]) -> BTreeMap<String, BTreeSet<String>> {
    let tree = ["tree", "--offline", "--prefix", "none", "--format", "{p}|{f}"];
    let listed = String::from_utf8(cargo(&[&tree, selection].concat())).unwrap();
    let mut features = BTreeMap::<String, BTreeSet<String>>::new();
    for line in listed.lines().filter(|line| !line.contains(root().to_str().unwrap())) {
        let Some((package, its)) = line.trim_end_matches(" (*)").split_once('|') else { continue };
        features.entry(package.to_owned()).or_default().insert(its.to_owned());
    }
    features
}

/// The dependencies of a package within the workspace, those of its tests left out.
fn dependencies(package: &Value) -> BTreeSet<String> {
    let all = package["dependencies"].as_array().unwrap().iter();
    all.filter(|dependency| dependency["kind"] != "dev" && dependency["path"].is_string())
        .map(|dependency| dependency["name"].as_str().unwrap().to_owned())
        .collect()
}

/// Whether `word` stands in `line` by itself.
fn has_word(line: &str, word: &str) -> bool {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        !line[..at].chars().next_back().is_some_and(is_part)
            && !line[at + word.len()..].chars().next().is_some_and(is_part)
    })
}

/// Fails with every line of `lines` that `is_wrong` finds.
#[track_caller]
fn assert_none<'a>(
    rule: &str,
    lines: impl Iterator<Item = (&'a Source, usize, &'a str)>,
    is_wrong: impl Fn(&str) -> bool,
) {
    let wrong: Vec<String> = lines
        .filter(|(.., line)| is_wrong(line))
        .map(|(source, number, line)| format!("{}:{number}: {}", source.path, line.trim()))
        .collect();
    assert!(wrong.is_empty(), "{rule}:\n{}", wrong.join("\n"));
}

#[test]
fn stages_meet_in_checkpoints_and_not_in_code() {
    for package in packages() {
        let name = package["name"].as_str().unwrap();
        let known = dependencies(&package);
        let allowed =
            LIBRARIES.iter().find(|(library, _)| *library == name).map_or(&["common"][..], |(_, known)| *known);
        let unlisted: Vec<&String> = known.iter().filter(|known| !allowed.contains(&known.as_str())).collect();
        assert!(unlisted.is_empty(), "`{name}` depends on {unlisted:?}, expected {allowed:?} at most");
    }
}

#[test]
fn what_is_for_tests_is_not_built_into_programs() {
    for package in packages().iter().filter(|package| package["name"] != "pipeline-tests") {
        for dependency in package["dependencies"].as_array().unwrap() {
            let testing = dependency["features"].as_array().unwrap().iter().any(|feature| feature == "testing");
            assert!(!testing || dependency["kind"] == "dev", "`{}` builds `testing` in", package["name"]);
        }
    }
}

#[test]
fn to_know_one_stage_is_to_know_all() {
    for stage in STAGES {
        for file in ["main.rs", "lib.rs", "cli.rs", "config.rs", "data.rs", "eval.rs", "train.rs"] {
            assert!(root().join(stage).join("src").join(file).is_file(), "`{stage}` has no src/{file}");
        }
        assert!(root().join(stage).join("tests/cli.rs").is_file(), "`{stage}` has no tests/cli.rs");
    }
}

#[test]
fn every_crate_of_ours_is_heard_at_the_level_asked_for() {
    let logging = std::fs::read_to_string(root().join("common/src/logging.rs")).unwrap();
    for package in packages().iter().filter(|package| package["name"] != "pipeline-tests") {
        let name = package["name"].as_str().unwrap().replace('-', "_");
        assert!(logging.contains(&format!("\"{name}\"")), "common/src/logging.rs does not list `{name}`");
    }
}

#[test]
fn modules_of_common_know_only_those_listed() {
    let mut edges: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let sources = sources();
    let modules: BTreeSet<&str> = EDGES.iter().map(|(module, _)| *module).collect();
    for source in sources.iter().filter(|source| source.path.starts_with("common/src/") && !source.is_test()) {
        let module = source.path.trim_start_matches("common/src/").split(['/', '.']).next().unwrap();
        assert!(modules.contains(module), "`{module}` is new: list in this test what it may know");
        for (_, line) in source.code() {
            for (at, _) in line.match_indices("crate::") {
                let rest = &line[at + "crate::".len()..];
                assert!(!rest.starts_with('{'), "{}: write one `use crate::` for each module", source.path);
                let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
                if &rest[..end] != module {
                    edges.entry(module.to_owned()).or_default().insert(rest[..end].to_owned());
                }
            }
        }
    }
    for (module, listed) in EDGES {
        let listed: BTreeSet<String> = listed.iter().map(ToString::to_string).collect();
        let found = edges.remove(module).unwrap_or_default();
        // Only a missing edge is wrong for `testing`, which may know everything.
        if module != "testing" {
            assert_eq!(found, listed, "edges of `common::{module}`");
        }
    }
}

#[test]
fn only_backend_rs_names_a_backend() {
    let constructors =
        ["flex", "ndarray", "wgpu", "vulkan", "metal", "cuda", "cpu"].map(|name| format!("Device::{name}("));
    let sources = sources();
    let elsewhere = sources.iter().filter(|source| {
        !source.is_test()
            && !source.lies_in("common/src/backend.rs")
            && !source.lies_in("common/kernels/")
            && !source.lies_in("common/src/testing.rs")
    });
    assert_none(
        "only common/src/backend.rs names a backend",
        elsewhere.flat_map(|source| source.code().map(move |(number, line)| (source, number, line))),
        |line| constructors.iter().any(|constructor| line.contains(constructor)),
    );
}

#[test]
fn only_hf_and_the_table_of_parameters_know_foreign_names() {
    let foreign = ["n_embd", "n_ctx", "n_inner", "wte", "wpe", "c_attn", "c_proj", "c_fc", "lm_head"];
    let sources = sources();
    let known = ["common/model/src/hf/", "common/model/src/params.rs"];
    let elsewhere =
        sources.iter().filter(|source| !source.is_test() && !known.iter().any(|place| source.lies_in(place)));
    assert_none(
        "only hf and the table of parameters know the names of other libraries",
        elsewhere.flat_map(|source| source.code().map(move |(number, line)| (source, number, line))),
        |line| foreign.iter().any(|name| has_word(line, name)),
    );
}

#[test]
fn only_kernels_are_unsafe() {
    let sources = sources();
    let elsewhere = sources.iter().filter(|source| !source.lies_in("common/kernels/"));
    assert_none(
        "only common/kernels is unsafe",
        elsewhere.flat_map(|source| {
            source.text.lines().enumerate().map(move |(i, line)| (source, i + 1, line.split("//").next().unwrap_or("")))
        }),
        |line| has_word(line, "unsafe") && !line.contains('"'),
    );
}

#[test]
fn no_file_is_longer_than_one_sitting() {
    for source in sources() {
        let n_lines = source.text.lines().count();
        let most = if source.path.ends_with("src/main.rs") { MAX_LINES_OF_MAIN } else { MAX_LINES };
        assert!(n_lines <= most, "{} has {n_lines} lines, expected at most {most}", source.path);
    }
}

#[test]
fn model_loss_and_rl_maths_are_pure() {
    let sources = sources();
    let pure: Vec<&Source> =
        sources.iter().filter(|source| !source.is_test() && PURE.iter().any(|place| source.lies_in(place))).collect();
    for place in PURE {
        assert!(pure.iter().any(|source| source.lies_in(place)), "there is no {place}");
    }
    let impure = [
        "std::fs",
        "std::env",
        "std::time",
        "std::io",
        "std::net",
        "std::process",
        "Instant",
        "tracing::",
        "rand::rng",
    ];
    assert_none(
        "model, loss and RL maths do no I/O and read no clock, environment or global random state",
        pure.iter().flat_map(|source| source.code().map(move |(number, line)| (*source, number, line))),
        |line| impure.iter().any(|name| line.contains(name)),
    );
}

#[test]
fn the_maths_of_a_stage_know_only_common_and_each_other() {
    let sources = sources();
    let maths = sources.iter().filter(|source| MATHS.contains(&source.path.as_str()));
    assert_none(
        "the maths of a stage know only `common` and each other",
        maths.flat_map(|source| source.code().map(move |(number, line)| (source, number, line))),
        |line| {
            line.match_indices("crate::").any(|(at, _)| {
                let rest = &line[at + "crate::".len()..];
                !["advantage", "dialect", "kl", "loss", "rewards"].iter().any(|module| rest.starts_with(module))
            })
        },
    );
}

/// Documentation for people: path from the workspace's root, and text.
fn pages() -> Vec<(PathBuf, String)> {
    let configs = std::fs::read_dir(root().join("configs")).unwrap().map(|entry| entry.unwrap().path());
    let folders = [root(), root().join("docs")].into_iter().chain(configs);
    let entries = folders.flat_map(|folder| std::fs::read_dir(folder).unwrap());
    let paths = entries.map(|entry| entry.unwrap().path());
    paths
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .map(|path| (path.strip_prefix(root()).unwrap().to_owned(), std::fs::read_to_string(&path).unwrap()))
        .collect()
}

#[test]
fn files_that_the_documentation_names_exist() {
    let folders = [
        "chat/",
        "common/",
        "configs/",
        "docs/",
        "dpo/",
        "ppo/",
        "pretrain/",
        "recipe/",
        "reward-model/",
        "sft/",
        "tests/",
    ];
    let mut n_checked = 0;
    for (page, text) in pages() {
        // Names of metrics look like paths too, but have neither a dot nor a slash at the end.
        let quoted = text.split('`').skip(1).step_by(2).filter(|name| {
            folders.iter().any(|folder| name.starts_with(folder))
                && (name.ends_with('/') || name.contains('.'))
                && !name.contains([' ', '\n', '*', '<', '{', '$'])
        });
        let links = text.split("](").skip(1).filter_map(|rest| rest.split([')', '#']).next());
        let links = links.filter(|link| !link.is_empty() && !link.contains("://"));
        let beside_page = links.map(|link| page.parent().unwrap().join(link));
        for path in quoted.map(PathBuf::from).chain(beside_page) {
            assert!(root().join(&path).exists(), "{} names {}, which does not exist", page.display(), path.display());
            n_checked += 1;
        }
    }
    assert!(n_checked > 20, "only {n_checked} names were found");
}

/// Else the first build of the tests compiles Burn anew.
#[test]
fn a_program_by_itself_compiles_what_the_workspace_and_its_tests_compile() {
    let workspace = features(&["--workspace", "--edges", "normal,build,dev"]);
    let burn = features(&["--package", "burn", "--edges", "normal,build"]);
    for program in ["pretrain", "sft", "reward-model", "ppo", "dpo", "chat", "recipe"] {
        let alone = features(&["--package", program, "--edges", "normal,build"]);
        assert!(alone.len() > 100, "{program} has only {} dependencies", alone.len());
        for (package, features) in alone.into_iter().filter(|(package, _)| burn.contains_key(package)) {
            assert_eq!(features, workspace[&package], "{package} of {program}: name its features in common/Cargo.toml");
        }
    }
}
