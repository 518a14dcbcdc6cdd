//! Checkpoints and tokenizers.

use common::checkpoint::Stage;
use common::hf;
use common::model::NamedTensors;
use common::testing::{byte_tokenizer, save_tiny};
use common::tokenizer::{Tokenizer, TokenizerConfig, TokenizerKind};
use pipeline_tests::Lab;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use serde_json::{Value, json};

use crate::{Case, models};

const EVAL: [&str; 5] = ["eval", "--checkpoint", "broken", "--ids", "ids.json"];

/// A lab with the sound checkpoint `broken`, for a test to break.
fn to_break() -> Lab {
    let lab = models();
    lab.write("ids.json", "[[1, 2]]");
    renew(&lab);
    lab
}

fn renew(lab: &Lab) {
    let _ = std::fs::remove_dir_all(lab.path("broken"));
    save_tiny(&lab.path("broken"), Stage::Sft, &byte_tokenizer(), 1);
}

/// Changes a JSON file of `broken`.
fn edit(lab: &Lab, file: &str, change: impl FnOnce(&mut Value)) {
    let path = format!("broken/{file}");
    let mut json = lab.json(&path);
    change(&mut json);
    lab.write(&path, json.to_string());
}

/// Writes changed weights under a manifest that does not know their hash, or under none.
fn edit_weights(lab: &Lab, keep_manifest: bool, change: impl FnOnce(&mut NamedTensors)) {
    let path = lab.path("broken/model.safetensors");
    let (mut tensors, _) = hf::read_file(&path, |_| true).unwrap();
    change(&mut tensors);
    // Not by our own writer, which refuses what a test wants to write.
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = tensors
        .into_iter()
        .map(|(name, tensor)| (name, tensor.shape, tensor.data.iter().flat_map(|x| x.to_le_bytes()).collect()))
        .collect();
    let views = tensors.iter().map(|(name, shape, bytes)| {
        (name, TensorView::new(Dtype::F32, shape.clone(), bytes).expect("as many bytes as the shape says"))
    });
    std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
    if !keep_manifest {
        std::fs::remove_file(lab.path("broken/manifest.json")).unwrap();
    }
}

#[test]
fn directories_that_are_no_checkpoint() {
    let lab = to_break();
    lab.write("notes/readme.txt", "hello");
    Case(&lab, "checkpoint-missing").refused("sft", &crate::sft_from("nowhere"));
    Case(&lab, "checkpoint-no-config").refused("sft", &crate::sft_from("notes"));
    Case(&lab, "checkpoint-is-a-file").refused("chat", &["generate", "--checkpoint", "ids.json", "--prompt", "hi"]);
    Case(&lab, "checkpoint-chat-missing").refused("chat", &["generate", "--checkpoint", "nowhere", "--prompt", "hi"]);
    Case(&lab, "tokenizer-missing").refused("pretrain", &crate::pretrain_with("nowhere"));
    Case(&lab, "tokenizer-none").refused("pretrain", &crate::pretrain_with("notes"));
}

#[test]
fn weights_that_are_damaged() {
    let lab = to_break();
    let weights = lab.bytes("broken/model.safetensors");
    lab.write("broken/model.safetensors", &weights[..weights.len() / 2]);
    Case(&lab, "weights-truncated").refused("pretrain", &EVAL);
    lab.write("broken/model.safetensors", b"");
    Case(&lab, "weights-empty").refused("pretrain", &EVAL);
    lab.write("broken/model.safetensors", b"\xff\xff\xff\xff\xff\xff\xff\xff rubbish");
    Case(&lab, "weights-rubbish").refused("pretrain", &EVAL);
    std::fs::remove_file(lab.path("broken/model.safetensors")).unwrap();
    Case(&lab, "weights-missing").refused("pretrain", &EVAL);

    renew(&lab);
    edit_weights(&lab, true, |tensors| tensors.values_mut().for_each(|tensor| tensor.data[0] += 1.0));
    Case(&lab, "weights-changed").refused("pretrain", &EVAL);
    for (name, value) in [("nan", f32::NAN), ("infinite", f32::INFINITY)] {
        renew(&lab);
        edit_weights(&lab, false, |tensors| {
            tensors.get_mut("transformer.wte.weight").expect("GPT-2's name").data[7] = value;
        });
        Case(&lab, &format!("weights-{name}"))
            .refused("chat", &["generate", "--checkpoint", "broken", "--prompt", "hi"]);
    }
    renew(&lab);
    edit_weights(&lab, false, |tensors| drop(tensors.remove("transformer.ln_f.bias")));
    Case(&lab, "weights-tensor-missing").refused("pretrain", &EVAL);
    renew(&lab);
    edit_weights(&lab, false, |tensors| {
        let tensor = tensors["transformer.ln_f.bias"].clone();
        tensors.insert("transformer.ln_g.bias".into(), tensor);
    });
    Case(&lab, "weights-tensor-unused").refused("pretrain", &EVAL);
    renew(&lab);
    edit(&lab, "config.json", |config| config["n_embd"] = json!(32));
    Case(&lab, "weights-tensor-shape").refused("pretrain", &EVAL);
}

