//! Chat templates against transformers, and within limits.

use super::*;
use crate::conversation::{ConversationError, Message, Role, encode, encode_prompt, encode_response};

/// What `tests/oracles/chat_templates.py` recorded.
fn recorded() -> &'static Value {
    static RECORDED: std::sync::LazyLock<Value> = std::sync::LazyLock::new(|| fixture("chat_templates.json"));
    &RECORDED
}

fn chats() -> Vec<Vec<Message>> {
    serde_json::from_value(recorded()["chats"].clone()).unwrap()
}

/// A tokenizer of the oracle, with `added` tokens and `settings`.
fn of_oracle(base: &str, added: &Value, settings: &Value) -> Tokenizer {
    let mut file = recorded()["tokenizers"][base]["file"].clone();
    for token in added.as_array().into_iter().flatten() {
        let token = json!({
            "id": token["id"], "content": token["content"], "special": token["special"], "normalized": false,
            "single_word": false, "lstrip": false, "rstrip": false,
        });
        file["added_tokens"].as_array_mut().unwrap().push(token);
    }
    load(&file, settings).unwrap()
}

fn directory(name: &str) -> Tokenizer {
    let directory = &recorded()["directories"][name];
    of_oracle(directory["tokenizer"].as_str().unwrap(), &directory["added"], &directory["settings"])
}

/// `ChatML`'s tokenizer with another template.
fn with_template(template: &str) -> Tokenizer {
    let directory = &recorded()["directories"]["chatml"];
    let mut settings = directory["settings"].clone();
    settings["chat_template"] = json!(template);
    of_oracle("byte-level", &directory["added"], &settings)
}

fn pairs(chat: &[Message]) -> Vec<(&str, &str)> {
    chat.iter().map(|m| (m.role.name(), m.content.as_str())).collect()
}

#[test]
fn prompts_are_those_of_transformers() {
    let mut others = vec![];
    for (name, directory_record) in recorded()["directories"].as_object().unwrap() {
        others.extend(other_prompts(name, &directory(name), &directory_record["prompts"]));
    }
    assert!(others.is_empty(), "{others:#?}");
}

#[test]
fn conversations_of_a_real_model_are_those_of_transformers() {
    let Some(dir) = std::env::var_os("KINDLING_SMOLLM2") else {
        println!("skipped: KINDLING_SMOLLM2 names no directory of SmolLM2-135M-Instruct");
        return;
    };
    let records = &recorded()["smollm2"];
    let (tokenizer, n_added) = Tokenizer::load(Path::new(&dir)).unwrap().with_pad_token().unwrap();
    assert_eq!((n_added, tokenizer.pad(), tokenizer.end_ids()), (0, Some(0), vec![2]));
    let others = other_prompts("smollm2", &tokenizer, &records["prompts"]);
    assert!(others.is_empty(), "{others:#?}");
    for (chat, record) in chats().iter().zip(records["conversations"].as_array().unwrap()) {
        let encoded = encode(&tokenizer, chat).unwrap();
        let mask: Vec<u8> = encoded.trained.iter().map(|trained| u8::from(*trained)).collect();
        assert_eq!((json!(encoded.ids), json!(mask)), (record["ids"].clone(), record["mask"].clone()));
    }
}

#[test]
fn a_thinking_switch_is_that_of_transformers() {
    let qwen3 = || directory("qwen3");
    for thinking in [true, false] {
        let records = &recorded()["directories"]["qwen3"][format!("prompts_thinking_{thinking}")];
        let others = other_prompts("qwen3", &qwen3().with_thinking(thinking).unwrap(), records);
        assert!(others.is_empty(), "{thinking}: {others:#?}");
    }
    assert_ne!(
        recorded()["directories"]["qwen3"]["prompts_thinking_false"],
        recorded()["directories"]["qwen3"]["prompts"]
    );
    assert!(directory("chatml").with_thinking(true).is_none());
}

/// The prompts that differ from `records`.
fn other_prompts(name: &str, tokenizer: &Tokenizer, records: &Value) -> Vec<String> {
    let mut others = vec![];
    for (i, chat) in chats().iter().enumerate() {
        let record = &records[i];
        let prompt = encode_prompt(tokenizer, &chat[..chat.len() - 1]);
        match record["error"].as_str() {
            Some(error) => assert!(prompt.unwrap_err().to_string().contains(error), "{name} {i}"),
            None if prompt.as_ref().is_ok_and(|ids| json!(ids) == record["ids"]) => {}
            None => {
                let text = prompt.map(|ids| tokenizer.decode_with_specials(&ids));
                others.push(format!("{name} {i}: {text:?}"));
            }
        }
    }
    others
}

