//! Whatever call fails, with whatever errno, in whatever pair: the server goes on and ends clean.

use kit::failing::Scenario;
use portcullis::sim::{Call, Scripted};

/// Some 950 runs.
#[test]
fn each_call_fails_once_with_each_error() {
    for &scenario in Scenario::ALL {
        let singles = scenario.singles().expect("holds without failures");
        assert!(
            singles.len() > 70,
            "{scenario:?}: {} failures",
            singles.len()
        );
        for failure in singles {
            if let Err(what) = scenario.play(&[failure]) {
                panic!("{what}");
            }
        }
    }
}

/// The rest of the pairs, with `--pairs` of the example `simulate`.
#[track_caller]
fn pairs(scenario: Scenario, stride: usize, at_least: usize) {
    let runs = match scenario.play_pairs(stride) {
        Ok(runs) => runs,
        Err(what) => panic!("{what}"),
    };
    assert!(runs > at_least, "{runs} runs");
}

/// All of them, and a third of those with the slow reader: some 13,000 runs.
#[test]
fn two_calls_fail_in_a_short_session() {
    pairs(Scenario::Echo, 1, 3_000);
    pairs(Scenario::HalfClose, 1, 6_000);
    pairs(Scenario::SlowReader, 3, 2_000);
    pairs(Scenario::Proxied, 2, 3_000);
}

/// One in eleven of them: some 6,000 runs.
#[test]
fn two_calls_fail_in_a_long_one() {
    pairs(Scenario::Drain, 11, 2_500);
    pairs(Scenario::OutOfFds, 11, 2_500);
}

/// One in forty of them: some 200 runs.
#[cfg(feature = "tls")]
#[test]
fn two_calls_fail_over_tls() {
    pairs(Scenario::Tls, 40, 200);
}

/// They can fail at all: a client that lost something is missed when no failure explains it.
#[test]
fn what_is_lost_is_noticed() {
    let reset = Scripted {
        call: Call::Read,
        after: 0,
        errno: libc::ECONNRESET,
    };
    let judged = Scenario::Echo.play_as_harmless(&[reset]);
    assert!(judged.is_err_and(|what| what.contains("1 clients were harmed by 0 failures")));
}
