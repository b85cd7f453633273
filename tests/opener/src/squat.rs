//! What any user of a guest can do to the driver's port on the host.

use std::io::Write;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vsock::{VMADDR_CID_HOST, VsockStream};

/// The service's port, as in the driver.
const PORT: u32 = 7325;

/// Holds up to this many connections that say nothing.
const SILENT: usize = 24;

/// Keeps at it for a while; a connection that the host ends is replaced.
pub fn run(length: Duration) -> Value {
    let until = Instant::now() + length;
    let mut silent: Vec<VsockStream> = Vec::new();
    let (mut connected, mut refused, mut sent, mut seed) = (0_u64, 0_u64, 0_u64, 1_u64);
    while Instant::now() < until {
        match VsockStream::connect_with_cid_port(VMADDR_CID_HOST, PORT) {
            Ok(mut stream) => {
                connected += 1;
                if connected % 3 == 0 {
                    let garbage = garbage(&mut seed);
                    sent += stream.write_all(&garbage).map_or(0, |()| garbage.len() as u64);
                } else {
                    silent.push(stream);
                    if silent.len() > SILENT {
                        silent.remove(0);
                    }
                }
            }
            Err(_) => refused += 1,
        }
        thread::sleep(Duration::from_millis(50));
    }
    json!({ "connected": connected, "refused": refused, "garbage_bytes": sent })
}

/// 4 KiB of numbers that mean nothing (xorshift).
fn garbage(seed: &mut u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(4096);
    while bytes.len() < 4096 {
        *seed ^= *seed << 13;
        *seed ^= *seed >> 7;
        *seed ^= *seed << 17;
        bytes.extend_from_slice(&seed.to_ne_bytes());
    }
    bytes
}