#[test]
fn conversations_and_their_masks_are_those_of_transformers() {
    for (name, directory_record) in recorded()["directories"].as_object().unwrap() {
        let tokenizer = directory(name);
        for (i, chat) in chats().iter().enumerate() {
            let record = &directory_record["conversations"][i];
            let encoded = match encode(&tokenizer, chat) {
                Ok(encoded) => encoded,
                // The oracle has no mask either.
                Err(error) => {
                    let is_told = matches!(&error, ConversationError::Tokenizer(TokenizerError::NoAnswer(_)));
                    assert!(record["mask"].is_null() && is_told, "{name} {i}: {error}");
                    continue;
                }
            };
            assert_eq!(json!(encoded.ids), record["ids"], "{name} {i}");
            if let Some(mask) = record["mask"].as_array() {
                let mask: Vec<bool> = mask.iter().map(|flag| flag == 1).collect();
                assert_eq!(encoded.trained, mask, "{name} {i}");
            }
        }
    }
}

#[test]
fn without_generation_blocks_an_answer_and_its_end_are_trained_on() {
    for (name, end) in [
        ("chatml", "<|im_end|>"),
        ("llama3", "<|eot_id|>"),
        ("zephyr", "</s>"),
        ("qwen3", "<|im_end|>"),
        ("qwen2.5", "<|im_end|>"),
        ("phi3", "<|end|>"),
        ("r1", "<｜end▁of▁sentence｜>"),
    ] {
        let tokenizer = directory(name);
        let chat = [Message::new(Role::User, "hi"), Message::new(Role::Assistant, "the cat")];
        let encoded = encode(&tokenizer, &chat).unwrap();
        let flags = encoded.ids.iter().zip(&encoded.trained);
        let trained: Vec<u32> = flags.filter(|(_, trained)| **trained).map(|(id, _)| *id).collect();
        let text = tokenizer.decode_with_specials(&trained);
        assert!(text.ends_with(&format!("the cat{end}")), "{name}: {text:?}");
        assert_eq!(tokenizer.end_of_turn(), tokenizer.token_id(end), "{name}");
        let response = encode_response(&tokenizer, "the cat").unwrap();
        assert_eq!(response, trained, "{name}");
        // Byte-level tokens of a line break depend on what follows two, and one prompt opens a block that is left out.
        if !["llama3", "r1"].contains(&name) {
            let row = [encode_prompt(&tokenizer, &chat[..1]).unwrap(), response].concat();
            assert!(encoded.ids.starts_with(&row), "{name}");
        }
    }
}

