//! A real service with real engines, and a driver that does as the test tells it, right or wrong.

#![allow(dead_code)] // Each test file uses a part.

use seawall_client::{Client, Event, EventKind, Guest, ScanReport, Status};
use seawall_proto::frame::{Decoder, Message, decode, encode};
use seawall_proto::{
    Attach, Attached, ContentHash, FileMetadata, Heartbeat, Hello, Operation, Part, Policy,
    PolicyParts, Proof, RegionId, RequestId, RingKey, ScanRequest, SlotRef, ToGuest, ToHost,
    Verdict,
};
use seawall_region::{GuestRegion, GuestRing, Slot};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// No wait in a test is longer.
pub const PATIENCE: Duration = Duration::from_secs(20);
const REGION_LEN: u64 = 1 << 20;

/// The EICAR test file, joined at run time so that no scanner finds it here.
pub fn eicar() -> Vec<u8> {
    let halves = [r"X5O!P%@AP[4\PZX54(P^)7CC)7}$EICAR-STANDARD-", "ANTIVIRUS-TEST-FILE!$H+H*"];
    halves.concat().into_bytes()
}

/// Waits until `what` gives something.
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < until, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A program that another package builds: beside this test's own ones, or in a folder named by
/// SEAWALL_BIN_DIR.
pub fn program(name: &str) -> PathBuf {
    let own = Path::new(env!("CARGO_BIN_EXE_seawalld")).parent().expect("it lies in a folder");
    let named = std::env::var_os("SEAWALL_BIN_DIR").map(PathBuf::from);
    let found = named.iter().map(PathBuf::as_path).chain([own]).map(|folder| folder.join(name));
    found.into_iter().find(|path| path.exists()).unwrap_or_else(|| {
        panic!(
            "{name} is not built: run `cargo build --release -p {name}` with the same target folder \
             ({}), or set SEAWALL_BIN_DIR",
            own.display()
        )
    })
}

