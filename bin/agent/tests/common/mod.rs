//! A real driver on a tmpfs in a mount namespace of the test's own, and a host that does what a test
//! tells it: the fault injector for what a real host will not do on demand.

#![allow(dead_code)] // Each test file uses a part.

use seawall_proto::{
    Attached, Clean, ContentHash, Decision, Fingerprint, Generation, Hello, Part, Policy, Proof,
    RegionId, Remediation, RequestId, RingKey, Running, ScanRequest, ToGuest, ToHost, Verdict,
    VerdictKind, frame,
};
use seawall_region::ring::PIECE_LEN;
use seawall_region::{Filled, Header, HostRegion, HostRing, Query, Reply as Replied};
use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What the host makes of a content.
#[derive(Debug, Clone, Copy)]
pub enum Reply {
    Clean,
    /// Clean, and an archive that nobody looked into.
    Unopened,
    Infected,
    /// Infected, and the file shall go to quarantine.
    Quarantine,
    /// Infected, and this is to be done with processes that run it.
    Running(Running),
    Error,
    /// No answer, ever.
    Silence,
    /// The same as another, after a while.
    After(Duration, &'static Reply),
}

/// What the host makes of the ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RingMode {
    /// It offers none.
    Off,
    /// It looks all the time, and answers from what it knows.
    Looks,
    /// The same when its doorbell has rung.
    Sleeps,
    /// It answers nothing.
    Silent,
    /// It answers on the link, after a while.
    Late(Duration),
}

type Rule = dyn Fn(&ScanRequest, &[u8]) -> Reply + Send + Sync;

/// What the host has seen.
#[derive(Default)]
pub struct Seen {
    pub requests: AtomicU64,
    pub contents: Mutex<Vec<(seawall_proto::Operation, Vec<u8>)>>,
    pub messages: Mutex<Vec<ToHost>>,
    pub sessions: AtomicU64,
    /// Parts that came in slots, and inline.
    pub parts: [AtomicU64; 2],
    /// What was asked for by its hash.
    pub hashes: Mutex<Vec<ContentHash>>,
    /// What the host knows so, as clean.
    pub known: Mutex<Vec<ContentHash>>,
    /// Files that were asked for by their fingerprints, on the link.
    pub fingerprints: Mutex<Vec<Fingerprint>>,
    /// What the host knows of them.
    pub golden: Mutex<HashMap<Fingerprint, ContentHash>>,
    /// Contents that were named or sent with their files' fingerprints.
    pub named: Mutex<Vec<(Fingerprint, ContentHash)>>,
    /// What was asked in the ring.
    pub asked: Mutex<Vec<Query>>,
    pub doorbells: AtomicU64,
    /// How many queries it had answered when one rang, and whether the next was there.
    pub rung_at: Mutex<Vec<(usize, bool)>>,
    /// The thread that hears it.
    pub thread: AtomicI32,
    /// It hears no doorbell.
    pub deaf: AtomicBool,
}

pub struct Host {
    pub seen: Arc<Seen>,
    accepting: Arc<AtomicBool>,
    streams: Arc<Mutex<Vec<UnixStream>>>,
    generation: Arc<AtomicU64>,
    policy: Arc<Mutex<Policy>>,
}

const RING_KEY: RingKey = RingKey([4; 32]);
const KEY: seawall_proto::Key = seawall_proto::Key([5; 32]);
/// The region's, and the key file's.
pub const HEADER: Header = Header { region: RegionId([6; 16]), key: KEY };

