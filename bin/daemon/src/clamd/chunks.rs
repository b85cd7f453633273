//! The content of an INSTREAM command: chunks of `<length, 4 bytes, big endian><bytes>`, ended by one of
//! length 0. No I/O.

/// Takes the lengths out of what comes.
#[derive(Debug)]
pub struct Chunks {
    /// What is still to come of the chunk.
    left: u32,
    /// The length, as far as it came.
    header: [u8; 4],
    have: usize,
    /// Bytes that may still be announced.
    quota: u64,
}

/// A chunk would make the stream longer than allowed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("INSTREAM size limit exceeded.")]
pub struct TooLong;

/// What was in some bytes of a stream.
#[derive(Debug, PartialEq, Eq)]
pub struct Fed {
    /// So many bytes of content stand at the beginning of the buffer now.
    pub content: usize,
    /// So many bytes of the buffer belonged to the stream.
    pub used: usize,
    /// The stream is whole.
    pub is_end: bool,
}

impl Chunks {
    /// A stream of at most `quota` bytes.
    pub fn new(quota: u64) -> Self {
        Self { left: 0, header: [0; 4], have: 0, quota }
    }

    /// So many bytes can be read without reading beyond the stream.
    pub fn wanted(&self) -> usize {
        if self.left == 0 { 4 - self.have } else { self.left as usize + 4 }
    }

    /// Takes a part of the stream in.
    ///
    /// # Errors
    /// [`TooLong`] as soon as a chunk is announced that is too long, before any of it is here.
    pub fn feed(&mut self, bytes: &mut [u8]) -> Result<Fed, TooLong> {
        let (mut content, mut used) = (0, 0);
        while used < bytes.len() {
            if self.left > 0 {
                let len = (bytes.len() - used).min(self.left as usize);
                bytes.copy_within(used..used + len, content);
                content += len;
                used += len;
                self.left -= u32::try_from(len).unwrap_or(self.left);
                continue;
            }
            self.header[self.have] = bytes[used];
            self.have += 1;
            used += 1;
            if self.have < self.header.len() {
                continue;
            }
            self.have = 0;
            self.left = u32::from_be_bytes(self.header);
            if self.left == 0 {
                return Ok(Fed { content, used, is_end: true });
            }
            self.quota = self.quota.checked_sub(self.left.into()).ok_or(TooLong)?;
        }
        Ok(Fed { content, used, is_end: false })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn chunk(content: &[u8]) -> Vec<u8> {
        [&u32::try_from(content.len()).unwrap().to_be_bytes()[..], content].concat()
    }

    #[test]
    fn a_chunk_that_lies_about_its_length_is_refused_when_it_is_announced() {
        let mut chunks = Chunks::new(10);
        let mut bytes = [chunk(b"123456"), 5_u32.to_be_bytes().to_vec()].concat();
        assert_eq!(chunks.feed(&mut bytes), Err(TooLong));
        let mut bytes = u32::MAX.to_be_bytes();
        assert_eq!(Chunks::new(u64::from(u32::MAX) - 1).feed(&mut bytes), Err(TooLong));
        let mut chunks = Chunks::new(u64::MAX);
        assert_eq!(chunks.feed(&mut bytes), Ok(Fed { content: 0, used: 4, is_end: false }));
        assert_eq!(chunks.wanted(), u32::MAX as usize + 4);
    }

    proptest! {
        /// Cut anywhere, read in any pieces: the content comes out whole and what follows stays.
        #[test]
        fn the_content_comes_out_whole(
            parts in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..50), 0..8),
            pieces in proptest::collection::vec(1_usize..40, 1..20),
            behind in proptest::collection::vec(any::<u8>(), 0..20),
        ) {
            let mut wire: Vec<u8> = parts.iter().flat_map(|part| chunk(part)).collect();
            wire.extend([0; 4]);
            wire.extend(&behind);
            let mut chunks = Chunks::new(1000);
            let (mut content, mut at, mut is_end) = (Vec::<u8>::new(), 0, false);
            for piece in pieces.iter().cycle() {
                let len = (*piece).min(wire.len() - at);
                let mut bytes = wire[at..at + len].to_vec();
                // Whoever asks first never reads beyond the stream.
                prop_assert!(at + chunks.wanted() <= wire.len() - behind.len());
                let fed = chunks.feed(&mut bytes).unwrap();
                content.extend(&bytes[..fed.content]);
                at += fed.used;
                is_end = fed.is_end;
                if is_end {
                    break;
                }
                prop_assert_eq!(fed.used, len);
            }
            prop_assert!(is_end);
            prop_assert_eq!(content, parts.concat());
            prop_assert_eq!(&wire[at..], &behind[..]);
        }

        #[test]
        fn rubbish_is_no_trouble(mut bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let len = bytes.len();
            if let Ok(fed) = Chunks::new(1000).feed(&mut bytes) {
                prop_assert!(fed.content <= fed.used && fed.used <= len);
            }
        }
    }
}
