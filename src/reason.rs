//! How and why a connection ends.

use std::error::Error as StdError;
use std::fmt;

use crate::catch::Panic;
use crate::escape::Escaped;

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident: $name:literal => $text:literal,)*) => {
        /// The one reason for which a connection ended. Each accepted socket and each outgoing
        /// connection has exactly one.
        ///
        /// [`Stats::closed`](crate::Stats::closed) counts them.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[non_exhaustive]
        pub enum CloseReason {
            $($(#[$doc])* $variant,)*
        }

        impl CloseReason {
            /// All reasons, in the order of declaration.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            const fn words(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)*
                }
            }

            /// Returns the stable name, in snake_case: the label in [`Metrics`](crate::Metrics).
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

reasons! {
    /// The peer finished sending (FIN, and close_notify over TLS), and the connection closed in order
    /// behind every answer. The kernel may still be sending them: the server does not wait for a peer
    /// that has finished.
    Finished: "finished" => "peer finished",
    /// The handler closed it: [`Conn::close`](crate::Conn::close) or [`Close::new`], before the
    /// peer's end and outside a drain.
    Closed: "closed" => "closed by handler",
    /// The handler returned an error through `?` or [`Close::because`]; [`Closed::error`] is that
    /// error. Or a frame of [`Handle::send`](crate::Handle::send) could not be queued.
    Failed: "failed" => "handler failed",
    /// The peer reads too slowly: a frame found pending output at the output limit. The handler
    /// returned that error ([`SendError::Full`](crate::SendError::Full)), or the frame came from
    /// [`Handle::send`](crate::Handle::send). A handler that returns the error of another
    /// connection's output ends its own as [`Failed`](CloseReason::Failed).
    SlowConsumer: "slow_consumer" => "slow consumer",
    /// The handler aborted it (RST): [`Conn::abort`](crate::Conn::abort) or [`Close::abort`].
    Aborted: "aborted" => "aborted by handler",
    /// A handler callback, a [`Framer`](crate::Framer) or a callback of a TLS configuration
    /// panicked. Only this connection ends.
    Panicked: "panicked" => "handler panicked",
    /// Killed by id ([`Control::kill`](crate::Control::kill)), or its server was dropped without a
    /// drain.
    Killed: "killed" => "killed",
    /// Detached as a blocking stream ([`Conn::detach`](crate::Conn::detach)). The connection counts
    /// as ended once that is dropped.
    Detached: "detached" => "detached",
    /// The server drained, and the handler closed this connection within the grace period. Or the
    /// connection was outgoing and not established.
    Drained: "drained" => "drained",
    /// The server drained, and this connection was still there after the grace period.
    DrainForced: "drain_forced" => "forced by drain deadline",
    /// The peer reset the connection (ECONNRESET, EPIPE, ECONNABORTED).
    Reset: "reset" => "reset by peer",
    /// No reply from the peer to retransmissions or keepalive probes (ETIMEDOUT).
    TimedOut: "timed_out" => "connection timed out",
    /// No route to the peer any more (EHOSTUNREACH, EHOSTDOWN, ENETUNREACH, ENETDOWN).
    Unreachable: "unreachable" => "peer unreachable",
    /// Another socket error; [`Closed::error`] is that error.
    Io: "io" => "socket error",
    /// The peer finished inside a frame.
    Truncated: "truncated" => "truncated frame",
    /// A frame is longer than the maximum
    /// ([`ConnConfig::max_frame`](crate::ConnConfig::max_frame)).
    FrameTooLarge: "frame_too_large" => "frame too large",
    /// A [`Framer`](crate::Framer) refused the bytes, or reported a frame outside them; or a length
    /// field announces less than its header ([`Framing::LengthField`](crate::Framing::LengthField)).
    /// [`Closed::error`] has the cause.
    BadFrame: "bad_frame" => "bad frame",
    /// The connection was not open within the handshake timeout, counted from accept, or from when
    /// an outgoing connection was connected. Or a handshake was not complete in that time after
    /// `Conn::start_tls`. A drain shortens the time.
    HandshakeTimeout: "handshake_timeout" => "handshake timeout",
    /// An incomplete frame made no progress within the frame timeout, or arrived more slowly than
    /// [`ConnConfig::min_rate`](crate::ConnConfig::min_rate).
    FrameTimeout: "frame_timeout" => "frame timeout",
    /// No byte from the peer within the idle timeout.
    IdleTimeout: "idle_timeout" => "idle timeout",
    /// The peer took nothing of the pending output within the write timeout, or less than
    /// [`ConnConfig::min_rate`](crate::ConnConfig::min_rate). For a client that writes all its
    /// requests before it reads an answer see
    /// [`ConnConfig::full_duplex`](crate::ConnConfig::full_duplex).
    WriteTimeout: "write_timeout" => "write timeout",
    /// The TLS handshake failed, and [`Closed::error`] has the cause. Or a close cut short a
    /// handshake, and the output queued for it is lost.
    TlsHandshake: "tls_handshake" => "TLS handshake failed",
    /// A TLS error on an open connection.
    Tls: "tls" => "TLS error",
    /// The peer's FIN came without close_notify: an attacker may have cut its data.
    TlsTruncated: "tls_truncated" => "TLS truncated",
    /// The peer sent something else than TLS: to a TLS listener, after `Conn::start_tls`, or as a
    /// server's answer to a TLS client.
    NotTls: "not_tls" => "plaintext on a TLS port",
    /// A TLS ClientHello came to a plain listener. Recognised by its first three bytes when the
    /// first frame is complete, before the handler sees the frame. Or when the frame fails: on its
    /// header (of two bytes, these suffice), at the peer's end, or at the frame timeout. With
    /// [`Framing::Raw`](crate::Framing::Raw) every byte is input. With a [`Framer`](crate::Framer),
    /// a fixed length or a length field only a frame that fails is recognised.
    UnexpectedTls: "unexpected_tls" => "TLS on a plain port",
    /// The server or the listener was at its connection cap, or had too many pending connections
    /// ([`AtCapacity::Refuse`](crate::AtCapacity::Refuse)).
    AtCapacity: "at_capacity" => "at capacity",
    /// The address is denied by [`AccessRules`](crate::AccessRules) or a
    /// [`Control::ban`](crate::Control::ban), or is no trusted proxy where a header is required.
    Denied: "denied" => "denied by access rules",
    /// The server or the listener was over its accept rate
    /// ([`Config::accept_rate`](crate::Config::accept_rate),
    /// [`Listen::accept_rate`](crate::Listen::accept_rate)), with
    /// [`AtCapacity::Refuse`](crate::AtCapacity::Refuse).
    RateLimited: "rate_limited" => "over the accept rate",
    /// The source had too many connections, or connected too fast. See
    /// [`SourceLimits::connections`](crate::SourceLimits::connections) and
    /// [`SourceLimits::rate`](crate::SourceLimits::rate).
    SourceLimited: "source_limited" => "too many of this source",
    /// The peer had gone before it was served: before its PROXY header, or in the backlog. There it
    /// had reset the connection, or finished without a byte.
    ///
    /// In the backlog this is checked only if a rate would be charged, a connection evicted, or if
    /// the client may have waited. That is after a cap, a rate or a suspension, in a drain, in an
    /// adopted socket, and after 5 ms of other work. A plain listener with
    /// [`Listen::evict_silent`](crate::Listen::evict_silent) off serves clients that have finished:
    /// they may want bytes that the server sends first.
    ClosedEarly: "closed_early" => "gone before it was served",
    /// A required PROXY header was missing, or a header was bad; [`Closed::error`] has the cause.
    BadProxyHeader: "bad_proxy_header" => "bad PROXY header",
    /// Evicted for a new connection. It was the oldest of too many pending ones
    /// ([`PendingLimits::connections`](crate::PendingLimits::connections)), or at a cap the oldest
    /// that had not sent a frame ([`Listen::evict_silent`](crate::Listen::evict_silent)).
    Evicted: "evicted" => "evicted for a newcomer",
    /// The server's buffers were near or over their limit, and this connection had the greatest
    /// product of buffer size and stall ([`Config::memory_limit`](crate::Config::memory_limit)).
    OverMemory: "over_memory" => "over the memory limit",
    /// The [`Service`](crate::Service) refused the peer.
    Refused: "refused" => "refused by service",
    /// An outgoing connection failed: refused, no route, no descriptor, or another cause.
    /// [`Closed::error`] is the kernel's `io::Error` of the last attempt.
    ConnectFailed: "connect_failed" => "could not connect",
    /// The last attempt of an outgoing connection took longer than
    /// [`Connect::connect_timeout`](crate::Connect::connect_timeout).
    ConnectTimeout: "connect_timeout" => "connect timeout",
    /// The kernel could not register the new socket for events (ENOMEM, ENOSPC).
    Unregistered: "unregistered" => "could not be registered",
}

impl CloseReason {
    pub(crate) const COUNT: usize = Self::ALL.len();

    pub(crate) const fn index(self) -> usize {
        self as usize
    }
}

impl fmt::Display for CloseReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.words())
    }
}

