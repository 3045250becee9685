//! A damaged file plays up to its damage, and then says where that is. Nothing in a file can harm its reader.

use std::fs;
use std::time::Duration;

use kit::forged::{self, Block};
use kit::net::Place;
use portcullis::sim::{Ending, Random, Replay, Tape};
use portcullis::{Payloads, Recording};

use crate::{config, listen, recorded_world, script, Journal, Talker};

const HEADER: u64 = 64;
const BLOCK: u64 = 64 * 1024;

/// Records of one word: an orderly end, and the reason of a connection's end.
const END: u64 = call(0, 0, 0);
const REASON: u64 = call(2, 0, 0);

/// The first word of the record of a call: its number, its form and its value.
const fn call(number: u64, form: u64, value: u64) -> u64 {
    6 | number << 32 | form << 38 | value << 40
}

fn block(number: u64, words: &[u64]) -> Block<'_> {
    let (first, time) = (0, 0);
    Block {
        number,
        first,
        time,
        words,
    }
}

/// A recording of several blocks, and the journal of its server.
fn recorded(place: &Place, max_bytes: u64) -> (Vec<u8>, Journal) {
    let path = place.path("whole");
    let recording = Recording::new(&path).with(|recording| {
        recording.payloads = Payloads::Kept;
        recording.max_bytes = max_bytes;
    });
    let (mut sim, addr) = recorded_world(recording);
    sim.try_play(addr, &script(7, 200), |_, _| Ok(()))
        .expect("no violation");
    sim.try_advance(Duration::from_secs(200))
        .expect("no violation");
    // Large answers fill blocks.
    let client = sim.connect(addr).expect("room");
    for _ in 0..2 {
        sim.send(client, b"much\n");
        sim.advance(Duration::from_millis(10));
    }
    let journal = sim.app().clone();
    drop(sim);
    let bytes = fs::read(&path).expect("a file");
    fs::remove_file(&path).expect("removed");
    (bytes, journal)
}

/// Plays these bytes. The journal is a beginning of the recorded one.
#[track_caller]
fn play(place: &Place, bytes: &[u8], journal: &Journal) -> Option<(Ending, usize)> {
    let path = place.path("damaged");
    fs::write(&path, bytes).expect("written");
    let tape = Tape::read(&path).ok()?;
    assert!(tape.is_whole());
    let ending = tape.ending();
    let mut replay = Replay::new(tape, config(), Journal::new()).expect("a whole tape");
    let listens = replay.listen(listen(), |_, _| Talker::default());
    assert_eq!(replay.run(), Ok(ending));
    let played = replay.app().len();
    assert!(journal.starts_with(replay.app()), "{ending:?}");
    assert!(listens.is_ok() || played == 0);
    Some((ending, played))
}

#[test]
fn a_truncated_file_plays_up_to_its_end() {
    let place = Place::new();
    let (bytes, journal) = recorded(&place, 64 << 20);
    assert!(bytes.len() as u64 > HEADER + 6 * BLOCK, "{}", bytes.len());
    let whole = play(&place, &bytes, &journal);
    assert_eq!(whole, Some((Ending::Complete, journal.len())));
    let mut random = Random::new(1);
    let edges = (0..7).flat_map(|block| {
        let at = HEADER + block * BLOCK;
        [at - 1, at, at + 1, at + HEADER, at + HEADER + 9]
    });
    let chosen: Vec<usize> = edges
        .map(|at| usize::try_from(at).expect("small"))
        .chain((0..120).map(|_| random.below(bytes.len())))
        .filter(|at| *at < bytes.len())
        .collect();
    let mut parts = Vec::new();
    for length in chosen {
        let played = play(&place, &bytes[..length], &journal);
        let Some((ending, played)) = played else {
            assert!(length < 64, "{length}");
            continue;
        };
        let block = (length as u64 - HEADER) / BLOCK;
        let is_edge = (length as u64 - HEADER) % BLOCK == 0;
        match ending {
            Ending::Unfinished => assert!(is_edge, "{length}"),
            ending => assert_eq!(
                ending,
                Ending::Damaged {
                    offset: HEADER + block * BLOCK
                },
                "{length}"
            ),
        }
        parts.push((length, played));
    }
    parts.sort_unstable();
    assert!(parts.is_sorted_by_key(|(_, played)| *played));
    assert!(parts.iter().any(|(_, played)| *played > journal.len() / 2));
}

