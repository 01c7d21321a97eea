//! Tokens into text as they come: only complete characters are given out, so that a terminal never shows half of one.

use tokenizers::Tokenizer;

/// What happens to special tokens such as end of text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpecialTokens {
    Hide,
    Show,
}

/// Why tokens could not be turned into text.
#[derive(Debug, thiserror::Error)]
#[error("the tokenizer cannot decode token {id}: {source}")]
pub struct TextError {
    id: u32,
    source: tokenizers::Error,
}

/// Decodes a growing sequence of tokens piece by piece.
///
/// The pieces together are the decoded text of all tokens, for byte-level and SentencePiece tokenizers alike, but for two
/// things that a stream cannot or should not do. Of bytes as tokens (byte fall-back) that are no UTF-8 only those become
/// U+FFFD that belong to no character, where the library gives up the whole run of them. And a decoder that takes back
/// text when more follows (spaces before punctuation) cannot take back what was given out.
///
/// Tokens are decoded together with those of the piece before, since decoders treat the first token of a text
/// differently (SentencePiece drops its leading space).
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    special_tokens: SpecialTokens,
    /// The tokens of the last piece, then those whose text is still held back.
    window: Vec<u32>,
    /// How many tokens of the window have been given out, and their text as the window's beginning.
    given: usize,
    given_text: String,
    /// Bytes of byte tokens at the end that are no whole character yet; the window has given their tokens out.
    bytes: Vec<u8>,
}

impl<'a> TextStream<'a> {
    pub fn new(tokenizer: &'a Tokenizer, special_tokens: SpecialTokens) -> Self {
        let (window, given, given_text) = (Vec::new(), 0, String::new());
        Self { tokenizer, special_tokens, window, given, given_text, bytes: Vec::new() }
    }

    /// A stream that goes on behind the tokens of `prompt`: what it gives out follows the prompt's text, with the space
    /// between them if there is one. Special tokens of the prompt (begin-of-text) are no text to follow.
    ///
    /// # Errors
    /// When the tokenizer cannot decode a token.
    pub fn after(tokenizer: &'a Tokenizer, special_tokens: SpecialTokens, prompt: &[u32]) -> Result<Self, TextError> {
        let mut stream = Self::new(tokenizer, special_tokens);
        let added = tokenizer.get_added_tokens_decoder();
        for &id in prompt.iter().filter(|id| added.get(id).is_none_or(|token| !token.special)) {
            stream.push(id)?;
        }
        Ok(stream)
    }

    /// Takes the next token and returns the text that it completes, often a word, sometimes nothing.
    ///
    /// # Errors
    /// When the tokenizer cannot decode the token.
    pub fn push(&mut self, id: u32) -> Result<String, TextError> {
        if let Some(byte) = self.byte(id)? {
            let held = self.held(id)?;
            self.window.push(id);
            self.give_out(id)?;
            self.bytes.push(byte);
            return Ok(held + &whole_characters(&mut self.bytes));
        }
        let unfinished = self.unfinished();
        self.window.push(id);
        let held = self.held(id)?;
        // U+FFFD at the end: perhaps the beginning of a character that the next tokens complete.
        if held.is_empty() || held.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(unfinished);
        }
        self.give_out(id)?;
        Ok(unfinished + &held)
    }

    /// The rest of the text: bytes that no token completed become U+FFFD.
    ///
    /// # Errors
    /// When the tokenizer cannot decode the tokens held back.
    pub fn finish(mut self) -> Result<String, TextError> {
        let Some(&id) = self.window.last() else { return Ok(String::new()) };
        Ok(self.unfinished() + &self.held(id)?)
    }

    /// The text of the tokens that are held back.
    fn held(&self, id: u32) -> Result<String, TextError> {
        if self.given == self.window.len() {
            return Ok(String::new());
        }
        let text = self.decode(&self.window, id)?;
        match text.strip_prefix(self.given_text.as_str()) {
            Some(held) => Ok(held.to_owned()),
            // What was given out became another text: these tokens then have the text that they have alone.
            None => self.decode(&self.window[self.given..], id),
        }
    }

    /// Keeps the tokens that were held back as what the next ones are decoded with.
    fn give_out(&mut self, id: u32) -> Result<(), TextError> {
        self.window.drain(..self.given);
        self.given = self.window.len();
        self.given_text = self.decode(&self.window, id)?;
        Ok(())
    }

    /// What the bytes at the end are worth when no more of them follow.
    fn unfinished(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.bytes)).into_owned()
    }

    /// The byte that a token of byte fall-back (`<0xE6>`) stands for.
    fn byte(&self, id: u32) -> Result<Option<u8>, TextError> {
        let Some(name) = self.tokenizer.id_to_token(id).filter(|name| name.len() == 6) else { return Ok(None) };
        let digits = name.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
        let Some(byte) = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) else { return Ok(None) };
        // Without byte fall-back among the decoders it is a token like others.
        Ok((self.decode(&[id], id)? != name).then_some(byte))
    }

    /// `id` is the token to name where decoding fails.
    fn decode(&self, ids: &[u32], id: u32) -> Result<String, TextError> {
        let skip = self.special_tokens == SpecialTokens::Hide;
        self.tokenizer.decode(ids, skip).map_err(|source| TextError { id, source })
    }
}

