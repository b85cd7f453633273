//! Which scans are in work, and which of them wait for one before them to end.
//!
//! A worker's scan is in work from its beginning where there are as many workers as threads. Where there are
//! more ([`super::Engine::ahead`]), a scan that finds no thread free waits in line: the service hears of it
//! only when its turn comes, and until then its time limit does not run.
//!
//! Messages go out under the lock: nobody reports on a scan before its beginning was told.
//!
//! In line is who came first, though another may have handed its content on first. Then it is that one which is in
//! work; should it take for ever, the one whose turn came is taken for it.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use super::send;
use crate::protocol::{Answer, ToHost};
use crate::sys;

/// One scan's place in line.
pub(super) struct Turn {
    pub id: u64,
    /// When its turn came, and the service was told.
    pub since: OnceLock<Instant>,
}

impl Turn {
    pub fn new(id: u64) -> Arc<Self> {
        Arc::new(Self { id, since: OnceLock::new() })
    }

    fn begin(&self) -> u64 {
        self.since.get_or_init(Instant::now);
        self.id
    }

    fn has_begun(&self) -> bool {
        self.since.get().is_some()
    }
}

/// See the module. Whatever breaks the connection ends the process.
pub(super) struct Line<'a> {
    socket: BorrowedFd<'a>,
    places: Mutex<Places>,
}

struct Places {
    /// Threads without a scan.
    free: u32,
    waiting: VecDeque<Arc<Turn>>,
}

impl Places {
    /// Who is next, if a thread is free; takes it.
    fn next(&mut self) -> Option<u64> {
        if self.free == 0 {
            return None;
        }
        let next = self.waiting.pop_front()?;
        self.free -= 1;
        Some(next.begin())
    }
}

impl<'a> Line<'a> {
    pub fn new(socket: BorrowedFd<'a>, threads: u32) -> Self {
        let places = Places { free: threads, waiting: VecDeque::new() };
        Self { socket, places: Mutex::new(places) }
    }

    /// A worker has taken a scan.
    pub fn enter(&self, turn: &Arc<Turn>) {
        let mut places = self.places();
        places.waiting.push_back(Arc::clone(turn));
        if let Some(id) = places.next() {
            self.say(ToHost::Started { id });
        }
    }

    /// A worker has an answer, and with it, perhaps, its next scan: one message tells both, and the service is
    /// woken once.
    pub fn leave(&self, turn: &Turn, answer: Answer, next: Option<&Arc<Turn>>) {
        let mut places = self.places();
        if turn.has_begun() {
            places.free += 1;
        } else {
            // Answered before those in front of it.
            self.begin_out_of_turn(&mut places, turn);
        }
        places.waiting.extend(next.map(Arc::clone));
        let next = places.next();
        self.say(ToHost::Report { id: turn.id, answer, next });
    }

    /// Ends the process. Whoever waits in line may be to blame: the service is to know that all were in work.
    pub fn end(&self) -> ! {
        // Not given back: nobody else says anything after it.
        let mut places = self.places();
        self.begin_all(&mut places);
        sys::exit_now(1)
    }

    fn begin_all(&self, places: &mut Places) {
        for turn in std::mem::take(&mut places.waiting) {
            self.say(ToHost::Started { id: turn.begin() });
        }
    }

    fn begin_out_of_turn(&self, places: &mut Places, turn: &Turn) {
        places.waiting.retain(|waiting| waiting.id != turn.id);
        self.say(ToHost::Started { id: turn.begin() });
    }

    fn say(&self, message: ToHost) {
        send(self.socket, message).unwrap_or_else(|_| sys::exit_now(1));
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, OwnedFd};

    use super::*;
    use crate::protocol::{MAX_TO_HOST, decode_to_host};
    use crate::report::Outcome;

    /// What the service hears.
    #[derive(Debug, PartialEq)]
    enum Heard {
        Started(u64),
        Report(u64, Option<u64>),
    }
    use Heard::{Report, Started};

    struct Service(OwnedFd);

    impl Service {
        fn heard(&self) -> Vec<Heard> {
            let mut all = Vec::new();
            let mut buffer = vec![0; MAX_TO_HOST];
            while let Ok(received) = sys::receive(self.0.as_fd(), &mut buffer, false, false) {
                match decode_to_host(&buffer[..received.length]).unwrap() {
                    ToHost::Started { id } => all.push(Started(id)),
                    ToHost::Report { id, next, .. } => all.push(Report(id, next)),
                    other => panic!("{other:?}"),
                }
            }
            all
        }
    }

    fn clean() -> Answer {
        Answer::Done(Outcome::Clean)
    }

    #[test]
    fn a_scan_begins_when_one_before_it_has_ended() {
        let (service, socket) = sys::seqpacket_pair().unwrap();
        let (service, line) = (Service(service), Line::new(socket.as_fd(), 2));
        let turns: Vec<_> = (0..=5).map(Turn::new).collect();
        for turn in &turns[1..=3] {
            line.enter(turn);
        }
        assert_eq!(service.heard(), [Started(1), Started(2)]);
        assert!(turns[3].since.get().is_none());
        line.leave(&turns[1], clean(), Some(&turns[4]));
        assert_eq!(service.heard(), [Report(1, Some(3))], "before the one that came later");
        assert!(turns[3].since.get().is_some());
        line.leave(&turns[2], clean(), None);
        assert_eq!(service.heard(), [Report(2, Some(4))]);
        line.leave(&turns[3], clean(), None);
        line.leave(&turns[4], clean(), None);
        line.enter(&turns[5]);
        assert_eq!(service.heard(), [Report(3, None), Report(4, None), Started(5)]);
    }

    #[test]
    fn one_that_overtakes_leaves_the_line_and_takes_no_thread() {
        let (service, socket) = sys::seqpacket_pair().unwrap();
        let (service, line) = (Service(service), Line::new(socket.as_fd(), 1));
        let turns: Vec<_> = (0..=4).map(Turn::new).collect();
        for turn in &turns[1..=2] {
            line.enter(turn);
        }
        line.leave(&turns[2], clean(), Some(&turns[3]));
        assert_eq!(service.heard(), [Started(1), Started(2), Report(2, None)]);
        line.leave(&turns[1], clean(), Some(&turns[4]));
        assert_eq!(service.heard(), [Report(1, Some(3))]);
        line.begin_all(&mut line.places());
        assert_eq!(service.heard(), [Started(4)], "what may have ended the process was in work");
        assert!(turns[4].has_begun());
    }
}
