//! f32 numbers stored as bf16, for activations and for the copy of the weights that bf16 products read.

use super::Threads;
use crate::ops::Number;
use crate::ops::simd::{Level, kernel};
use half::bf16;
use rayon::prelude::*;

/// Numbers that one thread converts at a time: what its second-level cache holds.
const CHUNK: usize = 64 * 1024;

/// Rounds `from` to bf16, nearest even; NaN stays NaN.
///
/// # Panics
/// When the lengths differ.
pub fn narrow(threads: Threads, from: &[f32], to: &mut [bf16]) {
    assert_eq!(from.len(), to.len(), "narrowing between slices of different lengths");
    let level = Level::current();
    match threads {
        Threads::One => narrow_chunk(level, from, to),
        Threads::All => {
            from.par_chunks(CHUNK).zip(to.par_chunks_mut(CHUNK)).for_each(|(from, to)| narrow_chunk(level, from, to));
        }
    }
}

kernel! {
    fn narrow_chunk(from: &[f32], to: &mut [bf16]) {
        to.iter_mut().zip(from).for_each(|(to, &from)| *to = bf16::round(from));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::at_every_level;

    #[test]
    fn numbers_round_as_the_half_crate_rounds_them_one_by_one() {
        // Every bf16 neighbourhood: its value, the ties and their neighbours; infinities, NaN and subnormals among them.
        let from: Vec<f32> = (0..=u16::MAX)
            .flat_map(|high| [0, 0x7fff, 0x8000, 0x8001].map(|low| f32::from_bits(u32::from(high) << 16 | low)))
            .collect();
        let expected: Vec<u16> = from[3..].iter().map(|&from| bf16::from_f32(from).to_bits()).collect();
        at_every_level(|level| {
            let mut to = vec![bf16::ZERO; from.len() - 3];
            narrow(Threads::One, &from[3..], &mut to);
            assert!(to.iter().map(|to| to.to_bits()).eq(expected.iter().copied()), "{level:?}");
        });
        let mut to = vec![bf16::ZERO; from.len() - 3];
        narrow(Threads::All, &from[3..], &mut to);
        assert!(to.iter().map(|to| to.to_bits()).eq(expected));
    }
}
