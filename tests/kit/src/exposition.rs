//! A strict reader of the Prometheus text exposition format 0.0.4.

use std::collections::{BTreeMap, HashSet};

/// One value: its name, its labels, itself.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub name: String,
    pub labels: Vec<(String, String)>,
    pub value: f64,
}

/// All samples of a text, which is right in every respect.
#[derive(Debug)]
pub struct Exposition {
    pub samples: Vec<Sample>,
}

impl Exposition {
    /// Reads a text.
    ///
    /// # Panics
    ///
    /// If anything is wrong with it.
    #[track_caller]
    pub fn read(text: &str) -> Self {
        assert!(text.ends_with('\n'), "the last line ends");
        let mut samples: Vec<Sample> = Vec::new();
        let mut families: BTreeMap<String, String> = BTreeMap::new();
        let mut family = (String::new(), String::new());
        let mut helped = String::new();
        for line in text.lines() {
            if let Some(help) = line.strip_prefix("# HELP ") {
                let (name, words) = help.split_once(' ').expect("a name and words");
                assert!(!words.is_empty() && !words.contains('\\'), "{line}");
                helped = name.to_owned();
            } else if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').expect("a name and a type");
                assert_eq!(name, helped, "help comes first");
                assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
                assert!(is_name(name) && name.starts_with("portcullis_"), "{line}");
                assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
                let before = families.insert(name.to_owned(), kind.to_owned());
                assert!(before.is_none(), "{name} once");
                family = (name.to_owned(), kind.to_owned());
            } else {
                let sample = sample(line);
                let own = match family.1.as_str() {
                    "histogram" => ["_bucket", "_sum", "_count"]
                        .iter()
                        .any(|end| sample.name == format!("{}{end}", family.0)),
                    _ => sample.name == family.0,
                };
                assert!(own, "{line} stands under {family:?}");
                assert!(sample.value >= 0.0, "{line}");
                samples.push(sample);
            }
        }
        let mut seen = HashSet::new();
        for sample in &samples {
            assert!(
                seen.insert((&sample.name, &sample.labels)),
                "{sample:?} is there twice"
            );
        }
        let read = Self { samples };
        for (name, _) in families.iter().filter(|(_, kind)| *kind == "histogram") {
            read.check_histogram(name);
        }
        read
    }

    /// The value with exactly these labels.
    #[track_caller]
    pub fn get(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let same = |sample: &&Sample| {
            sample.name == name
                && sample.labels.len() == labels.len()
                && sample
                    .labels
                    .iter()
                    .zip(labels)
                    .all(|(one, other)| one.0 == other.0 && one.1 == other.1)
        };
        let found = self.samples.iter().find(same);
        found
            .unwrap_or_else(|| panic!("no {name} {labels:?}"))
            .value
    }

    /// What all samples of this name add up to.
    pub fn sum(&self, name: &str) -> f64 {
        let named = self.samples.iter().filter(|sample| sample.name == name);
        named.map(|sample| sample.value).sum()
    }

    fn check_histogram(&self, name: &str) {
        let bucket = format!("{name}_bucket");
        let buckets: Vec<(f64, f64)> = self
            .samples
            .iter()
            .filter(|sample| sample.name == bucket)
            .map(|sample| {
                let [(label, bound)] = &sample.labels[..] else {
                    panic!("{sample:?} has one label");
                };
                assert_eq!(label, "le");
                (number(bound), sample.value)
            })
            .collect();
        assert!(buckets.len() > 2, "{name} has buckets");
        for pair in buckets.windows(2) {
            assert!(
                pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1,
                "{name}: {pair:?}"
            );
        }
        let (bound, all) = buckets[buckets.len() - 1];
        assert!(bound.is_infinite());
        assert_eq!(all, self.get(&format!("{name}_count"), &[]), "{name}");
        let sum = self.get(&format!("{name}_sum"), &[]);
        assert!(all > 0.0 || sum == 0.0, "{name}");
    }
}

fn sample(line: &str) -> Sample {
    let end = line
        .find(['{', ' '])
        .unwrap_or_else(|| panic!("{line:?} has a value"));
    let (name, rest) = line.split_at(end);
    assert!(is_name(name), "{line}");
    let (labels, value) = match rest.strip_prefix('{') {
        Some(rest) => read_labels(rest),
        None => (Vec::new(), rest),
    };
    let value = value
        .strip_prefix(' ')
        .unwrap_or_else(|| panic!("{line:?} has one blank"));
    Sample {
        name: name.to_owned(),
        labels,
        value: number(value),
    }
}

/// The labels, and what stands behind the closing brace.
fn read_labels(text: &str) -> (Vec<(String, String)>, &str) {
    let mut labels = Vec::new();
    let mut rest = text;
    loop {
        let (name, behind) = rest.split_once("=\"").expect("a label's name");
        assert!(is_name(name) && !name.contains(':'), "{text}");
        let mut value = String::new();
        let mut characters = behind.char_indices();
        let end = loop {
            match characters.next().expect("a closing quote") {
                (at, '"') => break at,
                (_, '\\') => match characters.next().expect("something escaped").1 {
                    'n' => value.push('\n'),
                    escaped @ ('\\' | '"') => value.push(escaped),
                    other => panic!("\\{other} in {text}"),
                },
                (_, other) => value.push(other),
            }
        };
        labels.push((name.to_owned(), value));
        rest = &behind[end + 1..];
        if let Some(behind) = rest.strip_prefix('}') {
            return (labels, behind);
        }
        rest = rest.strip_prefix(',').expect("a comma or the end");
    }
}

fn is_name(name: &str) -> bool {
    let letter = |c: char| c.is_ascii_alphabetic() || c == '_' || c == ':';
    name.starts_with(letter) && name.chars().all(|c| letter(c) || c.is_ascii_digit())
}

fn number(text: &str) -> f64 {
    match text {
        "+Inf" => f64::INFINITY,
        _ => {
            assert!(!text.contains(['i', 'n', 'N', ' ']), "{text:?} is a number");
            text.parse()
                .unwrap_or_else(|_| panic!("{text:?} is a number"))
        }
    }
}
