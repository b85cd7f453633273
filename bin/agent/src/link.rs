//! Ways to reach the host: AF_VSOCK, TCP over the host's bridge, a virtio-serial channel, or a unix
//! socket where host and driver run on one machine. What they carry is the same; TCP is encrypted with
//! the region's key, and a channel, which has no connections, carries it in records.

use crate::serial::SerialPort;
use rustix::event::{PollFd, PollFlags};
use seawall_proto::noise::{self, Initiator, Opener, Sealer};
use seawall_proto::serial::{self, Record, Token};
use seawall_proto::{Hello, Key, Preface, RegionId, ToGuest, ToHost, frame};
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vsock::{VMADDR_CID_HOST, VsockAddr, VsockStream};

/// How long connecting, a handshake step or a write may take.
const STEP: Duration = Duration::from_secs(5);

/// Where the host listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    Vsock {
        port: u32,
    },
    /// A number, since nobody should tell the driver which host it trusts; and a name's resolver would load the guest's own
    /// libraries into a static program.
    Tcp {
        address: SocketAddr,
    },
    /// Without a path, the port with the channel's name.
    Serial {
        path: Option<PathBuf>,
    },
    Unix {
        path: PathBuf,
    },
}

impl Address {
    /// Reads `vsock[:PORT]`, `tcp:ADDRESS:PORT`, `serial[:PATH]` or `unix:PATH`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (kind, rest) = text.split_once(':').unwrap_or((text, ""));
        match (kind, rest) {
            ("vsock", "") => Ok(Self::Vsock { port: seawall_proto::PORT.into() }),
            ("vsock", port) => match port.parse() {
                Ok(port) => Ok(Self::Vsock { port }),
                Err(_) => Err(format!("`{port}` is not a port number")),
            },
            ("tcp", address) => match address.parse() {
                Ok(address) => Ok(Self::Tcp { address }),
                Err(_) => Err(format!(
                    "`{address}` is not a numeric address with a port, as 10.77.0.1:7325"
                )),
            },
            ("serial", "") => Ok(Self::Serial { path: None }),
            ("serial", path) => Ok(Self::Serial { path: Some(path.into()) }),
            ("unix", path) if !path.is_empty() => Ok(Self::Unix { path: path.into() }),
            _ => Err(
                "expected vsock, vsock:PORT, tcp:ADDRESS:PORT, serial, serial:PATH or unix:PATH"
                    .into(),
            ),
        }
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Vsock { port } => write!(f, "vsock:{port}"),
            Self::Tcp { address } => write!(f, "tcp:{address}"),
            Self::Serial { path: None } => f.write_str("serial"),
            Self::Serial { path: Some(path) } => write!(f, "serial:{}", path.display()),
            Self::Unix { path } => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Why a link does not stand.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("{action}: {reason}")]
    Io { action: &'static str, reason: io::Error },
    #[error("the host closed the connection")]
    Closed,
    #[error("the host knows of no session on this channel")]
    Lost,
    #[error(transparent)]
    Hello(#[from] seawall_proto::HelloError),
    #[error(transparent)]
    Frame(#[from] frame::FrameError),
    #[error(transparent)]
    Noise(#[from] noise::NoiseError),
}

fn io_error(action: &'static str) -> impl FnOnce(io::Error) -> LinkError {
    move |reason| LinkError::Io { action, reason }
}

#[derive(Debug)]
enum Stream {
    Vsock(VsockStream),
    Tcp(TcpStream),
    Serial(SerialPort),
    Unix(UnixStream),
}

/// Runs the same call on whichever stream it is.
macro_rules! on_stream {
    ($stream:expr, $name:ident => $call:expr) => {
        match $stream {
            Stream::Vsock($name) => $call,
            Stream::Tcp($name) => $call,
            Stream::Serial($name) => $call,
            Stream::Unix($name) => $call,
        }
    };
}

impl Stream {
    fn connect(address: &Address) -> Result<Self, LinkError> {
        let error = io_error("the host cannot be reached");
        match address {
            Address::Vsock { port } => {
                VsockStream::connect(&VsockAddr::new(VMADDR_CID_HOST, *port)).map(Self::Vsock)
            }
            Address::Tcp { address } => connect_tcp(address).map(Self::Tcp),
            Address::Serial { path } => SerialPort::open(path.as_deref()).map(Self::Serial),
            Address::Unix { path } => UnixStream::connect(path).map(Self::Unix),
        }
        .map_err(error)
    }

    fn set_timeouts(&self, read: Option<Duration>) -> Result<(), LinkError> {
        on_stream!(self, stream => {
            stream.set_read_timeout(read).and_then(|()| stream.set_write_timeout(Some(STEP)))
        })
        .map_err(io_error("a time-out cannot be set"))
    }

    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        on_stream!(self, stream => (&mut &*stream).read(buffer))
    }

    fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        on_stream!(self, stream => (&mut &*stream).write_all(bytes))
    }

    fn shut(&self) {
        let _gone = on_stream!(self, stream => stream.shutdown(Shutdown::Both));
    }
}

fn connect_tcp(address: &SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(address, STEP)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// How bytes go out.
enum Outgoing {
    Plain,
    Sealed(Sealer),
    Records,
}

/// How they come in.
enum Incoming {
    Plain,
    Sealed(Opener),
    Records(serial::Decoder),
}

/// Whether this file takes a few bytes without waiting.
pub fn takes_now(file: impl AsFd) -> bool {
    let mut fds = [PollFd::new(&file, PollFlags::OUT)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    let ready = rustix::event::poll(&mut fds, Some(&now)).unwrap_or(0);
    ready > 0 && fds[0].revents() == PollFlags::OUT
}

/// The sending half. A write that takes too long ends the link.
pub struct Sender {
    stream: Arc<Stream>,
    outgoing: Outgoing,
    plain: Vec<u8>,
    wrapped: Vec<u8>,
}

impl Sender {
    /// Whether a short message goes out at once.
    pub fn takes_now(&self) -> bool {
        match &*self.stream {
            Stream::Vsock(stream) => takes_now(stream),
            Stream::Tcp(stream) => takes_now(stream),
            Stream::Serial(port) => port.takes_now(),
            Stream::Unix(stream) => takes_now(stream),
        }
    }

    /// Sends one message.
    pub fn send(&mut self, message: &ToHost) -> Result<(), LinkError> {
        self.plain.clear();
        frame::encode(message, &mut self.plain)?;
        self.write()
    }

    fn write(&mut self) -> Result<(), LinkError> {
        self.wrapped.clear();
        let bytes = match &mut self.outgoing {
            Outgoing::Plain => &self.plain,
            Outgoing::Sealed(sealer) => {
                sealer.seal(&self.plain, &mut self.wrapped)?;
                &self.wrapped
            }
            Outgoing::Records => {
                serial::encode(&self.plain, &mut self.wrapped);
                &self.wrapped
            }
        };
        self.stream.write_all(bytes).map_err(io_error("sending"))
    }
}

/// The receiving half.
pub struct Receiver {
    stream: Arc<Stream>,
    incoming: Incoming,
    buffer: Vec<u8>,
    decoder: frame::Decoder,
}

impl Receiver {
    /// The next message that this build knows.
    pub fn receive(&mut self) -> Result<ToGuest, LinkError> {
        loop {
            while let Some(payload) = self.decoder.next_payload()? {
                if let Some(message) = frame::decode(payload)? {
                    return Ok(message);
                }
            }
            self.more()?;
        }
    }

    fn more(&mut self) -> Result<(), LinkError> {
        // What came behind a beginning in the same read.
        if self.take_records()? {
            return Ok(());
        }
        let read = self.read()?;
        let bytes = &self.buffer[..read];
        match &mut self.incoming {
            Incoming::Plain => self.decoder.extend(bytes),
            Incoming::Sealed(opener) => opener.open(bytes, |plain| self.decoder.extend(plain))?,
            Incoming::Records(records) => {
                records.extend(bytes);
                self.take_records()?;
            }
        }
        Ok(())
    }

    fn read(&mut self) -> Result<usize, LinkError> {
        loop {
            match self.stream.read(&mut self.buffer) {
                Ok(0) => return Err(LinkError::Closed),
                Ok(read) => return Ok(read),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
                Err(error) => return Err(io_error("receiving")(error)),
            }
        }
    }

    fn take_records(&mut self) -> Result<bool, LinkError> {
        let Incoming::Records(records) = &mut self.incoming else { return Ok(false) };
        let mut any = false;
        while let Some(record) = records.next_record() {
            let Record::Piece(bytes) = record else { return Err(LinkError::Lost) };
            self.decoder.extend(&bytes);
            any = true;
        }
        Ok(any)
    }

    /// Skips what an earlier session left in the channel, to the host's answer to our beginning.
    fn skip_to(&mut self, token: &Token) -> Result<(), LinkError> {
        let until = Instant::now() + STEP;
        loop {
            let Incoming::Records(records) = &mut self.incoming else { return Ok(()) };
            while let Some(record) = records.next_record() {
                if record == Record::Sync(*token) {
                    return Ok(());
                }
            }
            if Instant::now() > until {
                let reason = io::ErrorKind::TimedOut.into();
                return Err(LinkError::Io { action: "the host does not answer", reason });
            }
            let read = self.read()?;
            if let Incoming::Records(records) = &mut self.incoming {
                records.extend(&self.buffer[..read]);
            }
        }
    }

    /// From now on a message may be as long in coming as it likes.
    pub fn wait_for_ever(&self) -> Result<(), LinkError> {
        self.stream.set_timeouts(None)
    }
}

/// Ends a link from any thread.
#[derive(Debug, Clone)]
pub struct Shutter(Arc<Stream>);

impl Shutter {
    pub fn shut(&self) {
        self.0.shut();
    }
}

/// A link whose two sides have agreed on a version.
pub struct Connection {
    pub sender: Sender,
    pub receiver: Receiver,
    pub shutter: Shutter,
    pub host_nonce: [u8; 32],
    pub guest_nonce: [u8; 32],
}

/// Connects and exchanges hellos.
pub fn connect(
    address: &Address,
    region: RegionId,
    key: &Key,
    guest_nonce: [u8; 32],
) -> Result<Connection, LinkError> {
    let stream = Stream::connect(address)?;
    stream.set_timeouts(Some(STEP))?;
    let (mut outgoing, mut incoming) = (Outgoing::Plain, Incoming::Plain);
    let mut token = Token::default();
    match address {
        Address::Tcp { .. } => {
            let (sealer, opener) = shake_hands(&stream, region, key)?;
            (outgoing, incoming) = (Outgoing::Sealed(sealer), Incoming::Sealed(opener));
        }
        Address::Serial { .. } => {
            let len = token.len();
            token.copy_from_slice(&guest_nonce[..len]);
            let mut begin = Vec::new();
            serial::encode_sync(&token, &mut begin);
            stream.write_all(&begin).map_err(io_error("sending"))?;
            (outgoing, incoming) = (Outgoing::Records, Incoming::Records(serial::Decoder::new()));
        }
        Address::Vsock { .. } | Address::Unix { .. } => (),
    }
    let stream = Arc::new(stream);
    let plain = Hello::new(guest_nonce).to_bytes().to_vec();
    let mut sender = Sender { stream: Arc::clone(&stream), outgoing, plain, wrapped: Vec::new() };
    sender.write()?;
    let decoder = frame::Decoder::new();
    let buffer = vec![0; 16 * 1024];
    let mut receiver = Receiver { stream: Arc::clone(&stream), incoming, buffer, decoder };
    receiver.skip_to(&token)?;
    while receiver.decoder.pending().len() < Hello::LEN {
        receiver.more()?;
    }
    let mut hello = [0; Hello::LEN];
    hello.copy_from_slice(receiver.decoder.take_raw(Hello::LEN));
    let hello = Hello::parse(&hello)?;
    Hello::new(guest_nonce).agree(&hello)?;
    let shutter = Shutter(stream);
    Ok(Connection { sender, receiver, shutter, host_nonce: hello.nonce, guest_nonce })
}

fn shake_hands(
    stream: &Stream,
    region: RegionId,
    key: &Key,
) -> Result<(Sealer, Opener), LinkError> {
    let (initiator, message) = Initiator::new(key)?;
    let mut bytes = Preface { region }.to_bytes().to_vec();
    bytes.extend_from_slice(&message);
    stream.write_all(&bytes).map_err(io_error("sending"))?;
    let mut reply = [0; noise::HANDSHAKE_LEN];
    let mut got = 0;
    while got < reply.len() {
        match stream.read(&mut reply[got..]).map_err(io_error("receiving"))? {
            0 => return Err(LinkError::Closed),
            read => got += read,
        }
    }
    Ok(initiator.finish(&reply)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_read_back_as_they_are_written() {
        for text in [
            "vsock:7325",
            "vsock:9",
            "tcp:10.77.0.1:7325",
            "tcp:[fd00::1]:7325",
            "serial",
            "serial:/dev/vport1p1",
            "unix:/run/x.sock",
        ] {
            assert_eq!(Address::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(Address::parse("vsock").unwrap().to_string(), "vsock:7325");
        for text in
            ["", "tcp", "tcp:host", "tcp:host:7325", "tcp:10.77.0.1", "unix:", "vsock:x", "udp:1:2"]
        {
            assert!(Address::parse(text).is_err(), "{text}");
        }
    }
}
