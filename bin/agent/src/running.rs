//! What was running before the driver watched: mapped executables count as exposed until scanned.

use crate::driver::Driver;
use crate::file::Look;
use seawall_fanotify::FileHandle;
use std::collections::HashSet;
use std::fs::File;
use std::os::fd::AsFd;

/// The exposure reason of files that were mapped before they were watched.
pub const MAPPED: u32 = 100;

/// Notes the executable mappings of all processes (of one file system, where `device` is given), to
/// be scanned as soon as the link stands.
pub fn expose_mapped(driver: &Driver, device: Option<u64>) {
    let mut seen = HashSet::new();
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    for pid in processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok()) {
        if pid == std::process::id() || pid == driver.supervisor {
            continue;
        }
        let Ok(maps) = std::fs::read_to_string(format!("/proc/{pid}/maps")) else { continue };
        for (range, key) in maps.lines().filter_map(executable) {
            if seen.insert(key.map(str::to_owned)) {
                expose(driver, &format!("/proc/{pid}/map_files/{}", unpadded(range)), device);
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

fn expose(driver: &Driver, path: &str, device: Option<u64>) {
    let Ok(file) = File::open(path) else { return };
    let Ok(look) = Look::at(&file) else { return };
    let wanted = device.is_none_or(|device| device == look.identity.device);
    if !wanted || !look.is_regular {
        return;
    }
    if let Ok(handle) = FileHandle::of(file.as_fd(), look.identity.device) {
        driver.ledger.expose(&handle, MAPPED);
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
    }
}
