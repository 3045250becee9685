"""Compares the lines of `src` that no test runs with coverage.toml, which says of each why. See `.ci/coverage`.

    coverage.py REPORT.json [--list]

A place in the code is named by its file, its function and the text of its first line, so that other changes of the file
do not matter. What is covered is counted as llvm-cov counts it, in code that is not a test's.
"""

import json
import re
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TEST_FILE = re.compile(r"/(tests|models|testing)(\.rs|/)")
TEST_ITEM = re.compile(r"( *)#\[cfg\((all\()?test\b")
EXIT = re.compile(r"(return\b.*|break|continue);")
CONDITION = re.compile(r" *(let|if|\} else|while|for|match)\b|.*=> ")
FUNCTION = re.compile(r"( *)(?!//).*\bfn (\w+)")


def without_tests(source):
    """The numbers of the lines that are not in an item for tests."""
    kept, end = set(), None
    for number, line in enumerate(source, 1):
        if end is None and (found := TEST_ITEM.match(line)):
            end = found[1]
        elif end is None:
            kept.add(number)
        elif line in (end + "}", end + "};") or re.match(end + r"(?! |#\[).*[;,}]$", line):
            end = None
    return kept


def starts(segment):
    _, _, _, has_count, is_entry, is_gap = segment
    return has_count and is_entry and not is_gap


def lines_of(segments):
    """How often each line ran: as often as the region on it that ran most often."""
    counts, before, by_line = {}, None, {}
    for segment in segments:
        by_line.setdefault(segment[0], []).append(segment)
    for line in range(segments[0][0], segments[-1][0] + 1) if segments else ():
        here = by_line.get(line, [])
        found = [segment[2] for segment in here if starts(segment)]
        is_skipped = bool(here) and not here[0][3] and here[0][4]
        if before and before[3]:
            found.append(before[2])
        if found and not is_skipped:
            counts[line] = max(found)
        if here:
            before = here[-1]
    return counts


def branches_of(entries):
    """The branches with the counts of both directions. A generic function has an entry for each of its types."""
    counts = {}
    for entry in entries:
        total = counts.setdefault(tuple(entry[:4]), [0, 0])
        total[0] += entry[4]
        total[1] += entry[5]
    return [(*place, *total) for place, total in counts.items()]


def function_of(source, number):
    """The function that a line is in."""
    indent = len(source[number - 1]) - len(source[number - 1].lstrip())
    for line in reversed(source[:number]):
        found = FUNCTION.match(line)
        if found and (len(found[1]) < indent or line == source[number - 1]):
            return found[2]
    return "-"


def text_of(source, number):
    """The text of a line. That of a bare exit begins with its condition: a function may have several of the same exit."""
    text = source[number - 1].strip()
    if EXIT.fullmatch(text):
        for line in reversed(source[: number - 1]):
            text = f"{line.strip()} {text}"
            if CONDITION.match(line):
                break
    return text


def places(path, source, lines):
    """The places of successive lines that did not run: the name of each, and the number of its first line."""
    last, found = None, []
    for line in sorted(lines):
        if not re.search(r"\w", source[line - 1]):
            last = line if last == line - 1 else None
            continue
        function = function_of(source, line)
        if last != line - 1 or function != found[-1][0]:
            found.append((function, line))
        last = line
    return [(f"{path} {function}", text_of(source, line), line) for function, line in found]


def listed():
    with open(HERE / "coverage.toml", "rb") as file:
        kinds = tomllib.load(file)["kind"]
    return [place for kind in kinds for place in kind["places"]]


def main():
    shows_all = "--list" in sys.argv
    report = json.loads(Path(sys.argv[1]).read_text())
    totals = {"lines": [0, 0], "regions": [0, 0], "branches": [0, 0]}
    explained, stale, unexplained = listed(), set(listed()), []
    if len(stale) != len(explained):
        sys.exit("coverage.toml names a place twice")
    for file in sorted(report["data"][0]["files"], key=lambda file: file["filename"]):
        path = Path(file["filename"]).relative_to(ROOT).as_posix()
        if not path.startswith("src/") or TEST_FILE.search(path):
            continue
        source = (ROOT / path).read_text().splitlines()
        kept = without_tests(source)
        lines = {line: count for line, count in lines_of(file["segments"]).items() if line in kept}
        regions = [segment for segment in file["segments"] if starts(segment) and segment[0] in kept]
        branches = [branch for branch in branches_of(file["branches"]) if branch[0] in kept]
        for kind, counts in (
            ("lines", list(lines.values())),
            ("regions", [segment[2] for segment in regions]),
            ("branches", [count for branch in branches for count in branch[4:]]),
        ):
            totals[kind][0] += sum(count > 0 for count in counts)
            totals[kind][1] += len(counts)
        for function, text, line in places(path, source, [line for line, count in lines.items() if not count]):
            names = {function, f"{function}: {text}"}
            stale -= names
            if names.isdisjoint(explained):
                unexplained.append(f"{path}:{line}: {function.split()[1]}: {text}")
        if shows_all:
            for line, column, count, *_ in regions:
                if not count and lines.get(line):
                    print(f"region {path}:{line}:{column}: {source[line - 1].strip()}")
            for line, column, _, _, taken, not_taken in branches:
                if lines.get(line) and not (taken and not_taken):
                    print(f"branch {path}:{line}:{column}: never {'false' if taken else 'true'}: "
                          f"{source[line - 1].strip()}")
    for place in sorted(stale):
        print(f"covered, and still explained: {place}")
    for place in unexplained:
        print(f"not covered, and not explained: {place}")
    for kind, (covered, count) in totals.items():
        print(f"{kind}: {covered:,} of {count:,}, {100 * covered / count:.2f} %")
    return bool(unexplained)


sys.exit(main())
