//! A listener's rules on access and rates, which may change while it runs; and a second
//! implementation of them.

use std::net::IpAddr;
use std::time::Duration;

use portcullis::sim::Random;
use portcullis::{AccessRules, AtCapacity, Config, Listen, ProxyProtocol, Quota, Rate};

use super::header::HOSTS;

/// Per second, and at once.
pub type Speed = (u64, u64);

pub fn rate(speed: Option<Speed>) -> Option<Rate> {
    speed.map(|(per_second, burst)| Rate::per_second(per_second).burst(burst))
}

/// The options of a listener that can change while it listens.
#[derive(Clone, Debug)]
pub struct Rules {
    pub places: Option<usize>,
    reserved: usize,
    pub at_capacity: AtCapacity,
    pub proxy: ProxyProtocol,
    trusted: Networks,
    access: Networks,
    pub accept_rate: Option<Speed>,
    pub source_connections: Option<usize>,
    source_rate: Option<Speed>,
    /// Bytes and frames of each connection, bytes and frames of all.
    throttles: [Option<Speed>; 4],
}

/// The first that a peer is in decides: true lets it in.
#[derive(Clone, Debug)]
struct Networks {
    rules: Vec<(bool, &'static str)>,
    otherwise: bool,
}

pub const NETWORKS: [&str; 10] = [
    "10.0.0.0/8",
    "10.0.0.1",
    "10.0.1.0/24",
    "10.0.0.2/31",
    "192.0.2.0/25",
    "::ffff:10.0.0.0/112",
    "2001:db8::/32",
    "2001:db8::5",
    "2001:db8:0:1::/64",
    "all",
];

impl Networks {
    fn all() -> Self {
        Self {
            rules: Vec::new(),
            otherwise: true,
        }
    }

    fn draw(random: &mut Random) -> Self {
        let rules = (0..random.below(4))
            .map(|_| (random.chance(600), NETWORKS[random.below(NETWORKS.len())]));
        Self {
            rules: rules.collect(),
            otherwise: random.chance(600),
        }
    }

    fn rules(&self) -> AccessRules {
        let begin = if self.otherwise {
            AccessRules::allow_all()
        } else {
            AccessRules::deny_all()
        };
        self.rules.iter().fold(begin, |rules, &(allow, network)| {
            let next = if allow {
                rules.allow(network)
            } else {
                rules.deny(network)
            };
            next.expect("a network")
        })
    }

    fn let_in(&self, peer: IpAddr) -> bool {
        let first = self
            .rules
            .iter()
            .find(|(_, network)| contains(network, peer));
        first.map_or(self.otherwise, |&(allow, _)| allow)
    }
}

/// Every address as one of IPv6, by its bits.
pub fn contains(network: &str, peer: IpAddr) -> bool {
    let bits = |address: IpAddr| match address {
        IpAddr::V4(address) => u128::from(address.to_ipv6_mapped()),
        IpAddr::V6(address) => u128::from(address),
    };
    if network == "all" {
        return true;
    }
    let (address, prefix) = network.split_once('/').unwrap_or((network, ""));
    let address: IpAddr = address.parse().expect("an address");
    let missing = if address.is_ipv4() { 96 } else { 0 };
    let prefix = prefix.parse::<u32>().map_or(128, |prefix| prefix + missing);
    let mask = u128::MAX.checked_shl(128 - prefix).unwrap_or(0);
    (bits(address) ^ bits(peer)) & mask == 0
}

/// What counts as one source: an address of IPv4, 64 bits of one of IPv6.
pub fn source(peer: IpAddr) -> u128 {
    match peer.to_canonical() {
        IpAddr::V4(address) => u128::from(u32::from(address)),
        IpAddr::V6(address) => u128::from(address) & !u128::from(u64::MAX),
    }
}

fn speed(random: &mut Random, least: usize, most: usize) -> Speed {
    let per_second = random.between(least, most) as u64;
    (per_second, [1, 2, per_second * 2][random.below(3)])
}

impl Rules {
    /// No client is refused, and none is slowed down.
    pub fn none(proxy: ProxyProtocol) -> Self {
        Self {
            places: None,
            reserved: 0,
            at_capacity: AtCapacity::Wait,
            proxy,
            trusted: Networks::all(),
            access: Networks::all(),
            accept_rate: None,
            source_connections: None,
            source_rate: None,
            throttles: [None; 4],
        }
    }

    pub fn draw(random: &mut Random) -> Self {
        let policies = [
            AtCapacity::Wait,
            AtCapacity::Wait,
            AtCapacity::Refuse {
                farewell: Vec::new(),
            },
            AtCapacity::Refuse {
                farewell: b"full, come back later\n".to_vec(),
            },
        ];
        let modes = [
            ProxyProtocol::Off,
            ProxyProtocol::Required,
            ProxyProtocol::Optional,
        ];
        let (places, reserved, at_capacity) = (
            random.chance(300).then(|| random.below(4)),
            [0, 0, 0, random.below(4)][random.below(4)],
            policies[random.below(4)].clone(),
        );
        if random.chance(400) {
            return Self {
                places,
                reserved,
                at_capacity,
                ..Self::none(ProxyProtocol::Off)
            };
        }
        let networks = |random: &mut Random, chance| {
            if random.chance(chance) {
                Networks::draw(random)
            } else {
                Networks::all()
            }
        };
        Self {
            places,
            reserved,
            at_capacity,
            proxy: modes[random.below(3)],
            trusted: networks(random, 250),
            access: networks(random, 200),
            accept_rate: random.chance(200).then(|| speed(random, 1, 20)),
            source_connections: random.chance(150).then(|| random.between(1, 4)),
            source_rate: random.chance(100).then(|| speed(random, 1, 5)),
            throttles: [(50, 2000), (1, 30), (50, 4000), (1, 60)]
                .map(|(least, most)| random.chance(40).then(|| speed(random, least, most))),
        }
    }

