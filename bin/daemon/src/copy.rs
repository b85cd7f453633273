//! The private copy: what the host holds of a guest's content once it was copied out of the slots.
//!
//! Small content is on the heap, larger in a memfd. What does not fit the memory budget goes to a
//! file without a name. The hash is that of the copy: bytes are hashed from here, never from a slot.

use seawall_engine::archive;
use seawall_engine::content::{ContentWriter, SharedContent};
use seawall_proto::ContentHash;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

/// Content up to this length stays on the heap, in bytes.
pub const HEAP_MAX: usize = 1 << 20;
/// One guest's part of the memory budget.
const GUEST_PART: u64 = 4;
/// One guest's spooled bytes are at most this many times the largest file that is scanned on access.
const SPOOLED_FILES: u64 = 8;

/// Why there is no whole copy.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    #[error("the content is longer than the {limit} bytes that a request may have")]
    TooLong { limit: u64 },
    #[error("the guest has too much content waiting for its scan")]
    Spooled,
    #[error("the content cannot be kept: {0}")]
    Store(#[source] io::Error),
}

/// The memory for private copies of the whole host.
#[derive(Debug)]
pub struct Budget {
    limit: u64,
    used: AtomicU64,
    spooled: AtomicU64,
    spool_dir: PathBuf,
}

impl Budget {
    pub fn new(limit: u64, spool_dir: PathBuf) -> Arc<Self> {
        let (used, spooled) = Default::default();
        Arc::new(Self { limit, used, spooled, spool_dir })
    }

    pub fn limit(&self) -> u64 {
        self.limit
    }

    pub fn used(&self) -> u64 {
        self.used.load(Relaxed)
    }

    pub fn spooled(&self) -> u64 {
        self.spooled.load(Relaxed)
    }

    /// A share for one guest.
    pub fn share(self: &Arc<Self>) -> Arc<Share> {
        self.share_of(self.limit / GUEST_PART)
    }

    /// A share that may use all of it, for the operator's own scans.
    pub fn whole(self: &Arc<Self>) -> Arc<Share> {
        self.share_of(self.limit)
    }

    fn share_of(self: &Arc<Self>, limit: u64) -> Arc<Share> {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let client = NEXT.fetch_add(1, Relaxed);
        let (used, spooled, scans) = Default::default();
        Arc::new(Share { budget: Arc::clone(self), client, limit, used, spooled, scans })
    }
}

/// What one guest holds of the budget.
#[derive(Debug)]
pub struct Share {
    budget: Arc<Budget>,
    /// Whose scans these are, for engines that share their time.
    pub client: u64,
    limit: u64,
    used: AtomicU64,
    spooled: AtomicU64,
    /// Scans under way that this guest began.
    pub scans: AtomicU32,
}

impl Share {
    fn take(&self, bytes: u64) -> bool {
        if !add_within(&self.used, bytes, self.limit) {
            return false;
        }
        if add_within(&self.budget.used, bytes, self.budget.limit) {
            return true;
        }
        self.used.fetch_sub(bytes, Relaxed);
        false
    }

    fn take_spool(&self, bytes: u64, limit: u64) -> bool {
        let taken = add_within(&self.spooled, bytes, limit);
        if taken {
            self.budget.spooled.fetch_add(bytes, Relaxed);
        }
        taken
    }
}

fn add_within(counter: &AtomicU64, bytes: u64, limit: u64) -> bool {
    let add = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= limit);
    counter.fetch_update(Relaxed, Relaxed, add).is_ok()
}

/// Bytes taken from a share, given back on drop.
#[derive(Debug)]
pub struct Charge {
    share: Arc<Share>,
    memory: u64,
    spooled: u64,
}

impl Charge {
    pub fn share(&self) -> &Arc<Share> {
        &self.share
    }

    fn release_memory(&mut self) {
        let memory = std::mem::take(&mut self.memory);
        self.share.used.fetch_sub(memory, Relaxed);
        self.share.budget.used.fetch_sub(memory, Relaxed);
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.release_memory();
        self.share.spooled.fetch_sub(self.spooled, Relaxed);
        self.share.budget.spooled.fetch_sub(self.spooled, Relaxed);
    }
}

enum Store {
    Heap(Vec<u8>),
    Memory(ContentWriter),
    Spool(File),
}

