#!/usr/bin/env bash
# Checks a graphics card within ten minutes and writes what it found to one Markdown file, as a section for
# docs/backends.md: devices, `recipe compare` in f32 and in 16 bits, speed of training, decoding and PPO, and whether 500
# steps hold more memory than 100. Needs bash, coreutils, sed, grep and the program `recipe` with a GPU backend in it, which
# may have been built elsewhere; no Rust, no Python, no network.
#
# usage: tests/gpu/check.sh RECIPE_PROGRAM [BACKEND [FILE]]        BACKEND: wgpu (the default), vulkan, metal, cuda
set -uo pipefail
export LC_ALL=C

if [ $# -lt 1 ] || [ $# -gt 3 ]; then
  sed -n '7s/^# //p' "$0" >&2
  exit 2
fi
recipe=$(command -v "$1") || { echo "error: there is no program \`$1\`" >&2; exit 2; }
recipe=$(realpath "$recipe")
backend=${2:-wgpu}
report=${3:-gpu-${backend//:/-}.md}
# Seconds for everything, and what is left of them.
limit=${KINDLING_CHECK_SECONDS:-600}
left() { echo $((limit - SECONDS)); }
# The same for one comparison: speeds are wanted too where a driver compiles for minutes.
left_for_comparison() { echo $(($(left) < limit * 2 / 5 ? $(left) : limit * 2 / 5)); }

devices=$("$recipe" --backend list 2>/dev/null) || { echo "error: \`$recipe --backend list\` failed" >&2; exit 1; }
line=$(grep -E "^${backend%%:*}(:[0-9]+)? " <<<"$devices" | head -n 1)
case $line in
  "" | *"not compiled in"* | *"none found"*)
    echo "error: \`$recipe\` cannot open \`$backend\`: ${line:-no such backend}" >&2
    echo "hint: \`$recipe --backend list\` says what it has" >&2
    exit 1
    ;;
esac
case $line in
  *bf16*) narrow=bf16 ;;
  *f16*) narrow=f16 ;;
  *) narrow= ;;
esac

work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
failures=()
say() { printf '%s\n' "$*" >&2; }
# One line for each argument.
write() { printf '%s\n' "$@" >>"$work/report.md"; }

# field NAME: the number or list under NAME in the JSON line on standard input.
field() { sed -nE "s/.*\"$1\":(\[[^]]*\]|[^,}]*).*/\1/p" | head -n 1; }

# bench LABEL ARGUMENT...: a row of the table, or why there is none. Sets `line`.
bench() {
  local label=$1
  shift
  say "recipe bench $*"
  if [ "$(left)" -le 5 ]; then
    line=
    write "| $label | no time left | | | |"
    return
  fi
  line=$(timeout "$(left)" "$recipe" bench "$@" --backend "$backend" -q 2>"$work/stderr")
  local code=$?
  if [ $code -eq 124 ]; then
    line=
    failures+=("bench $* (not done in the time left)")
    write "| $label | not done in the time left | | | |"
    return
  fi
  if [ $code -ne 0 ]; then
    line=
    failures+=("bench $*")
    write "| $label | failed with $code: $(tail -n 1 "$work/stderr" | tr '|' '/') | | | |"
    return
  fi
  local ms tokens
  ms=$(field ms_per_step <<<"$line")
  [ -n "$ms" ] || ms=$(field ms_per_decode_step <<<"$line")
  [ -n "$ms" ] || ms="$(field s_per_iteration <<<"$line") s"
  tokens=$(field tokens_per_s <<<"$line")
  write "| $label | $ms | $tokens | $(field first_step_s <<<"$line") | $(field loss_first <<<"$line") $(field loss_last <<<"$line") |"
}

# compare PRECISION: the whole comparison of a small model.
compare() {
  local precision=$1
  say "recipe compare tiny --precision $precision"
  write "" "### \`recipe compare\`, a small model, $precision" ""
  if [ "$(left)" -le 20 ]; then
    write "No time left."
    return
  fi
  timeout "$(left_for_comparison)" "$recipe" compare tiny --backends "flex,$backend" --precision "$precision" --steps 20 --stages pretrain,sft \
    --out "$work/$precision" --set recipe.world.stories=500 --set recipe.world.sft=100 --set recipe.world.held_out=20 \
    --set pretrain.model.n_layers=2 --set pretrain.model.d_model=32 --set pretrain.model.d_ff=128 \
    --set pretrain.model.n_heads=2 --set pretrain.tokenizer.vocab_size=400 -q >"$work/stdout" 2>"$work/stderr"
  local code=$?
  [ $code -eq 0 ] || failures+=("compare --precision $precision")
  if [ -f "$work/$precision/compare.md" ]; then
    sed -n '3,$p' "$work/$precision/compare.md" | grep -v '^!\[' | sed 's/^## /#### /' >>"$work/report.md"
  else
    write "It ended with $code: $(tail -n 1 "$work/stderr")"
  fi
}

write "## $(sed -E 's/^[^ ]+ +//; s/  .*//' <<<"$line"), \`$backend\`" ""
write "$("$recipe" --version), $(uname -sm), $(date -u +%Y-%m-%d)." "" '```' "$devices" '```'

compare f32
write "" "### Speed and memory, random weights and tokens" ""
write "| work | ms a step | tokens/s | first step, s | loss, first and last |" "| --- | --- | --- | --- | --- |"
bench "training, size a" train --size a --steps 20
bench "training, size a, 500 steps of a smaller batch" train --size a --batch 2 --max-seq-len 64 --steps 500
held=$line
[ -z "$narrow" ] || bench "training, size a, $narrow" train --size a --steps 20 --precision "$narrow"
bench "decoding, size a, 32 rows" generate --size a --batches 32 --gen 64 --steps 1
bench "PPO, size a" ppo --size a --steps 2
bench "training, size c" train --size c --steps 5
bench "decoding, size c, 1 row" generate --size c --batches 1 --gen 64 --steps 1
bench "training, size s" train --size s --steps 5
bench "decoding, size s, 8 rows" generate --size s --batches 8 --gen 64 --steps 1
if [ -n "$held" ]; then
  write "" "Held after each hundred of the 500 steps, MiB: on the device $(field device_mib <<<"$held"), by the process \
$(field resident_mib <<<"$held")."
fi
[ -z "$narrow" ] || compare "$narrow"
write "" "Took $SECONDS s. $([ ${#failures[@]} -eq 0 ] && echo "Nothing failed." || printf 'Failed: %s.' "$(IFS=';'; echo "${failures[*]}")")"

cp "$work/report.md" "$report" || exit 1
say "the report is in \`$report\`"
[ ${#failures[@]} -eq 0 ]
