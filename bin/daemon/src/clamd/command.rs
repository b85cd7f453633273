//! What clients say: clamd's commands, cut out of what came and taken apart. No I/O.
//!
//! ```text
//! zCOMMAND\0   ended by a zero byte, answered with one
//! nCOMMAND\n   ended by a newline (a \r before it is dropped), answered with one
//! COMMAND      the old form: what came at once is one command, with or without a newline
//! ```
//!
//! FILDES is followed by one byte of no meaning, which carries the descriptor.

/// Longest command with its prefix and end, in bytes: clamd's own bound (PATH_MAX and 8).
pub const LONGEST: usize = 4096 + 8;

/// One command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    Ping,
    Version,
    VersionCommands,
    Stats,
    Reload,
    /// SHUTDOWN, or QUIT, which is the same.
    Shutdown,
    /// SCAN and its kin, with the path.
    Path(How, Vec<u8>),
    InStream,
    Fildes,
    IdSession,
    End,
    Unknown,
}

/// How a path is scanned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// Up to the first file that is infected.
    First,
    /// All files.
    All,
    /// All files, several at the same time.
    Parallel,
    /// Up to the first file that is infected, with all that was found in it.
    AllMatches,
}

/// Commands that this service knows, as VERSIONCOMMANDS tells them.
pub const NAMES: &str = "SCAN QUIT RELOAD PING CONTSCAN VERSIONCOMMANDS VERSION END SHUTDOWN \
                         MULTISCAN FILDES STATS IDSESSION INSTREAM ALLMATCHSCAN";

const PATHS: [(&[u8], How); 4] = [
    (b"SCAN", How::First),
    (b"CONTSCAN", How::All),
    (b"MULTISCAN", How::Parallel),
    (b"ALLMATCHSCAN", How::AllMatches),
];

impl Command {
    /// `words` is without prefix and end.
    fn parse(words: &[u8], is_old: bool) -> Self {
        for (name, how) in PATHS {
            // clamd takes whatever byte stands between the two.
            if let Some([_, path @ ..]) = words.strip_prefix(name) {
                let is_known = how != How::AllMatches || !is_old;
                return if is_known { Self::Path(how, path.to_vec()) } else { Self::Unknown };
            }
        }
        match words {
            b"PING" => Self::Ping,
            b"VERSION" => Self::Version,
            b"RELOAD" => Self::Reload,
            b"SHUTDOWN" | b"QUIT" => Self::Shutdown,
            b"FILDES" => Self::Fildes,
            _ if is_old => Self::Unknown,
            b"VERSIONCOMMANDS" => Self::VersionCommands,
            b"STATS" => Self::Stats,
            b"INSTREAM" => Self::InStream,
            b"IDSESSION" => Self::IdSession,
            b"END" => Self::End,
            _ => Self::Unknown,
        }
    }
}

/// A command as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    pub command: Command,
    /// What ends its answer.
    pub ending: u8,
    /// It came in the old form.
    pub is_old: bool,
}

/// What came and is no whole command yet.
#[derive(Debug, Default)]
pub struct Input(Vec<u8>);

impl Input {
    /// How much more it takes. 0: whoever sends it sends no command.
    pub fn room(&self) -> usize {
        LONGEST.saturating_sub(self.0.len())
    }

    pub fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// All that there is, when it is no command but a stream's beginning.
    pub fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.0)
    }

    /// Cuts the next whole command off.
    pub fn next_command(&mut self) -> Option<Received> {
        let (ending, is_old) = match self.0.first()? {
            b'z' => (0, false),
            b'n' => (b'\n', false),
            _ => (b'\n', true),
        };
        let end = self.0.iter().position(|byte| *byte == ending);
        let (words, mut len) = match (is_old, end) {
            (false, None) => return None,
            (false, Some(end)) => (&self.0[1..end], end + 1),
            (true, Some(end)) => (&self.0[..end], end + 1),
            (true, None) => (&self.0[..], self.0.len()),
        };
        let words = match (ending, is_old) {
            (0, _) => words,
            (_, false) => chomp(words),
            // A byte for the descriptor may already be there.
            (_, true) => chomp(words.split(|byte| *byte == 0).next().unwrap_or_default()),
        };
        let command = Command::parse(words, is_old);
        if command == Command::Fildes {
            let bare = is_old && end.is_none();
            len = if bare { words.len() + 1 } else { len + 1 };
            if self.0.len() < len {
                return None;
            }
        }
        if is_old && command != Command::Fildes {
            // One packet is one command, whatever is behind it.
            len = self.0.len();
        }
        self.0.drain(..len);
        if self.0.is_empty() {
            // Many connections wait most of the time.
            self.0 = Vec::new();
        }
        Some(Received { command, ending, is_old })
    }
}

