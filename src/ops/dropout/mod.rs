//! Dropout: each number is 0 with probability p and x / (1 - p) otherwise (Srivastava et al., JMLR 2014).
//!
//! Which numbers are dropped is a pure function of a key (made from the run's seed, the step, the micro-batch and the
//! place in the model) and of the number's row and column. Nothing is stored: the backward pass and a block that is
//! computed again find the same mask, whatever the number of threads, and a resumed run finds it too.

mod cpu;

pub use cpu::{add_masked, add_to, columns, forward, in_place};

/// A dropout's mask: which one, and how much it drops.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mask {
    key: u64,
    /// A number is kept where its hash is at least this: p * 2^32.
    threshold: u32,
    /// 1 / (1 - p)
    scale: f32,
}

impl Mask {
    /// The mask of `key` for `probability` in [0, 1).
    pub fn new(key: u64, probability: f64) -> Self {
        assert!((0.0..1.0).contains(&probability), "a probability of dropout of {probability}");
        let threshold = (probability * 2f64.powi(32)).round().min(f64::from(u32::MAX)) as u32;
        Self { key, threshold, scale: (1.0 / (1.0 - probability)) as f32 }
    }
}

/// What the masks of one pass depend on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Draw {
    pub seed: u64,
    /// The optimizer step, from 1.
    pub step: u64,
    pub micro_batch: u64,
}

impl Draw {
    /// The key of the dropout at `place` in the model.
    pub fn key(self, place: u64) -> u64 {
        [self.step, self.micro_batch, place].into_iter().fold(mix(self.seed), |key, part| mix(key ^ mix(part)))
    }
}

/// A bijection of 64 bits in which every output bit depends on every input bit (Steele et al., "SplitMix", 2014).
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
