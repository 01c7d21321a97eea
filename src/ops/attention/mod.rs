//! Causal attention with several heads, forward and backward, without the T x T matrix of probabilities.
//!
//! For each sequence and head: s[i, j] = scale * q_i . k_j for j <= i, p = softmax of each row, y_i = sum_j p[i, j] v_j.
//! Saved for the backward pass is only each row's log of the sum of e^s (Dao, "FlashAttention-2", 2023), from which a
//! block of p is formed again:
//!
//! ```text
//! dp = dy v^T    ds = p * (dp - rowsum(dy * y))    dq = scale * ds k    dk = scale * ds^T q    dv = p^T dy
//! ```
//!
//! With dropout y_i = sum_j m[i, j] p[i, j] v_j, where m is 0 or 1 / (1 - probability); dp and p in dv are multiplied by m.
//!
//! Of inputs in bf16 the products round their operands to bf16 too; scores, softmax and sums are f32 always.
//!
//! Rows come in blocks of [`BLOCK`]; blocks above the diagonal are never formed. With fewer heads for keys and values
//! than for queries (grouped-query attention), query head h reads key head h / (heads / kv_heads). Where several
//! documents stand in a row, j goes from the beginning of i's document only, and blocks that lie before it are not formed.

mod cpu;
mod decode;
pub mod reference;

use super::Values;
use super::dropout::Mask;
pub use cpu::{backward, forward, scratch_len};
pub use decode::{Cache, decode, decode_scratch_len};

/// Query rows that are handled together: whole panels of the products' rows.
pub const BLOCK: usize = 64;

/// Sizes of an attention layer's input: B sequences of T positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub batch: usize,
    pub sequence: usize,
    pub heads: usize,
    /// Divides `heads`.
    pub kv_heads: usize,
    pub head_dim: usize,
}

impl Shape {
    /// The usual scale of the scores, 1 / sqrt(head_dim).
    pub fn scale(&self) -> f32 {
        (1.0 / (self.head_dim as f64).sqrt()) as f32
    }

    /// Elements of a row of q and of y.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Elements of a row of k and of v.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Rows of q: positions of all sequences.
    pub fn rows(&self) -> usize {
        self.batch * self.sequence
    }

    fn check(&self) {
        let fits = self.kv_heads > 0 && self.heads.is_multiple_of(self.kv_heads) && self.head_dim > 0;
        assert!(fits, "attention: kv_heads must divide heads, and head_dim be positive: {self:?}");
    }
}

/// Which positions of a row belong together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Documents<'a> {
    /// A row is one document.
    Whole,
    /// A row holds several documents, one after another: each position's place in its own, [B, T], counted from 0.
    Packed(&'a [u32]),
    /// The only row holds documents of these lengths, one after another, and each is computed by itself: to the last bit
    /// as where it is the whole row. Not for the backward pass. log_sum_exp is [heads, length] of each in turn.
    Apart(&'a [usize]),
}

impl<'a> Documents<'a> {
    /// # Panics
    /// When the places do not count up by one from 0 within the rows, or the lengths are not those of one row.
    fn check(self, shape: Shape) {
        let places = match self {
            Self::Whole => return,
            Self::Packed(places) => places,
            Self::Apart(lengths) => {
                let fit = shape.batch == 1 && lengths.iter().sum::<usize>() == shape.sequence;
                return assert!(fit, "attention: documents that are not one row: {lengths:?} in {shape:?}");
            }
        };
        assert_eq!(places.len(), shape.rows(), "attention: the places in the documents are not [B, T]");
        for row in places.chunks_exact(shape.sequence.max(1)) {
            let counts_up = row.windows(2).all(|pair| pair[1] == 0 || pair[1] == pair[0] + 1);
            assert!(row[0] == 0 && counts_up, "attention: the places in the documents do not count up from 0");
        }
    }

    /// Places of `rows` positions of sequence `b` from `first` on; none where the row is one document.
    fn of(self, shape: Shape, b: usize, first: usize, rows: usize) -> &'a [u32] {
        match self {
            Self::Whole | Self::Apart(_) => &[],
            Self::Packed(places) => &places[b * shape.sequence + first..][..rows],
        }
    }
}

/// Which scores take part in a pass.
#[derive(Clone, Copy, Debug)]
pub struct Pattern<'a> {
    pub documents: Documents<'a>,
    /// Drops probabilities: column j of row (b heads + h) T + i of the mask is that of key j for query i.
    pub dropout: Option<Mask>,
}

impl<'a> From<Documents<'a>> for Pattern<'a> {
    fn from(documents: Documents<'a>) -> Self {
        Self { documents, dropout: None }
    }
}

/// Queries, keys and values. A row is a position, in it the heads stand one after another.
#[derive(Clone, Copy, Debug)]
pub enum Inputs<'a> {
    /// [B*T, (heads + 2 kv_heads) * head_dim]: q, then k, then v in each row.
    Fused(Values<'a>),
    /// q [B*T, heads * head_dim], k and v [B*T, kv_heads * head_dim].
    Separate { q: Values<'a>, k: Values<'a>, v: Values<'a> },
}

impl<'a> Inputs<'a> {
    /// `count` rows from row `first` on.
    fn rows(self, shape: Shape, first: usize, count: usize) -> Self {
        let rows = |values: Values<'a>, width: usize| values.slice(first * width..(first + count) * width);
        let (q_width, kv_width) = (shape.q_width(), shape.kv_width());
        match self {
            Self::Fused(values) => Self::Fused(rows(values, q_width + 2 * kv_width)),
            Self::Separate { q, k, v } => {
                Self::Separate { q: rows(q, q_width), k: rows(k, kv_width), v: rows(v, kv_width) }
            }
        }
    }
}

/// Where [`backward`] puts the gradients of [`Inputs`], in the same layout. They are overwritten.
#[derive(Debug)]
pub enum InputGradients<'a> {
    Fused(&'a mut [f32]),
    Separate { dq: &'a mut [f32], dk: &'a mut [f32], dv: &'a mut [f32] },
}

/// What [`forward`] was given and found, for [`backward`].
#[derive(Clone, Copy, Debug)]
pub struct Saved<'a> {
    pub inputs: Inputs<'a>,
    pub pattern: Pattern<'a>,
    /// [B*T, heads * head_dim].
    pub y: Values<'a>,
    /// Natural logarithm of each row's sum of e^s, [B, heads, T].
    pub log_sum_exp: &'a [f32],
}
