//! Scans of this guest's files that the host asks for.
//!
//! ```text
//!   Walk ──► one thread: mounts or folders, file by file ──► scan, as for what nobody waits for
//!                 │ no such request under way                       │
//!                 └──► WalkProgress: where it is ◄──────────────────┘
//! ```
//!
//! Accesses go first: a walk has few requests under way at once, stands still while the guest's processes wait for
//! disks or CPUs, and reads no faster than it may. It keeps nothing over a restart; the host says where it was.

use crate::driver::{Ask, Driver, Job, Purpose, Subject};
use crate::file::{Look, open_mount};
use crate::golden;
use crate::memory::Known;
use crate::session::Session;
use crate::walk::{Level, Step, Walk};
use crate::{mounts, running, scan, truth};
use seawall_fanotify::{FileHandle, process};
use seawall_proto::remedy::Time;
use seawall_proto::walk::{self, WalkMissed, WalkOrder, WalkProgress};
use seawall_proto::{Facts, Mode, Operation, ToHost};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How many of its scans are under way at once.
const AT_ONCE: usize = 4;
/// And of those that may be answered without their content.
const ASKED_AT_ONCE: usize = 16;
/// Files are asked for by their hash as long as the host knows so many of a thousand,
const KNOWS_LEAST: u32 = 300;
/// and one after so many in any case.
const ASK_EVERY: u32 = 16;
/// How often it says how far it is.
const TELL: Duration = Duration::from_secs(1);
/// Mounts and folders that it goes through: users may mount new ones for ever.
const ITEMS_MAX: usize = 4096;
/// How long it waits for mounts to be known.
const MOUNTS: Duration = Duration::from_secs(5);
/// How often it looks whether it may go on.
const LOOK: Duration = Duration::from_millis(200);
/// Files with several names of which it knows that it has come to them; more are come to again.
const LINKED_MAX: usize = 32 * 1024;
/// Files left out that are named to the host.
const NAMED_MAX: u64 = 200;
/// What changed within this counts as recent for a quick scan, in seconds.
const RECENT: i64 = 7 * 24 * 3600;

/// Where programs are started from without anybody who asks: beginnings of paths.
const START_UP: [&[u8]; 12] = [
    b"/etc/cron",
    b"/etc/init",
    b"/etc/ld.so.preload",
    b"/etc/profile",
    b"/etc/rc",
    b"/etc/systemd/",
    b"/etc/udev/",
    b"/etc/xdg/autostart/",
    b"/lib/systemd/",
    b"/usr/lib/systemd/",
    b"/usr/lib/udev/",
    b"/var/spool/cron/",
];
/// The same in people's homes: ends of paths, and folders in them.
const START_UP_AT_HOME: [&[u8]; 7] = [
    b"/.bash",
    b"/.config/autostart/",
    b"/.config/systemd/",
    b"/.profile",
    b"/.ssh/",
    b"/.xsession",
    b"/.zsh",
];

/// What the session leaves for [`work`].
#[derive(Default)]
pub struct OnDemand {
    state: Mutex<State>,
    changed: Condvar,
    /// Verdicts on its files that are being carried out.
    judged: Arc<AtomicUsize>,
}

/// A verdict on one of its files that is being carried out, as long as it lives.
#[derive(Debug)]
pub struct Judging(Arc<AtomicUsize>);

impl Drop for Judging {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

#[derive(Default)]
struct State {
    /// A walk that has not begun.
    wanted: Option<(walk::Walk, Arc<Session>)>,
    /// And shall not.
    hold_wanted: bool,
    /// The one under way.
    id: u64,
    hold: bool,
    end: bool,
    missed: u64,
    named: u64,
    /// Files that the host does not know by the hash of their content.
    unknown: Vec<Job>,
    /// How often it lately knew one, in thousandths.
    knows: u32,
    /// Files since one was asked for by its hash.
    not_asked: u32,
}

impl OnDemand {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The host wants this. Never waits.
    pub fn begin(&self, walk: walk::Walk, session: &Arc<Session>) {
        let mut state = self.lock();
        state.end = true;
        state.wanted = Some((walk, Arc::clone(session)));
        state.hold_wanted = false;
        drop(state);
        self.changed.notify_all();
    }

