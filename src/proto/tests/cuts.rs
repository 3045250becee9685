//! The same bytes, cut anywhere, make the same events and the same end.

use proptest::prelude::*;

use super::*;

#[derive(Clone, Copy, Debug)]
enum Style {
    Echo,
    OneAtATime,
    SlowReader,
}

/// Returns the handler's events, the bytes for the peer, and the reason.
fn outcome(framing: &Framing, style: Style, pieces: &[&[u8]]) -> (Vec<Seen>, Vec<u8>, CloseReason) {
    let limits = Limits {
        max_frame: Some(40),
        ..limits()
    };
    let mut rig = Rig::open_with(framing, limits, move |turn, event| {
        if let (Style::OneAtATime, Seen::Frame(_)) = (style, event) {
            turn.pause();
        }
        echo(turn, event)
    });
    if let Style::SlowReader = style {
        rig.room = 0;
    }
    for piece in pieces {
        rig.inbox.push_back(Input::Bytes(piece.to_vec()));
    }
    rig.inbox.push_back(Input::Fin);
    rig.turn();
    for _ in 0..SPIN {
        if rig.gone.is_some() {
            break;
        }
        match style {
            Style::OneAtATime if rig.is_open() => rig.resume(),
            Style::SlowReader if rig.room == 0 && !rig.fin => rig.drain_to_peer(3),
            _ => rig.pass(secs(1)),
        }
    }
    let mut event = rig.events();
    // How often a slow reader causes congestion depends on the pieces.
    event.retain(|event| *event != Seen::Writable);
    if let Framing::Raw = framing {
        let bytes: Vec<u8> = event
            .iter()
            .filter_map(|event| match event {
                Seen::Frame(bytes) => Some(bytes.as_slice()),
                _ => None,
            })
            .collect::<Vec<_>>()
            .concat();
        event = vec![frame(bytes)];
    }
    (event, rig.answers(), rig.ended())
}

fn framings() -> impl Strategy<Value = Framing> {
    prop::sample::select(vec![
        Framing::Raw,
        Framing::Packet1,
        Framing::Packet2,
        Framing::Packet4,
        Framing::Line,
        Framing::Delimited(3),
    ])
}

/// Small numbers: lengths that fit, and delimiters. Never 0x16, which begins a ClientHello: how
/// much of one has arrived when the frame is refused depends on the pieces.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(
        prop_oneof![6 => 0_u8..4, 2 => Just(b'\n'), 1 => 30_u8..60, 1 => 250_u8..=255],
        0..200,
    )
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 400,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn cuts_make_no_difference(
        framing in framings(),
        style in prop::sample::select(vec![Style::Echo, Style::OneAtATime, Style::SlowReader]),
        bytes in bytes(),
        mut cuts in prop::collection::vec(0_usize..200, 0..12),
    ) {
        cuts.retain(|cut| *cut > 0 && *cut < bytes.len());
        cuts.sort_unstable();
        cuts.dedup();
        let mut pieces = Vec::new();
        let mut from = 0;
        for cut in cuts.into_iter().chain([bytes.len()]) {
            pieces.push(&bytes[from..cut]);
            from = cut;
        }
        pieces.retain(|piece| !piece.is_empty());
        let whole = outcome(&framing, style, &[bytes.as_slice()][..usize::from(!bytes.is_empty())]);
        let single: Vec<&[u8]> = bytes.chunks(1).collect();
        prop_assert_eq!(&outcome(&framing, style, &pieces), &whole);
        prop_assert_eq!(&outcome(&framing, style, &single), &whole);
    }
}
