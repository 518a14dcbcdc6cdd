//! Tokenizers from elsewhere: `SentencePiece`'s, ids with gaps, marks without a flag, and files that would harm.

use super::*;

fn recorded() -> Value {
    fixture("chat_templates.json")
}

#[test]
fn texts_have_the_ids_and_ids_the_texts_of_the_library() {
    let recorded = recorded();
    for (name, record) in recorded["tokenizers"].as_object().unwrap() {
        let tokenizer = load(&record["file"], &json!({})).unwrap();
        for (i, text) in strings(&recorded["texts"]).iter().enumerate() {
            let ids = tokenizer.encode(text).unwrap();
            assert_eq!(json!(ids), record["ids"][i], "{name} {text:?}");
            assert_eq!(json!(tokenizer.decode(&ids)), record["texts"][i], "{name} {text:?}");
        }
    }
}

/// The oracle's tokenizers, and others whose decoders depend on neighbours.
fn foreign() -> &'static [(String, Tokenizer)] {
    static TOKENIZERS: std::sync::LazyLock<Vec<(String, Tokenizer)>> = std::sync::LazyLock::new(|| {
        let recorded = recorded();
        let mut all: Vec<_> =
            recorded["tokenizers"].as_object().unwrap().iter().map(|(n, r)| (n.clone(), r["file"].clone())).collect();
        let base = recorded["tokenizers"]["sentencepiece-bpe"]["file"].clone();
        let replace = json!({ "type": "Replace", "pattern": { "String": "▁" }, "content": " " });
        let strip = json!({ "type": "Strip", "content": " ", "start": 3, "stop": 0 });
        for (i, decoder) in [
            json!(null),
            json!({ "type": "WordPiece", "prefix": "##", "cleanup": true }),
            json!({ "type": "BPEDecoder", "suffix": "e" }),
            json!({ "type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": true }),
            json!({ "type": "Sequence", "decoders": [replace, { "type": "ByteFallback" }, { "type": "Fuse" }, strip] }),
            json!({ "type": "Sequence", "decoders": [{ "type": "ByteFallback" }, { "type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true }] }),
        ]
        .into_iter()
        .enumerate()
        {
            let mut file = base.clone();
            file["decoder"] = decoder;
            all.push((format!("decoder {i}"), file));
        }
        all.into_iter().map(|(name, file)| (name, load(&file, &json!({})).unwrap())).collect()
    });
    &TOKENIZERS
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn pieces_as_they_are_printed_are_the_text_at_the_end(
        // Bytes and white space more often than letters, ids beyond the vocabulary now and then.
        ids in prop::collection::vec(prop_oneof![3 => 0..420u32, 2 => 3..40u32, 2 => 255..275u32, 2 => 120..260u32], 0..24),
    ) {
        for (name, tokenizer) in foreign() {
            let mut decoder = StreamDecoder::new(tokenizer);
            let mut text: String = ids.iter().map(|&id| decoder.push(id)).collect();
            text += &decoder.finish();
            prop_assert_eq!(&text, &tokenizer.decode(&ids), "{}", name);
        }
    }
}

/// Two words and byte-level letters, with `added` tokens.
fn words(added: &Value) -> Value {
    let vocab: Map<String, Value> =
        ["<unk>", "a", "b", "c"].iter().zip(0..).map(|(w, i)| ((*w).to_owned(), json!(i))).collect();
    let added: Vec<Value> = added
        .as_array()
        .unwrap()
        .iter()
        .map(|t| json!({ "id": t[0], "content": t[1], "special": t[2], "normalized": false, "single_word": false, "lstrip": false, "rstrip": false }))
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": { "type": "WhitespaceSplit" }, "post_processor": null, "decoder": null,
        "model": { "type": "WordLevel", "vocab": vocab, "unk_token": "<unk>" },
    })
}

#[test]
fn added_tokens_keep_the_ids_of_the_file() {
    let file = words(&json!([[14, "<|end|>", true], [9, "<|more|>", true], [0, "<unk>", true]]));
    let tokenizer = load(&file, &json!({})).unwrap();
    assert_eq!([tokenizer.token_id("<|end|>"), tokenizer.token_id("<|more|>")], [Some(14), Some(9)]);
    assert_eq!((tokenizer.vocab_size(), tokenizer.decode_with_specials(&[14, 1])), (15, "<|end|> a".to_owned()));
    // So does what is saved, and what is added later comes behind.
    let dir = tempfile::tempdir().unwrap();
    tokenizer.save(dir.path()).unwrap();
    let loaded = Tokenizer::load(dir.path()).unwrap();
    assert_eq!(loaded.sha256(), tokenizer.sha256());
    let (grown, n_added) = loaded.with_special_tokens_added().unwrap();
    assert_eq!((n_added, grown.specials().end, grown.specials().bos), (5, 14, 15));
}

#[test]
fn ids_that_cannot_be_kept_are_refused() {
    for (added, expected) in [
        (json!([[4, "x", true], [4, "y", true]]), "have the same id 4"),
        (json!([[2, "<x>", true]]), "which the vocabulary uses"),
        (json!([[3, "a", true]]), "but the vocabulary has it as 1"),
        (json!([[4_294_967_295_u32, "x", true]]), "at most 16777215 is taken"),
        (json!([[16_000_000, "x", true]]), "have no token, at most 65536 is taken"),
        (json!([[-1, "x", true]]), "has no `id`"),
    ] {
        let error = load(&words(&added), &json!({})).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("tokenizer.json"), "{error}");
    }
    let mut gap = words(&json!([[5, "<x>", true]]));
    gap["model"]["vocab"]["c"] = json!(4);
    assert!(load(&gap, &json!({})).unwrap_err().to_string().contains("ids up to 4"));
    gap["model"]["vocab"]["c"] = json!(4_294_967_295_u32);
    assert!(load(&gap, &json!({})).unwrap_err().to_string().contains("at most 16777215"));
    // The library writes one word an id, so such a file would not come back from a checkpoint.
    let mut twice = words(&json!([]));
    twice["model"]["vocab"]["c"] = json!(2);
    assert!(load(&twice, &json!({})).unwrap_err().to_string().contains("tokens `b` and `c` have the same id 2"));
}