    /// What the host wants of the walk under way. Never waits.
    pub fn order(&self, id: u64, order: WalkOrder) {
        let mut state = self.lock();
        if state.wanted.as_ref().is_some_and(|(wanted, _)| wanted.id == id) {
            match order {
                WalkOrder::Hold => state.hold_wanted = true,
                WalkOrder::GoOn => state.hold_wanted = false,
                WalkOrder::End => state.wanted = None,
            }
        }
        if state.id == id {
            match order {
                WalkOrder::Hold => state.hold = true,
                WalkOrder::GoOn => state.hold = false,
                WalkOrder::End => state.end = true,
            }
        }
        drop(state);
        self.changed.notify_all();
    }

    /// A verdict on one of its files is carried out; to be dropped when that is done.
    pub fn judging(&self) -> Judging {
        self.judged.fetch_add(1, Ordering::AcqRel);
        Judging(Arc::clone(&self.judged))
    }

    /// Whether no walk is under way that anybody wants.
    pub fn has_ended(&self) -> bool {
        let state = self.lock();
        state.end || state.id == 0
    }

    /// A file's content could not be had. May wait for the link: not for the session's own thread.
    pub fn missed(&self, session: Option<&Arc<Session>>, path: &[u8], reason: &str) {
        let mut state = self.lock();
        state.missed += 1;
        state.named += 1;
        let (id, is_named) = (state.id, state.named <= NAMED_MAX);
        drop(state);
        if let Some(session) = session.filter(|_| is_named) {
            let mut path = path.to_vec();
            path.truncate(4096);
            let missed = WalkMissed { id, path: path.into(), reason: reason.to_owned() };
            if session.send(&ToHost::WalkMissed(missed)).is_err() {
                session.end();
            }
        }
    }

    /// Whether the next file is asked for by its hash: that spares the host a copy where it knows the content, and costs
    /// a second read where it does not.
    pub fn asks_by_hash(&self) -> bool {
        let mut state = self.lock();
        state.not_asked += 1;
        let asks = state.knows >= KNOWS_LEAST || state.not_asked > ASK_EVERY;
        if asks {
            state.not_asked = 0;
        }
        asks
    }

    /// Whether the host knew what was asked for so. Never waits.
    pub fn knew(&self, known: bool) {
        let mut state = self.lock();
        state.knows = (state.knows * 7 + if known { 1000 } else { 0 }) / 8;
    }

    /// The host does not know this one. Never waits.
    pub fn unknown(&self, job: Job) {
        self.knew(false);
        self.lock().unknown.push(job);
        self.changed.notify_all();
    }

