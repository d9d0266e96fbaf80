#!/usr/bin/env bash
# All that is to be measured on a GPU, in one command of at most ten minutes: attention, several devices, the training step of
# both models beside its peers, a profile, the plan's measurement, the loader.
#
#   bench/gpu.sh                  on this machine's NVIDIA cards; installs requirements-cuda.txt into .venv where it is missing
#   bench/gpu.sh --minutes=N      at most so long (10), installing not counted; what would not fit is skipped and named
#   bench/gpu.sh --only=A,B       only the parts whose names begin so
#   bench/gpu.sh --nano           at the end the real nano run: 5,000 steps at 512 on the generated photographs, and the gate; it
#                                 takes as long as it takes
#   bench/gpu.sh --memory_gb=N    of the card that the training step may use (24)
#   bench/gpu.sh --python=PATH    another Python that has all packages; nothing is installed
#   bench/gpu.sh --out=DIR        where the results go (bench/results)
#   bench/gpu.sh --smallest       everything in its smallest form on the CPU, to try the script; results go to a temporary folder
#
# Exit code 0: all parts ran. 1: one failed, or did not fit into the time; the last lines name it. 2: the call is wrong, or there
# is no card.
set -uo pipefail

minutes=10 only="" nano="" memory_gb=24 given="" out="" smallest=""
for argument in "$@"; do
  case "$argument" in
    --minutes=*) minutes="${argument#*=}" ;;
    --only=?*) only="${argument#*=}" ;;
    --nano) nano=yes ;;
    --memory_gb=*) memory_gb="${argument#*=}" ;;
    --python=?*) given="${argument#*=}" ;;
    --out=?*)
      mkdir -p "${argument#*=}" 2>/dev/null || { echo "Error: $argument: this folder cannot be made." >&2; exit 2; }
      out="$(cd "${argument#*=}" && pwd)"
      ;;
    --smallest) smallest=yes ;;
    --help | -h) sed -n '2,18s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "Error: $argument is not understood; bench/gpu.sh --help says what is." >&2; exit 2 ;;
  esac
done
for flag in minutes memory_gb; do
  if ! [[ "${!flag}" =~ ^[1-9][0-9]*$ ]]; then
    echo "Error: --$flag=${!flag}: a whole number above 0 is wanted." >&2
    exit 2
  fi
done
if [ -z "$smallest" ] && ! nvidia-smi -L >/dev/null 2>&1; then
  echo "Error: nvidia-smi finds no card here; --smallest tries the script on the CPU." >&2
  exit 2
fi
if [ -n "$given" ] && ! given="$(command -v "$given")"; then
  echo "Error: --python: no such program." >&2
  exit 2
fi
[ -z "$given" ] || given="$(cd "$(dirname "$given")" && pwd)/$(basename "$given")"

if [ -n "$given" ]; then
  python="$given"
  cd "$(dirname "$0")/.." || exit 1
else
  [ -n "$smallest" ] || export JAXDIT_CUDA=yes
  source "$(dirname "$0")/../launch/environment.sh"
fi
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}" JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_MEM_FRACTION=0.9
work="$(mktemp -d)"
if [ -n "$smallest" ]; then
  export JAX_PLATFORMS=cpu
  out="${out:-$work/results}"
fi
out="${out:-$PWD/bench/results}"
mkdir -p "$out"
export JAXDIT_BENCH_RESULTS="$out"
if ! $python -c 'import jax; jax.devices()' >"$work/devices" 2>&1; then
  echo "Error: JAX finds no $JAX_PLATFORMS device: $(tail -n 1 "$work/devices")" >&2
  exit 2
fi
count="$($python -c 'import jax; print(jax.device_count())')"

