use std::fs;
use std::path::Path;

use burn::tensor::Device;
use half::{bf16, f16};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use super::*;
use crate::{Activation, Gpt, ScalarGpt, param_paths};
use base::hash::sha256_of_file;
use base::rng::Streams;

fn tiny(config: &GptConfig) -> GptConfig {
    GptConfig { d_model: 8, n_layers: 2, n_heads: 2, d_ff: 32, max_seq_len: 6, ..config.clone() }
}

/// Every switch in every position, and a feed-forward width that one class has no place for.
fn every_config() -> Vec<GptConfig> {
    let mut configs = Vec::new();
    for norm in [NormPlacement::Pre, NormPlacement::Post] {
        for positions in [Positions::Sinusoidal, Positions::Learned] {
            for activation in [Activation::Relu, Activation::GeluTanh] {
                for (tie_embeddings, d_ff) in [(true, 32), (false, 24)] {
                    let base = tiny(&GptConfig::transformer(11));
                    configs.push(GptConfig {
                        norm,
                        positions,
                        activation,
                        tie_embeddings,
                        d_ff,
                        dropout: 0.25,
                        ..base
                    });
                }
            }
        }
    }
    configs
}

fn lm(config: &GptConfig) -> NamedTensors {
    Gpt::new(config, &Streams::new(1), &Device::flex()).to_named()
}

fn scalar(config: &GptConfig) -> NamedTensors {
    ScalarGpt::new(Gpt::new(config, &Streams::new(1), &Device::flex()), &Streams::new(2)).to_named()
}

const TOKENS: TokenIds = TokenIds { bos: Some(3), eos: Some(4), pad: Some(5) };

/// A directory with the preset `gpt2`, tied, as [`write`] leaves it.
fn gpt2() -> (tempfile::TempDir, GptConfig) {
    let dir = tempfile::tempdir().expect("a directory");
    let config = tiny(&GptConfig::gpt2(11));
    write(dir.path(), &config, Head::Lm, &lm(&config), TOKENS).expect("writes");
    (dir, config)
}

/// Every tensor of the file in `dir` by its foreign name.
fn foreign(dir: &Path) -> NamedTensors {
    read_file(&dir.join(WEIGHTS_FILE), |_| true).expect("readable").0
}

fn rewrite(dir: &Path, tensors: &NamedTensors) {
    write_file(&dir.join(WEIGHTS_FILE), tensors.iter().map(|(name, tensor)| (name.clone(), tensor))).expect("writes");
}

fn message(dir: &Path) -> String {
    read(dir).expect_err("refused").to_string().replace(&dir.display().to_string(), "DIR")
}

#[test]
fn the_names_are_those_of_the_modules_in_every_architecture() {
    for config in every_config() {
        let gpt = Gpt::new(&config, &Streams::new(1), &Device::flex());
        let mut of_model = param_paths(&gpt);
        let mut of_names: Vec<(String, Vec<usize>)> =
            names::entries(Class::of(&config), &config, Head::Lm).into_iter().map(|e| (e.ours, e.shape)).collect();
        of_model.sort();
        of_names.sort();
        assert_eq!(of_names, of_model, "{config:?}");
    }
}

#[test]
fn what_is_written_reads_back_bit_equal_in_every_architecture() {
    for config in every_config() {
        for (head, tensors) in [(Head::Lm, lm(&config)), (Head::Score { bias: -0.1 }, scalar(&config))] {
            let dir = tempfile::tempdir().expect("a directory");
            let class = write(dir.path(), &config, head, &tensors, TOKENS).expect("writes");
            assert_eq!(class == Class::Kindling, config.norm == NormPlacement::Post && config.d_ff == 24);
            let (model, tokens, sha256) = read(dir.path()).expect("reads");
            assert_eq!(model, HostModel { config: config.clone(), head, tensors }, "{config:?}");
            assert_eq!(tokens, TOKENS);
            assert_eq!(sha256, sha256_of_file(&dir.path().join(WEIGHTS_FILE)).expect("readable"));
        }
    }
}