#[test]
fn tokens_that_only_the_settings_list_are_added() {
    let listed = json!({ "added_tokens_decoder": {
        "4": { "content": "<|x|>", "special": true }, "5": { "content": "<y>", "special": false },
    }});
    let tokenizer = load(&words(&json!([])), &listed).unwrap();
    assert_eq!([tokenizer.token_id("<|x|>"), tokenizer.token_id("<y>")], [Some(4), Some(5)]);
    assert_eq!([tokenizer.is_special(4), tokenizer.is_special(5)], [true, false]);
}

#[test]
fn what_the_settings_leave_out_is_the_default_of_the_class() {
    let file = words(&json!([[4, "<|endoftext|>", true], [5, "</s>", true]]));
    let eos = |settings: Value| load(&file, &settings).unwrap().eos();
    assert_eq!(eos(json!({ "tokenizer_class": "GPT2TokenizerFast" })), Some(4));
    assert_eq!(eos(json!({ "tokenizer_class": "LlamaTokenizer" })), Some(5));
    assert_eq!(eos(json!({ "tokenizer_class": "GPT2Tokenizer", "eos_token": "</s>" })), Some(5));
    assert_eq!(eos(json!({ "tokenizer_class": "PreTrainedTokenizerFast" })), None);
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("tokenizer.json"), file.to_string()).unwrap();
    assert_eq!(Tokenizer::load(dir.path()).unwrap().eos(), None);
    fs::write(dir.path().join("config.json"), "{\"model_type\": \"gpt2\"}").unwrap();
    assert_eq!(Tokenizer::load(dir.path()).unwrap().eos(), Some(4));
    fs::write(dir.path().join("special_tokens_map.json"), "{\"eos_token\": {\"content\": \"</s>\"}}").unwrap();
    assert_eq!(Tokenizer::load(dir.path()).unwrap().eos(), Some(5));
}

