//! Tests of the whole data path, from bytes to batches, and what they share.

mod formats;
mod pipeline;
mod rows;
mod shared;

use super::{DataSet, MemoryFile, Order, SourceFile, StreamSettings, TextTokenizer, TokenStream};
use anyhow::{Result, anyhow};
use parquet::basic::{Compression, ZstdLevel};
use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::properties::{WriterProperties, WriterVersion};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use serde_json::json;
use std::sync::Arc;
use tokenizers::Tokenizer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

/// A tokenizer.json of a byte-level BPE with three merges: 256 bytes, `th`, `the`, ` t`, and end-of-text as id 259.
pub(super) fn small_tokenizer_json() -> serde_json::Value {
    let mut alphabet: Vec<String> = ByteLevel::alphabet().into_iter().map(String::from).collect();
    alphabet.sort_unstable();
    let words = alphabet.into_iter().chain(["th", "the", "Ġt", "<|endoftext|>"].map(String::from));
    let vocabulary: serde_json::Map<String, serde_json::Value> = words.zip((0..).map(|id: u32| id.into())).collect();
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "padding": null,
        "added_tokens": [{"id": 259, "content": "<|endoftext|>", "single_word": false, "lstrip": false, "rstrip": false,
                          "normalized": false, "special": true}],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": 0.5, "vocab": vocabulary, "merges": ["t h", "th e", "Ġ t"]},
    })
}

fn small_tokenizer() -> Result<TextTokenizer> {
    let tokenizer = Tokenizer::from_bytes(small_tokenizer_json().to_string()).map_err(|error| anyhow!(error))?;
    TextTokenizer::new(tokenizer, 259)
}

fn settings(sequence_length: usize, order: Order, threads: usize) -> StreamSettings {
    StreamSettings { sequence_length, order, vocabulary_size: 300, threads, queue_tokens: 1000 }
}

fn memory(name: &str, bytes: impl Into<Vec<u8>>) -> Result<SourceFile> {
    SourceFile::detect(Arc::new(MemoryFile::new(name, bytes.into())))
}

/// A parquet file of an id and a nullable text column, a row group for each inner list.
fn parquet_bytes(groups: &[Vec<Option<String>>], compression: Compression, version: WriterVersion) -> Result<Vec<u8>> {
    let schema = parse_message_type("message rows { required int64 id; optional binary text (UTF8); }")?;
    let properties = WriterProperties::builder().set_compression(compression).set_writer_version(version);
    let properties = properties.set_data_page_size_limit(200).set_write_batch_size(4).build();
    let mut writer = SerializedFileWriter::new(Vec::new(), Arc::new(schema), Arc::new(properties))?;
    for texts in groups {
        let mut group = writer.next_row_group()?;
        let ids: Vec<i64> = (0..texts.len() as i64).collect();
        let levels: Vec<i16> = texts.iter().map(|text| i16::from(text.is_some())).collect();
        let values: Vec<ByteArray> = texts.iter().flatten().map(|text| text.as_bytes().to_vec().into()).collect();
        if let Some(mut column) = group.next_column()? {
            column.typed::<Int64Type>().write_batch(&ids, None, None)?;
            column.close()?;
        }
        if let Some(mut column) = group.next_column()? {
            column.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None)?;
            column.close()?;
        }
        group.close()?;
    }
    Ok(writer.into_inner()?)
}

fn zstd() -> Result<Compression> {
    Ok(Compression::ZSTD(ZstdLevel::try_new(3)?))
}

/// Every row of the first `epochs` epochs.
fn all_rows(stream: &mut TokenStream, epochs: u64) -> Result<Vec<Vec<u32>>> {
    let mut rows = Vec::new();
    while stream.epoch()? < epochs {
        rows.push(one_row(stream)?);
    }
    Ok(rows)
}

/// The next row, of T+1 tokens.
fn one_row(stream: &mut TokenStream) -> Result<Vec<u32>> {
    let batch = stream.next_batch(1)?;
    let mut row = batch.inputs.clone();
    row.extend(batch.targets.last());
    assert_eq!(batch.inputs[1..], batch.targets[..batch.targets.len() - 1], "targets are the inputs shifted by one");
    Ok(row)
}

/// The message of an error, with its causes.
fn message<T>(result: Result<T>) -> String {
    result.err().map(|error| format!("{error:#}")).unwrap_or_else(|| "no error".to_string())
}
