//! What a driver asks in the ring: answered from what is known, and never anything but that it is clean.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Driver, Engine, Service, Setup, block_on, eicar, wait_for};
use seawall_proto::{Clean, ContentHash, ToGuest, ToHost, VerdictKind};
use seawall_region::ring::PIECE_LEN;
use seawall_region::{Filled, GuestRing, HostLooks, Query, Reply, Slot};
use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A driver and its session's ring.
struct Asker {
    driver: Driver,
    ring: GuestRing,
    next: u64,
}

impl Asker {
    fn new(service: &Service, guest: &str) -> Self {
        let mut driver = service.driver(guest);
        let ring = driver.ring();
        Self { driver, ring, next: 0 }
    }

    /// Puts content into slots, and gives the query about it.
    fn content(&self, content: &[u8]) -> (Vec<Slot>, Query, Filled) {
        let (slots, _) = self.driver.fill(content);
        let len = u32::try_from(content.len()).unwrap();
        let query = Query::Content { len, slots: slots.iter().map(Slot::index).collect() };
        let pieces = len.div_ceil(PIECE_LEN).try_into().unwrap();
        (slots, query, Filled::Pieces(pieces))
    }

    fn put(&mut self, query: &Query, filled: Filled) -> u64 {
        let number = self.next;
        self.next += 1;
        self.ring.ask(number, query, filled);
        self.ring_bell(None);
        number
    }

    /// Rings unless the service looks, or has still to hear what it was told when it was away so often.
    fn ring_bell(&mut self, rung: Option<u32>) -> Option<u32> {
        match self.ring.host_looks() {
            HostLooks::Away(times) if rung != Some(times) => {
                self.driver.say(ToHost::Doorbell);
                Some(times)
            }
            _ => rung,
        }
    }

    fn service_looks(&self) -> bool {
        self.ring.host_looks() == HostLooks::Now
    }

    /// Asks, and looks until there is a reply.
    fn ask_with(&mut self, query: &Query, filled: Filled) -> Reply {
        let number = self.put(query, filled);
        wait_for("the reply", || self.ring.reply(number))
    }

    fn ask(&mut self, content: &[u8]) -> Reply {
        let (slots, query, filled) = self.content(content);
        let reply = self.ask_with(&query, filled);
        drop(slots);
        reply
    }

    fn ask_by_hash(&mut self, content: &[u8]) -> Reply {
        self.ask_with(&Query::Hash(hash(content)), Filled::Pieces(0))
    }

    /// What the service says on the link of this query.
    fn hear_answer(&mut self, number: u64) -> Option<Clean> {
        loop {
            match self.driver.connection.hear().expect("the session stands") {
                ToGuest::Answered { number: of, clean } if of == number => return clean,
                _ => continue,
            }
        }
    }
}

fn hash(content: &[u8]) -> ContentHash {
    ContentHash(*blake3::hash(content).as_bytes())
}

fn clean(reply: Reply) -> Clean {
    let Reply::Clean(clean) = reply else { panic!("{reply:?}") };
    clean
}

fn long(n: u8) -> Vec<u8> {
    (0..300_000_u32).map(|at| (at / 7) as u8 ^ n).collect()
}

