//! Ending an answer at a text, which may come in pieces.

/// Looks for the first of several texts in a stream of pieces and holds back what might be its beginning.
#[derive(Debug, Clone)]
pub struct StopText {
    stops: Vec<String>,
    held: String,
}

impl StopText {
    /// A watch for `stops`; none of them may be empty.
    pub fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new() }
    }

    /// Takes the next piece. Returns the text that is now certainly before any stop text, and whether one was found.
    ///
    /// Of several the one that begins first counts.
    pub fn push(&mut self, piece: &str) -> (String, bool) {
        self.held.push_str(piece);
        if let Some(at) = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min() {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let is_beginning = |at: &usize| self.stops.iter().any(|stop| stop.starts_with(&self.held[*at..]));
        let certain = self.held.char_indices().map(|(at, _)| at).find(is_beginning).unwrap_or(self.held.len());
        let rest = self.held.split_off(certain);
        (std::mem::replace(&mut self.held, rest), false)
    }

    /// The text still held back when the stream has ended.
    pub fn finish(self) -> String {
        self.held
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The text that comes out of `pieces`, and whether a stop text was found.
    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let mut watch = StopText::new(stops.iter().map(|&stop| stop.to_owned()).collect());
        let mut text = String::new();
        for piece in pieces {
            let (out, found) = watch.push(piece);
            text += &out;
            if found {
                return (text, true);
            }
        }
        (text + &watch.finish(), false)
    }

    #[test]
    fn a_stop_text_is_found_across_pieces() {
        assert_eq!(run(&["END"], &["on", "e E", "N", "D two"]), ("one ".to_owned(), true));
        assert_eq!(run(&["aab"], &["a", "a", "a", "b", "c"]), ("a".to_owned(), true));
        assert_eq!(run(&["xyz", "é\n"], &["caf", "é", "\n", "xyz"]), ("caf".to_owned(), true));
    }

    #[test]
    fn the_earliest_stop_text_counts() {
        assert_eq!(run(&["two", "one"], &["zero one two"]), ("zero ".to_owned(), true));
    }

    #[test]
    fn nothing_is_lost_without_one() {
        assert_eq!(run(&["END"], &["the EN", "d EN"]), ("the ENd EN".to_owned(), false));
        assert_eq!(run(&[], &["a", "b"]), ("ab".to_owned(), false));
    }

    #[test]
    fn only_what_may_be_a_beginning_is_held_back() {
        let mut watch = StopText::new(vec!["\n\n".to_owned()]);
        assert_eq!(watch.push("line\n"), ("line".to_owned(), false));
        assert_eq!(watch.push("next"), ("\nnext".to_owned(), false));
    }
}
