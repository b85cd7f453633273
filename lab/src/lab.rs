//! A whole lab: up, at work, down.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail, ensure};

use crate::binaries::{Binaries, Need, ensure_binaries};
use crate::guest::Guest;
use crate::net::{self, GuestNet};
use crate::options::{Image, LabOptions};
use crate::process::{self, Process, tail};
use crate::state::{LabState, Store};
use crate::{daemon, debian, paths, qemu, rules, setup};

/// Ends when systemd has nothing left to start and udev has seen every device.
const DEBIAN_IS_UP: &str = "until systemctl --quiet is-active multi-user.target; do sleep 0.3; done; \
                            udevadm settle; systemctl is-system-running --wait >/dev/null; true";

/// A lab that is up. Dropping one that was not made to be kept takes it down.
#[derive(Debug)]
pub struct Lab {
    store: Store,
    name: String,
    keep: bool,
}

impl Lab {
    /// Builds what is needed, boots, and waits until every guest answers and is protected.
    pub fn up(options: LabOptions) -> anyhow::Result<Self> {
        options.check()?;
        qemu::check_socket_length(&options.name)?;
        setup::ensure()?;
        build(&options)?;
        if options.image == Image::Debian {
            debian::ensure_image()?;
        }
        sweep()?;
        let store = Store::new(&options.name);
        match store.find()? {
            Some(state) if state.ready => {
                bail!(
                    "lab `{0}` is up already; `cargo xtask lab --name {0} down` first",
                    options.name
                )
            }
            // What is left of a start that failed.
            Some(_) => take_down(&options.name)?,
            None => {}
        }
        let lab = Self { store, name: options.name.clone(), keep: options.keep };
        lab.make(&options)?;
        Ok(lab)
    }

    /// A lab that is up already.
    pub fn open(name: &str) -> anyhow::Result<Self> {
        let store = Store::new(name);
        store.load()?;
        Ok(Self { store, name: name.to_owned(), keep: true })
    }

    /// Takes a lab down, also one that came only half way. Does nothing where there is none.
    pub fn down(name: &str) -> anyhow::Result<()> {
        take_down(name)
    }

    /// Names of the labs of this source tree.
    pub fn names() -> Vec<String> {
        let entries = fs::read_dir(paths::labs_dir()).into_iter().flatten().flatten();
        let mut names: Vec<String> =
            entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort();
        names
    }

    fn make(&self, options: &LabOptions) -> anyhow::Result<()> {
        let state = LabState::plan(options);
        claim_run_dir(&state)?;
        fs::create_dir_all(&state.state_dir)?;
        self.store.save(&state)?;
        let nets: Vec<GuestNet> =
            state.guests.iter().map(|guest| GuestNet::new(guest.index)).collect();
        net::create(&state.netns, &nets)?;
        if options.rules.is_none() {
            rules::write_rules(&state.rules)?;
        }
        rules::write_signatures(&state.signatures)?;
        daemon::write_config(&state, &options.config)?;
        for guest in &state.guests {
            qemu::make_disks(guest)?;
        }
        // Where QEMU wants keys, the service has to write them first.
        if state.key && options.daemon {
            daemon::start(&self.store)?;
        }
        // Else guests first: they take longer, and the service comes up beside them.
        for guest in &state.guests {
            qemu::start(&self.store, &guest.name, None)?;
        }
        if options.daemon && !state.key {
            daemon::start(&self.store)?;
        }
        self.wait_ready()?;
        self.store.update(|state| {
            state.ready = true;
            Ok(())
        })
    }