#[test]
fn a_file_without_the_prefix_and_with_mask_buffers_reads_the_same() {
    let (dir, _) = gpt2();
    let (expected, ..) = read(dir.path()).expect("reads");
    let mut old: NamedTensors = foreign(dir.path())
        .into_iter()
        .map(|(name, tensor)| (name.trim_start_matches("transformer.").to_owned(), tensor))
        .collect();
    let buffer = HostTensor { shape: vec![1, 1, 2, 2], data: vec![1.0, 0.0, 1.0, 1.0] };
    old.insert("h.0.attn.bias".into(), buffer.clone());
    old.insert("h.1.attn.masked_bias".into(), buffer);
    rewrite(dir.path(), &old);
    assert_eq!(read(dir.path()).expect("reads").0, expected);
}

#[test]
fn half_precision_is_widened() {
    type Narrow = fn(f32) -> [u8; 2];
    let (dir, _) = gpt2();
    let exact = foreign(dir.path());
    let narrow: [(Dtype, Narrow, f32); 2] = [
        (Dtype::F16, |x| f16::from_f32(x).to_le_bytes(), 1e-3),
        (Dtype::BF16, |x| bf16::from_f32(x).to_le_bytes(), 1e-2),
    ];
    for (dtype, narrow, relative) in narrow {
        let bytes: Vec<(&String, &HostTensor, Vec<u8>)> = exact
            .iter()
            .map(|(name, tensor)| (name, tensor, tensor.data.iter().flat_map(|&x| narrow(x)).collect()))
            .collect();
        let views = bytes.iter().map(|(name, tensor, bytes)| {
            (name.as_str(), TensorView::new(dtype, tensor.shape.clone(), bytes).expect("valid"))
        });
        safetensors::serialize_to_file(views, None, &dir.path().join(WEIGHTS_FILE)).expect("writes");
        for (name, tensor) in foreign(dir.path()) {
            let close = |(a, b): (&f32, &f32)| (a - b).abs() <= relative * b.abs() + 1e-6;
            assert!(tensor.data.iter().zip(&exact[&name].data).all(close), "{name}");
        }
        read(dir.path()).expect("reads");
    }
}

#[test]
fn shards_with_an_index_read_as_one_file() {
    let (dir, _) = gpt2();
    let (expected, ..) = read(dir.path()).expect("reads");
    let all = foreign(dir.path());
    fs::remove_file(dir.path().join(WEIGHTS_FILE)).expect("removed");
    let mut weight_map = serde_json::Map::new();
    for shard_idx in 0..3 {
        let shard = format!("model-{shard_idx}.safetensors");
        let part: Vec<(String, &HostTensor)> =
            all.iter().skip(shard_idx).step_by(3).map(|(name, tensor)| (name.clone(), tensor)).collect();
        weight_map.extend(part.iter().map(|(name, _)| (name.clone(), json!(shard))));
        write_file(&dir.path().join(shard), part).expect("writes");
    }
    let write_index = |weight_map: &serde_json::Map<String, Value>| {
        let index = json!({ "metadata": {}, "weight_map": weight_map });
        fs::write(dir.path().join(INDEX_FILE), index.to_string()).expect("writes");
    };
    write_index(&weight_map);
    assert_eq!(read(dir.path()).expect("reads").0, expected);

    let mut wrong = weight_map.clone();
    wrong.insert("transformer.wte.weight".into(), json!("../model-0.safetensors"));
    write_index(&wrong);
    assert!(message(dir.path()).contains("`../model-0.safetensors` is not a file name"));
    let mut wrong = weight_map.clone();
    wrong.insert("transformer.extra".into(), json!("model-1.safetensors"));
    write_index(&wrong);
    assert_eq!(message(dir.path()), "`DIR/model-1.safetensors`: tensor `transformer.extra` is missing");
    let mut wrong = weight_map.clone();
    let (first, _) = all.iter().next().expect("some tensor");
    wrong.remove(first);
    write_index(&wrong);
    assert!(message(dir.path()).contains(&format!("tensor `{first}` is not used")));
    write_index(&weight_map);
    fs::remove_file(dir.path().join("model-2.safetensors")).expect("removed");
    assert!(message(dir.path()).starts_with("failed to read `DIR/model-2.safetensors`"));
}

