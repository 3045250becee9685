//! A message allocates nothing, an idle connection holds next to nothing, and what was held comes back. Counted by the
//! allocator, on the server's own thread: exact, and the same on every machine.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use allocation_counter::{measure, AllocationInfo};
use kit::net::{connect, local, packet2, Echo};
use portcullis::{Config, Framing, Listen, Server};

/// Does something that is not counted.
fn opt_out<T>(what: impl FnOnce() -> T) -> T {
    let mut done = None;
    allocation_counter::opt_out(|| done = Some(what()));
    done.expect("it was done")
}

/// A server that is turned by hand, on the thread whose allocations are counted.
struct Turned {
    server: Server,
    addr: SocketAddr,
}

impl Turned {
    fn new(config: Config, mut listen: Listen) -> Self {
        let mut server = Server::new(config).expect("a server");
        // Deadlines are armed, as everywhere.
        listen.conn.idle_timeout = Duration::from_secs(300);
        server.listen(listen, |_: &mut (), _| Echo).expect("a port");
        let addr = kit::net::tcp(&server.control().listeners()[0].addr);
        Self { server, addr }
    }

    /// Turns it until `wanted` holds.
    #[track_caller]
    fn until(&mut self, what: &str, mut wanted: impl FnMut(&mut Server) -> bool) {
        kit::net::eventually(what, || {
            let patience = Some(Duration::from_millis(10));
            self.server.poll_once(&mut (), patience).expect("it polls");
            wanted(&mut self.server)
        });
    }

    /// One message there and back.
    #[track_caller]
    fn echo(&mut self, client: &mut TcpStream, message: &[u8], answer: &mut [u8]) {
        client.write_all(message).expect("sent");
        let all = self.server.control().stats().traffic.bytes_out + message.len() as u64;
        self.until("the echo", |server| {
            server.control().stats().traffic.bytes_out >= all
        });
        client.read_exact(answer).expect("the echo");
        assert!(answer == message);
    }

    fn client(&mut self) -> TcpStream {
        let client = opt_out(|| connect(self.addr));
        let open = self.server.control().stats().open + 1;
        self.until("it is served", |server| {
            server.control().stats().open == open
        });
        client
    }
}

/// The allocations of a thousand messages.
fn per_thousand(framing: Framing, message: &[u8]) -> AllocationInfo {
    let mut turned = Turned::new(
        Config::new(),
        local().with(|listen| listen.framing = framing),
    );
    let mut clients = [turned.client(), turned.client(), turned.client()];
    let mut answer = vec![0; message.len()];
    // Buffers find their size.
    for client in &mut clients {
        turned.echo(client, message, &mut answer);
    }
    measure(|| {
        for round in 0..1000 {
            turned.echo(&mut clients[round % 3], message, &mut answer);
        }
    })
}

#[test]
fn a_message_allocates_nothing() {
    let raw = per_thousand(Framing::Raw, &[b'x'; 300]);
    let packet = per_thousand(Framing::Packet2, &packet2(&[b'x'; 64]));
    let large = per_thousand(Framing::Packet2, &packet2(&[b'x'; 9000]));
    let line = per_thousand(Framing::Line, &[&[b'x'; 80][..], b"\n"].concat());
    for (what, info) in [
        ("raw", raw),
        ("packet-2", packet),
        ("large", large),
        ("line", line),
    ] {
        assert_eq!((info.count_total, info.bytes_total), (0, 0), "{what}");
    }
}

/// A frame in two pieces is held in a buffer that goes from hand to hand.
#[test]
fn a_frame_in_pieces_allocates_nothing() {
    let mut turned = Turned::new(Config::new(), local());
    let mut client = turned.client();
    let message = packet2(&[b'x'; 700]);
    let (front, back) = message.split_at(333);
    let mut answer = vec![0; message.len()];
    let mut echo_in_pieces = |turned: &mut Turned| {
        let stats = turned.server.control().stats();
        let (read, sent) = (
            stats.traffic.bytes_in + front.len() as u64,
            stats.traffic.bytes_out + message.len() as u64,
        );
        client.write_all(front).expect("sent");
        turned.until("the front", |server| {
            server.control().stats().traffic.bytes_in >= read
        });
        client.write_all(back).expect("sent");
        turned.until("the echo", |server| {
            server.control().stats().traffic.bytes_out >= sent
        });
        client.read_exact(&mut answer).expect("the echo");
    };
    // Spare buffers find their size.
    (0..10).for_each(|_| echo_in_pieces(&mut turned));
    let info = measure(|| (0..100).for_each(|_| echo_in_pieces(&mut turned)));
    assert_eq!((info.count_total, info.bytes_total), (0, 0));
}

