//! `config.json` and `generation_config.json`, written.

use serde_json::{Map, Value, json};

use super::{Class, Head, TokenIds};
use crate::{Activation, GptConfig, RopeScaling, Rotary};

/// The two JSON files of a model.
pub(super) fn render(class: Class, config: &GptConfig, head: Head, tokens: &TokenIds) -> (Value, Value) {
    let eos = match tokens.eos[..] {
        [] => Value::Null,
        [id] => json!(id),
        ref ids => json!(ids),
    };
    let mut fields = match class {
        Class::Gpt2 => gpt2(config),
        Class::OpenAiGpt => openai_gpt(config),
        Class::Llama | Class::Mistral | Class::Qwen2 | Class::Qwen3 => llama(class, config),
        Class::GptNeox => gpt_neox(config),
        Class::Kindling => json!({ "gpt": config, "vocab_size": config.vocab_size }),
    };
    fields["architectures"] = json!([class.architecture(head)]);
    fields["model_type"] = json!(class.model_type());
    fields["dtype"] = json!("float32");
    fields["tie_word_embeddings"] = json!(config.tie_embeddings);
    fields["bos_token_id"] = json!(tokens.bos);
    fields["eos_token_id"] = eos.clone();
    fields["pad_token_id"] = json!(tokens.pad);
    if let Head::Score { bias } = head {
        fields["num_labels"] = json!(1);
        fields["id2label"] = json!({ "0": "score" });
        fields["label2id"] = json!({ "score": 0 });
        fields["score_bias"] = json!(bias);
    }
    let mut generation = Map::new();
    for (name, id) in [("bos_token_id", json!(tokens.bos)), ("eos_token_id", eos), ("pad_token_id", json!(tokens.pad))]
    {
        if !id.is_null() {
            generation.insert(name.to_owned(), id);
        }
    }
    (fields, Value::Object(generation))
}

fn gpt2(config: &GptConfig) -> Value {
    json!({
        "vocab_size": config.vocab_size,
        "n_positions": config.max_seq_len,
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": (config.d_ff != 4 * config.d_model).then_some(config.d_ff),
        "activation_function": if config.activation == Activation::Relu { "relu" } else { "gelu_new" },
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "layer_norm_epsilon": config.layer_norm_eps,
        "initializer_range": 0.02,
        "scale_attn_weights": true,
        "scale_attn_by_inverse_layer_idx": false,
        "reorder_and_upcast_attn": false,
        "use_cache": true,
    })
}

fn openai_gpt(config: &GptConfig) -> Value {
    json!({
        "vocab_size": config.vocab_size,
        "n_positions": config.max_seq_len,
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        // "gelu" is the tanh form in this class alone.
        "afn": if config.activation == Activation::Relu { "relu" } else { "gelu" },
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "layer_norm_epsilon": config.layer_norm_eps,
        "initializer_range": 0.02,
    })
}

fn llama(class: Class, config: &GptConfig) -> Value {
    let mut fields = json!({
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads(),
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "initializer_range": 0.02,
        "rms_norm_eps": config.layer_norm_eps,
        "attention_dropout": config.dropout,
        "use_cache": true,
    });
    add_rope(&mut fields, rope(config.rotary));
    // Qwen 2 has its biases and the width of its heads by definition.
    if class != Class::Qwen2 {
        fields["head_dim"] = json!(config.d_head());
        fields["attention_bias"] = json!(config.qkv_bias);
    }
    if class == Class::Llama {
        fields["mlp_bias"] = json!(config.mlp_bias);
    } else {
        fields["use_sliding_window"] = json!(false);
    }
    fields
}

fn gpt_neox(config: &GptConfig) -> Value {
    let mut rope = rope(config.rotary);
    rope["partial_rotary_factor"] = json!(config.rotary.fraction);
    let mut fields = json!({
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "hidden_act": match config.activation {
            Activation::Relu => "relu",
            Activation::GeluTanh => "gelu_new",
            _ => "gelu",
        },
        "max_position_embeddings": config.max_seq_len,
        "initializer_range": 0.02,
        "layer_norm_eps": config.layer_norm_eps,
        "attention_dropout": config.dropout,
        "hidden_dropout": config.dropout,
        "attention_bias": config.qkv_bias,
        "use_parallel_residual": config.parallel,
        "use_cache": true,
        "rotary_pct": config.rotary.fraction,
        "rotary_emb_base": config.rotary.theta,
    });
    add_rope(&mut fields, rope);
    fields
}

/// Writes the angles for every reader: transformers 5 has `rope_parameters`, earlier versions and other programs take
/// `rope_theta` and `rope_scaling`, and compute other angles without a word where these are missing.
fn add_rope(fields: &mut Value, rope: Value) {
    fields["rope_theta"] = rope["rope_theta"].clone();
    if rope["rope_type"] != "default" {
        fields["rope_scaling"] = rope.clone();
    }
    fields["rope_parameters"] = rope;
}

/// The angles as transformers 5 writes them.
fn rope(rotary: Rotary) -> Value {
    let theta = rotary.theta;
    match rotary.scaling {
        RopeScaling::Default => json!({ "rope_type": "default", "rope_theta": theta }),
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "rope_theta": theta, "factor": factor }),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => json!({
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": factor,
            "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original,
        }),
    }
}
