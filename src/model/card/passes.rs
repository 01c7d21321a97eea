//! The passes of kernels/model.cu over tensors on a card. Shapes: N tokens (B rows of T), C the width, H heads of D.
//!
//! Results are new tensors unless a name says otherwise; nothing is tracked, nothing waits for the host.

use crate::cuda::{Module, address_of, address_of_ids, launch};
use candle_core::{CudaDevice, DType, Device, Result, Shape, Tensor, bail};

const ROW_WARPS: usize = 4;
const ROW_THREADS: u32 = 32 * ROW_WARPS as u32;
const PLAIN_THREADS: u32 = 256;
const COLUMN_THREADS: u32 = 64;
const HEAD_THREADS: u32 = 256;
/// Rows whose column sums one thread adds up, as in kernels/model.cu.
const ROWS_A_SUM: usize = 64;

/// A card, and what its launches need.
#[derive(Clone)]
pub struct Card {
    device: CudaDevice,
    tensors: Device,
}

/// Where the tokens of a batch stand: positions [N] in their documents, counted from 0, and the batch's shape.
pub struct Standing {
    pub positions: Tensor,
    pub rows: usize,
    pub time: usize,
}

/// What a norm keeps for its backward pass; `means` only where it is a layer norm.
pub struct NormKept {
    means: Option<Tensor>,
    scales: Tensor,
}

/// Cosines and sines [N, D / 2] of the tokens' positions.
pub struct Angles {
    pub cosines: Tensor,
    pub sines: Tensor,
}

/// Where heads lie in a row of numbers: `heads` of `dim` columns from `first_column` on, each shared by `group` heads.
#[derive(Clone, Copy)]
pub struct Columns {
    pub heads: usize,
    pub dim: usize,
    pub group: usize,
    pub row_stride: usize,
    pub first_column: usize,
}

/// `Columns` of a batch as the kernels take them.
#[repr(C)]
#[derive(Clone, Copy)]
struct Heads {
    batch: u32,
    time: u32,
    heads: u32,
    dim: u32,
    group: u32,
    row_stride: u32,
    first_column: u32,
}

// SAFETY: plain numbers in the layout of kernels/model.cu.
unsafe impl candle_core::cuda_backend::cudarc::driver::DeviceRepr for Heads {}

impl Columns {
    /// What the kernels take, and a block for each token.
    fn of(&self, standing: &Standing) -> Result<(Heads, u32)> {
        let Self { heads, dim, group, row_stride, first_column } = *self;
        // Their product, and so each of them.
        plain(standing.rows * standing.time * heads * dim)?;
        let [batch, time, heads, dim, group, row_stride, first_column] =
            [standing.rows, standing.time, heads, dim, group, row_stride, first_column].map(|number| number as u32);
        Ok((Heads { batch, time, heads, dim, group, row_stride, first_column }, batch * time))
    }
}

/// The elements of a pass with a thread each, and its blocks.
fn plain(count: usize) -> Result<(u32, u32)> {
    match u32::try_from(count) {
        Ok(count) if count <= u32::MAX - PLAIN_THREADS => Ok((count, count.div_ceil(PLAIN_THREADS))),
        _ => bail!(
            "a micro-batch has {count} numbers of one kind, the card's kernels count to 2^32: lower train.micro_batch"
        ),
    }
}

/// Blocks of a pass with a warp for each row.
fn row_blocks(rows: usize) -> Result<u32> {
    u32::try_from(rows.div_ceil(ROW_WARPS)).map_err(|_| candle_core::Error::Msg(format!("{rows} rows are too many")))
}

impl Card {
    pub fn new(device: &CudaDevice) -> Self {
        Self { device: device.clone(), tensors: Device::Cuda(device.clone()) }
    }

    pub fn ids(&self, ids: &[u32]) -> Result<Tensor> {
        Tensor::from_slice(ids, ids.len(), &self.tensors)
    }

    pub fn numbers(&self, numbers: &[f32]) -> Result<Tensor> {
        Tensor::from_slice(numbers, numbers.len(), &self.tensors)
    }

