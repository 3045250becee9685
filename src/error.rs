//! Errors outside any connection.

use std::error::Error as StdError;
use std::fmt;
use std::io;
#[cfg(feature = "record")]
use std::path::PathBuf;

use crate::addr::{Addr, AddrError};
use crate::escape::Escaped;
use crate::id::AlarmId;
use crate::id::ListenerRef;

/// The result of a request to the [`Server`](crate::Server).
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Error of a request to a server, with the listener that is concerned and a remedy. After any of
/// them the rest of the server is as it was before the call.
///
/// `Debug` prints the same text as `Display`, so that a `main` which returns this value gives its
/// user a readable error.
#[non_exhaustive]
pub enum Error {
    /// The address given to [`Listen::tcp`](crate::Listen::tcp) cannot be resolved.
    Address {
        /// The given value.
        given: String,
        /// Why it is no address.
        source: io::Error,
    },
    /// The address is taken by another socket (EADDRINUSE).
    AddressInUse {
        /// The address.
        addr: Addr,
    },
    /// The socket could not be created, bound or set to listen.
    Listen {
        /// The address.
        addr: Addr,
        /// The kernel's error.
        source: io::Error,
    },
    /// The address given to [`Control::connect`](crate::Control::connect) is invalid, or is a host
    /// name.
    ConnectAddress(AddrError),
    /// The kernel refused an outgoing connection at once, and no retry was requested.
    Connect {
        /// The address.
        addr: Addr,
        /// The kernel's error.
        source: io::Error,
    },
    /// The cap on connections is reached: no slot for an outgoing one.
    AtCapacity {
        /// The cap.
        max_connections: usize,
    },
    /// Another listener of this server has this name.
    NameTaken {
        /// The name.
        name: String,
    },
    /// An option has a value that cannot work.
    Option {
        /// The option, by the name of its field.
        option: &'static str,
        /// The problem, and a value that would work.
        problem: String,
    },
    /// No open listener of this server has this id, port or name.
    NoListener {
        /// The given id, port or name.
        listener: ListenerRef,
    },
    /// No alarm of this server has this id.
    NoAlarm {
        /// The given id.
        alarm: AlarmId,
    },
    /// The state of a connection does not allow the call: [`Conn::detach`](crate::Conn::detach),
    /// [`Conn::reconfigure`](crate::Conn::reconfigure), `Conn::start_tls`. Nothing has changed.
    ConnState(&'static str),
    /// The server drains: it takes no new listeners, and makes no connections.
    Draining,
    /// The kernel refused an operation that the server needs.
    Os {
        /// The operation.
        doing: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
    /// A recording could not be created or read.
    #[cfg(feature = "record")]
    Recording {
        /// The file.
        path: PathBuf,
        /// The kernel's error, or what is wrong with the file.
        source: io::Error,
    },
    /// An error from outside the server: see [`Error::other`].
    Other(Box<dyn StdError + Send + Sync>),
}

impl Error {
    /// Makes an error of the program's own, with a text or another error as its cause. For failures
    /// while [`Server::spawn`](crate::Server::spawn) or [`Shards::spawn`](crate::Shards::spawn)
    /// makes the application's state. [`HandleError`](crate::HandleError) and
    /// [`AddrError`](crate::AddrError) convert by `?`.
    ///
    /// ```no_run
    /// # use portcullis::{Config, Error, Server};
    /// # fn main() -> portcullis::Result<()> {
    /// let spawned = Server::spawn(|| {
    ///     let words = std::fs::read_to_string("words").map_err(Error::other)?;
    ///     Ok((Server::new(Config::new())?, words))
    /// })?;
    /// # spawned.join()?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn other(cause: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self::Other(cause.into())
    }

    pub(crate) fn option(option: &'static str, problem: impl Into<String>) -> Self {
        Self::Option {
            option,
            problem: problem.into(),
        }
    }

    /// Names the listener whose option it is.
    pub(crate) fn of_listener(self, name: &str) -> Self {
        match self {
            Self::Option { option, problem } => Self::Option {
                option,
                problem: format!("{problem} (listener {name:?})"),
            },
            error => error,
        }
    }

    pub(crate) fn listen(addr: Addr, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::AddrInUse => Self::AddressInUse { addr },
            _ => Self::Listen { addr, source },
        }
    }

