//! One plain connection, as a list of things that happen to it.
//!
//! `ConnModel` checks its invariants after each. Here: the handler gets what a naive decoder makes of the same bytes, and
//! whatever has happened, time leads to the end.
#![no_main]

mod input;

use std::time::Duration;

use kit::naive;
use libfuzzer_sys::arbitrary::{self, Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;
use portcullis::sim::{Action, Callback, ConnModel, Input};
use portcullis::{AccessRules, Listen, ProxyProtocol};

#[derive(Debug)]
struct Case {
    /// From 192 on behind a proxy.
    framing: u8,
    max_frame: u8,
    watermarks: [u8; 3],
    /// In milliseconds: frame, idle, write, linger.
    timeouts: [u8; 4],
    linger_bytes: u8,
    inputs: Vec<Input>,
}

impl<'a> Arbitrary<'a> for Case {
    fn arbitrary(input: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        let mut case = Self {
            framing: input.arbitrary()?,
            max_frame: input.arbitrary()?,
            watermarks: input.arbitrary()?,
            timeouts: input.arbitrary()?,
            linger_bytes: input.arbitrary()?,
            inputs: Vec::new(),
        };
        while !input.is_empty() {
            case.inputs.push(input::one(input)?);
        }
        Ok(case)
    }
}

impl Case {
    fn listen(&self) -> Listen {
        let [low, more, most] = self.watermarks.map(usize::from);
        let [frame, idle, write, linger] = self
            .timeouts
            .map(|ms| Duration::from_millis(u64::from(ms) + 1));
        let mode = match self.framing {
            0..=191 => ProxyProtocol::Off,
            192..=223 => ProxyProtocol::Required,
            224.. => ProxyProtocol::Optional,
        };
        Listen::tcp("127.0.0.1:0", Action::framing(self.framing)).with(|listen| {
            listen.proxy_protocol = mode;
            listen.trusted_proxies = Some(AccessRules::allow_all());
            let conn = &mut listen.conn;
            conn.max_frame = Some(self.max());
            conn.low_watermark = low;
            conn.high_watermark = low + more + 1;
            conn.output_limit = low + more + 1 + most;
            conn.frame_timeout = frame;
            conn.idle_timeout = idle;
            conn.write_timeout = write;
            conn.linger_timeout = linger;
            conn.linger_bytes = usize::from(self.linger_bytes);
        })
    }

    fn max(&self) -> usize {
        naive::accepted_max(self.framing, usize::from(self.max_frame) + 1)
    }

    /// What the peer begins with, before and after the first input.
    fn header(&self) -> [&'static [u8]; 2] {
        let header: &[u8] = match self.framing {
            0..=191 => b"",
            odd if odd % 2 == 1 => b"PROXY TCP4 192.0.2.1 198.51.100.2 50000 443\r\n",
            _ => b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0",
        };
        let (head, tail) = header.split_at(usize::from(self.max_frame).min(header.len()));
        [head, tail]
    }

    /// The framing does not change on the way.
    fn is_tame(&self) -> bool {
        let shifts = |action: &Action| matches!(action, Action::Framing(_) | Action::MaxFrame(_));
        !self.inputs.iter().any(|input| match input {
            Input::Act(action) => shifts(action),
            Input::OnFrame(actions) | Input::OnEnd(actions) => actions.iter().any(shifts),
            _ => false,
        })
    }
}

fuzz_target!(|case: Case| {
    let mut model = ConnModel::new(&case.listen()).expect("settings that work");
    let tame = case.is_tame();
    let max = case.max();
    let mut underway = Vec::new();
    let mut arrived = 0;
    let [head, tail] = case.header();
    model.apply(&Input::Bytes(head.to_vec())).expect("it holds");
    // What comes between the two pieces spoils the header, or stands before it where it may be left out.
    let tame = tame && (tail.is_empty() || !matches!(case.inputs.first(), Some(Input::Bytes(_))));
    for (at, input) in case.inputs.iter().enumerate() {
        if at == 1 {
            model.apply(&Input::Bytes(tail.to_vec())).expect("it holds");
        }
        let unread = model.unread();
        model.apply(input).expect("it holds");
        if let Input::Bytes(bytes) = input {
            if model.unread() > unread {
                underway.extend_from_slice(bytes);
                arrived += bytes.len();
            }
        }
        for callback in model.take_callbacks() {
            if let (Callback::Frame(frame), true) = (callback, tame) {
                let taken = naive::taken_by(&frame, case.framing, max, &underway)
                    .expect("as a naive decoder has it");
                underway.drain(..taken);
            }
        }
    }
    // Every turn of this loop brings a deadline, or a frame that the handler paused after.
    model.apply(&Input::Turn).expect("it holds");
    for _ in 0..arrived + 100 {
        if model.end().is_some() {
            return;
        }
        let onwards = if model.has_deadline() {
            [Input::Expire, Input::Turn]
        } else {
            assert!(model.is_at_rest(), "no deadline is armed: {model:?}");
            [Input::Act(Action::Resume), Input::Turn]
        };
        for input in &onwards {
            model.apply(input).expect("it holds");
        }
    }
    panic!("no end in sight: {model:?}");
});
