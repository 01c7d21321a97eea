//! The tile of C that a kernel computes from one panel of A and one of B, and the portable kernel.

use std::ops::Range;

/// Rows of a tile: lines of a panel of A.
pub(super) const ROWS: usize = 8;
/// Columns of a tile: lines of a panel of B.
pub(super) const COLUMNS: usize = 48;
/// Steps below which a tile asks for its memory at once, as there is no time to spread it.
pub(super) const SHORT: usize = 256;

/// Where a tile goes: C = scale * sum + (addend + bias).
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// Its first element; `rows` rows of `columns` elements from there on are written.
    pub c: *mut f32,
    pub row_stride: usize,
    pub rows: usize,
    pub columns: usize,
    pub scale: f32,
    /// What is added, row by row, and the elements between its rows: C itself, or a residual.
    pub addend: Option<(*const f32, usize)>,
    /// What is added to each row.
    pub bias: Option<*const f32>,
    /// What a kernel asks memory for meanwhile.
    pub ahead: Fetch,
}

/// Cache lines that are wanted soon: runs of `run` lines, `stride` bytes from one run to the next, and of all their lines,
/// counted through, those from `from` to `to`.
///
/// A core has few requests to memory under way at once, and a burst of them holds up the operands of a tile. So kernels ask
/// for a share of the lines every few steps.
#[derive(Clone, Copy)]
pub(super) struct Fetch {
    first: *const u8,
    stride: usize,
    run: usize,
    from: usize,
    to: usize,
}

impl Fetch {
    pub const NOTHING: Self = Self { first: std::ptr::null(), stride: 0, run: 1, from: 0, to: 0 };
    const LINE: usize = 64;

    /// All lines of `runs` runs of `bytes`.
    pub fn new(first: *const u8, runs: usize, stride: usize, bytes: usize) -> Self {
        let run = bytes.div_ceil(Self::LINE).max(1);
        Self { first, stride, run, from: 0, to: runs * run }
    }

    /// Those `shares` of `of` equal ones.
    #[inline(always)]
    pub fn share(self, shares: Range<usize>, of: usize) -> Self {
        let lines = self.to - self.from;
        Self { from: self.from + lines * shares.start / of, to: self.from + lines * shares.end / of, ..self }
    }

    #[inline(always)]
    fn lines(self) -> impl Iterator<Item = *const u8> {
        let (mut run, mut line) = (self.from / self.run, self.from % self.run);
        (self.from..self.to).map(move |_| {
            let place = run * self.stride + line * Self::LINE;
            (run, line) = if line + 1 == self.run { (run + 1, 0) } else { (run, line + 1) };
            self.first.wrapping_add(place)
        })
    }

