//! One engine process: its start, its socket, its standard error, its end.
//!
//! Owns the child, its process group and the host's end of the socket pair. Decides nothing: the
//! supervisor does.

use std::env;
use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::EngineConfig;
use super::flow::Workers;
use crate::FD_VARIABLE;
use crate::protocol::{
    CANCEL_PAGE, Limits, MAX_TO_ENGINE, MAX_TO_HOST, ProtocolError, Start, ToEngine, ToHost,
    decode_to_host, encode_to_engine,
};
use crate::report::Description;
use crate::sys::{self, Wait};

/// Longest line of standard error that is logged, in bytes; the rest of it is cut.
const LONGEST_LINE: usize = 1024;
/// Lines of standard error that are logged in each window; a hostile engine must not fill the log.
const MOST_LINES: u32 = 200;
/// See [`MOST_LINES`].
const LINE_WINDOW: Duration = Duration::from_secs(10);

/// Numbers the processes of one supervisor; never reused, unlike a pid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct ProcessId(pub u64);

/// The host's end of the socket, and of the page of cancelled scans.
pub(super) struct Link {
    socket: OwnedFd,
    cancelled: File,
}

impl Link {
    /// `scans`: how many are to have room in the socket.
    fn new(socket: OwnedFd, scans: usize) -> io::Result<Self> {
        // Twice: the kernel counts what it keeps besides, too. With less it is slower, not wrong.
        if let Err(error) = sys::set_send_buffer(socket.as_fd(), 2 * scans * MAX_TO_ENGINE) {
            tracing::debug!(%error, "the socket to an engine stays small");
        }
        let cancelled = sys::memfd(c"seawall-cancelled")?;
        cancelled.set_len(CANCEL_PAGE as u64)?;
        Ok(Self { socket, cancelled })
    }

    /// Sends the first message; the page goes with it, to be read only.
    fn start(&self, start: Start) -> io::Result<()> {
        let page = File::open(format!("/proc/self/fd/{}", self.cancelled.as_raw_fd()))?;
        let bytes = encode_to_engine(ToEngine::Start(start)).map_err(io::Error::other)?;
        self.send([&bytes, &[]], Some(page.as_fd()))
    }

    /// Sends one message and what follows it, or fails at once when the socket has no room.
    pub(super) fn send(&self, parts: [&[u8]; 2], pass: Option<BorrowedFd<'_>>) -> io::Result<()> {
        sys::send(self.socket.as_fd(), parts, pass, false)
    }

