use burn::tensor::Device;
use proptest::prelude::*;

use super::*;
use crate::{Gpt, ScalarGpt, param_paths};

fn configs() -> impl Strategy<Value = GptConfig> {
    let norm = prop_oneof![Just(NormPlacement::Pre), Just(NormPlacement::Post)];
    let positions = prop_oneof![Just(Positions::Learned), Just(Positions::Sinusoidal)];
    let gpt = (norm, positions, any::<bool>(), 1..3usize, 1..4usize, 1..4usize, 1..9usize, 1..9usize).prop_map(
        |(norm, positions, tie_embeddings, n_layers, n_heads, half_head, d_ff, vocab_size)| GptConfig {
            norm,
            positions,
            tie_embeddings,
            n_layers,
            n_heads,
            d_model: 2 * half_head * n_heads,
            d_ff,
            max_seq_len: 5,
            ..GptConfig::transformer(vocab_size)
        },
    );
    let switches = any::<[bool; 8]>();
    (gpt, switches).prop_map(|(gpt, [qkv_bias, proj_bias, mlp_bias, qk_norm, gated, rms, shared, rotary])| GptConfig {
        qkv_bias,
        proj_bias,
        mlp_bias,
        qk_norm,
        gated,
        norm_kind: if rms { NormKind::RmsNorm } else { NormKind::LayerNorm },
        n_kv_heads: shared.then_some(1),
        head_dim: shared.then_some(6),
        positions: if rotary { Positions::Rotary } else { gpt.positions },
        ..gpt
    })
}

fn table(config: &GptConfig, output: Output) -> Vec<(String, Vec<usize>)> {
    let mut table: Vec<_> = parameters(config, output).map(|p| (p.path(), p.shape())).collect();
    table.sort();
    table
}

/// Checks that each number of the parameter has one place of its own in the tensors; their number of spans.
fn check_layout(parameter: &Parameter<'_>, foreign: Foreign) -> usize {
    let (shape, spans) = (parameter.shape(), parameter.spans(foreign));
    let mut seen = vec![0; shape.iter().product()];
    let mut places = std::collections::BTreeSet::new();
    for span in &spans {
        assert_eq!(span.ours.len(), span.theirs.len());
        span.for_each_pair(&shape, |ours, theirs| {
            seen[ours] += 1;
            assert!(theirs < span.shape.iter().product(), "{span:?}");
            assert!(places.insert((span.name, theirs)), "two numbers in one place: {span:?}");
        });
    }
    assert!(seen.iter().all(|&n| n == 1), "a number is left out or twice there");
    spans.len()
}

proptest! {
    #[test]
    fn every_parameter_has_one_row_and_every_row_a_parameter(config in configs()) {
        let gpt = Gpt::new(&config, &Streams::new(1), &Device::flex());
        let scalar = ScalarGpt::new(gpt.clone(), &Streams::new(1));
        let [mut of_gpt, mut of_scalar] = [param_paths(&gpt), param_paths(&scalar)];
        of_gpt.sort();
        of_scalar.sort();
        prop_assert_eq!(table(&config, Output::Logits), of_gpt);
        prop_assert_eq!(table(&config, Output::Score), of_scalar);
    }

    #[test]
    fn a_path_has_the_role_of_its_row(config in configs()) {
        for output in [Output::Logits, Output::Score] {
            for parameter in parameters(&config, output) {
                prop_assert_eq!(role_of(&parameter.path()), Some(parameter.role()));
            }
        }
    }

    #[test]
    fn every_layout_holds_every_number_once(config in configs(), transposed in any::<bool>()) {
        for parameter in parameters(&config, Output::Logits) {
            prop_assert_eq!(check_layout(&parameter, parameter.gpt2()), 1);
            prop_assert_eq!(check_layout(&parameter, parameter.openai_gpt()), 1);
            let n_parts = if matches!(parameter.row.shape.last(), Some(Size::Qkv)) { QKV } else { 1 };
            prop_assert_eq!(check_layout(&parameter, parameter.llama()), n_parts);
            for nth in 0..2 {
                // Fused by hand, as some classes have gate and up.
                let shared = Foreign { names: &["both"], order: Order::Shared { nth, of: 2 }, transposed };
                prop_assert_eq!(check_layout(&parameter, shared), 1);
            }
            if matches!(parameter.role(), Role::Linear { packed: QKV, .. }) {
                let split = Foreign { names: &["q", "k", "v"], order: Order::InTurn, transposed };
                prop_assert_eq!(check_layout(&parameter, split), 3);
                let fused = Foreign { names: &["qkv"], order: Order::HeadByHead, transposed };
                if config.n_kv_heads() == config.n_heads {
                    prop_assert_eq!(check_layout(&parameter, fused), 3 * config.n_heads);
                }
            }
        }
    }
}

#[test]
fn only_a_path_of_the_table_has_a_role() {
    for path in ["blocks.mlp.up.weight", "blocks.x.mlp.up.weight", "blocks.0.weight", "weight", "blocks.0.head", ""] {
        assert_eq!(role_of(path), None, "{path}");
    }
}

#[test]
fn queries_keys_and_values_lie_head_by_head_where_they_are_fused() {
    let config = GptConfig { d_model: 4, n_heads: 2, n_layers: 1, ..GptConfig::gpt2(3) };
    let qkv = parameters(&config, Output::Logits).find(|p| p.path() == "blocks.0.attention.qkv.weight");
    let fused = Foreign { names: &["qkv"], order: Order::HeadByHead, transposed: true };
    let spans = qkv.expect("there").spans(fused);
    // Two channels a head; ours are q₀ q₁ k₀ k₁ v₀ v₁, theirs q₀ k₀ v₀ q₁ k₁ v₁.
    let ranges: Vec<_> = spans.iter().map(|span| (span.ours.start, span.theirs.start)).collect();
    assert_eq!(ranges, [(0, 0), (4, 2), (8, 4), (2, 6), (6, 8), (10, 10)]);
    assert!(spans.iter().all(|span| span.shape == [12, 4]));
}

#[test]
fn only_matrices_of_linear_layers_decay_and_take_adapters() {
    let config = GptConfig { tie_embeddings: false, n_layers: 1, ..GptConfig::gpt2(3) };
    let of = |output, holds: fn(Role) -> bool| -> Vec<String> {
        parameters(&config, output).filter(|p| holds(p.role())).map(|p| p.path()).collect()
    };
    let linear = ["attention.qkv", "attention.proj", "mlp.up", "mlp.down"].map(|l| format!("blocks.0.{l}.weight"));
    assert_eq!(of(Output::Logits, Role::takes_adapter), linear);
    assert_eq!(of(Output::Logits, Role::decays), [&linear[..], &["head".to_owned()]].concat());
    let score = [&linear.map(|path| format!("trunk.{path}"))[..], &["score.weight".to_owned()]].concat();
    assert_eq!(of(Output::Score, Role::decays), score);
    assert_eq!(of(Output::Logits, Role::is_per_token), ["token_embedding", "head"]);
}
