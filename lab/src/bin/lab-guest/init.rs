//! The first process of a guest.
//!
//! From the initramfs it loads modules, mounts, sets the network up, and then either becomes the init of
//! a small system on a tmpfs (`lab.image=initramfs`) or hands over to systemd on the disk
//! (`lab.image=debian`). What it needs to know stands on the kernel's command line as `lab.KEY=VALUE`.

use std::collections::HashMap;
use std::ffi::CStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::mount::{MountFlags, mount, mount_move};
use rustix::process::{WaitOptions, WaitStatus};

const NEW_ROOT: &str = "/newroot";
const AGENT: &str = "/usr/lib/seawall/seawall-agent";
const SELF: &str = "/usr/local/sbin/lab-guest";
const AGENT_LOG: &str = "/run/seawall/agent.log";
const SERVE_LOG: &str = "/run/lab/serve.log";

/// While this file exists the driver is not started again: it was stopped on purpose.
const HOLD: &str = "/run/seawall/hold";

/// The wait before a dead driver or exec server is started again, the same as in the systemd unit.
const RESPAWN: Duration = Duration::from_secs(1);

/// Entry as `/init` of the initramfs. Does not return when all goes well.
pub fn from_initramfs() -> anyhow::Result<()> {
    let result = boot();
    // The console's end is what the lab shows when a guest does not come up.
    if let Err(error) = &result {
        eprintln!("lab-guest: boot failed: {error:#}");
    }
    rustix::system::reboot(rustix::system::RebootCommand::PowerOff)?;
    result
}

fn boot() -> anyhow::Result<()> {
    mount_pseudo_file_systems()?;
    let settings = Settings::read()?;
    load_modules()?;
    if let Some(name) = settings.get("name") {
        rustix::system::sethostname(name.as_bytes())?;
    }
    set_up_network(&settings)?;
    // Kernels that have it then report an event that nobody answers within ten seconds.
    let watchdog = Path::new("/proc/sys/fs/fanotify/watchdog_timeout");
    if watchdog.exists() {
        fs::write(watchdog, "10")?;
    }
    fs::create_dir_all("/run/seawall")?;
    fs::create_dir_all("/run/lab")?;
    let next = match settings.get("image") {
        Some("debian") => prepare_debian(&settings)?,
        _ => prepare_tmpfs()?,
    };
    let data = Path::new(NEW_ROOT).join("data");
    fs::create_dir_all(&data)?;
    mount_disk("data", &data)?;
    fs::set_permissions(&data, fs::Permissions::from_mode(0o1777))?;
    switch_root()?;
    let error = Command::new(&next[0]).args(&next[1..]).exec();
    bail!("{}: {error}", next[0])
}

/// The `lab.` words of the kernel's command line.
struct Settings(HashMap<String, String>);

impl Settings {
    fn read() -> io::Result<Self> {
        let line = fs::read_to_string("/proc/cmdline")?;
        let words =
            line.split_whitespace().filter_map(|word| word.strip_prefix("lab.")?.split_once('='));
        Ok(Self(words.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()))
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    fn agent_link(&self) -> Option<&str> {
        self.get("agent").filter(|link| *link != "off")
    }
}

fn mount_pseudo_file_systems() -> anyhow::Result<()> {
    let none = MountFlags::NOSUID | MountFlags::NODEV;
    let table: [(&str, &str, MountFlags, &CStr); 7] = [
        ("proc", "/proc", none | MountFlags::NOEXEC, c""),
        ("sysfs", "/sys", none | MountFlags::NOEXEC, c""),
        ("devtmpfs", "/dev", MountFlags::NOSUID, c"mode=0755"),
        (
            "devpts",
            "/dev/pts",
            MountFlags::NOSUID | MountFlags::NOEXEC,
            c"mode=0620,gid=5,ptmxmode=0666",
        ),
        ("tmpfs", "/dev/shm", none, c"mode=1777"),
        ("tmpfs", "/run", none, c"mode=0755"),
        ("tmpfs", "/tmp", none, c"mode=1777"),
    ];
    for (kind, target, flags, data) in table {
        fs::create_dir_all(target)?;
        mount(kind, target, kind, flags, data).with_context(|| format!("cannot mount {target}"))?;
    }
    Ok(())
}

/// The lab packs the modules in the order in which they load.
fn load_modules() -> anyhow::Result<()> {
    let mut files: Vec<PathBuf> =
        fs::read_dir("/modules")?.flatten().map(|entry| entry.path()).collect();
    files.sort();
    for path in files {
        let file = File::open(&path)?;
        match rustix::system::finit_module(&file, c"", 0) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            // A module for hardware that is not there says so; the guest may do without it.
            Err(error) => eprintln!("lab-guest: {}: {error}", path.display()),
        }
    }
    Ok(())
}

