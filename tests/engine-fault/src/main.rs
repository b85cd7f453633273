//! An engine that misbehaves when the content says so, to test what surrounds an engine.
//!
//! `seawall-engine-fault [--rules FILE | --as NAME | --scannerless | --by-descriptor]`. Content that starts with `SEAWALL-FAULT ` and
//!
//! | word | does |
//! |---|---|
//! | `sleep=MS` | sleeps, then reports clean |
//! | `crash` | aborts |
//! | `panic` | panics |
//! | `hang` | never ends |
//! | `error` | reports an error |
//! | `memory` | allocates until it cannot |
//! | `escape` | tries to leave the sandbox; infected with `escaped` when anything works |
//! | `read` | sleeps 1.5 s, then reads the whole content |
//! | `swallow` | sleeps 1.5 s, reads the whole content, and says clean whether that worked or not |
//! | `keep` | reads the whole content, sleeps 1.5 s, then looks at all of it |
//! | `until-cancelled` | works until it is cancelled |
//! | `gives-up` | says that it was cancelled |
//! | `slow=WHAT` | gives up for want of time, because of WHAT |
//! | `left` | infected with `left`, after 200 ms and with the time used as the family |
//! | `found=NAME`, `found=NAME/SEVERITY` | infected with NAME |
//! | `allow=ENTRY` | known to be good by ENTRY |
//! | `slow-allow=ENTRY` | the same after 300 ms |
//! | `way` | infected with `way`, how the content came and how many dots are in it |
//! | `seen` | infected with `seen`, path, guest and size as the engine got them |
//!
//! All other content is clean. `NAME:WORD,NAME:WORD` gives each of several engines its own word. FILE stands for a signature set: its first 32 bytes are the
//! generation, each line that holds `broken` is an error; `load-ms=MS` makes loading take as long, `load-crash` aborts it,
//! `load-memory` allocates until it cannot.

use std::fs::File;
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::Duration;

use seawall_engine::runtime::{Engine, LoadError, Request, ScanError, Scanner, run};
use seawall_engine::{Description, Detection, Diagnostic, Generation, Outcome, Severity};

const MARK: &[u8] = b"SEAWALL-FAULT ";

fn main() -> ExitCode {
    run(|_| Fault::load())
}

struct Fault {
    name: String,
    generation: Generation,
    diagnostics: Vec<Diagnostic>,
    no_scanner: bool,
    by_descriptor: bool,
}

impl Fault {
    fn load() -> Result<Self, LoadError> {
        let mut generation = Generation([0; 32]);
        let mut diagnostics = Vec::new();
        let mut name = String::new();
        let mut arguments = std::env::args_os().skip(1);
        let first = arguments.next().unwrap_or_default();
        if first == "--as" {
            name = arguments.next().unwrap_or_default().to_string_lossy().into_owned();
        } else if first == "--rules" {
            let path = PathBuf::from(arguments.next().unwrap_or_default());
            let text = std::fs::read(&path).map_err(|error| {
                Diagnostic::error("fault-read", error.to_string()).in_file(&path)
            })?;
            for (to, from) in generation.0.iter_mut().zip(&text) {
                *to = *from;
            }
            misbehave_loading(&String::from_utf8_lossy(&text));
            for (number, line) in String::from_utf8_lossy(&text).lines().enumerate() {
                if line.contains("broken") {
                    let one = Diagnostic::error("fault-broken", "this line is broken");
                    diagnostics.push(Diagnostic { line: number as u32 + 1, ..one.in_file(&path) });
                }
            }
        }
        let no_scanner = first == "--scannerless";
        let by_descriptor = first == "--by-descriptor";
        Ok(Self { name, generation, diagnostics, no_scanner, by_descriptor })
    }
}

fn misbehave_loading(text: &str) {
    for line in text.lines() {
        if let Some(ms) = line.strip_prefix("load-ms=") {
            thread::sleep(Duration::from_millis(ms.parse().unwrap_or(0)));
        } else if line == "load-crash" {
            std::process::abort();
        } else if line == "load-memory" {
            let mut all = Vec::new();
            loop {
                all.push(vec![1_u8; 1 << 20]);
            }
        }
    }
}

impl Engine for Fault {
    fn describe(&self) -> Description {
        Description::new("fault", env!("CARGO_PKG_VERSION"), self.generation)
            .with_rules(1)
            .with_by_descriptor(self.by_descriptor)
            .with_diagnostics(self.diagnostics.clone())
    }

    fn scanner(&self) -> Result<Box<dyn Scanner + '_>, LoadError> {
        if self.no_scanner {
            return Err(LoadError::new("fault-scanner", "asked to have none"));
        }
        Ok(Box::new(FaultScanner { name: &self.name }))
    }
}

struct FaultScanner<'a> {
    name: &'a str,
}

