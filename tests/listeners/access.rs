//! Access rules decide by address, before anything is spent on a peer.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use kit::net::{connect_from, local, ping, read_to_end, spawn, spawn_echo, Echo, Running};
use portcullis::sim::{ClientState, Sim};
use portcullis::{
    AccessRules, AtCapacity, CloseReason, Closed, Config, ConnId, Control, Error, Framing, Handler,
    Listen, ListenerRef, Peer, ProxyProtocol, Refuse, Server,
};

/// What one listener's service has heard.
#[derive(Default)]
struct Heard {
    accepted: usize,
    failed_accepts: Vec<(CloseReason, Option<ConnId>, SocketAddr)>,
}

struct Recorder;

impl portcullis::Service<Heard> for Recorder {
    fn accept(&mut self, heard: &mut Heard, _: Peer) -> Result<Box<dyn Handler<Heard>>, Refuse> {
        heard.accepted += 1;
        Ok(Box::new(Echo))
    }

    fn on_failed_accept(&mut self, heard: &mut Heard, peer: &Peer, closed: &Closed) {
        heard
            .failed_accepts
            .push((closed.reason, peer.id, kit::net::tcp(&peer.addr)));
    }
}

fn server(config: Config, listen: Listen) -> Running<Heard> {
    spawn(move || {
        let mut server = Server::new(config).expect("server");
        server.listen_with(listen, Recorder).expect("listen");
        (server, Heard::default())
    })
}

/// esockd: t_allow_deny. A denied client is closed before TLS, and takes no slot.
#[test]
fn a_denied_client_costs_no_slot_and_no_call() {
    let rules = AccessRules::allow_all()
        .deny("127.0.0.2/31")
        .expect("a network");
    let server = server(
        Config::max_connections(1),
        local().with(|listen| listen.access_rules = rules),
    );
    let mut inside = connect_from("127.0.0.1:0", server.addr());
    ping(&mut inside, b"inside");
    drop(inside);
    server.until("the place is free", |stats| stats.open == 0);
    for source in ["127.0.0.2:0", "127.0.0.3:0"] {
        assert_eq!(read_to_end(&mut connect_from(source, server.addr())), b"");
    }
    ping(
        &mut connect_from("127.0.0.4:0", server.addr()),
        b"still open to others",
    );
    let stats = server.until("all are counted", |stats| stats.closed_total() == 4);
    assert_eq!(
        (
            stats.closed(CloseReason::Denied),
            stats.accepted,
            stats.peak
        ),
        (2, 4, 1)
    );
    server.ask(|heard, _| {
        assert_eq!(heard.accepted, 2, "the service is not asked");
        let denied = heard.failed_accepts.iter().all(|(reason, id, addr)| {
            *reason == CloseReason::Denied && id.is_none() && !addr.ip().to_string().ends_with(".1")
        });
        assert!(denied && heard.failed_accepts.len() == 2);
    });
}

/// Denied comes before "no slot": a denied client does not learn that there is none.
#[test]
fn the_rules_are_asked_before_the_cap() {
    let rules = AccessRules::deny_all()
        .allow("127.0.0.1")
        .expect("an address");
    let full = AtCapacity::Refuse {
        farewell: b"full".to_vec(),
    };
    let server = server(
        Config::max_connections(0),
        local().with(|listen| {
            listen.access_rules = rules;
            listen.at_capacity = full;
        }),
    );
    assert_eq!(
        read_to_end(&mut connect_from("127.0.0.2:0", server.addr())),
        b""
    );
    assert_eq!(
        read_to_end(&mut connect_from("127.0.0.1:0", server.addr())),
        b"full"
    );
}

/// An IPv4 peer of a dual-stack socket is matched as IPv4.
#[test]
fn an_ipv4_peer_is_one_on_an_ipv6_socket_too() {
    let rules = AccessRules::allow_all()
        .deny("127.0.0.2")
        .expect("an address");
    let listen = Listen::tcp("[::]:0", Framing::Packet2).with(|listen| {
        listen.socket.only_v6 = false;
        listen.access_rules = rules;
    });
    let server = server(Config::new(), listen);
    let addr = SocketAddr::from(([127, 0, 0, 1], server.addr().port()));
    assert_eq!(read_to_end(&mut connect_from("127.0.0.2:0", addr)), b"");
    ping(&mut connect_from("127.0.0.1:0", addr), b"over IPv4");
    let addr = SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, server.addr().port()));
    ping(&mut connect_from("[::1]:0", addr), b"over IPv6");
}

fn set(
    control: &mut Control<'_, Heard>,
    which: ListenerRef,
    rules: AccessRules,
) -> portcullis::Result<()> {
    control.reconfigure_listener(which, |listen| listen.access_rules = rules)
}