    /// Other rules in one respect, or in all.
    pub fn redraw(&mut self, random: &mut Random) {
        let other = Self::draw(random);
        match random.below(9) {
            0 => self.access = other.access,
            1 => self.trusted = other.trusted,
            2 => self.proxy = other.proxy,
            3 => self.accept_rate = other.accept_rate,
            4 => self.source_connections = other.source_connections,
            5 => self.throttles = other.throttles,
            6 => self.at_capacity = other.at_capacity,
            7 => self.reserved = other.reserved,
            _ => *self = other,
        }
    }

    pub fn apply(&self, listen: &mut Listen) {
        let [read, frames, all_read, all_frames] = self.throttles.map(rate);
        listen.at_capacity = self.at_capacity.clone();
        listen.proxy_protocol = self.proxy;
        listen.trusted_proxies = Some(self.trusted.rules());
        listen.access_rules = self.access.rules();
        listen.accept_rate = rate(self.accept_rate);
        listen.source_limits.connections = self.source_connections;
        listen.source_limits.rate = rate(self.source_rate);
        listen.conn.read_rate = read;
        listen.conn.frame_rate = frames;
        listen.total_read_rate = all_read;
        listen.total_frame_rate = all_frames;
        listen.max_connections = self.places;
        listen.reserved = self.reserved;
    }

    /// Whether this peer speaks for others here.
    pub fn trusts(&self, peer: IpAddr) -> bool {
        self.proxy != ProxyProtocol::Off && self.trusted.let_in(peer)
    }

    /// A peer, or the source that a proxy names.
    pub fn allows(&self, source: IpAddr) -> bool {
        self.access.let_in(source)
    }

    /// A peer, before it has said anything.
    pub fn admits(&self, peer: IpAddr) -> bool {
        self.allows(peer) && (self.proxy != ProxyProtocol::Required || self.trusts(peer))
    }

    pub fn has_throttle(&self) -> bool {
        self.throttles.iter().any(Option::is_some)
    }

    pub fn limits_sources(&self) -> bool {
        self.source_connections.is_some() || self.source_rate.is_some()
    }

    /// A peer that is allowed, and the source that it names if it has to. Neither is banned.
    pub fn someone(&self, is_banned: impl Fn(IpAddr) -> bool) -> Option<(IpAddr, Option<IpAddr>)> {
        let hosts = || {
            let all = HOSTS.iter().map(|host| host.parse().expect("an address"));
            all.filter(|&host| !is_banned(host))
        };
        let peer = hosts().find(|&peer| self.admits(peer))?;
        if !self.trusts(peer) {
            return Some((peer, None));
        }
        Some((peer, Some(hosts().find(|&source| self.allows(source))?)))
    }
}

/// A change of a listener that must be refused as a whole: a part of it is good.
pub fn bad_listen(listen: &mut Listen, random: &mut Random) {
    listen.conn.idle_timeout = Duration::from_millis(77);
    let never = Rate::per_second(0);
    match random.below(10) {
        0 => (listen.conn.low_watermark, listen.conn.high_watermark) = (5, 5),
        1 => listen.socket.backlog = 77,
        2 => *listen = listen.clone().name("another"),
        3 => listen.source_limits.connections = Some(0),
        4 => listen.source_limits.prefixes = (24, 64),
        5 => listen.accept_rate = Some(never),
        6 => listen.total_read_rate = Some(Rate::per_second(9).burst(0)),
        7 => listen.conn.max_frame = Some(0),
        8 => listen.conn.handshake_timeout = Duration::ZERO,
        _ => {
            listen.at_capacity = AtCapacity::Refuse {
                farewell: vec![b'!'; 5000],
            }
        }
    }
}

/// The server's own rules on access, which may change too.
#[derive(Clone, Debug, Default)]
pub struct House {
    pub accept_rate: Option<Speed>,
    pending: Option<Quota>,
    patience: Duration,
    pub memory: Option<usize>,
}

impl House {
    pub fn draw(random: &mut Random, heavy: bool) -> Self {
        Self {
            accept_rate: random.chance(150).then(|| speed(random, 1, 20)),
            pending: random.chance(400).then(|| match random.below(4) {
                0 => Quota::Percent(random.between(1, 100) as u8),
                _ => Quota::Count(random.between(1, 4)),
            }),
            patience: Duration::from_millis([0, 1, 100, 1000][random.below(4)]),
            memory: heavy.then_some(256 * 1024),
        }
    }

    /// Some may have to give way.
    pub fn is_crowded(&self) -> bool {
        self.pending.is_some()
    }

    /// They do at once.
    pub fn is_impatient(&self) -> bool {
        self.patience.is_zero()
    }

    pub fn apply(&self, config: &mut Config) {
        config.accept_rate = rate(self.accept_rate);
        config.pending_limits.connections = self.pending.unwrap_or(Quota::Percent(50));
        config.pending_limits.grace = self.patience;
        config.memory_limit = self.memory;
    }
}

/// As [`bad_listen`].
pub fn bad_config(config: &mut Config, random: &mut Random) {
    config.max_connections = 1;
    config.queue_limits.commands = 1;
    config.pending_limits.grace = Duration::ZERO;
    match random.below(7) {
        0 => config.budgets.accepts = 0,
        1 => config.memory_limit = Some(1000),
        2 => config.pending_limits.connections = Quota::Count(0),
        3 => config.pending_limits.connections = Quota::Percent(101),
        4 => config.emfile_backoff = Duration::ZERO,
        5 => config.accept_rate = Some(Rate::per_second(0)),
        _ => config.max_connections = usize::MAX,
    }
}
