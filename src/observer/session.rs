//! One browser's connection: requests, answers in order, and events at the end.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use super::feed::{subscribe, SharedFeed};
use super::guard::{has_token, is_own_host, is_own_origin, MIN_TOKEN};
use super::http::{head, parameters, Method, Refusal, Request, HEAD_LIMIT, NOT_ALLOWED};
use super::ranking::{Query, SHOWN};
use super::waiting::{is_full, Waiting};
use crate::handler::{Context, Handler};
use crate::id::{ConnId, ListenerId};
use crate::metrics::Metrics;
use crate::reason::{Close, CloseReason, Closed, Outcome};

/// The page: one file, which names no other.
const PAGE: &str = include_str!("page.html");

/// Nothing runs in the page but its own script, and it talks to nothing but its own server. The
/// hashes are those of the script and the style in the page.
const CONTENT_SECURITY_POLICY: &str = concat!(
    "Content-Security-Policy: default-src 'none'; ",
    "script-src 'sha256-",
    include_str!("script.sha256"),
    "'; style-src 'sha256-",
    include_str!("style.sha256"),
    "'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; ",
    "frame-ancestors 'none'\r\n",
);

const TEXT: &str = "text/plain; charset=utf-8";
const HTML: &str = "text/html; charset=utf-8";
const JSON: &str = "application/json";
const EVENTS: &str = "text/event-stream";
const OK: &str = "200 OK";

/// The timer of a connection without a request.
const SILENCE: u8 = 0;
/// Browsers connect ahead of time, but not for long: a connection without a request has a slot that
/// an operator may need.
const MAX_SILENCE: Duration = Duration::from_secs(5);

/// What all connections of an observer share.
pub(super) struct Shared {
    pub(super) hosts: Vec<String>,
    pub(super) token: Option<String>,
    pub(super) feed: SharedFeed,
    pub(super) waiting: RefCell<Waiting>,
}

impl Shared {
    fn token(&self) -> Option<&str> {
        self.token.as_deref()
    }
}

/// The requests of one connection.
pub(super) struct Session {
    shared: Rc<Shared>,
    listener: ListenerId,
    /// Its last request was for the events, which do not end.
    follows: bool,
}

/// An answer with its content.
struct Answer<B> {
    status: &'static str,
    kind: &'static str,
    more: String,
    body: B,
}

impl Session {
    pub(super) fn new(shared: Rc<Shared>, listener: ListenerId) -> Self {
        Self {
            shared,
            listener,
            follows: false,
        }
    }

    /// No other client can come in while this connection stays: it is for a request with an end.
    fn has_last_slot<A>(&self, cx: &mut Context<'_, A>) -> bool {
        let id = cx.conn.id();
        let can_make_room = self.shared.waiting.borrow().has_other(id);
        !can_make_room && is_full(&cx.conn.control(), self.listener)
    }

