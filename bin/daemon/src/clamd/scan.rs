//! The jobs: a content is copied once, judged, and answered for.

use super::Clamd;
use super::answer::To;
use super::bounds::Place;
use super::command::How;
use super::connection::Answers;
use super::files::{self, Copying, Fault, Target, Walk};
use crate::config::ScanPath;
use crate::copy::PrivateCopy;
use crate::on_demand;
use crate::pipeline::Finding;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use tokio::task::{JoinSet, spawn_blocking};

/// Files of one folder that are scanned at the same time for MULTISCAN.
const PARALLEL: usize = 8;

/// The content of a stream.
pub async fn judge_stream(
    clamd: Arc<Clamd>,
    answers: Arc<Answers>,
    to: To,
    copy: Box<PrivateCopy>,
) {
    let finding = clamd.judge(Vec::new(), copy).await;
    answers.say(&to.tells(b"stream", &finding, false)).await;
}

/// The content of a descriptor; it and its place are dropped on a thread that may hang.
pub async fn judge_descriptor(
    clamd: Arc<Clamd>,
    answers: Arc<Answers>,
    to: To,
    descriptor: OwnedFd,
    place: Place,
) {
    let name = format!("fd[{}]", descriptor.as_raw_fd()).into_bytes();
    let copying = clamd.copying_files();
    let copied = spawn_blocking(move || {
        let file = File::from(descriptor);
        let copied = copying.copy(&file);
        drop(file);
        drop(place);
        copied
    });
    let finding = match copied.await {
        Ok(Ok(copy)) => clamd.judge(Vec::new(), copy).await,
        Ok(Err(fault)) => {
            return answers.say(&to.says_of(&name, &format!("{fault} ERROR"))).await;
        }
        Err(error) => Finding::Error(error.to_string()),
    };
    answers.say(&to.tells(&name, &finding, false)).await;
}

/// What a path leads to.
enum Opened {
    Content(Box<PrivateCopy>),
    Folder(Walk),
}

fn open(allowed: &[ScanPath], copying: &Copying, path: &[u8]) -> Result<Opened, Fault> {
    match files::open(allowed, path)? {
        Target::File(file) => copying.copy(&file).map(Opened::Content),
        Target::Folder(walk) => Ok(Opened::Folder(walk)),
    }
}

/// A file or folder of this host.
pub async fn judge_path(
    clamd: Arc<Clamd>,
    answers: Arc<Answers>,
    to: To,
    how: How,
    path: Vec<u8>,
    place: Place,
) {
    let (copying, host, asked) = (clamd.copying_files(), Arc::clone(&clamd), path.clone());
    let opened = spawn_blocking(move || {
        let opened = open(&host.settings.scan_paths, &copying, &asked);
        (opened, place)
    });
    let Ok((opened, place)) = opened.await else { return };
    let one = One { clamd, answers, to, all: how == How::AllMatches };
    match opened {
        Ok(Opened::Content(copy)) => {
            drop(place);
            one.judge(path, Ok(copy)).await;
        }
        Err(fault) => {
            one.judge(path, Err(fault)).await;
        }
        Ok(Opened::Folder(walk)) => {
            let end = path.iter().rposition(|byte| *byte != b'/').map_or(0, |last| last + 1);
            let base = path[..end].to_vec();
            if one.judge_folder(how, &base, walk, place).await {
                let name = if base.is_empty() { b"/" } else { base.as_slice() };
                one.answers.say(&to.says_of(name, "OK")).await;
            }
        }
    }
}

/// Judges one file after the other, for one command.
#[derive(Clone)]
struct One {
    clamd: Arc<Clamd>,
    answers: Arc<Answers>,
    to: To,
    /// All that was found is told.
    all: bool,
}

impl One {
    /// Answers for one file, and gives what was found.
    async fn judge(
        &self,
        path: Vec<u8>,
        copied: Result<Box<PrivateCopy>, Fault>,
    ) -> Option<Finding> {
        match copied {
            Ok(copy) => {
                let finding = self.clamd.judge(path.clone(), copy).await;
                self.answers.say(&self.to.tells(&path, &finding, self.all)).await;
                Some(finding)
            }
            Err(fault) => {
                self.answers.say(&self.to.says_of(&path, &format!("{fault} ERROR"))).await;
                None
            }
        }
    }

    /// The same for a file of a folder, of which it is no news that nothing was found.
    async fn judge_quietly(self, path: Vec<u8>, copied: Result<Box<PrivateCopy>, Fault>) -> Kind {
        let finding = match copied {
            Ok(copy) => self.clamd.judge(path.clone(), copy).await,
            Err(fault) => {
                self.answers.say(&self.to.says_of(&path, &format!("{fault} ERROR"))).await;
                return Kind::Error;
            }
        };
        if finding == Finding::Clean {
            return Kind::Clean;
        }
        self.answers.say(&self.to.tells(&path, &finding, self.all)).await;
        if matches!(finding, Finding::Infected(_)) { Kind::Infected } else { Kind::Error }
    }

    /// All files of a folder, or up to the first infected one. Gives whether all were clean.
    async fn judge_folder(&self, how: How, base: &[u8], mut walk: Walk, mut place: Place) -> bool {
        let at_once = if how == How::Parallel { PARALLEL } else { 1 };
        let to_the_end = matches!(how, How::All | How::Parallel);
        let mut under_way = JoinSet::new();
        let mut all_clean = true;
        loop {
            let copying = self.clamd.copying_files();
            let next = spawn_blocking(move || {
                let copied = walk.next().map(|(path, file)| {
                    let copied = file.and_then(|file| copying.copy(&file));
                    (path, copied)
                });
                (walk, place, copied)
            });
            let Ok((same, again, next)) = next.await else { return false };
            (walk, place) = (same, again);
            let Some((path, copied)) = next else { break };
            let path = [base, &path].concat();
            under_way.spawn(self.clone().judge_quietly(path, copied));
            while under_way.len() >= at_once {
                let Some(kind) = under_way.join_next().await else { break };
                let kind = kind.unwrap_or(Kind::Error);
                all_clean &= kind == Kind::Clean;
                if kind == Kind::Infected && !to_the_end || self.answers.is_broken() {
                    return false;
                }
            }
        }
        while let Some(kind) = under_way.join_next().await {
            all_clean &= kind.unwrap_or(Kind::Error) == Kind::Clean;
        }
        all_clean
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Clean,
    Infected,
    Error,
}

impl Clamd {
    /// The verdict, when it is this content's turn.
    async fn judge(&self, path: Vec<u8>, copy: Box<PrivateCopy>) -> Finding {
        self.waiting.fetch_add(1, Relaxed);
        let turn = self.scans.acquire().await;
        self.waiting.fetch_sub(1, Relaxed);
        let answer = on_demand::judge(&self.api.host, path, *copy).await;
        drop(turn);
        match answer {
            Some(answer) => answer.finding,
            None => Finding::Error("the service ends".into()),
        }
    }
}