/// Takes the characters from the beginning of `bytes`, U+FFFD for what can be none, and leaves the beginning of one that
/// further bytes may complete.
fn whole_characters(bytes: &mut Vec<u8>) -> String {
    let mut text = String::new();
    let mut taken = 0;
    for chunk in bytes.utf8_chunks() {
        text += chunk.valid();
        taken += chunk.valid().len();
        let invalid = chunk.invalid();
        let unfinished = taken + invalid.len() == bytes.len()
            && std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none());
        if !invalid.is_empty() && !unfinished {
            text.push(char::REPLACEMENT_CHARACTER);
            taken += invalid.len();
        }
    }
    bytes.drain(..taken);
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quickstart::{corpus, tokenizer};
    use proptest::prelude::*;
    use std::sync::LazyLock;
    use tokenizers::AddedToken;
    use tokenizers::decoders::byte_fallback::ByteFallback;
    use tokenizers::decoders::fuse::Fuse;
    use tokenizers::decoders::sequence::Sequence;
    use tokenizers::decoders::strip::Strip;
    use tokenizers::models::bpe::BpeBuilder;
    use tokenizers::normalizers::replace::Replace;

    static BYTE_LEVEL: LazyLock<Tokenizer> = LazyLock::new(|| {
        let corpus = corpus::generate(1, 1000, 0).expect("a thousand problems");
        let texts: Vec<String> = corpus.training.iter().map(corpus::Problem::document).collect();
        tokenizer::train(texts.iter().map(String::as_str)).expect("a tokenizer")
    });

    /// All pieces, the last one from `finish`.
    fn pieces(tokenizer: &Tokenizer, ids: &[u32], special_tokens: SpecialTokens) -> Result<Vec<String>, TextError> {
        let mut stream = TextStream::new(tokenizer, special_tokens);
        let mut pieces = ids.iter().map(|&id| stream.push(id)).collect::<Result<Vec<_>, _>>()?;
        pieces.push(stream.finish()?);
        Ok(pieces)
    }

    #[test]
    fn a_character_split_over_tokens_is_given_out_whole() -> anyhow::Result<()> {
        let text = "né 日本 🦀!";
        let encoding = BYTE_LEVEL.encode_fast(text, false).map_err(anyhow::Error::msg)?;
        assert_eq!(encoding.get_ids().len(), text.len(), "every byte is a token of its own");
        let pieces = pieces(&BYTE_LEVEL, encoding.get_ids(), SpecialTokens::Hide)?;
        let given: Vec<&str> = pieces.iter().map(String::as_str).filter(|piece| !piece.is_empty()).collect();
        assert_eq!(given, ["n", "é", " ", "日", "本", " ", "🦀", "!"]);
        Ok(())
    }

    #[test]
    fn an_unfinished_character_at_the_end_becomes_a_replacement_character() -> anyhow::Result<()> {
        let encoding = BYTE_LEVEL.encode_fast("a日", false).map_err(anyhow::Error::msg)?;
        let ids = &encoding.get_ids()[..3];
        assert_eq!(pieces(&BYTE_LEVEL, ids, SpecialTokens::Hide)?, ["a", "", "", "\u{FFFD}"]);
        Ok(())
    }

    #[test]
    fn special_tokens_are_hidden_or_shown() -> anyhow::Result<()> {
        let encoding = BYTE_LEVEL.encode_fast("x<|endoftext|>y", false).map_err(anyhow::Error::msg)?;
        assert_eq!(pieces(&BYTE_LEVEL, encoding.get_ids(), SpecialTokens::Hide)?, ["x", "", "y", ""]);
        assert_eq!(pieces(&BYTE_LEVEL, encoding.get_ids(), SpecialTokens::Show)?, ["x", "<|endoftext|>", "y", ""]);
        Ok(())
    }

    /// LLaMA's decoder: U+2581 for spaces, bytes as tokens, the first space of the text dropped.
    fn sentence_piece() -> anyhow::Result<Tokenizer> {
        let names =
            ["▁Hello", "▁world", "▁", "<0xE6>", "<0x97>", "<0xA5>", "!", "<0x9C>", "<0xAC>", "<0xFF>", "<s>", "<0xF0>"];
        let vocabulary: [_; 12] = std::array::from_fn(|id| (names[id].to_owned(), id as u32));
        let model = BpeBuilder::new().vocab_and_merges(vocabulary, vec![]);
        let mut tokenizer = Tokenizer::new(model.byte_fallback(true).build().map_err(anyhow::Error::msg)?);
        tokenizer.add_special_tokens([AddedToken::from("<s>", true)]).map_err(anyhow::Error::msg)?;
        tokenizer.with_decoder(Some(Sequence::new(vec![
            Replace::new("▁", " ").map_err(anyhow::Error::msg)?.into(),
            ByteFallback::new().into(),
            Fuse::new().into(),
            Strip::new(' ', 1, 0).into(),
        ])));
        Ok(tokenizer)
    }

    #[test]
    fn a_sentencepiece_decoder_keeps_the_spaces_between_pieces() -> anyhow::Result<()> {
        let tokenizer = sentence_piece()?;
        let ids = [0, 1, 2, 1, 3, 4, 5, 3, 7, 8, 6, 2, 0];
        let pieces = pieces(&tokenizer, &ids, SpecialTokens::Hide)?;
        assert_eq!(pieces.concat(), "Hello world  world日本!  Hello");
        assert_eq!(pieces.concat(), tokenizer.decode(&ids, true).map_err(anyhow::Error::msg)?);
        assert_eq!(pieces[..2], ["Hello", " world"]);
        assert_eq!(pieces[4..10], ["", "", "日", "", "", "本"]);
        Ok(())
    }

    #[test]
    fn byte_tokens_that_are_no_utf8_cost_no_other_text() -> anyhow::Result<()> {
        let tokenizer = sentence_piece()?;
        for (ids, expected) in [
            (&[3, 4, 5, 9, 3, 7, 8, 1][..], "日\u{FFFD}本 world"),
            (&[0, 3, 4, 1], "Hello\u{FFFD} world"),
            (&[0, 3, 4], "Hello\u{FFFD}"),
            (&[0, 3, 3, 4, 5], "Hello\u{FFFD}日"),
            (&[4, 5, 0], "\u{FFFD}\u{FFFD} Hello"),
            (&[11, 9, 6], "\u{FFFD}\u{FFFD}!"),
        ] {
            assert_eq!(pieces(&tokenizer, ids, SpecialTokens::Hide)?.concat(), expected, "{ids:?}");
        }
        Ok(())
    }

    #[test]
    fn a_continuation_keeps_its_space_behind_the_prompt() -> anyhow::Result<()> {
        let tokenizer = sentence_piece()?;
        for (prompt, ids, expected) in [
            (&[10, 0][..], &[1, 6][..], " world!"),
            (&[10], &[0, 1], "Hello world"),
            (&[], &[0, 1], "Hello world"),
            (&[10, 0, 3, 4], &[5, 1], "日 world"),
            (&[10, 0, 3, 4, 5], &[3, 7, 8], "本"),
        ] {
            for special_tokens in [SpecialTokens::Hide, SpecialTokens::Show] {
                let mut stream = TextStream::after(&tokenizer, special_tokens, prompt)?;
                let mut text = ids.iter().map(|&id| stream.push(id)).collect::<Result<String, _>>()?;
                text += &stream.finish()?;
                assert_eq!(text, expected, "{prompt:?} {ids:?}");
            }
        }
        Ok(())
    }

    proptest! {
        /// Any ids, also those whose bytes are no UTF-8.
        #[test]
        fn the_pieces_are_the_whole_text(
            ids in prop::collection::vec(0..tokenizer::VOCABULARY_SIZE as u32, 0..60),
            bytes in prop::collection::vec(1..257u32, 0..60),
        ) {
            for ids in [&ids, &bytes] {
                for special_tokens in [SpecialTokens::Hide, SpecialTokens::Show] {
                    let whole = BYTE_LEVEL.decode(ids, special_tokens == SpecialTokens::Hide);
                    let pieces = pieces(&BYTE_LEVEL, ids, special_tokens)?;
                    prop_assert_eq!(pieces.concat(), whole.map_err(|error| TestCaseError::fail(error.to_string()))?);
                }
            }
        }
    }
}
