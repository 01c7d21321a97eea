//! What the twins of both models share: the causal mask, and the loss.

use candle_core::{DType, Device, IndexOp, Result, Tensor};

/// [T, T]: 0 on and below the diagonal, -inf above.
pub fn causal_mask(time: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    let numbers: Vec<f32> =
        (0..time * time).map(|i| if i % time > i / time { f32::NEG_INFINITY } else { 0.0 }).collect();
    Tensor::from_vec(numbers, (time, time), device)?.to_dtype(dtype)
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
