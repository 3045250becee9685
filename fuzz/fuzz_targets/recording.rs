//! Recordings with any content, and those of real worlds: as they are, or damaged with the right checksums.
//!
//! Whatever a file says: it is read, listed, made a script of and replayed up to an end or a difference, in bounded memory.
//! What is recorded and not damaged replays exactly.
#![no_main]

mod script;

use std::cell::RefCell;
use std::fmt;
use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use kit::forged::{self, Block, WORDS};
use kit::unlinked::{self, Unlinked};
use libfuzzer_sys::arbitrary::{self, Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use portcullis::sim::{Action, Answer, ClientId, Ending, Op, Replay, Script, Sim, Tape};
use portcullis::{
    Closed, Config, Connect, Context, Framing, Handle, Handler, Listen, Outcome, Payloads,
    Recording, Retry,
};

use script::Lines;

/// Maximum number of blocks in a file: each takes 64 KiB.
const MAX_BLOCKS: usize = 8;

#[derive(Debug)]
struct Plan {
    server: Server,
    /// 0 for none, 1 for hashes, 2 for all.
    payloads: u8,
    content: Content,
    layout: Layout,
}

enum Content {
    Words(Vec<u64>),
    Recorded(Script, Vec<Edit>),
}

/// How the server is made, recorded or not.
#[derive(Arbitrary, Clone, Copy, Debug)]
struct Server {
    framing: u8,
    /// Maximum number of connections, and the answer to outgoing ones.
    cap: u8,
}

/// How the words stand in the file.
#[derive(Arbitrary, Debug)]
struct Layout {
    max_blocks: u8,
    /// Words of a block, divided by 4; 0 for all that fit.
    size: u8,
    /// The number of the first block.
    number: u8,
    first: u8,
    damaged: u8,
}

/// A change of a word of a recording.
#[derive(Arbitrary, Debug)]
struct Edit {
    at: u16,
    how: u8,
    word: u64,
}

impl<'a> Arbitrary<'a> for Plan {
    fn arbitrary(input: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        let [kind, payloads]: [u8; 2] = input.arbitrary()?;
        Ok(Self {
            server: input.arbitrary()?,
            payloads: payloads % 3,
            layout: input.arbitrary()?,
            content: match kind {
                0..128 => Content::Words(words(input)?),
                kind => {
                    let edits = (0..kind % 8).map(|_| input.arbitrary());
                    let edits = edits.collect::<arbitrary::Result<_>>()?;
                    Content::Recorded(script::script(input)?, edits)
                }
            },
        })
    }
}

impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Words(words) => write!(f, "words {words:#x?}"),
            Self::Recorded(script, edits) => write!(f, "{edits:#x?}, {:?}", Lines(script)),
        }
    }
}

/// What is left of the input.
fn words(input: &mut Unstructured<'_>) -> arbitrary::Result<Vec<u64>> {
    let bytes = input.bytes(input.len())?;
    let words = bytes.chunks(8).map(|bytes| {
        let mut word = [0; 8];
        word[..bytes.len()].copy_from_slice(bytes);
        u64::from_le_bytes(word)
    });
    Ok(words.collect())
}

fuzz_target!(|plan: Plan| {
    let Plan {
        server,
        payloads,
        content,
        layout,
    } = plan;
    match content {
        Content::Words(words) => {
            play(&layout.file(payloads, &words), server);
        }
        Content::Recorded(script, edits) => {
            let (file, outcome) = record(&script, payloads, server);
            if !edits.is_empty() {
                let mut words = forged::words(&file);
                edits.iter().for_each(|edit| edit.apply(&mut words));
                play(&layout.file(payloads, &words), server);
                return;
            }
            let (replayed, ending) = play(&file, server);
            if payloads == 2 && !outcome.contains(DETACHED) {
                assert_eq!(ending, Some(Ok(Ending::Complete)));
                assert_eq!(replayed, outcome);
            }
        }
    }
});

impl Layout {
    fn file(&self, payloads: u8, words: &[u64]) -> Vec<u8> {
        let chosen = match self.size {
            0 => WORDS,
            size => usize::from(size) * 4,
        };
        let size = chosen.max(words.len().div_ceil(MAX_BLOCKS)).min(WORDS);
        let max_blocks = (usize::from(self.max_blocks) + MAX_BLOCKS - 1) % MAX_BLOCKS + 1;
        let first = match self.first {
            u8::MAX => u64::MAX,
            first => u64::from(first),
        };
        let blocks: Vec<Block<'_>> = (u64::from(self.number)..)
            .zip(words.chunks(size).take(MAX_BLOCKS))
            .map(|(number, words)| Block {
                number,
                first,
                time: number,
                words,
            })
            .collect();
        let mut file = forged::file(payloads.into(), max_blocks as u64, &blocks);
        if let Some(damaged) = usize::from(self.damaged).checked_sub(1) {
            let at = forged::HEADER + damaged % MAX_BLOCKS * forged::BLOCK;
            file.iter_mut().skip(at).take(1).for_each(|byte| *byte ^= 1);
        }
        file
    }
}

