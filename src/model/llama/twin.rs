//! LLaMA from candle primitives, in any dtype and on any device: slow and plain.
//!
//! It is the oracle of the fast path's tests (in f64 too) and the fall-back on devices without kernels of ours
//! ([`super::generic`]). Everything is written out in operations whose gradient candle has: its fused norm, rotation and
//! softmax would cut the graph silently.

use super::LlamaConfig;
use crate::model::twin::{Places, loss_sum};
use crate::model::{Batch, IGNORE};
use crate::ops::rotary::Table;
use crate::params::Layout;
use candle_core::{D, Result, Tensor, bail};
use candle_nn::ops::softmax;

/// One block's nine parameters, in the order of [`super::BlockParameters`].
pub struct BlockTensors {
    pub norm_1: Tensor,
    pub query: Tensor,
    pub key: Tensor,
    pub value: Tensor,
    pub output: Tensor,
    pub norm_2: Tensor,
    pub gate: Tensor,
    pub up: Tensor,
    pub down: Tensor,
}

impl From<[Tensor; 9]> for BlockTensors {
    fn from([norm_1, query, key, value, output, norm_2, gate, up, down]: [Tensor; 9]) -> Self {
        Self { norm_1, query, key, value, output, norm_2, gate, up, down }
    }
}

/// Cosines and sines [B, 1, T, head_dim / 2] of every token's position.
pub struct Rotation {
    cos: Tensor,
    sin: Tensor,
}

impl Rotation {
    pub fn new(config: &LlamaConfig, places: &Places) -> Result<Self> {
        let half = config.head_dim / 2;
        let (batch, _, time, _) = places.mask.dims4()?;
        let table = Table::new(config.rope_theta, config.head_dim, time, config.rope_scaling);
        let (mut cos, mut sin) = (Vec::with_capacity(time * half), Vec::with_capacity(time * half));
        for position in 0..time {
            let (row_cos, row_sin) = table.row(position);
            cos.extend_from_slice(row_cos);
            sin.extend_from_slice(row_sin);
        }
        let tensor = |numbers| {
            let table = Tensor::from_vec(numbers, (time, half), places.mask.device())?.to_dtype(places.mask.dtype())?;
            table.index_select(&places.positions, 0)?.reshape((batch, 1, time, half))
        };
        Ok(Self { cos: tensor(cos)?, sin: tensor(sin)? })
    }

    /// x [B, H, T, D], each pair (x[i], x[i + D/2]) turned by its position's angle.
    fn turn(&self, x: &Tensor) -> Result<Tensor> {
        let half = x.dim(D::Minus1)? / 2;
        let (first, second) = (x.narrow(D::Minus1, 0, half)?, x.narrow(D::Minus1, half, half)?);
        let turned_first = (first.broadcast_mul(&self.cos)? - second.broadcast_mul(&self.sin)?)?;
        let turned_second = (second.broadcast_mul(&self.cos)? + first.broadcast_mul(&self.sin)?)?;
        Tensor::cat(&[turned_first, turned_second], D::Minus1)
    }
}

/// x [B, T, I] times the transpose of w [O, I].
fn linear(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (batch, time, inputs) = x.dims3()?;
    x.reshape((batch * time, inputs))?.matmul(&weight.t()?)?.reshape((batch, time, weight.dim(0)?))
}

/// x / sqrt(mean(x^2) + epsilon) * weight, over the last dimension.
fn rms_norm(x: &Tensor, weight: &Tensor, epsilon: f64) -> Result<Tensor> {
    let root = (x.sqr()?.mean_keepdim(D::Minus1)? + epsilon)?.sqrt()?;
    x.broadcast_div(&root)?.broadcast_mul(weight)
}

/// Token embedding: ids [B, T] -> [B, T, C].
pub fn embed(token: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let (batch, time) = ids.dims2()?;
    token.index_select(&ids.flatten_all()?, 0)?.reshape((batch, time, token.dim(1)?))
}

/// One pre-norm block: x [B, T, C] -> [B, T, C].
pub fn block(
    config: &LlamaConfig,
    places: &Places,
    rotation: &Rotation,
    parameters: &BlockTensors,
    x: &Tensor,
) -> Result<Tensor> {
    let (batch, time, _) = x.dims3()?;
    let LlamaConfig { n_head, n_kv_head, head_dim, rms_norm_epsilon: epsilon, .. } = *config;
    let group = n_head / n_kv_head;

    let normed = rms_norm(x, &parameters.norm_1, epsilon)?;
    // [B, heads, T, D]
    let part = |weight: &Tensor, heads: usize| -> Result<Tensor> {
        linear(&normed, weight)?.reshape((batch, time, heads, head_dim))?.transpose(1, 2)?.contiguous()
    };
    // Query head h reads key head h / group.
    let shared = |x: Tensor| -> Result<Tensor> {
        let x = x.unsqueeze(2)?.broadcast_as((batch, n_kv_head, group, time, head_dim))?;
        x.contiguous()?.reshape((batch, n_head, time, head_dim))
    };
    let query = rotation.turn(&part(&parameters.query, n_head)?)?;
    let key = shared(rotation.turn(&part(&parameters.key, n_kv_head)?)?)?;
    let value = shared(part(&parameters.value, n_kv_head)?)?;
    let scores = (query.matmul(&key.t()?.contiguous()?)? * (1.0 / (head_dim as f64).sqrt()))?;
    let scores = scores.broadcast_add(&places.mask)?;
    let mixed = softmax(&scores, D::Minus1)?.matmul(&value)?;
    let mixed = mixed.transpose(1, 2)?.contiguous()?.reshape((batch, time, n_head * head_dim))?;
    let x = (x + linear(&mixed, &parameters.output)?)?;

    let normed = rms_norm(&x, &parameters.norm_2, epsilon)?;
    let hidden = (linear(&normed, &parameters.gate)?.silu()? * linear(&normed, &parameters.up)?)?;
    &x + linear(&hidden, &parameters.down)?
}

/// Final norm and head: x [B, T, C] -> logits [B T, V].
pub fn logits(config: &LlamaConfig, norm: &Tensor, head: &Tensor, x: &Tensor) -> Result<Tensor> {
    let (batch, time, width) = x.dims3()?;
    let hidden = rms_norm(x, norm, config.rms_norm_epsilon)?;
    hidden.reshape((batch * time, width))?.matmul(&head.t()?)
}

/// The sum of the losses of a batch and the number of its targets; `tensors` in the layout's order.
pub fn loss(config: &LlamaConfig, layout: &Layout, tensors: &[Tensor], batch: Batch) -> Result<(Tensor, u64)> {
    let Some(first) = tensors.first() else { bail!("a model without parameters") };
    let places = Places::new(batch.documents, batch.extent(), first.dtype(), first.device())?;
    let (rotation, parameters) = (Rotation::new(config, &places)?, config.parameters(layout));
    let of = |index: usize| tensors[index].clone();
    let ids = Tensor::from_slice(batch.inputs, (batch.rows, batch.sequence_length()), first.device())?;
    let mut x = embed(&of(parameters.token_embedding), &ids)?;
    for block in &parameters.blocks {
        x = self::block(config, &places, &rotation, &block.all().map(of).into(), &x)?;
    }
    loss_sum(&logits(config, &of(parameters.norm_final), &of(parameters.head), &x)?, batch.targets, IGNORE)
}
