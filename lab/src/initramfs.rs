//! Packs a guest's first file system: our init, busybox, kernel modules, the driver.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, ensure};

use crate::options::Kernel;
use crate::paths::cache_dir;
use crate::process::run_tool;
use crate::setup::kernel_dir;

/// Modules that a guest loads, with what they stand on. What a kernel has built in is passed over.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_rng",
    "vmw_vsock_virtio_transport",
    "qemu_fw_cfg",
    "overlay",
    "fuse",
    "loop",
    // The power button, for QMP's system_powerdown.
    "button",
];

/// How many packed images stay in the cache.
const KEEP: usize = 12;

/// Packs the image, or finds it packed, and returns its path.
pub fn pack(kernel: Kernel, lab_guest: &Path, agent: Option<&Path>) -> anyhow::Result<PathBuf> {
    let mut archive = Cpio::default();
    let folders =
        ["bin", "dev", "etc", "home", "home/user", "lib", "lib64", "modules", "proc", "sys", "usr"];
    let more = [
        "usr/local",
        "usr/local/sbin",
        "usr/lib",
        "usr/lib/seawall",
        "var",
        "var/log",
        "srv",
        "opt",
        "mnt",
    ];
    for folder in folders.iter().chain(&more) {
        archive.folder(folder, 0o755);
    }
    archive.folder("root", 0o700);
    // The kernel opens it as init's console before anything is mounted.
    archive.character_device("dev/console", 5, 1);
    for (link, target) in [("sbin", "bin"), ("usr/bin", "../bin"), ("usr/sbin", "../bin")] {
        archive.symlink(link, target);
    }
    archive.file(
        "etc/passwd",
        0o644,
        b"root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
    );
    archive.file("etc/group", 0o644, b"root:x:0:\ntty:x:5:\nuser:x:1000:\n");
    archive.file("etc/hosts", 0o644, b"127.0.0.1 localhost\n10.77.0.1 host\n");
    add_busybox(&mut archive)?;
    let read =
        |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    archive.file("init", 0o755, &read(&stripped(lab_guest)?)?);
    if let Some(agent) = agent {
        archive.file("usr/lib/seawall/seawall-agent", 0o755, &read(&stripped(agent)?)?);
    }
    for (index, (name, content)) in modules(kernel)?.into_iter().enumerate() {
        archive.file(&format!("modules/{index:03}-{name}.ko"), 0o644, &content);
    }
    store(&archive.finish(), kernel)
}

/// The program without its debug sections, kept in the cache: they are most of a static binary, and an
/// emulated guest copies every byte twice while it boots.
fn stripped(program: &Path) -> anyhow::Result<PathBuf> {
    let content =
        fs::read(program).with_context(|| format!("cannot read {}", program.display()))?;
    let folder = cache_dir().join("stripped");
    fs::create_dir_all(&folder)?;
    let name = program.file_name().unwrap_or_default().to_string_lossy();
    let path = folder.join(format!("{name}-{}", &blake3::hash(&content).to_hex()[..16]));
    if !path.exists() {
        let fresh = path.with_extension(format!("{}", std::process::id()));
        let words = ["strip", "--strip-debug", "-o"].map(OsStr::new);
        if run_tool(words.into_iter().chain([fresh.as_os_str(), program.as_os_str()])).is_err() {
            // Without binutils the guest boots a little slower.
            return Ok(program.to_path_buf());
        }
        fs::rename(&fresh, &path)?;
        prune(&folder)?;
    }
    Ok(path)
}

fn add_busybox(archive: &mut Cpio) -> anyhow::Result<()> {
    archive.file(
        "bin/busybox",
        0o755,
        &fs::read("/bin/busybox").context("cannot read /bin/busybox")?,
    );
    let list = run_tool(["/bin/busybox", "--list"])?;
    for applet in list.lines().filter(|applet| *applet != "busybox") {
        archive.symlink(&format!("bin/{applet}"), "busybox");
    }
    Ok(())
}