impl Host {
    fn start(folder: &Path, ring: RingMode, policy: Policy, rule: Arc<Rule>) -> Self {
        let region = Arc::new(HostRegion::open(&folder.join("region")).unwrap());
        region.write_header(&HEADER).unwrap();
        std::fs::write(folder.join("key"), HEADER.to_bytes()).unwrap();
        let listener = UnixListener::bind(folder.join("link")).unwrap();
        let host = Self {
            seen: Arc::default(),
            accepting: Arc::new(AtomicBool::new(true)),
            streams: Arc::default(),
            generation: Arc::new(AtomicU64::new(1)),
            policy: Arc::new(Mutex::new(policy)),
        };
        let (seen, accepting, streams, generation, policy) = (
            Arc::clone(&host.seen),
            Arc::clone(&host.accepting),
            Arc::clone(&host.streams),
            Arc::clone(&host.generation),
            Arc::clone(&host.policy),
        );
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                if !accepting.load(Ordering::Relaxed) {
                    continue;
                }
                streams.lock().unwrap().push(stream.try_clone().unwrap());
                let (seen, region, rule) =
                    (Arc::clone(&seen), Arc::clone(&region), Arc::clone(&rule));
                let (policy, generation) = (Arc::clone(&policy), Arc::clone(&generation));
                std::thread::spawn(move || {
                    serve(stream, ring, &seen, &region, &*rule, &policy, &generation)
                });
            }
        });
        host
    }

    /// Cuts the link; new connections are closed at once until [`Self::up`].
    pub fn down(&self) {
        self.accepting.store(false, Ordering::Relaxed);
        for stream in self.streams.lock().unwrap().drain(..) {
            let _gone = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    pub fn up(&self) {
        self.accepting.store(true, Ordering::Relaxed);
    }

    /// New signatures.
    pub fn renew(&self) {
        let generation = self.generation.fetch_add(1, Ordering::Relaxed) + 1;
        self.say(&ToGuest::Generation(Generation(generation)));
    }

    /// Another policy, for the driver that is there and those that come.
    pub fn set_policy(&self, policy: Policy) {
        policy.to_parts().into_iter().for_each(|part| self.say(&ToGuest::Policy(part)));
        *self.policy.lock().unwrap() = policy;
    }

    /// Says something to every driver.
    pub fn say(&self, message: &ToGuest) {
        for stream in self.streams.lock().unwrap().iter_mut() {
            let mut wire = Vec::new();
            frame::encode(message, &mut wire).unwrap();
            let _gone = stream.write_all(&wire);
        }
    }

    /// Waits for a message in which `find` finds what it looks for, and takes it.
    pub fn heard<T>(&self, mut find: impl FnMut(&ToHost) -> Option<T>) -> T {
        let mut found = None;
        let heard = within(Duration::from_secs(60), || {
            let mut messages = self.seen.messages.lock().unwrap();
            let at = messages.iter().position(|message| {
                found = find(message);
                found.is_some()
            });
            at.map(|at| messages.remove(at)).is_some()
        });
        assert!(heard, "the driver has not said it");
        found.unwrap()
    }

    pub fn requests(&self) -> u64 {
        self.seen.requests.load(Ordering::Relaxed)
    }
}

struct Partial {
    request: ScanRequest,
    content: Vec<u8>,
    copied: u32,
}

fn serve(
    mut stream: UnixStream,
    ring: RingMode,
    seen: &Arc<Seen>,
    region: &Arc<HostRegion>,
    rule: &Rule,
    policy: &Mutex<Policy>,
    generation: &Arc<AtomicU64>,
) -> Option<()> {
    stream.write_all(&Hello::new([7; 32]).to_bytes()).ok()?;
    let mut hello = [0; Hello::LEN];
    stream.read_exact(&mut hello).ok()?;
    let guest_nonce = Hello::parse(&hello).ok()?.nonce;
    let writer = Arc::new(Mutex::new(stream.try_clone().ok()?));
    let send = |message: &ToGuest| {
        let mut wire = Vec::new();
        frame::encode(message, &mut wire).unwrap();
        let _gone = writer.lock().unwrap().write_all(&wire);
    };
    let ended = Arc::new(AtomicBool::new(false));
    let _ends = Ends(Arc::clone(&ended));
    let (mut decoder, mut at_bell) = (frame::Decoder::new(), None::<HostRing>);
    seen.thread.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::Relaxed);
    let mut partial: HashMap<RequestId, Partial> = HashMap::new();
    let mut buffer = [0; 65536];
    loop {
        let payload = loop {
            if let Some(payload) = decoder.next_payload().unwrap() {
                break payload.to_vec();
            }
            let read = stream.read(&mut buffer).ok().filter(|read| *read > 0)?;
            decoder.extend(&buffer[..read]);
        };
        let message = frame::decode(&payload).unwrap().unwrap();
        match &message {
            ToHost::Attach(attach) => {
                let proof = Proof::new(&KEY, &[7; 32], &guest_nonce);
                assert!(proof.matches(&attach.proof), "the driver proves that it has the key");
                seen.sessions.fetch_add(1, Ordering::Relaxed);
                send(&ToGuest::Attached(Attached {
                    guest: "native".into(),
                    generation: Generation(generation.load(Ordering::Relaxed)),
                    heartbeat_ms: 200,
                }));
                let policy = policy.lock().unwrap().clone();
                policy.to_parts().into_iter().for_each(|part| send(&ToGuest::Policy(part)));
                if ring != RingMode::Off {
                    at_bell = HostRing::new(region, RING_KEY).ok();
                    send(&ToGuest::Ring(RING_KEY));
                    let looks = ring != RingMode::Sleeps;
                    let mut desk = HostRing::new(region, RING_KEY).unwrap();
                    desk.look(looks);
                    let mut ring = InRing {
                        mode: ring,
                        seen: Arc::clone(seen),
                        region: Arc::clone(region),
                        desk,
                        generation: Arc::clone(generation),
                        writer: Arc::clone(&writer),
                        ended: Arc::clone(&ended),
                    };
                    std::thread::spawn(move || ring.answer());
                }
            }
            ToHost::Doorbell => {
                let asked = seen.asked.lock().unwrap().len();
                let is_there = at_bell.as_ref()?.query(asked as u64).is_some();
                seen.rung_at.lock().unwrap().push((asked, is_there));
                seen.doorbells.fetch_add(1, Ordering::Relaxed);
            }
            ToHost::Fingerprinted(fingerprint, request) => {
                let known = match request.part {
                    Part::Hash(hash) => {
                        seen.hashes.lock().unwrap().push(hash);
                        let known = seen.known.lock().unwrap().contains(&hash).then_some(hash);
                        seen.named.lock().unwrap().extend(known.map(|hash| (*fingerprint, hash)));
                        known
                    }
                    _ => {
                        seen.fingerprints.lock().unwrap().push(*fingerprint);
                        seen.golden.lock().unwrap().get(fingerprint).copied()
                    }
                };
                let (id, writer) = (request.id, Arc::clone(&writer));
                match known {
                    Some(hash) => answer(writer, id, hash, Reply::Clean, Arc::clone(generation)),
                    None => send(&ToGuest::SendContent(id)),
                }
                continue;
            }
            ToHost::ScanRequest(ScanRequest { id, part: Part::Hash(hash), last: true, .. }) => {
                seen.hashes.lock().unwrap().push(*hash);
                if seen.known.lock().unwrap().contains(hash) {
                    answer(Arc::clone(&writer), *id, *hash, Reply::Clean, Arc::clone(generation));
                } else {
                    send(&ToGuest::SendContent(*id));
                }
                continue;
            }
            ToHost::ScanRequest(request) => {
                let new = Partial { request: request.clone(), content: Vec::new(), copied: 0 };
                partial.insert(request.id, new);
                copy(seen, region, partial.get_mut(&request.id)?, &request.part);
            }
            ToHost::Content(content) => {
                copy(seen, region, partial.get_mut(&content.id)?, &content.part);
            }
            ToHost::Cancel(id) => drop(partial.remove(id)),
            ToHost::Heartbeat(_) => send(&ToGuest::Alive),
            _ => (),
        }
        let (id, last) = match &message {
            ToHost::ScanRequest(request) => (request.id, request.last),
            ToHost::Content(content) => (content.id, content.last),
            ToHost::Ended(ended) => (ended.id, true),
            _ => {
                seen.messages.lock().unwrap().push(message);
                continue;
            }
        };
        send(&ToGuest::Copied { id, slots: partial[&id].copied });
        if last {
            let Partial { request, content, .. } = partial.remove(&id)?;
            seen.requests.fetch_add(1, Ordering::Relaxed);
            let reply = rule(&request, &content);
            let hash = ContentHash(*blake3::hash(&content).as_bytes());
            if let ToHost::Ended(seawall_proto::Ended { fingerprint: Some(own), .. }) = message {
                seen.named.lock().unwrap().push((own, hash));
            }
            seen.contents.lock().unwrap().push((request.operation, content));
            answer(Arc::clone(&writer), id, hash, reply, Arc::clone(generation));
        }
    }
}

