//! Packing of operands in f16 or NF4: a panel at a time is widened to f32 in the thread's cache, and packed from there.

use super::pack::Part;
use super::{Matrix, Operand, Operand4, scratch};
use crate::ops::nf4;
use crate::ops::simd::Level;
use half::slice::HalfFloatSliceExt;

/// Packs `part` of `from`, an f16 or NF4 operand, through `pack`, which packs f32.
pub(super) fn panels(from: Matrix, part: Part, out: &mut [u32], pack: impl Fn(Operand, Part, &mut [u32])) {
    scratch::with(&scratch::WIDENED, part.width * part.depth, |words| {
        let widened: &mut [f32] = bytemuck::cast_slice_mut(words);
        for panel in 0..part.panels() {
            let first_line = part.first_line + panel * part.width;
            let lines = part.width.min(part.lines - panel * part.width);
            let numbers = &mut widened[..lines * part.depth];
            let operand = widen(from, first_line, lines, part.first_depth, part.depth, numbers);
            let one = Part { first_line: 0, lines, first_depth: 0, ..part };
            pack(operand, one, &mut out[panel * part.panel_stride..]);
        }
    });
}

/// `lines` rows of `depth` columns from (`first_line`, `first_depth`) on as f32, laid out as `from` is.
fn widen<'a>(
    from: Matrix,
    first_line: usize,
    lines: usize,
    first_depth: usize,
    depth: usize,
    numbers: &'a mut [f32],
) -> Operand<'a> {
    let (row_stride, column_stride) = match from {
        Matrix::F16(operand) => (operand.row_stride, operand.column_stride),
        Matrix::Nf4(Operand4 { row_stride, column_stride, .. }) => (row_stride, column_stride),
        Matrix::F32(_) | Matrix::Bf16(_) => unreachable!("packed as they are"),
    };
    // Whichever way is contiguous, in runs.
    let (runs, run, run_stride) =
        if column_stride == 1 { (lines, depth, row_stride) } else { (depth, lines, column_stride) };
    let first = first_line * row_stride + first_depth * column_stride;
    let level = Level::current();
    for (index, numbers) in numbers.chunks_exact_mut(run).enumerate().take(runs) {
        let first = first + index * run_stride;
        match from {
            Matrix::Nf4(Operand4 { data, .. }) => nf4::dequantize(level, data, first, numbers),
            Matrix::F16(operand) => operand.data[first..first + run].convert_to_f32_slice(numbers),
            Matrix::F32(_) | Matrix::Bf16(_) => unreachable!("packed as they are"),
        }
    }
    let numbers = &*numbers;
    if column_stride == 1 {
        Operand { data: numbers, row_stride: depth, column_stride: 1 }
    } else {
        Operand { data: numbers, row_stride: 1, column_stride: lines }
    }
}
