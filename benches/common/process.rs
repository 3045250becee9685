//! Servers and clients as processes of their own: a program that starts itself.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

#[cfg(target_os = "linux")]
use nix::sched::{sched_getaffinity, sched_setaffinity, CpuSet};
#[cfg(target_os = "linux")]
use nix::unistd::Pid;

/// This program with other arguments, until it is dropped.
pub struct Process {
    child: Child,
    out: BufReader<ChildStdout>,
    /// When it closes the process ends, whatever becomes of us.
    input: ChildStdin,
}

impl Process {
    pub fn start(arguments: &[&str]) -> Self {
        let me = std::env::current_exe().expect("a program");
        Self::from(Command::new(me).args(arguments))
    }

    /// As [`Process::start`], letting others go first.
    pub fn start_nicely(arguments: &[&str]) -> Self {
        let me = std::env::current_exe().expect("a program");
        Self::from(
            Command::new("nice")
                .args(["-n", "19"])
                .arg(me)
                .args(arguments),
        )
    }

    /// Starts another program on processor number `processor`.
    pub fn start_other(command: &mut Command, processor: usize) -> Self {
        let own = processors();
        pin(processor);
        let process = Self::from(command);
        restore(own);
        process
    }

    fn from(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a process");
        let out = BufReader::new(child.stdout.take().expect("piped"));
        let input = child.stdin.take().expect("piped");
        Self { child, out, input }
    }

    /// The next line that it prints.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.out.read_line(&mut line).expect("a line");
        line.trim().to_owned()
    }

    /// Sends it a line ([`commands`]).
    pub fn say(&mut self, line: &str) {
        writeln!(self.input, "{line}").expect("it reads");
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Processor time so far, of all its threads.
    pub fn cpu(&self) -> Duration {
        let tasks =
            std::fs::read_dir(format!("/proc/{}/task", self.child.id())).expect("Linux's /proc");
        let times = tasks.flatten().filter_map(|task| {
            let line = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
            line.split(' ').next()?.parse::<u64>().ok()
        });
        Duration::from_nanos(times.sum())
    }

    /// A field of `proc_pid_status(5)`, in bytes: VmRSS is its memory, VmHWM the most that it had.
    pub fn status(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))
            .expect("Linux's /proc");
        let mut lines = status.lines().map(|line| line.split_whitespace());
        let value = lines.find_map(|mut words| {
            let is_it = words.next()?.strip_suffix(':')? == field;
            if is_it {
                words.next()?.parse::<u64>().ok()
            } else {
                None
            }
        });
        value.expect("a number") * 1024
    }

    /// Bytes that are its own: not those of the program and its libraries.
    pub fn memory(&self) -> u64 {
        let rollup = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", self.child.id()))
            .expect("Linux's /proc");
        let line = rollup
            .lines()
            .find(|line| line.starts_with("Private_Dirty:"));
        let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
        kib.expect("a number") * 1024
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// In a process that [`Process::start`] made: ends with the one that made it.
pub fn end_with_parent() {
    std::thread::spawn(|| {
        let _ = std::io::stdin().read(&mut [0]);
        std::process::exit(0);
    });
}

/// As [`end_with_parent`], calling `act` with each line that the parent sends.
pub fn commands(mut act: impl FnMut(&str) + Send + 'static) {
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            act(&line);
        }
        std::process::exit(0);
    });
}

/// Only processor number `wanted` from now on, if there is one.
#[cfg(target_os = "linux")]
pub fn pin(wanted: usize) {
    pin_to([wanted]);
}

/// Only these processors from now on, if there are any.
#[cfg(target_os = "linux")]
pub fn pin_to(wanted: impl IntoIterator<Item = usize>) {
    let mut processors = CpuSet::new();
    if wanted
        .into_iter()
        .all(|number| processors.set(number).is_ok())
    {
        restore(Some(processors));
    }
}

/// The processors of this thread.
#[cfg(target_os = "linux")]
fn processors() -> Option<CpuSet> {
    sched_getaffinity(Pid::from_raw(0)).ok()
}

#[cfg(target_os = "linux")]
fn restore(processors: Option<CpuSet>) {
    if let Some(processors) = processors {
        let _ = sched_setaffinity(Pid::from_raw(0), &processors);
    }
}

#[cfg(not(target_os = "linux"))]
pub fn pin(_: usize) {}

#[cfg(not(target_os = "linux"))]
pub fn pin_to(_: impl IntoIterator<Item = usize>) {}

#[cfg(not(target_os = "linux"))]
fn processors() {}

#[cfg(not(target_os = "linux"))]
fn restore((): ()) {}