    fn next(&self) -> (walk::Walk, Arc<Session>) {
        let mut state = self.lock();
        loop {
            if let Some((walk, session)) = state.wanted.take() {
                let hold = state.hold_wanted;
                *state = State { id: walk.id, hold, knows: 1000, ..State::default() };
                return (walk, session);
            }
            state.id = 0;
            let waited = self.changed.wait_timeout(state, Duration::from_secs(2));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// A scan has come to its end. Never waits.
    pub fn wake(&self) {
        self.changed.notify_all();
    }

    fn wait(&self, time: Duration) {
        let state = self.lock();
        drop(self.changed.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner));
    }
}

/// Where a walk is: what it goes through, and how far it is there.
#[derive(Serialize, Deserialize)]
struct Place {
    /// What it has gone through.
    done: Vec<serde_bytes::ByteBuf>,
    item: serde_bytes::ByteBuf,
    levels: Vec<Level>,
}

/// Does what the host wants for ever.
pub fn work(driver: &Driver) {
    let mut buffer = Vec::new();
    loop {
        let (order, session) = driver.on_demand.next();
        tracing::info!(id = order.id, quick = order.quick, "a scan of files begins");
        let mut going = Going::new(driver, &order, &session);
        let done = going.go(&mut buffer).is_some();
        tracing::info!(id = order.id, files = going.progress.files, done, "a scan of files ends");
        buffer = Vec::new();
    }
}

/// What is on the disks.
struct WrittenOut {
    /// Those of these file systems,
    devices: HashSet<u64>,
    /// which changed before this.
    before: Time,
}

/// A walk under way. `None` from its functions: it is not wanted any more.
struct Going<'a> {
    driver: &'a Driver,
    order: &'a walk::Walk,
    session: &'a Arc<Session>,
    progress: WalkProgress,
    /// What it goes through now.
    at: Option<(serde_bytes::ByteBuf, Walk)>,
    /// What it has gone through: mounts and folders.
    gone_through: Vec<serde_bytes::ByteBuf>,
    /// Files with several names that it has come to.
    linked: HashSet<(u64, u64)>,
    /// What is being executed, for a quick scan.
    mapped: HashSet<(u64, u64)>,
    /// The host learns files' fingerprints: of those that are on the disk as they are.
    written_out: Option<WrittenOut>,
    since: Instant,
    told: Instant,
    looked: Instant,
}

impl<'a> Going<'a> {
    fn new(driver: &'a Driver, order: &'a walk::Walk, session: &'a Arc<Session>) -> Self {
        let progress = WalkProgress { id: order.id, ..WalkProgress::default() };
        let mapped = if order.quick { running::mapped() } else { HashSet::new() };
        let (now, linked) = (Instant::now(), HashSet::new());
        let (since, told, looked, gone_through) = (now, now, now, Vec::new());
        let (at, written_out) = Default::default();
        Self {
            driver,
            order,
            session,
            progress,
            at,
            gone_through,
            linked,
            mapped,
            written_out,
            since,
            told,
            looked,
        }
    }

    fn go(&mut self, buffer: &mut Vec<u8>) -> Option<()> {
        let place = self.order.place.as_ref();
        let mut place = place.and_then(|place| postcard::from_bytes::<Place>(place).ok());
        if let Some(place) = &mut place {
            self.gone_through = std::mem::take(&mut place.done);
        }
        self.wait_for_mounts()?;
        let items = self.items();
        if self.session.golden().learns {
            self.written_out = Some(self.write_out());
        }
        self.progress.expected = if self.order.roots.is_empty() { expected(&items) } else { 0 };
        // Until there is nothing new: what is mounted meanwhile belongs to it.
        while self.gone_through.len() < ITEMS_MAX
            && let Some((device, path)) = self.items().into_iter().find(|item| self.is_new(item))
        {
            let own = path.as_os_str().as_bytes();
            let walk = match device {
                Some(device) => Walk::begin(device, &path),
                None => self.beneath(&path),
            };
            match walk {
                Ok(mut walk) => {
                    if let Some(place) = place.take_if(|place| place.item.as_slice() == own) {
                        walk.go_to(&place.levels);
                    }
                    self.at = Some((serde_bytes::ByteBuf::from(own), walk));
                    self.go_through(buffer)?;
                    self.at = None;
                }
                Err(error) => self.miss(own, &error.to_string()),
            }
            self.gone_through.push(serde_bytes::ByteBuf::from(own));
        }
        self.settle(buffer)?;
        self.progress.done = true;
        self.tell()
    }

    /// After a start, and where nothing was watched until now, it takes a moment until mounts are known.
    fn wait_for_mounts(&self) -> Option<()> {
        let until = Instant::now() + MOUNTS;
        let coverage = &self.driver.coverage;
        while (!coverage.is_ready() || coverage.reached().is_empty()) && Instant::now() < until {
            self.is_wanted()?;
            self.driver.on_demand.wait(LOOK);
        }
        Some(())
    }

