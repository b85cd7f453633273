//! The encrypted channel of a TCP link: Noise_NNpsk0 (noiseprotocol.org, revision 34, section 9),
//! keyed by the region's key.
//!
//! The driver is the initiator. After its [`Preface`](crate::Preface) each side sends one handshake
//! message of [`HANDSHAKE_LEN`] bytes; then everything travels in records: a length (u16, little
//! endian, of what follows), then at most 65,535 bytes of ciphertext with its tag. No I/O here.

use crate::Key;
use snow::{HandshakeState, StatelessTransportState};
use std::sync::Arc;

const PATTERN: &str = "Noise_NNpsk0_25519_ChaChaPoly_BLAKE2s";
const PROLOGUE: &[u8] = b"seawall link 1";
const TAG_LEN: usize = 16;
const LENGTH_LEN: usize = 2;
const PLAIN_MAX: usize = u16::MAX as usize - TAG_LEN;

/// Length of each of the two handshake messages: a public key and a tag.
pub const HANDSHAKE_LEN: usize = 48;

/// Why a channel cannot be, or is no longer.
#[derive(Debug, thiserror::Error)]
pub enum NoiseError {
    /// The peer does not hold the key, or the bytes were changed on the way.
    #[error("the peer does not hold this region's key, or its bytes were changed on the way")]
    Peer(#[source] snow::Error),
    /// The channel could not be set up on this side.
    #[error("the encrypted channel cannot be set up: {0}")]
    Local(#[source] snow::Error),
}

fn builder(key: &Key) -> Result<snow::Builder<'_>, NoiseError> {
    let parameters = PATTERN.parse().map_err(NoiseError::Local)?;
    snow::Builder::new(parameters)
        .prologue(PROLOGUE)
        .and_then(|builder| builder.psk(0, &key.0))
        .map_err(NoiseError::Local)
}

/// The driver's side of a handshake under way.
pub struct Initiator(HandshakeState);

impl Initiator {
    /// Begins; the bytes go to the host behind the preface.
    ///
    /// # Errors
    /// [`NoiseError::Local`].
    pub fn new(key: &Key) -> Result<(Self, [u8; HANDSHAKE_LEN]), NoiseError> {
        let mut state = builder(key)?.build_initiator().map_err(NoiseError::Local)?;
        let mut message = [0; HANDSHAKE_LEN];
        state.write_message(&[], &mut message).map_err(NoiseError::Local)?;
        Ok((Self(state), message))
    }

