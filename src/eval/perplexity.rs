//! Perplexity of a model on token ids: consecutive windows, every target scored once.

use crate::model::{Batch, Documents, Engine, LossSum};
use crate::params::ParameterStore;
use anyhow::{Result, ensure};

/// Targets of one forward pass, at most.
const TOKENS_AT_ONCE: usize = 4096;

/// Negative log-likelihood of `document` in windows of `window` + 1 tokens with stride `window`.
///
/// The first token has nothing before it and is no target; the last window may be shorter. At most `limit` targets are
/// scored, the first ones.
pub fn score(
    engine: &mut Engine,
    store: &ParameterStore,
    document: &[u32],
    window: usize,
    limit: u64,
) -> Result<LossSum> {
    ensure!(window > 0, "a window needs at least one target");
    let targets = (document.len().saturating_sub(1) as u64).min(limit) as usize;
    let mut total = LossSum::default();
    let whole = targets / window;
    let rows_at_once = (TOKENS_AT_ONCE / window).max(1);
    let mut row = 0;
    while row < whole {
        let rows = rows_at_once.min(whole - row);
        let range = row * window..(row + rows) * window;
        let (inputs, targets) = (&document[range.clone()], &document[range.start + 1..=range.end]);
        total += engine.loss(store, Batch { inputs, targets, rows, documents: Documents::Whole })?;
        row += rows;
    }
    let rest = whole * window..targets;
    if !rest.is_empty() {
        let (inputs, targets) = (&document[rest.clone()], &document[rest.start + 1..=rest.end]);
        total += engine.loss(store, Batch { inputs, targets, rows: 1, documents: Documents::Whole })?;
    }
    Ok(total)
}
