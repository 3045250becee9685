//! The application's own descriptors in a world: adopted sockets, detached connections that come back, and watched
//! descriptors.

use std::cell::{Cell, RefCell};
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::time::Duration;

use portcullis::sim::{Random, Sim};
use portcullis::{ConnId, Context, Control, Detached, Error, Interest};

use super::app::{tcp, App, Talk};
use super::plan::Door;
use super::subject::Subject;
use crate::outgoing::connected_socket;
use crate::script::ScriptedHandler;

/// A detached connection.
#[derive(Debug)]
pub struct Outside {
    stream: Detached,
    peer: SocketAddr,
    door: Rc<Door>,
}

/// What becomes of the descriptors of one world.
#[derive(Debug, Default)]
pub struct Descriptors {
    /// Sockets were adopted, or refused, since the world looked.
    pub is_new: bool,
    /// Peers of adopted sockets, with their send buffers.
    pub adopted: Vec<(SocketAddr, usize)>,
    pub detached: Rc<RefCell<Vec<Outside>>>,
    /// Connections that have come back.
    pub attached: u64,
    /// Bytes for watched descriptors, and those that were read.
    pub written: u64,
    pub read: u64,
}

fn subject(door: &Rc<Door>, app: &App, seed: u64) -> ScriptedHandler<Subject> {
    ScriptedHandler::new(Subject::new(door, app, Random::new(seed)))
}

/// Adopts a socket, between two iterations or in a job.
pub fn adopt(sim: &mut Sim<App>, door: &Rc<Door>, random: &mut Random) {
    let (socket, seed) = (connected_socket(), random.bits());
    if random.chance(500) {
        let handler = subject(door, sim.app(), seed);
        let adopted = sim
            .control()
            .adopt(socket, door.connect(Duration::MAX, None), handler);
        let adopted = peer_of(adopted, &mut sim.control());
        return sim.app_mut().note_adopted(adopted, door);
    }
    let door = Door::clone(door);
    let posted = sim.handle().post(move |app, control| {
        app.commands.jobs += 1;
        let door = Rc::new(door);
        let handler = subject(&door, app, seed);
        let adopted = control.adopt(socket, door.connect(Duration::MAX, None), handler);
        app.note_adopted(peer_of(adopted, control), &door);
    });
    let commands = &mut sim.app_mut().commands;
    match posted {
        Ok(()) => commands.posts += 1,
        Err(_) => commands.refused += 1,
    }
}

fn peer_of(
    adopted: Result<ConnId, Error>,
    control: &mut Control<'_, App>,
) -> Result<SocketAddr, Error> {
    let info = control.conn(adopted?).and_then(|conn| conn.info());
    Ok(tcp(&info.expect("it is there").peer))
}

impl App {
    fn note_adopted(&mut self, adopted: Result<SocketAddr, Error>, door: &Door) {
        self.descriptors.is_new = true;
        match adopted {
            Ok(peer) => {
                let mut talk = Talk::new(door.wire, door.max_frame, false);
                talk.evictable = false;
                self.talks.insert(peer, talk);
                self.descriptors.adopted.push((peer, door.send_buffer));
            }
            Err(error) => self.expect_refusal(&error),
        }
    }

    /// A good socket is refused for these reasons alone.
    fn expect_refusal(&mut self, error: &Error) {
        if !matches!(
            error,
            Error::AtCapacity { .. } | Error::Draining | Error::Os { .. }
        ) {
            self.blame(format!("a socket is refused: {error}"));
        }
    }
}

/// Takes the connection out of the loop, unless it ends before.
pub fn detach(cx: &mut Context<'_, App>, door: &Rc<Door>) {
    let Some(info) = cx.conn.info() else { return };
    let (streams, door) = (Rc::clone(&cx.app.descriptors.detached), Rc::clone(door));
    // It may be closing, which is a result.
    let _ = cx.conn.detach(move |stream| {
        let peer = tcp(&info.peer);
        streams.borrow_mut().push(Outside { stream, peer, door });
    });
}

/// A detached connection comes back or ends, after some words of its stream.
pub fn tend(sim: &mut Sim<App>, random: &mut Random, heavy: bool) {
    let outside = sim.app().descriptors.detached.borrow_mut().pop();
    let Some(outside) = outside else { return };
    let Outside {
        mut stream,
        peer,
        door,
    } = outside;
    let talk = sim.app_mut().talk(peer);
    // Nothing else runs while a write waits for room.
    if !heavy && random.chance(300) {
        match stream.write_all(b"blocking").and_then(|()| stream.flush()) {
            Ok(()) => {
                talk.promised.extend(b"blocking");
                talk.taken = talk.promised.len() as u64;
            }
            // The peer has gone, or TLS has ended.
            Err(_) => talk.murky = true,
        }
    }
    if random.chance(200) {
        return;
    }
    let (wire, max) = (talk.wire, talk.max);
    let options = door.connect(Duration::MAX, None).with(|connect| {
        connect.framing = wire.framing();
        connect.conn.max_frame = Some(max);
    });
    let handler = subject(&door, sim.app(), random.bits());
    match sim.control().attach(stream, options, handler) {
        Ok(_) => {
            let app = sim.app_mut();
            app.descriptors.attached += 1;
            app.talk(peer).come_back();
        }
        Err(Error::ConnState(_)) => {}
        Err(error) => sim.app_mut().expect_refusal(&error),
    }
}

/// Watches one end of a pair, whose other end gets a few bytes, one after another.
pub fn watch(cx: &mut Context<'_, App>, other: ConnId, random: &mut Random) {
    let (ours, mut theirs) = UnixStream::pair().expect("a pair");
    ours.set_nonblocking(true).expect("non-blocking");
    let mut more = random.between(1, 4) as u64;
    let is_early = random.chance(500);
    if is_early {
        theirs.write_all(b"w").expect("there is room");
    }
    let own = Rc::new(Cell::new(None));
    let known = Rc::clone(&own);
    let mut writer = theirs.try_clone().expect("a copy");
    let interest = [Interest::Readable, Interest::Both][random.below(2)];
    let watched = cx.conn.control().watch(
        ours,
        interest,
        move |app: &mut App, control: &mut Control<'_, App>, ours: &mut UnixStream| {
            app.work();
            let mut bytes = [0; 8];
            while let Ok(count @ 1..) = ours.read(&mut bytes) {
                app.descriptors.read += count as u64;
                more = more.saturating_sub(count as u64);
                if let Some(mut conn) = control.conn(other) {
                    // It may be closing, or full: both are results.
                    let _ = app.send(&mut conn, b"watched");
                }
                if more > 0 {
                    writer.write_all(b"w").expect("there is room");
                    app.descriptors.written += 1;
                }
            }
            if more == 0 && !known.take().is_some_and(|id| control.unwatch(id)) {
                app.blame("a callback runs after its watch has ended");
            }
        },
    );
    // The kernel may refuse it.
    let Ok(id) = watched else { return };
    own.set(Some(id));
    cx.app.descriptors.written += 1;
    if !is_early {
        theirs.write_all(b"w").expect("there is room");
    }
}
