//! The lab's own program inside a guest: init, exec server, and (on the host) the link's relay.
//!
//! One static binary, so that the same file works in an initramfs, in a full Debian and on the host.

mod exec;
mod init;
mod relay;
mod serve;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        ["/init", ..] => init::from_initramfs(),
        [_, "init"] => init::run(),
        [_, "serve"] => serve::run(),
        [_, "relay", listen, connect] => relay::run(listen.as_ref(), connect.as_ref()),
        _ => {
            eprintln!("usage: lab-guest serve | relay LISTEN CONNECT");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab-guest: {error:#}");
            ExitCode::FAILURE
        }
    }
}
