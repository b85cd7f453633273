//! Where guests connect: unix sockets for each guest, one TCP port, one AF_VSOCK port.
//!
//! A connection's handshake runs on a thread of its own, which becomes the session's reader when
//! the driver has proved itself. Nothing that an unproved peer does or leaves undone touches a
//! session that stands.

mod channel;
mod handshake;

use crate::guest::Guest;
use crate::host::Host;
use crate::link::Socket;
use handshake::Handshake;
use seawall_client::LinkKind;
use seawall_proto::PORT;
use std::collections::VecDeque;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// TCP connections of one address, and of all, that have not said yet which region is theirs.
const UNNAMED_PER_PEER: usize = 8;
const UNNAMED_MAX: usize = 128;
/// How often a listener looks whether its socket is still there.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// The stack of a thread that serves one connection; the longest frame and record fit well.
const STACK: usize = 512 * 1024;

/// Starts a thread for one connection.
fn spawn(name: String, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name).stack_size(STACK).spawn(work).map(drop)
}

/// Listens on a guest's unix sockets until the guest is removed.
pub fn serve_guest(host: &Arc<Host>, guest: &Arc<Guest>) -> io::Result<()> {
    let sockets =
        [(&guest.config.socket, LinkKind::Unix), (&guest.config.serial_socket, LinkKind::Serial)];
    for (socket, kind) in sockets {
        if let Some(socket) = socket {
            serve_path(host, guest, socket.get_ref().as_path(), kind)?;
        }
    }
    Ok(())
}

fn serve_path(host: &Arc<Host>, guest: &Arc<Guest>, path: &Path, kind: LinkKind) -> io::Result<()> {
    let (host, guest, path) = (Arc::clone(host), Arc::clone(guest), path.to_owned());
    thread::Builder::new().name(format!("at {}", guest.name())).spawn(move || {
        let mut complained = false;
        while !guest.is_removed() {
            match bind(&path) {
                Ok(listener) => {
                    complained = false;
                    let ours = identity(&path);
                    accept_unix(&host, &guest, &listener, &path, kind);
                    // Whoever connects now must not wait for an answer. What another has put there, a
                    // listener that came after this one say, is not ours to remove.
                    if guest.is_removed() && ours.is_some() && identity(&path) == ours {
                        let _ = std::fs::remove_file(&path);
                    }
                }
                Err(error) => {
                    if !std::mem::replace(&mut complained, true) {
                        let path = path.display();
                        tracing::error!(guest = guest.name(), %error, "cannot listen on {path}; trying again each second");
                    }
                    thread::sleep(LOOK_AGAIN);
                }
            }
        }
    })?;
    Ok(())
}