    fn answer<A>(&mut self, cx: &mut Context<'_, A>, request: &Request<'_>) -> Outcome {
        let local = cx.conn.local_addr().ok().and_then(|addr| addr.ip());
        let is_own = |host| is_own_host(host, local, &self.shared.hosts);
        // Requests without a host come from programs: every browser sends one.
        if request.host.is_some_and(|host| !is_own(host)) {
            let text = "this host name is not allowed: see Observer::allow_host\n";
            return reply(cx, request, plain("421 Misdirected Request", text));
        }
        let can_kill = self.shared.token().is_some();
        match (request.path, request.method) {
            ("/kill", Method::Post) if can_kill => return self.kill(cx, request),
            ("/kill", _) if can_kill => return reply(cx, request, not_allowed("POST")),
            ("/" | "/events" | "/metrics" | "/tree.json" | "/healthz", method)
                if !matches!(method, Method::Get | Method::Head) =>
            {
                return reply(cx, request, not_allowed("GET, HEAD"));
            }
            _ => {}
        }
        match request.path {
            "/" => {
                let answer = Answer {
                    status: OK,
                    kind: HTML,
                    more: CONTENT_SECURITY_POLICY.to_owned(),
                    body: PAGE,
                };
                reply(cx, request, answer)
            }
            "/events" => self.follow(cx, request),
            "/metrics" => {
                let text = cx.conn.control().metrics().to_string();
                reply(cx, request, answer(OK, Metrics::CONTENT_TYPE, text))
            }
            "/tree.json" => {
                let Some(limit) = limit(request.query) else {
                    let text = "limit is a number of connections, at most 100\n";
                    return reply(cx, request, plain("400 Bad Request", text));
                };
                let tree = cx.conn.control().tree(limit);
                let body = serde_json::to_vec(&tree).map_err(Close::because)?;
                reply(cx, request, answer(OK, JSON, body))
            }
            "/healthz" if cx.conn.control().tree(0).draining => {
                reply(cx, request, plain("503 Service Unavailable", "draining\n"))
            }
            "/healthz" => reply(cx, request, plain(OK, "ok\n")),
            _ => {
                let text = "/, /events, /metrics, /tree.json, /healthz\n";
                reply(cx, request, plain("404 Not Found", text))
            }
        }
    }

    fn follow<A>(&mut self, cx: &mut Context<'_, A>, request: &Request<'_>) -> Outcome {
        let Some(query) = Query::parse(request.query) else {
            let text = "sort: queue, traffic, age, address; order: asc, desc; filter: up to 4 \
                        words, 256 bytes\n";
            return reply(cx, request, plain("400 Bad Request", text));
        };
        let head = head(OK, EVENTS, None, false, "");
        if request.method == Method::Head {
            cx.conn.send(head)?;
            return Err(Close::new());
        }
        if self.shared.feed.borrow().refuses(&query) {
            let text = "too many different queries\n";
            return reply(cx, request, plain("503 Service Unavailable", text));
        }
        let id = cx.conn.id();
        if self.has_last_slot(cx) {
            let text = "too many browsers follow the events\n";
            return reply(cx, request, plain("503 Service Unavailable", text));
        }
        self.follows = true;
        // A browser sends nothing from here on. One that reads nothing ends by the write timeout.
        cx.conn
            .reconfigure(|conn| conn.idle_timeout = Duration::MAX)?;
        self.shared.waiting.borrow_mut().remove(id);
        let mut control = cx.conn.control();
        subscribe(&self.shared.feed, &mut control, id, query, head);
        Ok(())
    }

    fn kill<A>(&self, cx: &mut Context<'_, A>, request: &Request<'_>) -> Outcome {
        let token = self.shared.token().unwrap_or_default();
        if !is_own_origin(request) {
            let text = "the Origin is not this page's\n";
            return reply(cx, request, plain("403 Forbidden", text));
        }
        // A listener that was made by other means has not checked the token's length.
        if token.len() < MIN_TOKEN || !has_token(request, token) {
            return reply(cx, request, plain("403 Forbidden", "not the right token\n"));
        }
        let text = std::str::from_utf8(request.body).unwrap_or_default();
        let Ok(id) = text.trim().parse::<ConnId>() else {
            let text = "the content is the id of a connection, as in 7.3.1\n";
            return reply(cx, request, plain("400 Bad Request", text));
        };
        match cx.conn.control().kill(id) {
            true => reply(cx, request, plain(OK, "killed\n")),
            false => reply(cx, request, plain("404 Not Found", "no such connection\n")),
        }
    }
}

impl<A> Handler<A> for Session {
    fn on_open(&mut self, cx: &mut Context<'_, A>) -> Outcome {
        let id = cx.conn.id();
        cx.conn.set_timer(SILENCE, MAX_SILENCE);
        let mut waiting = self.shared.waiting.borrow_mut();
        waiting.open(id);
        waiting.make_room(&mut cx.conn.control(), self.listener, id);
        Ok(())
    }

