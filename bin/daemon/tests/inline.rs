//! Content that comes on the link itself, from guests that do right and wrong with it, and the key of
//! guests that have no region.

#![allow(clippy::unwrap_used)] // A test says what it expects by unwrapping it.

mod common;

use common::{Connection, Driver, Engine, Service, Setup, eicar, wait_for};
use seawall_client::GuestState;
use seawall_proto::{
    Content, Hello, INLINE_MAX, Part, Refusal, RegionId, RequestId, SlotRef, ToGuest, ToHost,
    Verdict, VerdictKind,
};
use seawall_region::Header;
use std::os::unix::fs::PermissionsExt;

/// A guest that has a key file and no region.
const WITHOUT_REGION: &str =
    "[[guest]]\nname = \"k1\"\nkey_file = \"{dir}/k1.key\"\nsocket = \"{dir}/k1.sock\"\n";

fn inline(bytes: &[u8]) -> Part {
    Part::Inline(bytes.to_vec().into())
}

/// Begins a request with a part of its content.
fn begin(driver: &mut Driver, part: Part, last: bool) -> RequestId {
    let mut request = driver.request(Vec::new(), last);
    request.part = part;
    let id = request.id;
    driver.say(ToHost::ScanRequest(request));
    id
}

fn go_on(driver: &mut Driver, id: RequestId, part: Part, last: bool) {
    driver.say(ToHost::Content(Content { id, part, last }));
}

/// Asks for a verdict on content in pieces of `len` bytes.
fn scan(driver: &mut Driver, content: &[u8], len: usize) -> Verdict {
    let pieces: Vec<&[u8]> = content.chunks(len).collect();
    let id = begin(driver, inline(pieces[0]), pieces.len() == 1);
    for (n, piece) in pieces.iter().enumerate().skip(1) {
        go_on(driver, id, inline(piece), n + 1 == pieces.len());
    }
    driver.verdict(id)
}

#[test]
fn inline_content_is_hashed_scanned_and_remembered_like_any_other() {
    let service = Service::start(Setup { engine: Engine::Yara, ..Setup::default() });
    let mut driver = service.driver("g1");
    let mut content: Vec<u8> = (0..3_000_000_u32).map(|n| (n / 5) as u8).collect();
    for len in [INLINE_MAX, 10_007] {
        let verdict = scan(&mut driver, &content, len);
        assert_eq!(verdict.kind, VerdictKind::Clean);
        assert_eq!(verdict.hash.unwrap().0, *blake3::hash(&content).as_bytes());
    }
    assert_eq!(service.status().counters.scans, 1, "the second one was known");
    content.extend_from_slice(&eicar());
    assert_eq!(scan(&mut driver, &content, INLINE_MAX).kind, VerdictKind::Infected);
    assert_eq!(driver.copied, [], "no slot is given back that was not named");
    // What one guest sent inline another need not have scanned again from slots.
    let small = b"small content";
    assert_eq!(scan(&mut driver, small, 5).kind, VerdictKind::Clean);
    let before = service.status().counters.scans;
    assert_eq!(service.driver("g2").scan(small).kind, VerdictKind::Clean);
    assert_eq!(service.status().counters.scans, before);
    service.wait_no_copies();
}

/// A request that ends as an error with one clear line, and nothing else ends.
fn ends_the_request(log: &str, hostile: impl FnOnce(&mut Driver) -> RequestId) {
    let service = Service::start(Setup::default());
    let mut driver = service.driver("g1");
    let id = hostile(&mut driver);
    let verdict = driver.verdict(id);
    assert_eq!((verdict.kind, verdict.decision, verdict.hash), (VerdictKind::Error, None, None));
    service.wait_log(log);
    // The rest of it may still be on its way.
    go_on(&mut driver, id, inline(b"late"), true);
    assert_eq!(scan(&mut driver, b"after it", 100).kind, VerdictKind::Clean);
    assert_eq!(service.driver("g2").scan(b"other guest").kind, VerdictKind::Clean);
    service.wait_no_copies();
}

#[test]
fn more_bytes_in_one_message_than_may_be() {
    ends_the_request("32769 bytes came inline; the most is 32768", |driver| {
        begin(driver, inline(&vec![1; INLINE_MAX + 1]), true)
    });
}

#[test]
fn slots_first_and_then_bytes() {
    ends_the_request("one content came in more than one way", |driver| {
        let (_slots, refs) = driver.fill(b"in a slot");
        let id = begin(driver, Part::Slots(refs), false);
        go_on(driver, id, inline(b"and inline"), true);
        id
    });
}

#[test]
fn bytes_first_and_then_slots() {
    ends_the_request("one content came in more than one way", |driver| {
        let (_slots, refs) = driver.fill(b"in a slot");
        let id = begin(driver, inline(b"inline"), false);
        go_on(driver, id, Part::Slots(refs), true);
        id
    });
}

