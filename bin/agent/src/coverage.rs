//! Which file systems are watched, in every mount namespace.
//!
//! Marks go on superblocks. The driver's own mountinfo tells of mounts at once (poll gives POLLPRI,
//! proc_pid_mounts(5)). Those in other mount namespaces are found by looking through /proc once a
//! second, and before each exec of a process that lives in one ([`before_exec`]), so that a container
//! or `unshare` cannot run a program from a file system that is not watched yet. Holding a foreign
//! namespace's mountinfo open would keep its mounts alive; it is opened, read and closed.

use crate::driver::Driver;
use crate::golden;
use crate::mounts::{self, Class, Mount};
use crate::running;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;
use seawall_fanotify::Holds;
use seawall_fanotify::probe::OverlayView;
use seawall_proto::{Mode, Notice, Uncovered};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How often the other mount namespaces are looked through.
const LOOK_AGAIN: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// File systems that are not watched, named to the host one by one; and how much of their names.
const TOLD_MAX: usize = 64;
const PATH_TOLD_MAX: usize = 512;
const TYPE_TOLD_MAX: usize = 64;

#[derive(Debug, Default)]
struct State {
    /// What was last seen in each mount namespace, by its inode number.
    namespaces: HashMap<u64, Namespace>,
    /// Watched.
    covered: BTreeSet<u64>,
    /// Where watched files can be reached, by their `st_dev`. It is the device's but for btrfs, where each
    /// subvolume has its own.
    reached: BTreeMap<u64, Reached>,
    uncovered: BTreeMap<u64, Uncovered>,
    /// Policy excludes their types. Those that the driver's own namespace has, and no others: in a namespace of
    /// their own users mount what they like.
    excluded: BTreeSet<u64>,
    /// The mode that the marks fit.
    mode: Mode,
    changed: bool,
    first_done: bool,
}

#[derive(Debug)]
struct Reached {
    device: u64,
    path: PathBuf,
}

#[derive(Debug)]
struct Namespace {
    /// The process through which its mounts are reached.
    pid: u32,
    /// Digest of its mountinfo.
    digest: u64,
    devices: Vec<u64>,
}

/// What is watched. One thread keeps it; fillers ask before an exec.
#[derive(Debug)]
pub struct Coverage {
    only: Vec<PathBuf>,
    state: Mutex<State>,
}

impl State {
    /// File systems that are mounted in none of these namespaces are gone; their device numbers will
    /// belong to others.
    ///
    /// Gives the `st_dev` of those that are gone.
    fn forget_all_but(&mut self, namespaces: &[u64]) -> Vec<u64> {
        self.namespaces.retain(|namespace, _| namespaces.contains(namespace));
        let devices: HashSet<u64> =
            self.namespaces.values().flat_map(|seen| seen.devices.iter().copied()).collect();
        self.retain(&devices)
    }

    /// Forgets what is on none of these devices. Gives those that are gone.
    fn retain(&mut self, devices: &HashSet<u64>) -> Vec<u64> {
        let before = self.covered.len() + self.uncovered.len();
        self.covered.retain(|device| devices.contains(device));
        let is_gone = |reached: &Reached| !devices.contains(&reached.device);
        let gone = self.reached.extract_if(.., |_, reached| is_gone(reached));
        let gone = gone.map(|(device, _)| device).collect();
        self.uncovered.retain(|device, _| devices.contains(device));
        self.excluded.retain(|device| devices.contains(device));
        self.changed |= self.covered.len() + self.uncovered.len() != before;
        self.first_done = true;
        gone
    }
}

impl Coverage {
    /// Watches everything, or only the file systems mounted at `only`.
    pub fn new(only: Vec<PathBuf>) -> Self {
        Self { only, state: Mutex::default() }
    }