/// Adds to `head` what it has room for.
fn keep_head(head: &mut Vec<u8>, piece: &[u8]) {
    let room = archive::HEAD.saturating_sub(head.len());
    head.extend_from_slice(&piece[..room.min(piece.len())]);
}

/// A copy that grows piece by piece.
pub struct PrivateCopy {
    store: Store,
    hasher: blake3::Hasher,
    /// The first bytes, as far as they tell what the content is.
    head: Vec<u8>,
    len: u64,
    limit: u64,
    spool_limit: u64,
    charge: Charge,
}

impl PrivateCopy {
    /// An empty copy that grows to at most `limit` bytes. `spare` is a buffer to use again;
    /// `usual_limit` is the largest file scanned on access.
    pub fn new(share: Arc<Share>, limit: u64, usual_limit: u64, mut spare: Vec<u8>) -> Self {
        spare.clear();
        Self {
            store: Store::Heap(spare),
            hasher: blake3::Hasher::new(),
            head: Vec::new(),
            len: 0,
            limit,
            spool_limit: usual_limit.saturating_mul(SPOOLED_FILES),
            charge: Charge { share, memory: 0, spooled: 0 },
        }
    }

    /// Whose budget it uses.
    pub fn share(&self) -> &Share {
        &self.charge.share
    }

    /// Bytes copied so far.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Adds `len` bytes that `fill` copies, once; they are hashed where they were copied to.
    /// `scratch` is used where they do not stay on the heap.
    pub fn append<E: From<CopyError>>(
        &mut self,
        len: usize,
        scratch: &mut Vec<u8>,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.len + len as u64 > self.limit {
            return Err(CopyError::TooLong { limit: self.limit }.into());
        }
        self.make_room(len)?;
        if let Store::Heap(bytes) = &mut self.store {
            let start = bytes.len();
            bytes.resize(start + len, 0);
            fill(&mut bytes[start..])?;
            self.hasher.update(&bytes[start..]);
            keep_head(&mut self.head, &bytes[start..]);
        } else {
            scratch.resize(len, 0);
            fill(scratch)?;
            self.hasher.update(scratch);
            keep_head(&mut self.head, scratch);
            self.store(scratch).map_err(CopyError::Store)?;
        }
        self.len += len as u64;
        Ok(())
    }

    fn store(&mut self, piece: &[u8]) -> io::Result<()> {
        match &mut self.store {
            Store::Heap(bytes) => bytes.extend_from_slice(piece),
            Store::Memory(writer) => writer.append(piece)?,
            Store::Spool(file) => file.write_all(piece)?,
        }
        Ok(())
    }

    /// Takes `len` bytes from the budget and moves the copy to where it has room for them.
    fn make_room(&mut self, len: usize) -> Result<(), CopyError> {
        if matches!(self.store, Store::Spool(_)) {
            return self.take_spool(len as u64);
        }
        if !self.charge.share.take(len as u64) {
            self.take_spool(self.len + len as u64)?;
            self.spill().map_err(CopyError::Store)?;
            self.charge.release_memory();
            return Ok(());
        }
        self.charge.memory += len as u64;
        if let Store::Heap(bytes) = &mut self.store
            && bytes.len() + len > HEAP_MAX
        {
            let mut writer = ContentWriter::new(self.limit).map_err(CopyError::Store)?;
            writer.append(bytes).map_err(CopyError::Store)?;
            self.store = Store::Memory(writer);
        }
        Ok(())
    }

    fn take_spool(&mut self, bytes: u64) -> Result<(), CopyError> {
        if !self.charge.share.take_spool(bytes, self.spool_limit) {
            return Err(CopyError::Spooled);
        }
        self.charge.spooled += bytes;
        Ok(())
    }

