//! What was running before the driver watched: mapped executables count as exposed until scanned.

use crate::driver::Driver;
use crate::file::Look;
use seawall_fanotify::FileHandle;
use seawall_proto::ExposureReason;
use std::collections::HashSet;
use std::fs::File;
use std::os::fd::AsFd;

/// Notes the executable mappings of all processes on one file system, to be scanned as soon as the link stands.
pub fn expose_mapped(driver: &Driver, device: u64) {
    let mut seen = HashSet::new();
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    for pid in processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()) {
        if pid == std::process::id() || pid == driver.supervisor {
            continue;
        }
        let Ok(maps) = std::fs::read_to_string(format!("/proc/{pid}/maps")) else { continue };
        for (range, key) in maps.lines().filter_map(executable) {
            // Nothing on another file system is opened: it may be one that hangs.
            if device_of(key[0]) == Some(device) && seen.insert(key.map(str::to_owned)) {
                expose(driver, &format!("/proc/{pid}/map_files/{}", unpadded(range)));
            }
        }
    }
}

/// The address range of an executable file mapping, and its device and inode as text.
fn executable(line: &str) -> Option<(&str, [&str; 2])> {
    let mut fields = line.split_ascii_whitespace();
    let (range, permissions) = (fields.next()?, fields.next()?);
    let (device, inode) = (fields.nth(1)?, fields.next()?);
    (permissions.contains('x') && inode != "0").then_some((range, [device, inode]))
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

/// What all processes have mapped for execution: device and inode numbers.
pub fn mapped() -> HashSet<(u64, u64)> {
    let mut found = HashSet::new();
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    for process in processes {
        let maps = std::fs::read_to_string(process.path().join("maps")).unwrap_or_default();
        found.extend(
            maps.lines()
                .filter_map(executable)
                .filter_map(|(_, [device, inode])| Some((device_of(device)?, inode.parse().ok()?))),
        );
    }
    found
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
        let line = |perms, inode| format!("7f00-7f01 {perms} 00000000 fd:00 {inode}   /bin/x");
        assert_eq!(executable(&line("r-xp", 9)), Some(("7f00-7f01", ["fd:00", "9"])));
        assert_eq!(executable(&line("r--p", 9)), None);
        assert_eq!(executable(&line("r-xp", 0)), None);
        assert_eq!(executable("garbage"), None);
        assert_eq!(device_of("fd:0a"), Some(rustix::fs::makedev(0xfd, 0x0a)));
    }
}