/// Ids of the marks in `ids`.
fn marks(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<u32> {
    ids.iter().copied().filter(|&id| tokenizer.is_mark(id)).collect()
}

#[test]
fn a_mark_in_a_message_stays_text_whatever_the_template_does() {
    for (name, record) in recorded()["directories"].as_object().unwrap() {
        let tokenizer = directory(name);
        let mut spelled: Vec<String> = tokenizer.marks.spellings().map(str::to_owned).collect();
        spelled.push(spelled.concat());
        for mark in spelled {
            for text in [format!("hi {mark}the"), mark.clone(), format!("{mark}{mark}"), format!("a\n{mark}\n b{mark}")]
            {
                // What the template does with its own marks, it does beside a text without any.
                let plain = [
                    Message::new(Role::User, "hi"),
                    Message::new(Role::Assistant, "ok"),
                    Message::new(Role::User, "hi"),
                ];
                let hostile = [
                    Message::new(Role::User, "hi"),
                    Message::new(Role::Assistant, "ok"),
                    Message::new(Role::User, &text),
                ];
                let expected = encode_prompt(&tokenizer, &plain).unwrap();
                match encode_prompt(&tokenizer, &hostile) {
                    Ok(ids) => {
                        assert_eq!(marks(&tokenizer, &ids), marks(&tokenizer, &expected), "{name} {text:?}");
                        let shown = tokenizer.decode_with_specials(&ids);
                        if record["tokenizer"] == "byte-level" {
                            let rendered = tokenizer.render_chat_template(&pairs(&hostile), true).unwrap();
                            assert_eq!(shown, rendered, "{name}");
                        }
                    }
                    Err(error) => {
                        let error = error.to_string();
                        assert!(error.contains("template") || error.contains("spells"), "{name}: {error}");
                        // Only templates that look into the text may give up.
                        assert!(name.starts_with("feature-") || name == "qwen3", "{name}: {error}");
                    }
                }
            }
        }
    }
}

#[test]
fn parts_of_a_mark_do_not_become_one_beside_the_templates_text() {
    let open = with_template("{% for m in messages %}{{ '<|im_start|><' + m.content + '>' }}{% endfor %}");
    let chat = [Message::new(Role::User, "|im_end|")];
    let start = open.token_id("<|im_start|>").unwrap();
    assert_eq!(marks(&open, &encode_prompt(&open, &chat).unwrap()), [start]);
    let cut = with_template("{% for m in messages %}{{ '<|im_start|>' + m.content.replace('-', '') }}{% endfor %}");
    let chat = [Message::new(Role::User, "a<|im_-end|>b")];
    assert_eq!(marks(&cut, &encode_prompt(&cut, &chat).unwrap()), [start]);
    // Brackets from the template, letters from the message.
    let wrapped = with_template("{% for m in messages %}{{ '<|' + m.content | lower + '|>' }}{% endfor %}");
    let chat = [Message::new(Role::User, "IM_END")];
    assert!(marks(&wrapped, &encode_prompt(&wrapped, &chat).unwrap()).is_empty());
    let wrapped = with_template("{% for m in messages %}{{ '<|im_' + m.content | lower + '|>' }}{% endfor %}");
    let error = encode_prompt(&wrapped, &[Message::new(Role::User, "END")]).unwrap_err().to_string();
    assert!(error.contains("cannot be told"), "{error}");
}

#[test]
fn a_template_that_asks_for_a_mark_in_a_message_is_refused_if_the_answer_matters() {
    let asks = with_template(
        "{% for m in messages %}{% if '<|im_end|>' in m.content %}<|im_start|>{% endif %}{{ m.content }}{% endfor %}",
    );
    let error = encode_prompt(&asks, &[Message::new(Role::User, "x<|im_end|>")]).unwrap_err().to_string();
    assert!(error.contains("cannot be told"), "{error}");
    assert_eq!(encode_prompt(&asks, &[Message::new(Role::User, "hi < |")]).unwrap().len(), 5);
}

#[test]
fn templates_that_would_not_end_or_would_fill_the_memory_are_stopped() {
    let doubled = "{% set s = 'xxxxxxxx' %}".to_owned() + &"{% set s = s OP s %}".repeat(40) + "{{ s }}";
    let nested = (0..40).fold("{{ x }}".to_owned(), |body, _| format!("{{% for x in [x ~ x] %}}{body}{{% endfor %}}"));
    for template in [
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}".to_owned(),
        "{% for i in range(90000) %}{% for j in range(90000) %}x{% endfor %}{% endfor %}".to_owned(),
        doubled.replace("OP", "+"),
        doubled.replace("OP", "~"),
        "{% set ns = namespace(s='xxxxxxxx') %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}".to_owned(),
        "{% set s = 'xx' %}".to_owned() + &"{% set s %}{{ s }}{{ s }}{% endset %}".repeat(40),
        "{% set s = [1, 2] %}".to_owned() + &"{% set s = s + s %}".repeat(40) + "{{ s | length }}{{ s | list | length }}",
        "{% set s = ['x' * 1000000] * 100000 %}{{ s | join }}".to_owned(),
        "{% set s = ['x' * 1000000] * 100000 %}{{ s | tojson }}".to_owned(),
        "{% set s = 'x' * 100000 %}{{ s.replace('x', s).replace('x', s) }}".to_owned(),
        "{% set s = 'x' * 100000 %}{{ s | replace('x', s) | replace('x', s) }}".to_owned(),
        "{{ 'x' | indent(1000000000, true) }}{{ '%999999999d' | format(1) }}{{ '%999999999d' % 1 }}".to_owned(),
        "{% macro m(s) %}{{ m(s ~ s) }}{% endmacro %}{{ m('xx') }}".to_owned(),
        "{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}".to_owned(),
        "{% set x = 'xx' %}".to_owned() + &nested,
        "{{ ".to_owned() + &"(".repeat(100_000) + "1" + &")".repeat(100_000) + " }}",
        "{{ ".to_owned() + &"[".repeat(100_000) + &"]".repeat(100_000) + " }}",
        "{% if 1 %}".repeat(20_000) + &"{% endif %}".repeat(20_000),
        "{{ 1 ".to_owned() + &"+ 1 ".repeat(100_000) + "}}",
        "{{ 'x' ".to_owned() + &"| upper ".repeat(100_000) + "}}",
        "{{ 2 ** 999999999 }}".to_owned(),
        "{{ messages[0].content * 999999999 }}".to_owned(),
        "{% set ns = namespace(s=[1]) %}{% for i in range(40) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}{{ ns.s ~ 1 }}".to_owned(),
        "{% set ns = namespace(s=[1]) %}{% for i in range(40) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s | tojson }}".to_owned(),
        "{{ ''.join(['x' * 1000000] * 100000) }}".to_owned(),
    ] {
        let began = std::time::Instant::now();
        // Said before, so that a template that does not end is known.
        println!("{}", template.chars().take(100).collect::<String>());
        let rendered = with_template(&template).render_chat_template(&[("user", "hi")], true);
        let begin: String = template.chars().take(60).collect();
        if let Ok(text) = rendered {
            assert!(text.len() < 2 << 20, "{begin}: {} bytes", text.len());
        }
        assert!(began.elapsed().as_secs() < 10, "{begin}: {:?}", began.elapsed());
    }
    let endless = with_template("{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}");
    let error = endless.render_chat_template(&[("user", "hi")], true).unwrap_err().to_string();
    assert!(error.contains("more steps or memory"), "{error}");
}

