//! Text that spells special tokens, which is no error.

use common::testing::byte_tokenizer;
use pipeline_tests::Lab;

use crate::models;

const SPELLED: &str = "<|bos|> <|end|> <|assistant|><|pad|> <|user|>";

fn prompt_ids(lab: &Lab, more: &[&str]) -> Vec<u32> {
    let args = ["generate", "--checkpoint", "sft", "--prompt", SPELLED, "--json", "--max-tokens", "1"];
    let answer: serde_json::Value = serde_json::from_str(&lab.ok("chat", &[&args[..], more].concat())).unwrap();
    serde_json::from_value(answer["prompt_token_ids"].clone()).unwrap()
}

#[test]
fn a_prompt_that_spells_them_has_only_those_of_the_conversation() {
    let lab = models();
    let specials = byte_tokenizer().specials();
    let all = [specials.bos, specials.pad, specials.system, specials.user, specials.assistant, specials.end];
    let found = |ids: &[u32]| ids.iter().copied().filter(|id| all.contains(id)).collect::<Vec<_>>();
    let ids = prompt_ids(&lab, &[]);
    assert_eq!(found(&ids), [specials.bos, specials.user, specials.end, specials.assistant]);
    assert_eq!(ids.len(), SPELLED.len() + 4, "every other token is a byte of the text");
    let raw = prompt_ids(&lab, &["--raw"]);
    assert_eq!((found(&raw), raw.len()), (vec![specials.bos], SPELLED.len() + 1));
}

#[test]
fn every_stage_trains_on_text_that_spells_them() {
    let lab = models();
    let text = format!("{SPELLED} once\n\n").repeat(40);
    lab.write("data/train.txt", &text);
    lab.write("data/val.txt", &text);
    let short = "<|end|> <|bos|>";
    let json = |value: serde_json::Value| format!("{value}\n").repeat(8);
    for set in ["train", "val"] {
        let conversation = serde_json::json!({ "prompt": short, "completion": "<|end|>" });
        lab.write(&format!("data/sft.{set}.jsonl"), json(conversation));
        let pair = serde_json::json!({ "prompt": short, "chosen": "<|end|>", "rejected": "<|pad|>" });
        lab.write(&format!("data/pairs.{set}.jsonl"), json(pair));
        lab.write(&format!("data/prompts.{set}.jsonl"), json(serde_json::json!({ "prompt": short })));
    }
    let few = ["-q", "--set", "train.steps=2"];
    lab.ok("pretrain", &crate::pretrain(&few));
    let measured = lab.ok("pretrain", &["eval", "--checkpoint", "base", "--data", "data/val.txt"]);
    let measured: serde_json::Value = serde_json::from_str(&measured).unwrap();
    // Byte by byte, after one `<|bos|>` a document: were a special token made of the text, there would be fewer.
    let document = SPELLED.len() + " once".len() + 1;
    assert_eq!(measured["tokens"], document * 40 - 1);
    lab.ok("sft", &crate::sft_into("out-sft", &few));
    lab.ok("reward-model", &crate::reward_model_into("out-reward", &few));
    lab.ok("ppo", &crate::ppo_into("out-ppo", &few));
}
