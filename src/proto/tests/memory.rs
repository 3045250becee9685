//! The memory of a connection: none while idle, none for a header's claim, none large for long.

use std::sync::Arc;

use super::*;

/// Returns the capacity of the connection's buffers.
fn holds(rig: &mut Rig) -> usize {
    rig.machine.parts().recv_buf.raw().0.capacity() + rig.machine.parts().send_buf.capacity()
}

/// Returns the capacities of the pool's spare buffers, largest first.
fn spares(rig: &mut Rig) -> Vec<usize> {
    let mut buffers = Vec::new();
    loop {
        let buffer = rig.pool.buffers.take();
        if buffer.capacity() == 0 {
            break;
        }
        buffers.push(buffer);
    }
    let mut capacities: Vec<usize> = buffers.iter().map(Vec::capacity).collect();
    capacities.sort_unstable_by(|one, other| other.cmp(one));
    for buffer in buffers {
        rig.pool.give(buffer);
    }
    capacities
}

#[test]
fn an_idle_connection_holds_no_memory() {
    let mut rig = Rig::open(echo);
    for _ in 0..10 {
        rig.receive([packet2("whole"), vec![0]].concat());
        assert!(rig.machine.parts().recv_buf.raw().0.capacity() > 0);
        rig.receive([1, b'x']);
        assert_eq!(holds(&mut rig), 0);
        assert_eq!(rig.machine.buffered(), 0);
    }
    assert!(spares(&mut rig).len() <= 2, "the same buffers went round");
}

#[test]
fn a_closing_connection_gives_back_its_input() {
    let mut rig = Rig::open(echo);
    rig.receive([0, 9, 1, 2, 3]);
    rig.close();
    assert_eq!(holds(&mut rig), 0);
    assert_eq!(spares(&mut rig).len(), 1);
    rig.receive([0, 9, 1, 2, 3]);
    assert_eq!(holds(&mut rig), 0, "what is discarded is not kept");
}

#[test]
fn an_ended_connection_gives_back_everything() {
    let mut rig = Rig::open(echo);
    rig.room = 0;
    rig.receive([packet2("x"), vec![0]].concat());
    assert!(holds(&mut rig) > 0);
    rig.machine
        .end(Closed::new(CloseReason::Killed), &mut rig.pool);
    assert_eq!(holds(&mut rig), 0);
    assert_eq!(spares(&mut rig).len(), 2);
}

/// The header alone decides about the maximum; buffers grow with received bytes.
#[test]
fn a_header_alone_costs_nothing() {
    for header in [
        0x8000_0000_u32,
        0xFFFF_FFFF,
        0x7FFF_FFFC,
        8 * 1024 * 1024 + 1,
    ] {
        let mut rig = Rig::open_with(&Framing::Packet4, limits(), echo);
        rig.receive(header.to_be_bytes());
        assert_eq!(rig.finish(), CloseReason::FrameTooLarge, "{header:#x}");
    }
    let mut rig = Rig::open_with(&Framing::Packet4, limits(), echo);
    rig.receive((8_u32 * 1024 * 1024).to_be_bytes());
    rig.receive([0; 100]);
    assert!(rig.is_open());
    assert!(rig.machine.parts().recv_buf.raw().0.capacity() < 1024);
}

#[test]
fn a_large_frame_leaves_no_large_buffer() {
    const MANY: usize = 1 << 20;
    let mut rig = Rig::open_with(&Framing::Packet4, no_limits(), silent);
    let mut wire = u32::try_from(MANY).expect("fits").to_be_bytes().to_vec();
    wire.resize(4 + MANY, 7);
    // The beginning of the next frame comes with the end of the large one.
    wire.extend_from_slice(&[0, 0, 0, 9, 1, 2]);
    for piece in wire.chunks(64 * 1024) {
        rig.receive(piece);
    }
    assert_eq!(rig.events(), [frame(vec![7; MANY])]);
    assert_eq!(rig.machine.buffered(), 6);
    assert!(
        rig.machine.parts().recv_buf.raw().0.capacity() <= 128 * 1024,
        "{}",
        rig.machine.parts().recv_buf.raw().0.capacity()
    );
    rig.receive([3; 7]);
    assert_eq!(rig.events(), [frame([1, 2, 3, 3, 3, 3, 3, 3, 3])]);
    assert_eq!(holds(&mut rig), 0);
    assert!(spares(&mut rig)
        .iter()
        .all(|capacity| *capacity <= 128 * 1024));
}

#[test]
fn a_large_answer_leaves_no_large_buffer() {
    let mut rig = Rig::open_with(&Framing::Packet4, no_limits(), silent);
    rig.act(|turn| turn.send(&vec![1; 1 << 20]).expect("open"));
    assert_eq!(rig.answers().len(), 4 + (1 << 20));
    assert_eq!(holds(&mut rig), 0);
    assert!(spares(&mut rig)
        .iter()
        .all(|capacity| *capacity <= 128 * 1024));
}

/// Taking single frames out of a large read copies no buffered bytes.
#[test]
fn buffered_frames_are_taken_in_place() {
    let mut rig = Rig::open_with(&Framing::Packet1, no_limits(), one_at_a_time);
    let count = 30_000;
    rig.receive([1, b'x'].repeat(count));
    let before = rig.machine.parts().recv_buf.raw().0.as_ptr();
    for _ in 1..count / 3 {
        rig.resume();
    }
    assert_eq!(rig.machine.parts().recv_buf.raw().0.as_ptr(), before);
    assert_eq!(
        rig.machine.parts().recv_buf.raw().1,
        2 * (count / 3 - 1),
        "where it was, and no byte moved"
    );
    for _ in count / 3..count {
        rig.resume();
    }
    assert_eq!(rig.events().len(), count);
    assert_eq!(holds(&mut rig), 0);
}

#[test]
fn buffered_bytes_are_counted() {
    let mut rig = Rig::open(one_at_a_time);
    rig.receive([packet2("one"), packet2("two"), packet2("three")].concat());
    assert_eq!(rig.machine.buffered(), 5 + 7);
    rig.resume();
    assert_eq!(rig.machine.buffered(), 7);
    rig.room = 0;
    rig.act(|turn| turn.send(b"x").expect("open"));
    assert_eq!((rig.machine.buffered(), rig.machine.queued()), (10, 3));
}

#[test]
fn timers_are_counted() {
    let mut rig = Rig::open(silent);
    assert_eq!(rig.machine.memory(), Held::NOTHING);
    for key in 0..=u8::MAX {
        rig.act(|turn| turn.set_timer(key, secs(1)));
    }
    assert!(rig.machine.memory().own >= 256 * 16);
    rig.pass(secs(1));
    assert_eq!(rig.machine.memory(), Held::NOTHING);
}

#[test]
fn a_connection_that_goes_with_its_output_keeps_no_payload() {
    let mut rig = Rig::open_with(&Framing::Raw, no_limits(), silent);
    let payload = Arc::<[u8]>::from([7; 5000]);
    let mut chunks = [Chunk::Shared(Arc::clone(&payload))];
    let frame = rig.machine.frame(&mut chunks, 8, rig.now, &mut rig.pool);
    let frame = frame.expect("room");
    rig.machine.queue_frame(frame, rig.now, &mut rig.pool);
    assert_eq!(rig.pool.shared.bytes(), payload.len());
    rig.machine.recycle(&mut rig.pool);
    assert_eq!(rig.pool.shared.bytes(), 0);
    drop(chunks);
    assert_eq!(Arc::strong_count(&payload), 1);
}
