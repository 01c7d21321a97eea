//! How both models read their weights: trained or frozen, exact or from the bf16 copy.

use crate::ops::product::{Numbers, Precision};
use crate::params::{Layout, Weights};

/// A token embedding: exact where it is trained, as it is stored where it is frozen.
pub fn table<'a>(layout: &Layout, weights: Weights<'a>, index: usize) -> Numbers<'a> {
    match weights.frozen {
        Some(frozen) => frozen.tensor(index).into(),
        None => weights.vector(layout, index).into(),
    }
}

/// A matrix as a product of `precision` reads it: from the bf16 copy, if there is one; a frozen one as it is stored.
pub fn matrix<'a>(layout: &Layout, weights: Weights<'a>, precision: Precision, index: usize) -> Numbers<'a> {
    if let Some(frozen) = weights.frozen {
        return frozen.tensor(index).into();
    }
    let range = layout.parameters()[index].range();
    match (precision, weights.rounded) {
        (Precision::Bf16, Some(rounded)) => rounded[range].into(),
        _ => weights.exact[range].into(),
    }
}
