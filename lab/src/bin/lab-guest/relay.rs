//! A pipe that the lab can cut: stands between a guest's vsock device and the host service.
//!
//! Stopping this process silences the link, killing it resets the link, and in both cases the guest's
//! device stays whole, so that the guest can still shut down. Cutting at the device itself would
//! block QEMU, which waits for the device's answer when the guest powers off.

use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;

use anyhow::Context;

/// Listens on one socket and connects each caller to the other, until killed.
pub fn run(listen: &Path, connect: &Path) -> anyhow::Result<()> {
    // A socket left by a killed predecessor would refuse the bind.
    let _ = fs::remove_file(listen);
    let listener = UnixListener::bind(listen)
        .with_context(|| format!("cannot listen on {}", listen.display()))?;
    for caller in listener.incoming() {
        let caller = caller.context("accept")?;
        let target = connect.to_path_buf();
        thread::spawn(move || {
            // Without a service the caller is closed at once, as a refused connection would be.
            if let Ok(service) = UnixStream::connect(target) {
                let _ = join(&caller, &service);
            }
        });
    }
    Ok(())
}

fn join(caller: &UnixStream, service: &UnixStream) -> io::Result<()> {
    let (from, to) = (caller.try_clone()?, service.try_clone()?);
    let upward = thread::spawn(move || copy(from, to));
    copy(service.try_clone()?, caller.try_clone()?);
    let _ = upward.join();
    Ok(())
}

fn copy(mut from: UnixStream, mut to: UnixStream) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..count]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
}
