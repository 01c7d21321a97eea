//! Adapters merged into their base: W + s * B A, a whole model again, written tensor by tensor.

use super::ModelShape;
use crate::model::base::{transposed, widened};
use crate::model::weights::{NamePrefix, prefixed};
use crate::ops::product::{Into, Operand, Size, Threads, multiply};
use crate::params::{Frozen, FrozenTensor, Layout};
use anyhow::{Context, Result};
use safetensors::tensor::{Dtype, View};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// One tensor of the merged model, computed when it is written.
struct Merged<'a> {
    shape: &'a ModelShape,
    frozen: &'a Frozen,
    index: usize,
    /// s, A and B.
    adapter: Option<(f32, &'a [f32], &'a [f32])>,
}

impl Merged<'_> {
    /// The numbers in f32, as the model's layout has them.
    fn numbers(&self) -> Vec<f32> {
        let parameter = &self.frozen.layout().parameters()[self.index];
        let tensor = self.frozen.tensor(self.index);
        let quantized = matches!(tensor, FrozenTensor::Nf4(_));
        let mut numbers = widened(tensor.clone());
        let gpt2 = matches!(self.shape, ModelShape::Gpt2(_));
        if quantized && gpt2 {
            // Stored [outputs, inputs]; the layout has [inputs, outputs].
            numbers = transposed(&numbers, parameter.shape[0]);
        }
        let Some((scaling, a, b)) = self.adapter else { return numbers };
        let (rows, columns) = (parameter.shape[0], parameter.shape[1]);
        let (inputs, outputs) = if gpt2 { (rows, columns) } else { (columns, rows) };
        let rank = a.len() / inputs;
        let (a, b) = (Operand::row_major(a, inputs), Operand::row_major(b, rank));
        if gpt2 {
            // [I, O]: the transpose of B A.
            let size = Size { m: inputs, k: rank, n: outputs };
            multiply(
                Threads::All,
                size,
                a.transposed(),
                b.transposed(),
                scaling,
                &mut numbers,
                outputs,
                Into::Accumulate,
            );
        } else {
            let size = Size { m: outputs, k: rank, n: inputs };
            multiply(Threads::All, size, b, a, scaling, &mut numbers, inputs, Into::Accumulate);
        }
        numbers
    }
}

impl View for &Merged<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.frozen.layout().parameters()[self.index].shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Owned(bytemuck::cast_slice(&self.numbers()).to_vec())
    }

    fn data_len(&self) -> usize {
        size_of::<f32>() * self.frozen.layout().parameters()[self.index].len
    }
}

/// Writes base and adapters (`weights`, a flat storage of `layout`) as one model in f32, under Hugging Face names.
///
/// A base in NF4 is dequantised first: the merged matrix is (the dequantised base) + s * B A, which is what the run
/// computed with, not the base's original weights + s * B A.
pub fn write(
    path: &Path,
    shape: &ModelShape,
    frozen: &Frozen,
    layout: &Layout,
    weights: &[f32],
    prefix: NamePrefix,
) -> Result<()> {
    let mut adapters = BTreeMap::new();
    for module in shape.modules(frozen.layout()) {
        let [a, b] = module.names(shape).map(|name| layout.index_of(&name));
        if let (Some(a), Some(b)) = (a, b) {
            let numbers = |index: usize| &weights[layout.parameters()[index].range()];
            adapters.insert(module.index, (frozen.adaptation().scaling, numbers(a), numbers(b)));
        }
    }
    let parameters = frozen.layout().parameters();
    let merged: Vec<Merged> = (0..parameters.len())
        .map(|index| Merged { shape, frozen, index, adapter: adapters.get(&index).copied() })
        .collect();
    let tensors = parameters.iter().zip(&merged).map(|(parameter, merged)| (prefixed(prefix, &parameter.name), merged));
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize_to_file(tensors, Some(metadata), path)
        .with_context(|| format!("cannot write {}", path.display()))
}
