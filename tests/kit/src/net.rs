//! A server on a thread of its own, clients whose every wait is bounded, and the examples as child processes.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{mpsc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use portcullis::{
    Addr, Config, Context, Framing, Handle, Handler, Listen, ListenerInfo, Outcome, Server,
    Spawned, Stats,
};
use socket2::{Domain, SockRef, Socket, Type};

/// The longest that anything may take, on a machine that is busy with something else.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Sends every frame back.
pub struct Echo;

impl<A> Handler<A> for Echo {
    fn on_frame(&mut self, cx: &mut Context<'_, A>, frame: &[u8]) -> Outcome {
        cx.conn.send(frame)?;
        Ok(())
    }
}

/// How many connections each shard has.
#[track_caller]
pub fn held_by_each<A: 'static>(shards: &Spawned<A>) -> Vec<usize> {
    let handles = shards.handle.shards();
    handles.map(|handle| current_stats(&handle).open).collect()
}

/// The counters as they are now. Those that [`Handle::stats`] returns are of the end of the last iteration: a client may have
/// read an answer before its frame is among them.
#[track_caller]
pub fn current_stats<A: 'static>(handle: &Handle<A>) -> Stats {
    handle.metrics(PATIENCE).expect("the loop answers").stats
}

/// Four clients make requests all the time while `run` does something, which sees how many were begun; none of them may fail. How
/// many there were.
#[track_caller]
pub fn while_asking(
    ask: impl Fn(usize) -> Result<(), String> + Sync,
    run: impl FnOnce(&AtomicUsize),
) -> usize {
    let (done, over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let failures = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    if let Err(failure) = ask(done.fetch_add(1, Ordering::Relaxed)) {
                        failures.lock().expect("not poisoned").push(failure);
                    }
                }
            });
        }
        // Whatever happens there, the clients end.
        let outcome = catch_unwind(AssertUnwindSafe(|| run(&done)));
        over.store(true, Ordering::Relaxed);
        outcome.expect("what was done meanwhile");
    });
    let failures = failures.into_inner().expect("not poisoned");
    assert!(
        failures.is_empty(),
        "{} failed: {:?}",
        failures.len(),
        failures.first()
    );
    done.into_inner()
}

/// A server that runs on its own thread until [`Running::finish`], or until it is dropped.
pub struct Running<A = ()> {
    pub handle: Handle<A>,
    pub listeners: Vec<ListenerInfo>,
    thread: Option<JoinHandle<(Stats, A)>>,
}

/// Builds a server on a new thread (it cannot be sent to one) and runs it there.
#[track_caller]
pub fn spawn<A, B>(build: B) -> Running<A>
where
    A: Send + 'static,
    B: FnOnce() -> (Server<A>, A) + Send + 'static,
{
    let (tell, told) = mpsc::channel();
    let thread = thread::spawn(move || {
        let (mut server, mut app) = build();
        tell.send((server.handle(), server.control().listeners()))
            .expect("the test waits");
        server.run(&mut app).expect("run");
        (server.control().stats(), app)
    });
    let (handle, listeners) = told.recv_timeout(PATIENCE).expect("the server was built");
    Running {
        handle,
        listeners,
        thread: Some(thread),
    }
}

/// An echo server on a port of its own.
#[track_caller]
pub fn spawn_echo(config: Config, listen: Listen) -> Running {
    spawn(move || {
        let mut server = Server::new(config).expect("server");
        server
            .listen(listen, |_app: &mut (), _peer| Echo)
            .expect("listen");
        (server, ())
    })
}

/// The address of a TCP listener.
#[track_caller]
pub fn tcp(addr: &Addr) -> SocketAddr {
    addr.as_tcp().expect("a TCP address")
}

/// `127.0.0.1` on a port that the system chooses.
pub fn local() -> Listen {
    Listen::tcp("127.0.0.1:0", Framing::Packet2)
}

