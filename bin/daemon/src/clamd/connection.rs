//! A client's connection: what comes in, with descriptors, and answers going out.
//!
//! A descriptor that a client passes is poison until proven harmless: closing one of a file system in user
//! space waits for that file system's answer. So none is taken before there is a place for it, it is
//! closed on a thread that may hang, and its place is given back only then. What comes where none is
//! expected is never received: the kernel drops it.

use super::bounds::{Peer, Place, Places};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, recv, recvmsg,
};
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;
use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::{Mutex, Notify};
use tokio::time::timeout;

/// Either kind of connection.
#[derive(Debug)]
pub enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    pub async fn readable(&self) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.readable().await,
            Self::Tcp(stream) => stream.readable().await,
        }
    }

    async fn writable(&self) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.writable().await,
            Self::Tcp(stream) => stream.writable().await,
        }
    }

    /// Reads what is there. WouldBlock when there is nothing; 0 at the end.
    pub fn try_read(&self, to: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.try_read(to),
            Self::Tcp(stream) => stream.try_read(to),
        }
    }

    fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.try_write(bytes),
            Self::Tcp(stream) => stream.try_write(bytes),
        }
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        }
    }

    /// Looks at what is there, without taking it: how much, and whether descriptors come with it.
    pub fn peek(&self, to: &mut [u8]) -> io::Result<(usize, bool)> {
        let Self::Unix(stream) = self else {
            return self.try_tcp(|stream| Ok((recv(stream, to, RecvFlags::PEEK)?.1, false)));
        };
        stream.try_io(Interest::READABLE, || {
            let mut buffers = [IoSliceMut::new(to)];
            // No room for descriptors: that there are some is all that it says.
            let got = recvmsg(
                stream,
                &mut buffers,
                &mut RecvAncillaryBuffer::default(),
                RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC,
            )?;
            Ok((got.bytes, got.flags.contains(ReturnFlags::CTRUNC)))
        })
    }

    fn try_tcp<R>(&self, work: impl FnOnce(BorrowedFd<'_>) -> io::Result<R>) -> io::Result<R> {
        match self {
            Self::Unix(stream) => stream.try_io(Interest::READABLE, || work(stream.as_fd())),
            Self::Tcp(stream) => stream.try_io(Interest::READABLE, || work(stream.as_fd())),
        }
    }

    /// Takes what [`Self::peek`] saw, with its descriptors.
    pub fn receive(&self, to: &mut [u8], place: Place) -> io::Result<(usize, Passed)> {
        let mut passed = Passed(Some((Vec::new(), place)));
        let len = self.try_tcp(|stream| {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut buffers = [IoSliceMut::new(to)];
            let got = recvmsg(stream, &mut buffers, &mut control, RecvFlags::CMSG_CLOEXEC)?;
            for message in control.drain() {
                if let (RecvAncillaryMessage::ScmRights(fds), Some((to, _))) =
                    (message, &mut passed.0)
                {
                    to.extend(fds);
                }
            }
            Ok(got.bytes)
        })?;
        Ok((len, passed))
    }

    /// Whether the other end is closed altogether, and not only for what it would send.
    pub fn is_gone(&self) -> bool {
        let mut fds = [PollFd::from_borrowed_fd(self.as_fd(), PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)).is_ok_and(|count| count > 0)
    }

    /// Says that nothing more comes.
    pub fn shutdown(&self) {
        // It may be gone already.
        let _ = rustix::net::shutdown(self.as_fd(), rustix::net::Shutdown::Write);
    }
}

/// Descriptors that came with a message.
#[derive(Debug)]
pub struct Passed(Option<(Vec<OwnedFd>, Place)>);

impl Passed {
    /// The one descriptor and its place, both to be dropped on a thread that may hang. `None` where it is
    /// not just one.
    pub fn only(mut self) -> Option<(OwnedFd, Place)> {
        if self.0.as_ref()?.0.len() != 1 {
            return None;
        }
        let (mut fds, place) = self.0.take()?;
        Some((fds.pop()?, place))
    }
}

impl Drop for Passed {
    fn drop(&mut self) {
        if let Some((fds, place)) = self.0.take()
            && !fds.is_empty()
        {
            tokio::task::spawn_blocking(move || {
                drop(fds);
                drop(place);
            });
        }
    }
}

/// Waits for a place for descriptors.
pub async fn place(places: &Places, peer: Peer, patience: Duration) -> Option<Place> {
    timeout(patience, places.take(peer)).await.ok()
}

/// The way of answers to one client. One that does not read them in time hears no more.
#[derive(Debug)]
pub struct Answers {
    stream: std::sync::Arc<Stream>,
    turn: Mutex<()>,
    patience: Duration,
    is_broken: AtomicBool,
    broke: Notify,
}

impl Answers {
    pub fn new(stream: std::sync::Arc<Stream>, patience: Duration) -> Self {
        let (turn, is_broken, broke) = Default::default();
        Self { stream, turn, patience, is_broken, broke }
    }

    /// Sends lines; whole ones, whoever else sends.
    pub async fn say(&self, lines: &[u8]) {
        let _turn = self.turn.lock().await;
        if self.is_broken.load(Relaxed) {
            return;
        }
        let sent = timeout(self.patience, self.send(lines)).await;
        if !matches!(sent, Ok(Ok(()))) {
            self.is_broken.store(true, Relaxed);
            self.broke.notify_waiters();
        }
    }

    async fn send(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            self.stream.writable().await?;
            match self.stream.try_write(bytes) {
                Ok(len) => bytes = &bytes[len..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Nobody hears any more.
    pub fn is_broken(&self) -> bool {
        self.is_broken.load(Relaxed)
    }

    /// Waits until nobody hears any more.
    pub async fn broken(&self) {
        loop {
            let broke = self.broke.notified();
            if self.is_broken() {
                return;
            }
            broke.await;
        }
    }
}
