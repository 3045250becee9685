//! Accepting clients: each is admitted, refused or dropped.

use std::io;
use std::time::Duration;

use super::admit::admit;
use super::core::Core;
use super::drive::Scratch;
use super::incoming::Incoming;
use super::inner::Inner;
use super::listener::AcceptError;
use super::os::{is_short_of_memory, End, Os};
use super::refuse::{report_failed, turn_away};
use super::work;
use crate::config::ProxyProtocol;
use crate::id::ConnId;
use crate::logs;
use crate::reason::{CloseReason, Closed};

/// How long servers with fewer connections go first, where several share a backlog.
const DEFER: Duration = Duration::from_millis(1);

/// How long a server that may evict a connection goes first: callbacks may keep it from accepting.
const DEFER_EVICTION: Duration = Duration::from_millis(100);

/// Time between two looks whether the client is still there.
const RETRY_EVICTION: Duration = Duration::from_millis(10);

/// One accept round over the listeners that may have a client.
pub(super) struct Round {
    /// Listeners that had their turn.
    done: usize,
    /// Of the listener whose turn it is: `None` before its first accept.
    current: Option<Progress>,
}

struct Progress {
    accepts_left: usize,
    accepted: bool,
    /// The last client that the kernel lost.
    lost: Option<io::Error>,
}

enum Step {
    /// A connection was inserted: it has its first turn now.
    Admitted(ConnId),
    /// The client is dealt with; go on with the same listener.
    Next,
    /// No more from this listener in this round.
    Done,
}

impl Round {
    /// `None` if no listener can have a client.
    pub(super) fn begin<O: Os>(core: &mut Core<O>) -> Option<Self> {
        if core.listeners_rest() {
            return None;
        }
        let Core {
            listeners,
            admission,
            conns,
            config,
            now,
            ..
        } = core;
        listeners.refill_reserves(conns);
        let rests = admission.is_unrestricted(conns, config);
        let capacity = || admission.capacity(conns, config, *now);
        if !listeners.begin_round(*now, rests, capacity) {
            return None;
        }
        core.refresh();
        Some(Self {
            done: 0,
            current: None,
        })
    }

    /// Accepts until a connection is admitted, which has its first turn then, or the round is over.
    pub(super) fn next<A, O: Os>(
        &mut self,
        inner: &mut Inner<A, O>,
        app: &mut A,
        scratch: &mut Scratch,
    ) -> Option<ConnId> {
        while let Some(at) = inner.core.listeners.in_round(self.done) {
            if !inner.core.has_work_left() {
                // The listeners that are left are readable still.
                return None;
            }
            if self.current.is_none() && !defer_accept(&mut inner.core, at) {
                self.current = Some(Progress {
                    accepts_left: inner.core.config.budgets.accepts,
                    accepted: false,
                    lost: None,
                });
            }
            let step = match &mut self.current {
                Some(progress) => accept_next(inner, app, scratch, at, progress),
                None => Step::Done,
            };
            match step {
                Step::Admitted(id) => {
                    inner.core.listeners.note_admitted(at);
                    return Some(id);
                }
                Step::Next => {}
                Step::Done => {
                    self.done += 1;
                    self.current = None;
                }
            }
        }
        None
    }
}

/// Another server that accepts from the same backlog goes first, for a while: one with fewer
/// connections, or one that can evict a connection where this one would refuse the client.
fn defer_accept<O: Os>(core: &mut Core<O>, at: usize) -> bool {
    let (is_ahead, evicts_elsewhere) = (core.conns.is_ahead(), core.conns.may_others_evict());
    if !(is_ahead || evicts_elsewhere) || core.drain.is_on() {
        return false;
    }
    let Some(listener) = core.listeners.get(at) else {
        return false;
    };
    let refusal = core
        .admission
        .refusal(&core.conns, listener, &core.config, core.now);
    let (patience, retry_after) = match refusal {
        None if is_ahead => (DEFER, DEFER),
        Some(CloseReason::AtCapacity) if evicts_elsewhere && !listener.lets_wait() => {
            (DEFER_EVICTION, RETRY_EVICTION)
        }
        _ => return false,
    };
    let now = core.now;
    let since = listener.deferred_since.unwrap_or(now);
    if !listener.may_accept() || now >= since.after(patience) {
        return false;
    }
    if let Some(listener) = core.listeners.change(at) {
        listener.deferred_since = Some(since);
        listener.retry_at = now.after(retry_after);
    }
    true
}

