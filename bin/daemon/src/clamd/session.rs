//! One client, from its first command to its last answer.
//!
//! ```text
//! command ──quick──► answer ──────────────────────────────┐
//!    │  └─scan──► job: copy once, judge, answer ──────────┤
//!    ▼ INSTREAM                                           ▼
//! content, copied as it comes ──whole──► job     one command: the end; IDSESSION: the next command
//! ```
//!
//! What a client has under way is bounded: beyond it nothing more is read from it.

use super::Clamd;
use super::answer::To;
use super::bounds::Peer;
use super::chunks::{Chunks, TooLong};
use super::command::{Command, How, Input, LONGEST, Received};
use super::connection::{Answers, Passed, Stream, place};
use super::files;
use super::scan::{judge_descriptor, judge_path, judge_stream};
use crate::copy::PrivateCopy;
use std::io::ErrorKind::{Interrupted, WouldBlock};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::coop::consume_budget;
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::{Instant, sleep, sleep_until, timeout};

/// Jobs of one session at the same time.
const JOBS_MAX: usize = 8;
/// Bytes of a stream that are kept together before they go to the copy.
const PIECE: usize = 128 * 1024;
/// A stream may take so many times as long as a client may be silent.
const STREAM_PATIENCE: u32 = 10;
/// How long a stream that was refused is read on: a connection that is closed on it would break under the
/// sender before it has read the answer.
const LINGER: Duration = Duration::from_secs(10);
/// How often a client that waits is looked at: it may have gone.
const LOOK: Duration = Duration::from_millis(500);

pub struct Session {
    clamd: Arc<Clamd>,
    stream: Arc<Stream>,
    answers: Arc<Answers>,
    peer: Peer,
    input: Input,
    /// What came with the last bytes.
    passed: Option<Passed>,
    /// The next command's number, between IDSESSION and END; 0 outside.
    number: u32,
    until: Instant,
    jobs: JoinSet<()>,
}

/// How a session ends.
enum End {
    /// When what is under way is answered.
    Answered,
    /// After what is still on its way here was read.
    Refused,
    /// At once.
    Now,
}

enum Heard {
    Something,
    Nothing,
    TooLate,
}

/// What a look at a stream gave.
enum Filled {
    More,
    Whole,
    Broken,
}

impl Session {
    pub fn new(clamd: Arc<Clamd>, stream: Stream, peer: Peer) -> Self {
        let stream = Arc::new(stream);
        let answers = Arc::new(Answers::new(Arc::clone(&stream), clamd.settings.read_timeout()));
        let until = Instant::now() + clamd.settings.idle_timeout();
        let (input, passed, number, jobs) = Default::default();
        Self { clamd, stream, answers, peer, input, passed, number, until, jobs }
    }

    /// Serves the client until it is over.
    pub async fn run(mut self) {
        match self.serve().await {
            End::Answered => self.finish().await,
            End::Refused => {
                self.finish().await;
                self.stream.shutdown();
                let _enough = timeout(LINGER, self.take_in()).await;
            }
            End::Now => {}
        }
        // What is still under way ends with its set.
        self.stream.shutdown();
    }

    async fn serve(&mut self) -> End {
        loop {
            while let Some(received) = self.input.next_command() {
                if let Err(end) = self.obey(received).await {
                    return end;
                }
                if self.answers.is_broken() {
                    return End::Now;
                }
                self.until = Instant::now() + self.clamd.settings.read_timeout();
            }
            if self.passed.take().is_some() {
                let why = "PROTOCOL ERROR: ancillary data sent without FILDES. ERROR";
                self.answers.say(&self.to(0).says(why)).await;
                return End::Answered;
            }
            if self.input.room() == 0 {
                return End::Now;
            }
            match self.hear().await {
                Heard::Something => {}
                Heard::Nothing => return End::Answered,
                Heard::TooLate => return self.too_late().await,
            }
        }
    }

    fn to(&self, ending: u8) -> To {
        To { id: self.number, ending }
    }

    async fn too_late(&self) -> End {
        // In clamd's words, which are those of no command.
        self.answers.say(b"COMMAND READ TIMED OUT\n").await;
        End::Now
    }

