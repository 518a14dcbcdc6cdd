//! The conversation so far, and as much of it as fits the context window.

use common::conversation::{ConversationError, Message, Role, encode_prompt};
use common::tokenizer::Tokenizer;

/// A system message and the turns since.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct History {
    system: Option<String>,
    /// The turns of user and assistant, oldest first.
    turns: Vec<(String, String)>,
}

/// The prompt for the next answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FittedPrompt {
    /// Token ids.
    pub ids: Vec<u32>,
    /// How many turns were forgotten for it.
    pub n_dropped: usize,
}

impl History {
    /// An empty conversation.
    pub fn new(system: Option<String>) -> Self {
        Self { system, turns: Vec::new() }
    }

    /// Replaces the system message; an empty one means none.
    pub fn set_system(&mut self, system: &str) {
        self.system = (!system.is_empty()).then(|| system.to_owned());
    }

    /// Whether there is a system message.
    pub fn has_system(&self) -> bool {
        self.system.is_some()
    }

    /// Forgets all turns; the system message stays.
    pub fn reset(&mut self) {
        self.turns.clear();
    }

    /// Remembers a turn.
    pub fn push(&mut self, message: String, answer: String) {
        self.turns.push((message, answer));
    }

    /// The prompt for an answer to `message`.
    ///
    /// Forgets the oldest turns, whole, until the prompt has at most `budget` tokens. The system message and
    /// `message` always stay: if they alone are longer, so is the prompt.
    ///
    /// # Errors
    /// If a text cannot be encoded. No turn is forgotten then.
    pub fn prompt(
        &mut self,
        tokenizer: &Tokenizer,
        message: &str,
        budget: usize,
    ) -> Result<FittedPrompt, ConversationError> {
        for n_dropped in 0..=self.turns.len() {
            let ids = encode_prompt(tokenizer, &self.messages(n_dropped, message))?;
            if ids.len() <= budget || n_dropped == self.turns.len() {
                self.turns.drain(..n_dropped);
                return Ok(FittedPrompt { ids, n_dropped });
            }
        }
        unreachable!("the last round returns")
    }

    fn messages(&self, n_dropped: usize, message: &str) -> Vec<Message> {
        let mut messages: Vec<Message> = self.system.iter().map(|text| Message::new(Role::System, text)).collect();
        for (message, answer) in &self.turns[n_dropped..] {
            messages.push(Message::new(Role::User, message));
            messages.push(Message::new(Role::Assistant, answer));
        }
        messages.push(Message::new(Role::User, message));
        messages
    }
}

#[cfg(test)]
mod tests {
    use common::testing::byte_tokenizer;

    use super::*;

    /// A byte tokenizer makes 2 tokens of each message's marks and one of each byte; `<|bos|>` and `<|assistant|>`
    /// add 2: 3 turns of 6 tokens, the message of 3 and a system message of 5.
    fn history() -> History {
        let mut history = History::new(Some("sys".to_owned()));
        for (message, answer) in [("1", "a"), ("2", "b"), ("3", "c")] {
            history.push(message.to_owned(), answer.to_owned());
        }
        history
    }

    #[test]
    fn all_turns_stay_while_they_fit() {
        let prompt = history().prompt(&byte_tokenizer(), "4", 28).unwrap();
        assert_eq!((prompt.ids.len(), prompt.n_dropped), (28, 0));
    }

    #[test]
    fn the_oldest_turns_are_dropped_whole_and_the_system_message_stays() {
        let tokenizer = byte_tokenizer();
        let mut history = history();
        let prompt = history.prompt(&tokenizer, "4", 27).unwrap();
        assert_eq!((prompt.ids.len(), prompt.n_dropped), (22, 1));
        assert_eq!(tokenizer.decode(&prompt.ids), "sys2b3c4");
        // Forgotten is forgotten, even if the next message leaves room again.
        assert_eq!(history.prompt(&tokenizer, "4", 100).unwrap().ids, prompt.ids);
        let prompt = history.prompt(&tokenizer, "5", 0).unwrap();
        assert_eq!((tokenizer.decode(&prompt.ids).as_str(), prompt.n_dropped), ("sys5", 2));
    }

    #[test]
    fn reset_keeps_the_system_message() {
        let mut history = history();
        history.reset();
        assert_eq!(history, History::new(Some("sys".to_owned())));
        history.set_system("");
        assert_eq!(history, History::new(None));
    }
}
