//! The quarantine on disk: contents, once each, and entries. Encrypted, so that nothing on the host
//! runs, scans or restores them by accident, and altered bytes are noticed.
//!
//! ```text
//!   FOLDER/key              32 random bytes, mode 0600
//!   FOLDER/objects/HASH     one content: magic, nonce, then sealed chunks (STREAM, BE32)
//!   FOLDER/entries/TICKET   one entry: magic, nonce, then one sealed JSON object
//! ```
//!
//! | object, offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `SWQOBJ01` |
//! | 8 | 19 | nonce of the stream |
//! | 27 | … | chunks of 64 KiB, each with a tag of 16 bytes; the last one is marked as last |
//!
//! The cipher is XChaCha20-Poly1305; the file's kind and name are authenticated with it, so that one
//! file cannot stand in for another. A file is written beside its place, made durable, read back, and
//! only then renamed; the folder is made durable last. What is found under a name is whole or damaged,
//! never half.

use super::entry::Entry;
use chacha20poly1305::aead::stream::{DecryptorBE32, EncryptorBE32};
use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};
use seawall_engine::content::SharedContent;
use seawall_proto::{ContentHash, Ticket};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const OBJECT: &[u8; 8] = b"SWQOBJ01";
const ENTRY: &[u8; 8] = b"SWQENT01";
/// Plain bytes in a chunk.
const CHUNK: usize = 64 * 1024;
const TAG: usize = 16;
const STREAM_NONCE: usize = 19;
const NONCE: usize = 24;
/// No entry is longer, in bytes.
const ENTRY_MAX: u64 = 1 << 20;

/// Why the store cannot do it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The disk is full, or says no.
    #[error("{}: {reason}", path.display())]
    Io { path: PathBuf, reason: io::Error },
    /// What is on the disk is not what was written.
    #[error("{} is damaged: {what}", path.display())]
    Damaged { path: PathBuf, what: &'static str },
    /// Without its key nothing in the store can be read.
    #[error("{} is not there, but files that need it are; bring it back from a backup, or move the folder away", path.display())]
    NoKey { path: PathBuf },
    /// There is no such thing.
    #[error("{} is not there", path.display())]
    Missing { path: PathBuf },
    /// Whoever reads wants no more.
    #[error("{0}")]
    Reader(String),
}

#[derive(Clone)]
pub struct Store {
    folder: PathBuf,
    cipher: XChaCha20Poly1305,
}

fn io_error(path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |reason| match reason.kind() {
        io::ErrorKind::NotFound => StoreError::Missing { path },
        _ => StoreError::Io { path, reason },
    }
}

fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes)?;
    Ok(bytes)
}

fn read_full(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut got = 0;
    while got < buffer.len() {
        match reader.read(&mut buffer[got..]) {
            Ok(0) => break,
            Ok(len) => got += len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(got)
}

fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path.parent().unwrap_or(path))?.sync_all()
}

impl Store {
    /// Opens the store, or makes an empty one.
    ///
    /// # Errors
    /// What the disk says; [`StoreError::Damaged`] for a key of another length.
    pub fn open(folder: &Path) -> Result<Self, StoreError> {
        for part in ["", "objects", "entries"] {
            let path = folder.join(part);
            let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
            made.map_err(|reason| StoreError::Io { path: path.clone(), reason })?;
        }
        let cipher = XChaCha20Poly1305::new(&Self::key(folder)?.into());
        let store = Self { folder: folder.to_owned(), cipher };
        for part in ["objects", "entries"] {
            store.sweep(&folder.join(part));
        }
        Ok(store)
    }

