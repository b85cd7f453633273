//! clamd's answers as an engine's reports.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use seawall_engine::runtime::{Engine, LoadError, Request, ScanError, Scanner, Start};
use seawall_engine::{Description, Detection, Diagnostic, Generation, Outcome, Severity};

use crate::Arguments;
use crate::clamd::{CONTENT_MAX_MIB, Clamd, digest};
use crate::session::{Answer, Session};
use crate::system::{System, Watch};

/// Bytes that must be free where clamd unpacks.
const ROOM: u64 = 64 << 20;
/// What clamd calls content of which it has not looked at everything.
const BEYOND: &str = "Heuristics.Limits.Exceeded";

/// Contents that clamd has besides those it works on. Without one its threads wait while an answer goes to the
/// service and the next content comes.
const AHEAD: u32 = 1;

/// A clamd that is loaded, and a session for each worker.
pub struct Clamav {
    sockets: Vec<Arc<UnixStream>>,
    /// Those that no worker has taken.
    free: Mutex<Vec<Arc<Mutex<Session>>>>,
    description: Description,
    whose: Whose,
}

/// Whose clamd it is.
enum Whose {
    /// Ours.
    Own {
        /// Where it unpacks.
        folder: OwnedFd,
        /// Lives as long as this process.
        _clamd: Clamd,
    },
    /// Somebody else's, which may load other signatures when it likes.
    System {
        /// The version that counts.
        version: String,
        /// Started with the first scanner, when what threads may do is restricted.
        watch: Mutex<Option<Watch>>,
    },
}

impl Clamav {
    /// Connects to a clamd, or starts one and waits until it has loaded its database.
    pub fn load(arguments: &Arguments, start: &Start) -> Result<Self, LoadError> {
        match &arguments.socket {
            Some(socket) => Ok(Self::of_the_system(System::connect(socket, start.threads)?)),
            None => Self::own(arguments, start).map_err(|error| {
                let one = Diagnostic::error("clamav-start", error.to_string());
                one.in_file(&arguments.database).into()
            }),
        }
    }

    fn own(arguments: &Arguments, start: &Start) -> io::Result<Self> {
        let before = digest(&arguments.database, &[])?;
        let mut clamd = Clamd::start(arguments, start.threads)?;
        let mut sessions = Vec::new();
        let mut version = String::new();
        for _ in 0..start.threads.max(1) + AHEAD {
            let session = clamd.session().and_then(|mut session| {
                version = session.version(|| clamd.check())?;
                Ok(session)
            });
            sessions.push(session.map_err(|error| clamd.last_words(error))?);
        }
        if digest(&arguments.database, &[])? != before {
            return Err(io::Error::other("the signatures changed while they were loaded"));
        }
        // What clamd can unpack, and how far it goes, is part of what it finds.
        let limits =
            [arguments.scan_size, arguments.recursion, arguments.files].map(|n| n.to_string());
        let mut more = vec![env!("CARGO_PKG_VERSION"), version.as_str()];
        more.extend(limits.iter().map(String::as_str));
        let generation = Generation(digest(&arguments.database, &more)?);
        let description =
            describe(&version, generation).with_rules(clamd.signatures().unwrap_or(0).into());
        let whose = Whose::Own { folder: clamd.folder()?, _clamd: clamd };
        Ok(Self::with(sessions, description, |_| whose))
    }

    fn of_the_system(system: System) -> Self {
        // How many signatures it has loaded it does not tell.
        let description =
            describe(&system.version, system.generation()).with_diagnostics(system.warnings);
        let version = system.version;
        Self::with(system.sessions, description, |sessions| {
            let watch = Watch { version: version.clone(), sessions };
            Whose::System { version, watch: Mutex::new(Some(watch)) }
        })
    }

    fn with(
        sessions: Vec<Session>,
        description: Description,
        whose: impl FnOnce(Vec<Arc<Mutex<Session>>>) -> Whose,
    ) -> Self {
        let sockets = sessions.iter().map(Session::socket).collect();
        let shared: Vec<_> =
            sessions.into_iter().map(|session| Arc::new(Mutex::new(session))).collect();
        let whose = whose(shared.clone());
        Self { sockets, free: Mutex::new(shared), description, whose }
    }
}

fn describe(version: &str, generation: Generation) -> Description {
    Description::new("clamav", version.strip_prefix("ClamAV ").unwrap_or(version), generation)
        .with_by_descriptor(true)
}

impl Engine for Clamav {
    fn describe(&self) -> Description {
        self.description.clone()
    }

