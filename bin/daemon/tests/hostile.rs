//! A guest that does what it must not: its request or its session ends with one clear log line, and
//! nobody else notices.

mod common;

use common::{Connection, Driver, Service, Setup};
use seawall_proto::frame::PAYLOAD_MAX;
use seawall_proto::{
    Content, Hello, Part, Refusal, RequestId, SlotRef, ToGuest, ToHost, VerdictKind,
};
use std::time::Duration;

/// Does something hostile in a session of g1 that must end that session alone, with `log` in the log.
fn ends_the_session(log: &str, hostile: impl FnOnce(&mut Driver)) {
    let service = Service::start(Setup::default());
    let mut bystander = service.driver("g2");
    let mut driver = service.driver("g1");
    assert_eq!(driver.scan(b"before").kind, VerdictKind::Clean);
    hostile(&mut driver);
    driver.connection.hear_the_end();
    service.wait_log(log);
    let line = service.log();
    let line = line.lines().find(|line| line.contains(log)).expect("it is there").to_owned();
    assert!(line.contains("WARN") && line.contains("guest=\"g1\""), "{line}");
    assert_eq!(bystander.scan(b"after").kind, VerdictKind::Clean, "another guest's session");
    assert_eq!(service.driver("g1").scan(b"again").kind, VerdictKind::Clean);
}

#[test]
fn garbage() {
    ends_the_session("is not a message of kind", |driver| {
        driver.connection.raw(&[5, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff]);
    });
}

#[test]
fn an_oversized_frame() {
    ends_the_session("a frame of 65537 bytes was announced", |driver| {
        let length = u32::try_from(PAYLOAD_MAX + 1).expect("it fits");
        driver.connection.raw(&length.to_le_bytes());
    });
}

#[test]
fn an_empty_frame() {
    ends_the_session("an empty frame", |driver| driver.connection.raw(&[0; 4]));
}

#[test]
fn a_request_number_used_twice() {
    ends_the_session("request 1 does not follow request 1", |driver| {
        driver.next_id = 1;
        let request = driver.request(Vec::new(), true);
        driver.say(ToHost::ScanRequest(request));
    });
}

#[test]
fn content_of_a_request_that_was_never_begun() {
    ends_the_session("content for request 99, which was never begun", |driver| {
        driver.say(ToHost::Content(Content {
            id: RequestId(99),
            part: Part::Slots(Vec::new()),
            last: true,
        }));
    });
}

#[test]
fn a_path_that_is_none() {
    ends_the_session("a path of 5000 bytes", |driver| {
        let mut request = driver.request(Vec::new(), true);
        request.file.path = serde_bytes::ByteBuf::from(vec![b'/'; 5000]);
        driver.say(ToHost::ScanRequest(request));
    });
}

#[test]
fn a_second_attach_message() {
    let service = Service::start(Setup::default());
    let mut driver = service.driver("g1");
    let header = driver.region.header().unwrap();
    driver.say(ToHost::Attach(seawall_proto::Attach {
        proof: seawall_proto::Proof::new(&header.key, &[0; 32], &[0; 32]),
        region: header.region,
        driver_version: String::new(),
        kernel: String::new(),
        boot_id: String::new(),
    }));
    driver.connection.hear_the_end();
    service.wait_log("a second attach message");
}

#[test]
fn a_message_of_a_later_version_is_skipped() {
    let service = Service::start(Setup::default());
    let mut driver = service.driver("g1");
    driver.connection.raw(&[3, 0, 0, 0, 100, 1, 2]);
    assert_eq!(driver.scan(b"still there").kind, VerdictKind::Clean);
}

#[test]
fn a_wrong_version() {
    let service = Service::start(Setup::default());
    let mut connection = service.connect("g1");
    let mut hello = Hello::new([0; 32]);
    (hello.lowest, hello.highest) = (7, 9);
    connection.hello(&hello);
    connection.hear_the_end();
    service.wait_log("this side speaks 1 to 1, the peer 7 to 9");

    let mut connection = service.connect("g2");
    connection.raw(b"GET / HTTP/1.1\r\nHost: x\r\n\r\nand more than a hello would be long");
    let mut theirs = [0; Hello::LEN];
    connection.stream.read_exact(&mut theirs).unwrap();
    connection.hear_the_end();
    service.wait_log("the peer does not speak the Seawall protocol");
}

/// A request with wrong slots ends as an error; the session goes on.
fn ends_the_request(log: &str, refs: &[SlotRef]) {
    let service = Service::start(Setup::default());
    let mut driver = service.driver("g1");
    let request = driver.request(refs.to_vec(), true);
    let id = request.id;
    driver.say(ToHost::ScanRequest(request));
    let verdict = driver.verdict(id);
    assert_eq!((verdict.kind, verdict.decision, verdict.hash), (VerdictKind::Error, None, None));
    service.wait_log(log);
    assert_eq!(driver.scan(b"after it").kind, VerdictKind::Clean);
    assert_eq!(service.status().counters.scans, 1);
    service.wait_no_copies();
}

#[test]
fn slots_out_of_range() {
    let log = "slot 15 with 1 bytes is not within 15 slots";
    ends_the_request(log, &[SlotRef { index: 0, len: 1 }, SlotRef { index: 15, len: 1 }]);
}

#[test]
fn a_slot_longer_than_a_slot() {
    ends_the_request(
        "slot 0 with 4294967295 bytes is not within",
        &[SlotRef { index: 0, len: u32::MAX }],
    );
}

#[test]
fn slots_that_overlap() {
    let slot = |index| SlotRef { index, len: 100 };
    ends_the_request("slot 3 is named twice", &[slot(3), slot(4), slot(3)]);
}

