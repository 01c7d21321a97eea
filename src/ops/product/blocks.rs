//! A product in blocks: what is packed when, which thread computes which tiles, in which order the depth is summed.
//!
//! The depth k is cut into blocks that fit the caches. For each block the narrower operand is packed once, for all
//! threads (the shared panels); then each thread takes a few panels of the other operand, packs them into its own
//! buffer and multiplies them with all shared panels. Which thread takes which panels is left to chance; a tile of C
//! is computed whole by one thread, block after block, so the result does not depend on it.
//!
//! A result in bf16 is rounded tile by tile, and never stands in memory as f32.

use super::instructions::{Instructions, Word};
use super::pack::{self, Part, panel_stride};
use super::scratch;
use super::tile::{COLUMNS, Fetch, Kernel, ROWS, Rows, SHORT, Tile};
use super::{Into, Matrix, Plus, Size, Threads, narrow};
use crate::ops::Number;
use crate::ops::simd::{Level, kernel};
use half::bf16;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Steps in a block of the depth, at most: a panel of A (24 KiB) then fits the first-level cache.
const MOST_STEPS: usize = 768;
/// Words of the panels that a thread packs for itself: 384 KiB of the second-level cache.
const OWN_WORDS: usize = 96 * 1024;
/// Multiply-adds for which another thread is worth waking.
const WORTH_A_THREAD: usize = 1 << 20;

/// One operand as a row of panels.
#[derive(Clone, Copy)]
struct Side<'a> {
    /// Its lines are its rows.
    matrix: Matrix<'a>,
    lines: usize,
    /// Lines in a panel.
    width: usize,
    panel_stride: usize,
}

impl<'a> Side<'a> {
    fn new(matrix: Matrix<'a>, lines: usize, width: usize, steps: usize) -> Self {
        Self { matrix, lines, width, panel_stride: panel_stride(steps, width) }
    }

    fn panels(&self) -> usize {
        self.lines.div_ceil(self.width)
    }

    fn words(&self, panels: usize) -> usize {
        panels * self.panel_stride
    }
}

/// Which operand all threads share.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shared {
    A,
    B,
}

/// C, whose rows are some stride apart.
#[derive(Clone, Copy)]
pub(super) enum Target {
    F32(*mut f32),
    /// Each number is rounded once, so the depth must be [`one_block`] and nothing can be accumulated.
    Bf16(*mut bf16),
}

/// A tile on its way to bf16: [`ROWS`] rows of [`COLUMNS`].
#[repr(align(64))]
struct Sums([f32; ROWS * COLUMNS]);

/// Whether a depth of `k` is summed in one go.
pub(super) fn one_block(word: Word, k: usize) -> bool {
    k.div_ceil(word.numbers()) <= MOST_STEPS
}

/// A product under way, seen by all its threads.
struct Job<'a> {
    instructions: Instructions,
    word: Word,
    kernel: Kernel,
    size: Size,
    which: Shared,
    shared: Side<'a>,
    own: Side<'a>,
    /// Numbers in a block of the depth.
    block: usize,
    /// Two buffers of shared panels: one is read while the other is packed.
    buffers: [*mut u32; 2],
    /// The shared panels are cut into so many sections, so that there is work for every thread.
    sections: usize,
    threads: usize,
    scale: f32,
    c: Target,
    c_row_stride: usize,
    into: Into,
    plus: Plus<'a>,
    level: Level,
    packing: Progress,
    multiplying: Progress,
}

// SAFETY: threads write disjoint tiles of C and disjoint panels of the buffers, and read a buffer only after its
// packing is done, as `Progress` orders it.
unsafe impl Sync for Job<'_> {}

/// Units taken and units finished, counted over all blocks.
#[derive(Default)]
struct Progress {
    taken: AtomicUsize,
    done: AtomicUsize,
}

impl Progress {
    /// The next units below `limit`; `most` tells how many from the first one on, given how many are left.
    fn take(&self, limit: usize, most: impl Fn(usize, usize) -> usize) -> Option<Range<usize>> {
        let mut first = self.taken.load(Ordering::Relaxed);
        while first < limit {
            let end = first + most(first, limit - first).clamp(1, limit - first);
            match self.taken.compare_exchange_weak(first, end, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some(first..end),
                Err(now) => first = now,
            }
        }
        None
    }

    fn finish(&self, units: usize) {
        self.done.fetch_add(units, Ordering::Release);
    }

