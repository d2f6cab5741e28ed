#!/usr/bin/env bash
# object_store.sh fetch | up | env | kill9 | restart | down
#
# A production S3 implementation on loopback, for tests and for trying the system out: Ceph's RADOS gateway from
# Debian's packages, unpacked without installing; no root, no container. Three processes: a monitor, one storage
# daemon, the gateway. An acknowledged PUT survives kill -9, conditional writes are atomic.
#   fetch     unpacks the packages (once, about 260 MB)
#   up        starts what is not running, on a new data folder or the old one; returns when the gateway answers and
#             the bucket s3://moviola is there
#   env       prints the export lines that point clients here: eval "$(scripts/object_store.sh env)"
#   kill9     SIGKILL to all three, at once
#   restart   stops what is running, then up, on the same data
#   down      stops it in order; the data stays (delete the folder to be rid of it)
#
# MOVIOLA_CACHE        where the packages lie (~/.cache/moviola)
# MOVIOLA_STORE_DIR    data, logs, pids, generated keys (/tmp/moviola-store-$UID); a short path, it holds sockets
# MOVIOLA_STORE_PORT   the gateway's port (27480); the monitor takes the next one. Give each of two stores its own.
set -euo pipefail

die() {
  echo "object_store.sh: $*" >&2
  exit 1
}

cache=${MOVIOLA_CACHE:-$HOME/.cache/moviola}/object_store
dir=$(realpath -m "${MOVIOLA_STORE_DIR:-/tmp/moviola-store-$UID}")
port=${MOVIOLA_STORE_PORT:-27480}
monitor=127.0.0.1:$((port + 1))
endpoint=http://127.0.0.1:$port
root=$cache/root
wait_seconds=60