#[test]
fn a_tied_head_that_is_written_out_is_dropped_and_one_that_differs_is_kept() {
    let (dir, config) = gpt2();
    let (expected, ..) = read(dir.path()).expect("reads");
    let mut tensors = foreign(dir.path());
    let mut head = tensors["transformer.wte.weight"].clone();
    tensors.insert("lm_head.weight".into(), head.clone());
    rewrite(dir.path(), &tensors);
    assert_eq!(read(dir.path()).expect("reads").0, expected);
    head.data[0] += 1.0;
    tensors.insert("lm_head.weight".into(), head.clone());
    rewrite(dir.path(), &tensors);
    let model = read(dir.path()).expect("reads").0;
    assert_eq!(model.config, GptConfig { tie_embeddings: false, ..config });
    assert_eq!(model.tensors["head"], head);
}

#[test]
fn a_position_table_is_sinusoidal_only_if_it_is_within_rounding() {
    let dir = tempfile::tempdir().expect("a directory");
    let config = tiny(&GptConfig::transformer(11));
    write(dir.path(), &config, Head::Lm, &lm(&config), TOKENS).expect("writes");
    let mut tensors = foreign(dir.path());
    for (shift, positions) in [(5e-7, Positions::Sinusoidal), (5e-6, Positions::Learned)] {
        let table = sinusoid_table(6, 8);
        tensors.get_mut("transformer.positions_embed.weight").expect("written").data[3] = table[3] + shift;
        rewrite(dir.path(), &tensors);
        assert_eq!(read(dir.path()).expect("reads").0.config.positions, positions);
    }
}

#[test]
fn a_tensor_that_is_missing_unused_misshapen_or_not_finite_is_named() {
    let (dir, _) = gpt2();
    let good = foreign(dir.path());
    let changed = |change: fn(&mut NamedTensors)| {
        let mut tensors = good.clone();
        change(&mut tensors);
        rewrite(dir.path(), &tensors);
        message(dir.path())
    };
    assert_eq!(
        changed(|t| drop(t.remove("transformer.h.1.mlp.c_fc.bias"))),
        "`DIR/model.safetensors`: tensor `transformer.h.1.mlp.c_fc.bias` is missing"
    );
    assert_eq!(
        changed(|t| drop(t.insert("transformer.h.2.ln_1.bias".into(), HostTensor { shape: vec![1], data: vec![0.0] }))),
        "`DIR/model.safetensors`: tensor `transformer.h.2.ln_1.bias` is not used by the model that config.json describes"
    );
    assert_eq!(
        changed(|t| t.get_mut("transformer.wte.weight").expect("there").shape = vec![8, 11]),
        "`DIR/model.safetensors`: tensor `transformer.wte.weight` has shape [8, 11], expected [11, 8]"
    );
    // `write_file` refuses such a number, so it is put into the bytes.
    rewrite(dir.path(), &good);
    let path = dir.path().join(WEIGHTS_FILE);
    let mut bytes = fs::read(&path).expect("there");
    let end = bytes.len();
    bytes[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, bytes).expect("writes");
    assert_eq!(
        message(dir.path()),
        "`DIR/model.safetensors`: tensor `transformer.wte.weight` holds NaN; every number must be finite"
    );
    let mut tensors = good.clone();
    tensors.get_mut("transformer.wte.weight").expect("there").data[0] = f32::INFINITY;
    let named = tensors.iter().map(|(name, tensor)| (name.clone(), tensor));
    let refused = write_file(&path, named).expect_err("not finite").to_string();
    assert!(refused.contains("tensor `transformer.wte.weight` holds inf"), "{refused}");
}