#[test]
fn json_files_that_are_damaged() {
    let lab = to_break();
    lab.write("broken/config.json", "{\"model_type\": \"gpt2\"");
    Case(&lab, "config-json-cut").refused("pretrain", &EVAL);
    for (name, key, value) in [
        ("model-type", "model_type", json!("gemma")),
        ("architecture", "architectures", json!(["GPT2Model"])),
        ("heads", "n_head", json!(3)),
        ("missing-key", "n_layer", Value::Null),
        ("huge", "n_embd", json!(1_u64 << 60)),
        ("fraction", "n_embd", json!(15.5)),
    ] {
        renew(&lab);
        edit(&lab, "config.json", |config| config[key] = value);
        Case(&lab, &format!("config-json-{name}")).refused("pretrain", &EVAL);
    }
    renew(&lab);
    lab.write("broken/tokenizer.json", "{\"version\": \"1.0\", \"model\"");
    Case(&lab, "tokenizer-json-cut").refused("pretrain", &EVAL);
    lab.write("broken/tokenizer.json", "{}");
    Case(&lab, "tokenizer-json-empty").refused("sft", &crate::sft_from("broken"));
    renew(&lab);
    edit(&lab, "manifest.json", |manifest| manifest["format"] = json!(2));
    Case(&lab, "manifest-format").refused("pretrain", &EVAL);
    lab.write("broken/manifest.json", "{\"format\": 1, \"stage\": \"distil\"}");
    Case(&lab, "manifest-damaged").refused("pretrain", &EVAL);
    renew(&lab);
    let text = String::from_utf8(lab.bytes("broken/tokenizer_config.json")).unwrap();
    lab.write("broken/tokenizer_config.json", text.replace("<|end|>", "<|END|>"));
    Case(&lab, "tokenizer-changed").refused("pretrain", &EVAL);
}

#[test]
fn checkpoints_of_another_stage() {
    let lab = models();
    Case(&lab, "stage-sft-from-reward-model").refused("sft", &crate::sft_from("reward"));
    Case(&lab, "stage-policy-is-reward-model").refused("ppo", &crate::ppo_from("reward", "reward"));
    Case(&lab, "stage-policy-is-pretrained").refused("ppo", &crate::ppo_from("base", "reward"));
    Case(&lab, "stage-reward-model-is-sft").refused("ppo", &crate::ppo_from("sft", "sft"));
    Case(&lab, "stage-chat-with-reward-model")
        .refused("chat", &["generate", "--checkpoint", "reward", "--prompt", "hi"]);
    Case(&lab, "stage-score-with-sft")
        .refused("reward-model", &["score", "--checkpoint", "sft", "--data", "data/pairs.val.jsonl"]);
    Case(&lab, "stage-eval-reward-model")
        .refused("pretrain", &["eval", "--checkpoint", "reward", "--data", "data/val.txt"]);
    // Without a manifest there is no stage; what the model is, config.json still says.
    std::fs::remove_file(lab.path("reward/manifest.json")).unwrap();
    Case(&lab, "stage-foreign-reward-model-as-policy").refused("ppo", &crate::ppo_from("reward", "reward"));
}

#[test]
fn tokenizers_that_do_not_fit() {
    let lab = to_break();
    let config = TokenizerConfig { kind: TokenizerKind::Char, ..TokenizerConfig::default() };
    let chars = Tokenizer::train(&config, ["the fox sees a boat?."].iter(), true).unwrap();
    chars.save(&lab.path("chars")).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(lab.path("chars").join(file), lab.path("reward").join(file)).unwrap();
    }
    std::fs::remove_file(lab.path("reward/manifest.json")).unwrap();
    Case(&lab, "tokenizer-of-another").refused("ppo", &crate::ppo_from("sft", "reward"));
    // A manifest knows its tokenizer.
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(lab.path("chars").join(file), lab.path("broken").join(file)).unwrap();
    }
    Case(&lab, "tokenizer-not-the-manifests").refused("sft", &crate::sft_from("broken"));
    renew(&lab);
    let config = TokenizerConfig { vocab_size: 400, ..TokenizerConfig::default() };
    let text = String::from_utf8(lab.bytes("data/train.txt")).unwrap();
    Tokenizer::train(&config, [text].iter(), true).unwrap().save(&lab.path("broken")).unwrap();
    std::fs::remove_file(lab.path("broken/manifest.json")).unwrap();
    Case(&lab, "tokenizer-larger-than-the-model").refused("sft", &crate::sft_from("broken"));
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::remove_file(lab.path("broken").join(file)).unwrap();
    }
    Case(&lab, "tokenizer-absent").refused("chat", &["generate", "--checkpoint", "broken", "--prompt", "hi"]);
    let alien = ["--set", "data.train=[\"../data/alien.txt\"]"];
    lab.write("data/alien.txt", "Ωmega");
    Case(&lab, "tokenizer-unknown-character")
        .refused("pretrain", &[&crate::pretrain_with("chars")[..], &alien, &["-q"]].concat());
}

#[test]
fn chat_templates_that_cannot_be_used() {
    let lab = to_break();
    std::fs::remove_file(lab.path("broken/manifest.json")).unwrap();
    let turn = |role: &str, content: &str| json!({ "role": role, "content": content });
    let chat = [turn("user", "a"), turn("assistant", "bc"), turn("user", "d"), turn("assistant", "e")];
    for set in ["train", "val"] {
        lab.write(&format!("data/sft.{set}.jsonl"), format!("{}\n", json!({ "messages": chat })));
    }
    for (name, template) in [
        (
            "template-hides-the-answer",
            json!("{% for m in messages %}{{ (m.content if loop.last else m.content[::-1]) + '<|end|>' }}{% endfor %}"),
        ),
        (
            "template-raises",
            json!("{% if messages | length > 2 %}{{ raise_exception('one question only') }}{% endif %}"),
        ),
        (
            "template-none-is-the-default",
            json!([{ "name": "rag", "template": "" }, { "name": "tools", "template": "" }]),
        ),
    ] {
        edit(&lab, "tokenizer_config.json", |settings| settings["chat_template"] = template);
        Case(&lab, name).refused("sft", &crate::sft_from("broken"));
    }
}
