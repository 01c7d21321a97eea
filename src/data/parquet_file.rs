//! Parquet: the footer is read once, and then, a row group at a time, the bytes of the text column alone.

use super::bytes::ByteSource;
use super::document::{Document, Opening, UnitText};
use ::bytes::{Buf, Bytes};
use anyhow::{Context, Result, anyhow, bail, ensure};
use parquet::basic::{Compression, ConvertedType, LogicalType, Type};
use parquet::column::reader::ColumnReaderImpl;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::ParquetError;
use parquet::file::metadata::{ColumnChunkMetaData, FooterTail, ParquetMetaData, ParquetMetaDataReader};
use parquet::file::reader::{ChunkReader, Length};
use parquet::file::serialized_reader::SerializedPageReader;
use parquet::schema::types::{ColumnDescriptor, SchemaDescriptor};
use sha2::{Digest, Sha256};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// Bytes of the file's end that the first read fetches. Many footers fit, and then there is no second read.
const TAIL: u64 = 64 << 10;

/// The footer's last bytes: the length of the metadata (u32) and the magic number.
const FOOTER: u64 = 8;

/// A checked parquet file and where its text lies.
pub(super) struct ParquetFile {
    bytes: Arc<dyn ByteSource>,
    groups: Vec<RowGroup>,
    footer_digest: [u8; 32],
}

/// The text column of one row group.
struct RowGroup {
    /// Its number in the file.
    number: usize,
    rows: usize,
    column: ColumnChunkMetaData,
}

impl ParquetFile {
    /// Reads the footer and checks it: the text column, its compression and that every row group lies in the file.
    pub fn open(bytes: Arc<dyn ByteSource>, text_column: &str) -> Result<Self> {
        let name = bytes.name().to_string();
        let (metadata, footer_digest) = read_footer(&*bytes)?;
        let schema = metadata.file_metadata().schema_descr();
        let column = find_text_column(schema, text_column).with_context(|| format!("in {name}"))?;
        let mut groups = Vec::with_capacity(metadata.num_row_groups());
        for (number, group) in metadata.row_groups().iter().enumerate() {
            let chunk =
                group.columns().get(column).with_context(|| torn(&name, "a row group lacks the text column"))?;
            check_chunk(chunk, bytes.len()).with_context(|| format!("row group {number} of {name}"))?;
            let rows = usize::try_from(group.num_rows()).with_context(|| torn(&name, "a negative number of rows"))?;
            if rows > 0 {
                // The statistics hold copies of the smallest and largest text, which nothing needs.
                let column = chunk.clone().into_builder().clear_statistics().clear_page_encoding_stats().build()?;
                groups.push(RowGroup { number, rows, column });
            }
        }
        Ok(Self { bytes, groups, footer_digest })
    }

    /// Number of row groups that have rows.
    pub fn units(&self) -> usize {
        self.groups.len()
    }

    /// Rows, those with a null text included.
    pub fn rows(&self) -> u64 {
        self.groups.iter().map(|group| group.rows as u64).sum()
    }

    /// What messages call a unit.
    pub fn unit_name(&self, unit: usize) -> String {
        format!("row group {} of {}", self.groups[unit].number, self.bytes.name())
    }

    /// Bytes that reading the unit fetches (compressed).
    pub fn unit_bytes(&self, unit: usize) -> u64 {
        self.groups[unit].column.byte_range().1
    }

    /// SHA-256 of the footer, which names every page of the file.
    pub fn footer_digest(&self) -> [u8; 32] {
        self.footer_digest
    }

    /// The documents of one row group: one read, of the text column's bytes.
    pub fn read_unit(&self, unit: usize) -> Result<UnitText> {
        let group = &self.groups[unit];
        let place = || self.unit_name(unit);
        let (start, length) = group.column.byte_range();
        let bytes = self.bytes.read(start..start + length)?;
        let chunk = ColumnBytes { start, bytes: bytes.into() };
        let decoded = guarded(|| decode(chunk, group));
        let (levels, values) = decoded.with_context(|| torn(&place(), "its text does not decode"))?;
        let mut read = UnitText::default();
        let mut values = values.into_iter();
        for row in 0..group.rows {
            if levels.get(row).is_some_and(|&level| level < group.column.column_descr().max_def_level()) {
                read.nulls += 1;
                continue;
            }
            let value = values.next().with_context(|| torn(&place(), "fewer texts than rows"))?;
            let text = String::from_utf8(value.data().to_vec())
                .with_context(|| format!("the text of row {row} of {} is not UTF-8", place()))?;
            read.documents.push(Document { opening: Opening::Begins, text });
        }
        Ok(read)
    }
}

/// Runs the parquet decoder. It indexes into what damaged pages claim to hold, and panics where they do not: then this is
/// an error.
pub(super) fn guarded<T>(decode: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(decode))
        .unwrap_or_else(|_| Err(anyhow!("the decoder met a page that breaks its format")))
}

fn torn(what: &str, why: &str) -> String {
    format!("{what} is torn or damaged ({why}): fetch or write the file again")
}

