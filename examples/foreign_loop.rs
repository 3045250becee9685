//! A program with a loop of its own: the server's descriptor is one of many things in it.
//!
//!     cargo run --release --example foreign_loop -- 127.0.0.1:2525
//!
//! The loop here is `poll(2)`; any that can wait for a descriptor will do. It has a timer of its own beside the network.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{poll, PollFd, PollFlags, PollTimeout};
use portcullis::{Config, Context, Framing, Handler, Listen, Outcome, Server, Turn};

#[path = "support/terminal.rs"]
mod terminal;

const SECOND: Duration = Duration::from_secs(1);

/// The program's own state, which handlers get too.
#[derive(Default)]
struct Program {
    seconds: u32,
}

struct Clock;

impl Handler<Program> for Clock {
    fn on_frame(&mut self, cx: &mut Context<'_, Program>, _line: &[u8]) -> Outcome {
        cx.conn.send(format!("{} s\n", cx.app.seconds))?;
        Ok(())
    }
}

/// Waits for the first of these descriptors, or for the timeout.
fn wait(
    descriptors: &mut [PollFd<'_>],
    timeout: Duration,
) -> Result<(), Box<dyn std::error::Error>> {
    // Milliseconds, rounded up: rounded down, the last of them would be spent in going round.
    let timeout = PollTimeout::try_from(timeout + Duration::from_micros(999))?;
    match poll(descriptors, timeout) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    terminal::log_to_stderr();
    let addr = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "127.0.0.1:2525".to_owned());
    let mut server = Server::new(Config::new())?;
    let listen = Listen::tcp(addr.as_str(), Framing::Line);
    let id = server.listen(listen, |_app, _peer| Clock)?;
    // Before the address is printed: its reader may send a signal at once.
    terminal::drain_on_signal(server.handle(), Duration::from_secs(5))?;
    terminal::say(&format!(
        "listening on {} (line)",
        server.control().listener(id)?.addr
    ));

    let mut program = Program::default();
    let mut next_second = Instant::now() + SECOND;
    loop {
        // The server has deadlines too, and sometimes work that no event announces.
        let own = next_second.saturating_duration_since(Instant::now());
        let timeout = server
            .next_timeout()
            .map_or(own, |network| network.min(own));
        // The program's other descriptors go here.
        wait(
            &mut [PollFd::new(server.as_fd(), PollFlags::POLLIN)],
            timeout,
        )?;
        while Instant::now() >= next_second {
            program.seconds += 1;
            next_second += SECOND;
        }
        // A bounded amount of work: the loop goes round again for the rest.
        if server.poll_once(&mut program, Some(Duration::ZERO))? != Turn::Continue {
            return Ok(());
        }
    }
}
