//! Which contents are archives.

/// How many bytes of a content's beginning [`kind`] needs to know all kinds.
pub const HEAD: usize = 512;

/// What an engine is asked to look into. Compressed single files count: what matters lies inside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// POSIX and GNU tar, by the `ustar` of each header (POSIX.1-2017, pax, "ustar Interchange Format").
    Tar,
    /// Zip, and all that is built on it: jar, docx, apk (APPNOTE.TXT 4.3.7).
    Zip,
    /// RFC 1952.
    Gzip,
    /// The .xz file format, 2.1.1.1.
    Xz,
    /// bzip2.
    Bzip2,
    /// RFC 8878, 3.1.1 and 3.1.2: a frame, or one that is to be skipped.
    Zstd,
}

/// What a content is that begins like this. The beginning decides, as it does for the programs that unpack: no name does.
pub fn kind(head: &[u8]) -> Option<Kind> {
    let begins = |magic: &[u8]| head.starts_with(magic);
    if begins(b"PK\x03\x04") {
        Some(Kind::Zip)
    } else if begins(&[0x1f, 0x8b, 8]) {
        Some(Kind::Gzip)
    } else if begins(&[0xfd, b'7', b'z', b'X', b'Z', 0]) {
        Some(Kind::Xz)
    } else if begins(b"BZh") && head.get(3).is_some_and(|level| (b'1'..=b'9').contains(level)) {
        Some(Kind::Bzip2)
    } else if begins(&[0x28, 0xb5, 0x2f, 0xfd])
        || matches!(head, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..])
    {
        Some(Kind::Zstd)
    } else if head.get(257..262) == Some(b"ustar") {
        Some(Kind::Tar)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_beginning_that_is_cut_off_is_no_archive() {
        let mut tar = vec![0; HEAD];
        tar[257..262].copy_from_slice(b"ustar");
        assert_eq!(kind(&tar), Some(Kind::Tar));
        assert_eq!(kind(&tar[..261]), None);
        assert_eq!(kind(b"BZh9"), Some(Kind::Bzip2));
        assert_eq!(kind(b"BZh"), None);
        assert_eq!(kind(b""), None);
    }
}