#[test]
fn known_content_is_answered_and_unknown_is_not() {
    let service = Service::start(Setup::default());
    let (mut one, mut two) = (Asker::new(&service, "g1"), Asker::new(&service, "g2"));
    let sizes = [65_536, 16_385, 65_537, 131_072].map(|len| vec![len as u8; len]);
    for content in [b"short".to_vec(), long(0)].into_iter().chain(sizes) {
        assert_eq!(one.ask(&content), Reply::Unknown);
        assert_eq!(one.ask_by_hash(&content), Reply::Unknown);
        let verdict = one.driver.scan(&content);
        assert_eq!(verdict.kind, VerdictKind::Clean);
        let expected =
            Clean { unopened: false, generation: verdict.generation, hash: hash(&content) };
        for asker in [&mut one, &mut two] {
            assert_eq!(asker.ask(&content), Reply::Clean(expected));
            assert_eq!(asker.ask_by_hash(&content), Reply::Clean(expected));
        }
    }
    // What is not good is never told so, however well it is known.
    assert_eq!(one.driver.scan(b"SEAWALL-FAULT found=X").kind, VerdictKind::Infected);
    assert_eq!(two.ask(b"SEAWALL-FAULT found=X"), Reply::Unknown);
    assert_eq!(two.ask_by_hash(b"SEAWALL-FAULT found=X"), Reply::Unknown);
    let counters = service.status().counters;
    assert_eq!(counters.scans, 7, "the ring has nothing scanned");
    // Only what was answered counts: as requests, and as verdicts.
    assert_eq!(counters.requests, 7 + 24);
    assert_eq!(counters.verdicts.clean, 6 + 24);
    assert_eq!(service.guest("g2").verdicts.clean, 12);
    service.wait_no_copies();
}

#[test]
fn who_looks_away_is_told_on_the_link() {
    let service = Service::start(Setup::default());
    let mut one = Asker::new(&service, "g1");
    one.driver.scan(b"known");
    for round in 0..20 {
        let content: &[u8] = if round % 2 == 0 { b"known" } else { b"unknown" };
        let (_slots, query, filled) = one.content(content);
        wait_for("the service to sleep", || (!one.service_looks()).then_some(()));
        one.ring.ask(round, &query, filled);
        one.ring.look_away(round);
        one.driver.say(ToHost::Doorbell);
        let answer = one.hear_answer(round);
        assert_eq!(answer.map(|clean| clean.hash), (round % 2 == 0).then(|| hash(content)));
    }
}

#[test]
fn archives_into_which_nobody_looked_are_told_from_others() {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    std::io::Write::write_all(&mut out, b"harmless").unwrap();
    let archive = out.finish().unwrap();
    let service = Service::start(Setup { engine: Engine::Yara, ..Setup::default() });
    let mut one = Asker::new(&service, "g1");
    assert_eq!(one.ask(&archive), Reply::Unknown);
    assert_eq!(one.driver.scan(&archive).kind, VerdictKind::Unopened);
    let (by_content, by_hash) = (one.ask(&archive), one.ask_by_hash(&archive));
    assert!(clean(by_content).unopened && by_hash == by_content, "{by_content:?}");
    let more = "[policy.archives]\non_access = true\n".to_owned();
    let service = Service::start(Setup { engine: Engine::Yara, more, ..Setup::default() });
    let mut one = Asker::new(&service, "g1");
    assert_eq!(one.driver.scan(&archive).kind, VerdictKind::Clean);
    let (by_content, by_hash) = (one.ask(&archive), one.ask_by_hash(&archive));
    assert!(!clean(by_content).unopened && by_hash == by_content, "{by_content:?}");
}

#[test]
fn after_new_signatures_nothing_is_known_until_it_was_scanned_again() {
    let service = Service::start(Setup { engine: Engine::Yara, ..Setup::default() });
    let mut one = Asker::new(&service, "g1");
    let before = one.driver.scan(b"harmless until today");
    assert_eq!(clean(one.ask(b"harmless until today")).generation, before.generation);
    let rule = "rule Today { strings: $a = \"until today\" condition: $a }\n";
    fs::write(service.path("rules/new.yar"), rule).unwrap();
    assert!(block_on(service.client().reload()).unwrap().taken);
    assert_eq!(one.ask(b"harmless until today"), Reply::Unknown);
    assert_eq!(one.ask_by_hash(b"harmless until today"), Reply::Unknown);
    assert_eq!(one.driver.scan(b"harmless until today").kind, VerdictKind::Infected);
    assert_eq!(one.ask(b"harmless until today"), Reply::Unknown);
    let after = one.driver.scan(b"harmless for ever");
    assert!(after.generation > before.generation);
    assert_eq!(clean(one.ask(b"harmless for ever")).generation, after.generation);
    // Rules that ask for a file's name are not asked here.
    let rule = "rule Named { condition: path contains \"never\" }\n";
    fs::write(service.path("rules/named.yar"), rule).unwrap();
    let reload = block_on(service.client().reload()).unwrap();
    assert!(reload.taken, "{reload:?}");
    assert_eq!(one.driver.scan(b"harmless for ever").kind, VerdictKind::Clean);
    assert_eq!(one.ask(b"harmless for ever"), Reply::Unknown);
}