    /// Ends with the host's reply.
    ///
    /// # Errors
    /// [`NoiseError::Peer`] when the host holds another key.
    pub fn finish(mut self, reply: &[u8; HANDSHAKE_LEN]) -> Result<(Sealer, Opener), NoiseError> {
        self.0.read_message(reply, &mut []).map_err(NoiseError::Peer)?;
        split(self.0)
    }
}

/// The host's side of a handshake: reads the driver's message and gives the reply.
///
/// # Errors
/// [`NoiseError::Peer`] when the driver holds another key.
pub fn respond(
    key: &Key,
    message: &[u8; HANDSHAKE_LEN],
) -> Result<([u8; HANDSHAKE_LEN], Sealer, Opener), NoiseError> {
    let mut state = builder(key)?.build_responder().map_err(NoiseError::Local)?;
    state.read_message(message, &mut []).map_err(NoiseError::Peer)?;
    let mut reply = [0; HANDSHAKE_LEN];
    state.write_message(&[], &mut reply).map_err(NoiseError::Local)?;
    let (sealer, opener) = split(state)?;
    Ok((reply, sealer, opener))
}

fn split(state: HandshakeState) -> Result<(Sealer, Opener), NoiseError> {
    let state = Arc::new(state.into_stateless_transport_mode().map_err(NoiseError::Local)?);
    let sealer = Sealer { state: Arc::clone(&state), nonce: 0 };
    Ok((sealer, Opener { state, nonce: 0, pending: Vec::new(), plain: Vec::new() }))
}

/// Encrypts what is sent.
pub struct Sealer {
    state: Arc<StatelessTransportState>,
    nonce: u64,
}

impl Sealer {
    /// Appends `plain` to `out` as records.
    ///
    /// # Errors
    /// [`NoiseError::Local`]; the channel is of no use then.
    pub fn seal(&mut self, plain: &[u8], out: &mut Vec<u8>) -> Result<(), NoiseError> {
        for piece in plain.chunks(PLAIN_MAX) {
            let len = piece.len() + TAG_LEN;
            let length = u16::try_from(len).expect("PLAIN_MAX leaves room for the tag");
            out.extend_from_slice(&length.to_le_bytes());
            let start = out.len();
            out.resize(start + len, 0);
            self.state
                .write_message(self.nonce, piece, &mut out[start..])
                .map_err(NoiseError::Local)?;
            self.nonce += 1;
        }
        Ok(())
    }
}

/// Decrypts what arrives. Holds at most one record and what came behind it.
pub struct Opener {
    state: Arc<StatelessTransportState>,
    nonce: u64,
    pending: Vec<u8>,
    /// As large as the largest record so far.
    plain: Vec<u8>,
}

impl Opener {
    /// Takes bytes that arrived and gives those that could be decrypted to `deliver`.
    ///
    /// # Errors
    /// [`NoiseError::Peer`] when a record is not the peer's; the channel is of no use then.
    pub fn open(&mut self, bytes: &[u8], mut deliver: impl FnMut(&[u8])) -> Result<(), NoiseError> {
        self.pending.extend_from_slice(bytes);
        let mut at = 0;
        while let Some(length) = self.pending[at..].first_chunk::<LENGTH_LEN>() {
            let len = usize::from(u16::from_le_bytes(*length));
            let start = at + LENGTH_LEN;
            let Some(record) = self.pending.get(start..start + len) else { break };
            self.plain.resize(self.plain.len().max(len), 0);
            let read = self
                .state
                .read_message(self.nonce, record, &mut self.plain)
                .map_err(NoiseError::Peer)?;
            self.nonce += 1;
            deliver(&self.plain[..read]);
            at = start + len;
        }
        self.pending.drain(..at);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn channel() -> (Sealer, Opener) {
        let key = Key([7; 32]);
        let (initiator, message) = Initiator::new(&key).unwrap();
        let (reply, _, opener) = respond(&key, &message).unwrap();
        let (sealer, _) = initiator.finish(&reply).unwrap();
        (sealer, opener)
    }

    #[test]
    fn what_is_sealed_opens_in_any_pieces() {
        let (mut sealer, mut opener) = channel();
        let plain: Vec<u8> = (0..200_000_u32).map(|n| n as u8).collect();
        let (mut wire, mut got) = (Vec::new(), Vec::new());
        sealer.seal(&plain, &mut wire).unwrap();
        assert!(!wire.windows(64).any(|window| window == &plain[..64]));
        for piece in wire.chunks(777) {
            opener.open(piece, |bytes| got.extend_from_slice(bytes)).unwrap();
        }
        assert_eq!(got, plain);
    }

    #[test]
    fn another_key_is_refused_at_the_first_message() {
        let (_, message) = Initiator::new(&Key([1; 32])).unwrap();
        assert!(matches!(respond(&Key([2; 32]), &message), Err(NoiseError::Peer(_))));
    }

    #[test]
    fn changed_and_repeated_records_are_refused() {
        let (mut sealer, mut opener) = channel();
        let mut wire = Vec::new();
        sealer.seal(b"allow", &mut wire).unwrap();
        opener.open(&wire, |_| ()).unwrap();
        assert!(opener.open(&wire, |_| ()).is_err(), "a record replayed");

        let (mut sealer, mut opener) = channel();
        wire.clear();
        sealer.seal(b"allow", &mut wire).unwrap();
        *wire.last_mut().unwrap() ^= 1;
        assert!(opener.open(&wire, |_| ()).is_err(), "a record changed");
    }
}