impl<A: Send + 'static> Running<A> {
    /// Where the first listener is.
    pub fn addr(&self) -> SocketAddr {
        tcp(&self.listeners[0].addr)
    }

    /// Drains, and returns what is left when the server is done.
    #[track_caller]
    pub fn finish(mut self) -> (Stats, A) {
        // Gone already, if the test's own drain is over.
        let _ = self.handle.drain(Duration::from_secs(10));
        let thread = self.thread.take().expect("running");
        eventually("the server ends", || thread.is_finished());
        thread.join().expect("the server did not panic")
    }

    /// Connects, and waits until the server has opened the connection. A client that finishes or closes before that, without
    /// a byte, may count as gone ([`CloseReason::ClosedEarly`](portcullis::CloseReason::ClosedEarly)).
    #[track_caller]
    pub fn connect_open(&self) -> TcpStream {
        let before = current_stats(&self.handle).opened;
        let client = connect(self.addr());
        self.until("it is open", |stats| stats.opened > before);
        client
    }

    /// Waits until the counters satisfy `wanted`.
    #[track_caller]
    pub fn until(&self, what: &str, wanted: impl Fn(&Stats) -> bool) -> Stats {
        eventually(what, || wanted(&self.handle.stats()));
        self.handle.stats()
    }

    /// Runs `job` on the loop and returns its answer.
    #[track_caller]
    pub fn ask<R: Send + 'static>(
        &self,
        job: impl FnOnce(&mut A, &mut portcullis::Control<'_, A>) -> R + Send + 'static,
    ) -> R {
        self.handle.call(PATIENCE, job).expect("the loop answers")
    }
}

impl<A> Drop for Running<A> {
    fn drop(&mut self) {
        let _ = self.handle.stop();
    }
}

/// A directory of the test's own with a short path, for Unix sockets. Gone with this.
pub struct Place(PathBuf);

impl Place {
    #[track_caller]
    pub fn new() -> Self {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let name = format!(
            "portcullis-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).expect("a new directory");
        Self(path)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A server's state that finds out in its destructor whether the server takes jobs: what it takes
/// then would never be carried out.
pub struct PostsOnDrop {
    pub handle: Handle<Self>,
    pub found: mpsc::Sender<Result<(), portcullis::HandleError>>,
}

impl Drop for PostsOnDrop {
    fn drop(&mut self) {
        let _ = self.found.send(self.handle.post(|_, _| ()));
    }
}

/// Waits until `condition` holds; fails after [`PATIENCE`].
#[track_caller]
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(
            start.elapsed() < PATIENCE,
            "not within {PATIENCE:?}: {what}"
        );
        thread::park_timeout(Duration::from_millis(1));
    }
}

/// Runs iterations of a server on this thread until `condition` holds; fails after [`PATIENCE`].
#[track_caller]
pub fn turns_until<A>(
    server: &mut Server<A>,
    app: &mut A,
    mut condition: impl FnMut(&mut Server<A>, &A) -> bool,
) {
    let begun = Instant::now();
    while !condition(server, app) {
        assert!(
            begun.elapsed() < PATIENCE,
            "not within {PATIENCE:?}: {server:?}"
        );
        server
            .poll_once(app, Some(Duration::from_millis(10)))
            .expect("a turn");
    }
}

/// Keeps the loop busy inside a job, and returns once it is there. Dropping what this returns lets the loop go on.
#[track_caller]
pub fn hold<A>(handle: &Handle<A>) -> mpsc::Sender<()> {
    let (entered, inside) = mpsc::channel();
    let (release, released) = mpsc::channel();
    let job = move |_: &mut A, _: &mut portcullis::Control<'_, A>| {
        entered.send(()).expect("the test waits");
        let _ = released.recv_timeout(PATIENCE);
    };
    handle.post(job).expect("post");
    inside
        .recv_timeout(PATIENCE)
        .expect("the loop takes the job");
    release
}

/// A connection whose reads and writes end after [`PATIENCE`].
#[track_caller]
pub fn connect(addr: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect_timeout(&addr, PATIENCE).expect("connect");
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    stream.set_write_timeout(Some(PATIENCE)).expect("timeout");
    stream.set_nodelay(true).expect("nodelay");
    stream
}

/// As [`connect`], from this source: an address with its port, of which 0 is any.
#[track_caller]
pub fn connect_from(source: &str, addr: SocketAddr) -> TcpStream {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, None).expect("socket");
    let source: SocketAddr = source.parse().expect("an address");
    socket.bind(&source.into()).expect("bind");
    socket
        .connect_timeout(&addr.into(), PATIENCE)
        .expect("connect");
    let stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
    stream.set_write_timeout(Some(PATIENCE)).expect("timeout");
    stream
}

