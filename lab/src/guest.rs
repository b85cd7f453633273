//! One guest, as tests and people use it.

use std::fs;
use std::io::{self, BufReader, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use rustix::process::Signal;
use serde_json::json;

use crate::options::{Image, Link};
use crate::process::{Process, tail};
use crate::state::{GuestState, LabState, Store};
use crate::wire::{self, AgentPart, AgentPids, Ended, Exec, Failed, FileInfo, Kind, Request};
use crate::{net, qemu, qmp};

/// How long a command may take unless it is told otherwise. Guests are emulated; this is generous.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// How long the lab waits for the exec server beyond a command's own time-out.
const GRACE: Duration = Duration::from_secs(10);

/// A guest of a lab. Cheap to clone, and good for use from several threads.
#[derive(Debug, Clone)]
pub struct Guest {
    store: Store,
    name: String,
}

/// What a command left behind.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Output {
    /// Exit status, or 128 plus the signal's number. As in a shell 127 when the program is not there and
    /// 126 when the kernel would not run it.
    pub status: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// True when the time-out killed the command.
    pub timed_out: bool,
    /// Why execve failed, for 126 and 127: 1 is EPERM.
    pub errno: Option<i32>,
}

impl Output {
    /// Whether it ended with status 0.
    pub fn success(&self) -> bool {
        self.status == 0 && !self.timed_out
    }

    /// Standard output as text, without the white space at its end.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim_end().to_owned()
    }

    /// Standard error as text, without the white space at its end.
    pub fn error_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr).trim_end().to_owned()
    }

    /// The output of a success; an error with all there is otherwise.
    pub fn ok(self) -> anyhow::Result<Self> {
        if self.success() {
            return Ok(self);
        }
        let end =
            if self.timed_out { "timed out".to_owned() } else { format!("status {}", self.status) };
        bail!(
            "the command ended with {end}\nstdout: {}\nstderr: {}",
            self.text(),
            self.error_text()
        )
    }
}

/// Why a file could not be read or written in the guest.
#[derive(Debug)]
pub enum FileError {
    /// The guest's kernel said no, with this error number (1 is EPERM).
    Errno(i32, String),
    /// The guest could not be asked.
    Other(anyhow::Error),
}

impl FileError {
    /// The guest's error number.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Errno(errno, _) => Some(*errno),
            Self::Other(_) => None,
        }
    }
}

impl std::fmt::Display for FileError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Errno(_, what) => f.write_str(what),
            Self::Other(error) => write!(f, "{error:#}"),
        }
    }
}

impl std::error::Error for FileError {}

impl From<io::Error> for FileError {
    fn from(error: io::Error) -> Self {
        Self::Other(error.into())
    }
}