    /// Whether it watches everything.
    pub fn is_of_all(&self) -> bool {
        self.only.is_empty()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the first look has been done.
    pub fn is_ready(&self) -> bool {
        self.lock().first_done
    }

    /// The host has not heard of the coverage yet.
    pub fn tell_again(&self) {
        self.lock().changed = true;
    }

    /// A path on the file system of `device` (`st_dev`).
    pub fn path_on(&self, device: u64) -> Option<PathBuf> {
        self.lock().reached.get(&device).map(|reached| reached.path.clone())
    }

    /// All file systems that are watched: `st_dev`, and a path on it.
    pub fn reached(&self) -> Vec<(u64, PathBuf)> {
        let state = self.lock();
        let reached = state.reached.iter();
        reached.map(|(device, reached)| (*device, reached.path.clone())).collect()
    }

    /// What the host is told. It fits a message however many file systems users mount, and whatever
    /// they call them.
    pub fn summary(&self) -> seawall_proto::Coverage {
        let state = self.lock();
        let mut uncovered: Vec<_> = state.uncovered.values().take(TOLD_MAX).cloned().collect();
        for one in &mut uncovered {
            one.mount_point.truncate(PATH_TOLD_MAX);
            one.fs_type = one.fs_type.chars().take(TYPE_TOLD_MAX).collect();
        }
        let more = state.uncovered.len().saturating_sub(uncovered.len());
        if more > 0 {
            uncovered.push(Uncovered {
                mount_point: serde_bytes::ByteBuf::new(),
                fs_type: "more".into(),
                reason: format!("{more} more file systems are not watched"),
            });
        }
        let covered = u32::try_from(state.covered.len()).unwrap_or(u32::MAX);
        seawall_proto::Coverage { covered, uncovered }
    }
}

/// Watches for mounts for ever.
pub fn keep(driver: &Driver) {
    let mountinfo = File::open("/proc/self/mountinfo");
    loop {
        look(driver);
        tell(driver);
        golden::look(driver);
        match &mountinfo {
            Ok(mountinfo) => {
                let mut fds = [PollFd::new(mountinfo, PollFlags::PRI)];
                let _again = rustix::event::poll(&mut fds, Some(&LOOK_AGAIN));
            }
            Err(_) => std::thread::sleep(std::time::Duration::from_secs(1)),
        }
    }
}

fn tell(driver: &Driver) {
    let coverage = &driver.coverage;
    if driver.session().is_some()
        && std::mem::take(&mut coverage.lock().changed)
        && !driver.notice(Notice::Coverage(coverage.summary()))
    {
        coverage.tell_again();
    }
}

/// Looks through all mount namespaces.
pub fn look(driver: &Driver) {
    let coverage = &driver.coverage;
    let mode = driver.policy().mode;
    if mode == Mode::Off {
        return look_away(driver);
    }
    if std::mem::replace(&mut coverage.lock().mode, mode) != mode {
        mark_again(driver, mode);
    }
    if !coverage.only.is_empty() {
        let devices = coverage.only.iter().filter_map(|path| cover_folder(driver, path)).collect();
        let gone = coverage.lock().retain(&devices);
        gone.into_iter().for_each(|device| driver.forget_device(device));
        return;
    }
    let mut seen = Vec::new();
    let own = std::process::id();
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let processes = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    for pid in std::iter::once(own).chain(processes) {
        if let Some(namespace) = namespace_of(pid).filter(|ns| !seen.contains(ns)) {
            seen.push(namespace);
            look_into(driver, pid, namespace);
        }
    }
    let gone = coverage.lock().forget_all_but(&seen);
    gone.into_iter().for_each(|device| driver.forget_device(device));
}

/// Policy has nothing watched.
fn look_away(driver: &Driver) {
    let mut state = driver.coverage.lock();
    let first_done = std::mem::replace(&mut state.first_done, true);
    if std::mem::replace(&mut state.mode, Mode::Off) == Mode::Off && first_done {
        return;
    }
    let gone = std::mem::take(&mut state.reached);
    *state = State { mode: Mode::Off, changed: true, first_done: true, ..State::default() };
    drop(state);
    crate::worker::unmark(driver);
    gone.into_keys().for_each(|device| driver.forget_device(device));
    tracing::warn!("policy: nothing is watched");
}

/// Marks what is watched so that it fits another mode.
fn mark_again(driver: &Driver, mode: Mode) {
    tracing::info!(?mode, "policy");
    for (device, path) in driver.coverage.reached() {
        let marked = crate::file::open_mount(device, &path)
            .map_err(|error| error.to_string())
            .and_then(|fd| mark_fd(driver, &fd));
        if let Err(error) = marked {
            // It is gone, or hidden; a look finds it elsewhere.
            tracing::debug!(%error, mount = %path.display(), "cannot be marked anew");
            driver.coverage.lock().covered.retain(|covered| *covered != device);
        }
    }
    let mut state = driver.coverage.lock();
    state.namespaces.clear();
    state.changed = true;
}

/// Before a process of another mount namespace executes something: whatever it has mounted is
/// watched from here on.
pub fn before_exec(driver: &Driver, pid: u32) {
    if pid == 0 || !driver.coverage.only.is_empty() {
        return;
    }
    match (namespace_of(pid), namespace_of(std::process::id())) {
        (Some(namespace), Some(own)) if namespace != own => look_into(driver, pid, namespace),
        _ => (),
    }
}

fn namespace_of(pid: u32) -> Option<u64> {
    rustix::fs::stat(format!("/proc/{pid}/ns/mnt")).ok().map(|stat| stat.st_ino)
}

fn look_into(driver: &Driver, pid: u32, namespace: u64) {
    let Ok(mountinfo) = std::fs::read(format!("/proc/{pid}/mountinfo")) else { return };
    let rules = driver.policy();
    let types = &rules.exclude.file_systems;
    let mut hasher = DefaultHasher::new();
    (&mountinfo, driver.ledger.overlay().load(Ordering::Relaxed), types).hash(&mut hasher);
    let digest = hasher.finish();
    let is_own = namespace_of(std::process::id()) == Some(namespace);
    let is_known = |known: &Namespace| {
        // Another process of the same namespace serves as well while the first one lives.
        let reachable = is_own || namespace_of(known.pid) == Some(namespace);
        known.digest == digest && reachable
    };
    if driver.coverage.lock().namespaces.get(&namespace).is_some_and(is_known) {
        return;
    }
    let root = if is_own { PathBuf::from("/") } else { format!("/proc/{pid}/root").into() };
    let mounts = mounts::parse(&mountinfo);
    // Beneath an overlay of a user's own may be a FUSE server of his that never answers; where overlays
    // are marked themselves, reading such an event would hold the reader for ever. In the driver's own
    // namespace only root mounts.
    if is_own {
        let is_it = |mount: &&Mount| types.contains(&mount.fs_type);
        let excluded = mounts.iter().filter(is_it).map(|mount| mount.device).collect();
        driver.coverage.lock().excluded = excluded;
    }
    let is_risky = !is_own && mounts.iter().any(|mount| mount.class() == Class::Remote);
    for mount in &mounts {
        if is_risky && mount.class() == Class::Overlay {
            let reason = "an overlay beside file systems of others: one beneath it could hold an open for ever";
            uncover(driver, mount, reason.into());
            continue;
        }
        let path = mount.mount_point.strip_prefix("/").unwrap_or(&mount.mount_point);
        cover(driver, mount, &root.join(path));
    }
    let devices = mounts.iter().map(|mount| mount.device).collect();
    let seen = Namespace { pid, digest, devices };
    driver.coverage.lock().namespaces.insert(namespace, seen);
}

fn cover(driver: &Driver, mount: &Mount, path: &Path) {
    if driver.coverage.lock().excluded.contains(&mount.device) {
        return exclude(driver, mount, path);
    }
    match mount.class() {
        Class::Pseudo => (),
        Class::Remote => {
            let reason = "a server or process elsewhere could hold an open for ever";
            uncover(driver, mount, reason.into());
        }
        Class::Overlay => match OverlayView::from_number(overlay_view(driver)) {
            // Its opens are held at the file systems beneath it.
            OverlayView::Beneath => (),
            OverlayView::Itself => mark(driver, mount, path),
            OverlayView::Unknown => {
                uncover(driver, mount, "how this kernel shows overlays is being found out".into());
            }
        },
        Class::Real => mark(driver, mount, path),
    }
}

/// Policy excludes file systems of this type.
fn exclude(driver: &Driver, mount: &Mount, path: &Path) {
    let was_covered = driver.coverage.lock().covered.contains(&mount.device);
    if was_covered {
        let unmarked = reach(path, mount).and_then(|fd| {
            let path = path_of(&fd);
            for group in driver.groups.all() {
                match group.unmark_filesystem(&path) {
                    Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                        return Err(error.to_string());
                    }
                    _ => (),
                }
            }
            Ok(())
        });
        if unmarked.is_err() {
            // Another of its mounts will do.
            return;
        }
        tracing::info!(mount = %path.display(), fs = %mount.fs_type, "excluded by policy");
        let mut state = driver.coverage.lock();
        state.covered.remove(&mount.device);
        let is_on_it = |reached: &Reached| reached.device == mount.device;
        let gone: Vec<_> = state
            .reached
            .extract_if(.., |_, reached| is_on_it(reached))
            .map(|(st_dev, _)| st_dev)
            .collect();
        drop(state);
        gone.into_iter().for_each(|device| driver.forget_device(device));
    }
    uncover(driver, mount, "policy excludes file systems of this type".into());
}

