//! An archive in an archive in an archive, to see what a clamd does beyond its limits.

/// More levels than any clamd may go down (MaxRecursion, at most 100).
pub const BEYOND_ALL_LIMITS: usize = 120;

/// So many levels of gzip (RFC 1952), each one stored block.
pub fn gzip(levels: usize) -> Vec<u8> {
    let mut content = b"nothing".to_vec();
    for _ in 0..levels {
        let length = u16::try_from(content.len()).unwrap_or(u16::MAX);
        let mut outer = vec![0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 3, 1];
        outer.extend(length.to_le_bytes());
        outer.extend((!length).to_le_bytes());
        outer.extend(&content);
        outer.extend(crc(&content).to_le_bytes());
        outer.extend(u32::from(length).to_le_bytes());
        content = outer;
    }
    content
}

/// The checksum of RFC 1952, section 8.
fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| {
            if sum & 1 == 1 { sum >> 1 ^ 0xedb8_8320 } else { sum >> 1 }
        })
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::{Read, Write};
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn the_checksum_is_the_known_one() {
        assert_eq!(crc(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn gzip_itself_unpacks_every_level() {
        let mut content = gzip(3);
        for _ in 0..3 {
            let mut child = Command::new("gzip")
                .arg("-dc")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            child.stdin.take().unwrap().write_all(&content).unwrap();
            let mut unpacked = Vec::new();
            child.stdout.take().unwrap().read_to_end(&mut unpacked).unwrap();
            assert!(child.wait().unwrap().success());
            content = unpacked;
        }
        assert_eq!(content, b"nothing");
        assert!(gzip(BEYOND_ALL_LIMITS).len() < 4096);
    }
}
