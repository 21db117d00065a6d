#!/bin/bash
# Bring up a real Slurm on this one machine: 4 virtual nodes (c1 c2 g1 g2), fake RTX 3090s on g1 and g2,
# partitions cpu and gpu, preemptible low (20 s of grace), low0 (none) and lowc (cancelled), accounting; with SUSPENDS=1,
# which gang-schedules all of them, also lows (suspended). Root, no systemd.
# Run again it starts what is missing. slurm_install.sh installs the packages, slurm_down.sh stops it.
set -euo pipefail
LAB=${LAB:-/var/lib/yelp-hpc-cluster}; LOG=${LOG:-/var/log/yelp-hpc-cluster}; RUN=${RUN:-/run/yelp-hpc-cluster}; ETC=/etc/slurm
MARK="# written by tests/cluster/slurm_up.sh"
if [ -s $ETC/slurm.conf ] && ! grep -qxF "$MARK" $ETC/slurm.conf; then
  echo "slurm_up.sh: $ETC/slurm.conf belongs to another cluster; nothing was changed" >&2; exit 2
fi
DBD=${DBD:-1}                    # 0: no accounting at all
HOST=$(hostname -s); NODES="c1 c2 g1 g2"
export PATH=/usr/sbin:/usr/bin:/sbin:/bin:$PATH
T0=$(date +%s%N); say(){ printf '%6.2fs %s\n' "$(( ($(date +%s%N)-T0)/10000000 ))e-2" "$*"; }
alive(){ local p; p=$(cat "$1" 2>/dev/null) && [ -n "$p" ] && kill -0 "$p" 2>/dev/null && ! grep -q '^State:.Z' /proc/$p/status; }
mkdir -p $LAB/ctld $LAB/dev $LOG $RUN $ETC; chmod 755 $LAB $LOG
for n in $NODES; do mkdir -p $LAB/slurmd.$n; done
VER=$(slurmctld -V | grep -oE '[0-9]+\.[0-9]+' | head -1)

# fake GPU device nodes (gres.conf File= only has to exist); a harmless /dev/null alike
for i in 0 1 2 3; do [ -e $LAB/dev/gpu$i ] || mknod -m 666 $LAB/dev/gpu$i c 1 3; done

# munge: Debian's postinst makes the key; the socket dir must be made by hand without systemd
[ -s /etc/munge/munge.key ] || { install -d -o munge -g munge -m 700 /etc/munge; dd if=/dev/urandom bs=128 count=1 of=/etc/munge/munge.key status=none; chown munge:munge /etc/munge/munge.key; chmod 400 /etc/munge/munge.key; }
install -d -o munge -g munge -m 755 /run/munge; install -d -o munge -g munge -m 700 /var/log/munge /var/lib/munge
munge -n >/dev/null 2>&1 || { rm -f /run/munge/munge.socket.2*; runuser -u munge -- /usr/sbin/munged --num-threads=4; }
munge -n | unmunge >/dev/null; say munge up

[ -s $LAB/firstid ] || echo $((RANDOM*30+1000)) > $LAB/firstid; FIRST=$(cat $LAB/firstid)   # fresh ids per fresh cluster
GLOBAL=REQUEUE LOWS=
[ "${SUSPENDS:-0}" = 0 ] || { GLOBAL=SUSPEND,GANG; LOWS="PartitionName=lows Nodes=c[1-2] PriorityTier=1 PreemptMode=SUSPEND"; }
case $VER in 22.*) SIGOPT=SlurmctldParameters=preempt_send_user_signal;; *) SIGOPT=PreemptParameters=send_user_signal;; esac
if [ $DBD = 1 ]; then ACCT=$'AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=127.0.0.1\nAccountingStoragePort=16819\nAccountingStoreFlags=job_comment,job_env,job_script\nAccountingStorageTRES=gres/gpu'
else ACCT=AccountingStorageType=accounting_storage/none; case $VER in 22.*|23.*) ;; *) ACCT=;; esac; fi
cat > $ETC/slurm.conf <<C
$MARK
ClusterName=lab
SlurmctldHost=$HOST(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=16817
AuthType=auth/munge
AuthInfo=cred_expire=5
ProctrackType=proctrack/${PROCTRACK:-linuxproc}
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
SlurmdParameters=config_overrides
ReturnToService=2
MailProg=/bin/true
StateSaveLocation=$LAB/ctld
SlurmdSpoolDir=$LAB/slurmd.%n
SlurmctldPidFile=$RUN/slurmctld.pid
SlurmdPidFile=$RUN/slurmd.%n.pid
SlurmctldLogFile=$LOG/slurmctld.log
SlurmdLogFile=$LOG/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
SlurmctldTimeout=30
SlurmdTimeout=12
MessageTimeout=10
InactiveLimit=0
KillWait=4
OverTimeLimit=0
# a step that ends while the controller is down waits for it; it must not drain its node meanwhile
UnkillableStepTimeout=600
MinJobAge=600
MaxJobCount=50000
MaxArraySize=10001
JobRequeue=1
FirstJobId=$FIRST
PreemptType=preempt/partition_prio
PreemptMode=$GLOBAL
$SIGOPT
PriorityType=priority/basic
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=5,bf_interval=2,bf_continue,default_queue_depth=1000,partition_job_depth=1000
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=5
JobCompType=jobcomp/filetxt
JobCompLoc=$LOG/jobcomp.txt
$ACCT
NodeName=c1 NodeHostname=$HOST NodeAddr=127.0.0.1 Port=17001 CPUs=4 RealMemory=8000 State=UNKNOWN
NodeName=c2 NodeHostname=$HOST NodeAddr=127.0.0.1 Port=17002 CPUs=4 RealMemory=8000 State=UNKNOWN
NodeName=g1 NodeHostname=$HOST NodeAddr=127.0.0.1 Port=17003 CPUs=4 RealMemory=8000 Gres=gpu:rtx3090:4 Feature=gpu State=UNKNOWN
NodeName=g2 NodeHostname=$HOST NodeAddr=127.0.0.1 Port=17004 CPUs=4 RealMemory=8000 Gres=gpu:rtx3090:4 Feature=gpu State=UNKNOWN
PartitionName=DEFAULT DefMemPerCPU=500 MaxTime=1-0 DefaultTime=10 State=UP OverSubscribe=NO
PartitionName=cpu Nodes=c[1-2] Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=gpu Nodes=g[1-2] PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=c[1-2],g[1-2] PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=low0 Nodes=c[1-2],g[1-2] PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=lowc Nodes=c[1-2] PriorityTier=1 PreemptMode=CANCEL GraceTime=0
$LOWS
C
echo "NodeName=g[1-2] Name=gpu Type=rtx3090 File=$LAB/dev/gpu[0-3]" > $ETC/gres.conf
# Slurm >= 23.11: slurmd always initialises cgroups unless told not to
case $VER in 22.*|23.02) echo CgroupPlugin=cgroup/v1;; *) echo CgroupPlugin=${CGROUP:-disabled};; esac > $ETC/cgroup.conf
: > $ETC/plugstack.conf

