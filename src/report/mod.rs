//! What people look at during and after training: a page of charts (as a file, or live), pictures, tables, the list of runs.

mod block;
mod describe;
mod find;
mod follow;
pub mod page;
pub mod picture;
mod rows;
pub mod server;
mod state;
pub mod tables;
mod thin;

pub use describe::Description;
pub use find::{Found, find};
pub use picture::COLOURS;
pub use rows::Rows;
pub use state::{State, Summary};

use anyhow::Result;

/// A run as a report shows it.
pub struct RunReport {
    pub description: Description,
    pub rows: Rows,
}

impl RunReport {
    /// Reads all that a run has written down.
    pub fn read(found: &Found) -> Result<Self> {
        Ok(Self { description: Description::read(found)?, rows: Rows::read(&found.path)? })
    }
}