    /// Waits until `limit` units are finished. Whoever took one is running, so this ends.
    fn wait(&self, limit: usize) {
        let mut turns = 0u32;
        while self.done.load(Ordering::Acquire) < limit {
            turns += 1;
            if turns.is_multiple_of(4096) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
    }
}

/// C [m, n] (+)= scale * A B + `plus` with the kernel and the packing of `instructions` for `word`.
///
/// # Safety
/// The operands cover their matrices, C may be written through `c`, nothing is empty, and the processor has the
/// instructions. What [`Target`] asks for holds.
#[allow(clippy::too_many_arguments, reason = "a product has this many operands")]
pub(super) unsafe fn multiply(
    instructions: Instructions,
    word: Word,
    threads: Threads,
    size: Size,
    a: Matrix,
    b: Matrix,
    scale: f32,
    c: Target,
    c_row_stride: usize,
    into: Into,
    plus: Plus,
) {
    let Size { m, k, n } = size;
    let steps = k.div_ceil(word.numbers());
    // Blocks of equal length, in multiples of what packing transposes at once.
    let block_steps = steps.div_ceil(steps.div_ceil(MOST_STEPS)).next_multiple_of(8).min(MOST_STEPS);
    let a = Side::new(a, m, ROWS, block_steps);
    let b = Side::new(b.transposed(), n, COLUMNS, block_steps);
    let (which, shared, own) = if m <= n { (Shared::A, a, b) } else { (Shared::B, b, a) };
    let available = match threads {
        Threads::One => 1,
        Threads::All => rayon::current_num_threads(),
    };
    let threads = (m * n * k / WORTH_A_THREAD).clamp(1, available);
    let sections = (3 * threads).div_ceil(own.panels()).min(shared.panels());
    let buffer_words = shared.words(shared.panels());
    scratch::with(&scratch::SHARED, 2 * buffer_words, |words| {
        let (first, second) = words.split_at_mut(buffer_words);
        let job = Job {
            instructions,
            word,
            kernel: instructions.kernel(word),
            size,
            which,
            shared,
            own,
            block: block_steps * word.numbers(),
            buffers: [first.as_mut_ptr(), second.as_mut_ptr()],
            sections: if threads == 1 { 1 } else { sections },
            threads,
            scale,
            c,
            c_row_stride,
            into,
            plus,
            level: Level::current(),
            packing: Progress::default(),
            multiplying: Progress::default(),
        };
        if threads == 1 {
            job.work();
        } else {
            rayon::scope(|scope| {
                (1..threads).for_each(|_| scope.spawn(|_| job.work()));
                job.work();
            });
        }
    });
}

impl Job<'_> {
    /// What every thread does: pack and multiply block after block, as long as there is something to take.
    fn work(&self) {
        let most_panels = (OWN_WORDS / self.own.panel_stride).clamp(1, self.own.panels());
        scratch::with(&scratch::OWN, self.own.words(most_panels), |own| {
            let blocks = self.size.k.div_ceil(self.block);
            self.pack_shared(0);
            for block in 0..blocks {
                self.packing.wait((block + 1) * self.shared.panels());
                self.multiply_block(block, most_panels, own);
                if block + 1 < blocks {
                    // Into the other buffer, while slower threads still multiply. Nobody reads it: all have finished
                    // the block before.
                    self.pack_shared(block + 1);
                    self.multiplying.wait((block + 1) * self.units());
                }
            }
        });
    }

    fn units(&self) -> usize {
        self.own.panels() * self.sections
    }

    fn part(&self, side: &Side, panels: Range<usize>, block: usize) -> Part {
        let first_line = panels.start * side.width;
        Part {
            first_line,
            lines: (panels.end * side.width).min(side.lines) - first_line,
            first_depth: block * self.block,
            depth: self.block.min(self.size.k - block * self.block),
            width: side.width,
            panel_stride: side.panel_stride,
        }
    }

    fn pack_shared(&self, block: usize) {
        let panels = self.shared.panels();
        // As many panels as make long runs of memory, but enough parts for every thread.
        let most = (96 / self.shared.width).min(panels.div_ceil(2 * self.threads));
        while let Some(units) = self.packing.take((block + 1) * panels, |_, _| most) {
            let taken = units.start - block * panels..units.end - block * panels;
            let words = self.shared.words(taken.len());
            // SAFETY: these panels of the buffer are this thread's until it reports them finished.
            let out = unsafe {
                let first = self.buffers[block % 2].add(self.shared.words(taken.start));
                std::slice::from_raw_parts_mut(first, words)
            };
            let part = self.part(&self.shared, taken, block);
            self.instructions.pack(self.word, self.shared.matrix, part, out);
            self.packing.finish(units.len());
        }
    }

