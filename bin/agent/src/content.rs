//! Reading a content for its hash alone.

use rustix::io::ReadWriteFlags;
use seawall_proto::ContentHash;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::unix::fs::FileExt;

/// Bytes that are read and hashed at a time: BLAKE3 hashes 16 KiB at once, but in pieces of that it takes a quarter longer (with
/// AVX-512). Each thread that hashes something so large has a buffer of this.
const PIECE: usize = 64 * 1024;
/// After so many bytes it is asked whether to go on.
const ASK_EVERY: u64 = 1 << 20;

/// How a content is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reads {
    /// From the page cache or not at all (RWF_NOWAIT, preadv2(2)).
    Now,
    Waiting,
}

/// The hash of a file's first `size` bytes. `None` where there are not so many, they are not to be had in this way, or it is
/// not to `go_on`.
pub fn hash_of(
    file: &File,
    size: u64,
    reads: Reads,
    buffer: &mut Vec<u8>,
    go_on: impl Fn() -> bool,
) -> io::Result<Option<ContentHash>> {
    let len = usize::try_from(size).unwrap_or(PIECE).min(PIECE);
    buffer.resize(len.max(buffer.len()), 0);
    let (mut hasher, mut offset, mut asked_at) = (blake3::Hasher::new(), 0, 0);
    while offset < size {
        if offset >= asked_at {
            if !go_on() {
                return Ok(None);
            }
            asked_at = offset + ASK_EVERY;
        }
        let most = usize::try_from(size - offset).unwrap_or(PIECE).min(len);
        let piece = &mut buffer[..most];
        let read = match reads {
            Reads::Waiting => file.read_at(piece, offset),
            Reads::Now => {
                let mut pieces = [IoSliceMut::new(piece)];
                let read = rustix::io::preadv2(file, &mut pieces, offset, ReadWriteFlags::NOWAIT);
                read.map_err(io::Error::from)
            }
        };
        match read {
            Ok(0) => return Ok(None),
            Ok(read) => {
                hasher.update(&buffer[..read]);
                offset += read as u64;
            }
            Err(error) => match error.kind() {
                // Not all file systems can tell what they have in memory.
                io::ErrorKind::WouldBlock | io::ErrorKind::Unsupported => return Ok(None),
                io::ErrorKind::Interrupted => (),
                _ => return Err(error),
            },
        }
    }
    Ok(Some(ContentHash(*hasher.finalize().as_bytes())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::io::Write;

    #[test]
    fn so_many_bytes_are_hashed_or_none() {
        let mut file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| (n / 7) as u8).collect();
        file.write_all(&bytes).unwrap();
        let mut buffer = Vec::new();
        for reads in [Reads::Now, Reads::Waiting] {
            for size in [0, 1, PIECE, PIECE + 1, bytes.len()] {
                let expected = ContentHash(*blake3::hash(&bytes[..size]).as_bytes());
                let found = hash_of(&file, size as u64, reads, &mut buffer, || true).unwrap();
                // Its file system may not tell what it has in memory.
                if found.is_some() || reads == Reads::Waiting {
                    assert_eq!(found, Some(expected), "{reads:?} {size}");
                }
            }
            let more = bytes.len() as u64 + 1;
            assert_eq!(hash_of(&file, more, reads, &mut buffer, || true).unwrap(), None);
        }
        let asked = Cell::new(0);
        let twice = || asked.replace(asked.get() + 1) < 2;
        let size = bytes.len() as u64;
        assert_eq!(hash_of(&file, size, Reads::Waiting, &mut buffer, twice).unwrap(), None);
        assert_eq!(asked.get(), 3);
    }
}
