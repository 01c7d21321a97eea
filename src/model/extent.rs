//! The size of a micro-batch.

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
}
