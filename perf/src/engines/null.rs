//! What the API is measured with: an engine that only touches its content, and a bare echo.

use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use seawall_engine::runtime::{Engine, LoadError, Request, ScanError, Scanner};
use seawall_engine::{Description, Generation, Outcome};

/// Bytes of a message that goes to and fro: about what a scan and its report take.
const MESSAGE: usize = 64;

struct Null;

impl Engine for Null {
    fn describe(&self) -> Description {
        Description::new("null", "1", Generation([0; 32])).with_rules(1)
    }

    fn scanner(&self) -> Result<Box<dyn Scanner + '_>, LoadError> {
        Ok(Box::new(Touch))
    }
}

struct Touch;

impl Scanner for Touch {
    /// Reads a byte of each page, as any engine has to.
    fn scan(&mut self, request: &Request<'_>) -> Result<Outcome, ScanError> {
        let bytes = request.content.bytes()?;
        let sum = bytes.iter().step_by(4096).fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        std::hint::black_box(sum);
        Ok(Outcome::Clean)
    }
}

/// The engine's process.
pub fn engine() -> ExitCode {
    seawall_engine::runtime::run(|_| Ok(Null))
}

/// The echo's process: the other end is its standard input.
pub fn echo() -> anyhow::Result<ExitCode> {
    let socket = std::io::stdin();
    let mut buffer = [0; MESSAGE];
    loop {
        let (count, _) = rustix::net::recv(&socket, &mut buffer[..], RecvFlags::empty())?;
        if count == 0 {
            return Ok(ExitCode::SUCCESS);
        }
        rustix::net::send(&socket, &buffer[..count], SendFlags::NOSIGNAL)?;
    }
}

/// A process that sends back what it gets, over the same kind of socket as engines have.
pub struct Echo {
    socket: OwnedFd,
    child: Child,
}

impl Echo {
    pub fn start() -> anyhow::Result<Self> {
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let child = Command::new(std::env::current_exe()?)
            .arg("echo")
            .stdin(Stdio::from(theirs))
            .spawn()
            .context("this program cannot start itself")?;
        Ok(Self { socket: ours, child })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn round_trip(&self) -> anyhow::Result<Duration> {
        let mut buffer = [7; MESSAGE];
        let begin = Instant::now();
        rustix::net::send(&self.socket, &buffer, SendFlags::NOSIGNAL)?;
        let (count, _) =
            rustix::net::recv(self.socket.as_fd(), &mut buffer[..], RecvFlags::empty())?;
        let took = begin.elapsed();
        ensure!(count == MESSAGE, "the echo is gone");
        Ok(took)
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        // Its end of the socket has ended then, so it ends too.
        let _gone = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
        let _ended = self.child.wait();
    }
}
