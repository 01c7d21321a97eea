//! What is added to a product: bias and residual.

use super::Into;
use crate::ops::parallel::rows_a_piece;
use crate::ops::simd::{Level, kernel};
use rayon::prelude::*;

/// What is added to a product C [m, n] = A B + bias + residual.
#[derive(Clone, Copy, Debug, Default)]
pub struct Plus<'a> {
    /// [n], for every row.
    pub bias: Option<&'a [f32]>,
    /// [m, n], contiguous.
    pub residual: Option<&'a [f32]>,
}

impl Plus<'_> {
    pub(super) fn is_nothing(self) -> bool {
        self.bias.is_none() && self.residual.is_none()
    }

    /// Whether it has the sizes of C [m, n].
    pub(super) fn fits(self, m: usize, n: usize) -> bool {
        self.bias.is_none_or(|bias| bias.len() == n) && self.residual.is_none_or(|residual| residual.len() == m * n)
    }

    /// Fills C with what the product is added to, and says whether there is anything to add to.
    pub(super) fn preset(self, c: &mut [f32], n: usize) -> Into {
        let (piece, level) = (rows_a_piece(n) * n, Level::current());
        match (self.bias, self.residual) {
            (None, None) => return Into::Overwrite,
            (Some(bias), None) => c.par_chunks_mut(piece).for_each(|c| {
                c.chunks_exact_mut(n).for_each(|c| c.copy_from_slice(bias));
            }),
            (None, Some(residual)) => {
                c.par_chunks_mut(piece)
                    .zip(residual.par_chunks(piece))
                    .for_each(|(c, residual)| c.copy_from_slice(residual));
            }
            (Some(bias), Some(residual)) => c
                .par_chunks_mut(piece)
                .zip(residual.par_chunks(piece))
                .for_each(|(c, residual)| biased_rows(level, residual, bias, c)),
        }
        Into::Accumulate
    }
}

kernel! {
    fn biased_rows(residual: &[f32], bias: &[f32], c: &mut [f32]) {
        for (c, residual) in c.chunks_exact_mut(bias.len()).zip(residual.chunks_exact(bias.len())) {
            for ((c, residual), bias) in c.iter_mut().zip(residual).zip(bias) {
                *c = residual + bias;
            }
        }
    }
}
