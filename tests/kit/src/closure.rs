//! Every state that one connection can be in, visited once: breadth-first over small worlds, where every number is tiny.
//!
//! A state is the connection machine, its kernel, its handler's script, and the bytes that are on their way to the handler. From
//! each state every input is tried. No invariant may break, what the handler gets must be what a naive decoder makes
//! of the bytes, and from every state time alone must lead to the end, unless the handler has paused the connection.

use std::collections::{BTreeSet, HashSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

use portcullis::sim::{Action, Callback, ConnModel, Input};
use portcullis::{AccessRules, CloseReason, Listen, ProxyProtocol, State};

use crate::naive;

/// The longest payload.
const MAX_FRAME: usize = 2;
/// Bytes that the kernel holds for the server at most.
const WINDOW: usize = 3;
/// Deadlines after which every connection must have ended by itself.
const PATIENCE: usize = 24;

/// One small world: what does not change while it is searched.
#[derive(Clone, Debug)]
pub struct Setting {
    pub framing: u8,
    pub on_frame: Vec<Action>,
    pub on_end: Vec<Action>,
    /// A PROXY header comes before everything else.
    pub proxied: bool,
    /// Things pile up between two turns of the connection, in any combination. Else a turn follows each.
    pub lazy: bool,
    /// A read or a write may find no memory.
    pub short_of_memory: bool,
}

/// What a search found.
#[derive(Debug, Default)]
pub struct Findings {
    pub states: u64,
    pub moves: u64,
    /// Changes of [`State`] that were seen.
    pub changes: BTreeSet<(State, State)>,
    pub reasons: BTreeSet<CloseReason>,
    /// The longest of the shortest ways to a state.
    pub depth: usize,
}

impl Findings {
    pub fn add(&mut self, other: Self) {
        self.states += other.states;
        self.moves += other.moves;
        self.changes.extend(other.changes);
        self.reasons.extend(other.reasons);
        self.depth = self.depth.max(other.depth);
    }
}

/// All settings: every built-in framing that frames in its own way, and every kind of handler.
pub fn settings(lazy: bool) -> Vec<Setting> {
    let on_frame: [&[Action]; 9] = [
        &[Action::Echo],
        &[],
        &[Action::Echo, Action::Pause],
        &[Action::Echo, Action::Close],
        &[Action::Echo, Action::Finish],
        &[Action::CloseAfterInput, Action::Echo],
        &[Action::Pause, Action::Resume, Action::Send(0)],
        &[Action::Echo, Action::Fail],
        &[Action::Echo, Action::NotifyFlushed],
    ];
    let on_end: [&[Action]; 4] = [
        &[Action::CloseAfterInput],
        &[],
        &[Action::Echo, Action::Close],
        &[Action::Finish],
    ];
    let mut all = Vec::new();
    for framing in [1, 4, 0] {
        for on_frame in on_frame {
            for on_end in on_end {
                all.push(Setting {
                    framing,
                    on_frame: on_frame.to_vec(),
                    on_end: on_end.to_vec(),
                    proxied: false,
                    lazy,
                    // One framing for it: the states are many more.
                    short_of_memory: framing == 0,
                });
            }
        }
    }
    for framing in [1, 4, 0] {
        all.push(Setting {
            framing,
            on_frame: vec![Action::Echo],
            on_end: vec![Action::CloseAfterInput],
            proxied: true,
            lazy,
            short_of_memory: false,
        });
    }
    all
}

/// A state in the search.
struct World {
    model: ConnModel,
    /// How far the peer's stream has come.
    phase: usize,
    /// What is left of the header before it.
    header: &'static [u8],
    /// Sent by the peer, and not told to the handler yet.
    underway: Vec<u8>,
}

/// A way on: what happens, one after the other.
type Move = Vec<Step>;

#[derive(Clone, Debug, PartialEq)]
enum Step {
    /// The peer sends so many bytes of its stream.
    Bytes(usize),
    /// The peer sends a byte that begins no frame, where it stands between two, and then no more.
    Nonsense,
    Do(Input),
}

/// The peer has sent nonsense, and nothing after it.
const SPOILED: usize = usize::MAX;

impl World {
    fn new(setting: &Setting) -> Result<Self, String> {
        let tick = Duration::from_millis(1);
        let listen = Listen::tcp("127.0.0.1:0", Action::framing(setting.framing)).with(|listen| {
            listen.conn.max_frame = Some(MAX_FRAME);
            listen.conn.handshake_timeout = tick;
            listen.conn.frame_timeout = tick;
            listen.conn.idle_timeout = 2 * tick;
            listen.conn.write_timeout = tick;
            listen.conn.linger_timeout = tick;
            listen.conn.linger_bytes = 1;
            listen.conn.low_watermark = 1;
            listen.conn.high_watermark = 2;
            listen.conn.output_limit = 4;
        });
        let listen = if setting.proxied {
            listen.with(|listen| {
                listen.proxy_protocol = ProxyProtocol::Optional;
                listen.trusted_proxies = Some(AccessRules::allow_all());
            })
        } else {
            listen
        };
        let mut model = ConnModel::accepted(&listen).map_err(|error| error.to_string())?;
        for input in [
            Input::OnFrame(setting.on_frame.clone()),
            Input::OnEnd(setting.on_end.clone()),
        ] {
            model
                .apply(&input)
                .map_err(|violation| violation.to_string())?;
        }
        model.take_callbacks();
        Ok(Self {
            model,
            phase: 0,
            header: if setting.proxied { HEADER } else { b"" },
            underway: Vec::new(),
        })
    }

    fn fork(&self) -> Option<Self> {
        Some(Self {
            model: self.model.fork()?,
            phase: self.phase,
            header: self.header,
            underway: self.underway.clone(),
        })
    }

    /// A hash stands for a state.
    fn key(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        (
            self.model.state_hash(),
            self.phase,
            self.header.len(),
            &self.underway,
        )
            .hash(&mut hasher);
        hasher.finish()
    }

    /// Makes one move. `None` if it is not possible here.
    fn make(&mut self, setting: &Setting, steps: &[Step]) -> Result<Option<()>, String> {
        for step in steps {
            if self.step(setting, step)?.is_none() {
                return Ok(None);
            }
        }
        Ok(Some(()))
    }

    fn step(&mut self, setting: &Setting, step: &Step) -> Result<Option<()>, String> {
        let stream = stream(setting.framing);
        let wanted = match step {
            Step::Do(_) => 0,
            _ if self.phase == SPOILED => return Ok(None),
            Step::Bytes(count) => *count,
            // Without a header, or behind it: it may be left out.
            Step::Nonsense if self.phase == 0 && [0, HEADER.len()].contains(&self.header.len()) => {
                1
            }
            Step::Nonsense => return Ok(None),
        };
        if self.model.unread() + wanted > WINDOW {
            return Ok(None);
        }
        // Where in the input frames begin.
        let mut begins = 0;
        let input = match step {
            Step::Bytes(count) => {
                let (mut input, left) = (Vec::new(), self.header.len());
                input.extend(self.header.iter().take(*count));
                self.header = &self.header[input.len()..];
                let count = count - input.len();
                input.extend((0..count).map(|ahead| stream[(self.phase + ahead) % stream.len()]));
                self.phase = (self.phase + count) % stream.len();
                begins = left - self.header.len();
                Input::Bytes(input)
            }
            Step::Nonsense => {
                self.phase = SPOILED;
                Input::Bytes(vec![b'x'; 3])
            }
            Step::Do(input) => input.clone(),
        };
        let before = self.model.unread();
        self.model
            .apply(&input)
            .map_err(|violation| violation.to_string())?;
        if let Input::Bytes(bytes) = &input {
            // After FIN or RST nothing arrives any more.
            if self.model.unread() > before {
                self.underway.extend_from_slice(&bytes[begins..]);
            }
        }
        for callback in self.model.take_callbacks() {
            match callback {
                Callback::Frame(frame) => {
                    let taken =
                        naive::taken_by(&frame, setting.framing, MAX_FRAME, &self.underway)?;
                    self.underway.drain(..taken);
                }
                Callback::Finished if !self.underway.is_empty() => {
                    return Err(format!(
                        "told that the peer finished before {:?}",
                        self.underway
                    ));
                }
                _ => {}
            }
        }
        if self.model.state() == State::Closing {
            self.underway.clear();
            self.phase = 0;
            self.header = b"";
        }
        Ok(Some(()))
    }
}

const HEADER: &[u8] = b"PROXY UNKNOWN\r\n";

/// What the peer says, over and over.
fn stream(framing: u8) -> &'static [u8] {
    match framing {
        1 => b"\x00\x02bc",
        4 => b"a\n\n",
        _ => b"r",
    }
}

