//! What happens at last, and what cannot go on for ever.

use crate::connection::Deadline;
use crate::fairness::{Lasso, Promise, Reachable};
use crate::listener::State;
use crate::world::{Action, Client, Drain, World, MAX_CLIENTS};
use crate::Setting;

/// A promise about one client.
pub struct Property {
    pub name: &'static str,
    /// The promise to this client is open.
    open: fn(&Setting, &World, usize) -> bool,
    /// The promise is about runs in which this happens finitely often. The client is the one it is
    /// made to.
    finite: fn(&Action, usize) -> bool,
}

pub const PROPERTIES: [Property; 4] = [
    Property {
        name: "every connection ends, unless its peer sends frames for ever",
        open: |_, world, client| matches!(world.clients[client], Client::Connected(_)),
        finite: |action, client| *action == Action::SendWhole(client),
    },
    Property {
        name: "every connection ends in a drain, whatever its peer sends",
        open: |_, world, client| {
            world.drain != Drain::No && matches!(world.clients[client], Client::Connected(_))
        },
        finite: |_, _| false,
    },
    Property {
        name: "a client does not wait while there is room, whatever the others do",
        open: |setting, world, client| {
            let suspended = world.listener.state == State::Suspended;
            world.clients[client] == Client::Waiting && world.has_room(setting) && !suspended
        },
        finite: |_, _| false,
    },
    Property {
        name: "every waiting client is served, if peers fall silent and descriptors come back",
        open: |_, world, client| world.clients[client] == Client::Waiting,
        finite: |action, _| {
            matches!(
                action,
                Action::SendWhole(_) | Action::TakeFd | Action::Suspend
            )
        },
    },
];

impl Property {
    /// A run that breaks the promise.
    pub fn broken(
        &self,
        setting: &Setting,
        reachable: &Reachable<Setting>,
    ) -> Option<Lasso<Action>> {
        (0..setting.clients).find_map(|client| {
            reachable.broken(&Promise {
                open: &|world| (self.open)(setting, world, client),
                finite: &|action| (self.finite)(action, client),
                class: &|action| class(*action),
            })
        })
    }
}

/// Steps of the loop that go round by themselves, without anything from outside and without time: a
/// loop that spins.
pub fn spins(reachable: &Reachable<Setting>) -> Option<Lasso<Action>> {
    reachable.circle(&|action| {
        matches!(
            action,
            Action::Accept | Action::AcceptDenied | Action::Turn(..)
        )
    })
}

/// The loop takes its turns, deadlines pass, the kernel has descriptors again, and the owner
/// resumes. Peers, handlers and
/// other parts of the process owe nothing.
fn class(action: Action) -> Option<u32> {
    let of_client = |client: usize, kind: usize| {
        let kinds = 1 + Deadline::ALL.len();
        u32::try_from(8 + client * kinds + kind)
            .ok()
            .filter(|_| client < MAX_CLIENTS)
    };
    match action {
        Action::Accept | Action::AcceptDenied => Some(0),
        Action::RetryAccept => Some(1),
        Action::DrainOver => Some(2),
        Action::FreeFd => Some(3),
        Action::Resume => Some(4),
        Action::Turn(client, _) => of_client(client, 0),
        Action::Expire(client, deadline) => of_client(client, 1 + deadline as usize),
        _ => None,
    }
}
