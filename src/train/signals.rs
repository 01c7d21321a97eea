//! SIGINT and SIGTERM: finish the step, save, exit 3. A second signal ends the process at once.

use anyhow::{Context, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether someone asked the run to stop.
#[derive(Clone, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Registers the handlers. After the first signal a second one takes its default action.
    pub fn install() -> Result<Self> {
        use signal_hook::consts::{SIGINT, SIGTERM};
        let flag = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            let register = || {
                signal_hook::flag::register_conditional_default(signal, Arc::clone(&flag))?;
                signal_hook::flag::register(signal, Arc::clone(&flag))
            };
            register().context("cannot install the signal handlers")?;
        }
        Ok(Self(flag))
    }

    pub fn requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}
