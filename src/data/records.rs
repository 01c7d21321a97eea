//! Whole rows of jsonl and parquet files with all their fields: the problems of an evaluation, the examples of a task.

use super::files::{FileKind, SourceFile};
use super::parquet_file::guarded;
use anyhow::{Context, Result, anyhow, bail, ensure};
use bytes::Bytes;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use serde_json::{Map, Value};

/// One row.
#[derive(Clone, Debug)]
pub struct Record {
    fields: Map<String, Value>,
    /// The file's name and the row's number from 1, for messages.
    place: String,
}

impl Record {
    pub fn place(&self) -> &str {
        &self.place
    }

    /// A field, if the row has it.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.fields.get(name).filter(|value| !value.is_null())
    }

    /// A text field.
    ///
    /// # Errors
    /// When the row lacks it, or it is no text.
    pub fn text(&self, name: &str) -> Result<&str> {
        let value = self.value(name)?;
        value.as_str().ok_or_else(|| anyhow!("{}: its field \"{name}\" is not a text but {value}", self.place))
    }

    /// A field.
    ///
    /// # Errors
    /// When the row lacks it.
    pub fn value(&self, name: &str) -> Result<&Value> {
        let names: Vec<&str> = self.fields.keys().map(String::as_str).collect();
        self.get(name)
            .ok_or_else(|| anyhow!("{}: its field \"{name}\" is missing (there are: {})", self.place, names.join(", ")))
    }
}

/// The rows of all files, in order.
///
/// # Errors
/// When a file is of another kind, damaged or has no rows.
pub fn records(files: &[SourceFile]) -> Result<Vec<Record>> {
    let mut rows = Vec::new();
    for file in files {
        let name = file.bytes.name();
        let bytes = file.bytes.read(0..file.bytes.len())?;
        match file.kind {
            FileKind::Jsonl => lines(name, &bytes, &mut rows)?,
            FileKind::Parquet => {
                guarded(|| groups(name, bytes, &mut rows)).with_context(|| format!("cannot read {name}"))?
            }
            _ => bail!("{name} is neither a jsonl nor a parquet file, so it has no fields"),
        }
    }
    let names: Vec<&str> = files.iter().map(|file| file.bytes.name()).collect();
    ensure!(!rows.is_empty(), "{} has no rows", names.join(", "));
    Ok(rows)
}

fn lines(name: &str, bytes: &[u8], rows: &mut Vec<Record>) -> Result<()> {
    let text = std::str::from_utf8(bytes).with_context(|| format!("{name} is not UTF-8"))?;
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let place = format!("line {} of {name}", index + 1);
        match serde_json::from_str(line).with_context(|| format!("{place} is not valid JSON"))? {
            Value::Object(fields) => rows.push(Record { fields, place }),
            _ => bail!("{place} is not a JSON object"),
        }
    }
    Ok(())
}

fn groups(name: &str, bytes: Vec<u8>, rows: &mut Vec<Record>) -> Result<()> {
    let reader = SerializedFileReader::new(Bytes::from(bytes))?;
    for (index, row) in reader.get_row_iter(None)?.enumerate() {
        rows.push(Record { fields: object(&row?)?, place: format!("row {} of {name}", index + 1) });
    }
    Ok(())
}

fn object(row: &Row) -> Result<Map<String, Value>> {
    row.get_column_iter().map(|(name, field)| Ok((name.clone(), json(field)?))).collect()
}

fn json(field: &Field) -> Result<Value> {
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(value) => (*value).into(),
        Field::Byte(value) => (*value).into(),
        Field::Short(value) => (*value).into(),
        Field::Int(value) => (*value).into(),
        Field::Long(value) => (*value).into(),
        Field::UByte(value) => (*value).into(),
        Field::UShort(value) => (*value).into(),
        Field::UInt(value) => (*value).into(),
        Field::ULong(value) => (*value).into(),
        Field::Float(value) => (*value).into(),
        Field::Double(value) => (*value).into(),
        Field::Str(value) => value.as_str().into(),
        Field::Bytes(value) => std::str::from_utf8(value.data()).context("bytes that are not UTF-8")?.into(),
        Field::Group(row) => Value::Object(object(row)?),
        Field::ListInternal(list) => Value::Array(list.elements().iter().map(json).collect::<Result<_>>()?),
        // Times, decimals and the like: no task has them, so their text will do.
        other => other.to_string().into(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::MemoryFile;
    use super::*;
    use std::sync::Arc;

    fn of_lines(text: &str) -> Result<Vec<Record>> {
        records(&[SourceFile::detect(Arc::new(MemoryFile::new("x.jsonl", text.as_bytes().to_vec())))?])
    }

    #[test]
    fn fields_are_found_and_missing_ones_are_named_with_their_line() -> Result<()> {
        let rows = of_lines("\u{feff}{\"q\": \"one\", \"n\": 3}\n\n{\"q\": null, \"e\": [\"a\", \"b\"]}\n")?;
        assert_eq!((rows.len(), rows[0].text("q")?), (2, "one"));
        assert_eq!(rows[1].value("e")?, &serde_json::json!(["a", "b"]));
        for (row, name, said) in [
            (0, "n", "line 1 of x.jsonl: its field \"n\" is not a text but 3"),
            (1, "q", "line 3 of x.jsonl: its field \"q\" is missing (there are: q, e)"),
        ] {
            let error = rows[row].text(name).err().map(|error| error.to_string());
            assert_eq!(error.as_deref(), Some(said));
        }
        for (text, said) in
            [("{}\n[1]", "line 2 of x.jsonl is not a JSON object"), ("{", "not valid JSON"), ("\n", "no rows")]
        {
            let error = of_lines(text).err().map(|error| format!("{error:#}")).unwrap_or_default();
            assert!(error.contains(said), "{error}");
        }
        Ok(())
    }
}
