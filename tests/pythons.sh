#!/bin/sh
# pythons.sh DEFAULT COMMAND...: run COMMAND PYTHON=... on each other Python that pyproject.toml promises and that is
# here, in PATH or pyenv's; say at the end which were tried, which failed, and which are missing.
default=$1
shift
cd "$(dirname "$0")/.." || exit
version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }

tried= failed= missing=
for wanted in $(sed -n 's/.*"Programming Language :: Python :: \(3\.[0-9]*\)".*/\1/p' pyproject.toml); do
  [ "$wanted" = "$(version "$default")" ] && continue
  found=
  # pyenv has commands of these names in PATH even where they only say that they do not run.
  for python in "python$wanted" "$(pyenv root 2>/dev/null)/versions/$wanted".*/bin/python; do
    [ "$(version "$python")" = "$wanted" ] && found=$python && break
  done
  if [ -z "$found" ]; then
    missing="$missing $wanted"
  else
    tried="$tried $wanted"
    echo "PYTHONS $wanted: $found"
    "$@" PYTHON="$found" || failed="$failed $wanted"
  fi
done
echo "PYTHONS beside $(version "$default"): tried:${tried:- none}; failed:${failed:- none}; not on this machine:${missing:- none}"
[ -z "$failed" ]
