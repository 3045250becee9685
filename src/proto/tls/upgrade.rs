//! Why an open connection cannot go on behind TLS.

use std::error::Error as StdError;
use std::fmt;

/// Why [`Conn::start_tls`](crate::Conn::start_tls) did nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum StartTlsError {
    /// The connection speaks TLS, or is in the handshake of another `start_tls`. RFC 3207 section
    /// 4.2: do not offer it then.
    AlreadyTls,
    /// No handshake is possible: the connection is closing, one of its ends has finished, or it is
    /// not open yet.
    Closed,
}

impl fmt::Display for StartTlsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AlreadyTls => "the connection speaks TLS already",
            Self::Closed => {
                "the connection is closing or not open, or its peer has finished: \
                 no handshake is possible"
            }
        })
    }
}

impl StdError for StartTlsError {}