/// Kills a process of a service of ours.
pub fn kill(pid: u32) {
    let pid = nix::unistd::Pid::from_raw(pid.try_into().expect("a pid"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("it is ours");
}

/// Runs the command line through pipes.
pub fn seawall(service: &Service, arguments: &[&str]) -> Output {
    Command::new(program("seawall"))
        .env("SEAWALL_SOCKET", service.path("api.sock"))
        .args(arguments)
        .output()
        .expect("seawall runs")
}

/// Runs it on a terminal (script(1) makes one), where somebody types `typed`; gives what is to be seen there.
pub fn on_terminal(service: &Service, arguments: &str, typed: &str) -> (Option<i32>, String) {
    let command = format!("stty cols 80; {} {arguments}", program("seawall").display());
    let mut script = Command::new("script")
        .args(["--quiet", "--return", "--command", &command, "/dev/null"])
        .env("SEAWALL_SOCKET", service.path("api.sock"))
        .env_remove("NO_COLOR")
        .env("TERM", "xterm")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("script runs");
    let mut keyboard = script.stdin.take().expect("it is piped");
    keyboard.write_all(typed.as_bytes()).expect("script listens");
    let output = script.wait_with_output().expect("script ends");
    drop(keyboard);
    (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
}

/// What a test wants of the service's configuration.
pub struct Setup {
    pub guests: Vec<&'static str>,
    /// Laid into the section of a guest.
    pub of_guests: Vec<(&'static str, &'static str)>,
    pub engine: Engine,
    /// Laid into the configuration; `{dir}` is the service's folder.
    pub more: String,
    pub tcp: bool,
    /// The state folder is a file system of so many MiB in a mount namespace of the service's own.
    pub state_mib: Option<u32>,
}

#[derive(Clone, Copy, PartialEq)]
pub enum Engine {
    Yara,
    Fault,
    /// The same, whose scans may take half a minute.
    Patient,
    /// Three that obey `one:WORD,two:WORD,three:WORD`; the first may call content good.
    Three,
    /// The same, and none may.
    ThreeWithoutTrust,
    /// Hash lists, one that misbehaves (`.fault`) and YARA, in this order, which have their signatures of the host's sets. The
    /// watched folder is `{dir}/rules`.
    Sets,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            guests: vec!["g1", "g2"],
            of_guests: Vec::new(),
            engine: Engine::Fault,
            more: String::new(),
            tcp: false,
            state_mib: None,
        }
    }
}

/// A running service in a folder of its own.
pub struct Service {
    pub folder: tempfile::TempDir,
    pub setup: Setup,
    pub port: u16,
    child: Child,
    log: Arc<Mutex<String>>,
}

impl Service {
    pub fn start(setup: Setup) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::create_dir(folder.path().join("rules")).expect("a folder");
        let eicar = String::from_utf8(eicar()).expect("it is ASCII").replace('\\', "\\\\");
        std::fs::write(
            folder.path().join("rules/eicar.yar"),
            format!("rule Eicar {{ strings: $a = \"{eicar}\" condition: $a }}\n"),
        )
        .expect("rules");
        if setup.engine == Engine::Sets {
            let rules = folder.path().join("rules");
            std::fs::write(rules.join("set.fault"), "first\n").expect("rules");
            std::fs::write(rules.join("bad.md5"), "d41d8cd98f00b204e9800998ecf8427f  Nothing\n")
                .expect("rules");
        }
        for guest in &setup.guests {
            new_region(&folder.path().join(format!("{guest}.region")));
        }
        let port = free_port();
        let log = Arc::new(Mutex::new(String::new()));
        let child = spawn(folder.path(), &setup, port, &log);
        let service = Self { folder, setup, port, child, log };
        service.wait_ready();
        service
    }

    /// Waits until the service answers and its engine is ready.
    pub fn wait_ready(&self) {
        wait_for("the service to be ready", || {
            let status = self.try_status()?;
            let ready = |engine: &seawall_client::Engine| {
                engine.state == seawall_client::EngineState::Ready
            };
            status.engines.iter().all(ready).then_some(())
        });
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn signal(&self, name: &str) {
        let done =
            Command::new("kill").arg(format!("-{name}")).arg(self.pid().to_string()).status();
        assert!(done.expect("kill runs").success());
    }

    /// Ends the service with a signal and starts it anew in the same folder.
    pub fn restart(&mut self, signal: &str) {
        self.restart_after(signal, |_| ());
    }

    /// The same, with something done while no service runs.
    pub fn restart_after(&mut self, signal: &str, between: impl FnOnce(&Self)) {
        self.signal(signal);
        self.child.wait().expect("it is our child");
        between(self);
        self.again();
    }

    /// Starts it anew after it has ended.
    pub fn again(&mut self) {
        self.again_unready();
        self.wait_ready();
    }

    /// The same, and waits for nothing.
    pub fn again_unready(&mut self) {
        self.child = spawn(self.folder.path(), &self.setup, self.port, &self.log);
    }

    /// How it ended, if it does within `patience`.
    pub fn try_end(&mut self, patience: Duration) -> Option<std::process::ExitStatus> {
        let until = Instant::now() + patience;
        loop {
            let ended = self.child.try_wait().expect("it is our child");
            if ended.is_some() || Instant::now() > until {
                return ended;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn wait_end(&mut self) -> std::process::ExitStatus {
        wait_for("the service to end", || self.child.try_wait().expect("it is our child"))
    }

    /// Writes the configuration of `self.setup` again.
    pub fn configure(&self) {
        write_config(self.folder.path(), &self.setup, self.port);
    }

    pub fn log(&self) -> String {
        self.log.lock().expect("nobody panicked with it").clone()
    }

    pub fn wait_log(&self, text: &str) {
        let until = Instant::now() + PATIENCE;
        while !self.log().contains(text) {
            assert!(Instant::now() < until, "no `{text}` in the log:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn client(&self) -> Client {
        Client::new(self.path("api.sock"))
    }

    /// Every private copy is given back, soon after its verdict.
    pub fn wait_no_copies(&self) {
        wait_for("the private copies to be given back", || {
            let copies = self.status().private_copies;
            (copies.memory_bytes == 0 && copies.spooled_bytes == 0).then_some(())
        });
    }

    pub fn try_status(&self) -> Option<Status> {
        block_on(self.client().status()).ok()
    }

    pub fn status(&self) -> Status {
        block_on(self.client().status()).expect("the service answers")
    }

    pub fn guest(&self, name: &str) -> Guest {
        let guests = block_on(self.client().guests()).expect("the service answers");
        guests.into_iter().find(|guest| guest.name == name).expect("it is configured")
    }

    pub fn scan(&self, name: &str, content: &[u8]) -> ScanReport {
        let body = http_body_util::Full::new(bytes::Bytes::copy_from_slice(content));
        block_on(self.client().scan(name, body)).expect("the service answers")
    }

    /// All events that are written, also while no service runs.
    pub fn events(&self) -> Vec<Event> {
        let read = || {
            let events = rusqlite::Connection::open_with_flags(
                self.path("state/events.db"),
                rusqlite::OpenFlags::SQLITE_OPEN_READ_WRITE,
            )?;
            let mut lines = events.prepare("SELECT line FROM events ORDER BY id")?;
            let lines = lines.query_map((), |row| row.get::<_, String>(0))?;
            lines.collect::<rusqlite::Result<Vec<_>>>()
        };
        // Not there yet, or just being made.
        let lines = read().unwrap_or_default();
        lines.iter().map(|line| serde_json::from_str(line).expect("an event")).collect()
    }

    pub fn wait_event(&self, kind: EventKind, guest: &str) -> Event {
        wait_for(&format!("a {kind:?} event of {guest}"), || {
            let is_it = |event: &Event| event.kind == kind && event.guest.as_deref() == Some(guest);
            self.events().into_iter().find(is_it)
        })
    }

    /// Puts a new region file in place of a guest's.
    pub fn renew_region(&self, guest: &str) {
        let new = self.path("new");
        new_region(&new);
        std::fs::rename(new, self.path(&format!("{guest}.region"))).expect("same folder");
    }

    /// A driver of `guest` that has a session.
    pub fn driver(&self, guest: &str) -> Driver {
        let refused = |refused| panic!("refused: {refused:?}");
        let driver = self.try_driver(guest).unwrap_or_else(refused);
        // The driver hears of its session before anybody else can find it.
        wait_for("the session", || self.guest(guest).session.is_some().then_some(()));
        driver
    }

    pub fn try_driver(&self, guest: &str) -> Result<Driver, Box<ToGuest>> {
        let mut connection = self.connect(guest);
        let region = self.region(guest);
        let header = region.header().expect("the service wrote it");
        match connection.attach(&header.key.0, header.region) {
            ToGuest::Attached(attached) => Ok(Driver {
                connection,
                region,
                attached,
                next_id: 1,
                copied: Vec::new(),
                said: Vec::new(),
            }),
            other => Err(Box::new(other)),
        }
    }

    pub fn region(&self, guest: &str) -> GuestRegion {
        GuestRegion::open_file(&self.path(&format!("{guest}.region"))).expect("it is there")
    }

    /// A connection of `guest` on which nothing was said.
    pub fn connect(&self, guest: &str) -> Connection {
        let path = self.path(&format!("{guest}.sock"));
        let stream = wait_for("the guest's socket", || UnixStream::connect(&path).ok());
        stream.set_read_timeout(Some(PATIENCE)).expect("it is open");
        Connection::new(stream)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("--- the service's log\n{}", self.log());
        }
    }
}

/// A region of the given file name, as QEMU makes it.
fn new_region(path: &Path) {
    File::create(path).and_then(|file| file.set_len(REGION_LEN)).expect("a region file");
}

pub fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("it is bound").port()
}

pub fn block_on<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
        .block_on(work)
}

fn write_config(folder: &Path, setup: &Setup, port: u16) -> PathBuf {
    let dir = folder.display();
    let mut text =
        format!("[service]\napi_socket = \"{dir}/api.sock\"\nstate_dir = \"{dir}/state\"\n");
    if setup.tcp {
        text += &format!("tcp_listen = \"127.0.0.1:{port}\"\n");
    }
    text += &setup.more.replace("{dir}", &dir.to_string());
    let fault = program("seawall-engine-fault").display().to_string();
    let engine = |name: &str, command: &str, more: &str| {
        format!(
            "\n[[engine]]\nname = \"{name}\"\ncommand = [{command}]\nmemory_mib = 1024\n{more}\n"
        )
    };
    const SHORT: &str = "scan_timeout_ms = 3000";
    match setup.engine {
        Engine::Yara => {
            let program = program("seawall-engine-yara");
            let command = format!("\"{}\", \"--rules\", \"{dir}/rules\"", program.display());
            text += &engine("first", &command, "");
        }
        Engine::Sets => {
            for (name, command, kind) in [
                (
                    "hash",
                    "\"seawall-engine-hash\", \"--lists\", \"{signatures}\"",
                    "\"hash\"\nmay_allow = true",
                ),
                (
                    "fault",
                    &format!("\"{fault}\", \"--rules\", \"{{signatures}}/set.fault\""),
                    "[\"fault\"]",
                ),
                ("yara", "\"seawall-engine-yara\", \"--rules\", \"{signatures}\"", "\"yara\""),
            ] {
                let program =
                    format!("\"{}\"", program(&format!("seawall-engine-{name}")).display());
                let command = command.replace(&format!("\"seawall-engine-{name}\""), &program);
                text += &engine(
                    name,
                    &command,
                    &format!("signatures = {kind}\n{SHORT}\nload_timeout_s = 20\n"),
                );
            }
        }
        Engine::Fault => text += &engine("first", &format!("\"{fault}\""), SHORT),
        Engine::Patient => text += &engine("first", &format!("\"{fault}\""), ""),
        Engine::Three | Engine::ThreeWithoutTrust => {
            for name in ["one", "two", "three"] {
                let command = format!("\"{fault}\", \"--as\", \"{name}\"");
                let may = if name == "one" && setup.engine == Engine::Three {
                    "may_allow = true\n"
                } else {
                    ""
                };
                text += &engine(name, &command, &format!("{may}{SHORT}"));
            }
        }
    }
    for guest in &setup.guests {
        text += &format!(
            "\n[[guest]]\nname = \"{guest}\"\nregion = \"{dir}/{guest}.region\"\n\
             socket = \"{dir}/{guest}.sock\"\n"
        );
        for (_, lines) in setup.of_guests.iter().filter(|(name, _)| name == guest) {
            text += lines;
            text += "\n";
        }
    }
    let path = folder.join("seawalld.toml");
    std::fs::write(&path, text).expect("the folder is ours");
    path
}

fn spawn(folder: &Path, setup: &Setup, port: u16, log: &Arc<Mutex<String>>) -> Child {
    let config = write_config(folder, setup, port);
    let service = env!("CARGO_BIN_EXE_seawalld");
    let mut command = Command::new(service);
    if let Some(mib) = setup.state_mib {
        let state = folder.join("state");
        std::fs::create_dir_all(&state).expect("the folder is ours");
        let script = "mount -t tmpfs -o size=\"$0\" none \"$1\" && shift && exec \"$@\"";
        command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", script, &format!("{mib}m")]).arg(state).arg(service);
    }
    let mut child =
        command.arg("--config").arg(config).stderr(Stdio::piped()).spawn().expect("seawalld runs");
    let mut stderr = child.stderr.take().expect("it is piped");
    let log = Arc::clone(log);
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(len @ 1..) = stderr.read(&mut bytes) {
            log.lock().expect("no panic").push_str(&String::from_utf8_lossy(&bytes[..len]));
        }
    });
    child
}

pub trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

/// One end of a link on which a test can say anything.
pub struct Connection {
    pub stream: Box<dyn Stream>,
    pub decoder: Decoder,
    /// What the service last said of it.
    pub policy: Policy,
    /// The key of its ring, once the service has told it.
    pub ring: Option<RingKey>,
}

impl Connection {
    pub fn new(stream: impl Stream + 'static) -> Self {
        let (decoder, policy, ring) = Default::default();
        Self { stream: Box::new(stream), decoder, policy, ring }
    }

    /// Exchanges hellos and sends an attach message that proves `key`.
    pub fn attach(&mut self, key: &[u8; 32], region: RegionId) -> ToGuest {
        let peer = self.hello(&Hello::new([7; 32]));
        let key = seawall_proto::Key(*key);
        self.say(&ToHost::Attach(Attach {
            proof: Proof::new(&key, &peer.nonce, &[7; 32]),
            region,
            driver_version: "test".into(),
            kernel: "6.1\x1b[2J".into(),
            boot_id: "b".into(),
        }));
        let answer = self.hear().expect("an answer to the attach message");
        if let ToGuest::Attached(_) = answer {
            self.hear_policy();
        }
        answer
    }

    /// The policy, which is the next thing that the service says.
    pub fn hear_policy(&mut self) -> &Policy {
        let mut parts = PolicyParts::default();
        self.policy = loop {
            let Some(ToGuest::Policy(part)) = self.hear() else { panic!("no policy") };
            if let Some(policy) = parts.add(&part).expect("a policy") {
                break policy;
            }
        };
        &self.policy
    }

    pub fn hello(&mut self, ours: &Hello) -> Hello {
        self.raw(&ours.to_bytes());
        let mut theirs = [0; Hello::LEN];
        self.stream.read_exact(&mut theirs).expect("a hello");
        Hello::parse(&theirs).expect("a hello")
    }

    pub fn raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("the connection stands");
    }

    pub fn say(&mut self, message: &impl Message) {
        self.try_say(message).expect("the connection stands");
    }

    /// The same to a service that may be gone.
    pub fn try_say(&mut self, message: &impl Message) -> std::io::Result<()> {
        let mut wire = Vec::new();
        encode(message, &mut wire).expect("it is short");
        self.stream.write_all(&wire)
    }

    /// The next message; `None` when the service has ended the connection.
    pub fn hear(&mut self) -> Option<ToGuest> {
        loop {
            if let Some(payload) = self.decoder.next_payload().expect("frames") {
                match decode(payload).expect("a message").expect("one of this version") {
                    ToGuest::Ring(key) => self.ring = Some(key),
                    message => return Some(message),
                }
                continue;
            }
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(0) => return None,
                Ok(len) => self.decoder.extend(&bytes[..len]),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return None,
                // With a limit no read is begun again after a signal (signal(7)).
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => panic!("the service neither speaks nor ends: {error}"),
            }
        }
    }

    /// Whatever comes until the service ends the connection.
    pub fn hear_the_end(&mut self) -> Vec<ToGuest> {
        std::iter::from_fn(|| self.hear()).collect()
    }
}

