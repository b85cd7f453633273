//! The bytes to scan: how the service makes them, and how an engine reads them.
//!
//! [`SharedContent`] is the service's side, [`Content`] the engine's. Small content travels in the message
//! that asks for its scan: to make a memfd, pass, map and close it costs more than two copies. Longer content
//! is a sealed memfd, read in place: its seals forbid every write and every change of size, so a mapping of it
//! can neither change under the engine nor raise SIGBUS. Everything else (a spool file) is copied, and a copy
//! that comes out short is an error, never a shorter scan.

use std::cell::{Cell, OnceCell, RefCell};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, OnceLock};

use crate::protocol::INLINE_MAX;
use crate::sys::{self, Mapping};

/// Content to scan, on the service's side. Cheap to clone: give one content to several engines.
#[derive(Clone, Debug)]
pub struct SharedContent {
    /// At most [`INLINE_MAX`] bytes; None where there is a descriptor from the start.
    bytes: Option<Arc<[u8]>>,
    /// Of small content only once somebody needs it.
    fd: Arc<OnceLock<OwnedFd>>,
    length: u64,
}

impl SharedContent {
    /// A private copy; of what is long, sealed.
    ///
    /// # Errors
    /// There is no memory, or no descriptor is free, for a memfd.
    pub fn new(bytes: impl Into<Vec<u8>>) -> io::Result<Self> {
        let bytes = bytes.into();
        let length = bytes.len() as u64;
        if bytes.len() > INLINE_MAX {
            return Ok(Self::of(sealed(&bytes)?, length));
        }
        Ok(Self { bytes: Some(bytes.into()), fd: Arc::default(), length })
    }

    /// The first `length` bytes of a spool file that has no name any more. A descriptor that can
    /// write is replaced by one that cannot: the engine must not change what others read.
    pub fn from_spool(file: File, length: u64) -> io::Result<Self> {
        let file = if sys::is_read_only(file.as_fd())? {
            file
        } else {
            File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?
        };
        Ok(Self::of(file.into(), length))
    }

    fn of(fd: OwnedFd, length: u64) -> Self {
        Self { bytes: None, fd: Arc::new(fd.into()), length }
    }

    /// Bytes to scan.
    pub fn len(&self) -> u64 {
        self.length
    }

    /// True when there is nothing to scan.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The bytes, where they are few enough to travel in a message.
    pub fn inline(&self) -> Option<&[u8]> {
        self.bytes.as_deref()
    }

    /// A descriptor of the content: a sealed memfd, or what [`SharedContent::from_spool`] was given.
    ///
    /// # Errors
    /// There is no memory, or no descriptor is free, for a memfd of what was small.
    pub fn descriptor(&self) -> io::Result<BorrowedFd<'_>> {
        if let (None, Some(bytes)) = (self.fd.get(), &self.bytes) {
            // Somebody else may have been quicker: one is as good as the other.
            let _same = self.fd.set(sealed(bytes)?);
        }
        let fd = self.fd.get().ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        Ok(fd.as_fd())
    }
}

/// A sealed memfd of these bytes.
fn sealed(bytes: &[u8]) -> io::Result<OwnedFd> {
    let file = sys::memfd(c"seawall-content")?;
    file.write_all_at(bytes, 0)?;
    sys::seal(&file)?;
    Ok(file.into())
}

/// A private copy that is written piece by piece and then sealed: the bytes move once.
#[derive(Debug)]
pub struct ContentWriter {
    file: File,
    length: u64,
    capacity: u64,
}

impl ContentWriter {
    /// An empty memfd that grows to at most `capacity` bytes.
    pub fn new(capacity: u64) -> io::Result<Self> {
        Ok(Self { file: sys::memfd(c"seawall-content")?, length: 0, capacity })
    }

