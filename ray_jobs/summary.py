"""How a run ended, for people, for summary.json and for the exit code.

0  complete: every caption is published exactly once (some may have failed, and are counted)
1  an error nobody foresaw, with its traceback
2  the configuration cannot work; nothing was done
3  stopped: too many images failed, or all of them
4  incomplete: captions are missing, or the GPUs it waited for did not come; run the same command again
5  another driver holds the run directory
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

EXIT_CONFIG, EXIT_STOPPED, EXIT_INCOMPLETE, EXIT_HELD = 2, 3, 4, 5

State = Literal["complete", "stopped", "incomplete"]


class Summary(BaseModel):
    """What is written to summary.json, last."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    state: State
    why: str | None = None
    """Why it is not complete."""
    generation: int | None = None
    attempt: int
    num_images: int
    num_regions: int
    num_captions: int = 0
    by_status: dict[str, int] = {}
    by_reason: dict[str, int] = {}
    num_tokens: int = 0
    engine: str
    kernels: str
    finished_at: str | None = None
    """When this summary was made, UTC."""
    audit: dict[str, Any] | None = None
    session: dict[str, Any] = {}
    """The last driver's own figures: what it captioned, seconds, speed, worker deaths, quarantined images."""

    @property
    def exit_code(self) -> int:
        """What the process ends with."""
        return {"complete": 0, "stopped": EXIT_STOPPED, "incomplete": EXIT_INCOMPLETE}[self.state]

    def lines(self) -> list[str]:
        """The summary as a person reads it at the end of a job."""
        failed = sum(self.by_reason.values())
        text = [
            f"{self.state}: {self.num_images:,} images, {self.num_regions:,} regions, {self.num_captions:,} captions"
            + (f", {failed:,} without text" if failed else "")
        ]
        if self.why:
            text.append(self.why)
        text += [f"  {count:>8,}  {reason}" for reason, count in sorted(self.by_reason.items(), key=lambda i: -i[1])]
        if "speed" in self.session:
            text.append(str(self.session["speed"]))
        return text
