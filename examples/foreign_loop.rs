//! A program with a loop of its own: the server's descriptor is one of many things in it.
//!
//!     cargo run --release --example foreign_loop -- 127.0.0.1:2525
//!
//! The loop here is calloop's; any that can wait for a descriptor will do. It has a timer of its own beside the network.

use std::os::fd::AsFd;
use std::time::Duration;

use calloop::generic::Generic;
use calloop::timer::{TimeoutAction, Timer};
use calloop::{EventLoop, Interest, Mode, PostAction};
use portcullis::{Config, Context, Framing, Handler, Listen, Outcome, Server, Turn};

#[path = "support/terminal.rs"]
mod terminal;

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

/// What calloop lends to its callbacks.
struct Everything {
    server: Server<Program>,
    program: Program,
    outcome: portcullis::Result<Turn>,
}

impl Everything {
    /// What is to be done now, bounded: the loop goes round again for the rest.
    fn serve(&mut self) {
        self.outcome = self.server.poll_once(&mut self.program, Some(Duration::ZERO));
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    terminal::log_to_stderr();
    let addr = std::env::args().nth(1).unwrap_or_else(|| "127.0.0.1:2525".to_owned());
    let mut server = Server::new(Config::new())?;
    let listen = Listen::tcp(addr.as_str()).framing(Framing::Line);
    let id = server.listen(listen, |_: &mut Program, _peer| Clock)?;
    terminal::say(&format!("listening on {} (line)", server.listener(id)?.addr));
    terminal::drain_on_signal(server.handle(), Duration::from_secs(5))?;

    let mut event_loop: EventLoop<'_, Everything> = EventLoop::try_new()?;
    // A second descriptor for the same poll: calloop owns what it watches. Level-triggered, so that nothing is lost
    // whenever the server leaves work for the next round.
    let network = Generic::new(server.as_fd().try_clone_to_owned()?, Interest::READ, Mode::Level);
    event_loop.handle().insert_source(network, |_, _, everything| {
        everything.serve();
        Ok(PostAction::Continue)
    })?;
    let second = Timer::from_duration(Duration::from_secs(1));
    event_loop.handle().insert_source(second, |_, _, everything| {
        everything.program.seconds += 1;
        TimeoutAction::ToDuration(Duration::from_secs(1))
    })?;

    let mut everything = Everything {
        server,
        program: Program::default(),
        outcome: Ok(Turn::Continue),
    };
    while let Ok(Turn::Continue) = everything.outcome {
        // The server has deadlines too, and sometimes work that no event announces.
        let timeout = everything.server.next_timeout();
        event_loop.dispatch(timeout, &mut everything)?;
        if everything.server.next_timeout() == Some(Duration::ZERO) {
            everything.serve();
        }
    }
    everything.outcome?;
    Ok(())
}
