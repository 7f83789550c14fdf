//! Stop strings over a stream of text.

/// Looks for the first stop string in text that arrives in pieces. A tail that may be the beginning of one is held
/// back, so nothing that turns out to belong to a stop string is ever given out.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<String>,
    /// Text not given out yet.
    held: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StopOutcome {
    /// Text that is certainly before any stop string.
    Text(String),
    /// `stop` was found; this is the text before it. Nothing follows.
    Stopped { text: String, stop: String },
}

impl StopMatcher {
    pub fn new(stops: &[String]) -> Self {
        let stops = stops.iter().filter(|s| !s.is_empty()).cloned().collect();
        Self { stops, held: String::new() }
    }

    pub fn push(&mut self, piece: &str) -> StopOutcome {
        if self.stops.is_empty() {
            return StopOutcome::Text(piece.to_owned());
        }
        self.held.push_str(piece);
        // The match that ends first, as when looking after every character; of those the one that begins first.
        let matches = self.stops.iter().filter_map(|stop| self.held.find(stop).map(|at| (at + stop.len(), at, stop)));
        if let Some((_, at, stop)) = matches.min() {
            let stop = stop.clone();
            self.held.truncate(at);
            return StopOutcome::Stopped { text: std::mem::take(&mut self.held), stop };
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        StopOutcome::Text(std::mem::replace(&mut self.held, rest))
    }

    /// Text that passes by without being looked at (before `min_tokens`).
    pub fn pass(&mut self, piece: &str) -> String {
        let mut text = std::mem::take(&mut self.held);
        text.push_str(piece);
        text
    }

    /// The output ended by itself: what was held back is ordinary text.
    pub fn flush(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes of the longest proper prefix of `stop` that `text` ends with.
fn overlap(text: &str, stop: &str) -> usize {
    stop.char_indices()
        .map(|(at, _)| at)
        .rev()
        .find(|&len| len <= text.len() && text.ends_with(&stop[..len]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (String, bool) {
        let stops: Vec<String> = stops.iter().map(|&s| s.to_owned()).collect();
        let mut matcher = StopMatcher::new(&stops);
        let mut out = String::new();
        for piece in pieces {
            match matcher.push(piece) {
                StopOutcome::Text(text) => out.push_str(&text),
                StopOutcome::Stopped { text, .. } => return (out + &text, true),
            }
        }
        (out + &matcher.flush(), false)
    }

    #[test]
    fn a_stop_string_across_pieces_is_cut_out() {
        assert_eq!(run(&["</s>"], &["Hello<", "/", "s", ">more"]), ("Hello".to_owned(), true));
    }

    #[test]
    fn a_tail_that_comes_to_nothing_is_given_out() {
        assert_eq!(run(&["</s>"], &["a <", "/b> <"]), ("a </b> <".to_owned(), false));
    }

    #[test]
    fn the_match_that_ends_first_wins() {
        assert_eq!(run(&["abcd", "bc"], &["xabcd"]), ("xa".to_owned(), true));
    }

    #[test]
    fn text_before_a_possible_match_is_not_held() {
        let mut matcher = StopMatcher::new(&["\n\n".to_owned()]);
        assert_eq!(matcher.push("line\n"), StopOutcome::Text("line".to_owned()));
        assert_eq!(matcher.push("next"), StopOutcome::Text("\nnext".to_owned()));
    }

    proptest! {
        /// Whatever the split, the result is the whole text cut at the first match.
        #[test]
        fn any_split_gives_the_same(text in "[abé]{0,12}", cuts in prop::collection::vec(0usize..13, 0..5),
                                    stops in prop::collection::vec("[abé]{1,3}", 0..3)) {
            let mut at: Vec<usize> = cuts.into_iter().filter(|&c| text.is_char_boundary(c)).collect();
            at.extend([0, text.len()]);
            at.sort_unstable();
            let pieces: Vec<&str> = at.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let first = stops.iter().filter_map(|s| text.find(s).map(|i| (i + s.len(), i))).min();
            let whole = first.map_or((text.clone(), false), |(_, i)| (text[..i].to_owned(), true));
            prop_assert_eq!(run(&stops, &pieces), whole);
        }
    }
}
