//! What a seed draws: the server and its listeners, what goes wrong, and what happens.

use std::time::Duration;

use portcullis::sim::{Faults, Op, Random};
use portcullis::{Config, ConnConfig, Connect, Listen, Retry};

use super::rules::{House, Rules};
use super::subject::HandlerKind;
use super::wire::Wire;

/// A world before it begins.
#[derive(Clone, Debug)]
pub struct Plan {
    pub seed: u64,
    pub setup: Setup,
    pub faults: Faults,
    pub script: Vec<Action>,
    /// The kernel reports readiness as kqueue does, else as epoll.
    pub kqueue: bool,
}

#[derive(Clone, Debug)]
pub struct Setup {
    pub doors: Vec<Door>,
    pub cap: usize,
    /// Per turn: accepts, handshakes, bytes read, commands.
    pub budgets: [usize; 4],
    /// Of a whole iteration.
    pub work: usize,
    /// The handle's queue, in commands and in bytes.
    pub queue: (usize, usize),
    /// Access rules, and the limit on memory.
    pub house: House,
    /// Frames are large, buffers too.
    pub heavy: bool,
}

/// What one connection is held to, and may change.
#[derive(Clone, Debug)]
pub struct ConnLimits {
    /// Low, high, and the output limit.
    watermarks: (usize, usize, usize),
    /// Handshake, frame, idle, write, linger.
    timeouts: [Duration; 5],
    /// Bytes per second.
    min_rate: u32,
}

/// One listener.
#[derive(Clone, Debug)]
pub struct Door {
    pub handler_kind: HandlerKind,
    pub wire: Wire,
    pub tls: bool,
    /// There is TLS in this world.
    pub may_upgrade: bool,
    /// Its TLS asks clients for certificates, whose chains may be expensive.
    pub asks: bool,
    /// Peers that the service refuses, of a thousand.
    pub refusals: u16,
    /// As it begins.
    pub rules: Rules,
    pub limits: ConnLimits,
    pub linger_bytes: usize,
    pub max_frame: usize,
    /// Connections that say nothing make room at the cap.
    pub evict_silent: bool,
    pub backlog: u32,
    /// Of each connection.
    pub send_buffer: usize,
    /// Clients that do not read at first, of a thousand.
    pub clogged: u16,
}

/// One thing that happens, and the seed of its particulars.
#[derive(Clone, Debug)]
pub struct Action {
    pub act: Act,
    pub seed: u64,
}

/// Doors and connections by number, modulo how many there are; clients counted back from the latest.
#[derive(Clone, Debug)]
pub enum Act {
    /// What the simulator can do by itself.
    World(Op),
    /// A client comes; an odd one speaks TLS to a plain door, or none to the other kind.
    Connect {
        door: u8,
        odd: bool,
    },
    /// The server connects to an address, which answers in one way or another.
    Dial {
        door: u8,
    },
    /// The server adopts a connected socket.
    Adopt {
        door: u8,
    },
    /// A client says some frames.
    Say {
        client: u8,
        frames: u8,
    },
    /// A client says what is no frame; or, over TLS, no record.
    Rubbish {
        client: u8,
        record: bool,
    },
    /// A client finishes: politely with close_notify and FIN, or with one of both.
    Finish {
        client: u8,
        notify: bool,
        fin: bool,
    },
    /// A client stops to read, and little fits on the way.
    Clog {
        client: u8,
    },
    /// It reads a little all the same.
    Sip {
        client: u8,
    },
    /// A client sends a frame and reads, a few bytes at a time while time passes.
    Trickle {
        client: u8,
        rounds: u8,
    },
    /// The next write fails, and it is a rare one: an answer to a client that was late with its
    /// PROXY header, or output to be flushed.
    Strike {
        error: u8,
    },
    /// Another thread gives orders through a handle.
    Flood {
        orders: u16,
    },
    /// Another thread says through a handle that it is to end.
    DrainByHandle {
        millis: u16,
    },
    StopByHandle,
    Suspend {
        door: u8,
        on: bool,
    },
    CloseDoor {
        door: u8,
    },
    /// A closed listener opens again.
    OpenDoor {
        door: u8,
    },
    /// The options of a listener change, or of the server: to others, or to what cannot work and changes nothing.
    ChangeRules {
        door: u8,
        good: bool,
    },
    ChangeHouse {
        good: bool,
    },
    /// A network is banned, for ever or for a time.
    Ban {
        network: u8,
    },
    /// A ban ends early, if there is one.
    Unban {
        network: u8,
    },
}