/// Interfaces are told apart by hardware address: their order is the kernel's affair.
fn set_up_network(settings: &Settings) -> anyhow::Result<()> {
    busybox("ifconfig", &["lo", "127.0.0.1", "up"])?;
    for key in ["net", "mgmt"] {
        let Some((hardware, address)) = settings.get(key).and_then(|value| value.split_once(','))
        else {
            continue;
        };
        let interface = fs::read_dir("/sys/class/net")?.flatten().find(|entry| {
            fs::read_to_string(entry.path().join("address"))
                .is_ok_and(|found| found.trim() == hardware)
        });
        let interface =
            interface.with_context(|| format!("no interface has address {hardware}"))?.file_name();
        busybox(
            "ifconfig",
            &[&interface.to_string_lossy(), address, "netmask", "255.255.255.0", "up"],
        )?;
    }
    Ok(())
}

fn busybox(applet: &str, arguments: &[&str]) -> anyhow::Result<()> {
    let status = Command::new("/bin/busybox").arg(applet).args(arguments).status()?;
    anyhow::ensure!(status.success(), "{applet} {}: {status}", arguments.join(" "));
    Ok(())
}

/// Mounts the virtio disk with this serial number. The device appears shortly after its module.
fn mount_disk(serial: &str, target: &Path) -> anyhow::Result<()> {
    let until = Instant::now() + Duration::from_secs(10);
    while Instant::now() < until {
        for entry in fs::read_dir("/sys/block")?.flatten() {
            if fs::read_to_string(entry.path().join("serial"))
                .is_ok_and(|found| found.trim() == serial)
            {
                let device = Path::new("/dev").join(entry.file_name());
                return mount(&device, target, "ext4", MountFlags::empty(), None).with_context(
                    || format!("cannot mount {} on {}", device.display(), target.display()),
                );
            }
        }
        thread::sleep(Duration::from_millis(20));
    }
    bail!("no disk has serial number {serial}")
}

/// Copies the initramfs to a tmpfs. The kernel's own rootfs cannot be pivoted away from and is like no
/// file system of a real machine.
fn prepare_tmpfs() -> anyhow::Result<Vec<String>> {
    fs::create_dir_all(NEW_ROOT)?;
    mount("tmpfs", NEW_ROOT, "tmpfs", MountFlags::empty(), c"mode=0755,size=80%")?;
    for entry in fs::read_dir("/")?.flatten() {
        let name = entry.file_name();
        let moved = ["dev", "proc", "sys", "run", "tmp", "modules", "newroot", "init"];
        if !moved.iter().any(|skip| name == *skip) {
            copy(&entry.path(), &Path::new(NEW_ROOT).join(&name))?;
        }
    }
    install_self()?;
    std::os::unix::fs::chown(Path::new(NEW_ROOT).join("home/user"), Some(1000), Some(1000))?;
    Ok(vec![SELF.into(), "init".into()])
}

fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let kind = fs::symlink_metadata(from)?.file_type();
    if kind.is_symlink() {
        return symlink(fs::read_link(from)?, to);
    }
    if !kind.is_dir() {
        return fs::copy(from, to).map(drop);
    }
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)?.flatten() {
        copy(&entry.path(), &to.join(entry.file_name()))?;
    }
    Ok(())
}

fn install_self() -> io::Result<()> {
    let target = Path::new(NEW_ROOT).join(&SELF[1..]);
    if let Some(folder) = target.parent() {
        fs::create_dir_all(folder)?;
    }
    // A guest that starts again finds the file of its last start, perhaps marked or running nowhere.
    let _ = fs::remove_file(&target);
    fs::copy("/init", &target).map(drop)
}

/// Puts our programs and units into a full Debian. The units go to `/run`, so that the disk image stays
/// as it is when they change.
fn prepare_debian(settings: &Settings) -> anyhow::Result<Vec<String>> {
    fs::create_dir_all(NEW_ROOT)?;
    mount_disk("root", Path::new(NEW_ROOT))?;
    install_self()?;
    let units = Path::new("/run/systemd/system");
    let wanted = units.join("sysinit.target.wants");
    fs::create_dir_all(&wanted)?;
    for timer in ["apt-daily", "apt-daily-upgrade", "dpkg-db-backup", "e2scrub_all", "fstrim"] {
        symlink("/dev/null", units.join(format!("{timer}.timer")))?;
    }
    let enable = |name: &str, text: String| -> io::Result<()> {
        fs::write(units.join(name), text)?;
        symlink(format!("../{name}"), wanted.join(name))
    };
    enable("lab-guest.service", lab_unit())?;
    if let Some(link) = settings.agent_link() {
        let target = Path::new(NEW_ROOT).join(&AGENT[1..]);
        fs::create_dir_all(target.parent().context("agent's folder")?)?;
        let _ = fs::remove_file(&target);
        fs::copy(AGENT, &target).context("cannot copy the driver")?;
        enable("seawall-agent.service", agent_unit(link))?;
    }
    Ok(vec!["/sbin/init".into()])
}