    /// Appends a piece; nothing of it counts when it does not fit.
    pub fn append(&mut self, piece: &[u8]) -> io::Result<()> {
        if piece.len() as u64 > self.capacity - self.length {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        // At an offset: a piece that failed half-way is written again at its own place.
        self.file.write_all_at(piece, self.length)?;
        self.length += piece.len() as u64;
        Ok(())
    }

    /// Bytes written so far.
    pub fn len(&self) -> u64 {
        self.length
    }

    /// True when nothing was written yet.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Forbids every further change, for everyone and for good.
    pub fn seal(self) -> io::Result<SharedContent> {
        sys::seal(&self.file)?;
        Ok(SharedContent::of(self.file.into(), self.length))
    }
}

/// Why content could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// Somebody truncated the file.
    #[error("the content ended after {got} of {expected} bytes")]
    Short {
        /// Bytes announced.
        expected: u64,
        /// Bytes read.
        got: u64,
    },
    /// The copy does not fit into the engine's memory limit.
    #[error("no memory for {length} bytes of content")]
    Memory {
        /// Bytes needed.
        length: u64,
    },
    /// The system said no.
    #[error("cannot read the content")]
    Io(#[from] io::Error),
}

/// Content to scan, on the engine's side.
pub struct Content {
    source: Source,
    length: u64,
    bytes: OnceCell<Bytes>,
    /// Why some of it could not be read, the first time.
    failure: RefCell<Option<String>>,
    /// There was no memory for a copy, and nothing was read in another way since.
    unread: Cell<bool>,
}

enum Source {
    /// Behind a descriptor.
    File(File),
    /// At this place of a buffer that holds the message which asks for its scan.
    Message { buffer: Vec<u8>, at: Range<usize> },
}

enum Bytes {
    Mapped(Mapping),
    Copied(Vec<u8>),
}

impl Content {
    /// Content behind a received descriptor.
    pub(crate) fn new(fd: OwnedFd, length: u64) -> Self {
        Self::from_source(Source::File(File::from(fd)), length)
    }

    /// Content that came in a message, at this place of its buffer.
    pub(crate) fn in_message(buffer: Vec<u8>, at: Range<usize>) -> Self {
        let length = at.len() as u64;
        Self::from_source(Source::Message { buffer, at }, length)
    }

    fn from_source(source: Source, length: u64) -> Self {
        Self {
            source,
            length,
            bytes: OnceCell::new(),
            failure: RefCell::new(None),
            unread: Cell::new(false),
        }
    }

    /// Gives back the buffer of the message that it came in.
    pub(crate) fn into_buffer(self) -> Option<Vec<u8>> {
        match self.source {
            Source::Message { buffer, .. } => Some(buffer),
            Source::File(_) => None,
        }
    }

    /// Empty content, to warm a scanner up.
    pub(crate) fn empty() -> Self {
        Self::in_message(Vec::new(), 0..0)
    }

    /// Bytes to scan.
    pub fn len(&self) -> u64 {
        self.length
    }

    /// True when there is nothing to scan.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Whether [`Content::bytes`] costs no memory: it is sealed, or came in the message, and is read where it
    /// lies. Else it is copied, and [`Content::read_at`] may do.
    pub fn is_in_place(&self) -> bool {
        match &self.source {
            Source::File(file) => sys::is_sealed(file.as_fd()),
            Source::Message { .. } => true,
        }
    }

    /// Why not all of it can have been seen; None when nothing went wrong. After that a scan cannot end as
    /// clean: the runtime makes an error of it.
    pub fn unseen(&self) -> Option<String> {
        let memory = || ContentError::Memory { length: self.length }.to_string();
        self.failure.borrow().clone().or_else(|| self.unread.get().then(memory))
    }

    fn note(&self, error: &ContentError) {
        match error {
            ContentError::Memory { .. } => self.unread.set(true),
            ContentError::Io(cause) => self.note_text(format!("{error}: {cause}")),
            ContentError::Short { .. } => self.note_text(error.to_string()),
        }
    }

    fn note_text(&self, reason: String) {
        self.failure.borrow_mut().get_or_insert(reason);
    }

    /// The descriptor itself, to be handed on: it can only be read. An engine whose
    /// [`Description::by_descriptor`](crate::Description::by_descriptor) is set always gets one; to others
    /// small content comes without.
    pub fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match &self.source {
            Source::File(file) => Some(file.as_fd()),
            Source::Message { .. } => None,
        }
    }