    fn scanner(&self) -> Result<Box<dyn Scanner + '_>, LoadError> {
        if let Whose::System { watch, .. } = &self.whose
            && let Some(watch) = lock(watch).take()
        {
            watch.start()?;
        }
        Ok(Box::new(Worker { session: lock(&self.free).pop(), whose: &self.whose }))
    }

    fn sockets(&self) -> Vec<BorrowedFd<'_>> {
        self.sockets.iter().map(|socket| socket.as_fd()).collect()
    }

    fn ahead(&self) -> u32 {
        match self.whose {
            Whose::Own { .. } => AHEAD,
            // How many threads it has it does not tell.
            Whose::System { .. } => 0,
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One worker and its session.
struct Worker<'a> {
    whose: &'a Whose,
    /// None after a panic: the session may be in the midst of an answer.
    session: Option<Arc<Mutex<Session>>>,
}

impl Worker<'_> {
    /// Whether there is room to unpack. Without it clamd takes some archives for what it could write of them.
    /// Where somebody else's unpacks is not known.
    fn has_room(&self) -> bool {
        let Whose::Own { folder, .. } = self.whose else { return true };
        rustix::fs::fstatvfs(folder).is_ok_and(|space| space.f_bavail * space.f_frsize > ROOM)
    }

    fn ask(&self, content: BorrowedFd<'_>) -> io::Result<Answer> {
        let none = || io::Error::other("no session is left");
        let mut session = lock(self.session.as_ref().ok_or_else(none)?);
        match self.whose {
            Whose::Own { .. } => session.scan(content),
            Whose::System { version, .. } => session.scan_as(version, content, || Ok(())),
        }
    }
}

impl Scanner for Worker<'_> {
    fn scan(&mut self, request: &Request<'_>) -> Result<Outcome, ScanError> {
        if request.content.is_empty() {
            return Ok(Outcome::Clean);
        }
        if request.content.len() > CONTENT_MAX_MIB << 20 {
            let reason = format!("larger than clamd takes ({CONTENT_MAX_MIB} MiB)");
            return Err(ScanError::Failed { reason });
        }
        if request.is_cancelled() {
            return Err(ScanError::Cancelled);
        }
        let had_room = self.has_room();
        // clamd cannot be told to stop. Its answer is waited for, so that the service counts what it holds
        // and ends what takes too long.
        let Some(content) = request.content.descriptor() else {
            let reason = "content for clamd came without a descriptor".into();
            return Err(ScanError::Failed { reason });
        };
        match self.ask(content) {
            Ok(Answer::Clean) if had_room && self.has_room() => Ok(Outcome::Clean),
            Ok(Answer::Clean) => {
                let reason = "no room where clamd unpacks: it may not have seen everything".into();
                Err(ScanError::Failed { reason })
            }
            Ok(Answer::Found(name)) if name.starts_with(BEYOND) => {
                let reason = format!("not all of it was looked at: {name}");
                Err(ScanError::Failed { reason })
            }
            Ok(Answer::Found(name)) => Ok(Outcome::Infected(vec![detection(&name)])),
            Ok(Answer::Error(words)) => {
                Err(ScanError::Failed { reason: format!("clamd: {words}") })
            }
            Err(error) => {
                Err(ScanError::Broken { reason: format!("clamd is of no more use: {error}") })
            }
        }
    }
}

/// `Platform.Category.Family-ID-Revision`, as ClamAV's own signatures are named.
fn detection(name: &str) -> Detection {
    let severity = match name.split('.').next() {
        Some("PUA") => Severity::Low,
        Some("Heuristics") => Severity::Medium,
        _ => Severity::High,
    };
    let family = name.split('.').nth(2).and_then(|family| family.split('-').next());
    let family = family.filter(|family| !family.is_empty() && *family != "UNOFFICIAL");
    Detection { severity, family: family.map(str::to_owned), ..Detection::new(name) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_severity_and_family() {
        for (name, severity, family) in [
            ("Win.Trojan.Agent-123-0", Severity::High, Some("Agent")),
            ("PUA.Win.Packer.Upx-4", Severity::Low, Some("Packer")),
            ("Heuristics.Phishing.Email", Severity::Medium, Some("Email")),
            ("Test.Word.UNOFFICIAL", Severity::High, None),
            ("Eicar-Signature", Severity::High, None),
        ] {
            let found = detection(name);
            assert_eq!((found.severity, found.family.as_deref()), (severity, family), "{name}");
        }
    }
}
