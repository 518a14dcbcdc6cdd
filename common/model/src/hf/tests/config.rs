use super::*;
use crate::{RopeScaling, Rotary};

#[test]
fn a_config_value_that_cannot_be_honoured_is_named() {
    let (dir, config) = gpt2();
    let path = dir.path().join(CONFIG_FILE);
    let good: Value = serde_json::from_slice(&fs::read(&path).expect("there")).expect("JSON");
    let with = |key: &str, value: Value| {
        let mut json = good.clone();
        json[key] = value;
        fs::write(&path, json.to_string()).expect("writes");
        message(dir.path())
    };
    for (key, value, expected) in [
        ("model_type", json!("gemma"), "`model_type` is gemma, expected `gpt2`, `openai-gpt`, `llama`, `mistral`,"),
        ("architectures", json!(["GPT2Model"]), "`architectures` is GPT2Model, expected `GPT2LMHeadModel` or"),
        (
            "architectures",
            json!("GPT2LMHeadModel"),
            "`architectures` is \"GPT2LMHeadModel\", expected a list of one class name",
        ),
        ("model_type", Value::Null, "lacks the key `model_type`"),
        ("activation_function", json!("gelu"), "`activation_function` is gelu, expected `gelu_new` or `relu`"),
        ("scale_attn_by_inverse_layer_idx", json!(true), "`scale_attn_by_inverse_layer_idx` is true, expected `false`"),
        ("scale_attn_weights", json!(false), "`scale_attn_weights` is false, expected `true`"),
        ("add_cross_attention", json!(true), "`add_cross_attention` is true, expected `false`"),
        ("n_inner", json!(-3), "`n_inner` is -3, expected a whole number from 1 to 16777216"),
        ("n_layer", json!(0), "`n_layer` is 0, expected a whole number from 1 to 16777216"),
        ("n_head", json!(3), "`d_model` 8 is not a multiple of `n_heads` 3"),
        ("vocab_size", json!(12), "tensor `transformer.wte.weight` has shape [11, 8], expected [12, 8]"),
        ("n_embd", Value::Null, "tensor `transformer.wte.weight` has shape [11, 8], expected [11, 768]"),
        ("n_layer", json!(3), "tensor `transformer.h.2.ln_1.weight` is missing"),
        ("n_layer", json!(1), "tensor `transformer.h.1.attn.c_attn.bias` is not used by the model"),
        ("n_layer", json!(1 << 24), "tensor `transformer.h.2.ln_1.weight` is missing"),
        ("n_layer", json!(u64::MAX), "`n_layer` is 18446744073709551615, expected a whole number from 1 to 16777216"),
        (
            "n_embd",
            json!(1_000_000_000_000_u64),
            "`n_embd` is 1000000000000, expected a whole number from 1 to 16777216",
        ),
        ("n_embd", json!(1 << 21), "config.json`: model: the sizes make "),
        ("n_positions", json!(1 << 24), "tensor `transformer.wpe.weight` has shape [6, 8], expected [16777216, 8]"),
        ("layer_norm_epsilon", json!(1e300), "`layer_norm_eps` must be a positive number that 32 bits hold, found 1"),
        (
            "layer_norm_epsilon",
            json!(1e-300),
            "`layer_norm_eps` must be a positive number that 32 bits hold, found 0.0",
        ),
        ("layer_norm_epsilon", json!(-1), "`layer_norm_eps` must be a positive number that 32 bits hold, found -1"),
        ("resid_pdrop", json!(1e300), "`dropout` must lie in [0, 1), found 1"),
        ("tie_word_embeddings", json!("yes"), "`tie_word_embeddings` is \"yes\", expected a boolean"),
        ("eos_token_id", json!("end"), "`eos_token_id` is \"end\", expected a token id or a list of them"),
        ("eos_token_id", json!([4, u64::MAX]), "`eos_token_id` is [4,18446744073709551615], expected a token id"),
    ] {
        let found = with(key, value);
        assert!(found.contains(expected), "{key}: {found}");
    }
    // A width of its own is honoured, so the tensors no longer fit.
    assert!(
        with("n_inner", json!(24))
            .contains("tensor `transformer.h.0.mlp.c_fc.weight` has shape [8, 32], expected [8, 24]")
    );

    write(dir.path(), &config, Head::Score { bias: 0.0 }, &scalar(&config), &tokens()).expect("writes");
    let good: Value = serde_json::from_slice(&fs::read(&path).expect("there")).expect("JSON");
    let mut json = good.clone();
    json["num_labels"] = json!(2);
    fs::write(&path, json.to_string()).expect("writes");
    assert!(message(dir.path()).contains("`num_labels` is 2 labels, expected 1 label, the score"));
    json["num_labels"] = json!(1);
    json["score_bias"] = json!(1e300);
    fs::write(&path, json.to_string()).expect("writes");
    assert!(message(dir.path()).contains("`score_bias` is 1"));
    // As transformers writes it.
    json.as_object_mut().expect("an object").remove("num_labels");
    json.as_object_mut().expect("an object").remove("score_bias");
    fs::write(&path, json.to_string()).expect("writes");
    assert_eq!(read(dir.path()).expect("reads").0.head, Head::Score { bias: 0.0 });
}