impl Edit {
    fn apply(&self, words: &mut Vec<u64>) {
        let at = usize::from(self.at) % words.len().max(1);
        let Some(there) = words.get_mut(at) else {
            return;
        };
        let [other, shift] = [self.word as usize % 64, usize::from(self.how) / 8];
        match self.how % 8 {
            0 => *there = self.word,
            1 => *there ^= 1 << (self.word % 64),
            2 => *there ^= self.word << shift,
            3 => words.insert(at, self.word),
            4 => drop(words.remove(at)),
            5 => words.truncate(at),
            // Records again, or in another order.
            6 => words.extend_from_within(at..words.len().min(at + other)),
            _ => {
                let behind = &mut words[at..];
                behind.rotate_left(other % behind.len());
            }
        }
    }
}

// --- the server ---

const DETACHED: &str = "detaches";
const REMOTE: &str = "192.0.2.7:80";

#[derive(Default)]
struct App {
    journal: Vec<String>,
    handle: Option<Handle<Self>>,
}

/// Does what the first byte of a frame says.
struct Subject;

impl Subject {
    fn note(cx: &mut Context<'_, App>, what: &str) {
        let id = cx.conn.id();
        cx.app.journal.push(format!("{id} {what}"));
    }
}

impl Handler<App> for Subject {
    fn on_open(&mut self, cx: &mut Context<'_, App>) -> Outcome {
        let addr = cx.conn.local_addr()?;
        Self::note(cx, &format!("opens at {addr}"));
        cx.conn.set_timer(0, Duration::from_millis(700));
        Ok(())
    }

    fn on_frame(&mut self, cx: &mut Context<'_, App>, frame: &[u8]) -> Outcome {
        Self::note(cx, &format!("frame {}", frame.escape_ascii()));
        let id = cx.conn.id();
        let handle = cx.app.handle.clone().expect("it is set");
        match frame.first() {
            Some(b'c') => cx.conn.close(),
            Some(b'm') => cx.conn.send(vec![b'x'; 20_000])?,
            Some(b'o') => {
                let connect = Connect::new(Framing::Line).with(|connect| {
                    connect.retry = Some(Retry::new(3));
                });
                let connects = cx.conn.control().connect(REMOTE, connect, Self);
                Self::note(cx, &format!("connects: {}", connects.is_ok()));
            }
            Some(b'd') => handle.drain(Duration::from_millis(500))?,
            Some(b'k') => handle.kill(id)?,
            Some(b's') => handle.send(id, frame.to_vec())?,
            Some(b't') => cx
                .conn
                .set_timer(1, Duration::from_millis(frame.len() as u64)),
            Some(b'x') => {
                Self::note(cx, DETACHED);
                cx.conn.detach(drop)?;
            }
            _ => cx.conn.send(frame)?,
        }
        Ok(())
    }

    fn on_timer(&mut self, cx: &mut Context<'_, App>, number: u8) -> Outcome {
        Self::note(cx, &format!("timer {number}"));
        cx.conn.send("still there?\n")?;
        Ok(())
    }

    fn on_finish(&mut self, cx: &mut Context<'_, App>) -> Outcome {
        Self::note(cx, "finish");
        cx.conn.close();
        Ok(())
    }

    fn on_writable(&mut self, cx: &mut Context<'_, App>) -> Outcome {
        Self::note(cx, "writable");
        Ok(())
    }

    fn on_connect_failed(&mut self, cx: &mut Context<'_, App>, closed: &Closed) {
        cx.app.journal.push(format!("connect failed: {closed}"));
    }

    fn on_close(&mut self, cx: &mut Context<'_, App>, closed: &Closed) {
        Self::note(cx, &format!("closes: {closed}"));
    }
}

impl Server {
    fn config(self) -> Config {
        Config::max_connections(usize::from(self.cap % 8) + 1)
    }

    fn listen(self) -> Listen {
        Listen::tcp("127.0.0.1:0", Action::framing(self.framing)).with(|listen| {
            listen.conn.max_frame = Some(10_000);
            if self.cap >= 128 {
                listen.conn.low_watermark = 10_000;
                listen.conn.high_watermark = 30_000;
                listen.conn.output_limit = 100_000;
            }
        })
    }

