use super::*;
use crate::hf::adapter::{ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, AdapterFiles, Base, HostAdapter};
use crate::hf::{adapters_of, read_adapter, write_adapter};
use crate::{LoraConfig, params::Output};

fn config() -> GptConfig {
    GptConfig { d_model: 8, n_layers: 1, n_heads: 2, d_ff: 12, max_seq_len: 6, ..GptConfig::llama(11) }
}

/// A directory with an adapter of rank 2 on `config`.
fn written(head: Head) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let lora =
        LoraConfig { rank: 2, alpha: 4.0, targets: vec!["q_proj".into(), "v_proj".into()], ..LoraConfig::default() };
    let adapters = adapters_of(&config(), &lora).expect("known");
    let mut tensors = adapters.initial(&config(), head.output(), &base::rng::Streams::new(0));
    if head.output() == Output::Score {
        tensors.insert("score.weight".into(), HostTensor { shape: vec![1, 8], data: vec![0.5; 8] });
    }
    let adapter = HostAdapter { adapters, head, tensors };
    write_adapter(dir.path(), &config(), &adapter, &Base::default(), &TokenIds::default()).expect("writes");
    dir
}

/// What reading the adapter in `dir` beside a base of `config` says, with the directory as `DIR`.
fn refused(dir: &Path, config: &GptConfig) -> String {
    let read = AdapterFiles::read(dir).and_then(|files| read_adapter(dir, &files, config));
    read.expect_err("refused").to_string().replace(&dir.display().to_string(), "DIR")
}

/// The message after one key of `adapter_config.json` was changed.
fn with_key(key: &str, value: Value) -> String {
    let dir = written(Head::Lm);
    let path = dir.path().join(ADAPTER_CONFIG_FILE);
    let mut json: Value = serde_json::from_str(&fs::read_to_string(&path).expect("there")).expect("JSON");
    json[key] = value;
    fs::write(&path, json.to_string()).expect("writes");
    refused(dir.path(), &config())
}

#[test]
fn an_adapter_that_computes_something_else_is_refused_by_the_setting() {
    for (key, value, found, expected) in [
        ("use_dora", json!(true), "true", "`false`"),
        ("rank_pattern", json!({ "q_proj": 4 }), "{\"q_proj\":4}", "none: one rank for all layers"),
        ("alpha_pattern", json!({ "q_proj": 4 }), "{\"q_proj\":4}", "none: one `lora_alpha` for all layers"),
        ("layer_replication", json!([[0, 1], [0, 1]]), "[[0,1],[0,1]]", "`null`: the layers of the base"),
        ("layers_to_transform", json!([0]), "[0]", "`null`: all layers"),
        ("layers_to_transform", json!(0), "0", "`null`: all layers"),
        ("exclude_modules", json!("k_proj"), "k_proj", "`null`"),
        ("lora_bias", json!(true), "true", "`false`"),
        ("bias", json!("all"), "all", "`none`: the biases of the base"),
        ("trainable_token_indices", json!([3]), "[3]", "`null`: the embeddings of the base"),
        ("peft_type", json!("IA3"), "IA3", "`LORA`"),
        ("task_type", json!("SEQ_2_SEQ_LM"), "SEQ_2_SEQ_LM", "`CAUSAL_LM` or `SEQ_CLS`"),
        ("modules_to_save", json!(["embed_tokens"]), "[\"embed_tokens\"]", "none: weights of the base as they are"),
        ("target_modules", json!(".*_proj"), ".*_proj", "a list of names, or `all-linear`"),
        (
            "init_lora_weights",
            json!("pissa"),
            "pissa",
            "`true`, or a way to begin that leaves the weights of the base as they are",
        ),
    ] {
        assert_eq!(with_key(key, value), format!("`DIR/adapter_config.json`: `{key}` is {found}, expected {expected}"));
    }
    assert_eq!(with_key("r", Value::Null), "`DIR/adapter_config.json` lacks the key `r`");
    assert!(
        with_key("target_modules", json!(["q_prj"])).starts_with("`q_prj` is no linear layer of this model\nhint: ")
    );
}

#[test]
fn an_adapter_of_another_rank_shape_or_base_is_refused_by_the_tensor() {
    let q_proj = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
    assert_eq!(
        with_key("r", json!(3)),
        format!(
            "`DIR/adapter_model.safetensors`: tensor `{q_proj}` has shape [2, 8], expected [3, 8] for rank 3 on this base\n\
             hint: the adapter was made for another base, or with another rank than `adapter_config.json` says"
        )
    );
    assert_eq!(
        with_key("target_modules", json!(["q_proj"])),
        "`DIR/adapter_model.safetensors`: tensor `base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight` has no place \
         beside this base and these targets\nhint: the adapter was made for another base, or its files are not of one adapter"
    );
    let dir = written(Head::Lm);
    let wider = GptConfig { d_model: 12, ..config() };
    assert!(refused(dir.path(), &wider).contains("has shape [2, 8], expected [2, 12] for rank 2"));
    let deeper = GptConfig { n_layers: 2, ..config() };
    assert!(refused(dir.path(), &deeper).contains("layers.1.self_attn.q_proj.lora_A.weight` is missing\nhint: "));
    let of_neox = GptConfig { d_model: 8, n_heads: 2, n_layers: 1, ..GptConfig::gpt_neox(11) };
    assert!(refused(dir.path(), &of_neox).starts_with("`q_proj` is no linear layer of this model"));
}

#[test]
fn a_reward_models_adapter_without_its_head_is_refused() {
    let dir = written(Head::Score { bias: 0.5 });
    let files = AdapterFiles::read(dir.path()).expect("reads");
    assert_eq!(files.head, Head::Score { bias: 0.5 });
    let path = dir.path().join(ADAPTER_WEIGHTS_FILE);
    let (tensors, _) = read_file(&path, |name| !name.contains("score")).expect("reads");
    write_file(&path, tensors.iter().map(|(name, tensor)| (name.clone(), tensor))).expect("writes");
    assert_eq!(
        refused(dir.path(), &config()),
        "`DIR/adapter_model.safetensors` is the adapter of a reward model and lacks its head `base_model.model.score.weight`\n\
         hint: without the head there are no scores; save the adapter again, with `score` among `modules_to_save`"
    );
    fs::rename(&path, dir.path().join("adapter_model.bin")).expect("moved");
    assert_eq!(
        refused(dir.path(), &config()),
        "no weights in `DIR`: expected `adapter_model.safetensors`\nhint: `adapter_model.bin` is not read; load it with PEFT and \
         `save_pretrained` it again"
    );
}
