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
pub enum TextError {
    #[error("the tokenizer cannot decode token {id}: {source}")]
    Decode { id: u32, source: tokenizers::Error },
    #[error(
        "the tokenizer's decoder takes back text when token {id} follows ({before:?} became {after:?}): \
         such text cannot be streamed; decode all tokens at the end instead"
    )]
    TakenBack { id: u32, before: String, after: String },
}

/// Decodes a growing sequence of tokens piece by piece.
///
/// The pieces together are the decoded text of all tokens, for byte-level and SentencePiece tokenizers alike. (Byte
/// fall-back is the one exception: there a whole run of bytes decodes to U+FFFD as soon as one of them is invalid,
/// also those whose characters were given out before.)
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
}

impl<'a> TextStream<'a> {
    pub fn new(tokenizer: &'a Tokenizer, special_tokens: SpecialTokens) -> Self {
        Self { tokenizer, special_tokens, window: Vec::new(), given: 0, given_text: String::new() }
    }

    /// Takes the next token and returns the text that it completes, often a word, sometimes nothing.
    ///
    /// # Errors
    /// When the tokenizer cannot decode the token.
    pub fn push(&mut self, id: u32) -> Result<String, TextError> {
        self.window.push(id);
        let text = self.decode(&self.window, id)?;
        let piece = self.after_given(&text, id)?;
        // U+FFFD at the end: perhaps the beginning of a character that the next tokens complete.
        if piece.is_empty() || piece.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        let piece = piece.to_owned();
        self.window.drain(..self.given);
        self.given = self.window.len();
        self.given_text = self.decode(&self.window, id)?;
        Ok(piece)
    }

    /// The rest of the text: bytes that no token completed become U+FFFD.
    ///
    /// # Errors
    /// When the tokenizer cannot decode the tokens held back.
    pub fn finish(self) -> Result<String, TextError> {
        let Some(&id) = self.window.last() else { return Ok(String::new()) };
        let text = self.decode(&self.window, id)?;
        self.after_given(&text, id).map(str::to_owned)
    }

    fn after_given<'t>(&self, text: &'t str, id: u32) -> Result<&'t str, TextError> {
        text.strip_prefix(self.given_text.as_str()).ok_or_else(|| TextError::TakenBack {
            id,
            before: self.given_text.clone(),
            after: text.to_owned(),
        })
    }

    /// `id` is the token to name where decoding fails.
    fn decode(&self, ids: &[u32], id: u32) -> Result<String, TextError> {
        let skip = self.special_tokens == SpecialTokens::Hide;
        self.tokenizer.decode(ids, skip).map_err(|source| TextError::Decode { id, source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quickstart::{corpus, tokenizer};
    use proptest::prelude::*;
    use std::sync::LazyLock;
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
    #[test]
    fn a_sentencepiece_decoder_keeps_the_spaces_between_pieces() -> anyhow::Result<()> {
        let names = ["▁Hello", "▁world", "▁", "<0xE6>", "<0x97>", "<0xA5>", "!"];
        let vocabulary: [_; 7] = std::array::from_fn(|id| (names[id].to_owned(), id as u32));
        let model = BpeBuilder::new().vocab_and_merges(vocabulary, vec![]);
        let mut tokenizer = Tokenizer::new(model.byte_fallback(true).build().map_err(anyhow::Error::msg)?);
        tokenizer.with_decoder(Some(Sequence::new(vec![
            Replace::new("▁", " ").map_err(anyhow::Error::msg)?.into(),
            ByteFallback::new().into(),
            Fuse::new().into(),
            Strip::new(' ', 1, 0).into(),
        ])));
        let ids = [0, 1, 2, 1, 3, 4, 5, 6, 2, 0];
        let pieces = pieces(&tokenizer, &ids, SpecialTokens::Hide)?;
        assert_eq!(pieces.concat(), "Hello world  world日!  Hello");
        assert_eq!(pieces.concat(), tokenizer.decode(&ids, true).map_err(anyhow::Error::msg)?);
        assert_eq!(pieces[..2], ["Hello", " world"]);
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