    /// [`Conn::start_tls`](crate::Conn::start_tls) at an end of a connection.
    #[cfg(feature = "tls")]
    pub(crate) const fn no_handshake() -> Self {
        Self::ConnState(
            "the connection is closing or not open, or its peer has finished: no handshake is \
             possible",
        )
    }

    pub(crate) fn os(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Os { doing, source }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address { given, source } => {
                write!(
                    f,
                    "{} is no address to listen on (give HOST:PORT): {source}",
                    Escaped::new(given)
                )
            }
            Self::AddressInUse { addr } => {
                let hint = match addr {
                    Addr::Tcp(_) => "port (0 lets the system choose)",
                    Addr::Unix(_) => "path",
                };
                write!(
                    f,
                    "cannot listen on {addr}: the address is in use; stop its owner, or choose \
                     another {hint}"
                )
            }
            Self::Listen { addr, source } => {
                let hint = match (addr, source.kind()) {
                    (Addr::Tcp(_), io::ErrorKind::PermissionDenied) => {
                        "; ports below 1024 need a privilege"
                    }
                    (Addr::Tcp(_), io::ErrorKind::AddrNotAvailable) => {
                        "; no interface of this machine has that address"
                    }
                    (Addr::Unix(_), io::ErrorKind::NotFound) => "; its directory must exist",
                    (Addr::Unix(_), io::ErrorKind::AlreadyExists) => {
                        "; remove it, or choose another path"
                    }
                    _ => "",
                };
                write!(f, "cannot listen on {addr}: {source}{hint}")
            }
            Self::ConnectAddress(error) => write!(f, "cannot connect: {error}"),
            Self::Connect { addr, source } => {
                let hint = match source.raw_os_error() {
                    Some(libc::EMFILE) => "; raise the limit of open files (ulimit -n)",
                    Some(libc::EAGAIN) if addr.as_unix().is_some() => "; its backlog is full",
                    _ => "",
                };
                write!(f, "cannot connect to {addr}: {source}{hint}")
            }
            Self::AtCapacity { max_connections } => {
                write!(f, "no slot is free: max_connections is {max_connections}")
            }
            Self::NameTaken { name } => {
                write!(
                    f,
                    "a listener named {name:?} exists already; give this one another name"
                )
            }
            Self::Option { option, problem } => write!(f, "option {option}: {problem}"),
            Self::NoListener { listener } => write!(f, "there is no listener {listener}"),
            Self::NoAlarm { alarm } => write!(f, "there is no alarm {alarm}"),
            Self::ConnState(problem) => f.write_str(problem),
            Self::Draining => f.write_str(
                "the server drains: it takes no new listeners, and makes no connections",
            ),
            Self::Os { doing, source } => write!(f, "{doing}: {source}"),
            #[cfg(feature = "record")]
            Self::Recording { path, source } => {
                let hint = match source.kind() {
                    io::ErrorKind::AlreadyExists => "; a recording overwrites no file",
                    _ => "",
                };
                write!(
                    f,
                    "recording {}: {source}{hint}",
                    Escaped::new(path.display())
                )
            }
            Self::Other(cause) => cause.fmt(f),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match self {
            Self::Address { source, .. }
            | Self::Listen { source, .. }
            | Self::Connect { source, .. }
            | Self::Os { source, .. } => Some(source),
            #[cfg(feature = "record")]
            Self::Recording { source, .. } => Some(source),
            Self::ConnectAddress(error) => Some(error),
            Self::Other(cause) => cause.source(),
            _ => None,
        }
    }
}

