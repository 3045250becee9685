//! Bytes and frames of each listener: they move while connections live, and never go down.

use std::net::SocketAddr;
use std::time::Duration;

use kit::net::{local, Echo};
use portcullis::sim::{ClientId, Sim};
use portcullis::{Config, ConnId, Context, Handler, Listen, Outcome, Traffic};

/// Sends each frame to all connections of the other listener.
struct Relay {
    is_first: bool,
}

type Members = Vec<(bool, ConnId)>;

impl Handler<Members> for Relay {
    fn on_open(&mut self, cx: &mut Context<'_, Members>) -> Outcome {
        cx.app.push((self.is_first, cx.conn.id()));
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, Members>, frame: &[u8]) -> Outcome {
        for (is_first, id) in cx.app.iter() {
            if *is_first == self.is_first {
                continue;
            }
            if let Some(mut conn) = cx.conn.control().conn(*id) {
                conn.send(frame)?;
            }
        }
        Ok(())
    }
}

fn named(name: &str) -> Listen {
    local().name(name)
}

fn traffic<A>(sim: &mut Sim<A>, name: &str) -> Traffic {
    sim.control().listener(name).expect("it is there").traffic
}

fn numbers(traffic: &Traffic) -> [u64; 4] {
    let Traffic {
        bytes_in,
        bytes_out,
        frames_in,
        frames_out,
        ..
    } = *traffic;
    [bytes_in, bytes_out, frames_in, frames_out]
}

/// No number of it goes down.
fn grows(before: &Traffic, after: &Traffic) -> bool {
    let pairs = numbers(before).into_iter().zip(numbers(after));
    pairs.into_iter().all(|(before, after)| before <= after)
}

#[test]
fn counters_move_while_a_connection_lives_and_stay_when_it_ends() {
    let mut sim = Sim::new(3, Config::new(), ());
    let addr = sim
        .listen(named("echo"), |_: &mut (), _| Echo)
        .expect("listen");
    let client = sim.connect(addr).expect("a listener");
    let mut before = traffic(&mut sim, "echo");
    for round in 1..=5 {
        sim.send(client, b"\0\x03abc");
        sim.advance(Duration::from_secs(15));
        let now = traffic(&mut sim, "echo");
        assert_eq!(numbers(&now), [5 * round, 5 * round, round, round]);
        let info = &sim.control().connections()[0];
        assert_eq!(info.traffic, now);
        before = now;
    }
    let text = sim.control().metrics().to_string();
    assert!(text.contains("portcullis_listener_bytes_in_total{listener=\"echo\"} 25\n"));
    sim.finish(client);
    sim.settle();
    assert_eq!(sim.stats().open, 0);
    assert_eq!(traffic(&mut sim, "echo"), before);
}

/// Traffic is the listener's whose connection has it, whatever callback causes it.
#[test]
fn what_is_sent_to_a_connection_counts_for_its_listener() {
    let mut sim: Sim<Members> = Sim::new(4, Config::new(), Vec::new());
    let mut addrs: Vec<SocketAddr> = Vec::new();
    for (name, is_first) in [("one", true), ("two", false)] {
        let added = sim.listen(named(name), move |_: &mut Members, _| Relay { is_first });
        addrs.push(added.expect("listen"));
    }
    let connect = |sim: &mut Sim<Members>, at: usize| -> ClientId {
        let client = sim.connect(addrs[at]).expect("a listener");
        sim.settle();
        client
    };
    let (first, second) = (connect(&mut sim, 0), connect(&mut sim, 1));
    let third = connect(&mut sim, 1);
    // The input is the one's, the output the other's.
    let mut before = [traffic(&mut sim, "one"), traffic(&mut sim, "two")];
    for (from, frames) in [
        (first, &b"\0\x01a\0\x01b"[..]),
        (second, b"\0\x03abc"),
        (first, b"\0\x01c"),
    ] {
        sim.send(from, frames);
        sim.settle();
        let now = [traffic(&mut sim, "one"), traffic(&mut sim, "two")];
        assert!(grows(&before[0], &now[0]) && grows(&before[1], &now[1]));
        before = now;
    }
    assert_eq!(numbers(&before[0]), [9, 5, 3, 1]);
    assert_eq!(numbers(&before[1]), [5, 18, 1, 6]);
    sim.reset(second);
    sim.finish(third);
    sim.settle();
    let after = [traffic(&mut sim, "one"), traffic(&mut sim, "two")];
    assert_eq!(after, before);
    // A command sends outside of a turn.
    let (handle, target) = (sim.handle(), sim.app()[0].1);
    handle.send(target, b"xyz").expect("queued");
    sim.settle();
    assert_eq!(numbers(&traffic(&mut sim, "one")), [9, 10, 3, 2]);
    assert_eq!(traffic(&mut sim, "two"), before[1]);
    let (one, two) = (traffic(&mut sim, "one"), traffic(&mut sim, "two"));
    let mut sum = numbers(&one);
    for (sum, more) in sum.iter_mut().zip(numbers(&two)) {
        *sum += more;
    }
    assert_eq!(sum, numbers(&sim.stats().traffic));
}
