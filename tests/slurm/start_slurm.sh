#!/usr/bin/env bash
# A real Slurm of one node on loopback, for the tests: no systemd, no cgroups, no accounting
# database, and two GPUs that are character devices (a regular file never sets
# CUDA_VISIBLE_DEVICES).
#
#   start_slurm.sh          start it; nothing to do if a controller already answers
#   start_slurm.sh stop     end what it started
#
# As root, on Debian with the packages slurm-wlm and munge.
set -euo pipefail

MARK="# written by ms4's tests"
CONF=/etc/slurm
STATE=/var/spool/ms4-test-slurm
LOGS=/var/log/ms4-test-slurm
MUNGE_PID=/run/munge/munged.pid

alive() { # alive PID: it runs; one that nobody reaped yet does not
    local state
    state=$(sed -n 's/^State:[[:space:]]*//p' "/proc/$1/status" 2>/dev/null) && [ -n "$state" ] &&
        [ "${state:0:1}" != Z ]
}

end() { # end PIDFILE: the process that the file names, and wait until it is gone
    local pid
    [ -s "$1" ] || return 0
    pid=$(cat "$1")
    alive "$pid" || return 0
    kill "$pid"
    for _ in $(seq 100); do
        alive "$pid" || return 0
        sleep 0.1
    done
    echo "start_slurm.sh: process $pid does not end" >&2
    return 1
}

if [ "${1:-start}" = stop ]; then
    end /run/ms4-test-slurmd.pid
    end /run/ms4-test-slurmctld.pid
    [ ! -e "$STATE/started-munge" ] || end "$MUNGE_PID"
    rm -rf "$STATE"
    exit 0
fi

if sinfo --version >/dev/null 2>&1 && timeout 10 scontrol ping 2>/dev/null | grep -q ' UP'; then
    echo "start_slurm.sh: a controller already answers"
    exit 0
fi
if [ -s "$CONF/slurm.conf" ] && ! grep -qF "$MARK" "$CONF/slurm.conf"; then
    echo "start_slurm.sh: $CONF/slurm.conf belongs to another cluster; it is left alone" >&2
    exit 1
fi

host=$(hostname -s)
memory=$(($(awk '/^MemTotal/ {print $2}' /proc/meminfo) / 1024 - 512))
grep -qw "$host" /etc/hosts || echo "127.0.0.1 $host" >>/etc/hosts
rm -rf "$STATE"
mkdir -p "$CONF" "$STATE"/{ctld,d} "$LOGS" /run/munge

if ! { [ -s "$MUNGE_PID" ] && alive "$(cat "$MUNGE_PID")"; }; then
    [ -s /etc/munge/munge.key ] || /usr/sbin/mungekey --force
    chown -R munge:munge /run/munge /etc/munge /var/lib/munge /var/log/munge
    runuser -u munge -- /usr/sbin/munged
    touch "$STATE/started-munge"
fi

for i in 0 1; do
    [ -c "/dev/ms4-fake-gpu$i" ] || mknod -m 666 "/dev/ms4-fake-gpu$i" c 1 3 # a twin of /dev/null
done

cat >"$CONF/slurm.conf" <<END
$MARK
ClusterName=ms4test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerType=sched/backfill
StateSaveLocation=$STATE/ctld
SlurmdSpoolDir=$STATE/d
SlurmctldPidFile=/run/ms4-test-slurmctld.pid
SlurmdPidFile=/run/ms4-test-slurmd.pid
SlurmctldLogFile=$LOGS/slurmctld.log
SlurmdLogFile=$LOGS/slurmd.log
ReturnToService=2
MinJobAge=600
JobRequeue=1
KillWait=5
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
GresTypes=gpu
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$memory Gres=gpu:h200:2 State=UNKNOWN
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
cat >"$CONF/gres.conf" <<END
$MARK
NodeName=$host Name=gpu Type=h200 File=/dev/ms4-fake-gpu[0-1]
END
printf '%s\nCgroupPlugin=cgroup/v1\n' "$MARK" >"$CONF/cgroup.conf"

/usr/sbin/slurmctld
/usr/sbin/slurmd
for _ in $(seq 60); do
    if sinfo --noheader --format=%T 2>/dev/null | grep -q idle; then
        sinfo --format="%P %N %T %G %c %m"
        exit 0
    fi
    sleep 0.5
done
echo "start_slurm.sh: the node does not become idle; see $LOGS" >&2
tail -n 20 "$LOGS"/*.log >&2
exit 1