/// Definition levels (none for a required column) and the texts that are not null.
fn decode(chunk: ColumnBytes, group: &RowGroup) -> Result<(Vec<i16>, Vec<ByteArray>)> {
    let pages = SerializedPageReader::new(Arc::new(chunk), &group.column, group.rows, None)?;
    let mut reader = ColumnReaderImpl::<ByteArrayType>::new(group.column.column_descr_ptr(), Box::new(pages));
    let (mut levels, mut values) = (Vec::new(), Vec::new());
    let (rows, _, _) = reader.read_records(group.rows, Some(&mut levels), None, &mut values)?;
    ensure!(rows == group.rows, "{rows} rows instead of {}", group.rows);
    Ok((levels, values))
}

/// The metadata at the file's end, in one or two reads, and its SHA-256.
fn read_footer(bytes: &dyn ByteSource) -> Result<(ParquetMetaData, [u8; 32])> {
    let (name, len) = (bytes.name(), bytes.len());
    ensure!(len >= FOOTER + 4, torn(name, "too short for a parquet file"));
    let tail = bytes.read(len.saturating_sub(TAIL)..len)?;
    let magic = tail.last_chunk::<8>().context("a short read")?;
    let footer = FooterTail::try_new(magic).with_context(|| torn(name, "it does not end as a parquet file does"))?;
    ensure!(!footer.is_encrypted_footer(), "{name} is encrypted, which is not supported: decrypt it first");
    let length = footer.metadata_length() as u64;
    ensure!(length + FOOTER + 4 <= len, torn(name, "its metadata are longer than the file"));
    let from_end = length + FOOTER;
    let metadata = match tail.len() as u64 >= from_end {
        true => tail[tail.len() - from_end as usize..tail.len() - FOOTER as usize].to_vec(),
        false => bytes.read(len - from_end..len - FOOTER)?,
    };
    let digest = Sha256::digest(&metadata).into();
    let metadata =
        ParquetMetaDataReader::decode_metadata(&metadata).with_context(|| torn(name, "its metadata do not decode"))?;
    Ok((metadata, digest))
}

/// The index of the leaf column that holds the texts.
fn find_text_column(schema: &SchemaDescriptor, name: &str) -> Result<usize> {
    let columns = schema.columns();
    let texts: Vec<String> = columns.iter().filter(|c| is_text(c)).map(|c| c.path().string()).collect();
    let advice = match texts.is_empty() {
        true => "the file has no text column".to_string(),
        false => format!("set text_column to one of: {}", texts.join(", ")),
    };
    match columns.iter().position(|column| column.path().string() == name) {
        Some(index) if is_text(&columns[index]) => Ok(index),
        Some(index) if columns[index].max_rep_level() > 0 => {
            bail!("the column \"{name}\" holds lists, not texts: {advice}")
        }
        Some(index) => bail!("the column \"{name}\" is not text but {}: {advice}", columns[index].physical_type()),
        None => bail!("there is no column \"{name}\": {advice}"),
    }
}

fn is_text(column: &ColumnDescriptor) -> bool {
    let utf8 = matches!(column.logical_type_ref(), Some(LogicalType::String))
        || column.converted_type() == ConvertedType::UTF8;
    utf8 && column.physical_type() == Type::BYTE_ARRAY && column.max_rep_level() == 0
}

/// What the reader would otherwise meet, or panic at, in the middle of training.
fn check_chunk(chunk: &ColumnChunkMetaData, file_len: u64) -> Result<()> {
    match chunk.compression() {
        Compression::UNCOMPRESSED | Compression::SNAPPY | Compression::ZSTD(_) => {}
        other => bail!("it is compressed with {other}, which is not supported: write it with snappy or zstd"),
    }
    let start = chunk.dictionary_page_offset().unwrap_or(chunk.data_page_offset());
    let end = start.checked_add(chunk.compressed_size()).and_then(|end| u64::try_from(end).ok());
    let inside = start >= 0 && chunk.compressed_size() >= 0 && end.is_some_and(|end| end <= file_len);
    ensure!(inside && chunk.num_values() >= 0, torn("the file", "its text lies outside the file"));
    Ok(())
}

/// The fetched bytes of a column chunk, addressed as the whole file is.
struct ColumnBytes {
    start: u64,
    bytes: Bytes,
}

impl ColumnBytes {
    fn from(&self, start: u64) -> Result<Bytes, ParquetError> {
        let skip = start.checked_sub(self.start).filter(|&skip| skip <= self.bytes.len() as u64);
        let skip = skip.ok_or_else(|| ParquetError::EOF(format!("a page at {start} lies outside its column")))?;
        Ok(self.bytes.slice(skip as usize..))
    }
}

impl Length for ColumnBytes {
    fn len(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }
}

impl ChunkReader for ColumnBytes {
    type T = ::bytes::buf::Reader<Bytes>;

    fn get_read(&self, start: u64) -> Result<Self::T, ParquetError> {
        Ok(self.from(start)?.reader())
    }

    fn get_bytes(&self, start: u64, length: usize) -> Result<Bytes, ParquetError> {
        let bytes = self.from(start)?;
        if length > bytes.len() {
            return Err(ParquetError::External(anyhow!("a page of {length} bytes at {start} is cut").into()));
        }
        Ok(bytes.slice(..length))
    }
}