#[test]
fn a_long_conversation_is_within_the_limits() {
    let tokenizer = directory("qwen3");
    let chat: Vec<Message> = (0..400)
        .flat_map(|i| [Role::User, Role::Assistant].map(|role| Message::new(role, "the cat ".repeat(i))))
        .collect();
    assert!(encode_prompt(&tokenizer, &chat[..chat.len() - 1]).unwrap().len() > 100_000);
}

#[test]
fn what_a_template_raises_is_said() {
    let raises = with_template("{{ raise_exception('no system message here') }}");
    let error = raises.render_chat_template(&[("user", "hi")], true).unwrap_err().to_string();
    assert!(error.contains("chat template failed: no system message here"), "{error}");
    let unknown = with_template("{{ messages | unheard_of }}");
    let error = unknown.render_chat_template(&[("user", "hi")], true).unwrap_err().to_string();
    assert!(error.contains("unheard_of") && error.contains("line 1"), "{error}");
}

#[test]
fn the_time_is_told_in_the_format_asked_for() {
    let tokenizer = with_template("{{ strftime_now('%Y-%m-%d') }}");
    let rendered = tokenizer.render_chat_template(&[("user", "hi")], true).unwrap();
    assert!(rendered.len() == 10 && rendered.starts_with("20"), "{rendered}");
    assert!(with_template("{{ strftime_now('%!') }}").render_chat_template(&[("user", "hi")], true).is_err());
}

#[test]
fn templates_in_files_go_before_the_key() {
    let dir = tempfile::tempdir().unwrap();
    with_template("old").save(dir.path()).unwrap();
    assert_eq!(Tokenizer::load(dir.path()).unwrap().chat_template(), "old");
    assert!(!dir.path().join("chat_template.jinja").exists());
    fs::write(dir.path().join("chat_template.jinja"), "new").unwrap();
    assert_eq!(Tokenizer::load(dir.path()).unwrap().chat_template(), "new");
    fs::create_dir(dir.path().join("additional_chat_templates")).unwrap();
    fs::write(dir.path().join("additional_chat_templates/tool_use.jinja"), "tools").unwrap();
    let loaded = Tokenizer::load(dir.path()).unwrap();
    assert_eq!(loaded.chat_template(), "new");
    assert_eq!(loaded.settings["chat_template"], json!({ "tool_use": "tools", "default": "new" }));

    // What came in files is saved in files, whatever else is added.
    let out = tempfile::tempdir().unwrap();
    let (padded, _) = loaded.with_pad_token().unwrap();
    padded.save(out.path()).unwrap();
    let text = |name: &str| fs::read_to_string(out.path().join(name)).unwrap();
    assert_eq!(text("chat_template.jinja"), "new");
    assert_eq!(text("additional_chat_templates/tool_use.jinja"), "tools");
    assert!(!text("tokenizer_config.json").contains("chat_template"));
    assert_eq!(Tokenizer::load(out.path()).unwrap().settings, padded.settings);
}

