#!/bin/sh
# debian.sh: have the programs that tests need and pip cannot install. Where one is missing, its tests skip and say so.
#
# Servers are unpacked, not installed: their packages would start them, nginx on port 80, now or at the next boot.
cd "$(dirname "$0")/.." || exit
PATH="$PATH:/usr/sbin:$PWD/build/debian/bin"

# By command; after a colon its package, if that is called otherwise. (systemd starts nothing where it is not process 1.)
missing=
for name in wrk chromium haproxy strace lsof systemd-analyze:systemd zsh fish man:man-db; do
  command -v "${name%%:*}" >/dev/null || missing="$missing ${name##*:}"
done
servers=
for name in nginx redis-server prometheus promtool:prometheus; do
  command -v "${name%%:*}" >/dev/null || servers="$servers $name"
done
[ -n "$missing$servers" ] || exit 0

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  echo "make: not installed (apt-get install$missing$servers); the tests that need it will skip" >&2
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive

unpack() {
  mkdir -p build/debian/bin build/debian/packages/partial
  packages=
  for name in "$@"; do packages="$packages ${name##*:}"; done
  apt-get -qq install -y --no-install-recommends --download-only -o Dir::Cache::archives="$PWD/build/debian/packages" $packages &&
    for package in build/debian/packages/*.deb; do
      dpkg -x "$package" build/debian/root || return
    done &&
    for name in "$@"; do
      name=${name%%:*}
      program=$(find "$PWD/build/debian/root/usr/bin" "$PWD/build/debian/root/usr/sbin" -name "$name")
      libraries=$PWD/build/debian/root/usr/lib/$(uname -m)-linux-gnu
      printf '#!/bin/sh\nLD_LIBRARY_PATH=%s exec %s "$@"\n' "$libraries" "$program" >"build/debian/bin/$name"
      chmod +x "build/debian/bin/$name"
    done
}

{
  apt-get -qq update &&
    { [ -z "$missing" ] || apt-get -qq install -y --no-install-recommends $missing; } &&
    { [ -z "$servers" ] || unpack $servers; }
} >/dev/null 2>&1 || echo "make: could not install$missing$servers; the tests that need it will skip" >&2
