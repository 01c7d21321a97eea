//! Which instructions multiply: found at run time, with the reason in words.

#[cfg(not(target_arch = "x86_64"))]
use super::pack::Words as VectorWords;
use super::pack::{self, Exact, Pairs, Part, Rounded, RoundedPairs, Widened};
#[cfg(target_arch = "x86_64")]
use super::pack_x86::{self, VectorWords};
use super::tile::{self, Kernel};
#[cfg(target_arch = "x86_64")]
use super::tile_x86;
use super::widen;
use super::{Matrix, Operand, Precision};

/// Instruction sets that products have kernels for, best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instructions {
    /// 512-bit registers with a dot product of bf16 pairs.
    Avx512Bf16,
    /// 512-bit registers.
    Avx512,
    /// 256-bit registers with fused multiply-add.
    Avx2,
    /// What the compiler makes of plain loops.
    Portable,
}

/// What one step of a kernel takes from a line of a panel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word {
    /// An f32.
    Exact,
    /// An f32 that was rounded to bf16.
    Rounded,
    /// Two bf16, neighbours along the depth.
    Pair,
}

impl Word {
    /// Numbers along the depth in a word.
    pub fn numbers(self) -> usize {
        if self == Self::Pair { 2 } else { 1 }
    }
}

impl Instructions {
    const ALL: [Self; 4] = [Self::Avx512Bf16, Self::Avx512, Self::Avx2, Self::Portable];

    /// Those of this processor, best first.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|instructions| instructions.are_available())
    }

    /// The best of this processor.
    pub fn best() -> Self {
        Self::available().next().unwrap_or(Self::Portable)
    }

    #[cfg(target_arch = "x86_64")]
    pub(super) fn are_available(self) -> bool {
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        let avx512 = avx2 && is_x86_feature_detected!("avx512f");
        let vectors_of_any_length = is_x86_feature_detected!("avx512vl") && is_x86_feature_detected!("avx512bw");
        match self {
            Self::Avx512Bf16 => avx512 && vectors_of_any_length && is_x86_feature_detected!("avx512bf16"),
            Self::Avx512 => avx512,
            Self::Avx2 => avx2,
            Self::Portable => true,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(super) fn are_available(self) -> bool {
        self == Self::Portable
    }

    /// What they are called in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Avx512Bf16 => "AVX512-BF16",
            Self::Avx512 => "AVX-512",
            Self::Avx2 => "AVX2 and FMA",
            Self::Portable => "no vector instructions known to vrtrain",
        }
    }

    /// The words that a product of `precision` is computed from.
    pub(super) fn word(self, precision: Precision) -> Word {
        match (self, precision) {
            (Self::Avx512Bf16, Precision::Bf16) => Word::Pair,
            (_, Precision::Bf16) => Word::Rounded,
            (_, Precision::F32) => Word::Exact,
        }
    }

    /// The kernel over such words.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn kernel(self, word: Word) -> Kernel {
        match (self, word) {
            (Self::Avx512Bf16, Word::Pair) => tile_x86::avx512_bf16,
            (Self::Avx512Bf16 | Self::Avx512, _) => tile_x86::avx512,
            (Self::Avx2, _) => tile_x86::avx2,
            (Self::Portable, _) => tile::portable,
        }
    }

    #[cfg(not(target_arch = "x86_64"))]
    pub(super) fn kernel(self, _: Word) -> Kernel {
        tile::portable
    }

    /// Packs a part of an operand, whose lines are its rows.
    pub(super) fn pack(self, word: Word, from: Matrix, part: Part, out: &mut [u32]) {
        match (from, word) {
            (Matrix::F32(from), Word::Exact) => self.pack_singles::<Exact>(from, part, out),
            (Matrix::F32(from), Word::Rounded) => self.pack_singles::<Rounded>(from, part, out),
            (Matrix::F32(from), Word::Pair) => self.pack_pairs::<RoundedPairs>(from, part, out),
            (Matrix::Bf16(from), Word::Exact | Word::Rounded) => self.pack_singles::<Widened>(from, part, out),
            (Matrix::Bf16(from), Word::Pair) => self.pack_pairs::<Pairs>(from, part, out),
            (Matrix::F16(_) | Matrix::Nf4(_), _) => {
                widen::panels(from, part, out, |from, part, out| self.pack(word, Matrix::F32(from), part, out));
            }
        }
    }

    fn pack_singles<W: VectorWords>(self, from: Operand<W::Number>, part: Part, out: &mut [u32]) {
        match self {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: both have AVX2 and AVX512-F.
            Self::Avx512Bf16 | Self::Avx512 => unsafe { pack_x86::avx512::<W>(from, part, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: it has AVX2.
            Self::Avx2 => unsafe { pack_x86::avx2::<W>(from, part, out) },
            _ => pack::portable::<W>(from, part, out),
        }
    }

    fn pack_pairs<W: VectorWords>(self, from: Operand<W::Number>, part: Part, out: &mut [u32]) {
        match self {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: it has every instruction of the packing.
            Self::Avx512Bf16 => unsafe { pack_x86::avx512_bf16::<W>(from, part, out) },
            _ => pack::portable::<W>(from, part, out),
        }
    }
}
