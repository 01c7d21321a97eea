//! The records of jsonl and parquet files as JSON values, each with its place for messages.

use super::super::parquet_file::guarded;
use crate::data::files::{FileKind, SourceFile};
use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use parquet::file::reader::FileReader;
use parquet::file::serialized_reader::SerializedFileReader;
use parquet::record::{Field, Row};
use parquet::schema::types::Type;
use serde_json::{Map, Value};

/// A record and where it stands.
pub struct Record {
    pub value: Map<String, Value>,
    /// Line (from 1) or row (from 0) of the file.
    number: usize,
}

/// The records of one file.
pub struct Records {
    file: String,
    kind: FileKind,
    pub list: Vec<Record>,
}

impl Records {
    /// What messages call a record.
    pub fn place(&self, record: &Record) -> String {
        let unit = if self.kind == FileKind::Parquet { "row" } else { "line" };
        format!("{unit} {} of {}", record.number, self.file)
    }
}

/// Reads all of a file; of a parquet file, the top-level columns `wanted` that it has.
pub fn read(file: &SourceFile, wanted: &[&str]) -> Result<Records> {
    let name = file.bytes.name().to_owned();
    let bytes = file.bytes.read(0..file.bytes.len())?;
    let list = match file.kind {
        FileKind::Jsonl => lines(&bytes, &name)?,
        FileKind::Parquet => guarded(|| rows(bytes.into(), wanted)).with_context(|| format!("cannot read {name}"))?,
        _ => bail!("{name} has no columns: examples are read from jsonl and parquet files"),
    };
    Ok(Records { file: name, kind: file.kind, list })
}

fn lines(bytes: &[u8], name: &str) -> Result<Vec<Record>> {
    let mut records = Vec::new();
    let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    for (index, line) in text.split(|&byte| byte == b'\n').enumerate() {
        let number = index + 1;
        let line = line.trim_ascii();
        if line.is_empty() {
            continue;
        }
        let value = serde_json::from_slice(line).with_context(|| format!("line {number} of {name} is not JSON"))?;
        let Value::Object(value) = value else { bail!("line {number} of {name} is not a JSON object") };
        records.push(Record { value, number });
    }
    Ok(records)
}

fn rows(bytes: Bytes, wanted: &[&str]) -> Result<Vec<Record>> {
    let reader = SerializedFileReader::new(bytes)?;
    let schema = reader.metadata().file_metadata().schema();
    let fields: Vec<_> = schema.get_fields().iter().filter(|field| wanted.contains(&field.name())).cloned().collect();
    if fields.is_empty() {
        let names: Vec<&str> = schema.get_fields().iter().map(|field| field.name()).collect();
        bail!("it has none of the columns {}: its columns are {}", wanted.join(", "), names.join(", "));
    }
    let projection = Type::group_type_builder(schema.name()).with_fields(fields).build()?;
    let mut records = Vec::new();
    for (number, row) in reader.get_row_iter(Some(projection))?.enumerate() {
        let row = row.with_context(|| format!("row {number}"))?;
        records.push(Record { value: object(row), number });
    }
    let expected = reader.metadata().file_metadata().num_rows();
    ensure!(records.len() as i64 == expected, "it holds {} of its {expected} rows: it is torn", records.len());
    Ok(records)
}

fn object(row: Row) -> Map<String, Value> {
    row.into_columns().into_iter().map(|(name, field)| (name, value(&field))).collect()
}

fn value(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(truth) => Value::Bool(*truth),
        Field::Str(text) => Value::String(text.clone()),
        Field::Group(row) => Value::Object(object(row.clone())),
        Field::ListInternal(list) => Value::Array(list.elements().iter().map(value).collect()),
        // Numbers, dates and the like: no format reads them, messages show them.
        other => Value::String(other.to_string()),
    }
}
