//! Runs one command: output and input as frames, time-out, exit status.

use std::fs;
use std::io::{self, BufReader, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};
use seawall_lab::wire::{self, Ended, Exec, Failed, Kind};

/// How long a killed command may take to disappear before it is reported as it is: a process that
/// sleeps in the kernel dies only when it wakes.
const DEATH: Duration = Duration::from_secs(2);

/// Runs the command and writes the whole answer.
pub fn run(request: &Exec, from: BufReader<TcpStream>, mut to: TcpStream) -> anyhow::Result<()> {
    let deadline = request.timeout_ms.map(|ms| Instant::now() + Duration::from_millis(ms));
    let mut child = match start(request, deadline) {
        Start::Running(child) => child,
        Start::TimedOut => {
            let ended = Ended { status: 128 + Signal::KILL.as_raw(), timed_out: true };
            return Ok(wire::write_json(&mut to, Kind::Ended, &ended)?);
        }
        Start::Failed(error) => {
            let failed = Failed {
                what: format!("{}: {error}", request.argv.join(" ")),
                errno: error.raw_os_error(),
            };
            return Ok(wire::write_json(&mut to, Kind::Failed, &failed)?);
        }
    };
    wire::write_json(&mut to, Kind::Started, &child.id())?;
    let group = Arc::new(Mutex::new(Pid::from_raw(child.id() as i32)));
    let (stdin, watched) = (child.stdin.take(), Arc::clone(&group));
    let input = thread::spawn(move || feed(from, stdin, &watched));
    let ended = pump(&mut child, deadline, &mut to, &group);
    // From here on the number may belong to another process.
    if let Ok(mut group) = group.lock() {
        *group = None;
    }
    let result = ended.and_then(|ended| wire::write_json(&mut to, Kind::Ended, &ended));
    let _ = to.shutdown(Shutdown::Both);
    let _ = input.join();
    Ok(result?)
}

enum Start {
    Running(Child),
    TimedOut,
    Failed(io::Error),
}

/// Starts the command in a thread of its own: while the kernel holds the new process at execve for the
/// driver's answer, the caller of spawn is held too, and only the child's death frees it.
fn start(request: &Exec, deadline: Option<Instant>) -> Start {
    let Some((program, arguments)) = request.argv.split_first() else {
        return Start::Failed(io::Error::new(io::ErrorKind::InvalidInput, "no command"));
    };
    let mut command = Command::new(program);
    command
        .args(arguments)
        .current_dir(request.cwd.as_deref().unwrap_or("/"))
        .env_clear()
        .envs([
            ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
            ("TERM", "dumb"),
        ])
        .envs([
            ("HOME", if request.user.is_some() { "/home/user" } else { "/root" }),
            ("LC_ALL", "C.UTF-8"),
        ])
        .envs(request.env.iter().map(|(name, value)| (name, value)))
        .stdin(if request.stdin { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    if let Some(id) = request.user {
        command.uid(id).gid(id);
    }
    let (sender, receiver) = mpsc::channel();
    let thread_id = {
        let (id_sender, id_receiver) = mpsc::channel();
        thread::spawn(move || {
            let _ = id_sender.send(rustix::thread::gettid());
            let _ = sender.send(command.spawn());
        });
        id_receiver.recv().ok()
    };
    let spawned = match deadline {
        Some(deadline) => receiver.recv_timeout(deadline.saturating_duration_since(Instant::now())),
        None => receiver.recv().map_err(|_| RecvTimeoutError::Disconnected),
    };
    match spawned {
        Ok(Ok(child)) => Start::Running(child),
        Ok(Err(error)) => Start::Failed(error),
        Err(RecvTimeoutError::Disconnected) => {
            Start::Failed(io::Error::other("the starting thread died"))
        }
        Err(RecvTimeoutError::Timeout) => {
            kill_children(thread_id);
            if let Ok(Ok(mut child)) = receiver.recv_timeout(DEATH) {
                let _ = child.kill();
                let _ = child.wait();
            }
            Start::TimedOut
        }
    }
}

/// Kills what a thread has forked: the child that is held at execve has no handle yet.
fn kill_children(thread_id: Option<Pid>) {
    let Some(thread_id) = thread_id else { return };
    let path = format!("/proc/self/task/{}/children", thread_id.as_raw_nonzero());
    for word in fs::read_to_string(path).unwrap_or_default().split_whitespace() {
        if let Some(pid) = word.parse().ok().and_then(Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, Signal::KILL);
        }
    }
}

/// Hands the caller's frames to the command; a caller that goes away takes the command with it.
fn feed(mut from: BufReader<TcpStream>, mut stdin: Option<ChildStdin>, group: &Mutex<Option<Pid>>) {
    loop {
        match wire::read_frame(&mut from) {
            Ok((Kind::Stdin, bytes)) => {
                // A command may close its input early; that is its own business.
                if stdin.as_mut().is_some_and(|pipe| pipe.write_all(&bytes).is_err()) {
                    stdin = None;
                }
            }
            Ok((Kind::StdinEnd, _)) => stdin = None,
            Ok(_) | Err(_) => {
                if let Ok(group) = group.lock() {
                    kill_group(*group);
                }
                return;
            }
        }
    }
}

fn kill_group(group: Option<Pid>) {
    if let Some(group) = group {
        let _ = rustix::process::kill_process_group(group, Signal::KILL);
    }
}

/// Copies output until the command has ended and its pipes are empty. A background process that
/// keeps the pipes open does not hold the answer back.
fn pump(
    child: &mut Child,
    mut deadline: Option<Instant>,
    to: &mut TcpStream,
    group: &Mutex<Option<Pid>>,
) -> io::Result<Ended> {
    let pid = Pid::from_child(child);
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    let mut pipes: Vec<(OwnedFd, Kind)> = Vec::new();
    pipes.extend(child.stdout.take().map(|pipe| (pipe.into(), Kind::Stdout)));
    pipes.extend(child.stderr.take().map(|pipe| (pipe.into(), Kind::Stderr)));
    for (pipe, _) in &pipes {
        rustix::io::ioctl_fionbio(pipe, true)?;
    }
    let mut timed_out = false;
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            if timed_out {
                return Ok(Ended { status: 128 + Signal::KILL.as_raw(), timed_out });
            }
            timed_out = true;
            deadline = Some(Instant::now() + DEATH);
            if let Ok(group) = group.lock() {
                kill_group(*group);
            }
            continue;
        }
        let exited = {
            let mut set = vec![PollFd::new(&pidfd, PollFlags::IN)];
            set.extend(pipes.iter().map(|(pipe, _)| PollFd::new(pipe, PollFlags::IN)));
            let timeout = left.and_then(|left| Timespec::try_from(left).ok());
            match rustix::event::poll(&mut set, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            !set[0].revents().is_empty()
        };
        let mut open = Vec::new();
        for (pipe, kind) in pipes {
            if drain(pipe.as_fd(), kind, to)? {
                open.push((pipe, kind));
            }
        }
        pipes = open;
        if exited {
            let status = child.wait()?;
            let status = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
            return Ok(Ended { status, timed_out });
        }
    }
}