use_packages() {
  [[ -x $root/usr/bin/radosgw ]] || die "nothing in $cache; run 'scripts/object_store.sh fetch' first"
  command -v curl >/dev/null || die "needs curl"
  lib=$(echo "$root"/usr/lib/*-linux-gnu)
  export LD_LIBRARY_PATH=$lib:$lib/ceph:$root/lib/$(basename "$lib") PATH=$root/usr/bin:$PATH
  export PYTHONPATH=$root/usr/lib/python3/dist-packages CEPH_CONF=$dir/ceph.conf
}

# The ceph command is Python, with bindings built for Debian's own interpreter, not for one from elsewhere on PATH.
ceph() { /usr/bin/python3 "$root/usr/bin/ceph" "$@"; }

pid_of() { # NAME -> pid, if that process of this store lives; a number that went to another process does not count
  local pid
  pid=$(cat "$dir/$1.pid" 2>/dev/null) && grep -qsz "^CEPH_CONF=$dir/ceph.conf" "/proc/$pid/environ" && echo "$pid"
}

wait_for() { # WHAT NAME COMMAND...: until COMMAND succeeds; dies with the log if NAME exits first or time is up
  local what=$1 name=$2 deadline=$((SECONDS + wait_seconds))
  shift 2
  until "$@" &>/dev/null; do
    pid_of "$name" >/dev/null || die "$name ended before $what; $dir/$name.out says: $(tail -n 3 "$dir/$name.out")"
    ((SECONDS < deadline)) || die "no $what within $wait_seconds s; see $dir/$name.out and $dir/*.log"
    sleep 0.05
  done
}

start() { # NAME COMMAND...: in the background, in a session of its own, so that a caller's Ctrl-C does not reach it
  local name=$1
  shift
  setsid "$@" >>"$dir/$name.out" 2>&1 </dev/null 9>&- &
  echo $! >"$dir/$name.pid"
  while [[ $(readlink /proc/$!/exe) == "$(readlink /proc/$$/exe)" ]]; do sleep 0.01; done # still a copy of this shell
}

stop() { # SIGNAL: gateway first, monitor last; returns when all are gone
  local name pid
  for name in gateway storage monitor; do
    pid=$(pid_of $name) || continue
    kill "-$1" "$pid" 2>/dev/null || :
    [[ $1 == KILL ]] || gone "$name"
  done
  for name in gateway storage monitor; do gone "$name"; done
}

gone() { # NAME: waits until its process has ended; after 10 s it is killed
  local deadline=$((SECONDS + 10)) pid
  while pid=$(pid_of "$1"); do
    ((SECONDS < deadline)) || kill -KILL "$pid" 2>/dev/null || :
    sleep 0.05
  done
}

storage_is_active() { ceph daemon "$dir/osd.0.asok" status | grep -q '"active"'; }

make_data() { # a new cluster in $dir; its mark comes last, so that a half-made one is made anew
  local cluster storage
  cluster=$(</proc/sys/kernel/random/uuid)
  storage=$(</proc/sys/kernel/random/uuid)
  rm -rf "$dir"
  mkdir -p -m 700 "$dir/osd" "$dir/rgw"
  : >"$dir/keyring"
  cat >"$dir/ceph.conf" <<END
[global]
fsid = $cluster
mon host = v2:$monitor
public network = 127.0.0.0/8
auth cluster required = none
auth service required = none
auth client required = none
ms mon client mode = crc
ms bind ipv6 = false
ms bind port min = 26800
ms bind port max = 26999
keyring = $dir/keyring
run dir = $dir
crash dir = $dir
admin socket = $dir/\$name.asok
pid file =
log file = $dir/\$name.log
mon cluster log file = $dir/cluster.log
plugin dir = $lib/ceph
erasure code dir = $lib/ceph/erasure-code
osd class dir = $lib/rados-classes

# One copy on one disk, and few placement groups: this is a store for tests.
mon data = $dir/mon
mon allow pool size one = true
mon max pg per osd = 5000
mon data avail crit = 1
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pg autoscale mode = off
osd crush chooseleaf type = 0

# A lone monitor has nobody to wait for, and a killed storage daemon should be missed soon.
paxos propose interval = 0.05
paxos min wait = 0.02
osd heartbeat grace = 4
osd heartbeat interval = 1

# Bluestore in a sparse file: durable against kill -9, in little memory.
osd data = $dir/osd
osd objectstore = bluestore
bluestore block size = 34359738368
bluestore cache autotune = false
bluestore cache size = 67108864

rgw data = $dir/rgw
rgw frontends = beast endpoint=127.0.0.1:$port
rgw thread pool size = 64
rgw run sync thread = false
END
  monmaptool --create --fsid "$cluster" --addv a "[v2:$monitor]" "$dir/monmap" >"$dir/make.out"
  ceph-mon --mkfs -i a --monmap "$dir/monmap" --keyring "$dir/keyring" >>"$dir/make.out" 2>&1
  start_monitor
  ceph osd new "$storage" >>"$dir/make.out"
  ceph-osd -i 0 --mkfs --osd-uuid "$storage" >>"$dir/make.out" 2>&1
  start_storage
  (
    umask 077
    echo "key=$(random) secret=$(random)" >"$dir/keys"
  )
  read_keys
  radosgw-admin user create --uid=moviola --display-name=moviola --access-key="$key" --secret-key="$secret" \
    >>"$dir/make.out" 2>&1
  touch "$dir/.made"
}

random() { tr -d - </proc/sys/kernel/random/uuid; }

read_keys() {
  [[ -f $dir/keys ]] || die "no store in $dir; run 'scripts/object_store.sh up' first"
  key=$(sed -E 's/key=(\S+) .*/\1/' "$dir/keys")
  secret=$(sed -E 's/.*secret=(\S+)/\1/' "$dir/keys")
}

start_monitor() {
  pid_of monitor >/dev/null && return
  start monitor ceph-mon -f -i a --public-addr "v2:$monitor"
  wait_for "a quorum" monitor ceph --connect-timeout 5 mon stat
}

start_storage() {
  pid_of storage >/dev/null && return
  rm -f "$dir/osd.0.asok" # a killed daemon leaves its socket, which would look alive
  start storage ceph-osd -f -i 0
  wait_for "an active storage daemon" storage storage_is_active
}

start_gateway() {
  pid_of gateway >/dev/null && return
  start gateway radosgw -f -n client.rgw
  wait_for "an answer on $endpoint" gateway curl --silent --fail --output /dev/null --max-time 5 "$endpoint"
}

up() {
  use_packages
  ((${#dir} <= 80)) || die "MOVIOLA_STORE_DIR is ${#dir} characters long, sockets allow 80: $dir"
  mkdir -p "$(dirname "$dir")"
  exec 9>"$dir.lock"
  flock 9
  if [[ ! -f $dir/.made ]]; then
    [[ ! -d $dir || -f $dir/ceph.conf || -z $(ls -A "$dir") ]] || die "$dir holds something else; choose another folder"
    stop KILL
    make_data
  fi
  grep -q "endpoint=127.0.0.1:$port\$" "$dir/ceph.conf" ||
    die "the store in $dir was made for another port than $port: $(grep 'rgw frontends' "$dir/ceph.conf")"
  start_monitor
  start_storage
  start_gateway
  make_bucket
}

make_bucket() { # the owner of a bucket may make it again
  read_keys
  curl --silent --show-error --fail --output /dev/null --request PUT --aws-sigv4 aws:amz:us-east-1:s3 \
    --header "x-amz-content-sha256: UNSIGNED-PAYLOAD" --config - "$endpoint/moviola" <<<"user = $key:$secret"
}

case ${1:-} in
  fetch) "$(dirname "$0")/debian.sh" "$cache" radosgw ceph-mon ceph-osd ;;
  up) up ;;
  env)
    read_keys
    echo "export MOVIOLA_S3_ENDPOINT=$endpoint"
    echo "export AWS_ACCESS_KEY_ID=$key"
    echo "export AWS_SECRET_ACCESS_KEY=$secret"
    echo "export AWS_DEFAULT_REGION=us-east-1"
    ;;
  kill9) stop KILL ;;
  restart)
    stop TERM
    up
    ;;
  down) stop TERM ;;
  *)
    sed -n '2,19s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
