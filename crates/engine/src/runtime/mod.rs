//! The engine's side: what a process does from its start to its last scan.
//!
//! [`run`] owns the process: the socket, the sandbox, the worker threads. An engine owns its
//! signatures and says what it found.
//!
//! ```text
//!  Start ──► load signatures ──► landlock ──► workers build and warm their scanners ──► seccomp
//!               │ cannot                                                                   │
//!               ▼                                                                          ▼
//!            Failed, exit                                       Ready ──► each worker: Scan → Started,
//!                                                                         Report; end of file → exit
//! ```
//!
//! There is no way back: new signatures are a new process. After the sandbox no thread can be
//! started and no executable memory be made, so a [`Scanner`] starts what it needs when it is built
//! or in its first scan, which is one of empty content before the sandbox.

mod error;
mod helper;
mod line;
mod sandbox;

use std::any::Any;
use std::env;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::{Arc, Barrier, mpsc};
use std::thread;
use std::time::{Duration, Instant};

pub use error::{LoadError, ScanError};
use error::{StartError, chain};
pub use helper::{HelperFolders, start_helper};
pub use sandbox::SandboxError;

use crate::FD_VARIABLE;
use crate::content::Content;
use crate::protocol::{
    Answer, MAX_TO_ENGINE, ProtocolError, Scan, ToEngine, ToHost, decode_to_engine, encode_to_host,
};
pub use crate::protocol::{Limits, Start};
use crate::report::{Description, Diagnostic, Metadata, Operation, Outcome};
use crate::sys;
use line::{Line, Turn};

/// Signatures, loaded and shared by all workers.
pub trait Engine: Send + Sync {
    /// Name, version, generation, and what could not be loaded.
    fn describe(&self) -> Description;

    /// A scanner for one worker thread. Called on that thread, before the sandbox; called again
    /// inside it when a scan has panicked.
    ///
    /// # Errors
    /// There can be none: the engine does not run.
    fn scanner(&self) -> Result<Box<dyn Scanner + '_>, LoadError>;

    /// Sockets made while it loaded that scans talk through: sendmsg(2) and recvmsg(2) are allowed on
    /// these, and on no others.
    fn sockets(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    /// Scanners above the threads that the service wishes: for an engine that hands its contents on to somebody
    /// who works on as many of them as there are threads, in the order in which they come, and who finds the
    /// next one waiting when one ends. The time limit of such a content begins when one before it has ended.
    fn ahead(&self) -> u32 {
        0
    }
}

/// What one worker scans with, one content after the other.
pub trait Scanner {
    /// Looks at the whole content. Where that is possible, it ends early with [`ScanError::TimedOut`] when
    /// [`Request::left`] is nearly used up, and with [`ScanError::Cancelled`] when
    /// [`Request::is_cancelled`].
    fn scan(&mut self, request: &Request<'_>) -> Result<Outcome, ScanError>;
}

/// One content to look at.
pub struct Request<'a> {
    /// The bytes.
    pub content: &'a Content,
    /// What is known of the file besides.
    pub metadata: &'a Metadata,
    /// How long this scan may take from its start; then the process is killed.
    pub limit: Duration,
    turn: &'a Turn,
    cancelled: Option<&'a sys::Numbers>,
}

impl Request<'_> {
    /// How long this scan may still take; zero when its process is about to be killed.
    pub fn left(&self) -> Duration {
        let used = self.turn.since.get().map(Instant::elapsed);
        self.limit.saturating_sub(used.unwrap_or_default())
    }

    /// Whether nobody wants the report any more. Costs one read of memory: ask as often as you like.
    pub fn is_cancelled(&self) -> bool {
        let id = self.turn.id;
        self.cancelled.is_some_and(|numbers| numbers.get(id) == id)
    }
}

