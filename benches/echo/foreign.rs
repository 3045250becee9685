//! Servers in other languages, compiled when the bench starts, if their compiler is installed.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::machine::output;
use crate::servers::Kind;

const PROGRAMS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/programs");

/// The programs, in a folder of their own until this is dropped.
pub struct Foreign {
    folder: PathBuf,
    /// Compiled programs, each with its compiler for the caption.
    pub present: Vec<(Kind, String)>,
    /// Programs left out, each with the reason.
    pub absent: Vec<(Kind, String)>,
}

impl Foreign {
    /// Compiles the programs of these kinds, and prints those left out.
    pub fn compile(kinds: &[Kind]) -> Self {
        let folder = std::env::temp_dir().join(format!("portcullis-echo-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        let mut foreign = Self {
            folder,
            present: Vec::new(),
            absent: Vec::new(),
        };
        for &kind in kinds {
            let compiled = match kind {
                Kind::Erlang => compile_erlang(&foreign.folder),
                _ => compile_c(&foreign.folder),
            };
            foreign.note(kind, compiled);
        }
        foreign
    }

    fn note(&mut self, kind: Kind, compiled: Result<String, String>) {
        match compiled {
            Ok(compiler) => self.present.push((kind, compiler)),
            Err(reason) => {
                eprintln!("LEFT OUT: {}: {reason}", kind.name());
                self.absent.push((kind, reason));
            }
        }
    }

    /// The kinds among `kinds` that can be measured.
    pub fn present_among(&self, kinds: &[Kind]) -> Vec<Kind> {
        let absent = |kind: &Kind| self.absent.iter().any(|(absent, _)| absent == kind);
        kinds.iter().copied().filter(|kind| !absent(kind)).collect()
    }

    /// Command that starts the server, if it is a program of its own.
    pub fn command(&self, kind: Kind) -> Option<Command> {
        match kind {
            Kind::Epoll => Some(Command::new(self.folder.join("epoll_echo"))),
            Kind::Erlang => {
                let mut command = Command::new("erl");
                // One scheduler, as there is one processor, and none that spins.
                command.args("-noshell +S 1:1 +sbwt none +sbwtdcpu none +sbwtdio none".split(' '));
                command.arg("-pa").arg(&self.folder);
                command.args(["-s", "gen_tcp_echo", "start"]);
                Some(command)
            }
            _ => None,
        }
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn compile_c(folder: &Path) -> Result<String, String> {
    let source = format!("{PROGRAMS}/epoll_echo.c");
    let mut compile = Command::new("cc");
    compile.args(["-O2", "-o"]).arg(folder.join("epoll_echo"));
    output(compile.arg(source))?;
    let version = output(Command::new("cc").arg("--version"))?;
    Ok(version.lines().next().unwrap_or("cc").trim().to_owned() + ", -O2")
}

fn compile_erlang(folder: &Path) -> Result<String, String> {
    let mut compile = Command::new("erlc");
    compile.arg("-o").arg(folder);
    output(compile.arg(format!("{PROGRAMS}/gen_tcp_echo.erl")))?;
    let print = "io:put_chars(erlang:system_info(otp_release)),halt().";
    let release = output(Command::new("erl").args(["-noshell", "-eval", print]))?;
    Ok(format!("Erlang/OTP {}", release.trim()))
}
