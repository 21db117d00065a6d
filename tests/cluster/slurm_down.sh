#!/bin/bash
# Stop the cluster of slurm_up.sh, by its pid files only. "slurm_down.sh wipe" also removes its state and logs.
LAB=${LAB:-/var/lib/yelp-hpc-cluster}; LOG=${LOG:-/var/log/yelp-hpc-cluster}; RUN=${RUN:-/run/yelp-hpc-cluster}; ETC=/etc/slurm
grep -qxF "# written by tests/cluster/slurm_up.sh" $ETC/slurm.conf 2>/dev/null || { echo "slurm_down.sh: no cluster of slurm_up.sh here"; exit 0; }
run(){ kill -0 "$1" 2>/dev/null && ! grep -q '^State:.Z' /proc/$1/status 2>/dev/null; }
stop(){ local p; p=$(cat "$1" 2>/dev/null); [ -n "$p" ] || return 0; kill -TERM "$p" 2>/dev/null
  for i in $(seq 100); do run "$p" || break; sleep .1; done; run "$p" && kill -KILL "$p"; rm -f "$1"; }
timeout 10 scancel -u root >/dev/null 2>&1; sleep 1
for n in c1 c2 g1 g2; do stop $RUN/slurmd.$n.pid; done
stop $RUN/slurmctld.pid; stop $RUN/slurmdbd.pid; stop $RUN/mysql.pid
[ "${KEEP_MUNGE:-0}" = 1 ] || stop /run/munge/munged.pid
[ "${1:-}" = wipe ] && rm -rf "$LAB" "$LOG" "$RUN" $ETC/slurm.conf $ETC/gres.conf $ETC/cgroup.conf $ETC/slurmdbd.conf
exit 0
