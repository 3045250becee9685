//! The connections that wait for a request: while no other client could come in, one of them makes
//! room.

use std::collections::VecDeque;
use std::time::Duration;

use crate::handler::{Conn, Control};
use crate::id::{ConnId, ListenerId};
use crate::listener_info::ListenerState;
use crate::reason::Close;

/// The reason of a connection that has made room.
const LABEL: &str = "made_room";

/// After this time without a request, a peer has got the last answer.
const REST: Duration = Duration::from_secs(1);

/// Connections that do not follow the events, the one that has waited longest first. No more than
/// the listener has.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    /// Those that have sent no request.
    silent: VecDeque<ConnId>,
    /// Those that have been answered.
    answered: VecDeque<ConnId>,
}

impl Waiting {
    pub(super) fn open(&mut self, id: ConnId) {
        self.silent.push_back(id);
    }

    /// A request has come.
    pub(super) fn note_request(&mut self, id: ConnId) {
        self.remove(id);
        self.answered.push_back(id);
    }

    /// The connection has ended, or follows the events.
    pub(super) fn remove(&mut self, id: ConnId) {
        self.silent.retain(|other| *other != id);
        self.answered.retain(|other| *other != id);
    }

    pub(super) fn is_silent(&self, id: ConnId) -> bool {
        self.silent.contains(&id)
    }

    /// Whether another connection than `id` can make room.
    pub(super) fn has_other(&self, id: ConnId) -> bool {
        self.other(id).is_some()
    }

    /// The connection to make room, other than `id`: first those whose peers have lost nothing.
    fn other(&self, id: ConnId) -> Option<ConnId> {
        let all = self.silent.iter().chain(&self.answered);
        all.copied().find(|other| *other != id)
    }

    /// While no other client of the listener could come in: ends the connection that has waited
    /// longest, unless that is `id`.
    pub(super) fn make_room<A>(
        &mut self,
        control: &mut Control<'_, A>,
        listener: ListenerId,
        id: ConnId,
    ) {
        if !is_full(control, listener) {
            return;
        }
        while let Some(other) = self.other(id) {
            let is_silent = self.is_silent(other);
            self.remove(other);
            if let Some(mut conn) = control.conn(other) {
                // An orderly end would wait for the peer's.
                let close = match is_silent || is_at_rest(&conn) {
                    true => Close::abort(),
                    false => Close::new(),
                };
                return conn.end(close.labelled(LABEL));
            }
        }
    }
}

/// Whether the peer has had its answers for a while.
fn is_at_rest<A>(conn: &Conn<'_, A>) -> bool {
    let info = conn.info();
    info.is_some_and(|info| info.queued == 0 && info.idle >= REST)
}

/// Whether the listener's next client would have to wait for a slot.
pub(super) fn is_full<A>(control: &Control<'_, A>, listener: ListenerId) -> bool {
    let state = control.listener(listener).map(|listener| listener.state);
    state.is_ok_and(|state| state == ListenerState::Full)
}
