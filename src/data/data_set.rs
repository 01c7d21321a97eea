//! The opened and checked files of a source, as units: what is read, shuffled and resumed at a time.

use super::bytes::ByteSource;
use super::document::UnitText;
use super::files::{FileKind, SourceFile};
use super::jsonl::JsonlFile;
use super::order::Order;
use super::parquet_file::ParquetFile;
use super::text_file::TextFile;
use super::token_file::{TokenFile, TokenFiles};
use anyhow::{Context, Result, bail, ensure};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::path::Path;

/// Bytes of lines or text a unit.
const UNIT_BYTES: u64 = 1 << 20;

/// Bytes of text a document when a text file is shuffled.
const PIECE_BYTES: usize = 16 << 10;

/// A source of no more bytes than this is read and checked in full before training.
const CHECK_IN_FULL: u64 = 16 << 20;

/// Files open at a time: they may be far away, so more than there are cores.
const OPEN_AT_ONCE: usize = 8;

/// Bytes of a file's beginning and end that enter its digest; a file that is no longer than both enters whole.
const DIGEST_BYTES: u64 = 512 << 10;

/// What is known of a source without tokenising it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    pub files: usize,
    /// Of all files, on disk or on the hub.
    pub bytes: u64,
    /// Bytes of the text columns alone (compressed) or of the whole files: what an epoch reads.
    pub read_bytes: u64,
    /// Row groups or megabytes; `None` for token files, whose blocks depend on the sequence length.
    pub units: Option<usize>,
    /// Rows of parquet files, those with a null text included; `None` for other kinds.
    pub documents: Option<u64>,
    /// Tokens of token files.
    pub tokens: Option<u64>,
}

/// How lines and text are cut.
#[derive(Clone, Copy)]
pub(super) struct Sizes {
    /// Bytes a unit.
    pub unit: u64,
    /// Bytes a document of a shuffled text file.
    pub piece: usize,
}

/// A file of texts.
enum DocumentFile {
    Parquet(ParquetFile),
    Jsonl(JsonlFile),
    Text(TextFile),
}

/// A unit's file and its number in it.
#[derive(Clone, Copy)]
struct UnitPlace {
    file: usize,
    unit: usize,
}

/// What the files hold.
pub(super) enum Contents {
    Documents(Documents),
    Tokens(TokenFiles),
}

/// Files of texts and the table of their units.
pub(super) struct Documents {
    files: Vec<DocumentFile>,
    units: Vec<UnitPlace>,
    /// Bytes that reading each unit fetches.
    unit_bytes: Vec<u64>,
}

/// Checked files, ready to be read.
pub struct DataSet {
    pub(super) contents: Contents,
    names: Vec<String>,
    text_column: String,
    summary: Summary,
    digest: String,
}

impl DataSet {
    /// Opens every file and checks what can be checked: footers, headers, lengths, columns, and all of a small source.
    ///
    /// The order of `files` is the order of the data. Texts are taken from the column or field `text_column`.
    pub fn open(files: Vec<SourceFile>, text_column: &str) -> Result<Self> {
        Self::open_with_sizes(files, text_column, Sizes { unit: UNIT_BYTES, piece: PIECE_BYTES })
    }

