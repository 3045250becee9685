//! Each bug that is planted to test the campaign still has its line in the library.

use kit::planted_bugs::BUGS;

#[test]
fn every_planted_bug_has_its_line_once() {
    for bug in BUGS {
        let text = std::fs::read_to_string(format!("{}/{}", kit::ROOT, bug.file));
        let text = text.expect("the file");
        assert_eq!(text.matches(bug.line).count(), 1, "{}", bug.kind);
        assert_ne!(bug.line, bug.planted, "{}", bug.kind);
    }
}