    /// Has what was changed until now written to the disks, of which clones are made.
    fn write_out(&self) -> WrittenOut {
        golden::look(self.driver);
        let now = rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
        let before = (now.tv_sec, u32::try_from(now.tv_nsec).unwrap_or(0));
        let mut devices = HashSet::new();
        for (device, path) in self.driver.coverage.reached() {
            match open_mount(device, &path).and_then(|fd| Ok(rustix::fs::syncfs(fd)?)) {
                Ok(()) => drop(devices.insert(device)),
                Err(error) => {
                    tracing::warn!(%error, path = %path.display(), "cannot be written out");
                }
            }
        }
        WrittenOut { devices, before }
    }

    fn is_new(&self, (_, path): &(Option<u64>, PathBuf)) -> bool {
        let own = path.as_os_str().as_bytes();
        !self.gone_through.iter().any(|done| done.as_slice() == own)
    }

    /// A walk through what the host names, if that is on a file system that is watched: a server elsewhere, or a
    /// user's, may never answer, and is not asked.
    fn beneath(&self, path: &Path) -> std::io::Result<Walk> {
        let mountinfo = std::fs::read("/proc/self/mountinfo")?;
        let mounts = mounts::parse(&mountinfo);
        let holds = |mount: &&mounts::Mount| path.starts_with(&mount.mount_point);
        // The last one of several at the same place hides the others.
        let mount =
            mounts.iter().filter(holds).max_by_key(|mount| mount.mount_point.as_os_str().len());
        if mount.is_some_and(|mount| mount.class() == mounts::Class::Remote) {
            return Err(std::io::Error::other(
                "a server or process elsewhere could hold it for ever",
            ));
        }
        Walk::beneath(path)
    }

    /// What it goes through, in the order of the paths: mounts with their `st_dev`, and what the host names.
    fn items(&self) -> Vec<(Option<u64>, PathBuf)> {
        let mounts = self.driver.coverage.reached().into_iter();
        let mounts = mounts.map(|(device, path)| (Some(device), path));
        let roots: Vec<_> = self
            .order
            .roots
            .iter()
            .map(|root| PathBuf::from(std::ffi::OsString::from_vec(root.to_vec())))
            .collect();
        let mut items: Vec<_> = if roots.is_empty() {
            mounts.collect()
        } else {
            let is_beneath = |path: &Path| {
                roots.iter().any(|root| path.starts_with(root) && path != root.as_path())
            };
            let beneath = mounts.filter(|(_, path)| is_beneath(path));
            beneath.chain(roots.iter().map(|root| (None, root.clone()))).collect()
        };
        items.sort_by(|(_, a), (_, b)| a.as_os_str().as_bytes().cmp(b.as_os_str().as_bytes()));
        items
    }

    fn go_through(&mut self, buffer: &mut Vec<u8>) -> Option<()> {
        while let Some((_, walk)) = &mut self.at {
            match walk.step() {
                Step::File(file) => self.take(file, buffer)?,
                Step::Other => (),
                Step::Missed(reason) => {
                    let folder = walk.folder().and_then(truth::path_of);
                    self.miss(&folder.unwrap_or_default(), reason);
                }
                Step::End => return Some(()),
            }
            if self.looked.elapsed() >= LOOK {
                self.stand(buffer)?;
            }
            if self.told.elapsed() >= TELL {
                self.settle(buffer)?;
                self.tell()?;
            }
        }
        Some(())
    }