impl Scanner for FaultScanner<'_> {
    fn scan(&mut self, request: &Request<'_>) -> Result<Outcome, ScanError> {
        let Request { content, metadata, .. } = request;
        let mut head = [0; 64];
        let length = content.read_at(0, &mut head)?;
        let Some(order) = head[..length].strip_prefix(MARK) else { return Ok(Outcome::Clean) };
        let end = order.iter().position(|byte| byte.is_ascii_whitespace() || *byte == 0);
        let orders = String::from_utf8_lossy(&order[..end.unwrap_or(order.len())]);
        let own = format!("{}:", self.name);
        let order = orders.split(',').find_map(|order| match order.strip_prefix(&own) {
            Some(word) => Some(word),
            None => (!order.contains(':')).then_some(order),
        });
        let Some(order) = order else { return Ok(Outcome::Clean) };
        match order.split_once('=').unwrap_or((order, "")) {
            ("sleep", millis) => {
                thread::sleep(Duration::from_millis(millis.parse().unwrap_or(0)));
                Ok(Outcome::Clean)
            }
            ("until-cancelled", _) => {
                while !request.is_cancelled() {
                    thread::sleep(Duration::from_millis(1));
                }
                Err(ScanError::Cancelled)
            }
            ("gives-up", _) => Err(ScanError::Cancelled),
            ("slow", what) => Err(ScanError::TimedOutIn { what: what.to_owned() }),
            ("left", _) => {
                thread::sleep(Duration::from_millis(200));
                let used = request.limit - request.left();
                Ok(found("left", Some(used.as_millis().to_string())))
            }
            ("found", what) => {
                let (name, severity) = what.split_once('/').unwrap_or((what, "high"));
                let severity = severity.parse().unwrap_or(Severity::High);
                Ok(Outcome::Infected(vec![Detection { severity, ..Detection::new(name) }]))
            }
            ("slow-allow", name) => {
                thread::sleep(Duration::from_millis(300));
                Ok(Outcome::Allowed { name: name.to_owned() })
            }
            ("allow", name) => Ok(Outcome::Allowed { name: name.to_owned() }),
            ("crash", _) => std::process::abort(),
            ("crash-after", millis) => {
                thread::sleep(Duration::from_millis(millis.parse().unwrap_or(0)));
                std::process::abort()
            }
            ("panic", _) => panic!("asked to"),
            ("hang", _) => loop {
                thread::sleep(Duration::from_secs(3600));
            },
            ("error", _) => Err(ScanError::Failed { reason: "asked to".into() }),
            ("memory", _) => Ok(eat_memory()),
            ("escape", _) => Ok(found("escaped", escape())),
            ("read", _) => {
                thread::sleep(Duration::from_millis(1500));
                content.bytes()?;
                Ok(Outcome::Clean)
            }
            ("swallow", _) => {
                thread::sleep(Duration::from_millis(1500));
                let _unread = content.bytes();
                Ok(Outcome::Clean)
            }
            ("keep", _) => {
                let bytes = content.bytes()?;
                thread::sleep(Duration::from_millis(1500));
                let dots = bytes.iter().filter(|byte| **byte == b'.').count();
                Ok(found("kept", Some(dots.to_string())))
            }
            ("way", _) => {
                let dots = content.bytes()?.iter().filter(|byte| **byte == b'.').count();
                let way = if content.descriptor().is_some() { "descriptor" } else { "message" };
                Ok(found("way", Some(format!("{way} {dots}"))))
            }
            ("seen", _) => {
                let path = String::from_utf8_lossy(&metadata.path);
                let seen = format!("{path} {} {}", metadata.guest, metadata.size);
                Ok(found("seen", Some(seen)))
            }
            _ => Ok(Outcome::Clean),
        }
    }
}

fn found(name: &str, what: Option<String>) -> Outcome {
    what.map_or(Outcome::Clean, |family| {
        Outcome::Infected(vec![Detection { family: Some(family), ..Detection::new(name) }])
    })
}

/// Ends with the process, unless the memory limit does not hold: 64 GiB of touched pages are more
/// than any test allows.
fn eat_memory() -> Outcome {
    let mut eaten: Vec<Vec<u8>> = Vec::new();
    for _ in 0..1024 {
        eaten.push(vec![1; 64 << 20]);
    }
    found("ate", Some(format!("{} pieces of 64 MiB", eaten.len())))
}

/// What of the outside could be reached.
fn escape() -> Option<String> {
    let mut reached = Vec::new();
    if File::open("/etc/passwd").is_ok() {
        reached.push("open");
    }
    if File::create("/tmp/seawall-escaped").is_ok() {
        reached.push("create");
    }
    // The listener of another test would do, too: only the answer "not permitted" is right.
    match TcpStream::connect("127.0.0.1:1") {
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {}
        _ => reached.push("connect"),
    }
    if std::os::unix::net::UnixDatagram::pair().is_ok() {
        reached.push("socket");
    }
    if Command::new("/bin/true").spawn().is_ok() {
        reached.push("exec");
    }
    if thread::Builder::new().spawn(|| ()).is_ok() {
        reached.push("thread");
    }
    (!reached.is_empty()).then(|| reached.join(" "))
}
