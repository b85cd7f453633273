//! Signature sets on disk: `state_dir/signatures/sets/ID/`.
//!
//! A set is copied from the operator's folders once and never changes: what was checked, what is in use
//! and what a restart loads are the same bytes. Each engine has a folder of its own in it with the files
//! that it takes; a file for two engines, or in two sets, is one file with two names (hard links).
//!
//! ```text
//! sets/3f0c9a…/set.json            what is in it, and where it came from
//!              engines/yara/…      what the engine named `yara` gets
//! ```

use crate::config::{EngineConfig, Takes};
use crate::events::hex;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use walkdir::WalkDir;

/// Deepest folder that is looked into.
const DEEPEST: usize = 32;
/// Most files of one set: against a mistake, as if `/` had been given.
const MOST_FILES: usize = 100_000;
/// Most bytes of one set, for the same reason.
const MOST_BYTES: u64 = 32 << 30;
/// What stays free on the disk for everything else, at most.
const RESERVE: u64 = 256 << 20;
/// Files left out that are named.
const MOST_NAMED: usize = 50;
/// Digits of a set's name.
const ID_DIGITS: usize = 16;
/// Of the set, in its folder.
const MANIFEST: &str = "set.json";

/// Why folders make no set.
#[derive(Debug, thiserror::Error)]
pub enum SetError {
    #[error("{}: {reason}", path.display())]
    Unreadable { path: PathBuf, reason: String },
    #[error("{}: it changed while it was read; apply the folder when it is complete", .0.display())]
    Changed(PathBuf),
    #[error(
        "{} and {} would both be `{name}` for engine {engine}: give one of them another name",
        one.display(), other.display()
    )]
    SameName { engine: String, name: String, one: PathBuf, other: PathBuf },
    #[error("{what}: is this the right folder?")]
    TooMuch { what: String },
    #[error("{from}: there is no file that an engine takes ({endings})")]
    Empty { from: String, endings: String },
    #[error(
        "no engine takes its signatures from a set: give one `signatures` and {} in its command",
        crate::config::FOLDER
    )]
    NoTaker,
    #[error("the set cannot be kept in {}: {reason}", path.display())]
    Store { path: PathBuf, reason: io::Error },
    #[error("there is no set `{0}`; `seawall signatures list` shows those that are kept")]
    Unknown(String),
    #[error("there is no earlier set; `seawall signatures list` shows those that are kept")]
    NoEarlier,
}

/// One file of a set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetFile {
    /// Below the engine's folder.
    pub path: String,
    /// BLAKE3, in hexadecimal.
    pub hash: String,
    pub size: u64,
    /// The operator's file that it was copied from.
    pub from: String,
}

/// What is in a set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub id: String,
    /// The operator's folders.
    pub from: Vec<String>,
    pub engines: BTreeMap<String, Vec<SetFile>>,
}

impl Manifest {
    /// No set.
    pub fn nothing() -> Self {
        Self { id: "none".into(), from: Vec::new(), engines: BTreeMap::new() }
    }

    /// The files of an engine.
    pub fn files(&self, engine: &str) -> &[SetFile] {
        self.engines.get(engine).map_or(&[], Vec::as_slice)
    }

    /// Whether the engine finds the same in both.
    pub fn is_same_for(&self, engine: &str, other: &Self) -> bool {
        let both = [self, other].map(|set| set.files(engine).iter());
        let [ours, theirs] = both.map(|files| files.map(|file| (&file.path, &file.hash)));
        ours.eq(theirs)
    }
}

/// A set that was put together.
#[derive(Debug)]
pub struct Gathered {
    pub set: Manifest,
    /// Digest of what came from the operator's folders.
    pub source: String,
    /// Files that no engine takes, and how many more.
    pub left_out: Vec<String>,
    pub left_out_count: usize,
}

/// Where sets are kept.
#[derive(Debug)]
pub struct Store {
    sets: PathBuf,
}

/// A file that was found, and for whom it is.
struct Found {
    path: PathBuf,
    size: u64,
    /// Engine and the name there.
    names: Vec<(String, String)>,
}