    fn empty(&self, shape: impl Into<Shape>) -> Result<Tensor> {
        // SAFETY: every caller's kernel writes all of it before anything reads it.
        unsafe { Tensor::empty(shape, DType::F32, &self.tensors) }
    }

    fn at(&self, tensor: &Tensor) -> Result<u64> {
        // These kernels read number by number: a part may begin at any.
        address_of::<f32>(&self.device, tensor)
    }

    /// 0 where there is none.
    fn at_maybe(&self, tensor: Option<&Tensor>) -> Result<u64> {
        tensor.map_or(Ok(0), |tensor| self.at(tensor))
    }

    /// The normed x [N, C]: a layer norm where it is `centred`, else a root-mean-square norm.
    pub fn norm(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        epsilon: f64,
        centred: bool,
    ) -> Result<(Tensor, NormKept)> {
        let (rows, width) = x.dims2()?;
        let (y, scales) = (self.empty(x.shape())?, self.empty(rows)?);
        let means = if centred { Some(self.empty(rows)?) } else { None };
        let (n, c, epsilon) = (rows as u64, width as u64, epsilon as f32);
        let (from, to, w, b) = (self.at(x)?, self.at(&y)?, self.at(weight)?, self.at_maybe(bias)?);
        let (m, s) = (self.at_maybe(means.as_ref())?, self.at(&scales)?);
        let blocks = row_blocks(rows)?;
        let device = &self.device;
        launch!(
            device,
            Module::Model,
            "norm_forward",
            blocks,
            ROW_THREADS,
            &n,
            &c,
            &epsilon,
            &from,
            &w,
            &b,
            &to,
            &m,
            &s
        );
        Ok((y, NormKept { means, scales }))
    }

    /// The gradient of a norm's input, with `residual` added.
    pub fn norm_input_gradient(
        &self,
        dy: &Tensor,
        x: &Tensor,
        weight: &Tensor,
        kept: &NormKept,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (rows, width) = x.dims2()?;
        let dx = self.empty(x.shape())?;
        let (n, c) = (rows as u64, width as u64);
        let (slope, from, w, to) = (self.at(dy)?, self.at(x)?, self.at(weight)?, self.at(&dx)?);
        let (m, s, r) = (self.at_maybe(kept.means.as_ref())?, self.at(&kept.scales)?, self.at_maybe(residual)?);
        let (device, blocks) = (&self.device, row_blocks(rows)?);
        launch!(
            device,
            Module::Model,
            "norm_backward",
            blocks,
            ROW_THREADS,
            &n,
            &c,
            &slope,
            &from,
            &w,
            &m,
            &s,
            &r,
            &to
        );
        Ok(dx)
    }

    /// The sums over chunks of rows [chunks, C] of a norm's weight and, for a layer norm, its bias.
    pub fn norm_parameter_sums(&self, dy: &Tensor, x: &Tensor, kept: &NormKept) -> Result<(Tensor, Option<Tensor>)> {
        let (rows, width) = x.dims2()?;
        let chunks = rows.div_ceil(ROWS_A_SUM);
        let weight_sums = self.empty((chunks, width))?;
        let bias_sums = if kept.means.is_some() { Some(self.empty((chunks, width))?) } else { None };
        let (n, c, slope, from) = (rows as u64, width as u64, self.at(dy)?, self.at(x)?);
        let (m, s) = (self.at_maybe(kept.means.as_ref())?, self.at(&kept.scales)?);
        let (w, b) = (self.at(&weight_sums)?, self.at_maybe(bias_sums.as_ref())?);
        let (device, blocks) = (&self.device, self.column_blocks(width) * chunks as u32);
        let name = "norm_parameter_sums";
        launch!(device, Module::Model, name, blocks, COLUMN_THREADS, &n, &c, &slope, &from, &m, &s, &w, &b);
        Ok((weight_sums, bias_sums))
    }

    fn column_blocks(&self, width: usize) -> u32 {
        (width as u32).div_ceil(COLUMN_THREADS)
    }