/// The argument of [`Handler::on_close`](crate::Handler::on_close): the one reason, and the error
/// behind it if there is one.
#[derive(Debug)]
#[non_exhaustive]
pub struct Closed {
    /// The reason for the end.
    pub reason: CloseReason,
    /// The cause, if there is one: the handler's error, or that of the kernel, the framer, TLS or
    /// the PROXY header. If earlier output is lost, the loss becomes the reason
    /// ([`CloseReason::WriteTimeout`] and its like), and the error stays.
    pub error: Option<Box<dyn StdError + Send + Sync>>,
    /// The label of the [`Close`], if it has one ([`Close::labelled`]). It stays as the error does.
    pub label: Option<&'static str>,
}

impl Closed {
    /// The panic of foreign code that ended it, where none has reported that yet.
    pub(crate) fn panic(&self) -> Option<&Panic> {
        self.error.as_deref()?.downcast_ref()
    }

    pub(crate) fn new(reason: CloseReason) -> Self {
        Self {
            reason,
            error: None,
            label: None,
        }
    }

    pub(crate) fn with(
        reason: CloseReason,
        error: impl Into<Box<dyn StdError + Send + Sync>>,
    ) -> Self {
        Self {
            reason,
            error: Some(error.into()),
            label: None,
        }
    }
}

