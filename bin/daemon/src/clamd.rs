//! clamd's protocol, so that ClamAV's clients use Seawall's engines and verdicts: clamd(8), "COMMANDS".
//!
//! Runs on the service's one asynchronous thread; files are read and content is hashed on blocking ones.
//! What comes is taken apart in [`command`] and [`chunks`], what goes is put together in [`answer`]; none of
//! them does I/O. A [`session`] is one client. All clients together have one guest's share of the memory
//! for copies ([`files`]), and [`bounds`] on everything else; what they ask for goes behind guests'
//! accesses.
//!
//! Unlike clamd, nothing is ever answered with OK that was not scanned: neither a FIFO nor a descriptor
//! that cannot be read, and not a folder in which something could not be looked at.

mod answer;
mod bounds;
mod chunks;
mod command;
mod connection;
mod files;
mod scan;
mod session;

use crate::api::Api;
use crate::config;
use crate::copy::Share;
use anyhow::{Context, bail};
use bounds::{Peer, Places};
use connection::Stream;
use files::Copying;
use jiff::Timestamp;
use jiff::tz::TimeZone;
use rustix::fs::{CWD, FileType, Gid, Mode};
use seawall_proto::Generation;
use session::Session;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Mutex as AsyncMutex, Semaphore};

/// Scans under way for all clients: few enough that the queue of on-demand scans is never full of them.
const SCANS: usize = 32;
/// Commands under way that scan or wait for it, of all clients.
const JOBS: usize = 256;
/// Descriptors and paths that are being opened or copied; reading one may hang for ever.
const DESCRIPTORS: usize = 64;
/// Of both, one client's user or address gets this part, and half of the sessions.
const PART: usize = 4;
/// Pieces of streams that are being hashed or stored.
const HANDS: usize = 16;
/// Between two reloads that clients ask for.
const RELOAD_GAP: Duration = Duration::from_secs(5);
/// After an accept that failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Whose words these are. Clients expect digits here; they name the clamd whose protocol this is.
const VERSION: &str = concat!("ClamAV 1.4.0-seawall-", env!("CARGO_PKG_VERSION"));
/// 2020-01-01: the number of a signature set is the second since then in which it came into use.
const EPOCH: i64 = 1_577_836_800;

/// What all clients share.
struct Clamd {
    api: Api,
    settings: config::Clamd,
    share: Arc<Share>,
    descriptors: Places,
    jobs: Places,
    scans: Semaphore,
    waiting: AtomicUsize,
    hands: Semaphore,
    in_use: Mutex<(Generation, Timestamp)>,
    /// Held by the reload under way.
    reloading: AsyncMutex<()>,
    reloads_wanted: AtomicUsize,
}

/// The sockets, until the service ends.
pub struct Serving {
    socket: Option<PathBuf>,
}

impl Serving {
    /// Takes the socket away; sessions end with the service.
    pub fn stop(&self) {
        if let Some(socket) = &self.socket {
            // The next start replaces it if this fails.
            let _ = std::fs::remove_file(socket);
        }
    }
}

/// Listens where the configuration says.
pub fn start(api: &Api) -> anyhow::Result<Serving> {
    let settings = api.host.first_config.clamd.clone();
    let (socket, address) = (settings.socket.0.clone(), settings.tcp_listen.0);
    let local = socket.as_deref().map(|path| listen(path, &settings)).transpose()?;
    let network = address
        .map(|address| -> anyhow::Result<_> {
            let listener = std::net::TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            Ok(TcpListener::from_std(listener)?)
        })
        .transpose()
        .with_context(|| format!("cannot listen on TCP {address:?}"))?;
    let pipeline = &api.host.pipeline;
    let clamd = Arc::new(Clamd {
        share: api.host.budget.share(),
        descriptors: Places::new(DESCRIPTORS, DESCRIPTORS / PART),
        jobs: Places::new(JOBS, JOBS / PART),
        scans: Semaphore::new(SCANS),
        waiting: AtomicUsize::new(0),
        hands: Semaphore::new(HANDS),
        in_use: Mutex::new((pipeline.generations.current(), Timestamp::now())),
        reloading: AsyncMutex::default(),
        reloads_wanted: AtomicUsize::new(0),
        api: api.clone(),
        settings,
    });
    if let Some(listener) = local {
        tracing::info!(socket = ?socket, "clamd's protocol is served");
        tokio::spawn(serve(Arc::clone(&clamd), Listener::Unix(listener)));
    }
    if let Some(listener) = network {
        tracing::info!(
            ?address,
            "clamd's protocol is served on TCP: to anybody, and not encrypted"
        );
        tokio::spawn(serve(Arc::clone(&clamd), Listener::Tcp(listener)));
    }
    if socket.is_some() || address.is_some() {
        tokio::spawn(clamd.watch_signatures());
    }
    Ok(Serving { socket })
}

/// Makes the socket. It is the service's own until its group and mode are set.
fn listen(path: &Path, settings: &config::Clamd) -> anyhow::Result<UnixListener> {
    let shown = path.display();
    let group = group(&settings.socket_group)?;
    match std::fs::symlink_metadata(path) {
        Ok(found) if FileType::from_raw_mode(mode_of(&found)) != FileType::Socket => {
            bail!("{shown} is there and no socket; remove it, or name another `socket`")
        }
        Ok(_) if StdUnixStream::connect(path).is_ok() => {
            bail!("another program serves {shown}; stop it, or name another `socket`")
        }
        Ok(_) => std::fs::remove_file(path)?,
        Err(_) => {}
    }
    let listener = UnixListener::bind(path).with_context(|| format!("cannot listen on {shown}"))?;
    let limited = || -> Result<(), rustix::io::Errno> {
        if group.is_some() {
            rustix::fs::chown(path, None, group)?;
        }
        rustix::fs::chmodat(
            CWD,
            path,
            Mode::from_raw_mode(settings.socket_mode.0),
            rustix::fs::AtFlags::empty(),
        )
    };
    limited().with_context(|| format!("{shown} cannot get its group and mode"))?;
    Ok(listener)
}

