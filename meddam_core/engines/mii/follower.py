"""The other ranks of a model over several processes: they repeat what rank 0 announces (see tensor_parallel)."""

from __future__ import annotations

from meddam_core.dam.model import Dam
from meddam_core.engines.mii import compat
from meddam_core.engines.mii.tensor_parallel import join


def follow(dam: Dam, tp_size: int) -> None:
    """Serves as one of the other ranks until rank 0 closes its engine. `dam`: the same checkpoint; emptied."""
    compat.import_deepspeed()
    group = join(tp_size, dam.device)
    kernels, limits, keep_weights = group.receive()
    if kernels == "cuda":
        from meddam_core.engines.mii.ops import load_ops

        load_ops()
    from meddam_core.engines.mii.model import VisualRows
    from meddam_core.engines.mii.startup import build_ragged_engine

    ragged = build_ragged_engine(dam, kernels, limits, keep_weights, group)
    while (message := group.receive()) is not None:
        if isinstance(message, int):
            ragged._model.visual.pop(message, None)
            ragged.flush(message)
            continue
        uids, tokens, visual = message
        for uid, (positions, rows) in visual.items():
            ragged._model.visual[uid] = VisualRows(positions, rows.to(dam.device))
        ragged.put(uids, tokens)
    group.leave()
