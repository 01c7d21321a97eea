//! f32 numbers stored as bf16, for activations and for the copy of the weights that bf16 products read.

use super::Threads;
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
    match threads {
        Threads::One => narrow_chunk(from, to),
        Threads::All => {
            from.par_chunks(CHUNK).zip(to.par_chunks_mut(CHUNK)).for_each(|(from, to)| narrow_chunk(from, to));
        }
    }
}

fn narrow_chunk(from: &[f32], to: &mut [bf16]) {
    #[cfg(target_arch = "x86_64")]
    if super::Precision::bf16_is_native() {
        // SAFETY: the processor has the instructions.
        unsafe { super::pack_x86::narrow(from, to) };
        return;
    }
    to.iter_mut().zip(from).for_each(|(to, &from)| *to = bf16::from_f32(from));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_round_as_the_half_crate_rounds_them_one_by_one() {
        // Every bf16 neighbourhood: its value, the ties and their neighbours. Subnormal results may be zeros.
        let from: Vec<f32> = (0..=u16::MAX)
            .flat_map(|high| [0, 0x7fff, 0x8000, 0x8001].map(|low| f32::from_bits(u32::from(high) << 16 | low)))
            .collect();
        for threads in [Threads::One, Threads::All] {
            let mut to = vec![bf16::ZERO; from.len() - 3];
            narrow(threads, &from[3..], &mut to);
            for (to, &from) in to.iter().zip(&from[3..]) {
                let expected = bf16::from_f32(from);
                let same = to.to_bits() == expected.to_bits();
                let both_nan = to.is_nan() && expected.is_nan();
                let flushed = from.is_subnormal() && to.to_f32() == 0.0;
                assert!(same || both_nan || flushed, "{from:e}: {to:e}, not {expected:e}");
            }
        }
    }
}
