//! One WebSocket: messages out of fragments, pings and closes, the echo and the chat room.

use std::time::Duration;

use portcullis::{Close, CloseReason, Closed, Context, FrameError, Handler, Outcome};

use crate::frames::{frame, Frames, Header, Opcode, Violation};
use crate::App;

/// The server's pings: proxies on the way forget silent connections.
const PING_EVERY: Duration = Duration::from_secs(30);
const PING: u8 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    Echo,
    Chat,
}

pub struct Session {
    place: Place,
    /// The kind of the message that has begun, and its fragments.
    opcode: Opcode,
    message: Vec<u8>,
    /// The server has sent its close frame, behind which it sends nothing (section 5.5.1).
    has_closed: bool,
}

impl Session {
    pub fn begin(cx: &mut Context<'_, App>, place: Place) -> Self {
        if place == Place::Chat {
            cx.app.room.insert(cx.conn.id());
        }
        cx.conn.set_timer(PING, PING_EVERY);
        Self {
            place,
            opcode: Opcode::Text,
            message: Vec::new(),
            has_closed: false,
        }
    }

    fn add(&mut self, cx: &mut Context<'_, App>, header: Header, fragment: &[u8]) -> Outcome {
        if header.opcode != Opcode::Continuation {
            self.opcode = header.opcode;
        }
        if self.message.is_empty() && header.fin {
            return self.deliver(cx, fragment);
        }
        if self.message.len() + fragment.len() > cx.app.max_message {
            return self.fail(cx, Violation::TOO_BIG);
        }
        self.message.extend_from_slice(fragment);
        if header.fin {
            let message = std::mem::take(&mut self.message);
            self.deliver(cx, &message)?;
        }
        Ok(())
    }

    fn deliver(&mut self, cx: &mut Context<'_, App>, message: &[u8]) -> Outcome {
        if self.opcode == Opcode::Text && std::str::from_utf8(message).is_err() {
            return self.fail(cx, Violation::NOT_UTF8);
        }
        let frame = frame(self.opcode, message);
        if self.place == Place::Echo {
            cx.conn.send(frame)?;
            return Ok(());
        }
        let all = cx.conn.broadcast(cx.app.room.iter().copied(), frame);
        for (member, error) in all.refused {
            if let Some(mut member) = cx.conn.peer(member) {
                // Too slow for the room.
                member.end(error.into());
            }
        }
        Ok(())
    }

    /// Closes because of a message that its frames alone did not give away.
    fn fail(&mut self, cx: &mut Context<'_, App>, violation: Violation) -> Outcome {
        self.say_goodbye(cx, violation.code, violation.to_string())?;
        Err(violation.into())
    }

    /// Sends the close frame, once.
    fn say_goodbye(
        &mut self,
        cx: &mut Context<'_, App>,
        code: u16,
        reason: impl AsRef<[u8]>,
    ) -> Outcome {
        // No message of another member follows.
        cx.app.room.remove(&cx.conn.id());
        if !std::mem::replace(&mut self.has_closed, true) {
            let payload = [&code.to_be_bytes()[..], reason.as_ref()].concat();
            cx.conn.send(frame(Opcode::Close, &payload))?;
        }
        Ok(())
    }

    /// Section 7: the close frame comes back, then the server closes first.
    fn close(&mut self, cx: &mut Context<'_, App>, payload: &[u8]) -> Outcome {
        let code = match payload {
            [] => None,
            [high, low, reason @ ..] => {
                let code = u16::from_be_bytes([*high, *low]);
                if !matches!(code, 1000..=1003 | 1007..=1014 | 3000..=4999) {
                    return self.fail(cx, Violation::protocol("a close code that does not exist"));
                }
                if std::str::from_utf8(reason).is_err() {
                    return self.fail(cx, Violation::NOT_UTF8);
                }
                Some(code.to_be_bytes())
            }
            _ => return self.fail(cx, Violation::protocol("half a close code")),
        };
        if !self.has_closed {
            let code = code.as_ref().map_or(&[][..], |code| code);
            cx.conn.send(frame(Opcode::Close, code))?;
        }
        Err(Close::new())
    }
}

impl Handler<App> for Session {
    fn on_frame(&mut self, cx: &mut Context<'_, App>, payload: &[u8]) -> Outcome {
        // The framer has just parsed and unmasked it.
        let Some(header) = cx.conn.framer::<Frames>().and_then(|frames| frames.header) else {
            return Ok(());
        };
        match header.opcode {
            Opcode::Close => self.close(cx, payload),
            _ if self.has_closed => Ok(()),
            Opcode::Ping => {
                cx.conn.send(frame(Opcode::Pong, payload))?;
                Ok(())
            }
            Opcode::Pong => Ok(()),
            _ => self.add(cx, header, payload),
        }
    }

    fn on_timer(&mut self, cx: &mut Context<'_, App>, _: u8) -> Outcome {
        if self.has_closed {
            return Ok(());
        }
        cx.conn.send(frame(Opcode::Ping, b""))?;
        cx.conn.set_timer(PING, PING_EVERY);
        Ok(())
    }

    /// The close says which rule was broken (section 7.4.1).
    fn on_bad_input(&mut self, cx: &mut Context<'_, App>, closed: &Closed) -> Outcome {
        let error = closed
            .error
            .as_deref()
            .and_then(|error| error.downcast_ref());
        let cause =
            error.and_then(|error: &FrameError| error.get_ref().downcast_ref::<Violation>());
        let violation = match closed.reason {
            CloseReason::FrameTooLarge => Some(&Violation::TOO_BIG),
            _ => cause,
        };
        match violation {
            Some(violation) => self.say_goodbye(cx, violation.code, violation.to_string()),
            None => Ok(()),
        }
    }

    /// 1001, going away: the client's close frame comes back, or the drain ends.
    fn on_drain(&mut self, cx: &mut Context<'_, App>) -> Outcome {
        self.say_goodbye(cx, 1001, "")
    }

    fn on_close(&mut self, cx: &mut Context<'_, App>, _: &Closed) {
        cx.app.room.remove(&cx.conn.id());
    }
}