fn chomp(mut words: &[u8]) -> &[u8] {
    while let [rest @ .., b'\r' | b'\n'] = words {
        words = rest;
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all(bytes: &[u8]) -> (Vec<Received>, usize) {
        let mut input = Input::default();
        input.push(bytes);
        let commands = std::iter::from_fn(|| input.next_command()).collect();
        (commands, input.0.len())
    }

    fn one(bytes: &[u8]) -> (Command, u8) {
        let (mut commands, left) = all(bytes);
        assert_eq!((commands.len(), left), (1, 0), "{:?}: {commands:?}", bytes.escape_ascii());
        let Received { command, ending, .. } = commands.remove(0);
        (command, ending)
    }

    #[test]
    fn the_three_forms_are_taken_apart() {
        for (bytes, ending) in [
            (&b"zPING\0"[..], 0),
            (b"nPING\n", b'\n'),
            (b"nPING\r\n", b'\n'),
            (b"PING\n", b'\n'),
            (b"PING\r\n", b'\n'),
            (b"PING", b'\n'),
            (b"PING\nmore", b'\n'),
        ] {
            assert_eq!(one(bytes), (Command::Ping, ending), "{:?}", bytes.escape_ascii());
        }
        let path = |how, path: &[u8]| (Command::Path(how, path.to_vec()), 0);
        assert_eq!(one(b"zSCAN /a b\n\0"), path(How::First, b"/a b\n"));
        assert_eq!(one(b"zCONTSCAN /a\0"), path(How::All, b"/a"));
        assert_eq!(one(b"zMULTISCAN /a\0"), path(How::Parallel, b"/a"));
        assert_eq!(one(b"zALLMATCHSCAN /a\0"), path(How::AllMatches, b"/a"));
        assert_eq!(one(b"zSCAN \0"), path(How::First, b""));
        for unknown in [
            &b"zPING\n\0"[..],
            b"zSCAN\0",
            b"z\0",
            b"\n",
            b"zping\0",
            b"zPINGPONG\0",
            b"STATS\n",
            b"INSTREAM\n",
            b"ALLMATCHSCAN /a\n",
            b"GET / HTTP/1.1\r\n\r\n",
        ] {
            assert_eq!(one(unknown).0, Command::Unknown, "{:?}", unknown.escape_ascii());
        }
        assert_eq!(all(b"zPIN"), (Vec::new(), 4));
        assert_eq!(all(b"nPING\0zPING\0"), (Vec::new(), 12), "each form has its own end");
    }

    #[test]
    fn fildes_waits_for_the_byte_that_carries_the_descriptor() {
        for (half, whole) in [
            (&b"zFILDES\0"[..], &b"zFILDES\0\0"[..]),
            (b"nFILDES\n", b"nFILDES\nx"),
            (b"FILDES\n", b"FILDES\n\0"),
            (b"FILDES", b"FILDES\0"),
        ] {
            assert_eq!(all(half).0, []);
            assert_eq!(one(whole).0, Command::Fildes, "{:?}", whole.escape_ascii());
        }
        let (commands, left) = all(b"zFILDES\0\0zFILDES\0\0zPING\0z");
        assert_eq!((commands.len(), left), (3, 1));
    }

    proptest! {
        /// Whatever comes, in whatever pieces: prefixed commands come out the same, and nothing that was
        /// cut off is longer than what went in.
        #[test]
        fn pieces_make_no_difference(
            bytes in proptest::collection::vec(
                prop_oneof![Just(b'z'), Just(b'n'), Just(0), Just(b'\n'), Just(b'P'), any::<u8>()],
                0..200,
            ),
            first in prop_oneof![Just(b'z'), Just(b'n')],
            cut in 0_usize..200,
        ) {
            let mut bytes = bytes;
            bytes.insert(0, first);
            let whole = all(&bytes);
            let cut = cut.min(bytes.len());
            let mut input = Input::default();
            let mut commands = Vec::new();
            for piece in [&bytes[..cut], &bytes[cut..]] {
                input.push(piece);
                // The old form has no end but that of what came at once.
                commands.extend(std::iter::from_fn(|| {
                    (!matches!(input.0.first(), Some(byte) if !b"zn".contains(byte)))
                        .then(|| input.next_command())
                        .flatten()
                }));
            }
            let prefixed = whole.0.into_iter().take_while(|one| !one.is_old);
            prop_assert!(prefixed.eq(commands));
            prop_assert!(whole.1 <= bytes.len());
        }
    }
}
