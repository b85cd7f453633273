//! Golden images, as the service keeps them: what is learned, who is told and believed, and what lasts.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Driver, Engine, Service, Setup, block_on, eicar, seawall, wait_for};
use seawall_client::{
    ClientError, EventKind, GoldenFile, GoldenFiles, GoldenLearnRequest, GoldenReport, GuestScan,
    GuestScanState,
};
use seawall_proto::walk::WalkProgress;
use seawall_proto::{
    ContentHash, Ended, Fingerprint, Golden, Operation, Part, ToGuest, ToHost, VerdictKind,
};
use seawall_region::{Filled, HostLooks, Query, Reply};
use std::fs;

const NOTHING: Golden = Golden { knows: false, learns: false };
const KNOWS: Golden = Golden { knows: true, learns: false };
const LEARNS: Golden = Golden { knows: false, learns: true };

fn setup(more: &str) -> Setup {
    Setup {
        guests: vec!["template", "clone", "other"],
        more: format!("[on_demand]\npressure_percent = 0\n{more}"),
        ..Setup::default()
    }
}

fn hash(content: &[u8]) -> ContentHash {
    ContentHash(*blake3::hash(content).as_bytes())
}

fn fingerprint(number: u8) -> Fingerprint {
    Fingerprint([number; 16])
}

fn content(number: u8) -> Vec<u8> {
    format!("file {number}").into_bytes()
}

/// What the driver is told next of golden images.
fn hear_golden(driver: &mut Driver) -> Golden {
    let is_it = |said: &ToGuest| matches!(said, ToGuest::Golden(_));
    loop {
        if let Some(at) = driver.said.iter().position(is_it)
            && let ToGuest::Golden(golden) = driver.said.remove(at)
        {
            return golden;
        }
        let said = driver.connection.hear().expect("the session stands");
        driver.said.push(said);
    }
}

/// Sends a content, and whose it is.
fn send(
    driver: &mut Driver,
    operation: Operation,
    own: Option<Fingerprint>,
    content: &[u8],
) -> VerdictKind {
    let (slots, refs) = driver.fill(content);
    let mut request = driver.request(refs, false);
    request.operation = operation;
    let id = request.id;
    driver.say(ToHost::ScanRequest(request));
    driver.say(ToHost::Ended(Ended { id, fingerprint: own }));
    let kind = driver.verdict(id).kind;
    drop(slots);
    kind
}

/// Asks with no more than a fingerprint, and perhaps a hash. `None` where the content is wanted.
fn ask(
    driver: &mut Driver,
    operation: Operation,
    own: Fingerprint,
    hash: Option<ContentHash>,
) -> Option<ContentHash> {
    let mut request = driver.request(Vec::new(), true);
    request.operation = operation;
    request.part = hash.map_or(Part::Fingerprint, Part::Hash);
    let wanted = request.id;
    driver.say(ToHost::Fingerprinted(own, request));
    loop {
        match driver.connection.hear().expect("the session stands") {
            ToGuest::Verdict(verdict) if verdict.id == wanted => {
                assert_eq!(verdict.kind, VerdictKind::Clean);
                return verdict.hash;
            }
            ToGuest::SendContent(id) if id == wanted => return None,
            other => driver.said.push(other),
        }
    }
}

/// The same until it is answered: one in a hundred is not.
fn ask_again(driver: &mut Driver, own: Fingerprint) -> Option<ContentHash> {
    (0..5).find_map(|_| ask(driver, Operation::Open, own, None))
}

fn learn(service: &Service, guest: &str, name: &str) -> GuestScan {
    let wanted = GoldenLearnRequest { guest: guest.into() };
    block_on(service.client().learn_golden(name, &wanted)).unwrap()
}

fn report(service: &Service) -> GoldenReport {
    block_on(service.client().golden()).unwrap()
}

fn hear_walk(driver: &mut Driver) -> u64 {
    let is_it = |said: &ToGuest| matches!(said, ToGuest::Walk(_));
    loop {
        if let Some(at) = driver.said.iter().position(is_it)
            && let ToGuest::Walk(walk) = driver.said.remove(at)
        {
            return walk.id;
        }
        let said = driver.connection.hear().expect("the session stands");
        driver.said.push(said);
    }
}

