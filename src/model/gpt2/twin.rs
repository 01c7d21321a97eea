//! GPT-2 from candle primitives, in any dtype and on any device: slow and plain.
//!
//! It is the oracle of the fast path's tests (in f64 too) and the fall-back on devices without kernels of ours
//! ([`super::generic`]). Only operations whose gradient candle has are used: its fused layer norm and softmax would cut
//! the graph silently.

use super::Gpt2Config;
use crate::model::twin::{Places, loss_sum};
use crate::model::{Batch, IGNORE};
use crate::params::Layout;
use candle_core::{D, Result, Tensor, bail};
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

impl From<[Tensor; 12]> for BlockTensors {
    fn from([a, b, c, d, e, f, g, h, i, j, k, l]: [Tensor; 12]) -> Self {
        Self {
            norm_1: [a, b],
            attention_in: [c, d],
            attention_out: [e, f],
            norm_2: [g, h],
            mlp_in: [i, j],
            mlp_out: [k, l],
        }
    }
}

/// x [B, T, I] times w [I, O] plus b [O].
fn linear(x: &Tensor, [weight, bias]: &[Tensor; 2]) -> Result<Tensor> {
    let (batch, time, inputs) = x.dims3()?;
    let y = x.reshape((batch * time, inputs))?.matmul(weight)?.broadcast_add(bias)?;
    y.reshape((batch, time, bias.elem_count()))
}

/// Token plus position embedding: ids [B, T] -> [B, T, C].
pub fn embed(token: &Tensor, position: &Tensor, ids: &Tensor, places: &Places) -> Result<Tensor> {
    let (batch, time) = ids.dims2()?;
    let width = token.dim(1)?;
    let tokens = token.index_select(&ids.flatten_all()?, 0)?;
    (tokens + position.index_select(&places.positions, 0)?)?.reshape((batch, time, width))
}

/// One pre-norm block: x [B, T, C] -> [B, T, C].
pub fn block(config: &Gpt2Config, places: &Places, parameters: &BlockTensors, x: &Tensor) -> Result<Tensor> {
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
    let scores = scores.broadcast_add(&places.mask)?;
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

/// The sum of the losses of a batch and the number of its targets; `tensors` in the layout's order.
pub fn loss(config: &Gpt2Config, layout: &Layout, tensors: &[Tensor], batch: Batch) -> Result<(Tensor, u64)> {
    let Some(first) = tensors.first() else { bail!("a model without parameters") };
    let places = Places::new(batch.documents, batch.extent(), first.dtype(), first.device())?;
    let parameters = config.parameters(layout);
    let of = |index: usize| tensors[index].clone();
    let ids = Tensor::from_slice(batch.inputs, (batch.rows, batch.sequence_length()), first.device())?;
    let mut x = embed(&of(parameters.token_embedding), &of(parameters.position_embedding), &ids, &places)?;
    for block in &parameters.blocks {
        x = self::block(config, &places, &block.all().map(of).into(), &x)?;
    }
    let norm = [of(parameters.norm_final.weight), of(parameters.norm_final.bias)];
    loss_sum(&logits(config, &norm, &of(parameters.head), &x)?, batch.targets, IGNORE)
}
