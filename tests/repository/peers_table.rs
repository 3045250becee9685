//! Each test that `tests/README.md` names as that of a peer's exists where it says.

use std::path::Path;

#[test]
fn every_test_of_the_table_exists() {
    let root = Path::new(kit::ROOT);
    let (_, table) = include_str!("../README.md")
        .split_once("## The suites of our peers")
        .expect("a section");
    let (mut found, mut rows) = (0, 0);
    for row in table.lines().filter(|line| line.starts_with("| ")) {
        let ours = row.split(" | ").nth(1).expect("two columns");
        rows += 1;
        let mut file = String::new();
        for word in ours
            .split([' ', ',', ':', '|'])
            .filter(|word| !word.is_empty())
        {
            if word.ends_with(".rs") {
                let folder = if word.starts_with("src/") {
                    root.to_owned()
                } else {
                    root.join("tests")
                };
                let path = folder.join(word);
                file = std::fs::read_to_string(&path)
                    .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            } else if let Some(name) = word
                .strip_prefix('`')
                .and_then(|word| word.strip_suffix('`'))
            {
                assert!(
                    file.contains(&format!("fn {name}(")),
                    "no test {name}: {row}"
                );
                found += 1;
            }
        }
    }
    assert!(rows > 70 && found > 100, "{found} tests in {rows} rows");
}
