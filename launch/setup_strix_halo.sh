#!/usr/bin/env bash
# Prepares a machine with a Strix Halo APU (gfx1151): checks the GPU, makes .venv with PyTorch for ROCm, and proves the GPU.
#
#   launch/setup_strix_halo.sh                run again, it installs nothing that is there, and proves the GPU once more
#   ROCM_INDEX=URL ROCM_TORCH=VERSION ...     another index of wheels, another build of PyTorch (docs/strix_halo.md)
#
# Exit code 0: the GPU may encode. 1: it may not, or the installation failed. 2: this is no such machine; nothing was changed.
set -euo pipefail
cd "$(dirname "$0")/.."

target=gfx1151 code=110501
nodes=/sys/class/kfd/kfd/topology/nodes device=/dev/kfd
found="$(cat "$nodes"/*/properties 2>/dev/null | awk '$1 == "gfx_target_version" && $2 > 0 { print $2 }' | sort -u | tr '\n' ' ')" || true
if [ -z "$found" ]; then
  echo "Error: the kernel shows no AMD GPU that can compute (nothing below $nodes); nothing was changed." >&2
  exit 2
fi
if [[ " $found" != *" $code "* ]]; then
  echo "Error: the AMD GPU here is of target ${found% }, not $code ($target, Strix Halo); nothing was changed." >&2
  exit 2
fi
if ! { [ -r "$device" ] && [ -w "$device" ]; }; then
  echo "Error: you may not use $device; run: sudo usermod -aG render,video $(id -un), then log in again. Nothing was changed." >&2
  exit 2
fi
echo "A $target GPU is here. Linux $(uname -r)."
if [ "$(printf '%s\n' 6.18.4 "$(uname -r)" | sort -V | head -n 1)" != 6.18.4 ]; then
  echo "Note: AMD asks for Linux 6.18.4 or newer, or Ubuntu 24.04 with its 6.17.0-19.19 (HWE) or 6.14.0-1018 (OEM) or newer."
fi
pages="$(cat /sys/module/ttm/parameters/pages_limit 2>/dev/null || echo 0)"
[ "$pages" -eq 0 ] || echo "The GPU may use up to $((pages / 262144)) GiB of the memory (docs/strix_halo.md says how to change it)."
if [ -n "${HSA_OVERRIDE_GFX_VERSION:-}" ]; then
  echo "Note: HSA_OVERRIDE_GFX_VERSION=$HSA_OVERRIDE_GFX_VERSION is left out here; take it out of your profile: it makes the GPU run"
  echo "another chip's kernels, and what is proven below is not what you would run."
  unset HSA_OVERRIDE_GFX_VERSION
fi

index="${ROCM_INDEX:-https://stable.repo.amd.com/rocm/whl-next/}"
wanted="$(sed -n 's/^torch==//p' requirements.txt)"
version="${ROCM_TORCH:-$wanted+rocm10.0.0}"
installed() { # the environment is whole, and its PyTorch is the wanted build
  [ "$(cat .venv/installed 2>/dev/null)" = "$(sha256sum requirements.txt)" ] &&
    [ "$(.venv/bin/python -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null)" = "$version" ]
}
if installed; then
  echo "PyTorch $version is installed."
else
  python=""
  for candidate in python3.12 python3.11 python3.13 python3; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      python="$candidate"
      break
    fi
  done
  if [ -z "$python" ]; then
    echo "Error: no Python of version 3.11 or newer with venv was found; install one (on Debian: python3-venv)." >&2
    exit 2
  fi
  .venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv .venv || exit 1 # a kill may have left half of one
  rm -f .venv/installed
  echo "Installing PyTorch $version from $index (about 2 GB), then the rest of requirements.txt ..."
  .venv/bin/pip install --quiet --disable-pip-version-check --index-url "$index" "torch[device-$target]==$version" || exit 1
  # The build's number beyond the plus satisfies the pin in requirements.txt, so it stays; another version would be exchanged.
  if [ "${version%%+*}" = "$wanted" ]; then
    .venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt || exit 1
  else
    .venv/bin/pip install --quiet --disable-pip-version-check -r <(grep -v '^torch==' requirements.txt) || exit 1
  fi
  sha256sum requirements.txt > .venv/installed # launch/environment.sh then leaves it alone
fi

echo "Proving the GPU (the first time MIOpen looks for its kernels, which may take minutes) ..."
if .venv/bin/python -m encode.selftest; then
  echo "This GPU may encode: .venv/bin/python -m encode.main --config=configs/encode_flux.py ..."
else
  echo "Error: the GPU did not prove itself; docs/strix_halo.md says what is known to break and what to try." >&2
  exit 1
fi
