//! The frozen base of a run that trains adapters: read tensor by tensor into its storages, quantised on the way.

use super::ModelShape;
use super::weights;
use crate::config::Quantization;
use crate::ops::nf4;
use crate::params::{Adaptation, Frozen, FrozenTensor, Layout, Nf4, Parameter};
use anyhow::Result;
use half::bf16;
use std::path::PathBuf;
use std::sync::Arc;

/// Where the base's numbers come from.
pub enum BaseSource<'a> {
    /// Weight files in the hub's layout.
    Files(&'a [PathBuf]),
    /// Initial weights drawn from a seed: nothing to fine-tune, but the memory and the time of a model of this shape.
    Scratch { seed: u64 },
}

/// Reads or draws the base of `shape`. No more than one tensor at a time is in memory besides what stays.
///
/// Without quantisation the numbers stay as they are stored (f32, bf16 or f16). With NF4 the matrices of the blocks are
/// quantised; embeddings and the head stay as they are stored (drawn ones become bf16), vectors become f32.
///
/// # Errors
/// When a file is torn, a parameter is missing or of another shape, a number is not finite, or a tensor is left over.
pub fn load_base(
    shape: &ModelShape,
    source: BaseSource,
    quantization: Quantization,
    adaptation: Adaptation,
) -> Result<Frozen> {
    let layout = Arc::new(Layout::new(shape.parameter_specs()));
    let mut tensors = Vec::with_capacity(layout.parameters().len());
    match source {
        BaseSource::Files(files) => {
            weights::each_exactly(&layout, shape.stored(&layout, files)?, |parameter, place| {
                let tensor = weights::read_as_stored(&parameter.name, place)?;
                tensors.push(freeze(shape, parameter, tensor, quantization));
                Ok(())
            })?;
        }
        BaseSource::Scratch { seed } => {
            let mut initializer = shape.initializer(seed);
            for parameter in layout.parameters() {
                let mut numbers = vec![0.0; parameter.len];
                initializer.fill(parameter, &mut numbers);
                let quantized = shape.is_block_matrix(parameter);
                let narrow = quantization == Quantization::Nf4 && !quantized && !kept_in_f32(parameter);
                let tensor = match narrow {
                    true => FrozenTensor::Bf16(numbers.iter().map(|&x| bf16::from_f32(x)).collect()),
                    false => FrozenTensor::F32(numbers),
                };
                tensors.push(freeze(shape, parameter, tensor, quantization));
            }
        }
    }
    Ok(Frozen::new(layout, tensors, adaptation))
}

/// One parameter as it is kept.
fn freeze(shape: &ModelShape, parameter: &Parameter, tensor: FrozenTensor, quantization: Quantization) -> FrozenTensor {
    let quantized = quantization == Quantization::Nf4 && shape.is_block_matrix(parameter);
    if !quantized && !kept_in_f32(parameter) {
        return tensor;
    }
    let numbers = widened(tensor);
    if !quantized {
        return FrozenTensor::F32(numbers);
    }
    let numbers = match shape {
        // As a linear layer of PyTorch would hold it, which is what bitsandbytes quantises.
        ModelShape::Gpt2(_) => transposed(&numbers, parameter.shape[1]),
        ModelShape::Llama(_) => numbers,
    };
    FrozenTensor::Nf4(nf4::quantize(&numbers))
}

/// Vectors, and GPT-2's positions: little memory, and read where f32 is expected.
fn kept_in_f32(parameter: &Parameter) -> bool {
    parameter.shape.len() < 2 || parameter.name == "wpe.weight"
}

/// The numbers in f32.
pub(super) fn widened(tensor: FrozenTensor) -> Vec<f32> {
    match tensor {
        FrozenTensor::F32(numbers) => numbers,
        FrozenTensor::Bf16(numbers) => numbers.iter().map(|x| x.to_f32()).collect(),
        FrozenTensor::F16(numbers) => numbers.iter().map(|x| x.to_f32()).collect(),
        FrozenTensor::Nf4(numbers) => {
            let mut out = vec![0.0; numbers.len];
            nf4::dequantize_all(&numbers, &mut out);
            out
        }
    }
}

/// Rows of `columns` numbers as columns.
pub(super) fn transposed(numbers: &[f32], columns: usize) -> Vec<f32> {
    let rows = numbers.len() / columns.max(1);
    let mut out = Vec::with_capacity(numbers.len());
    for column in 0..columns {
        out.extend((0..rows).map(|row| numbers[row * columns + column]));
    }
    out
}

/// Bytes that the base of `shape` takes, for a plan: `file_bytes` is the size of a number in its files, if there are any.
pub fn freeze_bytes(shape: &ModelShape, quantization: Quantization, file_bytes: Option<usize>) -> usize {
    let of = |parameter: &Parameter| match quantization {
        _ if kept_in_f32(parameter) => size_of::<f32>() * parameter.len,
        Quantization::Nf4 if shape.is_block_matrix(parameter) => Nf4::bytes_of(parameter.len),
        Quantization::Nf4 => file_bytes.unwrap_or(size_of::<bf16>()) * parameter.len,
        Quantization::None => file_bytes.unwrap_or(size_of::<f32>()) * parameter.len,
    };
    Layout::new(shape.parameter_specs()).parameters().iter().map(of).sum()
}