fn moves(setting: &Setting) -> Vec<Move> {
    let arrivals = [
        Step::Bytes(1),
        Step::Bytes(2),
        Step::Bytes(3),
        Step::Nonsense,
    ];
    let ends = [Input::Finish, Input::Reset].map(Step::Do);
    let others = [
        Input::Admit,
        Input::BreakPipe,
        Input::Room(0),
        Input::Room(1),
        Input::Room(u16::MAX),
        Input::Act(Action::Send(0)),
        Input::Act(Action::Pause),
        Input::Act(Action::Resume),
        Input::Act(Action::Close),
        Input::Act(Action::CloseAfterInput),
        Input::Act(Action::Abort),
        Input::Act(Action::Timer(1)),
        Input::Drain,
        Input::CutShort,
    ]
    .map(Step::Do);
    let famine = setting
        .short_of_memory
        .then_some(Step::Do(Input::OutOfMemory));
    let iterations = [Input::Turn, Input::Step, Input::ExpireDue, Input::Expire].map(Step::Do);
    let [turn, round, ..] = &iterations;
    let mut moves: Vec<Move> = iterations.iter().map(|turn| vec![turn.clone()]).collect();
    moves.push(vec![Step::Do(Input::Spurious), turn.clone()]);
    let steps = arrivals.iter().chain(&ends).chain(&others).chain(&famine);
    if setting.lazy {
        moves.extend(steps.map(|step| vec![step.clone()]));
        return moves;
    }
    moves.extend(steps.map(|step| vec![step.clone(), turn.clone()]));
    for arrival in &arrivals {
        moves.push(vec![arrival.clone(), round.clone()]);
        moves.extend(
            ends.iter()
                .map(|end| vec![arrival.clone(), end.clone(), turn.clone()]),
        );
    }
    moves.push(ends.iter().chain([turn]).cloned().collect());
    moves
}

