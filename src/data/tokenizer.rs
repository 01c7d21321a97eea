//! Tokenizers as the hub stores them: loading, the end-of-text token, and encoding documents as training text.

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::path::Path;
use tokenizers::models::ModelWrapper;
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, PostProcessorWrapper, Tokenizer};

/// The end-of-text token of GPT-2 and many after it.
const END_OF_TEXT: &str = "<|endoftext|>";

/// A tokenizer, and what training needs to know of it.
#[derive(Clone)]
pub struct TextTokenizer {
    tokenizer: Tokenizer,
    begin_of_text: u32,
    end_of_text: u32,
    /// What ends an answer: the eos_token that the files name, else end-of-text.
    end_of_answer: u32,
    vocabulary_size: usize,
    digest: [u8; 32],
}

impl TextTokenizer {
    /// Loads `path`: a tokenizer.json, or a folder with one, or with vocab.json and merges.txt (byte-level BPE).
    ///
    /// End-of-text is `<|endoftext|>`, else the eos_token that tokenizer_config.json or special_tokens_map.json beside
    /// it names, else `</s>`. Begin-of-text, which goes before each document, is `<|endoftext|>` too, else the
    /// bos_token that they name, else `<s>`, else end-of-text. Truncation and padding that the file asks for are switched off, and BPE dropout too.
    pub fn load(path: &Path) -> Result<Self> {
        let (file, folder) = match path.is_dir() {
            true => (path.join("tokenizer.json"), path),
            false => (path.to_path_buf(), path.parent().unwrap_or(Path::new("."))),
        };
        let pairs = [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")];
        let pair = pairs.map(|(vocabulary, merges)| (folder.join(vocabulary), folder.join(merges)));
        let pair = pair.iter().find(|(vocabulary, merges)| vocabulary.is_file() && merges.is_file());
        let tokenizer = match (file.is_file(), pair) {
            (true, _) => {
                let bytes = std::fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
                let parsed = Tokenizer::from_bytes(&bytes).map_err(|error| anyhow!(error));
                parsed.with_context(|| format!("{} is not a tokenizer.json that can be read", file.display()))?
            }
            (false, Some((vocabulary, merges))) if path.is_dir() => byte_level_bpe(vocabulary, merges)?,
            _ => bail!(
                "there is no tokenizer at {}: looked for tokenizer.json, or vocab.json and merges.txt",
                path.display()
            ),
        };
        let candidates = |role: &str, usual: &str| -> Result<Vec<String>> {
            let named = named_token(folder, role)?;
            Ok([Some(END_OF_TEXT.to_string()), named, Some(usual.to_string())].into_iter().flatten().collect())
        };
        let find = |candidates: &[String]| candidates.iter().find_map(|token| tokenizer.token_to_id(token));
        let ends = candidates("eos_token", "</s>")?;
        let Some(end_of_text) = find(&ends) else {
            bail!(
                "the tokenizer at {} has no end-of-text token: looked for {} (name one as eos_token in \
                 tokenizer_config.json)",
                path.display(),
                ends.join(", ")
            );
        };
        let begin_of_text = find(&candidates("bos_token", "<s>")?).unwrap_or(end_of_text);
        let named = named_token(folder, "eos_token")?;
        let end_of_answer = named.and_then(|token| tokenizer.token_to_id(&token)).unwrap_or(end_of_text);
        let loaded =
            Self::new(tokenizer, end_of_text).with_context(|| format!("the tokenizer at {}", path.display()))?;
        Ok(Self { begin_of_text, end_of_answer, ..loaded })
    }

    /// Takes a tokenizer that was trained or loaded elsewhere, in which one token begins and ends texts.
    pub fn new(mut tokenizer: Tokenizer, end_of_text: u32) -> Result<Self> {
        tokenizer.with_padding(None).with_truncation(None).map_err(|error| anyhow!(error))?;
        if let ModelWrapper::BPE(bpe) = tokenizer.get_model()
            && bpe.dropout.is_some()
        {
            let mut bpe = bpe.clone();
            bpe.dropout = None;
            tokenizer.with_model(bpe);
        }
        let largest = tokenizer.get_vocab(true).into_values().max().context("its vocabulary is empty")?;
        let written = tokenizer.to_string(false).map_err(|error| anyhow!(error))?;
        let digest = Sha256::digest(written).into();
        let (begin_of_text, end_of_answer) = (end_of_text, end_of_text);
        let vocabulary_size = largest as usize + 1;
        Ok(Self { tokenizer, begin_of_text, end_of_text, end_of_answer, vocabulary_size, digest })
    }

    /// The id put before each document.
    pub fn begin_of_text(&self) -> u32 {
        self.begin_of_text
    }

    /// The id at which a text ends.
    pub fn end_of_text(&self) -> u32 {
        self.end_of_text
    }

    /// The id that ends an answer in fine-tuning, at which generation stops.
    pub fn end_of_answer(&self) -> u32 {
        self.end_of_answer
    }

    /// The text of the token `id`.
    pub fn token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// The ids that the tokenizer itself puts before a text.
    pub fn beginning(&self) -> Result<Vec<u32>> {
        let ids = |special| {
            let encoding = self.tokenizer.encode_fast("a", special).map_err(|error| anyhow!(error));
            Ok::<_, anyhow::Error>(encoding.context("cannot tokenize a letter")?.get_ids().to_vec())
        };
        let (with, plain) = (ids(true)?, ids(false)?);
        let start = with.windows(plain.len().max(1)).position(|window| window == plain).unwrap_or(0);
        Ok(with[..start].to_vec())
    }

    /// One more than the largest id.
    pub fn vocabulary_size(&self) -> usize {
        self.vocabulary_size
    }

    /// The library's tokenizer, which recognises special tokens in a text.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// The ids of a prompt: special tokens are recognised, none is added.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, false).map_err(|error| anyhow!(error));
        Ok(encoding.context("cannot tokenize the text")?.get_ids().to_vec())
    }

