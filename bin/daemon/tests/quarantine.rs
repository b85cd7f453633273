//! Quarantine and restore in the service: what is durable when, and what comes back.

mod common;

use common::{Driver, Engine, Service, Setup, block_on, eicar, on_terminal, seawall, wait_for};
use seawall_client::{
    Approval, ClientError, EventKind, QuarantineEntry, QuarantineState, RestoreRequest,
};
use seawall_proto::remedy::{
    Attributes, FileIdentity, Obstacle, Offer, Offered, Remediation, Remove, Removed, Restore,
    RestoreContent, RestoreProgress, Restored, Stays,
};
use seawall_proto::{Decision, RequestId, Ticket, ToGuest, ToHost, VerdictKind};
use std::process::{Command, Stdio};
use std::time::Duration;

const ACTION: &str = "[policy.action]\ninfected = \"quarantine\"\n";

fn start() -> Service {
    start_with("")
}

fn start_with(more: &str) -> Service {
    let more = format!("{ACTION}{more}");
    Service::start(Setup { engine: Engine::Yara, more, ..Setup::default() })
}

/// Content that is found, and differs with `salt`.
fn evil(salt: &str, len: usize) -> Vec<u8> {
    let mut content = eicar();
    content.extend_from_slice(salt.as_bytes());
    content.resize(len.max(content.len()), b'.');
    content
}

fn offered(path: &str, content: &[u8]) -> Offered {
    let time = (1_700_000_000, 123);
    let size = content.len() as u64;
    let xattrs = vec![(b"user.x".to_vec().into(), b"value".to_vec().into())];
    Offered {
        path: path.as_bytes().to_vec().into(),
        identity: FileIdentity { device: 1, inode: 2, size, modified: time, changed: time },
        attributes: Attributes {
            mode: 0o4750,
            uid: 1000,
            gid: 1001,
            accessed: time,
            modified: time,
            xattrs,
            extents: Vec::new(),
            links: 1,
        },
    }
}

fn offer(driver: &mut Driver, id: RequestId, file: Offered) {
    driver.say(ToHost::Offer(Offer { id, file: Ok(file) }));
}

/// Waits for a message, past others.
fn hear<T>(driver: &mut Driver, find: impl Fn(&ToGuest) -> Option<T>) -> Option<T> {
    if let Some(found) = driver.said.iter().find_map(&find) {
        driver.said.clear();
        return Some(found);
    }
    loop {
        let message = driver.connection.hear()?;
        if let Some(found) = find(&message) {
            return Some(found);
        }
    }
}

fn removal(message: &ToGuest) -> Option<Remove> {
    if let ToGuest::Remove(remove) = message { Some(remove.clone()) } else { None }
}

fn removed(driver: &mut Driver, ticket: Ticket, result: Result<u32, Stays>) {
    driver.say(ToHost::Removed(Removed { ticket, result }));
}

/// An infected file on its way into quarantine; gives the ticket under which it is removed.
fn quarantine(driver: &mut Driver, path: &str, content: &[u8]) -> Ticket {
    let verdict = driver.scan(content);
    assert_eq!(verdict.decision, Some(Decision::Deny));
    assert_eq!(verdict.remediation, Remediation::Quarantine);
    offer(driver, verdict.id, offered(path, content));
    let remove = hear(driver, removal).expect("the host has it");
    assert_eq!(&**remove.path, path.as_bytes());
    removed(driver, remove.ticket, Ok(0));
    remove.ticket
}

fn entries(service: &Service) -> Vec<QuarantineEntry> {
    block_on(service.client().quarantine(None)).expect("the service answers").entries
}

fn entry_in(service: &Service, id: Ticket, state: QuarantineState) -> QuarantineEntry {
    wait_for(&format!("{id} to be {state:?}"), || {
        entries(service).into_iter().find(|one| one.id == id.to_string() && one.state == state)
    })
}

