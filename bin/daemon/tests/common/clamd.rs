//! A client of clamd's protocol that does as the test tells it, right or wrong.

#![allow(dead_code)] // Each test file uses a part.

use crate::common::PATIENCE;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, sendmsg};
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// A connection.
pub struct Client(pub UnixStream);

impl Client {
    pub fn connect(socket: &Path) -> Self {
        Self::try_connect(socket).expect("it is served")
    }

    pub fn try_connect(socket: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self(stream))
    }

    /// Sends; the service may have ended the connection meanwhile.
    pub fn say(&mut self, bytes: &[u8]) -> &mut Self {
        let _ = self.0.write_all(bytes);
        self
    }

    /// Sends bytes that carry descriptors.
    pub fn pass(&mut self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> &mut Self {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
        let _ = sendmsg(&self.0, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
        self
    }

    /// FILDES, as clamdscan sends it.
    pub fn fildes(&mut self, descriptor: impl AsFd) -> &mut Self {
        self.say(b"zFILDES\0").pass(b"\0", &[descriptor.as_fd()])
    }

    /// Nothing more is said.
    pub fn end(&mut self) -> &mut Self {
        let _ = rustix::net::shutdown(&self.0, Shutdown::Write);
        self
    }

    /// Everything up to the end of the connection.
    pub fn all(&mut self) -> Vec<u8> {
        let mut heard = Vec::new();
        match self.0.read_to_end(&mut heard) {
            Err(error) if error.kind() != ErrorKind::ConnectionReset => {
                panic!("the service neither speaks nor ends: {error}; {}", heard.escape_ascii())
            }
            _ => heard,
        }
    }

    /// The same as text.
    pub fn hear(&mut self) -> String {
        String::from_utf8_lossy(&self.all()).into_owned()
    }

    /// One answer, without its end.
    pub fn answer(&mut self, ending: u8) -> String {
        let mut heard = Vec::new();
        let mut byte = [0];
        loop {
            self.0.read_exact(&mut byte).expect("an answer");
            if byte[0] == ending {
                return String::from_utf8_lossy(&heard).into_owned();
            }
            heard.push(byte[0]);
        }
    }
}

/// What a client hears that says this.
pub fn ask(socket: &Path, bytes: &[u8]) -> String {
    Client::connect(socket).say(bytes).hear()
}

/// A stream of one chunk, whole.
pub fn stream(content: &[u8]) -> Vec<u8> {
    let len = u32::try_from(content.len()).expect("it is short").to_be_bytes();
    let chunk = if content.is_empty() { Vec::new() } else { [&len[..], content].concat() };
    [&chunk[..], &[0; 4]].concat()
}

/// An INSTREAM command with its content.
pub fn in_stream(content: &[u8]) -> Vec<u8> {
    [&b"zINSTREAM\0"[..], &stream(content)].concat()
}