fn end(driver: &mut Driver, walk: u64) {
    let done = WalkProgress { id: walk, files: 1, done: true, ..WalkProgress::default() };
    driver.say(ToHost::WalkProgress(done));
}

fn until(service: &Service, id: u64, state: GuestScanState) -> GuestScan {
    wait_for(&format!("{state:?}"), || {
        let scan = block_on(service.client().guest_scan(id)).unwrap();
        Some(scan).filter(|scan| scan.state == state)
    })
}

/// The template is learned with files 1 to `count`.
fn learned(service: &Service, count: u8) -> Driver {
    let mut template = service.driver("template");
    let id = learn(service, "template", "base").id;
    assert_eq!(hear_golden(&mut template), LEARNS);
    let walk = hear_walk(&mut template);
    for number in 1..=count {
        let (own, content) = (fingerprint(number), content(number));
        assert_eq!(
            send(&mut template, Operation::OnDemand, Some(own), &content),
            VerdictKind::Clean
        );
    }
    end(&mut template, walk);
    until(service, id, GuestScanState::Done);
    assert_eq!((hear_golden(&mut template), hear_golden(&mut template)), (NOTHING, KNOWS));
    template
}

#[test]
fn what_is_clean_in_a_template_is_learned_and_known_in_its_clones() {
    let service = Service::start(setup(""));
    let (mut template, mut clone) = (service.driver("template"), service.driver("clone"));
    let id = learn(&service, "template", "base").id;
    assert_eq!(hear_golden(&mut template), LEARNS);
    let walk = hear_walk(&mut template);
    let on_demand = Operation::OnDemand;
    let one = |number| Some(fingerprint(number));
    assert_eq!(send(&mut template, on_demand, one(1), &content(1)), VerdictKind::Clean);
    // One that is named by its hash, one that changed while it was read, one that is infected, and one of an access.
    assert_eq!(send(&mut template, Operation::Open, None, &content(2)), VerdictKind::Clean);
    assert!(ask(&mut template, on_demand, fingerprint(2), Some(hash(&content(2)))).is_some());
    assert_eq!(send(&mut template, on_demand, None, &content(3)), VerdictKind::Clean);
    assert_eq!(send(&mut template, Operation::Open, one(5), &content(5)), VerdictKind::Clean);
    let infected = b"SEAWALL-FAULT found=X";
    assert_eq!(send(&mut template, on_demand, one(4), infected), VerdictKind::Infected);
    end(&mut template, walk);
    let scan = until(&service, id, GuestScanState::Done);
    assert_eq!((scan.learns.as_deref(), scan.infected), (Some("base"), 1));
    assert_eq!(scan.reason, "2 files are known");
    let lists = report(&service).lists;
    assert_eq!((lists[0].name.as_str(), lists[0].source.as_str()), ("base", "guest template"));
    assert_eq!((lists[0].files, lists.len()), (2, 1));
    let event = wait_for("the event", || {
        service.events().into_iter().find(|event| event.kind == EventKind::GoldenLearned)
    });
    assert_eq!(event.reason.as_deref(), Some("base: 2 files of guest template"));
    // A clone, which is told so, and one that comes later.
    assert_eq!(hear_golden(&mut clone), KNOWS);
    let mut other = service.driver("other");
    assert_eq!(hear_golden(&mut other), KNOWS);
    for driver in [&mut clone, &mut other] {
        assert_eq!(ask_again(driver, fingerprint(1)), Some(hash(&content(1))));
        assert_eq!(ask_again(driver, fingerprint(2)), Some(hash(&content(2))));
        for number in [3, 4, 5, 9] {
            assert_eq!(ask_again(driver, fingerprint(number)), None);
        }
    }
    // In the ring, too.
    let ring = clone.ring();
    let ask_in_ring = |clone: &mut Driver, number, own| {
        ring.ask(number, &Query::Fingerprint(own), Filled::Pieces(0));
        if ring.host_looks() != HostLooks::Now {
            clone.say(ToHost::Doorbell);
        }
        wait_for("the reply", || ring.reply(number))
    };
    assert_eq!(ask_in_ring(&mut clone, 0, fingerprint(9)), Reply::Unknown);
    let known = (1..6).find_map(|number| match ask_in_ring(&mut clone, number, fingerprint(1)) {
        Reply::Clean(clean) => Some(clean.hash),
        Reply::Unknown => None,
    });
    assert_eq!(known, Some(hash(&content(1))));
}