impl From<AddrError> for Error {
    fn from(error: AddrError) -> Self {
        Self::other(error)
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::AddressInUse { .. } => io::ErrorKind::AddrInUse,
            Error::Address { source, .. }
            | Error::Listen { source, .. }
            | Error::Connect { source, .. }
            | Error::Os { source, .. } => source.kind(),
            #[cfg(feature = "record")]
            Error::Recording { source, .. } => source.kind(),
            Error::NoListener { .. } | Error::NoAlarm { .. } => io::ErrorKind::NotFound,
            Error::NameTaken { .. } => io::ErrorKind::AlreadyExists,
            Error::Option { .. } | Error::ConnectAddress(_) => io::ErrorKind::InvalidInput,
            Error::ConnState(_) | Error::Draining | Error::AtCapacity { .. } | Error::Other(_) => {
                io::ErrorKind::Other
            }
        };
        Self::new(kind, error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::ServerNumber;

    fn os(errno: i32) -> io::Error {
        io::Error::from_raw_os_error(errno)
    }

    fn tcp() -> Addr {
        Addr::Tcp(([127, 0, 0, 1], 80).into())
    }

    fn unix() -> Addr {
        Addr::Unix(crate::UnixAddr::pathname("/run/a".as_ref()))
    }

    /// One of each kind, with words of its text and the kind of the `io::Error` it becomes.
    fn all() -> Vec<(Error, &'static str, io::ErrorKind)> {
        use io::ErrorKind::{
            AddrInUse, AlreadyExists, InvalidInput, NotFound, Other, PermissionDenied, WouldBlock,
        };
        let (given, name) = ("a\nb".to_owned(), "a".to_owned());
        let alarm = AlarmId(3, ServerNumber::NONE);
        vec![
            (
                Error::Address {
                    given,
                    source: os(libc::ENOENT),
                },
                r"a\nb is no address",
                NotFound,
            ),
            (
                Error::AddressInUse { addr: tcp() },
                "choose another port",
                AddrInUse,
            ),
            (
                Error::AddressInUse { addr: unix() },
                "choose another path",
                AddrInUse,
            ),
            (
                Error::listen(tcp(), os(libc::EACCES)),
                "need a privilege",
                PermissionDenied,
            ),
            (
                Error::listen(unix(), os(libc::ENOENT)),
                "its directory must exist",
                NotFound,
            ),
            (
                Error::ConnectAddress("nowhere".parse::<Addr>().expect_err("no address")),
                "cannot connect: ",
                InvalidInput,
            ),
            (
                Error::Connect {
                    addr: tcp(),
                    source: os(libc::EMFILE),
                },
                "ulimit -n",
                os(libc::EMFILE).kind(),
            ),
            (
                Error::Connect {
                    addr: unix(),
                    source: os(libc::EAGAIN),
                },
                "backlog is full",
                WouldBlock,
            ),
            (
                Error::AtCapacity { max_connections: 7 },
                "max_connections is 7",
                Other,
            ),
            (
                Error::NameTaken { name },
                "a listener named \"a\"",
                AlreadyExists,
            ),
            (Error::option("mode", "no"), "option mode: no", InvalidInput),
            (
                Error::NoListener { listener: 9.into() },
                "no listener port 9",
                NotFound,
            ),
            (Error::NoAlarm { alarm }, "no alarm A3", NotFound),
            (Error::ConnState("it has gone"), "it has gone", Other),
            (Error::Draining, "the server drains", Other),
            #[cfg(feature = "record")]
            (
                Error::Recording {
                    path: "/a".into(),
                    source: os(libc::EEXIST),
                },
                "a recording overwrites no file",
                AlreadyExists,
            ),
            (
                Error::os("making a poll")(os(libc::EACCES)),
                "making a poll: ",
                PermissionDenied,
            ),
            (Error::other("my own"), "my own", Other),
        ]
    }

    #[test]
    fn each_error_says_what_it_concerns() {
        for (error, words, _) in all() {
            let text = error.to_string();
            assert!(text.contains(words), "{text}");
            assert_eq!(format!("{error:?}"), text);
        }
    }

    #[test]
    fn an_io_error_has_the_kind_and_the_text() {
        for (error, _, kind) in all() {
            let text = error.to_string();
            let converted = io::Error::from(error);
            assert_eq!(converted.kind(), kind, "{text}");
            assert_eq!(converted.to_string(), text);
        }
    }

    #[test]
    fn the_kernels_error_is_the_source() {
        for (error, ..) in all() {
            let has_cause = matches!(
                error,
                Error::Address { .. }
                    | Error::Listen { .. }
                    | Error::ConnectAddress(_)
                    | Error::Connect { .. }
                    | Error::Os { .. }
            );
            #[cfg(feature = "record")]
            let has_cause = has_cause || matches!(error, Error::Recording { .. });
            assert_eq!(error.source().is_some(), has_cause, "{error}");
        }
        let cause = Error::other(os(libc::EACCES));
        assert!(cause.source().is_none(), "it stands for its cause");
    }

    /// Errors of other kinds contain no option.
    #[test]
    fn only_the_error_of_an_option_names_its_listener() {
        for (error, ..) in all() {
            let (before, is_option) = (error.to_string(), matches!(error, Error::Option { .. }));
            let expected = match is_option {
                true => format!("{before} (listener \"a\")"),
                false => before,
            };
            assert_eq!(error.of_listener("a").to_string(), expected);
        }
    }
}