/// The reason, the label in parentheses, and the text of the error. Control characters are escaped
/// and at most 1 KiB is printed, because a peer may have chosen the text.
impl fmt::Display for Closed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_reason(f, self.reason, self.label)?;
        match &self.error {
            Some(error) => write!(f, ": {}", Escaped::new(error)),
            None => Ok(()),
        }
    }
}

/// Writes the reason, and the label in parentheses.
pub(crate) fn write_reason(
    f: &mut fmt::Formatter<'_>,
    reason: CloseReason,
    label: Option<&str>,
) -> fmt::Result {
    match label {
        Some(label) => write!(f, "{reason} ({})", Escaped::new(label)),
        None => write!(f, "{reason}"),
    }
}

/// The end of a connection, as a callback requests it: the error half of [`Outcome`].
///
/// Any type that implements [`std::error::Error`], `Send` and `Sync` converts into it. So `?`
/// inside a callback closes the connection in order, with that error as the cause
/// ([`CloseReason::Failed`]). For a `String` or a boxed error use
/// `work().map_err(Close::because)?`.
///
/// ```
/// use portcullis::{Close, Context, Handler, Outcome};
///
/// struct Login;
/// impl Handler for Login {
///     fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
///         let user = std::str::from_utf8(frame)?;
///         if user == "guest" {
///             return Err(Close::because("guests are not served"));
///         }
///         cx.conn.send(b"welcome")?;
///         Err(Close::new())
///     }
/// }
/// ```
#[derive(Debug)]
#[must_use]
pub struct Close {
    pub(crate) closed: Closed,
    pub(crate) abort: bool,
}

/// The result of a callback. `Ok(())` goes on, [`Close`] ends this connection.
pub type Outcome = Result<(), Close>;