#[test]
fn one_in_a_hundred_is_looked_at_and_who_does_not_agree_is_not_believed() {
    let mut service = Service::start(setup(""));
    let mut template = learned(&service, 3);
    let (mut clone, mut other) = (service.driver("clone"), service.driver("other"));
    assert_eq!((hear_golden(&mut clone), hear_golden(&mut other)), (KNOWS, KNOWS));
    let asked: Vec<_> =
        (0..2000).map(|_| ask(&mut clone, Operation::Exec, fingerprint(1), None)).collect();
    let sampled = asked.iter().filter(|answer| answer.is_none()).count();
    assert!((3..80).contains(&sampled), "{sampled}");
    let open = Operation::Open;
    assert_eq!(send(&mut clone, open, Some(fingerprint(1)), &content(1)), VerdictKind::Clean);
    assert_eq!(send(&mut clone, open, Some(fingerprint(9)), b"new"), VerdictKind::Clean);
    // Its file 2 has another content.
    assert_eq!(send(&mut clone, open, Some(fingerprint(2)), b"made up"), VerdictKind::Clean);
    assert_eq!(hear_golden(&mut clone), NOTHING);
    let event = service.wait_event(EventKind::GoldenDistrusted, "clone");
    assert_eq!(event.hash, Some(hash(b"made up").to_string()));
    assert!(event.reason.unwrap().contains("golden image base"));
    assert_eq!(ask_again(&mut clone, fingerprint(1)), None);
    assert_eq!(ask_again(&mut other, fingerprint(1)), Some(hash(&content(1))), "others are");
    assert_eq!(report(&service).distrusted[0].guest, "clone");
    let text = String::from_utf8(seawall(&service, &["golden", "list"]).stdout).unwrap();
    assert!(
        text.contains("clone is no clone of base: /data/\\x1b[2Jfile\\xff was another"),
        "{text}"
    );
    // Nor is the template, once it is no more what it was.
    send(&mut template, open, Some(fingerprint(3)), b"another");
    service.wait_event(EventKind::GoldenDistrusted, "template");
    // It stays so, also where the service is killed.
    std::thread::sleep(std::time::Duration::from_millis(1500));
    drop((template, clone, other));
    service.restart("KILL");
    let mut clone = service.driver("clone");
    assert_eq!(ask_again(&mut clone, fingerprint(1)), None);
    assert!(seawall(&service, &["golden", "trust", "clone"]).status.success());
    assert_eq!(hear_golden(&mut clone), KNOWS);
    assert_eq!(ask_again(&mut clone, fingerprint(1)), Some(hash(&content(1))));
    let again = seawall(&service, &["golden", "trust", "clone"]);
    assert_eq!(again.status.code(), Some(4), "{again:?}");
}

#[test]
fn new_signatures_are_asked_about_what_was_learned() {
    let service = Service::start(Setup { engine: Engine::Yara, ..setup("") });
    let _template = learned(&service, 2);
    let (mut clone, mut other) = (service.driver("clone"), service.driver("other"));
    assert!(ask_again(&mut clone, fingerprint(1)).is_some());
    let before = clone.attached.generation;
    fs::write(
        service.path("rules/more.yar"),
        "rule More { strings: $a = \"file 2\" condition: $a }",
    )
    .unwrap();
    assert!(seawall(&service, &["reload"]).status.success());
    // Nothing is clean by an old word.
    assert_eq!(ask_again(&mut clone, fingerprint(1)), None);
    assert_eq!(ask_again(&mut clone, fingerprint(2)), None);
    let own = |number| Some(fingerprint(number));
    assert_eq!(send(&mut clone, Operation::Open, own(1), &content(1)), VerdictKind::Clean);
    assert_eq!(send(&mut clone, Operation::Open, own(2), &content(2)), VerdictKind::Infected);
    // Sent once, for all.
    assert_eq!(ask_again(&mut other, fingerprint(1)), Some(hash(&content(1))));
    assert_eq!(ask_again(&mut other, fingerprint(2)), None);
    assert!(report(&service).distrusted.is_empty());
    let generation = |said: &ToGuest| matches!(said, ToGuest::Generation(now) if *now > before);
    assert!(clone.said.iter().any(generation));
}

