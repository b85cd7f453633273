//! Times scans through the whole path: `latency CONTENT_BYTES COUNT PROGRAM ARGUMENTS…`, one scan at
//! a time. Prints the median and the 95th percentile in microseconds, beside a bare round trip of one
//! byte between two threads over a unix socket pair.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use seawall_engine::host::{ContentFd, EngineConfig, EngineHandle, Lane, Metadata, Operation};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let bytes: usize = arguments.next().ok_or("content size?")?.parse()?;
    let count: usize = arguments.next().ok_or("count?")?.parse()?;
    let command: Vec<String> = arguments.collect();
    let handle = EngineHandle::start(EngineConfig::new("latency", command), |_| ())?;
    if !handle.wait_ready(Duration::from_secs(60)) {
        return Err(format!("{:?}", handle.state()).into());
    }
    let (mut here, mut there) = UnixStream::pair()?;
    std::thread::spawn(move || {
        let mut byte = [0];
        while there.read_exact(&mut byte).is_ok() && there.write_all(&byte).is_ok() {}
    });
    let content = vec![b'.'; bytes];
    let metadata =
        Metadata { path: Vec::new(), guest: "g".into(), operation: Operation::Open, size: 0 };
    let (mut seal, mut bare, mut scan) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..count {
        let begin = Instant::now();
        here.write_all(&[1])?;
        here.read_exact(&mut [0])?;
        bare.push(begin.elapsed());
        let begin = Instant::now();
        let sealed = ContentFd::sealed(&content)?;
        seal.push(begin.elapsed());
        let (tell, reply) = mpsc::channel();
        let begin = Instant::now();
        handle.scan(sealed, metadata.clone(), Lane::OnAccess, Duration::from_secs(9), move |_| {
            let _ = tell.send(Instant::now());
        });
        scan.push(reply.recv()?.duration_since(begin));
    }
    for (name, mut times) in [("bare round trip", bare), ("copy and seal", seal), ("scan", scan)] {
        times.sort();
        let (median, late) = (times[count / 2], times[count * 95 / 100]);
        println!("{name}: median {} µs, 95 % {} µs", median.as_micros(), late.as_micros());
    }
    Ok(())
}
