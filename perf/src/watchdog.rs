//! Ends a run that stands still: an open that nobody answers would wait for ever.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::thread;
use std::time::{Duration, Instant};

use std::io::{IsTerminal, Write};

/// No step takes longer than this, even on a busy machine.
const STEP_MAX: Duration = Duration::from_secs(120);

static STEP: Mutex<Option<(Instant, String)>> = Mutex::new(None);

/// Says what is done now; shown on a terminal.
pub fn step(what: impl Into<String>) {
    let what = what.into();
    let mut error = std::io::stderr();
    if error.is_terminal() {
        // Back to the line's start, and clear it.
        let _ = write!(error, "\r\x1b[K{what}");
        let _ = error.flush();
    }
    *STEP.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), what));
}

/// Clears the line that [`step`] showed.
pub fn clear() {
    if std::io::stderr().is_terminal() {
        eprint!("\r\x1b[K");
    }
}

/// Watches from a thread of its own until the process ends.
pub fn start() {
    thread::spawn(|| {
        loop {
            thread::sleep(Duration::from_secs(1));
            let step = STEP.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if let Some((since, what)) = step
                && since.elapsed() > STEP_MAX
            {
                eprintln!("error: `{what}` takes longer than {} s", STEP_MAX.as_secs());
                // As the first process of its PID namespace it takes all others along; the kernel then
                // lets go of what fanotify held.
                std::process::exit(1);
            }
        }
    });
}
