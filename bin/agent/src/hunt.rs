//! Finds the processes that run infected files, and names, stops or kills them, as policy wants.
//!
//! One thread goes through all processes, at most once a second, for all files that wait then: an infected file can be
//! opened as often as anybody likes. It shares nothing with those who answer accesses, since to look at a process may
//! wait for what that process waits for. No file is held open for it, or who unmounts its file system would be told
//! that it is busy: an inode's number may be another's a moment later, its time of birth is its own. Where that is not
//! known (the file is gone, its file system tells none) nobody is stopped or killed.

use crate::driver::{Driver, count};
use crate::event::process_of;
use crate::running::{each_mapping, processes};
use crate::truth::{self, Born, ShownPath};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use seawall_proto::{Mapper, MapperEnd, Notice, Running};
use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How many files wait at most.
const FILES: usize = 128;
/// From the end of one look at all processes to the next.
const PAUSE: Duration = Duration::from_secs(1);
/// How often they are gone through for files whose processes start others meanwhile.
const PASSES: u32 = 8;
/// That a process runs on is told again after this.
const TELL_AGAIN: Duration = Duration::from_secs(60);
/// How many of these are remembered.
const TOLD: usize = 1024;
/// The first process of a guest: no guest lives without what it runs.
const INIT: Init = Init { pid: 1, counts_unread: true };

#[derive(Clone, Copy)]
struct Init {
    pid: u32,
    /// Whether it runs everything, where nobody can tell what it runs.
    counts_unread: bool,
}

/// A file whose processes are looked for.
pub struct Hunted {
    pub path: ShownPath,
    pub running: Running,
}

/// Files that wait.
#[derive(Default)]
pub struct Hunts {
    files: Mutex<HashMap<Born, Hunted>>,
    added: Condvar,
}

impl Hunts {
    /// Has a file's processes looked for; never waits. `false`: there is no room.
    pub fn add(&self, key: Born, mut hunted: Hunted) -> bool {
        if key.at.is_none() {
            hunted.running = hunted.running.min(Running::Report);
        }
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let is_full = files.len() >= FILES;
        match files.entry(key) {
            Entry::Occupied(mut known) if known.get().running < hunted.running => {
                known.insert(hunted);
            }
            Entry::Occupied(_) => (),
            Entry::Vacant(_) if is_full => return false,
            Entry::Vacant(place) => {
                place.insert(hunted);
            }
        }
        self.added.notify_one();
        true
    }

    /// All that wait, as soon as there are any.
    fn take(&self) -> HashMap<Born, Hunted> {
        let files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        let files = self.added.wait_while(files, |files| files.is_empty());
        std::mem::take(&mut *files.unwrap_or_else(PoisonError::into_inner))
    }
}

/// Works for ever.
pub fn work(driver: &Driver) {
    let own = [std::process::id(), driver.supervisor];
    // One that watches some mounts alone may be in a sandbox, where the first process is another's.
    let init = Init { counts_unread: driver.coverage.is_of_all(), ..INIT };
    let mut told = HashMap::new();
    loop {
        let files = driver.hunts.take();
        let mut ends = deal_with(&files, &own, init);
        told.retain(|_, at: &mut Instant| at.elapsed() < TELL_AGAIN);
        for (key, mut mappers) in ends.drain() {
            mappers.retain(|mapper| {
                let is_over = matches!(mapper.end, MapperEnd::Stopped | MapperEnd::Killed);
                let known = (mapper.pid, key);
                is_over
                    || (!told.contains_key(&known)
                        && (told.len() >= TOLD || told.insert(known, Instant::now()).is_none()))
            });
            if let Some(hunted) = files.get(&key) {
                tell(driver, &hunted.path, mappers);
            }
        }
        drop(files);
        std::thread::sleep(PAUSE);
    }
}

