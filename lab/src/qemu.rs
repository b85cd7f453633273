//! Starts and stops the processes behind one guest: QEMU, the relay of its link, on vsock the device.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::json;

use crate::net::{GuestNet, HOST};
use crate::options::Link;
use crate::process::{Background, Process, run_tool, tail};
use crate::setup::{kernel_dir, vsock_device};
use crate::state::{GuestState, LabState, Store};
use crate::{debian, initramfs, paths, qmp};

/// DESIGN.md, "Defaults".
const REGION_BYTES: u64 = 16 << 20;
const DATA_DISK_BYTES: u64 = 256 << 20;

/// QEMU's name for the device of the region.
const REGION_DEVICE: &str = "region0";

/// Pulls the region's device out of a running guest and waits until the guest's kernel has let it go.
pub fn unplug_region(guest: &GuestState) -> anyhow::Result<()> {
    let qmp_socket = &guest.qmp;
    qmp::execute(qmp_socket, "device_del", json!({ "id": REGION_DEVICE }))?;
    let until = Instant::now() + Duration::from_secs(30);
    while has_region_device(qmp_socket)? {
        if Instant::now() > until {
            bail!("the guest does not let its region go");
        }
        thread::sleep(Duration::from_millis(20));
    }
    // QEMU 7.2 ends itself when a device comes back to a backend that it had before.
    qmp::execute(qmp_socket, "object-del", json!({ "id": "region" })).map(drop)
}

/// Plugs the region's device in again, with the same file behind it.
pub fn plug_region(guest: &GuestState) -> anyhow::Result<()> {
    let qmp_socket = &guest.qmp;
    let backend = json!({
        "qom-type": "memory-backend-file", "id": "region", "share": true,
        "mem-path": guest.region, "size": REGION_BYTES,
    });
    qmp::execute(qmp_socket, "object-add", backend)?;
    let device = json!({ "driver": "ivshmem-plain", "id": REGION_DEVICE, "memdev": "region" });
    qmp::execute(qmp_socket, "device_add", device).map(drop)
}

fn has_region_device(qmp_socket: &Path) -> anyhow::Result<bool> {
    let list = qmp::execute(qmp_socket, "qom-list", json!({ "path": "/machine/peripheral" }))?;
    let devices = list.as_array().context("qom-list gives no list")?;
    Ok(devices.iter().any(|device| device["name"] == REGION_DEVICE))
}

/// Port of the service, on TCP and vsock alike.
pub const SERVICE_PORT: u16 = 7325;