struct Ends(Arc<AtomicBool>);

impl Drop for Ends {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Answers in the ring of one session.
struct InRing {
    mode: RingMode,
    seen: Arc<Seen>,
    region: Arc<HostRegion>,
    desk: HostRing,
    generation: Arc<AtomicU64>,
    writer: Arc<Mutex<UnixStream>>,
    ended: Arc<AtomicBool>,
}

impl InRing {
    fn answer(&mut self) {
        let (mut number, mut rung) = (0, 0);
        while !self.ended.load(Ordering::Relaxed) {
            let rings = self.seen.doorbells.load(Ordering::Relaxed);
            let deaf = self.seen.deaf.load(Ordering::Relaxed);
            if self.mode == RingMode::Sleeps && (deaf || rings == rung) {
                std::thread::sleep(Duration::from_micros(100));
                continue;
            }
            let sleeps = self.mode == RingMode::Sleeps;
            if sleeps {
                self.desk.look(true);
            }
            let mut is_filling = self.answer_all(&mut number);
            if sleeps {
                self.desk.look(false);
                is_filling |= self.answer_all(&mut number);
            }
            rung = if is_filling { rung } else { rings };
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    /// Whether the content of one is not there yet. The region may be unplugged for a while.
    fn answer_all(&self, number: &mut u64) -> bool {
        while let Some(query) = self.desk.query(*number) {
            let Some(hash) = self.hash(*number, &query) else { return true };
            self.seen.asked.lock().unwrap().push(query);
            let known = match self.seen.asked.lock().unwrap().last() {
                Some(Query::Fingerprint(_)) => hash != ContentHash([0; 32]),
                _ => self.seen.known.lock().unwrap().contains(&hash),
            };
            let generation = Generation(self.generation.load(Ordering::Relaxed));
            let clean = known.then_some(Clean { unopened: false, generation, hash });
            self.reply(*number, clean);
            *number += 1;
        }
        false
    }

    /// Its content's, once that is there.
    fn hash(&self, number: u64, query: &Query) -> Option<ContentHash> {
        let (len, slots) = match query {
            Query::Hash(hash) => return Some(*hash),
            Query::Fingerprint(own) => {
                let known = self.seen.golden.lock().unwrap().get(own).copied();
                return Some(known.unwrap_or(ContentHash([0; 32])));
            }
            Query::Content { len, slots } => (*len as usize, slots),
        };
        let pieces = len.div_ceil(PIECE_LEN as usize);
        match self.desk.filled(number) {
            Filled::GivenUp => return Some(ContentHash([0; 32])),
            Filled::Pieces(filled) if usize::from(filled) < pieces => return None,
            Filled::Pieces(_) => (),
        }
        let mut content = vec![0; len];
        for (index, part) in slots.iter().zip(content.chunks_mut(65_536)) {
            self.desk.copy_piece(*index, 0, part).ok()?;
        }
        Some(ContentHash(*blake3::hash(&content).as_bytes()))
    }

    fn reply(&self, number: u64, clean: Option<Clean>) {
        let late = match self.mode {
            RingMode::Silent => return,
            RingMode::Late(late) => Some(late),
            _ => {
                let reply = clean.map_or(Replied::Unknown, Replied::Clean);
                let looks = self.desk.reply(number, reply);
                (!looks).then_some(Duration::ZERO)
            }
        };
        if let Some(late) = late {
            std::thread::sleep(late);
            let mut wire = Vec::new();
            frame::encode(&ToGuest::Answered { number, clean }, &mut wire).unwrap();
            let _gone = self.writer.lock().unwrap().write_all(&wire);
        }
    }
}

fn copy(seen: &Seen, region: &HostRegion, partial: &mut Partial, part: &Part) {
    let count = |which: usize| seen.parts[which].fetch_add(1, Ordering::Relaxed);
    match part {
        Part::Slots(slots) => {
            count(0);
            for slot in slots {
                let mut bytes = vec![0; slot.len as usize];
                region.copy_slot(*slot, &mut bytes).unwrap();
                partial.content.extend_from_slice(&bytes);
                partial.copied += 1;
            }
        }
        Part::Inline(bytes) => {
            count(1);
            assert!(bytes.len() <= seawall_proto::INLINE_MAX);
            partial.content.extend_from_slice(bytes);
        }
        Part::Hash(_) | Part::Fingerprint => panic!("no content where that is due"),
    }
}

fn answer(
    writer: Arc<Mutex<UnixStream>>,
    id: RequestId,
    hash: ContentHash,
    reply: Reply,
    now: Arc<AtomicU64>,
) {
    let remediation = match reply {
        Reply::Quarantine => Remediation::Quarantine,
        _ => Remediation::None,
    };
    let (kind, decision) = match reply {
        Reply::Clean => (VerdictKind::Clean, Some(Decision::Allow)),
        Reply::Unopened => (VerdictKind::Unopened, Some(Decision::Allow)),
        Reply::Infected | Reply::Quarantine | Reply::Running(_) => {
            (VerdictKind::Infected, Some(Decision::Deny))
        }
        Reply::Error => (VerdictKind::Error, None),
        Reply::Silence => return,
        Reply::After(pause, reply) => {
            std::thread::spawn(move || {
                std::thread::sleep(pause);
                answer(writer, id, hash, *reply, now);
            });
            return;
        }
    };
    let generation = Generation(now.load(Ordering::Relaxed));
    let hash = Some(hash);
    let detail = Some("Test".into());
    let running = match reply {
        Reply::Running(running) => running,
        _ => Running::Leave,
    };
    let verdict = Verdict { id, kind, decision, generation, hash, detail, remediation, running };
    let mut wire = Vec::new();
    frame::encode(&ToGuest::Verdict(verdict), &mut wire).unwrap();
    let _gone = writer.lock().unwrap().write_all(&wire);
}

/// A driver under test.
pub struct Native {
    folder: tempfile::TempDir,
    agent: Child,
    pub host: Host,
}

impl Native {
    /// Starts a driver for a tmpfs of its own and waits until it is attached.
    pub fn start(
        policy: Policy,
        rule: impl Fn(&ScanRequest, &[u8]) -> Reply + Send + Sync + 'static,
    ) -> Self {
        Self::start_with(&[], policy, rule)
    }

    /// The same on an ext4 file system in an image.
    pub fn start_on(
        image: &Path,
        policy: Policy,
        rule: impl Fn(&ScanRequest, &[u8]) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let mount = |mount: &Path| {
            let done = Command::new("mount").args(["-o", "loop"]).arg(image).arg(mount).status();
            assert!(done.unwrap().success());
        };
        Self::start_mounted(mount, RingMode::Off, &[], policy, rule)
    }

    /// The same with a host that offers a ring, mounted with these options.
    pub fn start_on_with(
        image: &Path,
        options: &str,
        ring: RingMode,
        policy: Policy,
        rule: impl Fn(&ScanRequest, &[u8]) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let mount = |mount: &Path| {
            let options = format!("loop,{options}");
            let done = Command::new("mount").args(["-o", &options]).arg(image).arg(mount).status();
            assert!(done.unwrap().success());
        };
        Self::start_mounted(mount, ring, &[], policy, rule)
    }

    /// The same on a new one, with a host that offers a ring.
    pub fn start_in_ring(
        ring: RingMode,
        policy: Policy,
        rule: impl Fn(&ScanRequest, &[u8]) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        std::fs::File::create(&image).unwrap().set_len(64 << 20).unwrap();
        let made = Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&image).status();
        assert!(made.unwrap().success());
        let mount = |mount: &Path| {
            let done = Command::new("mount").args(["-o", "loop"]).arg(&image).arg(mount).status();
            assert!(done.unwrap().success());
        };
        Self::start_mounted(mount, ring, &[], policy, rule)
    }

    /// The same with further options of `seawall-agent run`.
    pub fn start_with(
        options: &'static [&'static str],
        policy: Policy,
        rule: impl Fn(&ScanRequest, &[u8]) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let mount = |mount: &Path| {
            let flags = nix::mount::MsFlags::empty();
            nix::mount::mount(Some("none"), mount, Some("tmpfs"), flags, None::<&str>).unwrap();
        };
        Self::start_mounted(mount, RingMode::Off, options, policy, rule)
    }

