//! The opening handshake: an HTTP request, and the answer that makes it a WebSocket (section 4.2).

use std::time::Duration;

use base64::prelude::{Engine, BASE64_STANDARD};
use httparse::{Request, EMPTY_HEADER};
use portcullis::{
    Close, CloseReason, Closed, Context, Decoded, FrameError, Framer, Framing, Handler, Outcome,
};
use sha1::{Digest, Sha1};

use crate::frames::Frames;
use crate::session::{Place, Session};
use crate::App;

/// Maximum length of a request's head.
pub const MAX_HEAD: usize = 8 * 1024;
const MAX_HEADERS: usize = 64;
/// Of section 1.3.
const GUID: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
/// Without a byte for this long, a client that has not answered a ping is gone.
const SILENCE: Duration = Duration::from_secs(75);

const PAGE: &str = include_str!("page.html");

/// Cuts the head of a request off the stream, up to its empty line.
#[derive(Default)]
pub struct Head {
    /// Number of bytes that were searched.
    searched: usize,
}

impl Framer for Head {
    fn decode(&mut self, input: &[u8]) -> Result<Decoded, FrameError> {
        const END: &[u8] = b"\r\n\r\n";
        let new = input.get(self.searched..).unwrap_or_default();
        let Some(at) = new.windows(END.len()).position(|bytes| bytes == END) else {
            self.searched = input.len().saturating_sub(END.len() - 1);
            return Ok(Decoded::More);
        };
        let end = self.searched + at + END.len();
        self.searched = 0;
        Ok(Decoded::Frame {
            payload: 0..end,
            consumed: end,
        })
    }
}

/// A connection that has not become a WebSocket yet.
pub struct Upgrade;

impl Handler<App> for Upgrade {
    fn on_frame(&mut self, cx: &mut Context<'_, App>, head: &[u8]) -> Outcome {
        match answer(head) {
            Ok((key, place)) => {
                cx.conn.send(format!(
                    "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: \
                     Upgrade\r\nSec-WebSocket-Accept: {}\r\n\r\n",
                    accept(key)
                ))?;
                let max = cx.app.max_message;
                cx.conn.reconfigure(|conn| {
                    conn.max_frame = Some(max);
                    conn.idle_timeout = SILENCE;
                })?;
                // Frames may stand behind the request already.
                cx.conn.set_framing(&Framing::custom(Frames::default));
                let session = Session::begin(cx, place);
                cx.conn.replace_handler(session);
                Ok(())
            }
            Err(Refusal::Page) => {
                cx.conn.send(response("200 OK", "text/html", PAGE))?;
                Err(Close::new())
            }
            Err(Refusal::Status(status)) => {
                cx.conn.send(response(status, "text/plain", status))?;
                Err(Close::because(status))
            }
        }
    }

    fn on_bad_input(&mut self, cx: &mut Context<'_, App>, closed: &Closed) -> Outcome {
        if closed.reason == CloseReason::FrameTooLarge {
            let status = "431 Request Header Fields Too Large";
            cx.conn.send(response(status, "text/plain", status))?;
        }
        Ok(())
    }
}

enum Refusal {
    /// It is a browser that wants to see something.
    Page,
    Status(&'static str),
}

/// Returns the client's key and where it wants to go.
fn answer(head: &[u8]) -> Result<(&[u8], Place), Refusal> {
    const BAD: Refusal = Refusal::Status("400 Bad Request");
    let mut headers = [EMPTY_HEADER; MAX_HEADERS];
    let mut request = Request::new(&mut headers);
    request.parse(head).map_err(|_| BAD)?;
    let header = |name: &str| {
        let mut all = request.headers.iter();
        all.find(|header| header.name.eq_ignore_ascii_case(name))
            .map(|header| header.value)
    };
    if (request.method, request.version) != (Some("GET"), Some(1)) {
        return Err(BAD);
    }
    let place = match request.path {
        Some("/") => Place::Echo,
        Some("/chat") => Place::Chat,
        _ => return Err(Refusal::Status("404 Not Found")),
    };
    if !has_token(header("Upgrade"), "websocket") {
        return match place {
            Place::Echo => Err(Refusal::Page),
            Place::Chat => Err(Refusal::Status("426 Upgrade Required")),
        };
    }
    if !has_token(header("Connection"), "upgrade") || header("Host").is_none() {
        return Err(BAD);
    }
    if header("Sec-WebSocket-Version") != Some(b"13") {
        return Err(Refusal::Status("426 Upgrade Required"));
    }
    let key = header("Sec-WebSocket-Key").ok_or(BAD)?;
    match BASE64_STANDARD.decode(key) {
        Ok(nonce) if nonce.len() == 16 => Ok((key, place)),
        _ => Err(BAD),
    }
}

fn has_token(list: Option<&[u8]>, token: &str) -> bool {
    let list = list.unwrap_or_default().split(|&byte| byte == b',');
    list.map(<[u8]>::trim_ascii)
        .any(|item| item.eq_ignore_ascii_case(token.as_bytes()))
}

fn accept(key: &[u8]) -> String {
    let digest = Sha1::new().chain_update(key).chain_update(GUID).finalize();
    BASE64_STANDARD.encode(digest)
}

fn response(status: &str, kind: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}; charset=utf-8\r\nContent-Length: \
         {length}\r\nSec-WebSocket-Version: 13\r\nConnection: close\r\n\r\n{body}"
    )
}
