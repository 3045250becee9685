//! Every option of a listener says when a change of it takes effect.

#[test]
fn every_option_says_when_it_takes_effect() {
    let source = include_str!("../src/listen.rs");
    let (mut docs, mut options) = (String::new(), 0);
    for line in source.lines().map(str::trim) {
        if let Some(words) = line.strip_prefix("///") {
            docs.push_str(words);
            continue;
        }
        let is_option = line.starts_with("pub fn ") && line.contains("(mut self");
        if is_option {
            let says = docs.contains("*Live") || docs.contains("*Next connection") || docs.contains("*Next listen");
            let as_another = docs.contains("Else as [`Listen::");
            assert!(says || as_another, "{line} does not say when it takes effect");
            options += 1;
        }
        if !line.starts_with("#[") {
            docs.clear();
        }
    }
    assert!(options > 30, "{options} options were found");
}