/// A driver with a session.
pub struct Driver {
    pub connection: Connection,
    pub region: GuestRegion,
    pub attached: Attached,
    pub next_id: u64,
    /// Copied messages so far.
    pub copied: Vec<(RequestId, u32)>,
    /// Other messages that came while a verdict was waited for.
    pub said: Vec<ToGuest>,
}

impl Driver {
    /// Puts content into slots.
    pub fn fill(&self, content: &[u8]) -> (Vec<Slot>, Vec<SlotRef>) {
        let mut file = tempfile::tempfile().expect("a file");
        file.write_all(content).expect("room");
        let (mut slots, mut refs, mut at) = (Vec::new(), Vec::new(), 0);
        while at < content.len() as u64 {
            let mut slot = self.region.take_slot().expect("a free slot");
            let len = slot.fill(&file, at).expect("it is readable");
            refs.push(SlotRef { index: slot.index(), len });
            at += u64::from(len);
            slots.push(slot);
        }
        self.region.publish();
        (slots, refs)
    }

    pub fn request(&mut self, slots: Vec<SlotRef>, last: bool) -> ScanRequest {
        let id = RequestId(self.next_id);
        self.next_id += 1;
        ScanRequest {
            id,
            operation: Operation::Open,
            deadline_ms: 10_000,
            file: FileMetadata {
                path: serde_bytes::ByteBuf::from(b"/data/\x1b[2Jfile\xff".to_vec()),
                path_is_true: true,
                inode: (1, 2),
                size: slots.iter().map(|slot| u64::from(slot.len)).sum(),
                pid: 77,
            },
            part: Part::Slots(slots),
            last,
        }
    }

