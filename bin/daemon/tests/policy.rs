//! Policies of groups of guests: who has which, what is refused, what is told.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Engine, Service, Setup, block_on, seawall};
use seawall_client::{ClientError, ExplainQuery, PolicyCheck};
use seawall_proto::remedy::Remediation;
use seawall_proto::{FailMode, Policy, ToGuest, VerdictKind};
use std::fs;
use std::process::Command;

const UUID: &str = "1b4e28ba-2fa1-11d2-883f-0016d3cca427";

fn setup() -> Setup {
    Setup {
        guests: vec!["web", "db", "mail", "other"],
        of_guests: vec![
            ("db", "tags = [\"prod\", \"sql\"]"),
            ("mail", "uuid = \"1B4E28BA-2fa1-11d2-883f-0016d3cca427\""),
        ],
        more: "[policy]\nwhole_file_limit_mib = 100\n[policy.deadline]\nopen_ms = 4000\n".into(),
        ..Setup::default()
    }
}

/// Writes a file of groups.
fn write(service: &Service, name: &str, text: &str) {
    fs::create_dir_all(service.path("policy.d")).unwrap();
    fs::write(service.path("policy.d").join(name), text).unwrap();
}

fn reload(service: &Service) -> seawall_client::Reload {
    block_on(service.client().reload()).unwrap()
}

fn check(service: &Service) -> PolicyCheck {
    block_on(service.client().check_policy()).unwrap()
}

fn deadline(policy: &Policy) -> u32 {
    policy.open_deadline_ms
}

#[test]
fn a_guest_has_the_policy_of_the_first_group_that_names_it() {
    let mut service = Service::start(setup());
    let uuid = format!(
        "[[group]]\nname = \"mail\"\nuuids = [\"{UUID}\"]\n[group.policy.fail_mode]\nopen = \"closed\"\n"
    );
    write(
        &service,
        "20-late.toml",
        "[[group]]\nname = \"late\"\nguests = [\"web\", \"db\"]\npolicy.deadline.open_ms = 1000\n",
    );
    let early = "[[group]]\nname = \"sql\"\ntags = [\"sql\"]\npolicy.deadline.open_ms = 2000\n\
                 policy.exclude_paths = [\"/var/lib/sql/\"]\n";
    write(&service, "10-early.toml", &format!("{early}{uuid}"));
    write(&service, "30-not-read.conf", "this is not read");
    write(&service, ".hidden.toml", "neither is this");
    service.restart("TERM");
    let policy = |guest: &str| service.driver(guest).attached.policy;
    let (web, db, mail, other) = (policy("web"), policy("db"), policy("mail"), policy("other"));
    assert_eq!([&web, &db, &mail, &other].map(deadline), [1000, 2000, 4000, 4000]);
    assert_eq!(db.exclude_paths, [b"/var/lib/sql/".to_vec()]);
    assert!(web.exclude_paths.is_empty());
    let modes = [web, db, mail, other].map(|policy| {
        assert_eq!(policy.whole_file_limit, 100 << 20, "as the configuration has it for all");
        policy.fail_open
    });
    assert_eq!(modes, [FailMode::Open, FailMode::Open, FailMode::Closed, FailMode::Open]);
    let groups = ["web", "db", "mail", "other"].map(|guest| service.guest(guest).group);
    assert_eq!(
        groups.each_ref().map(|group| group.as_deref().unwrap_or("")),
        ["late", "sql", "mail", ""]
    );
}

#[test]
fn a_reload_tells_those_whose_policy_changes_and_nobody_else() {
    let mut service = Service::start(setup());
    let (mut web, mut db) = (service.driver("web"), service.driver("db"));
    write(
        &service,
        "a.toml",
        "[[group]]\nname = \"g\"\nguests = [\"web\"]\npolicy.deadline.open_ms = 900\n",
    );
    assert_eq!(check(&service).changes, ["web"]);
    assert!(reload(&service).taken);
    let Some(ToGuest::Policy(policy)) = web.connection.hear() else { panic!("no policy") };
    assert_eq!(deadline(&policy), 900);
    assert!(check(&service).changes.is_empty(), "it is in use");
    // Another tag is no reason to end a session.
    service.setup.of_guests = vec![("db", "tags = [\"new\"]")];
    write(
        &service,
        "a.toml",
        "[[group]]\nname = \"g\"\ntags = [\"new\"]\npolicy.deadline.open_ms = 800\n",
    );
    service.configure();
    assert!(reload(&service).taken);
    let Some(ToGuest::Policy(policy)) = web.connection.hear() else { panic!("no policy") };
    assert_eq!(deadline(&policy), 4000, "of no group any more");
    let Some(ToGuest::Policy(policy)) = db.connection.hear() else { panic!("no policy") };
    assert_eq!(deadline(&policy), 800, "the first that it hears of");
    assert_eq!(db.scan(b"its session stands").kind, VerdictKind::Clean);
}

