"""Rows for the tests, as ingest writes them, without pixels."""

from __future__ import annotations

from meddam_core.records import EncodedImage, Image, Label, Region, Window, region_id


def image(
    dataset: str,
    regions: list[tuple[tuple[int, int, int, int], dict[str, str]]],
    *,
    ordinal: int = 1,
    modality: str = "DX",
    recipe: str = "generic",
    window: Window | None = None,
    trust: float | None = 1.0,
) -> Image:
    """An image row whose regions are (box, {label name: label value})."""
    return Image(
        image_id=ordinal,
        image_key=f"key{ordinal}",
        dataset=dataset,
        recipe=recipe,
        modality=modality,
        image=EncodedImage(),
        preview=EncodedImage(),
        width=1000,
        height=1000,
        window=window,
        regions=[
            Region(
                region_id=region_id(ordinal, i),
                box=box,
                labels=[Label(name=n, value=v, trust=trust) for n, v in labels.items()],
            )
            for i, (box, labels) in enumerate(regions)
        ],
    )
