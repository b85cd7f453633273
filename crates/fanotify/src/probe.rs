//! What this kernel can do, found out by trying: back-ports make versions lie.

use crate::group::{Answer, Group, Holds, IgnoreMark, Purpose};
use crate::process;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::process::{Pid, WaitOptions};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

/// How an open through an overlay shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OverlayView {
    /// There is no overlay file system to try with (yet).
    Unknown,
    /// At the marks of the file systems beneath it. Marking the overlay too would hold each open
    /// twice, the second time from within the read of the first.
    Beneath,
    /// Only at a mark on the overlay itself (kernels before about 6.5).
    Itself,
}

impl OverlayView {
    /// From [`crate::ledger::Ledger::overlay`].
    #[must_use]
    pub fn from_number(number: u32) -> Self {
        match number {
            1 => Self::Beneath,
            2 => Self::Itself,
            _ => Self::Unknown,
        }
    }

    /// For [`crate::ledger::Ledger::overlay`].
    #[must_use]
    pub fn number(self) -> u32 {
        match self {
            Self::Unknown => 0,
            Self::Beneath => 1,
            Self::Itself => 2,
        }
    }
}

/// Which kind of ignore mark this kernel has.
///
/// # Errors
/// When it has none at all, or no permission events.
pub fn ignore_mark() -> io::Result<IgnoreMark> {
    let group = Group::new(Purpose::Permission)?;
    let file = File::open("/proc/self/exe")?;
    if group.ignore_opens(file.as_fd(), IgnoreMark::Evictable).is_ok() {
        return Ok(IgnoreMark::Evictable);
    }
    group.ignore_opens(file.as_fd(), IgnoreMark::Plain).map(|()| IgnoreMark::Plain)
}

const BENEATH: u8 = 10;
const ITSELF: u8 = 11;

/// Mounts a small overlay in a mount namespace of its own and looks where an open through it shows.
/// Forks, so call it from a process of one thread. Takes at most about two seconds.
#[must_use]
pub fn overlay() -> OverlayView {
    let probe = || match watch_an_overlay() {
        Ok(true) => BENEATH,
        Ok(false) => ITSELF,
        Err(_) => 0,
    };
    let status = process::fork(probe).ok().and_then(wait).unwrap_or(0);
    match u8::try_from(status) {
        Ok(BENEATH) => OverlayView::Beneath,
        Ok(ITSELF) => OverlayView::Itself,
        _ => OverlayView::Unknown,
    }
}

fn wait(pid: u32) -> Option<i32> {
    let pid = Pid::from_raw(pid.cast_signed())?;
    let (_, status) = rustix::process::waitpid(Some(pid), WaitOptions::empty()).ok()??;
    status.exit_status()
}

fn watch_an_overlay() -> io::Result<bool> {
    // SAFETY: this process was just forked and has one thread; a mount namespace of its own changes
    // nothing that Rust code relies on.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS)? };
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", private)?;
    let base = ["/run", "/tmp", "/mnt"].map(Path::new).into_iter().find(|path| path.is_dir());
    let base = base.ok_or(io::ErrorKind::NotFound)?;
    rustix::mount::mount("none", base, "tmpfs", MountFlags::empty(), None)?;
    let [lower, upper, work, merged] = ["l", "u", "w", "m"].map(|name| base.join(name));
    for folder in [&lower, &upper, &work, &merged] {
        std::fs::create_dir(folder)?;
    }
    std::fs::write(lower.join("x"), "x")?;
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let options =
        format!("lowerdir={},upperdir={},workdir={}", text(&lower), text(&upper), text(&work));
    let options = std::ffi::CString::new(options)?;
    rustix::mount::mount("none", &merged, "overlay", MountFlags::empty(), options.as_c_str())?;

    let group = Group::new(Purpose::Permission)?;
    group.mark_filesystem(&lower, Holds::OpenAndExec)?;
    let opener = process::fork(move || u8::from(File::open(merged.join("x")).is_err()))?;
    let opener = Pid::from_raw(opener.cast_signed()).ok_or(io::ErrorKind::InvalidData)?;
    let until = Instant::now() + Duration::from_secs(1);
    while Instant::now() < until {
        let mut fds = [PollFd::new(&group, PollFlags::IN)];
        let tick = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
        if rustix::event::poll(&mut fds, Some(&tick))? > 0 {
            let mut answered = false;
            group.read(1, |event| {
                if let Some(fd) = event.fd {
                    use std::os::fd::AsRawFd;
                    answered |= group.answer(fd.as_raw_fd(), Answer::Allow).unwrap_or(false);
                }
            })?;
            return Ok(answered);
        }
        if rustix::process::waitpid(Some(opener), WaitOptions::NOHANG)?.is_some() {
            return Ok(false);
        }
    }
    Err(io::ErrorKind::TimedOut.into())
}
