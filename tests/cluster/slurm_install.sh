#!/bin/bash
# Install Slurm, its accounting and MariaDB on Debian 12 (Slurm 22.05) or 13 (24.11). Root. About 85 MB.
# Starts nothing: slurm_up.sh does.
set -euo pipefail
PACKAGES="slurmctld slurmd slurm-client slurmdbd slurm-wlm-mysql-plugin munge mariadb-server-core mariadb-client-core"
[ "$(id -u)" = 0 ] || { echo "slurm_install.sh: must run as root" >&2; exit 2; }
# shellcheck disable=SC2086
if dpkg-query -W -f '${Status}\n' $PACKAGES 2>/dev/null | grep -c '^install ok installed$' | grep -qx 8; then exit 0; fi
export DEBIAN_FRONTEND=noninteractive
# without systemd nothing must be started by the packages' scripts; a policy says so for this run only
POLICY=/usr/sbin/policy-rc.d
if [ ! -e $POLICY ]; then printf '#!/bin/sh\nexit 101\n' > $POLICY; chmod 755 $POLICY; trap 'rm -f $POLICY' EXIT; fi
apt-get -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 update -qq
# shellcheck disable=SC2086
apt-get -o DPkg::Lock::Timeout=600 -o Acquire::Retries=3 install -y -qq --no-install-recommends $PACKAGES >/dev/null
