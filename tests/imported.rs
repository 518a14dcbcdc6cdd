//! Models from elsewhere that bring a chat template: tokenizer, template and ends of answers go through every stage as they
//! came, and nothing is read where the padding id stands.

#![allow(clippy::unwrap_used)] // a test that unwraps fails with the error in its message

use std::path::Path;

use burn::tensor::Device;
use common::conversation::{Message, Role, encode_prompt, encode_response};
use common::hf::{self, Head, TokenIds};
use common::model::{Gpt, GptConfig, ScalarGpt};
use common::rng::Streams;
use common::tokenizer::Tokenizer;
use pipeline_tests::{Lab, PPO, REWARD_MODEL, SFT, Stage};
use serde_json::{Value, json};

/// Few steps, and nothing in between.
const SHORT: [&str; 5] = ["-q", "--set", "train.steps=2", "--set", "run.eval_every=0"];

/// How far a score may be from that of the same row in a batch of another shape.
const REORDERED: f64 = 1e-5;

/// Writes a model as the hub has Qwen 2.5: a byte-level tokenizer, a template in a file that writes a system text of its own,
/// and padding by one of the two ids that end answers. `head` decides the class.
fn write_hub_model(dir: &Path, head: Head) -> Tokenizer {
    std::fs::create_dir_all(dir).unwrap();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/chat_templates.json");
    let recorded: Value = serde_json::from_slice(&std::fs::read(fixture).unwrap()).unwrap();
    let mut file = recorded["tokenizers"]["byte-level"]["file"].clone();
    let directory = &recorded["directories"]["qwen2.5"];
    let added = directory["added"].as_array().unwrap().iter().map(|token| {
        json!({
            "id": token["id"], "content": token["content"], "special": true, "normalized": false,
            "single_word": false, "lstrip": false, "rstrip": false,
        })
    });
    file["added_tokens"] = added.collect();
    let mut settings = directory["settings"].clone();
    let template = settings.as_object_mut().unwrap().remove("chat_template").unwrap();
    std::fs::write(dir.join("tokenizer.json"), file.to_string()).unwrap();
    std::fs::write(dir.join("tokenizer_config.json"), settings.to_string()).unwrap();
    std::fs::write(dir.join("chat_template.jinja"), template.as_str().unwrap()).unwrap();
    let tokenizer = Tokenizer::load(dir).unwrap();

    // Three rows without a token, as Qwen's vocabulary is rounded up.
    let base = GptConfig::llama(tokenizer.vocab_size() + 3);
    let config = GptConfig { d_model: 16, n_layers: 1, n_heads: 2, d_ff: 32, max_seq_len: 256, ..base };
    let streams = Streams::new(4);
    let gpt = Gpt::new(&config, &streams, &Device::flex());
    let named = match head {
        Head::Lm => gpt.to_named(),
        Head::Score { .. } => ScalarGpt::new(gpt, &streams).to_named(),
    };
    let id = |token: &str| tokenizer.token_id(token).unwrap();
    let eos = vec![id("<|im_end|>"), id("<|endoftext|>")];
    let tokens = TokenIds { bos: None, pad: Some(id("<|endoftext|>")), eos };
    hf::write(dir, &config, head, &named, &tokens).unwrap();
    tokenizer
}

#[test]
fn every_stage_keeps_tokenizer_template_and_ends() {
    let lab = Lab::new();
    let tokenizer = write_hub_model(&lab.path("base"), Head::Lm);
    let id = |token: &str| tokenizer.token_id(token).unwrap();
    for stage in [SFT, REWARD_MODEL, PPO] {
        lab.ok(stage.program, &stage.train(stage.out, &SHORT));
        let file = |name: &str| format!("{}/{name}", stage.out);
        assert_eq!(lab.json(&file("tokenizer.json")), lab.json("base/tokenizer.json"), "{}", stage.out);
        assert_eq!(lab.bytes(&file("chat_template.jinja")), lab.bytes("base/chat_template.jinja"), "{}", stage.out);
        let mut settings = lab.json("base/tokenizer_config.json");
        // What pads must not end an answer; all else is as it came.
        settings["pad_token"] = json!("<|vision_pad|>");
        assert_eq!(lab.json(&file("tokenizer_config.json")), settings, "{}", stage.out);
        for name in ["config.json", "generation_config.json"] {
            let json = lab.json(&file(name));
            assert_eq!(json["eos_token_id"], json!([id("<|im_end|>"), id("<|endoftext|>")]), "{}", file(name));
            assert_eq!(json["pad_token_id"], json!(id("<|vision_pad|>")), "{}", file(name));
        }
        assert_eq!(lab.json(&file("config.json"))["vocab_size"], json!(tokenizer.vocab_size() + 3), "{}", stage.out);
    }
    for line in lab.lines("ppo/rollouts.jsonl") {
        let length = line["length"].as_u64().unwrap();
        assert!(line["finish"] == "stop" || length == 8, "{line}");
    }

    // A reward model of another format is refused; without a manifest, as another program leaves it.
    std::fs::remove_file(lab.path("reward/manifest.json")).unwrap();
    lab.write("reward/chat_template.jinja", "{% for m in messages %}{{ m.content + '<|im_end|>' }}{% endfor %}");
    let output = lab.run("ppo", &PPO.train("out", &SHORT));
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stderr.contains("`sft` and `reward` have different chat templates"), "{}", output.stderr);
}

