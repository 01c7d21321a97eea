//! What the twins of both models share: where tokens stand and what they attend to, and the loss.

use super::extent::{Extent, place};
use crate::ops::attention::Documents;
use candle_core::{DType, Device, IndexOp, Result, Tensor};

/// Where the tokens of a batch stand, and what they attend to.
pub struct Places {
    /// [B T]: each token's position in its document.
    pub positions: Tensor,
    /// [B, 1, T, T]: 0 for keys of a query's own document on and below the diagonal, -inf for all others.
    pub mask: Tensor,
}

impl Places {
    pub fn new(documents: Documents, extent: Extent, dtype: DType, device: &Device) -> Result<Self> {
        let Extent { rows, time } = extent;
        let mut positions = Vec::new();
        place(documents, extent, &mut positions);
        let mask = |token: usize| {
            let query = token % time;
            let first = query - positions[token] as usize;
            (0..time).map(move |key| if (first..=query).contains(&key) { 0.0 } else { f32::NEG_INFINITY })
        };
        let mask: Vec<f32> = (0..rows * time).flat_map(mask).collect();
        let mask = Tensor::from_vec(mask, (rows, 1, time, time), device)?.to_dtype(dtype)?;
        Ok(Self { positions: Tensor::from_vec(positions, rows * time, device)?, mask })
    }
}

/// Sum over the rows of the negative log-likelihood of `targets` [N] under `logits` [N, V]; ids of `ignore` count nothing.
///
/// Gives the sum and the number of targets that count.
pub fn loss_sum(logits: &Tensor, targets: &[u32], ignore: u32) -> Result<(Tensor, u64)> {
    let counted: Vec<u32> = (0..targets.len() as u32).filter(|&row| targets[row as usize] != ignore).collect();
    let labels: Vec<u32> = counted.iter().map(|&row| targets[row as usize]).collect();
    let count = counted.len() as u64;
    if counted.is_empty() {
        return Ok(((logits.i((0, 0))? * 0.0)?, 0));
    }
    let rows = Tensor::from_vec(counted, labels.len(), logits.device())?;
    let labels = Tensor::from_vec(labels, (count as usize, 1), logits.device())?;
    let logits = logits.index_select(&rows, 0)?;
    let largest = logits.max_keepdim(1)?.detach();
    let shifted = logits.broadcast_sub(&largest)?;
    let log_sum = shifted.exp()?.sum_keepdim(1)?.log()?;
    let nll = (log_sum - shifted.gather(&labels, 1)?)?;
    Ok((nll.sum_all()?, count))
}