began=$SECONDS summary="" code=0 child=""
trap '[ -z "$child" ] || kill -TERM "$child" 2>/dev/null; exit 1' INT TERM
part() { # part NAME SECONDS COMMAND...: runs it where that much time is left, for at most three times as long, and remembers how it went
  local name="$1" needs="$2" start=$SECONDS left=$((60 * minutes - SECONDS + began)) limit ended=0
  shift 2
  local wanted chosen=""
  for wanted in ${only//,/ }; do [[ "$name" != "$wanted"* ]] || chosen=yes; done
  [ -z "$only" ] || [ -n "$chosen" ] || return 0
  if [ "$left" -lt "$needs" ]; then
    summary+="$(printf '%-22s skipped: it takes about %d s, and %d s are left; --minutes=N gives more' "$name" "$needs" "$((left > 0 ? left : 0))")"$'\n'
    code=1
    return 0
  fi
  limit=$((3 * needs < left ? 3 * needs : left))
  echo "== $name (at most $limit s)"
  timeout --kill-after=10 "$limit" "$@" >"$work/$name.log" 2>&1 &
  child=$!
  wait "$child" || ended=$?
  child=""
  if [ $ended -eq 0 ]; then
    summary+="$(printf '%-22s %4d s' "$name" $((SECONDS - start)))"$'\n'
  else
    code=1
    [ $ended -ne 124 ] || echo "It ran past its $limit s." >>"$work/$name.log"
    summary+="$(printf '%-22s %4d s  FAILED with exit code %d: %s' "$name" $((SECONDS - start)) $ended "$(grep -v '^ *$' "$work/$name.log" | tail -n 1)")"$'\n'
  fi
}

step() { # step CONFIG RESOLUTION MICRO_BATCH REMAT PEERS SECONDS: one case of bench/train_step.py, in a file of its own
  part "step-$1-$2-$3" "$6" $python -m bench.train_step --config="$1" --resolutions="$2" --micro_batches="$3" --remat="$4" \
    --peers="$5" --label="$2-$3" "${stepping[@]}"
}

photographs() { # photographs COUNT SIZE: the generated ones, square, encoded at that resolution in one bucket
  $python -m encode.demo --out="$work/photographs-$1" --count="$1" --side="$2" &&
    $python -m encode.main --config=configs/encode_demo.py --config.images="$work/photographs-$1" \
      --config.out="$work/encoded-$1" --config.resolutions="($2,)" --config.buckets="(($2, $2),)" --config.max_upscale=4.0
}

devices() { # the trainer's first steps on all devices must have the losses that they have on one
  photographs 16 64 || return 1
  local common=(-m jaxdit.main --config=configs/quickstart.py --config.data.path="$work/encoded-16/64" --config.train.total_steps=4
    --config.train.batch_size=8 --config.train.micro_batch=8 --config.train.log_every=1 --config.optim.warmup_steps=0
    --config.sample.previews=0 --config.data.holdout_fraction=0 --config.train.eval_every=0 --config.model.layers=2)
  if [ -n "$smallest" ]; then
    $python "${common[@]}" --workdir="$work/one" &&
      XLA_FLAGS=--xla_force_host_platform_device_count=2 $python "${common[@]}" --workdir="$work/all"
  else
    CUDA_VISIBLE_DEVICES=0 $python "${common[@]}" --workdir="$work/one" && $python "${common[@]}" --workdir="$work/all"
  fi && $python - "$work" <<'PYTHON'
import json, sys
from pathlib import Path

one, several = ([json.loads(row)["loss"] for row in (Path(sys.argv[1]) / name / "metrics.jsonl").open()] for name in ("one", "all"))
print("losses on one device and on all:", list(zip(one, several)))
worst = max(abs(a - b) / a for a, b in zip(one, several, strict=True))
if not worst < 0.01:
    sys.exit(f"The losses on all devices differ by {worst:.1%} from those on one.")
PYTHON
}

plan() { # twenty real updates a bucket, beside what the plan estimates
  $python -m jaxdit.plan --measure --config=configs/nano.py "$@" >"$out/plan-nano.txt" && cat "$out/plan-nano.txt"
}

nano_run() { # nano_run COUNT SIZE [OVERRIDES]: the README's way on the generated photographs: encode, train, gate
  photographs "$1" "$2" || return 1
  local verdict=0
  $python -m jaxdit.main --config=configs/nano.py --workdir="$work/nano" --config.data.path="$work/encoded-$1/$2" "${@:3}" || return 1
  mkdir -p "$out/nano"
  $python -m jaxdit.validate --workdir="$work/nano" --out="$out/nano" || verdict=$?
  cp "$work/nano/metrics.jsonl" "$work/nano/report.html" "$out/nano/"
  [ -z "$smallest" ] || [ $verdict -ne 1 ] || return 0 # ten steps are too few to pass
  return $verdict
}
export -f photographs devices plan nano_run
export python work out smallest

few=(--config.model.layers=1 --config.model.width=64 --config.model.heads=2 --config.train.batch_size=4 --config.train.micro_batch=2)
if [ -n "$smallest" ]; then
  stepping=(--layers=1 --rounds=1 --text=8)
  part attention 20 $python -m bench.attention --models=nano --tokens=64 --seconds=0.01
  part devices 60 bash -c devices
  step nano 32 1 none "torch_dit eager" 30
  step full 32 1 block "torch_dit eager" 30
  part profile-nano 30 $python -m bench.profile_step --config=nano --layers=1 --resolution=32 --micro_batch=1 --text=8
  part plan 30 bash -c 'plan "$@"' - --resolution=64 "${few[@]}"
  part loader 20 $python -m bench.loader --resolutions=256 --samples=32 --rounds=1
  if [ -n "$nano" ]; then
    minutes=$((minutes + 10))
    part nano 120 bash -c 'nano_run "$@"' - 12 64 "${few[@]}" --config.train.total_steps=10 --config.sample.previews=0
  fi
else
  # The most wanted first; the seconds are those of an H100's machine with 16 cores, where torch.compile takes two minutes of 24
  # layers and ours 40 s. Micro-batches are those of configs/, the target of 8 at 1024, or what PyTorch has room for.
  stepping=(--memory_gb="$memory_gb" --rounds=3 --updates=2 --accumulation=4 --text=128 --fused=no,yes)
  part attention 90 $python -m bench.attention --models=full,full-8 --tokens=247,1024 --seconds=0.2 # 208x304 pixels are 13 x 19 tokens
  [ "$count" -eq 1 ] || part devices 90 bash -c devices
  step full 512 8 none "torch_dit compiled" 180
  step full 1024 8 block none 100
  part profile-full 70 $python -m bench.profile_step --config=full --resolution=512 --micro_batch=8 --text=128
  part profile-fused 70 $python -m bench.profile_step --config=full --resolution=512 --micro_batch=8 --text=128 --fused
  step full 256 32 none none 90
  step full 1024 2 none none 90
  step nano 512 16 none torch_dit,diffusers 150
  part profile-nano 60 $python -m bench.profile_step --config=nano --resolution=512 --micro_batch=16 --text=128
  part plan 90 bash -c 'plan "$@"' - --config.train.batch_size=32 --resolution=512
  part loader 60 $python -m bench.loader --resolutions=256,512,1024 --samples=256 --rounds=1
  step full 512 4 none,block torch_dit 240
  step full 256 16 none,block torch_dit 240
  step full 1024 1 none,block torch_dit 240
  step nano 256 32 none torch_dit,diffusers 150
  step nano 1024 4 none torch_dit 150
  if [ -n "$nano" ]; then
    minutes=$((60 * 24))
    part nano 7200 bash -c 'nano_run "$@"' - 100 512
  fi
fi

printf '\n%s%-22s %4d s\n\n' "$summary" "in all" $((SECONDS - began))
$python -m bench.table "$out"/train-step-*.json
echo "The results are in $out, what each part said in $work."
exit $code