#[test]
fn a_prompt_has_the_templates_own_ids() {
    let lab = Lab::new();
    let tokenizer = write_hub_model(&lab.path("base"), Head::Lm);
    lab.ok("sft", &SFT.train("sft", &SHORT));
    let expected = encode_prompt(&tokenizer, &[Message::new(Role::User, "the cat <|im_end|>")]).unwrap();
    assert!(tokenizer.decode_with_specials(&expected).starts_with("<|im_start|>system\nYou are Qwen."));
    for checkpoint in ["base", "sft"] {
        let args =
            ["generate", "--checkpoint", checkpoint, "--prompt", "the cat <|im_end|>", "--json", "--max-tokens", "1"];
        let answer: Value = serde_json::from_str(&lab.ok("chat", &args)).unwrap();
        assert_eq!(answer["prompt_token_ids"], json!(expected), "{checkpoint}");
    }
}

#[test]
fn a_reward_model_padded_with_an_end_scores_the_answer() {
    let lab = Lab::new();
    let tokenizer = write_hub_model(&lab.path("judge"), Head::Score { bias: 0.0 });
    // The commonest trap: rows are padded with the mark that ends every turn, those of the prompt too.
    let end = tokenizer.token_id("<|im_end|>").unwrap();
    let mut config = lab.json("judge/config.json");
    config["pad_token_id"] = json!(end);
    lab.write("judge/config.json", config.to_string());
    let answers = ["hi", "the cat", "a far longer answer, which pads the others"];
    let prompt = [Message::new(Role::User, "who is there?")];
    let (mut records, mut rows) = (String::new(), vec![]);
    for answer in answers {
        records += &format!("{}\n", json!({ "prompt": prompt[0].content, "response": answer }));
        let row = [encode_prompt(&tokenizer, &prompt).unwrap(), encode_response(&tokenizer, answer).unwrap()].concat();
        assert_eq!(row.iter().filter(|id| **id == end).count(), 3, "system, user, assistant");
        assert_eq!(row.last(), Some(&end));
        rows.push(row);
    }
    lab.write("records.jsonl", records);
    let scores = |args: &[&str]| -> Vec<f64> {
        let lines = lab.ok("reward-model", &[&["score", "--checkpoint", "judge"], args].concat());
        lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["score"].as_f64().unwrap()).collect()
    };
    let together = scores(&["--data", "records.jsonl"]);
    // A row alone, at its last id: no padding at all.
    let alone = rows.iter().flat_map(|row| {
        lab.write("row.json", json!([row]).to_string());
        scores(&["--ids", "row.json"])
    });
    for (together, alone) in together.iter().zip(alone) {
        assert!((together - alone).abs() < REORDERED, "{together} and {alone}");
    }
    assert!((together[0] - together[1]).abs() > 100.0 * REORDERED, "two answers to one prompt: {together:?}");
}

#[test]
fn an_adapter_that_scores_says_how_peft_is_told_the_padding_id() {
    let lab = Lab::new();
    let tokenizer = write_hub_model(&lab.path("base"), Head::Lm);
    let mut config = lab.json("base/config.json");
    config["pad_token_id"] = json!(tokenizer.token_id("<|im_end|>").unwrap());
    lab.write("base/config.json", config.to_string());
    let stage = Stage { inputs: &["--init", "base"], ..REWARD_MODEL };
    let said = |out: &str, more: &[&str]| {
        let output = lab.run("reward-model", &stage.train(out, &[&SHORT[1..], more].concat()));
        assert_eq!(output.status.code(), Some(0), "{}", output.stderr);
        output.stderr
    };
    let adapter = said("adapter", &["--set", "lora.rank=2", "--set", "lora.targets=[\"q_proj\"]"]);
    let pad = &lab.json("adapter/config.json")["pad_token_id"];
    assert!(adapter.contains(&format!("in PEFT set `model.config.pad_token_id = {pad}`")), "{adapter}");
    assert_eq!(adapter.matches("rows are padded with").count(), 1, "{adapter}");
    // The head, and two matrices beside each layer's queries.
    let (d_model, n_layers) = (config["hidden_size"].as_u64().unwrap(), config["num_hidden_layers"].as_u64().unwrap());
    let n_trained = d_model + n_layers * 2 * (d_model + d_model);
    assert!(adapter.contains(&format!(" parameters ({n_trained} of them trained), ")), "{adapter}");
    let whole = said("whole", &[]);
    assert!(!whole.contains("PEFT") && !whole.contains("of them trained"), "{whole}");

    // Into its own directory an adapter cannot be merged, and there is nothing to resume.
    let output = lab.run("chat", &["merge", "--checkpoint", "adapter", "--out", "adapter"]);
    assert!(output.stderr.ends_with("is not empty\nhint: pass another `--out`\n"), "{}", output.stderr);
}
