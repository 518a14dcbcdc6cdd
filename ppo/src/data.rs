//! Prompts in, lines of responses out.

use std::path::PathBuf;

use common::score::{Prompts, Rollout, ScoreError};
use common::tokenizer::Tokenizer;
use serde_json::{Value, json};

use crate::config::PpoConfig;

impl PpoConfig {
    /// Reads prompts as `[data]` says; each has to leave room for a response in a context of `max_seq_len` tokens.
    ///
    /// # Errors
    /// As [`Prompts::read`].
    pub fn read_prompts(
        &self,
        files: &[PathBuf],
        tokenizer: &Tokenizer,
        max_seq_len: usize,
    ) -> Result<Prompts, ScoreError> {
        let (options, on_too_long) = (self.data.read_options(), self.data.on_too_long);
        Prompts::read(files, tokenizer, max_seq_len, self.ppo.response_length, options, on_too_long)
    }
}

/// The line of `rollouts.jsonl` or `samples.jsonl`; `score` is the one that counts.
pub(crate) fn line(rollout: &Rollout, score: f32) -> Value {
    let mut line = json!({
        "prompt": rollout.prompt.text,
        "response": rollout.response.text,
        "score": score,
        "kl": rollout.kl(),
        "length": rollout.response.answer().len(),
        "finish": if rollout.response.ended { "stop" } else { "length" },
    });
    if !rollout.member_scores.is_empty() {
        line["member_scores"] = json!(rollout.member_scores);
    }
    if let Some(gold) = rollout.gold {
        line["gold"] = json!(gold);
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use common::score::{EncodedPrompt, Response};

    #[test]
    fn a_line_of_rollouts_names_what_it_holds() {
        let response =
            Response { ids: vec![5; 2], log_probs: vec![-1.0, -0.5], text: "r".into(), ended: true, n_after_end: 0 };
        let mut rollout = Rollout {
            prompt: EncodedPrompt { ids: vec![0, 1], text: "p".into() },
            response,
            ref_log_probs: vec![-1.5, -0.25],
            score: 2.0,
            member_scores: Vec::new(),
            gold: None,
        };
        // KL = (−1 + 1.5) + (−0.5 + 0.25).
        assert_eq!(
            line(&rollout, 1.0),
            json!({ "prompt": "p", "response": "r", "score": 1.0, "kl": 0.25, "length": 2, "finish": "stop" })
        );
        (rollout.gold, rollout.response.ended) = (Some(0.5), false);
        rollout.member_scores = vec![1.5, 2.5];
        let line = line(&rollout, -1.0);
        assert_eq!((&line["gold"], &line["finish"]), (&json!(0.5), &json!("length")));
        assert_eq!(line["member_scores"], json!([1.5, 2.5]));
    }
}
