//! A connection that closes once everything is answered, while answers come from elsewhere.

use portcullis::sim::{ClientState, Sim};
use portcullis::{Config, ConnId, Context, Framing, Handler, Listen, Message, Outcome};

/// Is asked to close while an answer is still to come, and pauses until it does.
struct Slow;

impl Handler<Option<ConnId>> for Slow {
    fn on_open(&mut self, cx: &mut Context<'_, Option<ConnId>>) -> Outcome {
        *cx.app = Some(cx.conn.id());
        cx.conn.hold();
        cx.conn.close_after_input();
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, Option<ConnId>>, line: &[u8]) -> Outcome {
        cx.conn.send(line)?;
        if line == b"wait\n" {
            cx.conn.pause();
        }
        Ok(())
    }

    fn on_message(&mut self, cx: &mut Context<'_, Option<ConnId>>, _: Message) -> Outcome {
        cx.conn.release();
        cx.conn.resume();
        Ok(())
    }
}

/// What came while it was paused is answered, although nothing was left to read before.
#[test]
fn what_came_meanwhile_is_answered_before_the_close() {
    let mut sim = Sim::new(1, Config::new(), None);
    let listen = Listen::tcp("127.0.0.1:0", Framing::Line);
    let addr = sim
        .listen(listen, |_: &mut Option<ConnId>, _| Slow)
        .expect("listen");
    let client = sim.connect(addr).expect("it listens");
    sim.settle();
    assert_eq!(
        sim.state(client),
        ClientState::Connected,
        "an answer is to come"
    );
    sim.send(client, b"wait\n");
    sim.settle();
    sim.send(client, b"meanwhile\n");
    sim.settle();
    assert_eq!(sim.received(client), b"wait\n");
    let id = sim.app().expect("it is open");
    sim.handle().notify(id, ()).expect("it runs");
    sim.settle();
    assert_eq!(sim.received(client), b"meanwhile\n");
    assert_ne!(sim.state(client), ClientState::Connected);
}