    pub(super) fn open_with_sizes(files: Vec<SourceFile>, text_column: &str, sizes: Sizes) -> Result<Self> {
        ensure!(!files.is_empty(), "the data set has no files");
        let tokens = |file: &SourceFile| matches!(file.kind, FileKind::NanoGptBin | FileKind::LlmcBin);
        let token_files = files.iter().filter(|file| tokens(file)).count();
        if token_files != 0 && token_files != files.len() {
            let (ids, texts): (Vec<_>, Vec<_>) = files.iter().partition(|file| tokens(file));
            let (ids, texts) = (ids[0].bytes.name(), texts[0].bytes.name());
            bail!("{ids} holds token ids and {texts} holds text: choose files of one sort");
        }
        let pool = rayon::ThreadPoolBuilder::new().num_threads(OPEN_AT_ONCE.min(files.len())).build()?;
        let opened: Vec<Result<(OpenFile, [u8; 32])>> =
            pool.install(|| files.par_iter().map(|file| open_file(file, text_column, sizes)).collect());
        let mut summary = Summary {
            files: files.len(),
            bytes: files.iter().map(|file| file.bytes.len()).sum(),
            read_bytes: 0,
            units: None,
            documents: None,
            tokens: None,
        };
        let mut digest = Sha256::new();
        let (mut documents, mut ids) = (Vec::new(), Vec::new());
        // In the order of the files, so that of several errors always the same one is reported.
        for result in opened {
            let (file, file_digest) = result?;
            digest.update(file_digest);
            match file {
                OpenFile::Documents(file) => documents.push(file),
                OpenFile::Tokens(file) => ids.push(file),
            }
        }
        let contents = if documents.is_empty() {
            let ids = TokenFiles::new(ids);
            (summary.tokens, summary.read_bytes) = (Some(ids.tokens()), summary.bytes);
            Contents::Tokens(ids)
        } else {
            let documents = Documents::new(documents, &files, sizes);
            summary.read_bytes = documents.unit_bytes.iter().sum();
            (summary.units, summary.documents) = (Some(documents.units.len()), documents.rows());
            pool.install(|| documents.check(summary.read_bytes))?;
            Contents::Documents(documents)
        };
        let names = files.iter().map(|file| file.bytes.name().to_string()).collect();
        let digest = hexadecimal(&digest.finalize());
        Ok(Self { contents, names, text_column: text_column.to_string(), summary, digest })
    }

    pub fn summary(&self) -> &Summary {
        &self.summary
    }

    /// Names of the files, in the order of the data.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Every text, in the order of the files.
    ///
    /// # Errors
    /// When a file cannot be read, or holds token ids instead of texts.
    pub fn texts(&self) -> Result<Vec<String>> {
        let Contents::Documents(documents) = &self.contents else {
            anyhow::bail!("{} holds token ids, not texts", self.names().join(", "))
        };
        let mut texts = Vec::new();
        for unit in 0..documents.units() {
            let read = documents.read(unit, Order::Sequential)?;
            texts.extend(read.documents.into_iter().map(|document| document.text));
        }
        Ok(texts)
    }

    /// The files in a message: the first one's name, and how many more there are.
    pub fn describe(&self) -> String {
        match self.names.as_slice() {
            [] => "no file".into(),
            [only] => only.clone(),
            [first, rest @ ..] => format!("{first} and {} more", rest.len()),
        }
    }

    /// Rows an epoch has, known of token files alone.
    pub fn rows(&self, sequence_length: usize) -> Option<u64> {
        match &self.contents {
            Contents::Tokens(files) => Some(files.rows(sequence_length)),
            Contents::Documents(_) => None,
        }
    }

    /// Digest of the files' names (the last parts), kinds, lengths and contents (large files: the beginning and the
    /// end, or the footer).
    pub(super) fn digest(&self) -> &str {
        &self.digest
    }

    /// The column or field that texts are taken from, if there are texts.
    pub(super) fn text_column(&self) -> Option<&str> {
        match self.contents {
            Contents::Documents(_) => Some(&self.text_column),
            Contents::Tokens(_) => None,
        }
    }
}

enum OpenFile {
    Documents(DocumentFile),
    Tokens(TokenFile),
}

/// Opens one file, and makes the digest that names it.
fn open_file(file: &SourceFile, text_column: &str, sizes: Sizes) -> Result<(OpenFile, [u8; 32])> {
    let bytes = file.bytes.clone();
    ensure!(!bytes.is_empty(), "the data file {} is empty", bytes.name());
    let mut content_digest = None;
    let opened = match file.kind {
        FileKind::Parquet => {
            let parquet = ParquetFile::open(bytes.clone(), text_column)?;
            content_digest = Some(parquet.footer_digest());
            OpenFile::Documents(DocumentFile::Parquet(parquet))
        }
        FileKind::Jsonl => {
            OpenFile::Documents(DocumentFile::Jsonl(JsonlFile::new(bytes.clone(), text_column, sizes.unit)))
        }
        FileKind::Text => {
            OpenFile::Documents(DocumentFile::Text(TextFile::new(bytes.clone(), sizes.unit, sizes.piece)))
        }
        FileKind::NanoGptBin | FileKind::LlmcBin => OpenFile::Tokens(TokenFile::open(file)?),
    };
    let content_digest = content_digest.map_or_else(|| sampled_digest(&*bytes), Ok)?;
    let base_name = Path::new(bytes.name()).file_name().map(|name| name.to_string_lossy().into_owned());
    let mut digest = Sha256::new();
    digest.update(format!("{:?} {:?} {} ", file.kind, base_name, bytes.len()));
    digest.update(content_digest);
    Ok((opened, digest.finalize().into()))
}