#[test]
fn a_template_is_learned_over_restarts_and_in_place_of_an_earlier_one() {
    let mut service = Service::start(setup(""));
    let mut template = service.driver("template");
    let id = learn(&service, "template", "base").id;
    let walk = hear_walk(&mut template);
    let own = Some(fingerprint(1));
    send(&mut template, Operation::OnDemand, own, &content(1));
    let place = b"there".to_vec().into();
    let progress = WalkProgress { id: walk, files: 1, place, ..WalkProgress::default() };
    template.say(ToHost::WalkProgress(progress));
    wait_for("its word", || {
        (block_on(service.client().guest_scan(id)).unwrap().files == 1).then_some(())
    });
    // The driver goes and comes: it goes on, and what was learned is kept.
    drop(template);
    until(&service, id, GuestScanState::Waiting);
    let mut template = service.driver("template");
    assert_eq!(hear_golden(&mut template), LEARNS);
    let walk = hear_walk(&mut template);
    send(&mut template, Operation::OnDemand, Some(fingerprint(2)), &content(2));
    end(&mut template, walk);
    until(&service, id, GuestScanState::Done);
    assert_eq!(report(&service).lists[0].files, 2);
    // The service goes: it begins anew, since nothing of it is written before the end.
    let id = learn(&service, "template", "base").id;
    let _walk = hear_walk(&mut template);
    send(&mut template, Operation::OnDemand, own, &content(3));
    drop(template);
    service.restart("KILL");
    assert_eq!(report(&service).lists[0].files, 2, "the one before");
    let mut template = service.driver("template");
    let walk = hear_walk(&mut template);
    end(&mut template, walk);
    let scan = until(&service, id, GuestScanState::Failed);
    assert!(scan.reason.starts_with("nothing could be learned"), "{}", scan.reason);
    let id = learn(&service, "template", "base").id;
    let walk = hear_walk(&mut template);
    send(&mut template, Operation::OnDemand, own, &content(3));
    end(&mut template, walk);
    until(&service, id, GuestScanState::Done);
    assert_eq!((report(&service).lists.len(), report(&service).lists[0].files), (1, 1));
    let mut clone = service.driver("clone");
    assert_eq!(ask_again(&mut clone, fingerprint(1)), Some(hash(&content(3))));
    // A scan besides learns nothing.
    let scans = seawall(&service, &["scan", "template", "--detach"]);
    assert!(scans.status.success());
    let walk = hear_walk(&mut template);
    let content = send(&mut template, Operation::OnDemand, Some(fingerprint(7)), &content(7));
    assert_eq!(content, VerdictKind::Clean);
    end(&mut template, walk);
    until(&service, id + 1, GuestScanState::Done);
    assert_eq!(report(&service).lists[0].files, 1);
    assert_eq!(ask_again(&mut clone, fingerprint(7)), None);
    let knows = Golden { knows: true, learns: false };
    assert_eq!(template.said.iter().rev().find_map(golden).unwrap_or(knows), knows);
}

fn golden(said: &ToGuest) -> Option<Golden> {
    match said {
        ToGuest::Golden(golden) => Some(*golden),
        _ => None,
    }
}

