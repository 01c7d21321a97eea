//! The tile of C that a kernel computes from one panel of A and one of B, and the portable kernel.

/// Rows of a tile: lines of a panel of A.
pub(super) const ROWS: usize = 8;
/// Columns of a tile: lines of a panel of B.
pub(super) const COLUMNS: usize = 48;

/// Where a tile goes: C = scale * sum, or C += scale * sum.
#[derive(Clone, Copy)]
pub(super) struct Tile {
    /// Its first element; `rows` rows of `columns` elements from there on are written.
    pub c: *mut f32,
    pub row_stride: usize,
    pub rows: usize,
    pub columns: usize,
    pub scale: f32,
    pub accumulate: bool,
}

/// Sums a tile over `steps` words of a panel of A ([steps][ROWS]) and of B ([steps][COLUMNS]).
///
/// Unsafe: panels and tile must be in memory that the call may read and write, and the processor must have the
/// kernel's instructions.
pub(super) type Kernel = unsafe fn(steps: usize, a: *const u32, b: *const u32, tile: &Tile);

impl Tile {
    /// The part of the tile from (`row`, `column`) on, at most `rows` x `columns` large.
    pub fn part(&self, row: usize, column: usize, rows: usize, columns: usize) -> Self {
        // SAFETY: callers ask for places inside the tile.
        let c = unsafe { self.c.add(row * self.row_stride + column) };
        Self { c, rows: rows.min(self.rows - row), columns: columns.min(self.columns - column), ..*self }
    }

    /// Writes the sums of its rows, `stride` numbers apart.
    ///
    /// # Safety
    /// The tile lies in memory that the caller may write.
    pub unsafe fn write(&self, sums: &[f32], stride: usize) {
        for i in 0..self.rows {
            // SAFETY: row i of the tile, see above.
            let row = unsafe { std::slice::from_raw_parts_mut(self.c.add(i * self.row_stride), self.columns) };
            for (c, sum) in row.iter_mut().zip(&sums[i * stride..]) {
                *c = if self.accumulate { *c + self.scale * sum } else { self.scale * sum };
            }
        }
    }
}

/// The kernel for any processor, over f32 words.
///
/// # Safety
/// See [`Kernel`].
pub(super) unsafe fn portable(steps: usize, a: *const u32, b: *const u32, tile: &Tile) {
    // As many sums at a time as 16 registers of four hold.
    const PART_ROWS: usize = 4;
    const PART_COLUMNS: usize = 8;
    for row in (0..tile.rows).step_by(PART_ROWS) {
        for column in (0..tile.columns).step_by(PART_COLUMNS) {
            let mut sums = [[0.0f32; PART_COLUMNS]; PART_ROWS];
            for step in 0..steps {
                // SAFETY: the panels hold `steps` steps of ROWS and COLUMNS words, both multiples of the part's.
                let (a, b) = unsafe {
                    let a = &*a.add(step * ROWS + row).cast::<[u32; PART_ROWS]>();
                    (a, &*b.add(step * COLUMNS + column).cast::<[u32; PART_COLUMNS]>())
                };
                for (sums, a) in sums.iter_mut().zip(a) {
                    for (sum, b) in sums.iter_mut().zip(b) {
                        *sum += f32::from_bits(*a) * f32::from_bits(*b);
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
