use std::fs;
use std::io;

use serde_json::json;

use super::save::{exchange_in_steps, save_with};
use super::*;
use crate::hash::sha256_of_file;
use crate::model::HostTensor;
use crate::rng::Streams;
use crate::testing::tiny_config;
use crate::tokenizer::{TokenizerConfig, TokenizerKind};

fn tokenizer(kind: TokenizerKind) -> Tokenizer {
    let config = TokenizerConfig { kind, ..TokenizerConfig::default() };
    Tokenizer::train(&config, ["the quick brown fox"].into_iter(), true).expect("trains")
}

fn config(tokenizer: &Tokenizer) -> GptConfig {
    let base = GptConfig::transformer(tokenizer.vocab_size());
    GptConfig { d_model: 8, n_layers: 1, n_heads: 2, d_ff: 32, max_seq_len: 6, ..base }
}

fn lm(seed: u64, tokenizer: &Tokenizer) -> Weights {
    let config = config(tokenizer);
    Weights::Lm { named: Gpt::new(&config, &Streams::new(seed), &Device::flex()).to_named(), config }
}

fn score(seed: u64, tokenizer: &Tokenizer) -> Weights {
    let config = config(tokenizer);
    let trunk = Gpt::new(&config, &Streams::new(seed), &Device::flex());
    Weights::Scalar { named: ScalarGpt::new(trunk, &Streams::new(seed)).to_named(), config, score_bias: 0.1 + 0.2 }
}

fn state(seed: u64, tokenizer: &Tokenizer) -> State {
    let (_, _, named) = lm(seed, tokenizer).parts_owned();
    State {
        json: json!({ "step": 7, "kl_coef": 0.1 + 0.2, "rate": 1e-310, "seed": u64::MAX, "best": null }),
        tensors: BTreeMap::from([("adam_m".to_owned(), named.clone()), ("weights".to_owned(), named)]),
    }
}

impl Weights {
    fn parts(&self) -> (&GptConfig, Head, &NamedTensors) {
        match self {
            Self::Lm { named, config } => (config, Head::Lm, named),
            Self::Scalar { named, config, score_bias } => (config, Head::Score { bias: *score_bias }, named),
            Self::Adapter { adapter, config, .. } => (config, adapter.head, &adapter.tensors),
        }
    }

    fn parts_owned(&self) -> (GptConfig, Head, NamedTensors) {
        let (config, head, named) = self.parts();
        (config.clone(), head, named.clone())
    }
}

fn snapshot(seed: u64, tokenizer: &Tokenizer) -> Snapshot<'_> {
    let manifest = Manifest { step: seed, tokens: 64 * seed, backend: "flex".into(), ..Manifest::new(Stage::Ppo) };
    Snapshot {
        weights: lm(seed, tokenizer),
        manifest,
        tokenizer: Some(tokenizer),
        config_toml: "seed = 1\n",
        value: Some(score(seed, tokenizer)),
        state: Some(state(seed, tokenizer)),
    }
}

/// The step of the checkpoint in `out`, after it was opened and its state and value model read.
fn step_of(out: &Path) -> u64 {
    let checkpoint = Checkpoint::open(out).expect("opens");
    checkpoint.load_gpt(&Device::flex()).expect("loads");
    checkpoint.load_value(&Device::flex()).expect("loads");
    checkpoint.state().expect("reads");
    checkpoint.manifest().expect("ours").step
}

