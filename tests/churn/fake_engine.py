"""Speaks an engine's part of the contract, without making any load; `Plan.path` says how it behaves."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from pathlib import Path

import msgspec

from hotport.churn.plan import Armed, Begin, End, Plan, Summary, Tick
from hotport.churn.result import Bucket, Incident


def say(message: msgspec.Struct) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(message) + b"\n")
    sys.stdout.buffer.flush()


def main() -> None:
    stdin = sys.stdin.buffer
    plan = msgspec.json.decode(stdin.readline(), type=Plan)
    if plan.path == "/unarmed":
        say(Summary({}, error="EMFILE"))
        return
    if plan.path == "/import-error":
        raise SystemExit("ModuleNotFoundError: no module named engine")
    say(Armed())
    begin = msgspec.json.decode(stdin.readline(), type=Begin).at_ns
    if pids := os.environ.get("FAKE_PIDS"):
        Path(pids, str(os.getpid())).touch()
    if plan.path == "/mumble":
        sys.stdout.write("what?\n")
        sys.stdout.flush()
    if plan.path == "/stay":
        signal.pause()
    end_ns = begin + int(plan.duration_ms * 1e6) + 1_000_000_000
    ticks = int(plan.duration_ms // plan.bucket_ms)
    for number in range(ticks):
        end = begin + (number + 1) * plan.bucket_ms * 1_000_000
        if select.select([stdin], [], [], max(0, end - time.monotonic_ns()) / 1e9)[0]:
            if not (line := stdin.readline()):
                break  # stop now
            end_ns = msgspec.json.decode(line, type=End).at_ns
        if time.monotonic_ns() >= end_ns:
            break
        at_ms = number * plan.bucket_ms
        if plan.path == "/die" and number == 1 and plan.seed % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        fates = {load.kind: {"answered": 2} for load in plan.loads}
        incidents = []
        if plan.path == "/refuse":
            fates["connect"]["refused"] = 1
            incidents = [Incident("connect", "refused", at_ms + 1.0, at_ms + 2.0 - plan.seed % 2, "ECONNREFUSED")]
        latency = {load.kind: {20: 2} for load in plan.loads}
        say(Tick(Bucket(at_ms, fates, latency, {"generation 1": 2}, 1, 3), incidents))
    own_limits = {"EADDRNOTAVAIL": 1} if plan.path == "/ports" else {}
    say(Summary({10: 1, 20: 1}, own_limits, [plan.seed % 7 + 10 * n for n in range(10)]))


if __name__ == "__main__":
    main()
