//! The Hugging Face Hub: listings, whole files in the shared cache layout, and byte ranges that survive a bad network.
//!
//! ```no_run
//! use vrtrain::hub::{Hub, RepoId, RepoKind};
//! # fn main() -> Result<(), vrtrain::hub::HubError> {
//! let hub = Hub::from_env()?;
//! let repo = RepoId::parse(RepoKind::Dataset, "HuggingFaceFW/fineweb-edu")?;
//! for file in hub.list(&repo)?.matching("sample/10BT/*.parquet")? {
//!     let remote = hub.open(&repo, &file);
//!     let footer = remote.read(remote.len().saturating_sub(8)..remote.len())?;
//!     println!("{} {} {footer:?}", file.path, file.size);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Everything blocks and may be called from any thread. Nothing is taken on trust: a whole file is compared with its
//! size and hash, a range with its `Content-Range`, the file's size and the hash that the hub names for it.

mod answer;
mod cache;
mod download;
mod error;
mod hash;
mod http;
mod listing;
mod ranges;
mod remote;
mod repo;
mod retry;
mod settings;
mod source;

#[cfg(test)]
mod lookalike_tests;
#[cfg(test)]
mod network_tests;
#[cfg(test)]
mod test_server;

pub use error::HubError;
pub use listing::{HubFile, Listing};
pub use ranges::RangeCache;
pub use remote::RemoteFile;
pub use repo::{RepoId, RepoKind};
pub use retry::RetryPolicy;
pub use settings::{Mode, Settings};

use cache::HubCache;
use http::Transport;
use std::sync::Arc;

type Result<T> = std::result::Result<T, HubError>;

/// A client: cheap to clone, all clones share connections and caches.
#[derive(Clone)]
pub struct Hub {
    inner: Arc<Inner>,
}

struct Inner {
    settings: Settings,
    transport: Transport,
    cache: HubCache,
    ranges: RangeCache,
}

impl Hub {
    /// A client set up by the variables that other Hugging Face tools read too (see [`Settings::from_env`]).
    pub fn from_env() -> Result<Self> {
        Self::new(Settings::from_env()?)
    }

    pub fn new(settings: Settings) -> Result<Self> {
        let transport = Transport::new(&settings)?;
        let cache = HubCache::new(settings.cache.clone());
        let ranges = RangeCache::new(settings.own_folder().join("ranges"), settings.range_cache_bytes);
        Ok(Self { inner: Arc::new(Inner { settings, transport, cache, ranges }) })
    }

    pub fn settings(&self) -> &Settings {
        &self.inner.settings
    }
}