#[test]
fn a_vocabulary_in_two_files_is_gpt2s_or_refused() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
    let vocab: Map<String, Value> = (0..=255u8).map(|b| (char_of_byte(b).to_string(), json!(b))).collect();
    write("vocab.json", &Value::Object(vocab).to_string());
    write("merges.txt", "#version: 0.2\n");
    assert_eq!(Tokenizer::load(dir.path()).unwrap().encode("a").unwrap(), [97]);
    write("tokenizer_config.json", "{\"tokenizer_class\": \"Qwen2Tokenizer\"}");
    assert!(Tokenizer::load(dir.path()).unwrap_err().to_string().contains("its class is `Qwen2`"));
}

#[test]
fn marks_without_a_flag_and_marks_that_are_words_stay_text() {
    let pieces =
        |words: &[&str]| -> Value { words.iter().map(|w| json!([w, if w.len() > 1 { -1.0 } else { -9.0 }])).collect() };
    let letters: Vec<String> = "<|imend_str>/x".chars().map(String::from).collect();
    let mut vocab: Vec<&str> = vec!["<unk>", "<|im_end|>", "</s>"];
    vocab.extend(letters.iter().map(String::as_str));
    let by_word: Map<String, Value> = vocab.iter().zip(0..).map(|(w, i)| ((*w).to_owned(), json!(i))).collect();
    let mark: Vec<String> = "<|im_end|>".chars().map(String::from).collect();
    let mut merged = by_word.clone();
    let mut merges = vec![];
    let mut so_far = mark[0].clone();
    for next in &mark[1..] {
        merges.push(json!([so_far, next]));
        so_far += next;
        let id = merged.len();
        merged.entry(so_far.clone()).or_insert(json!(id));
    }
    let settings = json!({ "eos_token": "</s>", "chat_template": "{{ '<|im_end|>' }}{% for m in messages %}{{ m.content }}{% endfor %}" });
    for model in [
        json!({ "type": "Unigram", "unk_id": 0, "vocab": pieces(&vocab), "byte_fallback": false }),
        json!({ "type": "WordLevel", "vocab": by_word, "unk_token": "<unk>" }),
        json!({ "type": "WordPiece", "vocab": by_word, "unk_token": "<unk>", "continuing_subword_prefix": "", "max_input_chars_per_word": 100 }),
        json!({ "type": "BPE", "vocab": merged, "merges": merges, "unk_token": "<unk>" }),
        json!({ "type": "BPE", "vocab": by_word, "merges": [], "unk_token": "<unk>", "ignore_merges": true }),
    ] {
        let mut file = words(&json!([]));
        file["pre_tokenizer"] =
            json!({ "type": "Split", "pattern": { "Regex": "<[^<>]+>" }, "behavior": "Isolated", "invert": false });
        file["model"] = model;
        let kind = file["model"]["type"].clone();
        let tokenizer = load(&file, &settings).unwrap();
        for text in ["<|im_end|>", "x<|im_end|>x", "</s>", "<|im_end|></s>"] {
            let ids = tokenizer.encode(text).unwrap();
            assert!(!ids.contains(&1) && !ids.contains(&2), "{kind} {text} {ids:?}");
            let prompt = tokenizer.encode_chat_template(&[("user", text)], true).unwrap().ids;
            assert_eq!(prompt.iter().filter(|id| [1, 2].contains(id)).count(), 1, "{kind} {text} {prompt:?}");
            assert_eq!(prompt[0], 1, "{kind} {text}");
        }
    }
}

#[test]
fn plain_words_and_white_space_that_were_added_are_text() {
    let file = words(&json!([[4, "  ", false], [5, "covid", false], [6, "<|turn|>", false]]));
    let tokenizer = load(&file, &json!({})).unwrap();
    assert_eq!(tokenizer.encode("a  covid").unwrap(), [1, 4, 5]);
    assert!(!tokenizer.encode("a <|turn|>").unwrap().contains(&6));
}

