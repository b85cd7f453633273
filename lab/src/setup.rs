//! Brings in what the lab needs on this machine: Debian packages, the vsock device, the guests' kernels.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};

use crate::options::Kernel;
use crate::paths::cache_dir;
use crate::process::run_tool;

/// Debian packages, each with a program that shows it is there.
const PACKAGES: &[(&str, &str)] = &[
    ("qemu-system-x86", "/usr/bin/qemu-system-x86_64"),
    ("qemu-utils", "/usr/bin/qemu-img"),
    ("iproute2", "/bin/ip"),
    ("busybox-static", "/bin/busybox"),
    ("mmdebstrap", "/usr/bin/mmdebstrap"),
    ("e2fsprogs", "/sbin/mkfs.ext4"),
    ("xfsprogs", "/sbin/mkfs.xfs"),
    ("btrfs-progs", "/sbin/mkfs.btrfs"),
    ("kmod", "/sbin/depmod"),
    ("xz-utils", "/usr/bin/xz"),
    ("zstd", "/usr/bin/zstd"),
    ("lz4", "/usr/bin/lz4"),
    ("util-linux", "/usr/bin/setpriv"),
    ("strace", "/usr/bin/strace"),
    // clamd(8), its clients, and the files to try it on.
    ("clamav-daemon", "/usr/sbin/clamd"),
    ("clamdscan", "/usr/bin/clamdscan"),
    ("clamav-testfiles", "/usr/share/clamav-testfiles"),
    // The tests build an engine in C.
    ("gcc", "/usr/bin/cc"),
    ("libc6-dev", "/usr/include/stdio.h"),
];

const VSOCK_DEVICE: &str = "vhost-device-vsock";
const VSOCK_DEVICE_VERSION: &str = "0.3.0";

/// Does what is missing and says each step in a line on stderr; silent when nothing is.
pub fn setup() -> anyhow::Result<()> {
    ensure!(
        rustix::process::getuid().is_root(),
        "the lab needs root: it makes network namespaces and taps"
    );
    let cache = cache_dir();
    fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
    let lock = File::create(cache.join("lock"))?;
    lock.lock()?;
    install_packages()?;
    install_vsock_device()?;
    for kernel in Kernel::ALL {
        fetch_kernel(*kernel)?;
    }
    Ok(())
}

/// [`setup`] when something is missing, and a check of what it cannot install.
pub fn ensure() -> anyhow::Result<()> {
    let kernels = Kernel::ALL.iter().all(|kernel| kernel_dir(*kernel).join("vmlinux").exists());
    if !missing_packages().is_empty() || !vsock_device().exists() || !kernels {
        setup()?;
    }
    ensure!(
        rustix::process::getuid().is_root(),
        "the lab needs root: it makes network namespaces and taps"
    );
    for (path, why) in
        [("/dev/net/tun", "the guests' network cards"), ("/dev/shm", "the shared memory")]
    {
        ensure!(
            Path::new(path).exists(),
            "this machine has no {path}, which the lab needs for {why}"
        );
    }
    Ok(())
}

/// The program that gives guests a vsock device on hosts without /dev/vhost-vsock.
pub(crate) fn vsock_device() -> PathBuf {
    cache_dir().join("bin").join(VSOCK_DEVICE)
}

/// Folder with `vmlinux`, `version` and `lib/modules/VERSION` of a kernel.
pub(crate) fn kernel_dir(kernel: Kernel) -> PathBuf {
    cache_dir().join("kernels").join(kernel.as_str())
}

fn step(words: &str) {
    eprintln!("setup: {words}");
}

fn missing_packages() -> Vec<&'static str> {
    // The static busybox and the dynamic one share a path.
    let is_static = |path: &str| {
        fs::read(path).is_ok_and(|program| {
            !program.windows(11).take(4096).any(|bytes| bytes == b"/lib64/ld-l")
        })
    };
    let present = |name: &str, path: &str| {
        Path::new(path).exists() && (name != "busybox-static" || is_static(path))
    };
    PACKAGES.iter().filter(|(name, path)| !present(name, path)).map(|(name, _)| *name).collect()
}

fn install_packages() -> anyhow::Result<()> {
    // apt may remove one package for another: a newer qemu-utils from elsewhere goes when Debian's
    // qemu-system-x86 comes. What is missing after that is installed in a second round.
    for _round in 0..2 {
        let missing = missing_packages();
        if missing.is_empty() {
            return Ok(());
        }
        if !Path::new("/usr/bin/apt-get").exists() {
            bail!("this machine has no apt-get; install the equivalents of {}", missing.join(", "));
        }
        step(&format!("installing {}", missing.join(", ")));
        let install = || {
            apt(["install", "-y", "-q", "--no-install-recommends"]
                .into_iter()
                .chain(missing.iter().copied()))
        };
        if install().is_err() {
            // The lists are missing or name versions that are gone.
            update_lists()?;
            install()?;
        }
    }
    let still = missing_packages();
    ensure!(still.is_empty(), "installed, but not found: {}", still.join(", "));
    Ok(())
}

fn update_lists() -> anyhow::Result<()> {
    step("updating apt's package lists");
    apt(["update", "-q"])
}

fn apt<'a>(arguments: impl IntoIterator<Item = &'a str>) -> anyhow::Result<()> {
    let fixed =
        ["env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-o", "DPkg::Lock::Timeout=300"];
    run_tool(fixed.into_iter().chain(arguments)).map(drop)
}

