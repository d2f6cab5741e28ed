#!/usr/bin/env bash
# chromium.sh fetch | browser | driver ARGUMENT...
#
# Debian's Chromium and its driver, unpacked without installing, for the tests of the report.
#   fetch    unpacks them (once)
#   browser  prints the browser's path, which a session names as its binary
#   driver   runs chromedriver
#
# MOVIOLA_CACHE   where they lie (~/.cache/moviola)
set -euo pipefail

cache=${MOVIOLA_CACHE:-$HOME/.cache/moviola}/chromium
root=$cache/root

case ${1:-} in
  fetch) "$(dirname "$0")/debian.sh" "$cache" chromium chromium-driver fonts-dejavu-core ;;
  browser | driver)
    if [[ ! -x $root/usr/bin/chromedriver ]]; then
      echo "chromium.sh: nothing in $cache; run 'scripts/chromium.sh fetch' first" >&2
      exit 1
    fi
    if [[ $1 == browser ]]; then
      echo "$root/usr/lib/chromium/chromium"
      exit
    fi
    libraries=$(find "$root" -name '*.so*' -printf '%h\n' | sort -u | paste -sd:)
    cat >"$cache/fonts.conf" <<FONTS
<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>/usr/share/fonts</dir><dir>$root/usr/share/fonts</dir><cachedir>$cache/fonts</cachedir></fontconfig>
FONTS
    export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} FONTCONFIG_FILE=$cache/fonts.conf
    exec "$root/usr/bin/chromedriver" "${@:2}"
    ;;
  *) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