    /// The sums of x's columns over chunks of rows: [chunks, C].
    pub fn column_sums(&self, x: &Tensor) -> Result<Tensor> {
        let (rows, width) = x.dims2()?;
        let chunks = rows.div_ceil(ROWS_A_SUM);
        let sums = self.empty((chunks, width))?;
        let (n, c, from, to) = (rows as u64, width as u64, self.at(x)?, self.at(&sums)?);
        let (device, blocks) = (&self.device, self.column_blocks(width) * chunks as u32);
        launch!(device, Module::Model, "column_sums", blocks, COLUMN_THREADS, &n, &c, &from, &to);
        Ok(sums)
    }

    /// Writes or adds the sums of `sums`' rows [chunks, C] into `into` [C].
    pub fn fold_columns_into(&self, sums: &Tensor, into: &Tensor, accumulate: bool) -> Result<()> {
        let (chunks, width) = sums.dims2()?;
        let (n, c, add, from, to) =
            (chunks as u64, width as u64, u32::from(accumulate), self.at(sums)?, self.at(into)?);
        let (device, blocks) = (&self.device, self.column_blocks(width));
        launch!(device, Module::Model, "fold_columns", blocks, COLUMN_THREADS, &n, &c, &from, &add, &to);
        Ok(())
    }

    /// Writes or adds `from` (zeros where there is none) into `into`.
    pub fn accumulate_into(&self, from: Option<&Tensor>, into: &Tensor, accumulate: bool) -> Result<()> {
        let (count, blocks) = plain(into.elem_count())?;
        let (add, from, to) = (u32::from(accumulate), self.at_maybe(from)?, self.at(into)?);
        let device = &self.device;
        launch!(device, Module::Model, "accumulate_into", blocks, PLAIN_THREADS, &count, &from, &add, &to);
        Ok(())
    }

    /// x [N, C] + bias [C] + residual [N, C].
    pub fn add(&self, x: &Tensor, bias: Option<&Tensor>, residual: Option<&Tensor>) -> Result<Tensor> {
        let y = self.empty(x.shape())?;
        let (count, blocks) = plain(x.elem_count())?;
        let width = x.dim(candle_core::D::Minus1)? as u32;
        let (from, b, r, to) = (self.at(x)?, self.at_maybe(bias)?, self.at_maybe(residual)?, self.at(&y)?);
        let device = &self.device;
        launch!(device, Module::Model, "add_bias_residual", blocks, PLAIN_THREADS, &count, &width, &from, &b, &r, &to);
        Ok(y)
    }

    /// (x + bias, gelu of it)
    pub fn gelu(&self, x: &Tensor, bias: &Tensor) -> Result<(Tensor, Tensor)> {
        let (before, y) = (self.empty(x.shape())?, self.empty(x.shape())?);
        let ((count, blocks), width) = (plain(x.elem_count())?, x.dim(1)? as u32);
        let (from, b, kept, to) = (self.at(x)?, self.at(bias)?, self.at(&before)?, self.at(&y)?);
        let device = &self.device;
        launch!(device, Module::Model, "gelu_forward", blocks, PLAIN_THREADS, &count, &width, &from, &b, &kept, &to);
        Ok((before, y))
    }

    pub fn gelu_gradient(&self, before: &Tensor, dy: &Tensor) -> Result<Tensor> {
        let dx = self.empty(dy.shape())?;
        let (count, blocks) = plain(dy.elem_count())?;
        let (kept, slope, to) = (self.at(before)?, self.at(dy)?, self.at(&dx)?);
        let device = &self.device;
        launch!(device, Module::Model, "gelu_backward", blocks, PLAIN_THREADS, &count, &kept, &slope, &to);
        Ok(dx)
    }

    /// silu(gate) * up
    pub fn swiglu(&self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        let y = self.empty(gate.shape())?;
        let (count, blocks) = plain(gate.elem_count())?;
        let (g, u, to) = (self.at(gate)?, self.at(up)?, self.at(&y)?);
        let device = &self.device;
        launch!(device, Module::Model, "swiglu_forward", blocks, PLAIN_THREADS, &count, &g, &u, &to);
        Ok(y)
    }