    fn take(&mut self, file: File, buffer: &mut Vec<u8>) -> Option<()> {
        let Ok(look) = Look::at(&file) else {
            self.miss(b"", "unreadable");
            return Some(());
        };
        let identity = look.identity;
        let inode = (identity.device, identity.inode);
        let shown = truth::shown_path(&file, identity.device, identity.inode);
        if self.order.quick && !self.is_quick(&shown.path, inode, &look) {
            return Some(());
        }
        if look.links > 1 && self.linked.contains(&inode) {
            return Some(());
        }
        self.progress.files += 1;
        let rules = self.driver.policy();
        let facts = Facts { path: shown.if_true(), owner: Some(look.owner), ..Facts::default() };
        if rules.exclusion(&facts).is_some() || rules.mode == Mode::Off {
            self.progress.excluded += 1;
            return Some(());
        }
        // Not before: a name of it in an excluded folder does not keep it from being scanned by another one.
        if look.links > 1 && self.linked.len() < LINKED_MAX {
            self.linked.insert(inode);
        }
        if identity.size > self.order.file_limit {
            let mib = self.order.file_limit >> 20;
            self.miss(&shown.path, &format!("larger than {mib} MiB"));
            return Some(());
        }
        let known = self.driver.memory.known(&identity, process::now_ms());
        if known == Some(Known::Clean { unopened: false }) && self.written_out.is_none() {
            self.progress.known += 1;
            return Some(());
        }
        let Ok(handle) = FileHandle::of(file.as_fd(), identity.device) else {
            self.miss(&shown.path, "it has no handle");
            return Some(());
        };
        self.send_unknown(buffer)?;
        let (ask, at_once) = match self.driver.on_demand.asks_by_hash() {
            true => (Ask::Hash, ASKED_AT_ONCE),
            false => (Ask::Known, AT_ONCE),
        };
        self.wait_for(at_once)?;
        self.progress.bytes += identity.size;
        let is_on_disk = self.written_out.as_ref().is_some_and(|written| {
            look.changed_before(written.before) && written.devices.contains(&identity.device)
        });
        let fingerprint =
            is_on_disk.then(|| golden::fingerprint(self.driver, file.as_fd(), &look)).flatten();
        let subject =
            Subject::Background { handle, file: Some(Arc::new(file)), purpose: Purpose::OnDemand };
        scan::scan(self.driver, Job { ask, fingerprint, ..Job::new(subject) }, buffer);
        self.keep_pace(buffer)
    }

    /// Waits until fewer than so many of its scans are under way.
    fn wait_for(&self, most: usize) -> Option<()> {
        while self.session.under_way(Operation::OnDemand) >= most {
            self.is_wanted()?;
            self.driver.on_demand.wait(Duration::from_millis(5));
        }
        Some(())
    }

    /// Sends the content of files that the host did not know by its hash.
    fn send_unknown(&self, buffer: &mut Vec<u8>) -> Option<()> {
        loop {
            let Some(job) = self.driver.on_demand.lock().unknown.pop() else { return Some(()) };
            self.wait_for(AT_ONCE)?;
            match job.subject.opened(self.driver) {
                Some(subject) if subject.file().is_some() => {
                    scan::scan(self.driver, Job { subject, ..job }, buffer);
                }
                // It is gone, as if the walk had come later.
                _ => (),
            }
        }
    }

    fn is_quick(&self, path: &[u8], inode: (u64, u64), look: &Look) -> bool {
        let at_home = |place: &&[u8]| path.windows(place.len()).any(|part| part == *place);
        look.changed_within(RECENT)
            || self.mapped.contains(&inode)
            || START_UP.iter().any(|place| path.starts_with(place))
            || START_UP_AT_HOME.iter().any(at_home)
    }

    fn miss(&mut self, path: &[u8], reason: &str) {
        self.driver.on_demand.missed(Some(self.session), path, reason);
    }

    /// Whether the host still wants it, and in this session.
    fn is_wanted(&self) -> Option<()> {
        let is_ours = self.driver.session().is_some_and(|now| Arc::ptr_eq(&now, self.session));
        (is_ours && !self.driver.on_demand.lock().end).then_some(())
    }

    /// Stands still as long as the host, or the guest's own work, wants that.
    fn stand(&mut self, buffer: &mut Vec<u8>) -> Option<()> {
        loop {
            self.is_wanted()?;
            self.looked = Instant::now();
            let hold = self.driver.on_demand.lock().hold;
            let was = self.progress.pressed;
            let most = self.order.pressure_percent;
            self.progress.pressed = most > 0 && pressure().is_some_and(|now| now > most.into());
            if !hold && !self.progress.pressed {
                return Some(());
            }
            if was != self.progress.pressed || self.told.elapsed() >= TELL {
                self.settle(buffer)?;
                self.tell()?;
            }
            self.driver.on_demand.wait(LOOK);
        }
    }