    /// Notes that nobody wants this scan any more. Another scan's note may be lost by it: that one is
    /// scanned to its end.
    pub(super) fn cancel(&self, id: u64) {
        if let Err(error) = self.cancelled.write_all_at(&id.to_ne_bytes(), sys::Numbers::place(id))
        {
            tracing::debug!(%error, "a scan cannot be cancelled");
        }
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What of [`Process::waits`] there is to look at.
#[derive(Clone, Copy)]
pub(super) struct Ready {
    /// Something can be received.
    pub socket: bool,
    /// The process is dead, whoever else still holds its socket.
    pub ended: bool,
    /// It wrote to standard error.
    pub stderr: bool,
}

impl Ready {
    /// None where there is nothing.
    pub(super) fn of(waits: &[bool]) -> Option<Self> {
        let at = |index| waits.get(index).copied().unwrap_or(false);
        waits.contains(&true).then(|| Self { socket: at(0), ended: at(1), stderr: at(2) })
    }
}

/// What [`Process::receive`] found.
pub(super) enum Event {
    /// A message.
    Message(ToHost),
    /// Nothing more at present.
    Nothing,
    /// The engine closed its end, or is dead.
    Closed,
    /// The engine said what no engine may say.
    Violation(ProtocolError),
}

/// A running engine.
pub(super) struct Process {
    pub id: ProcessId,
    pub link: Arc<Link>,
    /// Set when it said Ready.
    pub description: Option<Description>,
    /// When it was started.
    pub since: Instant,
    /// When it last said anything.
    pub heard: Instant,
    /// An unanswered ping.
    pub pinged: Option<Instant>,
    child: Child,
    ended: OwnedFd,
    stderr: Lines,
    buffer: Vec<u8>,
}

impl Process {
    /// Starts the program and sends it Start. Must be called on the supervisor's thread: the
    /// process dies with the thread that starts it.
    pub(super) fn spawn(config: &EngineConfig, id: ProcessId, strict: bool) -> io::Result<Self> {
        let (ours, theirs) = sys::seqpacket_pair()?;
        let [program, arguments @ ..] = config.command.as_slice() else {
            return Err(io::Error::new(ErrorKind::InvalidInput, "the engine's command is empty"));
        };
        let mut command = Command::new(find_program(program)?);
        command
            .args(arguments)
            .env_clear()
            .env(FD_VARIABLE, theirs.as_raw_fd().to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0);
        sys::prepare_child(&mut command, theirs.as_fd());
        let mut child = command.spawn()?;
        // Ours must be the only end left on this side, or its end would never show.
        drop(theirs);
        match Self::connect(config, id, strict, ours, &mut child) {
            Ok((link, ended, stderr)) => {
                let now = Instant::now();
                let link = Arc::new(link);
                Ok(Self {
                    id,
                    link,
                    description: None,
                    since: now,
                    heard: now,
                    pinged: None,
                    child,
                    ended,
                    stderr,
                    buffer: vec![0; MAX_TO_HOST + 1],
                })
            }
            Err(error) => {
                sys::kill_group(child.id());
                child.wait()?;
                Err(error)
            }
        }
    }

    fn connect(
        config: &EngineConfig,
        id: ProcessId,
        strict: bool,
        socket: OwnedFd,
        child: &mut Child,
    ) -> io::Result<(Link, OwnedFd, Lines)> {
        let ended = sys::pid_fd(child.id())?;
        let stderr = Lines::new(child, config, id)?;
        let limits = Limits { memory: config.memory_mib << 20 };
        let workers = Workers::of(config);
        let link = Link::new(socket, workers.in_hand())?;
        link.start(Start { threads: workers.all(), limits, strict })?;
        Ok((link, ended, stderr))
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What wakes the supervisor for this process, in the order of [`Ready::of`].
    pub(super) fn waits(&self, write: bool) -> impl Iterator<Item = Wait<'_>> {
        let socket = Wait { fd: self.link.as_fd(), write };
        let ended = Wait { fd: self.ended.as_fd(), write: false };
        let stderr = self.stderr.pipe.as_ref();
        let stderr = stderr.map(|pipe| Wait { fd: pipe.as_fd(), write: false });
        [socket, ended].into_iter().chain(stderr)
    }

    /// Takes one message from the socket.
    pub(super) fn receive(&mut self) -> Event {
        let mut take = || sys::receive(self.link.as_fd(), &mut self.buffer, false, false);
        let taken = match take() {
            // An engine that dies with scans unread resets the socket, and the kernel tells that
            // before it hands out what the engine had sent: who was in work, and who had finished.
            // The error comes once.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => take(),
            other => other,
        };
        let received = match taken {
            Ok(received) => received,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Event::Nothing,
            Err(_) => return Event::Closed,
        };
        if received.length == 0 {
            return Event::Closed;
        }
        self.heard = Instant::now();
        if received.cut {
            return Event::Violation(ProtocolError::TooLong { most: MAX_TO_HOST });
        }
        if received.lost_fd {
            return Event::Violation(ProtocolError::Descriptor);
        }
        match decode_to_host(&self.buffer[..received.length]) {
            Ok(message) => Event::Message(message),
            Err(error) => Event::Violation(error),
        }
    }

    /// Logs what the process wrote to standard error.
    pub(super) fn log_stderr(&mut self) {
        self.stderr.log();
    }

    /// Kills the process and all that it started.
    pub(super) fn kill(mut self) -> Corpse {
        sys::kill_group(self.child.id());
        self.log_stderr();
        Corpse { child: self.child, ended: self.ended }
    }

    /// Why a process that closed its socket ended. Most often it is dead already; one that lives on
    /// without its socket is killed after a moment.
    pub(super) fn end(mut self) -> (String, Option<Corpse>) {
        let wait = [Wait { fd: self.ended.as_fd(), write: false }];
        let exited = sys::poll(&wait, Duration::from_millis(50)).is_ok_and(|ready| ready[0]);
        if !exited {
            return ("closed its socket".to_owned(), Some(self.kill()));
        }
        // What it started goes, too; before it is reaped, so that the number is still its own.
        sys::kill_group(self.child.id());
        self.log_stderr();
        match self.child.try_wait() {
            Ok(Some(status)) => (describe(status), None),
            _ => ("ended".to_owned(), Some(self.kill())),
        }
    }
}

/// A killed process that has not been waited for.
pub(super) struct Corpse {
    child: Child,
    ended: OwnedFd,
}

impl Corpse {
    /// Waits without blocking. True when there is nothing left to do.
    pub(super) fn reap(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// What wakes the supervisor for it.
    pub(super) fn wait(&self) -> Wait<'_> {
        Wait { fd: self.ended.as_fd(), write: false }
    }
}

fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with status {code}"),
        (None, Some(signal)) => format!("was ended by signal {signal}"),
        (None, None) => "ended".to_owned(),
    }
}

