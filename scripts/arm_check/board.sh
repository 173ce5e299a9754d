#!/usr/bin/env bash
# What scripts/arm-check --vm does inside of its machine, as root on a board that has no package index: the wheel into an environment,
# the models, the service under systemd with a watchdog, killed, hung, seen over MQTT, and removed.
# /host: wheels/, models/, photo.png, probe.py; what goes back: probe.json, doctor.json, said.
set -euo pipefail

step() { printf '%4d s  %s\n' "$SECONDS" "$*"; }
fail() {
    printf 'FAILED: %s\n' "$*"
    systemctl --no-pager status edge-serve || true
    journalctl --no-pager -n 40 -u edge-serve || true
    exit 1
}
# within SECONDS COMMAND...: waits until it succeeds.
within() {
    local until=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $until ] || fail "not within its time: $*"
        sleep 1
    done
}
show() { systemctl show -p "$1" --value edge-serve; }
restarted() { [ "$(show NRestarts)" -gt "$1" ] && [ "$(show ActiveState)" = active ]; }
seven() { /opt/edge-serve/bin/edge-serve send unix:///run/edge-serve/digits.sock /host/photo.png | grep -q '"label": *"7"'; }

step "$(uname -srm), $(nproc) cores, $(awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo) MB, systemd $(systemctl --version | awk 'NR == 1 { print $2 }')"
python3 -m venv /root/try
/root/try/bin/pip install -q --disable-pip-version-check --no-index --find-links /host/wheels edge-serve
PATH=/root/try/bin:$PATH
step "the wheel is installed"
edge-serve devices
edge-serve doctor --json >/host/doctor.json || true
python3 /host/probe.py >/host/probe.json
step "the models have run"

systemctl start mosquitto
mkdir -p /etc/edge-serve /srv/models
cp -r /host/models/digits /srv/models/
cat >/etc/edge-serve/edge-serve.toml <<'TOML'
schema = 1
device = "board"
[mqtt]
url = "mqtt://127.0.0.1:1883"
[pipeline]
name = "digits"
model = "/srv/models/digits"
[pipeline.source]
type = "socket"
listen = "unix:///run/edge-serve/digits.sock"
[pipeline.sink]
type = "mqtt"
retain = true
TOML
edge-serve check -c /etc/edge-serve/edge-serve.toml
edge-serve service install -c /etc/edge-serve/edge-serve.toml --watchdog 20
[ "$(show ActiveState)" = active ] || fail "the service is not active after its installation"
step "the service serves"
seven || fail "the photo of a 7 is something else"
mosquitto_sub -W 20 -C 1 -t edge-serve/board/digits/result | grep -q '"label": *"7"' || fail "no result over MQTT"
step "its result was seen over the socket and over MQTT"
STATE_DIRECTORY=/var/lib/edge-serve edge-serve inspect /srv/models/digits -c /etc/edge-serve/edge-serve.toml | sed -n '/chosen/,$p' | tee /root/chosen
grep -q 'chosen here' /root/chosen || fail "inspect does not know what was chosen"
systemd-analyze security --no-pager --threshold=20 edge-serve | tail -n 1
awk '/VmRSS/ { print "resident memory of the service: " int($2 / 1024) " MB" }' "/proc/$(show MainPID)/status"

before=$(show NRestarts)
kill -KILL "$(show MainPID)"
within 120 restarted "$before"
seven || fail "it does not answer after kill -KILL"
step "killed, it came back and answers"
before=$(show NRestarts)
kill -STOP "$(show MainPID)"
within 180 restarted "$before"
journalctl --no-pager -u edge-serve | grep -q "Watchdog timeout" || fail "no watchdog has ended it"
seven || fail "it does not answer after the watchdog"
step "stopped, the watchdog ended it; it came back and answers"
edge-serve service status
edge-serve service uninstall
[ "$(systemctl is-active edge-serve)" != active ] || fail "the service runs after its removal"
step "the service is removed"
