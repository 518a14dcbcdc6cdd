//! `tokenizer_config.json` with its chat template, applied to a conversation.
//!
//! An input is `{"base", "config", "jinja", "messages"}`: which tokenizer, two files and a list of `[role, text]`.

#![no_main]

use std::sync::OnceLock;

use fuzz::{check_error, file, mutate, put};
use libfuzzer_sys::{fuzz_mutator, fuzz_target};
use serde_json::{Value, json};
use text::conversation::{self, Message, Role};
use text::tokenizer::{Tokenizer, TokenizerConfig, TokenizerKind};

/// Characters to put between those of a text, of which one that occurs nowhere else is taken.
const WEDGES: [char; 3] = ['■', '\u{2060}', '◆'];

/// A vocabulary with marks among its words.
const PIECES: [&str; 15] =
    ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "<|im_end|>", "▁", "a", "▁a", "x", "<", ">", "|", "im", "end"];

const WORDS: [&str; 84] = [
    "chat_template",
    "bos_token",
    "eos_token",
    "pad_token",
    "unk_token",
    "added_tokens_decoder",
    "content",
    "special",
    "additional_special_tokens",
    "extra_special_tokens",
    "tokenizer_class",
    "name",
    "default",
    "template",
    "lstrip",
    "single_word",
    "normalized",
    "system",
    "user",
    "assistant",
    "tool",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "<|bos|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<|",
    "|>",
    "im_end",
    "[",
    "]",
    "\n",
    "{% for m in messages %}",
    "{% endfor %}",
    "{{ m.role }}",
    "{{ m['content'] }}",
    "{{ m.content | trim }}",
    "{{ messages }}",
    "{{ messages[0].content }}",
    "{{ messages | tojson }}",
    "{% if loop.first %}",
    "{% endif %}",
    "{% if 'x' in m.content %}",
    "{% else %}",
    "{% set x = 'a' %}",
    "{% set ns = namespace(x=0) %}",
    "{{ x * 1000 }}",
    "{{ x ~ x }}",
    "{{ x + x }}",
    "{% generation %}",
    "{% endgeneration %}",
    "{% macro f(a) %}",
    "{% endmacro %}",
    "{{ f(f) }}",
    "{% break %}",
    "{% continue %}",
    "{{ bos_token }}",
    "{{ eos_token }}",
    "{% if add_generation_prompt %}",
    "{{ raise_exception('no') }}",
    "{{ strftime_now('%Y') }}",
    "{{ range(1000) | list }}",
    "{{ m.content | upper }}",
    "{{ m.content.split('<') | join('|') }}",
    "{{ m.content[1:] }}",
    "{{ m.content | replace('a', 'b') }}",
    "{{ m.content | indent(4) }}",
    "{{ '%s' | format(m.content) }}",
    "{{ m.content | reverse }}",
    "{{ m.content | length }}",
    "{%- ",
    " -%}",
    "{{ [m.content] * 100 }}",
    "{{ m.content.strip() }}",
    "{{ dict(a=1).items() }}",
    "{# #}",
    "{% call f() %}",
    "{{ (m.content | list) | sort | join }}",
];

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    mutate(data, size, max_size, seed, &WORDS)
});

fuzz_target!(|data: &[u8]| {
    let Ok(input) = serde_json::from_slice::<Value>(data) else { return };
    let pair = |pair: &Value| Some((pair[0].as_str()?.to_owned(), pair[1].as_str()?.to_owned()));
    let messages: Vec<(String, String)> = input["messages"].as_array().into_iter().flatten().filter_map(pair).collect();
    let dir = file("template");
    std::fs::create_dir_all(&dir).expect("a folder");
    let base = &bases()[input["base"].as_u64().unwrap_or_default() as usize % bases().len()];
    put(&dir, "tokenizer.json", Some(base.as_bytes()));
    put(&dir, "tokenizer_config.json", input.get("config").map(|json| json.to_string().into_bytes()).as_deref());
    put(&dir, "chat_template.jinja", input["jinja"].as_str().map(str::as_bytes));
    let tokenizer = match Tokenizer::load(&dir) {
        Err(error) => return check_error(&error),
        Ok(tokenizer) => tokenizer,
    };
    let _ = tokenizer.end_of_turn();
    for add_generation_prompt in [false, true] {
        check(&tokenizer, &messages, add_generation_prompt, &input.to_string());
    }
    check_conversation(&tokenizer, &messages);
});