fn lab_unit() -> String {
    format!(
        "[Unit]\nDescription=Exec server of the lab\nDefaultDependencies=no\nBefore=sysinit.target\n\
         StartLimitIntervalSec=0\n\n[Service]\nExecStart={SELF} serve\nRestart=always\nRestartSec=1\n\
         KillMode=process\nOOMScoreAdjust=-1000\nTasksMax=infinity\n\
         StandardOutput=append:{SERVE_LOG}\nStandardError=append:{SERVE_LOG}\n"
    )
}

/// Before sysinit.target, so that the guest's services start protected. Its log goes to a tmpfs: written
/// to the journal it could wait for journald, which waits for the driver. Exit status 0 is a stop on
/// purpose.
fn agent_unit(link: &str) -> String {
    format!(
        "[Unit]\nDescription=Seawall guest driver\nDefaultDependencies=no\nBefore=sysinit.target\n\
         StartLimitIntervalSec=0\n\n[Service]\nExecStart={AGENT} run --link {link}\nRestart=always\nRestartSec=1\n\
         RestartPreventExitStatus=0\nKillMode=process\nOOMScoreAdjust=-1000\nTasksMax=infinity\n\
         StandardOutput=append:{AGENT_LOG}\nStandardError=append:{AGENT_LOG}\n"
    )
}

fn switch_root() -> anyhow::Result<()> {
    let root = Path::new(NEW_ROOT);
    for name in ["dev", "proc", "sys", "run"] {
        let target = root.join(name);
        fs::create_dir_all(&target)?;
        mount_move(Path::new("/").join(name), &target)
            .with_context(|| format!("cannot move /{name}"))?;
    }
    // Debian decides for itself what its /tmp is; ours is a tmpfs of its own.
    let target = root.join("tmp");
    fs::create_dir_all(&target)?;
    mount_move("/tmp", &target)?;
    std::env::set_current_dir(root)?;
    mount_move(".", "/")?;
    rustix::process::chroot(".")?;
    std::env::set_current_dir("/")?;
    Ok(())
}

/// A program that init keeps alive.
struct Service {
    program: &'static str,
    arguments: Vec<String>,
    log: &'static str,
    /// While this file exists the program stays down.
    hold: Option<&'static str>,
    pid: Option<u32>,
    due: Instant,
}

impl Service {
    fn start(&mut self) {
        let log = || OpenOptions::new().create(true).append(true).open(self.log);
        let (Ok(out), Ok(err)) = (log(), log()) else { return };
        let child = Command::new(self.program)
            .args(&self.arguments)
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .process_group(0)
            .spawn();
        match child {
            Ok(child) => self.pid = Some(child.id()),
            Err(error) => {
                eprintln!("lab-guest: {}: {error}", self.program);
                self.due = Instant::now() + RESPAWN;
            }
        }
    }

    fn ended(&mut self, status: WaitStatus) {
        self.pid = None;
        self.due = Instant::now() + RESPAWN;
        if let (Some(0), Some(hold)) = (status.exit_status(), self.hold) {
            let _ = File::create(hold);
        }
    }

    fn held(&self) -> bool {
        self.hold.is_some_and(|hold| Path::new(hold).exists())
    }
}

/// Init of the small system: keeps the exec server and the driver alive and buries orphans.
pub fn run() -> anyhow::Result<()> {
    let settings = Settings::read()?;
    let now = Instant::now();
    let mut services = vec![Service {
        program: SELF,
        arguments: vec!["serve".into()],
        log: SERVE_LOG,
        hold: None,
        pid: None,
        due: now,
    }];
    if let Some(link) = settings.agent_link() {
        services.push(Service {
            program: AGENT,
            arguments: vec!["run".into(), "--link".into(), link.into()],
            log: AGENT_LOG,
            hold: Some(HOLD),
            pid: None,
            due: now,
        });
    }
    loop {
        for service in &mut services {
            if service.pid.is_none() && Instant::now() >= service.due && !service.held() {
                service.start();
            }
        }
        let all_run = services.iter().all(|service| service.pid.is_some());
        let options = if all_run { WaitOptions::empty() } else { WaitOptions::NOHANG };
        match rustix::process::wait(options) {
            Ok(Some((pid, status))) => {
                let pid = pid.as_raw_nonzero().get() as u32;
                if let Some(service) = services.iter_mut().find(|service| service.pid == Some(pid))
                {
                    service.ended(status);
                }
            }
            Ok(None) | Err(_) => thread::sleep(Duration::from_millis(100)),
        }
    }
}