#[test]
fn a_flipped_byte_is_found() {
    let place = Place::new();
    let (bytes, journal) = recorded(&place, 64 << 20);
    let mut random = Random::new(2);
    let headers = [0, 3]
        .into_iter()
        .flat_map(|block| (0..64).map(move |at| HEADER + block * BLOCK + at));
    let chosen: Vec<usize> = (0..HEADER)
        .chain(headers)
        .map(|at| usize::try_from(at).expect("small"))
        .chain((0..100).map(|_| random.below(bytes.len())))
        .collect();
    for at in chosen {
        let mut bytes = bytes.clone();
        bytes[at] ^= 1 << random.below(8);
        match play(&place, &bytes, &journal) {
            None => assert!(at < 64, "{at}"),
            Some((ending, _)) => {
                let block = (at as u64 - HEADER) / BLOCK;
                let offset = HEADER + block * BLOCK;
                assert_eq!(ending, Ending::Damaged { offset }, "{at}");
            }
        }
    }
}

/// Once the oldest part is overwritten, the newest block may be anywhere in the file.
#[test]
fn damage_of_a_full_file_is_found() {
    let place = Place::new();
    let (bytes, _) = recorded(&place, 300_000);
    let slots: Vec<usize> = (64..bytes.len()).step_by(65536).collect();
    let number = |slot: usize| -> u64 {
        let number = bytes[slot + 8..slot + 16].try_into().expect("eight");
        u64::from_le_bytes(number)
    };
    let mut by_age = slots.clone();
    by_age.sort_by_key(|slot| number(*slot));
    assert!(number(by_age[0]) > 0);
    for (age, slot) in by_age.iter().enumerate() {
        let mut bytes = bytes.clone();
        bytes[slot + 100] ^= 1;
        let path = place.path("damaged");
        fs::write(&path, &bytes).expect("written");
        let tape = Tape::read(&path).expect("a recording");
        assert!(!tape.is_whole());
        let offset = *slot as u64;
        let expected = match age {
            // The file begins behind it.
            0 => Ending::Complete,
            _ => Ending::Damaged { offset },
        };
        assert_eq!(tape.ending(), expected, "block {age} of {}", by_age.len());
    }
}

/// A power failure while the first block is overwritten for the first time costs that block alone.
#[test]
fn a_full_file_without_its_first_block_has_the_others() {
    let place = Place::new();
    let path = place.path("torn");
    let records = [END; 10];
    let blocks = [1, 2, 3].map(|number| block(number, &records));
    fs::write(&path, forged::file(2, 4, &blocks)).expect("written");
    let tape = Tape::read(&path).expect("a recording");
    let offset = HEADER;
    let lines = tape.lines().count();
    assert_eq!((lines, tape.is_whole()), (30, false));
    assert_eq!(tape.ending(), Ending::Complete);

    let records = [REASON; 10];
    let blocks = [1, 2, 3].map(|number| block(number, &records));
    fs::write(&path, forged::file(2, 4, &blocks)).expect("written");
    let tape = Tape::read(&path).expect("a recording");
    assert_eq!(tape.ending(), Ending::Damaged { offset });
    // As long as the file is not full, its beginning is lost.
    fs::write(&path, forged::file(2, 5, &blocks)).expect("written");
    let tape = Tape::read(&path).expect("a recording");
    assert_eq!((tape.lines().count(), tape.is_whole()), (0, true));
    assert_eq!(tape.ending(), Ending::Damaged { offset });
}

/// The mark of an orderly end is the last record.
#[test]
fn an_end_in_the_middle_is_none() {
    let place = Place::new();
    let path = place.path("middle");
    fs::write(&path, forged::file(2, 4, &[block(0, &[END, REASON])])).expect("written");
    let tape = Tape::read(&path).expect("a recording");
    assert_eq!(tape.ending(), Ending::Unfinished);
}