fn accept_next<A, O: Os>(
    inner: &mut Inner<A, O>,
    app: &mut A,
    scratch: &mut Scratch,
    at: usize,
    progress: &mut Progress,
) -> Step {
    let core = &mut inner.core;
    if progress.accepts_left == 0 {
        end_budget(core, at, progress);
        return Step::Done;
    }
    progress.accepts_left -= 1;
    let Core {
        os,
        conns,
        listeners,
        admission,
        config,
        now,
        stats,
        work,
        ..
    } = core;
    // The client before may have been turned away.
    listeners.refill_reserves(conns);
    let Some(listener) = listeners.get_mut(at) else {
        return Step::Done;
    };
    if !listener.may_accept() || admission.fds.is_on() {
        return Step::Done;
    }
    // Until the client has its slot, no other server looks for one: none takes a slot without a
    // client, and none finds one that is only reserved.
    conns.prepare();
    let gate = conns.gate();
    let locked = gate.as_ref().map(|shared_cap| shared_cap.lock());
    admission.trim_for(conns, listener);
    let refusal = admission.refusal(conns, listener, config, *now);
    if refusal.is_some() && listener.lets_wait() {
        return Step::Done;
    }
    let Some(socket) = &mut listener.socket else {
        listener.readable = false;
        return Step::Done;
    };
    work.charge(work::STEP);
    let accepted = os.accept(socket);
    if refusal.is_none() && accepted.is_ok() {
        // Without a slot, one that is evicted leaves its own.
        let _claimed = listener.claim(conns);
    }
    drop(locked);
    match accepted {
        Ok((stream, addr)) => {
            work.charge(work::ACCEPT);
            progress.accepted = true;
            listener.failing = false;
            listener.broken = false;
            listener.accepted += 1;
            stats.accepted += 1;
            let incoming = Incoming {
                addr,
                credentials: core.os.credentials(&stream).ok(),
                proxy: None,
            };
            match handle_accepted(inner, app, scratch, at, stream, incoming, refusal) {
                Some(id) => Step::Admitted(id),
                None => Step::Next,
            }
        }
        Err(error) => handle_error(inner, app, at, error, progress),
    }
}

fn handle_error<A, O: Os>(
    inner: &mut Inner<A, O>,
    app: &mut A,
    at: usize,
    error: io::Error,
    progress: &mut Progress,
) -> Step {
    let core = &mut inner.core;
    let retry_at = core.now.after(core.config.emfile_backoff);
    match AcceptError::of(&error) {
        AcceptError::Retry => {
            core.stats.accept_errors += 1;
            progress.lost = Some(error);
            return Step::Next;
        }
        AcceptError::Drained => {
            if let Some(listener) = core.listeners.get_mut(at) {
                listener.readable = false;
                listener.has_waited = false;
                listener.broken = false;
                listener.deferred_since = None;
            }
            core.admission.fds.handle_drained(retry_at);
        }
        AcceptError::OutOfFds => core.begin_fd_exhaustion(&error),
        AcceptError::Broken => handle_broken(inner, app, at, error),
        AcceptError::Yield => core
            .listeners
            .fail(at, retry_at, "cannot accept from", &error),
    }
    Step::Done
}

