//! A connection with a guest, whatever it came by: plain bytes, or sealed ones on TCP.
//!
//! [`Socket`] is the file descriptor that reader and writer share; [`LinkReader`] gives the bytes
//! that the guest said, [`LinkWriter`] turns what is said to the guest into bytes for the socket.

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use seawall_client::LinkKind;
use seawall_proto::noise::{NoiseError, Opener, Sealer};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How much is read at once, in bytes: a driver's longest frame.
const READ_LEN: usize = 64 * 1024;

/// A stream socket: unix, TCP or vsock.
#[derive(Debug, Clone)]
pub struct Socket(Arc<OwnedFd>);

impl Socket {
    pub fn new(socket: impl Into<OwnedFd>) -> Self {
        Self(Arc::new(socket.into()))
    }

    /// Whether both are the same connection.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Ends the connection for both sides. Whoever waits for it notices.
    pub fn end(&self) {
        // It may have ended already; nothing is left to do then.
        let _ = shutdown(&*self.0, Shutdown::Both);
    }

    /// Waits at most `patience` for bytes. `WouldBlock` when none came.
    pub fn set_patience(&self, patience: Duration) -> io::Result<()> {
        Ok(set_socket_timeout(&*self.0, Timeout::Recv, Some(patience))?)
    }

    /// Waits for bytes; 0 when the peer has ended the connection.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match recv(&*self.0, &mut *buffer, RecvFlags::empty()) {
                Ok((_, len)) => return Ok(len),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Sends what can be sent without waiting. `WouldBlock` when nothing can.
    pub fn send_now(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match send(&*self.0, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(len) => return Ok(len),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Reads exactly `buffer` before `until`, as a handshake needs.
    pub fn receive_exact(&self, mut buffer: &mut [u8], until: Instant) -> io::Result<()> {
        while !buffer.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.set_patience(left)?;
            match self.receive(buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(len) => buffer = &mut buffer[len..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Sends a handshake's few bytes; a peer whose buffer is full at this point is refused.
    pub fn send_first(&self, bytes: &[u8]) -> io::Result<()> {
        if self.send_now(bytes)? == bytes.len() {
            return Ok(());
        }
        Err(io::ErrorKind::WouldBlock.into())
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Why no more bytes come.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error("the guest ended the connection")]
    Ended,
    #[error("the connection broke: {0}")]
    Broken(#[source] io::Error),
    #[error(transparent)]
    Noise(#[from] NoiseError),
}

/// Gives the bytes that the guest said.
pub struct LinkReader {
    socket: Socket,
    opener: Option<Opener>,
    buffer: Box<[u8]>,
}

impl LinkReader {
    /// Waits for bytes, at most as long as the socket's patience, and gives them to `deliver`.
    /// `false` when none came in that time.
    pub fn read(&mut self, deliver: impl FnMut(&[u8])) -> Result<bool, ReadError> {
        let mut deliver = deliver;
        let len = match self.socket.receive(&mut self.buffer) {
            Ok(0) => return Err(ReadError::Ended),
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(ReadError::Broken(error)),
        };
        let bytes = &self.buffer[..len];
        match &mut self.opener {
            Some(opener) => opener.open(bytes, deliver)?,
            None => deliver(bytes),
        }
        Ok(true)
    }
}

/// Turns what is said to the guest into bytes for the socket.
pub struct LinkWriter(Option<Sealer>);

impl LinkWriter {
    /// Appends `plain` to `out` as it travels.
    pub fn wrap(&mut self, plain: &[u8], out: &mut Vec<u8>) -> Result<(), NoiseError> {
        match &mut self.0 {
            Some(sealer) => sealer.seal(plain, out),
            None => {
                out.extend_from_slice(plain);
                Ok(())
            }
        }
    }
}

/// A connection that arrived, plain or sealed.
pub struct Connection {
    pub kind: LinkKind,
    pub socket: Socket,
    pub reader: LinkReader,
    pub writer: LinkWriter,
}

impl Connection {
    pub fn plain(kind: LinkKind, socket: Socket) -> Self {
        Self::new(kind, socket, None, None)
    }

    pub fn sealed(kind: LinkKind, socket: Socket, sealer: Sealer, opener: Opener) -> Self {
        Self::new(kind, socket, Some(sealer), Some(opener))
    }

    fn new(kind: LinkKind, socket: Socket, sealer: Option<Sealer>, opener: Option<Opener>) -> Self {
        let buffer = vec![0; READ_LEN].into_boxed_slice();
        let reader = LinkReader { socket: socket.clone(), opener, buffer };
        Self { kind, socket, reader, writer: LinkWriter(sealer) }
    }
}
