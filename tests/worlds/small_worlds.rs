//! In small worlds every state of a connection is visited, and none breaks a promise or is a dead end.
//!
//! The worlds here are those that take seconds; `cargo run --release --bin exhaust` visits them all.

use std::collections::BTreeSet;

use kit::{closure, strings};
#[cfg(feature = "tls")]
use kit::{schedules, sim_tls};
use portcullis::sim::{Action, ConnModel, Input, Random};
use portcullis::{CloseReason, Listen, State};

fn close(framing: u8, on_frame: &[Action], on_end: &[Action]) -> closure::Findings {
    let setting = closure::Setting {
        framing,
        on_frame: on_frame.to_vec(),
        on_end: on_end.to_vec(),
        proxied: false,
        lazy: false,
        short_of_memory: false,
    };
    visit_all(&setting)
}

fn visit_all(setting: &closure::Setting) -> closure::Findings {
    match closure::close(setting) {
        Ok(found) => found,
        Err(what) => panic!("{what}"),
    }
}

/// Visits every state of one connection with tiny limits. From each the invariants hold and some
/// inputs lead to the end.
#[test]
fn every_state_keeps_its_promises_and_leads_to_the_end() {
    let packets = close(1, &[], &[Action::CloseAfterInput]);
    let lines = close(
        4,
        &[Action::Echo, Action::Fail],
        &[Action::Echo, Action::Close],
    );
    let raw = close(0, &[Action::Echo, Action::Close], &[]);
    let halves = close(0, &[Action::Finish], &[Action::Finish]);
    let mut all = closure::Findings::default();
    for found in [packets, lines, raw, halves] {
        assert!(
            found.states > 4_000 && found.moves > 25 * found.states,
            "{found:?}"
        );
        all.add(found);
    }
    use CloseReason::*;
    let reasons = BTreeSet::from([
        Finished,
        Closed,
        Failed,
        Aborted,
        Drained,
        DrainForced,
        Reset,
        Truncated,
        FrameTooLarge,
        HandshakeTimeout,
        FrameTimeout,
        IdleTimeout,
        WriteTimeout,
    ]);
    assert_eq!(
        all.reasons, reasons,
        "each of them is reached, and no other"
    );
    // Without TLS there is no handshake.
    assert_eq!(
        all.changes,
        BTreeSet::from([
            (State::Accepting, State::Open),
            (State::Accepting, State::Closing),
            (State::Open, State::Closing)
        ])
    );
}

/// Behind a proxy a connection waits for its header first, and that may stop, be left out or be wrong at every byte.
#[test]
fn every_state_before_a_header_leads_to_the_end_too() {
    let found = visit_all(&closure::Setting {
        framing: 0,
        on_frame: vec![Action::Echo, Action::Close],
        on_end: vec![Action::CloseAfterInput],
        proxied: true,
        lazy: false,
        short_of_memory: false,
    });
    use CloseReason::*;
    let early = [
        ClosedEarly,
        BadProxyHeader,
        HandshakeTimeout,
        Reset,
        Finished,
    ];
    assert!(
        early.iter().all(|reason| found.reasons.contains(reason)),
        "{found:?}"
    );
    assert!(found.changes.contains(&(State::Accepting, State::Open)));
    assert!(found.changes.contains(&(State::Accepting, State::Closing)));
}

/// Short strings in every cut give the same frames. `exhaust` plays strings of up to eight bytes.
#[test]
fn every_short_string_is_the_same_frames_in_every_cut() {
    for framing in 0..Action::FRAMINGS {
        match strings::play(framing, 5) {
            Ok(played) => assert_eq!(played, (0..=5).map(|length| 8_u64.pow(length)).sum::<u64>()),
            Err(what) => panic!("{what}"),
        }
    }
}

