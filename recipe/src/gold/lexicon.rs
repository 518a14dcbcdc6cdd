//! Gold from a word list: how pleasant the words of a text are.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context as _, ensure};

/// Words, and phrases of several words, with a valence each.
///
/// Made for AFINN (Nielsen, "A new ANEW", arXiv:1103.2903): valences from −5, most negative, to 5, most positive.
#[derive(Debug, Clone)]
pub struct Lexicon {
    valences: HashMap<String, f64>,
    /// Words of the longest phrase.
    n_longest: usize,
}

impl Lexicon {
    /// Reads a JSON object from words to valences.
    ///
    /// # Errors
    /// If the file cannot be read, is not such an object, is empty, lists what is no word, or leaves the scale of −5 to
    /// 5.
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        let shown = path.display();
        let text = std::fs::read_to_string(path).with_context(|| format!("failed to read the word list `{shown}`"))?;
        let listed: HashMap<String, f64> = serde_json::from_str(&text).with_context(|| {
            format!(
                "`{shown}` is not a word list\nhint: write one JSON object of words and valences, {{\"good\": 3, \
                 \"bad\": -3}}"
            )
        })?;
        ensure!(!listed.is_empty(), "the word list `{shown}` is empty");
        let mut valences = HashMap::new();
        let mut n_longest = 1;
        for (word, valence) in listed {
            ensure!(
                (-5.0..=5.0).contains(&valence),
                "`{word}` has the valence {valence} in `{shown}`, expected -5 to 5"
            );
            let words = words(&word);
            ensure!(!words.is_empty(), "`{word}` in `{shown}` is no word");
            n_longest = n_longest.max(words.len());
            valences.insert(words.join(" "), valence);
        }
        Ok(Self { valences, n_longest })
    }

    /// The mean valence of `text`.
    ///
    /// `Σ valence(listed words and phrases) / n`, with `n` all words of the text, so a text of twice the length is not
    /// twice as pleasant. 0 for a text without words. In `[−5, 5]`, for stories mostly in `[−0.5, 0.5]`.
    ///
    /// Words are runs of letters and digits with inner apostrophes and hyphens, in lower case; of phrases that begin at
    /// a word the longest counts, and its words do not count again. Negation is not understood, but for the phrases on
    /// the list (`not good`).
    pub fn score(&self, text: &str) -> f64 {
        let words = words(text);
        let mut sum = 0.0;
        let mut at = 0;
        while at < words.len() {
            let longest = self.n_longest.min(words.len() - at);
            let found = (1..=longest)
                .rev()
                .find_map(|n| self.valences.get(&words[at..at + n].join(" ")).map(|valence| (n, valence)));
            let (n, valence) = found.unwrap_or((1, &0.0));
            sum += valence;
            at += n;
        }
        if words.is_empty() { 0.0 } else { sum / words.len() as f64 }
    }
}

fn words(text: &str) -> Vec<String> {
    toy::text::words(&text.replace('\u{2019}', "'"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lexicon(json: &str) -> anyhow::Result<Lexicon> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("words.json");
        std::fs::write(&path, json).unwrap();
        Lexicon::load(&path)
    }

    #[test]
    fn the_score_is_the_mean_valence() {
        let lexicon = lexicon(r#"{"good": 3, "not good": -2, "can't stand": -3, "ill-fated": -2}"#).unwrap();
        assert_eq!(lexicon.score("A GOOD, good day!"), 1.5);
        assert_eq!(lexicon.score("It is not good."), -0.5);
        assert_eq!(lexicon.score("I can\u{2019}stand it; I can\u{2019}t stand it."), -3.0 / 7.0);
        assert_eq!(lexicon.score("An ill-fated trip, goodness"), -0.5);
        assert_eq!(lexicon.score(""), 0.0);
        assert_eq!(lexicon.score("Good. Good day"), lexicon.score("Good. Good day. Good. Good day"));
    }

    #[test]
    fn a_bad_list_is_an_error() {
        for (json, expected) in [
            ("good 3", "is not a word list\nhint: "),
            (r#"{"good": "3"}"#, "is not a word list\nhint: "),
            ("{}", "is empty"),
            (r#"{"good": 7}"#, "`good` has the valence 7"),
            (r#"{"!": 1}"#, "`!` in "),
        ] {
            let error = lexicon(json).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let error = Lexicon::load(Path::new("no/such.json")).unwrap_err().to_string();
        assert_eq!(error, "failed to read the word list `no/such.json`");
    }

    #[test]
    fn afinn_tells_a_pleasant_text_from_a_sad_one() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/afinn/afinn-165.json");
        if !path.exists() {
            #[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
            {
                eprintln!("skipped: there is no `{}`", path.display());
            }
            return;
        }
        let afinn = Lexicon::load(&path).unwrap();
        assert!(afinn.score("They laughed and were happy.") > 0.5);
        assert!(afinn.score("She cried. It was a terrible, sad day.") < -0.5);
    }
}
