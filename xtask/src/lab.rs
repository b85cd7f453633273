//! `cargo xtask lab`

use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::{Subcommand, ValueEnum};
use nix::sys::signal::{SigSet, Signal};
use seawall_lab::wire::AgentPart;
use seawall_lab::{Engine, Guest, Image, Kernel, Lab, LabOptions, Link, Native, NativeOptions};

#[derive(clap::Args)]
pub struct Arguments {
    /// Which lab; several live side by side
    #[arg(long, global = true, default_value = "lab")]
    name: String,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Boot guests, start the service, and wait until all are protected
    Up(Up),
    /// Run a command in a guest; ends with its exit status, 124 when it timed out
    Exec {
        /// Numeric user to run as; 1000 is `user`
        #[arg(long)]
        user: Option<u32>,
        /// Kill the command after this many seconds
        #[arg(long)]
        timeout: Option<u64>,
        /// Hand standard input to the command
        #[arg(long, short = 'i')]
        stdin: bool,
        guest: String,
        #[arg(required = true, last = true)]
        command: Vec<String>,
    },
    /// Copy a file into a guest, with its permission bits
    Push { guest: String, local: PathBuf, remote: String },
    /// Copy a file out of a guest, with its permission bits
    Pull { guest: String, remote: String, local: PathBuf },
    /// Run the operator's command line against the lab's service
    Cli {
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Kill -9 a part of Seawall, or reset a guest's link
    Kill {
        part: Part,
        /// Needed for agent, supervisor and link
        guest: Option<String>,
    },
    /// Start or stop the driver in a guest, on purpose
    Agent { what: StartStop, guest: String },
    /// Start, stop or restart the service
    Daemon { what: DaemonVerb },
    /// Silence (down), reset or restore (up) a guest's link
    Link { what: LinkVerb, guest: String },
    /// Pull the region's device out of a running guest, or plug it in again
    Region { what: RegionVerb, guest: String },
    /// Boot a guest that is off
    Boot { guest: String },
    /// Show what a guest's serial console has shown
    Console { guest: String },
    /// Where things are: sockets, rules, quarantine, region files, logs
    Paths {
        #[arg(long)]
        json: bool,
    },
    /// Names of the labs that are there
    List,
    /// Take the lab down; leaves nothing behind
    Down {
        /// Every lab of this source tree
        #[arg(long)]
        all: bool,
    },
    /// Service and driver on this machine, for one file system; until ctrl-c
    Native {
        /// Where the file system is mounted; never the machine's root
        #[arg(long)]
        mount: PathBuf,
        /// Rules for the engine
        #[arg(long)]
        rules: Option<PathBuf>,
    },
}

#[derive(clap::Args)]
struct Up {
    #[arg(long, default_value_t = 1)]
    guests: u32,
    /// initramfs or debian
    #[arg(long, default_value_t = Image::Initramfs)]
    image: Image,
    /// 6.1 or 6.12
    #[arg(long, default_value_t = Kernel::V6_12)]
    kernel: Kernel,
    /// tcp, vsock or serial
    #[arg(long, default_value_t = Link::Vsock)]
    link: Link,
    /// Give the guests no region: their key comes by fw_cfg, content travels on the link
    #[arg(long)]
    no_region: bool,
    /// Give the guests a key by fw_cfg beside their region, for when it is unplugged or locked down
    #[arg(long)]
    key: bool,
    /// Words added to the guests' kernel command line, like lockdown=integrity
    #[arg(long, value_name = "WORDS", default_value = "")]
    kernel_arguments: String,
    /// Do not run the driver in the guests
    #[arg(long)]
    no_agent: bool,
    /// Do not run the service
    #[arg(long)]
    no_daemon: bool,
    /// Rules for the YARA engine instead of the lab's own
    #[arg(long)]
    rules: Option<PathBuf>,
    /// The engines in the order in which they decide: yara, clamav, hash
    #[arg(long, value_name = "ENGINES", value_delimiter = ',', default_value = "yara")]
    engines: Vec<Engine>,
    /// TOML file laid over the service's generated configuration
    #[arg(long)]
    config: Option<PathBuf>,
    /// Memory of each guest in MiB
    #[arg(long)]
    memory: Option<u32>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// The driver's worker; its supervisor starts the next
    Agent,
    /// The driver's supervisor; the guest's init starts the next after a second
    Supervisor,
    /// The service; `lab daemon start` brings it back
    Daemon,
    /// Every engine process; the service starts the next
    Engine,
    /// A guest's link: connections break, new ones are refused; `lab link up` restores it
    Link,
}

#[derive(Clone, Copy, ValueEnum)]
enum StartStop {
    Start,
    Stop,
}

#[derive(Clone, Copy, ValueEnum)]
enum DaemonVerb {
    Start,
    Stop,
    Restart,
}

#[derive(Clone, Copy, ValueEnum)]
enum RegionVerb {
    Unplug,
    Plug,
}

#[derive(Clone, Copy, ValueEnum)]
enum LinkVerb {
    /// What is sent arrives nowhere, and nobody is told
    Down,
    /// Connections break, new ones are refused (on TCP the same as down)
    Reset,
    /// As it was
    Up,
}

/// Carries one verb out.
pub fn run(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let name = arguments.name.as_str();
    let open = || Lab::open(name);
    let guest = |guest: &str| -> anyhow::Result<Guest> { open()?.guest(guest) };
    match arguments.verb {
        Verb::Up(up) => start(name, up)?,
        Verb::Exec { user, timeout, stdin, guest: target, command } => {
            return exec(&guest(&target)?, user, timeout, stdin, &command);
        }
        Verb::Push { guest: target, local, remote } => guest(&target)?.push(&local, &remote)?,
        Verb::Pull { guest: target, remote, local } => guest(&target)?.pull(&remote, &local)?,
        Verb::Cli { arguments } => return cli(&open()?, &arguments),
        Verb::Kill { part, guest } => kill(&open()?, part, guest.as_deref())?,
        Verb::Agent { what: StartStop::Start, guest: target } => guest(&target)?.start_agent()?,
        Verb::Agent { what: StartStop::Stop, guest: target } => guest(&target)?.stop_agent()?,
        Verb::Daemon { what } => daemon(&open()?, what)?,
        Verb::Link { what: LinkVerb::Down, guest: target } => guest(&target)?.link_down()?,
        Verb::Link { what: LinkVerb::Reset, guest: target } => guest(&target)?.link_reset()?,
        Verb::Link { what: LinkVerb::Up, guest: target } => guest(&target)?.link_up()?,
        Verb::Region { what: RegionVerb::Unplug, guest: target } => {
            guest(&target)?.unplug_region()?;
        }
        Verb::Region { what: RegionVerb::Plug, guest: target } => guest(&target)?.plug_region()?,
        Verb::Boot { guest: target } => {
            let guest = guest(&target)?;
            guest.boot()?;
            guest.wait_exec(Duration::from_secs(120))?;
        }
        Verb::Console { guest: target } => print!("{}", guest(&target)?.console()?),
        Verb::Paths { json } => paths(&open()?, json)?,
        Verb::List => Lab::names().iter().for_each(|name| println!("{name}")),
        Verb::Down { all: false } => Lab::down(name)?,
        Verb::Down { all: true } => Lab::names().iter().try_for_each(|name| Lab::down(name))?,
        Verb::Native { mount, rules } => native(mount, rules)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn start(name: &str, up: Up) -> anyhow::Result<()> {
    let started = Instant::now();
    let config = match &up.config {
        Some(path) => std::fs::read_to_string(path)
            .with_context(|| format!("cannot read {}", path.display()))?,
        None => String::new(),
    };
    let lab = Lab::up(LabOptions {
        name: name.to_owned(),
        guests: up.guests,
        image: up.image,
        kernel: up.kernel,
        link: up.link,
        region: !up.no_region,
        key: up.key,
        kernel_arguments: up.kernel_arguments,
        agent: !up.no_agent,
        daemon: !up.no_daemon,
        keep: true,
        config,
        rules: up.rules,
        engines: up.engines,
        memory_mib: up.memory,
    })?;
    let state = lab.state()?;
    let guests: Vec<_> =
        state.guests.iter().map(|guest| format!("{} {}", guest.name, guest.address)).collect();
    println!(
        "lab `{name}` is up after {:.1} s: {}; {}, kernel {}, link {}{}",
        started.elapsed().as_secs_f64(),
        guests.join(", "),
        state.image,
        state.kernel,
        state.link,
        if state.region { "" } else { ", no region" }
    );
    Ok(())
}

fn exec(
    guest: &Guest,
    user: Option<u32>,
    timeout: Option<u64>,
    stdin: bool,
    words: &[String],
) -> anyhow::Result<ExitCode> {
    let mut command = guest.command(words).no_timeout();
    if let Some(user) = user {
        command = command.as_user(user);
    }
    if let Some(seconds) = timeout {
        command = command.timeout(Duration::from_secs(seconds));
    }
    if stdin {
        let mut input = Vec::new();
        std::io::stdin().read_to_end(&mut input)?;
        command = command.stdin(input);
    }
    let output = command.stream(&mut std::io::stdout().lock(), &mut std::io::stderr().lock())?;
    if let Some(errno) = output.errno {
        eprintln!("{} (errno {errno})", output.error_text());
    }
    if output.timed_out {
        eprintln!("timed out");
        return Ok(ExitCode::from(124));
    }
    Ok(ExitCode::from(u8::try_from(output.status).unwrap_or(255)))
}

fn cli(lab: &Lab, arguments: &[String]) -> anyhow::Result<ExitCode> {
    let mut command = lab.cli_command()?;
    let status = command.args(arguments).status().context("cannot run the command line")?;
    Ok(ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(255)))
}

fn kill(lab: &Lab, part: Part, guest: Option<&str>) -> anyhow::Result<()> {
    let guest = || -> anyhow::Result<Guest> {
        match guest {
            Some(name) => lab.guest(name),
            None => bail!("say which guest: cargo xtask lab kill PART GUEST"),
        }
    };
    match part {
        Part::Agent => guest()?.kill_agent(AgentPart::Worker),
        Part::Supervisor => guest()?.kill_agent(AgentPart::Supervisor),
        Part::Link => guest()?.link_reset(),
        Part::Daemon => lab.kill_daemon(),
        Part::Engine => match lab.kill_engines()? {
            0 => bail!("the service has no engine process"),
            _ => Ok(()),
        },
    }
}

fn daemon(lab: &Lab, what: DaemonVerb) -> anyhow::Result<()> {
    match what {
        DaemonVerb::Start => lab.start_daemon(),
        DaemonVerb::Stop => lab.stop_daemon(),
        DaemonVerb::Restart => {
            if lab.daemon()?.is_some() {
                lab.stop_daemon()?;
            }
            lab.start_daemon()
        }
    }
}

fn paths(lab: &Lab, json: bool) -> anyhow::Result<()> {
    let state = lab.state()?;
    if json {
        println!("{}", serde_json::to_string_pretty(&state)?);
        return Ok(());
    }
    let line = |what: &str, path: &Path| println!("{what:<16} {}", path.display());
    println!("{:<16} {}", "namespace", state.netns);
    line("REST socket", &state.api_socket);
    line("clamd socket", &state.clamd_socket);
    line("configuration", &state.config);
    line("service log", &state.daemon_log);
    line("events", &state.events);
    line("quarantine", &state.quarantine);
    line("rules", &state.rules);
    line("signatures", &state.signatures);
    for guest in &state.guests {
        println!("{:<16} {}", guest.name, guest.address);
        if state.region {
            line("  region", &guest.region);
        }
        if state.key {
            line("  key", &guest.key);
        }
        line("  link socket", &guest.socket);
        line("  console", &guest.console);
        line("  log", &guest.log);
    }
    Ok(())
}

fn native(mount: PathBuf, rules: Option<PathBuf>) -> anyhow::Result<()> {
    // Blocked before any thread starts, so that all inherit it and the signal waits for us.
    let mut signals = SigSet::empty();
    signals.extend([Signal::SIGINT, Signal::SIGTERM]);
    signals.thread_block()?;
    let native =
        Native::start(&NativeOptions { mount: mount.clone(), rules, ..NativeOptions::default() })?;
    println!("{} is protected; ctrl-c ends it", mount.display());
    println!("REST socket      {}", native.api_socket.display());
    println!("control socket   {}", native.control.display());
    println!("service log      {}", native.daemon_log().display());
    println!("driver log       {}", native.agent_log().display());
    signals.wait()?;
    if std::io::stdout().is_terminal() {
        println!();
    }
    std::io::stdout().flush()?;
    drop(native);
    Ok(())
}