/// Beside the running program first, so that an installation needs no PATH; then in PATH.
fn find_program(name: &str) -> io::Result<PathBuf> {
    if name.contains('/') {
        return Ok(name.into());
    }
    let beside =
        env::current_exe().ok().and_then(|own| own.parent().map(|folder| folder.join(name)));
    let path = env::var_os("PATH").unwrap_or_default();
    let in_path = env::split_paths(&path).map(|folder| folder.join(name));
    beside.into_iter().chain(in_path).find(|candidate| candidate.is_file()).ok_or_else(|| {
        let message = format!("{name} is neither beside the service's program nor in PATH");
        io::Error::new(ErrorKind::NotFound, message)
    })
}

/// Standard error of an engine, line by line into the log.
struct Lines {
    engine: String,
    process: u64,
    pipe: Option<ChildStderr>,
    partial: Vec<u8>,
    window: Instant,
    logged: u32,
}

impl Lines {
    fn new(child: &mut Child, config: &EngineConfig, id: ProcessId) -> io::Result<Self> {
        let pipe = child.stderr.take();
        if let Some(pipe) = &pipe {
            sys::set_nonblocking(pipe.as_fd())?;
        }
        Ok(Self {
            engine: config.name.clone(),
            process: id.0,
            pipe,
            partial: Vec::new(),
            window: Instant::now(),
            logged: 0,
        })
    }

    /// Reads what is there, at most 64 KiB at a time so that other processes get their turn.
    fn log(&mut self) {
        let mut piece = [0; 4096];
        for _ in 0..16 {
            let Some(pipe) = &mut self.pipe else { return };
            match pipe.read(&mut piece) {
                Ok(0) => {
                    self.pipe = None;
                    self.line_ends();
                }
                Ok(length) => self.take(&piece[..length]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }

    fn take(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            if byte == b'\n' {
                self.line_ends();
            } else if self.partial.len() < LONGEST_LINE {
                self.partial.push(byte);
            }
        }
    }

    fn line_ends(&mut self) {
        if self.window.elapsed() > LINE_WINDOW {
            self.window = Instant::now();
            self.logged = 0;
        }
        self.logged = self.logged.saturating_add(1);
        if self.logged <= MOST_LINES && !self.partial.is_empty() {
            // Escaped: an engine that a file took over must not write control characters to a
            // terminal.
            let line = String::from_utf8_lossy(&self.partial).escape_debug().to_string();
            tracing::info!(engine = self.engine, process = self.process, "{line}");
        } else if self.logged == MOST_LINES + 1 {
            tracing::warn!(
                engine = self.engine,
                process = self.process,
                "too much output; further lines are dropped for a while"
            );
        }
        self.partial.clear();
    }
}