#[test]
fn a_region_file_cut_short() {
    let service = Service::start(Setup::default());
    let mut driver = service.driver("g1");
    let file = std::fs::File::options().write(true).open(service.path("g1.region")).unwrap();
    file.set_len(4096).unwrap();
    let request = driver.request(vec![SlotRef { index: 3, len: 100 }], true);
    let id = request.id;
    driver.say(ToHost::ScanRequest(request));
    assert_eq!(driver.verdict(id).kind, VerdictKind::Error);
    service.wait_log("the region's file cannot be read");
    file.set_len(1 << 20).unwrap();
    assert_eq!(driver.scan(b"whole again").kind, VerdictKind::Clean);
    assert_eq!(service.driver("g2").scan(b"other guest").kind, VerdictKind::Clean);
}

#[test]
fn more_outstanding_requests_than_may_be() {
    let service = Service::start(Setup::default());
    let mut driver = service.driver("g1");
    let (_slots, refs) = driver.fill(b"x");
    for _ in 0..1025 {
        let request = driver.request(refs.clone(), false);
        driver.say(ToHost::ScanRequest(request));
    }
    let verdict = driver.verdict(RequestId(1025));
    assert_eq!(verdict.kind, VerdictKind::Error);
    assert!(verdict.detail.unwrap().contains("more than 1024 requests"));
    driver.say(ToHost::Cancel(RequestId(5)));
    driver.verdict(RequestId(5));
    assert_eq!(driver.scan(b"y").kind, VerdictKind::Clean);
}

#[test]
fn who_cannot_read_the_header_displaces_nobody() {
    let service = Service::start(Setup::default());
    let mut driver = service.driver("g1");
    let own = driver.region.header().unwrap();
    let other = service.region("g2").header().unwrap();

    let answer = service.connect("g1").attach(&[0; 32], own.region);
    assert!(matches!(answer, ToGuest::Refused(Refusal::Proof)), "{answer:?}");
    service.wait_log("has not proved that it can read the region's header");
    // Another guest's region, even with the right key for it.
    let answer = service.connect("g1").attach(&other.key.0, other.region);
    assert!(matches!(answer, ToGuest::Refused(Refusal::Region)), "{answer:?}");
    let mut first = service.connect("g1");
    first.hello(&Hello::new([1; 32]));
    first.say(&ToHost::Cancel(RequestId(1)));
    assert!(matches!(first.hear(), Some(ToGuest::Refused(Refusal::Order))));

    // Connections that say nothing, more than may be half-open.
    let idle: Vec<Connection> = (0..30).map(|_| service.connect("g1")).collect();
    assert_eq!(driver.scan(b"it stands").kind, VerdictKind::Clean);
    // A driver gets through all the same.
    assert_eq!(service.driver("g1").scan(b"and a new one").kind, VerdictKind::Clean);
    drop(idle);
}

#[test]
fn a_handshake_that_takes_too_long() {
    let service = Service::start(Setup::default());
    let mut connection = service.connect("g1");
    connection.hello(&Hello::new([1; 32]));
    let begin = std::time::Instant::now();
    connection.hear_the_end();
    let took = begin.elapsed();
    assert!((4..7).contains(&took.as_secs()), "{took:?}");
    service.wait_log("nothing more was said within 5 s");
}

#[test]
fn a_guest_that_never_reads_its_link() {
    let service = Service::start(Setup::default());
    let mut driver = service.driver("g1");
    let mut bystander = service.driver("g2");
    assert_eq!(driver.scan(b"known").kind, VerdictKind::Clean);
    let (_slots, refs) = driver.fill(b"known");
    let mut wire = Vec::new();
    let mut sent = 0;
    let ended = loop {
        wire.clear();
        let request = driver.request(refs.clone(), true);
        seawall_proto::frame::encode(&ToHost::ScanRequest(request), &mut wire).unwrap();
        if driver.connection.stream.write_all(&wire).is_err() {
            break true;
        }
        sent += 1;
        if sent % 1000 == 0 {
            let content = format!("new {sent}");
            assert_eq!(bystander.scan(content.as_bytes()).kind, VerdictKind::Clean);
        }
        if sent > 1_000_000 {
            break false;
        }
    };
    assert!(ended, "the session outlived {sent} answers that nobody read");
    service.wait_log("the session ends: the guest");
    assert_eq!(bystander.scan(b"undisturbed").kind, VerdictKind::Clean);
    assert_eq!(service.driver("g1").scan(b"back").kind, VerdictKind::Clean);
}

#[test]
fn a_guest_that_stops_reading_with_little_unread() {
    let service = Service::start(Setup::default());
    let mut driver = service.driver("g1");
    assert_eq!(driver.scan(b"known").kind, VerdictKind::Clean);
    let (_slots, refs) = driver.fill(b"known");
    // Enough to fill the socket and leave something, far from a mebibyte.
    for _ in 0..6000 {
        let request = driver.request(refs.clone(), true);
        driver.say(ToHost::ScanRequest(request));
    }
    service.wait_log("the session ends: the guest reads nothing");
}

#[test]
fn a_flood_of_bad_connections_is_a_few_log_lines() {
    let service = Service::start(Setup::default());
    let region = service.region("g1").header().unwrap().region;
    for _ in 0..100 {
        service.connect("g1").attach(&[0; 32], region);
    }
    std::thread::sleep(Duration::from_millis(300));
    let lines =
        service.log().lines().filter(|line| line.contains("a connection is refused")).count();
    assert_eq!(lines, 1, "{}", service.log());
    service.wait_log("more of these in the last 10 s");
    service.wait_log("count=99");
}