    /// Takes in what comes next.
    async fn hear(&mut self) -> Heard {
        loop {
            // Whoever always has more to say must not have the thread for himself.
            consume_budget().await;
            tokio::select! {
                ready = self.stream.readable() => {
                    if ready.is_err() {
                        return Heard::Nothing;
                    }
                }
                Some(_) = self.jobs.join_next() => {
                    self.until = Instant::now() + self.clamd.settings.read_timeout();
                    continue;
                }
                () = self.answers.broken() => return Heard::Nothing,
                () = sleep_until(self.until), if self.jobs.is_empty() => return Heard::TooLate,
            }
            let (len, has_descriptors) = match self.peek() {
                Ok((0, _)) => return Heard::Nothing,
                Ok(seen) => seen,
                Err(error) if matches!(error.kind(), WouldBlock | Interrupted) => continue,
                Err(_) => return Heard::Nothing,
            };
            let taken = if has_descriptors {
                let patience = self.clamd.settings.read_timeout();
                let Some(place) = place(&self.clamd.descriptors, self.peer, patience).await else {
                    return Heard::TooLate;
                };
                let mut bytes = vec![0; len];
                self.stream.receive(&mut bytes, place).map(|(len, passed)| {
                    self.input.push(&bytes[..len]);
                    self.passed = Some(passed);
                })
            } else {
                self.take(len)
            };
            match taken {
                Ok(()) => return Heard::Something,
                Err(error) if matches!(error.kind(), WouldBlock | Interrupted) => {}
                Err(_) => return Heard::Nothing,
            }
        }
    }

    fn peek(&self) -> std::io::Result<(usize, bool)> {
        self.stream.peek(&mut [0; LONGEST][..self.input.room()])
    }

    fn take(&mut self, len: usize) -> std::io::Result<()> {
        let mut bytes = [0; LONGEST];
        let len = self.stream.try_read(&mut bytes[..len])?;
        self.input.push(&bytes[..len]);
        Ok(())
    }

    /// Does what a command says. An error is the session's end.
    async fn obey(&mut self, received: Received) -> Result<(), End> {
        let Received { command, ending, is_old } = received;
        let (to, numbered) = (self.to(ending), self.number > 0);
        if numbered && is_old {
            // It has no end of its own, so the answer has that of most clients.
            let why = "Only nCMDS\\n and zCMDS\\0 are accepted inside IDSESSION. ERROR";
            self.answers.say(&self.to(0).says(why)).await;
            return Err(End::Answered);
        }
        match command {
            Command::End if numbered => return Err(End::Answered),
            Command::IdSession if !numbered => {
                self.number = 1;
                return Ok(());
            }
            Command::Ping => self.answers.say(&to.says("PONG")).await,
            Command::Version => self.answers.say(&to.says(&self.clamd.version())).await,
            Command::VersionCommands => {
                self.answers.say(&to.says(&self.clamd.version_and_commands())).await;
            }
            Command::Stats => self.answers.say(&to.says(&self.clamd.stats())).await,
            // On the heap: most sessions wait for their next command, and are as large as all this.
            Command::Fildes => Box::pin(self.fildes(to)).await?,
            Command::InStream => Box::pin(self.in_stream(to)).await?,
            Command::Path(how, path) if !numbered || how == How::First => {
                Box::pin(self.path(to, how, path)).await?;
            }
            _ if numbered => {
                self.answers.say(&to.says("Command invalid inside IDSESSION. ERROR")).await;
                return Err(End::Answered);
            }
            Command::Reload if matches!(self.peer, Peer::User(_)) => {
                self.clamd.reload(self.peer);
                self.answers.say(&to.says("RELOADING")).await;
            }
            Command::Reload | Command::Shutdown => {
                self.answers.say(&to.says("COMMAND UNAVAILABLE")).await;
            }
            _ => self.answers.say(&to.says("UNKNOWN COMMAND")).await,
        }
        if !numbered {
            return Err(End::Answered);
        }
        self.number = self.number.wrapping_add(1).max(1);
        Ok(())
    }

    /// Begins something that takes time, when there is room for it.
    async fn start(&mut self, job: impl Future<Output = ()> + Send + 'static) -> Result<(), End> {
        while self.jobs.len() >= JOBS_MAX {
            tokio::select! {
                _ = self.jobs.join_next() => {}
                () = self.answers.broken() => return Err(End::Now),
            }
        }
        let place = tokio::select! {
            place = self.clamd.jobs.take(self.peer) => place,
            () = gone(&self.stream, &self.answers) => return Err(End::Now),
        };
        self.jobs.spawn(async move {
            job.await;
            drop(place);
        });
        Ok(())
    }

    async fn path(&mut self, to: To, how: How, path: Vec<u8>) -> Result<(), End> {
        // Before the job: who has a job must not wait for a place.
        let place = tokio::select! {
            place = self.clamd.descriptors.take(self.peer) => place,
            () = gone(&self.stream, &self.answers) => return Err(End::Now),
        };
        let (clamd, answers) = (Arc::clone(&self.clamd), Arc::clone(&self.answers));
        self.start(judge_path(clamd, answers, to, how, path, place)).await
    }

    async fn fildes(&mut self, to: To) -> Result<(), End> {
        let Some((descriptor, place)) = self.passed.take().and_then(Passed::only) else {
            self.answers.say(&to.says("No file descriptor received. ERROR")).await;
            return Err(End::Answered);
        };
        let (clamd, answers) = (Arc::clone(&self.clamd), Arc::clone(&self.answers));
        self.start(judge_descriptor(clamd, answers, to, descriptor, place)).await
    }