/// Closes a client with RST.
#[track_caller]
pub fn reset(stream: TcpStream) {
    SockRef::from(&stream)
        .set_linger(Some(Duration::ZERO))
        .expect("linger");
    drop(stream);
}

/// The descriptors that this process may open.
#[cfg(target_os = "linux")]
#[track_caller]
pub fn descriptor_limit() -> usize {
    let limits = std::fs::read_to_string("/proc/self/limits").expect("proc");
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"));
    let soft = line
        .and_then(|line| line.split_whitespace().next())
        .expect("a limit");
    soft.parse().unwrap_or(usize::MAX)
}

/// A packet-4 frame on the wire.
pub fn packet4(payload: &[u8]) -> Vec<u8> {
    let mut wire = u32::try_from(payload.len())
        .expect("fits")
        .to_be_bytes()
        .to_vec();
    wire.extend_from_slice(payload);
    wire
}

/// A packet-2 frame on the wire.
pub fn packet2(payload: &[u8]) -> Vec<u8> {
    let mut wire = u16::try_from(payload.len())
        .expect("fits")
        .to_be_bytes()
        .to_vec();
    wire.extend_from_slice(payload);
    wire
}

/// Sends one packet-2 frame.
#[track_caller]
pub fn send2(stream: &mut impl Write, payload: &[u8]) {
    stream.write_all(&packet2(payload)).expect("send");
}

/// Receives one packet-2 frame.
#[track_caller]
pub fn recv2(stream: &mut impl Read) -> Vec<u8> {
    let mut header = [0; 2];
    stream.read_exact(&mut header).expect("a frame's header");
    let mut payload = vec![0; usize::from(u16::from_be_bytes(header))];
    stream.read_exact(&mut payload).expect("a frame's payload");
    payload
}

/// One round trip.
#[track_caller]
pub fn ping(stream: &mut (impl Read + Write), payload: &[u8]) {
    send2(stream, payload);
    assert_eq!(recv2(stream), payload, "the echo");
}

/// As `read`, but goes on when it was interrupted. A socket with a timeout is, when the process is stopped and continued:
/// signal(7).
pub trait ReadSome: Read {
    fn read_some(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        uninterrupted(|| self.read(buffer))
    }
}

impl<R: Read + ?Sized> ReadSome for R {}

/// Repeats a call until nothing interrupts it.
pub fn uninterrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            outcome => return outcome,
        }
    }
}

/// A stream for a client of another author, which takes an interruption for a failure.
pub struct Uninterrupted<S>(pub S);

impl<S: Read> Read for Uninterrupted<S> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read_some(buffer)
    }
}

impl<S: Write> Write for Uninterrupted<S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        uninterrupted(|| self.0.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Everything up to the orderly end. Panics on a reset.
#[track_caller]
pub fn read_to_end(stream: &mut impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).expect("an orderly end");
    bytes
}

/// Waits for the end of the connection, orderly or by reset; whatever comes before is dropped.
#[track_caller]
pub fn await_end(stream: &mut impl Read) {
    let mut buffer = [0; 4096];
    loop {
        match stream.read_some(&mut buffer) {
            Ok(0) => return,
            Ok(_) => {}
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                ) =>
            {
                panic!("the connection did not end")
            }
            Err(_) => return,
        }
    }
}

/// Whether an outside program can be run. If not, says loudly what was skipped; under CI that is a failure.
pub fn have(program: &str, argument: &str) -> bool {
    let found = Command::new(program)
        .arg(argument)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok();
    if !found {
        assert!(
            std::env::var_os("CI").is_none(),
            "CI needs {program} for this test"
        );
        eprintln!("SKIPPED: {program} is not installed, this test did not run");
    }
    found
}

/// The path of an example's binary, which `cargo test` builds beside the tests.
pub fn example(name: &str) -> PathBuf {
    let mut path = std::env::current_exe().expect("the test's own path");
    path.pop();
    if path.ends_with("deps") {
        path.pop();
    }
    path.push("examples");
    path.push(name);
    assert!(
        path.exists(),
        "{} is not built: run `cargo build --examples`",
        path.display()
    );
    path
}

/// A child process that does not outlive the test.
pub struct ChildProcess {
    pub child: Child,
    stdout: mpsc::Receiver<String>,
    stderr: mpsc::Receiver<String>,
}