#[test]
fn what_is_wrong_is_all_told_with_its_place_and_the_running_policy_stays() {
    let service = Service::start(setup());
    write(
        &service,
        "a.toml",
        "[[group]]\nname = \"good\"\nguests = [\"web\"]\npolicy.deadline.open_ms = 900\n",
    );
    assert!(reload(&service).taken);
    let mut web = service.driver("web");
    write(
        &service,
        "b.toml",
        "[[group]]\nname = \"key\"\nguests = [\"db\"]\npolicy.dead_line.open_ms = 900\n",
    );
    write(
        &service,
        "c.toml",
        "[[group]]\nname = \"value\"\nguests = [\"db\"]\npolicy.deadline.open_ms = 9\n",
    );
    write(
        &service,
        "d.toml",
        "[[group]]\nname = \"nobody\"\n\n[[group]]\nname = \"good\"\ntags = [\"sql\"]\n",
    );
    write(&service, "e.toml", "[[group]\n");
    fs::create_dir(service.path("policy.d/f.toml")).unwrap();
    fs::write(service.path("policy.d/g.toml"), b"name = \"\xff\"").unwrap();
    let wanted = [
        "b.toml:4:8: error[E-KEY]: unknown field `dead_line`",
        "c.toml:4:27: error[E-VALUE]: 9 is not from 10 to 600000",
        "d.toml:2:8: error[E-NO-MATCH]: group `nobody` names no guest",
        "d.toml:5:8: error[E-CONFLICT]: group `good` is defined at ",
        "e.toml:1:9: error[E-SYNTAX]: ",
        "f.toml: error[E-READ]: it cannot be read: ",
        "g.toml: error[E-READ]: it cannot be read: ",
    ];
    let told = reload(&service);
    let error = told.config_error.unwrap();
    assert!(!told.taken);
    let checked = seawall(&service, &["policy", "check"]);
    assert_eq!(checked.status.code(), Some(4));
    let start = Command::new(env!("CARGO_BIN_EXE_seawalld"))
        .args(["--check", "--config"])
        .arg(service.path("seawalld.toml"))
        .output()
        .unwrap();
    assert_eq!(start.status.code(), Some(1));
    let texts = [
        error,
        String::from_utf8(checked.stdout).unwrap(),
        String::from_utf8(start.stderr).unwrap(),
    ];
    for text in texts {
        for one in wanted {
            assert!(text.contains(&format!("policy.d/{one}")), "{one}\n--- in\n{text}");
        }
    }
    let findings = check(&service);
    assert_eq!((findings.right, findings.findings.len()), (false, wanted.len()));
    // What was in use stays, also for a session that begins now.
    assert_eq!(web.scan(b"x").kind, VerdictKind::Clean);
    assert_eq!(deadline(&service.driver("web").attached.policy), 900);
    assert_eq!(deadline(&service.driver("db").attached.policy), 4000);
}

#[test]
fn guests_that_are_not_there_and_groups_that_overlap_are_warned_of() {
    let service = Service::start(setup());
    write(
        &service,
        "a.toml",
        "[[group]]\nname = \"one\"\nguests = [\"web\", \"wbe\"]\ntags = [\"none\"]\n\n\
         [[group]]\nname = \"two\"\nguests = [\"web\"]\nuuids = [\"00000000-0000-0000-0000-000000000000\"]\n",
    );
    let wanted = [
        "a.toml:3:18: warning[W-NO-GUEST]: no guest is named `wbe`",
        "a.toml:4:9: warning[W-NO-GUEST]: no guest has the tag `none`",
        "a.toml:9:10: warning[W-NO-GUEST]: no guest has the UUID 00000000-0000-0000-0000-000000000000",
        "a.toml:7:8: warning[W-OVERLAP]: guest `web` belongs to group `one` (",
    ];
    let checked = seawall(&service, &["policy", "check"]);
    let text = String::from_utf8(checked.stdout).unwrap();
    assert_eq!(checked.status.code(), Some(0), "{text}");
    assert!(reload(&service).taken);
    for one in wanted {
        assert!(text.contains(&format!("policy.d/{one}")), "{one}\n--- in\n{text}");
        service.wait_log(one);
    }
    assert!(text.contains("good: `seawall reload` would change no guest's policy."), "{text}");
    assert_eq!(service.guest("web").group.as_deref(), Some("one"));
}