    async fn in_stream(&mut self, to: To) -> Result<(), End> {
        let copy = match self.receive_stream().await {
            Ok(copy) => copy,
            Err(Refusal::End(end)) => return Err(end),
            Err(Refusal::Because(why)) => {
                self.answers.say(&to.says(&format!("{why} ERROR"))).await;
                return Err(End::Refused);
            }
        };
        let (clamd, answers) = (Arc::clone(&self.clamd), Arc::clone(&self.answers));
        self.start(judge_stream(clamd, answers, to, copy)).await
    }

    /// The content that follows an INSTREAM command, copied as it comes. Nothing is read beyond it.
    async fn receive_stream(&mut self) -> Result<Box<PrivateCopy>, Refusal> {
        let copying = self.clamd.copying_streams();
        let patience = self.clamd.settings.read_timeout();
        let whole_by = Instant::now() + patience * STREAM_PATIENCE;
        let mut chunks = Chunks::new(copying.limit);
        let mut copy = copying.begin();
        // What came along with the command.
        let mut early = self.input.take();
        let fed = chunks.feed(&mut early)?;
        self.input.push(&early[fed.used..]);
        early.truncate(fed.content);
        copy = store(copy, early).await?;
        let mut is_whole = fed.is_end;
        while !is_whole {
            let until = whole_by.min(Instant::now() + patience);
            tokio::select! {
                ready = self.stream.readable() => ready.map_err(|_| Refusal::End(End::Now))?,
                Some(_) = self.jobs.join_next() => continue,
                () = self.answers.broken() => return Err(Refusal::End(End::Now)),
                () = sleep_until(until) => return Err(Refusal::End(self.too_late().await)),
            }
            // Only who has a hand has a buffer.
            let hand = self.clamd.hands.acquire().await;
            let mut piece = Vec::new();
            match fill(&self.stream, &mut chunks, &mut piece)? {
                Filled::More => {}
                Filled::Whole => is_whole = true,
                Filled::Broken => return Err(Refusal::End(End::Now)),
            }
            copy = store(copy, piece).await?;
            drop(hand);
        }
        Ok(copy)
    }

    /// Waits until all is answered that is under way.
    async fn finish(&mut self) {
        while !self.jobs.is_empty() {
            tokio::select! {
                _ = self.jobs.join_next() => {}
                () = gone(&self.stream, &self.answers) => return,
            }
        }
    }

    /// Reads what is still on its way.
    async fn take_in(&self) {
        while self.stream.readable().await.is_ok() {
            consume_budget().await;
            match self.stream.try_read(&mut [0; LONGEST]) {
                Ok(1..) => {}
                Err(error) if matches!(error.kind(), WouldBlock | Interrupted) => {}
                _ => return,
            }
        }
    }
}

/// Why there is no content to scan.
enum Refusal {
    End(End),
    Because(String),
}

impl From<TooLong> for Refusal {
    fn from(error: TooLong) -> Self {
        Self::Because(error.to_string())
    }
}

/// Ends when the client is gone or does not listen.
async fn gone(stream: &Stream, answers: &Answers) {
    let looks = async {
        while !stream.is_gone() {
            sleep(LOOK).await;
        }
    };
    tokio::select! {
        () = looks => {}
        () = answers.broken() => {}
    }
}

/// Reads of a stream what is there, up to a piece.
fn fill(stream: &Stream, chunks: &mut Chunks, piece: &mut Vec<u8>) -> Result<Filled, TooLong> {
    while piece.len() < PIECE {
        let start = piece.len();
        piece.resize(start + chunks.wanted().min(PIECE - start), 0);
        let len = match stream.try_read(&mut piece[start..]) {
            Ok(len @ 1..) => len,
            Err(error) if error.kind() == WouldBlock => {
                piece.truncate(start);
                return Ok(Filled::More);
            }
            Err(error) if error.kind() == Interrupted => 0,
            _ => return Ok(Filled::Broken),
        };
        let fed = chunks.feed(&mut piece[start..start + len])?;
        piece.truncate(start + fed.content);
        if fed.is_end {
            return Ok(Filled::Whole);
        }
    }
    Ok(Filled::More)
}

/// Hashing and, above the budget, writing to disk: not on the asynchronous thread.
async fn store(mut copy: Box<PrivateCopy>, piece: Vec<u8>) -> Result<Box<PrivateCopy>, Refusal> {
    if piece.is_empty() {
        return Ok(copy);
    }
    let work =
        spawn_blocking(move || files::add(&mut copy, &piece, &mut Vec::new()).map(|()| copy));
    match work.await {
        Ok(Ok(copy)) => Ok(copy),
        Ok(Err(error)) => Err(Refusal::Because(files::Fault::from(error).to_string())),
        Err(_) => Err(Refusal::End(End::Now)),
    }
}
