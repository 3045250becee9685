//! Clients that wait in the backlog while the server has no descriptor free.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use rustix::process::{getrlimit, prlimit, Pid, Resource, Rlimit};

use crate::common::process::Process;
use crate::roles::Running;
use crate::Options;

/// Clients that wait: fewer than fit into a backlog of 1,024.
const WAITING: usize = 500;
const PATIENCE: Duration = Duration::from_secs(20);
const MESSAGE: &[u8] = b"\0\x05hello";

/// Returns the seconds until all are served, after the limit was raised and after connections have
/// left, and the processor time of the server in each second without a descriptor, in milliseconds.
pub fn measure(options: &Options, server: &mut Running, round: usize) -> Vec<f64> {
    // The periods in which servers try again are not in step with the outage.
    let outage = Duration::from_secs_f64(options.seconds * (1.0 + 0.37 * round as f64));
    let waiting = WAITING.min(options.connections);
    let clients = || {
        let all = (0..waiting).map(|_| ask(server.addr));
        all.collect::<Vec<_>>()
    };
    let (holding, held) = (clients(), descriptors(&server.process));
    hear(holding.iter());
    let held = held.max(descriptors(&server.process));

    limit(&server.process, Some(held));
    let queued = clients();
    let before = server.process.cpu();
    std::thread::sleep(outage);
    let spent = server.process.cpu() - before;
    let begun = Instant::now();
    limit(&server.process, None);
    hear(queued.iter());
    let raised = begun.elapsed();

    limit(&server.process, Some(descriptors(&server.process)));
    let queued_again = clients();
    std::thread::sleep(outage);
    let begun = Instant::now();
    drop((holding, queued));
    hear(queued_again.iter());
    let left = begun.elapsed();
    let spent = spent.as_secs_f64() / outage.as_secs_f64();
    vec![raised.as_secs_f64(), left.as_secs_f64(), spent * 1e3]
}

fn ask(addr: SocketAddr) -> TcpStream {
    let mut stream = TcpStream::connect_timeout(&addr, PATIENCE).expect("room in the backlog");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
    stream.write_all(MESSAGE).expect("room in the kernel");
    stream
}

fn hear<'a>(clients: impl Iterator<Item = &'a TcpStream>) {
    for mut client in clients {
        let mut echo = [0; MESSAGE.len()];
        client.read_exact(&mut echo).expect("an echo in time");
        assert_eq!(echo, MESSAGE);
    }
}

/// Number of the open descriptors.
fn descriptors(process: &Process) -> u64 {
    let all = std::fs::read_dir(format!("/proc/{}/fd", process.id())).expect("Linux's /proc");
    all.count() as u64
}

/// Sets the most descriptors of the server. `None` is as many as this process may have.
fn limit(process: &Process, most: Option<u64>) {
    let own = getrlimit(Resource::Nofile);
    let limit = Rlimit {
        current: most.or(own.current),
        maximum: own.maximum,
    };
    let pid = Pid::from_raw(process.id() as i32);
    prlimit(pid, Resource::Nofile, limit).expect("a child's limit");
}
