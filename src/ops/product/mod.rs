//! Matrix products: C = scale * A B, or C += scale * A B, over strided operands in f32 or bf16.
//!
//! [`multiply`] is f32 throughout: large products on our own AVX-512 kernel where the processor has it, others on the
//! gemm crate's (AVX-512, AVX2 or portable, chosen at run time). [`multiply_in`] can also round the operands to bf16 and
//! sum their products in f32, and takes operands stored as bf16, f16 or NF4 (which are widened panel by panel while they
//! are packed, never as a whole). Attention packs its operands itself and multiplies parts of them ([`Packing`]), on our
//! kernels everywhere. C is f32 always. No result depends on the number of threads.
//!
//! Weights and activations are packed anew for each product. In a bf16 step of GPT-2 124M that is 8% of the products' time, the
//! weights about a third of it: packed once a step they would gain little for a second copy (forward and backward need
//! different ones).

mod blocks;
mod convert;
mod instructions;
mod pack;
#[cfg(target_arch = "x86_64")]
mod pack_x86;
mod panels;
mod plus;
mod scratch;
mod tile;
#[cfg(target_arch = "x86_64")]
mod tile_x86;
mod widen;

use super::ValuesMut;
use crate::params::{FrozenTensor, Nf4};
use blocks::Target;
pub use convert::narrow;
use half::{bf16, f16};
pub use instructions::Instructions;
pub use panels::{Depth, PANEL_COLUMNS, PANEL_ROWS, Packing, Panels, Side, panel_words};
pub use plus::Plus;

/// What the operands of a product are rounded to; sums are f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// f32 operands and products.
    F32,
    /// Operands rounded to bf16, nearest even. Numbers below bf16's normal range (1.2e-38) may count as 0.
    Bf16,
}

impl Precision {
    /// Whether this processor multiplies bf16 faster than f32.
    pub fn bf16_is_native() -> bool {
        Instructions::best() == Instructions::Avx512Bf16
    }

    /// Why bf16 is native or is not, for the start of a run.
    pub fn bf16_reason() -> String {
        match Instructions::best() {
            Instructions::Avx512Bf16 => "this processor has AVX512-BF16".into(),
            other => format!("this processor lacks AVX512-BF16 (it has {}), so bf16 would not be faster", other.name()),
        }
    }
}

/// Which threads a product may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Threads {
    /// The calling thread alone: for products inside a parallel loop.
    One,
    /// The whole pool.
    All,
}

/// A matrix as a slice with strides: element (i, j) is `data[i * row_stride + j * column_stride]`.
#[derive(Clone, Copy, Debug)]
pub struct Operand<'a, N = f32> {
    pub data: &'a [N],
    pub row_stride: usize,
    pub column_stride: usize,
}

/// A matrix stored as bf16: saved activations, and the copy of the weights that the optimizer writes.
pub type Operand16<'a> = Operand<'a, bf16>;

impl<'a, N> Operand<'a, N> {
    /// Rows of `columns` contiguous numbers.
    pub fn row_major(data: &'a [N], columns: usize) -> Self {
        Self { data, row_stride: columns, column_stride: 1 }
    }

    /// The transpose.
    pub fn transposed(self) -> Self {
        Self { row_stride: self.column_stride, column_stride: self.row_stride, ..self }
    }

    fn covers(&self, rows: usize, columns: usize) -> bool {
        rows == 0 || columns == 0 || (rows - 1) * self.row_stride + (columns - 1) * self.column_stride < self.data.len()
    }
}

/// A matrix in NF4: as [`Operand`], but (as in f16) its rows or its columns must be contiguous.
#[derive(Clone, Copy, Debug)]
pub struct Operand4<'a> {
    pub data: &'a Nf4,
    pub row_stride: usize,
    pub column_stride: usize,
}

