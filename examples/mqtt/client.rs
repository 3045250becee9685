//! The handler of one connection.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use portcullis::{Close, Closed, Context, Handler, Outcome};

use crate::broker::Broker;
use crate::packet::{
    ack, connack, pingresp, suback, Connect, ConnectCode, Packet, Publish, Qos, Violation, PUBACK,
    PUBCOMP, PUBREC, UNSUBACK,
};

/// The timer that ends a pause.
const RESUME: u8 = 0;
/// The timer that ends a connection without CONNECT.
const TOO_LATE: u8 = 1;
/// The work of messages after which other connections get their turns: a few milliseconds.
const MAX_WORK: usize = 32 * 1024;

#[derive(Default)]
pub struct Client {
    /// The client's identifier, from CONNECT on.
    id: Option<Rc<str>>,
    /// The work of its messages since the last pause.
    work: usize,
}

impl Handler<Broker> for Client {
    fn on_open(&mut self, cx: &mut Context<'_, Broker>) -> Outcome {
        cx.conn.set_timer(TOO_LATE, cx.app.connect_timeout());
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, Broker>, frame: &[u8]) -> Outcome {
        let outcome = self.handle(cx, frame);
        if outcome.is_err() {
            // At once: `on_close` comes when the peer has finished too.
            self.leave(cx);
        }
        outcome
    }

    /// Section 4.8: the close is the answer, without a packet. The will is published at once.
    fn on_bad_input(&mut self, cx: &mut Context<'_, Broker>, _: &Closed) -> Outcome {
        self.leave(cx);
        Ok(())
    }

    fn on_writable(&mut self, cx: &mut Context<'_, Broker>) -> Outcome {
        if let Some(id) = &self.id {
            cx.app.flush(&mut cx.conn, id);
        }
        Ok(())
    }

    fn on_timer(&mut self, cx: &mut Context<'_, Broker>, key: u8) -> Outcome {
        if key == TOO_LATE {
            return Err(Close::because("no CONNECT in time"));
        }
        cx.conn.resume();
        Ok(())
    }

    fn on_close(&mut self, cx: &mut Context<'_, Broker>, _: &Closed) {
        self.leave(cx);
    }
}

impl Client {
    fn handle(&mut self, cx: &mut Context<'_, Broker>, frame: &[u8]) -> Outcome {
        let packet = Packet::parse(frame)?;
        let Some(id) = &self.id else {
            return self.handle_first(cx, &packet);
        };
        match packet {
            Packet::Connect(_) | Packet::OtherVersion => {
                return Err(Violation("a second CONNECT").into())
            }
            Packet::Publish(publish) => {
                self.work += handle_publish(cx, id, &publish)?;
                if self.work >= MAX_WORK {
                    self.work = 0;
                    pause(cx);
                }
            }
            Packet::PubAck(acknowledged) => {
                if let Some(session) = cx.app.session(id) {
                    session.acknowledge(acknowledged);
                }
                cx.app.flush(&mut cx.conn, id);
            }
            Packet::PubRel(released) => {
                if let Some(session) = cx.app.session(id) {
                    session.unreleased.remove(&released);
                }
                cx.conn.send(ack(PUBCOMP, released))?;
            }
            Packet::Subscribe(packet, filters) => handle_subscribe(cx, id, packet, &filters)?,
            Packet::Unsubscribe(packet, filters) => {
                for filter in filters {
                    cx.app.unsubscribe(id, filter);
                }
                cx.conn.send(ack(UNSUBACK, packet))?;
            }
            Packet::PingReq => cx.conn.send(pingresp())?,
            Packet::Disconnect => {
                if let Some(session) = cx.app.session(id) {
                    session.will = None;
                }
                return Err(Close::new());
            }
        }
        Ok(())
    }

    fn handle_first(&mut self, cx: &mut Context<'_, Broker>, packet: &Packet<'_>) -> Outcome {
        let result = match packet {
            Packet::Connect(connect) => {
                cx.conn.cancel_timer(TOO_LATE);
                set_keep_alive(cx, connect)?;
                cx.app.connect(&mut cx.conn, connect)
            }
            Packet::OtherVersion => Err(ConnectCode::UnacceptableVersion),
            _ => return Err(Violation("the first packet is not CONNECT").into()),
        };
        match result {
            Ok((id, is_present)) => {
                self.id = Some(Rc::clone(&id));
                let accepted = connack(is_present, ConnectCode::Accepted);
                cx.conn.send(accepted)?;
                cx.app.flush(&mut cx.conn, &id);
                Ok(())
            }
            Err(code) => {
                cx.conn.send(connack(false, code))?;
                let label = match code {
                    ConnectCode::BadUserOrPassword | ConnectCode::NotAuthorized => "not_authorised",
                    _ => "refused",
                };
                Err(Close::because(format!("refused: {code:?}")).labelled(label))
            }
        }
    }

    fn leave(&mut self, cx: &mut Context<'_, Broker>) {
        if let Some(id) = self.id.take() {
            cx.app.leave(&mut cx.conn, &id);
        }
    }
}

/// Until the next iteration: other connections get their turns before the next packet.
fn pause(cx: &mut Context<'_, Broker>) {
    cx.conn.pause();
    cx.conn.set_timer(RESUME, Duration::ZERO);
}

/// One and a half times what the client has announced (section 3.1.2.10).
fn set_keep_alive(cx: &mut Context<'_, Broker>, connect: &Connect<'_>) -> Outcome {
    let timeout = match connect.keep_alive {
        0 => Duration::MAX,
        seconds => Duration::from_secs(seconds.into()) * 3 / 2,
    };
    cx.conn.reconfigure(|conn| conn.idle_timeout = timeout)?;
    Ok(())
}

/// Returns the work of the message.
fn handle_publish(
    cx: &mut Context<'_, Broker>,
    client: &Rc<str>,
    publish: &Publish<'_>,
) -> Result<usize, Close> {
    let (work, answer) = match publish.qos {
        Qos::AtMostOnce => return Ok(cx.app.publish(&mut cx.conn, publish)),
        Qos::AtLeastOnce => (cx.app.publish(&mut cx.conn, publish), PUBACK),
        Qos::ExactlyOnce => {
            let work = cx.app.publish_once(&mut cx.conn, client, publish)?;
            (work, PUBREC)
        }
    };
    cx.conn.send(ack(answer, publish.id))?;
    Ok(work)
}

fn handle_subscribe(
    cx: &mut Context<'_, Broker>,
    client: &Rc<str>,
    packet: u16,
    filters: &[(&str, Qos)],
) -> Outcome {
    let granted: Vec<_> = filters
        .iter()
        .map(|(filter, qos)| cx.app.subscribe(client, filter, *qos))
        .collect();
    cx.conn.send(suback(packet, &granted))?;
    // Each filter once, however often the packet has it.
    let filters = filters.iter().map(|(filter, _)| filter);
    let distinct: BTreeMap<_, _> = filters.zip(granted).collect();
    for (filter, granted) in distinct {
        if let Some(granted) = granted {
            cx.app.send_retained(&mut cx.conn, client, filter, granted);
        }
    }
    // The search may be long.
    pause(cx);
    Ok(())
}
