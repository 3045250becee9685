//! What the rows ask of their servers.

use std::time::{Duration, Instant};

use rustix::process::{kill_process, Pid, Signal};

use crate::churn;
use crate::common::fan_out::{self, Protocol};
use crate::common::load::{Load, Work};
use crate::roles::Running;
use crate::Options;

/// Payloads of the fan-out, in bytes.
pub const FAN_OUT_BYTES: [usize; 3] = [64, 4_096, 65_536];
/// What is on its way at a time, at least one message: bytes and messages to all subscribers
/// together.
const BYTES_ON_THEIR_WAY: usize = 256 << 20;
const ON_THEIR_WAY: usize = 16_000;
const MESSAGES_ON_THEIR_WAY: usize = 16;
/// Payloads of `bulk`, in bytes.
pub const CHUNKS: [usize; 3] = [16 << 10, 64 << 10, 256 << 10];
/// Nearly the longest that packet-2 has.
const STORM_BYTES: usize = 65_533;
/// Memory is back when so much is left of its growth, in bytes.
const BACK: u64 = 8_000_000;

/// Microseconds of processor time for each message that a subscriber gets.
pub fn fan_out(options: &Options, server: &mut Running, _: usize) -> Vec<f64> {
    let protocol = match server.is_mosquitto {
        true => Protocol::Mqtt,
        false => Protocol::Packet4,
    };
    let addr = server.addr.to_string();
    let mut values = Vec::new();
    for subscribers in options.subscribers() {
        let load = fan_out::Load::connect(&addr, subscribers, FAN_OUT_BYTES[0], protocol);
        let mut load = load.expect("they subscribe");
        for bytes in FAN_OUT_BYTES {
            load.set_bytes(bytes);
            let window = (BYTES_ON_THEIR_WAY / bytes).min(ON_THEIR_WAY) / subscribers;
            let window = window.clamp(1, MESSAGES_ON_THEIR_WAY);
            let mut run = |span: Duration| load.run_for(span, window).expect("everything arrives");
            run(Duration::ZERO);
            let before = server.process.cpu();
            let deliveries = subscribers * run(options.span());
            let spent = server.process.cpu() - before;
            values.push(spent.as_secs_f64() * 1e6 / deliveries as f64);
        }
    }
    values
}

/// Microseconds of processor time for each message.
pub fn bulk(options: &Options, server: &mut Running, _: usize) -> Vec<f64> {
    let chunks = CHUNKS.map(|bytes| Work::new(8, 4, bytes));
    let small = [Work::new(64, 16, 64)];
    let works = chunks.into_iter().chain(small);
    let cost = |work: Work| {
        let mut load = Load::connect(server.addr, work.packet_4());
        load.run(options.span() / 10);
        let before = server.process.cpu();
        let messages = load.run(options.span());
        (server.process.cpu() - before).as_secs_f64() * 1e6 / messages as f64
    };
    works.map(cost).collect()
}

/// Microseconds of processor time for each message, and the 99th percentile of the latency in
/// milliseconds.
pub fn busy(options: &Options, server: &mut Running, _: usize) -> Vec<f64> {
    let mut load = Load::connect(server.addr, Work::new(options.connections, 1, 64));
    let every = Duration::from_secs(1);
    load.pace(every, options.span());
    let before = server.process.cpu();
    let messages = load.pace(every, options.span() * 5);
    let spent = server.process.cpu() - before;
    let (_, slow) = load.latencies();
    vec![
        spent.as_secs_f64() * 1e6 / messages as f64,
        slow.as_secs_f64() * 1e3,
    ]
}

/// Milliseconds of an iteration while 64 KiB of empty frames from each of a thousand peers are due:
/// the median, the 99th percentile, the maximum.
pub fn iteration(options: &Options, server: &mut Running, _: usize) -> Vec<f64> {
    let pid = Pid::from_raw(server.process.id() as i32).expect("a process");
    let signal = |signal| kill_process(pid, signal).expect("a child");
    let frames = (64 << 10) / 2;
    let mut load = Load::connect(server.addr, Work::new(options.connections / 10, frames, 0));
    server.process.say("start again");
    server.process.line();
    // It finds everything at once.
    signal(Signal::STOP);
    load.run_once(Duration::ZERO, || signal(Signal::CONT));
    server.process.say("report");
    let report = server.process.line();
    let nanoseconds = report.split(' ').map(|word| word.parse::<f64>());
    nanoseconds
        .map(|number| number.expect("a number") / 1e6)
        .collect()
}

/// Messages and connections per second.
pub fn shards(options: &Options, server: &mut Running, _: usize) -> Vec<f64> {
    let mut load = Load::connect(server.addr, Work::new(64, 1, 64));
    let rate = |run: &mut dyn FnMut(Duration) -> u64| {
        run(options.span() / 10);
        let begun = Instant::now();
        run(options.span() * 2) as f64 / begun.elapsed().as_secs_f64()
    };
    let messages = rate(&mut |span| load.run(span));
    drop(load);
    let connections = rate(&mut |span| churn::run(server.addr, span));
    vec![messages, connections]
}

/// Seconds from the command to the end, and the clients whose connections were reset.
pub fn drain(options: &Options, server: &mut Running, _: usize) -> Vec<f64> {
    let mut load = Load::connect(server.addr, Work::new(options.connections, 1, 64));
    let mut begun = Instant::now();
    let process = &mut server.process;
    let ends = load.run_to_end(options.span(), || {
        begun = Instant::now();
        process.say("drain");
    });
    assert_eq!(process.line(), "ended");
    vec![begun.elapsed().as_secs_f64(), ends.otherwise as f64]
}

/// Memory above that before, in megabytes: at most, after a fifth of the pause, after the pause.
/// Then the seconds until it is back, or the pause.
pub fn storm(options: &Options, server: &mut Running, _: usize) -> Vec<f64> {
    let connections = options.connections;
    let mut load = Load::connect(server.addr, Work::new(connections, 1, 64));
    let server = &server.process;
    let (before, resident) = (server.memory(), server.status("VmRSS"));
    load.set_payload(Work::new(connections, 1, STORM_BYTES));
    load.begin_each();
    load.end_each();
    let over = Instant::now();
    let growth = || server.memory().saturating_sub(before);
    let most = server.status("VmHWM").saturating_sub(resident);
    let (mut back, mut soon, pause) = (None, None, options.pause);
    while over.elapsed() < pause {
        let now = growth();
        if now <= BACK {
            back.get_or_insert(over.elapsed());
        }
        if over.elapsed() > pause / 5 {
            soon.get_or_insert(now);
        }
        std::thread::sleep(pause / 250);
    }
    let late = growth();
    let back = back.unwrap_or(pause).as_secs_f64();
    let bytes = [most, soon.unwrap_or(late), late];
    bytes
        .map(|bytes| bytes as f64 / 1e6)
        .into_iter()
        .chain([back])
        .collect()
}
