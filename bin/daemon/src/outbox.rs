//! What is said to one guest, without ever waiting for it.
//!
//! Owns the sending half of a session's connection. [`Outbox::push`] sends at once what the socket
//! takes; the rest waits here and a thread of its own sends it on. A guest that leaves too much
//! unread, or reads nothing for too long, loses its session and nobody else waits.

use crate::link::{LinkWriter, Socket};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use seawall_proto::{ToGuest, frame};
use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// More unsent bytes than this end the session. The longest policy fits three times.
const UNSENT_MAX: usize = 4 << 20;
const _: () = assert!(UNSENT_MAX >= 3 * seawall_proto::POLICY_MAX);
/// A peer that takes nothing for this long loses its session.
const STALL_MAX: Duration = Duration::from_secs(5);
/// How often a waiting sender looks whether the session has ended.
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

pub struct Outbox {
    socket: Socket,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    writer: LinkWriter,
    /// Bytes for the socket; those before `sent` are sent.
    buffer: Vec<u8>,
    sent: usize,
    /// When the socket last took something, or when something began to wait.
    progress: Instant,
    ended: Option<String>,
}

impl Outbox {
    pub fn new(socket: Socket, writer: LinkWriter) -> Self {
        let state =
            State { writer, buffer: Vec::new(), sent: 0, progress: Instant::now(), ended: None };
        Self { socket, state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says `message`. Never waits.
    pub fn push(&self, message: &ToGuest) {
        let mut plain = Vec::with_capacity(128);
        if let Err(error) = frame::encode(message, &mut plain) {
            self.end(&format!("a message for the guest cannot be encoded: {error}"));
            return;
        }
        let mut state = self.lock();
        if state.ended.is_some() {
            return;
        }
        let was_empty = state.buffer.is_empty();
        let State { writer, buffer, .. } = &mut *state;
        if let Err(error) = writer.wrap(&plain, buffer) {
            self.end_locked(&mut state, &error.to_string());
            return;
        }
        if was_empty {
            state.progress = Instant::now();
            self.send_locked(&mut state);
            if !state.buffer.is_empty() {
                self.changed.notify_one();
            }
        }
        if state.buffer.len() - state.sent > UNSENT_MAX {
            self.end_locked(&mut state, "the guest leaves too much unread");
        }
    }

    /// Ends the session; `why` is what its reader will tell. The first reason counts.
    pub fn end(&self, why: &str) {
        self.end_locked(&mut self.lock(), why);
    }

    /// Why the session ended, if this side ended it.
    pub fn ended(&self) -> Option<String> {
        self.lock().ended.clone()
    }

    fn end_locked(&self, state: &mut State, why: &str) {
        if state.ended.is_none() {
            state.ended = Some(why.to_owned());
        }
        state.buffer = Vec::new();
        state.sent = 0;
        self.socket.end();
        self.changed.notify_one();
    }

    fn send_locked(&self, state: &mut State) {
        while state.sent < state.buffer.len() {
            match self.socket.send_now(&state.buffer[state.sent..]) {
                Ok(len) => {
                    state.sent += len;
                    state.progress = Instant::now();
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if state.sent > UNSENT_MAX {
                        state.buffer.drain(..state.sent);
                        state.sent = 0;
                    }
                    return;
                }
                Err(error) => {
                    self.end_locked(state, &format!("the connection broke: {error}"));
                    return;
                }
            }
        }
        state.buffer.clear();
        state.buffer.shrink_to(16 * 1024);
        state.sent = 0;
    }

    /// Sends what could not be sent at once. Runs on the session's sending thread until it ends.
    pub fn run(&self) {
        let mut state = self.lock();
        while state.ended.is_none() {
            if state.buffer.is_empty() {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            if state.progress.elapsed() > STALL_MAX {
                self.end_locked(&mut state, "the guest reads nothing");
                return;
            }
            drop(state);
            // An error here shows again at the next send.
            let _ = poll(&mut [PollFd::new(&self.socket, PollFlags::OUT)], Some(&TICK));
            state = self.lock();
            self.send_locked(&mut state);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::link::Connection;
    use seawall_client::LinkKind;
    use seawall_proto::{Generation, ToGuest};
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    fn outbox() -> (UnixStream, Arc<Outbox>, std::thread::JoinHandle<()>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let connection = Connection::plain(LinkKind::Unix, Socket::new(ours));
        let outbox = Arc::new(Outbox::new(connection.socket, connection.writer));
        let sender = Arc::clone(&outbox);
        (theirs, outbox, std::thread::spawn(move || sender.run()))
    }

    #[test]
    fn what_the_socket_does_not_take_at_once_arrives_in_order() {
        let (mut theirs, outbox, sender) = outbox();
        let reader = std::thread::spawn(move || {
            let (mut decoder, mut expected, mut bytes) = (frame::Decoder::new(), 0, [0; 4096]);
            loop {
                std::thread::sleep(Duration::from_micros(200));
                let len = theirs.read(&mut bytes).unwrap();
                if len == 0 {
                    return expected;
                }
                decoder.extend(&bytes[..len]);
                while let Some(payload) = decoder.next_payload().unwrap() {
                    let Some(ToGuest::Generation(found)) = frame::decode(payload).unwrap() else {
                        panic!("another message")
                    };
                    assert_eq!(found, Generation(expected));
                    expected += 1;
                }
            }
        });
        for n in 0..100_000 {
            while outbox.lock().buffer.len() > UNSENT_MAX / 2 {
                std::thread::sleep(Duration::from_millis(1));
            }
            outbox.push(&ToGuest::Generation(Generation(n)));
        }
        while !outbox.lock().buffer.is_empty() {
            std::thread::sleep(Duration::from_millis(1));
        }
        outbox.end("done");
        assert_eq!(reader.join().unwrap(), 100_000);
        sender.join().unwrap();
    }

    #[test]
    fn a_guest_that_leaves_too_much_unread_loses_its_session() {
        let (theirs, outbox, sender) = outbox();
        for n in 0..1_000_000 {
            outbox.push(&ToGuest::Generation(Generation(n)));
            if outbox.ended().is_some() {
                break;
            }
        }
        assert_eq!(outbox.ended().as_deref(), Some("the guest leaves too much unread"));
        sender.join().unwrap();
        drop(theirs);
    }
}
