//! Somebody else's clamd, reached through its socket.
//!
//! It has none of what a clamd of our own has: no sandbox of ours, limits and a memory of its own, and it loads
//! other signatures when it likes. So each scan asks for its version before and after, and while nobody scans
//! [`Watch`] asks. Another version, or no clamd, ends this process: the next one has the generation that then is.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process;
use std::sync::{Arc, Mutex, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use flate2::Compression;
use flate2::write::GzEncoder;
use seawall_engine::content::SharedContent;
use seawall_engine::runtime::LoadError;
use seawall_engine::{Diagnostic, Generation};

use crate::session::{Answer, PULSE, Session, changed};

/// A clamd that does not answer for so long at the start is given up; below the service's own limit for it.
const PATIENCE: Duration = Duration::from_secs(100);
/// The same for one that has answered before.
const SILENCE: Duration = Duration::from_secs(30);

/// Levels of archives in one another: more than any clamd may go down (MaxRecursion, at most 100).
const BEYOND_ALL_LIMITS: usize = 120;

/// An archive in an archive in an archive, to see what a clamd does beyond its limits.
fn nested(levels: usize) -> io::Result<Vec<u8>> {
    (0..levels).try_fold(b"nothing".to_vec(), |content, _| {
        let mut outer = GzEncoder::new(Vec::new(), Compression::none());
        outer.write_all(&content)?;
        outer.finish()
    })
}

/// A clamd that answers.
pub struct System {
    /// As it tells it.
    pub version: String,
    /// One for each worker.
    pub sessions: Vec<Session>,
    /// What a person should know of it.
    pub warnings: Vec<Diagnostic>,
    tells_limits: bool,
}

impl System {
    /// Connects, waits until it answers, and has it scan something.
    pub fn connect(socket: &Path, threads: u32) -> Result<Self, LoadError> {
        let failed = |error: &io::Error| {
            LoadError::from(
                Diagnostic::error("clamav-socket", explain(socket, error)).in_file(socket),
            )
        };
        Self::try_connect(socket, threads).map_err(|error| failed(&error))
    }

    fn try_connect(socket: &Path, threads: u32) -> io::Result<Self> {
        let until = Instant::now() + PATIENCE;
        let mut go_on = || {
            let words = "it takes connections and does not answer: it loads its signatures, or it is stopped";
            if Instant::now() < until { Ok(()) } else { Err(io::Error::other(words)) }
        };
        let mut sessions = Vec::new();
        let mut version = String::new();
        for _ in 0..threads.max(1) {
            let mut session = Session::connect(socket)?;
            version = session.version(&mut go_on)?;
            sessions.push(session);
        }
        let mut probe = |content: &[u8]| {
            let content = SharedContent::new(content)?;
            sessions[0].scan_as(&version, content.descriptor()?, &mut go_on)
        };
        if let Answer::Error(words) = probe(b"seawall")? {
            let why = format!("it cannot scan what is passed to it as a descriptor: {words}");
            return Err(io::Error::other(why));
        }
        let tells_limits = probe(&nested(BEYOND_ALL_LIMITS)?)? != Answer::Clean;
        let mut warnings = Vec::new();
        if !tells_limits {
            let reason = "this clamd calls content clean where it goes beyond its limits; set \
                          `AlertExceedsMax yes` in its configuration";
            warnings.push(Diagnostic::warning("clamav-limits", reason).in_file(socket));
        }
        if !version.contains('/') {
            let reason = "this clamd has no signatures that carry a number (daily.cvd): that its signatures \
                          change is not noticed";
            warnings.push(Diagnostic::warning("clamav-version", reason).in_file(socket));
        }
        Ok(Self { version, sessions, warnings, tells_limits })
    }

    /// What is known of its signatures: the version it tells, with the number and date of daily.cvd.
    pub fn generation(&self) -> Generation {
        let mut hasher = blake3::Hasher::new();
        let limits = if self.tells_limits { "told" } else { "silent" };
        for text in ["clamd of the system", env!("CARGO_PKG_VERSION"), &self.version, limits] {
            hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
        }
        Generation(*hasher.finalize().as_bytes())
    }
}

/// What to do about it.
fn explain(socket: &Path, error: &io::Error) -> String {
    let is_socket = fs::metadata(socket).map(|about| about.file_type().is_socket());
    match error.kind() {
        io::ErrorKind::NotFound => {
            "there is no such socket: clamd is not running, or its LocalSocket is elsewhere".into()
        }
        _ if matches!(is_socket, Ok(false)) => "this is no socket".into(),
        io::ErrorKind::ConnectionRefused => "nobody listens: clamd is not running".into(),
        io::ErrorKind::PermissionDenied => "this user may not connect: see LocalSocketMode and \
             LocalSocketGroup in clamd.conf, and the folders on the way to it"
            .into(),
        _ => error.to_string(),
    }
}

/// Keeps idle sessions alive and ends this process when they are worth nothing any more.
pub struct Watch {
    /// The version that counts.
    pub version: String,
    /// Those of the workers; one that is locked is in use.
    pub sessions: Vec<Arc<Mutex<Session>>>,
}

impl Watch {
    /// Starts its thread.
    pub fn start(self) -> io::Result<()> {
        thread::Builder::new().name("watch".into()).spawn(move || self.run()).map(drop)
    }

    fn run(&self) {
        loop {
            thread::sleep(PULSE);
            for session in &self.sessions {
                match session.try_lock() {
                    Ok(mut session) => {
                        if let Err(error) = self.ask(&mut session) {
                            drop(session);
                            self.end(&error);
                        }
                    }
                    // In use: the scan itself finds out.
                    Err(TryLockError::WouldBlock) => {}
                    Err(TryLockError::Poisoned(_)) => {
                        self.end(&io::Error::other("a scan panicked"))
                    }
                }
            }
        }
    }

    fn ask(&self, session: &mut Session) -> io::Result<()> {
        let until = Instant::now() + SILENCE;
        let told = session.version(|| {
            let words = "clamd does not answer";
            if Instant::now() < until { Ok(()) } else { Err(io::Error::other(words)) }
        })?;
        if told == self.version {
            Ok(())
        } else {
            Err(io::Error::other(changed(&self.version, &told)))
        }
    }

    /// Scans in work end first: their answers count.
    fn end(&self, why: &io::Error) -> ! {
        let _all: Vec<_> = self.sessions.iter().map(|session| session.lock()).collect();
        eprintln!("{why}");
        process::exit(1)
    }
}
