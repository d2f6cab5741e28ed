#!/usr/bin/env bash
# prometheus.sh fetch | path
#
# Debian's Prometheus and promtool, unpacked without installing, for the tests of metrics, rules and dashboards.
#   fetch   unpacks them (once)
#   path    prints the folder of both programs: PATH="$(scripts/prometheus.sh path):$PATH" promtool check rules FILE
#
# MOVIOLA_CACHE   where they lie (~/.cache/moviola)
set -euo pipefail

cache=${MOVIOLA_CACHE:-$HOME/.cache/moviola}/prometheus

case ${1:-} in
  fetch) "$(dirname "$0")/debian.sh" "$cache" prometheus ;;
  path)
    if [[ ! -x $cache/root/usr/bin/promtool ]]; then
      echo "prometheus.sh: nothing in $cache; run 'scripts/prometheus.sh fetch' first" >&2
      exit 1
    fi
    echo "$cache/root/usr/bin"
    ;;
  *) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
