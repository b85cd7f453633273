//! What processes have mapped for execution. What was before the driver watched counts as exposed until scanned;
//! who has an infected file mapped is named, stopped or killed, as policy wants.

use crate::driver::Driver;
use crate::event::process_of;
use crate::file::{Identity, Look};
use crate::session::Session;
use crate::truth;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use seawall_fanotify::FileHandle;
use seawall_proto::{ExposureReason, Mapper, MapperEnd, Notice, Running, ToHost};
use std::collections::{HashSet, VecDeque};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

/// Notes the executable mappings of all processes on one file system, to be scanned as soon as the link stands.
pub fn expose_mapped(driver: &Driver, device: u64) {
    let mut seen = HashSet::new();
    for pid in processes() {
        if pid == std::process::id() || pid == driver.supervisor {
            continue;
        }
        for Mapping { range, key } in mappings(pid) {
            // Nothing on another file system is opened: it may be one that hangs.
            if key.0 == device && seen.insert(key) {
                expose(driver, &format!("/proc/{pid}/map_files/{range}"));
            }
        }
    }
}

/// What all processes have mapped for execution: device and inode numbers.
pub fn mapped() -> HashSet<(u64, u64)> {
    processes().flat_map(mappings).map(|mapping| mapping.key).collect()
}

/// All that are there, but for those that begin meanwhile.
fn processes() -> impl Iterator<Item = u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// A file that a process has mapped for execution.
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    /// Its name in map_files.
    range: String,
    /// Device and inode number.
    key: (u64, u64),
}

/// Those of one process, line by line: a process may have very many.
fn mappings(pid: u32) -> impl Iterator<Item = Mapping> {
    let maps = File::open(format!("/proc/{pid}/maps")).ok().map(BufReader::new);
    let lines = maps.into_iter().flat_map(|maps| maps.split(b'\n').map_while(Result::ok));
    // The path behind it may be any bytes.
    lines.filter_map(|line| executable(&String::from_utf8_lossy(&line)))
}

/// The mapping of a line of proc_pid_maps(5), if it is one of a file and for execution.
fn executable(line: &str) -> Option<Mapping> {
    let mut fields = line.split_ascii_whitespace();
    let (range, permissions) = (fields.next()?, fields.next()?);
    let (device, inode) = (fields.nth(1)?, fields.next()?);
    if !permissions.contains('x') || inode == "0" {
        return None;
    }
    let key = (device_of(device)?, inode.parse().ok()?);
    Some(Mapping { range: unpadded(range), key })
}

/// maps pads addresses to eight digits, the names in map_files are not padded.
fn unpadded(range: &str) -> String {
    let ends = range.split('-').map(|address| address.trim_start_matches('0'));
    ends.collect::<Vec<_>>().join("-")
}

/// Major and minor number in hexadecimal (proc_pid_maps(5)).
fn device_of(text: &str) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    let number = |digits| u32::from_str_radix(digits, 16).ok();
    Some(rustix::fs::makedev(number(major)?, number(minor)?))
}

fn expose(driver: &Driver, path: &str) {
    let Ok(file) = File::open(path) else { return };
    let Ok(look) = Look::at(&file) else { return };
    if look.is_regular {
        let handle = FileHandle::of(file.as_fd(), look.identity.device).ok();
        driver.ledger.expose(handle.as_ref(), ExposureReason::RanBefore.number());
    }
}

/// A file whose processes are to be dealt with.
pub struct Hunt {
    pub session: Arc<Session>,
    pub look: Look,
    /// Empty where there is none.
    pub path: Vec<u8>,
    pub running: Running,
}

/// How many files wait.
pub const HUNTS: usize = 16;
/// A file is not looked for again before this: an infected one can be opened as often as anybody likes.
const AGAIN: Duration = Duration::from_secs(10);
/// The first process of a guest.
const INIT: u32 = 1;

