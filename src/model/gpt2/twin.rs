//! GPT-2 from candle primitives, in any dtype and on any device: slow and plain.
//!
//! It is the oracle of the fast path's tests (in f64 too) and the fall-back on devices without kernels of ours
//! ([`super::generic`]). Only operations whose gradient candle has are used: its fused layer norm and softmax would cut
//! the graph silently.

use super::Gpt2Config;
use candle_core::{D, DType, Device, IndexOp, Result, Tensor};
use candle_nn::ops::{layer_norm_slow, softmax};

/// One block's twelve parameters, in the order of the block's parameters in the layout's names.
pub struct BlockTensors {
    pub norm_1: [Tensor; 2],
    pub attention_in: [Tensor; 2],
    pub attention_out: [Tensor; 2],
    pub norm_2: [Tensor; 2],
    pub mlp_in: [Tensor; 2],
    pub mlp_out: [Tensor; 2],
}

/// x [B, T, I] times w [I, O] plus b [O].
fn linear(x: &Tensor, [weight, bias]: &[Tensor; 2]) -> Result<Tensor> {
    let (batch, time, inputs) = x.dims3()?;
    let y = x.reshape((batch * time, inputs))?.matmul(weight)?.broadcast_add(bias)?;
    y.reshape((batch, time, bias.elem_count()))
}

/// [T, T]: 0 on and below the diagonal, -inf above.
fn causal_mask(time: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    let numbers: Vec<f32> =
        (0..time * time).map(|i| if i % time > i / time { f32::NEG_INFINITY } else { 0.0 }).collect();
    Tensor::from_vec(numbers, (time, time), device)?.to_dtype(dtype)
}

/// Token plus position embedding: ids [B, T] -> [B, T, C].
pub fn embed(token: &Tensor, position: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let (batch, time) = ids.dims2()?;
    let width = token.dim(1)?;
    let tokens = token.index_select(&ids.flatten_all()?, 0)?.reshape((batch, time, width))?;
    tokens.broadcast_add(&position.narrow(0, 0, time)?)
}

/// One pre-norm block: x [B, T, C] -> [B, T, C].
pub fn block(config: &Gpt2Config, parameters: &BlockTensors, x: &Tensor) -> Result<Tensor> {
    let (batch, time, width) = x.dims3()?;
    let (heads, head_dim, epsilon) = (config.n_head, config.head_dim(), config.layer_norm_epsilon as f32);
    let BlockTensors { norm_1, attention_in, attention_out, norm_2, mlp_in, mlp_out } = parameters;

    let qkv = linear(&layer_norm_slow(x, &norm_1[0], &norm_1[1], epsilon)?, attention_in)?;
    let part = |i: usize| -> Result<Tensor> {
        let part = qkv.narrow(2, i * width, width)?.reshape((batch, time, heads, head_dim))?;
        part.transpose(1, 2)?.contiguous()
    };
    let (query, key, value) = (part(0)?, part(1)?, part(2)?);
    let scores = (query.matmul(&key.t()?.contiguous()?)? * (1.0 / (head_dim as f64).sqrt()))?;
    let scores = scores.broadcast_add(&causal_mask(time, x.dtype(), x.device())?)?;
    let mixed = softmax(&scores, D::Minus1)?.matmul(&value)?;
    let mixed = mixed.transpose(1, 2)?.contiguous()?.reshape((batch, time, width))?;
    let x = (x + linear(&mixed, attention_out)?)?;

    let hidden = linear(&layer_norm_slow(&x, &norm_2[0], &norm_2[1], epsilon)?, mlp_in)?.gelu()?;
    &x + linear(&hidden, mlp_out)?
}

/// Final norm and head: x [B, T, C] -> logits [B T, V].
pub fn logits(config: &Gpt2Config, norm: &[Tensor; 2], head: &Tensor, x: &Tensor) -> Result<Tensor> {
    let (batch, time, width) = x.dims3()?;
    let hidden = layer_norm_slow(x, &norm[0], &norm[1], config.layer_norm_epsilon as f32)?;
    hidden.reshape((batch * time, width))?.matmul(&head.t()?)
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
