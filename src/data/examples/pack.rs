//! Which examples share a row.

use std::collections::VecDeque;

/// Whether a row may hold several examples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Packing {
    /// As many as fit.
    Packed,
    /// One, and padding.
    OneExampleARow,
}

/// Examples that are looked at to fill a row: enough to leave few holes, and few enough to keep the order's randomness.
const LOOK_AHEAD: usize = 64;

/// Rows of example indices: every entry of `order` once. A packed row begins with the next example of the order and is
/// filled with the longest of the following [`LOOK_AHEAD`] that still fits, until none does.
///
/// # Panics
/// When an example is longer than a row.
pub fn rows(lengths: &[usize], order: &[usize], row_length: usize, packing: Packing) -> Vec<Vec<usize>> {
    assert!(order.iter().all(|&index| lengths[index] <= row_length), "an example is longer than a row");
    if packing == Packing::OneExampleARow {
        return order.iter().map(|&index| vec![index]).collect();
    }
    let mut rows = Vec::new();
    let mut rest = order.iter().copied();
    let mut window: VecDeque<usize> = rest.by_ref().take(LOOK_AHEAD).collect();
    while let Some(first) = window.pop_front() {
        window.extend(rest.next());
        let (mut row, mut room) = (vec![first], row_length - lengths[first]);
        // Of equally long ones the earliest, so that the rows are a function of the order alone.
        let longest = |window: &VecDeque<usize>, room: usize| {
            let fitting = (0..window.len()).filter(|&place| lengths[window[place]] <= room);
            fitting.rev().max_by_key(|&place| lengths[window[place]])
        };
        while let Some(place) = longest(&window, room) {
            let Some(index) = window.remove(place) else { break };
            window.extend(rest.next());
            room -= lengths[index];
            row.push(index);
        }
        rows.push(row);
    }
    rows
}