/// The budget is spent: more in the next iteration, unless the kernel only loses clients.
fn end_budget<O: Os>(core: &mut Core<O>, at: usize, progress: &mut Progress) {
    if let Some(listener) = core.listeners.get_mut(at) {
        listener.has_waited = true;
    }
    let (Some(error), false) = (progress.lost.take(), progress.accepted) else {
        return;
    };
    core.listeners
        .back_off(at, core.now.after(core.config.emfile_backoff));
    if let Some(listener) = core.listeners.get(at) {
        logs::debug!(
            target: logs::LISTENER,
            "clients are lost in a row on listener {} on {}: {error}; trying again",
            listener.name,
            listener.addr
        );
    }
}

/// The socket reports that it is no listener: it has one more chance, then it is closed and its
/// service is told.
fn handle_broken<A, O: Os>(inner: &mut Inner<A, O>, app: &mut A, at: usize, error: io::Error) {
    let Inner { core, user } = inner;
    let retry_at = core.now.after(core.config.emfile_backoff);
    let Some(listener) = core.listeners.change(at) else {
        return;
    };
    if !std::mem::replace(&mut listener.broken, true) {
        return core
            .listeners
            .fail(at, retry_at, "cannot accept from", &error);
    }
    logs::error!(
        target: logs::LISTENER,
        "listener {} on {} is lost and closed: {error}",
        listener.name,
        listener.addr
    );
    core.conns.offer_room();
    user.listener_lost(&mut core.guard, listener.service, app, listener.id, &error);
    listener.close(&mut core.os, &mut core.admission.fds);
}

/// Handles one accepted socket: admit, refuse or drop it. `refusal` is why no client may come in.
fn handle_accepted<A, O: Os>(
    inner: &mut Inner<A, O>,
    app: &mut A,
    scratch: &mut Scratch,
    at: usize,
    mut stream: O::Stream,
    incoming: Incoming,
    refusal: Option<CloseReason>,
) -> Option<ConnId> {
    let core = &mut inner.core;
    core.conns.offer_room();
    let listener = core.listeners.get_mut(at)?;
    let ip = incoming.addr.ip();
    let trusted = listener.trusts(ip);
    let is_banned = core.admission.bans.contains(ip, core.now);
    let mut denied = is_banned || listener.denies(ip);
    denied |= listener.options.proxy_protocol == ProxyProtocol::Required && !trusted;
    // The check costs a system call: only where a rate would be charged for the client, where a
    // connection would be evicted for it, or where it may have waited for long.
    let at_cap = !core.conns.has_claim() || listener.reached_cap().is_some();
    let evicts = refusal.is_none() && at_cap;
    let may_be_gone = evicts
        || listener.has_waited
        || core.config.accept_rate.is_some()
        || listener.options.accept_rate.is_some()
        || listener.options.source_limits.rate.is_some();
    let wants_input = listener.wants_input();
    let reason = if denied {
        Some(CloseReason::Denied)
    } else if may_be_gone && is_gone(&mut core.os, &mut stream, wants_input) {
        Some(CloseReason::ClosedEarly)
    } else {
        refusal
    };
    match reason {
        None => return admit(inner, app, scratch, at, stream, incoming, trusted),
        Some(reason @ (CloseReason::AtCapacity | CloseReason::RateLimited)) => {
            turn_away(inner, app, scratch, at, stream, incoming, reason);
        }
        Some(reason) => {
            core.conns.unclaim();
            core.os.close(stream, End::Close);
            report_failed(inner, app, at, None, incoming, Closed::new(reason));
        }
    }
    None
}

/// The client has reset the connection while it was in the backlog, or, if input is wanted, has
/// finished without a byte.
fn is_gone<O: Os>(os: &mut O, stream: &mut O::Stream, wants_input: bool) -> bool {
    match os.peek(stream) {
        Ok(count) => count == 0 && wants_input,
        Err(error) => {
            let passing = matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
            );
            !passing && !is_short_of_memory(&error)
        }
    }
}