    /// The gradients of gate and up.
    pub fn swiglu_gradients(&self, gate: &Tensor, up: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
        let (dgate, dup) = (self.empty(gate.shape())?, self.empty(gate.shape())?);
        let (count, blocks) = plain(gate.elem_count())?;
        let (g, u, slope, dg, du) = (self.at(gate)?, self.at(up)?, self.at(dy)?, self.at(&dgate)?, self.at(&dup)?);
        let device = &self.device;
        launch!(device, Module::Model, "swiglu_backward", blocks, PLAIN_THREADS, &count, &g, &u, &slope, &dg, &du);
        Ok((dgate, dup))
    }

    /// Heads [B H, T, D] out of the columns of x [N, ..], with a bias added or rotated.
    pub fn heads_apart(
        &self,
        x: &Tensor,
        bias: Option<&Tensor>,
        angles: Option<&Angles>,
        columns: Columns,
        standing: &Standing,
    ) -> Result<Tensor> {
        let y = self.empty((standing.rows * columns.heads, standing.time, columns.dim))?;
        let (shape, blocks) = columns.of(standing)?;
        let (from, b, to) = (self.at(x)?, self.at_maybe(bias)?, self.at(&y)?);
        let (c, s) =
            (self.at_maybe(angles.map(|angles| &angles.cosines))?, self.at_maybe(angles.map(|angles| &angles.sines))?);
        let device = &self.device;
        launch!(device, Module::Model, "heads_apart", blocks, PLAIN_THREADS, &shape, &from, &b, &c, &s, &to);
        Ok(y)
    }

    /// Writes heads [B H, T, D] into the columns of `x` [N, ..]: the sum of those that share columns, turned back.
    pub fn heads_together_into(
        &self,
        y: &Tensor,
        angles: Option<&Angles>,
        columns: Columns,
        standing: &Standing,
        x: &Tensor,
    ) -> Result<()> {
        let (shape, blocks) = columns.of(standing)?;
        let (from, to) = (self.at(y)?, self.at(x)?);
        let (c, s) =
            (self.at_maybe(angles.map(|angles| &angles.cosines))?, self.at_maybe(angles.map(|angles| &angles.sines))?);
        let device = &self.device;
        launch!(device, Module::Model, "heads_together", blocks, PLAIN_THREADS, &shape, &from, &c, &s, &to);
        Ok(())
    }

    /// As [`Self::heads_together_into`], into a tensor of its own, whose columns the heads fill.
    pub fn heads_together(
        &self,
        y: &Tensor,
        angles: Option<&Angles>,
        columns: Columns,
        standing: &Standing,
    ) -> Result<Tensor> {
        let x = self.empty((standing.rows * standing.time, columns.row_stride))?;
        self.heads_together_into(y, angles, columns, standing, &x)?;
        Ok(x)
    }

    /// Scores [B H, T, T] become probabilities in their place.
    pub fn softmax_in_place(&self, scores: &Tensor, heads: usize, scale: f32, standing: &Standing) -> Result<()> {
        let (rows, h, t) = ((standing.rows * heads * standing.time) as u64, heads as u64, standing.time as u64);
        let (places, numbers) = (address_of_ids(&self.device, &standing.positions)?, self.at(scores)?);
        let (device, blocks) = (&self.device, row_blocks(rows as usize)?);
        launch!(
            device,
            Module::Model,
            "softmax_forward",
            blocks,
            ROW_THREADS,
            &rows,
            &h,
            &t,
            &scale,
            &places,
            &numbers
        );
        Ok(())
    }

    /// The gradients of the probabilities become those of the scores in their place.
    pub fn softmax_gradient_in_place(
        &self,
        probabilities: &Tensor,
        slopes: &Tensor,
        heads: usize,
        scale: f32,
        standing: &Standing,
    ) -> Result<()> {
        let (rows, h, t) = ((standing.rows * heads * standing.time) as u64, heads as u64, standing.time as u64);
        let places = address_of_ids(&self.device, &standing.positions)?;
        let (p, numbers) = (self.at(probabilities)?, self.at(slopes)?);
        let (device, blocks) = (&self.device, row_blocks(rows as usize)?);
        let name = "softmax_backward";
        launch!(device, Module::Model, name, blocks, ROW_THREADS, &rows, &h, &t, &scale, &places, &p, &numbers);
        Ok(())
    }