/// Makes the disks of a guest that are not there yet.
pub fn make_disks(guest: &GuestState) -> anyhow::Result<()> {
    if !guest.data_disk.exists() {
        File::create(&guest.data_disk)?.set_len(DATA_DISK_BYTES)?;
        let options =
            ["mkfs.ext4", "-q", "-F", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1"];
        run_tool(options.iter().map(OsStr::new).chain([guest.data_disk.as_os_str()]))?;
    }
    if let Some(disk) = guest.root_disk.as_ref().filter(|disk| !disk.exists()) {
        let base = debian::image_path();
        let words =
            ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b"].map(OsString::from);
        run_tool(words.into_iter().chain([base.into(), disk.into()]))?;
    }
    Ok(())
}

/// Writes the state of a running guest to a file, as a migration sends it to another host, and ends its QEMU: here the
/// guest is gone, and its disks are let go.
pub fn leave(store: &Store, name: &str, file: &Path) -> anyhow::Result<()> {
    let qmp_socket = store.load()?.guest(name)?.qmp.clone();
    let uri = format!("exec:cat >'{}'", file.display());
    qmp::execute(&qmp_socket, "migrate", json!({ "uri": uri }))?;
    let until = Instant::now() + Duration::from_secs(120);
    loop {
        let state = qmp::execute(&qmp_socket, "query-migrate", json!({}))?;
        match state["status"].as_str() {
            Some("completed") => return stop(store, name),
            Some("failed" | "cancelled") => bail!("the guest does not leave: {state}"),
            _ if Instant::now() > until => bail!("the guest does not leave in time: {state}"),
            _ => thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// Starts a guest and records each process as soon as it has a number. `from` is where [`leave`] has written its state:
/// it goes on where it was.
pub fn start(store: &Store, name: &str, from: Option<&Path>) -> anyhow::Result<()> {
    let state = store.load()?;
    let guest = state.guest(name)?;
    if guest.qemu.as_ref().is_some_and(Process::is_alive) {
        bail!("{name} runs already");
    }
    let binaries = crate::Binaries::locate();
    let image = initramfs::pack(
        state.kernel,
        &binaries.lab_guest,
        state.agent.then_some(binaries.agent.as_path()),
    )?;
    if state.region {
        make_region(&guest.region)?;
    }
    if state.key {
        renew_key(&state, guest)?;
    }
    if state.link != Link::Tcp {
        start_relay(store, name)?;
    }
    if state.link == Link::Vsock {
        start_vsock_device(store, name)?;
    }
    let mut arguments = qemu_arguments(&state, guest, &image)?;
    if let Some(file) = from {
        arguments.extend(["-incoming".into(), format!("exec:cat '{}'", file.display()).into()]);
    }
    let qemu = background(&state, guest, OsStr::new("qemu-system-x86_64"), arguments)?;
    store.update(|state| {
        state.guest_mut(name)?.qemu = Some(qemu);
        Ok(())
    })
}

/// Ends a guest's processes as a power cut would.
pub fn stop(store: &Store, name: &str) -> anyhow::Result<()> {
    let state = store.load()?;
    let guest = state.guest(name)?;
    for process in [&guest.qemu, &guest.vsock_device, &guest.relay].into_iter().flatten() {
        process.kill()?;
    }
    store.update(|state| {
        let guest = state.guest_mut(name)?;
        (guest.qemu, guest.vsock_device, guest.relay) = (None, None, None);
        Ok(())
    })
}

fn background(
    state: &LabState,
    guest: &GuestState,
    program: &OsStr,
    arguments: Vec<OsString>,
) -> anyhow::Result<Process> {
    Background {
        program,
        arguments,
        log: &guest.log,
        netns: Some(&state.netns),
        bound: state.owner.is_some(),
    }
    .start()
}

/// A fresh file of zeros under the old name, so that the service sees that the guest started anew.
fn make_region(path: &Path) -> anyhow::Result<()> {
    let fresh = path.with_extension("new");
    let file = File::options().create(true).truncate(true).write(true).mode(0o600).open(&fresh)?;
    file.set_len(REGION_BYTES)?;
    Ok(fs::rename(fresh, path)?)
}

/// Has the service write a new key, as whoever starts a guest does. Without a service the old one stays.
fn renew_key(state: &LabState, guest: &GuestState) -> anyhow::Result<()> {
    let Some(daemon) = state.daemon.as_ref().filter(|daemon| daemon.is_alive()) else {
        let path = guest.key.display();
        anyhow::ensure!(guest.key.exists(), "{path} is missing; the service has to write it");
        return Ok(());
    };
    let _ = fs::remove_file(&guest.key);
    wait_for_file(&guest.key, daemon, &state.daemon_log)
}

/// Starts the relay between a guest's vsock device or virtio-serial channel and the service.
pub fn start_relay(store: &Store, name: &str) -> anyhow::Result<()> {
    let state = store.load()?;
    let guest = state.guest(name)?;
    let listen = match state.link {
        Link::Serial => guest.serial.clone().into_os_string(),
        _ => vsock_listener(guest),
    };
    let _ = fs::remove_file(&listen);
    let arguments = vec!["relay".into(), listen.clone(), guest.socket.clone().into()];
    let relay =
        background(&state, guest, crate::Binaries::locate().lab_guest.as_os_str(), arguments)?;
    store.update(|state| {
        state.guest_mut(name)?.relay = Some(relay.clone());
        Ok(())
    })?;
    wait_for_file(Path::new(&listen), &relay, &guest.log)
}

fn vsock_listener(guest: &GuestState) -> OsString {
    let mut path = guest.vsock.clone().into_os_string();
    path.push(format!("_{SERVICE_PORT}"));
    path
}

fn vhost_socket(guest: &GuestState) -> std::path::PathBuf {
    guest.vsock.with_extension("vhost")
}

fn start_vsock_device(store: &Store, name: &str) -> anyhow::Result<()> {
    let state = store.load()?;
    let guest = state.guest(name)?;
    let socket = vhost_socket(guest);
    for stale in [&socket, &guest.vsock] {
        let _ = fs::remove_file(stale);
    }
    let device = format!(
        "guest-cid={},uds-path={},socket={}",
        guest.cid,
        guest.vsock.display(),
        socket.display()
    );
    let arguments = vec!["--vm".into(), device.into()];
    let process = background(&state, guest, vsock_device().as_os_str(), arguments)?;
    store.update(|state| {
        state.guest_mut(name)?.vsock_device = Some(process.clone());
        Ok(())
    })?;
    wait_for_file(&socket, &process, &guest.log)
}

fn wait_for_file(path: &Path, process: &Process, log: &Path) -> anyhow::Result<()> {
    let until = Instant::now() + Duration::from_secs(5);
    while !path.exists() {
        if !process.is_alive() || Instant::now() > until {
            bail!("{} does not appear\n{}", path.display(), tail(log, 10));
        }
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// What the driver is told about its link.
fn agent_link(link: Link) -> String {
    match link {
        Link::Vsock => "vsock".into(),
        Link::Tcp => format!("tcp:{HOST}:{SERVICE_PORT}"),
        Link::Serial => "serial".into(),
    }
}

fn kernel_command_line(state: &LabState, guest: &GuestState) -> String {
    let net = GuestNet::new(guest.index);
    let agent = if state.agent { agent_link(state.link) } else { "off".into() };
    format!(
        // The second line saves an emulated processor a second of self-tests and clock measurements. The
        // machine id is the guest's own, and known, so that systemd takes no boot for a first one.
        "console=ttyS0 panic=-1 quiet \
         cryptomgr.notests tsc=reliable no_timer_check \
         net.ifnames=0 systemd.machine_id={id} \
         lab.name={name} lab.image={image} lab.agent={agent} \
         lab.net={hardware},{address} lab.mgmt={management_hardware},{management} {more}",
        id = &blake3::hash(format!("{} {}", state.name, guest.name).as_bytes()).to_hex()[..32],
        name = guest.name,
        image = state.image,
        hardware = net.hardware,
        address = net.address,
        management_hardware = net.management_hardware,
        management = net.management,
        more = guest.kernel_arguments,
    )
}

fn qemu_arguments(
    state: &LabState,
    guest: &GuestState,
    image: &Path,
) -> anyhow::Result<Vec<OsString>> {
    let net = GuestNet::new(guest.index);
    let memory = guest.memory_mib;
    let shown = |path: &Path| path.display().to_string();
    let mut words: Vec<String> = Vec::new();
    let mut add = |option: &str, value: String| words.extend([format!("-{option}"), value]);
    add("name", format!("seawall-{}-{}", state.name, guest.name));
    // Shared, since the vsock device reads the guest's memory from another process.
    add("object", format!("memory-backend-memfd,id=memory,size={memory}M,share=on"));
    add("machine", "pc,memory-backend=memory".into());
    // One thread for both processors: with one each, the emulation does not survive the kernel's patching
    // of its own code on a busy machine (a panic in the middle of a static jump, one boot in six).
    add("accel", "tcg,thread=single".into());
    add("cpu", "max".into());
    add("smp", "2".into());
    add("m", memory.to_string());
    add("display", "none".into());
    add("kernel", shown(&kernel_dir(state.kernel).join("vmlinux")));
    add("initrd", shown(image));
    add("append", kernel_command_line(state, guest));
    add("chardev", format!("file,id=console,path={}", shown(&guest.console)));
    add("serial", "chardev:console".into());
    add("chardev", format!("socket,id=qmp,path={},server=on,wait=off", shown(&guest.qmp)));
    add("mon", "chardev=qmp,mode=control".into());
    if state.region {
        let region = shown(&guest.region);
        add(
            "object",
            format!("memory-backend-file,id=region,share=on,mem-path={region},size={REGION_BYTES}"),
        );
        add("device", format!("ivshmem-plain,id={REGION_DEVICE},memdev=region"));
    }
    if state.key {
        add("fw_cfg", format!("name=opt/seawall/key,file={}", shown(&guest.key)));
    }
    for (id, tap, hardware) in [
        ("net0", &net.tap, &net.hardware),
        ("mgmt0", &net.management_tap, &net.management_hardware),
    ] {
        add("netdev", format!("tap,id={id}.tap,ifname={tap},script=no,downscript=no"));
        add("device", format!("virtio-net-pci,id={id},netdev={id}.tap,mac={hardware},romfile="));
    }
    add("object", "rng-random,id=random,filename=/dev/urandom".into());
    add("device", "virtio-rng-pci,rng=random".into());
    let mut disk = |serial: &str, format: &str, path: &Path| {
        // Nothing in a lab outlives its machine, so nothing needs to reach the disk.
        let file = shown(path);
        add(
            "drive",
            format!("if=none,id={serial},format={format},file={file},cache=unsafe,discard=unmap"),
        );
        add("device", format!("virtio-blk-pci,drive={serial},serial={serial}"));
    };
    disk("data", "raw", &guest.data_disk);
    if let Some(path) = &guest.root_disk {
        disk("root", "qcow2", path);
    }
    if guest.root_disk.is_some() || state.link == Link::Serial {
        add("device", "virtio-serial-pci".into());
    }
    if guest.root_disk.is_some() {
        add(
            "chardev",
            format!("socket,id=qga,path={},server=on,wait=off", shown(&guest.guest_agent)),
        );
        add("device", "virtserialport,chardev=qga,name=org.qemu.guest_agent.0".into());
    }
    if state.link == Link::Serial {
        // QEMU connects, and again each second: so service and guest may come and go in any order.
        let path = shown(&guest.serial);
        add("chardev", format!("socket,id=seawall,path={path},server=off,reconnect=1"));
        add("device", "virtserialport,chardev=seawall,name=org.seawall.0".into());
    }
    if state.link == Link::Vsock {
        add("chardev", format!("socket,id=vsock,path={}", shown(&vhost_socket(guest))));
        add("device", "vhost-user-vsock-pci,id=vsock0,chardev=vsock".into());
    }
    words.extend(["-nodefaults", "-no-user-config", "-no-reboot"].map(String::from));
    Ok(words.into_iter().map(OsString::from).collect())
}

/// Fails with a plain reason when a socket's path would not fit into the kernel's 108 bytes (unix(7)).
pub fn check_socket_length(name: &str) -> anyhow::Result<()> {
    let longest = paths::run_dir(name).join("g200.vsock_7325");
    let length = longest.as_os_str().len();
    (length < 108)
        .then_some(())
        .with_context(|| format!("socket path {} is too long", longest.display()))
}