    fn key(folder: &Path) -> Result<[u8; 32], StoreError> {
        let path = folder.join("key");
        let bytes = match fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // With another key all that is here would be lost; the old one may come from a backup.
                let is_used =
                    |part| fs::read_dir(folder.join(part)).map(|mut files| files.next().is_some());
                if is_used("objects")
                    .and_then(|used| Ok(used || is_used("entries")?))
                    .map_err(io_error(&path))?
                {
                    return Err(StoreError::NoKey { path });
                }
                let key = random::<32>().map_err(io_error(&path))?;
                write_durably(&path, |file| file.write_all(&key)).map_err(io_error(&path))?;
                fs::read(&path)
            }
            read => read,
        };
        let bytes = bytes.map_err(io_error(&path))?;
        bytes.try_into().map_err(|_| StoreError::Damaged { path, what: "a key has 32 bytes" })
    }

    /// What a service that died in the midst of writing has left.
    fn sweep(&self, folder: &Path) {
        for file in fs::read_dir(folder).into_iter().flatten().flatten() {
            if file.file_name().as_encoded_bytes().ends_with(b".new") {
                let _next_time = fs::remove_file(file.path());
            }
        }
    }

    fn object(&self, hash: ContentHash) -> PathBuf {
        self.folder.join("objects").join(hash.to_string())
    }

    fn entry(&self, ticket: Ticket) -> PathBuf {
        self.folder.join("entries").join(ticket.to_string())
    }

    /// Makes sure that a content is here, whole and durable: one that is here already is read and
    /// compared, a damaged one is replaced. Gives the bytes that it takes on disk.
    ///
    /// # Errors
    /// What the disk says, or that what was written reads back as something else.
    pub fn keep(&self, hash: ContentHash, content: &SharedContent) -> Result<u64, StoreError> {
        let path = self.object(hash);
        if self.read(hash, |_| Ok(())).is_err() {
            let file = content
                .descriptor()
                .and_then(|fd| fd.try_clone_to_owned())
                .map_err(io_error(&path))?;
            let written =
                write_durably(&path, |to| self.seal(hash, &file.into(), content.len(), to));
            written.map_err(io_error(&path))?;
            if let Err(error) = self.read(hash, |_| Ok(())) {
                let _next_time = fs::remove_file(&path);
                return Err(error);
            }
        }
        Ok(fs::metadata(&path).map_err(io_error(&path))?.len())
    }

    fn seal(&self, hash: ContentHash, from: &File, len: u64, to: &mut File) -> io::Result<()> {
        let nonce = random::<STREAM_NONCE>()?;
        let mut stream = EncryptorBE32::from_aead(self.cipher.clone(), &nonce.into());
        to.write_all(OBJECT)?;
        to.write_all(&nonce)?;
        let mut chunk = vec![0; CHUNK];
        let mut at = 0;
        loop {
            let wanted = usize::try_from(len - at).unwrap_or(CHUNK).min(CHUNK);
            from.read_exact_at(&mut chunk[..wanted], at)?;
            at += wanted as u64;
            let payload = Payload { msg: &chunk[..wanted], aad: &hash.0 };
            let failed = |_| io::Error::other("the content cannot be encrypted");
            if at == len {
                return to.write_all(&stream.encrypt_last(payload).map_err(failed)?);
            }
            to.write_all(&stream.encrypt_next(payload).map_err(failed)?)?;
        }
    }

    /// Reads a content piece by piece, and says at the end whether it is what its name says. What was
    /// read before an error is worth nothing.
    ///
    /// # Errors
    /// [`StoreError::Missing`], [`StoreError::Damaged`], what the disk or `each` says.
    pub fn read(
        &self,
        hash: ContentHash,
        mut each: impl FnMut(&[u8]) -> Result<(), String>,
    ) -> Result<(), StoreError> {
        let path = self.object(hash);
        let damaged = |what| StoreError::Damaged { path: path.clone(), what };
        let mut file = File::open(&path).map_err(io_error(&path))?;
        let mut left = file.metadata().map_err(io_error(&path))?.len();
        let mut head = [0; OBJECT.len() + STREAM_NONCE];
        let got = read_full(&mut file, &mut head).map_err(io_error(&path))?;
        let (magic, nonce) = head.split_at(OBJECT.len());
        if got < head.len() || magic != OBJECT {
            return Err(damaged("it does not begin like one"));
        }
        left -= head.len() as u64;
        let nonce: [u8; STREAM_NONCE] = nonce.try_into().expect("split at its length");
        let mut stream = DecryptorBE32::from_aead(self.cipher.clone(), &nonce.into());
        let mut hasher = blake3::Hasher::new();
        let mut chunk = vec![0; CHUNK + TAG];
        loop {
            let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(chunk.len());
            let got = read_full(&mut file, &mut chunk[..wanted]).map_err(io_error(&path))?;
            left -= got as u64;
            let payload = Payload { msg: &chunk[..got], aad: &hash.0 };
            let altered = |_| damaged("its bytes were altered");
            if left == 0 {
                let plain = stream.decrypt_last(payload).map_err(altered)?;
                hasher.update(&plain);
                each(&plain).map_err(StoreError::Reader)?;
                break;
            }
            let plain = stream.decrypt_next(payload).map_err(altered)?;
            hasher.update(&plain);
            each(&plain).map_err(StoreError::Reader)?;
        }
        if hasher.finalize().as_bytes() != &hash.0 {
            return Err(damaged("its content has another hash"));
        }
        Ok(())
    }

    /// Bytes that a content takes on disk; 0 for one that is not here.
    pub fn stored_size(&self, hash: ContentHash) -> u64 {
        fs::metadata(self.object(hash)).map_or(0, |file| file.len())
    }

    /// Removes a content.
    ///
    /// # Errors
    /// What the disk says, but for its not being here.
    pub fn remove_content(&self, hash: ContentHash) -> Result<(), StoreError> {
        remove(&self.object(hash))
    }

    /// Writes an entry, in place of what it said before.
    ///
    /// # Errors
    /// What the disk says.
    pub fn write_entry(&self, entry: &Entry) -> Result<(), StoreError> {
        let path = self.entry(entry.ticket);
        let written = serde_json::to_vec(entry).map_err(io::Error::from).and_then(|plain| {
            let nonce = random::<NONCE>()?;
            let payload = Payload { msg: &plain, aad: &entry.ticket.0.to_be_bytes() };
            let sealed = self
                .cipher
                .encrypt(XNonce::from_slice(&nonce), payload)
                .map_err(|_| io::Error::other("the entry cannot be encrypted"))?;
            write_durably(&path, |file| {
                file.write_all(ENTRY)?;
                file.write_all(&nonce)?;
                file.write_all(&sealed)
            })
        });
        written.map_err(io_error(&path))
    }

    /// Reads an entry.
    ///
    /// # Errors
    /// [`StoreError::Missing`], [`StoreError::Damaged`], or what the disk says.
    pub fn read_entry(&self, ticket: Ticket) -> Result<Entry, StoreError> {
        let path = self.entry(ticket);
        let damaged = |what| StoreError::Damaged { path: path.clone(), what };
        let file = File::open(&path).map_err(io_error(&path))?;
        let mut bytes = Vec::new();
        file.take(ENTRY_MAX).read_to_end(&mut bytes).map_err(io_error(&path))?;
        let rest = bytes.strip_prefix(ENTRY).filter(|rest| rest.len() > NONCE);
        let (nonce, msg) =
            rest.ok_or_else(|| damaged("it does not begin like one"))?.split_at(NONCE);
        let payload = Payload { msg, aad: &ticket.0.to_be_bytes() };
        let plain = self.cipher.decrypt(XNonce::from_slice(nonce), payload);
        let plain = plain.map_err(|_| damaged("its bytes were altered"))?;
        serde_json::from_slice(&plain).map_err(|_| damaged("it is of a version unknown here"))
    }

    /// All tickets that have an entry.
    ///
    /// # Errors
    /// What the disk says: a folder that cannot be read is not an empty one.
    pub fn tickets(&self) -> Result<Vec<Ticket>, StoreError> {
        let ticket = |name: &str| {
            (name.len() == 16).then(|| u64::from_str_radix(name, 16).ok().map(Ticket)).flatten()
        };
        self.names("entries", ticket)
    }

    /// All contents that are here.
    ///
    /// # Errors
    /// As for [`Self::tickets`].
    pub fn contents(&self) -> Result<Vec<ContentHash>, StoreError> {
        self.names("objects", parse_hash)
    }

    fn names<T>(&self, part: &str, read: impl Fn(&str) -> Option<T>) -> Result<Vec<T>, StoreError> {
        let path = self.folder.join(part);
        let mut all = Vec::new();
        for file in fs::read_dir(&path).map_err(io_error(&path))? {
            let name = file.map_err(io_error(&path))?.file_name();
            all.extend(name.to_str().and_then(&read));
        }
        Ok(all)
    }

    /// Removes an entry.
    ///
    /// # Errors
    /// What the disk says, but for its not being here.
    pub fn remove_entry(&self, ticket: Ticket) -> Result<(), StoreError> {
        remove(&self.entry(ticket))
    }
}