/// Works for ever, on a thread of its own: looking at a process may wait for what that process waits for.
pub fn hunt(driver: &Driver, wanted: &Receiver<Hunt>) {
    let mut recent = VecDeque::new();
    for hunt in wanted {
        let key = (hunt.look.identity.device, hunt.look.identity.inode, hunt.running);
        recent.retain(|(_, at): &(_, Instant)| at.elapsed() < AGAIN);
        if recent.iter().any(|(known, _)| *known == key) {
            continue;
        }
        recent.truncate(HUNTS - 1);
        recent.push_front((key, Instant::now()));
        deal_with(driver, hunt);
    }
}

fn deal_with(driver: &Driver, hunt: Hunt) {
    let Hunt { session, look, mut path, running } = hunt;
    let Identity { device, inode, .. } = look.identity;
    let own = [std::process::id(), driver.supervisor];
    let has_it = |pid: &u32| !own.contains(pid) && has_mapped(*pid, device, inode);
    let pids: Vec<_> = processes().filter(has_it).collect();
    let spared = pids.contains(&INIT);
    let (mut mappers, mut more) = (Vec::new(), 0);
    for pid in pids {
        let process = process_of(pid);
        let end = match by_signal(running, spared) {
            Ok((signal, done)) => end(pid, signal, done, has_it),
            Err(left) => Some(left),
        };
        let Some(end) = end else { continue };
        if mappers.len() < Mapper::MOST {
            mappers.push(Mapper { pid, process, end });
        } else {
            more += 1;
        }
    }
    path.truncate(4096);
    let notice = Notice::Mapped { path: path.into(), mappers, more };
    if !matches!(&notice, Notice::Mapped { mappers, .. } if mappers.is_empty())
        && session.send(&ToHost::Notice(notice)).is_err()
    {
        session.end();
    }
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
    has_it: impl Fn(&u32) -> bool,
) -> Option<MapperEnd> {
    let process = Pid::from_raw(i32::try_from(pid).ok()?)?;
    let sent = match pidfd_open(process, PidfdFlags::empty()) {
        Ok(process) if has_it(&pid) => pidfd_send_signal(process, signal),
        Ok(_) | Err(Errno::SRCH) => return None,
        Err(error) => Err(error),
    };
    match sent {
        Ok(()) => Some(done),
        Err(Errno::SRCH) => None,
        Err(error) => Some(MapperEnd::Failed { errno: error.raw_os_error() }),
    }
}

/// The number in maps decides where to look closer: on some file systems (btrfs, overlayfs) its device is not that
/// of stat(2).
fn has_mapped(pid: u32, device: u64, inode: u64) -> bool {
    mappings(pid).any(|mapping| {
        let name = || format!("/proc/{pid}/map_files/{}", mapping.range);
        mapping.key.1 == inode
            && (mapping.key.0 == device
                || truth::cached_stat(rustix::fs::CWD, &name()) == Some((device, inode)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_at_a_low_address_is_found() {
        assert_eq!(unpadded("00401000-00585000"), "401000-585000");
        assert_eq!(unpadded("7f00a000-7f01b000"), "7f00a000-7f01b000");
    }

    #[test]
    fn what_the_first_process_runs_is_left_running_for_all() {
        for running in [Running::Stop, Running::Kill] {
            assert_eq!(by_signal(running, true), Err(MapperEnd::Spared));
            assert!(by_signal(running, false).is_ok());
        }
        assert_eq!(by_signal(Running::Report, true), Err(MapperEnd::Left));
    }

    #[test]
    fn only_executable_file_mappings_count() {
        let line = |perms, inode| format!("7f00-7f01 {perms} 00000000 fd:0a {inode}   /bin/x");
        let key = (rustix::fs::makedev(0xfd, 0x0a), 9);
        let mapping = Mapping { range: "7f00-7f01".into(), key };
        assert_eq!(executable(&line("r-xp", 9)), Some(mapping));
        assert_eq!(executable(&line("r--p", 9)), None);
        assert_eq!(executable(&line("r-xp", 0)), None);
        assert_eq!(executable("garbage"), None);
    }
}
