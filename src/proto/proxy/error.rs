//! Why bytes are no PROXY header.

use std::error::Error as StdError;
use std::fmt;

/// Why bytes are no PROXY header.
///
/// The error behind [`CloseReason::BadProxyHeader`](crate::CloseReason::BadProxyHeader).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProxyError(pub(super) &'static str);

impl ProxyError {
    pub(in crate::proto) const MISSING: Self = Self("it begins with something else");
    pub(in crate::proto) const CUT_OFF: Self = Self("the peer finished inside it");
}

impl fmt::Display for ProxyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not a PROXY protocol header: {}", self.0)
    }
}

impl StdError for ProxyError {}
