//! JSON Lines: a unit is the lines that begin in one megabyte of the file; each line's text field is a document.

use super::bytes::ByteSource;
use super::document::{Document, Opening, UnitText};
use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;
use std::sync::Arc;

/// A file of one JSON object a line.
pub(super) struct JsonlFile {
    bytes: Arc<dyn ByteSource>,
    text_column: String,
    /// Bytes a unit, not counting the end of its last line.
    unit_bytes: u64,
}

impl JsonlFile {
    pub fn new(bytes: Arc<dyn ByteSource>, text_column: &str, unit_bytes: u64) -> Self {
        Self { bytes, text_column: text_column.to_string(), unit_bytes }
    }

    /// What messages call a unit.
    pub fn unit_name(&self, unit: usize) -> String {
        let start = unit as u64 * self.unit_bytes;
        format!("about the bytes {start}..{} of {}", (start + self.unit_bytes).min(self.bytes.len()), self.bytes.name())
    }

    pub fn units(&self) -> usize {
        self.bytes.len().div_ceil(self.unit_bytes) as usize
    }

    /// The documents of the lines that begin in the unit's bytes, wherever they end.
    pub fn read_unit(&self, unit: usize) -> Result<UnitText> {
        let first = unit as u64 * self.unit_bytes;
        let (start, lines) = self.read_lines(first, (first + self.unit_bytes).min(self.bytes.len()))?;
        let mut text = UnitText::default();
        let mut offset = start;
        for line in lines.split_inclusive(|&byte| byte == b'\n') {
            // A byte order mark is no part of the first line.
            let visible = if offset == 0 { line.strip_prefix(b"\xef\xbb\xbf").unwrap_or(line) } else { line };
            let document = self.parse(visible).with_context(|| self.line_name(offset));
            match document? {
                Line::Text(document) => text.documents.push(Document { opening: Opening::Begins, text: document }),
                Line::Null => text.nulls += 1,
                Line::Blank => {}
            }
            offset += line.len() as u64;
        }
        Ok(text)
    }

    /// The lines that begin in `first..end` and where the first of them begins.
    fn read_lines(&self, first: u64, end: u64) -> Result<(u64, Vec<u8>)> {
        // One byte before the unit tells whether a line begins exactly at it.
        let from = first.saturating_sub(1);
        let mut bytes = self.bytes.read(from..end)?;
        let start = match first {
            0 => 0,
            _ => match bytes.iter().position(|&byte| byte == b'\n') {
                Some(newline) => newline + 1,
                None => return Ok((end, Vec::new())),
            },
        };
        if start as u64 + from >= end {
            return Ok((end, Vec::new()));
        }
        // The last line's end, looked for in pieces that grow.
        let mut piece = 64 << 10;
        while bytes.last() != Some(&b'\n') {
            let here = from + bytes.len() as u64;
            if here == self.bytes.len() {
                break;
            }
            let more = self.bytes.read(here..(here + piece).min(self.bytes.len()))?;
            let newline = more.iter().position(|&byte| byte == b'\n');
            bytes.extend_from_slice(&more[..newline.map_or(more.len(), |newline| newline + 1)]);
            piece *= 2;
        }
        bytes.drain(..start);
        Ok((from + start as u64, bytes))
    }

    fn parse(&self, line: &[u8]) -> Result<Line> {
        let line = std::str::from_utf8(line).context("it is not UTF-8")?.trim();
        if line.is_empty() {
            return Ok(Line::Blank);
        }
        let Value::Object(mut fields) = serde_json::from_str(line).context("it is not valid JSON")? else {
            bail!("it is not a JSON object");
        };
        match fields.get_mut(&self.text_column).map(Value::take) {
            Some(Value::String(text)) => Ok(Line::Text(text)),
            Some(Value::Null) => Ok(Line::Null),
            other => {
                let texts = fields.iter().filter(|(_, value)| value.is_string());
                let texts: Vec<&str> = texts.map(|(name, _)| name.as_str()).collect();
                let problem = if other.is_some() { "is not a text" } else { "is missing" };
                Err(anyhow!("its field \"{}\" {problem} (its texts: {})", self.text_column, texts.join(", ")))
            }
        }
    }

    /// What messages call the line that begins at `offset`. Counting lines costs a pass over the file, so it is done
    /// for a message only.
    fn line_name(&self, offset: u64) -> String {
        const PIECE: u64 = 1 << 20;
        let mut newlines = 0;
        for start in (0..offset).step_by(PIECE as usize) {
            match self.bytes.read(start..(start + PIECE).min(offset)) {
                Ok(bytes) => newlines += bytes.iter().filter(|&&byte| byte == b'\n').count(),
                Err(_) => return format!("the line at byte {offset} of {}", self.bytes.name()),
            }
        }
        format!("line {} of {}", newlines + 1, self.bytes.name())
    }
}

enum Line {
    Text(String),
    Null,
    Blank,
}

#[cfg(test)]
mod tests {
    use super::super::MemoryFile;
    use super::*;

    fn file(bytes: &[u8], unit_bytes: u64) -> JsonlFile {
        JsonlFile::new(Arc::new(MemoryFile::new("x.jsonl", bytes.to_vec())), "text", unit_bytes)
    }

    fn texts(file: &JsonlFile) -> Result<(Vec<String>, u64)> {
        let (mut texts, mut nulls) = (Vec::new(), 0);
        for unit in 0..file.units() {
            let read = file.read_unit(unit)?;
            nulls += read.nulls;
            texts.extend(read.documents.into_iter().map(|document| document.text));
        }
        Ok((texts, nulls))
    }

    #[test]
    fn every_line_belongs_to_exactly_one_unit_whatever_the_size_of_units() -> Result<()> {
        let lines = concat!(
            "\u{feff}{\"text\": \"one\"}\r\n\n{\"id\": 2, \"text\": null}\n",
            "{\"text\":\"zwei\\u00fc\\n\"}\n  \n{\"text\":\"\"}"
        );
        for unit_bytes in 1..lines.len() as u64 + 2 {
            let (texts, nulls) = texts(&file(lines.as_bytes(), unit_bytes))?;
            assert_eq!((texts, nulls), (vec!["one".into(), "zweiü\n".into(), String::new()], 1), "{unit_bytes}");
        }
        Ok(())
    }

    #[test]
    fn a_bad_line_is_named_by_its_number_and_says_which_texts_there_are() {
        for (line, said) in [
            ("{\"text\": ", "not valid JSON"),
            ("[1]", "not a JSON object"),
            ("{\"question\": \"q\", \"n\": 1}", "\"text\" is missing (its texts: question)"),
            ("{\"text\": 3}", "\"text\" is not a text"),
        ] {
            let lines = format!("{{\"text\": \"a\"}}\n\n{line}\n");
            let error = texts(&file(lines.as_bytes(), 5)).err().map(|e| format!("{e:#}")).unwrap_or_default();
            assert!(error.contains("line 3 of x.jsonl") && error.contains(said), "{error}");
        }
        let error = texts(&file(b"{\"text\": \"\xff\"}", 100)).err().map(|e| format!("{e:#}")).unwrap_or_default();
        assert!(error.contains("line 1 of x.jsonl: it is not UTF-8"), "{error}");
    }
}