    /// Asks for them, into the second-level cache.
    #[inline(always)]
    pub fn ask(self) {
        // Most tiles of small products have none, and a division would weigh there.
        if self.from < self.to {
            self.lines().for_each(prefetch);
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn prefetch(line: *const u8) {
    use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
    // SAFETY: a prefetch of any address is harmless.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) };
}

/// Other processors are left to their own.
#[cfg(not(target_arch = "x86_64"))]
fn prefetch(_: *const u8) {}

/// The rows of A that a tile is computed from: the word of a row and a step is
/// `first[row * row_stride + step * step_stride]`, where one of the strides is 1.
#[derive(Clone, Copy)]
pub(super) struct Rows {
    pub first: *const u32,
    pub row_stride: usize,
    pub step_stride: usize,
}

impl Rows {
    /// A panel: [steps][ROWS].
    pub fn panel(first: *const u32) -> Self {
        Self { first, row_stride: 1, step_stride: ROWS }
    }

    /// Where `N` rows from `row` on begin, of which only `rows` need be there: a row beyond them is the last one again.
    pub fn starts<const N: usize>(&self, row: usize, rows: usize) -> [*const u32; N] {
        // SAFETY: callers ask for rows that are there.
        std::array::from_fn(|i| unsafe { self.first.add((row + i).min(rows - 1) * self.row_stride) })
    }
}

/// Sums a tile over `steps` words of `tile.rows` rows of A and of a panel of B ([steps][COLUMNS]).
///
/// Unsafe: rows, panel and tile must be in memory that the call may read and write (of rows that adjoin, all [`ROWS`] are
/// read), and the processor must have the kernel's instructions.
pub(super) type Kernel = unsafe fn(steps: usize, a: Rows, b: *const u32, tile: &Tile);

impl Tile {
    /// The part of the tile from (`row`, `column`) on, at most `rows` x `columns` large.
    pub fn part(&self, row: usize, column: usize, rows: usize, columns: usize) -> Self {
        // SAFETY: callers ask for places inside the tile.
        unsafe {
            Self {
                c: self.c.add(row * self.row_stride + column),
                rows: rows.min(self.rows - row),
                columns: columns.min(self.columns - column),
                addend: self.addend.map(|(addend, stride)| (addend.add(row * stride + column), stride)),
                bias: self.bias.map(|bias| bias.add(column)),
                ..*self
            }
        }
    }

    /// Writes the sums of its rows, `stride` numbers apart.
    ///
    /// # Safety
    /// The tile lies in memory that the caller may write, what is added to it in memory that may be read.
    pub unsafe fn write(&self, sums: &[f32], stride: usize) {
        for (i, sums) in sums.chunks(stride).take(self.rows).enumerate() {
            for (j, &sum) in sums.iter().take(self.columns).enumerate() {
                // SAFETY: element (i, j) of the tile, see above.
                unsafe {
                    let addend = self.addend.map(|(addend, stride)| *addend.add(i * stride + j));
                    let bias = self.bias.map(|bias| *bias.add(j));
                    let value = match (addend, bias) {
                        (None, None) => self.scale * sum,
                        (Some(one), None) | (None, Some(one)) => one + self.scale * sum,
                        (Some(addend), Some(bias)) => addend + bias + self.scale * sum,
                    };
                    *self.c.add(i * self.row_stride + j) = value;
                }
            }
        }
    }
}

/// The kernel for any processor, over f32 words.
///
/// # Safety
/// See [`Kernel`].
pub(super) unsafe fn portable(steps: usize, a: Rows, b: *const u32, tile: &Tile) {
    tile.ahead.ask();
    // As many sums at a time as 16 registers of four hold.
    const PART_ROWS: usize = 4;
    const PART_COLUMNS: usize = 8;
    for row in (0..tile.rows).step_by(PART_ROWS) {
        let starts: [_; PART_ROWS] = a.starts(row, tile.rows);
        for column in (0..tile.columns).step_by(PART_COLUMNS) {
            let mut sums = [[0.0f32; PART_COLUMNS]; PART_ROWS];
            for step in 0..steps {
                // SAFETY: rows and panel hold `steps` steps, the panel of COLUMNS words, a multiple of the part's.
                let (a, b) = unsafe {
                    let a = starts.map(|start| *start.add(step * a.step_stride));
                    (a, &*b.add(step * COLUMNS + column).cast::<[u32; PART_COLUMNS]>())
                };
                for (sums, a) in sums.iter_mut().zip(a) {
                    for (sum, b) in sums.iter_mut().zip(b) {
                        *sum += f32::from_bits(a) * f32::from_bits(*b);
                    }
                }
            }
            // SAFETY: a part of the tile.
            unsafe {
                tile.part(row, column, PART_ROWS, PART_COLUMNS).write(sums.as_flattened(), PART_COLUMNS);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_of_shares_ask_for_every_line_of_an_operand_once_and_for_no_other() {
        // Three rows of 100 numbers, 130 apart: 400 bytes begin in seven lines each.
        let numbers = [0.0f32; 3 * 130];
        let first = numbers.as_ptr().cast::<u8>();
        let all = Fetch::new(first, 3, 130 * 4, 100 * 4);
        let expected: Vec<usize> = (0..3).flat_map(|row| (0..7).map(move |line| row * 520 + line * 64)).collect();
        for (tiles, stretches) in [(1, 1), (4, 8), (5, 3), (40, 8)] {
            let mut asked = vec![];
            for tile in 0..tiles {
                for stretch in 0..stretches {
                    let lines = all.share(tile..tile + 1, tiles).share(stretch..stretch + 1, stretches).lines();
                    asked.extend(lines.map(|line| line.addr() - first.addr()));
                }
            }
            assert_eq!(asked, expected, "{tiles} tiles of {stretches} stretches");
        }
        assert_eq!(Fetch::NOTHING.share(2..3, 3).lines().count(), 0);
    }
}
