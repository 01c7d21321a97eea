//! The quickstart's own byte-level BPE, trained on its corpus.

use std::path::{Path, PathBuf};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, Tokenizer};

/// The text of the token that stands before every document; its id is [`END_OF_TEXT_ID`].
pub const END_OF_TEXT: &str = "<|endoftext|>";
pub const END_OF_TEXT_ID: u32 = 0;

/// Tokens of the trained vocabulary, end of text included.
pub const VOCABULARY_SIZE: usize = 640;

/// Why a tokenizer could not be trained or saved.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    #[error("cannot train the tokenizer: {0}")]
    Train(tokenizers::Error),
    #[error(
        "the tokenizer has only {found} of {wanted} tokens: the texts have too few different words; train it on more texts"
    )]
    SmallSample { found: usize, wanted: usize },
    #[error("cannot write the tokenizer as JSON: {0}")]
    Serialize(tokenizers::Error),
    #[error("cannot write the tokenizer to {}: {source}", path.display())]
    Write { path: PathBuf, source: std::io::Error },
}

/// Trains a byte-level BPE of [`VOCABULARY_SIZE`] tokens on `texts`; every digit is a token of its own.
///
/// The same texts give the same tokenizer, whatever the number of threads.
///
/// # Errors
/// When the texts have too few different words for the vocabulary.
pub fn train<'a>(texts: impl Iterator<Item = &'a str> + Send) -> Result<Tokenizer, TokenizerError> {
    train_with(VOCABULARY_SIZE, texts)
}

/// As [`train`], of `vocabulary` tokens.
pub fn train_with<'a>(
    vocabulary: usize,
    texts: impl Iterator<Item = &'a str> + Send,
) -> Result<Tokenizer, TokenizerError> {
    let mut trainer = TrainerWrapper::from(
        BpeTrainer::builder()
            .vocab_size(vocabulary)
            .show_progress(false)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(vec![AddedToken::from(END_OF_TEXT, true)])
            .build(),
    );
    let byte_level = ByteLevel::new(false, true, true);
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![Digits::new(true).into(), byte_level.into()])));
    tokenizer.with_decoder(Some(byte_level));
    tokenizer.train(&mut trainer, texts).map_err(TokenizerError::Train)?;
    match tokenizer.get_vocab_size(true) {
        found if found == vocabulary => Ok(tokenizer),
        found => Err(TokenizerError::SmallSample { found, wanted: vocabulary }),
    }
}

