//! Frames: a length (u32, little endian, of what follows), then that many bytes of postcard.
//!
//! A payload is at most [`PAYLOAD_MAX`] bytes, checked before anything is allocated for it. A
//! payload whose first varint names a message that this build does not know decodes to `None` and
//! is skipped, so a newer peer may say more than an older one understands.

use crate::{ToGuest, ToHost};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The longest payload in bytes. The longest message is a request with a path of 4,096 bytes and
/// [`INLINE_MAX`](crate::INLINE_MAX) bytes of content.
pub const PAYLOAD_MAX: usize = 64 * 1024;

const LENGTH_LEN: usize = 4;

/// Why bytes are not a frame, or a frame not a message.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FrameError {
    /// The peer announced more than the cap.
    #[error("a frame of {announced} bytes was announced; the most is {PAYLOAD_MAX}")]
    TooLong {
        /// The announced length in bytes.
        announced: usize,
    },
    /// A payload of no bytes, which holds no message.
    #[error("an empty frame")]
    Empty,
    /// The payload names a known message but is not one.
    #[error("a frame of {len} bytes is not a message of kind {kind}: {reason}")]
    Malformed {
        /// The message's number.
        kind: u32,
        /// The payload's length in bytes.
        len: usize,
        /// What the deserialiser says.
        reason: postcard::Error,
    },
}

/// A message enum whose variants are numbered from zero without gaps.
pub trait Message: Serialize + DeserializeOwned {
    /// How many variants this build knows.
    const KINDS: u32;
}

impl Message for ToHost {
    const KINDS: u32 = 15;
}

impl Message for ToGuest {
    const KINDS: u32 = 17;
}

/// Appends `message` as one frame.
///
/// # Errors
/// [`FrameError::TooLong`] when the message is over the cap; nothing is appended then.
pub fn encode<M: Message>(message: &M, out: &mut Vec<u8>) -> Result<(), FrameError> {
    let start = out.len();
    out.extend_from_slice(&[0; LENGTH_LEN]);
    let mut whole = postcard::to_extend(message, std::mem::take(out))
        .map_err(|reason| FrameError::Malformed { kind: 0, len: 0, reason })?;
    let len = whole.len() - start - LENGTH_LEN;
    let fits = u32::try_from(len).ok().filter(|_| len <= PAYLOAD_MAX);
    match fits {
        Some(length) => whole[start..start + LENGTH_LEN].copy_from_slice(&length.to_le_bytes()),
        None => whole.truncate(start),
    }
    *out = whole;
    fits.map(|_| ()).ok_or(FrameError::TooLong { announced: len })
}

/// Reads one payload. `None` is a message of a kind that this build does not know.
///
/// # Errors
/// [`FrameError::Empty`] and [`FrameError::Malformed`].
pub fn decode<M: Message>(payload: &[u8]) -> Result<Option<M>, FrameError> {
    if payload.is_empty() {
        return Err(FrameError::Empty);
    }
    let malformed = |kind| move |reason| FrameError::Malformed { kind, len: payload.len(), reason };
    let (kind, _) = postcard::take_from_bytes::<u32>(payload).map_err(malformed(u32::MAX))?;
    if kind >= M::KINDS {
        return Ok(None);
    }
    postcard::from_bytes(payload).map(Some).map_err(malformed(kind))
}

/// Collects bytes as they arrive and gives payloads as they become whole. Holds at most one frame
/// and what came in the same read behind it.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: Vec<u8>,
    taken: usize,
}

impl Decoder {
    /// An empty decoder.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds bytes that arrived.
    pub fn extend(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.taken);
        self.taken = 0;
        self.buffer.extend_from_slice(bytes);
    }

    /// The bytes that are in no payload yet.
    #[must_use]
    pub fn pending(&self) -> &[u8] {
        &self.buffer[self.taken..]
    }

    /// Takes the first `len` pending bytes out as they are: the hello that precedes the frames.
    ///
    /// # Panics
    /// When fewer are [pending](Self::pending).
    pub fn take_raw(&mut self, len: usize) -> &[u8] {
        let start = self.taken;
        self.taken += len;
        &self.buffer[start..start + len]
    }

    /// The next whole payload, or `None` until more bytes arrive.
    ///
    /// # Errors
    /// [`FrameError::TooLong`] as soon as the length is there; the connection is of no use then.
    pub fn next_payload(&mut self) -> Result<Option<&[u8]>, FrameError> {
        let pending = &self.buffer[self.taken..];
        let Some(length) = pending.first_chunk::<LENGTH_LEN>() else { return Ok(None) };
        let announced = u32::from_le_bytes(*length) as usize;
        if announced > PAYLOAD_MAX {
            return Err(FrameError::TooLong { announced });
        }
        let end = LENGTH_LEN + announced;
        if pending.len() < end {
            return Ok(None);
        }
        let start = self.taken + LENGTH_LEN;
        self.taken += end;
        Ok(Some(&self.buffer[start..start + announced]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Heartbeat;
    use proptest::prelude::*;

    #[test]
    fn an_oversized_frame_is_refused_by_its_length_alone() {
        let mut decoder = Decoder::new();
        decoder.extend(&u32::MAX.to_le_bytes());
        assert_eq!(
            decoder.next_payload(),
            Err(FrameError::TooLong { announced: u32::MAX as usize })
        );
    }

    #[test]
    fn a_message_of_a_later_version_is_skipped() {
        assert!(matches!(decode::<ToHost>(&[ToHost::KINDS as u8, 1, 2, 3]), Ok(None)));
    }

    proptest! {
        #[test]
        fn garbage_never_panics_and_never_grows_beyond_what_came(
            chunks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..20)
        ) {
            let mut decoder = Decoder::new();
            for chunk in chunks {
                decoder.extend(&chunk);
                while let Ok(Some(payload)) = decoder.next_payload() {
                    let _ = decode::<ToHost>(payload);
                    let _ = decode::<ToGuest>(payload);
                }
            }
        }

        #[test]
        fn frames_survive_any_cut(cuts in prop::collection::vec(1_usize..9, 1..40)) {
            let mut wire = Vec::new();
            for events in 0..10 {
                let beat = Heartbeat { events, ..Heartbeat::default() };
                encode(&ToHost::Heartbeat(beat), &mut wire).unwrap();
            }
            let (mut decoder, mut seen, mut rest) = (Decoder::new(), 0, &wire[..]);
            for cut in cuts.iter().cycle() {
                if rest.is_empty() { break }
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                rest = later;
                decoder.extend(now);
                while let Some(payload) = decoder.next_payload().unwrap() {
                    let message = decode::<ToHost>(payload).unwrap();
                    let Some(ToHost::Heartbeat(beat)) = message else { panic!("{message:?}") };
                    prop_assert_eq!(beat.events, seen);
                    seen += 1;
                }
            }
            prop_assert_eq!(seen, 10);
        }
    }
}