/// What the server's thread holds more of with 500 idle connections than with 100.
fn per_idle_connection<C>(
    listen: impl Fn() -> Listen,
    make: impl Fn(&Turned) -> C,
    visit: impl Fn(&mut Turned, &mut C),
) -> i64 {
    let held = |connections: usize| {
        let mut all = None;
        let info = measure(|| {
            // Reserved for as many as may come: the whole of what they cost.
            let mut turned = Turned::new(Config::max_connections(connections), listen());
            let mut clients = opt_out(|| make(&turned));
            for _ in 0..connections {
                visit(&mut turned, &mut clients);
            }
            assert_eq!(turned.server.control().stats().open, connections);
            all = Some((turned, clients));
        });
        drop(all);
        info.bytes_current
    };
    (held(500) - held(100)) / 400
}

#[test]
fn an_idle_connection_holds_200_bytes() {
    let message = packet2(&[b'x'; 64]);
    let each = per_idle_connection(
        local,
        |_| Vec::with_capacity(500),
        |turned, clients| {
            let mut client = turned.client();
            turned.echo(&mut client, &message, &mut [0; 66]);
            clients.push(client);
        },
    );
    // mio's sockets are larger in debug builds, where they know which poll they belong to.
    let most = if cfg!(debug_assertions) { 216 } else { 200 };
    // Its number in a recording: all tests are built with that feature.
    let most = most + 8;
    println!("{each} bytes for each connection");
    assert!(
        (100..=most).contains(&each),
        "{each} bytes for each connection"
    );
}

/// After a burst of large frames, an idle connection is as small as before.
#[test]
fn large_frames_leave_nothing_behind() {
    let message = packet2(&[b'x'; 60_000]);
    let mut answer = vec![0; message.len()];
    let mut turned = Turned::new(Config::new(), local());
    let mut clients: Vec<TcpStream> = (0..100).map(|_| turned.client()).collect();
    let mut burst = |turned: &mut Turned, clients: &mut [TcpStream]| {
        for client in clients {
            turned.echo(client, &message, &mut answer);
        }
    };
    // The pool takes what it keeps.
    burst(&mut turned, &mut clients[..1]);
    let info = measure(|| burst(&mut turned, &mut clients));
    assert_eq!(info.bytes_current, 0, "{info:?}");
    assert_eq!(turned.server.control().stats().memory, 0);
}

/// Clients with their TLS on a thread of their own, whose allocations are not counted.
#[cfg(feature = "tls")]
mod behind_tls {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{mpsc, Arc};
    use std::thread;

    use super::*;
    use kit::tls::{secure, Site};
    use portcullis::tls::rustls::{version::TLS13, ClientConfig};

    enum Order {
        /// Connect, and have a message echoed.
        Come,
        /// Have a message echoed on the last connection.
        Echo,
    }

    struct Clients {
        orders: mpsc::Sender<Order>,
        given: usize,
        obeyed: Arc<AtomicUsize>,
    }

    impl Clients {
        fn of(addr: SocketAddr, config: ClientConfig) -> Self {
            let (orders, given) = mpsc::channel();
            let obeyed = Arc::new(AtomicUsize::new(0));
            let told = Arc::clone(&obeyed);
            thread::spawn(move || {
                let mut clients = Vec::new();
                for order in given {
                    if let Order::Come = order {
                        clients.push(secure(addr, &config));
                    }
                    let client = clients.last_mut().expect("it came first");
                    kit::net::ping(client, &[b'x'; 64]);
                    told.fetch_add(1, Ordering::SeqCst);
                }
            });
            Self {
                orders,
                given: 0,
                obeyed,
            }
        }

        /// Turns the server until the order is carried out.
        fn carry_out(&mut self, order: Order, turned: &mut Turned) {
            opt_out(|| self.orders.send(order).expect("it runs"));
            self.given += 1;
            let (given, obeyed) = (self.given, &self.obeyed);
            turned.until("the client is done", |_| {
                obeyed.load(Ordering::SeqCst) == given
            });
        }
    }

    /// Both are rustls' own: what it has decrypted, and what it is to encrypt, each in a buffer of its own.
    const PER_MESSAGE: u64 = 2;

    #[test]
    fn a_message_allocates_what_rustls_does() {
        let site = Site::new();
        let mut turned = Turned::new(Config::new(), local().tls(site.server()));
        let mut clients = Clients::of(turned.addr, site.client(&TLS13));
        clients.carry_out(Order::Come, &mut turned);
        clients.carry_out(Order::Echo, &mut turned);
        let info = measure(|| (0..100).for_each(|_| clients.carry_out(Order::Echo, &mut turned)));
        assert_eq!(info.count_total, 100 * PER_MESSAGE, "{info:?}");
        assert_eq!(info.bytes_current, 0, "{info:?}");
    }

    /// What aws-lc and ring hold of the keys is allocated by C, and not counted here.
    #[test]
    fn an_idle_connection_holds_2650_bytes() {
        let site = Site::new();
        let each = per_idle_connection(
            || opt_out(|| local().tls(site.server())),
            |turned| Clients::of(turned.addr, site.client(&TLS13)),
            |turned, clients| clients.carry_out(Order::Come, turned),
        );
        println!("{each} bytes for each connection");
        assert!(
            (1000..=2650).contains(&each),
            "{each} bytes for each connection"
        );
    }
}