    /// The ids of a text with what the tokenizer's own template puts around one (LLaMA's begin-of-text; nothing for GPT-2).
    pub fn encode_with_template(&self, text: &str) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, true).map_err(|error| anyhow!(error));
        Ok(encoding.context("cannot tokenize the text")?.get_ids().to_vec())
    }

    /// The text of `ids`, special tokens included.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer.decode(ids, false).map_err(|error| anyhow!(error)).context("cannot turn ids into text")
    }

    /// SHA-256 of all that the tokenizer is.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// An encoder of texts one by one, as examples and evaluations take them.
    pub fn text_encoder(&self) -> Result<TextEncoder> {
        Ok(TextEncoder { beginning: self.beginning()?, plain: self.document_encoder()? })
    }

    /// An encoder of training text.
    pub(super) fn document_encoder(&self) -> Result<DocumentEncoder> {
        let mut tokenizer = self.tokenizer.clone();
        tokenizer.set_encode_special_tokens(true);
        // It would add special tokens and trim offsets; neither is wanted.
        tokenizer.with_post_processor(None::<PostProcessorWrapper>);
        Ok(DocumentEncoder { tokenizer, begin_of_text: self.begin_of_text })
    }
}

/// Encodes documents: no special tokens are added, and what looks like one in a text is tokenized as the text it is.
pub(super) struct DocumentEncoder {
    tokenizer: Tokenizer,
    begin_of_text: u32,
}

impl DocumentEncoder {
    /// The ids of `text`, after begin-of-text if it begins a document.
    pub fn encode(&self, text: &str, begins: bool) -> Result<Vec<u32>> {
        let encoding = self.tokenizer.encode_fast(text, false).map_err(|error| anyhow!(error));
        let encoding = encoding.context("cannot tokenize a document")?;
        let mut ids = Vec::with_capacity(encoding.len() + 1);
        if begins {
            ids.push(self.begin_of_text);
        }
        ids.extend_from_slice(encoding.get_ids());
        Ok(ids)
    }
}