/// An operand of any type.
#[derive(Clone, Copy, Debug)]
pub enum Matrix<'a> {
    F32(Operand<'a>),
    Bf16(Operand16<'a>),
    F16(Operand<'a, f16>),
    Nf4(Operand4<'a>),
}

impl Matrix<'_> {
    /// The transpose.
    pub fn transposed(self) -> Self {
        match self {
            Self::F32(operand) => Self::F32(operand.transposed()),
            Self::Bf16(operand) => Self::Bf16(operand.transposed()),
            Self::F16(operand) => Self::F16(operand.transposed()),
            Self::Nf4(Operand4 { data, row_stride, column_stride }) => {
                Self::Nf4(Operand4 { data, row_stride: column_stride, column_stride: row_stride })
            }
        }
    }

    fn covers(&self, rows: usize, columns: usize) -> bool {
        match self {
            Self::F32(operand) => operand.covers(rows, columns),
            Self::Bf16(operand) => operand.covers(rows, columns),
            Self::F16(operand) => {
                (operand.row_stride == 1 || operand.column_stride == 1) && operand.covers(rows, columns)
            }
            Self::Nf4(Operand4 { data, row_stride, column_stride }) => {
                let contiguous = *row_stride == 1 || *column_stride == 1;
                let last = rows.saturating_sub(1) * row_stride + columns.saturating_sub(1) * column_stride;
                contiguous && (rows == 0 || columns == 0 || last < data.len)
            }
        }
    }
}

impl<'a> From<Operand<'a>> for Matrix<'a> {
    fn from(operand: Operand<'a>) -> Self {
        Self::F32(operand)
    }
}

impl<'a> From<Operand16<'a>> for Matrix<'a> {
    fn from(operand: Operand16<'a>) -> Self {
        Self::Bf16(operand)
    }
}

/// Numbers stored as f32, or as something narrower.
#[derive(Clone, Copy, Debug)]
pub enum Numbers<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
    Nf4(&'a Nf4),
}

impl<'a> Numbers<'a> {
    pub fn len(self) -> usize {
        match self {
            Self::F32(data) => data.len(),
            Self::Bf16(data) => data.len(),
            Self::F16(data) => data.len(),
            Self::Nf4(data) => data.len,
        }
    }

    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// A matrix whose rows are `columns` contiguous numbers.
    pub fn row_major(self, columns: usize) -> Matrix<'a> {
        match self {
            Self::F32(data) => Matrix::F32(Operand::row_major(data, columns)),
            Self::Bf16(data) => Matrix::Bf16(Operand::row_major(data, columns)),
            Self::F16(data) => Matrix::F16(Operand::row_major(data, columns)),
            Self::Nf4(data) => Matrix::Nf4(Operand4 { data, row_stride: columns, column_stride: 1 }),
        }
    }
}

impl<'a> From<&'a FrozenTensor> for Numbers<'a> {
    fn from(tensor: &'a FrozenTensor) -> Self {
        match tensor {
            FrozenTensor::F32(data) => Self::F32(data),
            FrozenTensor::Bf16(data) => Self::Bf16(data),
            FrozenTensor::F16(data) => Self::F16(data),
            FrozenTensor::Nf4(data) => Self::Nf4(data),
        }
    }
}

impl<'a> From<&'a [f32]> for Numbers<'a> {
    fn from(data: &'a [f32]) -> Self {
        Self::F32(data)
    }
}

impl<'a> From<&'a Vec<f32>> for Numbers<'a> {
    fn from(data: &'a Vec<f32>) -> Self {
        Self::F32(data)
    }
}

impl<'a> From<&'a [bf16]> for Numbers<'a> {
    fn from(data: &'a [bf16]) -> Self {
        Self::Bf16(data)
    }
}

/// Sizes of a product: A is [m, k], B is [k, n], C is [m, n].
#[derive(Clone, Copy, Debug)]
pub struct Size {
    pub m: usize,
    pub k: usize,
    pub n: usize,
}

/// What happens to what stands in C.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Into {
    Overwrite,
    Accumulate,
}

impl From<bool> for Into {
    /// `true` accumulates, as [`crate::params::GradientSlots::slot`] tells it.
    fn from(accumulate: bool) -> Self {
        if accumulate { Self::Accumulate } else { Self::Overwrite }
    }
}

