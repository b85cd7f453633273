//! What an operator is told when something is not as it should be.

use std::process::{Command, Output};

fn seawall(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_seawall"))
        .env_remove("SEAWALL_SOCKET")
        .args(arguments)
        .output()
        .expect("seawall runs")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_service_that_cannot_be_reached_is_exit_code_3_and_says_what_to_do() {
    let output = seawall(&["--socket", "/nonexistent/api.sock", "status"]);
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(
        said(&output),
        "seawall: the service cannot be reached at /nonexistent/api.sock: No such file or directory \
         (os error 2)\nThere is no such socket: start seawalld, or name its api_socket with --socket \
         or SEAWALL_SOCKET.\n"
    );
    let by_environment = Command::new(env!("CARGO_BIN_EXE_seawall"))
        .env("SEAWALL_SOCKET", "/elsewhere.sock")
        .arg("guests")
        .output()
        .expect("seawall runs");
    assert!(said(&by_environment).contains("/elsewhere.sock"), "{by_environment:?}");
}

#[test]
fn wrong_use_is_exit_code_2() {
    assert_eq!(seawall(&["scna", "x"]).status.code(), Some(2));
    assert_eq!(seawall(&["events", "--limit", "100001"]).status.code(), Some(2));
    assert_eq!(seawall(&["events", "--since", "yesterday"]).status.code(), Some(2));
    assert_eq!(seawall(&["events", "--follow", "--until", "2h"]).status.code(), Some(2));
    assert_eq!(seawall(&[]).status.code(), Some(2));
}

#[test]
fn completions_and_man_pages_come_from_the_same_source_as_the_help() {
    for shell in ["bash", "zsh", "fish"] {
        let text = String::from_utf8(seawall(&["completions", shell]).stdout).expect("UTF-8");
        assert!(text.contains("since") && text.contains("reload"), "{shell}");
    }
    let folder = tempfile::tempdir().expect("a folder");
    assert!(seawall(&["man", folder.path().to_str().expect("UTF-8")]).status.success());
    let page = std::fs::read_to_string(folder.path().join("seawall-events.1")).expect("a page");
    assert!(page.contains("how long ago"), "{page}");
}

#[test]
fn the_help_names_every_exit_code() {
    let help = String::from_utf8(seawall(&["--help"]).stdout).expect("UTF-8");
    for code in
        ["0 all went well", "1 `scan` found malware", "2 wrong use", "3 the service", "4 something"]
    {
        assert!(help.contains(code), "{code} is not in\n{help}");
    }
}

#[test]
fn a_file_that_cannot_be_read_is_named_harmlessly() {
    let output = seawall(&["scan", "/nonexistent/\u{1b}[31mx"]);
    assert_eq!(output.status.code(), Some(4));
    assert!(said(&output).contains(r"/nonexistent/\x1b[31mx cannot be read"), "{output:?}");
    let folder = seawall(&["scan", "/"]);
    assert!(said(&folder).contains("is a folder"), "{folder:?}");
}
