//! Ids that end answers, and padding that is none of them.

use super::*;

/// `ChatML`'s tokenizer with `more` special tokens and changed settings.
fn chatml(more: &[&str], change: impl FnOnce(&mut Value)) -> Tokenizer {
    let recorded = fixture("chat_templates.json");
    let mut file = recorded["tokenizers"]["byte-level"]["file"].clone();
    let mut settings = recorded["directories"]["chatml"]["settings"].clone();
    change(&mut settings);
    let first = file["model"]["vocab"].as_object().unwrap().len();
    let tokens = ["<|im_start|>", "<|im_end|>"].iter().chain(more).zip(first..);
    let added = tokens.map(|(token, id)| {
        json!({
            "id": id, "content": token, "special": true, "normalized": false, "single_word": false, "lstrip": false,
            "rstrip": false,
        })
    });
    file["added_tokens"] = added.collect();
    load(&file, &settings).unwrap()
}

/// What rows are padded with, and how many ids were added for it.
fn padding(tokenizer: Tokenizer) -> (String, usize) {
    let n_before = tokenizer.vocab_size();
    let (padded, n_added) = tokenizer.with_pad_token().unwrap();
    assert_eq!(padded.vocab_size(), n_before + n_added);
    let pad = padded.pad().unwrap();
    assert!(!padded.end_ids().contains(&pad) && padded.is_mark(pad));
    assert_eq!(padded.configured("pad_token"), padded.token_text(pad));
    (padded.token_text(pad).unwrap(), n_added)
}

#[test]
fn a_padding_token_that_ends_answers_is_replaced() {
    let pad_is_end = |settings: &mut Value| settings["pad_token"] = json!("<|im_end|>");
    let unused = |more: &[&str]| padding(chatml(more, pad_is_end));
    assert_eq!(unused(&[]), ("<|pad|>".to_owned(), 1));
    assert_eq!(unused(&["<|endoftext|>"]), ("<|endoftext|>".to_owned(), 0));
    assert_eq!(unused(&["<|endoftext|>", "<|finetune_right_pad_id|>"]), ("<|finetune_right_pad_id|>".to_owned(), 0));
    // Without any the same, and one that is sound stays.
    assert_eq!(padding(chatml(&[], |_| {})), ("<|pad|>".to_owned(), 1));
    assert_eq!(padding(chatml(&["<x>", "[PAD]"], |s| s["pad_token"] = json!("<x>"))), ("<x>".to_owned(), 0));
}

#[test]
fn a_token_in_use_is_not_taken_for_padding() {
    let begins = |s: &mut Value| s["bos_token"] = json!("<|endoftext|>");
    assert_eq!(padding(chatml(&["<|endoftext|>"], begins)), ("<|pad|>".to_owned(), 1));
    let is_written =
        |s: &mut Value| s["chat_template"] = json!(format!("<|endoftext|>{}", s["chat_template"].as_str().unwrap()));
    assert_eq!(padding(chatml(&["<|endoftext|>"], is_written)), ("<|pad|>".to_owned(), 1));
    // As Qwen 2.5's generation_config.json ends answers at what its tokenizer pads with.
    let qwen = || chatml(&["<|endoftext|>", "<|vision_pad|>"], |s| s["pad_token"] = json!("<|endoftext|>"));
    let end_of_text = qwen().token_id("<|endoftext|>").unwrap();
    assert_eq!(padding(qwen()), ("<|endoftext|>".to_owned(), 0));
    let ends = qwen().with_end_ids(vec![end_of_text]);
    assert_eq!(ends.end_ids(), [end_of_text - 1, end_of_text]);
    assert_eq!(padding(ends), ("<|vision_pad|>".to_owned(), 0));
}

#[test]
fn the_token_for_unknown_text_pads_where_no_text_is_unknown() {
    let recorded = fixture("chat_templates.json");
    let zephyr = |base: &str| {
        let mut settings = recorded["directories"]["zephyr"]["settings"].clone();
        settings["pad_token"] = json!("</s>");
        load(&recorded["tokenizers"][base]["file"], &settings).unwrap()
    };
    assert_eq!(padding(zephyr("sentencepiece-bpe")), ("<unk>".to_owned(), 0));
    assert_eq!(padding(zephyr("unigram")), ("<|pad|>".to_owned(), 1));
    let (padded, _) = zephyr("sentencepiece-bpe").with_pad_token().unwrap();
    let ids = padded.encode("字 <unk>").unwrap();
    assert_eq!(padded.decode(&ids), "字 <unk>");
    assert!(!ids.contains(&padded.pad().unwrap()));
}

#[test]
fn what_pads_is_kept_by_a_save() {
    let (padded, _) = chatml(&[], |s| s["pad_token"] = json!("<|im_end|>")).with_pad_token().unwrap();
    let dir = tempfile::tempdir().unwrap();
    padded.save(dir.path()).unwrap();
    let loaded = Tokenizer::load(dir.path()).unwrap();
    assert_eq!((loaded.pad(), loaded.sha256()), (padded.pad(), padded.sha256()));
    assert_eq!((loaded.chat_template(), loaded.end_ids()), (padded.chat_template(), padded.end_ids()));
    assert_eq!(loaded.with_pad_token().unwrap().1, 0);
    let own = of_fixture(TokenizerKind::Byte);
    assert_eq!((own.pad(), own.end_ids()), (Some(own.specials().pad), vec![own.specials().end]));
}
