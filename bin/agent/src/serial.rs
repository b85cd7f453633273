//! A virtio-serial port as a stream: what the kernel's port file does not do by itself
//! (drivers/char/virtio_console.c).
//!
//! The port is opened without blocking: a blocking write spins until the host has taken it, and waits
//! for ever where no host is connected. One process at a time may have it open, so ending the stream
//! closes it while other threads still hold the stream. A host that leaves shows as POLLHUP and as a
//! read of nothing.

use crate::link;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{Mode, OFlags};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The channel's name, as in QEMU's `virtserialport,name=…`.
pub const CHANNEL: &str = "org.seawall.0";

const FOR_EVER: u64 = u64::MAX;

/// An open port.
#[derive(Debug)]
pub struct SerialPort {
    port: Mutex<Option<Arc<OwnedFd>>>,
    /// Readable once the stream has ended.
    ended: OwnedFd,
    read_ms: AtomicU64,
    write_ms: AtomicU64,
}

impl SerialPort {
    /// Opens a port, or the one that carries the channel's name.
    pub fn open(path: Option<&Path>) -> io::Result<Self> {
        let path = match path {
            Some(path) => path.to_owned(),
            None => find(Path::new("/sys/class/virtio-ports"))?,
        };
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
        let port = rustix::fs::open(&path, flags, Mode::empty())?;
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut polled = [PollFd::new(&port, PollFlags::OUT)];
        poll(&mut polled, Some(&now))?;
        if polled[0].revents().contains(PollFlags::HUP) {
            let why = "nobody is connected at the host's end of the channel";
            return Err(io::Error::new(io::ErrorKind::NotConnected, why));
        }
        Ok(Self {
            port: Mutex::new(Some(Arc::new(port))),
            ended: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            read_ms: AtomicU64::new(FOR_EVER),
            write_ms: AtomicU64::new(FOR_EVER),
        })
    }

    /// Whether the host takes a few bytes without a wait.
    pub fn takes_now(&self) -> bool {
        self.port().is_ok_and(|port| link::takes_now(&*port))
    }

    /// As of a socket.
    pub fn set_read_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        self.read_ms.store(milliseconds(limit), Ordering::Relaxed);
        Ok(())
    }

    /// As of a socket.
    pub fn set_write_timeout(&self, limit: Option<Duration>) -> io::Result<()> {
        self.write_ms.store(milliseconds(limit), Ordering::Relaxed);
        Ok(())
    }

    /// Ends the stream in both directions and closes the port as soon as nobody is in a call on it.
    pub fn shutdown(&self, _both: Shutdown) -> io::Result<()> {
        drop(self.port.lock().unwrap_or_else(PoisonError::into_inner).take());
        rustix::io::write(&self.ended, &1_u64.to_ne_bytes())?;
        Ok(())
    }

    fn port(&self) -> io::Result<Arc<OwnedFd>> {
        let port = self.port.lock().unwrap_or_else(PoisonError::into_inner);
        port.clone().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    /// Waits until the port may take or give something, or says why not.
    fn wait(&self, what: PollFlags, until: Option<Instant>) -> io::Result<()> {
        let port = self.port()?;
        let left = match until {
            Some(until) => {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Some(Timespec::try_from(left).map_err(io::Error::other)?)
            }
            None => None,
        };
        let ended = PollFd::new(&self.ended, PollFlags::IN);
        let mut polled = [PollFd::new(&*port, what), ended];
        match poll(&mut polled, left.as_ref()) {
            Err(rustix::io::Errno::INTR) => return Ok(()),
            other => other?,
        };
        let gone = polled[0].revents().intersects(PollFlags::HUP | PollFlags::ERR);
        if !polled[1].revents().is_empty() || gone && what == PollFlags::OUT {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        Ok(())
    }
}

fn milliseconds(limit: Option<Duration>) -> u64 {
    limit.map_or(FOR_EVER, |limit| u64::try_from(limit.as_millis()).unwrap_or(FOR_EVER))
}

fn deadline(limit: &AtomicU64) -> Option<Instant> {
    let ms = limit.load(Ordering::Relaxed);
    (ms != FOR_EVER).then(|| Instant::now() + Duration::from_millis(ms))
}

impl Read for &SerialPort {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let until = deadline(&self.read_ms);
        loop {
            let port = self.port()?;
            match rustix::io::read(&*port, &mut *buffer) {
                Err(rustix::io::Errno::AGAIN) => drop(port),
                result => return Ok(result?),
            }
            self.wait(PollFlags::IN, until)?;
        }
    }
}

impl Write for &SerialPort {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let until = deadline(&self.write_ms);
        loop {
            let port = self.port()?;
            match rustix::io::write(&*port, bytes) {
                Err(rustix::io::Errno::AGAIN) => drop(port),
                result => return Ok(result?),
            }
            self.wait(PollFlags::OUT, until)?;
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The device of the port with our name. `/dev/virtio-ports` has it too, but only where udev runs.
fn find(ports: &Path) -> io::Result<PathBuf> {
    let missing = || {
        let why = format!("this machine has no virtio-serial port named {CHANNEL}");
        io::Error::new(io::ErrorKind::NotFound, why)
    };
    for port in std::fs::read_dir(ports).map_err(|_| missing())?.flatten() {
        let name = std::fs::read_to_string(port.path().join("name")).unwrap_or_default();
        if name.trim() == CHANNEL {
            return Ok(Path::new("/dev").join(port.file_name()));
        }
    }
    Err(missing())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_is_found_by_its_name() {
        let folder = tempfile::tempdir().unwrap();
        for (port, name) in [("vport1p1", "org.qemu.guest_agent.0"), ("vport1p2", CHANNEL)] {
            std::fs::create_dir(folder.path().join(port)).unwrap();
            std::fs::write(folder.path().join(port).join("name"), format!("{name}\n")).unwrap();
        }
        assert_eq!(find(folder.path()).unwrap(), Path::new("/dev/vport1p2"));
        assert!(find(Path::new("/nonexistent")).unwrap_err().to_string().contains(CHANNEL));
    }

    /// A FIFO is close enough to a port for this: a reader that waits is woken.
    #[test]
    fn ending_the_stream_wakes_who_waits_and_closes_the_port() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("port");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let port = Arc::new(SerialPort::open(Some(&path)).unwrap());
        port.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let error = (&*port).read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        port.set_read_timeout(None).unwrap();
        let reader = Arc::clone(&port);
        let reader = std::thread::spawn(move || (&*reader).read(&mut [0]));
        std::thread::sleep(Duration::from_millis(100));
        port.shutdown(Shutdown::Both).unwrap();
        assert!(reader.join().unwrap().is_err());
        assert!(port.port().is_err());
    }
}