/// The probe's result; the supervisor finds it out when it is first needed.
fn overlay_view(driver: &Driver) -> u32 {
    let view = driver.ledger.overlay();
    let order = (Ordering::Relaxed, Ordering::Relaxed);
    let _known = view.compare_exchange(0, crate::supervisor::PROBE_OVERLAY, order.0, order.1);
    view.load(Ordering::Relaxed)
}

fn uncover(driver: &Driver, mount: &Mount, reason: String) {
    let mut state = driver.coverage.lock();
    if state.covered.contains(&mount.device) {
        return;
    }
    let uncovered = Uncovered {
        mount_point: serde_bytes::ByteBuf::from(mount.mount_point.as_os_str().as_bytes()),
        fs_type: mount.fs_type.clone(),
        reason,
    };
    let before = state.uncovered.insert(mount.device, uncovered.clone());
    state.changed |= before != Some(uncovered);
}

/// Opens a mount point without triggering anything there. A mount that another one hides is not the
/// one that is found. Devices are compared only where there is no number: those of btrfs differ.
fn reach(path: &Path, mount: &Mount) -> Result<OwnedFd, String> {
    let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let fd = rustix::fs::open(path, flags, rustix::fs::Mode::empty())
        .map_err(|error| error.to_string())?;
    let is_it = match mount.id {
        Some(id) => mount_id(&fd) == Some(id),
        None => rustix::fs::fstat(&fd).is_ok_and(|found| found.st_dev == mount.device),
    };
    if is_it { Ok(fd) } else { Err("hidden beneath another mount".into()) }
}