fn tell(driver: &Driver, path: &ShownPath, mut mappers: Vec<Mapper>) {
    if mappers.is_empty() {
        return;
    }
    let more = mappers.len().saturating_sub(Mapper::MOST);
    let more = u32::try_from(more).unwrap_or(u32::MAX);
    mappers.truncate(Mapper::MOST);
    let ShownPath { mut path, is_true } = path.clone();
    path.truncate(4096);
    let notice = Notice::Mapped { path: path.into(), path_is_true: is_true, mappers, more };
    // It outlasts sessions; and there is time.
    for _ in 0..10 {
        if driver.notice(notice.clone()) {
            return;
        }
        std::thread::sleep(PAUSE);
    }
}

/// What was done with whom.
fn deal_with(files: &HashMap<Born, Hunted>, own: &[u32], init: Init) -> HashMap<Born, Vec<Mapper>> {
    let mut ends: HashMap<Born, Vec<Mapper>> = HashMap::new();
    let mut seen = HashSet::new();
    for _ in 0..PASSES {
        let found = look(files, own, init);
        let mut again = false;
        for (pid, key) in found.pairs {
            let Some(hunted) = files.get(&key).filter(|_| seen.insert((pid, key))) else {
                continue;
            };
            let process = process_of(pid);
            let end = match by_signal(hunted.running, found.spared.contains(&key)) {
                Ok((signal, done)) => {
                    again = true;
                    end(pid, signal, done, || has_mapped(pid, key))
                }
                Err(left) => Some(left),
            };
            ends.entry(key).or_default().extend(end.map(|end| Mapper { pid, process, end }));
        }
        if !again {
            break;
        }
    }
    ends
}

/// Who has which of the files mapped.
struct Found {
    pairs: Vec<(u32, Born)>,
    /// Files that the first process has mapped, or may have.
    spared: HashSet<Born>,
}

fn look(files: &HashMap<Born, Hunted>, own: &[u32], init: Init) -> Found {
    let mut found = Found { pairs: Vec::new(), spared: HashSet::new() };
    for pid in processes().filter(|pid| !own.contains(pid)) {
        let mut mapped = HashSet::new();
        let read = mapped_of(pid, files.keys().copied(), &mut mapped);
        if pid == init.pid {
            found.spared.extend(&mapped);
            if init.counts_unread && read.is_err() {
                found.spared.extend(files.keys());
            }
        }
        found.pairs.extend(mapped.into_iter().map(|key| (pid, key)));
    }
    found
}

/// Which of the files this process has mapped. The number in maps decides where to look closer: on some file systems (btrfs,
/// overlayfs) its device is not that of stat(2).
fn mapped_of(
    pid: u32,
    keys: impl Iterator<Item = Born>,
    mapped: &mut HashSet<Born>,
) -> std::io::Result<()> {
    let mut by_inode: HashMap<u64, Vec<Born>> = HashMap::new();
    keys.for_each(|key| by_inode.entry(key.inode).or_default().push(key));
    each_mapping(pid, |mapping| {
        let keys = by_inode.get(&mapping.key.1).into_iter().flatten();
        let mut keys = keys.filter(|key| !mapped.contains(key)).peekable();
        if keys.peek().is_none() {
            return;
        }
        let Some(found) = truth::born(rustix::fs::CWD, &mapping.name()) else { return };
        let is_it = |key: &&Born| **key == found || **key == Born { at: None, ..found };
        let these: Vec<Born> = keys.filter(is_it).copied().collect();
        mapped.extend(these);
    })
}

fn has_mapped(pid: u32, key: Born) -> bool {
    let mut mapped = HashSet::new();
    mapped_of(pid, std::iter::once(key), &mut mapped).is_ok() && !mapped.is_empty()
}

/// The signal and what comes of it, or why there is none.
fn by_signal(running: Running, spared: bool) -> Result<(Signal, MapperEnd), MapperEnd> {
    match running {
        Running::Leave | Running::Report => Err(MapperEnd::Left),
        _ if spared => Err(MapperEnd::Spared),
        Running::Stop => Ok((Signal::STOP, MapperEnd::Stopped)),
        Running::Kill => Ok((Signal::KILL, MapperEnd::Killed)),
    }
}