/// The wanted modules in loading order, uncompressed: the kernel's own loader wants them so.
fn modules(kernel: Kernel) -> anyhow::Result<Vec<(String, Vec<u8>)>> {
    let version = fs::read_to_string(kernel_dir(kernel).join("version"))?;
    let folder = kernel_dir(kernel).join("lib/modules").join(version);
    let table = fs::read_to_string(folder.join("modules.dep"))
        .context("no modules.dep; run `cargo xtask setup`")?;
    let entries: Vec<(&str, Vec<&str>)> = table
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(path, needed)| (path, needed.split_whitespace().collect()))
        .collect();
    let (mut seen, mut result) = (HashSet::new(), Vec::new());
    for wanted in MODULES {
        let Some((path, needed)) = entries.iter().find(|(path, _)| module_name(path) == *wanted)
        else {
            continue;
        };
        // modules.dep names what is needed last first.
        for path in needed.iter().rev().chain([path]) {
            if seen.insert(*path) {
                result.push((module_name(path), unpacked(&folder.join(path))?));
            }
        }
    }
    ensure!(
        seen.iter().any(|path| module_name(path) == "virtio_net"),
        "kernel {kernel} has no virtio_net module"
    );
    Ok(result)
}

fn module_name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

fn unpacked(path: &Path) -> anyhow::Result<Vec<u8>> {
    if path.extension().is_none_or(|extension| extension != "xz") {
        return fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    }
    let plain = path.with_extension("");
    if !plain.exists() {
        // Made under a name of its own: another lab may be reading.
        let fresh = plain.with_extension(format!("ko.{}", std::process::id()));
        let output = std::process::Command::new("xz")
            .arg("-dc")
            .arg(path)
            .output()
            .context("cannot run xz")?;
        ensure!(
            output.status.success(),
            "xz -dc {}: {}",
            path.display(),
            String::from_utf8_lossy(&output.stderr)
        );
        fs::write(&fresh, output.stdout)?;
        fs::rename(&fresh, &plain)?;
    }
    Ok(fs::read(plain)?)
}

/// Keeps the image under its content's hash, so that equal images are written once.
fn store(image: &[u8], kernel: Kernel) -> anyhow::Result<PathBuf> {
    let folder = cache_dir().join("initramfs");
    fs::create_dir_all(&folder)?;
    let path = folder.join(format!("{kernel}-{}.cpio", &blake3::hash(image).to_hex()[..16]));
    if !path.exists() {
        let fresh = path.with_extension(format!("{}", std::process::id()));
        fs::write(&fresh, image)?;
        fs::rename(&fresh, &path)?;
        prune(&folder)?;
    } else if let Ok(file) = fs::File::open(&path) {
        // Counts as used now.
        let _ = file.set_modified(SystemTime::now());
    }
    Ok(path)
}

fn prune(folder: &Path) -> anyhow::Result<()> {
    let mut files: Vec<(SystemTime, PathBuf)> = fs::read_dir(folder)?
        .flatten()
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    files.sort();
    for (_, path) in files.iter().rev().skip(KEEP) {
        let _ = fs::remove_file(path);
    }
    Ok(())
}

/// Writer of the kernel's "newc" archive format: Documentation/driver-api/early-userspace/buffer-format.rst.
#[derive(Default)]
struct Cpio {
    bytes: Vec<u8>,
    inode: u32,
}

impl Cpio {
    fn folder(&mut self, name: &str, mode: u32) {
        self.entry(name, 0o040_000 | mode, (0, 0), &[]);
    }

    fn file(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entry(name, 0o100_000 | mode, (0, 0), content);
    }

    fn symlink(&mut self, name: &str, target: &str) {
        self.entry(name, 0o120_777, (0, 0), target.as_bytes());
    }

    fn character_device(&mut self, name: &str, major: u32, minor: u32) {
        self.entry(name, 0o020_600, (major, minor), &[]);
    }

    fn entry(&mut self, name: &str, mode: u32, (major, minor): (u32, u32), content: &[u8]) {
        self.inode += 1;
        // inode, mode, uid, gid, links, mtime, size, device (2), special device (2), name size, checksum
        let size = content.len() as u32;
        let fields =
            [self.inode, mode, 0, 0, 1, 0, size, 0, 0, major, minor, name.len() as u32 + 1, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_aligned_and_carries_its_size() {
        let mut archive = Cpio::default();
        archive.file("a", 0o644, b"12345");
        assert_eq!(archive.bytes.len() % 4, 0);
        assert_eq!(&archive.bytes[54..62], b"00000005");
        assert!(archive.bytes.windows(5).any(|bytes| bytes == b"12345"));
    }

    #[test]
    fn module_names_are_the_kernels() {
        assert_eq!(module_name("kernel/drivers/char/hw_random/virtio-rng.ko.xz"), "virtio_rng");
    }
}
