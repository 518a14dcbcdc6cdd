//! Gold scorers: what answers are really worth, where that is known.
//!
//! Training never sees a gold score. The recipe uses it to label pairs through the simulated labeller, and to tell
//! whether a higher score of the reward model is a better answer. A recipe names its scorer in `recipe.toml`:
//!
//! ```toml
//! [gold]
//! kind = "lexicon"   # or "world", for the generated data of configs/tiny
//! words = "$DATA/afinn/afinn-165.json"
//! ```

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub mod lexicon;

pub use lexicon::Lexicon;

/// The `[gold]` section of a recipe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GoldConfig {
    /// The scorer. Required.
    pub kind: GoldKind,
    /// Word list of `lexicon`: a JSON object from words to valences, such as AFINN.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub words: Option<PathBuf>,
}

/// The scorers there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum GoldKind {
    /// Whether a story of the generated world does what its request asks, from 0 to 1.
    World,
    /// How pleasant the words of a text are.
    Lexicon,
}

impl GoldKind {
    /// What it scores, for the report.
    pub const fn describe(self) -> &'static str {
        match self {
            Self::World => {
                "how well a story does what its request asks, from 0 to 1: the named things appear, the ending has the mood asked \
                 for, the story ends, nothing repeats; length is neutral"
            }
            Self::Lexicon => "mean valence of an answer’s words by a list of word ratings",
        }
    }
}

impl GoldConfig {
    /// Checks that the fields fit together.
    ///
    /// # Errors
    /// If a word list is missing, or given where none is used.
    pub fn validate(&self) -> anyhow::Result<()> {
        match (self.kind, &self.words) {
            (GoldKind::Lexicon, None) => anyhow::bail!(
                "`gold.kind` is `lexicon`, but `gold.words` is missing\nhint: name a JSON file of words and valences, \
                 such as AFINN"
            ),
            (GoldKind::World, Some(_)) => anyhow::bail!(
                "`gold.words` is given, but `gold.kind` is `world`, which has its own words\nhint: remove `gold.words`"
            ),
            _ => Ok(()),
        }
    }

    /// Opens the scorer; its path must be absolute or relative to the working directory.
    ///
    /// # Errors
    /// As [`Self::validate`]; if the word list cannot be read.
    pub fn open(&self) -> anyhow::Result<GoldScorer> {
        self.validate()?;
        match &self.words {
            None => Ok(GoldScorer::World),
            Some(words) => Ok(GoldScorer::Lexicon(Lexicon::load(words)?)),
        }
    }
}

/// Scores answers by their text alone.
#[derive(Debug, Clone)]
pub enum GoldScorer {
    /// See [`toy::gold::score`].
    World,
    /// See [`Lexicon::score`].
    Lexicon(Lexicon),
}

impl GoldScorer {
    /// The gold score of `response` as an answer to `prompt`.
    ///
    /// `World` gives a number in `[0, 1]`, or `None` if `prompt` asks for no story. `Lexicon` looks at the response
    /// only and always answers.
    pub fn score(&self, prompt: &str, response: &str) -> Option<f64> {
        match self {
            Self::World => toy::gold::score(prompt, response),
            Self::Lexicon(lexicon) => Some(lexicon.score(response)),
        }
    }

    /// Whether answers to `prompt` have a score.
    pub fn understands(&self, prompt: &str) -> bool {
        self.score(prompt, "").is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scorer_is_named_in_the_recipe() {
        let config: GoldConfig = serde_json::from_str(r#"{"kind": "world"}"#).unwrap();
        let scorer = config.open().unwrap();
        assert_eq!(scorer.score("Where was Mia?", "She was in the park."), None);
        assert!(!scorer.understands("Where was Mia?") && scorer.understands("Tell me a story about Mia."));
        assert!(scorer.score("Tell me a story about Mia.", "Mia was very happy.").is_some());

        for bad in [r#"{"kind": "lexicon"}"#, r#"{"kind": "world", "words": "x.json"}"#] {
            let config: GoldConfig = serde_json::from_str(bad).unwrap();
            let error = config.open().unwrap_err().to_string();
            assert!(error.contains("\nhint: "), "{error}");
        }
        assert!(serde_json::from_str::<GoldConfig>(r#"{"kind": "world", "wrods": "x"}"#).is_err());
        assert!(serde_json::from_str::<GoldConfig>(r#"{"kind": "wrold"}"#).is_err());
    }

    #[test]
    fn a_lexicon_scores_any_answer() {
        let dir = tempfile::tempdir().unwrap();
        let words = dir.path().join("words.json");
        std::fs::write(&words, r#"{"good": 3}"#).unwrap();
        let scorer = GoldConfig { kind: GoldKind::Lexicon, words: Some(words) }.open().unwrap();
        assert_eq!(scorer.score("Hello?", "A good day."), Some(1.0));
    }
}
