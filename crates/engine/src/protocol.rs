//! Messages between the service and an engine process.
//!
//! One message is one datagram of a `SOCK_SEQPACKET` unix socket pair, so the kernel keeps message
//! bounds and hands each message to exactly one of the engine's threads. A [`Scan`] carries one descriptor by
//! `SCM_RIGHTS`; where it carries none, the content follows the message in the same datagram.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | magic `SWEN` |
//! | 4 | 2 | version, little endian |
//! | 6 | 2 | feature bits, little endian; none is defined, a receiver refuses those it does not know |
//! | 8 | – | message, postcard |
//!
//! The receiver's buffer is the byte cap ([`MAX_TO_ENGINE`], [`MAX_TO_HOST`]): a longer datagram is
//! refused before anything is decoded.
//!
//! The host trusts nothing that an engine says: after decoding, [`decode_to_host`] checks each count
//! and length, and the supervisor checks each id against what it sent.

use serde::{Deserialize, Serialize};

use crate::report::{
    Description, Detection, Diagnostic, MAX_DETECTIONS, MAX_MEMBER, MAX_NAME, MAX_PATH, MAX_REASON,
    Metadata, Outcome, clip,
};

/// Version of the messages in this file.
///
/// 1: the first one. 2: small content follows its `Scan`, and `Ready` says whether the engine wants that; `Report` tells the
/// scan that comes next. 3: a scan says how far to look into archives, and a detection in which member it is.
pub const VERSION: u16 = 3;
/// First four bytes of each message.
pub const MAGIC: [u8; 4] = *b"SWEN";
/// Bytes before the message proper.
pub const HEADER: usize = 8;
/// Longest content that follows its [`Scan`] in the same datagram, in bytes.
pub const INLINE_MAX: usize = 64 * 1024;
/// Byte cap of a message to an engine, content included.
pub const MAX_TO_ENGINE: usize = 16 * 1024 + INLINE_MAX;
/// Bytes of the page of cancelled scans, see [`Start`].
pub const CANCEL_PAGE: usize = 4096;
/// Byte cap of a message to the host. Below the kernel's default socket buffer of 208 KiB, above
/// which a datagram cannot be sent at all.
pub const MAX_TO_HOST: usize = 128 * 1024;

/// What an engine process must keep to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Private memory of the whole process, signatures included, in bytes.
    pub memory: u64,
}

/// First message: how to load. It comes with one descriptor, which can only be read: the page in which the
/// host notes the scans that nobody wants any more.
///
/// The page is [`CANCEL_PAGE`] bytes of 64-bit numbers in this machine's byte order. A scan is cancelled when
/// the number at its id modulo their count is its id. Looking there is a courtesy: an engine may ignore it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// Worker threads to run.
    pub threads: u32,
    /// Limits of the process.
    pub limits: Limits,
    /// True: signatures that do not all load are refused as a whole, because a good process runs.
    /// False: load what can be loaded, and report the rest.
    pub strict: bool,
}

/// A request to scan what is behind the one descriptor that comes with it, or what follows it where none does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scan {
    /// Chosen by the host, never used twice by one supervisor.
    pub id: u64,
    /// Bytes of content behind the descriptor, or behind the message.
    pub length: u64,
    /// Milliseconds after which the process is killed; the engine should give up before.
    pub limit_ms: u32,
    /// What is known of the file.
    pub metadata: Metadata,
}

/// Host to engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToEngine {
    /// First message, once. Comes with one descriptor.
    Start(Start),
    /// Comes with one descriptor, or with its content.
    Scan(Scan),
    /// Are you there? Answered by any free worker.
    Ping,
}

/// How a scan ended, as the engine tells it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// The scan finished.
    Done(Outcome),
    /// The scan could not be finished.
    Error {
        /// For people.
        reason: String,
    },
    /// The engine gave up before its time limit.
    TimedOut {
        /// What took the time, for people; empty where the engine does not know.
        what: String,
    },
    /// The engine gave up since nobody wants the report.
    Cancelled,
}