    pub fn say(&mut self, message: ToHost) {
        self.connection.say(&message);
    }

    /// Asks for a verdict on `content` and waits for it.
    pub fn scan(&mut self, content: &[u8]) -> Verdict {
        self.scan_of(None, content)
    }

    /// The same of a file with this path.
    pub fn scan_as(&mut self, path: &str, content: &[u8]) -> Verdict {
        self.scan_of(Some(path), content)
    }

    fn scan_of(&mut self, path: Option<&str>, content: &[u8]) -> Verdict {
        let (slots, refs) = self.fill(content);
        let mut request = self.request(refs, true);
        if let Some(path) = path {
            request.file.path = serde_bytes::ByteBuf::from(path.as_bytes().to_vec());
        }
        let id = request.id;
        self.say(ToHost::ScanRequest(request));
        let verdict = self.verdict(id);
        drop(slots);
        verdict
    }

    /// Names a content by its hash alone; `None` where the service wants the content.
    pub fn name(&mut self, operation: Operation, hash: [u8; 32]) -> Option<Verdict> {
        let mut request = self.request(Vec::new(), true);
        (request.operation, request.part) = (operation, Part::Hash(ContentHash(hash)));
        let wanted = request.id;
        self.say(ToHost::ScanRequest(request));
        loop {
            match self.connection.hear().expect("the session stands") {
                ToGuest::Verdict(verdict) if verdict.id == wanted => return Some(verdict),
                ToGuest::SendContent(id) if id == wanted => return None,
                other => self.said.push(other),
            }
        }
    }