    fn multiply_block(&self, block: usize, most_panels: usize, own: &mut [u32]) {
        let panels = self.own.panels();
        let before = block * self.units();
        // Large pieces first, small ones at the end, so that all threads finish together.
        let most = |first: usize, left: usize| {
            let to_section_end = panels - (first - before) % panels;
            (left / (2 * self.threads)).clamp(1, most_panels).min(to_section_end)
        };
        let mut sums = Sums([0.0; ROWS * COLUMNS]);
        let limit = before + self.units();
        let mut next = self.multiplying.take(limit, most);
        while let Some(units) = next.take() {
            next = self.multiplying.take(limit, most);
            let panels_of = |units: &Range<usize>| {
                let first = (units.start - before) % panels;
                first..first + units.len()
            };
            let taken = panels_of(&units);
            let part = self.part(&self.own, taken.clone(), block);
            self.instructions.pack(self.word, self.own.matrix, part, own);
            // While this thread multiplies, memory brings what it packs next.
            let next_part = next.as_ref().map(|units| self.part(&self.own, panels_of(units), block));
            let ahead = next_part.map_or(Fetch::NOTHING, |part| pack::ahead(self.own.matrix, part));
            let steps = part.depth.div_ceil(self.word.numbers());
            let section = (units.start - before) / panels;
            let shared = self.shared.panels();
            let shared = shared * section / self.sections..shared * (section + 1) / self.sections;
            // Tiles that ask at once do so for all tiles of their shared panel.
            let (asking, shares) =
                if steps < SHORT { (1, shared.len()) } else { (taken.len(), shared.len() * taken.len()) };
            let first_shared = shared.start;
            let pairs = shared.flat_map(|shared_panel| taken.clone().map(move |own_panel| (shared_panel, own_panel)));
            for (shared_panel, own_panel) in pairs {
                let (row, column) = (shared_panel - first_shared, own_panel - taken.start);
                let share = row * asking + column;
                let ahead = if column < asking { ahead.share(share..share + 1, shares) } else { Fetch::NOTHING };
                // SAFETY: both panels are packed, and the tile is of this thread's unit.
                unsafe {
                    let shared_words = self.buffers[block % 2].add(self.shared.words(shared_panel));
                    let own_words = own.as_ptr().add(self.own.words(own_panel - taken.start));
                    let (a, b) = ((shared_panel, shared_words.cast_const()), (own_panel, own_words));
                    let (a, b) = if self.which == Shared::A { (a, b) } else { (b, a) };
                    self.tile(block, steps, a, b, ahead, &mut sums);
                }
            }
            self.multiplying.finish(units.len());
        }
    }

    /// The tile of a panel of A and one of B, each with its place; `ahead` is asked for meanwhile.
    ///
    /// # Safety
    /// The panels are packed for `steps` and no other thread touches the tile.
    unsafe fn tile(
        &self,
        block: usize,
        steps: usize,
        a: (usize, *const u32),
        b: (usize, *const u32),
        ahead: Fetch,
        sums: &mut Sums,
    ) {
        let ((row, a), (column, b)) = ((a.0 * ROWS, a.1), (b.0 * COLUMNS, b.1));
        let place = row * self.c_row_stride + column;
        // SAFETY: the tile begins inside C and ends where C does.
        unsafe {
            let (c, row_stride) = match self.c {
                Target::F32(c) => (c.add(place), self.c_row_stride),
                Target::Bf16(_) => (sums.0.as_mut_ptr(), COLUMNS),
            };
            let own = (block > 0 || self.into == Into::Accumulate).then_some((c.cast_const(), row_stride));
            let n = self.size.n;
            let tile = Tile {
                c,
                row_stride,
                rows: ROWS.min(self.size.m - row),
                columns: COLUMNS.min(n - column),
                scale: self.scale,
                addend: own.or(self.plus.residual.map(|residual| (residual.as_ptr().add(row * n + column), n))),
                bias: self.plus.bias.filter(|_| block == 0).map(|bias| bias.as_ptr().add(column)),
                ahead,
            };
            (self.kernel)(steps, Rows::panel(a), b, &tile);
            if let Target::Bf16(c) = self.c {
                for (row, sums) in sums.0.as_chunks::<COLUMNS>().0.iter().take(tile.rows).enumerate() {
                    let c = c.add(place + row * self.c_row_stride);
                    if tile.columns == COLUMNS {
                        round_row(self.level, sums, &mut *c.cast());
                    } else {
                        narrow(Threads::One, &sums[..tile.columns], std::slice::from_raw_parts_mut(c, tile.columns));
                    }
                }
            }
        }
    }
}

kernel! {
    /// [`narrow`] where the length is known to the compiler, which takes a row in whole registers then (three of AVX-512).
    fn round_row(from: &[f32; COLUMNS], to: &mut [bf16; COLUMNS]) {
        to.iter_mut().zip(from).for_each(|(to, &from)| *to = bf16::round(from));
    }
}
