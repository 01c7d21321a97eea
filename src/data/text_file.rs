//! Plain text: in order, a file is one document, read about a megabyte at a time; shuffled, it is cut into pieces.

use super::bytes::ByteSource;
use super::document::{Document, Opening, UnitText};
use super::order::Order;
use anyhow::{Context, Result};
use std::ops::Range;
use std::sync::Arc;

/// A UTF-8 file.
///
/// Cuts are made between a newline and what follows it, where neither side of the newline is white space. There the
/// pre-tokenizers of GPT-2 and LLaMA 3 split anyway, so the tokens of the pieces are the tokens of the whole.
pub(super) struct TextFile {
    bytes: Arc<dyn ByteSource>,
    unit_bytes: u64,
    piece_bytes: usize,
}

impl TextFile {
    /// Units of about `unit_bytes`; when shuffled, documents of about `piece_bytes`.
    pub fn new(bytes: Arc<dyn ByteSource>, unit_bytes: u64, piece_bytes: usize) -> Self {
        Self { bytes, unit_bytes, piece_bytes }
    }

    /// What messages call a unit.
    pub fn unit_name(&self, unit: usize) -> String {
        let start = unit as u64 * self.unit_bytes;
        format!("about the bytes {start}..{} of {}", (start + self.unit_bytes).min(self.bytes.len()), self.bytes.name())
    }

    pub fn units(&self) -> usize {
        self.bytes.len().div_ceil(self.unit_bytes) as usize
    }

    /// How far from its nominal place a cut between units is looked for: less than a unit, so cuts keep their order.
    fn reach(&self) -> usize {
        (self.unit_bytes / 16) as usize
    }

    pub fn read_unit(&self, unit: usize, order: Order) -> Result<UnitText> {
        let len = self.bytes.len();
        let nominal = unit as u64 * self.unit_bytes;
        let nominal_end = nominal + self.unit_bytes;
        // Two bytes before the nominal place: a cut looks at the characters on both sides of a newline.
        let from = nominal.saturating_sub(2);
        let bytes = self.bytes.read(from..(nominal_end + self.reach() as u64).min(len))?;
        let within = |place: u64| (place - from) as usize;
        let start = if unit == 0 { 0 } else { cut(&bytes, within(nominal), self.reach()) };
        let end = if nominal_end >= len { bytes.len() } else { cut(&bytes, within(nominal_end), self.reach()) };
        let text = String::from_utf8(bytes[start..end].to_vec()).with_context(|| {
            format!(
                "{} is not UTF-8 text (looked at the bytes {}..{})",
                self.bytes.name(),
                from + start as u64,
                from + end as u64
            )
        })?;
        // A byte order mark is no part of the text.
        let text = if unit == 0 { text.trim_start_matches('\u{feff}') } else { &text };
        let pieces = match order {
            Order::Sequential => std::iter::once(0..text.len()).collect(),
            Order::Shuffled { .. } => cut_into_pieces(text.as_bytes(), self.piece_bytes),
        };
        let opening = match order {
            Order::Sequential if unit > 0 => Opening::Continues,
            _ => Opening::Begins,
        };
        let documents = pieces.into_iter().map(|piece| Document { opening, text: text[piece].to_string() }).collect();
        Ok(UnitText { documents, nulls: 0 })
    }
}

/// Ranges of about `piece_bytes`, in order, that cover `text` and are never empty.
fn cut_into_pieces(text: &[u8], piece_bytes: usize) -> Vec<Range<usize>> {
    let mut pieces = Vec::new();
    let mut start = 0;
    while start < text.len() {
        // What would be left after a cut is no shorter than half a piece.
        let end = match text.len() - start > piece_bytes + piece_bytes / 2 {
            true => cut(text, start + piece_bytes, piece_bytes / 4),
            false => text.len(),
        };
        pieces.push(start..end);
        start = end;
    }
    pieces
}

/// The first good place to cut in `nominal..nominal + reach`; a less good one where there is none.
fn cut(bytes: &[u8], nominal: usize, reach: usize) -> usize {
    let end = (nominal + reach).min(bytes.len());
    let nominal = nominal.min(end);
    let visible = |index: usize| bytes.get(index).is_some_and(|byte| !byte.is_ascii_whitespace());
    let after_newline = |&at: &usize| at >= 1 && bytes[at - 1] == b'\n';
    let between_visible = |at: &usize| after_newline(at) && *at >= 2 && visible(at - 2) && visible(*at);
    let before_space = |&at: &usize| bytes.get(at) == Some(&b' ') && at >= 1 && visible(at - 1);
    let character = |&at: &usize| bytes.get(at).is_none_or(|byte| byte & 0xc0 != 0x80);
    let mut places = nominal..end;
    let good = places.clone().find(between_visible);
    // Near the end of the text all the rest goes along.
    good.or_else(|| (nominal + reach > bytes.len()).then_some(end))
        .or_else(|| places.clone().find(after_newline))
        .or_else(|| places.clone().find(before_space))
        .or_else(|| places.find(character))
        .unwrap_or(end)
}

#[cfg(test)]
mod tests {
    use super::super::MemoryFile;
    use super::*;
    use proptest::prelude::*;

    const SHUFFLED: Order = Order::Shuffled { seed: 1 };

    proptest! {
        #[test]
        fn units_and_pieces_put_together_are_the_file(
            text in "[a-c \n.é语]{1,600}", unit_bytes in 64u64..200, piece_bytes in 16usize..60, shuffled: bool
        ) {
            let bytes = Arc::new(MemoryFile::new("x.txt", text.clone().into_bytes()));
            let file = TextFile::new(bytes, unit_bytes, piece_bytes);
            let mut all = String::new();
            for unit in 0..file.units() {
                let order = if shuffled { SHUFFLED } else { Order::Sequential };
                for document in file.read_unit(unit, order).expect("valid UTF-8").documents {
                    let continues = !shuffled && unit > 0;
                    prop_assert_eq!(document.opening == Opening::Continues, continues);
                    all.push_str(&document.text);
                }
            }
            prop_assert_eq!(all, text);
        }
    }

    #[test]
    fn cuts_prefer_a_newline_between_visible_characters() {
        assert_eq!(cut(b"one\n\ntwo \nthree\nfour", 2, 18), 16);
        assert_eq!(cut(b"one\n\ntwo", 2, 6), 4);
        assert_eq!(cut(b"one two", 2, 5), 3);
        assert_eq!(cut("aü".as_bytes(), 2, 1), 3);
        assert_eq!(cut("ü".as_bytes(), 1, 1), 2);
        assert_eq!(cut(b"one two\n", 5, 4), 8);
    }

    #[test]
    fn bytes_that_are_not_utf8_are_an_error_that_names_the_file() {
        let file = TextFile::new(Arc::new(MemoryFile::new("bad.txt", b"abc\xff\xfe".to_vec())), 1 << 20, 1 << 14);
        let error = file.read_unit(0, Order::Sequential).err().map(|e| format!("{e:#}")).unwrap_or_default();
        assert!(error.contains("bad.txt is not UTF-8") && error.contains("index 3"), "{error}");
    }
}
