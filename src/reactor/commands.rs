//! Commands from other threads, carried out on the loop.

use super::inner::Inner;
use super::os::Os;
use crate::catch::catch;
use crate::control::{Control, ControlOps};
use crate::handle::Command;
use crate::handler::Conn;
use crate::proto::SendError;
use crate::reason::Close;

/// Carries out one command. Connections that it changes are queued for a turn.
pub(super) fn carry_out<A, O: Os>(inner: &mut Inner<A, O>, app: &mut A, command: Command<A>) {
    // A command before may have taken long.
    inner.core.refresh();
    match command {
        Command::Send(id, frame) => {
            // A connection's framer is foreign code, and so is its error.
            let sent = catch(|| Conn::find(inner, id).map(|mut conn| conn.send(&frame)));
            let core = &mut inner.core;
            core.stats.undeliverable += u64::from(!matches!(sent, Ok(Some(Ok(())))));
            match sent {
                // Nothing was sent before on a connection that is not open, or nothing follows.
                Ok(Some(Ok(()) | Err(SendError::Closed)) | None) => {}
                // The handle has accepted the frame: the stream ends rather than has a hole.
                Ok(Some(Err(error))) => core.close_as(id, Close::because(error)),
                Err(panic) => core.close_in_panic(id, "a framer", panic),
            }
            core.touch(id);
        }
        Command::Notify(id, message) => {
            let core = &mut inner.core;
            let open = core
                .conns
                .get(id)
                .is_some_and(|conn| conn.machine.takes_messages());
            if open {
                inner.call(app, id, |handler, cx| handler.on_message(cx, message));
                inner.core.touch(id);
            } else {
                core.stats.undeliverable += 1;
                core.guard.drop("a message's destructor", message);
            }
        }
        Command::Kill(id) => {
            if !inner.kill(id) {
                inner.core.stats.undeliverable += 1;
            }
        }
        Command::Post(job) => {
            let done = catch(|| job(app, &mut Control::new(inner)));
            if let Err(panic) = done {
                inner.core.guard.report("a posted job", panic, None);
            }
        }
        Command::Drain(grace) => inner.drain(grace),
        Command::Stop => inner.core.stopped = true,
    }
}
