//! What is in `examples/deploy/` is what runs here: the units are parsed and obeyed as systemd does it, haproxy reads that very
//! configuration, and a restart loses no request.
#![cfg(target_os = "linux")] // sd_listen_fds(3)

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::Ordering;

use command_fds::{CommandFdExt, FdMapping};
use kit::net::{connect, eventually, example, have, while_asking, ChildProcess, Place, PATIENCE};
use socket2::SockRef;

const DEPLOY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../examples/deploy");

fn file(name: &str) -> String {
    fs::read_to_string(format!("{DEPLOY}/{name}")).expect("it is there")
}

/// The value of a setting that stands once in a unit.
#[track_caller]
fn setting(unit: &str, name: &str) -> String {
    let file = file(unit);
    let mut values = file
        .lines()
        .filter_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    let value = values
        .next()
        .unwrap_or_else(|| panic!("{unit} has no {name}"));
    assert_eq!(values.next(), None, "{unit} has {name} twice");
    value.to_owned()
}

/// The service's options, as the unit gives them.
fn options() -> Vec<String> {
    let line = setting("portcullis-echo.service", "ExecStart");
    let mut words = line.split_whitespace().map(str::to_owned);
    assert_eq!(
        words.next().as_deref(),
        Some("/usr/local/bin/portcullis-echo")
    );
    words.collect()
}

/// The value behind an option of the unit.
#[track_caller]
fn option<T: std::str::FromStr>(name: &str) -> T {
    let options = options();
    let at = options
        .iter()
        .position(|option| option == name)
        .expect("it is given");
    options[at + 1].parse().ok().expect("a value")
}

/// The service with this socket as descriptor 3, with the unit's options and environment.
fn activate(socket: &TcpListener) -> ChildProcess {
    let mut command = Command::new("sh");
    // Only the process itself knows its id before it runs.
    command.args(["-c", "export LISTEN_PID=$$; exec \"$0\" \"$@\""]);
    command.arg(example("service")).args(options());
    let environment = setting("portcullis-echo.service", "Environment");
    let (name, value) = environment.split_once('=').expect("a variable");
    command.env(name, value).env("LISTEN_FDS", "1");
    let parent_fd = OwnedFd::from(socket.try_clone().expect("a descriptor"));
    command
        .fd_mappings(vec![FdMapping {
            parent_fd,
            child_fd: 3,
        }])
        .expect("no number twice");
    let child = ChildProcess::start(&mut command);
    let addr = socket.local_addr().expect("an address");
    assert_eq!(child.line(), format!("listening on {addr} (line)"));
    child
}

/// SIGTERM, as the unit says; its last words.
fn terminate(child: ChildProcess) -> String {
    child.signal(setting("portcullis-echo.service", "KillSignal").trim_start_matches("SIG"));
    let (status, words, log) = child.finish();
    assert!(status.success() && !log.contains("panicked"), "{log}");
    assert!(!log.contains("WARN") && !log.contains("ERROR"), "{log}");
    words
}

struct Haproxy {
    _child: ChildProcess,
    place: Place,
    addr: SocketAddr,
}

impl Haproxy {
    fn before(service: SocketAddr) -> Self {
        // The listening socket is made here, so that no port is guessed.
        let listening = TcpListener::bind("127.0.0.1:0").expect("a port");
        SockRef::from(&listening)
            .set_cloexec(false)
            .expect("inherited");
        let place = Place::new();
        let mut command = Command::new("haproxy");
        command
            .args(["-db", "-f", &format!("{DEPLOY}/haproxy.cfg")])
            .env("FRONT", format!("fd@{}", listening.as_raw_fd()))
            .env("BACK", service.to_string())
            .env("ADMIN", place.path("admin"))
            .env("CHECK", "50ms");
        let haproxy = Self {
            _child: ChildProcess::start(&mut command),
            addr: listening.local_addr().expect("an address"),
            place,
        };
        eventually("haproxy answers", || haproxy.stat("status").is_some());
        haproxy
    }

