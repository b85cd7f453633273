//! Giving a quarantined file back to a guest.
//!
//! The content is approved for that guest first, else it would be caught again. It then goes over the
//! session's link in parts, a few ahead of what the driver has written; holes are left out. The driver
//! puts the file at its place only when the whole of it has the right hash.

use super::{Entry, Quarantine, QuarantineError, State, event_of};
use crate::session::Session;
use seawall_client::{Event, EventKind};
use seawall_proto::remedy::{Obstacle, Restore, RestoreContent, RestoreProgress, Restored};
use seawall_proto::{Ticket, ToGuest};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// How long the driver may be silent in a restore.
const PATIENCE: Duration = Duration::from_secs(30);

/// Holes are looked for in blocks of so many bytes; a part is a whole number of them.
const BLOCK: usize = 4096;
const _: () = assert!(RestoreContent::PIECE_MAX.is_multiple_of(BLOCK));

/// What a driver says in a restore.
pub enum Reply {
    Progress(u32),
    Done(Result<(), Obstacle>),
}

/// Where a file goes.
pub struct Target {
    pub session: Arc<Session>,
    pub path: Vec<u8>,
    pub overwrite: bool,
}

/// Why a file is not given back. It stays in quarantine.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error(transparent)]
    Quarantine(#[from] QuarantineError),
    #[error("this entry is being restored already")]
    UnderWay,
    #[error("the guest's driver has not answered for {} s; the file may be restored again", PATIENCE.as_secs())]
    Silent,
    #[error("there is a file at that path; --overwrite replaces it")]
    Exists,
    #[error("{}", told(*.0))]
    Obstacle(Obstacle),
}

impl From<Obstacle> for RestoreError {
    fn from(obstacle: Obstacle) -> Self {
        if obstacle == Obstacle::Exists { Self::Exists } else { Self::Obstacle(obstacle) }
    }
}

fn told(obstacle: Obstacle) -> String {
    match obstacle {
        Obstacle::Exists => "there is a file at that path".into(),
        Obstacle::NotAFile => {
            "there is something at that path that is no file; restore to another with --to".into()
        }
        Obstacle::NoFolder => {
            "the folder is not there, or a symbolic link leads to it; restore to another with --to"
                .into()
        }
        Obstacle::NoSpace => "the guest's file system is full".into(),
        Obstacle::ReadOnly => "the guest's file system is mounted read-only".into(),
        Obstacle::Attributes { errno } => format!(
            "the file's owner, mode or extended attributes cannot be set there: {}",
            std::io::Error::from_raw_os_error(errno)
        ),
        Obstacle::Content => "what arrived in the guest was not the content".into(),
        Obstacle::BrokenOff => {
            "the driver broke it off: it was restarted, or has too much to do".into()
        }
        Obstacle::Failed { errno } => super::entry::system(errno),
    }
}

impl Quarantine {
    /// Gives a file back and waits until it is there.
    ///
    /// # Errors
    /// [`RestoreError`]; the entry is as it was then.
    pub fn restore(&self, mut entry: Entry, target: &Target) -> Result<(), RestoreError> {
        let Target { session, path, .. } = target;
        let guest = session.guest.name().to_owned();
        let (sender, replies) = channel();
        {
            let mut under_way = self.restores.lock().unwrap_or_else(PoisonError::into_inner);
            if under_way.contains_key(&entry.ticket) {
                return Err(RestoreError::UnderWay);
            }
            under_way.insert(entry.ticket, (guest.clone(), sender));
        }
        let mut approved = false;
        let result = self.send(&entry, target, &replies, &mut approved);
        self.restores.lock().unwrap_or_else(PoisonError::into_inner).remove(&entry.ticket);
        if let Err(error) = &result {
            session.outbox.push(&ToGuest::RestoreEnd(entry.ticket));
            if approved && let Err(error) = self.revoke(entry.hash, Some(&guest)) {
                tracing::error!(guest, %error, "an approval for a restore that failed cannot be taken back");
            }
            if matches!(error, RestoreError::Exists) {
                // The operator is asked what to do.
                return result;
            }
            let mut event = event_of(EventKind::RestoreFailed, &entry).reason(error.to_string());
            event.guest = Some(guest);
            event.path = Some(seawall_client::text::escape(path));
            self.events.emit(event);
            return result;
        }
        entry.state = State::Restored { guest: guest.clone(), path: path.clone() };
        let held = self.held();
        held.store.write_entry(&entry).map_err(QuarantineError::from)?;
        held.index.put(&entry).map_err(QuarantineError::from)?;
        drop(held);
        let mut event: Event = event_of(EventKind::Restored, &entry);
        event.guest = Some(guest);
        event.path = Some(seawall_client::text::escape(path));
        self.events.emit(event);
        Ok(())
    }

