//! Attention over heads [B H, T, D] inside each document, up to the query itself.

use super::passes::{Card, Standing};
use candle_core::{Result, Tensor};

/// What the backward pass needs.
pub struct Kept {
    query: Tensor,
    key: Tensor,
    value: Tensor,
    /// [B H, T, T]
    probabilities: Tensor,
}

/// The scores' factor.
fn scale(query: &Tensor) -> Result<f32> {
    Ok((1.0 / (query.dim(2)? as f64).sqrt()) as f32)
}

/// softmax(scale q k^T) v
pub fn forward(card: &Card, standing: &Standing, [query, key, value]: [Tensor; 3]) -> Result<(Tensor, Kept)> {
    let heads = query.dim(0)? / standing.rows;
    let probabilities = query.matmul(&key.t()?)?;
    card.softmax_in_place(&probabilities, heads, scale(&query)?, standing)?;
    let mixed = probabilities.matmul(&value)?;
    Ok((mixed, Kept { query, key, value, probabilities }))
}

/// The gradients of query, key and value.
pub fn backward(card: &Card, standing: &Standing, kept: &Kept, gradient: &Tensor) -> Result<[Tensor; 3]> {
    let Kept { query, key, value, probabilities } = kept;
    let heads = query.dim(0)? / standing.rows;
    let value_gradient = probabilities.t()?.matmul(gradient)?;
    let slopes = gradient.matmul(&value.t()?)?;
    card.softmax_gradient_in_place(probabilities, &slopes, heads, scale(query)?, standing)?;
    Ok([slopes.matmul(key)?, slopes.t()?.matmul(query)?, value_gradient])
}
