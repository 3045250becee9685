//! The fuzzers' dictionaries have the ops of scripts as they are today.

use std::fs;
use std::path::Path;

use kit::{seeds, ROOT};

#[test]
fn they_are_those_that_the_program_makes() {
    for (path, made) in seeds::dictionaries() {
        let found = fs::read(Path::new(ROOT).join("fuzz").join(&path)).expect("a dictionary");
        let [made, found] = [made, found].map(|text| String::from_utf8(text).expect("text"));
        assert_eq!(found, made, "{path}: cargo run --bin seeds");
    }
}