impl Store {
    /// Opens the folder, and makes it where it is missing.
    pub fn open(folder: &Path) -> Result<Self, SetError> {
        let sets = folder.join("sets");
        fs::create_dir_all(&sets)
            .map_err(|reason| SetError::Store { path: sets.clone(), reason })?;
        Ok(Self { sets })
    }

    fn failed(&self, reason: io::Error) -> SetError {
        SetError::Store { path: self.sets.clone(), reason }
    }

    /// The folder that an engine gets.
    pub fn folder(&self, id: &str, engine: &str) -> PathBuf {
        self.sets.join(id).join("engines").join(engine)
    }

    /// What is in a set.
    pub fn read(&self, id: &str) -> Result<Manifest, SetError> {
        let path = self.sets.join(id).join(MANIFEST);
        let text = fs::read(&path).map_err(|_| SetError::Unknown(id.to_owned()))?;
        serde_json::from_slice(&text).map_err(|error| SetError::Unreadable {
            path,
            reason: format!("the set is damaged: {error}"),
        })
    }

    /// All sets that can be read, the oldest first.
    pub fn all(&self) -> Vec<Manifest> {
        let entries = fs::read_dir(&self.sets).into_iter().flatten().flatten();
        let mut sets: Vec<_> = entries
            .filter_map(|entry| {
                let made = entry.metadata().and_then(|about| about.modified()).ok()?;
                Some((made, self.read(entry.file_name().to_str()?).ok()?))
            })
            .collect();
        sets.sort_by_key(|(made, _)| *made);
        sets.into_iter().map(|(_, set)| set).collect()
    }

    /// The set with what `current` has for engines for which it has nothing: these keep what they have.
    pub fn complete(
        &self,
        set: Manifest,
        current: Option<&Manifest>,
    ) -> Result<Manifest, SetError> {
        let Some(current) = current else { return Ok(set) };
        let mut engines = set.engines.clone();
        for (engine, files) in &current.engines {
            if !files.is_empty() && set.files(engine).is_empty() {
                engines.insert(engine.clone(), files.clone());
            }
        }
        if engines == set.engines {
            return Ok(set);
        }
        let staging = self.stage()?;
        for (engine, files) in &engines {
            let owner = if set.files(engine).is_empty() { current } else { &set };
            let folder = engine_folder(staging.path(), engine);
            fs::create_dir_all(&folder).map_err(|reason| self.failed(reason))?;
            for file in files {
                let there = self.folder(&owner.id, engine).join(&file.path);
                self.link(&there, &folder.join(&file.path))?;
            }
        }
        let mut id = digest(&engines);
        id.truncate(ID_DIGITS);
        let set = Manifest { id, engines, from: set.from };
        self.publish(&set, staging).map_err(|reason| self.failed(reason))?;
        Ok(set)
    }

    fn stage(&self) -> Result<tempfile::TempDir, SetError> {
        let staging = tempfile::Builder::new().prefix(".new-").tempdir_in(&self.sets);
        staging.map_err(|reason| self.failed(reason))
    }

    /// Whether there is room for so many bytes more, and for what the service keeps on the same disk.
    fn check_room(&self, bytes: u64) -> Result<(), SetError> {
        let space = rustix::fs::statvfs(&self.sets).map_err(|error| self.failed(error.into()))?;
        let free = space.f_bavail.saturating_mul(space.f_frsize);
        // A part of a small disk, and never more than that of a large one.
        let reserve = (space.f_blocks.saturating_mul(space.f_frsize) / 20).min(RESERVE);
        if bytes.saturating_add(reserve) > free {
            let what =
                format!("it needs {bytes} bytes, and of {free} that are free {reserve} stay so");
            return Err(self.failed(io::Error::new(io::ErrorKind::StorageFull, what)));
        }
        Ok(())
    }

    /// Whether all files of a set are there, as they were.
    fn is_whole(&self, set: &Manifest) -> bool {
        let is_there = |engine: &String, file: &SetFile| {
            has_hash(&self.folder(&set.id, engine).join(&file.path), &file.hash)
        };
        self.read(&set.id).is_ok()
            && set
                .engines
                .iter()
                .all(|(engine, files)| files.iter().all(|file| is_there(engine, file)))
    }

