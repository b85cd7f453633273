//! What a lab consists of, kept as JSON beside its logs.
//!
//! The file is written before the things that it names are made, so that a lab that came only half way
//! can be taken down too. Every command reads it afresh; changes happen under a file lock.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::options::{Engine, Image, Kernel, LabOptions, Link};
use crate::paths;
use crate::process::Process;

/// A whole lab.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LabState {
    /// Its name.
    pub name: String,
    /// True once `up` has seen every guest answer.
    pub ready: bool,
    /// The process that the lab dies with; none for one that stays.
    pub owner: Option<Process>,
    /// Network namespace.
    pub netns: String,
    /// Logs, disks, rules.
    pub state_dir: PathBuf,
    /// Regions and sockets.
    pub run_dir: PathBuf,
    /// What the guests boot into.
    pub image: Image,
    /// Their kernel.
    pub kernel: Kernel,
    /// Their link.
    pub link: Link,
    /// Whether the guests have a region.
    pub region: bool,
    /// Whether they get a key by fw_cfg.
    pub key: bool,
    /// Whether the driver runs in the guests.
    pub agent: bool,
    /// Whether the service is part of this lab.
    pub with_daemon: bool,
    /// The service, while it runs.
    pub daemon: Option<Process>,
    /// The service's configuration.
    pub config: PathBuf,
    /// The service's REST socket.
    pub api_socket: PathBuf,
    /// The service's socket for clients of clamd's protocol.
    #[serde(default)]
    pub clamd_socket: PathBuf,
    /// The service's own state.
    pub service_dir: PathBuf,
    /// Events as JSON lines.
    pub events: PathBuf,
    /// Quarantined files.
    pub quarantine: PathBuf,
    /// The service's log.
    pub daemon_log: PathBuf,
    /// The engine's rules.
    pub rules: PathBuf,
    /// The engines, in the order in which they decide.
    pub engines: Vec<Engine>,
    /// Signatures of the others: `clamav` and `hash` in it.
    pub signatures: PathBuf,
    /// The guests in order.
    pub guests: Vec<GuestState>,
}

/// One guest.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct GuestState {
    /// g1, g2, …
    pub name: String,
    /// 1, 2, …
    pub index: u32,
    /// Context number on the vsock link.
    pub cid: u32,
    /// Address on the guests' bridge.
    pub address: Ipv4Addr,
    /// Address of the exec server.
    pub management: Ipv4Addr,
    /// File behind the shared memory.
    pub region: PathBuf,
    /// File with the key that QEMU hands in by fw_cfg, where the lab has keys.
    pub key: PathBuf,
    /// Unix socket on which the service takes this guest's connections.
    pub socket: PathBuf,
    /// Prefix of the sockets of the vsock device.
    pub vsock: PathBuf,
    /// Socket to which QEMU connects the virtio-serial channel: the relay's.
    pub serial: PathBuf,
    /// QEMU's control socket.
    pub qmp: PathBuf,
    /// Socket of the QEMU guest agent, in a Debian guest.
    pub guest_agent: PathBuf,
    /// Serial console.
    pub console: PathBuf,
    /// QEMU's own output, and that of its helpers.
    pub log: PathBuf,
    /// Disk at /data.
    pub data_disk: PathBuf,
    /// Root disk of a Debian guest.
    pub root_disk: Option<PathBuf>,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Additional kernel arguments.
    pub kernel_arguments: String,
    /// QEMU.
    pub qemu: Option<Process>,
    /// The vsock device's process.
    pub vsock_device: Option<Process>,
    /// The relay between the vsock device or the virtio-serial channel and the service.
    pub relay: Option<Process>,
}

impl LabState {
    /// The plan for a new lab.
    pub(crate) fn plan(options: &LabOptions) -> Self {
        let state_dir = paths::state_dir(&options.name);
        let run_dir = paths::run_dir(&options.name);
        let service_dir = state_dir.join("service");
        Self {
            name: options.name.clone(),
            ready: false,
            owner: if options.keep { None } else { Process::current() },
            netns: paths::netns(&options.name),
            image: options.image,
            kernel: options.kernel,
            link: options.link,
            region: options.region,
            key: options.key || !options.region,
            agent: options.agent,
            with_daemon: options.daemon,
            daemon: None,
            config: state_dir.join("seawalld.toml"),
            api_socket: run_dir.join("api.sock"),
            clamd_socket: run_dir.join("clamd.sock"),
            events: service_dir.join("events.db"),
            quarantine: service_dir.join("quarantine"),
            service_dir,
            daemon_log: state_dir.join("seawalld.log"),
            rules: options.rules.clone().unwrap_or_else(|| state_dir.join("rules")),
            engines: options.engines.clone(),
            signatures: state_dir.join("signatures"),
            guests: (1..=options.guests)
                .map(|index| GuestState::plan(options, index, &state_dir, &run_dir))
                .collect(),
            state_dir,
            run_dir,
        }
    }

