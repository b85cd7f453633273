//! How far something is that takes long, on the terminal where stderr is one. It leaves nothing behind.

use indicatif::{ProgressBar, ProgressStyle};
use std::time::Duration;

/// Shown until it is cleared.
#[derive(Clone)]
pub struct Progress(ProgressBar);

impl Progress {
    /// For so many bytes, where that is known; `done` is the word for those that are, like `sent`.
    pub fn of_bytes(len: Option<u64>, done: &str) -> Self {
        match len {
            Some(len) => Self::start(
                ProgressBar::new(len),
                &format!("{{bar:30}} {{bytes}} of {{total_bytes}} {done}, {{eta}} left"),
            ),
            None => {
                Self::start(ProgressBar::new_spinner(), &format!("{{spinner}} {{bytes}} {done}"))
            }
        }
    }

    /// For what tells nothing until it is done.
    pub fn of_work(what: &str) -> Self {
        Self::start(ProgressBar::new_spinner(), &format!("{{spinner}} {what}, {{elapsed}}"))
    }

    /// For what is a part of something else that is shown.
    pub fn hidden() -> Self {
        Self(ProgressBar::hidden())
    }

    fn start(bar: ProgressBar, template: &str) -> Self {
        let progress = Self(bar);
        progress.say(template);
        progress.0.enable_steady_tick(Duration::from_millis(200));
        progress
    }

    /// Changes the words; the format is indicatif's.
    pub fn say(&self, template: &str) {
        if let Ok(style) = ProgressStyle::with_template(template) {
            self.0.set_style(style);
        }
    }

    /// So many bytes more are done.
    pub fn add(&self, bytes: usize) {
        self.0.inc(bytes as u64);
    }

    /// Takes it off the terminal: something else is to be written there.
    pub fn clear(&self) {
        self.0.finish_and_clear();
    }
}