/// C [m, n], rows of `c_row_stride`, (+)= scale * A [m, k] * B [k, n].
///
/// # Panics
/// When a slice is too short for its matrix.
#[allow(clippy::too_many_arguments, reason = "a product has this many operands")]
pub fn multiply(
    threads: Threads,
    size: Size,
    a: Operand,
    b: Operand,
    scale: f32,
    c: &mut [f32],
    c_row_stride: usize,
    into: Into,
) {
    let Size { m, k, n } = size;
    if m == 0 || n == 0 {
        return;
    }
    assert!(a.covers(m, k) && b.covers(k, n), "an operand is shorter than its matrix {size:?}");
    assert!(n <= c_row_stride && (m - 1) * c_row_stride + n <= c.len(), "the result is shorter than its matrix");
    if own_kernel_is_faster(size) {
        let (a, b) = (a.into(), b.into());
        let instructions = Instructions::best();
        multiply_with(instructions, Precision::F32, threads, size, a, b, scale, c, c_row_stride, into);
        return;
    }
    let parallelism = match threads {
        Threads::One => gemm::Parallelism::None,
        Threads::All => gemm::Parallelism::Rayon(rayon::current_num_threads()),
    };
    let accumulate = into == Into::Accumulate;
    // SAFETY: the assertions above keep every element that the kernel touches inside the slices, and `c` is exclusive.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            c.as_mut_ptr(),
            1,
            c_row_stride as isize,
            accumulate,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            parallelism,
        );
    }
}

/// Whether our f32 kernel beats the gemm crate's on AVX-512: by 3 to 12% over the products of a GPT-2 124M step, and by a
/// third to two and a half times where a few dozen rows meet a transposed weight, as a LLaMA's prompts do. Where k is small
/// packing weighs more and it loses. Only the size decides, so that results do not depend on threads.
fn own_kernel_is_faster(Size { m, k, n }: Size) -> bool {
    let wide = matches!(Instructions::best(), Instructions::Avx512 | Instructions::Avx512Bf16);
    let large = m >= 128 && m * k * n >= 1 << 27;
    let few_rows = m >= 32 && k >= 256 && m * k * n >= 1 << 22;
    wide && n >= 128 && (large || few_rows)
}

/// Whether a row of C = A B has the same bits where A has `many` rows as where it has `few` (at most as many).
///
/// Our kernels sum a row in blocks that depend on k alone; the size may decide that they are not taken.
pub fn rows_keep_their_bits(precision: Precision, few: usize, many: usize, k: usize, n: usize) -> bool {
    let own = |m| own_kernel_is_faster(Size { m, k, n });
    let alike = own(few) == own(many) && (own(few) || gemm_sums_by_depth_alone(few, k, n));
    few == many || precision == Precision::Bf16 || alike
}

/// Whether the gemm crate (0.19) sums the rows of A [m, k] B [k, n] as it sums those of a larger A: in blocks that depend
/// on k and on the processor's caches. Its exceptions are vectors, a depth of at most 2, results of at most 256 numbers
/// and, where k is more than a block, results of at most 64 x 64.
fn gemm_sums_by_depth_alone(m: usize, k: usize, n: usize) -> bool {
    m > 1 && n > 1 && k > 2 && m * n > 256 && (m > 64 || n > 64 || k <= 512)
}

/// C [m, n], rows of `c_row_stride`, (+)= scale * A [m, k] * B [k, n], operands rounded as `precision` says.
///
/// Operands are f32 or bf16, each by itself. Those with contiguous rows or columns are packed fastest.
///
/// # Panics
/// When a slice is too short for its matrix.
#[allow(clippy::too_many_arguments, reason = "a product has this many operands")]
pub fn multiply_in<'a>(
    precision: Precision,
    threads: Threads,
    size: Size,
    a: impl std::convert::Into<Matrix<'a>>,
    b: impl std::convert::Into<Matrix<'a>>,
    scale: f32,
    c: &mut [f32],
    c_row_stride: usize,
    into: Into,
) {
    match (precision, a.into(), b.into()) {
        (Precision::F32, Matrix::F32(a), Matrix::F32(b)) => multiply(threads, size, a, b, scale, c, c_row_stride, into),
        (_, a, b) => {
            multiply_with(Instructions::best(), precision, threads, size, a, b, scale, c, c_row_stride, into);
        }
    }
}

/// [`multiply_in`] on our own kernels with given instructions, for tests and benchmarks.
///
/// # Panics
/// When a slice is too short for its matrix, or the processor lacks the instructions.
#[allow(clippy::too_many_arguments, reason = "a product has this many operands")]
pub fn multiply_with(
    instructions: Instructions,
    precision: Precision,
    threads: Threads,
    size: Size,
    a: Matrix,
    b: Matrix,
    scale: f32,
    c: &mut [f32],
    c_row_stride: usize,
    into: Into,
) {
    let (c, plus) = (ValuesMut::F32(c), Plus::default());
    multiply_plus_with(instructions, precision, threads, size, a, b, scale, c, c_row_stride, into, plus);
}