/// Sends the signal, unless the number is another process's by now.
fn end(
    pid: u32,
    signal: Signal,
    done: MapperEnd,
    has_it: impl FnOnce() -> bool,
) -> Option<MapperEnd> {
    let process = Pid::from_raw(i32::try_from(pid).ok()?)?;
    let sent = match pidfd_open(process, PidfdFlags::empty()) {
        Ok(process) if has_it() => pidfd_send_signal(process, signal),
        Ok(_) | Err(Errno::SRCH) => return None,
        Err(error) => Err(error),
    };
    match sent {
        Ok(()) => Some(done),
        Err(Errno::SRCH) => None,
        Err(error) => Some(MapperEnd::Failed { errno: error.raw_os_error() }),
    }
}

/// Has the processes dealt with that run an infected file; never waits.
pub fn begin(driver: &Driver, key: Born, hunted: Hunted) {
    if !driver.hunts.add(key, hunted) {
        count(&driver.counters.notices_lost);
        tracing::warn!("too many infected files at once; who runs one of them is not looked for");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    /// Ends with the test.
    struct Program(Child);

    impl Drop for Program {
        fn drop(&mut self) {
            let _gone = (self.0.kill(), self.0.wait());
        }
    }

    fn program(folder: &std::path::Path) -> (Program, Born) {
        let path = folder.join("program");
        std::fs::copy("/bin/sleep", &path).expect("a copy");
        let child = Command::new(&path).arg("60").spawn().expect("it runs");
        let key = truth::born(rustix::fs::CWD, path.to_str().expect("it is text"));
        let key = key.expect("it is there");
        let until = Instant::now() + Duration::from_secs(10);
        while !has_mapped(child.id(), key) {
            assert!(Instant::now() < until, "it does not run its program");
        }
        (Program(child), key)
    }

    fn hunted(running: Running) -> Hunted {
        Hunted { path: ShownPath::default(), running }
    }

    #[test]
    fn what_the_first_process_runs_is_left_running_for_all() {
        let folder = tempfile::tempdir().expect("a folder");
        let (mut child, key) = program(folder.path());
        let pid = child.0.id();
        let files = HashMap::from([(key, hunted(Running::Kill))]);
        let ends = |pid| {
            let ends = deal_with(&files, &[], Init { pid, counts_unread: false });
            ends[&key].iter().map(|mapper| (mapper.pid, mapper.end)).collect::<Vec<_>>()
        };
        assert_eq!(ends(pid), [(pid, MapperEnd::Spared)]);
        assert!(matches!(child.0.try_wait(), Ok(None)), "it runs on");
        assert_eq!(ends(std::process::id()), [(pid, MapperEnd::Killed)]);
        assert!(child.0.wait().is_ok_and(|status| !status.success()));
    }

    #[test]
    fn another_file_that_has_the_number_by_now_has_nobody_killed() {
        let folder = tempfile::tempdir().expect("a folder");
        let (child, key) = program(folder.path());
        let (seconds, nanoseconds) = key.at.expect("its birth is known");
        assert!(!has_mapped(child.0.id(), Born { at: Some((seconds - 1, nanoseconds)), ..key }));
        assert!(has_mapped(child.0.id(), Born { at: None, ..key }), "it is named all the same");
    }

    #[test]
    fn a_file_that_is_gone_has_nobody_killed_and_the_stronger_wish_counts() {
        let hunts = Hunts::default();
        let gone = |inode| Born { device: 1, inode, at: None };
        let here = |inode| Born { at: Some((1, 0)), ..gone(inode) };
        assert!(hunts.add(gone(1), hunted(Running::Kill)));
        assert!(hunts.add(here(2), hunted(Running::Stop)));
        assert!(hunts.add(here(2), hunted(Running::Report)));
        for inode in 3..=FILES as u64 {
            assert!(hunts.add(gone(inode), hunted(Running::Report)));
        }
        assert!(!hunts.add(here(1), hunted(Running::Kill)), "it is full");
        assert!(hunts.add(here(2), hunted(Running::Kill)), "but for what waits already");
        let all = hunts.take();
        assert_eq!(
            (all[&gone(1)].running, all[&here(2)].running),
            (Running::Report, Running::Kill)
        );
        assert_eq!(all.len(), FILES);
    }
}
