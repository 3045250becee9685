//! What a handler and its owner see, in the simulator.

use std::io::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use super::{Context, Handler, Message};
use crate::config::{Config, Connect, Listen, Retry};
use crate::error::Error;
use crate::proto::{Decoded, FrameBuf, FrameError, Framer, Framing};
use crate::reason::{Close, CloseReason, Closed, Outcome};
use crate::sim::Sim;

type Words = Vec<String>;

/// Notes its callbacks.
struct Probe;

impl Probe {
    fn note(cx: &mut Context<'_, Words>, name: &str) -> Outcome {
        cx.app.push(name.to_owned());
        Ok(())
    }
}

impl Handler<Words> for Probe {
    fn on_open(&mut self, cx: &mut Context<'_, Words>) -> Outcome {
        Self::note(cx, "open")
    }
    fn on_secured(&mut self, cx: &mut Context<'_, Words>) -> Outcome {
        Self::note(cx, "secured")
    }
    fn on_frame(&mut self, cx: &mut Context<'_, Words>, _: &[u8]) -> Outcome {
        Self::note(cx, "frame")
    }
    fn on_bad_input(&mut self, cx: &mut Context<'_, Words>, _: &Closed) -> Outcome {
        Self::note(cx, "bad input")
    }
    fn on_finish(&mut self, cx: &mut Context<'_, Words>) -> Outcome {
        Self::note(cx, "finish")
    }
    fn on_writable(&mut self, cx: &mut Context<'_, Words>) -> Outcome {
        Self::note(cx, "writable")
    }
    fn on_flushed(&mut self, cx: &mut Context<'_, Words>) -> Outcome {
        Self::note(cx, "flushed")
    }
    fn on_timer(&mut self, cx: &mut Context<'_, Words>, _: u8) -> Outcome {
        Self::note(cx, "timer")
    }
    fn on_message(&mut self, cx: &mut Context<'_, Words>, _: Message) -> Outcome {
        Self::note(cx, "message")
    }
    fn on_drain(&mut self, cx: &mut Context<'_, Words>) -> Outcome {
        Self::note(cx, "drain")
    }
    fn on_close(&mut self, cx: &mut Context<'_, Words>, _: &Closed) {
        let _ = Self::note(cx, "close");
    }
    fn on_connect_failed(&mut self, cx: &mut Context<'_, Words>, _: &Closed) {
        let _ = Self::note(cx, "connect failed");
    }
}

fn call_all<H: Handler<Words>>(handler: &mut H, cx: &mut Context<'_, Words>) -> Outcome {
    let closed = Closed::new(CloseReason::Finished);
    handler.on_open(cx)?;
    handler.on_secured(cx)?;
    handler.on_frame(cx, b"")?;
    handler.on_bad_input(cx, &closed)?;
    handler.on_finish(cx)?;
    handler.on_writable(cx)?;
    handler.on_flushed(cx)?;
    handler.on_timer(cx, 0)?;
    handler.on_message(cx, Box::new(()))?;
    handler.on_drain(cx)?;
    handler.on_close(cx, &closed);
    handler.on_connect_failed(cx, &closed);
    Ok(())
}