impl Close {
    /// Closes in order: flushes pending output, then sends close_notify and FIN. The reason is that
    /// of [`Conn::close`](crate::Conn::close).
    #[allow(clippy::new_without_default)] // `Close::default()` would not say what it does
    pub fn new() -> Self {
        Self {
            closed: Closed::new(CloseReason::Closed),
            abort: false,
        }
    }

    /// Closes at once with RST; pending output is dropped. [`CloseReason::Aborted`].
    pub fn abort() -> Self {
        Self {
            closed: Closed::new(CloseReason::Aborted),
            abort: true,
        }
    }

    /// Closes in order, with a cause for [`Handler::on_close`](crate::Handler::on_close) and the
    /// log. [`CloseReason::Failed`].
    pub fn because(cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self {
            closed: Closed::with(CloseReason::Failed, cause),
            abort: false,
        }
    }

    /// Adds a label: a short name of the cause, such as `taken_over`. [`Closed::label`] is that
    /// label, [`RecentClose::label`](crate::RecentClose::label) too, and the log has it.
    /// [`Metrics`](crate::Metrics) count each label apart, with `cause="taken_over"` beside the
    /// reason.
    ///
    /// Use few labels. A server counts its first 32, as does each listener, and all others as
    /// `other`. An empty label is none.
    ///
    /// ```
    /// use portcullis::{Close, Context, Handler, Outcome};
    ///
    /// struct Session;
    /// impl Handler for Session {
    ///     fn on_frame(&mut self, cx: &mut Context<'_>, frame: &[u8]) -> Outcome {
    ///         let name = std::str::from_utf8(frame)
    ///             .map_err(|error| Close::because(error).labelled("bad_name"))?;
    ///         if name == "guest" {
    ///             return Err(Close::because("guests are not served").labelled("not_authorised"));
    ///         }
    ///         Ok(())
    ///     }
    /// }
    /// ```
    pub fn labelled(mut self, label: &'static str) -> Self {
        self.closed.label = Some(label).filter(|label| !label.is_empty());
        self
    }
}

impl<E: StdError + Send + Sync + 'static> From<E> for Close {
    fn from(error: E) -> Self {
        Self::because(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_found_at_its_own_counter() {
        for (position, reason) in CloseReason::ALL.iter().enumerate() {
            assert_eq!(reason.index(), position, "{reason}");
        }
    }

    /// Each variant's own name in snake_case, which no rewording changes.
    #[test]
    fn a_name_is_the_variant_in_snake_case() {
        for reason in CloseReason::ALL {
            let mut expected = String::new();
            for character in format!("{reason:?}").chars() {
                if character.is_uppercase() && !expected.is_empty() {
                    expected.push('_');
                }
                expected.extend(character.to_lowercase());
            }
            assert_eq!(reason.name(), expected);
        }
    }

    #[test]
    fn any_error_closes_with_itself_as_the_cause() {
        let close = Close::from(std::io::Error::other("disk full"));
        assert_eq!(close.closed.to_string(), "handler failed: disk full");
        assert!(!close.abort);
        let cause = close.closed.error.expect("the error");
        assert!(cause.downcast_ref::<std::io::Error>().is_some());
    }

    #[test]
    fn a_label_stands_between_the_reason_and_the_error() {
        let close = Close::because("seen elsewhere").labelled("taken_over");
        let text = close.closed.to_string();
        assert_eq!(text, "handler failed (taken_over): seen elsewhere");
        let close = Close::new().labelled("quit\n\u{1b}");
        let text = close.closed.to_string();
        assert_eq!(text, r"closed by handler (quit\n\u{1b})");
        let close = Close::abort().labelled("").closed;
        assert_eq!((close.label, close.reason), (None, CloseReason::Aborted));
    }

    /// An application passes them to its own threads, and to its own error types.
    #[test]
    fn ends_and_errors_can_be_sent() {
        fn is_shared<T: Send + Sync + 'static>() {}
        is_shared::<Closed>();
        is_shared::<Close>();
        is_shared::<crate::Error>();
        is_shared::<crate::HandleError>();
        is_shared::<crate::SendError>();
        is_shared::<crate::FrameError>();
    }
}
