//! A connection with a guest, whatever it came by: plain bytes, sealed ones on TCP, records on a
//! virtio-serial channel.
//!
//! [`Socket`] is the file descriptor that reader and writer share; [`LinkReader`] gives the bytes
//! that the guest said, [`LinkWriter`] turns what is said to the guest into bytes for the socket.

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};
use seawall_client::LinkKind;
use seawall_proto::noise::{NoiseError, Opener, Sealer};
use seawall_proto::serial::{self, Record, Token};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// How much is read at once, in bytes: a driver's longest frame.
const READ_LEN: usize = 64 * 1024;

/// A stream socket: unix, TCP or vsock.
#[derive(Debug, Clone)]
pub struct Socket {
    fd: Arc<OwnedFd>,
    /// The connection goes on and belongs to another session now.
    retired: Arc<AtomicBool>,
}

impl Socket {
    pub fn new(socket: impl Into<OwnedFd>) -> Self {
        Self { fd: Arc::new(socket.into()), retired: Arc::default() }
    }

    /// The same connection for the next session on it.
    pub fn again(&self) -> Self {
        Self { fd: Arc::clone(&self.fd), retired: Arc::default() }
    }

    /// Leaves the connection to the next session: this one can neither send nor end it any more.
    pub fn retire(&self) {
        self.retired.store(true, Relaxed);
    }

    /// Whether both are the same connection.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.fd, &other.fd)
    }

    /// Ends the connection for both sides. Whoever waits for it notices.
    pub fn end(&self) {
        if !self.retired.load(Relaxed) {
            // It may have ended already; nothing is left to do then.
            let _ = shutdown(&*self.fd, Shutdown::Both);
        }
    }

    /// Waits at most `patience` for bytes. `WouldBlock` when none came.
    pub fn set_patience(&self, patience: Duration) -> io::Result<()> {
        Ok(set_socket_timeout(&*self.fd, Timeout::Recv, Some(patience))?)
    }

    /// Waits for bytes; 0 when the peer has ended the connection.
    pub fn receive(&self, buffer: &mut [u8]) -> io::Result<usize> {
        self.receive_with(buffer, RecvFlags::empty())
    }

    fn receive_with(&self, buffer: &mut [u8], flags: RecvFlags) -> io::Result<usize> {
        loop {
            match recv(&*self.fd, &mut *buffer, flags) {
                Ok((_, len)) => return Ok(len),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Sends what can be sent without waiting. `WouldBlock` when nothing can.
    pub fn send_now(&self, bytes: &[u8]) -> io::Result<usize> {
        if self.retired.load(Relaxed) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        loop {
            match send(&*self.fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
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
        self.fd.as_fd()
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
    /// On a virtio-serial channel: what follows belongs to the next session.
    #[error("the driver begins anew")]
    Renewed(Token),
}

/// How bytes travel.
enum Incoming {
    Plain,
    Sealed(Opener),
    Records(serial::Decoder),
}

/// Gives the bytes that the guest said.
pub struct LinkReader {
    socket: Socket,
    incoming: Incoming,
    buffer: Box<[u8]>,
}

impl LinkReader {
    fn new(socket: Socket, incoming: Incoming) -> Self {
        Self { socket, incoming, buffer: vec![0; READ_LEN].into_boxed_slice() }
    }

    /// For a virtio-serial channel, on which sessions follow each other.
    pub fn of_channel(socket: Socket) -> Self {
        Self::new(socket, Incoming::Records(serial::Decoder::new()))
    }

    /// Waits for bytes, at most as long as the socket's patience, and gives them to `deliver`.
    /// `false` when none came in that time.
    pub fn read(&mut self, deliver: impl FnMut(&[u8])) -> Result<bool, ReadError> {
        self.read_with(RecvFlags::empty(), deliver)
    }

    fn read_with(
        &mut self,
        flags: RecvFlags,
        mut deliver: impl FnMut(&[u8]),
    ) -> Result<bool, ReadError> {
        // What came behind a beginning in the same read.
        if self.take_records(&mut deliver)? {
            return Ok(true);
        }
        let len = match self.socket.receive_with(&mut self.buffer, flags) {
            Ok(0) => return Err(ReadError::Ended),
            Ok(len) => len,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(ReadError::Broken(error)),
        };
        let bytes = &self.buffer[..len];
        match &mut self.incoming {
            Incoming::Plain => deliver(bytes),
            Incoming::Sealed(opener) => opener.open(bytes, deliver)?,
            Incoming::Records(decoder) => {
                decoder.extend(bytes);
                self.take_records(&mut deliver)?;
            }
        }
        Ok(true)
    }

    /// The same with what is there already.
    pub fn read_now(&mut self, deliver: impl FnMut(&[u8])) -> Result<bool, ReadError> {
        self.read_with(RecvFlags::DONTWAIT, deliver)
    }

    /// Gives the pieces that are whole. `false` when there is none.
    fn take_records(&mut self, deliver: &mut impl FnMut(&[u8])) -> Result<bool, ReadError> {
        let Incoming::Records(decoder) = &mut self.incoming else { return Ok(false) };
        let mut any = false;
        while let Some(record) = decoder.next_record() {
            match record {
                Record::Piece(bytes) => {
                    deliver(&bytes);
                    any = true;
                }
                Record::Sync(token) => return Err(ReadError::Renewed(token)),
                Record::Lost => (),
            }
        }
        Ok(any)
    }
}

/// Turns what is said to the guest into bytes for the socket.
pub enum LinkWriter {
    Plain,
    Sealed(Sealer),
    Records,
}

impl LinkWriter {
    /// Appends `plain` to `out` as it travels.
    pub fn wrap(&mut self, plain: &[u8], out: &mut Vec<u8>) -> Result<(), NoiseError> {
        match self {
            Self::Plain => out.extend_from_slice(plain),
            Self::Sealed(sealer) => sealer.seal(plain, out)?,
            Self::Records => serial::encode(plain, out),
        }
        Ok(())
    }
}

/// A connection that arrived.
pub struct Connection {
    pub kind: LinkKind,
    pub socket: Socket,
    pub reader: LinkReader,
    pub writer: LinkWriter,
}

impl Connection {
    pub fn plain(kind: LinkKind, socket: Socket) -> Self {
        let reader = LinkReader::new(socket.clone(), Incoming::Plain);
        Self { kind, socket, reader, writer: LinkWriter::Plain }
    }

    pub fn sealed(kind: LinkKind, socket: Socket, sealer: Sealer, opener: Opener) -> Self {
        let reader = LinkReader::new(socket.clone(), Incoming::Sealed(opener));
        Self { kind, socket, reader, writer: LinkWriter::Sealed(sealer) }
    }

    /// A session's turn on a virtio-serial channel.
    pub fn of_channel(socket: Socket, reader: LinkReader) -> Self {
        Self { kind: LinkKind::Serial, socket, reader, writer: LinkWriter::Records }
    }
}
