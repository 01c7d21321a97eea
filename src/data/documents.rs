//! The documents of a file as token ids, one after the other: what an evaluation scores.

use super::data_set::{Contents, DataSet, Documents};
use super::document::{Document, Opening};
use super::files::SourceFile;
use super::order::Order;
use super::tokenizer::{DocumentEncoder, TextTokenizer};
use anyhow::{Context, Result, bail};
use std::collections::VecDeque;

/// The documents of `files`, read as they are asked for, without end-of-text or any other token
/// added. A text file is one document, and so are all token files together.
pub fn documents_as_ids(
    files: Vec<SourceFile>,
    text_column: &str,
    tokenizer: Option<&TextTokenizer>,
    vocabulary_size: usize,
) -> Result<Box<dyn Iterator<Item = Result<Vec<u32>>>>> {
    let data = DataSet::open(files, text_column)?;
    let names = data.names().to_vec();
    match data.contents {
        Contents::Tokens(files) => Ok(Box::new(std::iter::once(files.read(0..files.tokens(), vocabulary_size)))),
        Contents::Documents(documents) => {
            let name = names.first().map_or("the data", String::as_str);
            let tokenizer = tokenizer
                .with_context(|| format!("{name} is text, but the model has no tokenizer: give a token file"))?;
            let encoder = tokenizer.document_encoder()?;
            let reader = DocumentReader { documents, encoder, vocabulary_size, next_unit: 0, texts: VecDeque::new() };
            Ok(Box::new(reader))
        }
    }
}

/// Reads unit after unit and joins what belongs to one document.
struct DocumentReader {
    documents: Documents,
    encoder: DocumentEncoder,
    vocabulary_size: usize,
    next_unit: usize,
    texts: VecDeque<Document>,
}

impl DocumentReader {
    /// The next text, which may be a part of a document.
    fn peek(&mut self) -> Result<Option<&Document>> {
        while self.texts.is_empty() && self.next_unit < self.documents.units() {
            self.texts.extend(self.documents.read(self.next_unit, Order::Sequential)?.documents);
            self.next_unit += 1;
        }
        Ok(self.texts.front())
    }

    fn read(&mut self) -> Result<Option<Vec<u32>>> {
        if self.peek()?.is_none() {
            return Ok(None);
        }
        let mut ids = Vec::new();
        while let Some(document) = self.texts.pop_front() {
            ids.extend(self.encoder.encode(&document.text, false)?);
            if self.peek()?.is_none_or(|next| next.opening == Opening::Begins) {
                break;
            }
        }
        let size = self.vocabulary_size;
        if let Some(id) = ids.iter().find(|&&id| id as usize >= size) {
            bail!(
                "the tokenizer gives the id {id}, but the model's vocabulary has {size}: they do not belong together"
            );
        }
        Ok(Some(ids))
    }
}

impl Iterator for DocumentReader {
    type Item = Result<Vec<u32>>;

    fn next(&mut self) -> Option<Self::Item> {
        let document = self.read().transpose();
        if matches!(document, Some(Err(_))) {
            // An error is the last item.
            (self.next_unit, self.texts) = (self.documents.units(), VecDeque::new());
        }
        document
    }
}
