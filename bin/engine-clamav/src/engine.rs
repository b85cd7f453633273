//! clamd's answers as an engine's reports.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use seawall_engine::runtime::{Engine, Request, ScanError, Scanner, Start};
use seawall_engine::{Description, Detection, Diagnostic, Generation, Outcome, Severity};

use crate::Arguments;
use crate::clamd::{CONTENT_MAX_MIB, Clamd, digest};
use crate::session::{Answer, Session};

/// What clamd calls content of which it has not looked at everything.
/// Bytes that must be free where clamd unpacks.
const ROOM: u64 = 64 << 20;
const BEYOND: &str = "Heuristics.Limits.Exceeded";

/// A clamd that is loaded, and a session for each worker.
pub struct Clamav {
    /// Where clamd unpacks.
    folder: OwnedFd,
    sockets: Vec<Arc<UnixStream>>,
    /// Those that no worker has taken.
    sessions: Mutex<Vec<Session>>,
    description: Description,
    /// Lives as long as this process.
    _clamd: Clamd,
}

impl Clamav {
    /// Starts clamd and waits until it has loaded its database.
    pub fn load(arguments: &Arguments, start: &Start) -> Result<Self, Vec<Diagnostic>> {
        Self::try_load(arguments, start).map_err(|error| {
            let mut one = Diagnostic::error("clamav-start", error.to_string());
            one.file = arguments.database.display().to_string();
            vec![one]
        })
    }

    fn try_load(arguments: &Arguments, start: &Start) -> io::Result<Self> {
        let before = digest(&arguments.database, &[])?;
        let mut clamd = Clamd::start(arguments, start.threads)?;
        let (mut sockets, mut sessions) = (Vec::new(), Vec::new());
        let mut version = String::new();
        for _ in 0..start.threads.max(1) {
            let mut session = clamd.session()?;
            let told = session.version(|| clamd.check());
            // The end of the session is the end of clamd, which says more.
            version = match told {
                Ok(version) => version,
                Err(error) => {
                    std::thread::sleep(crate::clamd::LOOK);
                    clamd.check()?;
                    return Err(error);
                }
            };
            sockets.push(session.socket());
            sessions.push(session);
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
        let folder = clamd.folder()?;
        let version = version.strip_prefix("ClamAV ").unwrap_or(&version).to_owned();
        let description = Description {
            name: "clamav".into(),
            version,
            generation,
            by_name: false,
            rules: clamd.signatures().unwrap_or(0),
            diagnostics: Vec::new(),
            omitted: 0,
        };
        Ok(Self { folder, sockets, sessions: Mutex::new(sessions), description, _clamd: clamd })
    }
}

impl Engine for Clamav {
    fn describe(&self) -> Description {
        self.description.clone()
    }

    fn scanner(&self) -> Box<dyn Scanner + '_> {
        let mut sessions = self.sessions.lock().unwrap_or_else(PoisonError::into_inner);
        Box::new(Worker { session: sessions.pop(), folder: self.folder.as_fd() })
    }

    fn sockets(&self) -> Vec<BorrowedFd<'_>> {
        self.sockets.iter().map(|socket| socket.as_fd()).collect()
    }
}

/// One worker and its session.
struct Worker<'a> {
    folder: BorrowedFd<'a>,
    /// None after a panic: the session may be in the midst of an answer.
    session: Option<Session>,
}

impl Worker<'_> {
    /// Whether there is room to unpack. Without it clamd takes some archives for what it could write of them.
    fn has_room(&self) -> bool {
        rustix::fs::fstatvfs(self.folder).is_ok_and(|space| space.f_bavail * space.f_frsize > ROOM)
    }
}

impl Scanner for Worker<'_> {
    fn scan(&mut self, request: &Request<'_>) -> Result<Outcome, ScanError> {
        let broken = |reason: String| ScanError::Broken { reason };
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
        let session = self.session.as_mut().ok_or_else(|| broken("no session is left".into()))?;
        match session.scan(request.content.descriptor()) {
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
            Err(error) => Err(broken(format!("clamd is gone: {error}"))),
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