    fn start_mounted(
        mount_at: impl FnOnce(&Path),
        ring: RingMode,
        options: &'static [&'static str],
        policy: Policy,
        rule: impl Fn(&ScanRequest, &[u8]) -> Reply + Send + Sync + 'static,
    ) -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests need root, for fanotify");
        // The tests of this thread, and what it starts, get a mount namespace of their own.
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        let private = nix::mount::MsFlags::MS_PRIVATE | nix::mount::MsFlags::MS_REC;
        nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let mount = folder.path().join("m");
        std::fs::create_dir(&mount).unwrap();
        mount_at(&mount);
        let region = std::fs::File::create(folder.path().join("region")).unwrap();
        region.set_len(1 << 20).unwrap();
        let host = Host::start(folder.path(), ring, policy, Arc::new(rule));
        let agent = spawn_agent(folder.path(), options);
        let native = Self { folder, agent, host };
        native.wait_protected();
        native
    }

    /// The file that stands for the region's device.
    pub fn region(&self) -> PathBuf {
        self.folder.path().join("region")
    }

    /// The region is unplugged: behind the driver's mapping is nothing, and there is no device. Under
    /// QEMU the host would still have the memory; here it has not, so nothing may be under way.
    pub fn unplug(&self) {
        let region = std::fs::OpenOptions::new().write(true).open(self.region()).unwrap();
        std::fs::rename(self.region(), self.folder.path().join("unplugged")).unwrap();
        region.set_len(0).unwrap();
    }

    /// It is plugged in again.
    pub fn plug(&self) {
        let path = self.folder.path().join("unplugged");
        let region = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        region.set_len(1 << 20).unwrap();
        HostRegion::open(&path).unwrap().write_header(&HEADER).unwrap();
        std::fs::rename(path, self.region()).unwrap();
    }

    /// Parts of content that came in slots, and inline.
    pub fn parts(&self) -> (u64, u64) {
        let [slots, inline] = &self.host.seen.parts;
        (slots.load(Ordering::Relaxed), inline.load(Ordering::Relaxed))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join("m").join(name)
    }

    /// Writes a file and lets its times settle, so that it can be remembered.
    pub fn write(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    pub fn settle(&self) {
        // Longer than two clock ticks, and long enough for the scan after the close.
        std::thread::sleep(Duration::from_millis(400));
    }

    fn control(&self, command: &str) -> Output {
        let control = self.folder.path().join("control");
        let program = env!("CARGO_BIN_EXE_seawall-agent");
        let mut args = vec![command];
        args.extend((command == "status").then_some("--json"));
        Command::new(program).args(args).arg("--control").arg(control).output().unwrap()
    }

    pub fn status(&self) -> serde_json::Value {
        serde_json::from_slice(&self.control("status").stdout).unwrap_or_default()
    }

    /// The policy that the driver goes by.
    pub fn policy(&self) -> Option<Policy> {
        let mut control = UnixStream::connect(self.folder.path().join("control")).ok()?;
        control.write_all(b"policy\n").ok()?;
        serde_json::from_reader(control).ok()
    }

    pub fn number(&self, key: &str) -> u64 {
        self.status()[key].as_u64().unwrap_or(0)
    }

    pub fn wait_protected(&self) {
        let ok = || self.control("status").status.success();
        assert!(eventually(ok), "not protected: {}\n{}", self.status(), self.log());
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    pub fn kill_worker(&self) {
        kill(self.number("worker"));
    }

    pub fn kill_supervisor(&mut self) {
        self.agent.kill().unwrap();
        self.agent.wait().unwrap();
    }

    /// Starts another driver beside what is left of the first.
    pub fn start_again(&mut self) {
        self.agent = spawn_agent(self.folder.path(), &[]);
    }

    pub fn stop(&self) -> bool {
        self.control("stop").status.success()
    }
}

/// Kills a process of the driver.
pub fn kill(pid: u64) {
    assert!(pid > 1, "the driver tells its processes");
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).unwrap());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}