/// Engine to host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToHost {
    /// Signatures are loaded, the sandbox is entered.
    Ready(Description),
    /// The engine cannot run, or a strict start met errors; it exits.
    Failed {
        /// Why.
        diagnostics: Vec<Diagnostic>,
        /// Diagnostics left out because the message would have been too long.
        omitted: u32,
    },
    /// A worker that had none took this scan: its time runs from now.
    Started {
        /// As in [`Scan`].
        id: u64,
    },
    /// A scan ended. Only after `Started`, or `next`, with the same id.
    Report {
        /// As in [`Scan`].
        id: u64,
        /// How.
        answer: Answer,
        /// The scan that the same worker has taken meanwhile, as `Started` would tell it.
        next: Option<u64>,
    },
    /// Answer to [`ToEngine::Ping`].
    Pong,
}

/// Why a message was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// Longer than the cap.
    #[error("a message is longer than {most} bytes")]
    TooLong {
        /// The cap.
        most: usize,
    },
    /// Shorter than the header.
    #[error("a message of {got} bytes is too short for its header of {HEADER}")]
    TooShort {
        /// Bytes received.
        got: usize,
    },
    /// Not ours.
    #[error("a message starts with {got:02x?}, not with {MAGIC:02x?}")]
    Magic {
        /// The bytes received.
        got: [u8; 4],
    },
    /// Another version.
    #[error("engine protocol version {VERSION} expected, {got} came")]
    Version {
        /// The version received.
        got: u16,
    },
    /// Feature bits nobody defined.
    #[error("unknown feature bits {got:#06x}")]
    Features {
        /// The bits received.
        got: u16,
    },
    /// Does not decode, or bytes are left over.
    #[error("a message does not decode: {reason}")]
    Encoding {
        /// The decoder's words.
        reason: String,
    },
    /// Decodes, but a field is out of its bounds.
    #[error("{field} is out of bounds: {got}, at most {most}")]
    Bounds {
        /// The field.
        field: &'static str,
        /// Its length or count.
        got: usize,
        /// The bound.
        most: usize,
    },
    /// A message to the host that brings a descriptor.
    #[error("a message brings a descriptor, which no engine's message may")]
    Descriptor,
    /// A scan whose content is not as long as it says.
    #[error("{got} bytes of content came where {expected} were announced")]
    Content {
        /// Bytes announced.
        expected: u64,
        /// Bytes that follow the message.
        got: usize,
    },
    /// An infected report without a detection.
    #[error("an infected report names no detection")]
    NoDetection,
}

/// Encodes one message, header included.
fn encode<M: Serialize>(message: &M, most: usize) -> Result<Vec<u8>, ProtocolError> {
    let mut bytes = Vec::with_capacity(256);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&0u16.to_le_bytes());
    let bytes = postcard::to_extend(message, bytes)
        .map_err(|error| ProtocolError::Encoding { reason: error.to_string() })?;
    if bytes.len() > most {
        return Err(ProtocolError::TooLong { most });
    }
    Ok(bytes)
}

/// Checks the header and decodes the message; gives what follows it, too.
fn decode_first<'a, M: Deserialize<'a>>(
    bytes: &'a [u8],
    most: usize,
) -> Result<(M, &'a [u8]), ProtocolError> {
    if bytes.len() > most {
        return Err(ProtocolError::TooLong { most });
    }
    let Some((header, body)) = bytes.split_first_chunk::<HEADER>() else {
        return Err(ProtocolError::TooShort { got: bytes.len() });
    };
    let [m0, m1, m2, m3, v0, v1, f0, f1] = *header;
    if [m0, m1, m2, m3] != MAGIC {
        return Err(ProtocolError::Magic { got: [m0, m1, m2, m3] });
    }
    let version = u16::from_le_bytes([v0, v1]);
    if version != VERSION {
        return Err(ProtocolError::Version { got: version });
    }
    let features = u16::from_le_bytes([f0, f1]);
    if features != 0 {
        return Err(ProtocolError::Features { got: features });
    }
    postcard::take_from_bytes(body)
        .map_err(|error| ProtocolError::Encoding { reason: error.to_string() })
}