/// Encodes texts of the data: what looks like a special token in one is tokenized as the text it is.
pub struct TextEncoder {
    beginning: Vec<u32>,
    plain: DocumentEncoder,
}

impl TextEncoder {
    /// The ids of a text that nothing stands before: what the tokenizer itself puts there (LLaMA's begin-of-text; nothing
    /// for GPT-2) comes first.
    pub fn first(&self, text: &str) -> Result<Vec<u32>> {
        Ok([self.beginning.clone(), self.plain.encode(text, false)?].concat())
    }

    /// The ids of a text that goes on.
    pub fn next(&self, text: &str) -> Result<Vec<u32>> {
        self.plain.encode(text, false)
    }
}

/// GPT-2's kind of tokenizer from its two files.
fn byte_level_bpe(vocabulary: &Path, merges: &Path) -> Result<Tokenizer> {
    let build = || -> tokenizers::Result<Tokenizer> {
        let bpe = BPE::from_file(&vocabulary.to_string_lossy(), &merges.to_string_lossy()).build()?;
        let special = bpe.get_vocab().contains_key(END_OF_TEXT);
        let mut tokenizer = Tokenizer::new(bpe);
        tokenizer.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
        tokenizer.with_decoder(Some(ByteLevel::default()));
        if special {
            tokenizer.add_special_tokens([AddedToken::from(END_OF_TEXT, true)])?;
        }
        Ok(tokenizer)
    };
    let built = build().map_err(|error| anyhow!(error));
    built.with_context(|| format!("cannot make a byte-level BPE of {} and {}", vocabulary.display(), merges.display()))
}