fn sampled_digest(bytes: &dyn ByteSource) -> Result<[u8; 32]> {
    let len = bytes.len();
    let mut digest = Sha256::new();
    if len <= 2 * DIGEST_BYTES {
        digest.update(bytes.read(0..len)?);
    } else {
        digest.update(bytes.read(0..DIGEST_BYTES)?);
        digest.update(bytes.read(len - DIGEST_BYTES..len)?);
    }
    Ok(digest.finalize().into())
}

impl Documents {
    fn new(files: Vec<DocumentFile>, sources: &[SourceFile], sizes: Sizes) -> Self {
        let (mut units, mut unit_bytes) = (Vec::new(), Vec::new());
        for (index, (file, source)) in files.iter().zip(sources).enumerate() {
            for unit in 0..file.units() {
                units.push(UnitPlace { file: index, unit });
                unit_bytes.push(match file {
                    DocumentFile::Parquet(file) => file.unit_bytes(unit),
                    _ => sizes.unit.min(source.bytes.len() - unit as u64 * sizes.unit),
                });
            }
        }
        Self { files, units, unit_bytes }
    }

    pub fn units(&self) -> usize {
        self.units.len()
    }

    pub fn unit_bytes(&self, unit: usize) -> u64 {
        self.unit_bytes[unit]
    }

    /// What messages call a unit, named by its place in the files.
    pub fn unit_name(&self, unit: usize) -> String {
        let UnitPlace { file, unit } = self.units[unit];
        match &self.files[file] {
            DocumentFile::Parquet(file) => file.unit_name(unit),
            DocumentFile::Jsonl(file) => file.unit_name(unit),
            DocumentFile::Text(file) => file.unit_name(unit),
        }
    }

    /// The texts of a unit, named by its place in the files.
    pub fn read(&self, unit: usize, order: Order) -> Result<UnitText> {
        let UnitPlace { file, unit } = self.units[unit];
        match &self.files[file] {
            DocumentFile::Parquet(file) => file.read_unit(unit),
            DocumentFile::Jsonl(file) => file.read_unit(unit),
            DocumentFile::Text(file) => file.read_unit(unit, order),
        }
    }

    /// Number of rows if all files are parquet.
    fn rows(&self) -> Option<u64> {
        let rows = |file: &DocumentFile| match file {
            DocumentFile::Parquet(file) => Some(file.rows()),
            _ => None,
        };
        self.files.iter().map(rows).sum()
    }

    /// Reads what can be read without delay: all of a small source, else the beginning of each file of lines or text.
    fn check(&self, read_bytes: u64) -> Result<()> {
        let all = read_bytes <= CHECK_IN_FULL;
        let first_of_lines =
            |place: &UnitPlace| place.unit == 0 && !matches!(self.files[place.file], DocumentFile::Parquet(_));
        let chosen = |&unit: &usize| all || first_of_lines(&self.units[unit]);
        let checked: Vec<Result<usize>> = (0..self.units.len())
            .into_par_iter()
            .filter(chosen)
            .map(|unit| Ok(self.read(unit, Order::Sequential)?.documents.len()))
            .collect();
        let documents: Result<usize> = checked.into_iter().sum();
        let documents = documents.context("checking the data")?;
        ensure!(documents > 0 || !all, "the data set has no documents: its files hold no rows, or only null texts");
        Ok(())
    }
}

impl DocumentFile {
    fn units(&self) -> usize {
        match self {
            Self::Parquet(file) => file.units(),
            Self::Jsonl(file) => file.units(),
            Self::Text(file) => file.units(),
        }
    }
}

pub(super) fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