#[test]
fn a_tenants_template_is_that_tenants() {
    let setup = Setup {
        of_guests: vec![("template", "tags = [\"a\"]"), ("clone", "tags = [\"a\"]")],
        ..setup("")
    };
    let service = Service::start(setup);
    let folder = service.path("policy.d");
    fs::create_dir_all(&folder).unwrap();
    let group = "[[group]]\nname = \"a\"\ntags = [\"a\"]\n[group.policy]\ntenant = \"a\"\n";
    fs::write(folder.join("a.toml"), group).unwrap();
    let reload = seawall(&service, &["reload"]);
    assert!(reload.status.success(), "{reload:?}");
    let _template = learned(&service, 1);
    assert_eq!(report(&service).lists[0].tenant.as_deref(), Some("a"));
    let (mut clone, mut other) = (service.driver("clone"), service.driver("other"));
    assert_eq!(hear_golden(&mut clone), KNOWS);
    assert!(ask_again(&mut clone, fingerprint(1)).is_some());
    assert_eq!(ask_again(&mut other, fingerprint(1)), None);
    assert_eq!(other.said.iter().find_map(golden), None, "it is told of nothing");
}

#[test]
fn what_makes_no_sense_is_refused() {
    let service = Service::start(setup(""));
    let _template = learned(&service, 1);
    let client = service.client();
    let wanted = |guest: &str| GoldenLearnRequest { guest: guest.into() };
    let refused = |error: ClientError| match error {
        ClientError::Refused(fault) => fault.code,
        other => panic!("{other}"),
    };
    let learn = |name, guest| block_on(client.learn_golden(name, &wanted(guest))).unwrap_err();
    assert_eq!(refused(learn("base", "nobody")), "no-such-guest");
    assert_eq!(refused(learn("../base", "clone")), "bad-name");
    assert_eq!(refused(block_on(client.forget_golden("none")).unwrap_err()), "no-such-image");
    assert_eq!(refused(block_on(client.trust_golden("clone")).unwrap_err()), "not-distrusted");
    let file = GoldenFile {
        fs_type: 0xef53,
        fs_id: 1,
        inode: 1,
        size: 1,
        modified: (1, 1),
        changed: (1, 1),
        born: (1, 1),
        hash: "00".repeat(32),
    };
    let put = |file: GoldenFile| {
        block_on(client.put_golden("tree", &GoldenFiles { tree: "/x".into(), files: vec![file] }))
    };
    assert_eq!(
        refused(put(GoldenFile { hash: "0".into(), ..file.clone() }).unwrap_err()),
        "bad-hash"
    );
    let coarse = GoldenFile { changed: (1, 0), ..file.clone() };
    assert_eq!(refused(put(coarse).unwrap_err()), "nothing-to-learn");
    assert_eq!(put(file).unwrap().files, 1);
    // A driver that names none, or ends what was never begun.
    let mut clone = service.driver("clone");
    let mut request = clone.request(Vec::new(), true);
    request.part = Part::Fingerprint;
    let id = request.id;
    clone.say(ToHost::ScanRequest(request));
    assert_eq!(clone.verdict(id).kind, VerdictKind::Error);
    let (slots, refs) = clone.fill(b"x");
    let request = clone.request(refs, true);
    let id = request.id;
    clone.say(ToHost::Fingerprinted(fingerprint(1), request));
    assert_eq!(clone.verdict(id).kind, VerdictKind::Clean, "what it has besides does not count");
    drop(slots);
    clone.say(ToHost::Ended(Ended { id, fingerprint: None }));
    assert!(ask_again(&mut clone, fingerprint(1)).is_some(), "it is late, and does no harm");
    let id = seawall_proto::RequestId(1_000_000);
    clone.say(ToHost::Ended(Ended { id, fingerprint: None }));
    clone.connection.hear_the_end();
    assert!(report(&service).distrusted.is_empty());
}

