//! A model of one listener and its connections, small enough to visit each of its states.
//!
//! It is written from the design's sections "The life of a connection" and "The life of a
//! listener", not from the code:
//! it would not repeat a mistake of the code. It knows states, deadlines and reasons, but neither
//! bytes nor durations: a deadline
//! in force may pass at any time. `tests/README.md` says what is proven.

pub mod code;
pub mod connection;
pub mod events;
pub mod fairness;
#[cfg(not(feature = "tls"))]
mod insecure;
pub mod listener;
pub mod liveness;
pub mod safety;
#[cfg(feature = "tls")]
mod secure;
pub mod table;
pub mod world;

/// The bounds of a world, and what can happen in it.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    pub name: &'static str,
    /// Clients that connect, each once: up to [`world::MAX_CLIENTS`].
    pub clients: usize,
    /// Concurrent connections.
    pub cap: usize,
    /// Descriptors for connections, of which other parts of the process may take one.
    pub fds: u8,
    /// A connection begins with a PROXY header.
    pub proxy: bool,
    pub tls: bool,
    /// Access rules may deny a client.
    pub denies: bool,
    /// At the cap, clients are refused.
    pub refuses: bool,
    /// At the cap, connections that have not sent a frame are evicted.
    pub evicts: bool,
    /// Other parts of the process take descriptors.
    pub foreign: bool,
    /// Handlers act in timers and for messages as well.
    pub local: bool,
    /// The owner suspends, resumes, closes, drains and stops.
    pub owner: bool,
    /// Handlers send, abort and panic in the turn, and bytes may be malformed.
    pub reactions: bool,
    /// The world remembers why each client has gone.
    pub reasons: bool,
    /// A planted fault.
    pub fault: Option<Fault>,
}

impl Setting {
    pub fn has(&self, fault: Fault) -> bool {
        self.fault == Some(fault)
    }

    pub fn with(self, fault: Fault) -> Setting {
        Setting {
            fault: Some(fault),
            ..self
        }
    }

    /// Everything that can happen to one connection.
    pub const ONE: Setting = Setting {
        name: "one connection",
        clients: 1,
        cap: 1,
        fds: 1,
        proxy: true,
        tls: true,
        denies: true,
        refuses: false,
        evicts: true,
        foreign: true,
        local: true,
        owner: true,
        reactions: true,
        reasons: false,
        fault: None,
    };

    /// More clients than slots.
    pub const CAP: Setting = Setting {
        name: "more clients than slots",
        clients: 3,
        cap: 1,
        fds: 2,
        proxy: false,
        tls: false,
        denies: false,
        foreign: false,
        local: false,
        ..Setting::ONE
    };

    /// More clients than slots, and they are refused.
    pub const REFUSE: Setting = Setting {
        name: "clients are refused",
        refuses: true,
        evicts: false,
        ..Setting::CAP
    };

    /// More slots than descriptors.
    pub const FDS: Setting = Setting {
        name: "more slots than descriptors",
        clients: 3,
        cap: 2,
        fds: 1,
        evicts: false,
        foreign: true,
        ..Setting::CAP
    };

    /// Two connections that live at the same time.
    pub const TWO: Setting = Setting {
        name: "two connections",
        clients: 2,
        cap: 2,
        evicts: false,
        reactions: false,
        ..Setting::CAP
    };

    /// The settings in which the server is compared with the model. A world with TLS needs the
    /// feature `tls`.
    pub const PLAYED: [Setting; 6] = [
        Setting {
            reactions: false,
            local: false,
            foreign: false,
            evicts: false,
            ..Setting::ONE.played(1)
        },
        Setting {
            tls: false,
            evicts: false,
            ..Setting::ONE.played(1)
        },
        Setting {
            denies: true,
            proxy: true,
            reactions: false,
            ..Setting::CAP.played(2)
        },
        Setting {
            denies: true,
            reactions: false,
            ..Setting::REFUSE.played(2)
        },
        Setting {
            reactions: false,
            ..Setting::FDS.played(2)
        },
        Setting::TWO.played(2),
    ];

    /// The same, and handlers do more where there are several clients.
    pub const PLAYED_LONGER: [Setting; 6] = {
        let [one, plain, cap, refuse, fds, two] = Setting::PLAYED;
        let cap = Setting {
            local: true,
            reactions: true,
            ..cap
        };
        let two = Setting {
            reactions: true,
            ..two
        };
        [one, plain, cap, refuse, fds, two]
    };

    /// Whether this build can play it.
    pub fn can_be_played(&self) -> bool {
        cfg!(feature = "tls") || !self.tls
    }

    const fn played(self, clients: usize) -> Setting {
        Setting {
            clients,
            reasons: true,
            ..self
        }
    }

    /// The settings that a test visits.
    pub const SMALL: [Setting; 5] = [
        Setting::ONE,
        Setting::CAP,
        Setting::REFUSE,
        Setting::FDS,
        Setting::TWO,
    ];

    /// The settings of the program `prove`: as those, with more clients, and with everything that a
    /// handler can do.
    pub const LARGE: [Setting; 6] = [
        Setting::ONE,
        Setting {
            clients: 4,
            local: true,
            denies: true,
            ..Setting::CAP
        },
        Setting {
            clients: 4,
            local: true,
            denies: true,
            ..Setting::REFUSE
        },
        Setting {
            clients: 4,
            local: true,
            foreign: true,
            ..Setting::FDS
        },
        Setting {
            reactions: true,
            ..Setting::TWO
        },
        Setting {
            clients: 3,
            fds: 2,
            name: "three clients of two slots",
            ..Setting::TWO
        },
    ];
}

/// What must never happen. A world ends with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Flaw {
    DeliveredAfterClose,
    /// Output was lost, and the reason does not say so.
    SilentLoss,
    AcceptedWhenClosed,
    /// A drain has closed the port on clients for whom there was room.
    AbandonedBacklog,
}

/// Faults that can be planted, so that each property is seen to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Fault {
    /// One connection too many is accepted.
    CapOffByOne,
    /// Out of descriptors, the timer is not armed.
    PauseWithoutTimer,
    /// A listener that waits stays registered.
    WaitsRegistered,
    /// At the cap, accept is tried again and again.
    SpinsWhenFull,
    /// A freed slot does not wake the listener.
    SlotDoesNotWake,
    /// A listener that has waited is registered, but does not try accept at once.
    ReliesOnEdge,
    /// A closing connection has no deadline.
    ClosingWithoutDeadline,
    /// Bytes that complete no frame extend its deadline.
    TrickleMovesFrameDeadline,
    /// A drain has no deadline.
    DrainHasNoDeadline,
    /// Our own output moves the idle deadline.
    OwnSendsMoveIdle,
    /// A closing connection delivers frames.
    ClosingDelivers,
    /// A reset is counted twice.
    CountsTwice,
    /// `on_close` is left out at an abort.
    ForgetsOnClose,
    /// The descriptor of a connection that its peer closes early stays open.
    LeaksDescriptor,
    /// Output is cut off, and the connection ends as if it were not.
    SilentLoss,
    /// A closed listener accepts.
    AcceptsWhenClosed,
    /// A closed listener can be resumed.
    ResumesWhenClosed,
    /// A drain closes the port at once.
    DrainForgetsBacklog,
}