impl Plan {
    /// The world of this seed.
    pub fn draw(seed: u64, tls: bool) -> Self {
        let mut random = Random::new(seed);
        let tls = tls && cfg!(feature = "tls");
        let doors = [1, 1, 2, 3][random.below(4)];
        let heavy = random.chance(60);
        let mut setup = Setup {
            doors: (0..doors)
                .map(|_| Door::draw(&mut random, tls, heavy))
                .map(|door| Door {
                    asks: door.tls && seed % 2 == 1,
                    ..door
                })
                .collect(),
            cap: random.below(9).max(random.below(3)),
            budgets: [
                random.between(1, 3),
                random.between(1, 2),
                [1, 64, random.between(1, 4000)][random.below(3)],
                [1, 3, 1024][random.below(3)],
            ],
            work: Config::new().budgets.work,
            queue: (
                [1, 3, random.between(1, 60), 65_536][random.below(4)],
                [0, 10, 1 << 20][random.below(3)],
            ),
            house: House::draw(&mut random, heavy),
            heavy,
        };
        let faults = if random.chance(200) {
            Faults::none()
        } else {
            Faults::swarm(&mut random)
        };
        let length = random.between(5, 150);
        let script = (0..length).map(|_| Action::draw(&mut random)).collect();
        setup.work = match random.below(4) {
            0 => 1,
            1 => random.between(1, 100_000),
            _ => setup.work,
        };
        Self {
            seed,
            setup,
            faults,
            script,
            // Drawn last, so it changes nothing else of a seed's plan.
            kqueue: random.chance(250),
        }
    }
}

impl Setup {
    pub fn config(&self) -> Config {
        let [accept, handshakes, read, jobs] = self.budgets;
        Config::max_connections(self.cap).with(|config| {
            config.budgets.accepts = accept;
            config.budgets.handshakes = handshakes;
            config.budgets.read_bytes = read;
            config.budgets.commands = jobs;
            config.budgets.work = self.work;
            config.queue_limits.commands = self.queue.0;
            config.queue_limits.bytes = self.queue.1;
            self.house.apply(config);
        })
    }
}

impl ConnLimits {
    pub fn draw(random: &mut Random, heavy: bool) -> Self {
        let high = if heavy {
            random.between(2, 400_000)
        } else {
            [1, 2, 3, 17, random.between(2, 4000)][random.below(5)]
        };
        let timeout = |random: &mut Random| match random.below(10) {
            0 => Duration::from_millis(1),
            1 => Duration::from_millis(10),
            2..=4 => Duration::from_millis(random.between(1, 5_000) as u64),
            5..=7 => Duration::from_secs(30),
            _ => Duration::MAX,
        };
        let mut timeouts = [(); 5].map(|()| timeout(random));
        timeouts[4] = timeouts[4].min(Duration::from_secs(20));
        Self {
            watermarks: (
                random.below(high),
                high,
                high + [0, 1, random.below(4000)][random.below(3)],
            ),
            timeouts,
            min_rate: [500, 1, 100, 1_000_000][random.below(4)],
        }
    }

    pub fn set(&self, conn: &mut ConnConfig) {
        let [handshake, frame, idle, write, linger] = self.timeouts;
        let (low, high, limit) = self.watermarks;
        conn.handshake_timeout = handshake;
        conn.frame_timeout = frame;
        conn.idle_timeout = idle;
        conn.write_timeout = write;
        conn.min_rate = self.min_rate;
        conn.linger_timeout = linger;
        conn.low_watermark = low;
        conn.high_watermark = high;
        conn.output_limit = limit;
    }
}

impl Door {
    fn draw(random: &mut Random, tls: bool, heavy: bool) -> Self {
        let limits = ConnLimits::draw(random, heavy);
        Self {
            handler_kind: if random.chance(200) {
                HandlerKind::Echo
            } else {
                HandlerKind::ALL[random.below(HandlerKind::ALL.len())]
            },
            wire: Wire::ALL[random.below(Wire::ALL.len())],
            tls: tls && random.chance(400),
            may_upgrade: tls,
            asks: false,
            refusals: [0, 0, 0, 200][random.below(4)],
            rules: Rules::draw(random),
            limits,
            linger_bytes: [100, 10_000][random.below(2)],
            max_frame: if heavy {
                200_000
            } else {
                random.between(8, 255)
            },
            evict_silent: random.chance(700),
            backlog: random.between(1, 16) as u32,
            send_buffer: [64 * 1024, random.between(1, 2000), random.between(1, 100)]
                [random.below(3)],
            clogged: [0, 0, 500][random.below(3)],
        }
    }