fn nothing_follows(rest: &[u8]) -> Result<(), ProtocolError> {
    if rest.is_empty() {
        return Ok(());
    }
    Err(ProtocolError::Encoding { reason: format!("{} bytes are left over", rest.len()) })
}

/// Encodes a message to an engine; of a path that is too long, the end is kept. Content that is to follow is not
/// part of it: append at most [`INLINE_MAX`] bytes.
pub fn encode_to_engine(mut message: ToEngine) -> Result<Vec<u8>, ProtocolError> {
    if let ToEngine::Scan(scan) = &mut message {
        let path = &mut scan.metadata.path;
        path.drain(..path.len().saturating_sub(MAX_PATH));
        clip(&mut scan.metadata.guest, MAX_NAME);
    }
    encode(&message, MAX_TO_ENGINE - INLINE_MAX)
}

/// Decodes a datagram that an engine received, and gives the content that follows the message: for a [`Scan`] that came
/// with a descriptor nothing, for one that came without all of it.
pub fn decode_to_engine(
    bytes: &[u8],
    with_descriptor: bool,
) -> Result<(ToEngine, &[u8]), ProtocolError> {
    let (message, rest) = decode_first(bytes, MAX_TO_ENGINE)?;
    match &message {
        ToEngine::Scan(scan) if !with_descriptor => {
            if rest.len() as u64 != scan.length {
                return Err(ProtocolError::Content { expected: scan.length, got: rest.len() });
            }
        }
        _ => nothing_follows(rest)?,
    }
    Ok((message, rest))
}

/// Encodes a message to the host, shortening what is too long to travel.
pub fn encode_to_host(mut message: ToHost) -> Result<Vec<u8>, ProtocolError> {
    match &mut message {
        ToHost::Ready(description) => {
            clip(&mut description.name, MAX_NAME);
            clip(&mut description.version, MAX_NAME);
            clip_diagnostics(&mut description.diagnostics, &mut description.omitted);
        }
        ToHost::Failed { diagnostics, omitted } => clip_diagnostics(diagnostics, omitted),
        ToHost::Report { answer: Answer::Done(Outcome::Infected(detections)), .. } => {
            detections.truncate(MAX_DETECTIONS);
            for detection in detections {
                clip(&mut detection.name, MAX_NAME);
                if let Some(family) = &mut detection.family {
                    clip(family, MAX_NAME);
                }
                if let Some(member) = &mut detection.member {
                    clip(member, MAX_MEMBER);
                }
            }
        }
        ToHost::Report { answer: Answer::Done(Outcome::Allowed { name }), .. } => {
            clip(name, MAX_NAME);
        }
        ToHost::Report {
            answer: Answer::Error { reason: text } | Answer::TimedOut { what: text },
            ..
        } => clip(text, MAX_REASON),
        ToHost::Report { .. } | ToHost::Started { .. } | ToHost::Pong => {}
    }
    encode(&message, MAX_TO_HOST)
}

