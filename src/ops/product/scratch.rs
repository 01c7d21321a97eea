//! Buffers of packed words that live as long as their thread, so that a steady state neither allocates nor faults.

use bytemuck::{Pod, Zeroable};
use std::cell::Cell;
use std::thread::LocalKey;

/// One cache line of packed words; gives the buffers their alignment.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(super) struct Line([u32; LINE]);

/// Words in a cache line.
pub(super) const LINE: usize = 16;

thread_local! {
    /// The operand block that all threads of a product read, packed for the thread that called it.
    pub(super) static SHARED: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
    /// The panels that this thread packs for itself and keeps in its second-level cache.
    pub(super) static OWN: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
    /// A part of a narrow operand as f32, before it is packed.
    pub(super) static WIDENED: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// Calls `f` with at least `words` words of the buffer, which hold whatever was left in them.
///
/// The buffer is taken out for the call: a product that rayon starts on this thread meanwhile gets one of its own.
pub(super) fn with<R>(buffer: &'static LocalKey<Cell<Vec<Line>>>, words: usize, f: impl FnOnce(&mut [u32]) -> R) -> R {
    let mut lines = buffer.take();
    if lines.len() < words.div_ceil(LINE) {
        lines.resize(words.div_ceil(LINE), Line::zeroed());
    }
    let result = f(bytemuck::cast_slice_mut(&mut lines));
    buffer.set(lines);
    result
}