/// `tokenizer.json` of ours; of one whose marks are words of its vocabulary; and those of the oracle's directories.
fn bases() -> &'static [String] {
    static BASES: OnceLock<Vec<String>> = OnceLock::new();
    BASES.get_or_init(|| {
        let config = TokenizerConfig { kind: TokenizerKind::Byte, ..TokenizerConfig::default() };
        let bytes = Tokenizer::train(&config, std::iter::empty::<&str>(), true).expect("a tokenizer");
        let dir = file("base");
        bytes.save(&dir).expect("saved");
        let ours = std::fs::read_to_string(dir.join("tokenizer.json")).expect("read");
        let pieces: Vec<Value> = PIECES.iter().enumerate().map(|(i, word)| json!([word, -(i as f64)])).collect();
        let metaspace = json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true });
        let words = json!({
            "version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": metaspace, "decoder": metaspace,
            "post_processor": null, "model": { "type": "Unigram", "unk_id": 0, "vocab": pieces },
        });
        let oracle: Value = serde_json::from_str(include_str!("../../fixtures/chat_templates.json")).expect("JSON");
        let directories = oracle["directories"].as_object().expect("an object").values();
        [ours, words.to_string()].into_iter().chain(directories.map(|d| of_oracle(&oracle, d))).collect()
    })
}

/// `tokenizer.json` of one of the oracle's directories.
fn of_oracle(oracle: &Value, directory: &Value) -> String {
    let name = directory["tokenizer"].as_str().expect("a name");
    let mut json = oracle["tokenizers"][name]["file"].clone();
    for token in directory["added"].as_array().into_iter().flatten() {
        json["added_tokens"].as_array_mut().expect("a list").push(json!({
            "id": token["id"], "content": token["content"], "special": token["special"], "normalized": false,
            "single_word": false, "lstrip": false, "rstrip": false,
        }));
    }
    json.to_string()
}

/// Checks the ids of `messages` by the tokenizer's template.
fn check(tokenizer: &Tokenizer, messages: &[(String, String)], add_generation_prompt: bool, source: &str) {
    let borrowed: Vec<(&str, &str)> = messages.iter().map(|(role, text)| (role.as_str(), text.as_str())).collect();
    let rendered = match tokenizer.render_chat_template(&borrowed, add_generation_prompt) {
        Err(error) => return check_error(&error),
        Ok(rendered) => rendered,
    };
    let encoded = match tokenizer.encode_chat_template(&borrowed, add_generation_prompt) {
        Err(error) => return check_error(&error),
        Ok(encoded) => encoded,
    };
    assert_eq!(encoded.ids.len(), encoded.generated.len());
    assert!(encoded.ids.iter().all(|id| (*id as usize) < tokenizer.vocab_size()));
    let Some(wedge) = WEDGES.iter().find(|wedge| !source.contains(**wedge)) else { return };
    // With a wedge between all letters a text cannot spell a mark: what marks there are then are the template's.
    let apart: Vec<String> = messages.iter().map(|(_, text)| wedged(text, *wedge)).collect();
    let apart: Vec<(&str, &str)> =
        messages.iter().zip(&apart).map(|((role, _), text)| (role.as_str(), text.as_str())).collect();
    let same = tokenizer
        .render_chat_template(&apart, add_generation_prompt)
        .is_ok_and(|text| text.replace(*wedge, "") == rendered);
    if !same {
        return;
    }
    if let Ok(harmless) = tokenizer.encode_chat_template(&apart, add_generation_prompt) {
        let marks = |ids: &[u32]| ids.iter().copied().filter(|id| tokenizer.is_mark(*id)).collect::<Vec<_>>();
        assert_eq!(marks(&encoded.ids), marks(&harmless.ids), "a message wrote a mark in {rendered:?}");
    }
}

/// `text` with `wedge` between two characters that are no white space.
fn wedged(text: &str, wedge: char) -> String {
    let mut apart = String::new();
    for c in text.chars() {
        if apart.chars().next_back().is_some_and(|last| !last.is_whitespace()) && !c.is_whitespace() {
            apart.push(wedge);
        }
        apart.push(c);
    }
    apart
}

/// Checks what training and sampling make of `messages`.
fn check_conversation(tokenizer: &Tokenizer, messages: &[(String, String)]) {
    let role = |name: &str| [Role::System, Role::User, Role::Assistant].into_iter().find(|role| role.name() == name);
    let messages: Vec<Message> =
        messages.iter().filter_map(|(name, text)| Some(Message::new(role(name)?, text.as_str()))).collect();
    match conversation::encode(tokenizer, &messages) {
        Err(error) => check_error(&error),
        Ok(encoded) => {
            assert_eq!(encoded.ids.len(), encoded.trained.len());
            if !tokenizer.writes_by_template() {
                let n_marks = encoded.ids.iter().filter(|id| tokenizer.is_mark(**id)).count();
                assert_eq!(n_marks, 1 + 2 * messages.len(), "a message wrote a mark");
            }
        }
    }
    if let Err(error) = conversation::encode_prompt(tokenizer, &messages) {
        check_error(&error);
    }
    for message in &messages {
        if let Err(error) = conversation::encode_response(tokenizer, &message.content) {
            check_error(&error);
        }
    }
}