fn mode_of(found: &std::fs::Metadata) -> u32 {
    std::os::unix::fs::MetadataExt::mode(found)
}

/// A group of /etc/group by its name, or any by its number; none for an empty word.
fn group(name: &str) -> anyhow::Result<Option<Gid>> {
    if name.is_empty() {
        return Ok(None);
    }
    let number = name.parse().ok().or_else(|| {
        let groups = std::fs::read_to_string("/etc/group").unwrap_or_default();
        // NAME:PASSWORD:GID:MEMBERS (group(5))
        groups.lines().find_map(|line| {
            let mut fields = line.split(':');
            (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok()).flatten()
        })
    });
    let number: u32 = number.with_context(|| {
        format!("`socket_group`: /etc/group has no `{name}`; name another or give its number")
    })?;
    Ok(Some(Gid::from_raw(number)))
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    async fn accept(&self) -> std::io::Result<(Stream, Peer)> {
        match self {
            Self::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                let peer = Peer::User(stream.peer_cred()?.uid());
                Ok((Stream::Unix(stream), peer))
            }
            Self::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                // Answers are short, and somebody waits for them.
                stream.set_nodelay(true)?;
                Ok((Stream::Tcp(stream), Peer::Address(address.ip())))
            }
        }
    }
}

/// Takes clients in, each for a task of its own.
async fn serve(clamd: Arc<Clamd>, listener: Listener) {
    let most = clamd.settings.max_sessions as usize;
    let sessions = Places::new(most, most / 2);
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(client) => client,
            Err(error) => {
                tracing::debug!(%error, "a client of clamd's protocol was not taken in");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        // Too many: it is closed at once, and may come again.
        let Ok(place) = sessions.try_take(peer) else { continue };
        let session = Session::new(Arc::clone(&clamd), stream, peer);
        tokio::spawn(async move {
            session.run().await;
            drop(place);
        });
    }
}

impl Clamd {
    fn copying_streams(&self) -> Copying {
        let usual = self.settings.stream_max();
        let whole_file = self.api.host.config().policy.whole_file_limit();
        Copying { share: Arc::clone(&self.share), limit: usual.min(whole_file), usual }
    }

    fn copying_files(&self) -> Copying {
        let limit = self.api.host.config().policy.whole_file_limit();
        Copying { share: Arc::clone(&self.share), limit, usual: limit }
    }

    /// Notes when signatures change.
    async fn watch_signatures(self: Arc<Self>) {
        loop {
            self.signatures();
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    /// Since when the signatures are in use.
    fn signatures(&self) -> Timestamp {
        let now = self.api.host.pipeline.generations.current();
        let mut in_use = self.in_use.lock().unwrap_or_else(PoisonError::into_inner);
        if in_use.0 != now {
            *in_use = (now, Timestamp::now());
        }
        in_use.1
    }

    /// `ClamAV VERSION/NUMBER OF THE SIGNATURES/THEIR TIME`, which clients take apart.
    fn version(&self) -> String {
        let since = self.signatures();
        let number = since.as_second().saturating_sub(EPOCH).max(0);
        let time = since.to_zoned_datetime(TimeZone::system()).strftime("%a %b %e %H:%M:%S %Y");
        format!("{VERSION}/{number}/{time}")
    }

    fn version_and_commands(&self) -> String {
        format!("{}| COMMANDS: {}", self.version(), command::NAMES)
    }

    /// In the form that clamdtop(1) reads.
    fn stats(&self) -> String {
        let live = SCANS - self.scans.available_permits();
        let waiting = self.waiting.load(Relaxed);
        let used = crate::metrics::resources(std::process::id()).map_or(0, |now| now.resident_kib);
        let (whole, part) = (used / 1024, used % 1024 * 1000 / 1024);
        format!(
            "POOLS: 1\n\nSTATE: VALID PRIMARY\n\
             THREADS: live {live}  idle {} max {SCANS} idle-timeout {}\n\
             QUEUE: {waiting} items\n\n\
             MEMSTATS: heap {whole}.{part:03}M mmap N/A used N/A free N/A releasable N/A \
             pools 0 pools_used 0.000M pools_total 0.000M\nEND",
            SCANS - live,
            self.settings.idle_timeout_s,
        )
    }

    /// Reads configuration and signatures again, in the background. Whoever asks while one waits for its
    /// turn asks for that one.
    fn reload(self: &Arc<Self>, peer: Peer) {
        if self.reloads_wanted.fetch_add(1, Relaxed) > 0 {
            return;
        }
        let clamd = Arc::clone(self);
        tokio::spawn(async move {
            let _one = clamd.reloading.lock().await;
            clamd.reloads_wanted.store(0, Relaxed);
            tracing::info!(?peer, "a client of clamd's protocol asked for a reload");
            let api = clamd.api.clone();
            // Its result stands in the log.
            let done = tokio::task::spawn_blocking(move || drop(api.reload()));
            drop(done.await);
            tokio::time::sleep(RELOAD_GAP).await;
        });
    }
}
