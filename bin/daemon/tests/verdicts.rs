//! A driver asks, the service answers: what is found, what is remembered, what is told.

mod common;

use common::{Engine, Service, Setup, eicar, wait_for};
use seawall_client::{EventKind, Verdict};
use seawall_proto::{
    Content, Decision, Generation, Notice, Outcome, RequestId, ToGuest, ToHost, VerdictKind,
};

fn yara() -> Service {
    Service::start(Setup { engine: Engine::Yara, ..Setup::default() })
}

#[test]
fn an_infected_file_is_denied_and_a_clean_one_is_not() {
    let service = yara();
    let mut driver = service.driver("g1");
    assert_eq!(driver.attached.guest, "g1");
    assert_eq!(driver.attached.heartbeat_ms, 1000);

    let clean = driver.scan(b"nothing to see");
    assert_eq!((clean.kind, clean.decision), (VerdictKind::Clean, Some(Decision::Allow)));
    assert_eq!(clean.hash.unwrap().0, *blake3::hash(b"nothing to see").as_bytes());
    assert_eq!(clean.generation, driver.attached.generation);

    let infected = driver.scan(&eicar());
    assert_eq!((infected.kind, infected.decision), (VerdictKind::Infected, Some(Decision::Deny)));
    assert_eq!(infected.detail.as_deref(), Some("Eicar"));

    driver.say(ToHost::Notice(Notice::Outcome(Outcome {
        id: infected.id,
        decision: Some(Decision::Deny),
        process: serde_bytes::ByteBuf::from(b"cat\n".to_vec()),
        uid: Some(1000),
    })));
    let event = service.wait_event(EventKind::Verdict, "g1");
    assert_eq!(event.verdict, Some(Verdict::Infected));
    assert_eq!(event.decision.as_deref(), Some("deny"));
    assert_eq!(event.detection.as_deref(), Some("Eicar"));
    assert_eq!(event.engine.as_deref(), Some("first"));
    assert_eq!(event.path.as_deref(), Some(r"/data/\x1b[2Jfile\xff"));
    assert_eq!(event.path_hex.as_deref(), Some("2f646174612f1b5b324a66696c65ff"));
    assert_eq!((event.process.as_deref(), event.uid), (Some(r"cat\n"), Some(1000)));
    assert_eq!((event.pid, event.operation.as_deref()), (Some(77), Some("open")));
    assert_eq!(event.hash, infected.hash.map(|hash| hash.to_string()));
}
