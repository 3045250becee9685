//! Why a handle did not do something.

use std::error::Error as StdError;
use std::fmt;

use crate::error::Error;
use crate::id::{ConnId, ListenerRef};

/// Why a call of a [`Handle`](crate::Handle) failed.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HandleError {
    /// The connection has gone or left the loop, or is one of another server.
    NoConnection(ConnId),
    /// No open listener has this id, port or name.
    NoListener(ListenerRef),
    /// The command queue is full; try again later.
    QueueFull,
    /// The server has ended: that of the connection, or all shards.
    ServerGone,
    /// No answer came within the timeout. The job may still run.
    Timeout,
    /// The job panicked on the loop, which goes on.
    Panicked,
    /// The server refused the change: the text of its [`Error`].
    Refused(String),
    /// A blocking call on the loop's own thread would wait for itself. Use
    /// [`Server::control`](crate::Server::control), or post a job.
    OwnThread,
    /// [`Handle::post`](crate::Handle::post) and [`Handle::call`](crate::Handle::call) need one
    /// server, and this handle reaches several shards. Use
    /// [`Handle::shards`](crate::Handle::shards).
    ManyShards,
}

impl fmt::Display for HandleError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoConnection(id) => {
                write!(f, "connection {id} has gone, or is one of another server")
            }
            Self::NoListener(which) => write!(f, "there is no listener {which}"),
            Self::QueueFull => f.write_str("the server's command queue is full; try again later"),
            Self::ServerGone => f.write_str("the server is gone"),
            Self::Timeout => f.write_str("no answer from the server within the timeout"),
            Self::Panicked => f.write_str("the job panicked"),
            Self::Refused(words) => f.write_str(words),
            Self::OwnThread => {
                f.write_str("a blocking call on the server's own thread would wait for itself")
            }
            Self::ManyShards => {
                f.write_str("this concerns one of several shards: use the handle of that shard")
            }
        }
    }
}

impl StdError for HandleError {}

impl From<HandleError> for Error {
    fn from(error: HandleError) -> Self {
        Self::other(error)
    }
}

impl From<Error> for HandleError {
    fn from(error: Error) -> Self {
        match error {
            Error::NoListener { listener } => Self::NoListener(listener),
            error => Self::Refused(error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::ServerNumber;

    #[test]
    fn each_failure_has_its_words() {
        let id = ConnId::new(ServerNumber::NONE, 7, 3);
        for (error, words) in [
            (HandleError::NoConnection(id), "connection 7.3 has gone"),
            (HandleError::NoListener("a".into()), "no listener \"a\""),
            (HandleError::QueueFull, "queue is full"),
            (HandleError::ServerGone, "the server is gone"),
            (HandleError::Timeout, "no answer"),
            (HandleError::Panicked, "the job panicked"),
            (HandleError::Refused("a name".to_owned()), "a name"),
            (HandleError::OwnThread, "own thread"),
            (HandleError::ManyShards, "the handle of that shard"),
        ] {
            let text = error.to_string();
            assert!(text.contains(words), "{text}");
            assert_eq!(Error::from(error).to_string(), text);
        }
    }
}
