//! One session with clamd: commands and answers as clamd(8) has them, in their z form.
//!
//! Within IDSESSION each command has a number, and answers carry it. Content goes as a descriptor (FILDES), so
//! nothing is copied and clamd sees no name.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};

/// How long one wait for an answer takes at most, before the caller is asked whether to go on.
const PATIENCE: Duration = Duration::from_millis(200);
/// No answer is longer: a name of a signature, and what clamd calls the descriptor.
const ANSWER_MAX: usize = 16 * 1024;

/// What clamd says of a content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    Clean,
    /// The signature's name.
    Found(String),
    /// In clamd's words.
    Error(String),
}

/// A session that stands as long as its clamd.
#[derive(Debug)]
pub struct Session {
    stream: Arc<UnixStream>,
    /// Numbers given so far.
    last: u64,
    buffer: Vec<u8>,
}

impl Session {
    /// Connects and begins.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        rustix::net::sockopt::set_socket_timeout(
            &stream,
            rustix::net::sockopt::Timeout::Recv,
            Some(PATIENCE),
        )?;
        let session = Self { stream: Arc::new(stream), last: 0, buffer: Vec::new() };
        session.send(b"zIDSESSION\0", None)?;
        Ok(session)
    }

    /// The socket, for the sandbox.
    pub fn socket(&self) -> Arc<UnixStream> {
        Arc::clone(&self.stream)
    }

    /// Asks for clamd's version, as it tells it: `ClamAV 1.4.6/27000/Mon …`. `go_on` is asked now and then.
    pub fn version(&mut self, go_on: impl FnMut() -> io::Result<()>) -> io::Result<String> {
        self.send(b"zVERSION\0", None)?;
        self.last += 1;
        self.answer(go_on)
    }

    /// Has a content scanned. Ends with an error when the session is over.
    pub fn scan(&mut self, content: BorrowedFd<'_>) -> io::Result<Answer> {
        // In two: clamd takes the descriptor with the first byte after the command.
        self.send(b"zFILDES\0", None)?;
        self.send(b"\0", Some(content))?;
        self.last += 1;
        self.answer(|| Ok(())).map(|text| parse(&text))
    }

    fn send(&self, bytes: &[u8], pass: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let descriptors: Vec<_> = pass.into_iter().collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(&descriptors));
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            let pieces = [IoSlice::new(rest)];
            let flags = SendFlags::NOSIGNAL;
            match rustix::net::sendmsg(&self.stream, &pieces, &mut control, flags) {
                Ok(sent) => rest = &rest[sent..],
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The answer to the last command.
    fn answer(&mut self, mut go_on: impl FnMut() -> io::Result<()>) -> io::Result<String> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == 0) {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line[..end]).into_owned();
                return match line.split_once(": ") {
                    Some((number, text)) if number.parse() == Ok(self.last) => Ok(text.to_owned()),
                    _ => Err(io::Error::other(format!("clamd said `{line}`"))),
                };
            }
            if self.buffer.len() > ANSWER_MAX {
                return Err(io::Error::other("clamd's answer has no end"));
            }
            let mut piece = [0; 4096];
            let mut control = RecvAncillaryBuffer::default();
            let mut pieces = [IoSliceMut::new(&mut piece)];
            let received =
                rustix::net::recvmsg(&self.stream, &mut pieces, &mut control, RecvFlags::empty());
            match received {
                Ok(message) if message.bytes == 0 => {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                Ok(message) => self.buffer.extend_from_slice(&piece[..message.bytes]),
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => go_on()?,
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// `fd[10]: Name FOUND`, `fd[10]: OK`, `fd[10]: Words ERROR`; what clamd calls the content may hold anything.
fn parse(text: &str) -> Answer {
    let text = text.trim_end();
    if let Some(rest) = text.strip_suffix(" FOUND") {
        let name = rest.rsplit_once(": ").map_or(rest, |(_, name)| name);
        return Answer::Found(name.to_owned());
    }
    if text == "OK" || text.ends_with(": OK") {
        return Answer::Clean;
    }
    let words = text.strip_suffix(" ERROR").unwrap_or(text);
    let words = words.rsplit_once(": ").map_or(words, |(_, words)| words);
    Answer::Error(words.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_what_clamd_means() {
        let found = |name: &str| Answer::Found(name.into());
        for (text, answer) in [
            ("fd[11]: OK", Answer::Clean),
            ("/memfd:c (deleted): OK", Answer::Clean),
            ("fd[11]: Win.Test.EICAR_HDB-1 FOUND", found("Win.Test.EICAR_HDB-1")),
            ("/a: b: X.UNOFFICIAL FOUND", found("X.UNOFFICIAL")),
            ("fd[9]: Can't allocate memory ERROR", Answer::Error("Can't allocate memory".into())),
            (
                "No file descriptor received. ERROR",
                Answer::Error("No file descriptor received.".into()),
            ),
            ("UNKNOWN COMMAND", Answer::Error("UNKNOWN COMMAND".into())),
            ("", Answer::Error(String::new())),
        ] {
            assert_eq!(parse(text), answer, "{text}");
        }
    }
}
