//! Commands from other threads, carried out on the loop.

use super::close::finish_close;
use super::deferred::ForConn;
use super::inner::Inner;
use super::os::{Noted, Os};
use super::work;
use crate::catch::catch;
use crate::handle::Command;
use crate::handler::Conn;
use crate::handler::ControlOps;
use crate::id::ConnId;
use crate::proto::SendError;
use crate::reason::Close;

/// Carries out one command. Connections that it changes are queued for a turn.
pub(super) fn carry_out<A, O: Os>(inner: &mut Inner<A, O>, app: &mut A, command: Command<A>) {
    // A command before may have taken long.
    inner.core.refresh();
    inner.core.work.charge(work::STEP);
    inner.core.conns.offer_room();
    if let Some(noted) = noted(&command) {
        inner.core.os.note_command(noted);
    }
    match command {
        Command::Send(id, frame) => for_conn(inner, app, id, ForConn::Send(frame)),
        Command::Notify(id, message) => for_conn(inner, app, id, ForConn::Notify(message)),
        Command::Kill(id) => {
            if !inner.kill(id) {
                inner.core.stats.undeliverable += 1;
            } else if let Some(reset) = inner.core.next_step(id) {
                // At once: a job behind it may take long.
                finish_close(inner, app, id, reset);
            }
        }
        Command::Post(job) | Command::Call(job) => inner.run_job(app, "a posted job", job),
        Command::Drain(grace) => inner.drain(grace),
        Command::Stop => inner.core.stopped = true,
    }
}

fn noted<A>(command: &Command<A>) -> Option<Noted<'_>> {
    Some(match command {
        Command::Send(id, frame) => Noted::Send(*id, frame.bytes()),
        Command::Kill(id) => Noted::Kill(*id),
        Command::Drain(grace) => Noted::Drain(*grace),
        Command::Notify(..) | Command::Post(_) | Command::Call(_) => Noted::Opaque,
        // It ends the caller's loop alone.
        Command::Stop => return None,
    })
}

/// Carries out the next deferred command of an open connection. False if there is none.
pub(super) fn carry_out_deferred<A, O: Os>(inner: &mut Inner<A, O>, app: &mut A) -> bool {
    let Some((id, command)) = inner.core.deferred.next_due() else {
        return false;
    };
    inner.core.refresh();
    inner.core.work.charge(work::STEP);
    inner.core.conns.offer_room();
    deliver(inner, app, id, command);
    if inner.core.deferred.is_released(id) {
        release(inner, id);
    }
    true
}

fn release<A, O: Os>(inner: &mut Inner<A, O>, id: ConnId) {
    let core = &mut inner.core;
    if let Some(conn) = core.conns.get_mut(id) {
        conn.machine.end_commands();
        core.touch(id);
    }
}

/// The first `done` commands are carried out: lets the next connection close by itself that may have
/// had its own among them. False if there is none.
pub(super) fn release_next<A, O: Os>(inner: &mut Inner<A, O>, done: u64) -> bool {
    let core = &mut inner.core;
    let Some(id) = core.deferred.next_released(done) else {
        return false;
    };
    core.work.charge(work::STEP);
    release(inner, id);
    true
}

/// Carries out a command for a connection, or defers it until the connection is open.
fn for_conn<A, O: Os>(inner: &mut Inner<A, O>, app: &mut A, id: ConnId, command: ForConn) {
    let core = &mut inner.core;
    // Most often none is deferred, and the connection is open.
    let waits = core.deferred.has(id)
        || core
            .conns
            .get(id)
            .is_some_and(|conn| conn.machine.will_open());
    if !waits {
        return deliver(inner, app, id, command);
    }
    if core.deferred.will_close(id) {
        return core.drop_undelivered(command);
    }
    let Err(refused) = core.deferred.push(id, command, core.config.queue_limits) else {
        return;
    };
    let is_frame = matches!(refused, ForConn::Send(_));
    core.drop_undelivered(refused);
    if is_frame {
        // The handle has accepted it: the connection ends rather than has a hole in its stream.
        let words =
            "too many commands wait for connections that are not open; raise Config::queue_limits";
        core.close_as(id, Close::because(words));
        core.touch(id);
    }
}

fn deliver<A, O: Os>(inner: &mut Inner<A, O>, app: &mut A, id: ConnId, command: ForConn) {
    match command {
        ForConn::Send(frame) => {
            // A copy, at most; the bytes themselves count when they are written.
            inner.core.work.charge(frame.len() as u64);
            // It was accepted before a close that waits behind it.
            inner.core.deferred.set_delivering(Some(id));
            // A connection's framer is foreign code, and so is its error.
            let sent = catch(|| Conn::find(inner, id).map(|mut conn| conn.send_chunk(frame)));
            let core = &mut inner.core;
            core.deferred.set_delivering(None);
            core.stats.undeliverable += u64::from(!matches!(sent, Ok(Some(Ok(())))));
            match sent {
                // Nothing follows on a connection that closes.
                Ok(Some(Ok(()) | Err(SendError::Closed)) | None) => {}
                // The handle has accepted the frame: the stream ends rather than has a hole.
                Ok(Some(Err(error))) => core.close_as(id, Close::because(error)),
                Err(panic) => core.close_in_panic(id, "a framer", panic),
            }
            core.touch(id);
        }
        ForConn::Close(close) => {
            inner.core.close_as(id, close);
            inner.core.touch(id);
        }
        ForConn::Notify(message) => {
            let core = &mut inner.core;
            let takes = core
                .conns
                .get(id)
                .is_some_and(|conn| conn.machine.takes_messages());
            if takes {
                core.deferred.set_delivering(Some(id));
                inner.call(app, id, |handler, cx| handler.on_message(cx, message));
                inner.core.deferred.set_delivering(None);
                inner.core.touch(id);
            } else {
                core.drop_undelivered(ForConn::Notify(message));
            }
        }
    }
}