fn names_in(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("a directory");
    let mut names: Vec<String> =
        entries.map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

#[test]
fn what_is_saved_loads_bit_equal() {
    let dir = tempfile::tempdir().expect("a directory");
    let out = dir.path().join("runs/ppo");
    let tokenizer = tokenizer(TokenizerKind::Byte);
    let saved = snapshot(3, &tokenizer);
    save(&out, &saved).expect("saves");
    let checkpoint = Checkpoint::open(&out).expect("opens");
    let device = Device::flex();
    assert_eq!(checkpoint.stage(), Some(Stage::Ppo));
    assert_eq!(checkpoint.load_gpt(&device).expect("an LM").to_named(), saved.weights.parts().2.clone());
    let value = checkpoint.load_value(&device).expect("a value model");
    let (_, Head::Score { bias }, named) = saved.value.as_ref().expect("given").parts() else { panic!("a score") };
    assert_eq!((value.to_named(), value.score_bias()), (named.clone(), bias));
    assert_eq!(Some(checkpoint.state().expect("reads")), saved.state);
    assert_eq!(checkpoint.require_tokenizer().expect("saved").sha256(), tokenizer.sha256());
    let manifest = checkpoint.manifest().expect("ours");
    assert_eq!((manifest.step, manifest.tokens, manifest.files_sha256.len()), (3, 192, 4));
    assert_eq!(manifest.weights_sha256, sha256_of_file(&out.join("model.safetensors")).expect("there"));
    assert_eq!(checkpoint.as_parent().weights_sha256, manifest.weights_sha256);
    assert_eq!(fs::read_to_string(out.join(CONFIG_FILE)).expect("there"), "seed = 1\n");
    assert_eq!(names_in(&dir.path().join("runs")), ["ppo"]);
    // The same again gives the same bytes.
    let before = fs::read(out.join("model.safetensors")).expect("there");
    save(&out, &saved).expect("saves");
    assert_eq!(fs::read(out.join("model.safetensors")).expect("there"), before);
}

#[test]
fn a_save_replaces_the_checkpoint_and_brings_other_files_along() {
    let dir = tempfile::tempdir().expect("a directory");
    let out = dir.path().join("ppo");
    let tokenizer = tokenizer(TokenizerKind::Byte);
    fs::create_dir_all(out.join("plots")).expect("made");
    fs::write(out.join("config.toml"), "old").expect("writes");
    fs::write(out.join("metrics.jsonl"), "{\"step\":1}\n").expect("writes");
    fs::write(out.join("plots/a.svg"), "<svg/>").expect("writes");
    save(&out, &snapshot(1, &tokenizer)).expect("saves");
    let mut without_value = snapshot(2, &tokenizer);
    without_value.value = None;
    save(&out, &without_value).expect("saves");
    assert_eq!(fs::read_to_string(out.join("config.toml")).expect("there"), "seed = 1\n");
    assert_eq!(fs::read_to_string(out.join("metrics.jsonl")).expect("there"), "{\"step\":1}\n");
    assert_eq!(fs::read_to_string(out.join("plots/a.svg")).expect("there"), "<svg/>");
    assert!(!out.join(VALUE_DIR).exists(), "a value model belongs to the save that wrote it");
    assert_eq!(Checkpoint::open(&out).expect("opens").manifest().expect("ours").step, 2);
    assert_eq!(names_in(dir.path()), ["ppo"]);
}

#[test]
fn a_save_that_fails_anywhere_leaves_the_last_checkpoint() {
    let dir = tempfile::tempdir().expect("a directory");
    let out = dir.path().join("ppo");
    let tokenizer = tokenizer(TokenizerKind::Byte);
    save(&out, &snapshot(1, &tokenizer)).expect("saves");
    fs::write(out.join("metrics.jsonl"), "{}\n").expect("writes");
    let mut fails_at = 0;
    loop {
        let mut calls = 0;
        let result = save_with(&out, &snapshot(2, &tokenizer), &mut |_| {
            calls += 1;
            if calls > fails_at { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
        });
        if result.is_ok() {
            break;
        }
        let message = result.expect_err("failed").to_string();
        assert!(message.contains("any checkpoint saved before is kept"), "{message}");
        assert_eq!(step_of(&out), 1, "after failing at point {fails_at}");
        assert_eq!(names_in(dir.path()), ["ppo"]);
        fails_at += 1;
    }
    // Directory, model, value, two state tensors, state.json, tokenizer, config, manifest, metrics, exchange.
    assert_eq!(fails_at, 11);
    assert_eq!(step_of(&out), 2);
}

#[test]
fn a_first_save_that_fails_leaves_nothing() {
    let dir = tempfile::tempdir().expect("a directory");
    let out = dir.path().join("ppo");
    let tokenizer = tokenizer(TokenizerKind::Byte);
    let full = save_with(&out, &snapshot(1, &tokenizer), &mut |path| {
        if path.ends_with(MANIFEST_FILE) { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    });
    assert!(full.is_err());
    assert_eq!(names_in(dir.path()), [""; 0]);
    fs::write(dir.path().join("file"), "").expect("writes");
    let inside_a_file = save(&dir.path().join("file/ppo"), &snapshot(1, &tokenizer)).expect_err("no directory");
    assert!(inside_a_file.to_string().starts_with("failed to write `"), "{inside_a_file}");
}

#[test]
fn what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not() {
    let dir = tempfile::tempdir().expect("a directory");
    let out = dir.path().join("ppo");
    let tokenizer = tokenizer(TokenizerKind::Byte);
    save(&out, &snapshot(1, &tokenizer)).expect("saves");
    let mut child = std::process::Command::new("true").spawn().expect("runs");
    let dead = child.id();
    child.wait().expect("ends");
    let alive = std::os::unix::process::parent_id();
    for pid in [dead, alive] {
        let left = dir.path().join(format!(".ppo.tmp-{pid}"));
        fs::create_dir(&left).expect("made");
        fs::write(left.join("model.safetensors"), "half a file").expect("writes");
    }
    fs::create_dir(dir.path().join(".sft.tmp-1234")).expect("made");
    assert_eq!(step_of(&out), 1);
    save(&out, &snapshot(2, &tokenizer)).expect("saves");
    assert_eq!(names_in(dir.path()), [format!(".ppo.tmp-{alive}"), ".sft.tmp-1234".into(), "ppo".into()]);
    assert_eq!(step_of(&out), 2);
}

#[test]
fn a_link_to_the_output_directory_stays_a_link() {
    let dir = tempfile::tempdir().expect("a directory");
    let tokenizer = tokenizer(TokenizerKind::Byte);
    fs::create_dir(dir.path().join("disk")).expect("made");
    std::os::unix::fs::symlink(dir.path().join("disk"), dir.path().join("ppo")).expect("linked");
    save(&dir.path().join("ppo"), &snapshot(1, &tokenizer)).expect("saves");
    assert!(dir.path().join("ppo").is_symlink());
    assert_eq!(step_of(&dir.path().join("disk")), 1);
}

#[test]
fn directories_change_places_where_the_system_has_no_call_for_it() {
    let dir = tempfile::tempdir().expect("a directory");
    let (temporary, target) = (dir.path().join(".a.tmp-1"), dir.path().join("a"));
    for (path, name) in [(&temporary, "new"), (&target, "old")] {
        fs::create_dir(path).expect("made");
        fs::write(path.join(name), "").expect("writes");
    }
    exchange_in_steps(&temporary, &target).expect("exchanged");
    assert_eq!((names_in(&target), names_in(&temporary)), (vec!["new".to_owned()], vec!["old".to_owned()]));
    fs::remove_dir_all(&temporary).expect("removed");
    assert!(exchange_in_steps(&temporary, &target).is_err());
    assert_eq!(names_in(&target), ["new"], "a failure puts the old one back");
}

#[test]
fn a_number_that_is_not_finite_is_never_saved() {
    let dir = tempfile::tempdir().expect("a directory");
    let out = dir.path().join("ppo");
    let tokenizer = tokenizer(TokenizerKind::Byte);
    save(&out, &snapshot(1, &tokenizer)).expect("saves");
    let mut broken = snapshot(2, &tokenizer);
    let Weights::Lm { named, .. } = &mut broken.weights else { panic!("an LM") };
    named.get_mut("blocks.0.mlp.up.weight").expect("there").data[5] = f32::NAN;
    assert_eq!(
        save(&out, &broken).expect_err("NaN").to_string(),
        "not saved: tensor `transformer.h.0.mlp.c_fc.weight` of `model.safetensors` holds NaN; any checkpoint saved before is kept"
    );
    let mut broken = snapshot(2, &tokenizer);
    let tensors = &mut broken.state.as_mut().expect("given").tensors;
    tensors.get_mut("adam_m").expect("there").get_mut("token_embedding").expect("there").data[0] = f32::NEG_INFINITY;
    assert_eq!(
        save(&out, &broken).expect_err("infinity").to_string(),
        "not saved: tensor `token_embedding` of `adam_m.safetensors` holds -inf; any checkpoint saved before is kept"
    );
    let mut broken = snapshot(2, &tokenizer);
    let Some(Weights::Scalar { score_bias, .. }) = &mut broken.value else { panic!("a score") };
    *score_bias = f64::NAN;
    assert!(save(&out, &broken).expect_err("NaN").to_string().contains("`score_bias` of `config.json` holds NaN"));
    assert_eq!(step_of(&out), 1);
}

#[test]
fn a_file_that_was_changed_after_the_save_is_named() {
    let tokenizer = tokenizer(TokenizerKind::Byte);
    let dir = tempfile::tempdir().expect("a directory");
    let refused = |change: &dyn Fn(&Path)| {
        let out = dir.path().join("ppo");
        save(&out, &snapshot(1, &tokenizer)).expect("saves");
        change(&out);
        let read = Checkpoint::open(&out)
            .and_then(|checkpoint| checkpoint.load_value(&Device::flex()).map(|_| checkpoint))
            .and_then(|checkpoint| checkpoint.state());
        read.expect_err("changed").to_string().replace(&out.display().to_string(), "OUT")
    };
    let flip = |path: &Path| {
        let mut bytes = fs::read(path).expect("there");
        let last = bytes.len() - 4;
        bytes[last] ^= 1;
        fs::write(path, bytes).expect("writes");
    };
    for file in ["model.safetensors", "value/model.safetensors", "state/adam_m.safetensors"] {
        let message = refused(&|out| flip(&out.join(file)));
        assert!(message.starts_with(&format!("`OUT/{file}` is not the file that the manifest names")), "{message}");
        let message = refused(&|out| {
            let bytes = fs::read(out.join(file)).expect("there");
            fs::write(out.join(file), &bytes[..bytes.len() - 8]).expect("writes");
        });
        assert!(message.starts_with(&format!("`OUT/{file}` is damaged or cut short")), "{message}");
    }
    let message = refused(&|out| fs::write(out.join("state/state.json"), "{}").expect("writes"));
    assert!(message.starts_with("`OUT/state/state.json` is not the file"), "{message}");
    let message = refused(&|out| fs::remove_dir_all(out.join("state")).expect("removed"));
    assert_eq!(
        message,
        "checkpoint `OUT` holds no state to resume from\nhint: `--init` starts a new run from its weights"
    );
    let message = refused(&|out| fs::write(out.join("manifest.json"), "{\"format\": 9}").expect("writes"));
    assert_eq!(message, "`OUT/manifest.json` has format 9, this program reads 1");
    let message = refused(&|out| fs::write(out.join("manifest.json"), "{\"format\": 1}").expect("writes"));
    assert!(message.starts_with("`OUT/manifest.json` is damaged: missing field"), "{message}");
    let message = refused(&|out| drop(tokenizer_of_another_kind().save(out)));
    assert!(message.starts_with("`OUT/tokenizer.json` is not the file"), "{message}");
}

fn tokenizer_of_another_kind() -> Tokenizer {
    tokenizer(TokenizerKind::Char)
}

#[test]
fn the_wrong_stage_or_head_is_refused_with_what_to_pass() {
    let dir = tempfile::tempdir().expect("a directory");
    let tokenizer = tokenizer(TokenizerKind::Byte);
    let out = dir.path().join("rm");
    let snapshot = Snapshot {
        weights: score(1, &tokenizer),
        manifest: Manifest::new(Stage::RewardModel),
        tokenizer: None,
        config_toml: "",
        value: None,
        state: None,
    };
    save(&out, &snapshot).expect("saves");
    let reward_model = Checkpoint::open(&out).expect("opens");
    let text = |error: CheckpointError| error.to_string().replace(&out.display().to_string(), "runs/rm");
    assert_eq!(
        text(Checkpoint::open(&out).and_then(|wrong| wrong.of_stage(&[Stage::Sft])).expect_err("wrong")),
        "checkpoint `runs/rm` was written by stage `reward-model`, expected `sft`\n\
         hint: pass the directory that `sft train` wrote"
    );
    let reward_model = reward_model.of_stage(&[Stage::Sft, Stage::RewardModel]).expect("right");
    assert_eq!(
        text(reward_model.load_gpt(&Device::flex()).expect_err("a score")),
        "`runs/rm` holds a reward or value model, expected a language model"
    );
    reward_model.load_scalar(&Device::flex()).expect("a score");
    assert!(text(reward_model.require_tokenizer().expect_err("none")).starts_with("`runs/rm` has no tokenizer"));
    assert!(text(reward_model.state().expect_err("none")).contains("holds no state"));
    assert!(Checkpoint::open(&dir.path().join("none")).expect_err("none").to_string().contains("no such directory"));
    assert!(Checkpoint::open(dir.path()).expect_err("none").to_string().contains("it has no `config.json`"));
}

#[test]
fn partners_with_another_tokenizer_or_template_are_refused_by_name() {
    let dir = tempfile::tempdir().expect("a directory");
    let (bytes, chars) = (tokenizer(TokenizerKind::Byte), tokenizer(TokenizerKind::Char));
    let saved = |name: &str, tokenizer: &Tokenizer| {
        let out = dir.path().join(name);
        save(&out, &snapshot(1, tokenizer)).expect("saves");
        out
    };
    let open = |path: &Path| Checkpoint::open(path).expect("opens");
    let (a, b, c) = (saved("a", &bytes), saved("b", &bytes), saved("c", &chars));
    ensure_same_tokenizer(&open(&a), &open(&b)).expect("the same");
    let error = ensure_same_tokenizer(&open(&a), &open(&c)).expect_err("another").to_string();
    let expected = format!("`{}` and `{}` have different tokenizers", a.display(), c.display());
    assert!(error.starts_with(&expected), "{error}");
    // Another template under the same tokens, in a checkpoint that says so.
    let path = b.join("tokenizer_config.json");
    let mut settings: Value = serde_json::from_slice(&fs::read(&path).expect("there")).expect("JSON");
    settings["chat_template"] = json!("{{ messages }}");
    fs::write(&path, settings.to_string()).expect("writes");
    let changed = Checkpoint::open(&b).expect_err("changed").to_string();
    assert!(changed.contains("tokenizer_config.json` is not the file that the manifest names"), "{changed}");
    fs::remove_file(b.join(MANIFEST_FILE)).expect("removed");
    let error = ensure_same_tokenizer(&open(&a), &open(&b)).expect_err("another").to_string();
    assert!(error.contains("have different chat templates"), "{error}");
}

#[test]
fn a_tokenizer_larger_than_the_model_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let (bytes, chars) = (tokenizer(TokenizerKind::Byte), tokenizer(TokenizerKind::Char));
    let out = dir.path().join("out");
    let mut snapshot = snapshot(1, &chars);
    snapshot.tokenizer = Some(&bytes);
    save(&out, &snapshot).expect("saves");
    let error = Checkpoint::open(&out).expect_err("too large").to_string();
    assert!(error.contains(&format!(
        "the tokenizer has {} tokens, the model {}",
        bytes.vocab_size(),
        chars.vocab_size()
    )));
}

#[test]
fn new_rows_are_the_mean_of_the_old_and_spare_rows_are_used_first() {
    let table = |rows: &[[f32; 2]]| HostTensor { shape: vec![rows.len(), 2], data: rows.concat() };
    let old = table(&[[1.0, 2.0], [3.0, 6.0]]);
    let other = table(&[[9.0, 9.0]]);
    let mut named =
        NamedTensors::from([("token_embedding".into(), old.clone()), ("position_embedding".into(), other.clone())]);
    grow_vocab(&mut named, 2, 4, 4);
    assert_eq!(named["token_embedding"], table(&[[1.0, 2.0], [3.0, 6.0], [2.0, 4.0], [2.0, 4.0]]));
    assert_eq!(named["position_embedding"], other);
    let spare = table(&[[1.0, 2.0], [3.0, 6.0], [7.0, 7.0], [8.0, 8.0]]);
    let mut named = NamedTensors::from([("head".into(), spare.clone()), ("trunk.token_embedding".into(), spare)]);
    grow_vocab(&mut named, 2, 3, 4);
    for path in ["head", "trunk.token_embedding"] {
        assert_eq!(named[path], table(&[[1.0, 2.0], [3.0, 6.0], [2.0, 4.0], [8.0, 8.0]]));
    }
}

#[test]
fn a_foreign_directory_gets_the_special_tokens_and_ours_stays_as_it_is() {
    let dir = tempfile::tempdir().expect("a directory");
    // GPT-2's own files, in small: two bytes, one merge.
    fs::write(dir.path().join("vocab.json"), "{\"a\": 0, \"b\": 1, \"ab\": 2, \"<|endoftext|>\": 3}").expect("writes");
    fs::write(dir.path().join("merges.txt"), "#version: 0.2\na b\n").expect("writes");
    let base = GptConfig::gpt2(4);
    let config =
        GptConfig { d_model: 8, n_layers: 1, n_heads: 2, d_ff: 32, max_seq_len: 6, tie_embeddings: false, ..base };
    let named = Gpt::new(&config, &Streams::new(1), &Device::flex()).to_named();
    hf::write(dir.path(), &config, Head::Lm, &named, &hf::TokenIds::default()).expect("writes");
    let opened = Checkpoint::open(dir.path()).expect("opens");
    assert_eq!((opened.stage(), opened.model_config().vocab_size), (None, 4));
    opened.of_stage(&[Stage::Sft]).expect("a foreign directory has no stage");

    let init = init_from(dir.path(), Opening::default()).expect("opens");
    assert_eq!(init.model_config().vocab_size, 10);
    assert_eq!(init.require_tokenizer().expect("there").vocab_size(), 10);
    init.require_tokenizer().expect("there").try_specials().expect("all six");
    for path in ["token_embedding", "head"] {
        let (old, new) = (&named[path].data, &init.named()[path]);
        assert_eq!((&new.shape[..], &new.data[..4 * 8]), (&[10, 8][..], &old[..]));
        let mean = |column: usize| old.iter().skip(column).step_by(8).map(|&x| f64::from(x) / 4.0).sum::<f64>() as f32;
        assert!((4..10).all(|row| (0..8).all(|column| new.data[row * 8 + column] == mean(column))));
    }
    init.load_gpt(&Device::flex()).expect("loads");

    let out = dir.path().join("ours");
    let tokenizer = tokenizer(TokenizerKind::Byte);
    save(&out, &snapshot(1, &tokenizer)).expect("saves");
    assert_eq!(
        init_from(&out, Opening::default()).expect("opens").named(),
        Checkpoint::open(&out).expect("opens").named()
    );
}

/// A tokenizer with a chat template, beside a model whose vocabulary has `n_spare` rows more.
fn write_templated(dir: &Path, n_spare: usize) -> Tokenizer {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/chat_templates.json");
    let recorded: Value = serde_json::from_slice(&fs::read(fixture).expect("there")).expect("JSON");
    let file = recorded["tokenizers"]["byte-level"]["file"].to_string();
    let mut settings = recorded["directories"]["chatml"]["settings"].clone();
    settings["added_tokens_decoder"] = recorded["directories"]["chatml"]["added"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|token| (token["id"].to_string(), json!({ "content": token["content"], "special": true })))
        .collect();
    settings["pad_token"] = json!("<|im_end|>");
    fs::write(dir.join("tokenizer.json"), file).expect("writes");
    fs::write(dir.join("tokenizer_config.json"), settings.to_string()).expect("writes");
    let tokenizer = Tokenizer::load(dir).expect("loads");
    let config = tiny_config(tokenizer.vocab_size() + n_spare);
    let named = Gpt::new(&config, &Streams::new(1), &Device::flex()).to_named();
    let end = tokenizer.token_id("<|im_end|>");
    let tokens = hf::TokenIds { eos: end.into_iter().collect(), pad: end, ..Default::default() };
    hf::write(dir, &config, Head::Lm, &named, &tokens).expect("writes");
    tokenizer
}

#[test]
fn a_model_with_a_template_gets_a_padding_row_and_no_marks() {
    for n_spare in [0, 2] {
        let dir = tempfile::tempdir().expect("a directory");
        let before = write_templated(dir.path(), n_spare);
        let n_old = before.vocab_size();
        let opened = Checkpoint::open(dir.path()).expect("opens");
        let init = init_from(dir.path(), Opening::default()).expect("opens");
        let tokenizer = init.require_tokenizer().expect("there");
        assert_eq!((tokenizer.pad(), tokenizer.vocab_size()), (Some(n_old as u32), n_old + 1));
        assert_eq!(tokenizer.token_id("<|user|>"), None, "conversations are not written our way");
        assert_eq!(tokenizer.chat_template(), before.chat_template());
        assert_eq!(init.model_config().vocab_size, n_old + n_spare.max(1), "spare rows are used first");
        let rows = |checkpoint: &Checkpoint, n: usize| checkpoint.named()["token_embedding"].data[..n * 16].to_vec();
        assert_eq!(rows(&init, n_old), rows(&opened, n_old));

        let out = dir.path().join("out");
        let gpt = init.load_gpt(&Device::flex()).expect("loads");
        let weights = Weights::Lm { named: gpt.to_named(), config: gpt.config().clone() };
        let state = None;
        save(&out, &Snapshot { weights, tokenizer: Some(tokenizer), state, ..snapshot(1, tokenizer) }).expect("saves");
        let saved: Value = serde_json::from_slice(&fs::read(out.join("config.json")).expect("there")).expect("JSON");
        assert_eq!(saved["pad_token_id"], json!(n_old));
        assert_eq!(saved["eos_token_id"], json!(before.token_id("<|im_end|>")));
        let again = init_from(&out, Opening::default()).expect("opens");
        assert_eq!(again.require_tokenizer().expect("there").sha256(), tokenizer.sha256());
        ensure_same_tokenizer(&init, &again).expect("what was saved goes with what it was made from");
    }
}

#[test]
fn an_adapter_on_a_base_that_was_given_tokens_finds_their_embeddings_again() {
    for n_spare in [0, 2] {
        let dir = tempfile::tempdir().expect("a directory");
        write_templated(dir.path(), n_spare);
        let init = init_from(dir.path(), Opening::default()).expect("opens");
        let lora = crate::model::LoraConfig::default();
        let output = crate::model::params::Output::Logits;
        let adapter = init.adapter_to_train(&lora, output, &Streams::new(1)).expect("fits");
        let out = dir.path().join("out");
        let tokenizer = init.require_tokenizer().expect("there");
        let weights = Weights::Adapter { adapter, config: init.model_config().clone(), base: init.base() };
        let (value, state) = (None, None);
        save(&out, &Snapshot { weights, value, state, ..snapshot(1, tokenizer) }).expect("saves");
        let again = Checkpoint::open(&out).expect("opens");
        assert_eq!((again.base(), again.model_config()), (init.base(), init.model_config()));
        let named = |of: &Checkpoint| of.load_gpt(&Device::flex()).expect("loads").to_named();
        // A new adapter adds nothing.
        assert_eq!(named(&again), named(&init));
        ensure_same_tokenizer(&init, &again).expect("the same");
    }
}

#[test]
fn weights_that_are_taken_are_those_that_would_be_copied() {
    let dir = tempfile::tempdir().expect("a directory");
    let (out, tokenizer) = (dir.path().join("ppo"), tokenizer(TokenizerKind::Byte));
    let saved = snapshot(1, &tokenizer);
    save(&out, &saved).expect("saves");
    let (mut checkpoint, device) = (Checkpoint::open(&out).expect("opens"), Device::flex());
    let copied = checkpoint.load_gpt(&device).expect("an LM").to_named();
    assert_eq!(checkpoint.take_gpt(&device).expect("an LM").to_named(), copied);
    assert!(checkpoint.named().is_empty(), "nothing is there twice");
    assert!(checkpoint.take_gpt(&device).is_err(), "they were taken before");

    let mut value = Checkpoint::open(&out.join(VALUE_DIR)).expect("opens");
    let copied = value.load_scalar(&device).expect("a score").to_named();
    assert_eq!(value.take_scalar(&device).expect("a score").to_named(), copied);
    assert!(value.named().is_empty() && value.take_scalar(&device).is_err());
}

#[test]
fn answers_of_a_foreign_model_end_at_every_id_that_its_files_name() {
    let dir = tempfile::tempdir().expect("a directory");
    fs::write(dir.path().join("vocab.json"), "{\"a\": 0, \"b\": 1, \"ab\": 2, \"<|endoftext|>\": 3}").expect("writes");
    fs::write(dir.path().join("merges.txt"), "#version: 0.2\na b\n").expect("writes");
    let config =
        GptConfig { d_model: 8, n_layers: 1, n_heads: 2, d_ff: 32, max_seq_len: 6, dropout: 0.1, ..GptConfig::gpt2(4) };
    let named = Gpt::new(&config, &Streams::new(1), &Device::flex()).to_named();
    let tokens = hf::TokenIds { eos: vec![2, 3], ..Default::default() };
    hf::write(dir.path(), &config, Head::Lm, &named, &tokens).expect("writes");
    let opened = Checkpoint::open(dir.path()).expect("opens");
    assert_eq!(opened.require_tokenizer().expect("there").end_ids(), [3, 2]);

    // Once the conversation's tokens are appended, what is saved ends at `<|end|>` alone.
    let init = init_from(dir.path(), Opening::default()).expect("opens").with_dropout(Some(0.0));
    let tokenizer = init.require_tokenizer().expect("there");
    let out = dir.path().join("out");
    let gpt = init.load_gpt(&Device::flex()).expect("loads");
    assert_eq!(gpt.config().dropout, 0.0);
    let weights = Weights::Lm { named: gpt.to_named(), config: gpt.config().clone() };
    let state = None;
    save(&out, &Snapshot { weights, tokenizer: Some(tokenizer), state, ..snapshot(1, tokenizer) }).expect("saves");
    let saved = Checkpoint::open(&out).expect("opens");
    assert_eq!(saved.require_tokenizer().expect("there").end_ids(), [tokenizer.specials().end]);
    assert_eq!(init.with_dropout(None).model_config().dropout, 0.0);
}
