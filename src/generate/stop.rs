//! Stop strings: generated text ends before the first of them, also where one is spread over several pieces.

/// A stop string that would stop before any text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a stop string is empty: give at least one character, or leave it out")]
pub struct EmptyStopString;

/// What became of a piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scanned {
    /// Text that is certainly before any stop string; generation goes on.
    More(String),
    /// The last text, up to a stop string; generation is over.
    Stopped(String),
}

/// Looks for stop strings in text that comes in pieces.
///
/// The stop string that is complete first counts; how the text is cut into pieces makes no difference.
#[derive(Clone, Debug)]
pub struct StopScanner {
    stops: Vec<String>,
    /// The end of the text so far, as long as it may be the beginning of a stop string.
    held: String,
}

impl StopScanner {
    /// # Errors
    /// When a stop string is empty.
    pub fn new(stops: Vec<String>) -> Result<Self, EmptyStopString> {
        if stops.iter().any(String::is_empty) { Err(EmptyStopString) } else { Ok(Self { stops, held: String::new() }) }
    }

    /// Takes the next piece of text.
    pub fn push(&mut self, piece: &str) -> Scanned {
        self.held.push_str(piece);
        let found = self.stops.iter().filter_map(|stop| self.held.find(stop).map(|start| (start + stop.len(), start)));
        if let Some((_, start)) = found.min() {
            self.held.truncate(start);
            return Scanned::Stopped(std::mem::take(&mut self.held));
        }
        let kept = self.stops.iter().map(|stop| begun(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - kept);
        Scanned::More(std::mem::replace(&mut self.held, rest))
    }

    /// The text held back, when generation ends without a stop string.
    pub fn finish(self) -> String {
        self.held
    }
}

/// Length in bytes of the longest end of `text` with which `stop` begins, without being complete.
fn begun(text: &str, stop: &str) -> usize {
    stop.char_indices().map(|(length, _)| length).filter(|&length| text.ends_with(&stop[..length])).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The text given out, and whether a stop string ended it.
    fn scan(stops: &[&str], pieces: &[&str]) -> Result<(String, bool), EmptyStopString> {
        let mut scanner = StopScanner::new(stops.iter().map(|stop| stop.to_string()).collect())?;
        let mut text = String::new();
        for piece in pieces {
            match scanner.push(piece) {
                Scanned::More(more) => text += &more,
                Scanned::Stopped(last) => return Ok((text + &last, true)),
            }
        }
        Ok((text + &scanner.finish(), false))
    }

    #[test]
    fn text_is_cut_before_the_stop_string_even_across_pieces() -> Result<(), EmptyStopString> {
        assert_eq!(scan(&["Question:"], &["It is 4.\n\nQue", "st", "ion: What"])?, ("It is 4.\n\n".into(), true));
        assert_eq!(scan(&["Question:"], &["Que", "st", "s"])?, ("Quests".into(), false));
        assert_eq!(scan(&["aab"], &["a", "a", "a", "b"])?, ("a".into(), true));
        assert_eq!(scan(&[], &["a", "b"])?, ("ab".into(), false));
        assert_eq!(scan(&["日本"], &["x日", "曜日", "本"])?, ("x日曜".into(), true));
        assert_eq!(StopScanner::new(vec![String::new()]).err(), Some(EmptyStopString));
        Ok(())
    }

    #[test]
    fn the_stop_string_that_is_complete_first_counts() -> Result<(), EmptyStopString> {
        assert_eq!(scan(&["abc", "b"], &["xabc"])?, ("xa".into(), true));
        assert_eq!(scan(&["abc", "bc"], &["xabc"])?, ("x".into(), true));
        Ok(())
    }

    #[test]
    fn only_the_beginning_of_a_stop_string_is_held_back() -> Result<(), EmptyStopString> {
        let mut scanner = StopScanner::new(vec!["\n\n".into()])?;
        assert_eq!(scanner.push("a\n"), Scanned::More("a".into()));
        assert_eq!(scanner.push("b"), Scanned::More("\nb".into()));
        Ok(())
    }

    proptest! {
        #[test]
        fn the_cut_into_pieces_makes_no_difference(
            text in "[abé]{0,30}",
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
            cuts in prop::collection::vec(1usize..6, 0..30),
        ) {
            let characters: Vec<char> = text.chars().collect();
            let mut rest = characters.as_slice();
            let mut pieces: Vec<String> = Vec::new();
            for cut in cuts {
                let (piece, after) = rest.split_at(cut.min(rest.len()));
                pieces.push(piece.iter().collect());
                rest = after;
            }
            pieces.push(rest.iter().collect());
            let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let scanned = scan(&stops, &pieces)?;
            let ends = stops.iter().filter_map(|stop| text.find(stop).map(|start| (start + stop.len(), start)));
            let expected = ends.min().map_or((text.clone(), false), |(_, start)| (text[..start].to_owned(), true));
            prop_assert_eq!(scanned, expected);
        }
    }
}
