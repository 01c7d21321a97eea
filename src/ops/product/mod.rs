//! Matrix products: C = scale * A B, or C += scale * A B, over strided f32 operands.
//!
//! The f32 kernels are the gemm crate's (AVX-512, AVX2 or portable, chosen at run time). Their result does not depend
//! on the number of threads.

/// Which kernels multiply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// f32 operands, f32 products and sums.
    F32,
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
pub struct Operand<'a> {
    pub data: &'a [f32],
    pub row_stride: usize,
    pub column_stride: usize,
}

impl<'a> Operand<'a> {
    /// Rows of `columns` contiguous numbers.
    pub fn row_major(data: &'a [f32], columns: usize) -> Self {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, in f64.
    fn reference(size: Size, a: Operand, b: Operand, scale: f32, c: &mut [f32], stride: usize, into: Into) {
        for i in 0..size.m {
            for j in 0..size.n {
                let at = |o: &Operand, r: usize, s: usize| f64::from(o.data[r * o.row_stride + s * o.column_stride]);
                let sum: f64 = (0..size.k).map(|p| at(&a, i, p) * at(&b, p, j)).sum();
                let old = if into == Into::Accumulate { f64::from(c[i * stride + j]) } else { 0.0 };
                c[i * stride + j] = (old + f64::from(scale) * sum) as f32;
            }
        }
    }

    #[test]
    fn products_of_odd_sizes_and_every_orientation_match_the_definition() {
        let numbers: Vec<f32> = (0..4000).map(|i| ((i * 7919 % 1000) as f32 - 500.0) / 500.0).collect();
        for (m, k, n) in [(1, 1, 1), (17, 5, 33), (31, 64, 7), (3, 0, 4), (0, 3, 2), (50, 37, 19)] {
            for (ta, tb) in [(false, false), (true, false), (false, true), (true, true)] {
                let operand = |t: bool, r: usize, c: usize, from: usize| {
                    let data = &numbers[from..];
                    if t { Operand::row_major(data, r).transposed() } else { Operand::row_major(data, c) }
                };
                let (a, b) = (operand(ta, m, k, 0), operand(tb, k, n, 1500));
                for (into, threads) in [(Into::Overwrite, Threads::One), (Into::Accumulate, Threads::All)] {
                    let mut c = vec![0.5f32; m * (n + 3)];
                    let mut expected = c.clone();
                    let size = Size { m, k, n };
                    multiply(threads, size, a, b, 0.7, &mut c, n + 3, into);
                    reference(size, a, b, 0.7, &mut expected, n + 3, into);
                    let worst = c.iter().zip(&expected).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
                    assert!(worst < 1e-4, "{size:?} {ta} {tb} {into:?}: {worst}");
                }
            }
        }
    }
}
