//! Keys and values of the past, for generation: each new token then costs one row.

use crate::ops::attention;
use anyhow::{Result, ensure};

/// Keys and values of a batch of sequences, layer by layer.
pub struct KeyValueCache {
    /// [L][B, capacity, width] each.
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    capacity: usize,
    /// Numbers in a position's key, and in its value.
    width: usize,
    /// [B]: positions filled.
    lengths: Vec<usize>,
}

impl KeyValueCache {
    /// An empty cache for `batch` sequences of at most `capacity` positions.
    pub(super) fn new(layers: usize, batch: usize, capacity: usize, width: usize) -> Self {
        let layer = || vec![0.0; batch * capacity * width];
        Self {
            keys: (0..layers).map(|_| layer()).collect(),
            values: (0..layers).map(|_| layer()).collect(),
            capacity,
            width,
            lengths: vec![0; batch],
        }
    }

    /// Positions that a sequence has room for.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Positions filled, [B].
    pub fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// Forgets the past of one sequence.
    pub fn rewind(&mut self, sequence: usize) {
        self.lengths[sequence] = 0;
    }

    /// Makes room for a prompt of `length` positions in an emptied sequence.
    ///
    /// # Errors
    /// When the prompt is empty or longer than the cache.
    pub(super) fn restart(&mut self, sequence: usize, length: usize) -> Result<()> {
        ensure!(length > 0, "the prompt is empty: give at least one token");
        ensure!(length <= self.capacity, "the prompt has {length} tokens, the context holds {}", self.capacity);
        self.lengths[sequence] = length;
        Ok(())
    }

    /// Makes room for one more position in each of `sequences` sequences.
    ///
    /// # Errors
    /// When a sequence is full; nothing changes then.
    pub(super) fn lengthen(&mut self, sequences: usize) -> Result<()> {
        assert_eq!(sequences, self.lengths.len(), "a decoding step takes one token a sequence");
        let full = self.lengths.iter().any(|&length| length >= self.capacity);
        ensure!(!full, "a sequence has reached the end of the context");
        self.lengths.iter_mut().for_each(|length| *length += 1);
        Ok(())
    }

    /// Keeps the key and the value [width] of one position.
    pub(super) fn put(&mut self, layer: usize, sequence: usize, position: usize, key: &[f32], value: &[f32]) {
        let start = (sequence * self.capacity + position) * self.width;
        self.keys[layer][start..start + self.width].copy_from_slice(key);
        self.values[layer][start..start + self.width].copy_from_slice(value);
    }

    /// What the newest positions of a layer attend to.
    pub(super) fn layer(&self, layer: usize) -> attention::Cache<'_> {
        let (keys, values) = (&self.keys[layer], &self.values[layer]);
        attention::Cache { keys, values, capacity: self.capacity, lengths: &self.lengths }
    }
}