/// Does something with the context of each frame.
struct On(fn(&mut Context<'_, Words>));

impl Handler<Words> for On {
    fn on_frame(&mut self, cx: &mut Context<'_, Words>, _: &[u8]) -> Outcome {
        (self.0)(cx);
        Ok(())
    }
}

fn world(framing: Framing, on: fn(&mut Context<'_, Words>)) -> (Sim<Words>, SocketAddr) {
    let mut sim = Sim::new(1, Config::new(), Words::new());
    let listen = Listen::tcp("127.0.0.1:0", framing);
    let addr = sim.listen(listen, move |_: &mut Words, _| On(on));
    (sim, addr.expect("a listener"))
}

fn after_one_frame(framing: Framing, on: fn(&mut Context<'_, Words>)) -> Words {
    let (mut sim, addr) = world(framing, on);
    let client = sim.connect(addr).expect("a listener");
    sim.send(client, b"secret\n");
    sim.settle();
    sim.app().clone()
}

/// A method that `Box` left out would be the default one.
#[test]
fn a_box_passes_every_callback_on() {
    let called = after_one_frame(Framing::Line, |cx| {
        call_all(&mut Probe, cx).expect("noted");
        let boxed: &mut Box<dyn Handler<Words>> = &mut (Box::new(Probe) as _);
        call_all(boxed, cx).expect("noted");
    });
    let (direct, boxed) = called.split_at(called.len() / 2);
    assert_eq!(direct.len(), 12);
    assert_eq!(direct, boxed);
}

/// What is printed in logs has no data of a peer.
#[test]
fn a_context_is_shown_without_payload() {
    let shown = after_one_frame(Framing::Line, |cx| {
        let context = format!("{cx:?}");
        let control = format!("{:?}", cx.conn.control());
        cx.app.extend([context, control]);
    });
    let id = "ConnId(0.1 of server ";
    assert!(shown[0].contains(id), "{}", shown[0]);
    assert!(shown[0].contains("state: Open"), "{}", shown[0]);
    assert_eq!(shown[1], "Control { .. }");
    assert!(!shown.concat().contains("secret"));
}

/// Frames are lines, which it unpacks as they are. Counts them.
struct Lines {
    seen: usize,
}

impl Framer for Lines {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
        let Some(end) = input.iter().position(|byte| *byte == b'\n') else {
            return Ok(Decoded::More);
        };
        self.seen += 1;
        Ok(Decoded::Packed {
            payload: 0..end,
            consumed: end + 1,
        })
    }
}

/// As [`Lines`], written in brackets. An empty one is an error with a cause.
struct Others;

impl Framer for Others {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
        match input {
            [b'\n', ..] => Err(FrameError::new(Error::os("a frame")(
                std::io::Error::other("no line"),
            ))),
            input => Lines { seen: 0 }.decode(input),
        }
    }

    fn unpack(&mut self, payload: &[u8], out: &mut FrameBuf<'_>) -> Result<(), FrameError> {
        let written = out.write(b"[").map_err(FrameError::new)?;
        assert_eq!(written, 1);
        out.write_all(payload).map_err(FrameError::new)?;
        write!(out, "]").map_err(FrameError::new)?;
        out.flush().map_err(FrameError::new)
    }
}

/// Echoes, and notes the cause of a bad frame, and what is refused at the end.
struct Ending;

impl Handler<Words> for Ending {
    fn on_frame(&mut self, cx: &mut Context<'_, Words>, frame: &[u8]) -> Outcome {
        cx.app.push(frame.escape_ascii().to_string());
        match frame {
            b"[label]" => Err(Close::new().labelled("asked")),
            _ => Ok(()),
        }
    }

    fn on_close(&mut self, cx: &mut Context<'_, Words>, closed: &Closed) {
        let error = closed.error.as_deref().and_then(|error| error.source());
        cx.app
            .push(error.map(ToString::to_string).unwrap_or_default());
        let refused = cx.conn.reconfigure(|conn| conn.max_frame = Some(1));
        cx.app.push(format!("{refused:?}"));
    }
}

/// A world in which a client has sent these lines, and gone.
fn after_lines(lines: &[u8]) -> Sim<Words> {
    let mut sim = Sim::new(1, Config::new(), Words::new());
    let listen = Listen::tcp("127.0.0.1:0", Framing::custom(|| Others));
    let addr = sim.listen(listen, |_: &mut Words, _| Ending);
    let client = sim.connect(addr.expect("a port")).expect("a listener");
    sim.send(client, lines);
    sim.finish(client);
    // The end lingers.
    sim.advance(Duration::from_secs(60));
    sim
}

#[test]
fn a_framer_writes_a_frame_as_to_a_file() {
    assert_eq!(after_lines(b"one\ntwo\n").app()[..2], ["[one]", "[two]"]);
}

#[test]
fn a_bad_frame_keeps_its_cause() {
    let sim = after_lines(b"one\n\n");
    assert_eq!(sim.app()[..2], ["[one]", "no line"]);
    assert_eq!(sim.stats().closed(CloseReason::BadFrame), 1);
}

#[test]
fn a_connection_that_ends_keeps_its_options() {
    let sim = after_lines(b"\n");
    assert!(sim.app()[1].contains("not open"), "{}", sim.app()[1]);
}

#[test]
fn a_listener_counts_the_labels_of_its_closes() {
    let mut sim = after_lines(b"label\n");
    let listeners = sim.control().listeners();
    let labels: Vec<_> = CloseReason::ALL
        .iter()
        .flat_map(|reason| listeners[0].closed_labels(*reason))
        .collect();
    assert_eq!(labels, [("asked", 1)]);
}

#[test]
fn a_handler_reaches_its_framer() {
    let seen = after_one_frame(Framing::custom(|| Lines { seen: 0 }), |cx| {
        let lines = cx.conn.framer::<Lines>().map(|lines| lines.seen);
        cx.app.push(format!("{lines:?}"));
        cx.app
            .push(cx.conn.framer::<Others>().is_some().to_string());
        cx.app.push(cx.conn.max_frame().to_string());
    });
    assert_eq!(seen[..2], ["Some(1)", "false"]);
    let without = after_one_frame(Framing::Line, |cx| {
        let lines = cx.conn.framer::<Lines>().is_some();
        cx.app.push(lines.to_string());
        cx.app.push(cx.conn.max_frame().to_string());
    });
    assert_eq!(without[0], "false");
    assert_eq!(without[1], seen[2], "the default maximum");
}

#[test]
fn a_handle_changes_the_cap_of_one_server() {
    let (mut sim, _) = world(Framing::Line, |_| ());
    sim.handle().set_max_connections(3).expect("queued");
    assert_ne!(sim.stats().max_connections, 3, "the loop changes it");
    sim.settle();
    assert_eq!(sim.stats().max_connections, 3);
}

#[test]
fn what_cannot_connect_is_refused_by_name() {
    let (mut sim, addr) = world(Framing::Line, |_| ());
    let retry = |change: fn(Retry) -> Retry| {
        Connect::new(Framing::Line).with(|options| options.retry = Some(change(Retry::new(3))))
    };
    for (options, words) in [
        (
            retry(|retry| retry.first_delay(Duration::ZERO)),
            "at least 1 ms",
        ),
        (
            retry(|retry| retry.longest_delay(Duration::from_millis(1))),
            "is below the first",
        ),
        (retry(|retry| retry.jitter(101)), "at most 100 percent"),
    ] {
        let refused = sim.control().connect(addr, options, Probe);
        let Err(Error::Option { option, problem }) = refused else {
            panic!("{refused:?} for {words}");
        };
        assert_eq!(option, "retry");
        assert!(problem.contains(words), "{problem}");
    }
    let bound = Connect::new(Framing::Line).with(|options| options.bind = Some(addr));
    let path = "unix:/run/a".to_owned();
    let refused = sim.control().connect(&path, bound, Probe);
    let error = refused.expect_err(&path);
    assert!(error.to_string().starts_with("option bind:"), "{error}");
    assert_eq!(sim.stats().outgoing, 0);
}

#[test]
fn a_name_that_breaks_lines_is_refused() {
    let (mut sim, _) = world(Framing::Line, |_| ());
    for (name, words) in [
        ("two\nlines", "no line feeds"),
        ("", "at least one character"),
    ] {
        let listen = Listen::tcp("127.0.0.1:0", Framing::Line)
            .with(|listen| listen.name = Some(name.to_owned()));
        let error = sim
            .listen(listen, |_: &mut Words, _| Probe)
            .expect_err("refused");
        assert!(error.to_string().contains(words), "{error}");
    }
}
