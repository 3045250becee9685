//! The same bytes, cut anywhere, make the same events and the same end.

use super::*;
use crate::sim::Random;

#[derive(Clone, Copy, Debug)]
enum Style {
    Echo,
    OneAtATime,
    SlowReader,
}

/// Returns the handler's events, the bytes for the peer, and the reason.
fn outcome(framing: &Framing, style: Style, pieces: &[&[u8]]) -> (Vec<Seen>, Vec<u8>, CloseReason) {
    let limits = ConnConfig {
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

/// Small numbers: lengths that fit, and delimiters. Never 0x16, which begins a ClientHello: how
/// much of one has arrived when the frame is refused depends on the pieces.
fn byte(random: &mut Random) -> u8 {
    match random.below(10) {
        0..=5 => random.below(4) as u8,
        6..=7 => b'\n',
        8 => random.between(30, 59) as u8,
        _ => random.between(250, 255) as u8,
    }
}

#[test]
fn cuts_make_no_difference() {
    let framings = [
        Framing::Raw,
        Framing::Packet1,
        Framing::Packet2,
        Framing::Packet4,
        Framing::Line,
        Framing::Delimited(3),
    ];
    let styles = [Style::Echo, Style::OneAtATime, Style::SlowReader];
    for seed in 0..crate::testing::rounds(400) as u64 {
        let mut random = Random::new(seed);
        let (framing, style) = (
            &framings[random.below(framings.len())],
            styles[random.below(3)],
        );
        let length = random.below(200);
        let bytes: Vec<u8> = (0..length).map(|_| byte(&mut random)).collect();
        let mut cuts: Vec<usize> = (0..random.below(12))
            .map(|_| random.below(length))
            .collect();
        cuts.sort_unstable();
        let mut pieces = Vec::new();
        let mut from = 0;
        for cut in cuts.into_iter().chain([length]) {
            pieces.push(&bytes[from..cut]);
            from = cut;
        }
        pieces.retain(|piece| !piece.is_empty());
        let whole = outcome(
            framing,
            style,
            &[bytes.as_slice()][..usize::from(length > 0)],
        );
        let single: Vec<&[u8]> = bytes.chunks(1).collect();
        assert_eq!(outcome(framing, style, &pieces), whole, "seed {seed}");
        assert_eq!(outcome(framing, style, &single), whole, "seed {seed}");
    }
}