    /// `matrix` [V, C] with rows of zeros below, up to `rows`: products are quicker where sizes are multiples of 8.
    pub fn filled_up(&self, matrix: &Tensor, rows: usize) -> Result<Tensor> {
        let (there, width) = matrix.dims2()?;
        if there == rows {
            return Ok(matrix.clone());
        }
        let filled = self.empty((rows, width))?;
        self.accumulate_into(Some(matrix), &filled.narrow(0, 0, there)?, false)?;
        self.accumulate_into(None, &filled.narrow(0, there, rows - there)?, false)?;
        Ok(filled)
    }

    /// Each row's loss [N], in f64, under the first `vocabulary` logits; logits [N, ..] become its gradient in their place
    /// where `slopes` asks for it, those beyond the vocabulary zeros.
    pub fn cross_entropy_in_place(
        &self,
        logits: &Tensor,
        vocabulary: usize,
        targets: &Tensor,
        ignore: u32,
        slopes: bool,
    ) -> Result<Tensor> {
        let (rows, stride) = logits.dims2()?;
        // SAFETY: the kernel writes every row's loss.
        let losses = unsafe { Tensor::empty(rows, DType::F64, &self.tensors)? };
        let (v, stride, slopes) = (vocabulary as u64, stride as u64, u32::from(slopes));
        let (t, numbers) = (address_of_ids(&self.device, targets)?, self.at(logits)?);
        let to = address_of::<f64>(&self.device, &losses)?;
        let (device, blocks, name) = (&self.device, rows as u32, "cross_entropy");
        launch!(device, Module::Model, name, blocks, HEAD_THREADS, &v, &stride, &t, &ignore, &slopes, &numbers, &to);
        Ok(losses)
    }

    /// The rows of `table` [V, C] of `ids` [N], with those of a table of positions added.
    pub fn embed(&self, ids: &Tensor, table: &Tensor, positions: Option<(&Tensor, &Tensor)>) -> Result<Tensor> {
        let y = self.empty((ids.elem_count(), table.dim(1)?))?;
        let ((count, blocks), width) = (plain(y.elem_count())?, table.dim(1)? as u32);
        let (ids, table, to) = (address_of_ids(&self.device, ids)?, self.at(table)?, self.at(&y)?);
        let (places, place_table) = match positions {
            None => (0, 0),
            Some((positions, table)) => (address_of_ids(&self.device, positions)?, self.at(table)?),
        };
        let device = &self.device;
        let name = "embed";
        launch!(
            device,
            Module::Model,
            name,
            blocks,
            PLAIN_THREADS,
            &count,
            &width,
            &ids,
            &table,
            &places,
            &place_table,
            &to
        );
        Ok(y)
    }

    /// Adds the rows of dy [N, C] to the rows of a table's gradient that `ids` [N] name, each row's in their order.
    pub fn add_rows_by_id(&self, ids: &[u32], dy: &Tensor, gradient: &Tensor) -> Result<()> {
        let mut order: Vec<u32> = (0..ids.len() as u32).collect();
        order.sort_by_key(|&row| ids[row as usize]);
        let (mut distinct, mut begins) = (Vec::new(), Vec::new());
        for (place, &row) in order.iter().enumerate() {
            let id = ids[row as usize];
            if distinct.last() != Some(&id) {
                distinct.push(id);
                begins.push(place as u32);
            }
        }
        begins.push(ids.len() as u32);
        let (blocks, width) = (distinct.len() as u32, dy.dim(1)? as u64);
        let [distinct, begins, order] = [&distinct, &begins, &order].map(|ids| self.ids(ids));
        let (distinct, begins, order) = (distinct?, begins?, order?);
        let id_at = |ids: &Tensor| address_of_ids(&self.device, ids);
        let (i, b, o, from, to) =
            (id_at(&distinct)?, id_at(&begins)?, id_at(&order)?, self.at(dy)?, self.at(gradient)?);
        let device = &self.device;
        launch!(device, Module::Model, "embed_backward", blocks, PLAIN_THREADS, &width, &i, &b, &o, &from, &to);
        Ok(())
    }
}