/// A folder of this machine, as the operator learns it: what a clone of its file system would name is known.
#[test]
fn a_tree_is_learned_by_the_command() {
    let service = Service::start(Setup { engine: Engine::Yara, ..setup("") });
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("image");
    fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
    let tree = folder.path().join("debian13");
    fs::create_dir(&tree).unwrap();
    let run = |program: &str, arguments: &[&str]| {
        let done = std::process::Command::new(program).args(arguments).status().unwrap();
        assert!(done.success(), "{program} {arguments:?}");
    };
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
    let private = nix::mount::MsFlags::MS_PRIVATE | nix::mount::MsFlags::MS_REC;
    nix::mount::mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
    run("mkfs.ext4", &["-q", "-F", image.to_str().unwrap()]);
    run("mount", &["-o", "loop", image.to_str().unwrap(), tree.to_str().unwrap()]);
    fs::create_dir(tree.join("bin")).unwrap();
    for number in 0..5 {
        fs::write(tree.join(format!("bin/{number}")), content(number)).unwrap();
    }
    fs::hard_link(tree.join("bin/1"), tree.join("bin/link")).unwrap();
    fs::write(tree.join("empty"), "").unwrap();
    fs::write(tree.join("evil"), eicar()).unwrap();
    std::os::unix::fs::symlink("/etc", tree.join("etc")).unwrap();
    fs::write(tree.join("everybodys"), "everybody's").unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o666);
    fs::set_permissions(tree.join("everybodys"), mode).unwrap();
    let refused = seawall(&service, &["golden", "learn", tree.to_str().unwrap()]);
    assert_eq!(refused.status.code(), Some(4), "it may change");
    let remount =
        |how: &str| run("mount", &["-o", &format!("remount,{how}"), tree.to_str().unwrap()]);
    remount("ro");
    let learned = seawall(&service, &["golden", "learn", tree.to_str().unwrap()]);
    let text = String::from_utf8(learned.stdout).unwrap();
    assert_eq!(learned.status.code(), Some(1), "{text}");
    assert!(text.contains("debian13: 5 files of tree"), "{text}");
    assert!(text.contains("infected: ") && text.contains("/debian13/evil"), "{text}");
    remount("rw");
    fs::remove_file(tree.join("evil")).unwrap();
    remount("ro");
    let tree = tree.to_str().unwrap();
    let learned = seawall(&service, &["--json", "golden", "learn", tree, "--name", "base"]);
    assert_eq!(learned.status.code(), Some(0), "{learned:?}");
    let list: seawall_client::GoldenList = serde_json::from_slice(&learned.stdout).unwrap();
    assert_eq!((list.name.as_str(), list.files), ("base", 5));
    let shown = String::from_utf8(seawall(&service, &["golden"]).stderr).unwrap();
    assert!(shown.contains("learn") && shown.contains("list"), "{shown}");
    let own = fingerprint_of(&std::path::Path::new(tree).join("bin/3"));
    let mut clone = service.driver("clone");
    assert_eq!(ask_again(&mut clone, own), Some(hash(&content(3))));
    assert!(seawall(&service, &["golden", "forget", "base"]).status.success());
    assert!(seawall(&service, &["golden", "forget", "debian13"]).status.success());
    let list = String::from_utf8(seawall(&service, &["golden", "list"]).stdout).unwrap();
    assert!(list.contains("No golden image"), "{list}");
    assert_eq!(ask_again(&mut clone, own), None);
    for wrong in [vec!["learn", "/nowhere"], vec!["learn", "/"], vec!["learn", "clone:/srv"]] {
        let refused = seawall(&service, &[&["golden"], wrong.as_slice()].concat());
        assert_eq!(refused.status.code(), Some(4), "{wrong:?} {refused:?}");
    }
    run("umount", &[tree]);
}

/// As a driver sees it.
fn fingerprint_of(path: &std::path::Path) -> Fingerprint {
    use std::os::linux::fs::MetadataExt;
    let file = fs::File::open(path).unwrap();
    let metadata = file.metadata().unwrap();
    let born = metadata.created().unwrap().duration_since(std::time::UNIX_EPOCH).unwrap();
    let nanos = |nanos: i64| u32::try_from(nanos).unwrap();
    seawall_proto::golden::Origin {
        fs_type: rustix::fs::fstatfs(&file).unwrap().f_type as u64,
        fs_id: rustix::fs::fstatvfs(&file).unwrap().f_fsid,
        inode: metadata.st_ino(),
        size: metadata.st_size(),
        modified: (metadata.st_mtime(), nanos(metadata.st_mtime_nsec())),
        changed: (metadata.st_ctime(), nanos(metadata.st_ctime_nsec())),
        born: (i64::try_from(born.as_secs()).unwrap(), born.subsec_nanos()),
    }
    .fingerprint()
    .unwrap()
}