impl Guest {
    pub(crate) fn new(store: Store, name: &str) -> anyhow::Result<Self> {
        store.load()?.guest(name)?;
        Ok(Self { store, name: name.to_owned() })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where its parts are.
    pub fn state(&self) -> anyhow::Result<GuestState> {
        Ok(self.store.load()?.guest(&self.name)?.clone())
    }

    fn lab(&self) -> anyhow::Result<LabState> {
        self.store.load()
    }

    /// Runs a command as root and waits for it, at most a minute.
    pub fn exec<S: AsRef<str>>(
        &self,
        words: impl IntoIterator<Item = S>,
    ) -> anyhow::Result<Output> {
        self.command(words).run()
    }

    /// Runs a shell script.
    pub fn sh(&self, script: &str) -> anyhow::Result<Output> {
        self.exec(["sh", "-c", script])
    }

    /// A command with settings of its own.
    pub fn command<S: AsRef<str>>(&self, words: impl IntoIterator<Item = S>) -> Command {
        let argv = words.into_iter().map(|word| word.as_ref().to_owned()).collect();
        Command {
            guest: self.clone(),
            exec: Exec { argv, ..Exec::default() },
            timeout: Some(COMMAND_TIMEOUT),
            input: None,
        }
    }

    /// Starts a command and comes back at once.
    pub fn spawn<S: AsRef<str>>(
        &self,
        words: impl IntoIterator<Item = S>,
    ) -> anyhow::Result<Running> {
        self.command(words).no_timeout().spawn()
    }

    /// Copies a file into the guest with its permission bits.
    pub fn push(&self, local: &Path, remote: &str) -> anyhow::Result<()> {
        let mut file =
            fs::File::open(local).with_context(|| format!("cannot open {}", local.display()))?;
        let mode = file.metadata()?.permissions().mode() & 0o7777;
        self.push_from(&mut file, remote, mode, None).map_err(|error| self.explain(anyhow!(error)))
    }

    /// Writes a file in the guest.
    pub fn push_bytes(&self, content: &[u8], remote: &str, mode: u32) -> anyhow::Result<()> {
        self.write(content, remote, mode, None).map_err(|error| self.explain(anyhow!(error)))
    }

    /// Writes a file in the guest, owned by a user if one is named; the error tells the guest's errno.
    pub fn write(
        &self,
        content: &[u8],
        remote: &str,
        mode: u32,
        owner: Option<u32>,
    ) -> Result<(), FileError> {
        self.push_from(&mut &content[..], remote, mode, owner)
    }

    fn push_from(
        &self,
        content: &mut impl io::Read,
        remote: &str,
        mode: u32,
        owner: Option<u32>,
    ) -> Result<(), FileError> {
        let request = Request::Push { path: remote.to_owned(), mode, owner };
        let mut connection = self.ask(&request, COMMAND_TIMEOUT).map_err(FileError::Other)?;
        let mut buffer = vec![0; 256 * 1024];
        loop {
            let count = content.read(&mut buffer)?;
            // A refusal ends the server's reading; its answer says why, a broken pipe does not.
            let end = if count == 0 { Kind::StdinEnd } else { Kind::Stdin };
            if wire::write_frame(connection.get_mut(), end, &buffer[..count]).is_err() || count == 0
            {
                break;
            }
        }
        last_frame(&mut connection).map(drop)
    }

    /// Copies a file out of the guest with its permission bits.
    pub fn pull(&self, remote: &str, local: &Path) -> anyhow::Result<()> {
        let mut file = None;
        let done = self.pull_into(remote, |info, bytes| {
            if file.is_none() {
                let mut options = fs::File::options();
                options.create(true).truncate(true).write(true).mode(0o600);
                file = Some((options.open(local)?, info.mode));
            }
            file.as_mut().map_or(Ok(()), |(file, _)| file.write_all(bytes))
        });
        done.map_err(|error| self.explain(anyhow!(error)))?;
        if let Some((file, mode)) = file {
            file.set_permissions(fs::Permissions::from_mode(mode))?;
        }
        Ok(())
    }

    /// Reads a file of the guest; the error tells the guest's errno.
    pub fn read(&self, remote: &str) -> Result<Vec<u8>, FileError> {
        let mut content = Vec::new();
        self.pull_into(remote, |_, bytes| {
            content.extend_from_slice(bytes);
            Ok(())
        })?;
        Ok(content)
    }

    /// Calls back once with no bytes, so that an empty file is seen too.
    fn pull_into(
        &self,
        remote: &str,
        mut receive: impl FnMut(FileInfo, &[u8]) -> io::Result<()>,
    ) -> Result<(), FileError> {
        let request = Request::Pull { path: remote.to_owned() };
        let mut connection = self.ask(&request, COMMAND_TIMEOUT).map_err(FileError::Other)?;
        let mut info = FileInfo { mode: 0, size: 0 };
        loop {
            match wire::read_frame(&mut connection)? {
                (Kind::FileInfo, bytes) => {
                    info = wire::parse(&bytes)?;
                    receive(info, &[])?;
                }
                (Kind::Stdout, bytes) => receive(info, &bytes)?,
                (kind, bytes) => return end(kind, &bytes).map(drop),
            }
        }
    }

    /// Opens a connection and sends the request. `patience` bounds the wait for each answer.
    fn ask(&self, request: &Request, patience: Duration) -> anyhow::Result<BufReader<TcpStream>> {
        let state = self.lab()?;
        let guest = state.guest(&self.name)?;
        let ask = || -> anyhow::Result<BufReader<TcpStream>> {
            anyhow::ensure!(guest.qemu.as_ref().is_some_and(Process::is_alive), "it is off");
            let stream =
                net::connect(&state.netns, guest.management, wire::PORT, Duration::from_secs(10))?;
            stream.set_nodelay(true)?;
            stream.set_read_timeout(Some(patience + GRACE))?;
            stream.set_write_timeout(Some(patience + GRACE))?;
            wire::write_json(&mut &stream, Kind::Request, request)?;
            Ok(BufReader::new(stream))
        };
        ask().map_err(|error| {
            self.explain(error.context(format!("{} does not answer the lab", self.name)))
        })
    }

    /// Adds the end of the console to an error.
    fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        let Ok(guest) = self.state() else { return error };
        let ran = if guest.qemu.as_ref().is_some_and(Process::is_alive) {
            "runs"
        } else {
            "does not run"
        };
        anyhow!("{error:#}\nQEMU of {} {ran}\n{}", self.name, tail(&guest.console, 15))
    }

