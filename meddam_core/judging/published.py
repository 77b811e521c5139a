"""The paper's own figures, quoted: never ranked with ours, because data split, questions, judge and gate differ.

Source: "Describe Anything in Medical Images", Table 1 (zero-shot; each score the average over VinDr-CXR, LIDC-IDRI and
SkinCon; percent). The paper reports no intervals and names no judge for MedDLC-score.
"""

from __future__ import annotations

from dataclasses import dataclass

SOURCE = "Describe Anything in Medical Images, Table 1"


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """One line of the paper's Table 1, percent."""

    model: str
    kind: str
    llm_score: float
    med_dlc: float
    positive: float
    negative: float


PAPER_TABLE: tuple[PublishedRow, ...] = (
    PublishedRow("GPT-4o", "general", 81.5, 50.2, 52.0, 48.4),
    PublishedRow("Claude 3.7 Sonnet", "general", 79.2, 47.5, 49.0, 46.0),
    PublishedRow("LLaMA-3.2 Vision", "general", 75.3, 43.8, 45.1, 42.5),
    PublishedRow("Qwen2.5-VL", "general", 73.4, 41.9, 43.2, 40.6),
    PublishedRow("GPT4RoI", "region-specific", 77.1, 45.7, 47.3, 44.0),
    PublishedRow("OMG-LLaVA", "region-specific", 76.5, 46.1, 47.8, 44.5),
    PublishedRow("MedDAM", "region-specific", 78.9, 63.6, 65.1, 62.0),
)
