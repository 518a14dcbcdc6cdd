//! Sentences and words of a text, the same for the story-teller and its judge.

/// The sentences of `text`, each with its mark.
///
/// A sentence goes on after `.`, `!` or `?` (and a closing quotation mark) where a small letter follows: `"Yes!" said
/// Tom.` is one sentence. A last one without a mark is returned as well.
pub fn sentences(text: &str) -> Vec<&str> {
    let text = text.trim();
    let bytes = text.as_bytes();
    let mut found = Vec::new();
    let mut start = 0;
    let mut i = 0;
    while i < bytes.len() {
        let is_mark = matches!(bytes[i], b'.' | b'!' | b'?');
        i += 1;
        if !is_mark {
            continue;
        }
        if bytes.get(i) == Some(&b'"') && opened_quotes(&text[start..i]) {
            i += 1;
        }
        let rest = text[i..].trim_start();
        let goes_on = rest.starts_with(|c: char| c.is_lowercase() || ".!?".contains(c));
        if !goes_on {
            found.push(text[start..i].trim());
            start = i;
        }
    }
    let last = text[start..].trim();
    if !last.is_empty() {
        found.push(last);
    }
    found
}

/// Whether a quotation mark stands open at the end of `text`.
fn opened_quotes(text: &str) -> bool {
    text.bytes().filter(|&b| b == b'"').count() % 2 == 1
}

/// The words of `text` in lower case, without punctuation.
pub fn words(text: &str) -> Vec<String> {
    text.split(|c: char| !c.is_alphanumeric() && c != '\'' && c != '-')
        .map(|word| word.trim_matches(['\'', '-']).to_lowercase())
        .filter(|word| !word.is_empty())
        .collect()
}

/// Words as they stand, and punctuation marks, each by itself.
pub fn tokens(text: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut start = None;
    for (i, c) in text.char_indices() {
        let is_letter = c.is_alphanumeric() || c == '\'' || c == '-';
        if is_letter {
            start.get_or_insert(i);
            continue;
        }
        if let Some(from) = start.take() {
            found.push(&text[from..i]);
        }
        if !c.is_whitespace() {
            found.push(&text[i..i + c.len_utf8()]);
        }
    }
    if let Some(from) = start {
        found.push(&text[from..]);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sentence_goes_on_after_speech() {
        let text = "Tom ran. \"Is it mine?\" asked Tom. \"Yes!\" said the fox. \"No!\" Then it";
        assert_eq!(
            sentences(text),
            ["Tom ran.", "\"Is it mine?\" asked Tom.", "\"Yes!\" said the fox.", "\"No!\"", "Then it"]
        );
        assert!(sentences("  ").is_empty());
    }

    #[test]
    fn tokens_keep_capitals_and_marks() {
        assert_eq!(tokens("\"Oh no,\" he said."), ["\"", "Oh", "no", ",", "\"", "he", "said", "."]);
        assert_eq!(words("\"Oh no,\" He said."), ["oh", "no", "he", "said"]);
    }
}
