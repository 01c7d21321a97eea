//! Whole documents as token ids, for scoring: nothing is added, cut or shuffled.

use super::files::{FileKind, SourceFile};
use super::jsonl::JsonlFile;
use super::parquet_file::ParquetFile;
use super::token_file::{TokenFile, TokenFiles};
use super::tokenizer::TextTokenizer;
use anyhow::{Context, Result};
use std::path::Path;

/// Bytes of lines that are read at a time.
const UNIT_BYTES: u64 = 1 << 20;

/// The documents of a file, tokenised without special tokens: a text file is one, a row or a line of another is one, a
/// token file is one. Documents are made one at a time, as they are asked for.
///
/// # Errors
/// When the file cannot be read, has no `text_column`, is text and there is no `tokenizer`, or holds an id outside the
/// vocabulary.
pub fn documents_as_ids<'a>(
    path: &Path,
    text_column: &str,
    tokenizer: Option<&TextTokenizer>,
    vocabulary_size: usize,
) -> Result<Box<dyn Iterator<Item = Result<Vec<u32>>> + 'a>> {
    let file = SourceFile::local(path)?;
    if matches!(file.kind, FileKind::NanoGptBin | FileKind::LlmcBin) {
        let tokens = TokenFiles::new(vec![TokenFile::open(&file)?]);
        let ids = tokens.read(0..tokens.tokens(), vocabulary_size);
        return Ok(Box::new(std::iter::once(ids)));
    }
    let tokenizer = tokenizer.with_context(|| format!("{} is text, but the model has no tokenizer", path.display()))?;
    let encoder = tokenizer.document_encoder()?;
    let encode = move |text: &str| {
        let ids = encoder.encode(text, false)?;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= vocabulary_size) {
            anyhow::bail!(
                "the tokenizer gives the id {id}, but the model has {vocabulary_size} ids: they do not belong together"
            );
        }
        Ok(ids)
    };
    let units: Box<dyn Iterator<Item = Result<_>>> = match file.kind {
        FileKind::Text => {
            let bytes = file.bytes.read(0..file.bytes.len())?;
            let text = String::from_utf8(bytes).with_context(|| format!("{} is not UTF-8 text", path.display()))?;
            return Ok(Box::new(std::iter::once(encode(text.trim_start_matches('\u{feff}')))));
        }
        FileKind::Parquet => {
            let parquet = ParquetFile::open(file.bytes, text_column)?;
            Box::new((0..parquet.units()).map(move |unit| parquet.read_unit(unit)))
        }
        FileKind::Jsonl | FileKind::NanoGptBin | FileKind::LlmcBin => {
            let lines = JsonlFile::new(file.bytes, text_column, UNIT_BYTES);
            Box::new((0..lines.units()).map(move |unit| lines.read_unit(unit)))
        }
    };
    let texts = units.flat_map(|unit| match unit {
        Ok(unit) => unit.documents.into_iter().map(|document| Ok(document.text)).collect::<Vec<_>>(),
        Err(error) => vec![Err(error)],
    });
    Ok(Box::new(texts.map(move |text| encode(&text?))))
}