/// The token that the files beside the tokenizer name as `role`: eos_token or bos_token.
fn named_token(folder: &Path, role: &str) -> Result<Option<String>> {
    for file in ["tokenizer_config.json", "special_tokens_map.json"] {
        let path = folder.join(file);
        if !path.is_file() {
            continue;
        }
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let config: Value = serde_json::from_str(&text).with_context(|| format!("{} is not JSON", path.display()))?;
        // A string, or an object that describes an added token.
        let token = config.get(role).and_then(|token| token.as_str().or_else(|| token.get("content")?.as_str()));
        if let Some(token) = token {
            return Ok(Some(token.to_string()));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::super::tests::small_tokenizer_json;
    use super::*;
    use serde_json::json;

    fn folder(files: &[(&str, Value)]) -> Result<tempfile::TempDir> {
        let folder = tempfile::tempdir()?;
        for (name, content) in files {
            let text = content.as_str().map_or_else(|| content.to_string(), String::from);
            std::fs::write(folder.path().join(name), text)?;
        }
        Ok(folder)
    }

    #[test]
    fn truncation_and_dropout_of_the_file_are_off_and_special_text_in_documents_is_text() -> Result<()> {
        let folder = folder(&[("tokenizer.json", small_tokenizer_json())])?;
        let tokenizer = TextTokenizer::load(folder.path())?;
        assert_eq!((tokenizer.end_of_text(), tokenizer.vocabulary_size()), (259, 260));
        let encoder = tokenizer.document_encoder()?;
        let ids = encoder.encode("the the <|endoftext|>", true)?;
        assert_eq!(ids[0], 259);
        assert_eq!(ids.iter().filter(|&&id| id == 259).count(), 1);
        assert!(ids.len() > 10, "not cut to the file's 3 tokens");
        assert_eq!(encoder.encode("the the", false)?, encoder.encode("the the", false)?);
        assert_eq!(encoder.encode("", true)?, [259]);
        let same = TextTokenizer::load(&folder.path().join("tokenizer.json"))?;
        assert_eq!(same.digest(), tokenizer.digest());
        Ok(())
    }

    #[test]
    fn a_vocabulary_and_merges_alone_make_the_same_byte_level_bpe() -> Result<()> {
        let json = small_tokenizer_json();
        let merges = "#version: 0.2\nt h\nth e\nĠ t\n";
        let pair = folder(&[("vocab.json", json["model"]["vocab"].clone()), ("merges.txt", merges.into())])?;
        let (one, other) = (TextTokenizer::load(pair.path())?, folder(&[("tokenizer.json", json)])?);
        let other = TextTokenizer::load(other.path())?;
        assert_eq!(one.end_of_text(), 259);
        for text in ["the tea", " thé\n\n  the", "a<|endoftext|>"] {
            assert_eq!(one.document_encoder()?.encode(text, true)?, other.document_encoder()?.encode(text, true)?);
        }
        Ok(())
    }

    #[test]
    fn end_of_text_is_found_in_the_order_that_is_promised_or_the_error_says_what_was_looked_for() -> Result<()> {
        let mut without = small_tokenizer_json();
        without["added_tokens"] = json!([]);
        let renamed = without.to_string().replace("<|endoftext|>", "<stop>");
        let tokenizer = ("tokenizer.json", Value::from(renamed.as_str()));
        let error =
            TextTokenizer::load(folder(std::slice::from_ref(&tokenizer))?.path()).err().map(|e| format!("{e:#}"));
        assert!(error.is_some_and(|e| e.contains("looked for <|endoftext|>, </s>")));
        for named in [json!({"eos_token": "<stop>"}), json!({"eos_token": {"content": "<stop>"}})] {
            for file in ["tokenizer_config.json", "special_tokens_map.json"] {
                let folder = folder(&[tokenizer.clone(), (file, named.clone())])?;
                assert_eq!(TextTokenizer::load(folder.path())?.end_of_text(), 259);
            }
        }
        let llama = Value::from(renamed.replace("<stop>", "</s>"));
        assert_eq!(TextTokenizer::load(folder(&[("tokenizer.json", llama)])?.path())?.end_of_text(), 259);
        Ok(())
    }

    #[test]
    fn a_document_of_a_llama_begins_with_its_begin_of_text_and_of_gpt2_with_its_end_of_text() -> Result<()> {
        let gpt2 = TextTokenizer::load(folder(&[("tokenizer.json", small_tokenizer_json())])?.path())?;
        assert_eq!((gpt2.begin_of_text(), gpt2.end_of_text()), (259, 259));
        let mut json = small_tokenizer_json();
        json["added_tokens"] = json!([]);
        for (id, token) in [(259, "</s>"), (260, "<s>"), (261, "<begin>")] {
            json["model"]["vocab"].as_object_mut().context("a vocabulary")?.remove(END_OF_TEXT);
            json["model"]["vocab"][token] = json!(id);
        }
        let llama = ("tokenizer.json", json);
        let plain = TextTokenizer::load(folder(std::slice::from_ref(&llama))?.path())?;
        assert_eq!((plain.begin_of_text(), plain.end_of_text()), (260, 259));
        assert_eq!(plain.document_encoder()?.encode("the", true)?[0], 260);
        let named =
            TextTokenizer::load(folder(&[llama, ("tokenizer_config.json", json!({"bos_token": "<begin>"}))])?.path())?;
        assert_eq!((named.begin_of_text(), named.end_of_text()), (261, 259));
        Ok(())
    }

    #[test]
    fn a_missing_or_broken_tokenizer_is_named() -> Result<()> {
        let said = |folder: tempfile::TempDir| {
            TextTokenizer::load(folder.path()).err().map(|e| format!("{e:#}")).unwrap_or_default()
        };
        assert!(said(folder(&[])?).contains("looked for tokenizer.json, or vocab.json and merges.txt"));
        assert!(said(folder(&[("tokenizer.json", json!({"a": 1}))])?).contains("is not a tokenizer.json"));
        Ok(())
    }
}
