//! Blocks of sums whose operands are read where they lie, so that the overlapping windows of a convolution need no copies.
//!
//! A block is C[i, j] = sum over runs r and steps s of A[i, r, s] B[r, s, j], plus what it starts from: lines i that stand
//! apart in A, columns j that adjoin in B. Forward, a line is a pixel, a run a row of its window and a column an output
//! channel; for the weight's gradient a line is an output channel, a run a row of the image and a step a pixel of it.

use crate::ops::simd::{Level, Set};

/// Columns of a block at most: three registers of 16.
pub(super) const COLUMNS: usize = 48;
/// Columns that one register of the widest kernel holds.
pub(super) const LANES: usize = 16;

/// What the sums of a block are added to.
#[derive(Clone, Copy, Debug)]
pub(super) enum Start<'a> {
    Zero,
    /// One number a column.
    Bias(&'a [f32]),
    /// What stands in C.
    Before,
}

/// An operand: where its lines (in A), steps and runs begin.
#[derive(Clone, Copy, Debug)]
pub(super) struct Strided<'a> {
    pub data: &'a [f32],
    pub line: usize,
    pub step: usize,
    pub run: usize,
}

/// One block. In B a line is a column, and they adjoin.
#[derive(Clone, Copy, Debug)]
pub(super) struct Block<'a> {
    pub runs: usize,
    pub steps: usize,
    pub a: Strided<'a>,
    pub b: Strided<'a>,
    pub lines: usize,
    pub columns: usize,
    pub start: Start<'a>,
}

/// A block and where it goes, unchecked.
struct Task<'a> {
    block: Block<'a>,
    c: *mut f32,
    c_line: usize,
}

/// The kernel of an instruction set.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    sums: unsafe fn(&Task),
    wide: bool,
}

impl Kernel {
    pub fn new(level: Level) -> Self {
        match level.set() {
            #[cfg(target_arch = "x86_64")]
            Set::Avx512 => Self { sums: x86::avx512, wide: true },
            #[cfg(target_arch = "x86_64")]
            Set::Avx2 if is_x86_feature_detected!("fma") => Self { sums: x86::avx2, wide: false },
            _ => Self { sums: portable, wide: false },
        }
    }

    /// Lines that a block of `columns` columns should have: as many sums as keep the multipliers busy.
    pub fn lines(self, columns: usize) -> usize {
        if self.wide && columns <= LANES { 16 } else { 8 }
    }

    /// Computes `block` into `c`, whose lines are `c_line` numbers apart.
    ///
    /// # Panics
    /// When an operand is shorter than the block, or it has more than [`COLUMNS`] columns.
    pub fn run(self, block: Block, c: &mut [f32], c_line: usize) {
        let Block { runs, steps, a, b, lines, columns, start } = block;
        assert!((1..=COLUMNS).contains(&columns) && lines > 0, "a block of {lines} x {columns}");
        let last = |operand: Strided| (runs.max(1) - 1) * operand.run + (steps.max(1) - 1) * operand.step;
        let covered = last(a) + (lines - 1) * a.line < a.data.len() && last(b) + columns <= b.data.len();
        assert!(covered || runs * steps == 0, "an operand is shorter than its block");
        assert!(columns <= c_line && (lines - 1) * c_line + columns <= c.len(), "the result is shorter than its block");
        if let Start::Bias(bias) = start {
            assert!(bias.len() >= columns, "the bias is shorter than its block");
        }
        // SAFETY: the assertions above keep every element inside the slices, `c` is exclusive, and the level was asked of
        // the processor.
        unsafe { (self.sums)(&Task { block, c: c.as_mut_ptr(), c_line }) };
    }
}

impl Task<'_> {
    /// What element (line, column) starts from.
    unsafe fn before(&self, line: usize, column: usize) -> f32 {
        match self.block.start {
            Start::Zero => 0.0,
            Start::Bias(bias) => bias[column],
            // SAFETY: an element of C.
            Start::Before => unsafe { *self.c.add(line * self.c_line + column) },
        }
    }

    /// Writes sums of lines and columns from (`line`, `column`) on, `width` numbers a line, as far as the block has them.
    unsafe fn write(&self, line: usize, column: usize, sums: &[f32], width: usize) {
        for (i, sums) in sums.chunks(width).take(self.block.lines - line).enumerate() {
            for (j, sum) in sums.iter().take(self.block.columns - column).enumerate() {
                // SAFETY: an element of C.
                unsafe {
                    let value = self.before(line + i, column + j) + sum;
                    *self.c.add((line + i) * self.c_line + column + j) = value;
                }
            }
        }
    }

    /// Where `N` lines from `line` on begin in A: one beyond the block is its last again.
    fn starts<const N: usize>(&self, line: usize) -> [*const f32; N] {
        let Block { a, lines, .. } = self.block;
        std::array::from_fn(|i| a.data[(line + i).min(lines - 1) * a.line..].as_ptr())
    }
}

