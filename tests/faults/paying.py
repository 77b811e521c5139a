"""A process that pays for verdicts until it is killed: `python -m tests.faults.paying URL FOLDER NUM RPM`. Without Ray.

Prints the permits' totals as JSON when it comes to its end.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence

from meddam_core.judging.budget import Limits
from meddam_core.judging.cache import VerdictCache
from meddam_core.judging.egress import Endpoint
from meddam_core.judging.llm import LlmJudge, make_client
from qa_library import load_library, question_about
from ray_jobs.judge_calls import Caller, Prices, RetryRules, VerdictStore
from ray_jobs.permits import Grant, Permits, Refusal, Settled

RUN = "run"
MAX_CONCURRENT = 16


class LocalPermits:
    """The permit book in this process, as a Caller sees it."""

    def __init__(self, permits: Permits) -> None:
        self.permits = permits

    async def acquire(self, tokens: float, usd: float) -> Grant | Refusal:
        return await self.permits.acquire(RUN, tokens, usd)

    async def settle(self, calls: Sequence[Settled]) -> bool:
        return await self.permits.settle(calls)


async def pay(url: str, folder: str, num: int, requests_per_min: float) -> dict[str, object]:
    """Verdicts on `num` captions; their choices and the permits' totals."""
    question = question_about(load_library(), "lidc_idri", "margin", expected="sharp")
    permits = Permits(Limits(requests_per_min=requests_per_min, max_concurrent=MAX_CONCURRENT))
    await permits.join(RUN, permits.limits, None, f"{folder}/budget.json", timeout_s=5.0)
    port, endpoint = LocalPermits(permits), Endpoint(url, "inside")
    store = VerdictStore(VerdictCache(f"{folder}/cache"), VerdictCache(f"{folder}/ledger", keep_unscored=True), port)
    judge = LlmJudge(make_client(endpoint, "none", timeout_s=2.0), "m", endpoint)
    caller = Caller(judge, store, port, prices=Prices(), rules=RetryRules(first_wait_s=0.05, timeout_s=2.0),
                    max_concurrent=MAX_CONCURRENT)  # fmt: skip
    found = await asyncio.gather(*(caller.verdict(question, f"Caption {i}.", "deny") for i in range(num)))
    totals = await permits.totals(RUN)
    await permits.leave(RUN)
    return {**totals, "decided": sum(v.choice is not None for v in found), "verdicts": len(found)}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(pay(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])))))