/// The number of the mount that an open file belongs to (proc_pid_fdinfo(5)).
/// The number of the mount that was opened there (proc_pid_fdinfo(5)).
pub fn mount_id(fd: &OwnedFd) -> Option<u64> {
    let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd())).ok()?;
    info.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok())
}

fn mark(driver: &Driver, mount: &Mount, path: &Path) {
    match reach(path, mount).and_then(|fd| mark_fd(driver, &fd)) {
        Ok(st_dev) => {
            // A path of our own namespace lasts longer than one through another process, and one may have
            // been unmounted or hidden since.
            let known = driver.coverage.path_on(st_dev);
            let lasts = known.is_some_and(|known| {
                !known.starts_with("/proc") && crate::file::open_mount(st_dev, &known).is_ok()
            });
            let mut state = driver.coverage.lock();
            let news = state.covered.insert(mount.device);
            if !lasts {
                let reached = Reached { device: mount.device, path: path.to_owned() };
                state.reached.insert(st_dev, reached);
            }
            state.changed |= state.uncovered.remove(&mount.device).is_some() || news;
            drop(state);
            if news {
                tracing::info!(mount = %path.display(), fs = %mount.fs_type, "watched");
                running::expose_mapped(driver, mount.device);
            }
        }
        Err(reason) => uncover(driver, mount, reason),
    }
}

/// Gives the `st_dev` of what it marked.
fn mark_fd(driver: &Driver, fd: &OwnedFd) -> Result<u64, String> {
    let path = path_of(fd);
    let mode = driver.policy().mode;
    let holds = match (mode.holds_open(), mode.holds_exec()) {
        (true, _) => Holds::OpenAndExec,
        (false, true) => Holds::Exec,
        (false, false) => Holds::Nothing,
    };
    for group in driver.groups.all() {
        group.mark_filesystem(&path, holds).map_err(|error| error.to_string())?;
    }
    rustix::fs::fstat(fd).map(|stat| stat.st_dev).map_err(|error| error.to_string())
}

/// By which a mark finds what is open.
fn path_of(fd: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}

/// Gives the device that the folder is on.
fn cover_folder(driver: &Driver, path: &Path) -> Option<u64> {
    let stat = rustix::fs::stat(path).ok()?;
    let root_device = rustix::fs::stat("/").map(|root| root.st_dev);
    let mountinfo = std::fs::read("/proc/self/mountinfo").unwrap_or_default();
    let fs_type = mounts::parse(&mountinfo)
        .into_iter()
        .find(|mount| mount.device == stat.st_dev)
        .map_or("as told".into(), |mount| mount.fs_type);
    let is_excluded = driver.policy().exclude.file_systems.contains(&fs_type);
    let mount_point = path.to_owned();
    let mount = Mount { id: None, device: stat.st_dev, mount_point, fs_type, is_roots: false };
    if is_excluded {
        exclude(driver, &mount, path);
    } else if root_device == Ok(stat.st_dev) {
        uncover(driver, &mount, "not a file system of its own but part of the root".into());
    } else if driver.coverage.path_on(stat.st_dev).is_none() {
        mark(driver, &mount, path);
    }
    Some(stat.st_dev)
}