    /// Waits until the exec server answers.
    pub fn wait_exec(&self, timeout: Duration) -> anyhow::Result<()> {
        let until = Instant::now() + timeout;
        let state = self.lab()?;
        let guest = state.guest(&self.name)?;
        let ping = || -> anyhow::Result<()> {
            let stream = net::connect(
                &state.netns,
                guest.management,
                wire::PORT,
                Duration::from_millis(250),
            )?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            wire::write_json(&mut &stream, Kind::Request, &Request::Ping)?;
            wire::read_frame(&mut &stream)?;
            Ok(())
        };
        while ping().is_err() {
            let late = Instant::now() >= until;
            if late || !self.is_running() {
                let why = if late {
                    format!("does not answer after {timeout:?}")
                } else {
                    "has ended".into()
                };
                bail!(
                    "{} {why}\n{}\n{}",
                    self.name,
                    tail(&guest.console, 30),
                    tail(&guest.log, 10)
                );
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// The driver's processes; seen without opening a file of the guest's disks.
    pub fn agent_pids(&self) -> anyhow::Result<AgentPids> {
        let mut connection = self.ask(&Request::AgentPids, GRACE)?;
        let (kind, bytes) = wire::read_frame(&mut connection)?;
        anyhow::ensure!(kind == Kind::Info, "unexpected answer {kind:?}");
        Ok(wire::parse(&bytes)?)
    }

    /// Kills one of the driver's processes with SIGKILL.
    pub fn kill_agent(&self, part: AgentPart) -> anyhow::Result<()> {
        self.signal_agent(part, Signal::KILL.as_raw())
    }

    /// Sends a signal to one of the driver's processes.
    pub fn signal_agent(&self, part: AgentPart, signal: i32) -> anyhow::Result<()> {
        let mut connection = self.ask(&Request::SignalAgent { part, signal }, GRACE)?;
        Ok(last_frame(&mut connection).map(drop)?)
    }

    /// The driver's own view, `seawall-agent status --json`.
    pub fn agent_status(&self) -> anyhow::Result<Output> {
        self.exec(["/usr/lib/seawall/seawall-agent", "status", "--json"])
    }

    /// Waits until the driver says that the guest is protected.
    pub fn wait_protected(&self, timeout: Duration) -> anyhow::Result<()> {
        let until = Instant::now() + timeout;
        loop {
            let status =
                self.command(["/usr/lib/seawall/seawall-agent", "status"]).timeout(GRACE).run()?;
            if status.success() {
                return Ok(());
            }
            if Instant::now() >= until {
                let log = self.read("/run/seawall/agent.log").unwrap_or_default();
                let state = self.lab()?;
                bail!(
                    "{} is not protected after {timeout:?}; `seawall-agent status` ends with {}:\n{}{}\n--- agent.log\n{}\n{}",
                    self.name,
                    status.status,
                    status.text(),
                    status.error_text(),
                    String::from_utf8_lossy(&log),
                    tail(&state.daemon_log, 20)
                );
            }
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Stops the driver on purpose: it unmarks, answers all, ends, and is not started again.
    pub fn stop_agent(&self) -> anyhow::Result<()> {
        // In the small system exit status 0 is the sign for init; systemd has it in the unit.
        self.exec(["/usr/lib/seawall/seawall-agent", "stop"])?.ok()?;
        let until = Instant::now() + GRACE;
        while self.agent_pids()? != AgentPids::default() {
            anyhow::ensure!(Instant::now() < until, "the driver of {} does not end", self.name);
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Starts the driver again after [`Guest::stop_agent`]; the caller waits for protection.
    pub fn start_agent(&self) -> anyhow::Result<()> {
        let words: &[&str] = match self.lab()?.image {
            Image::Debian => &["systemctl", "start", "seawall-agent"],
            Image::Initramfs => &["rm", "-f", "/run/seawall/hold"],
        };
        self.exec(words)?.ok().map(drop)
    }

    /// Silences the link: what is sent arrives nowhere, nobody is told. On TCP the guest's network card
    /// loses its wire (the lab's own commands use another); on vsock and serial the relay is stopped.
    pub fn link_down(&self) -> anyhow::Result<()> {
        let state = self.lab()?;
        let guest = state.guest(&self.name)?;
        match state.link {
            Link::Tcp => self.set_wire(guest, false),
            _ => guest.relay.as_ref().context("the guest has no relay")?.stop(),
        }
    }

    /// Resets the link: connections break, and new ones are refused until [`Guest::link_up`]. On TCP a
    /// wire can only fall silent, so there it is the same as [`Guest::link_down`].
    pub fn link_reset(&self) -> anyhow::Result<()> {
        let state = self.lab()?;
        let guest = state.guest(&self.name)?;
        match (state.link, &guest.relay) {
            (Link::Tcp, _) => self.set_wire(guest, false),
            (_, Some(relay)) => relay.kill(),
            (_, None) => Ok(()),
        }
    }

    /// Restores the link after [`Guest::link_down`] or [`Guest::link_reset`].
    pub fn link_up(&self) -> anyhow::Result<()> {
        let state = self.lab()?;
        let guest = state.guest(&self.name)?;
        match (state.link, &guest.relay) {
            (Link::Tcp, _) => self.set_wire(guest, true),
            (_, Some(relay)) if relay.resume() => Ok(()),
            _ => qemu::start_relay(&self.store, &self.name),
        }
    }

    fn set_wire(&self, guest: &GuestState, up: bool) -> anyhow::Result<()> {
        qmp::execute(&guest.qmp, "set_link", json!({ "name": "net0", "up": up })).map(drop)
    }

    /// Pulls the region's device out of the running guest, and comes back when its kernel has let it go.
    pub fn unplug_region(&self) -> anyhow::Result<()> {
        qemu::unplug_region(&self.state()?)
    }

    /// Plugs it in again, with the same file behind it.
    pub fn plug_region(&self) -> anyhow::Result<()> {
        qemu::plug_region(&self.state()?)
    }

    /// Runs a command of QEMU's control protocol.
    pub fn qmp(
        &self,
        command: &str,
        arguments: serde_json::Value,
    ) -> anyhow::Result<serde_json::Value> {
        qmp::execute(&self.state()?.qmp, command, arguments)
    }

    /// Asks the QEMU guest agent of a Debian guest, for example `guest-fsfreeze-freeze`.
    pub fn guest_agent(
        &self,
        command: &str,
        arguments: serde_json::Value,
    ) -> anyhow::Result<serde_json::Value> {
        qmp::ask_guest_agent(&self.state()?.guest_agent, command, arguments)
    }

    /// Whether its QEMU runs.
    pub fn is_running(&self) -> bool {
        self.state().is_ok_and(|guest| guest.qemu.as_ref().is_some_and(Process::is_alive))
    }

    /// Powers the guest off without asking its services. See [`Guest::shut_down`] for the polite way.
    pub fn power_off(&self) -> anyhow::Result<()> {
        // The answer may not come: the machine goes off.
        self.ask(&Request::PowerOff, GRACE)?;
        self.wait_off(Duration::from_secs(30))
    }

    /// Shuts the guest down as its owner would, and waits until QEMU has ended.
    pub fn shut_down(&self, timeout: Duration) -> anyhow::Result<()> {
        match self.lab()?.image {
            Image::Debian => {
                // The connection may break before the answer.
                let _ = self.command(["systemctl", "poweroff"]).timeout(GRACE).run();
                self.wait_off(timeout)
            }
            Image::Initramfs => self.power_off(),
        }
    }

    /// Waits until QEMU has ended.
    pub fn wait_off(&self, timeout: Duration) -> anyhow::Result<()> {
        let until = Instant::now() + timeout;
        while self.is_running() {
            if Instant::now() >= until {
                return Err(self.explain(anyhow!("{} is not off after {timeout:?}", self.name)));
            }
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Ends QEMU as a power cut would.
    pub fn cut_power(&self) -> anyhow::Result<()> {
        qemu::stop(&self.store, &self.name)
    }

    /// Resets the running guest, as its reset button would: QEMU, its devices and the region's file stay. The caller
    /// waits.
    pub fn reset(&self) -> anyhow::Result<()> {
        self.qmp("set-action", json!({ "reboot": "reset" }))?;
        self.qmp("system_reset", json!({})).map(drop)
    }

    /// Starts a guest that is off, with its disks as they are and a new region. The caller waits.
    pub fn boot(&self) -> anyhow::Result<()> {
        self.cut_power()?;
        qemu::start(&self.store, &self.name, None)
    }

    /// Has the guest leave for another host, as far as this one sees it: its state goes to a file, and its QEMU ends. It
    /// must have no region plugged in, and no vsock: QEMU moves neither.
    pub fn migrate_away(&self) -> anyhow::Result<()> {
        qemu::leave(&self.store, &self.name, &self.migration()?)
    }

    /// Has it come back from there, and go on where it was.
    pub fn migrate_back(&self) -> anyhow::Result<()> {
        qemu::start(&self.store, &self.name, Some(&self.migration()?))
    }

    fn migration(&self) -> anyhow::Result<PathBuf> {
        Ok(self.state()?.data_disk.with_extension("migration"))
    }

    /// What the serial console has shown.
    pub fn console(&self) -> anyhow::Result<String> {
        Ok(String::from_utf8_lossy(&fs::read(self.state()?.console)?).into_owned())
    }
}

/// A command for a guest.
#[derive(Debug, Clone)]
pub struct Command {
    guest: Guest,
    exec: Exec,
    timeout: Option<Duration>,
    input: Option<Vec<u8>>,
}

impl Command {
    /// Kills the command after this time; a minute when not set.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Lets the command run as long as it likes.
    pub fn no_timeout(mut self) -> Self {
        self.timeout = None;
        self
    }

    /// Runs it as another user, by number; 1000 is `user`.
    pub fn as_user(mut self, id: u32) -> Self {
        self.exec.user = Some(id);
        self
    }

    /// Sets a variable of its environment.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.exec.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Sets its working folder.
    pub fn cwd(mut self, folder: &str) -> Self {
        self.exec.cwd = Some(folder.to_owned());
        self
    }

    /// Gives it input.
    pub fn stdin(mut self, input: impl Into<Vec<u8>>) -> Self {
        self.input = Some(input.into());
        self
    }

    /// Runs it and waits for its end.
    pub fn run(self) -> anyhow::Result<Output> {
        self.spawn()?.wait()
    }

    /// Runs it and hands its output on as it comes; the answer holds only how it ended.
    pub fn stream(
        self,
        stdout: &mut impl Write,
        stderr: &mut impl Write,
    ) -> anyhow::Result<Output> {
        let mut running = self.spawn()?;
        running.finish(stdout, stderr)
    }

    /// Starts it.
    pub fn spawn(mut self) -> anyhow::Result<Running> {
        self.exec.timeout_ms = self.timeout.map(|timeout| timeout.as_millis() as u64);
        self.exec.stdin = self.input.is_some();
        // Without a time-out of its own a command may be silent for long.
        let patience = self.timeout.unwrap_or(Duration::from_secs(24 * 3600));
        let connection = self.guest.ask(&Request::Exec(self.exec.clone()), patience)?;
        if let Some(input) = self.input.take() {
            let mut to = connection.get_ref().try_clone()?;
            // In a thread of its own: the command may want its output read before it reads on.
            thread::spawn(move || {
                let chunks = input.chunks(256 * 1024).map(|chunk| (Kind::Stdin, chunk));
                for (kind, bytes) in chunks.chain([(Kind::StdinEnd, &[][..])]) {
                    if wire::write_frame(&mut to, kind, bytes).is_err() {
                        return;
                    }
                }
            });
        }
        Ok(Running { guest: self.guest, words: self.exec.argv.join(" "), connection })
    }
}

/// A command that runs in the guest. Dropping it kills the command.
#[derive(Debug)]
pub struct Running {
    guest: Guest,
    words: String,
    connection: BufReader<TcpStream>,
}

impl Running {
    /// Waits for its end.
    pub fn wait(mut self) -> anyhow::Result<Output> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        match self.finish(&mut stdout, &mut stderr) {
            Ok(mut output) => {
                stderr.append(&mut output.stderr);
                Ok(Output { stdout, stderr, ..output })
            }
            Err(error) => {
                let (stdout, stderr) =
                    (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
                Err(error.context(format!("stdout: {stdout}\nstderr: {stderr}")))
            }
        }
    }

    fn finish(
        &mut self,
        stdout: &mut impl Write,
        stderr: &mut impl Write,
    ) -> anyhow::Result<Output> {
        self.collect(stdout, stderr).map_err(|error| {
            self.guest.explain(
                error.context(format!("`{}` in {} gave no end", self.words, self.guest.name)),
            )
        })
    }

    fn collect(
        &mut self,
        stdout: &mut impl Write,
        stderr: &mut impl Write,
    ) -> anyhow::Result<Output> {
        loop {
            match wire::read_frame(&mut self.connection)? {
                (Kind::Stdout, bytes) => {
                    stdout.write_all(&bytes)?;
                    stdout.flush()?;
                }
                (Kind::Stderr, bytes) => stderr.write_all(&bytes)?,
                (Kind::Started, _) => {}
                (Kind::Ended, bytes) => {
                    let ended: Ended = wire::parse(&bytes)?;
                    return Ok(Output {
                        status: ended.status,
                        timed_out: ended.timed_out,
                        ..Output::default()
                    });
                }
                (Kind::Failed, bytes) => {
                    let failed: Failed = wire::parse(&bytes)?;
                    let missing = failed.errno == Some(rustix::io::Errno::NOENT.raw_os_error());
                    return Ok(Output {
                        status: if missing { 127 } else { 126 },
                        errno: failed.errno,
                        stderr: failed.what.into_bytes(),
                        ..Output::default()
                    });
                }
                (kind, _) => bail!("unexpected frame {kind:?}"),
            }
        }
    }

    /// Kills the command with its process group.
    pub fn kill(self) {}
}

impl Drop for Running {
    fn drop(&mut self) {
        // The exec server kills a command whose caller goes away.
        let _ = self.connection.get_ref().shutdown(Shutdown::Both);
    }
}

fn last_frame(connection: &mut BufReader<TcpStream>) -> Result<Ended, FileError> {
    let (kind, bytes) = wire::read_frame(connection)?;
    end(kind, &bytes)
}

fn end(kind: Kind, bytes: &[u8]) -> Result<Ended, FileError> {
    match kind {
        Kind::Ended => Ok(wire::parse(bytes)?),
        Kind::Failed => {
            let failed: Failed = wire::parse(bytes)?;
            Err(match failed.errno {
                Some(errno) => FileError::Errno(errno, failed.what),
                None => FileError::Other(anyhow!(failed.what)),
            })
        }
        kind => Err(FileError::Other(anyhow!("unexpected frame {kind:?}"))),
    }
}
