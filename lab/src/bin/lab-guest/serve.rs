//! The exec server: one thread and one request for each connection.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::{thread, time::Duration};

use anyhow::Context;
use rustix::process::{Pid, Signal};
use seawall_lab::wire::{self, AgentPart, AgentPids, Ended, Failed, FileInfo, Kind, Request};

use crate::exec;

/// Serves until killed.
pub fn run() -> anyhow::Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", wire::PORT)).context("cannot listen")?;
    for stream in listener.incoming() {
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                // Out of descriptors: wait for some to come back rather than die.
                eprintln!("lab-guest: accept: {error}");
                thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        thread::spawn(move || {
            if let Err(error) = answer(stream) {
                eprintln!("lab-guest: {error:#}");
            }
        });
    }
    Ok(())
}

fn answer(stream: TcpStream) -> anyhow::Result<()> {
    stream.set_nodelay(true)?;
    let mut from = BufReader::new(stream.try_clone()?);
    let mut to = stream.try_clone()?;
    let (kind, payload) = wire::read_frame(&mut from)?;
    anyhow::ensure!(kind == Kind::Request, "expected a request, got {kind:?}");
    match wire::parse::<Request>(&payload)? {
        Request::Ping => wire::write_json(&mut to, Kind::Ended, &Ended::default())?,
        Request::Exec(request) => exec::run(&request, from, stream)?,
        Request::Push { path, mode, owner } => {
            let done = receive(path.as_ref(), mode, owner, &mut from);
            if done.is_err() {
                // Closing with content unread would reset the connection and lose the reason.
                while matches!(wire::read_frame(&mut from), Ok((Kind::Stdin, _))) {}
            }
            finish(&mut to, &format!("write {path}"), done)?;
        }
        Request::Pull { path } => {
            let done = send(path.as_ref(), &mut to);
            finish(&mut to, &format!("read {path}"), done)?;
        }
        Request::AgentPids => wire::write_json(&mut to, Kind::Info, &agent_pids()?)?,
        Request::SignalAgent { part, signal } => {
            let done = signal_agent(part, signal);
            finish(&mut to, &format!("signal the agent's {part:?}"), done)?;
        }
        Request::PowerOff => {
            wire::write_json(&mut to, Kind::Ended, &Ended::default())?;
            rustix::fs::sync();
            rustix::system::reboot(rustix::system::RebootCommand::PowerOff)?;
        }
    }
    Ok(())
}

fn finish(to: &mut TcpStream, what: &str, done: io::Result<()>) -> io::Result<()> {
    match done {
        Ok(()) => wire::write_json(to, Kind::Ended, &Ended::default()),
        Err(error) => {
            let failed = Failed { what: format!("{what}: {error}"), errno: error.raw_os_error() };
            wire::write_json(to, Kind::Failed, &failed)
        }
    }
}

fn receive(path: &Path, mode: u32, owner: Option<u32>, from: &mut impl Read) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let mut file = create(path)?;
    loop {
        match wire::read_frame(from)? {
            (Kind::Stdin, bytes) => file.write_all(&bytes)?,
            (Kind::StdinEnd, _) => break,
            (kind, _) => return Err(io::Error::other(format!("unexpected frame {kind:?}"))),
        }
    }
    if let Some(id) = owner {
        std::os::unix::fs::fchown(&file, Some(id), Some(id))?;
    }
    // After fchown, which clears set-user-ID bits.
    file.set_permissions(fs::Permissions::from_mode(mode))
}

/// Opens for writing. A file that the kernel will not open (it is infected, or is a running program) is
/// replaced, so that a push depends on nothing that was there before.
fn create(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    options.open(path).or_else(|error| {
        use rustix::io::Errno;
        let replaceable = [Errno::PERM, Errno::TXTBSY, Errno::ACCESS];
        if replaceable.iter().any(|errno| Some(errno.raw_os_error()) == error.raw_os_error()) {
            fs::remove_file(path)?;
            return options.open(path);
        }
        Err(error)
    })
}

fn send(path: &Path, to: &mut TcpStream) -> io::Result<()> {
    let mut file = File::open(path)?;
    let metadata = file.metadata()?;
    let info = FileInfo { mode: metadata.mode() & 0o7777, size: metadata.len() };
    wire::write_json(to, Kind::FileInfo, &info)?;
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(());
        }
        wire::write_frame(to, Kind::Stdout, &buffer[..count])?;
    }
}

/// Finds the driver by its program's name: the supervisor is the one whose parent is not the driver.
fn agent_pids() -> io::Result<AgentPids> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let mut words = command.split(|byte| *byte == 0);
        let is_agent = words.next().is_some_and(|program| program.ends_with(b"seawall-agent"))
            && words.next() == Some(b"run".as_slice());
        // After the name in parentheses: state, parent.
        let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        let (state, parent) =
            (fields.next(), fields.next().and_then(|field| field.parse::<u32>().ok()));
        if let (true, Some(parent)) = (is_agent && state != Some("Z"), parent) {
            found.push((pid, parent));
        }
    }
    let supervisor = found
        .iter()
        .find(|(_, parent)| !found.iter().any(|(pid, _)| pid == parent))
        .map(|(pid, _)| *pid);
    let worker = found.iter().find(|(_, parent)| Some(*parent) == supervisor).map(|(pid, _)| *pid);
    Ok(AgentPids { supervisor, worker })
}

fn signal_agent(part: AgentPart, signal: i32) -> io::Result<()> {
    let pids = agent_pids()?;
    let pid = match part {
        AgentPart::Worker => pids.worker,
        AgentPart::Supervisor => pids.supervisor,
    };
    let pid = pid
        .and_then(|pid| Pid::from_raw(pid as i32))
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "it does not run"))?;
    let signal = Signal::from_named_raw(signal).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidInput, format!("no signal {signal}"))
    })?;
    Ok(rustix::process::kill_process(pid, signal)?)
}
