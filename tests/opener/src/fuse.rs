//! A file system whose server never answers an open: /usr/include/linux/fuse.h, protocol 7.31, by hand.
//!
//! It has one file, `file`. Whoever opens that waits until this process ends.

use std::ffi::CString;
use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;

use anyhow::Context;
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const INIT: u32 = 26;
const BATCH_FORGET: u32 = 42;

/// `struct fuse_in_header`.
const IN_HEADER: usize = 40;
const ROOT: u64 = 1;
const FILE: u64 = 2;

/// Mounts and serves until killed; prints `mounted` once the kernel knows it.
pub fn serve(folder: &Path) -> anyhow::Result<()> {
    let mut device = OpenOptions::new().read(true).write(true).open("/dev/fuse")?;
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
    let options = CString::new(options)?;
    mount("opener", folder, "fuse", MountFlags::empty(), options.as_c_str())
        .with_context(|| format!("cannot mount on {}", folder.display()))?;
    println!("mounted");
    let mut buffer = vec![0; 128 * 1024];
    loop {
        let length = device.read(&mut buffer).context("/dev/fuse")?;
        let request = &buffer[..length];
        if let Some(reply) = answer(request) {
            device.write_all(&reply).context("/dev/fuse")?;
        }
    }
}

fn number(request: &[u8], at: usize) -> u64 {
    request.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).map_or(0, u64::from_ne_bytes)
}

/// The bytes for the kernel, or none: never.
fn answer(request: &[u8]) -> Option<Vec<u8>> {
    let operation = (number(request, 0) >> 32) as u32;
    let (unique, node) = (number(request, 8), number(request, 16));
    let result = match operation {
        OPEN | FORGET | BATCH_FORGET => return None,
        INIT => Ok(init()),
        GETATTR => Ok([words(&[1, 0]), attributes(node)].concat()),
        LOOKUP if request[IN_HEADER..].starts_with(b"file\0") => {
            Ok([words(&[FILE, 0, 1, 1, 0]), attributes(FILE)].concat())
        }
        LOOKUP => Err(Errno::NOENT),
        _ => Err(Errno::NOSYS),
    };
    let (error, body) = match result {
        Ok(body) => (0, body),
        Err(errno) => (-errno.raw_os_error(), Vec::new()),
    };
    let length = 16 + u32::try_from(body.len()).ok()?;
    Some([&length.to_ne_bytes(), &error.to_ne_bytes()[..], &unique.to_ne_bytes(), &body].concat())
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// `struct fuse_init_out`: version 7.31, no features.
fn init() -> Vec<u8> {
    let mut fields = [0_u32; 16];
    (fields[0], fields[1]) = (7, 31);
    // max_background and congestion_threshold in one word, then max_write.
    (fields[4], fields[5]) = (12 | 9 << 16, 4096);
    fields.iter().flat_map(|field| field.to_ne_bytes()).collect()
}

/// `struct fuse_attr`.
fn attributes(node: u64) -> Vec<u8> {
    let (mode, links) = if node == ROOT { (0o040_755, 2) } else { (0o100_644, 1) };
    let size = if node == ROOT { 0 } else { 4 };
    let mut bytes = words(&[node, size, 1, 0, 0, 0]);
    for field in [0_u32, 0, 0, mode, links, 0, 0, 0, 4096, 0] {
        bytes.extend_from_slice(&field.to_ne_bytes());
    }
    bytes
}