/// Changes keys of the file at `path`; a key set to `Value::Null` is left out.
fn edit(path: &Path, keys: &[(&str, Value)]) {
    let mut json: Value = serde_json::from_slice(&fs::read(path).expect("there")).expect("JSON");
    let object = json.as_object_mut().expect("an object");
    for (key, value) in keys {
        match value {
            Value::Null => drop(object.remove(*key)),
            _ => drop(object.insert((*key).to_owned(), value.clone())),
        }
    }
    fs::write(path, json.to_string()).expect("writes");
}

#[test]
fn keys_that_are_absent_have_the_values_of_transformers_classes() {
    // `GPT2Config()` and `OpenAIGPTConfig()` of transformers 5.23.
    let expected = [
        ("gpt2", 50_257, 1024, NormPlacement::Pre, Activation::GeluTanh, (Some(50_256), vec![50_256])),
        ("openai-gpt", 40_478, 512, NormPlacement::Post, Activation::GeluTanh, (None, vec![])),
    ];
    let dir = tempfile::tempdir().expect("a directory");
    for (model_type, vocab_size, max_seq_len, norm, activation, (bos, eos)) in expected {
        fs::write(dir.path().join(CONFIG_FILE), json!({ "model_type": model_type }).to_string()).expect("writes");
        let parsed = Parsed::read(dir.path()).expect("valid");
        let config = GptConfig {
            vocab_size,
            d_model: 768,
            n_layers: 12,
            n_heads: 12,
            d_ff: 3072,
            max_seq_len,
            dropout: 0.1,
            positions: Positions::Learned,
            norm,
            activation,
            ..GptConfig::gpt2(vocab_size)
        };
        assert_eq!((parsed.head, parsed.config), (None, config));
        assert_eq!(parsed.tokens, TokenIds { bos, eos, pad: None });
    }
    let general = json!({ "model_type": "gpt2", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "max_position_embeddings": 32 });
    fs::write(dir.path().join(CONFIG_FILE), general.to_string()).expect("writes");
    let GptConfig { d_model, n_layers, n_heads, max_seq_len, d_ff, .. } =
        Parsed::read(dir.path()).expect("valid").config;
    assert_eq!((d_model, n_layers, n_heads, max_seq_len, d_ff), (64, 3, 4, 32, 256));
}

/// What config.json alone says, or why it is refused.
fn parsed(json: &Value) -> Result<Parsed, String> {
    let dir = tempfile::tempdir().expect("a directory");
    fs::write(dir.path().join(CONFIG_FILE), json.to_string()).expect("writes");
    Parsed::read(dir.path()).map_err(|error| error.to_string())
}

