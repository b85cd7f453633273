//! Golden images: what the service has learned of templates, and which of their clones it believes.
//!
//! ```text
//!   learn ──► scan of the template ──► fingerprint → hash of each clean file ──► golden/NAME
//!   clone: fingerprint ──► hash ──► is it known to be clean, now? ──► yes
//!                            │ one in a hundred, and where it is not known
//!                            └──► its content ──► another hash: the guest is no clone, and is not believed any more
//! ```
//!
//! A list says which content a file has, and nothing about whether that is clean: that is asked of the cache each time. So
//! new signatures need no new list.

use crate::events::{Events, format_time};
use crate::pipeline::Tenant;
use seawall_client::text::escape_short;
use seawall_client::{Event, EventKind, GoldenDistrust, GoldenList, GoldenReport};
use seawall_proto::{ContentHash, Fingerprint};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard};

/// The most files of one list, with 48 bytes each.
pub const FILES_MAX: usize = 1_000_000;
/// The most lists.
const LISTS_MAX: usize = 64;
/// The content of one in so many files is asked for all the same.
const SAMPLE_EVERY: u64 = 100;
/// How a list's file begins; the last digit is the format's version.
const MAGIC: &[u8; 8] = b"SWGOLD01";
/// The end of the names of lists' files.
const SUFFIX: &str = "golden";
/// The file of guests that are not believed.
const DISTRUSTED: &str = "distrusted.json";