    /// The guest with this name.
    pub fn guest(&self, name: &str) -> anyhow::Result<&GuestState> {
        let names =
            || self.guests.iter().map(|guest| guest.name.as_str()).collect::<Vec<_>>().join(", ");
        let found = self.guests.iter().find(|guest| guest.name == name);
        found.with_context(|| format!("the lab has no guest `{name}`; it has {}", names()))
    }

    pub(crate) fn guest_mut(&mut self, name: &str) -> anyhow::Result<&mut GuestState> {
        let found = self.guests.iter_mut().find(|guest| guest.name == name);
        found.with_context(|| format!("the lab has no guest `{name}`"))
    }

    /// Every process that was started.
    pub fn processes(&self) -> Vec<Process> {
        let guests =
            self.guests.iter().flat_map(|guest| [&guest.qemu, &guest.vsock_device, &guest.relay]);
        guests.chain([&self.daemon]).flatten().cloned().collect()
    }
}

impl GuestState {
    fn plan(options: &LabOptions, index: u32, state_dir: &Path, run_dir: &Path) -> Self {
        let name = format!("g{index}");
        let net = crate::net::GuestNet::new(index);
        let debian = options.image == Image::Debian;
        Self {
            index,
            // 0 to 2 are taken: vsock(7), VMADDR_CID_HOST is 2.
            cid: 3 + index,
            address: net.address,
            management: net.management,
            region: run_dir.join(format!("{name}.region")),
            key: run_dir.join(format!("{name}.key")),
            socket: run_dir.join(format!("{name}.link")),
            vsock: run_dir.join(format!("{name}.vsock")),
            serial: run_dir.join(format!("{name}.serial")),
            qmp: run_dir.join(format!("{name}.qmp")),
            guest_agent: run_dir.join(format!("{name}.qga")),
            console: state_dir.join(format!("{name}.console")),
            log: state_dir.join(format!("{name}.log")),
            data_disk: state_dir.join(format!("{name}.data")),
            root_disk: debian.then(|| state_dir.join(format!("{name}.qcow2"))),
            memory_mib: options.memory_mib.unwrap_or(if debian { 1024 } else { 512 }),
            kernel_arguments: options.kernel_arguments.clone(),
            qemu: None,
            vsock_device: None,
            relay: None,
            name,
        }
    }
}

/// Reads and changes one lab's state.
#[derive(Debug, Clone)]
pub(crate) struct Store {
    name: String,
}

impl Store {
    pub fn new(name: &str) -> Self {
        Self { name: name.to_owned() }
    }

    fn file(&self) -> PathBuf {
        paths::state_dir(&self.name).join("state.json")
    }

    /// The state, or none when there is no such lab.
    pub fn find(&self) -> anyhow::Result<Option<LabState>> {
        let file = self.file();
        let text = match fs::read(&file) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", file.display()));
            }
        };
        serde_json::from_slice(&text)
            .map(Some)
            .with_context(|| format!("{} is damaged", file.display()))
    }

    /// The state of a lab that must be there.
    pub fn load(&self) -> anyhow::Result<LabState> {
        self.find()?.with_context(|| {
            format!("there is no lab `{}`; `cargo xtask lab up` makes one", self.name)
        })
    }

    /// Replaces the file as a whole.
    pub fn save(&self, state: &LabState) -> anyhow::Result<()> {
        let file = self.file();
        let fresh = file.with_extension("new");
        fs::write(&fresh, serde_json::to_vec_pretty(state)?)
            .with_context(|| format!("cannot write {}", fresh.display()))?;
        Ok(fs::rename(fresh, file)?)
    }

    /// Changes the state under the lab's lock.
    pub fn update<T>(
        &self,
        change: impl FnOnce(&mut LabState) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let _lock = self.lock()?;
        let mut state = self.load()?;
        let result = change(&mut state)?;
        self.save(&state)?;
        Ok(result)
    }

    /// Held while the state changes; freed when the file is closed.
    fn lock(&self) -> anyhow::Result<File> {
        let path = paths::state_dir(&self.name).join("lock");
        let file =
            File::create(&path).with_context(|| format!("there is no lab `{}`", self.name))?;
        file.lock()?;
        Ok(file)
    }
}