    fn set(&self, conn: &mut ConnConfig) {
        self.limits.set(conn);
        conn.max_frame = Some(self.max_frame);
        conn.linger_bytes = self.linger_bytes;
    }

    /// How it listens, all but the address.
    pub fn listen(&self, port: u16) -> Listen {
        let listen = Listen::tcp(("127.0.0.1", port), self.wire.framing()).with(|listen| {
            self.set(&mut listen.conn);
            listen.socket.backlog = self.backlog;
            listen.evict_silent = self.evict_silent;
        });
        #[cfg(feature = "tls")]
        let listen = if self.tls {
            listen.tls(match self.asks {
                true => crate::sim_tls::asking_server_config(),
                false => crate::sim_tls::server_config(),
            })
        } else {
            listen
        };
        listen.with(|listen| self.rules.apply(listen))
    }

    /// How it connects, in the clear.
    pub fn connect(&self, timeout: Duration, retry: Option<Retry>) -> Connect {
        Connect::new(self.wire.framing()).with(|connect| {
            self.set(&mut connect.conn);
            connect.connect_timeout = timeout;
            connect.retry = retry;
        })
    }
}

impl Action {
    fn draw(random: &mut Random) -> Self {
        Self {
            act: Act::draw(random),
            seed: random.bits(),
        }
    }
}

impl Act {
    fn draw(random: &mut Random) -> Self {
        let number = random.below(256) as u8;
        let (client, door, connection) = (number, number, number);
        match random.below(1000) {
            0..=149 => Self::Connect {
                door,
                odd: random.chance(30),
            },
            150..=189 => Self::Dial { door },
            190..=199 => Self::Adopt { door },
            200..=489 => Self::Say {
                client,
                frames: random.between(1, 12) as u8,
            },
            490..=499 => Self::Sip { client },
            500..=509 => Self::Trickle {
                client,
                rounds: random.between(1, 20) as u8,
            },
            510..=529 => Self::Strike { error: number },
            530..=539 => Self::ChangeRules {
                door,
                good: random.chance(700),
            },
            540..=554 => Self::Rubbish {
                client,
                record: random.chance(500),
            },
            555..=599 => {
                let [notify, fin] =
                    [[true, true], [true, true], [true, false], [false, true]][random.below(4)];
                Self::Finish {
                    client,
                    notify,
                    fin,
                }
            }
            600..=614 => Self::World(Op::Reset {
                client: client.into(),
            }),
            615..=644 => Self::World(Op::Read {
                client: client.into(),
                on: random.chance(500),
            }),
            645..=659 => Self::World(Op::SendBuffer {
                client: client.into(),
                bytes: random.between(1, 2000) as u16,
            }),
            660..=689 => Self::Clog { client },
            690..=719 => Self::Sip { client },
            720..=779 => Self::World(Op::Step),
            780..=784 => Self::Ban { network: number },
            785..=787 => Self::Unban { network: number },
            788..=849 => Self::World(Op::Advance {
                millis: [1, 10, 100, 1000, 6000][random.below(5)],
            }),
            850..=869 => Self::World(Op::Fail {
                call: random.below(256) as u8,
                after: random.below(4) as u8,
                error: random.below(256) as u8,
            }),
            870..=884 => Self::World(Op::Descriptors {
                more: [0, 1, 2, 255][random.below(4)],
            }),
            885..=894 => Self::World(Op::Kill { connection }),
            895..=929 => Self::Flood {
                orders: [1, 3, 10, 100, random.between(1, 300) as u16][random.below(5)],
            },
            930..=944 => Self::World(Op::Cap {
                connections: random.below(10) as u8,
            }),
            945..=969 => Self::Suspend {
                door,
                on: random.chance(400),
            },
            970..=975 => Self::CloseDoor { door },
            976..=985 => Self::OpenDoor { door },
            986..=990 => Self::ChangeHouse {
                good: random.chance(700),
            },
            991..=992 => Self::StopByHandle,
            993..=996 => Self::DrainByHandle {
                millis: random.between(1, 3000) as u16,
            },
            _ => Self::World(Op::Drain {
                millis: random.between(1, 3000) as u16,
            }),
        }
    }
}