/// A word can announce a payload of 4 GiB that is not in the file.
#[test]
fn announced_payloads_take_little_memory() {
    const LARGE: u64 = 0xFFFF_FFFF << 32;
    let place = Place::new();
    let path = place.path("announced");
    // Connection 0, from 127.0.0.1.
    let accept = [call(18, 3, 11), 0x7F04_0000_0000, 0x12_3401];
    let read = LARGE | 4;
    let words = [&accept[..], &[read; 1000]].concat();
    fs::write(&path, forged::file(0, 4, &[block(0, &words)])).expect("written");
    let tape = Tape::read(&path).expect("a recording");
    assert_eq!(tape.connections(), 1);
    let mut tape = tape.filled(|_, _, bytes| panic!("{} bytes are made", bytes.len()));
    let length = tape.script(|_, _| true).map(|script| script.ops.len());
    let error = length.expect_err("too much").to_string();
    let words = ["announced", "256 MiB"];
    assert!(words.iter().all(|word| error.contains(word)), "{error}");
    assert!(tape.script(|_, _| false).is_ok());

    // As many frames as take more than all addresses.
    let poll = [2];
    let frame = [call(36, 2, 0), 0, LARGE | 7];
    let frames = frame.repeat(forged::WORDS / 3);
    let blocks = (1..16).map(|number| block(number, &frames));
    let blocks: Vec<Block> = [block(0, &poll)].into_iter().chain(blocks).collect();
    fs::write(&path, forged::file(0, 100, &blocks)).expect("written");
    let tape = Tape::read(&path).expect("a recording").filled(|_, _, _| {});
    assert_eq!(tape.lines().count(), 1 + 15 * 2 * forged::WORDS / 3);
    let mut replay = Replay::new(tape, config(), Journal::new()).expect("a whole tape");
    assert_eq!(replay.step(), Ok(false));
}

/// Bytes with right checksums are refused as records, without a panic and without memory.
#[test]
fn any_bytes_are_read() {
    let place = Place::new();
    let (bytes, _) = recorded(&place, 64 << 20);
    let path = place.path("any");
    let mut random = Random::new(3);
    for _ in 0..300 {
        let mut any: Vec<u8> = match random.below(3) {
            0 => (0..random.below(5000))
                .map(|_| random.bits() as u8)
                .collect(),
            _ => bytes[..random.below(bytes.len())].to_vec(),
        };
        for _ in 0..random.below(20) {
            let at = random.below(any.len().max(1));
            if let Some(byte) = any.get_mut(at) {
                *byte = random.bits() as u8;
            }
        }
        fs::write(&path, &any).expect("written");
        if let Ok(mut tape) = Tape::read(&path) {
            assert!(tape.lines().count() <= any.len());
            let _ = tape.script(|_, _| true);
        }
    }
}

/// What no recorder writes, with the checksums that it would have.
#[test]
fn records_that_are_none_are_damage() {
    let place = Place::new();
    let (bytes, journal) = recorded(&place, 64 << 20);
    let mut random = Random::new(4);
    for _ in 0..300 {
        let mut bytes = bytes.clone();
        for _ in 0..random.between(1, 4) {
            // In the first block.
            let at = 128 + random.below(2000) * 8;
            let word = match random.below(3) {
                0 => random.bits(),
                // A valid kind with anything else.
                1 => random.bits() & !15 | random.between(1, 6) as u64,
                _ => u64::MAX << random.below(64),
            };
            bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
        }
        forged::seal(&mut bytes[64..64 + 65536]);
        let path = place.path("misleading");
        fs::write(&path, &bytes).expect("written");
        let mut tape = Tape::read(&path).expect("a recording");
        assert!(tape.lines().count() <= bytes.len());
        let _ = tape.script(|_, _| true);
        let mut replay = Replay::new(tape, config(), Journal::new()).expect("a whole tape");
        if replay.listen(listen(), |_, _| Talker::default()).is_ok() {
            let _ = replay.run();
        }
        assert!(replay.app().len() <= journal.len() + 1000);
    }
}
