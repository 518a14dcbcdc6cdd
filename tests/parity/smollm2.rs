//! A whole model of the hub: SmolLM2-135M-Instruct against transformers, by `fixtures/smollm2.json` from
//! `oracles/smollm2.py`.

use common::conversation::{Message, Role, encode_prompt};
use common::generate::{GenerateOptions, SamplingConfig, generate};
use common::loss::token_log_probs;
use common::tokenizer::Tokenizer;

use super::*;

/// Two candidates nearer than this may change places with the order of sums: logits have a size of 20.
const NEAR_TIE: f64 = 1e-3;

/// Log-probabilities of a text, in nats.
const LOG_PROB: f64 = 1e-3;

/// The model's directory and the recorded numbers, where the directory is there.
fn model_and_numbers() -> Option<(PathBuf, Value)> {
    let Some(dir) = std::env::var_os("KINDLING_SMOLLM2").map(PathBuf::from) else {
        println!("skipped: KINDLING_SMOLLM2 names no directory of SmolLM2-135M-Instruct");
        return None;
    };
    let recorded = json_of(&fixtures().join("smollm2.json"));
    let sha256 = sha256_of_file(&dir.join(hf::WEIGHTS_FILE)).unwrap();
    assert_eq!(json!(sha256), recorded["weights_sha256"], "the numbers were recorded with other weights");
    Some((dir, recorded))
}

#[test]
fn smollm2_answers_ten_prompts_and_reads_a_page_as_transformers() {
    let Some((dir, recorded)) = model_and_numbers() else { return };
    let (model, tokens, _) = hf::read(&dir).unwrap();
    let gpt = Gpt::from_named(&model.config, model.tensors, &Device::flex()).unwrap();
    let tokenizer = Tokenizer::load(&dir).unwrap();

    let answers = recorded["answers"].as_array().unwrap();
    let prompts: Vec<Vec<u32>> = answers
        .iter()
        .map(|answer| {
            let message = Message::new(Role::User, answer["prompt"].as_str().unwrap());
            let prompt = encode_prompt(&tokenizer, &[message]).unwrap();
            assert_eq!(json!(prompt), answer["prompt_ids"]);
            prompt
        })
        .collect();
    let config = SamplingConfig::greedy(recorded["max_new"].as_u64().unwrap() as usize, tokens.eos);
    let ours = generate(&gpt, &prompts, &config, &Streams::new(0), 0, GenerateOptions::default()).unwrap();
    for (answer, ours) in answers.iter().zip(ours) {
        let theirs = &ids(&json!([answer["answer_ids"]]))[0];
        let n_equal = ours.ids.iter().zip(theirs).take_while(|(a, b)| a == b).count();
        if n_equal < theirs.len() || n_equal < ours.ids.len() {
            let lead = answer["lead"][n_equal].as_f64().unwrap();
            assert!(lead < NEAR_TIE, "{}: token {n_equal} differs, which led by {lead}", answer["prompt"]);
            println!("near tie: {}: token {n_equal} led by {lead}", answer["prompt"]);
        }
    }

    let page = tokenizer.encode(recorded["page"].as_str().unwrap()).unwrap();
    assert_eq!(json!(page), recorded["page_ids"]);
    let (inputs, targets) = (&page[..page.len() - 1], &page[1..]);
    let hidden = gpt.hidden(tensor(&[inputs.to_vec()], &gpt.device()), &Layout::right_padded());
    let targets = tensor(&[targets.to_vec()], &gpt.device()).reshape([inputs.len()]);
    let ours = numbers(&token_log_probs(&gpt, hidden.reshape([inputs.len(), model.config.d_model]), targets, 1.0));
    let off = ours.iter().zip(floats(&recorded["page_log_probs"])).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    println!("largest difference of {} log-probabilities: {off:.2e} nats", ours.len());
    assert!(off <= LOG_PROB, "log-probabilities differ by {off}");
}