#[test]
fn defaults_of_later_families_are_those_of_transformers() {
    // `LlamaConfig()`, `Qwen2Config()`, `Qwen3Config()`, `GPTNeoXConfig()` of transformers 5.23.
    let of = |model_type: &str| parsed(&json!({ "model_type": model_type })).expect("valid").config;
    let llama = of("llama");
    assert_eq!((llama.vocab_size, llama.d_model, llama.d_ff, llama.max_seq_len), (32_000, 4096, 11_008, 2048));
    assert_eq!((llama.n_kv_heads(), llama.d_head(), llama.tie_embeddings, llama.qkv_bias), (32, 128, false, false));
    let qwen2 = of("qwen2");
    assert_eq!((qwen2.vocab_size, qwen2.d_ff, qwen2.max_seq_len), (151_936, 22_016, 32_768));
    assert_eq!((qwen2.qkv_bias, qwen2.proj_bias, qwen2.mlp_bias, qwen2.qk_norm), (true, false, false, false));
    let qwen3 = of("qwen3");
    assert_eq!((qwen3.d_head(), qwen3.qk_norm, qwen3.qkv_bias), (128, true, false));
    let neox = of("gpt_neox");
    assert_eq!((neox.d_model, neox.n_layers, neox.rotary.fraction, neox.parallel), (6144, 44, 0.25, true));
    assert_eq!(neox.activation, Activation::Gelu);
}

#[test]
fn rotary_positions_are_read_from_new_files_and_old() {
    let of = |more: Value| {
        let mut json = json!({ "model_type": "llama" });
        json.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        parsed(&json).map(|parsed| parsed.config.rotary)
    };
    let plain = Rotary::default();
    assert_eq!(of(json!({})), Ok(plain));
    assert_eq!(of(json!({ "rope_theta": 5e5, "rope_scaling": null })), Ok(Rotary { theta: 5e5, ..plain }));
    let linear = RopeScaling::Linear { factor: 2.0 };
    assert_eq!(
        of(json!({ "rope_theta": 5e5, "rope_scaling": { "type": "linear", "factor": 2.0 } })),
        Ok(Rotary { theta: 5e5, scaling: linear, ..plain })
    );
    let llama3 = json!({ "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192 });
    let expected = RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original: 8192 };
    assert_eq!(of(json!({ "rope_parameters": llama3 })), Ok(Rotary { theta: 5e5, scaling: expected, ..plain }));
    for (rope, part) in [
        (
            json!({ "rope_type": "yarn", "factor": 4.0 }),
            "`rope_type` is yarn, expected `default`, `linear` or `llama3`",
        ),
        (json!({ "rope_type": "dynamic", "factor": 4.0 }), "`rope_type` is dynamic"),
        (json!({ "rope_type": "linear" }), "expected an object with `factor`"),
        (json!({ "rope_type": "linear", "factor": 0.0 }), "every number must be finite and above 0"),
        (json!({ "rope_theta": -1.0 }), "every number must be finite and above 0"),
    ] {
        let error = of(json!({ "rope_parameters": rope })).expect_err("refused");
        assert!(error.contains(part), "{rope}: {error}");
    }
    let neox = parsed(&json!({ "model_type": "gpt_neox", "rotary_pct": 1.0, "rotary_emb_base": 5000 })).expect("valid");
    assert_eq!((neox.config.rotary.theta, neox.config.rotary.fraction), (5000.0, 1.0));
}

#[test]
fn what_would_be_computed_differently_is_refused_by_name() {
    for (json, part) in [
        (json!({ "model_type": "mistral" }), "`sliding_window` is 4096, expected `null`"),
        (json!({ "model_type": "mistral", "sliding_window": 512 }), "`sliding_window` is 512"),
        (
            json!({ "model_type": "qwen2", "sliding_window": 512, "use_sliding_window": true }),
            "`sliding_window` is 512",
        ),
        (
            json!({ "model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"] }),
            "`layer_types` is \"sliding_attention\"",
        ),
        (
            json!({ "model_type": "llama", "quantization_config": { "quant_method": "gptq" } }),
            "`quantization_config` is gptq, expected weights in f32, f16 or bf16",
        ),
        (json!({ "model_type": "llama", "hidden_act": "gelu" }), "`hidden_act` is gelu, expected `silu`"),
        (
            json!({ "model_type": "llama", "num_key_value_heads": 3 }),
            "`n_heads` 32 is not a multiple of `n_kv_heads` 3",
        ),
        (json!({ "model_type": "qwen3", "head_dim": 7 }), "turn 7 of a head's 7 channels"),
    ] {
        let error = parsed(&json).expect_err("refused");
        assert!(error.contains(part), "{json}: {error}");
    }
    // Named, but not used.
    assert!(parsed(&json!({ "model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": false })).is_ok());
    assert!(parsed(&json!({ "model_type": "mistral", "sliding_window": null })).is_ok());
}