#[test]
fn content_that_never_ends() {
    let more = "[policy]\nwhole_file_limit_mib = 1\n".into();
    let service = Service::start(Setup { more, ..Setup::default() });
    let (mut driver, mut bystander) = (service.driver("g1"), service.driver("g2"));
    let piece = vec![7; INLINE_MAX];
    let id = begin(&mut driver, inline(&piece), false);
    // Far more than the limit, and then nothing but emptiness.
    for _ in 0..200 {
        go_on(&mut driver, id, inline(&piece), false);
    }
    let verdict = driver.verdict(id);
    assert_eq!(verdict.kind, VerdictKind::Error);
    assert!(verdict.detail.unwrap().contains("longer than the 1048576 bytes"));
    let id = begin(&mut driver, inline(b""), false);
    for _ in 0..10_000 {
        go_on(&mut driver, id, inline(b""), false);
    }
    assert_eq!(bystander.scan(b"undisturbed").kind, VerdictKind::Clean);
    assert_eq!(scan(&mut driver, b"and the same guest", 9).kind, VerdictKind::Clean);
    drop(driver);
    service.wait_no_copies();
}

fn key_of(service: &Service) -> Header {
    let bytes = std::fs::read(service.path("k1.key")).unwrap();
    Header::parse(&bytes.try_into().unwrap()).unwrap()
}

/// A session of the guest without a region.
fn attach(service: &Service, header: &Header) -> (Connection, ToGuest) {
    let mut connection = service.connect("k1");
    let answer = connection.attach(&header.key.0, header.region);
    (connection, answer)
}

#[test]
fn a_guest_without_a_region_proves_itself_by_its_key_file() {
    let mut service = Service::start(Setup { more: WITHOUT_REGION.into(), ..Setup::default() });
    let mode = std::fs::metadata(service.path("k1.key")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "for the host's root alone");
    let header = key_of(&service);
    let (mut connection, answer) = attach(&service, &header);
    assert!(matches!(&answer, ToGuest::Attached(attached) if attached.guest == "k1"), "{answer:?}");
    let mut request = service.driver("g1").request(Vec::new(), true);
    request.part = inline(b"words");
    connection.say(&ToHost::ScanRequest(request.clone()));
    let heard = connection.hear();
    assert!(matches!(&heard, Some(ToGuest::Verdict(it)) if it.kind == VerdictKind::Clean));
    // There is nothing that a slot could be.
    request.id = RequestId(2);
    request.part = Part::Slots(vec![SlotRef { index: 0, len: 1 }]);
    connection.say(&ToHost::ScanRequest(request));
    let heard = connection.hear();
    assert!(matches!(&heard, Some(ToGuest::Verdict(it)) if it.kind == VerdictKind::Error));
    service.wait_log("slots are named in a session that has no region");

    // Others do not get in with what they have.
    let (_, answer) =
        attach(&service, &Header { key: seawall_proto::Key([0; 32]), ..header.clone() });
    assert!(matches!(answer, ToGuest::Refused(Refusal::Proof)), "{answer:?}");
    let (_, answer) = attach(&service, &Header { region: RegionId([0; 16]), ..header.clone() });
    assert!(matches!(answer, ToGuest::Refused(Refusal::Region)), "{answer:?}");
    let own = service.region("g1").header().unwrap();
    let (_, answer) = attach(&service, &own);
    assert!(matches!(answer, ToGuest::Refused(Refusal::Region)), "{answer:?}");
    connection.say(&ToHost::Heartbeat(seawall_proto::Heartbeat::default()));
    assert!(matches!(connection.hear(), Some(ToGuest::Alive)), "it stands all the same");
    wait_for("the guest to count as protected", || {
        (service.guest("k1").state == GuestState::Protected).then_some(())
    });
    assert_eq!(service.guest("k1").region, None);

    // A new service takes the same key; once it is removed there is another.
    service.restart("KILL");
    assert_eq!(key_of(&service), header);
    assert!(matches!(attach(&service, &header).1, ToGuest::Attached(_)));
    std::fs::remove_file(service.path("k1.key")).unwrap();
    let new = wait_for("a new key", || service.path("k1.key").exists().then(|| key_of(&service)));
    assert_ne!(new, header);
    assert!(matches!(attach(&service, &header).1, ToGuest::Refused(Refusal::Region)));
    assert!(matches!(attach(&service, &new).1, ToGuest::Attached(_)));
}

#[test]
fn a_hello_alone_says_nothing_of_keys() {
    // A guest that has none yet: its key file cannot be written.
    let more = WITHOUT_REGION.replace("{dir}/k1.key", "/nonexistent/k1.key");
    let service = Service::start(Setup { more, ..Setup::default() });
    let mut connection = service.connect("k1");
    connection.raw(&Hello::new([7; 32]).to_bytes());
    assert!(connection.hear_the_end().is_empty());
    service.wait_log("neither a usable region nor a key file");
    let status = service.status();
    assert!(status.problems.iter().any(|it| it.contains("k1: the key file cannot be written")));
}
