"""Verdicts through kill -9: none lost, none twice, and paid twice only what was in flight."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.faults import judge_quota
from tests.faults.paying import MAX_CONCURRENT
from tests.faults.quota_server import PAID, SHARES, Quota, QuotaServer, busiest_minute, paid_more_than_once

NUM = 120
RPM = 3000.0
DEADLINE_S = 120.0


def start(server: QuotaServer, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.faults.paying", server.url, str(folder), str(NUM), str(RPM)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def answered(server: QuotaServer) -> int:
    return sum(s.answered is not None and s.outcome in PAID for s in list(server.seen))


def test_a_killed_process_pays_again_for_what_was_in_flight_at_most(tmp_path: Path) -> None:
    rng, kills, twice_before = random.Random(0), 0, 0
    with QuotaServer(Quota(RPM, latency_s=(0.05, 0.15), shares={**SHARES, "hang": 0.0}, seed=5)) as server:
        for wanted in (25, 60, None):
            process, deadline = start(server, tmp_path), time.monotonic() + DEADLINE_S
            while wanted is not None and answered(server) < wanted + rng.randint(0, 5):
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.005)
            if wanted is not None:
                process.kill()
                kills += 1
            out, _ = process.communicate(timeout=DEADLINE_S)
            twice = paid_more_than_once(list(server.seen))
            assert twice - twice_before <= MAX_CONCURRENT
            twice_before = twice
        totals = json.loads(out)
        assert (kills, totals["verdicts"]) == (2, NUM)
        assert len({s.key for s in server.seen}) == NUM
        assert paid_more_than_once(server.seen) <= kills * MAX_CONCURRENT
        assert busiest_minute(server.seen) <= RPM
        assert not [s for s in server.seen if s.outcome == "over"]


@pytest.mark.slow
def test_a_minute_of_judging_uses_the_quota_and_never_breaks_it() -> None:
    assert judge_quota.main(["--requests-per-min", "600", "--seconds", "90"]) == 0


@pytest.mark.slow
def test_a_minute_of_tokens() -> None:
    assert judge_quota.main(["--tokens-per-min", "200000", "--seconds", "90"]) == 0


@pytest.mark.slow
def test_a_job_killed_on_the_way_gives_every_verdict_once() -> None:
    assert judge_quota.main(["--requests-per-min", "600", "--seconds", "40", "--kills", "2"]) == 0