/// Four lines by eight columns at a time.
unsafe fn portable(task: &Task) {
    const LINES: usize = 4;
    const WIDTH: usize = 8;
    let Block { runs, steps, a, b, lines, columns, .. } = task.block;
    for line in (0..lines).step_by(LINES) {
        let starts: [_; LINES] = task.starts(line);
        for column in (0..columns).step_by(WIDTH) {
            let width = WIDTH.min(columns - column);
            let mut sums = [[0.0f32; WIDTH]; LINES];
            for run in 0..runs {
                for step in 0..steps {
                    let mut row = [0.0; WIDTH];
                    row[..width].copy_from_slice(&b.data[run * b.run + step * b.step + column..][..width]);
                    for (sums, start) in sums.iter_mut().zip(starts) {
                        // SAFETY: `Kernel::run` asserted that A holds every line, run and step.
                        let number = unsafe { *start.add(run * a.run + step * a.step) };
                        sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += number * x);
                    }
                }
            }
            // SAFETY: the block's own elements.
            unsafe { task.write(line, column, sums.as_flattened(), WIDTH) };
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use super::{Block, LANES, Start, Task};
    use std::arch::x86_64::*;

    /// Lines whose sums stay in registers together.
    const LINES: usize = 8;

    /// Up to three registers of columns, eight lines of them at a time; sixteen lines of a single one.
    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn avx512(task: &Task) {
        let Block { lines, columns, .. } = task.block;
        // SAFETY: the caller's promise.
        unsafe {
            let mut line = 0;
            while columns <= LANES && line + 2 * LINES <= lines {
                sixteen_lines(task, line);
                line += 2 * LINES;
            }
            while line < lines {
                match columns.div_ceil(LANES) {
                    1 => eight_lines::<1>(task, line),
                    2 => eight_lines::<2>(task, line),
                    _ => eight_lines::<3>(task, line),
                }
                line += LINES;
            }
        }
    }

    /// The columns of the last of `registers` registers.
    fn last_mask(columns: usize, registers: usize) -> u16 {
        (0xffff_ffffu32 >> (32 - (columns - (registers - 1) * LANES).min(LANES))) as u16
    }

    #[target_feature(enable = "avx512f")]
    unsafe fn eight_lines<const REGISTERS: usize>(task: &Task, line: usize) {
        let Block { runs, steps, a, b, lines, columns, .. } = task.block;
        let mask = last_mask(columns, REGISTERS);
        let starts: [*const f32; LINES] = task.starts(line);
        // SAFETY: `Kernel::run` asserted that the operands hold every line, run, step and column.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); REGISTERS]; LINES];
            for run in 0..runs {
                let (mut place, mut row) = (run * a.run, b.data.as_ptr().wrapping_add(run * b.run));
                for _ in 0..steps {
                    let mut columns = [_mm512_setzero_ps(); REGISTERS];
                    for (register, column) in columns.iter_mut().enumerate() {
                        let from = row.add(register * LANES);
                        let last = register + 1 == REGISTERS;
                        *column = if last { _mm512_maskz_loadu_ps(mask, from) } else { _mm512_loadu_ps(from) };
                    }
                    for (sums, start) in sums.iter_mut().zip(starts) {
                        let number = _mm512_set1_ps(*start.add(place));
                        for (sum, column) in sums.iter_mut().zip(columns) {
                            *sum = _mm512_fmadd_ps(number, column, *sum);
                        }
                    }
                    place += a.step;
                    row = row.wrapping_add(b.step);
                }
            }
            for (i, sums) in sums.iter().enumerate().take(lines - line) {
                for (register, sum) in sums.iter().enumerate() {
                    let mask = if register + 1 == REGISTERS { mask } else { 0xffff };
                    write(task, line + i, register * LANES, mask, *sum);
                }
            }
        }
    }

    /// Sixteen lines of one register: eight sums alone would wait for one another.
    #[target_feature(enable = "avx512f")]
    unsafe fn sixteen_lines(task: &Task, line: usize) {
        const QUARTER: usize = 4;
        let Block { runs, steps, a, b, columns, .. } = task.block;
        let mask = last_mask(columns, 1);
        // SAFETY: as above; the block has all sixteen lines.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); QUARTER]; QUARTER];
            for run in 0..runs {
                let first = a.data.as_ptr().add(line * a.line + run * a.run);
                let mut quarters: [*const f32; QUARTER] =
                    std::array::from_fn(|i| first.wrapping_add(i * QUARTER * a.line));
                let mut row = b.data.as_ptr().wrapping_add(run * b.run);
                for _ in 0..steps {
                    let column = _mm512_maskz_loadu_ps(mask, row);
                    for (sums, quarter) in sums.iter_mut().zip(&mut quarters) {
                        for (i, sum) in sums.iter_mut().enumerate() {
                            *sum = _mm512_fmadd_ps(_mm512_set1_ps(*quarter.add(i * a.line)), column, *sum);
                        }
                        *quarter = quarter.wrapping_add(a.step);
                    }
                    row = row.wrapping_add(b.step);
                }
            }
            for (i, sum) in sums.as_flattened().iter().enumerate() {
                write(task, line + i, 0, mask, *sum);
            }
        }
    }

    #[inline(always)]
    unsafe fn write(task: &Task, line: usize, column: usize, mask: u16, sum: __m512) {
        // SAFETY: the block's own elements; the caller has AVX-512.
        unsafe {
            let c = task.c.add(line * task.c_line + column);
            let value = match task.block.start {
                Start::Zero => sum,
                Start::Bias(bias) => _mm512_add_ps(_mm512_maskz_loadu_ps(mask, bias.as_ptr().add(column)), sum),
                Start::Before => _mm512_add_ps(_mm512_maskz_loadu_ps(mask, c), sum),
            };
            _mm512_mask_storeu_ps(c, mask, value);
        }
    }

    /// Four lines by two registers of eight columns at a time.
    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn avx2(task: &Task) {
        const LINES: usize = 4;
        const HALF: usize = LANES / 2;
        let Block { runs, steps, a, b, lines, columns, .. } = task.block;
        for line in (0..lines).step_by(LINES) {
            let starts: [*const f32; LINES] = task.starts(line);
            for column in (0..columns).step_by(LANES) {
                let lanes_of = |register: usize| {
                    let lanes = columns.saturating_sub(column + register * HALF).min(HALF);
                    let mask: [i32; HALF] = std::array::from_fn(|lane| -i32::from(lane < lanes));
                    // SAFETY: a load of eight numbers.
                    unsafe { _mm256_loadu_si256(mask.as_ptr().cast()) }
                };
                let masks = [lanes_of(0), lanes_of(1)];
                // SAFETY: `Kernel::run` asserted that the operands hold every line, run, step and column.
                unsafe {
                    let mut sums = [[_mm256_setzero_ps(); 2]; LINES];
                    for run in 0..runs {
                        let mut place = run * a.run;
                        let mut row = b.data.as_ptr().wrapping_add(run * b.run + column);
                        for _ in 0..steps {
                            let low = _mm256_maskload_ps(row, masks[0]);
                            let high = _mm256_maskload_ps(row.wrapping_add(HALF), masks[1]);
                            for (sums, start) in sums.iter_mut().zip(starts) {
                                let number = _mm256_set1_ps(*start.add(place));
                                sums[0] = _mm256_fmadd_ps(number, low, sums[0]);
                                sums[1] = _mm256_fmadd_ps(number, high, sums[1]);
                            }
                            place += a.step;
                            row = row.wrapping_add(b.step);
                        }
                    }
                    let mut numbers = [0.0f32; LINES * LANES];
                    for (i, sum) in sums.as_flattened().iter().enumerate() {
                        _mm256_storeu_ps(numbers.as_mut_ptr().add(i * HALF), *sum);
                    }
                    task.write(line, column, &numbers, LANES);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::simd::available;
    use crate::ops::testing::*;

    #[test]
    fn a_block_of_any_size_is_the_sum_of_its_products_on_every_instruction_set() {
        let (a, b) = (normal(1, 4000), normal(2, 4000));
        let bias = normal(3, COLUMNS);
        for (lines, columns, runs, steps) in
            [(1, 1, 1, 1), (8, 48, 3, 9), (16, 16, 3, 7), (33, 11, 2, 5), (5, 33, 2, 3), (7, 32, 1, 4), (3, 20, 0, 5)]
        {
            for (a_line, a_step, a_run) in [(20, 1, 130), (1, 40, 500)] {
                let a = Strided { data: &a, line: a_line, step: a_step, run: a_run };
                let b = Strided { data: &b, line: 1, step: 50, run: 700 };
                for start in [Start::Zero, Start::Bias(&bias), Start::Before] {
                    let block = Block { runs, steps, a, b, lines, columns, start };
                    for level in available() {
                        let c_line = columns + 3;
                        let mut c = vec![0.5f32; lines * c_line];
                        Kernel::new(level).run(block, &mut c, c_line);
                        for (place, found) in c.iter().enumerate() {
                            let (i, j) = (place / c_line, place % c_line);
                            let before = match start {
                                Start::Zero => 0.0,
                                Start::Bias(bias) => f64::from(bias[j.min(COLUMNS - 1)]),
                                Start::Before => 0.5,
                            };
                            let product = |r: usize, s: usize| {
                                let a = a.data[i * a.line + r * a.run + s * a.step];
                                f64::from(a) * f64::from(b.data[r * b.run + s * b.step + j])
                            };
                            let sum: f64 = (0..runs).flat_map(|r| (0..steps).map(move |s| product(r, s))).sum();
                            let expected = if j < columns { before + sum } else { 0.5 };
                            let name =
                                format!("{level:?} {lines} x {columns}, {runs} x {steps}, {start:?} at {i}, {j}");
                            assert!((f64::from(*found) - expected).abs() < 2e-5, "{name}: {found}, not {expected}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    #[should_panic(expected = "shorter than its block")]
    fn an_operand_that_ends_inside_the_block_is_refused() {
        let data = [0.0; 20];
        let a = Strided { data: &data, line: 4, step: 1, run: 0 };
        let b = Strided { data: &data, line: 1, step: 8, run: 0 };
        let block = Block { runs: 1, steps: 4, a, b, lines: 2, columns: 8, start: Start::Zero };
        Kernel::new(Level::current()).run(block, &mut [0.0; 16], 8);
    }
}
