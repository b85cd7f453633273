//! A virtio-serial channel as QEMU shows it to the service: one connection that stays, and on it one
//! driver after another, each behind what the last one left.

#![allow(clippy::unwrap_used)] // A test says what it expects by unwrapping it.

mod common;

use common::{Connection, PATIENCE, Service, Setup, wait_for};
use seawall_client::{EventKind, LinkKind};
use seawall_proto::serial::{self, Record, Token};
use seawall_proto::{
    FileMetadata, Heartbeat, Operation, Part, RequestId, ScanRequest, ToGuest, ToHost, VerdictKind,
};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

const CHANNEL: &str =
    "[[guest]]\nname = \"s1\"\nregion = \"{dir}/s1.region\"\nserial_socket = \"{dir}/s1.serial\"\n";

fn start() -> Service {
    let service = Service::start(Setup { more: CHANNEL.into(), ..Setup::default() });
    // As QEMU makes it; the service may have been there first.
    let new = service.path("new");
    std::fs::File::create(&new).and_then(|file| file.set_len(1 << 20)).unwrap();
    std::fs::rename(new, service.path("s1.region")).unwrap();
    service
}

/// QEMU's side of the channel.
fn plug(service: &Service) -> UnixStream {
    let path = service.path("s1.serial");
    let stream = wait_for("the channel's socket", || UnixStream::connect(&path).ok());
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Records taken apart and put together, so that a [`Connection`] can stand on a channel.
struct Records {
    stream: UnixStream,
    decoder: serial::Decoder,
    pending: Vec<u8>,
}

impl Read for Records {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        while self.pending.is_empty() {
            match self.decoder.next_record() {
                Some(Record::Piece(bytes)) => self.pending = bytes,
                Some(other) => panic!("{other:?} in a session"),
                None => {
                    let mut bytes = [0; 4096];
                    let len = self.stream.read(&mut bytes)?;
                    if len == 0 {
                        return Ok(0);
                    }
                    self.decoder.extend(&bytes[..len]);
                }
            }
        }
        let len = to.len().min(self.pending.len());
        to[..len].copy_from_slice(&self.pending[..len]);
        self.pending.drain(..len);
        Ok(len)
    }
}

