//! Messages between the lab and the exec server inside a guest.
//!
//! One TCP connection carries one request. Every frame is a kind byte, a length (u32, little endian)
//! and that many bytes of payload. The server stands on nothing of Seawall, so that the lab can look
//! into a guest whose protection is broken.

use std::io::{self, Read, Write};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Port of the exec server, on the guest's management address.
pub const PORT: u16 = 7326;

/// Largest payload of a frame, in bytes; a peer that names more is cut off.
pub const MAX_PAYLOAD: usize = 1 << 20;

/// What one connection asks for.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Request {
    /// Answered with [`Kind::Ended`] at once.
    Ping,
    /// Runs a command; see [`Exec`].
    Exec(Exec),
    /// Writes a file; the content follows as [`Kind::Stdin`] frames.
    Push {
        /// Absolute path in the guest; missing folders are made.
        path: String,
        /// Permission bits.
        mode: u32,
        /// User and group that shall own the file.
        owner: Option<u32>,
    },
    /// Reads a file: [`Kind::FileInfo`], then [`Kind::Stdout`] frames.
    Pull {
        /// Absolute path in the guest.
        path: String,
    },
    /// Where Seawall's driver runs; answered with [`Kind::Info`] holding [`AgentPids`].
    AgentPids,
    /// Sends a signal to the driver. Reads only `/proc`, so it works in a guest whose file systems hang.
    SignalAgent {
        /// Which of the two processes.
        part: AgentPart,
        /// Signal number.
        signal: i32,
    },
    /// Syncs and powers the machine off without asking any service.
    PowerOff,
}

/// One command.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Exec {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Numeric user (and group) to become.
    pub user: Option<u32>,
    /// Working folder; `/` when absent.
    pub cwd: Option<String>,
    /// Additional environment.
    pub env: Vec<(String, String)>,
    /// The command and its process group are killed after this many milliseconds.
    pub timeout_ms: Option<u64>,
    /// Whether [`Kind::Stdin`] frames follow.
    pub stdin: bool,
}

/// The two processes of the driver.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AgentPart {
    /// The supervisor's child, which reads the events.
    Worker,
    /// The process that watches over the worker.
    Supervisor,
}

/// Process numbers of the driver in a guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentPids {
    /// The supervisor, when one runs.
    pub supervisor: Option<u32>,
    /// Its worker, when one runs.
    pub worker: Option<u32>,
}

/// How a command came to its end.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// Exit status, or 128 plus the signal's number.
    pub status: i32,
    /// True when the time-out killed it.
    pub timed_out: bool,
}

/// A request that could not be carried out.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Failed {
    /// What was tried.
    pub what: String,
    /// Error number of the guest's kernel, when it came from there.
    pub errno: Option<i32>,
}

/// What a pulled file looks like.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct FileInfo {
    /// Permission bits.
    pub mode: u32,
    /// Size in bytes when it was opened.
    pub size: u64,
}

/// First byte of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// [`Request`] as JSON; the first frame of a connection.
    Request = 1,
    /// Bytes for the command's input, or a pushed file's content.
    Stdin = 2,
    /// End of the input.
    StdinEnd = 3,
    /// Bytes of the command's output, or a pulled file's content.
    Stdout = 4,
    /// Bytes of the command's error output.
    Stderr = 5,
    /// The command runs; payload is its process number as JSON.
    Started = 6,
    /// [`Ended`] as JSON; the last frame.
    Ended = 7,
    /// [`Failed`] as JSON; the last frame.
    Failed = 8,
    /// [`FileInfo`] as JSON.
    FileInfo = 9,
    /// Any other answer as JSON; the last frame.
    Info = 10,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        use Kind::*;
        [Request, Stdin, StdinEnd, Stdout, Stderr, Started, Ended, Failed, FileInfo, Info]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
    }
}

/// Writes one frame.
pub fn write_frame(to: &mut impl Write, kind: Kind, payload: &[u8]) -> io::Result<()> {
    let length = u32::try_from(payload.len())
        .ok()
        .filter(|n| *n as usize <= MAX_PAYLOAD)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "frame too large"))?;
    // One write: two small segments would wait for each other's acknowledgement.
    let mut frame = Vec::with_capacity(5 + payload.len());
    frame.push(kind as u8);
    frame.extend_from_slice(&length.to_le_bytes());
    frame.extend_from_slice(payload);
    to.write_all(&frame)
}

/// Writes one frame with a JSON payload.
pub fn write_json(to: &mut impl Write, kind: Kind, value: &impl Serialize) -> io::Result<()> {
    write_frame(to, kind, &serde_json::to_vec(value)?)
}

/// Reads one frame.
pub fn read_frame(from: &mut impl Read) -> io::Result<(Kind, Vec<u8>)> {
    let mut head = [0u8; 5];
    from.read_exact(&mut head)?;
    let length = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
    let kind = Kind::from_byte(head[0]).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("unknown frame {}", head[0]))
    })?;
    if length > MAX_PAYLOAD {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("frame of {length} bytes")));
    }
    let mut payload = vec![0; length];
    from.read_exact(&mut payload)?;
    Ok((kind, payload))
}

/// Parses a JSON payload.
pub fn parse<T: DeserializeOwned>(payload: &[u8]) -> io::Result<T> {
    serde_json::from_slice(payload).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_comes_back_as_written() {
        let mut bytes = Vec::new();
        write_frame(&mut bytes, Kind::Stderr, b"words").unwrap();
        assert_eq!(read_frame(&mut bytes.as_slice()).unwrap(), (Kind::Stderr, b"words".to_vec()));
    }

    #[test]
    fn unknown_and_oversized_frames_are_refused() {
        assert!(read_frame(&mut [99u8, 0, 0, 0, 0].as_slice()).is_err());
        assert!(read_frame(&mut [4u8, 255, 255, 255, 255].as_slice()).is_err());
    }
}
