//! The host service of a lab: its configuration, its start and its end.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use toml::{Table, Value};

use crate::net::HOST;
use crate::options::{Engine, Link};
use crate::process::{Background, Process, tail};
use crate::qemu::SERVICE_PORT;
use crate::state::{LabState, Store};

/// Writes the configuration for a lab, with the caller's TOML laid over it.
pub fn write_config(state: &LabState, overlay: &str) -> anyhow::Result<()> {
    let guests = state.guests.iter().map(|guest| {
        let mut table = Table::new();
        table.insert("name".into(), guest.name.as_str().into());
        if state.region {
            table.insert("region".into(), text(&guest.region));
        }
        if state.key {
            table.insert("key_file".into(), text(&guest.key));
        }
        let socket = if state.link == Link::Serial { "serial_socket" } else { "socket" };
        table.insert(socket.into(), text(&guest.socket));
        Value::Table(table)
    });
    let tcp =
        if state.link == Link::Tcp { format!("{HOST}:{SERVICE_PORT}") } else { String::new() };
    let engines = state.engines.iter().map(|kind| engine(*kind));
    let mut config = base_config(
        &state.api_socket,
        &state.service_dir,
        engines.collect(),
        guests.collect(),
        &tcp,
        &[&state.rules, &state.signatures],
    );
    let mut clamd = Table::new();
    clamd.insert("socket".into(), text(&state.clamd_socket));
    config.insert("clamd".into(), clamd.into());
    let overlay: Table = overlay.parse().context("LabOptions::config is no valid TOML")?;
    lay_over(&mut config, overlay);
    fs::create_dir_all(&state.service_dir)?;
    Ok(fs::write(&state.config, config.to_string())?)
}

/// The configuration that lab and native mode share.
pub fn base_config(
    api_socket: &Path,
    service_dir: &Path,
    engines: Vec<Value>,
    guests: Vec<Value>,
    tcp: &str,
    watch: &[&Path],
) -> Table {
    let mut service = Table::new();
    service.insert("api_socket".into(), text(api_socket));
    service.insert("state_dir".into(), text(service_dir));
    service.insert("tcp_listen".into(), tcp.into());
    let mut config = Table::new();
    config.insert("service".into(), service.into());
    config.insert("engine".into(), Value::Array(engines));
    config.insert("guest".into(), Value::Array(guests));
    let mut signatures = Table::new();
    let watch = watch.iter().map(|folder| text(folder));
    signatures.insert("watch".into(), Value::Array(watch.collect()));
    config.insert("signatures".into(), signatures.into());
    config
}

/// An engine's section.
pub fn engine(kind: Engine) -> Value {
    let (program, option) = match kind {
        Engine::Yara => ("seawall-engine-yara", "--rules"),
        Engine::Clamav => ("seawall-engine-clamav", "--database"),
        Engine::Hash => ("seawall-engine-hash", "--lists"),
    };
    let mut engine = Table::new();
    engine.insert("name".into(), kind.as_str().into());
    let command = vec![program.into(), option.into(), "{signatures}".into()];
    engine.insert("command".into(), Value::Array(command));
    engine.insert("signatures".into(), kind.as_str().into());
    engine.insert("may_allow".into(), Value::Boolean(kind == Engine::Hash));
    Value::Table(engine)
}

fn text(path: &Path) -> Value {
    path.display().to_string().into()
}

/// Lays one table over another: tables merge, everything else is replaced.
pub fn lay_over(base: &mut Table, overlay: Table) {
    for (key, value) in overlay {
        match (base.get_mut(&key), value) {
            (Some(Value::Table(below)), Value::Table(above)) => lay_over(below, above),
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

/// Starts the service and waits until its REST socket answers.
pub fn start(store: &Store) -> anyhow::Result<()> {
    let state = store.load()?;
    if state.daemon.as_ref().is_some_and(Process::is_alive) {
        bail!("the service runs already");
    }
    let binaries = crate::Binaries::locate();
    let daemon = Background {
        program: binaries.daemon.as_os_str(),
        arguments: vec!["--config".into(), state.config.clone().into()],
        log: &state.daemon_log,
        netns: Some(&state.netns),
        bound: state.owner.is_some(),
    }
    .start()?;
    store.update(|state| {
        state.daemon = Some(daemon.clone());
        Ok(())
    })?;
    wait_ready(&state.api_socket, &daemon, &state.daemon_log)?;
    // The test may have switched it off, or put it elsewhere.
    let config: Table = fs::read_to_string(&state.config)?.parse()?;
    let clamd = config.get("clamd").and_then(|clamd| clamd.get("socket")).and_then(Value::as_str);
    match clamd {
        None | Some("") => Ok(()),
        Some(socket) => wait_ready(Path::new(socket), &daemon, &state.daemon_log),
    }
}

/// Waits until a service answers on one of its sockets.
pub fn wait_ready(socket: &Path, daemon: &Process, log: &Path) -> anyhow::Result<()> {
    let until = Instant::now() + Duration::from_secs(30);
    while UnixStream::connect(socket).is_err() {
        if !daemon.is_alive() {
            bail!("the service ended while it started\n{}", tail(log, 30));
        }
        if Instant::now() > until {
            bail!("the service does not answer at {}\n{}", socket.display(), tail(log, 30));
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// The service's engine processes: its children, by the name of their program.
pub fn engines(state: &LabState) -> Vec<Process> {
    let is_engine = |process: &Process| {
        let command = fs::read(format!("/proc/{}/cmdline", process.pid)).unwrap_or_default();
        let program = command.split(|byte| *byte == 0).next().unwrap_or_default();
        Path::new(OsStr::new(&*String::from_utf8_lossy(program)))
            .file_name()
            .is_some_and(|name| name.to_string_lossy().contains("engine"))
    };
    let children = state.daemon.iter().flat_map(Process::children);
    children.filter(is_engine).collect()
}