    /// What `show stat` says of the one server, by the name of the column.
    fn stat(&self, column: &str) -> Option<String> {
        let mut admin = UnixStream::connect(self.place.path("admin")).ok()?;
        admin.set_read_timeout(Some(PATIENCE)).ok()?;
        writeln!(admin, "show stat").ok()?;
        let mut all = String::new();
        admin.read_to_string(&mut all).ok()?;
        let mut lines = all.lines();
        let mut names = lines.next()?.trim_start_matches("# ").split(',');
        let at = names.position(|name| name == column)?;
        let line = lines.find(|line| line.starts_with("portcullis,one,"))?;
        Some(line.split(',').nth(at)?.to_owned())
    }

    fn await_check(&self) {
        eventually("the health check has an answer", || {
            self.stat("check_status").as_deref() == Some("L7OK")
        });
        assert_eq!(self.stat("status").as_deref(), Some("UP"));
    }
}

#[track_caller]
fn ask(stream: &mut BufReader<TcpStream>, line: &str) -> String {
    writeln!(stream.get_mut(), "{line}").expect("sent");
    let mut answer = String::new();
    stream.read_line(&mut answer).expect("an answer");
    answer.trim_end().to_owned()
}

/// haproxy has nothing to say against the file, with its defaults and with ours.
#[test]
fn haproxy_accepts_the_file_without_a_warning() {
    if !have("haproxy", "-v") {
        return;
    }
    for variables in [
        &[][..],
        &[
            ("FRONT", "127.0.0.1:4000"),
            ("BACK", "[::1]:2222"),
            ("ADMIN", "/tmp/admin"),
            ("CHECK", "1s"),
        ],
    ] {
        let mut command = Command::new("haproxy");
        command.args(["-c", "-f", &format!("{DEPLOY}/haproxy.cfg")]);
        let output = command
            .envs(variables.iter().copied())
            .output()
            .expect("it runs");
        let words = [output.stdout, output.stderr].concat();
        let words = String::from_utf8_lossy(&words);
        assert!(output.status.success(), "{words}");
        // Version 2.6 says this line, later ones nothing.
        let complaints = words
            .lines()
            .filter(|line| *line != "Configuration file is valid");
        assert_eq!(complaints.count(), 0, "{words}");
    }
}

/// The three files speak of the same port and the same numbers.
#[test]
fn the_files_fit_together() {
    let port = setting("portcullis-echo.socket", "ListenStream");
    assert!(file("haproxy.cfg").contains(&format!("${{BACK-{port}}}")));
    let (grace, stop): (u64, u64) = (
        option("--grace"),
        setting("portcullis-echo.service", "TimeoutStopSec")
            .parse()
            .expect("seconds"),
    );
    assert!(grace < stop, "the drain is over before SIGKILL");
    let (cap, descriptors): (u64, u64) = (
        option("--max-connections"),
        setting("portcullis-echo.service", "LimitNOFILE")
            .parse()
            .expect("a number"),
    );
    assert!(cap + 32 <= descriptors, "as `Server::new` wants it");
    assert_eq!(
        option::<String>("--trusted-proxy"),
        port.split(':').next().expect("a host")
    );
    let memory: u64 = option("--memory-limit");
    let most = setting("portcullis-echo.service", "MemoryMax");
    let most: u64 = most
        .strip_suffix('M')
        .expect("MiB")
        .parse()
        .expect("a number");
    assert!(
        memory * 2 <= most << 20,
        "the limit on buffers is not all that the process takes"
    );
}

/// Not required: a host without systemd has nothing to verify with.
#[test]
fn systemd_accepts_the_units() {
    let verifies = Command::new("systemd-analyze")
        .arg("--version")
        .stdout(Stdio::null())
        .status();
    if !verifies.is_ok_and(|status| status.success()) {
        eprintln!("SKIPPED: systemd-analyze is not installed, the units were not verified");
        return;
    }
    let place = Place::new();
    let binary = example("service");
    let mut units = Vec::new();
    for name in ["portcullis-echo.socket", "portcullis-echo.service"] {
        let unit = file(name).replace(
            "/usr/local/bin/portcullis-echo",
            binary.to_str().expect("text"),
        );
        units.push(place.path(name));
        fs::write(place.path(name), unit).expect("written");
    }
    let output = Command::new("systemd-analyze")
        .args(["verify", "--man=no"])
        .args(&units)
        .output()
        .expect("it runs");
    let words = String::from_utf8_lossy(&output.stderr);
    let about_ours: Vec<_> = words
        .lines()
        .filter(|line| line.contains("portcullis"))
        .collect();
    assert!(about_ours.is_empty(), "{words}");
}

