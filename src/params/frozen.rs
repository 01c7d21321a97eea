//! Frozen weights: read-only storages of a model whose base is not trained, without gradients or moments.

use super::layout::Layout;
use half::{bf16, f16};
use std::sync::Arc;

/// Numbers in a block of NF4, which share a scale.
pub const NF4_BLOCK: usize = 64;

/// Blocks of NF4 whose scales share a scale of their own.
pub const NF4_SCALES: usize = 256;

/// Numbers in NF4 with double quantisation (Dettmers et al., "QLoRA", 2023): 4 bits and 1/64 of a scale each.
///
/// Number i is `CODE[code i] * scale(i / 64)`; the scale of block b is
/// `SCALE_CODE[scale_codes[b]] * scale_maxima[b / 256] + offset`. `ops::nf4` has the tables and the arithmetic.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Nf4 {
    /// Two codes a byte, the first one in the high half.
    pub codes: Vec<u8>,
    /// [blocks]
    pub scale_codes: Vec<u8>,
    /// [blocks / 256, rounded up]: largest |scale - offset|.
    pub scale_maxima: Vec<f32>,
    /// The mean of the scales.
    pub offset: f32,
    /// How many numbers there are.
    pub len: usize,
}

impl Nf4 {
    /// Bytes that `len` numbers take.
    pub fn bytes_of(len: usize) -> usize {
        let blocks = len.div_ceil(NF4_BLOCK);
        len.div_ceil(2) + blocks + size_of::<f32>() * (blocks.div_ceil(NF4_SCALES) + 1)
    }
}

/// One frozen tensor.
#[derive(Clone, Debug, PartialEq)]
pub enum FrozenTensor {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
    F16(Vec<f16>),
    Nf4(Nf4),
}

impl FrozenTensor {
    pub fn len(&self) -> usize {
        match self {
            Self::F32(numbers) => numbers.len(),
            Self::Bf16(numbers) => numbers.len(),
            Self::F16(numbers) => numbers.len(),
            Self::Nf4(numbers) => numbers.len,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn bytes(&self) -> usize {
        match self {
            Self::F32(numbers) => size_of_val(&numbers[..]),
            Self::Bf16(numbers) => size_of_val(&numbers[..]),
            Self::F16(numbers) => size_of_val(&numbers[..]),
            Self::Nf4(numbers) => Nf4::bytes_of(numbers.len),
        }
    }
}

/// How adapters are added to the frozen layers that they stand beside.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Adaptation {
    /// What an adapter's part is multiplied by.
    pub scaling: f32,
    /// Probability that a number of an adapter's input is dropped, in training.
    pub dropout: f64,
}

/// A whole model's frozen weights, one tensor for each parameter of its layout, and how adapters join them.
///
/// Vectors (and GPT-2's table of positions) are f32. A matrix in NF4 is stored [outputs, inputs], whichever way the layout has it.
#[derive(Clone, Debug)]
pub struct Frozen {
    layout: Arc<Layout>,
    tensors: Vec<FrozenTensor>,
    adaptation: Adaptation,
}

impl Frozen {
    /// `tensors` in the layout's order.
    ///
    /// # Panics
    /// When they are not the layout's: a defect of the caller.
    pub fn new(layout: Arc<Layout>, tensors: Vec<FrozenTensor>, adaptation: Adaptation) -> Self {
        let fits = layout.parameters().iter().map(|p| p.len).eq(tensors.iter().map(FrozenTensor::len));
        assert!(fits, "frozen tensors of another layout");
        Self { layout, tensors, adaptation }
    }

    /// The model's layout: every parameter's name and shape. Offsets mean nothing here.
    pub fn layout(&self) -> &Arc<Layout> {
        &self.layout
    }

    pub fn tensor(&self, index: usize) -> &FrozenTensor {
        &self.tensors[index]
    }

    pub fn adaptation(&self) -> Adaptation {
        self.adaptation
    }

    pub fn bytes(&self) -> usize {
        self.tensors.iter().map(FrozenTensor::bytes).sum()
    }
}