/// Visits every state that can be reached.
///
/// # Errors
///
/// The shortest way to a state that breaks a promise, and the promise.
pub fn close(setting: &Setting) -> Result<Findings, String> {
    let moves = moves(setting);
    let start = World::new(setting)?;
    let mut findings = Findings::default();
    let mut visited: HashSet<u64> = HashSet::new();
    // How each state was first reached: from which, by which move, in how many.
    let mut came: Vec<(u32, u8, u16)> = vec![(0, 0, 0)];
    visited.insert(start.key());
    let mut queue = VecDeque::from([(0_u32, start)]);
    while let Some((at, world)) = queue.pop_front() {
        findings.states += 1;
        let depth = came[at as usize].2;
        findings.depth = findings.depth.max(usize::from(depth));
        let way = |last: Option<&Move>| {
            let mut way = Vec::new();
            let mut node = at;
            while node != 0 {
                let (parent, number, _) = came[node as usize];
                way.push(format!("{:?}", moves[usize::from(number)]));
                node = parent;
            }
            way.reverse();
            way.extend(last.map(|last| format!("{last:?}")));
            way.join(", ")
        };
        if let Err(what) = ends(&world, &mut findings) {
            return Err(format!("{setting:?}: after {}: {what}", way(None)));
        }
        let mut reached = Vec::new();
        for (number, step) in moves.iter().enumerate() {
            let Some(mut next) = world.fork() else {
                return Err("a plain connection cannot be copied".to_owned());
            };
            let made = next
                .make(setting, step)
                .map_err(|what| format!("{setting:?}: after {}: {what}", way(Some(step))))?;
            if made.is_none() {
                continue;
            }
            findings.moves += 1;
            findings.changes.extend(next.model.take_transitions());
            if let Some(end) = next.model.end() {
                findings.reasons.insert(end.reason);
                continue;
            }
            reached.push((number, next));
        }
        for (number, next) in reached {
            let fresh = u32::try_from(came.len()).map_err(|_| "too many states".to_owned())?;
            if visited.insert(next.key()) {
                came.push((at, u8::try_from(number).unwrap_or(u8::MAX), depth + 1));
                queue.push_back((fresh, next));
            }
        }
    }
    Ok(findings)
}

/// From here time alone leads to the end; where the handler has paused, once it goes on.
fn ends(world: &World, findings: &mut Findings) -> Result<(), String> {
    let mut model = world
        .model
        .fork()
        .ok_or("a plain connection cannot be copied")?;
    let apply = |model: &mut ConnModel, input| {
        model
            .apply(&input)
            .map_err(|violation| violation.to_string())
    };
    apply(&mut model, Input::Turn)?;
    for _ in 0..PATIENCE {
        if let Some(end) = model.end() {
            findings.reasons.insert(end.reason);
            return Ok(());
        }
        if model.has_deadline() {
            apply(&mut model, Input::Expire)?;
        } else if model.is_at_rest() {
            apply(&mut model, Input::Act(Action::Resume))?;
            apply(&mut model, Input::Turn)?;
        } else {
            return Err("no deadline is armed".to_owned());
        }
    }
    Err("no end in sight".to_owned())
}
