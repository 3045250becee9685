//! The servers of the rows, each as a process of its own.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::by_portcullis as portcullis;
use crate::common::process::{end_with_parent, pin, pin_to, Process};
use crate::foreign::Foreign;
use crate::servers::{serve, Kind};
use crate::turns::Turns;
use crate::{by_mio, by_tokio};
use ::portcullis::Framing;

/// Number of the server's processor.
const PROCESSOR: usize = 0;
/// The longest that a server may take to listen.
const PATIENCE: Duration = Duration::from_secs(10);

/// A server of a row.
pub struct Role {
    /// For the process that is it.
    pub id: &'static str,
    pub name: &'static str,
    kind: Serve,
}

#[derive(Clone, Copy)]
enum Serve {
    /// This program; it ends with its parent.
    Own(fn()),
    /// The same, on both processors.
    OnBoth(fn()),
    /// The same; it takes commands.
    Commanded(fn()),
    /// Compiled by [`Foreign`].
    Epoll,
    Mosquitto,
}

const fn role(id: &'static str, name: &'static str, kind: Serve) -> Role {
    Role { id, name, kind }
}

const MIO: &str = "mio by hand";
const OURS: &str = "portcullis";
const TOKIO: &str = "tokio by hand";
const C: Role = role("epoll", "C, bare epoll", Serve::Epoll);
const ECHO: Role = role("portcullis", OURS, Serve::Own(|| serve(Kind::Portcullis)));
const MIO_ECHO: Role = role("mio", MIO, Serve::Own(|| serve(Kind::Mio)));
const TOKIO_ECHO: Role = role("tokio", TOKIO, Serve::Own(by_tokio::by_hand));

pub const FAN_OUT: [Role; 4] = [
    role("mio-fan-out", MIO, Serve::Own(by_mio::fan_out)),
    role("fan-out", OURS, Serve::Own(portcullis::fan_out)),
    role(
        "tokio-fan-out",
        "tokio broadcast",
        Serve::Own(by_tokio::fan_out),
    ),
    role("mosquitto", "mosquitto (MQTT)", Serve::Mosquitto),
];

pub const BULK: [Role; 6] = [
    role("mio-raw", "mio by hand, raw", Serve::Own(by_mio::raw)),
    role(
        "raw",
        "portcullis, raw",
        Serve::Own(|| portcullis::echo(Framing::Raw)),
    ),
    role(
        "packet-4",
        "portcullis, packet-4",
        Serve::Own(|| portcullis::echo(Framing::Packet4)),
    ),
    role(
        "custom",
        "portcullis, own framer",
        Serve::Own(portcullis::custom),
    ),
    role("tokio-raw", "tokio by hand, raw", Serve::Own(by_tokio::raw)),
    role(
        "codec",
        "tokio-util, own codec",
        Serve::Own(by_tokio::codec),
    ),
];

pub const BUSY: [Role; 4] = [MIO_ECHO, ECHO, C, TOKIO_ECHO];

pub const ITERATION: [Role; 3] = [
    role(
        "mio-iteration",
        MIO,
        Serve::Commanded(|| by_mio::iteration(&Turns::reporting())),
    ),
    role(
        "iteration",
        OURS,
        Serve::Commanded(|| portcullis::iteration(&Turns::reporting())),
    ),
    role(
        "tokio-iteration",
        "tokio, a yielding task",
        Serve::Commanded(|| by_tokio::iteration(&Turns::reporting())),
    ),
];

pub const SHARDS: [Role; 2] = [
    role(
        "tokio-threads",
        "tokio, 2 workers",
        Serve::OnBoth(by_tokio::threads),
    ),
    role(
        "shards",
        "portcullis, 2 shards",
        Serve::OnBoth(portcullis::shards),
    ),
];

pub const RECOVERY: [Role; 3] = [
    role(
        "tokio",
        "tokio, accepting as axum",
        Serve::Own(by_tokio::by_hand),
    ),
    ECHO,
    C,
];

pub const DRAIN: [Role; 2] = [
    role(
        "tokio-drain",
        "tokio, watch + join",
        Serve::Commanded(by_tokio::drain),
    ),
    role("drain", OURS, Serve::Commanded(portcullis::drain)),
];

