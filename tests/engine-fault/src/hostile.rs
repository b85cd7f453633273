//! An engine that breaks the protocol, as one would that a file took over. No sandbox: it stands for
//! what comes over the socket.
//!
//! `seawall-engine-hostile MODE`: loads properly, then answers the first scan in the way of MODE.

use std::io::IoSlice;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::thread::sleep;
use std::time::Duration;

use rustix::net::{
    RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, send, sendmsg,
};
use seawall_engine::protocol::{
    Answer, MAX_TO_ENGINE, MAX_TO_HOST, ToEngine, ToHost, decode_to_engine, encode_to_host,
};
use seawall_engine::runtime::inherited_socket;
use seawall_engine::{Description, Diagnostic, Generation, Outcome};

fn main() -> ExitCode {
    let mode = std::env::args().nth(1).unwrap_or_default();
    match inherited_socket() {
        Ok(socket) => {
            Hostile { socket, mode }.run();
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

struct Hostile {
    socket: OwnedFd,
    mode: String,
}

impl Hostile {
    fn run(&self) {
        while let Some(message) = self.next() {
            match message {
                ToEngine::Start(start) => self.start(start.strict),
                ToEngine::Scan(scan) => self.answer(scan.id),
                ToEngine::Ping => {}
            }
        }
    }

    /// None at the end. The content's descriptor is left to the kernel to close.
    fn next(&self) -> Option<ToEngine> {
        let mut buffer = vec![0; MAX_TO_ENGINE];
        let (length, _) = recv(&self.socket, &mut buffer[..], RecvFlags::empty()).ok()?;
        let datagram = &buffer[..length];
        let decoded =
            decode_to_engine(datagram, false).or_else(|_| decode_to_engine(datagram, true));
        decoded.ok().map(|(message, _content)| message)
    }

    fn start(&self, strict: bool) {
        match self.mode.as_str() {
            "never-ready" => sleep(Duration::from_secs(3600)),
            "refuses" => {
                let diagnostics = vec![Diagnostic::error("hostile", "not today")];
                self.say(ToHost::Failed { diagnostics, omitted: 0 });
            }
            "dies-loading" => std::process::exit(3),
            "early-report" => self.report(1),
            // An engine that does not keep to a strict start.
            "half-a-set" if strict => self.ready(vec![Diagnostic::error("hostile", "half a set")]),
            _ => self.ready(Vec::new()),
        }
    }

    fn answer(&self, id: u64) {
        if self.mode == "deaf" {
            sleep(Duration::from_secs(3600));
        }
        self.say(ToHost::Started { id });
        match self.mode.as_str() {
            "garbage" => self.raw(&[0xff; 100]),
            "empty" => self.raw(&[]),
            "oversized" => self.raw(&vec![b'S'; MAX_TO_HOST + 1000]),
            "started-twice" => self.say(ToHost::Started { id }),
            "other-scan" => self.report(id + 1000),
            "next-is-other" => self.say(ToHost::Report {
                id,
                answer: Answer::Done(Outcome::Clean),
                next: Some(id + 1000),
            }),
            "unasked-pong" => self.say(ToHost::Pong),
            "descriptor" => self.descriptor(),
            "twice" => {
                self.report(id);
                self.report(id);
            }
            "noise" => {
                for number in 0..100_000 {
                    eprintln!("line {number} \x1b[31m red");
                }
                self.report(id);
            }
            "closes" => {
                // The socket's only end here goes; the process stays.
                let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
                sleep(Duration::from_secs(3600));
            }
            _ => self.report(id),
        }
    }

    fn ready(&self, diagnostics: Vec<Diagnostic>) {
        let description = Description::new("hostile", "1", Generation([9; 32]));
        self.say(ToHost::Ready(description.with_diagnostics(diagnostics)));
    }

    fn report(&self, id: u64) {
        self.say(ToHost::Report { id, answer: Answer::Done(Outcome::Clean), next: None });
    }

    fn say(&self, message: ToHost) {
        if let Ok(bytes) = encode_to_host(message) {
            self.raw(&bytes);
        }
    }

    fn raw(&self, bytes: &[u8]) {
        if let Err(error) = send(&self.socket, bytes, SendFlags::empty()) {
            eprintln!("cannot send {} bytes: {error}", bytes.len());
        }
    }

    /// Passes its own standard error to the host.
    fn descriptor(&self) {
        let Ok(bytes) = encode_to_host(ToHost::Pong) else { return };
        let stderr = std::io::stderr();
        let fds = [stderr.as_fd()];
        let mut space = [MaybeUninit::uninit(); 64];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        let _ = sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::empty());
    }
}