/// A socket that is passed on, a trusted proxy, a check that wants an answer: and the service knows
/// its clients.
#[test]
fn the_service_knows_its_clients_and_passes_its_check() {
    if !have("haproxy", "-v") {
        return;
    }
    let socket = TcpListener::bind("127.0.0.1:0").expect("a port");
    let service = activate(&socket);
    let haproxy = Haproxy::before(socket.local_addr().expect("an address"));
    haproxy.await_check();
    let client = connect(haproxy.addr);
    let own = client.local_addr().expect("an address").to_string();
    let mut client = BufReader::new(client);
    assert_eq!(ask(&mut client, "hello"), "hello");
    assert_eq!(ask(&mut client, "whoami"), own);
    assert_eq!(haproxy.stat("chkfail").as_deref(), Some("0"));
    // Without the proxy's header there is nothing to be had.
    let mut direct = connect(socket.local_addr().expect("an address"));
    writeln!(direct, "hello").expect("sent");
    kit::net::await_end(&mut direct);
    drop(client);
    let words = terminate(service);
    assert!(words.contains(" 0 were forced"), "{words}");
}

/// One request is one connection.
fn request(addr: SocketAddr, number: usize) -> Result<(), String> {
    let attempt = || -> std::io::Result<String> {
        let stream = TcpStream::connect(addr)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut stream = BufReader::new(stream);
        writeln!(stream.get_mut(), "request {number}")?;
        let mut answer = String::new();
        stream.read_line(&mut answer)?;
        Ok(answer)
    };
    match attempt() {
        Ok(answer) if answer == format!("request {number}\n") => Ok(()),
        other => Err(format!("request {number}: {other:?}")),
    }
}

/// `systemctl restart`, again and again, under requests that come all the time: the port is systemd's and stays open.
#[test]
fn a_restart_loses_no_request() {
    const RESTARTS: usize = 5;
    if !have("haproxy", "-v") {
        return;
    }
    let socket = TcpListener::bind("127.0.0.1:0").expect("a port");
    let mut service = Some(activate(&socket));
    let haproxy = Haproxy::before(socket.local_addr().expect("an address"));
    haproxy.await_check();
    while_asking(
        |number| request(haproxy.addr, number),
        |done| {
            for _ in 0..RESTARTS {
                let before = done.load(Ordering::Relaxed);
                eventually("requests between two restarts", || {
                    done.load(Ordering::Relaxed) >= before + 200
                });
                // One ends, then the next begins, as the unit says: meanwhile clients wait.
                let former = service.take().expect("it runs");
                let words = terminate(former);
                assert!(words.contains(" 0 were forced"), "{words}");
                service = Some(activate(&socket));
            }
        },
    );
    haproxy.await_check();
    terminate(service.expect("it runs"));
}

/// A client that has connected and whose request is in flight at SIGTERM gets its answer. Silent
/// clients do not delay the end.
#[test]
fn a_client_that_has_just_come_is_answered() {
    let service =
        ChildProcess::start(Command::new(example("service")).args(["--listen", "127.0.0.1:0"]));
    let addr = service.address();
    let mut asked = BufReader::new(connect(addr));
    assert_eq!(ask(&mut asked, "hello"), "hello");
    let mut new = BufReader::new(connect(addr));
    let _silent = connect(addr);
    service.signal("TERM");
    // A client that has had its answer is let go: then the drain has begun.
    assert_eq!(kit::net::read_to_end(asked.get_mut()), b"");
    assert_eq!(
        ask(&mut new, "whoami"),
        new.get_ref().local_addr().expect("an address").to_string()
    );
    assert_eq!(kit::net::read_to_end(new.get_mut()), b"");
    let (status, words, log) = service.finish();
    assert!(
        status.success() && words.contains(" 0 were forced"),
        "{words}{log}"
    );
}

/// The README names every file.
#[test]
fn the_files_are_documented() {
    let readme = fs::read_to_string(Path::new(DEPLOY).join("../README.md")).expect("it is there");
    for entry in fs::read_dir(DEPLOY).expect("the folder") {
        let name = entry.expect("an entry").file_name();
        let name = name.to_str().expect("text");
        assert!(
            readme.contains(&format!("deploy/{name}")),
            "examples/README.md does not name {name}"
        );
    }
}