/// Why something is not done.
#[derive(Debug, thiserror::Error)]
pub enum GoldenError {
    #[error(
        "a name has 1 to 64 letters, digits, dots, hyphens and underscores, and begins with none of the last three"
    )]
    Name,
    #[error("no golden image is named `{0}`; `seawall golden list` shows all")]
    Unknown(String),
    #[error("`{0}` is believed")]
    Trusted(String),
    #[error("{FILES_MAX} files are the most, and these are {0}")]
    TooManyFiles(usize),
    #[error("{LISTS_MAX} golden images are the most; `seawall golden forget` makes room")]
    TooManyLists,
    #[error(
        "nothing could be learned: no clean file has a change time and a birth time that its kernel gave it"
    )]
    Nothing,
    #[error("`{0}` is not 64 hexadecimal digits")]
    Hash(String),
    #[error("the files are not understood: {0}")]
    Files(#[from] serde_json::Error),
    #[error("the guest is no longer configured, or of another tenant than when it was learned")]
    Moved,
    #[error("it cannot be written: {0}")]
    Write(#[from] io::Error),
}

/// What was learned, and of what.
#[derive(Debug)]
pub struct Learned {
    pub name: String,
    /// `guest NAME` or `tree PATH`.
    pub source: String,
    pub tenant: Tenant,
    /// Whether guests of all tenants may use it.
    pub for_all: bool,
    pub files: Vec<(Fingerprint, ContentHash)>,
}

/// As it is in its file.
#[derive(Serialize, Deserialize)]
struct Kept {
    source: String,
    tenant: Option<String>,
    for_all: bool,
    learned: String,
    files: Vec<(Fingerprint, ContentHash)>,
}

#[derive(Debug)]
struct List {
    name: String,
    source: String,
    tenant: Tenant,
    for_all: bool,
    learned: String,
    /// In the order of the fingerprints.
    files: Vec<(Fingerprint, ContentHash)>,
    known: AtomicU64,
    sampled: AtomicU64,
}

impl List {
    fn new(name: String, kept: Kept) -> Self {
        let Kept { source, tenant, for_all, learned, files } = kept;
        let (known, sampled, tenant) = (0.into(), 0.into(), tenant.map(Into::into));
        Self { name, source, tenant, for_all, learned, files, known, sampled }
    }

    fn is_for(&self, tenant: &Tenant) -> bool {
        self.for_all || self.tenant == *tenant
    }

    fn hash_of(&self, fingerprint: Fingerprint) -> Option<ContentHash> {
        let found = self.files.binary_search_by_key(&fingerprint, |(own, _)| *own).ok()?;
        Some(self.files[found].1)
    }

    fn shown(&self) -> GoldenList {
        GoldenList {
            name: self.name.clone(),
            source: self.source.clone(),
            tenant: self.tenant.as_deref().map(ToOwned::to_owned),
            files: self.files.len() as u64,
            learned: self.learned.clone(),
            known: self.known.load(Relaxed),
            sampled: self.sampled.load(Relaxed),
        }
    }
}

#[derive(Debug, Default)]
struct State {
    lists: Vec<List>,
    distrusted: BTreeMap<String, GoldenDistrust>,
}

/// All golden images.
pub struct Golden {
    folder: PathBuf,
    state: RwLock<State>,
    /// Held by whoever changes something, until that is written.
    changing: Mutex<()>,
    /// Which files are sampled, no guest can know before.
    keys: RandomState,
    asked: AtomicU64,
    /// Who is not believed is to be written down.
    dirty: AtomicBool,
    /// Whether the last try failed, so that a full disk is told once.
    failed: AtomicBool,
    events: Events,
}

impl Golden {
    /// With what was learned before.
    pub fn open(folder: PathBuf, events: Events) -> Self {
        if let Err(error) = std::fs::create_dir_all(&folder) {
            tracing::error!(%error, folder = %folder.display(), "golden images are not kept");
        }
        let state = State { lists: read_lists(&folder), distrusted: read_distrusted(&folder) };
        let (state, changing) = (RwLock::new(state), Mutex::default());
        let (keys, asked, dirty, failed) = Default::default();
        Self { folder, state, changing, keys, asked, dirty, failed, events }
    }

    fn state(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// All lists, and who is not believed.
    pub fn report(&self) -> GoldenReport {
        let state = self.state();
        let mut lists: Vec<_> = state.lists.iter().map(List::shown).collect();
        lists.sort_by(|a, b| a.name.cmp(&b.name));
        GoldenReport { lists, distrusted: state.distrusted.values().cloned().collect() }
    }

    /// Whether anything is known of files of this guest, which belongs to this tenant.
    pub fn knows(&self, guest: &str, tenant: &Tenant) -> bool {
        let state = self.state();
        !state.distrusted.contains_key(guest) && state.lists.iter().any(|list| list.is_for(tenant))
    }

    /// The content of the file with this fingerprint. `None` where it is not known, and where it is to be seen.
    pub fn hash_of(
        &self,
        guest: &str,
        tenant: &Tenant,
        fingerprint: Fingerprint,
    ) -> Option<ContentHash> {
        let state = self.state();
        if state.distrusted.contains_key(guest) {
            return None;
        }
        let mut lists = state.lists.iter().filter(|list| list.is_for(tenant));
        let (list, hash) =
            lists.find_map(|list| list.hash_of(fingerprint).map(|hash| (list, hash)))?;
        if self.keys.hash_one(self.asked.fetch_add(1, Relaxed)).is_multiple_of(SAMPLE_EVERY) {
            list.sampled.fetch_add(1, Relaxed);
            return None;
        }
        list.known.fetch_add(1, Relaxed);
        Some(hash)
    }

    /// A guest has sent the content of a file with this fingerprint. Where a list says another one, the guest is not
    /// believed any more; `true` then, the first time.
    pub fn compare(
        &self,
        guest: &str,
        tenant: &Tenant,
        fingerprint: Fingerprint,
        hash: ContentHash,
        path: &[u8],
    ) -> bool {
        let list = {
            let state = self.state();
            let is_other = |list: &&List| {
                list.is_for(tenant) && list.hash_of(fingerprint).is_some_and(|own| own != hash)
            };
            match state.lists.iter().find(is_other) {
                Some(list) if !state.distrusted.contains_key(guest) => list.name.clone(),
                _ => return false,
            }
        };
        let path = escape_short(path, 1024);
        let since = format_time(jiff::Timestamp::now());
        tracing::warn!(
            guest,
            list,
            path,
            "it is no clone of this golden image: the content is another"
        );
        let reason =
            format!("its content is not that of golden image {list}; none is used for this guest");
        let event = Event::new(EventKind::GoldenDistrusted).guest(guest).reason(reason);
        self.events.emit(Event { path: Some(path.clone()), hash: Some(hash.to_string()), ..event });
        let distrust = GoldenDistrust { guest: guest.to_owned(), list, path, since };
        let is_first =
            self.change(|state| state.distrusted.insert(guest.to_owned(), distrust)).is_none();
        self.dirty.store(true, Relaxed);
        is_first
    }

    /// Writes down who is not believed, where that has changed. May wait for a disk.
    pub fn flush(&self) {
        if !self.dirty.swap(false, Relaxed) {
            return;
        }
        let _one_at_a_time = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let distrusted = self.state().distrusted.clone();
        let written = serde_json::to_vec_pretty(&distrusted)
            .map_err(io::Error::from)
            .and_then(|bytes| replace(&self.folder.join(DISTRUSTED), &bytes));
        if let Err(error) = written {
            if !self.failed.swap(true, Relaxed) {
                tracing::error!(%error, "whom golden images are not believed of is not kept over a restart");
            }
            self.dirty.store(true, Relaxed);
            return;
        }
        self.failed.store(false, Relaxed);
    }

    /// Takes a list into use, in place of an earlier one of the same name. May wait for a disk.
    pub fn put(&self, learned: Learned) -> Result<GoldenList, GoldenError> {
        let Learned { name, source, tenant, for_all, mut files } = learned;
        check_name(&name)?;
        files.sort_unstable_by_key(|(fingerprint, _)| *fingerprint);
        files.dedup_by_key(|(fingerprint, _)| *fingerprint);
        files.shrink_to_fit();
        match files.len() {
            0 => return Err(GoldenError::Nothing),
            1..=FILES_MAX => (),
            more => return Err(GoldenError::TooManyFiles(more)),
        }
        let _one_at_a_time = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let state = self.state();
            if state.lists.len() >= LISTS_MAX && !state.lists.iter().any(|list| list.name == name) {
                return Err(GoldenError::TooManyLists);
            }
        }
        let tenant = tenant.as_deref().map(ToOwned::to_owned);
        let learned = format_time(jiff::Timestamp::now());
        let kept = Kept { source, tenant, for_all, learned, files };
        replace(&self.path(&name), &encode(&kept)?)?;
        let list = List::new(name, kept);
        let shown = list.shown();
        let reason = format!("{}: {} files of {}", shown.name, shown.files, shown.source);
        self.change(|state| {
            state.lists.retain(|other| other.name != shown.name);
            state.lists.push(list);
        });
        tracing::info!("golden image {reason}");
        self.events.emit(Event::new(EventKind::GoldenLearned).reason(reason));
        Ok(shown)
    }

    /// Forgets a list. May wait for a disk.
    pub fn forget(&self, name: &str) -> Result<(), GoldenError> {
        let _one_at_a_time = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.state().lists.iter().any(|list| list.name == name) {
            return Err(GoldenError::Unknown(name.to_owned()));
        }
        std::fs::remove_file(self.path(name))?;
        self.change(|state| state.lists.retain(|list| list.name != name));
        Ok(())
    }

    /// Believes a guest again: the operator says that it is a clone. May wait for a disk.
    pub fn trust(&self, guest: &str) -> Result<(), GoldenError> {
        self.change(|state| state.distrusted.remove(guest))
            .ok_or_else(|| GoldenError::Trusted(guest.to_owned()))?;
        self.dirty.store(true, Relaxed);
        self.flush();
        Ok(())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.{SUFFIX}"))
    }
}

/// Whether a list may have this name, which is also a file's.
pub fn check_name(name: &str) -> Result<(), GoldenError> {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    let is_name = (1..=64).contains(&name.len())
        && name.bytes().all(fits)
        && name.as_bytes()[0].is_ascii_alphanumeric();
    if is_name { Ok(()) } else { Err(GoldenError::Name) }
}

/// Magic, digest, and what it is of.
fn encode(kept: &Kept) -> io::Result<Vec<u8>> {
    let body = postcard::to_stdvec(kept).map_err(io::Error::other)?;
    Ok([MAGIC.as_slice(), blake3::hash(&body).as_bytes(), &body].concat())
}

fn decode(bytes: &[u8]) -> Option<Kept> {
    let (digest, body) = bytes.strip_prefix(MAGIC)?.split_first_chunk::<32>()?;
    let kept: Kept =
        (blake3::hash(body) == *digest).then(|| postcard::from_bytes(body).ok()).flatten()?;
    kept.files.is_sorted_by_key(|(fingerprint, _)| *fingerprint).then_some(kept)
}

fn read_lists(folder: &Path) -> Vec<List> {
    let names = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let paths = names.map(|name| name.path());
    let files = paths.filter(|path| path.extension().is_some_and(|end| end == SUFFIX));
    let lists = files.filter_map(|path| {
        let name = path.file_stem()?.to_str()?.to_owned();
        match std::fs::read(&path).map(|bytes| decode(&bytes)) {
            Ok(Some(kept)) => return Some(List::new(name, kept)),
            Ok(None) => tracing::warn!(name, "this golden image is damaged; learn it again"),
            Err(error) => tracing::warn!(name, %error, "this golden image cannot be read"),
        }
        None
    });
    lists.collect()
}

fn read_distrusted(folder: &Path) -> BTreeMap<String, GoldenDistrust> {
    match std::fs::read(folder.join(DISTRUSTED)) {
        Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
            tracing::warn!(%error, "which guests are not believed is not known any more");
            BTreeMap::new()
        }),
        Err(_) => BTreeMap::new(),
    }
}

fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    let mut file = std::fs::File::create(&new)?;
    file.write_all(bytes)?;
    file.sync_data()?;
    std::fs::rename(new, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn golden(folder: &Path) -> Golden {
        let retention = crate::events::store::Retention { days: 1, most: 1 << 20 };
        let events = Events::start(&folder.join("events.db"), retention, Arc::default()).unwrap();
        Golden::open(folder.join("golden"), events)
    }

    fn hash(number: u8) -> ContentHash {
        ContentHash([number; 32])
    }

    fn fingerprint(number: u8) -> Fingerprint {
        Fingerprint([number; 16])
    }

    fn learned(name: &str, tenant: Option<&str>, files: &[u8]) -> Learned {
        let files = files.iter().map(|number| (fingerprint(*number), hash(*number))).collect();
        let (source, tenant) = ("guest template".into(), tenant.map(Into::into));
        Learned { name: name.into(), source, tenant, for_all: false, files }
    }

    #[test]
    fn a_clone_is_believed_but_for_one_in_a_hundred_until_it_does_not_agree() {
        let folder = tempfile::tempdir().unwrap();
        let golden = golden(folder.path());
        assert!(!golden.knows("clone", &None));
        golden.put(learned("base", None, &[3, 1, 2, 1])).unwrap();
        assert!(golden.knows("clone", &None));
        let known = |number| golden.hash_of("clone", &None, fingerprint(number));
        let answers: Vec<_> = (0..10_000).map(|_| known(2)).collect();
        assert!(answers.iter().flatten().all(|found| *found == hash(2)));
        let sampled = answers.iter().filter(|answer| answer.is_none()).count();
        assert!((40..200).contains(&sampled), "{sampled}");
        let shown = &golden.report().lists[0];
        assert_eq!(
            (shown.files, shown.sampled, shown.known),
            (3, sampled as u64, 10_000 - sampled as u64)
        );
        assert_eq!(known(9), None);
        let compare =
            |number, hash| golden.compare("clone", &None, fingerprint(number), hash, b"/x\n");
        assert!(!compare(2, hash(2)), "the same");
        assert!(!compare(9, hash(1)), "nothing is said of it");
        assert!(compare(2, hash(7)));
        assert!(!compare(2, hash(7)), "told once");
        assert!(!golden.knows("clone", &None) && golden.knows("other", &None));
        assert!((0..300).all(|_| known(2).is_none()));
        golden.flush();
        let again = self::golden(folder.path());
        let report = again.report();
        assert_eq!(report.distrusted, golden.report().distrusted);
        assert_eq!((report.distrusted[0].path.as_str(), report.lists[0].files), ("/x\\n", 3));
        assert!(matches!(again.trust("other"), Err(GoldenError::Trusted(_))));
        again.trust("clone").unwrap();
        assert!(again.knows("clone", &None));
        assert!(self::golden(folder.path()).report().distrusted.is_empty());
    }

    #[test]
    fn tenants_have_their_own_and_a_tree_is_for_all() {
        let folder = tempfile::tempdir().unwrap();
        let golden = golden(folder.path());
        golden.put(learned("one", Some("a"), &[1])).unwrap();
        let (own, other) = (Some("a".into()), Some("b".into()));
        assert!(golden.knows("g", &own) && !golden.knows("g", &other) && !golden.knows("g", &None));
        let found = |tenant| (0..300).find_map(|_| golden.hash_of("g", tenant, fingerprint(1)));
        assert_eq!((found(&own), found(&other), found(&None)), (Some(hash(1)), None, None));
        assert!(!golden.compare("g", &other, fingerprint(1), hash(2), b""));
        golden.put(Learned { for_all: true, ..learned("two", None, &[2]) }).unwrap();
        assert!(golden.knows("g", &other));
        golden.forget("two").unwrap();
        assert!(!golden.knows("g", &other));
        assert!(matches!(golden.forget("two"), Err(GoldenError::Unknown(_))));
        assert_eq!(self::golden(folder.path()).report().lists.len(), 1);
    }

    #[test]
    fn what_is_damaged_or_wrong_is_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let first = golden(folder.path());
        for name in ["", ".x", "a/b", "a b", &"x".repeat(65)] {
            assert!(
                matches!(first.put(learned(name, None, &[1])), Err(GoldenError::Name)),
                "{name}"
            );
        }
        assert!(matches!(first.put(learned("none", None, &[])), Err(GoldenError::Nothing)));
        for name in ["good", "short", "flipped", "other"] {
            first.put(learned(name, None, &[1])).unwrap();
        }
        first.put(learned("good", None, &[1, 2])).unwrap();
        let path = |name| folder.path().join("golden").join(format!("{name}.golden"));
        let bytes = std::fs::read(path("short")).unwrap();
        std::fs::write(path("short"), &bytes[..bytes.len() - 1]).unwrap();
        let mut flipped = bytes.clone();
        *flipped.last_mut().unwrap() ^= 1;
        std::fs::write(path("flipped"), flipped).unwrap();
        std::fs::write(path("other"), "SWGOLD02").unwrap();
        std::fs::write(folder.path().join("golden/distrusted.json"), "{").unwrap();
        let lists = golden(folder.path()).report().lists;
        assert_eq!(
            lists.iter().map(|list| (list.name.as_str(), list.files)).collect::<Vec<_>>(),
            [("good", 2)]
        );
    }

    #[test]
    fn as_many_lists_as_there_may_be() {
        let folder = tempfile::tempdir().unwrap();
        let golden = golden(folder.path());
        for number in 0..LISTS_MAX {
            golden.put(learned(&format!("l{number}"), None, &[1])).unwrap();
        }
        assert!(matches!(golden.put(learned("more", None, &[1])), Err(GoldenError::TooManyLists)));
        golden.put(learned("l3", None, &[1, 2])).unwrap();
        let files = (0..=FILES_MAX as u128).map(|n| (Fingerprint(n.to_be_bytes()), hash(1)));
        let many = Learned { files: files.collect(), ..learned("l3", None, &[]) };
        assert!(matches!(golden.put(many), Err(GoldenError::TooManyFiles(_))));
    }
}