#[test]
fn a_truncated_damaged_or_absent_file_is_named() {
    let (dir, _) = gpt2();
    let path = dir.path().join(WEIGHTS_FILE);
    let whole = fs::read(&path).expect("there");
    for length in [0, 4, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..length]).expect("writes");
        let message = message(dir.path());
        assert!(message.starts_with("`DIR/model.safetensors` is damaged or cut short: "), "{length}: {message}");
    }
    fs::write(&path, "not a safetensors file at all").expect("writes");
    assert!(message(dir.path()).contains("is damaged or cut short"));
    fs::rename(&path, dir.path().join("pytorch_model.bin")).expect("moved");
    assert!(message(dir.path()).starts_with("no weights in `DIR`: expected `model.safetensors` or"));
    assert!(message(dir.path()).contains("hint: `pytorch_model.bin` is not read"));
    fs::write(dir.path().join(CONFIG_FILE), "{").expect("writes");
    assert!(message(dir.path()).starts_with("`DIR/config.json` is damaged or cut short: "));
    fs::remove_file(dir.path().join(CONFIG_FILE)).expect("removed");
    assert!(message(dir.path()).starts_with("failed to read `DIR/config.json`"));
}

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
        ("model_type", json!("llama"), "`model_type` is llama, expected `gpt2`, `openai-gpt` or `kindling`"),
        ("architectures", json!(["GPT2Model"]), "`architectures` is GPT2Model, expected `GPT2LMHeadModel` or"),
        ("architectures", Value::Null, "`architectures` is null, expected a list of one class name"),
        ("activation_function", json!("gelu"), "`activation_function` is gelu, expected `gelu_new` or `relu`"),
        ("scale_attn_by_inverse_layer_idx", json!(true), "`scale_attn_by_inverse_layer_idx` is true, expected `false`"),
        ("scale_attn_weights", json!(false), "`scale_attn_weights` is false, expected `true`"),
        ("add_cross_attention", json!(true), "`add_cross_attention` is true, expected `false`"),
        ("n_inner", json!(-3), "`n_inner` is -3, expected a whole number from 1 to 1073741824"),
        ("n_layer", json!(0), "`n_layer` is 0, expected a whole number from 1 to 1073741824"),
        ("n_head", json!(3), "`d_model` 8 is not a multiple of `n_heads` 3"),
        ("vocab_size", json!(12), "tensor `transformer.wte.weight` has shape [11, 8], expected [12, 8]"),
        ("n_embd", Value::Null, "lacks the key `n_embd`"),
        ("tie_word_embeddings", json!("yes"), "`tie_word_embeddings` is \"yes\", expected a boolean"),
        ("eos_token_id", json!("end"), "`eos_token_id` is \"end\", expected a token id"),
    ] {
        let found = with(key, value);
        assert!(found.contains(expected), "{key}: {found}");
    }
    // A width of its own is honoured, so the tensors no longer fit.
    assert!(
        with("n_inner", json!(24))
            .contains("tensor `transformer.h.0.mlp.c_fc.weight` has shape [8, 32], expected [8, 24]")
    );

    write(dir.path(), &config, Head::Score { bias: 0.0 }, &scalar(&config), TOKENS).expect("writes");
    let good: Value = serde_json::from_slice(&fs::read(&path).expect("there")).expect("JSON");
    let mut json = good.clone();
    json["num_labels"] = json!(2);
    fs::write(&path, json.to_string()).expect("writes");
    assert!(message(dir.path()).contains("`num_labels` is 2 labels, expected 1 label, the score"));
    // As transformers writes it.
    json.as_object_mut().expect("an object").remove("num_labels");
    json.as_object_mut().expect("an object").remove("score_bias");
    fs::write(&path, json.to_string()).expect("writes");
    assert_eq!(read(dir.path()).expect("reads").0.head, Head::Score { bias: 0.0 });
}