fn install_vsock_device() -> anyhow::Result<()> {
    if vsock_device().exists() {
        return Ok(());
    }
    step(&format!("building {VSOCK_DEVICE} {VSOCK_DEVICE_VERSION}"));
    let build = cache_dir().join("build");
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .args(["install", "--quiet", "--locked", "--version", VSOCK_DEVICE_VERSION, "--root"])
        .arg(cache_dir());
    command.arg("--target-dir").arg(&build).arg(VSOCK_DEVICE);
    let output = command.output().context("cannot run cargo")?;
    ensure!(
        output.status.success(),
        "cargo install {VSOCK_DEVICE}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let _ = fs::remove_dir_all(build);
    Ok(())
}

fn fetch_kernel(kernel: Kernel) -> anyhow::Result<()> {
    let target = kernel_dir(kernel);
    if target.join("vmlinux").exists() {
        return Ok(());
    }
    let package = match newest_package(kernel)? {
        Some(package) => package,
        None => {
            update_lists()?;
            newest_package(kernel)?.with_context(|| {
                format!(
                    "apt knows no cloud kernel {kernel}; the lab needs Debian 12's package sources"
                )
            })?
        }
    };
    step(&format!("fetching {package}"));
    let work = target.with_extension("part");
    let _ = fs::remove_dir_all(&work);
    fs::create_dir_all(work.join("deb"))?;
    let unpacked = work.join("tree");
    if download(&package, &work.join("deb")).is_err() {
        update_lists()?;
        download(&package, &work.join("deb"))?;
    }
    let deb = fs::read_dir(work.join("deb"))?
        .flatten()
        .next()
        .context("apt-get downloaded nothing")?
        .path();
    run_tool(["dpkg".as_ref(), "-x".as_ref(), deb.as_os_str(), unpacked.as_os_str()])?;
    let version = package.trim_start_matches("linux-image-").to_owned();
    unpack_kernel(
        &unpacked.join("boot").join(format!("vmlinuz-{version}")),
        &unpacked.join("vmlinux"),
    )
    .with_context(|| format!("cannot unpack the kernel of {package}"))?;
    // The package leaves this to its installation script.
    run_tool(["depmod".as_ref(), "-b".as_ref(), unpacked.as_os_str(), version.as_ref()])?;
    fs::write(unpacked.join("version"), &version)?;
    let _ = fs::remove_dir_all(&target);
    fs::rename(&unpacked, &target)?;
    Ok(fs::remove_dir_all(work)?)
}

/// Takes the kernel proper out of its self-extracting image (Documentation/arch/x86/boot.rst, payload_offset).
/// QEMU starts it through its PVH entry; an emulated processor needs a second and more to unpack it.
fn unpack_kernel(image: &Path, target: &Path) -> anyhow::Result<()> {
    let bytes = fs::read(image)?;
    let word = |at: usize| {
        bytes.get(at..at + 4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
    };
    let (Some(offset), Some(length)) = (word(0x248), word(0x24c)) else {
        bail!("the image is too short")
    };
    // A value of 0 means 4 sectors; one more for the boot sector.
    let sectors = match bytes[0x1f1] {
        0 => 4,
        count => usize::from(count),
    };
    let start = (sectors + 1) * 512 + offset as usize;
    // The last four bytes hold the unpacked size and belong to no stream.
    let payload = bytes
        .get(start..start + length as usize - 4)
        .context("the payload ends after the image")?;
    let tool = match payload {
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
        [0x02, 0x21, 0x4c, 0x18, ..] => "lz4",
        _ => bail!("the payload is neither zstd nor lz4"),
    };
    let packed = image.with_extension("payload");
    fs::write(&packed, payload)?;
    let words =
        [tool.as_ref(), "-dqf".as_ref(), packed.as_os_str(), "-o".as_ref(), target.as_os_str()];
    let words = words.into_iter().filter(|word| tool == "zstd" || *word != "-o");
    run_tool(words).map(drop)
}

fn download(package: &str, folder: &Path) -> anyhow::Result<()> {
    // As root, since apt's own user may not enter the folder.
    let output = Command::new("apt-get")
        .args(["-q", "-o", "APT::Sandbox::User=root", "download", package])
        .current_dir(folder)
        .output()?;
    ensure!(
        output.status.success(),
        "apt-get download {package}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// The newest package of a kernel series, in Debian 12's naming: `linux-image-6.1.0-N-cloud-amd64` and
/// `linux-image-6.12.N+deb12-cloud-amd64`.
fn newest_package(kernel: Kernel) -> anyhow::Result<Option<String>> {
    let prefix = format!("linux-image-{kernel}.");
    let suffix = match kernel {
        Kernel::V6_1 => "-cloud-amd64",
        Kernel::V6_12 => "+deb12-cloud-amd64",
    };
    let names = run_tool(["apt-cache", "pkgnames", prefix.as_str()])?;
    Ok(names
        .lines()
        .filter(|name| name.ends_with(suffix))
        .max_by_key(|name| numbers(name))
        .map(str::to_owned))
}

/// The numbers in a name, which order versions of the same form.
fn numbers(name: &str) -> Vec<u64> {
    name.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::numbers;

    #[test]
    fn versions_order_by_number() {
        assert!(
            numbers("linux-image-6.1.0-100-cloud-amd64")
                > numbers("linux-image-6.1.0-56-cloud-amd64")
        );
        assert!(
            numbers("linux-image-6.12.9+deb12-cloud-amd64")
                < numbers("linux-image-6.12.73+deb12-cloud-amd64")
        );
    }
}