/// What an outgoing connection can do before it is open, in the clear and over TLS.
#[cfg(feature = "tls")]
fn connecting() -> BTreeSet<(State, State)> {
    use portcullis::sim::{ConnModel, Input};
    let plain = || portcullis::Connect::new(portcullis::Framing::Packet1);
    let secure = || plain().tls(sim_tls::client_config(), "sim.test");
    let mut changes = BTreeSet::new();
    for connect in [plain(), secure()] {
        for input in [
            Input::Admit,
            Input::Act(Action::Close),
            Input::Act(Action::Abort),
            Input::Act(Action::Fail),
        ] {
            let mut model = ConnModel::connecting(&connect).expect("options that work");
            for input in [
                Input::Act(Action::Send(3)),
                Input::Act(Action::Finish),
                Input::Act(Action::Send(3)),
                Input::Turn,
                input,
                Input::Turn,
            ] {
                model.apply(&input).expect("as promised");
            }
            changes.extend(model.take_transitions());
        }
    }
    changes
}

/// Every schedule of three moves behind TLS 1.3 and of two behind 1.2, and with the plain worlds every legal transition is seen and no other.
#[cfg(feature = "tls")]
#[test]
fn every_short_schedule_behind_tls_keeps_its_promises() {
    let mut changes = close(0, &[Action::Echo, Action::Close], &[]).changes;
    use schedules::{Start, Version};
    // The second version adds no transition; two moves of it find what is different.
    for (version, start, longest) in [
        (Version::Tls13, Start::Connected, 3),
        (Version::Tls13, Start::Open, 3),
        (Version::Tls13, Start::Upgrade, 3),
        (Version::Tls12, Start::Connected, 2),
        (Version::Tls12, Start::Open, 2),
        (Version::Tls12, Start::Upgrade, 2),
    ] {
        for length in 1..=longest {
            match schedules::play(version, start, length, || false) {
                Ok(found) => {
                    assert!(found.all && found.schedules == 16_u64.pow(length as u32));
                    changes.extend(found.changes);
                }
                Err(what) => panic!("{what}"),
            }
        }
    }
    changes.extend(connecting());
    let legal = State::ALL
        .iter()
        .flat_map(|&from| State::ALL.iter().map(move |&to| (from, to)));
    let legal: BTreeSet<_> = legal.filter(|(from, to)| from.may_become(*to)).collect();
    assert_eq!(changes, legal);
}

/// Random inputs, a socket without memory among them, which the searches leave out.
#[test]
fn random_inputs_break_no_promise() {
    const ACTIONS: [Action; 9] = [
        Action::Echo,
        Action::Send(200),
        Action::Pause,
        Action::Resume,
        Action::CloseAfterInput,
        Action::Finish,
        Action::Close,
        Action::Timer(7),
        Action::MaxFrame(3),
    ];
    for seed in 0..4000 {
        let mut random = Random::new(seed);
        let framing = Action::framing(random.below(6) as u8);
        let listen = Listen::tcp("127.0.0.1:0", framing).with(|listen| {
            listen.conn.low_watermark = 10;
            listen.conn.high_watermark = 300;
            listen.conn.output_limit = 400;
        });
        let mut model = ConnModel::new(&listen).expect("options that work");
        let mut inputs = Vec::new();
        for _ in 0..random.between(1, 40) {
            let action = ACTIONS[random.below(ACTIONS.len())];
            inputs.push(match random.below(16) {
                0..=3 => Input::Bytes(vec![random.below(3) as u8; random.between(1, 5)]),
                4 | 5 => Input::OutOfMemory,
                6 => Input::Room(random.below(400) as u16),
                7 => Input::Spurious,
                8 | 9 => Input::Turn,
                10 => Input::Step,
                11 => Input::ExpireDue,
                12 => Input::Expire,
                13 => Input::OnFrame(vec![Action::Echo, action]),
                14 => Input::Act(action),
                _ => [Input::Finish, Input::Reset, Input::BreakPipe, Input::Drain][random.below(4)]
                    .clone(),
            });
            let input = inputs.last().expect("just pushed");
            if let Err(violation) = model.apply(input) {
                panic!("seed {seed}: {violation} after {inputs:?}");
            }
        }
    }
}