/// Binds a unix socket in place of one that an earlier service left behind.
fn bind(path: &Path) -> io::Result<UnixListener> {
    if path.symlink_metadata().is_ok_and(|found| found.file_type().is_socket()) {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Device and inode of what is there.
fn identity(path: &Path) -> Option<(u64, u64)> {
    use std::os::unix::fs::MetadataExt;
    path.symlink_metadata().ok().map(|found| (found.dev(), found.ino()))
}

/// Accepts until the guest is removed or the socket file has vanished or is another's.
fn accept_unix(
    host: &Arc<Host>,
    guest: &Arc<Guest>,
    listener: &UnixListener,
    path: &Path,
    kind: LinkKind,
) {
    let ours = identity(path);
    while !guest.is_removed() && ours.is_some() && identity(path) == ours {
        if !wait_readable(listener) {
            continue;
        }
        match listener.accept() {
            Ok((stream, _)) => {
                let socket = Socket::new(stream);
                let (host, guest_of_thread) = (Arc::clone(host), Arc::clone(guest));
                let place = (kind != LinkKind::Serial).then(|| guest.half_open(socket.clone()));
                let serve = move || match place {
                    Some(place) => Handshake::new(host, guest_of_thread, place).serve(kind, socket),
                    None => channel::serve(&host, &guest_of_thread, socket),
                };
                if let Err(error) = spawn(guest.name().to_owned(), serve) {
                    guest.complain(&format!("no thread for a connection: {error}"));
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                guest.complain(&format!("a connection cannot be accepted: {error}"));
                thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

/// Waits at most a second for a connection.
fn wait_readable(listener: &impl std::os::fd::AsFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let second = Timespec { tv_sec: 1, tv_nsec: 0 };
    poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&second)).is_ok_and(|ready| ready > 0)
}

/// Listens on TCP for as long as the service lives.
pub fn serve_tcp(host: &Arc<Host>, address: SocketAddr) -> io::Result<()> {
    let listener = TcpListener::bind(address)?;
    let host = Arc::clone(host);
    let unnamed = Arc::new(Unnamed::default());
    thread::Builder::new().name("at tcp".into()).spawn(move || {
        loop {
            match listener.accept() {
                Ok((stream, peer)) => {
                    // Small answers must not wait for more; the kernel's default stays if not.
                    let _ = stream.set_nodelay(true);
                    let socket = Socket::new(stream);
                    unnamed.add(peer.ip(), socket.clone());
                    let (host, unnamed) = (Arc::clone(&host), Arc::clone(&unnamed));
                    let serve = move || {
                        let named = handshake::identify(&host, &socket, peer);
                        unnamed.remove(&socket);
                        if let Some((handshake, connection)) = named {
                            handshake.go_on(connection);
                        }
                    };
                    if let Err(error) = spawn("tcp".into(), serve) {
                        tracing::error!(%error, "no thread for a TCP connection");
                    }
                }
                Err(error) => {
                    tracing::debug!(%error, "a TCP connection cannot be accepted");
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
    })?;
    Ok(())
}

/// Listens on AF_VSOCK for as long as the service lives.
pub fn serve_vsock(host: &Arc<Host>) -> io::Result<()> {
    let listener = vsock::VsockListener::bind_with_cid_port(vsock::VMADDR_CID_ANY, PORT.into())?;
    let host = Arc::clone(host);
    thread::Builder::new().name("at vsock".into()).spawn(move || {
        loop {
            let (stream, peer) = match listener.accept() {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::debug!(%error, "a vsock connection cannot be accepted");
                    thread::sleep(Duration::from_millis(100));
                    continue;
                }
            };
            let is_it = |guest: &Guest| {
                guest.config.vsock_cid.as_ref().is_some_and(|cid| *cid.get_ref() == peer.cid())
            };
            let Some(guest) = host.guests.find(is_it) else {
                tracing::debug!(
                    cid = peer.cid(),
                    "a vsock connection of a guest that is not configured"
                );
                continue;
            };
            let socket = Socket::new(stream);
            let place = guest.half_open(socket.clone());
            let handshake = Handshake::new(Arc::clone(&host), Arc::clone(&guest), place);
            if let Err(error) =
                spawn(guest.name().to_owned(), move || handshake.serve(LinkKind::Vsock, socket))
            {
                guest.complain(&format!("no thread for a connection: {error}"));
            }
        }
    })?;
    Ok(())
}

/// TCP connections that have not said yet which region is theirs. One too many ends the oldest.
#[derive(Default)]
struct Unnamed(Mutex<VecDeque<(IpAddr, Socket)>>);

impl Unnamed {
    fn add(&self, peer: IpAddr, socket: Socket) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.push_back((peer, socket));
        let of_peer = all.iter().filter(|(ip, _)| *ip == peer).count();
        let oldest = if of_peer > UNNAMED_PER_PEER {
            all.iter().position(|(ip, _)| *ip == peer)
        } else {
            (all.len() > UNNAMED_MAX).then_some(0)
        };
        if let Some((_, socket)) = oldest.and_then(|at| all.remove(at)) {
            socket.end();
        }
    }

    fn remove(&self, socket: &Socket) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|(_, other)| !other.is(socket));
    }
}