if [ $DBD = 1 ]; then   # private mariadbd (socket only, no grants, no fsync) + slurmdbd
  export MYSQL_UNIX_PORT=$RUN/mysql.sock
  U=root; id mysql >/dev/null 2>&1 && U=mysql
  if [ ! -d $LAB/mysql/mysql ]; then
    rm -rf $LAB/mysql; install -d -o $U -m 700 $LAB/mysql
    mariadb-install-db --no-defaults --user=$U --datadir=$LAB/mysql --auth-root-authentication-method=normal --skip-test-db >$LOG/mysql-install.log 2>&1
    say mariadb datadir made
  fi
  if ! alive $RUN/mysql.pid; then
    rm -f $RUN/mysql.sock; chmod 777 $RUN
    # pre-create the db: slurmdbd 24.11 + libmariadb 11.8.9 (Debian 13) dies if its first connect hits an unknown database
    echo 'CREATE DATABASE IF NOT EXISTS slurm_acct_db;' > $LAB/init.sql; chmod 644 $LAB/init.sql; chmod 755 $LAB
    setsid mariadbd --no-defaults --user=$U --datadir=$LAB/mysql --socket=$RUN/mysql.sock --pid-file=$RUN/mysql.pid \
       --skip-networking --skip-grant-tables --skip-log-bin --innodb-buffer-pool-size=128M --innodb-log-file-size=32M --innodb-lock-wait-timeout=900 \
       --innodb-flush-log-at-trx-commit=0 --innodb-doublewrite=0 --init-file=$LAB/init.sql >$LOG/mariadbd.log 2>&1 </dev/null &
    for i in $(seq 400); do [ -S $RUN/mysql.sock ] && break; sleep .05; done; say mariadbd up
  fi
  cat > $ETC/slurmdbd.conf <<C
AuthType=auth/munge
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort=16819
SlurmUser=root
DebugLevel=info
LogFile=$LOG/slurmdbd.log
PidFile=$RUN/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
C
  chmod 600 $ETC/slurmdbd.conf
  if ! alive $RUN/slurmdbd.pid; then
    slurmdbd; for i in $(seq 600); do (echo >/dev/tcp/127.0.0.1/16819) 2>/dev/null && break; sleep .1; done; say slurmdbd up
    sacctmgr -i add cluster lab >/dev/null 2>&1 || true; say cluster registered
  fi
fi
alive $RUN/slurmctld.pid || slurmctld
for i in $(seq 400); do scontrol ping 2>/dev/null | grep -q 'UP$' && break; sleep .05; done; say slurmctld up
for n in $NODES; do alive $RUN/slurmd.$n.pid || slurmd -N $n; done
# nodes left down/drained by an earlier fault stay so across restarts: clear them
sinfo -h -N -p low -o '%N %t' | awk '$2~/^(drain|drng|down|fail)/{print $1}' | while read -r n; do scontrol update nodename=$n state=resume; done 2>/dev/null || true
for i in $(seq 400); do [ "$(sinfo -h -N -o '%N %t' -p low | grep -cE ' (idle|mix|alloc)$')" = 4 ] && break; sleep .05; done
say "nodes: $(sinfo -h -N -p low -o '%N=%t' | tr '\n' ' ')"