/// esockd: t_update_options. A change is atomic, and open connections are not touched.
#[test]
fn rules_change_under_way() {
    let server = server(Config::new(), local());
    let id = server.listeners[0].id;
    let mut inside = connect_from("127.0.0.2:0", server.addr());
    ping(&mut inside, b"inside");
    server.ask(move |_, control| {
        let rules = AccessRules::allow_all()
            .deny("127.0.0.0/8")
            .expect("a network");
        set(control, id.into(), rules).expect("it is there");
    });
    assert_eq!(
        read_to_end(&mut connect_from("127.0.0.2:0", server.addr())),
        b""
    );
    ping(&mut inside, b"who is inside stays");
    server.ask(move |_, control| {
        let options = control.options(id).expect("it is there");
        let rules = options.access_rules.clone();
        let found: Vec<_> = rules
            .iter()
            .map(|rule| (rule.to_string(), rule.hits))
            .collect();
        assert_eq!(found[..1], [("deny 127.0.0.0/8".to_owned(), 1)]);
        // Rules that stay keep their counts; a rule in front of them starts at 0.
        let more = rules.deny_first("10.0.0.0/8").expect("a network");
        set(control, id.into(), more).expect("it is there");
        let options = control.options(id).expect("it is there");
        let rules = options.access_rules.clone();
        let found: Vec<_> = rules
            .iter()
            .map(|rule| (rule.to_string(), rule.hits))
            .collect();
        assert_eq!(
            found[..2],
            [
                ("deny 10.0.0.0/8".to_owned(), 0),
                ("deny 127.0.0.0/8".to_owned(), 1)
            ]
        );
        set(control, id.into(), AccessRules::allow_all()).expect("it is there");
        let gone = set(control, "nobody".into(), AccessRules::deny_all());
        assert!(matches!(gone, Err(Error::NoListener { .. })), "{gone:?}");
    });
    ping(&mut connect_from("127.0.0.2:0", server.addr()), b"again");
}

#[test]
fn without_rules_every_peer_may_connect() {
    let server = spawn_echo(Config::new(), local());
    ping(&mut connect_from("127.0.0.9:0", server.addr()), b"welcome");
}

/// Whether a new client of this host is served.
fn is_served(sim: &mut Sim, addr: SocketAddr, host: &str) -> bool {
    let host: IpAddr = host.parse().expect("an address");
    let client = sim.connect_from(addr, host).expect("it listens");
    sim.settle();
    let denied = sim.state(client) != ClientState::Connected;
    sim.reset(client);
    sim.settle();
    !denied
}

/// A ban holds for its time, from the call on, for all listeners, and comes before every rule.
#[test]
fn a_ban_ends_by_itself() {
    let mut sim = Sim::new(1, Config::new(), ());
    let rules = AccessRules::allow_all()
        .allow("192.0.2.7")
        .and_then(|rules| rules.deny("198.51.100.0/24"))
        .expect("networks");
    let addr = sim
        .listen(
            local().with(|listen| listen.access_rules = rules),
            |_: &mut (), _| Echo,
        )
        .expect("listen");
    let other = sim
        .listen(local().name("other"), |_: &mut (), _| Echo)
        .expect("listen");
    let inside = sim
        .connect_from(addr, "192.0.2.7".parse().expect("an address"))
        .expect("it listens");
    sim.settle();
    let minute = Duration::from_secs(60);
    sim.control()
        .ban("192.0.2.0/24", minute)
        .expect("a network");
    sim.control()
        .ban("203.0.113.5", Duration::MAX)
        .expect("an address");
    for addr in [addr, other] {
        for (host, served) in [
            ("192.0.2.7", false),
            ("::ffff:192.0.2.7", false),
            ("192.0.3.7", true),
            ("203.0.113.5", false),
            ("2001:db8::1", true),
        ] {
            assert_eq!(is_served(&mut sim, addr, host), served, "{host}");
        }
    }
    assert_eq!(sim.stats().closed(CloseReason::Denied), 6);
    assert_eq!(sim.state(inside), ClientState::Connected, "it is open");
    sim.advance(minute - Duration::from_millis(1));
    assert!(!is_served(&mut sim, other, "192.0.2.7"));
    sim.advance(Duration::from_millis(1));
    assert!(is_served(&mut sim, other, "192.0.2.7"));
    sim.advance(minute * 60 * 24);
    assert!(!is_served(&mut sim, other, "203.0.113.5"));
    let mut control = sim.control();
    assert!(control.unban("203.0.113.5").expect("an address"));
    assert!(!control.unban("203.0.113.5").expect("an address"));
    assert!(
        !control.unban("192.0.2.0/24").expect("a network"),
        "it is over"
    );
    for wrong in [
        control.ban("nowhere", minute),
        control.unban("").map(|_| ()),
    ] {
        assert!(matches!(wrong, Err(Error::Option { .. })), "{wrong:?}");
    }
    assert!(is_served(&mut sim, addr, "203.0.113.5"));
}

/// Behind a proxy the client that the header names is banned, not the proxy.
#[test]
fn a_client_behind_a_proxy_is_banned() {
    let mut sim = Sim::new(1, Config::new(), ());
    let listen = local().with(|listen| {
        listen.proxy_protocol = ProxyProtocol::Required;
        listen.trusted_proxies = Some(AccessRules::allow_all());
    });
    let addr = sim.listen(listen, |_: &mut (), _| Echo).expect("listen");
    let ban = sim.control().ban("192.0.2.7", Duration::from_secs(60));
    ban.expect("an address");
    let mut come = |source: &str| {
        let client = sim.connect(addr).expect("it listens");
        let header = format!("PROXY TCP4 {source} 198.51.100.2 50000 443\r\n");
        sim.send(client, header.as_bytes());
        sim.settle();
        sim.state(client) == ClientState::Connected
    };
    assert!(come("192.0.2.8") && !come("192.0.2.7"));
    assert_eq!(sim.stats().closed(CloseReason::Denied), 1);
}
