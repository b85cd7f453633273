//! The lab's network: a namespace with two bridges, a tap on each for every guest.

use std::fmt::Write;
use std::fs::File;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, anyhow};
use rustix::thread::LinkNameSpaceType;

use crate::process::{run_tool, run_tool_with_input};

/// The host's address on the guests' bridge, where the service listens for TCP links.
pub const HOST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);

/// One guest's place in the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestNet {
    pub tap: String,
    pub management_tap: String,
    pub address: Ipv4Addr,
    pub management: Ipv4Addr,
    pub hardware: String,
    pub management_hardware: String,
}

impl GuestNet {
    /// The place of guest number `index`, from 1.
    pub fn new(index: u32) -> Self {
        let last = 10 + index as u8;
        Self {
            tap: format!("g{index}"),
            management_tap: format!("g{index}m"),
            address: Ipv4Addr::new(10, 77, 0, last),
            management: Ipv4Addr::new(10, 78, 0, last),
            hardware: format!("52:54:00:77:00:{last:02x}"),
            management_hardware: format!("52:54:00:78:00:{last:02x}"),
        }
    }
}

/// Makes namespace, bridges and taps.
pub fn create(netns: &str, guests: &[GuestNet]) -> anyhow::Result<()> {
    run_tool(["ip", "netns", "add", netns])
        .context("cannot make a network namespace (the lab needs root)")?;
    let mut script = String::from("link set lo up\n");
    for (bridge, host) in [("br0", "10.77.0.1"), ("mgmt", "10.78.0.1")] {
        writeln!(script, "link add {bridge} type bridge forward_delay 0")?;
        writeln!(script, "link set {bridge} addrgenmode none up")?;
        writeln!(script, "address add {host}/24 dev {bridge}")?;
    }
    for guest in guests {
        for (tap, bridge) in [(&guest.tap, "br0"), (&guest.management_tap, "mgmt")] {
            writeln!(script, "tuntap add dev {tap} mode tap")?;
            writeln!(script, "link set {tap} master {bridge} addrgenmode none up")?;
        }
        // Known from the start, so that the first connection need not wait for address resolution.
        writeln!(
            script,
            "neigh replace {} lladdr {} dev mgmt nud permanent",
            guest.management, guest.management_hardware
        )?;
    }
    run_tool_with_input(["ip", "-netns", netns, "-batch", "-"], &script)
        .context("cannot set the bridges up")?;
    Ok(())
}

/// Removes the namespace with all that is in it.
pub fn destroy(netns: &str) -> anyhow::Result<()> {
    if Path::new("/run/netns").join(netns).exists() {
        run_tool(["ip", "netns", "delete", netns])?;
    }
    Ok(())
}

/// Connects from inside the namespace. A socket stays in the namespace where it was made, so a thread
/// that goes there for a moment is enough.
pub fn connect(
    netns: &str,
    address: Ipv4Addr,
    port: u16,
    timeout: Duration,
) -> anyhow::Result<TcpStream> {
    let path = Path::new("/run/netns").join(netns);
    let namespace =
        File::open(&path).with_context(|| format!("the lab's namespace {netns} is gone"))?;
    let target = SocketAddr::new(IpAddr::V4(address), port);
    thread::spawn(move || -> anyhow::Result<TcpStream> {
        rustix::thread::move_into_link_name_space(
            namespace.as_fd(),
            Some(LinkNameSpaceType::Network),
        )?;
        Ok(TcpStream::connect_timeout(&target, timeout)?)
    })
    .join()
    .map_err(|_| anyhow!("the connecting thread died"))?
}