    /// Copies what engines take of `from` into a set of its own. An engine for which there is nothing keeps
    /// what it has in `base`.
    pub fn gather(
        &self,
        from: &[PathBuf],
        engines: &[EngineConfig],
        base: Option<&Manifest>,
    ) -> Result<Gathered, SetError> {
        let takers: Vec<_> = engines.iter().filter(|one| !one.signatures.is_nothing()).collect();
        if takers.is_empty() {
            return Err(SetError::NoTaker);
        }
        let (found, left_out) = find(from, &takers)?;
        if found.is_empty() {
            let from: Vec<_> = from.iter().map(|folder| folder.display().to_string()).collect();
            let endings: BTreeSet<_> =
                takers.iter().flat_map(|one| one.signatures.endings()).collect();
            let endings = endings.iter().map(|one| format!(".{one}")).collect::<Vec<_>>().join(" ");
            return Err(SetError::Empty { from: from.join(", "), endings });
        }
        let bytes = found.iter().map(|one| one.size).sum();
        if bytes > MOST_BYTES {
            let what =
                format!("these folders have more than {} GiB of signatures", MOST_BYTES >> 30);
            return Err(SetError::TooMuch { what });
        }
        self.check_room(bytes)?;
        let staging = self.stage()?;
        let mut made = BTreeMap::<String, Vec<SetFile>>::new();
        for one in &found {
            self.copy(one, staging.path(), base, &mut made)?;
        }
        let source = digest(&made);
        for taker in &takers {
            let kept = base.map_or(&[][..], |base| base.files(&taker.name));
            if let Some(base) = base
                && !made.contains_key(&taker.name)
            {
                for file in kept {
                    let to = engine_folder(staging.path(), &taker.name).join(&file.path);
                    self.link(&self.folder(&base.id, &taker.name).join(&file.path), &to)?;
                }
                made.insert(taker.name.clone(), kept.to_vec());
            }
            let folder = engine_folder(staging.path(), &taker.name);
            fs::create_dir_all(folder).map_err(|reason| self.failed(reason))?;
        }
        for files in made.values_mut() {
            files.sort_by(|one, other| one.path.cmp(&other.path));
        }
        let mut id = digest(&made);
        id.truncate(ID_DIGITS);
        let from = from.iter().map(|folder| folder.display().to_string()).collect();
        let set = Manifest { id, from, engines: made };
        self.publish(&set, staging).map_err(|reason| self.failed(reason))?;
        let left_out_count = left_out.len();
        let left_out = left_out.into_iter().take(MOST_NAMED).collect();
        Ok(Gathered { set, source, left_out, left_out_count })
    }

    /// Copies one file for the first that takes it, and gives it to the others by another name.
    fn copy(
        &self,
        found: &Found,
        staging: &Path,
        base: Option<&Manifest>,
        made: &mut BTreeMap<String, Vec<SetFile>>,
    ) -> Result<(), SetError> {
        let mut first: Option<(PathBuf, SetFile)> = None;
        for (engine, name) in &found.names {
            let to = engine_folder(staging, engine).join(name);
            let file = if let Some((there, file)) = &first {
                self.link(there, &to)?;
                SetFile { path: name.clone(), ..file.clone() }
            } else {
                let parent = to.parent().unwrap_or(staging);
                fs::create_dir_all(parent).map_err(|reason| self.failed(reason))?;
                let (hash, size) = self.copy_bytes(&found.path, &to)?;
                self.share(base, &hash, size, &to)?;
                let from = found.path.display().to_string();
                SetFile { path: name.clone(), hash, size, from }
            };
            made.entry(engine.clone()).or_default().push(file.clone());
            first.get_or_insert((to, file));
        }
        Ok(())
    }