/// Decodes a message from an engine and checks every bound.
pub fn decode_to_host(bytes: &[u8]) -> Result<ToHost, ProtocolError> {
    let (message, rest) = decode_first::<ToHost>(bytes, MAX_TO_HOST)?;
    nothing_follows(rest)?;
    match &message {
        ToHost::Ready(description) => {
            bound("engine name", description.name.len(), MAX_NAME)?;
            bound("engine version", description.version.len(), MAX_NAME)?;
            check_diagnostics(&description.diagnostics)?;
        }
        ToHost::Failed { diagnostics, .. } => check_diagnostics(diagnostics)?,
        ToHost::Report { answer: Answer::Done(Outcome::Infected(detections)), .. } => {
            check_detections(detections)?;
        }
        ToHost::Report { answer: Answer::Done(Outcome::Allowed { name }), .. } => {
            bound("list entry", name.len(), MAX_NAME)?;
        }
        ToHost::Report {
            answer: Answer::Error { reason: text } | Answer::TimedOut { what: text },
            ..
        } => bound("reason", text.len(), MAX_REASON)?,
        ToHost::Report { .. } | ToHost::Started { .. } | ToHost::Pong => {}
    }
    Ok(message)
}

fn bound(field: &'static str, got: usize, most: usize) -> Result<(), ProtocolError> {
    if got > most { Err(ProtocolError::Bounds { field, got, most }) } else { Ok(()) }
}

fn check_diagnostics(diagnostics: &[Diagnostic]) -> Result<(), ProtocolError> {
    diagnostics.iter().try_for_each(|one| {
        bound("diagnostic's file", one.file.len(), MAX_REASON)?;
        bound("diagnostic's code", one.code.len(), MAX_NAME)?;
        bound("diagnostic's reason", one.reason.len(), MAX_REASON)
    })
}

fn check_detections(detections: &[Detection]) -> Result<(), ProtocolError> {
    if detections.is_empty() {
        return Err(ProtocolError::NoDetection);
    }
    bound("number of detections", detections.len(), MAX_DETECTIONS)?;
    detections.iter().try_for_each(|one| {
        bound("detection's name", one.name.len(), MAX_NAME)?;
        bound("detection's family", one.family.as_ref().map_or(0, String::len), MAX_NAME)?;
        bound("detection's member", one.member.as_ref().map_or(0, String::len), MAX_MEMBER)
    })
}