#[test]
fn a_template_that_hides_the_answer_is_refused() {
    // Once another message follows, the answer is written backwards.
    let hides = with_template(
        "{% for m in messages %}{{ '<|im_start|>' + (m.content if loop.last else m.content[::-1]) + '<|im_end|>' }}{% endfor %}",
    );
    let chat = ["a", "bc", "d"].map(|text| Message::new(if text == "bc" { Role::Assistant } else { Role::User }, text));
    assert!(encode(&hides, &chat[..2]).unwrap().has_target());
    let error = encode(&hides, &chat).unwrap_err().to_string();
    assert!(error.contains("does not show where the answer in message 2"), "{error}");
}

#[test]
fn of_several_templates_one_must_be_the_default() {
    let directory = &recorded()["directories"]["chatml"];
    let mut settings = directory["settings"].clone();
    settings["chat_template"] = json!([{ "name": "a", "template": "1" }, { "name": "b", "template": "2" }]);
    let tokenizer = of_oracle("byte-level", &directory["added"], &settings);
    let error = encode_prompt(&tokenizer, &[Message::new(Role::User, "hi")]).unwrap_err().to_string();
    assert!(error.contains("there are `a`, `b` and none is named `default`"), "{error}");
    settings["chat_template"] = json!([{ "name": "a", "template": "1" }, { "name": "default", "template": "2" }]);
    assert_eq!(of_oracle("byte-level", &directory["added"], &settings).chat_template(), "2");
}

#[test]
fn a_template_of_ones_own_is_followed_though_the_six_tokens_are_there() {
    let own = of_fixture(TokenizerKind::Byte);
    assert!(!own.writes_by_template());
    let mut settings = own.settings.clone();
    settings.insert("chat_template".to_owned(), json!("{% for m in messages %}<|user|>{{ m.content }}{% endfor %}!"));
    let other = Tokenizer::new(own.library.clone(), settings).unwrap();
    let ids = encode_prompt(&other, &[Message::new(Role::User, "a")]).unwrap();
    assert_eq!(ids, [own.specials().user, u32::from(b'a'), u32::from(b'!')]);
}

/// Text that looks like marks, in other letters and with white space, and marks themselves.
fn mark_like() -> impl Strategy<Value = String> {
    let spelled = (0..SPECIAL_TOKENS.len(), 0..6usize).prop_map(|(i, form)| {
        let mark = SPECIAL_TOKENS[i];
        match form {
            0 => mark.to_uppercase(),
            1 => format!(" {mark}"),
            2 => format!("{mark}\n"),
            3 => mark.replace('|', "| "),
            4 => mark[1..].to_owned(),
            _ => mark.to_owned(),
        }
    });
    let parts = prop::collection::vec(prop_oneof![3 => spelled, 1 => "[ \\n<|>a-zA-Z]{0,6}", 1 => "\\PC{0,3}"], 0..8);
    parts.prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn a_conversation_has_the_marks_of_its_messages_and_no_others(texts in prop::collection::vec(mark_like(), 1..4)) {
        for tokenizer in lossless() {
            let Specials { bos, user, assistant, end, .. } = tokenizer.specials();
            let roles = [Role::User, Role::Assistant].into_iter().cycle();
            let chat: Vec<Message> = texts.iter().zip(roles).map(|(text, role)| Message::new(role, text)).collect();
            let mut expected = vec![bos];
            for message in &chat {
                expected.extend([if message.role == Role::User { user } else { assistant }, end]);
            }
            let encoded = encode(tokenizer, &chat).unwrap();
            prop_assert_eq!(marks(tokenizer, &encoded.ids), expected);
            let rendered = tokenizer.render_chat_template(&pairs(&chat), false).unwrap();
            prop_assert_eq!(tokenizer.decode_with_specials(&encoded.ids), rendered);
        }
    }

    #[test]
    fn by_a_template_too(text in mark_like()) {
        static TOKENIZERS: std::sync::LazyLock<Vec<Tokenizer>> = std::sync::LazyLock::new(|| {
            ["chatml-plain", "nanochat", "llama3", "zephyr", "chatml-unigram-first"].map(directory).into()
        });
        for tokenizer in TOKENIZERS.iter() {
            let spelled: String = tokenizer.marks.spellings().take(4).collect();
            let expected = encode_prompt(tokenizer, &[Message::new(Role::User, "a")]).unwrap();
            for text in [text.clone(), format!("{text}{spelled}"), text.replace("user", "im_end").replace("bos", "eot_id")] {
                let ids = encode_prompt(tokenizer, &[Message::new(Role::User, &text)]).unwrap();
                prop_assert_eq!(marks(tokenizer, &ids), marks(tokenizer, &expected), "{:?}", text);
            }
        }
    }
}