#[test]
fn files_that_could_hang_or_exhaust_or_panic_are_refused() {
    let change = |path: &[&str], value: Value| {
        let mut file = words(&json!([]));
        let last = path.iter().fold(&mut file, |part, key| &mut part[*key]);
        *last = value;
        file
    };
    let longer = json!({ "type": "Replace", "pattern": { "String": "a" }, "content": "aaaaaaaaaaaaaaaa" });
    let chain = |n: usize| json!({ "type": "Sequence", "normalizers": vec![longer.clone(); n] });
    let deep =
        (0..100).fold(json!({ "type": "NFC" }), |inner, _| json!({ "type": "Sequence", "normalizers": [inner] }));
    let regex = |pattern: &str| json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false });
    let single = json!({ "type": "TemplateProcessing", "single": [{ "Sequence": { "id": "B", "type_id": 0 } }], "pair": [], "special_tokens": {} });
    for file in [
        change(&["normalizer"], chain(12)),
        change(&["normalizer"], json!({ "type": "Prepend", "prepend": "x".repeat(5000) })),
        change(&["decoder"], json!({ "type": "Sequence", "decoders": vec![longer.clone(); 12] })),
        change(&["decoder"], json!({ "type": "Strip", "content": "a", "start": 0, "stop": 9 })),
        change(&["pre_tokenizer"], json!({ "type": "FixedLength", "length": 0 })),
        change(&["pre_tokenizer"], regex("(")),
        change(&["pre_tokenizer"], regex("((a{1000}){1000}){1000}")),
        change(&["post_processor"], single),
        change(&["normalizer"], json!({ "type": "Precompiled", "precompiled_charsmap": "AQ==" })),
        change(&["normalizer"], json!({ "type": "Precompiled", "precompiled_charsmap": "BAAAAAD/AAA=" })),
        change(&["model", "vocab"], json!({ "a": 1e300 })),
        change(&["model", "vocab"], json!({ "a": -1 })),
        change(&["model", "vocab"], json!([])),
        change(&["model"], json!({ "type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]] })),
        change(
            &["model"],
            json!({ "type": "WordPiece", "vocab": {}, "unk_token": "x", "max_input_chars_per_word": 1e300 }),
        ),
    ] {
        let Err(error) = load(&file, &json!({})) else { panic!("{file}") };
        let error = error.to_string();
        assert!(error.contains("tokenizer.json` is not a tokenizer: "), "{error}");
    }
    // These are odd, but do no harm.
    for file in [
        change(&["normalizer"], deep),
        change(
            &["truncation"],
            json!({ "max_length": 0, "stride": 9, "strategy": "LongestFirst", "direction": "Right" }),
        ),
        change(&["pre_tokenizer"], regex("(?:a|aa)+(?!b)")),
        change(&["pre_tokenizer"], regex("(?:(?:(?:a(?=b)){1000}){1000}){1000}")),
    ] {
        let began = std::time::Instant::now();
        if let Ok(tokenizer) = load(&file, &json!({})) {
            let _ = tokenizer.encode(&"a".repeat(10_000));
        }
        assert!(began.elapsed().as_secs() < 10, "{:?}", began.elapsed());
    }
    let text = "[".repeat(100_000);
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("tokenizer.json"), text).unwrap();
    assert!(Tokenizer::load(dir.path()).unwrap_err().to_string().contains("recursion limit"));
}

#[test]
fn text_without_a_break_is_learned_from_in_its_stride() {
    let dna: String =
        (0..160_000u64).map(|i| ['A', 'C', 'G', 'T'][((i * i * 2_654_435_761) >> 20) as usize % 4]).collect();
    let config = TokenizerConfig { vocab_size: 300, ..TokenizerConfig::default() };
    let began = std::time::Instant::now();
    let tokenizer = Tokenizer::train(&config, [dna.as_str()].iter(), true).unwrap();
    assert!(began.elapsed().as_secs() < 20, "{:?}", began.elapsed());
    let ids = tokenizer.encode(&dna).unwrap();
    assert!(ids.len() < dna.len() / 2, "merges are learned: {} tokens", ids.len());
    assert_eq!(tokenizer.decode(&ids), dna);
}
