//! Ctrl-C while text is written: the text ends where it is, and so does the command, with the shell's exit code for it.

use anyhow::{Context, Result};
use signal_hook::consts::SIGINT;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What a shell says of a process that Ctrl-C ended: 128 and the signal's number.
pub const EXIT_CODE: u8 = 130;

/// Whether someone pressed Ctrl-C. A second one, before the first has been heeded, ends the process at once.
pub struct StopSignal(Arc<AtomicBool>);

impl StopSignal {
    pub fn install() -> Result<Self> {
        let flag = Arc::new(AtomicBool::new(false));
        let register = || {
            signal_hook::flag::register_conditional_shutdown(SIGINT, EXIT_CODE.into(), Arc::clone(&flag))?;
            signal_hook::flag::register(SIGINT, Arc::clone(&flag))
        };
        register().context("cannot install the signal handler")?;
        Ok(Self(flag))
    }

    pub fn requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// From here on the first signal sets the flag.
    pub fn heed(&self) {
        self.0.store(false, Ordering::Relaxed);
    }

    /// From here on, while nothing is written, a signal ends the process at once.
    pub fn leave_at_once(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