impl Write for Records {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut wire = Vec::new();
        serial::encode(bytes, &mut wire);
        self.stream.write_all(&wire)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A driver begins: it skips what is old, to the answer to its own beginning.
fn begin(stream: &UnixStream, token: Token) -> Connection {
    let mut stream = stream.try_clone().unwrap();
    let mut wire = Vec::new();
    serial::encode_sync(&token, &mut wire);
    stream.write_all(&wire).unwrap();
    let mut decoder = serial::Decoder::new();
    while decoder.next_record() != Some(Record::Sync(token)) {
        let mut byte = [0];
        assert_eq!(stream.read(&mut byte).unwrap(), 1, "the channel goes on");
        decoder.extend(&byte);
    }
    let records = Records { stream, decoder, pending: Vec::new() };
    Connection::new(records)
}

fn attach(service: &Service, stream: &UnixStream, token: Token) -> Connection {
    let header = wait_for("the region's header", || service.region("s1").header().ok());
    let mut connection = begin(stream, token);
    let answer = connection.attach(&header.key.0, header.region);
    assert!(matches!(answer, ToGuest::Attached(_)), "{answer:?}");
    connection
}

fn request(id: u64, content: &[u8], last: bool) -> ToHost {
    ToHost::ScanRequest(ScanRequest {
        id: RequestId(id),
        operation: Operation::Open,
        deadline_ms: 10_000,
        file: FileMetadata {
            path: b"/f".to_vec().into(),
            path_is_true: true,
            inode: (1, 2),
            size: content.len() as u64,
            pid: 1,
        },
        part: Part::Inline(content.to_vec().into()),
        last,
    })
}

fn verdict(connection: &mut Connection) -> VerdictKind {
    loop {
        match connection.hear() {
            Some(ToGuest::Verdict(verdict)) => return verdict.kind,
            Some(_) => {}
            None => panic!("the session ended"),
        }
    }
}

#[test]
fn one_driver_after_another_on_one_connection() {
    let service = start();
    let stream = plug(&service);
    for round in 0..5 {
        let mut connection = attach(&service, &stream, [round; 16]);
        assert_eq!(service.guest("s1").session.unwrap().link, LinkKind::Serial);
        connection.say(&request(1, b"zeros \0\0 and more", true));
        assert_eq!(verdict(&mut connection), VerdictKind::Clean);
        // It dies in the midst of a content; what it asked for is answered to nobody.
        connection.say(&request(2, b"SEAWALL-FAULT sleep=200", true));
        connection.say(&request(3, &[0xa5; 30_000], false));
        connection.raw(&[0xff, 0xff, 0, 0, 1, 2, 3]);
        let mut half = Vec::new();
        serial::encode(&[3; 500], &mut half);
        (&stream).write_all(&half[..100]).unwrap();
    }
    let ended = service.events().iter().filter(|it| it.kind == EventKind::SessionEnded).count();
    assert_eq!(ended, 4, "{}", service.log());
    attach(&service, &stream, [99; 16]);
    service.wait_no_copies();
    assert!(!service.log().contains("WARN"), "{}", service.log());
}

#[test]
fn a_content_that_looks_like_a_beginning_is_content() {
    let service = start();
    let stream = plug(&service);
    let mut connection = attach(&service, &stream, [1; 16]);
    let mut evil = Vec::new();
    serial::encode_sync(&[2; 16], &mut evil);
    connection.say(&request(1, &evil.repeat(500), true));
    assert_eq!(verdict(&mut connection), VerdictKind::Clean);
    connection.say(&ToHost::Heartbeat(Heartbeat::default()));
    assert!(matches!(connection.hear(), Some(ToGuest::Alive)));
}

#[test]
fn a_driver_that_missed_the_services_restart_is_told() {
    let mut service = start();
    let stream = plug(&service);
    attach(&service, &stream, [1; 16]);
    service.restart("KILL");
    // QEMU connects again, the guest noticed nothing and goes on.
    let stream = plug(&service);
    let mut wire = Vec::new();
    serial::encode(b"a heartbeat, say", &mut wire);
    (&stream).write_all(&wire).unwrap();
    let mut decoder = serial::Decoder::new();
    let mut bytes = [0; 64];
    let len = (&stream).read(&mut bytes).unwrap();
    decoder.extend(&bytes[..len]);
    assert_eq!(decoder.next_record(), Some(Record::Lost));
    let mut connection = attach(&service, &stream, [2; 16]);
    connection.say(&request(1, b"words", true));
    assert_eq!(verdict(&mut connection), VerdictKind::Clean);
}

#[test]
fn a_channel_without_a_driver_waits_and_garbage_costs_little() {
    let service = start();
    let stream = plug(&service);
    (&stream).write_all(&vec![7; 1 << 20]).unwrap();
    // Longer than a handshake may take.
    std::thread::sleep(std::time::Duration::from_secs(6));
    let mut connection = attach(&service, &stream, [1; 16]);
    connection.say(&request(1, b"words", true));
    assert_eq!(verdict(&mut connection), VerdictKind::Clean);
    // QEMU that was killed comes back: the old connection ends.
    let second = plug(&service);
    attach(&service, &second, [2; 16]);
    let mut bytes = Vec::new();
    (&stream).read_to_end(&mut bytes).unwrap();
}

#[test]
fn a_session_that_breaks_the_protocol_ends_the_connection_and_qemu_comes_again() {
    let service = start();
    let stream = plug(&service);
    let mut connection = attach(&service, &stream, [1; 16]);
    connection.say(&request(1, b"words", true));
    connection.say(&request(1, b"words", true));
    connection.hear_the_end();
    service.wait_log("request 1 does not follow request 1");
    attach(&service, &plug(&service), [2; 16]);
}