impl ChildProcess {
    #[track_caller]
    pub fn start(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start the child");
        let stdout = lines_of(child.stdout.take().expect("piped"));
        let stderr = lines_of(child.stderr.take().expect("piped"));
        Self {
            child,
            stdout,
            stderr,
        }
    }

    /// As [`ChildProcess::start`], with a standard input to write to. Dropping that is its end.
    #[track_caller]
    pub fn interactive(command: &mut Command) -> (Self, ChildStdin) {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("start the child");
        let stdin = child.stdin.take().expect("piped");
        let stdout = lines_of(child.stdout.take().expect("piped"));
        let stderr = lines_of(child.stderr.take().expect("piped"));
        (
            Self {
                child,
                stdout,
                stderr,
            },
            stdin,
        )
    }

    /// The echo example with these options on a port of its own, and its address.
    #[track_caller]
    pub fn echo(options: &[&str]) -> (Self, SocketAddr) {
        let mut command = Command::new(example("echo"));
        command.args(["--listen", "127.0.0.1:0"]).args(options);
        let child = Self::start(&mut command);
        let addr = child.address();
        (child, addr)
    }

    /// The address in "listening on ADDRESS (...)".
    #[track_caller]
    pub fn address(&self) -> SocketAddr {
        let line = self.line();
        let addr = line
            .strip_prefix("listening on ")
            .and_then(|rest| rest.split(' ').next());
        addr.and_then(|addr| addr.parse().ok())
            .unwrap_or_else(|| panic!("no address in {line:?}"))
    }

    /// The next line of its standard output.
    #[track_caller]
    pub fn line(&self) -> String {
        self.stdout
            .recv_timeout(PATIENCE)
            .expect("a line from the child")
    }

    /// The next line of its standard error.
    #[track_caller]
    pub fn error_line(&self) -> String {
        self.stderr
            .recv_timeout(PATIENCE)
            .expect("a line from the child's log")
    }

    /// Sends it a signal by name: "TERM".
    #[track_caller]
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill")
            .args([&format!("-{name}"), &self.child.id().to_string()])
            .status()
            .expect("kill");
        assert!(status.success(), "kill -{name}");
    }

    /// Waits for its end, and returns how it ended, the rest of its output, and its log.
    #[track_caller]
    pub fn finish(mut self) -> (ExitStatus, String, String) {
        let mut status = None;
        eventually("the child ends", || {
            status = self.child.try_wait().expect("wait");
            status.is_some()
        });
        // The readers end with the pipes.
        let collect = |lines: &mpsc::Receiver<String>| {
            let mut text = String::new();
            while let Ok(line) = lines.recv_timeout(PATIENCE) {
                text.push_str(&line);
                text.push('\n');
            }
            text
        };
        (
            status.expect("ended"),
            collect(&self.stdout),
            collect(&self.stderr),
        )
    }

    /// Its process id.
    pub fn process(&self) -> u32 {
        self.child.id()
    }

    /// How many descriptors it has open.
    #[track_caller]
    pub fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id()))
            .expect("proc")
            .count()
    }

    /// The most memory that the process ever had, in bytes, without its files' pages, the program's own
    /// among them: those are mapped as the system likes. VmHWM and RssFile of proc(5).
    pub fn peak_memory(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process()));
        let status = status.expect("proc");
        let of = |name: &str| -> usize {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB"));
            kilobytes.expect("proc").trim().parse().expect("a number")
        };
        of("VmHWM:").saturating_sub(of("RssFile:")) * 1024
    }

    /// User and system CPU time so far, in seconds.
    #[track_caller]
    pub fn cpu_seconds(&self) -> f64 {
        let stat =
            std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).expect("proc");
        let fields: Vec<&str> = stat
            .rsplit(')')
            .next()
            .expect("fields")
            .split_whitespace()
            .collect();
        // Fields 14 and 15 of proc(5), in ticks of 10 ms; the split starts at field 3.
        let ticks =
            fields[11].parse::<f64>().expect("utime") + fields[12].parse::<f64>().expect("stime");
        ticks / 100.0
    }
}

impl Drop for ChildProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn lines_of(pipe: impl Read + Send + 'static) -> mpsc::Receiver<String> {
    let (tell, told) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(pipe).lines() {
            let Ok(line) = line else { return };
            if tell.send(line).is_err() {
                return;
            }
        }
    });
    told
}