    /// Waits for the verdict on one request.
    pub fn verdict(&mut self, id: RequestId) -> Verdict {
        loop {
            match self.connection.hear().expect("the session stands") {
                ToGuest::Verdict(verdict) if verdict.id == id => return verdict,
                ToGuest::Copied { id, slots } => self.copied.push((id, slots)),
                other => self.said.push(other),
            }
        }
    }

    /// The session's ring.
    pub fn ring(&mut self) -> GuestRing {
        self.heartbeat();
        while !matches!(self.connection.hear().expect("the session stands"), ToGuest::Alive) {}
        let key = self.connection.ring.clone().expect("it is told at the beginning");
        GuestRing::new(self.region.clone(), key)
    }

    /// The same, where others may have come before it.
    pub fn verdict_in_any_order(&mut self, id: RequestId) -> Verdict {
        let is_it = |said: &ToGuest| matches!(said, ToGuest::Verdict(verdict) if verdict.id == id);
        loop {
            if let Some(at) = self.said.iter().position(is_it)
                && let ToGuest::Verdict(verdict) = self.said.swap_remove(at)
            {
                return verdict;
            }
            let said = self.connection.hear().expect("the session stands");
            self.said.push(said);
        }
    }

    pub fn heartbeat(&mut self) {
        self.say(ToHost::Heartbeat(Heartbeat { events: 5, ..Heartbeat::default() }));
    }
}
