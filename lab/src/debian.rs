//! Builds the full Debian image once: systemd, a compiler, git, and a few packages to install offline.

use std::ffi::{OsStr, OsString};
use std::fmt::Write;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::options::Kernel;
use crate::paths::cache_dir;
use crate::process::run_tool;
use crate::setup::kernel_dir;

const PACKAGES: &str = "systemd,systemd-sysv,systemd-coredump,dbus,udev,iproute2,kmod,procps,gcc,libc6-dev,make,git,\
                        strace,qemu-guest-agent,python3-minimal,fuse3,util-linux,attr,less,file";

/// Kept in the image as files, for the test that installs packages without a network.
const OFFLINE_PACKAGES: &str = "hello tree bc sl";

/// Changes when what this module writes into the image changes.
const RECIPE: u32 = 1;

const DISK_BYTES: u64 = 4 << 30;

/// Where the image is. Its name holds everything that went into it.
pub fn image_path() -> PathBuf {
    let mut recipe = format!("{RECIPE} {PACKAGES} {OFFLINE_PACKAGES}");
    for kernel in Kernel::ALL {
        let version = fs::read_to_string(kernel_dir(*kernel).join("version")).unwrap_or_default();
        recipe.push_str(&version);
    }
    cache_dir().join(format!("debian-{}.ext4", &blake3::hash(recipe.as_bytes()).to_hex()[..12]))
}

/// Builds the image when it is not there, and says where it is; takes one to three minutes.
pub fn ensure_image() -> anyhow::Result<PathBuf> {
    let lock = File::create(cache_dir().join("lock"))?;
    lock.lock()?;
    let image = image_path();
    if image.exists() {
        return Ok(image);
    }
    eprintln!("lab: building the Debian image, once");
    let root = cache_dir().join("debian.part");
    remove_tree(&root)?;
    bootstrap(&root).context("cannot bootstrap Debian")?;
    configure(&root)?;
    let fresh = image.with_extension("part");
    File::create(&fresh)?.set_len(DISK_BYTES)?;
    let words = ["mkfs.ext4", "-q", "-F", "-L", "root", "-d"].map(OsString::from);
    run_tool(words.into_iter().chain([root.clone().into(), fresh.clone().into()]))?;
    remove_tree(&root)?;
    for entry in fs::read_dir(cache_dir())?.flatten() {
        let name = entry.file_name();
        if name.to_string_lossy().starts_with("debian-") && entry.path() != fresh {
            let _ = fs::remove_file(entry.path());
        }
    }
    fs::rename(fresh, &image)?;
    Ok(image)
}

fn remove_tree(root: &Path) -> anyhow::Result<()> {
    if root.exists() {
        // A bootstrap that was interrupted may have left mounts; never delete through them.
        run_tool(["rm".as_ref(), "-rf".as_ref(), "--one-file-system".as_ref(), root.as_os_str()])?;
    }
    Ok(())
}

fn bootstrap(root: &Path) -> anyhow::Result<()> {
    let download = format!(
        "--customize-hook=mkdir -p \"$1/srv/packages\" && chroot \"$1\" sh -c \
         'cd /srv/packages && apt-get -q -o APT::Sandbox::User=root download {OFFLINE_PACKAGES}'"
    );
    let include = format!("--include={PACKAGES}");
    let words =
        ["mmdebstrap", "--quiet", "--mode=root", "--variant=apt", &include, &download, "bookworm"];
    run_tool(words.iter().map(OsStr::new).chain([root.as_os_str()])).map(drop)
}

fn configure(root: &Path) -> anyhow::Result<()> {
    let write = |path: &str, text: &str| -> anyhow::Result<()> {
        let path = root.join(path);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    };
    for kernel in Kernel::ALL {
        let modules = kernel_dir(*kernel).join("lib/modules");
        let target = root.join("lib/");
        run_tool(["cp".as_ref(), "-a".as_ref(), modules.as_os_str(), target.as_os_str()])?;
    }
    let packages = root.join("srv/packages");
    write("srv/packages/Packages", &package_index(&packages)?)?;
    let _ = fs::remove_dir_all(root.join("etc/apt/sources.list.d"));
    fs::create_dir_all(root.join("etc/apt/sources.list.d"))?;
    write("etc/apt/sources.list", "deb [trusted=yes] file:/srv/packages ./\n")?;
    write("etc/hostname", "debian\n")?;
    write("etc/hosts", "127.0.0.1 localhost\n10.77.0.1 host\n")?;
    write("etc/fstab", "")?;
    // Empty, so that the kernel's systemd.machine_id= counts.
    write("etc/machine-id", "")?;
    write("etc/systemd/journald.conf.d/lab.conf", "[Journal]\nStorage=persistent\n")?;
    fs::create_dir_all(root.join("var/log/journal"))?;
    fs::create_dir_all(root.join("data"))?;
    let chroot = |words: &[&str]| {
        run_tool(
            ["chroot".as_ref(), root.as_os_str()].into_iter().chain(words.iter().map(OsStr::new)),
        )
    };
    chroot(&["useradd", "--uid", "1000", "--create-home", "--shell", "/bin/bash", "user"])?;
    Ok(())
}

/// The index of a folder of packages, as apt wants it.
fn package_index(folder: &Path) -> anyhow::Result<String> {
    let mut index = String::new();
    for entry in fs::read_dir(folder)?.flatten() {
        let path = entry.path();
        let control = run_tool(["dpkg-deb".as_ref(), "-f".as_ref(), path.as_os_str()])?;
        let sum = run_tool(["sha256sum".as_ref(), path.as_os_str()])?;
        let sum = sum.split_whitespace().next().context("sha256sum says nothing")?;
        writeln!(index, "{}", control.trim_end())?;
        writeln!(index, "Filename: ./{}", entry.file_name().to_string_lossy())?;
        writeln!(index, "Size: {}\nSHA256: {sum}\n", entry.metadata()?.len())?;
    }
    Ok(index)
}