#[test]
fn what_is_explained_is_what_happens() {
    let setup = Setup { engine: Engine::Yara, ..setup() };
    let mut service = Service::start(setup);
    write(
        &service,
        "a.toml",
        "[[group]]\nname = \"sql\"\ntags = [\"sql\"]\n\n[group.policy]\nexclude_paths = [\n  \"/srv/a\",\n  \
         \"/srv/b/\",\n]\naction.infected = \"quarantine\"\n",
    );
    service.restart("TERM");
    let explain = |guest: &str, path: &str, exec| {
        let access = ExplainQuery { path: path.into(), exec };
        block_on(service.client().explain_policy(guest, &access)).unwrap()
    };
    let steps = |guest: &str, path: &str, exec| {
        let explanation = explain(guest, path, exec);
        let place = |from: seawall_client::PolicyOrigin| {
            let name = from.file.rsplit('/').next().unwrap_or_default().to_owned();
            format!("{name}:{}", from.line)
        };
        let tell = |step: seawall_client::PolicyStep| {
            format!("{} {}", step.setting, step.from.map_or("default".into(), place))
        };
        (explanation.scanned, explanation.steps.into_iter().map(tell).collect::<Vec<_>>())
    };
    // The lines of seawalld.toml: [service] takes three.
    let scanned = |paths: &str, mode: &str, held: &str, action: &str| {
        let all = [
            format!("exclude_paths {paths}"),
            "whole_file_limit_mib seawalld.toml:5".into(),
            held.into(),
            "deadline.per_64_mib_ms default".into(),
            "deadline.most_ms default".into(),
            format!("{mode} default"),
            format!("action.infected {action}"),
        ];
        (true, all.to_vec())
    };
    let open = "deadline.open_ms seawalld.toml:7";
    assert_eq!(
        steps("web", "/srv/a/x", false),
        scanned("default", "fail_mode.open", open, "default")
    );
    assert_eq!(
        steps("db", "/srv/ab", true),
        scanned("a.toml:6", "fail_mode.exec", "deadline.exec_ms default", "a.toml:10")
    );
    let excluded = |line: &str| (false, vec![line.to_owned()]);
    assert_eq!(steps("db", "/srv/a/x", false), excluded("exclude_paths[0] a.toml:7"));
    assert_eq!(steps("db", "/srv/b/x/y", true), excluded("exclude_paths[1] a.toml:8"));

    // The driver goes by the same words (Policy::exclusion), and the service by its action.
    let (mut web, mut db) = (service.driver("web"), service.driver("db"));
    assert_eq!(db.attached.policy.exclusion(b"/srv/b/x/y"), Some(1));
    assert_eq!(db.attached.policy.exclusion(b"/srv/ab"), None);
    let evil = common::eicar();
    assert_eq!(web.scan(&evil).remediation, Remediation::None);
    assert_eq!(db.scan(&evil).remediation, Remediation::Quarantine);

    let shown = seawall(&service, &["policy", "show", "db"]);
    let text = String::from_utf8(shown.stdout).unwrap();
    let row = |name: &str| {
        let line = text.lines().find(|line| line.trim_start().starts_with(name)).unwrap_or(&text);
        line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
    };
    assert!(text.starts_with("Guest db, group sql ("), "{text}");
    assert_eq!(row("action.infected")[1], "quarantine");
    assert!(row("action.infected")[2].ends_with("policy.d/a.toml:10"), "{text}");
    assert_eq!(row("deadline.exec_ms")[1..], ["10000", "default"]);
    assert_eq!(row("deadline.open_ms")[1], "4000");
    let told = seawall(&service, &["policy", "explain", "db", "/srv/a/x", "--exec"]);
    let text = String::from_utf8(told.stdout).unwrap();
    assert!(text.contains("/srv/a/x, when it is executed: not scanned\n"), "{text}");
    assert!(text.contains("`/srv/a` excludes it"), "{text}");
    for (arguments, code) in [
        (["policy", "show", "nobody"].as_slice(), "no guest is named `nobody`"),
        (&["policy", "explain", "nobody", "/x"], "no guest is named `nobody`"),
        (&["policy", "explain", "db", "x"], "the path must be absolute"),
    ] {
        let output = seawall(&service, arguments);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(4), "{text}");
        assert!(text.contains(code), "{text}");
    }
    let refused = block_on(service.client().guest_policy("nobody")).unwrap_err();
    assert!(matches!(refused, ClientError::Refused(fault) if fault.code == "no-such-guest"));
}

/// What counts is the policy when the verdict is there.
#[test]
fn a_policy_that_changes_during_a_scan_counts_for_it() {
    let service = Service::start(Setup { engine: Engine::Three, ..setup() });
    let mut web = service.driver("web");
    let (slots, refs) = web.fill(b"SEAWALL-FAULT one:sleep=2000,two:found=Evil");
    let request = web.request(refs, true);
    web.say(seawall_proto::ToHost::ScanRequest(request));
    common::wait_for("the scan", || {
        let one = service.status().engines.into_iter().find(|engine| engine.name == "one")?;
        (one.in_flight > 0).then_some(())
    });
    write(
        &service,
        "a.toml",
        "[[group]]\nname = \"g\"\nguests = [\"web\"]\npolicy.action.infected = \"quarantine\"\n",
    );
    assert!(reload(&service).taken);
    let verdict = loop {
        match web.connection.hear().expect("a verdict") {
            ToGuest::Verdict(verdict) => break verdict,
            _ => continue,
        }
    };
    assert_eq!(
        (verdict.kind, verdict.remediation),
        (VerdictKind::Infected, Remediation::Quarantine)
    );
    drop(slots);
}
