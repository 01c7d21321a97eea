//! Numbers that one operation leaves for another: in f32, or rounded to bf16.
//!
//! bf16 halves what a pass keeps and what a product reads. Arithmetic is f32 all the same: a kernel widens what it
//! reads and rounds (nearest even) what it writes.

use super::product::Numbers;
use half::bf16;
use std::borrow::Cow;
use std::ops::Range;

/// How a kernel reads and writes one number.
pub trait Number: Copy + Default + Send + Sync {
    fn widen(self) -> f32;
    fn round(number: f32) -> Self;
}

impl Number for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn round(number: f32) -> Self {
        number
    }
}

impl Number for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    /// The bits of [`bf16::from_f32`], but without a branch, so that a loop over it becomes vector code. NaN stays NaN.
    #[inline(always)]
    fn round(number: f32) -> Self {
        let bits = number.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        let quiet_nan = bits >> 16 | 0x40;
        bf16::from_bits(if bits & 0x7fff_ffff > 0x7f80_0000 { quiet_nan } else { rounded } as u16)
    }
}

/// What an operation reads.
#[derive(Clone, Copy, Debug)]
pub enum Values<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

/// What an operation writes.
#[derive(Debug)]
pub enum ValuesMut<'a> {
    F32(&'a mut [f32]),
    Bf16(&'a mut [bf16]),
}

/// Runs `$body` with the slice in `$values` under the name `$slice`, whichever kind it is.
macro_rules! each_kind {
    ($kind:ident, $values:expr, $slice:ident => $body:expr) => {
        match $values {
            $crate::ops::values::$kind::F32($slice) => $body,
            $crate::ops::values::$kind::Bf16($slice) => $body,
        }
    };
}
pub(super) use each_kind;

impl<'a> Values<'a> {
    pub fn len(self) -> usize {
        each_kind!(Values, self, numbers => numbers.len())
    }

    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Some of the numbers.
    pub fn slice(self, range: Range<usize>) -> Self {
        match self {
            Self::F32(numbers) => Self::F32(&numbers[range]),
            Self::Bf16(numbers) => Self::Bf16(&numbers[range]),
        }
    }

    /// As f32: borrowed where they are f32 already.
    pub fn to_f32(self) -> Cow<'a, [f32]> {
        match self {
            Self::F32(numbers) => Cow::Borrowed(numbers),
            Self::Bf16(numbers) => Cow::Owned(numbers.iter().map(|number| number.widen()).collect()),
        }
    }
}

impl ValuesMut<'_> {
    pub fn len(&self) -> usize {
        each_kind!(ValuesMut, self, numbers => numbers.len())
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl<'a> From<&'a [f32]> for Values<'a> {
    fn from(numbers: &'a [f32]) -> Self {
        Self::F32(numbers)
    }
}

impl<'a> From<&'a Vec<f32>> for Values<'a> {
    fn from(numbers: &'a Vec<f32>) -> Self {
        Self::F32(numbers)
    }
}

impl<'a> From<&'a [bf16]> for Values<'a> {
    fn from(numbers: &'a [bf16]) -> Self {
        Self::Bf16(numbers)
    }
}

impl<'a> From<&'a mut [f32]> for Values<'a> {
    fn from(numbers: &'a mut [f32]) -> Self {
        Self::F32(numbers)
    }
}

impl<'a> From<&'a mut Vec<f32>> for Values<'a> {
    fn from(numbers: &'a mut Vec<f32>) -> Self {
        Self::F32(numbers)
    }
}

impl<'a> From<&'a mut [f32]> for ValuesMut<'a> {
    fn from(numbers: &'a mut [f32]) -> Self {
        Self::F32(numbers)
    }
}

impl<'a> From<&'a mut Vec<f32>> for ValuesMut<'a> {
    fn from(numbers: &'a mut Vec<f32>) -> Self {
        Self::F32(numbers)
    }
}

impl<'a> From<&'a mut [bf16]> for ValuesMut<'a> {
    fn from(numbers: &'a mut [bf16]) -> Self {
        Self::Bf16(numbers)
    }
}

impl<'a> From<Values<'a>> for Numbers<'a> {
    fn from(values: Values<'a>) -> Self {
        match values {
            Values::F32(numbers) => Self::F32(numbers),
            Values::Bf16(numbers) => Self::Bf16(numbers),
        }
    }
}
