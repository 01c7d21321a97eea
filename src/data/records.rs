//! Whole rows of jsonl and parquet files with all their fields: the problems of an evaluation, the examples of a task.

use super::files::{FileKind, SourceFile};
use super::parquet_file::guarded;
use anyhow::{Context, Result, anyhow, bail, ensure};
use bytes::Bytes;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use parquet::schema::types::Type;
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

    /// Every field, nulls too.
    pub fn fields(&self) -> &Map<String, Value> {
        &self.fields
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

/// Which fields of a row are read.
#[derive(Clone, Copy, Debug)]
pub enum Columns<'a> {
    All,
    /// Of a parquet file, these columns as far as it has them; lines are read whole.
    These(&'a [&'a str]),
}

/// The rows of all files with all their fields, in order.
///
/// # Errors
/// When a file is of another kind, damaged or has no rows.
pub fn records(files: &[SourceFile]) -> Result<Vec<Record>> {
    let rows = read(files, Columns::All)?;
    let names: Vec<&str> = files.iter().map(|file| file.bytes.name()).collect();
    ensure!(!rows.is_empty(), "{} has no rows", names.join(", "));
    Ok(rows)
}

/// The rows of all files, in order.
///
/// # Errors
/// When a file is of another kind or damaged, or a parquet file has none of the columns.
pub fn read(files: &[SourceFile], columns: Columns<'_>) -> Result<Vec<Record>> {
    let mut rows = Vec::new();
    for file in files {
        let name = file.bytes.name();
        let bytes = file.bytes.read(0..file.bytes.len())?;
        match file.kind {
            FileKind::Jsonl => lines(name, &bytes, &mut rows)?,
            FileKind::Parquet => {
                guarded(|| groups(name, bytes, columns, &mut rows)).with_context(|| format!("cannot read {name}"))?
            }
            _ => bail!("{name} has no columns: records are read from jsonl and parquet files"),
        }
    }
    Ok(rows)
}

fn lines(name: &str, bytes: &[u8], rows: &mut Vec<Record>) -> Result<()> {
    let text = bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes);
    let lines = text.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii);
    for (index, line) in lines.enumerate().filter(|(_, line)| !line.is_empty()) {
        let place = format!("line {} of {name}", index + 1);
        match serde_json::from_slice(line).with_context(|| format!("{place} is not JSON"))? {
            Value::Object(fields) => rows.push(Record { fields, place }),
            _ => bail!("{place} is not a JSON object"),
        }
    }
    Ok(())
}

fn groups(name: &str, bytes: Vec<u8>, columns: Columns<'_>, rows: &mut Vec<Record>) -> Result<()> {
    let reader = SerializedFileReader::new(Bytes::from(bytes))?;
    let metadata = reader.metadata().file_metadata();
    let projection = match columns {
        Columns::All => None,
        Columns::These(wanted) => Some(projection(metadata.schema(), wanted)?),
    };
    let before = rows.len();
    for (index, row) in reader.get_row_iter(projection)?.enumerate() {
        let place = format!("row {} of {name}", index + 1);
        let fields = row.map_err(anyhow::Error::from).and_then(|row| object(&row)).with_context(|| place.clone())?;
        rows.push(Record { fields, place });
    }
    let (found, expected) = (rows.len() - before, metadata.num_rows());
    ensure!(found as i64 == expected, "it holds {found} of its {expected} rows: it is torn");
    Ok(())
}

/// The schema with the wanted columns alone.
fn projection(schema: &Type, wanted: &[&str]) -> Result<Type> {
    let fields: Vec<_> = schema.get_fields().iter().filter(|field| wanted.contains(&field.name())).cloned().collect();
    if fields.is_empty() {
        let names: Vec<&str> = schema.get_fields().iter().map(|field| field.name()).collect();
        bail!("it has none of the columns {}: its columns are {}", wanted.join(", "), names.join(", "));
    }
    Ok(Type::group_type_builder(schema.name()).with_fields(fields).build()?)
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
        for (text, said) in [
            ("{}\n[1]", "line 2 of x.jsonl is not a JSON object"),
            ("{", "line 1 of x.jsonl is not JSON"),
            ("\n", "no rows"),
        ] {
            let error = of_lines(text).err().map(|error| format!("{error:#}")).unwrap_or_default();
            assert!(error.contains(said), "{error}");
        }
        Ok(())
    }
}