#[test]
fn policy_counts_in_the_ring() {
    let guests = vec!["a1", "a2", "b"];
    let service = Service::start(Setup { guests, ..Setup::default() });
    let write = |text: String| {
        fs::create_dir_all(service.path("policy.d")).unwrap();
        fs::write(service.path("policy.d/a.toml"), text).unwrap();
        assert!(block_on(service.client().reload()).unwrap().taken);
    };
    let excluded = hash(b"excluded");
    let group = |name: &str, guests: &str, more: &str| {
        format!(
            "[[group]]\nname = \"{name}\"\nguests = [{guests}]\npolicy.tenant = \"{name}\"\n{more}\n"
        )
    };
    let exclude = format!("policy.exclude.hashes = [\"{excluded}\"]");
    write(group("a", "\"a1\", \"a2\"", &exclude) + &group("b", "\"b\"", ""));
    let [mut a1, mut a2, mut b] = ["a1", "a2", "b"].map(|guest| Asker::new(&service, guest));
    a1.driver.scan(b"of one tenant");
    clean(a2.ask(b"of one tenant"));
    assert_eq!(b.ask(b"of one tenant"), Reply::Unknown);
    assert_eq!(b.ask_by_hash(b"of one tenant"), Reply::Unknown);
    // It is let through and not called clean.
    assert_eq!(a1.driver.scan(b"excluded").kind, VerdictKind::Excluded);
    assert_eq!(a1.ask(b"excluded"), Reply::Unknown);
    b.driver.scan(b"excluded");
    clean(b.ask(b"excluded"));
}

/// Numbers that jump, run backwards or come twice: they are not there.
#[test]
fn numbers_that_are_not_next_are_not_there() {
    let service = Service::start(Setup::default());
    let mut one = Asker::new(&service, "g1");
    one.driver.scan(b"known");
    let query = Query::Hash(hash(b"known"));
    for number in [1, 63, 64, 1 << 40, u64::MAX] {
        one.ring.ask(number, &query, Filled::Pieces(0));
        one.driver.say(ToHost::Doorbell);
        one.driver.scan(b"known");
        assert_eq!(one.ring.reply(number), None, "{number}");
    }
    // The first, then the second one, which stands there already.
    for number in 0..2 {
        one.ring.ask(number, &query, Filled::Pieces(0));
        one.driver.say(ToHost::Doorbell);
        clean(wait_for("the reply", || one.ring.reply(number)));
    }
    one.ring.ask(0, &Query::Hash(hash(b"other")), Filled::Pieces(0));
    one.driver.say(ToHost::Doorbell);
    one.driver.scan(b"known");
    clean(one.ring.reply(0).expect("the reply from before stands there"));
    one.next = 2;
    clean(one.ask(b"known"));
}

