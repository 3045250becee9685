//! What the captions say of machine and programs.

use std::process::{Command, Stdio};

/// Returns date, processors and kernel.
pub fn machine() -> String {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let processors = read("/proc/cpuinfo");
    let named = |line: &&str| line.starts_with("model name");
    let model = processors.lines().find(named);
    let model = model.and_then(|line| line.split(": ").nth(1));
    let many = processors.lines();
    let many = many.filter(|line| line.starts_with("processor")).count();
    let date = output(Command::new("date").args(["-u", "+%Y-%m-%d"]));
    format!(
        "Measured on {}: {many} × {}, Linux {}",
        date.unwrap_or_default().trim(),
        model.unwrap_or(std::env::consts::ARCH),
        read("/proc/sys/kernel/osrelease").trim()
    )
}

/// Returns the versions of rustc, of these crates and of `others`.
pub fn programs(crates: &[&str], others: &[String]) -> String {
    let compiler = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let version = output(Command::new(compiler).arg("--version")).unwrap_or_default();
    let mut programs = vec![version.trim().to_owned()];
    let lock = concat!(env!("CARGO_MANIFEST_DIR"), "/../Cargo.lock");
    let lock = std::fs::read_to_string(lock).unwrap_or_default();
    programs.extend(crates.iter().filter_map(|name| {
        let entry = format!("name = \"{name}\"\nversion = \"");
        // Of several versions the newest is ours.
        let (_, rest) = lock.rsplit_once(&entry)?;
        Some(format!("{name} {}", rest.split('"').next()?))
    }));
    programs.extend_from_slice(others);
    programs.join(", ")
}

/// Standard output of a program, or the reason of its failure.
pub fn output(command: &mut Command) -> Result<String, String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let run = command.stdin(Stdio::null()).output();
    let run = run.map_err(|error| format!("{name}: {error}"))?;
    if !run.status.success() {
        let said = String::from_utf8_lossy(&run.stderr);
        return Err(format!("{name}: {}: {}", run.status, said.trim()));
    }
    Ok(String::from_utf8_lossy(&run.stdout).into_owned())
}
