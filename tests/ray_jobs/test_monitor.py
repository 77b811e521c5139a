"""The circuit breaker and the ledger of deaths."""

from __future__ import annotations

from ray_jobs.monitor import RunMonitor


def _report(monitor: RunMonitor, images: int, failed: int) -> str | None:
    return monitor.report(
        "c0", num_images=images, num_failed=failed, num_regions=images, num_tokens=0,
        by_reason={"engine_error": failed} if failed else {}, busy_s=1.0, first=False,
    )  # fmt: skip


def test_a_canary_of_failures_stops_the_run_at_once() -> None:
    stop = _report(RunMonitor(canary_images=8), images=16, failed=16)
    assert stop == "all of the first 16 images failed (16 engine_error)"


def test_one_good_image_keeps_the_canary_quiet_and_the_share_decides_later() -> None:
    monitor = RunMonitor(max_failed_share=0.2, min_images=100)
    assert _report(monitor, images=16, failed=15) is None
    assert _report(monitor, images=84, failed=0) is None
    assert _report(monitor, images=100, failed=30) == (
        "45 of 200 images failed (45 engine_error), more than the 20% allowed"
    )


def test_an_engine_that_must_stop_opens_the_breaker_and_the_first_reason_stays() -> None:
    monitor = RunMonitor()
    assert _report(monitor, images=10, failed=0) is None
    assert monitor.stop("the endpoint is down") == "the endpoint is down"
    assert monitor.stop("another reason") == "the endpoint is down"
    assert _report(monitor, images=10, failed=0) == monitor.totals().stop == "the endpoint is down"


def test_a_block_that_twice_ended_its_process_is_tried_row_by_row_and_the_culprit_is_given_up() -> None:
    monitor = RunMonitor()
    ids = [1, 2, 3]
    assert monitor.begin("describe", ids) == (False, [])  # dies
    assert monitor.begin("describe", ids) == (False, [])  # dies again
    for _ in range(2):
        assert monitor.begin("describe", ids) == (True, [])
        assert monitor.begin("describe", [1], alone=True) == (False, [])
        monitor.end("describe", [1])
        assert monitor.begin("describe", [2], alone=True) == (False, [])  # dies alone
    assert monitor.begin("describe", ids) == (True, [])
    assert monitor.begin("describe", [2], alone=True) == (False, [2])
    assert monitor.begin("describe", [3], alone=True) == (False, [])
    monitor.end("describe", [3])
    monitor.end("describe", ids)
    assert monitor.totals().quarantined == [2]
    assert monitor.begin("describe", [4, 5]) == (False, [])


def test_a_death_in_one_stage_says_nothing_about_another() -> None:
    monitor = RunMonitor()
    for _ in range(3):
        monitor.begin("extract", [7])
    assert monitor.begin("describe", [7]) == (False, [])


def test_work_that_ends_leaves_no_trace() -> None:
    monitor = RunMonitor()
    for _ in range(5):
        assert monitor.begin("extract", [1, 2]) == (False, [])
        monitor.end("extract", [1, 2])
    assert monitor.totals().num_deaths == 0
