//! Which foreign tensor is which of ours, and its shape.

use super::{Class, Head};
use crate::{GptConfig, NormPlacement, Positions};

/// One tensor under both names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    /// The path in [`Gpt`](crate::Gpt) or [`ScalarGpt`](crate::ScalarGpt).
    pub ours: String,
    /// The name in the file, with its `transformer.` prefix where there is one.
    pub theirs: String,
    pub shape: Vec<usize>,
}

/// Every tensor of a model of `class`, `config` and `head`, the fixed position table of foreign classes excepted.
///
/// Linear layers are `[in, out]` on both sides, because these two classes use `Conv1D`: nothing is transposed.
pub(super) fn entries(class: Class, config: &GptConfig, head: Head) -> Vec<Entry> {
    let GptConfig { vocab_size, d_model, d_ff, max_seq_len, .. } = *config;
    let trunk = if matches!(head, Head::Score { .. }) { "trunk." } else { "" };
    let mut entries = Vec::new();
    let mut add = |ours: &str, theirs: &str, shape: &[usize]| {
        entries.push(Entry {
            ours: format!("{trunk}{ours}"),
            theirs: if class == Class::Kindling { format!("{trunk}{ours}") } else { format!("transformer.{theirs}") },
            shape: shape.to_vec(),
        });
    };
    add("token_embedding", token_table(class), &[vocab_size, d_model]);
    if config.positions == Positions::Learned {
        add("position_embedding", position_table(class), &[max_seq_len, d_model]);
    }
    for i in 0..config.n_layers {
        for (ours, theirs, d_in, d_out) in [
            ("attention.qkv", "attn.c_attn", d_model, 3 * d_model),
            ("attention.proj", "attn.c_proj", d_model, d_model),
            ("mlp.up", "mlp.c_fc", d_model, d_ff),
            ("mlp.down", "mlp.c_proj", d_ff, d_model),
        ] {
            add(&format!("blocks.{i}.{ours}.weight"), &format!("h.{i}.{theirs}.weight"), &[d_in, d_out]);
            add(&format!("blocks.{i}.{ours}.bias"), &format!("h.{i}.{theirs}.bias"), &[d_out]);
        }
        for norm in [1, 2] {
            add(&format!("blocks.{i}.norm_{norm}.gamma"), &format!("h.{i}.ln_{norm}.weight"), &[d_model]);
            add(&format!("blocks.{i}.norm_{norm}.beta"), &format!("h.{i}.ln_{norm}.bias"), &[d_model]);
        }
    }
    if config.norm == NormPlacement::Pre {
        add("final_norm.gamma", "ln_f.weight", &[d_model]);
        add("final_norm.beta", "ln_f.bias", &[d_model]);
    }
    match head {
        Head::Lm if config.tie_embeddings => {}
        Head::Lm => entries.push(Entry {
            ours: "head".to_owned(),
            theirs: if class == Class::Kindling { "head" } else { "lm_head.weight" }.to_owned(),
            shape: vec![vocab_size, d_model],
        }),
        Head::Score { .. } => entries.push(Entry {
            ours: "score.weight".to_owned(),
            theirs: "score.weight".to_owned(),
            shape: vec![1, d_model],
        }),
    }
    entries
}

/// The token embedding's name, without prefix.
pub(super) const fn token_table(class: Class) -> &'static str {
    match class {
        Class::Gpt2 => "wte.weight",
        Class::OpenAiGpt => "tokens_embed.weight",
        Class::Kindling => "token_embedding",
    }
}

/// The position table's name, without prefix.
pub(super) const fn position_table(class: Class) -> &'static str {
    match class {
        Class::Gpt2 => "wpe.weight",
        Class::OpenAiGpt => "positions_embed.weight",
        Class::Kindling => "position_embedding",
    }
}

/// Whether `name` is one of the causal-mask buffers that old versions of transformers wrote among the weights.
pub(super) fn is_mask_buffer(name: &str) -> bool {
    let name = name.strip_prefix("transformer.").unwrap_or(name);
    let layer = name
        .strip_prefix("h.")
        .and_then(|rest| rest.strip_suffix(".attn.bias").or_else(|| rest.strip_suffix(".attn.masked_bias")));
    layer.is_some_and(|layer| !layer.is_empty() && layer.bytes().all(|byte| byte.is_ascii_digit()))
}
