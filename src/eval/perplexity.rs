//! Perplexity of a model on token ids: windows of the context, every target scored once.

use crate::model::{Batch, Documents, Engine, IGNORE, LossSum};
use crate::params::ParameterStore;
use anyhow::{Result, ensure};

/// Targets of one forward pass, at most.
const TOKENS_AT_ONCE: usize = 4096;

/// How a document is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Windows {
    /// Inputs of a window.
    pub window: usize,
    /// Inputs from one window's beginning to the next one's. Where it is less than the window, the windows overlap, and
    /// each scores the targets that no earlier one has: they have at least `window - stride` tokens before them.
    pub stride: usize,
}

/// Negative log-likelihood of `document` in windows of `window` + 1 tokens.
///
/// The first token has nothing before it and is no target; the last window may be shorter. At most `limit` targets are
/// scored, the first ones.
pub fn score(
    engine: &mut Engine,
    store: &ParameterStore,
    document: &[u32],
    windows: Windows,
    limit: u64,
) -> Result<LossSum> {
    let Windows { window, stride } = windows;
    ensure!(stride > 0 && stride <= window, "the stride must be between 1 and the window");
    let targets = (document.len().saturating_sub(1) as u64).min(limit) as usize;
    let mut total = LossSum::default();
    let rows_at_once = (TOKENS_AT_ONCE / window).max(1);
    let (mut begin, mut scored) = (0, 0);
    while scored < targets {
        // Rows of one length go together; the document's last window may be alone and shorter.
        let (mut inputs, mut wanted, mut rows) = (Vec::new(), Vec::new(), 0);
        let time = window.min(targets - begin);
        while rows < rows_at_once && scored < targets && window.min(targets - begin) == time {
            inputs.extend_from_slice(&document[begin..begin + time]);
            let masked = scored - begin;
            wanted.extend(std::iter::repeat_n(IGNORE, masked));
            wanted.extend_from_slice(&document[begin + masked + 1..=begin + time]);
            scored = begin + time;
            begin += stride;
            rows += 1;
        }
        total += engine.loss(store, Batch { inputs: &inputs, targets: &wanted, rows, documents: Documents::Whole })?;
    }
    Ok(total)
}
