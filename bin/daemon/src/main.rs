//! seawalld, the host service.
//!
//! Guests' drivers connect ([`listen`]), prove themselves and hold a [`session`]; their content is
//! copied once ([`copy`]), looked up and scanned ([`pipeline`], [`engines`]). The data path runs on
//! threads of its own; only what serves requests on demand is asynchronous: the REST interface ([`api`])
//! and clamd's protocol ([`clamd`]).

mod alarm;
mod api;
mod clamd;
mod clock;
mod config;
mod copy;
mod database;
mod engines;
mod events;
mod generation;
mod golden;
mod guest;
mod host;
mod key;
mod link;
mod listen;
mod metrics;
mod on_demand;
mod outbox;
mod pipeline;
mod quarantine;
mod quiet;
mod region;
mod scans;
mod session;
mod signatures;
mod state;

use anyhow::{Context, bail};
use clap::Parser;
use config::Config;
use host::Host;
use seawall_client::{Event, EventKind};
use std::fs::{DirBuilder, File};
use std::io::IsTerminal;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;
use utoipa::OpenApi;

/// The Seawall host service: scans what guests' processes open, on behalf of their drivers.
///
/// It logs to stderr. SIGHUP reads the configuration and the signatures again, SIGTERM ends it in
/// good order. RUST_LOG sets the log's detail (error, warn, info, debug; default info).
#[derive(Debug, Parser)]
#[command(
    name = "seawalld",
    version,
    after_help = "Examples:\n  seawalld --config /etc/seawall/seawalld.toml --check\n  \
                  seawalld --config /etc/seawall/seawalld.toml\n\n\
                  Exit codes: 0 ended by a signal, or --check found nothing wrong; 1 it cannot run; 2 wrong use."
)]
struct Arguments {
    /// The configuration file.
    #[arg(long, value_name = "FILE", required_unless_present = "openapi")]
    config: Option<PathBuf>,
    /// Only say whether the configuration is right.
    #[arg(long)]
    check: bool,
    /// Print the OpenAPI document of the REST interface.
    #[arg(long, conflicts_with_all = ["config", "check"])]
    openapi: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("seawalld: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    if arguments.openapi {
        println!("{}", api::Document::openapi().to_pretty_json()?);
        return Ok(());
    }
    let path = arguments.config.clone().context("--config is missing")?;
    let config = Config::load(&path)?;
    if arguments.check {
        for warning in &config.warnings {
            eprintln!("{warning}");
        }
        let (guests, groups) = (config.guests.len(), config.groups.len());
        println!(
            "{}: the configuration is right, {guests} guests, {groups} groups",
            path.display()
        );
        return Ok(());
    }
    log_to_stderr();
    raise_descriptors();
    // Nothing that the service creates is for others.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let _only_one = only_one(&config)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve(path, config))
}

/// Each content that waits for its scan is a descriptor, and a thousand of one guest's must not be all
/// that there are.
fn raise_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    let raised = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    let most = getrlimit(Resource::Nofile).current;
    if raised.is_err() || most.is_some_and(|most| most < DESCRIPTORS_WANTED) {
        tracing::warn!(
            ?most,
            wanted = DESCRIPTORS_WANTED,
            "few descriptors: many guests at once may get fail mode; raise LimitNOFILE"
        );
    }
}

/// How long a service that was just told to end may still hold its lock.
const PREDECESSOR: Duration = Duration::from_secs(2);
/// Descriptors for which no busy moment is too much.
const DESCRIPTORS_WANTED: u64 = 16_384;

fn log_to_stderr() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
}

/// Makes the folders, and sure that no other instance uses the same socket. The lock ends with the
/// process, however that ends.
fn only_one(config: &Config) -> anyhow::Result<File> {
    let service = &config.service;
    let parent = |path: &Path| path.parent().map(Path::to_owned).unwrap_or_default();
    let (socket, state) = (service.api_socket.as_path(), service.state_dir.as_path());
    for folder in [parent(socket), state.to_owned()] {
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&folder)
            .with_context(|| format!("the folder {} cannot be made", folder.display()))?;
    }
    let mut lock_path = socket.as_os_str().to_owned();
    lock_path.push(".lock");
    let lock_path = PathBuf::from(lock_path);
    let lock = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&lock_path)
        .with_context(|| format!("{} cannot be opened", lock_path.display()))?;
    // One that was just ended may hold it for a moment.
    let until = Instant::now() + PREDECESSOR;
    let taken = || rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive);
    while taken().is_err() && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(20));
    }
    if taken().is_err() {
        bail!(
            "another seawalld serves {}; stop it, or give this one another api_socket",
            socket.display()
        );
    }
    Ok(lock)
}

async fn serve(config_path: PathBuf, config: Config) -> anyhow::Result<()> {
    let socket = config.service.api_socket.as_path().to_owned();
    // What is left of an earlier instance; the lock says that it is gone.
    if socket.exists() {
        std::fs::remove_file(&socket)
            .with_context(|| format!("{} cannot be replaced", socket.display()))?;
    }
    let listener = UnixListener::bind(&socket)
        .with_context(|| format!("cannot listen on {}", socket.display()))?;
    let host = start(config)?;
    let mut end = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hang_up = signal(SignalKind::hangup())?;
    let api = api::Api { host: Arc::clone(&host), config_path: Arc::new(config_path) };
    let serve = axum::serve(listener, api::router(api.clone()));
    let served = tokio::spawn(serve.into_future());
    let clamd = clamd::start(&api).context("clamd's protocol cannot be served")?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), socket = %socket.display(), "the service runs");
    loop {
        tokio::select! {
            _ = end.recv() => break,
            _ = interrupt.recv() => break,
            _ = hang_up.recv() => {
                let api = api.clone();
                // Its result stands in the log.
                tokio::task::spawn_blocking(move || drop(api.reload()));
            }
        }
    }
    served.abort();
    clamd.stop();
    stop(&host);
    // The next start replaces it if this fails.
    let _ = std::fs::remove_file(&socket);
    // Threads that still wait for guests or engines end with the process.
    std::process::exit(0);
}