/// Keeps as many diagnostics as fit into a message, errors and warnings in their order, and counts
/// the others.
fn clip_diagnostics(diagnostics: &mut Vec<Diagnostic>, omitted: &mut u32) {
    // A level, two numbers and three length prefixes take at most this many bytes.
    const FIXED: usize = 32;
    // What remains is for the header, the description's own strings and the length prefixes.
    let mut room = MAX_TO_HOST - 4 * 1024;
    let mut fits = 0;
    for one in diagnostics.iter_mut() {
        one.clip();
        let size = FIXED + one.file.len() + one.code.len() + one.reason.len();
        let Some(rest) = room.checked_sub(size) else { break };
        room = rest;
        fits += 1;
    }
    let dropped = diagnostics.len() - fits;
    *omitted = omitted.saturating_add(u32::try_from(dropped).unwrap_or(u32::MAX));
    diagnostics.truncate(fits);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::report::{ArchiveLimits, Generation, Operation, Severity};

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn description() -> Description {
        let warning = Diagnostic {
            level: Level::Warning,
            file: "a.yar".into(),
            line: 3,
            column: 1,
            code: "W1".into(),
            reason: "slow".into(),
        };
        let plain = Description::new("yara", "1.22", Generation([7; 32])).with_rules(300);
        Description { omitted: 2, ..plain.with_diagnostics(vec![warning]) }
    }

    use crate::report::Level;

    fn detection() -> Detection {
        Detection {
            name: "Eicar".into(),
            severity: Severity::High,
            family: Some("test".into()),
            offset: Some(300),
            cleaning: None,
            member: Some("m".into()),
        }
    }

    /// Version 3 on the wire. A change here is a new version.
    #[test]
    fn golden_bytes_to_the_engine() {
        let head = "5357454e03000000";
        let start =
            ToEngine::Start(Start { threads: 2, limits: Limits { memory: 1 << 31 }, strict: true });
        let scan = ToEngine::Scan(Scan {
            id: 300,
            length: 68,
            limit_ms: 30_000,
            metadata: Metadata {
                path: b"/tmp/\xff".to_vec(),
                guest: "g1".into(),
                operation: Operation::Exec,
                size: 69,
                archives: Some(ArchiveLimits {
                    depth: 6,
                    members: 10_000,
                    member: 128 << 20,
                    unpacked: 1 << 30,
                }),
            },
        });
        for (message, golden) in [
            (start, "0002808080800801"),
            (scan, "01ac0244b0ea01062f746d702fff02673101450106904e808080408080808004"),
            (ToEngine::Ping, "02"),
        ] {
            let bytes = encode_to_engine(message.clone()).unwrap();
            assert_eq!(hex(&bytes), format!("{head}{golden}"), "{message:?}");
            assert_eq!(decode_to_engine(&bytes, true).unwrap(), (message, &[][..]));
        }
    }

    #[test]
    fn golden_bytes_to_the_host() {
        let head = "5357454e03000000";
        let seven = "07".repeat(32);
        let infected = Answer::Done(Outcome::Infected(vec![detection()]));
        for (message, golden) in [
            (
                ToHost::Ready(description()),
                format!(
                    "00047961726104312e3232{seven}0000ac02010105612e79617203010257310\
                         4736c6f7702"
                ),
            ),
            (
                ToHost::Failed { diagnostics: vec![Diagnostic::error("E1", "x")], omitted: 0 },
                "010100000000024531017800".into(),
            ),
            (ToHost::Started { id: 300 }, "02ac02".into()),
            (
                ToHost::Report { id: 300, answer: Answer::Done(Outcome::Clean), next: Some(301) },
                "03ac02000001ad02".into(),
            ),
            (
                ToHost::Report { id: 300, answer: infected, next: None },
                "03ac020001010545696361720201047465737401ac020001016d00".into(),
            ),
            (
                ToHost::Report { id: 1, answer: Answer::Error { reason: "no".into() }, next: None },
                "030101026e6f00".into(),
            ),
            (
                ToHost::Report {
                    id: 1,
                    answer: Answer::TimedOut { what: String::new() },
                    next: None,
                },
                "0301020000".into(),
            ),
            (ToHost::Report { id: 1, answer: Answer::Cancelled, next: None }, "03010300".into()),
            (
                ToHost::Report {
                    id: 1,
                    answer: Answer::Done(Outcome::Allowed { name: "l:3".into() }),
                    next: None,
                },
                "03010002036c3a3300".into(),
            ),
            (ToHost::Pong, "04".into()),
        ] {
            let bytes = encode_to_host(message.clone()).unwrap();
            assert_eq!(hex(&bytes), format!("{head}{golden}"), "{message:?}");
            assert_eq!(decode_to_host(&bytes).unwrap(), message);
        }
    }

    #[test]
    fn what_is_not_ours_is_refused_by_name() {
        let good = encode_to_host(ToHost::Pong).unwrap();
        let with = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            decode_to_host(&bytes).unwrap_err()
        };
        assert!(matches!(with(0, b'X'), ProtocolError::Magic { .. }));
        assert_eq!(with(4, 9), ProtocolError::Version { got: 9 });
        assert_eq!(with(6, 1), ProtocolError::Features { got: 1 });
        assert!(matches!(with(8, 99), ProtocolError::Encoding { .. }));
        assert_eq!(decode_to_host(b"SWE"), Err(ProtocolError::TooShort { got: 3 }));
        let mut long = good.clone();
        long.push(0);
        assert!(matches!(decode_to_host(&long), Err(ProtocolError::Encoding { .. })));
        long.resize(MAX_TO_HOST + 1, 0);
        assert_eq!(decode_to_host(&long), Err(ProtocolError::TooLong { most: MAX_TO_HOST }));
    }

    #[test]
    fn bounds_hold_against_an_engine_that_does_not_clip() {
        let send =
            |answer| encode(&ToHost::Report { id: 1, answer, next: None }, MAX_TO_HOST).unwrap();
        let empty = send(Answer::Done(Outcome::Infected(Vec::new())));
        assert_eq!(decode_to_host(&empty), Err(ProtocolError::NoDetection));
        let many = send(Answer::Done(Outcome::Infected(vec![detection(); MAX_DETECTIONS + 1])));
        assert!(matches!(decode_to_host(&many), Err(ProtocolError::Bounds { .. })));
        let long = send(Answer::Error { reason: "x".repeat(MAX_REASON + 1) });
        assert!(matches!(decode_to_host(&long), Err(ProtocolError::Bounds { .. })));
    }

    #[test]
    fn content_follows_a_scan_that_came_without_a_descriptor_and_nothing_else() {
        let metadata = Metadata {
            path: vec![],
            guest: String::new(),
            operation: Operation::Open,
            size: 3,
            archives: None,
        };
        let scan = ToEngine::Scan(Scan { id: 1, length: 3, limit_ms: 1, metadata });
        let bytes = encode_to_engine(scan.clone()).unwrap();
        let with = |tail: &[u8]| [&bytes[..], tail].concat();
        assert_eq!(decode_to_engine(&with(b"abc"), false), Ok((scan.clone(), &b"abc"[..])));
        assert_eq!(decode_to_engine(&bytes, true), Ok((scan, &[][..])));
        for tail in [&b""[..], b"ab", b"abcd"] {
            let wrong = ProtocolError::Content { expected: 3, got: tail.len() };
            assert_eq!(decode_to_engine(&with(tail), false), Err(wrong));
        }
        let left_over = decode_to_engine(&with(b"abc"), true).unwrap_err();
        assert!(matches!(left_over, ProtocolError::Encoding { .. }), "{left_over}");
        let ping = [encode_to_engine(ToEngine::Ping).unwrap(), vec![0]].concat();
        assert!(matches!(decode_to_engine(&ping, false), Err(ProtocolError::Encoding { .. })));
    }

    /// A length prefix of 2^60 must not allocate.
    #[test]
    fn a_lying_length_is_refused() {
        let mut bytes = encode(&(), MAX_TO_HOST).unwrap();
        bytes.extend_from_slice(&[3, 1, 0, 1]);
        bytes.extend_from_slice(&[0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x10]);
        assert!(matches!(decode_to_host(&bytes), Err(ProtocolError::Encoding { .. })));
    }

    #[test]
    fn ten_thousand_broken_files_still_fit_a_message() {
        let one = Diagnostic {
            file: "f".repeat(100),
            ..Diagnostic::error("E001", "r".repeat(2 * MAX_REASON))
        };
        let message = ToHost::Failed { diagnostics: vec![one; 10_000], omitted: 0 };
        let bytes = encode_to_host(message).unwrap();
        let ToHost::Failed { diagnostics, omitted } = decode_to_host(&bytes).unwrap() else {
            panic!("another message");
        };
        assert!(diagnostics.len() > 50);
        assert_eq!(diagnostics.len() + omitted as usize, 10_000);
    }

    #[test]
    fn of_a_long_path_the_end_travels() {
        let mut path = vec![b'a'; 2 * MAX_PATH];
        path.extend_from_slice(b"/name");
        let scan = Scan {
            id: 1,
            length: 0,
            limit_ms: 1,
            metadata: Metadata {
                path,
                guest: "g".repeat(1000),
                operation: Operation::Open,
                size: 0,
                archives: None,
            },
        };
        let bytes = encode_to_engine(ToEngine::Scan(scan)).unwrap();
        let (ToEngine::Scan(scan), []) = decode_to_engine(&bytes, true).unwrap() else {
            panic!("another message");
        };
        assert_eq!(scan.metadata.path.len(), MAX_PATH);
        assert!(scan.metadata.path.ends_with(b"/name"));
        assert_eq!(scan.metadata.guest.len(), MAX_NAME);
    }
}
