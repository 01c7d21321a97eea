//! Where the time of a training step goes: a stop-watch for each part, off unless someone asks.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A part of a training step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Part {
    Embedding,
    Norm,
    LinearForward,
    LinearInputGradient,
    LinearWeightGradient,
    AttentionForward,
    AttentionBackward,
    Activation,
    Head,
    Adapters,
    Optimizer,
}

impl Part {
    pub const ALL: [Self; 11] = [
        Self::Embedding,
        Self::Norm,
        Self::LinearForward,
        Self::LinearInputGradient,
        Self::LinearWeightGradient,
        Self::AttentionForward,
        Self::AttentionBackward,
        Self::Activation,
        Self::Head,
        Self::Adapters,
        Self::Optimizer,
    ];

    /// What a report calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Embedding => "embedding",
            Self::Norm => "norms",
            Self::LinearForward => "linear, forward",
            Self::LinearInputGradient => "linear, input gradient",
            Self::LinearWeightGradient => "linear, weight gradient",
            Self::AttentionForward => "attention, forward",
            Self::AttentionBackward => "attention, backward",
            Self::Activation => "activation",
            Self::Head => "head and loss",
            Self::Adapters => "adapters",
            Self::Optimizer => "optimizer",
        }
    }
}

static ENABLED: AtomicBool = AtomicBool::new(false);
static NANOSECONDS: [AtomicU64; Part::ALL.len()] = [const { AtomicU64::new(0) }; Part::ALL.len()];

/// Starts measuring, from zero.
pub fn start() {
    NANOSECONDS.iter().for_each(|cell| cell.store(0, Ordering::Relaxed));
    ENABLED.store(true, Ordering::Relaxed);
}

/// Stops measuring; the time of each part since [`start`].
pub fn stop() -> Vec<(Part, Duration)> {
    ENABLED.store(false, Ordering::Relaxed);
    let time = |part: Part| Duration::from_nanos(NANOSECONDS[part as usize].load(Ordering::Relaxed));
    Part::ALL.into_iter().map(|part| (part, time(part))).collect()
}

/// Runs `f` on behalf of `part`.
pub fn timed<R>(part: Part, f: impl FnOnce() -> R) -> R {
    if !ENABLED.load(Ordering::Relaxed) {
        return f();
    }
    let started = Instant::now();
    let result = f();
    NANOSECONDS[part as usize].fetch_add(started.elapsed().as_nanos() as u64, Ordering::Relaxed);
    result
}
