//! The cosines and sines of every position.

use std::f64::consts::TAU;

/// How frequencies are changed for contexts longer than the first training's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Scaling {
    None,
    /// LLaMA 3's: wavelengths over original_positions / low_frequency_factor grow by `factor`, those under
    /// original_positions / high_frequency_factor stay, and the frequencies between go over smoothly.
    Llama3 {
        factor: f64,
        low_frequency_factor: f64,
        high_frequency_factor: f64,
        original_positions: usize,
    },
}

/// Cosines and sines, [positions, head_dim / 2].
#[derive(Clone, Debug)]
pub struct Table {
    head_dim: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Table {
    /// For positions 0..positions. Frequencies and angles are rounded to f32 as `transformers` rounds them, since the
    /// models were trained so; at position 4,000 the rounding moves an angle by up to 2e-4.
    ///
    /// # Panics
    /// When `head_dim` is odd or 0: pairs need an even number.
    pub fn new(theta: f64, head_dim: usize, positions: usize, scaling: Scaling) -> Self {
        assert!(head_dim > 0 && head_dim.is_multiple_of(2), "rotary embedding: head_dim {head_dim} is not even");
        let half = head_dim / 2;
        let frequency = |i: usize| scaling.apply(theta.powf(-2.0 * i as f64 / head_dim as f64)) as f32;
        let frequencies: Vec<f32> = (0..half).map(frequency).collect();
        let angles = (0..positions).flat_map(|t| frequencies.iter().map(move |frequency| t as f32 * frequency));
        let (cos, sin) = angles.map(|angle| f64::from(angle).sin_cos()).map(|(s, c)| (c as f32, s as f32)).unzip();
        Self { head_dim, cos, sin }
    }

    pub fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Positions that the table has.
    pub fn positions(&self) -> usize {
        self.cos.len() / (self.head_dim / 2)
    }

    /// Cosines and sines of `position`, [head_dim / 2] each.
    ///
    /// # Panics
    /// When the table does not have the position.
    pub fn row(&self, position: usize) -> (&[f32], &[f32]) {
        let half = self.head_dim / 2;
        let range = position * half..(position + 1) * half;
        (&self.cos[range.clone()], &self.sin[range])
    }
}

impl Scaling {
    /// The changed frequency, in radians a position.
    fn apply(self, frequency: f64) -> f64 {
        let Self::Llama3 { factor, low_frequency_factor, high_frequency_factor, original_positions } = self else {
            return frequency;
        };
        // Turns within the original context: few for the low frequencies.
        let turns = original_positions as f64 * frequency / TAU;
        let share = (turns - low_frequency_factor) / (high_frequency_factor - low_frequency_factor);
        let kept = share.clamp(0.0, 1.0);
        frequency * (kept + (1.0 - kept) / factor)
    }
}
