#!/usr/bin/env bash
# From a fresh clone to pictures: environment, photographs, encoding, training, the gate, samples, and a page to look at.
#
#   launch/quickstart.sh                      the generated photographs; about a quarter of an hour on two cores, no GPU
#   launch/quickstart.sh --images=DIR         your own captioned photographs, through the same small encoders
#   launch/quickstart.sh --out=DIR            where everything goes (default: quickstart, or quickstart-own with --images)
#   launch/quickstart.sh --steps=N            train only N steps; the gate is then expected to fail
#   launch/quickstart.sh --config.FIELD=...   another value of configs/quickstart.py for the training
#
# Run again, it goes on where it stopped.
set -euo pipefail
unset CDPATH # cd would say where it goes

images="" steps="" out="" changes=()
while [ $# -gt 0 ]; do
  argument="$1"
  case "$argument" in
    --images | --steps | --out) # as in --images DIR
      [ $# -gt 1 ] || { echo "Error: $argument: a value is wanted, as in $argument=..." >&2; exit 2; }
      argument="$1=$2"
      shift
      ;;
  esac
  shift
  value="${argument#*=}"
  case "$value" in "~") value="$HOME" ;; "~/"*) value="$HOME/${value#"~/"}" ;; esac # the shell leaves it behind a =
  case "$argument" in
    --images=?*)
      images="$(cd "$value" 2>/dev/null && pwd)" || { echo "Error: $argument: no such folder." >&2; exit 2; }
      ;;
    --steps=?*) steps="$value" ;;
    --out=?*) case "$value" in /*) out="$value" ;; *) out="$PWD/$value" ;; esac ;;
    --config.?*=*) changes+=("$argument") ;;
    --help | -h) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "Error: $argument is not understood; launch/quickstart.sh --help says what is." >&2; exit 2 ;;
  esac
done
if [ -n "$images" ] && [ "${out:-/nowhere}" -ef "$images" ]; then
  echo "Error: --out=$out is the folder of your photographs; name another." >&2
  exit 2
fi
if [ -n "$steps" ] && ! [[ "$steps" =~ ^[1-9][0-9]*$ ]]; then
  echo "Error: --steps=$steps: a whole number above 0 is wanted." >&2
  exit 2
fi

began=$SECONDS times="" child="" stopped=""
trap 'stopped=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' INT TERM # the stage saves what it has, and ends
stage() { # stage NAME COMMAND...: runs it and remembers how long it took
  local name="$1" start=$SECONDS code=0
  shift
  echo "== $name"
  "$@" &
  child=$!
  while kill -0 "$child" 2>/dev/null; do wait "$child" && code=0 || code=$?; done
  wait "$child" && code=0 || code=$? # bash remembers how it ended, whatever interrupted the waiting
  child=""
  [ -z "$stopped" ] || { echo "Stopped; the same command goes on from here." >&2; exit 3; }
  times+="$(printf '%-16s %4d s' "$name" $((SECONDS - start)))"$'\n'
  return $code
}

source "$(dirname "$0")/environment.sh"
out="${out:-$PWD/quickstart${images:+-own}}"
mkdir -p "$out" 2>/dev/null || { echo "Error: --out=$out: this folder cannot be made." >&2; exit 2; }

if [ -z "$images" ]; then
  images="$out/photographs" own=""
  stage "photographs" $python -m encode.demo --out="$images"
else
  own=yes
fi
stage "encode" $python -m encode.main --config=configs/encode_demo.py --config.images="$images" --config.out="$out/encoded" \
  --config.accept_captions=True

# Photographs that came since the training began are taken in.
training=(--config=configs/quickstart.py --workdir="$out/run" --config.data.path="$out/encoded/128" --config.data.accept_growth=True)
if [ -n "$steps" ]; then
  training+=(--config.train.total_steps="$steps" --config.optim.warmup_steps=$((steps / 10)))
fi
stage "train" $python -m jaxdit.main "${training[@]}" ${changes[@]+"${changes[@]}"}

# What the gate and the samples were made from: the newest checkpoint of this very run.
newest="$(cd "$out/run/checkpoints" && printf '%s\n' * | grep -E '^[0-9]+$' | sort -n | tail -1) $(cksum < "$out/run/config.json")"
done_for() { [ "$(cat "$1" 2>/dev/null)" = "$newest" ]; } # whether a stage has been done for the newest checkpoint

code=0
if done_for "$out/run/gate/step"; then
  grep -q '"verdict": "pass"' "$out/run/gate/gate.json" || code=1
  echo "== gate: step ${newest%% *} has been judged before"
else
  rm -f "$out/run/gate/gate.json" # of an earlier step
  stage "gate" $python -m jaxdit.validate --workdir="$out/run" || code=$?
  [ $code -le 1 ] || [ -n "$own" ] || exit $code
  [ -e "$out/run/gate/gate.json" ] || exit $code
  echo "$newest" > "$out/run/gate/step"
fi
if ! done_for "$out/samples/step"; then
  stage "samples" $python -m jaxdit.sample --workdir="$out/run" --out="$out/samples"
  echo "$newest" > "$out/samples/step"
fi
stage "page" $python -m jaxdit.report --workdir="$out/run" --samples="$out/samples" --encoded="$out/encoded/report.html" \
  --out="$out/index.html"

verdict="$(sed -n 's/.*"verdict": "\(.*\)".*/\1/p' "$out/run/gate/gate.json")"
printf '\n%s%-16s %4d s\n\n' "$times" "in all" $((SECONDS - began))
echo "The gate says: $verdict. Look at $out/index.html"
if [ -n "$steps" ]; then
  # Too short a training to pass: what is checked is that the gate says so.
  if [ "$verdict" = fail ] && [ $code -eq 1 ]; then
    echo "That is what is expected after $steps steps."
    exit 0
  fi
  [ "$verdict" != incomplete ] || [ -z "$own" ] || exit 0
  echo "Error: after $steps steps the gate was expected to fail, but its verdict is $verdict (exit code $code)." >&2
  exit 1
fi
[ -z "$own" ] || exit 0
exit $code
