//! The load of the figures for MQTT: one publisher and many subscribers, QoS 0.
//!
//! Usage: `figures_mqtt ADDRESS SUBSCRIBERS BYTES WINDOW MESSAGES`. After a warm-up with a tenth of
//! the messages, the program prints `ready` and waits for a line; after MESSAGES more it prints
//! `done`. Up to WINDOW messages are on their way at any time. Every subscriber has to get every
//! message: a lost one ends the program with an error.

#[path = "../common/fan_out.rs"]
#[allow(dead_code)] // the benches use the rest
mod fan_out;

use std::io;

use fan_out::{Load, Protocol, Result};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [addr, numbers @ ..] = &arguments[..] else {
        return Err("no address".into());
    };
    let numbers: Vec<usize> = numbers
        .iter()
        .map(|number| number.parse())
        .collect::<std::result::Result<_, _>>()?;
    let &[subscribers, bytes, window, messages] = &numbers[..] else {
        return Err("SUBSCRIBERS BYTES WINDOW MESSAGES".into());
    };
    let mut load = Load::connect(addr, subscribers, bytes, Protocol::Mqtt)?;
    load.run(messages / 10, window)?;
    println!("ready");
    io::stdin().read_line(&mut String::new())?;
    load.run(messages, window)?;
    println!("done");
    Ok(())
}
