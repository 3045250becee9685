//! The permits of the shared cap, after every kind of end: none is lost, and none is given back
//! twice.

use std::io::Write;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use kit::net::{eventually, local, tcp, PATIENCE};
use kit::outgoing::closed_addr;
use portcullis::{
    try_accept, AccessRules, Close, Config, Connect, Context, Framing, Handler, Listen, Outcome,
    ProxyProtocol, Quota, Refuse, Retry, Server, Shards,
};

const CAP: usize = 12;
const SHARDS: usize = 3;

/// Does what it is told, in one line.
#[derive(Clone)]
struct Obeys {
    refused: SocketAddr,
    echo: SocketAddr,
}

/// An outgoing connection that says a word and goes.
struct Errand;

impl Handler for Errand {
    fn on_open(&mut self, cx: &mut Context<'_>) -> Outcome {
        cx.conn.send("close\n")?;
        Ok(())
    }

    fn on_frame(&mut self, _: &mut Context<'_>, _: &[u8]) -> Outcome {
        Ok(())
    }
}

impl Handler for Obeys {
    fn on_frame(&mut self, cx: &mut Context<'_>, line: &[u8]) -> Outcome {
        let quick = Connect::new(Framing::Line)
            .with(|connect| connect.conn.idle_timeout = Duration::from_millis(50));
        match line {
            b"close\n" => return Err(Close::new()),
            b"abort\n" => return Err(Close::abort()),
            b"panic\n" => panic!("as told"),
            b"detach\n" => cx
                .conn
                .detach(|stream| drop(thread::spawn(move || stream.finish())))?,
            b"drop\n" => cx.conn.detach(drop)?,
            b"take\n" => cx.conn.detach(|stream| drop(stream.into_tcp()))?,
            // Whether there is a place is not what this is about.
            b"refused\n" => drop(cx.conn.control().connect(self.refused, quick, Errand)),
            b"retry\n" => {
                let retry = Retry::new(3).first_delay(Duration::from_millis(1));
                drop(cx.conn.control().connect(
                    self.refused,
                    quick.with(|connect| connect.retry = Some(retry)),
                    Errand,
                ));
            }
            b"foreign\n" => {
                let foreign = quick.with(|connect| {
                    connect.bind = Some("192.0.2.1:0".parse().expect("an address"))
                });
                drop(cx.conn.control().connect(self.refused, foreign, Errand));
            }
            b"echo\n" => drop(cx.conn.control().connect(self.echo, quick, Errand)),
            b"killed\n" => {
                if let Ok(id) = cx.conn.control().connect(self.echo, quick, Errand) {
                    cx.conn.peer(id).expect("it is there").abort();
                }
            }
            _ => cx.conn.send(line)?,
        }
        Ok(())
    }
}

fn plain() -> Listen {
    local().with(|listen| {
        listen.framing = Framing::Line;
        listen.conn.idle_timeout = Duration::from_millis(200);
    })
}

#[test]
fn places_are_neither_lost_nor_found() {
    let (refused, elsewhere) = (
        closed_addr(),
        std::net::TcpListener::bind("127.0.0.1:0").expect("a port"),
    );
    let echo = elsewhere.local_addr().expect("bound");
    thread::spawn(move || {
        // Accepts, and closes each connection at once or a little later.
        let mut kept = Vec::new();
        while let Ok((stream, _)) = elsewhere.accept() {
            kept.push(stream);
            if kept.len() > 3 {
                kept.clear();
            }
        }
    });
    let turn = Arc::new(AtomicUsize::new(0));
    let config = Config::max_connections(CAP).with(|config| {
        config.pending_limits.connections = Quota::Count(CAP / 2);
        config.budgets.accepts = 3;
    });
    let shards = Shards::new(config)
        .threads(SHARDS)
        .spawn(move |_, server: &mut Server| {
            let obeys = Obeys { refused, echo };
            let (first, second) = (obeys.clone(), obeys.clone());
            let trusted = AccessRules::deny_all().allow("127.0.0.1")?;
            let proxied = plain().with(|listen| {
                listen.proxy_protocol = ProxyProtocol::Required;
                listen.trusted_proxies = Some(trusted);
            });
            let turn = Arc::clone(&turn);
            server.listen(plain().name("plain"), move |_: &mut (), _| first.clone())?;
            server.listen(proxied.name("proxied"), move |_: &mut (), _| second.clone())?;
            let moody =
                try_accept(
                    move |(): &mut (), _| match turn.fetch_add(1, Ordering::Relaxed) % 3 {
                        0 => Err(Refuse::silently()),
                        1 => panic!("a service"),
                        _ => Ok(obeys.clone()),
                    },
                );
            server.listen_with(plain().name("moody"), moody)?;
            let denied = plain().with(|listen| listen.access_rules = AccessRules::deny_all());
            server.listen(denied.name("denied"), |_: &mut (), _| Errand)?;
            Ok(())
        });
    let shards = shards.expect("shards");
    let addrs: Vec<_> = shards
        .listeners
        .iter()
        .map(|listener| tcp(&listener.addr))
        .collect();
    let orders: Vec<&[u8]> = vec![
        b"close\n",
        b"abort\n",
        b"panic\n",
        b"detach\n",
        b"drop\n",
        b"take\n",
        b"refused\n",
        b"retry\n",
        b"foreign\n",
        b"echo\n",
        b"killed\n",
        b"hello\n",
        b"PROXY rubbish\r\n",
        b"PROXY UNKNOWN\r\nclose\n",
        b"half a line",
        b"",
    ];
    let clients: Vec<_> = (0..4_usize)
        .map(|thread| {
            let (addrs, orders) = (addrs.clone(), orders.clone());
            thread::spawn(move || {
                let mut chance = 0x9e37_79b9_u64.wrapping_mul(thread as u64 + 1);
                let mut next = move |below: usize| {
                    chance = chance
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407);
                    (chance >> 33) as usize % below
                };
                for _ in 0..400 {
                    let Ok(mut stream) =
                        TcpStream::connect_timeout(&addrs[next(addrs.len())], PATIENCE)
                    else {
                        continue;
                    };
                    // It may have ended already.
                    let _ = stream.write_all(orders[next(orders.len())]);
                    if next(2) == 0 {
                        let _ = stream.shutdown(Shutdown::Write);
                        let _ = stream.set_read_timeout(Some(Duration::from_millis(20)));
                        let _ = std::io::Read::read(&mut stream, &mut [0; 64]);
                    }
                }
            })
        })
        .collect();
    let mut cap = CAP;
    while !clients.iter().all(thread::JoinHandle::is_finished) {
        cap = if cap == CAP { CAP / 3 } else { CAP };
        shards.handle.set_max_connections(cap).expect("they run");
        thread::park_timeout(Duration::from_millis(5));
    }
    for client in clients {
        client.join().expect("no panic");
    }
    shards.handle.set_max_connections(CAP).expect("they run");
    eventually("all have gone", || shards.handle.stats().open == 0);
    let free = format!("free: {CAP},");
    eventually("all places are free", || {
        format!("{:?}", shards.handle).contains(&free)
    });
    // A place may be free before its shard counts its connection as ended.
    eventually("all are counted", || {
        let stats = shards.handle.stats();
        stats.open == 0 && stats.accepted + stats.outgoing == stats.closed_total()
    });
    let stats = shards.handle.stats();
    assert!(stats.outgoing > 0 && stats.panics > 0, "{stats:?}");
    shards
        .handle
        .drain(Duration::from_secs(1))
        .expect("they run");
    shards.join().expect("no error");
}
