//! Where it is measured: namespaces, and a file system for each setup.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, ensure};
use nix::sched::CloneFlags;
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::process::Signal;

/// The lab keeps what it runs natively here, and so does the benchmark.
pub const SHARED_MEMORY: &str = "/dev/shm";

/// The next process that this one starts is the first of a new PID namespace, and has a new mount
/// namespace.
pub fn new_namespaces() -> anyhow::Result<()> {
    nix::sched::unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID)
        .context("no new mount and PID namespaces")
}

/// Makes the namespaces ours: no mount is seen outside, /proc shows our processes, and what is put
/// under [`SHARED_MEMORY`] goes when we go.
pub fn settle_in() -> anyhow::Result<()> {
    ensure!(std::process::id() == 1, "this is no PID namespace of its own");
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private).context("mounts cannot be made private")?;
    let none = MountFlags::empty();
    rustix::mount::mount("proc", "/proc", "proc", none, None).context("no /proc")?;
    rustix::mount::mount("none", SHARED_MEMORY, "tmpfs", none, None).context("no tmpfs")?;
    Ok(())
}

/// A file system mounted for one setup.
#[derive(Debug)]
pub struct Stage {
    pub folder: PathBuf,
    /// What it is, for the report.
    pub kind: String,
}

impl Stage {
    /// Mounts an ext4 image with room for `bytes` of content, or a tmpfs where that cannot be.
    pub fn mount(name: &str, bytes: u64) -> anyhow::Result<Self> {
        let base = Path::new(SHARED_MEMORY).join("stage");
        let folder = base.join(name);
        fs::create_dir_all(&folder)?;
        let image = base.join(format!("{name}.img"));
        let kind = match mount_image(&image, &folder, bytes) {
            Ok(()) => "ext4 on a loop device, noatime".to_owned(),
            Err(error) => {
                let flags = MountFlags::NOATIME;
                rustix::mount::mount("none", &folder, "tmpfs", flags, None).with_context(|| {
                    format!("neither ext4 ({error:#}) nor tmpfs can be mounted")
                })?;
                format!("tmpfs, noatime (no ext4: {error:#})")
            }
        };
        Ok(Self { folder, kind })
    }

    /// Mounts a copy of it, as a clone of a guest has one.
    pub fn copy(&self, name: &str) -> anyhow::Result<Self> {
        let base = Path::new(SHARED_MEMORY).join("stage");
        let folder = base.join(name);
        fs::create_dir_all(&folder)?;
        let own = self.folder.file_name().context("it has a name")?;
        let (from, to) = (base.join(own).with_extension("img"), base.join(format!("{name}.img")));
        fs::copy(from, &to).context("a file system in an image is needed")?;
        let (image, at) = (to.display().to_string(), folder.display().to_string());
        tool(&["mount", "-o", "loop,noatime", &image, &at])?;
        Ok(Self { folder, kind: self.kind.clone() })
    }

    /// Writes back what is dirty, so that nothing does it while we measure.
    pub fn sync(&self) -> anyhow::Result<()> {
        Ok(rustix::fs::syncfs(File::open(&self.folder)?)?)
    }
}

fn mount_image(image: &Path, folder: &Path, bytes: u64) -> anyhow::Result<()> {
    // Journal, inode tables and a block for each small file come on top.
    File::create(image)?.set_len(bytes * 5 / 4 + (64 << 20))?;
    let image_text = image.display().to_string();
    // Everything is initialised now, so that the kernel does not do it in the background.
    let lazy = "lazy_itable_init=0,lazy_journal_init=0";
    tool(&["mkfs.ext4", "-q", "-F", "-m", "0", "-E", lazy, &image_text])?;
    tool(&["mount", "-o", "loop,noatime", &image_text, &folder.display().to_string()])
}

/// Runs a tool, at most a minute.
fn tool(words: &[&str]) -> anyhow::Result<()> {
    text_of(Command::new("timeout").arg("60").args(words)).map(drop)
}

/// Runs a command to its end; an error holds its own words.
pub fn text_of(command: &mut Command) -> anyhow::Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("{command:?} cannot be started"))?;
    let words = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?}: {}, {}", output.status, words.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
