//! One answer from those of several shards.

use super::HandleError;
use crate::error::{Error, Result};
use crate::listener_info::{ListenerInfo, ListenerState};

/// Returns the first error, if any. Shards without the listener do not count, unless all lack it.
pub(super) fn agree(answers: Vec<(usize, Result<()>)>) -> std::result::Result<(), HandleError> {
    let mut verdict = Err(HandleError::ServerGone);
    for (_, answer) in answers {
        match (answer, &verdict) {
            (Ok(()), Err(HandleError::ServerGone | HandleError::NoListener(_))) => verdict = Ok(()),
            (Ok(()), _) | (Err(Error::NoListener { .. }), Ok(())) => {}
            (Err(error), Ok(()) | Err(HandleError::ServerGone | HandleError::NoListener(_))) => {
                verdict = Err(error.into());
            }
            (Err(_), Err(_)) => {}
        }
    }
    verdict
}

/// Adds one shard's listeners to those of the others, by name.
pub(crate) fn add_listeners(
    all: &mut Vec<ListenerInfo>,
    more: impl IntoIterator<Item = ListenerInfo>,
    cap: usize,
) {
    for listener in more {
        let Some(same) = all.iter_mut().find(|other| other.name == listener.name) else {
            all.push(listener);
            continue;
        };
        same.connections += listener.connections;
        same.accepted += listener.accepted;
        same.traffic.add(&listener.traffic);
        same.closed.add(&listener.closed);
        same.max_connections = same
            .max_connections
            .saturating_add(listener.max_connections)
            .min(cap);
        if listener.state == ListenerState::Listening {
            same.state = listener.state;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_without_the_listener_do_not_count() {
        let none = || Error::NoListener { listener: 7.into() };
        let wrong = || Error::option("a", "b");
        let verdict = |answers: Vec<Result<()>>| agree(answers.into_iter().enumerate().collect());
        assert_eq!(verdict(vec![Ok(()), Err(none())]), Ok(()));
        assert_eq!(verdict(vec![Err(none()), Ok(())]), Ok(()));
        assert_eq!(
            verdict(vec![Err(none())]),
            Err(HandleError::NoListener(7.into()))
        );
        assert_eq!(verdict(vec![]), Err(HandleError::ServerGone));
        for answers in [
            vec![Err(wrong()), Ok(())],
            vec![Ok(()), Err(wrong())],
            vec![Err(none()), Err(wrong()), Ok(())],
        ] {
            assert!(matches!(verdict(answers), Err(HandleError::Refused(_))));
        }
    }
}
