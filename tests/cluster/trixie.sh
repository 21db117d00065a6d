#!/bin/bash
# The table of sites on Slurm 24.11: a Debian 13 root in ROOT (made by debootstrap, once), in namespaces of its own,
# so that a cluster of this machine and this one do not meet. Root, Debian. "trixie.sh [pytest arguments]"
set -euo pipefail
ROOT=${ROOT:-/var/lib/yelp-hpc-trixie}
MIRROR=${MIRROR:-http://deb.debian.org/debian}
SOURCE=$(cd "$(dirname "$0")/../.." && pwd)
[ "$(id -u)" = 0 ] || { echo "trixie.sh: must run as root" >&2; exit 2; }
if [ ! -e "$ROOT/made" ]; then
  command -v debootstrap >/dev/null || apt-get install -y -qq --no-install-recommends debootstrap >/dev/null
  [ -x "$ROOT/usr/bin/apt-get" ] || debootstrap --variant=minbase --include=ca-certificates trixie "$ROOT" "$MIRROR"
  cp /etc/resolv.conf "$ROOT/etc/resolv.conf"
  cp /etc/apt/apt.conf.d/* "$ROOT/etc/apt/apt.conf.d/" 2>/dev/null || true
  cp -L /etc/ssl/certs/ca-certificates.crt "$ROOT/etc/ssl/certs/"   # a site's own authority among them
  [ ! -e /etc/pip.conf ] || cp /etc/pip.conf "$ROOT/etc/pip.conf"
  mkdir -p "$ROOT/src"
  cat > "$ROOT/make.sh" <<'M'
set -euo pipefail
export DEBIAN_FRONTEND=noninteractive
bash /src/tests/cluster/slurm_install.sh
apt-get install -y -qq --no-install-recommends python3-venv procps iproute2 git >/dev/null
python3 -m venv /venv
/venv/bin/pip install -q "pytest>=8" pytest-timeout numpy /src
/venv/bin/pip uninstall -q -y yelp-hpc
M
  mount --bind "$SOURCE" "$ROOT/src"
  chroot "$ROOT" bash /make.sh || { umount "$ROOT/src"; exit 1; }
  umount "$ROOT/src"
  touch "$ROOT/made"
fi
cat > "$ROOT/run.sh" <<'M'
set -euo pipefail
ip link set lo up; ip address add 10.9.9.9/32 dev lo   # with 127.0.0.1 alone Slurm resolves no port
hostname trixie; echo "127.0.0.1 trixie localhost" > /etc/hosts
mkdir -p /run/lock
cd /src
PYTHONDONTWRITEBYTECODE=1 /venv/bin/python -m pytest -q -p no:cacheprovider --basetemp=/tmp/sites "$@"
M
export ROOT SOURCE
exec unshare --mount --net --pid --uts --fork --kill-child bash -c '
  mount --make-rprivate /
  mount --bind "$ROOT" "$ROOT"  # a mount point of its own, as a root is
  mount --bind "$SOURCE" "$ROOT/src"
  mount -t proc proc "$ROOT/proc"; mount --bind /dev "$ROOT/dev"; mount -t tmpfs tmpfs "$ROOT/run"
  exec chroot "$ROOT" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 bash /run.sh "$@"
' trixie "${@:-tests/cluster/test_sites.py}"