/// Starts everything but the REST interface.
fn start(config: Config) -> anyhow::Result<Arc<Host>> {
    let service = config.service.clone();
    let metrics = Arc::<metrics::Metrics>::default();
    let state_dir = service.state_dir.as_path();
    let events = events::Events::start(
        &state_dir.join("events.db"),
        config.events.retention(),
        Arc::clone(&metrics),
    )
    .context("no thread for the events")?;
    let cache_entries = config.limits.verdict_cache_entries;
    let (state, keeper) =
        state::State::open(&state_dir.join("state.db"), cache_entries, events.clone());
    state.keep_guests(|name| config.guests.iter().any(|guest| guest.is_named(name)));
    let budget = copy::Budget::new(config.limits.private_copies_mib << 20, state_dir.to_owned());
    let may_allow = config.engines.0.iter().map(|engine| engine.may_allow).collect();
    let generations = generation::Generations::new(generation::start_number(state_dir), may_allow);
    let pipeline = pipeline::Pipeline::new(
        generations,
        cache_entries,
        config.order,
        state.clone(),
        Arc::clone(&metrics),
    );
    let recalling = Arc::clone(&pipeline);
    std::thread::Builder::new().name("state".into()).spawn(move || keeper.run(&recalling))?;
    let folder = state_dir.join("quarantine");
    let quarantine =
        quarantine::Quarantine::start(&folder, config.quarantine.clone(), events.clone())
            .context("the quarantine cannot be opened")?;
    quarantine.set_shares(&config);
    let watched: Vec<_> =
        config.signatures.watch.iter().map(|path| path.as_path().to_owned()).collect();
    let (signatures, signature_keeper) =
        signatures::Signatures::open(&state_dir.join("signatures"), &config.engines.0, &watched)?;
    let scans = scans::Scans::open(state_dir.join("scans"), events.clone());
    let golden = golden::Golden::open(state_dir.join("golden"), events.clone());
    let guests = guest::Guests::default();
    let new = guests.configure(&config, &budget);
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    if new.is_empty() {
        tracing::warn!("no guest is configured: nothing is protected");
    }
    let first_config = Arc::new(config.clone());
    let host = Arc::new(Host {
        config: RwLock::new(Arc::clone(&first_config)),
        first_config,
        guests,
        pipeline,
        events,
        state,
        metrics,
        budget,
        quarantine,
        signatures,
        scans,
        golden,
        started: jiff::Timestamp::now(),
        telling: Mutex::default(),
    });
    host.events.emit(
        Event::new(EventKind::ServiceStarted)
            .reason(format!("version {}", env!("CARGO_PKG_VERSION"))),
    );
    engines::start(&host).context("an engine's supervisor cannot be started")?;
    let changing = Arc::clone(&host);
    std::thread::Builder::new()
        .name("signatures".into())
        .spawn(move || signature_keeper.run(&changing))?;
    let watching = Arc::clone(&host);
    std::thread::Builder::new().name("watch".into()).spawn(move || watching.watch())?;
    let scanning = Arc::clone(&host);
    std::thread::Builder::new()
        .name("scans".into())
        .spawn(move || scanning.scans.keep(&scanning))?;
    let keeping = Arc::clone(&host);
    std::thread::Builder::new().name("regions".into()).spawn(move || keeping.keep_regions())?;
    let sweeping = Arc::clone(&host.pipeline);
    std::thread::Builder::new().name("sweep".into()).spawn(move || sweeping.sweep())?;
    host.serve(&new);
    if let Some(address) = service.tcp_listen.0 {
        listen::serve_tcp(&host, address)
            .with_context(|| format!("cannot listen on TCP {address}"))?;
    }
    if service.vsock_listen {
        listen::serve_vsock(&host)
            .context("cannot listen on AF_VSOCK (is /dev/vhost-vsock there?)")?;
    }
    Ok(host)
}

/// Ends the sessions and writes what waits to be written.
fn stop(host: &Host) {
    tracing::info!("the service ends");
    for guest in host.guests.all() {
        guest.remove("the service stops");
        for socket in guest.config.socket.iter().chain(&guest.config.serial_socket) {
            // The next start replaces it if this fails.
            let _ = std::fs::remove_file(socket.get_ref().as_path());
        }
    }
    // Each session's thread tells of its end itself.
    let until = Instant::now() + Duration::from_secs(1);
    while host.guests.all().iter().any(|guest| guest.session().is_some()) && Instant::now() < until
    {
        std::thread::sleep(Duration::from_millis(5));
    }
    host.scans.flush();
    host.golden.flush();
    host.events.emit(Event::new(EventKind::ServiceStopped));
    host.state.flush(Duration::from_secs(2));
    host.events.flush(Duration::from_secs(2));
}
