#!/usr/bin/env bash
# debian.sh FOLDER PACKAGE...
#
# Unpacks Debian packages, and those of their dependencies that this machine lacks, into FOLDER. Nothing is installed
# and root is not needed: apt keeps its lists and archives below FOLDER. A FOLDER that is complete is left as it is;
# one that a killed call left behind is made anew.
set -euo pipefail

folder=$1
shift
packages=("$@")

mkdir -p "$folder"
exec 9>"$folder/.lock"
flock 9 # a second caller waits for the first, then finds everything in place

done_marker=$folder/.unpacked
if [[ -f $done_marker && $(<"$done_marker") == "${packages[*]}" ]]; then
  exit 0
fi
if ! command -v apt-get >/dev/null; then
  echo "debian.sh: ${packages[*]}: no apt-get here; needs Debian or Ubuntu" >&2
  exit 1
fi
rm -rf "$folder/root" "$folder/apt" "$done_marker"
mkdir -p "$folder/root" "$folder/apt/lists/partial" "$folder/apt/cache/archives/partial"

apt=(apt-get -q -y -o Debug::NoLocking=true -o "Dir::State::lists=$folder/apt/lists" -o "Dir::Cache=$folder/apt/cache"
  -o APT::Sandbox::User="$(id -un)" -o Acquire::Retries=3)
log=$folder/apt/log
download() { "${apt[@]}" update && "${apt[@]}" install --no-install-recommends --download-only "${packages[@]}"; }
if ! download &>"$log"; then
  echo "debian.sh: could not download ${packages[*]}:" >&2
  tail -n 5 "$log" >&2
  exit 1
fi
for archive in "$folder"/apt/cache/archives/*.deb; do
  dpkg -x "$archive" "$folder/root"
done
rm -rf "$folder/apt"
echo "${packages[*]}" >"$done_marker"