#[test]
fn a_model_without_a_named_architecture_is_known_by_its_head() {
    let (dir, config) = gpt2();
    edit(&dir.path().join(CONFIG_FILE), &[("architectures", Value::Null)]);
    assert_eq!(read(dir.path()).expect("reads").0.head, Head::Lm);
    write(dir.path(), &config, Head::Score { bias: 0.0 }, &scalar(&config), &tokens()).expect("writes");
    edit(&dir.path().join(CONFIG_FILE), &[("architectures", Value::Null)]);
    assert_eq!(read(dir.path()).expect("reads").0.head, Head::Score { bias: 0.0 });
}

#[test]
fn end_tokens_come_from_both_files_one_or_several() {
    let (dir, _) = gpt2();
    let eos = |of_config: Option<Value>, of_generation: Option<Value>| {
        for (file, value) in [(CONFIG_FILE, of_config), (GENERATION_FILE, of_generation)] {
            edit(&dir.path().join(file), &[("eos_token_id", Value::Null)]);
            let Some(value) = value else { continue };
            let mut json: Value =
                serde_json::from_slice(&fs::read(dir.path().join(file)).expect("there")).expect("JSON");
            json["eos_token_id"] = value;
            fs::write(dir.path().join(file), json.to_string()).expect("writes");
        }
        read(dir.path()).expect("reads").1.eos
    };
    assert_eq!(eos(Some(json!(4)), None), [4]);
    assert_eq!(eos(None, Some(json!(4))), [4]);
    assert_eq!(eos(Some(json!(4)), Some(json!([7, 4, 9]))), [7, 4, 9]);
    assert_eq!(eos(Some(json!([4, 5])), Some(json!(7))), [7, 4, 5]);
    // GPT-2's default, 50256, lies outside this vocabulary, and so does what a smaller tokenizer never gives.
    assert_eq!(eos(None, None), [0_u32; 0]);
    assert_eq!(eos(Some(json!([4, 50_256])), Some(json!(-1))), [4]);
    assert_eq!(eos(Some(Value::Null), None), [0_u32; 0]);
    fs::remove_file(dir.path().join(GENERATION_FILE)).expect("removed");
    assert_eq!(read(dir.path()).expect("reads").1.eos, [0_u32; 0]);
    fs::write(dir.path().join(GENERATION_FILE), "{").expect("writes");
    assert!(message(dir.path()).starts_with("`DIR/generation_config.json` is damaged or cut short: "));
}

#[test]
fn several_end_tokens_are_written_as_a_list_and_one_as_a_number() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = tiny(&GptConfig::gpt2(11));
    for (eos, expected) in [(vec![], Value::Null), (vec![4], json!(4)), (vec![4, 7], json!([4, 7]))] {
        let tokens = TokenIds { eos, ..tokens() };
        write(dir.path(), &config, Head::Lm, &lm(&config), &tokens).expect("writes");
        for file in [CONFIG_FILE, GENERATION_FILE] {
            let json: Value = serde_json::from_slice(&fs::read(dir.path().join(file)).expect("there")).expect("JSON");
            assert_eq!(json["eos_token_id"], expected, "{file}");
        }
        assert_eq!(read(dir.path()).expect("reads").1, tokens);
    }
}
