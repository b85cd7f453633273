//! One session with clamd: commands and answers as clamd(8) has them, in their z form.
//!
//! Within IDSESSION each command has a number, and answers carry it. Content goes as a descriptor (FILDES), so
//! nothing is copied and clamd sees no name.

use std::collections::BTreeMap;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

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

/// Between two questions on a session where nothing else is said. clamd ends one that is silent for its
/// CommandReadTimeout, also while it scans.
pub const PULSE: Duration = Duration::from_secs(2);

/// A session that stands as long as its clamd.
#[derive(Debug)]
pub struct Session {
    stream: Arc<UnixStream>,
    /// Numbers given so far.
    last: u64,
    buffer: Vec<u8>,
    /// What came for numbers that nobody has asked for yet: clamd answers in any order.
    answers: BTreeMap<u64, String>,
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
        let stream = Arc::new(stream);
        let session = Self { stream, last: 0, buffer: Vec::new(), answers: BTreeMap::new() };
        session.send(b"zIDSESSION\0", None)?;
        Ok(session)
    }

    /// The socket, for the sandbox.
    pub fn socket(&self) -> Arc<UnixStream> {
        Arc::clone(&self.stream)
    }

    /// Asks for clamd's version, as it tells it: `ClamAV 1.4.6/27000/Mon …`. `go_on` is asked now and then.
    pub fn version(&mut self, mut go_on: impl FnMut() -> io::Result<()>) -> io::Result<String> {
        self.begin();
        let asked = self.ask_version()?;
        self.answer(asked, |_| go_on())
    }

    /// Has a content scanned. Ends with an error when the session is over.
    pub fn scan(&mut self, content: BorrowedFd<'_>) -> io::Result<Answer> {
        self.begin();
        let asked = self.ask_scan(content)?;
        self.answer(asked, |_| Ok(())).map(|text| parse(&text))
    }

    /// The same by a clamd that may load other signatures meanwhile: an error unless its version is this one
    /// before and after. A scan has the signatures that are in use when clamd takes it.
    pub fn scan_as(
        &mut self,
        version: &str,
        content: BorrowedFd<'_>,
        mut go_on: impl FnMut() -> io::Result<()>,
    ) -> io::Result<Answer> {
        let mut check = |session: &mut Self| {
            let told = session.version(&mut go_on)?;
            if told == version { Ok(()) } else { Err(io::Error::other(changed(version, &told))) }
        };
        // One after the other: what comes in one read with a descriptor, clamd answers without a number.
        check(self)?;
        let scan = self.ask_scan(content)?;
        let mut spoke = Instant::now();
        let text = self.answer(scan, |session| {
            if spoke.elapsed() >= PULSE {
                session.ask_version()?;
                spoke = Instant::now();
            }
            Ok(())
        })?;
        check(self)?;
        Ok(parse(&text))
    }

    /// Forgets what came for commands that nobody waits for any more.
    fn begin(&mut self) {
        self.answers.clear();
    }

    fn ask_version(&mut self) -> io::Result<u64> {
        self.send(b"zVERSION\0", None)?;
        self.last += 1;
        Ok(self.last)
    }

    fn ask_scan(&mut self, content: BorrowedFd<'_>) -> io::Result<u64> {
        // In two: clamd takes the descriptor with the first byte after the command.
        self.send(b"zFILDES\0", None)?;
        self.send(b"\0", Some(content))?;
        self.last += 1;
        Ok(self.last)
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

    /// The answer to the command with this number.
    fn answer(
        &mut self,
        number: u64,
        mut go_on: impl FnMut(&mut Self) -> io::Result<()>,
    ) -> io::Result<String> {
        loop {
            if let Some(text) = self.answers.remove(&number) {
                return Ok(text);
            }
            if let Some(end) = self.buffer.iter().position(|byte| *byte == 0) {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line[..end]).into_owned();
                let (number, text) = self.numbered(&line)?;
                self.answers.insert(number, text);
                continue;
            }
            if self.buffer.len() > ANSWER_MAX {
                return Err(io::Error::other("clamd's answer has no end"));
            }
            self.receive(&mut go_on)?;
        }
    }

    /// An answer's number and text.
    fn numbered(&self, line: &str) -> io::Result<(u64, String)> {
        let parts = line.split_once(": ");
        let number = parts.and_then(|(number, _)| number.parse().ok());
        match (number, parts) {
            (Some(number), Some((_, text))) if (1..=self.last).contains(&number) => {
                Ok((number, text.to_owned()))
            }
            _ => Err(io::Error::other(format!("clamd said `{}`", line.trim_end()))),
        }
    }

    fn receive(&mut self, go_on: &mut impl FnMut(&mut Self) -> io::Result<()>) -> io::Result<()> {
        let mut piece = [0; 4096];
        let mut control = RecvAncillaryBuffer::default();
        let mut pieces = [IoSliceMut::new(&mut piece)];
        let received =
            rustix::net::recvmsg(&self.stream, &mut pieces, &mut control, RecvFlags::empty());
        match received {
            Ok(message) if message.bytes == 0 => {
                // Its last words have no number and no end: `COMMAND READ TIMED OUT`.
                let words = String::from_utf8_lossy(&self.buffer);
                let words = if words.is_empty() { "no word" } else { words.trim_end() };
                Err(io::Error::other(format!("clamd has ended the session with {words}")))
            }
            Ok(message) => {
                self.buffer.extend_from_slice(&piece[..message.bytes]);
                Ok(())
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => go_on(self),
            Err(error) => Err(error.into()),
        }
    }
}

/// Why a verdict does not count.
pub fn changed(was: &str, is: &str) -> String {
    format!("clamd has loaded other signatures: it was `{was}`, it is `{is}`")
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
