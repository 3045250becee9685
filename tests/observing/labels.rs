//! The label of a close, everywhere that the close shows.

use std::net::SocketAddr;
use std::time::Duration;

use kit::exposition::Exposition;
use portcullis::sim::{ClientId, Sim};
use portcullis::{
    Close, CloseReason, Closed, Config, Context, Framing, Handler, Listen, Message, Outcome,
};

const ODD: &str = "a \"b\" \\c\nd é";

#[derive(Default)]
struct App {
    closed: Vec<(CloseReason, Option<&'static str>)>,
}

/// Ends as its first line says.
struct Obedient;

impl Handler<App> for Obedient {
    fn on_frame(&mut self, cx: &mut Context<'_, App>, line: &[u8]) -> Outcome {
        match line.trim_ascii_end() {
            b"fail" => return Err(Close::because("no such user").labelled("not_authorised")),
            b"plain" => return Err(Close::because("no such user")),
            b"quit" => return Err(Close::new().labelled("quit")),
            b"cut" => return Err(Close::abort().labelled("quit")),
            b"odd" => return Err(Close::because("odd").labelled(ODD)),
            b"empty" => return Err(Close::because("odd").labelled("")),
            b"lose" => {
                cx.conn.send(vec![0; 1_000_000])?;
                return Err(Close::new().labelled("quit"));
            }
            b"flood" => loop {
                let sent = cx.conn.send(vec![0; 1_000_000]);
                sent.map_err(|error| Close::from(error).labelled("flood"))?;
            },
            b"end" => cx
                .conn
                .end(Close::because("seen elsewhere").labelled("taken_over")),
            b"last" => {
                cx.conn.notify("last words")?;
                cx.conn
                    .end(Close::because("seen elsewhere").labelled("taken_over"));
            }
            _ => cx.conn.send("what?\n")?,
        }
        Ok(())
    }

    fn on_message(&mut self, cx: &mut Context<'_, App>, _: Message) -> Outcome {
        cx.conn.send("last words\n")?;
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_, App>, closed: &Closed) {
        cx.app.closed.push((closed.reason, closed.label));
    }
}

fn listen(name: &str) -> Listen {
    Listen::tcp("127.0.0.1:0", Framing::Line).name(name)
}

fn world() -> (Sim<App>, [SocketAddr; 2]) {
    let mut sim = Sim::new(5, Config::new(), App::default());
    let addrs = ["one", "two"].map(|name| {
        let addr = sim.listen(listen(name), |_: &mut App, _| Obedient);
        addr.expect("a listener")
    });
    (sim, addrs)
}

fn end(sim: &mut Sim<App>, addr: SocketAddr, line: &str) -> ClientId {
    let client = sim.connect(addr).expect("a listener");
    sim.send(client, format!("{line}\n").as_bytes());
    sim.finish(client);
    sim.settle();
    client
}

#[test]
fn each_kind_of_close_keeps_its_label() {
    let (mut sim, [addr, _]) = world();
    let ends = [
        ("fail", CloseReason::Failed, Some("not_authorised")),
        ("plain", CloseReason::Failed, None),
        ("quit", CloseReason::Closed, Some("quit")),
        ("cut", CloseReason::Aborted, Some("quit")),
        ("odd", CloseReason::Failed, Some(ODD)),
        ("empty", CloseReason::Failed, None),
        ("end", CloseReason::Failed, Some("taken_over")),
        ("last", CloseReason::Failed, Some("taken_over")),
        ("flood", CloseReason::SlowConsumer, Some("flood")),
        ("hello", CloseReason::Finished, None),
    ];
    for (line, reason, label) in ends {
        let client = end(&mut sim, addr, line);
        sim.advance(Duration::from_secs(120));
        assert_eq!(sim.app().closed.last(), Some(&(reason, label)), "{line}");
        let close = &sim.control().recent_closes()[0];
        assert_eq!((close.reason, close.label), (reason, label), "{line}");
        if line == "last" {
            assert_eq!(sim.received(client), b"last words\n");
            let text = close.to_string();
            assert!(
                text.ends_with("handler failed (taken_over): seen elsewhere"),
                "{text}"
            );
        }
    }
    assert_eq!(sim.app().closed.len(), ends.len());
}

/// The reason changes, because output is lost.
#[test]
fn a_label_stays_if_output_is_lost() {
    let (mut sim, [addr, _]) = world();
    let client = sim.connect(addr).expect("a listener");
    sim.set_reading(client, false);
    sim.send(client, b"lose\n");
    sim.advance(Duration::from_secs(120));
    let closed = (CloseReason::WriteTimeout, Some("quit"));
    assert_eq!(sim.app().closed, [closed]);
}

#[test]
fn metrics_count_each_label_apart() {
    let (mut sim, [one, two]) = world();
    for (addr, line, times) in [
        (one, "fail", 3),
        (one, "plain", 2),
        (one, "quit", 1),
        (two, "end", 4),
        (two, "odd", 1),
    ] {
        for _ in 0..times {
            end(&mut sim, addr, line);
        }
    }
    let stats = sim.stats();
    assert_eq!(stats.closed(CloseReason::Failed), 10);
    let labels: Vec<_> = stats.closed_labels(CloseReason::Failed).collect();
    assert_eq!(labels, [(ODD, 1), ("not_authorised", 3), ("taken_over", 4)]);
    assert_eq!(stats.closed_labels(CloseReason::Killed).count(), 0);

    let text = sim.control().metrics().to_string();
    let read = Exposition::read(&text);
    let (name, of_listener) = (
        "portcullis_closed_total",
        "portcullis_listener_closed_total",
    );
    // A sum over the labels is the number of all.
    assert_eq!(read.sum(name), stats.closed_total() as f64);
    assert_eq!(read.sum(of_listener), stats.closed_total() as f64);
    let failed = ("reason", "failed");
    assert_eq!(read.get(name, &[failed]), 2.0);
    assert_eq!(read.get(name, &[failed, ("cause", "taken_over")]), 4.0);
    assert_eq!(read.get(name, &[failed, ("cause", ODD)]), 1.0);
    assert_eq!(
        read.get(name, &[("reason", "closed"), ("cause", "quit")]),
        1.0
    );
    let one = ("listener", "one");
    assert_eq!(read.get(of_listener, &[one, failed]), 2.0);
    let labels = [one, failed, ("cause", "not_authorised")];
    assert_eq!(read.get(of_listener, &labels), 3.0);
    let labels = [("listener", "two"), failed, ("cause", ODD)];
    assert_eq!(read.get(of_listener, &labels), 1.0);
    // A handle sees what was published.
    assert_eq!(sim.handle().stats(), sim.stats());
}