pub const STORM: [Role; 3] = [
    role(
        "codec-2",
        "tokio-util codec, send",
        Serve::Own(|| serve(Kind::TokioCodec)),
    ),
    role("portcullis", OURS, Serve::Own(|| serve(Kind::Portcullis))),
    MIO_ECHO,
];

const ALL: [&[Role]; 8] = [
    &FAN_OUT, &BULK, &BUSY, &ITERATION, &SHARDS, &RECOVERY, &DRAIN, &STORM,
];

/// Is the server `id` until the process ends.
pub fn be(id: &str) {
    let role = ALL.iter().copied().flatten().find(|role| role.id == id);
    pin(PROCESSOR);
    match role.expect("a server").kind {
        Serve::Own(serve) => {
            end_with_parent();
            serve();
        }
        Serve::OnBoth(serve) => {
            pin_to([0, 1]);
            end_with_parent();
            serve();
        }
        Serve::Commanded(serve) => serve(),
        Serve::Epoll | Serve::Mosquitto => panic!("{id} is a program of its own"),
    }
}

/// Programs that are not this one, as far as they are present.
pub struct Programs {
    foreign: Foreign,
    mosquitto: Option<(PathBuf, String)>,
}

impl Programs {
    /// Looks for them, and prints those left out.
    pub fn find() -> Self {
        let foreign = Foreign::compile(&[Kind::Epoll]);
        let found = ["/usr/sbin/mosquitto", "mosquitto"]
            .iter()
            .find_map(|path| {
                // It prints its version, and exits with 3.
                let help = Command::new(path)
                    .arg("-h")
                    .stdin(Stdio::null())
                    .output()
                    .ok()?;
                let text = String::from_utf8_lossy(&help.stdout).into_owned();
                Some((PathBuf::from(path), text.lines().next()?.trim().to_owned()))
            });
        if found.is_none() {
            eprintln!("LEFT OUT: mosquitto (Debian's mosquitto)");
        }
        Self {
            foreign,
            mosquitto: found,
        }
    }

    pub fn has(&self, role: &Role) -> bool {
        match role.kind {
            Serve::Epoll => !self.foreign.present_among(&[Kind::Epoll]).is_empty(),
            Serve::Mosquitto => self.mosquitto.is_some(),
            _ => true,
        }
    }

    /// Versions for the caption.
    pub fn versions(&self) -> Vec<String> {
        let compilers = self.foreign.present.iter().map(|(_, name)| name.clone());
        let mosquitto = self.mosquitto.iter().map(|(_, version)| version.clone());
        compilers.chain(mosquitto).collect()
    }
}

/// A server that runs.
pub struct Running {
    pub process: Process,
    pub addr: SocketAddr,
    pub is_mosquitto: bool,
}

impl Running {
    pub fn start(role: &Role, programs: &Programs) -> Self {
        let mut process = match (role.kind, &programs.mosquitto) {
            (Serve::Mosquitto, Some((path, _))) => return Self::mosquitto(path),
            (Serve::Epoll, _) => {
                let mut command = programs.foreign.command(Kind::Epoll).expect("compiled");
                Process::start_other(&mut command, PROCESSOR)
            }
            _ => Process::start(&["--serve", role.id]),
        };
        let addr = process.line().parse().expect("an address");
        Self {
            process,
            addr,
            is_mosquitto: false,
        }
    }

    fn mosquitto(path: &PathBuf) -> Self {
        let free = TcpListener::bind("127.0.0.1:0").expect("a port");
        let addr = free.local_addr().expect("bound");
        drop(free);
        let config = std::env::temp_dir().join(format!("mosquitto-{}.conf", std::process::id()));
        // Its defaults but for an unlimited queue, so that nothing is lost.
        let lines = format!(
            "listener {} 127.0.0.1\nallow_anonymous true\nmax_queued_messages 0\n",
            addr.port()
        );
        std::fs::write(&config, lines).expect("a file");
        let mut command = Command::new(path);
        command.arg("-c").arg(&config).stderr(Stdio::null());
        let process = Process::start_other(&mut command, PROCESSOR);
        let begun = Instant::now();
        while TcpStream::connect(addr).is_err() {
            assert!(begun.elapsed() < PATIENCE, "mosquitto does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        let _ = std::fs::remove_file(config);
        Self {
            process,
            addr,
            is_mosquitto: true,
        }
    }
}
