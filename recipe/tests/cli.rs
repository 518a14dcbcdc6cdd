//! The command line from outside: help, errors, what is printed where. Set `UPDATE_SNAPSHOTS` to rewrite the expected
//! texts in `snapshots/`.

#![allow(clippy::unwrap_used, reason = "a test that unwraps fails with the error in its message")]

use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::Command;

struct Ran {
    stdout: String,
    stderr: String,
    code: i32,
}

/// Runs `recipe` in `dir`, which is called `DIR` in what it says.
fn recipe(dir: &Path, args: &[&str]) -> Ran {
    let output = Command::new(env!("CARGO_BIN_EXE_recipe"))
        .args(args)
        .current_dir(dir)
        .env("COLUMNS", "100")
        .env_remove("KINDLING_DATA")
        .env_remove("RUST_LOG")
        .env_remove("RUST_BACKTRACE")
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap().replace(&dir.display().to_string(), "DIR");
    Ran { stdout: text(output.stdout), stderr: text(output.stderr), code: output.status.code().unwrap() }
}

#[track_caller]
fn assert_snapshot(name: &str, found: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots").join(name);
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        fs::write(&path, found).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(found, expected, "differs from `{}`", path.display());
}

#[test]
fn help_has_an_example_and_version_a_number() {
    let dir = tempfile::tempdir().unwrap();
    for (name, args) in [
        ("help.txt", vec!["--help"]),
        ("run-help.txt", vec!["run", "--help"]),
        ("plan-help.txt", vec!["plan", "--help"]),
        ("compare-help.txt", vec!["compare", "--help"]),
        ("overoptimise-help.txt", vec!["overoptimise", "--help"]),
        ("world-help.txt", vec!["world", "--help"]),
        ("bench-train-help.txt", vec!["bench", "train", "--help"]),
        ("bench-generate-help.txt", vec!["bench", "generate", "--help"]),
        ("bench-gemm-help.txt", vec!["bench", "gemm", "--help"]),
        ("bench-ppo-help.txt", vec!["bench", "ppo", "--help"]),
    ] {
        let ran = recipe(dir.path(), &args);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        assert!(ran.stdout.contains("Example:"), "{}", ran.stdout);
        assert_snapshot(name, &ran.stdout);
    }
    assert_eq!(recipe(dir.path(), &["--version"]).stdout, format!("recipe {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn errors_say_what_was_found_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    };
    file("empty/recipe.toml", "");
    file("typo/recipe.toml", "seed = 1\n[evalute]\nprompts = \"p\"\n");
    file("data/recipe.toml", "[evaluate]\nprompts = \"$DATA/p.jsonl\"\n");
    file("judge/recipe.toml", "[collect]\nprompts = \"p.jsonl\"\n");
    file("world/recipe.toml", "[world]\nstories = 10\n");
    file("lexicon/recipe.toml", "stages = [\"pretrain\"]\n[gold]\nkind = \"lexicon\"\nwords = \"no.json\"\n");
    file("filled/notes.txt", "mine");
    file("filled-world/notes.txt", "mine");
    fs::create_dir(dir.path().join("nothing")).unwrap();
    let mut text = String::new();
    for (args, code) in [
        (&["run", "no-such", "--out", "o"][..], 1),
        (&["run", "nothing", "--out", "o"], 1),
        (&["run", "typo", "--out", "o"], 1),
        (&["run", "data", "--out", "o"], 1),
        (&["run", "judge", "--out", "o"], 1),
        (&["run", "lexicon", "--out", "o"], 1),
        (&["run", "world", "--out", "o", "--data", "d"], 1),
        (&["run", "empty", "--out", "filled"], 1),
        (&["run", "empty", "--out", "o", "--stages", "world"], 1),
        (&["run", "empty", "--out", "o", "--stages", "pretrian"], 2),
        (&["run", "empty", "--out", "o", "--set", "train.steps=3"], 2),
        (&["run", "empty", "--out", "o", "--set", "recipe.sede=3"], 1),
        (&["run", "empty", "--out", "o"], 1),
        (&["run", "empty"], 2),
        (&["world", "--out", "filled-world"], 1),
        (&["world", "--out", "w", "--stories", "0"], 2),
        (&["bench", "train", "--size", "d"], 2),
        (&["bench", "train", "--backend", "fleks"], 1),
        (&["bench", "train", "--steps", "0"], 2),
        (&["bench", "train", "--n-heads", "3"], 2),
        (&["bench", "train", "--trunk", "bf16"], 2),
        (&["bench", "train", "--instructions", "sse"], 2),
        (&["bench", "train", "--base", "b"], 2),
        (&["compare", "tiny", "--backends", "flex", "--base", "b"], 2),
        (&["plan", "tiny", "--base", "b"], 2),
        (&["bench", "generate", "--prefill", "200"], 2),
        (&["bench", "generate", "--gen", "1"], 2),
        (&["bench", "ppo", "--kernels", "quick"], 2),
        (&["bench", "ppo", "--response", "512"], 2),
        (&["bench", "ppo", "--minibatches", "5"], 2),
    ] {
        let ran = recipe(dir.path(), args);
        assert_eq!((ran.code, ran.stdout.as_str()), (code, ""), "{args:?}: {}", ran.stderr);
        assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
        writeln!(text, "$ recipe {}\n{}", args.join(" "), ran.stderr).unwrap();
    }
    assert_snapshot("errors.txt", &text);
    assert_eq!(fs::read_to_string(dir.path().join("filled/notes.txt")).unwrap(), "mine");
}

#[test]
fn all_configurations_of_a_recipe_are_printed_under_the_names_of_set() {
    let dir = tempfile::tempdir().unwrap();
    let print = |args: &[&str]| {
        let ran = recipe(dir.path(), &[&["run", "tiny", "--print-config"], args].concat());
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{args:?}");
        let table: toml::Table = ran.stdout.parse().unwrap_or_else(|error| panic!("{error}: {}", ran.stdout));
        (table, ran.stdout)
    };
    let (table, text) = print(&["--set", "sft.train.steps=20", "--seed", "7"]);
    let names: Vec<&str> = table.keys().map(String::as_str).collect();
    assert_eq!(names, ["ppo", "pretrain", "recipe", "reward-model", "sft"]);
    assert_eq!((&table["sft"]["train"]["steps"], &table["ppo"]["seed"]), (&20.into(), &7.into()));
    assert_eq!(table["recipe"]["world"]["seed"], 7.into());
    assert!(text.contains("# Random seed of all steps"), "{text}");
    assert!(text.contains("/DIR/data/pairs.train.jsonl") && text.contains("/DIR/data/sft.train.jsonl"), "{text}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "something was written");

    // Every value that is printed can be set under its name.
    let mut flags = Vec::new();
    for (file, table) in &table {
        for (section, values) in table.as_table().unwrap() {
            for (key, value) in values.as_table().into_iter().flatten().filter(|(_, value)| !value.is_table()) {
                let value = value.to_string().replace("DIR/DIR", &dir.path().join("DIR").display().to_string());
                flags.extend(["--set".to_owned(), format!("{file}.{section}.{key}={value}")]);
            }
        }
    }
    assert!(flags.len() > 100);
    let flags: Vec<&str> =
        flags.iter().map(String::as_str).chain(["--set", "sft.train.steps=20", "--seed", "7"]).collect();
    assert_eq!(print(&flags).0, table);

    fs::create_dir(dir.path().join("own")).unwrap();
    fs::write(dir.path().join("own/recipe.toml"), "stages = [\"sft\"]\n[evaluate]\nprompts = \"$DATA/p.jsonl\"\n")
        .unwrap();
    fs::write(dir.path().join("own/sft.toml"), "[data]\ntrain = \"$DATA/a.jsonl\"\nval = \"b.jsonl\"\n").unwrap();
    let ran = recipe(dir.path(), &["run", "own", "--print-config"]);
    assert!(ran.code == 0 && ran.stdout.contains("[\"$DATA/a.jsonl\"]"), "{}{}", ran.stdout, ran.stderr);
    assert!(ran.stdout.contains("/own/b.jsonl\"]") && !ran.stdout.contains("[ppo"), "{}", ran.stdout);
}

#[test]
fn a_world_is_written_as_files_and_described_on_stdout() {
    let dir = tempfile::tempdir().unwrap();
    let ran = recipe(dir.path(), &["world", "--out", "w", "--seed", "5", "--stories", "240"]);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    let summary: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(summary["files"].as_array().unwrap().len(), fs::read_dir(dir.path().join("w")).unwrap().count());
    let again = recipe(dir.path(), &["world", "--out", "w", "--seed", "5", "--stories", "240", "--overwrite"]);
    assert_eq!((again.code, again.stdout), (0, ran.stdout));
}

#[test]
fn the_world_is_that_of_the_recipe_tiny() {
    let dir = tempfile::tempdir().unwrap();
    for args in [
        &["world", "--out", "w", "--seed", "3"][..],
        &["run", "tiny", "--out", "o", "--seed", "3", "--stages", "world"],
    ] {
        let ran = recipe(dir.path(), args);
        assert_eq!(ran.code, 0, "{}", ran.stderr);
    }
    for entry in fs::read_dir(dir.path().join("w")).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap();
        assert!(
            fs::read(&path).unwrap() == fs::read(dir.path().join("o/data").join(name)).unwrap(),
            "{}",
            path.display()
        );
    }
}

/// The one line of a measurement, whose `names` must be positive.
#[track_caller]
fn measured(args: &[&str], names: &[&str]) -> serde_json::Value {
    let dir = tempfile::tempdir().unwrap();
    let small = ["--n-layers", "2", "--n-heads", "2", "--d-model", "16", "--max-seq-len", "24", "--vocab-size", "61"];
    let args: Vec<&str> = ["bench"].into_iter().chain(args.iter().copied()).chain(small).collect();
    let ran = recipe(dir.path(), &args);
    assert_eq!(ran.code, 0, "{args:?}: {}", ran.stderr);
    assert_eq!(ran.stdout.lines().count(), 1, "{}", ran.stdout);
    let line: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    for name in names {
        let value = line[name].as_f64().unwrap_or_else(|| panic!("`{name}` of {line}"));
        assert!(value > 0.0 && value.is_finite(), "`{name}` of {line}");
    }
    assert_eq!((&line["bench"], &line["size"]), (&args[1].into(), &"custom".into()));
    line
}

#[test]
fn a_measurement_of_training_is_one_line() {
    let names =
        ["ms_per_step", "ms_min", "ms_p90", "tokens_per_s", "tokens_per_s_best", "gflop_per_step", "peak_rss_mib"];
    for (kernels, backend) in [("plain", "flex"), ("fused", "flex"), ("fused", "ndarray")] {
        let flags =
            ["train", "--steps", "2", "--threads", "1", "--batch", "3", "--kernels", kernels, "--backend", backend];
        let line = measured(&flags, &names);
        assert_eq!((&line["threads"], &line["steps"], &line["batch"]), (&1.into(), &2.into(), &3.into()));
        assert_eq!((&line["kernels"], &line["backend"]), (&kernels.into(), &backend.into()));
        // Random tokens: ln 61 nats each, whatever the kernels.
        assert!((line["loss_first"].as_f64().unwrap() - 61f64.ln()).abs() < 0.05, "{line}");
        // 2·(12·16² + 13·16) + 2·16 + 61·16 + 24·16 parameters.
        assert_eq!(line["params"], 2 * (12 * 256 + 208) + 32 + 85 * 16);
    }
}

#[test]
fn adapters_are_measured_beside_a_trunk_in_either_type() {
    let loss = |trunk: &str| {
        let line =
            measured(&["train", "--work", "lora", "--trunk", trunk, "--steps", "2"], &["ms_per_step", "trained"]);
        assert_eq!((&line["work"], &line["trunk"]), (&"lora".into(), &trunk.into()));
        line["loss_first"].as_f64().unwrap()
    };
    let (f32, bf16) = (loss("f32"), loss("bf16"));
    assert!((f32 - bf16).abs() < 0.01, "{f32} and {bf16}");
}

#[test]
fn a_measurement_with_fewer_instructions_says_so_and_computes_the_same() {
    let line = |flags: &[&str]| measured(&[&["train", "--steps", "2"], flags].concat(), &["ms_per_step"]);
    let (most, least) = (line(&[]), line(&["--instructions", "baseline"]));
    assert_eq!(least["instructions"], "baseline");
    assert_eq!(most["loss_last"], least["loss_last"]);
    if cfg!(target_arch = "x86_64") {
        assert_ne!(most["instructions"], "baseline");
    }
}

#[test]
fn memory_of_training_grows_with_the_context_not_with_its_square() {
    let peak = |ctx: &str| {
        let flags = [
            &["bench", "train", "--n-layers", "1", "--n-heads", "1", "--d-model", "32", "--vocab", "64"][..],
            &["--batch", "1", "--steps", "1", "--warmup", "1", "--threads", "1", "--max-seq-len", ctx],
        ];
        let ran = recipe(tempfile::tempdir().unwrap().path(), &flags.concat());
        assert_eq!(ran.code, 0, "{}", ran.stderr);
        let line: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
        line["peak_rss_mib"].as_f64().unwrap()
    };
    let (quarter, whole) = (peak("2048"), peak("8192"));
    // The scores of one head alone would be 256 MiB more.
    assert!(whole - quarter < 64.0, "{quarter} MiB at 2,048 tokens, {whole} at 8,192");
}

#[test]
fn a_measurement_of_decoding_has_a_result_for_each_batch_size() {
    let names = ["ms_per_decode_step", "tokens_per_s", "prefill_ms", "decode_tokens_per_s", "peak_rss_mib"];
    let flags = ["generate", "--steps", "2", "--batches", "2,1", "--prefill", "8", "--gen", "16", "--top-k", "5"];
    let line = measured(&flags, &names);
    let results = line["results"].as_array().unwrap();
    assert_eq!(results.iter().map(|r| r["batch"].as_u64().unwrap()).collect::<Vec<_>>(), [2, 1]);
    assert_eq!(line["ms_per_decode_step"], results[0]["ms_per_decode_step"]);
    // Twice for each batch size, under the name that the scripts it is compared with have for it.
    assert_eq!((&line["steps"], &results[1]["runs"]), (&2.into(), &2.into()));
}

#[test]
fn a_measurement_of_ppo_counts_its_parts() {
    let names =
        ["s_per_iteration", "s_per_iteration_min", "rollout_s", "update_s", "rollout_tokens_per_s", "peak_rss_mib"];
    let flags = ["ppo", "--steps", "2", "--ppo-batch", "4", "--prompt", "5", "--response", "7", "--mini-batches", "2"];
    let line = measured(&flags, &names);
    assert_eq!((&line["iterations"], &line["ppo_batch"]), (&2.into(), &4.into()));
    assert!(line["last_metrics"]["value/loss"].as_f64().unwrap() > 0.0, "{line}");
}

#[test]
fn a_measurement_of_products_has_a_rate_for_each_shape() {
    let line = measured(&["gemm", "--steps", "2"], &["gflops", "peak_rss_mib"]);
    let best = line["results"].as_array().unwrap().iter().map(|r| r["gflops"].as_f64().unwrap()).fold(0.0, f64::max);
    assert_eq!(line["gflops"].as_f64(), Some(best));
}