    /// Copies and hashes; what changes meanwhile is no signature file yet.
    fn copy_bytes(&self, from: &Path, to: &Path) -> Result<(String, u64), SetError> {
        let unreadable = |error: io::Error| SetError::Unreadable {
            path: from.to_owned(),
            reason: error.to_string(),
        };
        let mut source = open_file(from).map_err(unreadable)?;
        let before = source.metadata().map_err(unreadable)?;
        let mut target = File::create_new(to).map_err(|reason| self.failed(reason))?;
        let mut hasher = blake3::Hasher::new();
        let mut size = 0_u64;
        let mut piece = vec![0; 1 << 20];
        loop {
            let read = match source.read(&mut piece) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(unreadable(error)),
            };
            hasher.update(&piece[..read]);
            target.write_all(&piece[..read]).map_err(|reason| self.failed(reason))?;
            size += read as u64;
            if size > before.len() {
                return Err(SetError::Changed(from.to_owned()));
            }
        }
        let after = fs::metadata(from).map_err(unreadable)?;
        if size != before.len() || stamp(&before) != stamp(&after) {
            return Err(SetError::Changed(from.to_owned()));
        }
        Ok((hex(hasher.finalize().as_bytes()), size))
    }

    /// Has a copy share its place on the disk with the same file of the set before.
    fn share(
        &self,
        base: Option<&Manifest>,
        hash: &str,
        size: u64,
        copy: &Path,
    ) -> Result<(), SetError> {
        let Some(base) = base else { return Ok(()) };
        let all =
            base.engines.iter().flat_map(|(engine, files)| files.iter().map(move |f| (engine, f)));
        let Some((engine, file)) =
            all.into_iter().find(|(_, file)| file.hash == hash && file.size == size)
        else {
            return Ok(());
        };
        let mut new = copy.as_os_str().to_owned();
        new.push(".shared");
        let (there, new) = (self.folder(&base.id, engine).join(&file.path), PathBuf::from(new));
        // Where it cannot be shared, or is damaged, it is there twice.
        if has_hash(&there, hash) && fs::hard_link(there, &new).is_ok() {
            fs::rename(&new, copy).map_err(|reason| self.failed(reason))?;
        }
        Ok(())
    }

    fn link(&self, there: &Path, new: &Path) -> Result<(), SetError> {
        if let Some(parent) = new.parent() {
            fs::create_dir_all(parent).map_err(|reason| self.failed(reason))?;
        }
        let linked = fs::hard_link(there, new);
        // A file has at most so many names (ext4: 65,000).
        let linked = linked.or_else(|_| fs::copy(there, new).map(drop));
        linked.map_err(|reason| self.failed(reason))
    }

    /// Makes it durable and gives it its name.
    fn publish(&self, set: &Manifest, staging: tempfile::TempDir) -> io::Result<()> {
        let text = serde_json::to_vec_pretty(set)?;
        fs::write(staging.path().join(MANIFEST), text)?;
        let place = self.sets.join(&set.id);
        if place.exists() {
            if self.is_whole(set) {
                // The same files; what is in use stays where it is.
                return Ok(());
            }
            tracing::warn!(set = set.id, "the set on the disk is damaged; it is replaced");
            let aside = self.sets.join(format!(".damaged-{}", set.id));
            let _earlier = fs::remove_dir_all(&aside);
            fs::rename(&place, aside)?;
        }
        rustix::fs::syncfs(File::open(&self.sets)?)?;
        fs::rename(staging.path(), &place)?;
        // Its name is another now: there is nothing to remove.
        let _moved = staging.keep();
        File::open(&self.sets)?.sync_all()
    }

    /// Removes all sets but these.
    pub fn keep_only(&self, ids: &[String]) {
        let entries = fs::read_dir(&self.sets).into_iter().flatten().flatten();
        for entry in entries {
            let name = entry.file_name();
            if ids.iter().any(|id| name == **id) {
                continue;
            }
            if let Err(error) = fs::remove_dir_all(entry.path()) {
                tracing::warn!(path = %entry.path().display(), %error, "an old signature set cannot be removed");
            }
        }
    }
}

fn has_hash(path: &Path, hash: &str) -> bool {
    let mut hasher = blake3::Hasher::new();
    let read = File::open(path).and_then(|file| hasher.update_reader(file).map(drop));
    read.is_ok() && hex(hasher.finalize().as_bytes()) == hash
}

fn engine_folder(set: &Path, engine: &str) -> PathBuf {
    set.join("engines").join(engine)
}