fn spawn_agent(folder: &Path, options: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_seawall-agent"));
    command.arg("run").args(options);
    if !options.iter().any(|option| option.starts_with("--region=")) {
        command.arg("--region").arg(folder.join("region"));
    }
    command
        .arg(format!("--link=unix:{}", folder.join("link").display()))
        .arg("--key")
        .arg(folder.join("key"))
        .arg("--only-mount")
        .arg(folder.join("m"))
        .arg("--control")
        .arg(folder.join("control"))
        .arg("--journal")
        .arg(folder.join("journal/exposures"))
        .arg("--log")
        .arg(folder.join("log"))
        .stdin(Stdio::null())
        .spawn()
        .unwrap()
}

impl Drop for Native {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("driver's log:\n{}\nstatus: {}", self.log(), self.status());
        }
        let worker = self.number("worker");
        let _already = self.agent.kill();
        let _already = self.agent.wait();
        if worker > 1 {
            kill(worker);
        }
        let _busy = nix::mount::umount2(&self.path(""), nix::mount::MntFlags::MNT_DETACH);
    }
}

/// Waits up to ten seconds for something to become true.
pub fn eventually(check: impl FnMut() -> bool) -> bool {
    within(Duration::from_secs(10), check)
}

fn within(time: Duration, mut check: impl FnMut() -> bool) -> bool {
    let until = Instant::now() + time;
    while Instant::now() < until {
        if check() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    false
}

/// What became of a read, and how long it took.
pub type Ended = (Result<Vec<u8>, std::io::Error>, Duration);

/// A thread that reads a file.
pub struct Reader {
    path: PathBuf,
    thread: std::thread::JoinHandle<Ended>,
}

impl Reader {
    /// Waits for the thread; one that is held for a minute has no end and fails the test. The driver's
    /// end lets it go.
    pub fn join(self) -> std::thread::Result<Ended> {
        let until = Instant::now() + Duration::from_secs(60);
        while !self.thread.is_finished() {
            assert!(Instant::now() < until, "{:?} is held for ever", self.path);
            std::thread::sleep(Duration::from_millis(1));
        }
        self.thread.join()
    }

    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }
}

/// Opens and reads a file in a thread.
pub fn read_in_thread(path: PathBuf) -> Reader {
    let file = path.clone();
    let thread = std::thread::spawn(move || {
        let start = Instant::now();
        let result = std::fs::read(file);
        (result, start.elapsed())
    });
    Reader { path, thread }
}

/// Whether an access was denied with EPERM.
pub fn is_denied<T>(result: &std::io::Result<T>) -> bool {
    result.as_ref().err().and_then(std::io::Error::raw_os_error) == Some(1)
}
