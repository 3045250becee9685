//! A new process takes over the listening sockets without refusing a client: an echo server for lines that says its id with
//! each. SIGUSR2 starts the program anew with the sockets (`sd_listen_fds(3)`); once the new one says that it is ready, the
//! old one takes no more clients, serves those it has, and ends. SIGTERM and SIGINT drain.
//!
//!     cargo run --example handover -- 127.0.0.1:2222 unix:/tmp/handover.sock
//!     kill -USR2 PID

use std::error::Error;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use portcullis::{Config, Context, Framing, Handle, Handler, Listen, Outcome, Peer, Server};
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR2};

#[path = "support/passed.rs"]
mod passed;
#[path = "support/terminal.rs"]
mod terminal;

const GRACE: Duration = Duration::from_secs(10);

struct Echo;

impl Handler for Echo {
    fn on_frame(&mut self, cx: &mut Context<'_>, line: &[u8]) -> Outcome {
        let pid = format!("{} ", std::process::id());
        cx.conn.send([pid.as_bytes(), line].concat())?;
        Ok(())
    }

    /// A client that has connected and not asked yet is owed an answer: it is the one to end this, within the grace.
    fn on_drain(&mut self, _cx: &mut Context<'_>) -> Outcome {
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    terminal::log_to_stderr();
    let mut server = Server::new(Config::new())?;
    let echo = |_app: &mut (), _peer: Peer| Echo;
    let passed = passed::sockets(Framing::Line)?;
    let is_successor = !passed.is_empty();
    for listen in passed {
        server.listen(listen, echo)?;
    }
    for addr in std::env::args().skip(1).filter(|_| !is_successor) {
        let listen = match addr.strip_prefix("unix:") {
            Some(path) => Listen::unix(path, Framing::Line),
            None => Listen::tcp(&addr, Framing::Line),
        };
        server.listen(listen, echo)?;
    }
    obey_signals(server.handle())?;
    for listener in server.control().listeners() {
        terminal::say(&format!(
            "listening on {} as {}",
            listener.addr,
            std::process::id()
        ));
    }
    if is_successor {
        // Our standard input is a socket of the process before us, which waits for this, and fails only if that is gone.
        let _ = File::from(std::io::stdin().as_fd().try_clone_to_owned()?).write_all(b"!");
    }
    Ok(server.run(&mut ())?)
}

fn obey_signals(handle: Handle) -> std::io::Result<()> {
    let mut signals = signal_hook::iterator::Signals::new([SIGTERM, SIGINT, SIGUSR2])?;
    std::thread::spawn(move || {
        for signal in signals.forever() {
            if signal == SIGUSR2 {
                if let Err(error) = start_successor(&handle) {
                    terminal::complain(&format!("handover: {error}; going on"));
                    continue;
                }
            }
            // It fails only if the server is gone already.
            let _ = handle.post(move |_, control| {
                // First, so that clients in the queue, and later ones, are the successor's.
                for listener in control.listeners().iter().filter(|_| signal == SIGUSR2) {
                    let _ = control.close_listener(listener.id);
                }
                control.drain(GRACE);
            });
        }
    });
    Ok(())
}

/// Starts this program anew, with our sockets, and waits until it is ready.
fn start_successor(handle: &Handle) -> Result<(), Box<dyn Error>> {
    let (names, sockets): (Vec<_>, Vec<_>) = handle.call(GRACE, |_, control| {
        let listeners = control.listeners();
        let sockets = listeners.into_iter().map(|listener| {
            // An address has a colon and needs no name: it is the default.
            let name = Some(listener.name).filter(|name| !name.contains(':'));
            let socket = control.listener_socket(listener.id)?;
            Ok((name.unwrap_or_default(), socket))
        });
        sockets.collect::<portcullis::Result<_>>()
    })??;
    let (mut ours, theirs) = UnixStream::pair()?;
    ours.set_read_timeout(Some(GRACE))?;
    let mut arguments = std::env::args_os();
    // By its name: there may be a new version under it.
    let mut command = Command::new(arguments.next().ok_or("this program has no name")?);
    command
        .args(arguments)
        .stdin(Stdio::from(OwnedFd::from(theirs)));
    command
        .env("LISTEN_FDS", sockets.len().to_string())
        .env("LISTEN_FDNAMES", names.join(":"))
        .env_remove("LISTEN_PID");
    let numbered = sockets.into_iter().zip(3..);
    command.fd_mappings(
        numbered
            .map(|(parent_fd, child_fd)| FdMapping {
                parent_fd,
                child_fd,
            })
            .collect(),
    )?;
    let mut child = command.spawn()?;
    // Our copies of what is the child's, so that its end is one.
    drop(command);
    ours.read_exact(&mut [0]).map_err(|error| {
        let _ = child.kill().and_then(|()| child.wait());
        format!("the new process does not get ready: {error}").into()
    })
}