/// Writes `tokenizer.json` and the `tokenizer_config.json` that `transformers` wants beside it into `folder`.
///
/// # Errors
/// When a file cannot be written.
pub fn save(tokenizer: &Tokenizer, folder: &Path, model_max_length: usize) -> Result<(), TokenizerError> {
    let config = serde_json::json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "model_max_length": model_max_length,
        "add_prefix_space": false,
        "clean_up_tokenization_spaces": false,
    });
    let tokenizer_json = tokenizer.to_string(true).map_err(TokenizerError::Serialize)?;
    for (name, text) in [("tokenizer.json", tokenizer_json), ("tokenizer_config.json", format!("{config:#}"))] {
        let path = folder.join(name);
        std::fs::write(&path, text + "\n").map_err(|source| TokenizerError::Write { path, source })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quickstart::corpus::{self, Problem};
    use proptest::prelude::*;
    use std::sync::LazyLock;

    static DOCUMENTS: LazyLock<Vec<String>> = LazyLock::new(|| {
        corpus::generate(1337, 1000, 0).expect("a thousand problems").training.iter().map(Problem::document).collect()
    });
    static TOKENIZER: LazyLock<Tokenizer> =
        LazyLock::new(|| train(DOCUMENTS.iter().map(String::as_str)).expect("a tokenizer"));

    fn json(tokenizer: &Tokenizer) -> String {
        tokenizer.to_string(true).expect("a tokenizer can be written")
    }

    /// Hash maps inside the trainer have random seeds: each training in one process is as good as one in another.
    ///
    /// That their order cannot matter is known from the second claim: where every merge makes a new token, every pair
    /// is queued once, and the queue's order (count, then pair) leaves nothing to chance.
    #[test]
    fn training_is_deterministic() -> anyhow::Result<()> {
        for seed in 0..8 {
            let documents: Vec<String> =
                corpus::generate(seed, 1000, 0)?.training.iter().map(Problem::document).collect();
            let tokenizer = train(documents.iter().map(String::as_str))?;
            let parallel = train(documents.iter().map(String::as_str))?;
            assert_eq!(json(&tokenizer), json(&parallel));
            let value: serde_json::Value = serde_json::from_str(&json(&tokenizer))?;
            let merges = value["model"]["merges"].as_array().map(Vec::len);
            assert_eq!(merges, Some(VOCABULARY_SIZE - 256 - 1), "seed {seed}");
        }
        Ok(())
    }

    #[test]
    fn numbers_are_sequences_of_digits() -> anyhow::Result<()> {
        let encoding = TOKENIZER.encode("6*24=$<<6*24=144>>144.", false).map_err(anyhow::Error::msg)?;
        assert_eq!(encoding.get_tokens().join(" "), "6 * 2 4 =$<< 6 * 2 4 = 1 4 4 >> 1 4 4 .");
        let with_digits = (0..VOCABULARY_SIZE as u32)
            .filter_map(|id| TOKENIZER.id_to_token(id))
            .filter(|token| token.contains(|c: char| c.is_ascii_digit()));
        assert!(with_digits.eq((0..10).map(|digit: u8| digit.to_string())));
        Ok(())
    }

    #[test]
    fn end_of_text_is_one_special_token() -> anyhow::Result<()> {
        assert_eq!(TOKENIZER.token_to_id(END_OF_TEXT), Some(END_OF_TEXT_ID));
        let encoding = TOKENIZER.encode_fast("<|endoftext|>\n", false).map_err(anyhow::Error::msg)?;
        assert_eq!(encoding.get_ids()[0], END_OF_TEXT_ID);
        assert_eq!(encoding.get_ids().len(), 2);
        assert_eq!(TOKENIZER.decode(encoding.get_ids(), true).map_err(anyhow::Error::msg)?, "\n");
        Ok(())
    }

    #[test]
    fn documents_are_short() -> anyhow::Result<()> {
        let mut lengths = Vec::new();
        for document in DOCUMENTS.iter() {
            lengths.push(TOKENIZER.encode_fast(document.as_str(), false).map_err(anyhow::Error::msg)?.get_ids().len());
        }
        let mean = lengths.iter().sum::<usize>() as f64 / lengths.len() as f64;
        let longest = lengths.into_iter().max();
        assert!((50.0..75.0).contains(&mean) && longest < Some(100), "mean {mean}, longest {longest:?}");
        Ok(())
    }

    #[test]
    fn too_few_words_are_an_error() {
        let error = train(["a few words"].into_iter()).expect_err("three words make no vocabulary");
        assert!(matches!(error, TokenizerError::SmallSample { found, .. } if found < 300), "{error}");
    }

    #[test]
    fn a_saved_tokenizer_reads_back_and_a_missing_folder_is_an_error() -> anyhow::Result<()> {
        let folder = tempfile::tempdir()?;
        save(&TOKENIZER, folder.path(), 256)?;
        let read = Tokenizer::from_file(folder.path().join("tokenizer.json")).map_err(anyhow::Error::msg)?;
        assert_eq!(json(&read), json(&TOKENIZER));
        let missing = save(&TOKENIZER, &folder.path().join("missing"), 256).expect_err("no such folder");
        assert!(missing.to_string().contains("tokenizer.json"), "{missing}");
        Ok(())
    }

    proptest! {
        #[test]
        fn any_text_survives_a_round_trip(text in "\\PC*|[ -~\n\t]*|.*") {
            let encoding = TOKENIZER.encode_fast(text.as_str(), false).expect("bytes can always be encoded");
            prop_assert_eq!(TOKENIZER.decode(encoding.get_ids(), false).expect("ids can always be decoded"), text);
        }
    }
}