/// Reads 64 hexadecimal digits.
pub fn parse_hash(text: &str) -> Option<ContentHash> {
    let mut hash = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (byte, digits) in hash.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(ContentHash(hash))
}

fn remove(path: &Path) -> Result<(), StoreError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error(path)(error)),
        _ => Ok(()),
    }
}

/// Writes a file so that after a crash there is either what was there before, or all of this.
pub fn write_durably(
    path: &Path,
    write: impl FnOnce(&mut File) -> io::Result<()>,
) -> io::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    let open = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new);
    let written = open.and_then(|mut file| {
        write(&mut file)?;
        file.sync_all()
    });
    let placed = written.and_then(|()| fs::rename(&new, path)).and_then(|()| sync_folder(path));
    if placed.is_err() {
        let _next_start = fs::remove_file(&new);
    }
    placed
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::entry::{State, VERSION};
    use super::*;
    use seawall_proto::remedy::{Attributes, FileIdentity};

    fn hash_of(content: &[u8]) -> ContentHash {
        ContentHash(*blake3::hash(content).as_bytes())
    }

    fn read_back(store: &Store, hash: ContentHash) -> Result<Vec<u8>, StoreError> {
        let mut all = Vec::new();
        store.read(hash, |piece| {
            all.extend_from_slice(piece);
            Ok(())
        })?;
        Ok(all)
    }

    pub fn entry(ticket: u64, content: &[u8]) -> Entry {
        let times = (1_700_000_000, 5);
        Entry {
            version: VERSION,
            ticket: Ticket(ticket),
            hash: hash_of(content),
            size: content.len() as u64,
            guest: "g1".into(),
            path: b"/home/\xff\n/evil".to_vec(),
            identity: FileIdentity {
                device: 1,
                inode: 2,
                size: 3,
                modified: times,
                changed: times,
            },
            attributes: Attributes { mode: 0o4755, ..Attributes::default() },
            detection: "Test".into(),
            engine: "yara".into(),
            stored_ms: 1_700_000_000_000,
            state: State::Stored,
            delete: false,
        }
    }

    #[test]
    fn contents_of_every_length_come_back_and_are_not_readable_on_disk() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        for len in [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK] {
            let content = b"malware ".repeat(len / 8 + 1)[..len].to_vec();
            let hash = hash_of(&content);
            store.keep(hash, &SharedContent::new(&content[..]).unwrap()).unwrap();
            // Another service with the same folder reads it too.
            let again = Store::open(folder.path()).unwrap();
            assert_eq!(read_back(&again, hash).unwrap(), content, "{len} bytes");
            let raw = fs::read(store.object(hash)).unwrap();
            assert!(!raw.windows(8).any(|part| part == b"malware "));
        }
        assert_eq!(store.contents().unwrap().len(), 6);
    }

    #[test]
    fn damage_of_any_kind_is_noticed_and_mended_by_the_same_content() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let content = vec![7; 2 * CHUNK + 100];
        let (hash, sealed) = (hash_of(&content), SharedContent::new(&content[..]).unwrap());
        store.keep(hash, &sealed).unwrap();
        let whole = fs::read(store.object(hash)).unwrap();
        let mut cases = vec![Vec::new(), whole[..30].to_vec(), [&*whole, b"x"].concat()];
        // A chunk less, at its very end: the one before is not marked as the last.
        cases.push(whole[..27 + 2 * (CHUNK + TAG)].to_vec());
        for at in [0, 9, 40, CHUNK + 100, whole.len() - 1] {
            let mut altered = whole.clone();
            altered[at] ^= 1;
            cases.push(altered);
        }
        for case in cases {
            fs::write(store.object(hash), &case).unwrap();
            let error = read_back(&store, hash).unwrap_err();
            assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
            store.keep(hash, &sealed).unwrap();
            assert_eq!(read_back(&store, hash).unwrap(), content);
        }
        // One content under another's name.
        let other = hash_of(b"other");
        fs::copy(store.object(hash), store.object(other)).unwrap();
        assert!(read_back(&store, other).is_err());
    }

    #[test]
    fn what_was_kept_under_a_wrong_hash_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let error = store.keep(hash_of(b"x"), &SharedContent::new(b"y").unwrap()).unwrap_err();
        assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
        assert!(store.contents().unwrap().is_empty());
    }

    #[test]
    fn entries_come_back_and_damaged_ones_say_so() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path()).unwrap();
        let mut one = entry(1, b"evil");
        store.write_entry(&one).unwrap();
        one.state = State::Quarantined { links: 2 };
        store.write_entry(&one).unwrap();
        assert_eq!(store.read_entry(Ticket(1)).unwrap(), one);
        assert!(matches!(store.read_entry(Ticket(2)), Err(StoreError::Missing { .. })));
        fs::copy(store.entry(Ticket(1)), store.entry(Ticket(3))).unwrap();
        assert!(matches!(store.read_entry(Ticket(3)), Err(StoreError::Damaged { .. })));
        fs::write(folder.path().join("entries/0000000000000001.new"), "half").unwrap();
        fs::write(store.entry(Ticket(4)), "SWQENT01short").unwrap();
        let store = Store::open(folder.path()).unwrap();
        assert_eq!(store.tickets().unwrap().len(), 3);
        assert!(matches!(store.read_entry(Ticket(4)), Err(StoreError::Damaged { .. })));
        store.remove_entry(Ticket(1)).unwrap();
        store.remove_entry(Ticket(1)).unwrap();
        assert_eq!(store.tickets().unwrap().len(), 2);
    }

    #[test]
    fn the_key_is_made_once_and_a_wrong_one_is_told() {
        let folder = tempfile::tempdir().unwrap();
        Store::open(folder.path()).unwrap();
        let key = fs::read(folder.path().join("key")).unwrap();
        Store::open(folder.path()).unwrap();
        assert_eq!(fs::read(folder.path().join("key")).unwrap(), key);
        fs::write(folder.path().join("key"), "short").unwrap();
        assert!(matches!(Store::open(folder.path()), Err(StoreError::Damaged { .. })));
        fs::remove_file(folder.path().join("key")).unwrap();
        fs::write(folder.path().join("entries/0000000000000001"), "sealed").unwrap();
        assert!(matches!(Store::open(folder.path()), Err(StoreError::NoKey { .. })));
        assert!(!folder.path().join("key").exists());
    }
}