#[test]
fn torn_and_foreign_queries_are_not_there() {
    let service = Service::start(Setup::default());
    let mut one = Asker::new(&service, "g1");
    one.driver.scan(b"known");
    let file = fs::File::options().write(true).open(service.path("g1.region")).unwrap();
    let foreign = GuestRing::new(service.region("g1"), seawall_proto::RingKey([1; 32]));
    foreign.ask(0, &Query::Hash(hash(b"known")), Filled::Pieces(0));
    one.driver.say(ToHost::Doorbell);
    one.driver.scan(b"known");
    assert!(foreign.reply(0).is_none() && one.ring.reply(0).is_none());
    one.ring.ask(0, &Query::Hash(hash(b"known")), Filled::Pieces(0));
    file.write_all_at(&[0xff; 3], 8192 + 30).unwrap();
    one.driver.say(ToHost::Doorbell);
    one.driver.scan(b"known");
    assert!(one.ring.reply(0).is_none());
    file.write_all_at(&[0xff; 16_384], 8192).unwrap();
    one.driver.say(ToHost::Doorbell);
    one.driver.scan(b"known");
    clean(one.ask(b"known"));
}

#[test]
fn queries_that_make_no_sense_have_an_end() {
    let service = Service::start(Setup::default());
    let (mut one, mut two) = (Asker::new(&service, "g1"), Asker::new(&service, "g2"));
    one.driver.scan(b"known");
    let senseless = [
        Query::Content { len: 5, slots: vec![15] },
        Query::Content { len: 5, slots: vec![u16::MAX] },
        Query::Content { len: 5, slots: vec![] },
        Query::Content { len: 0, slots: vec![] },
        Query::Content { len: u32::MAX, slots: vec![0; 16] },
        Query::Content { len: 65_536, slots: vec![0, 1] },
    ];
    for query in &senseless {
        assert_eq!(one.ask_with(query, Filled::Pieces(64)), Reply::Unknown, "{query:?}");
        clean(one.ask(b"known"));
    }
    // Content that is announced and does not come, or is given up.
    let (_slots, query, _) = one.content(&long(1));
    assert_eq!(one.ask_with(&query, Filled::GivenUp), Reply::Unknown);
    assert_eq!(one.ask_with(&query, Filled::Pieces(3)), Reply::Unknown);
    clean(one.ask(b"known"));
    for _ in 0..10 {
        assert_eq!(one.ask_with(&senseless[0], Filled::Pieces(1)), Reply::Unknown);
    }
    service
        .wait_log("its ring is looked at no longer: slot 15 with 5 bytes is not within 15 slots");
    one.put(&Query::Hash(hash(b"known")), Filled::Pieces(0));
    assert_eq!(one.driver.scan(b"known").kind, VerdictKind::Clean, "the session stands");
    assert!(one.ring.reply(one.next - 1).is_none());
    clean(two.ask(b"known"));
}

#[test]
fn a_region_cut_short_ends_no_session() {
    let service = Service::start(Setup::default());
    let mut one = Asker::new(&service, "g1");
    one.driver.scan(b"known");
    clean(one.ask(b"known"));
    let file = fs::File::options().write(true).open(service.path("g1.region")).unwrap();
    file.set_len(4096).unwrap();
    // The driver's mapping is of nothing now: neither side sees the other, and neither dies of it.
    let number = one.put(&Query::Hash(hash(b"known")), Filled::Pieces(0));
    one.driver.say(ToHost::Doorbell);
    one.driver.heartbeat();
    while !matches!(one.driver.connection.hear().unwrap(), ToGuest::Alive) {}
    assert_eq!(one.ring.reply(number), None);
    file.set_len(1 << 20).unwrap();
    assert_eq!(one.driver.scan(b"known").kind, VerdictKind::Clean);
    clean(Asker::new(&service, "g1").ask(b"known"));
}

/// Of memory that is gone zeros are read. That zeros are clean says nothing of what was there.
#[test]
fn zeros_of_what_is_gone_are_no_content() {
    let service = Service::start(Setup::default());
    let mut one = Asker::new(&service, "g1");
    let zeros = vec![0; 40_000];
    assert_eq!(one.driver.scan(&zeros).kind, VerdictKind::Clean);
    clean(one.ask(&zeros));
    let (_slots, query, filled) = one.content(&[7; 40_000]);
    let file = fs::File::options().write(true).open(service.path("g1.region")).unwrap();
    // The ring stays, the slots go.
    file.set_len(65_536).unwrap();
    assert_eq!(one.ask_with(&query, filled), Reply::Unknown);
    file.set_len(1 << 20).unwrap();
    // This session's ring is used no longer.
    let number = one.put(&Query::Hash(hash(&zeros)), Filled::Pieces(0));
    one.driver.heartbeat();
    while !matches!(one.driver.connection.hear().unwrap(), ToGuest::Alive) {}
    assert_eq!(one.ring.reply(number), None);
    clean(Asker::new(&service, "g1").ask(&zeros));
}

