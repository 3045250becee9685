//! What holds in every state.

use stateright::Property;

use crate::connection::{Deadline, Life};
use crate::listener::State;
use crate::world::Client;
use crate::{Flaw, Setting};

/// The properties that stateright checks. Those of `sometimes` show that the others do not hold for
/// want of cases.
pub fn properties() -> Vec<Property<Setting>> {
    let always = Property::<Setting>::always;
    let sometimes = Property::<Setting>::sometimes;
    vec![
        always("never more open than the cap", |setting, world| {
            world.open() <= setting.cap
        }),
        always(
            "never more descriptors than the kernel has",
            |setting, world| world.fds + world.foreign_fds <= setting.fds,
        ),
        always("descriptors are back when connections end", |_, world| {
            usize::from(world.fds) == world.open()
        }),
        always(
            "accepted = open + closed, by one reason each",
            |_, world| usize::try_from(world.balance) == Ok(world.open()),
        ),
        always("opened = on_close calls + handlers", |_, world| {
            let alive = world
                .connections()
                .filter(|(_, conn)| conn.opened())
                .count();
            usize::try_from(world.handlers) == Ok(alive)
        }),
        always("every connection has a deadline", |setting, world| {
            let ends = |deadline| deadline != Deadline::FirstFrame;
            world
                .connections()
                .all(|(_, conn)| conn.deadlines(setting).any(ends))
        }),
        always("a listener that waits is not registered", |_, world| {
            world.listener.registered == (world.listener.state == State::Listening)
        }),
        always("only a listening listener tries accept", |_, world| {
            world.listener.state == State::Listening || !world.listener.ready
        }),
        always(
            "a listener out of descriptors has a deadline",
            |_, world| world.listener.deadline || world.listener.state != State::OutOfFds,
        ),
        always("closed is the end of a listener", |_, world| {
            world.listener.was_closed == (world.listener.state == State::Closed)
        }),
        always("a closed listener accepts nothing", |_, world| {
            world.flaw != Some(Flaw::AcceptedWhenClosed)
        }),
        always("a drain accepts the backlog first", |_, world| {
            world.flaw != Some(Flaw::AbandonedBacklog)
        }),
        always("nothing is delivered after the close", |_, world| {
            world.flaw != Some(Flaw::DeliveredAfterClose)
        }),
        always("an orderly end loses nothing", |_, world| {
            world.flaw != Some(Flaw::SilentLoss)
        }),
        sometimes("a connection closes", |_, world| {
            world
                .connections()
                .any(|(_, conn)| matches!(conn.life, Life::Closing(_)))
        }),
        sometimes("every client has gone", |setting, world| {
            world
                .clients
                .iter()
                .take(setting.clients)
                .all(|client| matches!(client, Client::Gone(_)))
        }),
    ]
}