    fn send(
        &self,
        entry: &Entry,
        target: &Target,
        replies: &Receiver<Reply>,
        approved: &mut bool,
    ) -> Result<(), RestoreError> {
        let Target { session, path, overwrite } = target;
        session.outbox.push(&ToGuest::Restore(Restore {
            ticket: entry.ticket,
            path: path.clone().into(),
            size: entry.size,
            hash: entry.hash,
            attributes: entry.attributes.clone(),
            overwrite: *overwrite,
        }));
        let mut parts = Parts { entry, session, replies, sent: 0, written: 0, waiting: None };
        // The driver says first whether there is a place for it.
        parts.hear()?;
        // From here on the content is in the guest, which must not catch it again.
        *approved = self.approve(entry.hash, Some(session.guest.name()))?;
        let mut offset = 0;
        let mut refused = None;
        let read = self.read(entry.hash, |piece| {
            let sent = parts.piece(offset, piece);
            offset += piece.len() as u64;
            sent.map_err(|error| {
                let why = error.to_string();
                refused = Some(error);
                why
            })
        });
        if let Some(error) = refused {
            return Err(error);
        }
        read.map_err(QuarantineError::from)?;
        parts.finish()
    }

    /// A driver tells of a restore. Never waits.
    pub fn restore_progress(&self, guest: &str, progress: RestoreProgress) {
        self.reply(guest, progress.ticket, Reply::Progress(progress.parts));
    }

    /// A driver has done with a restore. Never waits.
    pub fn restore_done(&self, guest: &str, done: Restored) {
        self.reply(guest, done.ticket, Reply::Done(done.result));
    }

    fn reply(&self, guest: &str, ticket: Ticket, reply: Reply) {
        let under_way = self.restores.lock().unwrap_or_else(PoisonError::into_inner);
        // A guest speaks for its own restores alone.
        if let Some((whose, sender)) = under_way.get(&ticket)
            && whose == guest
        {
            let _it_is_over = sender.send(reply);
        }
    }
}

/// The parts of one content on their way.
struct Parts<'a> {
    entry: &'a Entry,
    session: &'a Session,
    replies: &'a Receiver<Reply>,
    sent: u32,
    written: u32,
    /// The part that may be the last.
    waiting: Option<(u64, Vec<u8>)>,
}

impl Parts<'_> {
    /// Sends what of this piece is no hole. A hole is what the driver said to be one and what is
    /// zero here; it may have said anything.
    fn piece(&mut self, start: u64, piece: &[u8]) -> Result<(), RestoreError> {
        let mut run: Option<(u64, Vec<u8>)> = None;
        for (nth, block) in piece.chunks(BLOCK).enumerate() {
            let at = start + (nth * BLOCK) as u64;
            if block.iter().all(|byte| *byte == 0) && self.is_hole(at, block.len() as u64) {
                if let Some((offset, bytes)) = run.take() {
                    self.part(offset, bytes)?;
                }
                continue;
            }
            let (_, bytes) = run.get_or_insert_with(|| (at, Vec::new()));
            bytes.extend_from_slice(block);
            if bytes.len() >= RestoreContent::PIECE_MAX
                && let Some((offset, bytes)) = run.take()
            {
                self.part(offset, bytes)?;
            }
        }
        run.map_or(Ok(()), |(offset, bytes)| self.part(offset, bytes))
    }

    fn is_hole(&self, at: u64, len: u64) -> bool {
        let extents = &self.entry.attributes.extents;
        let touches = |(offset, length): &(u64, u64)| {
            *offset < at + len && at < offset.saturating_add(*length)
        };
        !extents.is_empty() && !extents.iter().any(touches)
    }

    fn part(&mut self, offset: u64, bytes: Vec<u8>) -> Result<(), RestoreError> {
        if let Some((offset, bytes)) = self.waiting.replace((offset, bytes)) {
            self.push(offset, bytes, false);
            while self.sent - self.written >= RestoreContent::AHEAD {
                self.hear()?;
            }
        }
        Ok(())
    }

    fn push(&mut self, offset: u64, bytes: Vec<u8>, last: bool) {
        let ticket = self.entry.ticket;
        let part = RestoreContent { ticket, offset, bytes: bytes.into(), last };
        self.session.outbox.push(&ToGuest::RestoreContent(part));
        self.sent += 1;
    }

    /// Waits for the driver's word. An end without an obstacle before the last part is none.
    fn hear(&mut self) -> Result<(), RestoreError> {
        match self.replies.recv_timeout(PATIENCE) {
            Ok(Reply::Progress(parts)) => {
                self.written = parts.clamp(self.written, self.sent);
                Ok(())
            }
            Ok(Reply::Done(Err(obstacle))) => Err(obstacle.into()),
            Ok(Reply::Done(Ok(()))) => Err(RestoreError::Obstacle(Obstacle::BrokenOff)),
            Err(_) => Err(RestoreError::Silent),
        }
    }

    fn finish(mut self) -> Result<(), RestoreError> {
        let (offset, bytes) = self.waiting.take().unwrap_or_default();
        self.push(offset, bytes, true);
        loop {
            match self.replies.recv_timeout(PATIENCE) {
                Ok(Reply::Progress(_)) => {}
                Ok(Reply::Done(result)) => return result.map_err(RestoreError::from),
                Err(_) => return Err(RestoreError::Silent),
            }
        }
    }
}
