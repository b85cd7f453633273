//! What `seawall-agent status` shows.

use crate::driver::{Driver, LastVerdict};
use seawall_fanotify::IgnoreMark;
use seawall_fanotify::probe::OverlayView;
use seawall_proto::{Heartbeat, Mode};
use serde::{Deserialize, Serialize};
use std::fmt::Write;
use std::sync::atomic::Ordering;

/// A file system that is not watched.
#[derive(Debug, Serialize, Deserialize)]
pub struct NotCovered {
    pub mount_point: String,
    pub fs_type: String,
    pub reason: String,
}

/// The driver's state.
#[derive(Debug, Serialize, Deserialize)]
pub struct Status {
    pub protected: bool,
    /// Why not, when it is not.
    pub reason: Option<String>,
    /// The name by which the host knows this guest.
    pub guest: Option<String>,
    pub link: String,
    /// How content reaches the host.
    pub content: String,
    pub generation: u64,
    pub worker: u32,
    pub supervisor: u32,
    pub supervised: bool,
    /// Which accesses policy has held, and what it has scanned besides.
    pub mode: Mode,
    pub ignore_mark: String,
    pub overlay: String,
    pub covered: u32,
    pub not_covered: Vec<NotCovered>,
    pub events: u64,
    pub passed: u64,
    pub remembered: u64,
    pub requests: u64,
    /// Of these, known content that was asked for in the ring.
    pub in_ring: u64,
    pub denied: u64,
    pub unscanned: u64,
    pub overloaded: u64,
    /// Closes after writing.
    pub closes: u64,
    /// Files that wait for a scan in the background, or are being sent for one.
    pub in_background: usize,
    /// Files let through unscanned that wait for their scan.
    pub exposed: u64,
    /// Of these, files that wait for whoever writes them.
    pub held_by_writer: u64,
    /// Files let through unscanned that were gone before their scan.
    pub unknown: u64,
    /// Mounts of which all files are scanned, since more were let through than could be noted.
    pub mounts_exposed: Vec<String>,
    /// Why what is exposed is forgotten with the driver's end; none when it is not.
    pub journal_in_memory: Option<String>,
    pub outstanding: u32,
    pub last_verdicts: Vec<LastVerdict>,
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).escape_debug().to_string()
}

fn mount_name(mount_point: &[u8]) -> String {
    if mount_point.is_empty() { "all file systems".into() } else { text(mount_point) }
}

impl Status {
    pub fn of(driver: &Driver, link: &str) -> Self {
        let Heartbeat {
            events,
            passed,
            remembered,
            requests,
            denied,
            unscanned,
            overloaded,
            exposed,
            held_by_writer,
            unknown,
            outstanding,
            supervised,
            ..
        } = driver.heartbeat(0, 0);
        let coverage = driver.coverage.summary();
        let journal = driver.background.shown();
        let session = driver.session();
        let mode = driver.policy().mode;
        let reason = if mode == Mode::Off {
            Some("policy has nothing scanned".into())
        } else if session.is_none() {
            Some(driver.why_no_session())
        } else if !driver.coverage.is_ready() || coverage.covered == 0 {
            Some("no file system is watched yet".into())
        } else {
            None
        };
        let not_covered = coverage.uncovered.iter().map(|uncovered| NotCovered {
            mount_point: text(&uncovered.mount_point),
            fs_type: uncovered.fs_type.clone(),
            reason: uncovered.reason.clone(),
        });
        Self {
            protected: reason.is_none(),
            reason,
            content: session.as_ref().map_or("-".into(), |session| session.content_way()),
            guest: session.map(|session| session.guest.clone()),
            link: link.to_owned(),
            generation: driver.generation().0,
            worker: std::process::id(),
            supervisor: driver.supervisor,
            supervised,
            mode,
            ignore_mark: match driver.groups.ignore {
                IgnoreMark::Evictable => "evictable",
                IgnoreMark::Plain => "plain, at most 4,096: this kernel has no evictable ones",
            }
            .into(),
            overlay:
                match OverlayView::from_number(driver.ledger.overlay().load(Ordering::Relaxed)) {
                    OverlayView::Unknown => "not needed yet",
                    OverlayView::Beneath => "held at the file systems beneath",
                    OverlayView::Itself => "marked itself",
                }
                .into(),
            covered: coverage.covered,
            not_covered: not_covered.collect(),
            events,
            passed,
            remembered,
            requests,
            in_ring: driver.counters.in_ring.load(Ordering::Relaxed),
            denied,
            unscanned,
            overloaded,
            closes: driver.counters.closes.load(Ordering::Relaxed),
            in_background: driver.background.waiting(),
            exposed,
            held_by_writer,
            unknown,
            mounts_exposed: journal.mounts.iter().map(|mount| mount_name(mount)).collect(),
            journal_in_memory: journal.in_memory,
            outstanding,
            last_verdicts: driver.last_verdicts(),
        }
    }

    /// For people.
    pub fn to_text(&self) -> String {
        let mut out = String::new();
        let _infallible = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        match &self.reason {
            None => writeln!(out, "protected")?,
            Some(reason) => writeln!(out, "NOT protected: {reason}")?,
        }
        let guest = self.guest.as_deref().unwrap_or("-");
        writeln!(
            out,
            "link          {} as guest {guest}, generation {}",
            self.link, self.generation
        )?;
        writeln!(out, "content       {}", self.content)?;
        let supervised = if self.supervised { "" } else { " (gone)" };
        writeln!(
            out,
            "processes     worker {}, supervisor {}{supervised}",
            self.worker, self.supervisor
        )?;
        writeln!(out, "mode          {}", self.mode)?;
        writeln!(out, "watched       {} file systems", self.covered)?;
        for one in &self.not_covered {
            let NotCovered { mount_point, fs_type, reason } = one;
            writeln!(out, "NOT watched   {mount_point} ({fs_type}): {reason}")?;
        }
        writeln!(out, "clean marks   {}", self.ignore_mark)?;
        writeln!(out, "overlays      {}", self.overlay)?;
        writeln!(
            out,
            "events        {} ({} passed, {} remembered, {} asked of the host, {} of them in the ring), {} held now",
            self.events,
            self.passed,
            self.remembered,
            self.requests,
            self.in_ring,
            self.outstanding
        )?;
        writeln!(
            out,
            "denied        {}\nunscanned     {} ({} by overload)",
            self.denied, self.unscanned, self.overloaded
        )?;
        writeln!(
            out,
            "background    {} files closed after writing, {} wait for a scan",
            self.closes, self.in_background
        )?;
        writeln!(
            out,
            "exposed       {} files wait for their scan, {} of them until they are written",
            self.exposed, self.held_by_writer
        )?;
        if self.unknown > 0 {
            writeln!(out, "unknown       {} files were gone before their scan", self.unknown)?;
        }
        for mount in &self.mounts_exposed {
            writeln!(out, "exposed       all files on {mount}, which are being scanned")?;
        }
        if let Some(why) = &self.journal_in_memory {
            writeln!(out, "journal       in memory, lost when the driver ends: {why}")?;
        }
        for LastVerdict { path, result } in &self.last_verdicts {
            writeln!(out, "last          {path}: {result}")?;
        }
        Ok(())
    }
}