    fn on_timer(&mut self, cx: &mut Context<'_, A>, _key: u8) -> Outcome {
        let is_silent = self.shared.waiting.borrow().is_silent(cx.conn.id());
        // A request that has begun has a timeout of its own.
        match is_silent && cx.conn.info().is_some_and(|info| info.buffered == 0) {
            true => Err(Close::abort().labelled("silent")),
            false => Ok(()),
        }
    }

    fn on_frame(&mut self, cx: &mut Context<'_, A>, frame: &[u8]) -> Outcome {
        if self.follows {
            return Ok(());
        }
        let id = cx.conn.id();
        self.shared.waiting.borrow_mut().note_request(id);
        match Request::parse(frame) {
            Ok(mut request) => {
                request.keeps_alive &= !self.has_last_slot(cx);
                self.answer(cx, &request)
            }
            Err(refusal) => {
                refuse(cx, refusal)?;
                Err(Close::because(refusal))
            }
        }
    }

    fn on_bad_input(&mut self, cx: &mut Context<'_, A>, closed: &Closed) -> Outcome {
        if self.follows {
            return Ok(());
        }
        let error = closed.error.as_deref();
        let error = error.and_then(|error| error.downcast_ref::<crate::proto::FrameError>());
        let refusal = error.and_then(|error| error.get_ref().downcast_ref::<Refusal>());
        match (refusal, closed.reason) {
            (Some(refusal), _) => refuse(cx, *refusal),
            (None, CloseReason::FrameTooLarge) => refuse(cx, HEAD_LIMIT),
            (None, _) => Ok(()),
        }
    }

    fn on_close(&mut self, cx: &mut Context<'_, A>, _closed: &Closed) {
        let id = cx.conn.id();
        self.shared.waiting.borrow_mut().remove(id);
        if self.follows {
            self.shared.feed.borrow_mut().unsubscribe(id);
        }
    }
}

fn answer<B>(status: &'static str, kind: &'static str, body: B) -> Answer<B> {
    Answer {
        status,
        kind,
        more: String::new(),
        body,
    }
}

fn plain(status: &'static str, text: &'static str) -> Answer<&'static str> {
    answer(status, TEXT, text)
}

fn not_allowed(methods: &str) -> Answer<&'static str> {
    Answer {
        more: format!("Allow: {methods}\r\n"),
        ..plain(NOT_ALLOWED, "this method is not served here\n")
    }
}

/// Sends an answer, and closes unless another request may follow.
fn reply<A, B>(cx: &mut Context<'_, A>, request: &Request<'_>, answer: Answer<B>) -> Outcome
where
    B: AsRef<[u8]>,
{
    let Answer {
        status,
        kind,
        more,
        body,
    } = answer;
    let body = body.as_ref();
    let head = head(status, kind, Some(body.len()), request.keeps_alive, &more);
    match request.method {
        Method::Head => cx.conn.send(head)?,
        _ => cx.conn.send((head, body))?,
    }
    match request.keeps_alive {
        true => Ok(()),
        false => Err(Close::new()),
    }
}

/// Answers what is no request: nothing follows.
fn refuse<A>(cx: &mut Context<'_, A>, refusal: Refusal) -> Outcome {
    let Refusal { status, cause } = refusal;
    let allow = match status {
        NOT_ALLOWED => "Allow: GET, HEAD\r\n",
        _ => "",
    };
    let body = format!("{cause}\n");
    let head = head(status, TEXT, Some(body.len()), false, allow);
    cx.conn.send((head, body))?;
    Ok(())
}

/// The number of connections that a tree has of each listener.
fn limit(query: &str) -> Option<usize> {
    let given = parameters(query).find(|(name, _)| name == "limit");
    match given {
        Some((_, value)) => value.parse().ok().filter(|limit| *limit <= SHOWN),
        None => Some(SHOWN),
    }
}
