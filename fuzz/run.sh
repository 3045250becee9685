#!/usr/bin/env bash
# Runs every fuzz target: `fuzz/run.sh replay`, `fuzz/run.sh smoke SECONDS`, `fuzz/run.sh long SECONDS`. See README.md.
set -euo pipefail
cd "$(dirname "$0")"

usage() {
  cat >&2 <<'END'
fuzz/run.sh replay         every corpus and every regression, once
fuzz/run.sh smoke SECONDS  fuzzes each target so long; keeps nothing but crashes
fuzz/run.sh long SECONDS   likewise, and keeps what reaches new code in fuzz/corpus
END
  exit 2
}

fail() {
  echo "fuzz/run.sh: $*" >&2
  exit 1
}

cargo +nightly --version >/dev/null 2>&1 || fail "no nightly compiler: rustup toolchain install nightly"
cargo fuzz --version >/dev/null 2>&1 || fail "no cargo-fuzz: cargo install cargo-fuzz"

mode="${1:-}"
seconds="${2:-}"
case "$mode" in
  replay) [ $# = 1 ] || usage ;;
  smoke | long) [[ $# = 2 && "$seconds" =~ ^[1-9][0-9]*$ ]] || usage ;;
  *) usage ;;
esac

targets=$(cargo fuzz list)
[ -n "$targets" ] || fail "no targets"

# Nothing in this crate has `unsafe`: pointers to a stack that has gone are the dearest thing to look for.
export ASAN_OPTIONS="detect_stack_use_after_return=0${ASAN_OPTIONS:+:$ASAN_OPTIONS}"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

cargo +nightly fuzz build
failed=()
for target in $targets; do
  printf '\n== %s %s %s\n' "$mode" "$target" "$seconds"
  corpus="corpus/$target"
  regressions="regressions/$target"
  mkdir -p "$corpus" "$scratch/$target"
  # What is found goes to the first folder.
  folders=("$scratch/$target" "$corpus")
  [ "$mode" != long ] || folders=("$corpus")
  [ ! -d "$regressions" ] || folders+=("$regressions")
  options=(-timeout=10 -print_final_stats=1)
  [ ! -f "dictionaries/$target.dict" ] || options+=("-dict=dictionaries/$target.dict")
  if [ "$mode" = replay ]; then
    options+=(-runs=0)
  else
    options+=("-max_total_time=$seconds")
  fi
  cargo +nightly fuzz run "$target" "${folders[@]}" -- "${options[@]}" || failed+=("$target")
done

[ "${#failed[@]}" = 0 ] || fail "findings in: ${failed[*]}; README.md says how to go on"
printf '\n== no findings in: %s\n' "${targets//$'\n'/ }"
