mod adapter;
mod config;
mod damaged;
mod narrow;

use std::fs;
use std::path::Path;

use burn::tensor::Device;
use half::{bf16, f16};
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};

use super::*;
use crate::{Activation, Gpt, ScalarGpt};
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

fn tokens() -> TokenIds {
    TokenIds { bos: Some(3), eos: vec![4], pad: Some(5) }
}

/// A directory with the preset `gpt2`, tied, as [`write`] leaves it.
fn gpt2() -> (tempfile::TempDir, GptConfig) {
    let dir = tempfile::tempdir().expect("a directory");
    let config = tiny(&GptConfig::gpt2(11));
    write(dir.path(), &config, Head::Lm, &lm(&config), &tokens()).expect("writes");
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
    let error = read(dir).expect_err("refused");
    let source = std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
    format!("{error}{source}").replace(&dir.display().to_string(), "DIR")
}

#[test]
fn what_is_written_reads_back_bit_equal_in_every_architecture() {
    for config in every_config() {
        for (head, tensors) in [(Head::Lm, lm(&config)), (Head::Score { bias: -0.1 }, scalar(&config))] {
            let dir = tempfile::tempdir().expect("a directory");
            let class = write(dir.path(), &config, head, &tensors, &tokens()).expect("writes");
            assert_eq!(class == Class::Kindling, config.norm == NormPlacement::Post && config.d_ff == 24);
            let (model, found, sha256) = read(dir.path()).expect("reads");
            assert_eq!(
                model,
                HostModel { config: config.clone(), head, tensors, narrow: NamedTensors::new() },
                "{config:?}"
            );
            assert_eq!(found, tokens());
            assert_eq!(sha256, sha256_of_file(&dir.path().join(WEIGHTS_FILE)).expect("readable"));
        }
    }
}

/// Writes `tensors` and buffers of types that no weight has, as old versions of transformers did.
fn write_with_buffers(dir: &Path, tensors: &NamedTensors, buffers: &[(&str, Dtype)]) {
    let mut all: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = tensors
        .iter()
        .map(|(name, tensor)| {
            let bytes = tensor.data.iter().flat_map(|x| x.to_le_bytes()).collect();
            (name.clone(), Dtype::F32, tensor.shape.clone(), bytes)
        })
        .collect();
    all.extend(buffers.iter().map(|(name, dtype)| {
        let shape = vec![1, 1, 6, 6];
        ((*name).to_owned(), *dtype, shape, vec![1; 36 * dtype.bitsize() / 8])
    }));
    let views = all.iter().map(|(name, dtype, shape, bytes)| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).expect("valid"))
    });
    safetensors::serialize_to_file(views, None, &dir.join(WEIGHTS_FILE)).expect("writes");
}

#[test]
fn buffers_of_any_type_and_names_without_the_prefix_read_the_same() {
    let masks = ["h.0.attn.bias", "h.1.attn.bias", "h.1.attn.masked_bias", "position_ids"];
    for (config, prefix) in [(GptConfig::gpt2(11), ""), (GptConfig::transformer(11), "transformer.")] {
        let dir = tempfile::tempdir().expect("a directory");
        let config = tiny(&config);
        write(dir.path(), &config, Head::Lm, &lm(&config), &tokens()).expect("writes");
        let (expected, ..) = read(dir.path()).expect("reads");
        let weights = foreign(dir.path());
        let renamed = |name: &String| format!("{prefix}{}", name.trim_start_matches("transformer."));
        let weights: NamedTensors = weights.iter().map(|(name, tensor)| (renamed(name), tensor.clone())).collect();
        for dtype in [Dtype::F32, Dtype::F64, Dtype::I64, Dtype::U8, Dtype::BOOL, Dtype::F8_E4M3] {
            let names = masks.map(|name| format!("{prefix}{name}"));
            let buffers: Vec<(&str, Dtype)> = names.iter().map(|name| (name.as_str(), dtype)).collect();
            write_with_buffers(dir.path(), &weights, &buffers);
            assert_eq!(read(dir.path()).expect("reads").0, expected, "{dtype:?}");
        }
        // Nearly a buffer's name is not one.
        write_with_buffers(dir.path(), &weights, &[("h.x.attn.bias", Dtype::I64)]);
        assert!(message(dir.path()).contains("tensor `transformer.h.x.attn.bias` is not used"));
        write_with_buffers(dir.path(), &weights, &[("h.0.attn.bias.weight", Dtype::I64)]);
        assert!(message(dir.path()).contains("tensor `transformer.h.0.attn.bias.weight` is not used"));
    }
}

#[test]
fn a_tensor_under_two_names_is_an_error() {
    let (dir, _) = gpt2();
    let mut tensors = foreign(dir.path());
    tensors.insert("ln_f.bias".into(), tensors["transformer.ln_f.bias"].clone());
    rewrite(dir.path(), &tensors);
    assert!(message(dir.path()).contains("ln_f.bias` is not used by the model"));
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
    assert!(
        message(dir.path()).starts_with("`DIR/model-1.safetensors`: tensor `transformer.extra` is missing\nhint: ")
    );
    let mut wrong = weight_map.clone();
    let (first, _) = all.iter().next().expect("some tensor");
    wrong.remove(first);
    write_index(&wrong);
    assert!(message(dir.path()).contains(&format!("tensor `{first}` is not used")));
    write_index(&weight_map);
    fs::remove_file(dir.path().join("model-2.safetensors")).expect("removed");
    assert!(message(dir.path()).starts_with("cannot read `DIR/model-2.safetensors`"));
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
    write(dir.path(), &config, Head::Lm, &lm(&config), &tokens()).expect("writes");
    let mut tensors = foreign(dir.path());
    for (shift, positions) in [(5e-7, Positions::Sinusoidal), (5e-6, Positions::Learned)] {
        let table = sinusoid_table(6, 8);
        tensors.get_mut("transformer.positions_embed.weight").expect("written").data[3] = table[3] + shift;
        rewrite(dir.path(), &tensors);
        assert_eq!(read(dir.path()).expect("reads").0.config.positions, positions);
    }
}
