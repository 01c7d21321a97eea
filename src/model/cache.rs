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
    /// The sequences that a decoding step extends, in the order of its rows.
    extended: Vec<usize>,
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
            extended: (0..batch).collect(),
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

    /// From now on a decoding step takes one token for each of these sequences, in this order (at first: for all).
    pub fn extend_only(&mut self, sequences: &[usize]) {
        assert!(sequences.iter().all(|&sequence| sequence < self.lengths.len()), "a sequence outside the cache");
        self.extended.clear();
        self.extended.extend_from_slice(sequences);
    }

    /// Where the newest position of each extended sequence stands, row by row: (sequence, position).
    pub(super) fn newest(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.extended.iter().map(|&sequence| (sequence, self.lengths[sequence] - 1))
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

    /// Makes room for one more position in each of the `rows` extended sequences.
    ///
    /// # Errors
    /// When a sequence is full; nothing changes then.
    pub(super) fn lengthen(&mut self, rows: usize) -> Result<()> {
        assert_eq!(rows, self.extended.len(), "a decoding step takes one token a sequence");
        let full = self.extended.iter().any(|&sequence| self.lengths[sequence] >= self.capacity);
        ensure!(!full, "a sequence has reached the end of the context");
        self.extended.iter().for_each(|&sequence| self.lengths[sequence] += 1);
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
        attention::Cache { keys, values, capacity: self.capacity, sequences: &self.extended, lengths: &self.lengths }
    }
}
