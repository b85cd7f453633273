//! Marking and remembering clean files, so that their next open asks nobody.
//!
//! Whoever forgets files forgets them here before the kernel's marks go, so what is still remembered after a mark was not
//! forgotten before it.

use crate::driver::{Driver, Groups};
use crate::file::{Identity, Look};
use crate::memory::Known;
use seawall_fanotify::{FileHandle, IgnoreMark, process};
use seawall_proto::{Clean, ContentHash, Mode};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering;

/// Where clean marks keep their inodes in memory there are at most this many.
const PLAIN_MARKS_MAX: u64 = 4096;

/// When a content was found clean.
#[derive(Debug, Clone, Copy)]
pub struct When {
    /// The driver's epoch before that.
    pub epoch: u64,
    /// Just now, and nobody had the file open for writing. Who has it since changes its times with the first write.
    pub unwritten: bool,
}

impl Driver {
    /// Marks a file clean, unless it is not the same any more, or all was forgotten since `when`. Called
    /// before the answer, so that a change between the copy and the mark is seen: a write after the mark
    /// takes it away again, one before it has changed the file's times.
    pub fn remember_clean(&self, file: impl AsFd, look: &Look, when: When, clean: Clean) {
        let (file, identity) = (file.as_fd(), &look.identity);
        if self.policy().mode == Mode::Strict && look.user_changeable {
            return;
        }
        if !when.unwritten && seawall_fanotify::is_open_for_writing(file).unwrap_or(true) {
            return self.remember_exposed(file, look);
        }
        self.mark_clean(file);
        match Look::at(file) {
            Ok(now) if now.identity == *identity => {
                self.memory.remember_clean(identity, clean.unopened, clean.hash);
            }
            _ => drop(self.groups.permission.unignore(file, self.groups.ignore)),
        }
        if self.epoch() != when.epoch {
            self.forget(file, identity);
        }
    }

    /// Lets a file through for a while that was scanned a moment ago, while a writer held it.
    pub fn remember_exposed(&self, file: BorrowedFd<'_>, look: &Look) {
        let identity = &look.identity;
        self.memory.remember_exposed(identity, process::now_ms());
        if self.policy().mode.scans_written()
            && let Ok(handle) = FileHandle::of(file, identity.device)
        {
            self.background.add_written(handle);
        }
    }

    /// Remembers a file as clean that nobody has opened for it; the next open of it is answered from memory.
    pub fn remember_unmarked(&self, look: &Look, epoch: u64, unopened: bool, hash: ContentHash) {
        if self.policy().mode == Mode::Strict && look.user_changeable {
            return;
        }
        let identity = &look.identity;
        self.memory.remember_clean(identity, unopened, hash);
        if self.epoch() != epoch {
            self.memory.forget(identity.device, identity.inode);
        }
    }

    /// Marks a file clean that is remembered as clean: its mark went with the inode when the kernel
    /// evicted it. Whoever forgets files forgets them here before the kernel's marks go, so what is
    /// still remembered after the mark was not forgotten before it.
    pub fn mark_again(&self, file: impl AsFd, identity: &Identity) {
        let file = file.as_fd();
        if !self.mark_clean(file) {
            return;
        }
        let same = Look::at(file).is_ok_and(|now| now.identity == *identity);
        let known = self.memory.known(identity, process::now_ms());
        if !same || !matches!(known, Some(Known::Clean { .. })) {
            let _none = self.groups.permission.unignore(file, self.groups.ignore);
        }
    }

    /// Infected, or written: nothing of this file is remembered any more.
    pub fn forget(&self, file: impl AsFd, identity: &Identity) {
        self.memory.forget(identity.device, identity.inode);
        let _none = self.groups.permission.unignore(file.as_fd(), self.groups.ignore);
    }

    /// Sets the clean mark, unless policy has none. Plain ones keep inodes in memory: at a bound all go, and files
    /// come back as they are opened.
    fn mark_clean(&self, file: impl AsFd) -> bool {
        // Whoever gives a file away (chown(2), chmod(2)) leaves its mark: then memory alone counts, which compares.
        if self.policy().mode == Mode::Strict {
            return false;
        }
        let Groups { permission, ignore, .. } = &self.groups;
        if *ignore == IgnoreMark::Plain
            && self.plain_marks.fetch_add(1, Ordering::Relaxed) >= PLAIN_MARKS_MAX
        {
            self.plain_marks.store(0, Ordering::Relaxed);
            let _none = permission.flush_ignored();
        }
        // Without the mark the next open raises an event and is answered from memory.
        permission.ignore_opens(file.as_fd(), *ignore).is_ok()
    }
}
