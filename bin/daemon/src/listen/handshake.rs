//! From a fresh connection, or a beginning on a channel, to a session: (TCP: preface, Noise,) hello, attach.
//!
//! Everything has to be said within [`HANDSHAKE_MAX`]. A peer that is refused gets the reason where
//! the protocol has one, and one log line tells the operator.

use crate::guest::{Guest, HalfOpen};
use crate::host::Host;
use crate::link::{Connection, LinkReader, ReadError, Socket};
use crate::outbox::Outbox;
use crate::region::{OpenRegion, RegionError, random};
use crate::session::Session;
use seawall_client::text::escape_short;
use seawall_client::{Driver, Event, EventKind, LinkKind};
use seawall_proto::frame::{Decoder, FrameError, decode, encode};
use seawall_proto::noise::{HANDSHAKE_LEN, NoiseError, respond};
use seawall_proto::serial::Token;
use seawall_proto::{
    Attach, Attached, Hello, HelloError, PREFACE_LEN, Preface, Proof, Refusal, RegionId, ToGuest,
    ToHost,
};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// From the connection to the attach message.
const HANDSHAKE_MAX: Duration = Duration::from_secs(5);
/// Characters kept of what a driver says of itself.
const SELF_TEXT_MAX: usize = 64;

/// Why a connection became no session.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("the connection broke: {0}")]
    Broken(#[from] io::Error),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("nothing more was said within {} s", HANDSHAKE_MAX.as_secs())]
    Late,
    #[error(transparent)]
    Hello(#[from] HelloError),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Noise(#[from] NoiseError),
    #[error(transparent)]
    Random(#[from] RegionError),
    #[error("the guest has neither a usable region nor a key file")]
    NoKey,
    #[error("the first message is not an attach message")]
    Order,
    #[error("the region named is not this guest's, or is its region before a restart")]
    Region,
    #[error("the peer has not proved that it can read the region's header or the guest's key")]
    Proof,
}

impl Refused {
    /// What the peer is told, where the protocol has a word for it.
    fn refusal(&self) -> Option<Refusal> {
        match self {
            Self::Order => Some(Refusal::Order),
            Self::Region => Some(Refusal::Region),
            Self::Proof => Some(Refusal::Proof),
            _ => None,
        }
    }
}

/// Finds the guest of a TCP connection by the region that it names, and sets up the channel that
/// only the holder of that region's key can use.
pub fn identify(
    host: &Arc<Host>,
    socket: &Socket,
    peer: SocketAddr,
) -> Option<(Handshake, Connection)> {
    let until = Instant::now() + HANDSHAKE_MAX;
    let mut preface = [0; PREFACE_LEN];
    let preface = socket
        .receive_exact(&mut preface, until)
        .map_err(Refused::from)
        .and_then(|()| Preface::parse(&preface).map_err(Refused::from));
    let preface = match preface {
        Ok(preface) => preface,
        Err(refused) => {
            // Anyone on the network can cause this, and no guest is known yet.
            tracing::debug!(%peer, "a TCP connection is refused: {refused}");
            return None;
        }
    };
    let Some(guest) = host.guests.find(|guest| guest.header(preface.region).is_some()) else {
        tracing::debug!(%peer, "a TCP connection names a region that no guest has now");
        return None;
    };
    let place = guest.half_open(socket.clone());
    let handshake = Handshake { until, ..Handshake::new(Arc::clone(host), guest, place) };
    match handshake.encrypt(socket, preface.region) {
        Ok(connection) => Some((handshake, connection)),
        Err(refused) => {
            handshake
                .guest
                .complain(&format!("a TCP connection from {peer} is refused: {refused}"));
            None
        }
    }
}

/// A connection of a known guest that is not a session yet.
pub struct Handshake {
    host: Arc<Host>,
    guest: Arc<Guest>,
    until: Instant,
    place: HalfOpen,
}

/// What a peer has proved.
struct Proved {
    attach: Attach,
    region: Arc<OpenRegion>,
    decoder: Decoder,
}

impl Handshake {
    pub fn new(host: Arc<Host>, guest: Arc<Guest>, place: HalfOpen) -> Self {
        Self { host, guest, until: Instant::now() + HANDSHAKE_MAX, place }
    }

    fn encrypt(&self, socket: &Socket, region: RegionId) -> Result<Connection, Refused> {
        let region = self.guest.header(region).ok_or(Refused::Region)?;
        let mut message = [0; HANDSHAKE_LEN];
        socket.receive_exact(&mut message, self.until)?;
        let (reply, sealer, opener) = respond(&region.header.key, &message)?;
        socket.send_first(&reply)?;
        Ok(Connection::sealed(LinkKind::Tcp, socket.clone(), sealer, opener))
    }

    /// Serves a plain connection until it ends.
    pub fn serve(self, kind: LinkKind, socket: Socket) {
        self.go_on(Connection::plain(kind, socket));
    }

    /// Serves a connection until it ends. Where a driver begins anew on the same one, gives what was
    /// not read yet.
    pub fn go_on(self, mut connection: Connection) -> Option<(LinkReader, Token)> {
        match self.prove(&mut connection) {
            Ok(proved) => self.attach(connection, proved),
            Err(Refused::Read(ReadError::Renewed(token))) => Some((connection.reader, token)),
            Err(refused) => {
                if let Some(refusal) = refused.refusal() {
                    // The peer may be gone; the log line below tells the operator all the same.
                    let _ = say(&mut connection, &ToGuest::Refused(refusal));
                }
                connection.socket.end();
                self.guest.complain(&format!("a connection is refused: {refused}"));
                None
            }
        }
    }

    fn prove(&self, connection: &mut Connection) -> Result<Proved, Refused> {
        let headers = self.guest.headers();
        if headers.is_empty() {
            return Err(Refused::NoKey);
        }
        let hello = Hello::new(random()?);
        let mut wire = Vec::new();
        connection.writer.wrap(&hello.to_bytes(), &mut wire)?;
        connection.socket.send_first(&wire)?;

        let mut said = Vec::new();
        let peer = loop {
            if let Some(first) = said.first_chunk::<{ Hello::LEN }>() {
                break Hello::parse(first)?;
            }
            self.hear(connection, &mut said)?;
        };
        hello.agree(&peer)?;
        let mut decoder = Decoder::new();
        decoder.extend(&said[Hello::LEN..]);
        let attach = loop {
            if let Some(payload) = decoder.next_payload()? {
                match decode::<ToHost>(payload)? {
                    Some(ToHost::Attach(attach)) => break attach,
                    _ => return Err(Refused::Order),
                }
            }
            let mut more = Vec::new();
            self.hear(connection, &mut more)?;
            decoder.extend(&more);
        };
        let named = headers.into_iter().find(|open| open.header.region == attach.region);
        let region = named.ok_or(Refused::Region)?;
        let expected = Proof::new(&region.header.key, &hello.nonce, &peer.nonce);
        if !attach.proof.matches(&expected) {
            return Err(Refused::Proof);
        }
        Ok(Proved { attach, region, decoder })
    }

    fn hear(&self, connection: &mut Connection, said: &mut Vec<u8>) -> Result<(), Refused> {
        let left = self.until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Refused::Late);
        }
        connection.socket.set_patience(left)?;
        connection.reader.read(|bytes| said.extend_from_slice(bytes))?;
        Ok(())
    }

    /// The peer is the guest's driver: its session begins, and an older one ends.
    fn attach(self, connection: Connection, proved: Proved) -> Option<(LinkReader, Token)> {
        let Self { host, guest, place, .. } = self;
        let Connection { kind, socket, reader, writer } = connection;
        let Proved { attach, region, decoder } = proved;
        if let Err(error) = socket.set_patience(Session::patience()) {
            guest.complain(&format!("a connection is refused: {error}"));
            return None;
        }
        let short = |text: &str| escape_short(text.as_bytes(), SELF_TEXT_MAX);
        let driver = Driver {
            version: short(&attach.driver_version),
            kernel: short(&attach.kernel),
            boot_id: short(&attach.boot_id),
        };
        let outbox = Outbox::new(socket.clone(), writer);
        let session =
            Session::new(Arc::clone(&host), Arc::clone(&guest), kind, driver.clone(), outbox);
        let sender = Arc::clone(&session);
        if let Err(error) =
            super::spawn(format!("to {}", guest.name()), move || sender.outbox.run())
        {
            guest.complain(&format!("no thread for a session: {error}"));
            socket.end();
            return None;
        }
        // Said before others can find the session, and before anything of it can change.
        let telling = host.telling();
        let (config, generation) = (host.config(), host.pipeline.generations.current());
        session.outbox.push(&ToGuest::Attached(Attached {
            guest: guest.name().to_owned(),
            generation,
            heartbeat_ms: config.alarm.heartbeat_ms,
        }));
        session.tell_policy(&guest.policy());
        session.tell_golden();
        guest.begin_session(&session);
        drop(telling);
        drop(place);
        tracing::info!(
            guest = guest.name(),
            link = ?kind,
            inline = region.slots.is_none(),
            driver = driver.version,
            kernel = driver.kernel,
            "a session begins"
        );
        host.events.emit(
            Event::new(EventKind::SessionStarted)
                .guest(guest.name())
                .reason(format!("driver {}, kernel {}", driver.version, driver.kernel)),
        );
        session.run(&socket, reader, decoder, region)
    }
}

fn say(connection: &mut Connection, message: &ToGuest) -> Result<(), Refused> {
    let (mut plain, mut wire) = (Vec::new(), Vec::new());
    encode(message, &mut plain)?;
    connection.writer.wrap(&plain, &mut wire)?;
    connection.socket.send_first(&wire)?;
    Ok(())
}