    /// The whole content: in place when it is sealed or came in the message, else a copy made at the first
    /// call.
    pub fn bytes(&self) -> Result<&[u8], ContentError> {
        let file = match &self.source {
            Source::Message { buffer, at } => return Ok(&buffer[at.clone()]),
            Source::File(file) => file,
        };
        if self.bytes.get().is_none() {
            // A second value is impossible: `Content` is not Sync.
            let loaded = self.load(file).inspect_err(|error| self.note(error))?;
            let _ = self.bytes.set(loaded);
        }
        match self.bytes.get() {
            Some(Bytes::Mapped(mapping)) => Ok(mapping),
            Some(Bytes::Copied(copy)) => Ok(copy),
            None => Ok(&[]),
        }
    }

    /// Reads at an offset; fewer bytes than asked for only at the end of the content.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<usize, ContentError> {
        let read = self.read_part(offset, buffer).inspect_err(|error| self.note(error))?;
        if read > 0 {
            self.unread.set(false);
        }
        Ok(read)
    }

    fn read_part(&self, offset: u64, buffer: &mut [u8]) -> Result<usize, ContentError> {
        let left = self.length.saturating_sub(offset);
        let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let file = match &self.source {
            Source::Message { buffer: message, at } => {
                let content = &message[at.clone()];
                // Behind the end nothing is wanted.
                let from =
                    usize::try_from(offset).map_or(content.len(), |at| at.min(content.len()));
                buffer[..wanted].copy_from_slice(&content[from..][..wanted]);
                return Ok(wanted);
            }
            Source::File(file) => file,
        };
        let mut got = 0;
        while got < wanted {
            match file.read_at(&mut buffer[got..wanted], offset + got as u64) {
                Ok(0) => {
                    let got = offset + got as u64;
                    return Err(ContentError::Short { expected: self.length, got });
                }
                Ok(count) => got += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(got)
    }

    fn load(&self, file: &File) -> Result<Bytes, ContentError> {
        let memory = || ContentError::Memory { length: self.length };
        let length = usize::try_from(self.length).map_err(|_| memory())?;
        if sys::is_sealed(file.as_fd()) {
            let size = sys::file_size(file.as_fd())?;
            if size < self.length {
                return Err(ContentError::Short { expected: self.length, got: size });
            }
            return Ok(Bytes::Mapped(Mapping::new(file.as_fd(), length)?));
        }
        let mut copy = Vec::new();
        copy.try_reserve_exact(length).map_err(|_| memory())?;
        copy.resize(length, 0);
        self.read_part(0, &mut copy)?;
        Ok(Bytes::Copied(copy))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write;

    use super::*;

    /// By descriptor, as it comes to an engine.
    fn received(content: &SharedContent) -> Content {
        Content::new(duplicate(content), content.len())
    }

    fn duplicate(content: &SharedContent) -> OwnedFd {
        content.descriptor().unwrap().try_clone_to_owned().unwrap()
    }

    #[test]
    fn sealed_content_is_read_in_place_and_cannot_change() {
        for length in [10, INLINE_MAX + 1] {
            let bytes = vec![7; length];
            let sealed = SharedContent::new(&bytes[..]).unwrap();
            let content = received(&sealed);
            assert_eq!(content.bytes().unwrap(), bytes);
            assert!(matches!(content.bytes.get(), Some(Bytes::Mapped(_))) && content.is_in_place());
            let file = File::from(duplicate(&sealed));
            assert!(file.write_at(b"x", 0).is_err());
            assert!(file.set_len(1).is_err());
            assert!(file.set_len(1 << 20).is_err());
        }
    }

    #[test]
    fn only_small_content_travels_in_a_message() {
        for (length, inline) in [(0, true), (1, true), (INLINE_MAX, true), (INLINE_MAX + 1, false)]
        {
            let content = SharedContent::new(vec![7; length]).unwrap();
            assert_eq!(content.inline().is_some(), inline, "{length}");
            assert_eq!(content.len(), length as u64);
        }
        let mut writer = ContentWriter::new(1).unwrap();
        writer.append(b"x").unwrap();
        assert_eq!(writer.seal().unwrap().inline(), None, "it is sealed already");
    }

    #[test]
    fn a_message_is_read_from_where_the_content_begins() {
        let content = Content::in_message(b"head0123456789tail".to_vec(), 4..14);
        assert_eq!((content.len(), content.is_in_place()), (10, true));
        assert_eq!(content.bytes().unwrap(), b"0123456789");
        offsets_stay_within(&content);
        assert!(content.descriptor().is_none());
        assert_eq!(content.unseen(), None);
        assert_eq!(content.into_buffer().unwrap(), b"head0123456789tail");
    }

    /// The kernel does so at times, when it moves pages about; here a pipe does.
    #[test]
    fn a_page_that_somebody_holds_does_not_keep_content_from_being_sealed() {
        let mut writer = ContentWriter::new(4096).unwrap();
        writer.append(&[7; 4096]).unwrap();
        let (_reader, pipe) = io::pipe().unwrap();
        assert_eq!(sys::splice(writer.file.as_fd(), pipe.as_fd(), 4096).unwrap(), 4096);
        let sealed = writer.seal().unwrap();
        assert!(File::from(duplicate(&sealed)).write_at(b"x", 0).is_err());
        assert_eq!(received(&sealed).bytes().unwrap(), [7; 4096]);
    }

    #[test]
    fn an_unsealed_memfd_is_copied() {
        let mut file = sys::memfd(c"test").unwrap();
        file.write_all(b"abc").unwrap();
        let content = Content::new(file.into(), 3);
        assert_eq!(content.bytes().unwrap(), b"abc");
        assert!(matches!(content.bytes.get(), Some(Bytes::Copied(_))) && !content.is_in_place());
    }

    #[test]
    fn content_shorter_than_announced_is_an_error() {
        let spooled = SharedContent::from_spool(spool(b"abc"), 3).unwrap();
        for shared in [SharedContent::new(b"abc").unwrap(), spooled] {
            let content = Content::new(duplicate(&shared), 4);
            assert_eq!(content.unseen(), None);
            assert!(matches!(content.bytes(), Err(ContentError::Short { expected: 4, got: 3 })));
            let reason = "the content ended after 3 of 4 bytes";
            assert_eq!(content.unseen().as_deref(), Some(reason));
            assert_eq!(content.read_at(0, &mut [0; 3]).unwrap(), 3);
            assert_eq!(content.unseen().as_deref(), Some(reason), "for good");
        }
    }

    #[test]
    fn what_there_was_no_memory_for_may_be_read_in_pieces() {
        let file = spool(b"abc");
        let length = 1 << 60;
        let content = Content::new(file.into(), length);
        assert!(matches!(content.bytes(), Err(ContentError::Memory { .. })));
        assert!(content.unseen().is_some_and(|why| why.starts_with("no memory for ")));
        assert_eq!(content.read_at(0, &mut [0; 2]).unwrap(), 2);
        assert_eq!(content.unseen(), None);
    }

    #[test]
    fn a_spool_file_loses_its_right_to_write() {
        let content = SharedContent::from_spool(spool(b"abc"), 3).unwrap();
        let file = File::from(duplicate(&content));
        assert!(file.write_at(b"x", 0).is_err());
        assert_eq!(received(&content).bytes().unwrap(), b"abc");
    }

    #[test]
    fn offsets_stay_within_the_content() {
        offsets_stay_within(&received(&SharedContent::new(b"0123456789").unwrap()));
    }

    fn offsets_stay_within(content: &Content) {
        let mut buffer = [0; 4];
        assert_eq!(content.read_at(8, &mut buffer).unwrap(), 2);
        assert_eq!(&buffer[..2], b"89");
        assert_eq!(content.read_at(10, &mut buffer).unwrap(), 0);
        assert_eq!(content.read_at(u64::MAX, &mut buffer).unwrap(), 0);
    }

    #[test]
    fn a_writer_keeps_to_its_capacity() {
        let mut writer = ContentWriter::new(4).unwrap();
        writer.append(b"abc").unwrap();
        assert!(writer.append(b"de").is_err());
        writer.append(b"d").unwrap();
        assert_eq!(received(&writer.seal().unwrap()).bytes().unwrap(), b"abcd");
    }

    fn spool(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }
}