/// Runs an engine until the service closes the socket. Call it from `main`, before any thread is
/// started. `load` gets the service's wishes and returns the loaded engine, or why there is none.
///
/// An engine whose [`Description`] holds errors is refused when the service asked for a strict
/// start; `load` need not care.
pub fn run<E, F>(load: F) -> ExitCode
where
    E: Engine,
    F: FnOnce(&Start) -> Result<E, LoadError>,
{
    match inherited_socket() {
        Ok(socket) => match serve(&socket, load) {
            Ok(()) | Err(StartError::Gone) => ExitCode::SUCCESS,
            Err(error) => {
                report_failure(&socket, error);
                ExitCode::FAILURE
            }
        },
        Err(error) => {
            eprintln!("{}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

/// Takes over the socket that the service left to this process. [`run`] does it; public for what
/// speaks [`crate::protocol`] without the runtime. Call it once.
pub fn inherited_socket() -> io::Result<OwnedFd> {
    let wrong = || io::Error::other(format!("{FD_VARIABLE} names no SOCK_SEQPACKET socket"));
    let number = env::var(FD_VARIABLE).map_err(|_| {
        let text = format!("{FD_VARIABLE} is not set: an engine is started by the service");
        io::Error::new(io::ErrorKind::NotFound, text)
    })?;
    let socket = sys::adopt(number.parse().map_err(|_| wrong())?).map_err(|_| wrong())?;
    match sys::socket_type(socket.as_fd()) {
        Ok(libc::SOCK_SEQPACKET) => Ok(socket),
        _ => Err(wrong()),
    }
}

/// From Start to the end.
fn serve<E, F>(socket: &OwnedFd, load: F) -> Result<(), StartError>
where
    E: Engine,
    F: FnOnce(&Start) -> Result<E, LoadError>,
{
    sys::harden_process()?;
    let (start, cancelled) = receive_start(socket.as_fd())?;
    sys::limit_memory(start.limits.memory)?;
    let engine = catch_unwind(AssertUnwindSafe(|| load(&start)))
        .unwrap_or_else(|panic| {
            let reason = format!("loading panicked: {}", panic_text(&*panic));
            Err(LoadError::new("engine-panic", reason))
        })
        .map_err(|error| StartError::Refused(error.into_diagnostics()))?;
    let mut description = engine.describe();
    if start.strict && description.has_errors() {
        return Err(StartError::Refused(description.diagnostics));
    }
    // In front: a long list of others must not push it out of the message.
    if let Some(warning) = sandbox::enter_landlock()? {
        description.diagnostics.insert(0, warning);
    }
    let threads = start.threads.max(1);
    let line = Line::new(socket.as_fd(), threads);
    let own = Own { socket: socket.as_fd(), engine: &engine, cancelled: &cancelled, line };
    work(&own, threads.saturating_add(engine.ahead()), description)
}

/// What all workers share.
struct Own<'a, E> {
    socket: BorrowedFd<'a>,
    engine: &'a E,
    cancelled: &'a sys::Numbers,
    line: Line<'a>,
}

fn receive_start(socket: BorrowedFd<'_>) -> Result<(Start, sys::Numbers), StartError> {
    let mut buffer = vec![0; MAX_TO_ENGINE];
    let received = sys::receive(socket, &mut buffer, true, true)?;
    if received.length == 0 {
        return Err(StartError::Gone);
    }
    if received.cut {
        return Err(ProtocolError::TooLong { most: MAX_TO_ENGINE }.into());
    }
    match decode_to_engine(&buffer[..received.length], true)?.0 {
        ToEngine::Start(start) => {
            let page = received.fd.ok_or(StartError::NoPage)?;
            Ok((start, sys::Numbers::map(page.as_fd())?))
        }
        ToEngine::Scan(_) | ToEngine::Ping => Err(StartError::NoStart),
    }
}

/// Starts the workers, closes the sandbox around them, says Ready, and waits for their end.
fn work<E: Engine>(
    own: &Own<'_, E>,
    workers: u32,
    description: Description,
) -> Result<(), StartError> {
    let socket = own.socket;
    let (warm, warmed) = mpsc::channel();
    let sealed = Arc::new(Barrier::new(workers as usize + 1));
    thread::scope(|scope| {
        for number in 0..workers {
            let (warm, sealed) = (warm.clone(), Arc::clone(&sealed));
            let body = move || worker(own, &warm, &sealed);
            if let Err(error) =
                thread::Builder::new().name(format!("scan-{number}")).spawn_scoped(scope, body)
            {
                give_up(socket, error.into());
            }
        }
        for _ in 0..workers {
            if let Ok(Err(refused)) = warmed.recv() {
                give_up(socket, StartError::Refused(refused));
            }
        }
        if let Err(error) = sandbox::enter_filter(socket, &own.engine.sockets(), workers) {
            give_up(socket, error.into());
        }
        if send(socket, ToHost::Ready(description)).is_err() {
            sys::exit_now(1);
        }
        sealed.wait();
    });
    Ok(())
}

/// Ends a process whose workers wait for a sandbox that will not come.
fn give_up(socket: BorrowedFd<'_>, error: StartError) -> ! {
    report_failure(socket, error);
    sys::exit_now(1)
}

/// One worker: builds its scanner, waits for the sandbox, then scans until the socket ends.
fn worker<E: Engine>(
    own: &Own<'_, E>,
    warm: &mpsc::Sender<Result<(), Vec<Diagnostic>>>,
    sealed: &Barrier,
) {
    let built = catch_unwind(AssertUnwindSafe(|| {
        let mut scanner = own.engine.scanner()?;
        warm_up(&mut *scanner);
        Ok(scanner)
    }));
    let built = built.unwrap_or_else(|panic| {
        let reason = format!("building a scanner panicked: {}", panic_text(&*panic));
        Err(LoadError::new("engine-scanner", reason))
    });
    let (scanner, told) = match built {
        Ok(scanner) => (Some(scanner), Ok(())),
        Err(error) => (None, Err(error.into_diagnostics())),
    };
    // The receiver lives until every worker has told.
    let _ = warm.send(told);
    // A failed build ends the process; until then this thread waits like the others.
    sealed.wait();
    if let Some(mut scanner) = scanner {
        work_off(own, &mut scanner);
    }
}

/// Takes and answers what comes, until the socket ends. Whatever breaks the connection ends the process: the
/// service has the scans, and starts another.
///
/// The next scan is taken before the report of the one before is sent, if it waits already: one message tells both,
/// and the service is woken once.
fn work_off<'e, E: Engine>(own: &Own<'e, E>, scanner: &mut Box<dyn Scanner + 'e>) {
    let mut buffer = vec![0; MAX_TO_ENGINE];
    let pong = || send(own.socket, ToHost::Pong).unwrap_or_else(|_| sys::exit_now(1));
    let mut at_hand = None;
    loop {
        let (scan, content, turn) = match at_hand.take() {
            Some(next) => next,
            None => match take(own.socket, &mut buffer, true) {
                Taken::Scan(scan, content) => {
                    let turn = Turn::new(scan.id);
                    own.line.enter(&turn);
                    (scan, content, turn)
                }
                Taken::Ping => {
                    pong();
                    continue;
                }
                Taken::Nothing => continue,
                Taken::End => return,
            },
        };
        let answer = answer(own, scanner, content.as_ref(), *scan, &turn);
        if let Some(taken) = content.and_then(Content::into_buffer) {
            buffer = taken;
        }
        let taken = take(own.socket, &mut buffer, false);
        let next = if let Taken::Scan(scan, _) = &taken { Some(Turn::new(scan.id)) } else { None };
        own.line.leave(&turn, answer, next.as_ref());
        match (taken, next) {
            (Taken::Scan(scan, content), Some(turn)) => at_hand = Some((scan, content, turn)),
            (Taken::Ping, _) => pong(),
            (Taken::End, _) => return,
            (Taken::Nothing | Taken::Scan(..), _) => {}
        }
    }
}

/// What a worker got.
enum Taken {
    /// A scan, and its content; None if that did not arrive.
    Scan(Box<Scan>, Option<Content>),
    Ping,
    /// There is nothing at present.
    Nothing,
    /// The service closed its end.
    End,
}

/// Takes one message. Small content stays in the buffer, which goes with it.
fn take(socket: BorrowedFd<'_>, buffer: &mut Vec<u8>, wait: bool) -> Taken {
    let received = match sys::receive(socket, buffer, true, wait) {
        Ok(received) if received.length == 0 => return Taken::End,
        Ok(received) if !received.cut => received,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Taken::Nothing,
        _ => sys::exit_now(1),
    };
    let with_descriptor = received.fd.is_some() || received.lost_fd;
    match decode_to_engine(&buffer[..received.length], with_descriptor) {
        Ok((ToEngine::Ping, _)) => Taken::Ping,
        Ok((ToEngine::Scan(scan), content)) => {
            let at = received.length - content.len()..received.length;
            let content = match received.fd {
                Some(fd) => Some(Content::new(fd, scan.length)),
                None if received.lost_fd => None,
                None => Some(Content::in_message(std::mem::take(buffer), at)),
            };
            Taken::Scan(Box::new(scan), content)
        }
        Ok((ToEngine::Start(_), _)) | Err(_) => {
            eprintln!("the service sent a message that makes no sense here");
            sys::exit_now(1)
        }
    }
}

/// The first scan starts what a library starts lazily (yara-x: its clock thread), which the sandbox
/// would forbid. Its result means nothing.
fn warm_up(scanner: &mut dyn Scanner) {
    let metadata = Metadata {
        path: Vec::new(),
        guest: String::new(),
        operation: Operation::Open,
        size: 0,
        archives: None,
    };
    let turn = Turn::new(0);
    let _ = scanner.scan(&Request {
        content: &Content::empty(),
        metadata: &metadata,
        limit: Duration::from_secs(60),
        turn: &turn,
        cancelled: None,
    });
}

/// Scans; a panic becomes an error and a fresh scanner.
fn answer<'e, E: Engine>(
    own: &Own<'e, E>,
    scanner: &mut Box<dyn Scanner + 'e>,
    content: Option<&Content>,
    scan: Scan,
    turn: &Turn,
) -> Answer {
    let Some(content) = content else {
        return Answer::Error { reason: "the content's descriptor did not arrive".into() };
    };
    let request = Request {
        content,
        metadata: &scan.metadata,
        limit: Duration::from_millis(scan.limit_ms.into()),
        turn,
        cancelled: Some(own.cancelled),
    };
    match catch_unwind(AssertUnwindSafe(|| scanner.scan(&request))) {
        Ok(Ok(outcome)) => match content.unseen() {
            // What nobody could read must not count as clean.
            Some(reason) if !matches!(outcome, Outcome::Infected(_)) => Answer::Error { reason },
            _ => Answer::Done(outcome),
        },
        Ok(Err(ScanError::TimedOut)) => Answer::TimedOut { what: String::new() },
        Ok(Err(ScanError::TimedOutIn { what })) => Answer::TimedOut { what },
        Ok(Err(ScanError::Cancelled)) => Answer::Cancelled,
        Ok(Err(ScanError::Broken { reason })) => {
            eprintln!("{reason}");
            own.line.end()
        }
        Ok(Err(error)) => Answer::Error { reason: chain(&error) },
        Err(panic) => {
            let reason = format!("the engine panicked: {}", panic_text(&*panic));
            match catch_unwind(AssertUnwindSafe(|| own.engine.scanner())) {
                Ok(Ok(fresh)) => *scanner = fresh,
                Ok(Err(error)) => {
                    eprintln!("{error}");
                    own.line.end()
                }
                Err(_) => own.line.end(),
            }
            Answer::Error { reason }
        }
    }
}

fn send(socket: BorrowedFd<'_>, message: ToHost) -> Result<(), StartError> {
    let bytes = encode_to_host(message)?;
    Ok(sys::send(socket, [&bytes, &[]], None, true)?)
}

/// Tells the service and standard error why the engine does not run.
fn report_failure(socket: impl AsFd, error: StartError) {
    let diagnostics = match error {
        StartError::Refused(diagnostics) => diagnostics,
        other => vec![Diagnostic::error("engine-start", chain(&other))],
    };
    for one in &diagnostics {
        eprintln!("{one}");
    }
    let message = ToHost::Failed { diagnostics, omitted: 0 };
    if let Err(error) = send(socket.as_fd(), message) {
        eprintln!("the service could not be told: {}", chain(&error));
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
}
