//! What processes have mapped for execution. What was before the driver watched counts as exposed until scanned.

use crate::driver::Driver;
use crate::file::Look;
use rustix::io::Errno;
use seawall_fanotify::FileHandle;
use seawall_proto::ExposureReason;
use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Error, ErrorKind};
use std::os::fd::AsFd;

/// Notes the executable mappings of all processes on one file system, to be scanned as soon as the link stands.
pub fn expose_mapped(driver: &Driver, device: u64) {
    let mut seen = HashSet::new();
    for pid in processes() {
        if pid == std::process::id() || pid == driver.supervisor {
            continue;
        }
        let _gone = each_mapping(pid, |mapping| {
            // Nothing on another file system is opened: it may be one that hangs.
            if mapping.key.0 == device && seen.insert(mapping.key) {
                expose(driver, &mapping.name());
            }
        });
    }
}

/// What all processes have mapped for execution: device and inode numbers.
pub fn mapped() -> HashSet<(u64, u64)> {
    let mut found = HashSet::new();
    for pid in processes() {
        let _gone = each_mapping(pid, |mapping| {
            found.insert(mapping.key);
        });
    }
    found
}

/// All that are there, but for those that begin meanwhile.
pub fn processes() -> impl Iterator<Item = u32> {
    numbers_in("/proc")
}

fn numbers_in(folder: &str) -> impl Iterator<Item = u32> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// A file that a process has mapped for execution.
#[derive(Debug, PartialEq, Eq)]
pub struct Mapping {
    /// The thread that shows it.
    thread: u32,
    /// Its name in map_files.
    range: String,
    /// Device and inode number.
    pub key: (u64, u64),
}

impl Mapping {
    /// A name of the file itself.
    pub fn name(&self) -> String {
        format!("/proc/{}/map_files/{}", self.thread, self.range)
    }
}

/// Shows those of one process, one by one: it may have very many.
///
/// # Errors
/// They cannot be read, and not because the process is gone.
pub fn each_mapping(pid: u32, mut see: impl FnMut(&Mapping)) -> std::io::Result<()> {
    let gone = |error: &Error| {
        error.kind() == ErrorKind::NotFound
            || error.raw_os_error() == Some(Errno::SRCH.raw_os_error())
    };
    match mappings_of(pid, &mut see) {
        Ok(true) => return Ok(()),
        Err(error) if !gone(&error) => return Err(error),
        Ok(false) | Err(_) => (),
    }
    // A thread of the kernel; or its first thread has ended, and the others go on without it.
    let folder = format!("/proc/{pid}/task");
    for thread in numbers_in(&folder).filter(|thread| *thread != pid) {
        if mappings_of(thread, &mut see).unwrap_or(false) {
            break;
        }
    }
    Ok(())
}

/// Whether there is anything mapped at all.
fn mappings_of(thread: u32, see: &mut impl FnMut(&Mapping)) -> std::io::Result<bool> {
    let mut maps = BufReader::new(File::open(format!("/proc/{thread}/maps"))?);
    let (mut line, mut any) = (Vec::new(), false);
    while maps.read_until(b'\n', &mut line)? > 0 {
        any = true;
        // The path in it may be any bytes.
        if let Some(mapping) = executable(thread, &String::from_utf8_lossy(&line)) {
            see(&mapping);
        }
        line.clear();
    }
    Ok(any)
}

/// The mapping of a line of proc_pid_maps(5), if it is one of a file and for execution.
fn executable(thread: u32, line: &str) -> Option<Mapping> {
    let mut fields = line.split_ascii_whitespace();
    let (range, permissions) = (fields.next()?, fields.next()?);
    let (device, inode) = (fields.nth(1)?, fields.next()?);
    if !permissions.contains('x') || inode == "0" {
        return None;
    }
    let key = (device_of(device)?, inode.parse().ok()?);
    Some(Mapping { thread, range: unpadded(range), key })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_at_a_low_address_is_found() {
        assert_eq!(unpadded("00401000-00585000"), "401000-585000");
        assert_eq!(unpadded("7f00a000-7f01b000"), "7f00a000-7f01b000");
    }

    #[test]
    fn only_executable_file_mappings_count() {
        let line = |perms, inode| format!("7f00-7f01 {perms} 00000000 fd:0a {inode}   /bin/x");
        let key = (rustix::fs::makedev(0xfd, 0x0a), 9);
        let mapping = Mapping { thread: 7, range: "7f00-7f01".into(), key };
        assert_eq!(executable(7, &line("r-xp", 9)), Some(mapping));
        assert_eq!(executable(7, &line("r--p", 9)), None);
        assert_eq!(executable(7, &line("r-xp", 0)), None);
        assert_eq!(executable(7, "garbage"), None);
    }
}
