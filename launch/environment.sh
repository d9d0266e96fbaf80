# Sourced by our scripts: makes .venv and installs requirements.txt into it, once for each content of that file.
# With JAXDIT_CUDA=yes it gets requirements-cuda.txt as well, and PyTorch for CUDA; it then stays such an environment.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

if ! command -v sha256sum >/dev/null; then sha256sum() { shasum -a 256 "$@"; }; fi

needed="requirements.txt"
if [ -n "${JAXDIT_CUDA:-}" ] || [ -e .venv/cuda ]; then needed="requirements.txt requirements-cuda.txt"; fi
if [ "$(cat .venv/installed 2>/dev/null)" != "$(sha256sum $needed)" ]; then
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
  torch="$(grep '^torch==' requirements.txt)"
  found="$(.venv/bin/python -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null)" || true
  case "$found" in
    "${torch#torch==}"+rocm*) ;; # satisfies the pin, so pip leaves it alone
    *+rocm*)
      echo "Error: .venv holds PyTorch $found and requirements.txt wants ${torch#torch==}; run launch/setup_strix_halo.sh, which takes its" >&2
      echo "build for ROCm (an index of AMD's that does not have it yet: ROCM_TORCH=VERSION, docs/strix_halo.md). Nothing was changed." >&2
      exit 2
      ;;
  esac
  # The plain name on Linux pulls gigabytes of CUDA packages; PyTorch's own index has the small CPU build.
  if [ "$needed" != requirements.txt ]; then
    echo "Installing $torch and JAX for CUDA (about 4 GB), then the rest of requirements.txt ..."
    case "$found" in
      *+cpu) .venv/bin/pip uninstall --quiet --yes torch || exit 1 ;; # would be taken for the wanted version
    esac
    .venv/bin/pip install --quiet --disable-pip-version-check "$torch" -r requirements-cuda.txt || exit 1
    touch .venv/cuda
  elif .venv/bin/python -c 'import urllib.request as u; u.urlopen("https://download.pytorch.org/whl/cpu/torch/", timeout=5)' 2>/dev/null; then
    echo "Installing $torch from PyTorch's index of CPU builds, then the rest of requirements.txt ..."
    .venv/bin/pip install --quiet --disable-pip-version-check --index-url https://download.pytorch.org/whl/cpu "$torch" || exit 1
  else
    echo "PyTorch's index of CPU builds cannot be reached; installing $torch from the default index ..."
    .venv/bin/pip install --quiet --disable-pip-version-check "$torch" || exit 1
  fi
  .venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt || exit 1
  sha256sum $needed > .venv/installed
fi

# XLA maps a step's temporaries afresh at every call: with huge pages a step takes a quarter less on the CPU.
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
python=.venv/bin/python
