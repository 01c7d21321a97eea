//! The length of one pass over running text: known only after all of it has been tokenised.

use super::data_set::DataSet;
use super::position::Identity;
use super::stream::{StreamSettings, TokenStream, identity, too_few};
use super::tokenizer::TextTokenizer;
use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Where a length comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Basis {
    #[default]
    Counted,
    /// From the tokens a byte of a part of the data.
    Estimated,
}

/// One epoch's tokens. Every epoch of the same data and settings has as many, whatever its order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pass {
    pub tokens: u64,
    /// Only what was counted is ever stored.
    #[serde(skip)]
    pub basis: Basis,
    /// What the number is of.
    identity: Identity,
}

impl Pass {
    /// Reads and tokenises an epoch. `told` hears the tokens so far and the part that has been read, from 0 to 1.
    ///
    /// # Errors
    /// When the data cannot be read, or do not fill one row.
    pub fn count(
        data: &Arc<DataSet>,
        tokenizer: Option<&TextTokenizer>,
        settings: &StreamSettings,
        told: &mut dyn FnMut(u64, f64),
    ) -> Result<Self> {
        let tokens = TokenStream::open(Arc::clone(data), tokenizer, settings, None)?.count_epoch(told)?;
        Self::new(tokens, Basis::Counted, data, tokenizer, settings)
    }

    /// Reads and tokenises the beginning of an epoch.
    ///
    /// # Errors
    /// As [`Self::count`].
    pub fn estimate(data: &Arc<DataSet>, tokenizer: Option<&TextTokenizer>, settings: &StreamSettings) -> Result<Self> {
        let tokens = TokenStream::open(Arc::clone(data), tokenizer, settings, None)?.estimate_epoch()?;
        Self::new(tokens, Basis::Estimated, data, tokenizer, settings)
    }

    fn new(
        tokens: u64,
        basis: Basis,
        data: &DataSet,
        tokenizer: Option<&TextTokenizer>,
        settings: &StreamSettings,
    ) -> Result<Self> {
        ensure!(tokens > settings.sequence_length as u64, too_few(data, tokens, settings.sequence_length));
        Ok(Self { tokens, basis, identity: identity(data, tokenizer, settings) })
    }

    /// Whether the number is of these data under these settings.
    pub fn is_of(&self, data: &DataSet, tokenizer: Option<&TextTokenizer>, settings: &StreamSettings) -> bool {
        self.identity == identity(data, tokenizer, settings)
    }

    /// Rows of a pass: neighbours share a token, and what does not fill a row is dropped.
    pub fn rows(&self) -> u64 {
        (self.tokens - 1) / self.identity.sequence_length
    }
}