fn exported(service: &Service, id: &str) -> Result<Vec<u8>, ClientError> {
    block_on(async {
        let mut pieces = service.client().quarantined_content(id).await?;
        let mut all = Vec::new();
        while let Some(piece) = pieces.next().await? {
            all.extend_from_slice(&piece);
        }
        Ok(all)
    })
}

fn code_of<T: std::fmt::Debug>(result: Result<T, ClientError>) -> String {
    match result {
        Err(ClientError::Refused(fault)) => fault.code,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn a_file_is_stored_before_its_guest_removes_it_and_kept_once_for_all() {
    let service = start();
    let (mut one, mut two) = (service.driver("g1"), service.driver("g2"));
    let content = evil("shared", 200_000);
    let verdict = one.scan(&content);
    assert_eq!(
        (verdict.kind, verdict.remediation),
        (VerdictKind::Infected, Remediation::Quarantine)
    );
    assert!(entries(&service).is_empty(), "nothing was offered yet");
    offer(&mut one, verdict.id, offered("/home/evil", &content));
    let remove = hear(&mut one, removal).expect("the host has it");
    assert_eq!(remove.identity, offered("/home/evil", &content).identity);
    let stored = entry_in(&service, remove.ticket, QuarantineState::Stored);
    assert_eq!(exported(&service, &stored.id).expect("it is there"), content);
    removed(&mut one, remove.ticket, Ok(1));
    let entry = entry_in(&service, remove.ticket, QuarantineState::Quarantined);
    assert!(entry.detail.contains("1 other name"), "{}", entry.detail);
    assert_eq!((entry.guest.as_str(), entry.path.as_str()), ("g1", "/home/evil"));
    assert_eq!(entry.detection, "Eicar");
    let whole = block_on(service.client().quarantine_entry(&entry.id[..4])).expect("one begins so");
    let attributes = whole.attributes.expect("they are shown");
    assert_eq!((attributes.mode.as_str(), attributes.uid, attributes.gid), ("4750", 1000, 1001));
    assert_eq!(attributes.xattrs, ["user.x"]);

    // The other guest's verdict comes from the cache; its file is another entry of the same content.
    let other = quarantine(&mut two, "/srv/evil", &content);
    let objects = service.path("state/quarantine/objects");
    let count = || std::fs::read_dir(&objects).expect("a folder").count();
    assert_eq!((entries(&service).len(), count()), (2, 1));
    for file in std::fs::read_dir(&objects).expect("a folder").flatten() {
        let raw = std::fs::read(file.path()).expect("it is ours");
        assert!(!raw.windows(20).any(|part| part == &eicar()[..20]), "it is encrypted");
    }
    let event = service.wait_event(EventKind::Quarantined, "g1");
    assert_eq!(event.path.as_deref(), Some("/home/evil"));
    assert_eq!(event.ticket.as_deref(), Some(&*entry.id));

    let gone = |id: &str| block_on(service.client().delete_quarantined(id)).expect("it goes");
    gone(&entry.id);
    assert_eq!(count(), 1, "the other entry needs it");
    entry_in(&service, other, QuarantineState::Quarantined);
    gone(&other.to_string());
    assert_eq!(count(), 0);
    assert_eq!(code_of(exported(&service, &entry.id)), "no-such-entry");
    service.wait_no_copies();
}

#[test]
fn why_a_file_stays_is_told() {
    let service = start();
    let mut driver = service.driver("g1");
    let content = evil("immutable", 100);
    let verdict = driver.scan(&content);
    driver.say(ToHost::Offer(Offer { id: verdict.id, file: Err(Stays::Immutable) }));
    let event = service.wait_event(EventKind::QuarantineStays, "g1");
    assert!(event.reason.expect("a reason").contains("immutable"));
    // Stored first, then it could not be removed; at the next try it could, and it is one entry.
    let verdict = driver.scan(&content);
    offer(&mut driver, verdict.id, offered("/x", &content));
    let first = hear(&mut driver, removal).expect("the host has it");
    removed(&mut driver, first.ticket, Err(Stays::ReadOnly));
    let entry = entry_in(&service, first.ticket, QuarantineState::Stays);
    assert!(entry.detail.contains("read-only"), "{}", entry.detail);
    assert_eq!(quarantine(&mut driver, "/x", &content), first.ticket);
    entry_in(&service, first.ticket, QuarantineState::Quarantined);
    // Approved: it passes, is not wanted any more, and the log tells so.
    let hash = entry.hash;
    let approval = |guest: Option<&str>| Approval {
        hash: hash.clone(),
        guest: guest.map(str::to_owned),
        since: String::new(),
    };
    block_on(service.client().approve(&approval(Some("g1")))).expect("it is approved");
    let verdict = driver.scan(&content);
    assert_eq!((verdict.kind, verdict.decision), (VerdictKind::Infected, Some(Decision::Allow)));
    assert_eq!(verdict.remediation, Remediation::None);
    let mut other = service.driver("g2");
    assert_eq!(other.scan(&content).decision, Some(Decision::Deny), "for that guest alone");
    block_on(service.client().revoke(&approval(None))).expect("it was approved");
    assert_eq!(driver.scan(&content).decision, Some(Decision::Deny));
    assert_eq!(code_of(block_on(service.client().revoke(&approval(None)))), "not-approved");
    let odd = Approval { hash: "12".into(), guest: None, since: String::new() };
    assert_eq!(code_of(block_on(service.client().approve(&odd))), "bad-hash");
}

#[test]
fn deleting_asks_on_a_terminal_and_is_refused_where_nobody_can_be_asked() {
    let service = start();
    let mut driver = service.driver("g1");
    let id = quarantine(&mut driver, "/evil", &evil("asked", 100)).to_string();
    let delete = format!("quarantine delete {id}");
    let output = seawall(&service, &["quarantine", "delete", &id]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("--yes"), "{output:?}");
    for (typed, code, done) in
        [("n\n", 4, "Nothing was changed"), ("\n", 4, "Nothing was"), ("y\n", 0, "deleted")]
    {
        let (status, text) = on_terminal(&service, &delete, typed);
        assert!(text.contains("/evil") && text.contains("[y/N]"), "{text}");
        assert!(status == Some(code) && text.contains(done), "{typed:?}: {status:?} {text}");
    }
    assert!(entries(&service).is_empty());
}

#[test]
fn a_guest_speaks_for_its_own_files_alone() {
    let service = start();
    let (mut one, mut two) = (service.driver("g1"), service.driver("g2"));
    let content = evil("mine", 100);
    let verdict = one.scan(&content);
    offer(&mut one, verdict.id, offered("/mine", &content));
    let remove = hear(&mut one, removal).expect("the host has it");
    // The other guest guesses the ticket, offers what nobody asked for, and what cannot be.
    removed(&mut two, remove.ticket, Ok(0));
    offer(&mut two, RequestId(4711), offered("/theirs", &content));
    let verdict = two.scan(&content);
    let many = vec![(0, 1); Attributes::EXTENTS_MAX + 1];
    let mut odd = offered("/theirs", &content);
    odd.attributes.extents = many;
    offer(&mut two, verdict.id, odd);
    service.wait_log("impossible attributes");
    assert_eq!(two.scan(b"clean").kind, VerdictKind::Clean, "its session goes on");
    entry_in(&service, remove.ticket, QuarantineState::Stored);
    assert_eq!(entries(&service).len(), 1);
    removed(&mut one, remove.ticket, Ok(0));
    entry_in(&service, remove.ticket, QuarantineState::Quarantined);
}

/// What the driver is sent of a restore, put together.
fn receive(driver: &mut Driver, answer: Result<(), Obstacle>) -> (Restore, Vec<u8>, u64) {
    let begin = |message: &ToGuest| match message {
        ToGuest::Restore(restore) => Some(restore.clone()),
        _ => None,
    };
    let part = |message: &ToGuest| match message {
        ToGuest::RestoreContent(part) => Some(part.clone()),
        _ => None,
    };
    let restore = hear(driver, begin).expect("a restore");
    let ticket = restore.ticket;
    let mut file = vec![0; usize::try_from(restore.size).expect("it is small")];
    if answer.is_err() {
        driver.say(ToHost::Restored(Restored { ticket, result: answer }));
        return (restore, file, 0);
    }
    driver.say(ToHost::RestoreProgress(RestoreProgress { ticket, parts: 0 }));
    let (mut parts, mut bytes) = (0, 0);
    loop {
        let RestoreContent { offset, bytes: part, last, .. } = hear(driver, part).expect("a part");
        let at = usize::try_from(offset).expect("it is small");
        file[at..at + part.len()].copy_from_slice(&part);
        bytes += part.len() as u64;
        parts += 1;
        if last {
            driver.say(ToHost::Restored(Restored { ticket, result: Ok(()) }));
            return (restore, file, bytes);
        }
        driver.say(ToHost::RestoreProgress(RestoreProgress { ticket, parts }));
    }
}

/// Asks for a restore on a thread of its own, since it ends only when the driver has answered.
fn restore(
    service: &Service,
    id: Ticket,
    wanted: RestoreRequest,
) -> std::thread::JoinHandle<Result<QuarantineEntry, ClientError>> {
    let client = service.client();
    std::thread::spawn(move || block_on(client.restore(&id.to_string(), &wanted)))
}

#[test]
fn a_restore_asks_on_a_terminal_before_it_overwrites() {
    let service = start();
    let mut driver = service.driver("g1");
    let content = evil("asked", 100);
    let id = quarantine(&mut driver, "/evil", &content);
    for (typed, code, told) in [("n\n", 4, "Nothing was changed"), ("y\n", 0, "given back")] {
        let (status, text) = std::thread::scope(|scope| {
            let words = format!("quarantine restore {id}");
            let service = &service;
            let asking = scope.spawn(move || on_terminal(service, &words, typed));
            let (wanted, ..) = receive(&mut driver, Err(Obstacle::Exists));
            assert!(!wanted.overwrite);
            if code == 0 {
                let (wanted, file, _) = receive(&mut driver, Ok(()));
                assert!(wanted.overwrite && file == content);
            }
            asking.join().expect("it ends")
        });
        assert!(text.contains("Replace it? [y/N]"), "{text}");
        assert!(status == Some(code) && text.contains(told), "{status:?} {text}");
        let approvals = block_on(service.client().approvals()).expect("the service answers");
        assert_eq!(approvals.len(), usize::from(code == 0), "only what was given back is approved");
    }
    // Nor is one left that was made for a restore that breaks off later.
    let other = quarantine(&mut driver, "/other", &evil("other", 300_000));
    let restoring = restore(&service, other, RestoreRequest::default());
    let begin = |message: &ToGuest| matches!(message, ToGuest::Restore(_)).then_some(());
    hear(&mut driver, begin).expect("a restore");
    driver.say(ToHost::RestoreProgress(RestoreProgress { ticket: other, parts: 0 }));
    let result = Err(Obstacle::NoSpace);
    driver.say(ToHost::Restored(Restored { ticket: other, result }));
    assert_eq!(code_of(restoring.join().expect("it ends")), "not-restored");
    let approvals = block_on(service.client().approvals()).expect("the service answers");
    assert_eq!(approvals.len(), 1, "{approvals:?}");
}

#[test]
fn a_restore_gives_back_all_but_the_holes_and_is_not_caught_again() {
    let service = start();
    let mut driver = service.driver("g1");
    // Parts of data, a hole that was told, one that was not, and a lie: data where a hole was told.
    let mut content = evil("sparse", 700_000);
    content[100_000..300_000].fill(0);
    content[400_000..450_000].fill(0);
    let mut file = offered("/var/evil", &content);
    file.attributes.extents = vec![(0, 98_304), (300_000, 200_000)];
    let verdict = driver.scan(&content);
    offer(&mut driver, verdict.id, file.clone());
    let ticket = hear(&mut driver, removal).expect("the host has it").ticket;
    removed(&mut driver, ticket, Ok(0));
    entry_in(&service, ticket, QuarantineState::Quarantined);

    let asked = restore(&service, ticket, RestoreRequest::default());
    let (begun, got, sent) = receive(&mut driver, Ok(()));
    let entry = asked.join().expect("no panic").expect("it is restored");
    assert_eq!(entry.state, QuarantineState::Restored);
    assert_eq!((begun.path.as_slice(), begun.overwrite), (b"/var/evil".as_slice(), false));
    assert_eq!(begun.attributes, file.attributes);
    assert!(got == content, "every byte, whatever the driver said of holes");
    assert!(sent < 560_000, "{sent} bytes: the told hole was not sent");
    assert_eq!(driver.scan(&content).decision, Some(Decision::Allow), "not caught again");
    service.wait_event(EventKind::Restored, "g1");

    // Obstacles, other places, guests that are not there.
    let asked = restore(&service, ticket, RestoreRequest::default());
    receive(&mut driver, Err(Obstacle::Exists));
    assert_eq!(code_of(asked.join().expect("no panic")), "exists");
    let to = |guest: &str, path: &str| RestoreRequest {
        guest: Some(guest.into()),
        path: Some(path.into()),
        overwrite: true,
    };
    for (guest, path, code) in
        [("g2", "/x", "guest-away"), ("nobody", "/x", "no-such-guest"), ("g1", "x", "bad-path")]
    {
        let asked = restore(&service, ticket, to(guest, path));
        assert_eq!(code_of(asked.join().expect("no panic")), code, "{guest}:{path}");
    }
    let mut other = service.driver("g2");
    let asked = restore(&service, ticket, to("g2", "/elsewhere"));
    let (begun, got, _) = receive(&mut other, Ok(()));
    asked.join().expect("no panic").expect("it is restored");
    assert_eq!((begun.path.as_slice(), begun.overwrite), (b"/elsewhere".as_slice(), true));
    assert!(got == content);
}

#[test]
fn damage_is_told_and_never_given_out_as_good() {
    let mut service = start();
    let mut driver = service.driver("g1");
    let (first, second) = (evil("first", 100_000), evil("second", 100_000));
    let one = quarantine(&mut driver, "/first", &first);
    let two = quarantine(&mut driver, "/second", &second);
    entry_in(&service, one, QuarantineState::Quarantined);
    entry_in(&service, two, QuarantineState::Quarantined);
    // The index, while nobody looks.
    let index = service.path("state/quarantine/index.db");
    service.signal("STOP");
    let mut bytes = std::fs::read(&index).expect("it is ours");
    bytes[..100].fill(0xff);
    std::fs::write(&index, bytes).expect("it is ours");
    for more in ["-wal", "-shm"] {
        let _ = std::fs::remove_file(service.path(&format!("state/quarantine/index.db{more}")));
    }
    service.restart("KILL");
    assert_eq!(entries(&service).len(), 2, "made anew from the entries");
    assert_eq!(exported(&service, &one.to_string()).expect("it is whole"), first);
    assert!(service.events().iter().any(|event| event.kind == EventKind::QuarantineDamaged));
    // A content.
    let hash = entry_in(&service, one, QuarantineState::Quarantined).hash;
    let object = service.path("state/quarantine/objects").join(&hash);
    let mut bytes = std::fs::read(&object).expect("it is ours");
    bytes[70_000] ^= 1;
    std::fs::write(&object, bytes).expect("it is ours");
    assert_eq!(code_of(exported(&service, &one.to_string())), "damaged");
    let mut driver = service.driver("g1");
    let asked = restore(&service, one, RestoreRequest::default());
    let begin = |message: &ToGuest| match message {
        ToGuest::Restore(restore) => Some(restore.ticket),
        _ => None,
    };
    let ticket = hear(&mut driver, begin).expect("a restore");
    driver.say(ToHost::RestoreProgress(RestoreProgress { ticket, parts: 0 }));
    assert_eq!(code_of(asked.join().expect("no panic")), "damaged");
    let ended = |message: &ToGuest| match message {
        ToGuest::RestoreEnd(ticket) => Some(*ticket),
        ToGuest::RestoreContent(part) => {
            assert!(!part.last, "a damaged content came to its end");
            None
        }
        _ => None,
    };
    assert_eq!(hear(&mut driver, ended), Some(ticket));
    // An entry: the other one and all contents stay.
    let entry = service.path("state/quarantine/entries").join(two.to_string());
    std::fs::write(&entry, "SWQENT01 nonsense").expect("it is ours");
    service.restart("KILL");
    assert_eq!(entries(&service).len(), 1);
    let objects = service.path("state/quarantine/objects");
    assert_eq!(std::fs::read_dir(objects).expect("a folder").count(), 2, "nothing is thrown away");
}

#[test]
fn a_full_disk_leaves_the_file_in_its_guest() {
    use nix::mount::{MsFlags, mount};
    let none = None::<&str>;
    // A file system of this thread's own, and of what it starts.
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("root");
    mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).expect("root");
    let mut service = start();
    let folder = service.path("state/quarantine");
    service.signal("TERM");
    service.wait_end();
    mount(none, &folder, Some("tmpfs"), MsFlags::empty(), Some("size=300k")).expect("root");
    service.again();
    let mut driver = service.driver("g1");
    let content = evil("large", 400_000);
    let verdict = driver.scan(&content);
    assert_eq!(verdict.decision, Some(Decision::Deny));
    offer(&mut driver, verdict.id, offered("/large", &content));
    let event = service.wait_event(EventKind::QuarantineFailed, "g1");
    assert!(event.reason.expect("a reason").contains("No space"), "it says why");
    assert!(entries(&service).is_empty());
    // What fits is taken all the same, and nothing was left over.
    let small = quarantine(&mut driver, "/small", &evil("small", 100_000));
    entry_in(&service, small, QuarantineState::Quarantined);
    assert!(driver.said.is_empty(), "no removal of the large one: {:?}", driver.said);
}

#[test]
fn one_guests_flood_costs_no_other_its_files() {
    let service = start_with("[quarantine]\nmost_mib = 1\n");
    let (mut loud, mut quiet) = (service.driver("g1"), service.driver("g2"));
    let kept = quarantine(&mut quiet, "/kept", &evil("kept", 150_000));
    entry_in(&service, kept, QuarantineState::Quarantined);
    for round in 0..12 {
        let content = evil(&format!("flood {round}"), 200_000);
        let verdict = loud.scan(&content);
        offer(&mut loud, verdict.id, offered(&format!("/f{round}"), &content));
        let remove = hear(&mut loud, removal).expect("there is room again");
        // Every other removal is never confirmed.
        if round % 2 == 0 {
            removed(&mut loud, remove.ticket, Ok(0));
        }
    }
    entry_in(&service, kept, QuarantineState::Quarantined);
    let all = block_on(service.client().quarantine(None)).expect("the service answers");
    assert!(all.used_bytes <= all.most_bytes, "{all:?}");
    assert!((3..=5).contains(&all.entries.len()), "{:?}", all.entries.len());
    assert!(service.events().iter().any(|event| event.kind == EventKind::QuarantineFilling));
    service.wait_event(EventKind::QuarantineDropped, "g1");
}

#[test]
fn a_policy_bounds_what_is_kept_of_its_guests() {
    let service = start_with("");
    let group = "[[group]]\nname = \"small\"\nguests = [\"g1\"]\npolicy.action.infected = \"quarantine\"\n\
                 policy.quarantine.guest_mib = 1\n";
    std::fs::create_dir_all(service.path("policy.d")).expect("a folder");
    std::fs::write(service.path("policy.d/small.toml"), group).expect("it is written");
    assert!(block_on(service.client().reload()).expect("the service answers").taken);
    let (mut small, mut other) = (service.driver("g1"), service.driver("g2"));
    for round in 0..5 {
        for driver in [&mut small, &mut other] {
            // The same content in both: it is on the disk once, and counts for each.
            quarantine(driver, &format!("/f{round}"), &evil(&format!("round {round}"), 400_000));
        }
    }
    let of = |guest: &str| {
        let all = block_on(service.client().quarantine(Some(guest))).expect("the service answers");
        let mut paths: Vec<_> = all.entries.iter().map(|entry| entry.path.clone()).collect();
        paths.sort();
        paths
    };
    assert_eq!(of("g1"), ["/f3", "/f4"], "the newest that fit");
    assert_eq!(of("g2").len(), 5);
    let event = service.wait_event(EventKind::QuarantineDropped, "g1");
    assert_eq!(event.reason.as_deref(), Some("its guest has more than policy lets it have"));
}

/// Has the running service killed at its `nth` call of `syscall` from now on.
fn kill_at(service: &Service, syscall: &str, nth: u32) -> std::process::Child {
    let inject = format!("inject={syscall}:signal=SIGKILL:when={nth}");
    let mut strace = Command::new("strace")
        .args(["-f", "-e", &format!("trace={syscall}"), "-e", &inject, "-p"])
        .arg(service.pid().to_string())
        .stderr(Stdio::piped())
        .spawn()
        .expect("strace is installed (cargo xtask setup)");
    // It says so when it holds all threads.
    let mut said = std::io::BufReader::new(strace.stderr.take().expect("it is piped"));
    let mut line = String::new();
    std::io::BufRead::read_line(&mut said, &mut line).expect("it speaks");
    assert!(line.contains("attached"), "{line}");
    std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
    std::thread::sleep(Duration::from_millis(100));
    strace
}

/// Whether the service has died of it.
fn has_died(service: &mut Service, strace: &mut std::process::Child) -> bool {
    let died = service.try_end(Duration::from_millis(500)).is_some();
    let _ = strace.kill();
    let _ = strace.wait();
    died
}

/// Killed at each call that makes something durable: once the guest was told to remove its file, the
/// whole of it is here, and a second try completes.
#[test]
fn the_service_dies_at_every_step_of_a_quarantine_and_nothing_is_lost() {
    let mut service = start();
    let mut steps = 0;
    for syscall in ["fsync", "rename", "pwrite64"] {
        for nth in 1..20 {
            let content = evil(&format!("{syscall} {nth}"), 90_000);
            let path = format!("/{syscall}/{nth}");
            let mut driver = service.driver("g1");
            let verdict = driver.scan(&content);
            let mut strace = kill_at(&service, syscall, nth);
            // It may die before it has read anything: other threads of it make such calls, too.
            let file = Ok(offered(&path, &content));
            let offer = ToHost::Offer(Offer { id: verdict.id, file });
            let _gone = driver.connection.try_say(&offer);
            let told = hear(&mut driver, removal);
            if let Some(Remove { ticket, .. }) = told {
                let removed = ToHost::Removed(Removed { ticket, result: Ok(0) });
                let _gone = driver.connection.try_say(&removed);
            }
            let died = has_died(&mut service, &mut strace);
            if died {
                steps += 1;
                service.again();
            }
            if let Some(remove) = &told {
                let here = exported(&service, &remove.ticket.to_string());
                assert!(here.expect("the guest was told") == content, "{syscall} {nth}");
            }
            // The second try: what was not confirmed is asked for again, or the file is offered again.
            let mut driver = service.driver("g1");
            let stored = entries(&service).into_iter().find(|entry| entry.path == path);
            let ticket = match stored {
                Some(entry) if entry.state == QuarantineState::Quarantined => {
                    Ticket(u64::from_str_radix(&entry.id, 16).expect("a ticket"))
                }
                Some(_) => {
                    let remove = hear(&mut driver, removal).expect("it is asked again");
                    removed(&mut driver, remove.ticket, Err(Stays::Gone));
                    remove.ticket
                }
                None => quarantine(&mut driver, &path, &content),
            };
            entry_in(&service, ticket, QuarantineState::Quarantined);
            assert!(exported(&service, &ticket.to_string()).expect("it is here") == content);
            let all = entries(&service);
            assert_eq!(all.iter().filter(|entry| entry.path == path).count(), 1);
            if !died {
                break;
            }
        }
    }
    assert!(steps >= 6, "only {steps} steps were walked");
}

#[test]
fn the_service_dies_in_a_restore_and_the_next_one_completes() {
    let mut service = start();
    let mut driver = service.driver("g1");
    let content = evil("restore", 600_000);
    let ticket = quarantine(&mut driver, "/evil", &content);
    entry_in(&service, ticket, QuarantineState::Quarantined);
    for parts in [0, 1, 5] {
        let asked = restore(&service, ticket, RestoreRequest::default());
        let begin = |message: &ToGuest| matches!(message, ToGuest::Restore(_)).then_some(());
        hear(&mut driver, begin).expect("a restore");
        for done in 0..parts {
            driver.say(ToHost::RestoreProgress(RestoreProgress { ticket, parts: done }));
            let part =
                |message: &ToGuest| matches!(message, ToGuest::RestoreContent(_)).then_some(());
            hear(&mut driver, part).expect("a part");
        }
        service.restart("KILL");
        assert!(asked.join().expect("no panic").is_err());
        entry_in(&service, ticket, QuarantineState::Quarantined);
        driver = service.driver("g1");
    }
    // And when its last word is lost: it is there, and may be asked for once more.
    let asked = restore(&service, ticket, RestoreRequest::default());
    let (_, got, _) = receive(&mut driver, Ok(()));
    asked.join().expect("no panic").expect("it is restored");
    assert!(got == content);
    entry_in(&service, ticket, QuarantineState::Restored);
    assert_eq!(driver.scan(&content).decision, Some(Decision::Allow));
}

/// The guest removes it as it would for the quarantine, and then nothing of it is kept; what stays is listed.
#[test]
fn what_policy_deletes_is_kept_until_it_is_gone_and_no_longer() {
    let more = "[policy.action]\ninfected = \"delete\"\n";
    let mut service =
        Service::start(Setup { engine: Engine::Yara, more: more.into(), ..Setup::default() });
    let mut driver = service.driver("g1");
    let ask = |driver: &mut Driver, path: &str, content: &[u8]| {
        let verdict = driver.scan(content);
        assert_eq!(verdict.remediation, Remediation::Quarantine);
        offer(driver, verdict.id, offered(path, content));
        hear(driver, removal).expect("the host has it").ticket
    };
    let content = evil("deleted", 3000);
    let ticket = ask(&mut driver, "/deleted", &content);
    entry_in(&service, ticket, QuarantineState::Stored);
    removed(&mut driver, ticket, Ok(0));
    let deleted = |service: &Service, path: &str| {
        wait_for("an event", || {
            let mut events = service.events().into_iter();
            events
                .find(|one| one.kind == EventKind::FileDeleted && one.path.as_deref() == Some(path))
        })
    };
    assert!(deleted(&service, "/deleted").detection.is_some());
    assert_eq!(entries(&service), []);
    let stays = ask(&mut driver, "/immutable", &content);
    removed(&mut driver, stays, Err(Stays::Immutable));
    entry_in(&service, stays, QuarantineState::Stays);
    // The service dies before it hears that another is gone, and asks again.
    let last = ask(&mut driver, "/last", &evil("last", 10));
    drop(driver);
    service.restart("KILL");
    let mut driver = service.driver("g1");
    let again = hear(&mut driver, removal).expect("it is asked again").ticket;
    assert_eq!(again, last);
    removed(&mut driver, last, Err(Stays::Gone));
    deleted(&service, "/last");
    let left = entries(&service);
    assert_eq!(left.iter().map(|one| one.id.clone()).collect::<Vec<_>>(), [stays.to_string()]);
    let all = service.events();
    assert!(!all.iter().any(|one| one.kind == EventKind::Quarantined));
}