    fn answer(self) -> Answer {
        match self.cap / 8 % 4 {
            0 => Answer::Accept,
            1 => Answer::AcceptAfter(Duration::from_millis(30)),
            2 => Answer::FailAfter(Duration::from_millis(20), 113),
            _ => Answer::Refuse,
        }
    }
}

/// Plays the script in a world, and returns the recording and everything that happened.
fn record(script: &Script, payloads: u8, server: Server) -> (Vec<u8>, String) {
    let kinds = [Payloads::Dropped, Payloads::Hashed, Payloads::Kept];
    let payloads = kinds[usize::from(payloads)];
    let path = unlinked::path("recording");
    let recording = Recording::new(&path).with(|recording| recording.payloads = payloads);
    // That of an earlier finding.
    let _ = fs::remove_file(&path);
    let sim = Sim::recorded(0, server.config(), App::default(), recording);
    let mut sim = sim.expect("a recording");
    sim.remote(REMOTE, server.answer());
    let handle = sim.handle();
    sim.app_mut().handle = Some(handle);
    let listens = sim.listen(server.listen(), |_, _| Subject);
    let addr = listens.expect("a listener in an empty world");
    let mut clients = Vec::new();
    for op in &script.ops {
        perform(&mut sim, addr, &mut clients, op);
    }
    let rest = sim.try_advance(Duration::from_secs(100));
    rest.unwrap_or_else(|violation| panic!("{violation}"));
    let outcome = format!("{:?}\n{:#?}", sim.stats(), sim.app().journal);
    drop(sim);
    let file = fs::read(&path).expect("the recording");
    fs::remove_file(&path).expect("our own file");
    (file, outcome)
}

/// Performs an operation of clients, of the world or of a handle: a recording has no changes by the program.
fn perform(sim: &mut Sim<App>, addr: SocketAddr, clients: &mut Vec<ClientId>, op: &Op) {
    let handle = sim.handle();
    match op {
        Op::Connect => clients.extend(sim.connect(addr)),
        // Refused when the queue is full.
        Op::Drain { millis } => drop(handle.drain(Duration::from_millis(u64::from(*millis)))),
        Op::Kill { .. } | Op::Notify { .. } | Op::Cap { .. } | Op::Suspend { .. } => {}
        op => {
            let performed = sim.try_perform(addr, clients, op);
            performed.unwrap_or_else(|violation| panic!("{violation}"));
        }
    }
}

// --- the reader ---

/// Reads a file in every way, and returns what a replay of it led to.
fn play(file: &[u8], server: Server) -> (String, Option<Result<Ending, ()>>) {
    thread_local!(static FILE: RefCell<Unlinked> = RefCell::new(Unlinked::new("file")));
    FILE.with_borrow_mut(|copy| {
        copy.put(file).expect("a file takes all");
        let tape = match Tape::read(copy.path()) {
            Ok(tape) => tape,
            Err(error) => {
                check_words(&error.to_string());
                return (String::new(), None);
            }
        };
        let mut tape = match tape.payloads() {
            Payloads::Kept => tape,
            _ => tape.filled(|_, before, bytes| bytes.fill(b"am\ns"[before as usize % 4])),
        };
        check_words(&format!("{tape:?} {}", tape.ending()));
        assert!(tape.lines().inspect(|line| check_words(line)).count() <= file.len() / 8);
        let script = tape.script(|_, connection| connection % 5 != 4);
        match script {
            Ok(script) => {
                let connects = script.ops.iter().filter(|op| **op == Op::Connect);
                assert!(connects.count() <= tape.connections() as usize);
            }
            Err(error) => check_words(&error.to_string()),
        }
        replay(tape, server)
    })
}

fn replay(tape: Tape, server: Server) -> (String, Option<Result<Ending, ()>>) {
    let is_whole = tape.is_whole();
    let mut replay = match Replay::new(tape, server.config(), App::default()) {
        Ok(replay) => replay,
        Err(error) => {
            assert!(!is_whole, "{error}");
            check_words(&error.to_string());
            return (String::new(), None);
        }
    };
    replay.app_mut().handle = Some(replay.handle());
    let listens = replay.listen(server.listen(), |_, _| Subject);
    let ended = replay.run();
    assert_eq!(replay.step().ok(), ended.is_ok().then_some(false));
    match &ended {
        Ok(ending) => assert_eq!(*ending, replay.ending()),
        Err(divergence) => check_words(&divergence.to_string()),
    }
    if let Err(error) = listens {
        check_words(&error.to_string());
    }
    let outcome = format!("{:?}\n{:#?}", replay.stats(), replay.app().journal);
    (outcome, Some(ended.map_err(drop)))
}

/// What is printed is a line.
#[track_caller]
fn check_words(words: &str) {
    assert!(!words.chars().any(char::is_control), "{words:?}");
}