    /// Waits until every guest answers and, where the driver runs, is protected.
    pub fn wait_ready(&self) -> anyhow::Result<()> {
        let state = self.state()?;
        // Bounds, not expectations: an initramfs guest needs three seconds on an idle machine.
        let seconds = if state.image == Image::Debian { 300 } else { 60 };
        let timeout = Duration::from_secs(seconds + 20 * state.guests.len() as u64);
        let failures = Mutex::new(Vec::new());
        thread::scope(|scope| {
            for guest in &state.guests {
                let failures = &failures;
                let state = &state;
                scope.spawn(move || {
                    if let Err(error) = self.wait_guest(&guest.name, state, timeout) {
                        failures
                            .lock()
                            .unwrap_or_else(|poisoned| poisoned.into_inner())
                            .push(error);
                    }
                });
            }
        });
        let failures = failures.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
        match failures.into_iter().next() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    fn wait_guest(&self, name: &str, state: &LabState, timeout: Duration) -> anyhow::Result<()> {
        let until = Instant::now() + timeout;
        let guest = self.guest(name)?;
        guest.wait_exec(timeout)?;
        if state.image == Image::Debian {
            let left = until.saturating_duration_since(Instant::now());
            let output = guest.command(["sh", "-c", DEBIAN_IS_UP]).timeout(left).run()?;
            ensure!(
                output.success(),
                "systemd of {name} is not up\n{}",
                tail(&guest.state()?.console, 30)
            );
        }
        if state.agent && state.with_daemon {
            guest.wait_protected(
                Duration::from_secs(30).max(until.saturating_duration_since(Instant::now())),
            )?;
        }
        Ok(())
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where everything is.
    pub fn state(&self) -> anyhow::Result<LabState> {
        self.store.load()
    }

    /// A guest by its name.
    pub fn guest(&self, name: &str) -> anyhow::Result<Guest> {
        Guest::new(self.store.clone(), name)
    }

    /// All guests in order.
    pub fn guests(&self) -> anyhow::Result<Vec<Guest>> {
        self.state()?.guests.iter().map(|guest| self.guest(&guest.name)).collect()
    }

    /// The operator's command line, set to talk to the lab's service.
    pub fn cli_command(&self) -> anyhow::Result<Command> {
        let mut command = Command::new(Binaries::locate().cli);
        command.env("SEAWALL_SOCKET", self.state()?.api_socket);
        Ok(command)
    }

    /// Runs the operator's command line against the lab's service.
    pub fn cli<S: AsRef<OsStr>>(
        &self,
        words: impl IntoIterator<Item = S>,
    ) -> anyhow::Result<Output> {
        self.cli_command()?.args(words).output().context("cannot run the command line")
    }

    /// Starts the service and waits until it answers.
    pub fn start_daemon(&self) -> anyhow::Result<()> {
        daemon::start(&self.store)
    }

    /// Ends the service in order.
    pub fn stop_daemon(&self) -> anyhow::Result<()> {
        self.end_daemon(|process| process.terminate(Duration::from_secs(10)))
    }

    /// Kills the service with SIGKILL.
    pub fn kill_daemon(&self) -> anyhow::Result<()> {
        self.end_daemon(Process::kill)
    }

    fn end_daemon(&self, end: impl FnOnce(&Process) -> anyhow::Result<()>) -> anyhow::Result<()> {
        let daemon =
            self.state()?.daemon.filter(Process::is_alive).context("the service does not run")?;
        end(&daemon)?;
        // Until then its socket may still answer.
        ensure!(daemon.wait_gone(Duration::from_secs(10)), "the service does not end");
        self.store.update(|state| {
            state.daemon = None;
            Ok(())
        })
    }

    /// The service, while it runs.
    pub fn daemon(&self) -> anyhow::Result<Option<Process>> {
        Ok(self.state()?.daemon.filter(Process::is_alive))
    }

    /// The service's engine processes.
    pub fn engines(&self) -> anyhow::Result<Vec<Process>> {
        Ok(daemon::engines(&self.state()?))
    }

    /// Kills every engine process with SIGKILL and says how many.
    pub fn kill_engines(&self) -> anyhow::Result<usize> {
        let engines = self.engines()?;
        for engine in &engines {
            engine.kill()?;
        }
        Ok(engines.len())
    }

    /// Writes the service's configuration anew with other TOML laid over it. The service reads it at its
    /// next start, or at SIGHUP.
    pub fn set_config(&self, overlay: &str) -> anyhow::Result<()> {
        daemon::write_config(&self.state()?, overlay)
    }

    /// What the service has logged.
    pub fn daemon_log(&self) -> anyhow::Result<String> {
        Ok(String::from_utf8_lossy(&fs::read(self.state()?.daemon_log)?).into_owned())
    }

    /// Leaves the lab up when this value is dropped.
    pub fn keep(&mut self) {
        self.keep = true;
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !self.keep
            && let Err(error) = take_down(&self.name)
        {
            eprintln!("lab: {} is not down: {error:#}", self.name);
        }
    }
}

fn build(options: &LabOptions) -> anyhow::Result<()> {
    ensure_binaries(Need { agent: options.agent, host: options.daemon }).map(drop)
}

/// Makes the folder of sockets, which all source trees on this machine share by name.
fn claim_run_dir(state: &LabState) -> anyhow::Result<()> {
    let owner = state.run_dir.join("owner");
    if let Ok(text) = fs::read_to_string(&owner)
        && Path::new(&text) != state.state_dir
    {
        bail!("another source tree has a lab `{}` ({text}); choose another --name", state.name);
    }
    fs::create_dir_all(&state.run_dir)?;
    Ok(fs::write(owner, state.state_dir.as_os_str().as_encoded_bytes())?)
}

/// Takes down labs whose owner died without doing so.
fn sweep() -> anyhow::Result<()> {
    for name in Lab::names() {
        if let Ok(Some(LabState { owner: Some(owner), .. })) = Store::new(&name).find()
            && !owner.is_alive()
        {
            take_down(&name)?;
        }
    }
    Ok(())
}

fn take_down(name: &str) -> anyhow::Result<()> {
    let (run_dir, state_dir, netns) =
        (paths::run_dir(name), paths::state_dir(name), paths::netns(name));
    if let Ok(text) = fs::read_to_string(run_dir.join("owner"))
        && Path::new(&text) != state_dir
    {
        // A lab of that name, but another source tree's.
        return remove(&state_dir);
    }
    if let Ok(Some(state)) = Store::new(name).find() {
        end_all(&state.processes())?;
    }
    // What was started but not yet recorded, and the children of what was.
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        let left = process::in_netns(&netns);
        if left.is_empty() {
            break;
        }
        ensure!(Instant::now() < until, "{} processes stay in {netns}", left.len());
        end_all(&left)?;
    }
    net::destroy(&netns)?;
    remove(&run_dir)?;
    remove(&state_dir)
}

/// Signals all before it waits for any: QEMU takes a moment to give its memory back.
fn end_all(processes: &[Process]) -> anyhow::Result<()> {
    for process in processes {
        process.signal(rustix::process::Signal::KILL);
    }
    let mut stuck = processes.iter().filter(|process| !process.wait_gone(Duration::from_secs(20)));
    match stuck.next() {
        Some(process) => Err(anyhow!("process {} outlives its SIGKILL", process.pid)),
        None => Ok(()),
    }
}

fn remove(folder: &Path) -> anyhow::Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", folder.display()))
        }
        _ => Ok(()),
    }
}
