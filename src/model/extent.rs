//! The size of a micro-batch, and where its tokens stand.

use crate::ops::attention::Documents;
use crate::ops::dropout::Draw;

/// Rows and length of a micro-batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Extent {
    pub rows: usize,
    pub time: usize,
}

impl Extent {
    pub fn tokens(self) -> usize {
        self.rows * self.time
    }

    /// What attention handles at a time: the rows, or the longest of the documents that it handles by themselves.
    pub(super) fn attended(self, documents: Documents) -> Self {
        match documents {
            Documents::Whole | Documents::Packed(_) => self,
            Documents::Apart(lengths) => Self { time: lengths.iter().copied().max().unwrap_or(0), ..self },
        }
    }
}

/// The rows that a pass runs over.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub extent: Extent,
    /// [R]: where each token stands in its document, R = rows * time.
    pub positions: &'a [u32],
    pub documents: Documents<'a>,
    /// What dropout draws; `None`: nothing is dropped.
    pub draw: Option<Draw>,
}

/// Makes `positions` [R] say where each token stands in its document.
pub fn place(documents: Documents, extent: Extent, positions: &mut Vec<u32>) {
    positions.clear();
    match documents {
        Documents::Whole => positions.extend((0..extent.rows).flat_map(|_| 0..extent.time as u32)),
        Documents::Packed(places) => positions.extend_from_slice(places),
        Documents::Apart(lengths) => positions.extend(lengths.iter().flat_map(|&length| 0..length as u32)),
    }
}