    /// Moves what is in memory to a file without a name.
    fn spill(&mut self) -> io::Result<()> {
        let mut file = File::options()
            .read(true)
            .write(true)
            .mode(0o600)
            .custom_flags(rustix::fs::OFlags::TMPFILE.bits().cast_signed())
            .open(&self.charge.share.budget.spool_dir)?;
        match std::mem::replace(&mut self.store, Store::Heap(Vec::new())) {
            Store::Heap(bytes) => file.write_all(&bytes)?,
            Store::Memory(writer) => {
                let content = writer.seal()?;
                let mut offset = 0;
                while offset < content.len() {
                    let left = usize::try_from(content.len() - offset).unwrap_or(usize::MAX);
                    let sent = rustix::fs::sendfile(
                        &file,
                        content.descriptor()?,
                        Some(&mut offset),
                        left,
                    )?;
                    if sent == 0 {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
            }
            Store::Spool(same) => file = same,
        }
        self.store = Store::Spool(file);
        Ok(())
    }

    /// The digest of what was copied.
    pub fn hash(&self) -> ContentHash {
        ContentHash(*self.hasher.finalize().as_bytes())
    }

    /// Whether it is an archive that engines may look into.
    pub fn is_archive(&self) -> bool {
        archive::kind(&self.head).is_some()
    }

    /// Gives the buffer back, where there is one.
    pub fn into_spare(self) -> Vec<u8> {
        match self.store {
            Store::Heap(bytes) => bytes,
            _ => Vec::new(),
        }
    }

    /// The copy as engines get it; the charge holds its part of the budget.
    pub fn seal(self) -> io::Result<(SharedContent, Charge)> {
        let content = match self.store {
            Store::Heap(bytes) => SharedContent::new(bytes)?,
            Store::Memory(writer) => writer.seal()?,
            Store::Spool(file) => SharedContent::from_spool(file, self.len)?,
        };
        Ok((content, self.charge))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn copy_of(share: &Arc<Share>, content: &[u8]) -> Result<PrivateCopy, CopyError> {
        let mut copy = PrivateCopy::new(Arc::clone(share), 64 << 20, 4 << 20, Vec::new());
        let mut scratch = Vec::new();
        for piece in content.chunks(65_536) {
            copy.append(piece.len(), &mut scratch, |to| {
                to.copy_from_slice(piece);
                Ok::<_, CopyError>(())
            })?;
        }
        Ok(copy)
    }

    fn bytes_of(content: &SharedContent) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(content.len()).unwrap()];
        let file = File::from(content.descriptor().unwrap().try_clone_to_owned().unwrap());
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn the_copy_is_whole_wherever_it_is_kept_and_gives_everything_back() {
        let folder = tempfile::tempdir().unwrap();
        let content: Vec<u8> = (0..3_000_000_u32).map(|n| (n / 7) as u8).collect();
        // Budget 16 MiB: on the heap, in a memfd, and, with a quarter of 2 MiB, in a file.
        for (limit, len) in [(16 << 20, 5), (16 << 20, 3_000_000), (8 << 20, 3_000_000)] {
            let budget = Budget::new(limit, folder.path().to_owned());
            let share = budget.share();
            let copy = copy_of(&share, &content[..len]).unwrap();
            assert_eq!(copy.hash().0, *blake3::hash(&content[..len]).as_bytes());
            let spooled = limit / 4 < len as u64;
            assert_eq!((budget.spooled() > 0, budget.used() > 0), (spooled, !spooled));
            let (sealed, charge) = copy.seal().unwrap();
            assert_eq!(bytes_of(&sealed), content[..len]);
            drop(charge);
            assert_eq!((budget.used(), budget.spooled()), (0, 0));
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "no file has a name");
    }

    #[test]
    fn a_guest_cannot_fill_the_disk_and_a_full_one_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let budget = Budget::new(4 << 20, folder.path().to_owned());
        let share = budget.share();
        let error = copy_of(&share, &vec![0; 33 << 20]).err().unwrap();
        assert!(matches!(error, CopyError::Spooled), "{error}");
        assert_eq!((budget.used(), budget.spooled()), (0, 0));

        let share = Budget::new(4 << 20, "/nonexistent".into()).share();
        let error = copy_of(&share, &vec![0; 2 << 20]).err().unwrap();
        assert!(matches!(error, CopyError::Store(_)), "{error}");
    }

    #[test]
    fn content_over_its_limit_is_refused() {
        let budget = Budget::new(4 << 20, "/nonexistent".into());
        let mut copy = PrivateCopy::new(budget.share(), 10, 10, Vec::new());
        let fill = |_: &mut [u8]| Ok::<_, CopyError>(());
        copy.append(10, &mut Vec::new(), fill).unwrap();
        let error = copy.append(1, &mut Vec::new(), fill).unwrap_err();
        assert!(matches!(error, CopyError::TooLong { limit: 10 }), "{error}");
    }
}
