//! The code has the model's table, and no other: the same events lead to the same states of the
//! listener and of each
//! connection, and to the same reasons.

use std::collections::BTreeSet;

use model::connection::{Reaction, Reason};
use model::events::{visit, Change, Event, Stage, Timer};
use model::{code, table, Setting};
use portcullis::{CloseReason, State};

/// Plays events over each change of the model's table, and compares after each event.
#[test]
fn each_change_of_the_model_is_one_of_the_code() {
    let mut changes = BTreeSet::new();
    for setting in Setting::PLAYED
        .iter()
        .filter(|setting| setting.can_be_played())
    {
        for timer in Timer::ALL {
            let waits = visit(setting, timer, false);
            assert!(waits.ways.len() > 50, "{}: {timer:?}", setting.name);
            for way in &waits.ways {
                if let Err(difference) = code::play(setting, timer, way) {
                    panic!("{difference}");
                }
            }
            changes.extend(waits.changes);
        }
    }
    assert!(changes.len() > 300, "{}", changes.len());
    reasons_are_complete(&changes);
}

/// A peer that has finished without a frame, and reads nothing, keeps the server waiting: it may be
/// evicted.
#[test]
fn output_that_is_not_read_keeps_no_silent_connection() {
    let setting = Setting {
        local: true,
        reasons: true,
        ..Setting::CAP
    };
    let keep = Event::HalfClose(0, Reaction::Proceed);
    let send = Event::Local(0, Reaction::Send);
    let connect = Event::Connect { denied: false };
    for way in [
        [connect, keep, send, Event::TimePasses, connect],
        [connect, Event::TimePasses, keep, send, connect],
    ] {
        assert_eq!(code::play(&setting, Timer::FirstFrame, &way), Ok(()));
    }
}

/// Each reason of the code is one that the model reached, or is listed as one that it does not
/// know.
fn reasons_are_complete(changes: &BTreeSet<Change>) {
    let reached: BTreeSet<Reason> = changes
        .iter()
        .filter_map(|change| match change {
            Change::Client(_, _, _, Stage::Gone(reason)) => *reason,
            _ => None,
        })
        .collect();
    for reason in CloseReason::ALL {
        let known = code::reason(*reason);
        let listed = table::UNKNOWN_REASONS
            .iter()
            .find(|(unknown, _)| unknown == reason);
        assert!(
            known.is_some() != listed.is_some(),
            "{reason}: {known:?}, {listed:?}"
        );
    }
    // No event drops the server.
    let mut expected = BTreeSet::from(Reason::ALL);
    expected.remove(&Reason::Stopped);
    if !cfg!(feature = "tls") {
        expected.remove(&Reason::HandshakeFailed);
    }
    assert_eq!(reached, expected);
}

/// The table that the code enforces, in both directions.
#[test]
fn the_transitions_of_a_connection_are_those_of_the_code() {
    let mut model = BTreeSet::new();
    for (proxy, tls) in [(false, false), (false, true), (true, false), (true, true)] {
        let setting = Setting {
            proxy,
            tls,
            ..Setting::ONE
        };
        model.extend(table::transitions(&setting));
    }
    for from in State::ALL {
        for to in State::ALL {
            let listed = table::UNKNOWN_TRANSITIONS
                .iter()
                .any(|(pair, _)| *pair == (*from, *to));
            let known = model.contains(&(*from, *to));
            assert!(
                !(known && listed),
                "{from} -> {to} is in the model, and listed as unknown"
            );
            assert_eq!(from.may_become(*to), known || listed, "{from} -> {to}");
        }
    }
}
