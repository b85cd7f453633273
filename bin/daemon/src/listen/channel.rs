//! A guest's virtio-serial channel: one socket on which QEMU stays connected, and on it one session
//! after another.
//!
//! ```text
//!   nothing ──sync──► handshake ──► session ──sync──► handshake …
//!      ▲  (bytes of a session that is gone: "lost")       │ QEMU ends, or this side ends a session
//!      └──────────────────────────────────────────────────┘ by ending the socket: QEMU connects again
//! ```
//!
//! A channel has no connections of its own: whatever the last driver left in it comes first. The driver
//! begins with a sync record, which this side repeats ([`seawall_proto::serial`]).

use super::handshake::Handshake;
use crate::guest::Guest;
use crate::host::Host;
use crate::link::{Connection, LinkReader, ReadError, Socket};
use crate::session::Session;
use seawall_proto::serial::{Token, encode_lost, encode_sync};
use std::sync::Arc;

/// Serves a channel until its socket ends.
pub fn serve(host: &Arc<Host>, guest: &Arc<Guest>, socket: Socket) {
    guest.take_channel(socket.clone());
    let mut reader = LinkReader::of_channel(socket.clone());
    let mut begun = None;
    loop {
        let token = match begun.take() {
            Some(token) => token,
            None => match wait_begin(&socket, &mut reader) {
                Some(token) => token,
                None => break,
            },
        };
        let own = socket.again();
        let mut wire = Vec::new();
        encode_sync(&token, &mut wire);
        if own.send_first(&wire).is_err() {
            break;
        }
        let place = guest.half_open(own.clone());
        let connection = Connection::of_channel(own, reader);
        match Handshake::new(Arc::clone(host), Arc::clone(guest), place).go_on(connection) {
            Some((unread, next)) => (reader, begun) = (unread, Some(next)),
            None => break,
        }
    }
    // Also where a session's end left it open.
    socket.end();
}

/// Waits for a driver to begin. One that goes on with a session that is not there is told so. `None`
/// when the socket has ended.
fn wait_begin(socket: &Socket, reader: &mut LinkReader) -> Option<Token> {
    socket.set_patience(Session::patience()).ok()?;
    loop {
        let mut anything = false;
        match reader.read(|_| anything = true) {
            Ok(_) if anything => {
                let mut wire = Vec::new();
                encode_lost(&mut wire);
                // One that does not read hears it another time.
                let _ = socket.send_now(&wire);
            }
            Ok(_) => {}
            Err(ReadError::Renewed(token)) => return Some(token),
            Err(_) => return None,
        }
    }
}