/// Tells a file from what it becomes when somebody writes it.
fn stamp(of: &Metadata) -> (u64, u64, i64, i64, i64, i64) {
    (of.ino(), of.len(), of.mtime(), of.mtime_nsec(), of.ctime(), of.ctime_nsec())
}

/// Opens what is a file; nothing that might make the opener wait.
pub fn open_file(path: &Path) -> io::Result<File> {
    let flags = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits().cast_signed()).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    Ok(file)
}

/// All files of the folders. Hidden names are left out; links are followed, in no circle.
///
/// # Errors
/// What cannot be read, named.
pub fn files_of(folder: &Path) -> Result<Vec<PathBuf>, SetError> {
    let is_hidden = |entry: &walkdir::DirEntry| {
        entry.depth() > 0 && entry.file_name().as_encoded_bytes().starts_with(b".")
    };
    let walk = WalkDir::new(folder).follow_links(true).max_depth(DEEPEST).sort_by_file_name();
    let mut files = Vec::new();
    for entry in walk.into_iter().filter_entry(|entry| !is_hidden(entry)) {
        let entry = entry.map_err(|error| SetError::Unreadable {
            path: error.path().unwrap_or(folder).to_owned(),
            reason: error.io_error().map_or_else(|| error.to_string(), ToString::to_string),
        })?;
        if entry.file_type().is_dir() {
            continue;
        }
        if files.len() >= MOST_FILES {
            let what = format!("{} has more than {MOST_FILES} files", folder.display());
            return Err(SetError::TooMuch { what });
        }
        files.push(entry.into_path());
    }
    Ok(files)
}

/// The files that engines take, and the names of the others.
fn find(from: &[PathBuf], takers: &[&EngineConfig]) -> Result<(Vec<Found>, Vec<String>), SetError> {
    let (mut found, mut left_out) = (Vec::new(), Vec::new());
    let mut taken = BTreeMap::<(String, String), PathBuf>::new();
    for folder in from {
        if !folder.is_dir() {
            let reason = "there is no such folder".to_owned();
            return Err(SetError::Unreadable { path: folder.clone(), reason });
        }
        for path in files_of(folder)? {
            let mut names = Vec::new();
            for taker in takers.iter().filter(|one| one.signatures.takes(&path)) {
                let name = name_for(&taker.signatures, folder, &path)?;
                let key = (taker.name.clone(), name.clone());
                if let Some(other) = taken.insert(key, path.clone()) {
                    let (engine, one) = (taker.name.clone(), path);
                    return Err(SetError::SameName { engine, name, one, other });
                }
                names.push((taker.name.clone(), name));
            }
            if names.is_empty() {
                left_out.push(path.display().to_string());
            } else {
                let size = fs::metadata(&path).map_or(0, |about| about.len());
                found.push(Found { path, size, names });
            }
        }
    }
    Ok((found, left_out))
}

/// What a file is called in an engine's folder.
fn name_for(takes: &Takes, folder: &Path, path: &Path) -> Result<String, SetError> {
    let below = path.strip_prefix(folder).unwrap_or(path);
    let name =
        if takes.is_flat() { Path::new(path.file_name().unwrap_or_default()) } else { below };
    let name = name.to_str().ok_or_else(|| SetError::Unreadable {
        path: path.to_owned(),
        reason: "its name is not UTF-8".to_owned(),
    })?;
    // Lists in a folder of this name are of good content, wherever that folder lies.
    let allows = folder.file_name().is_some_and(|name| name.eq_ignore_ascii_case("allow"));
    Ok(if allows && !takes.is_flat() { format!("allow/{name}") } else { name.to_owned() })
}

/// Of names and contents.
fn digest(engines: &BTreeMap<String, Vec<SetFile>>) -> String {
    let mut hasher = blake3::Hasher::new_derive_key("seawall 2026 files of a signature set");
    let mut text = |text: &str| {
        hasher.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
    };
    for (engine, files) in engines {
        text(engine);
        let mut files: Vec<_> = files.iter().collect();
        files.sort_by(|one, other| one.path.cmp(&other.path));
        for file in files {
            text(&file.path);
            text(&file.hash);
        }
        text("");
    }
    hex(hasher.finalize().as_bytes())
}