/// Copies what a pipe holds now; false at its end.
fn drain(pipe: impl AsFd, kind: Kind, to: &mut TcpStream) -> io::Result<bool> {
    let mut buffer = [0u8; 64 * 1024];
    // Bounded, so that a command that writes without end cannot outrun its own time-out.
    for _ in 0..16 {
        match rustix::io::read(&pipe, &mut buffer) {
            Ok(0) => return Ok(false),
            Ok(count) => wire::write_frame(to, kind, &buffer[..count])?,
            Err(rustix::io::Errno::AGAIN) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn run_here(request: Exec) -> (Vec<u8>, Result<Ended, Failed>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut caller = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        let reader = BufReader::new(server.try_clone().unwrap());
        let worker = thread::spawn(move || run(&request, reader, server));
        let mut output = Vec::new();
        let end = loop {
            match wire::read_frame(&mut caller).unwrap() {
                (Kind::Stdout | Kind::Stderr, bytes) => output.extend(bytes),
                (Kind::Ended, bytes) => break Ok(wire::parse(&bytes).unwrap()),
                (Kind::Failed, bytes) => break Err(wire::parse(&bytes).unwrap()),
                _ => {}
            }
        };
        worker.join().unwrap().unwrap();
        (output, end)
    }

    fn shell(script: &str) -> Exec {
        Exec { argv: vec!["sh".into(), "-c".into(), script.into()], ..Exec::default() }
    }

    #[test]
    fn status_is_the_commands_or_128_plus_its_signal() {
        let (output, end) = run_here(shell("echo out; echo err >&2; exit 7"));
        assert_eq!(end.unwrap(), Ended { status: 7, timed_out: false });
        assert_eq!(output.len(), 8);
        assert_eq!(run_here(shell("kill -TERM $$")).1.unwrap().status, 143);
    }

    #[test]
    fn all_output_comes_before_the_end() {
        let (output, end) = run_here(shell("head -c 5000000 /dev/zero"));
        assert_eq!((output.len(), end.unwrap().status), (5_000_000, 0));
    }

    #[test]
    fn a_command_without_end_is_killed_with_its_children() {
        let started = Instant::now();
        let (_, end) = run_here(Exec { timeout_ms: Some(300), ..shell("sleep 60 & sleep 60") });
        assert!(end.unwrap().timed_out);
        assert!(started.elapsed() < Duration::from_secs(2));
    }

    #[test]
    fn a_background_process_does_not_hold_the_answer() {
        let started = Instant::now();
        let (output, _) = run_here(shell("sleep 5 & echo on"));
        assert_eq!(output, b"on\n");
        assert!(started.elapsed() < Duration::from_secs(3));
    }

    #[test]
    fn a_missing_program_is_a_failure_with_its_errno() {
        let (_, end) = run_here(Exec { argv: vec!["/no/such".into()], ..Exec::default() });
        assert_eq!(end.unwrap_err().errno, Some(2));
    }
}