    /// No more bytes in a second than it may.
    fn keep_pace(&mut self, buffer: &mut Vec<u8>) -> Option<()> {
        let rate = self.order.bytes_per_second;
        if rate == 0 {
            return Some(());
        }
        let due = Duration::from_secs_f64(self.progress.bytes as f64 / rate as f64);
        while let Some(early) = due.checked_sub(self.since.elapsed()).filter(|it| !it.is_zero()) {
            self.is_wanted()?;
            self.driver.on_demand.wait(early.min(LOOK));
            if self.told.elapsed() >= TELL {
                self.settle(buffer)?;
                self.tell()?;
            }
        }
        Some(())
    }

    /// Waits until none of its scans is under way, and no verdict is being carried out: what it tells then is done.
    fn settle(&self, buffer: &mut Vec<u8>) -> Option<()> {
        let judged = &self.driver.on_demand.judged;
        loop {
            self.send_unknown(buffer)?;
            // In this order, which is that in which a scan comes to its end.
            let is_done = self.session.under_way(Operation::OnDemand) == 0
                && judged.load(Ordering::Acquire) == 0
                && self.driver.on_demand.lock().unknown.is_empty();
            if is_done {
                return Some(());
            }
            self.is_wanted()?;
            self.driver.on_demand.wait(Duration::from_millis(5));
        }
    }

    /// Says how far it is: all that it has come to is done.
    fn tell(&mut self) -> Option<()> {
        self.told = Instant::now();
        let (item, levels) = match &self.at {
            Some((item, walk)) => (item.clone(), walk.place()),
            None => Default::default(),
        };
        let place = Place { done: self.gone_through.clone(), item, levels };
        // One that is too long cannot be told: the walk would go on from the one before, and comes to nothing less.
        let place = postcard::to_stdvec(&place).ok().filter(|place| place.len() <= walk::PLACE_MAX);
        self.progress.place = place.unwrap_or_default().into();
        self.progress.missed = self.driver.on_demand.lock().missed;
        match self.session.send(&ToHost::WalkProgress(self.progress.clone())) {
            Ok(()) => Some(()),
            Err(_) => {
                self.session.end();
                None
            }
        }
    }
}

/// How many files these mounts have, as their file systems say; 0 where one does not.
fn expected(items: &[(Option<u64>, PathBuf)]) -> u64 {
    let used = items.iter().map(|(_, path)| {
        let system = rustix::fs::statvfs(path).ok()?;
        (system.f_files > 0).then(|| system.f_files.saturating_sub(system.f_ffree))
    });
    used.sum::<Option<u64>>().unwrap_or(0)
}

/// For how much of the last ten seconds something waited for a disk or a CPU, in percent; None where the kernel does
/// not tell (proc_pressure, CONFIG_PSI).
fn pressure() -> Option<f64> {
    let of = |what: &str| {
        let text = std::fs::read_to_string(format!("/proc/pressure/{what}")).ok()?;
        some_avg10(&text)
    };
    of("io").into_iter().chain(of("cpu")).reduce(f64::max)
}

fn some_avg10(text: &str) -> Option<f64> {
    let some = text.lines().find_map(|line| line.strip_prefix("some "))?;
    let value = some.split_ascii_whitespace().find_map(|word| word.strip_prefix("avg10="))?;
    value.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_is_read_as_the_kernel_writes_it() {
        let text = "some avg10=12.34 avg60=1.00 avg300=0.10 total=1234\n\
                    full avg10=99.00 avg60=0.00 avg300=0.00 total=1\n";
        assert_eq!(some_avg10(text), Some(12.34));
        assert_eq!(some_avg10("full avg10=1.00\n"), None);
    }
}