/// Content that changes while it is read is never taken for what it is not.
#[test]
fn content_that_changes_is_what_was_read_or_unknown() {
    let service = Service::start(Setup { engine: Engine::Yara, ..Setup::default() });
    let mut one = Asker::new(&service, "g1");
    let good = long(2);
    let evil = [eicar().as_slice(), &good[eicar().len()..]].concat();
    assert_eq!(one.driver.scan(&good).kind, VerdictKind::Clean);
    assert_eq!(one.driver.scan(&evil).kind, VerdictKind::Infected);
    let (slots, query, filled) = one.content(&good);
    let file = fs::File::options().write(true).open(service.path("g1.region")).unwrap();
    let at = 65_536 * (u64::from(slots[0].index()) + 1);
    let stop = AtomicBool::new(false);
    let (mut known, mut unknown) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for content in [&good, &evil].into_iter().cycle() {
                file.write_all_at(&content[..100], at).unwrap();
                if stop.load(Ordering::Relaxed) {
                    break;
                }
            }
        });
        let until = Instant::now() + Duration::from_secs(10);
        while (known == 0 || unknown == 0 || known + unknown < 300) && Instant::now() < until {
            match one.ask_with(&query, filled) {
                Reply::Clean(clean) => {
                    assert_eq!(clean.hash, hash(&good));
                    known += 1;
                }
                Reply::Unknown => unknown += 1,
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(known > 0 && unknown > 0, "{known} {unknown}");
}

/// Many queries, some while the service looks, some while it sleeps, some from a driver that does not look: each has its
/// answer.
#[test]
fn each_query_has_its_answer_at_whatever_moment() {
    let service = Service::start(Setup::default());
    let mut one = Asker::new(&service, "g1");
    one.driver.scan(b"known");
    let (mut looked, mut told, mut rung, mut early_used) = (0, 0, 0, 0);
    for n in 0..5_000_u64 {
        let query = Query::Hash(hash(if n % 3 == 0 { b"unknown" } else { b"known" }));
        rung += u32::from(!one.service_looks());
        let early = (n % 7 == 0).then(|| one.ring_bell(None)).flatten();
        if early.is_some() {
            // It has come and gone by then, or not.
            std::thread::sleep(Duration::from_micros(n * 31 % 400));
        }
        let number = one.next;
        one.next += 1;
        one.ring.ask(number, &query, Filled::Pieces(0));
        early_used += u32::from(early.is_some() && one.ring_bell(early) == early);
        if early.is_none() {
            one.ring_bell(None);
        }
        let until = Instant::now() + Duration::from_micros(n * 7919 % 60);
        let mut reply = None;
        while reply.is_none() && Instant::now() < until {
            reply = one.ring.reply(number);
        }
        if reply.is_none() {
            one.ring.look_away(number);
            reply = one.ring.reply(number);
        }
        looked += u32::from(reply.is_some());
        let reply = reply.unwrap_or_else(|| {
            told += 1;
            one.hear_answer(number).map_or(Reply::Unknown, Reply::Clean)
        });
        assert_eq!(reply == Reply::Unknown, n % 3 == 0, "{n}");
        if n % 10 == 0 {
            std::thread::sleep(Duration::from_micros(n * 104_729 % 300));
        }
    }
    assert!(looked > 0 && told > 0 && rung > 0, "{looked} {told} {rung}");
    assert!(early_used > 0, "the service looks for what it is told of");
}