/// [`multiply_with`], and `plus` added where the product is not accumulated. What goes to bf16 is rounded from f32, and
/// must be one block of the depth, overwritten.
#[allow(clippy::too_many_arguments, reason = "a product has this many operands")]
fn multiply_plus_with(
    instructions: Instructions,
    precision: Precision,
    threads: Threads,
    size: Size,
    a: Matrix,
    b: Matrix,
    scale: f32,
    c: ValuesMut,
    c_row_stride: usize,
    into: Into,
    plus: Plus,
) {
    let Size { m, k, n } = size;
    if m == 0 || n == 0 {
        return;
    }
    assert!(instructions.are_available(), "{instructions:?} on a processor without them");
    assert!(plus.fits(m, n) && (plus.is_nothing() || into == Into::Overwrite), "what is added does not fit {size:?}");
    assert!(a.covers(m, k) && b.covers(k, n), "an operand is shorter than its matrix {size:?}");
    assert!(n <= c_row_stride && (m - 1) * c_row_stride + n <= c.len(), "the result is shorter than its matrix");
    let word = instructions.word(precision);
    let c = match c {
        ValuesMut::F32(c) if k == 0 => {
            if into == Into::Overwrite {
                c.chunks_mut(c_row_stride).take(m).for_each(|row| row[..n].fill(0.0));
            }
            return;
        }
        ValuesMut::F32(c) => Target::F32(c.as_mut_ptr()),
        ValuesMut::Bf16(c) => {
            assert!(k > 0 && into == Into::Overwrite && blocks::one_block(word, k), "no result for bf16: {size:?}");
            Target::Bf16(c.as_mut_ptr())
        }
    };
    // SAFETY: the assertions above keep every element inside the slices, and `c` is exclusive.
    unsafe {
        blocks::multiply(instructions, word, threads, size, a, b, scale, c, c_row_stride, into, plus);
    }
}

/// C [m, n], contiguous, = A [m, k] * B [k, n] + `plus`, operands rounded as `precision` says, on all threads.
///
/// # Panics
/// When a slice has not the size of its matrix.
pub fn multiply_plus(precision: Precision, size: Size, a: Matrix, b: Matrix, plus: Plus, c: &mut [f32]) {
    let Size { m, k, n } = size;
    assert!(c.len() == m * n && plus.fits(m, n), "the result or what is added to it is not {m} x {n}");
    if c.is_empty() {
        return;
    }
    if k == 0 || !is_ours(precision, size, a, b) {
        let into = plus.preset(c, n);
        return multiply_in(precision, Threads::All, size, a, b, 1.0, c, n, into);
    }
    let (instructions, into) = (Instructions::best(), Into::Overwrite);
    multiply_plus_with(instructions, precision, Threads::All, size, a, b, 1.0, ValuesMut::F32(c), n, into, plus);
}

/// [`multiply_plus`] rounded to bf16, nearest even: bit for bit as by [`narrow`]. `raw` holds the f32 numbers where they
/// cannot be rounded as they are found; at least m n long.
///
/// # Panics
/// When a slice has not the size of its matrix.
pub fn multiply_plus_rounded(
    precision: Precision,
    size: Size,
    a: Matrix,
    b: Matrix,
    plus: Plus,
    c: &mut [bf16],
    raw: &mut [f32],
) {
    let Size { m, k, n } = size;
    assert!(c.len() == m * n, "the result is not {m} x {n}");
    let instructions = Instructions::best();
    if k > 0 && is_ours(precision, size, a, b) && blocks::one_block(instructions.word(precision), k) {
        let (c, into) = (ValuesMut::Bf16(c), Into::Overwrite);
        return multiply_plus_with(instructions, precision, Threads::All, size, a, b, 1.0, c, n, into, plus);
    }
    let raw = &mut raw[..m * n];
    multiply_plus(precision, size, a, b, plus, raw);
    narrow(Threads::All, raw, c);
}

/// Whether a product runs on our own kernels.
fn is_ours(precision: Precision, size: Size, a: Matrix, b: Matrix) -> bool {
    let all_f32 = precision == Precision::F32 && matches!((a, b), (Matrix::F32(_), Matrix::F32(_)));
    !all_f32 || own_kernel_is_faster(size)
}

#[cfg(test)]
mod tests;
