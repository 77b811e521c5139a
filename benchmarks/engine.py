"""An engine against a one-at-a-time Hugging Face `generate` loop: same weights, same inputs, same threads, same run.

    python benchmarks/engine.py --checkpoint tests/data/oracle/dam_tiny/checkpoint --threads 1
    python benchmarks/engine.py --dam-3b --device cuda --dtype bfloat16 --new-tokens 128 --batch-sizes 64,128,256

Every region is encoded and decoded by both sides; end of sequence is ignored so that lengths are fixed. `even` captions
have --new-tokens each, `uneven` ones 8 to 128. The roofline is the time per region if vision and prefill ran at the
measured matrix rate and every decode step read weights and cache once at the measured copy bandwidth (bytes read plus
bytes written); both are measured here, in the engine's dtype. The sides take turns; times are the best of --repeats.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from meddam_core.dam.checkpoint import load_dam, random_dam
from meddam_core.dam.config import DamConfig
from meddam_core.dam.documents import DAM_3B
from meddam_core.dam.model import Dam
from meddam_core.dam.tokens import Tokenizer, read_tokenizer
from meddam_core.engines.base import Engine, Request, Sampling
from meddam_core.engines.torch_engine import TorchEngine

LOOP = "generate loop"
QUERY = "<image>\nDescribe the masked region in detail."
UNEVEN = (8, 128)
TINY_TOKENIZER = "tests/data/oracle/dam_tiny/checkpoint/llm"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One measurement. Times in seconds, for all regions together."""

    what: str
    lengths: str
    batch: int
    num_regions: int
    num_tokens: int
    wall_s: float
    vision_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    peak_bytes: int = 0
    roofline_share: float | None = None

    @property
    def regions_per_s(self) -> float:
        return self.num_regions / self.wall_s

    @property
    def language_s(self) -> float:
        """Seconds a region for everything but vision."""
        return (self.wall_s - self.vision_s) / self.num_regions

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.wall_s


def main() -> None:
    args = _arguments()
    torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    dam = _random_dam_3b(args, device, dtype) if args.dam_3b else load_dam(args.checkpoint, device, dtype)
    load = f"load {os.getloadavg()[0]:.2f}"
    print(f"{_machine(device)}, {args.threads} threads, {load}, {args.dtype}, torch {torch.__version__}")
    copy_rate, matrix_rate = measure_copy(device), measure_matrix(device, dtype)
    print(f"copy {copy_rate / 1e9:.1f} GB/s, matrix {matrix_rate / 1e12:.3f} TFLOP/s")

    runs: list[Run] = []
    for batch in args.batch_sizes:
        engine = _make_engine(args.engine, dam, batch)
        num = max(args.regions, 4 * batch)
        even, uneven = (make_requests(dam.config, num, lengths, args.new_tokens) for lengths in ("even", "uneven"))
        sides = [partial(run_engine, engine, even, "even", batch), partial(run_engine, engine, uneven, "uneven", batch)]
        if not args.no_reference:
            loop = GenerateLoop(dam)
            sides.append(partial(loop.run, even[: args.reference_regions], batch))
        for run, requests in zip(best_of(args.repeats, sides), (even, uneven, even), strict=False):
            if run.what != LOOP:
                share = roofline_s(dam, requests, batch, copy_rate, matrix_rate) / run.wall_s
                run = Run(**{**asdict(run), "roofline_share": share})
            _show(run)
            runs.append(run)
        engine.close()
    summarise(runs)
    if args.json:
        print(json.dumps([asdict(run) for run in runs]))


def make_requests(config: DamConfig, num: int, lengths: str, new_tokens: int) -> list[Request]:
    """Regions of random pixels whose two views differ, so that every one takes the adapter route."""
    rng = np.random.default_rng(0)
    size = config.view_size
    pool = rng.integers(0, 256, (min(num, 32), 8, size, size), dtype=np.uint8)
    limits = np.full(num, new_tokens) if lengths == "even" else rng.permutation(np.linspace(*UNEVEN, num).astype(int))
    return [
        Request(
            request_id=str(i),
            views_N8SS=pool[i % len(pool)][None],
            query=QUERY,
            sampling=Sampling(max_new_tokens=int(limits[i])),
        )
        for i in range(num)
    ]


def best_of(repeats: int, sides: Sequence[Callable[[], Run]]) -> list[Run]:
    """The fastest of `repeats` runs of each side, in turns, so that a busy moment of the machine hits all of them.

    A first round does not count.
    """
    rounds = [[side() for side in sides] for _ in range(repeats + 1)][1:]
    return [min(runs, key=lambda run: run.wall_s) for runs in zip(*rounds, strict=True)]


def run_engine(engine: Engine, requests: Sequence[Request], lengths: str, batch: int) -> Run:
    before = asdict(engine.stats)
    _reset_peak()
    started = time.perf_counter()
    results = engine.generate(requests)
    wall_s = time.perf_counter() - started
    spent = {name: value - before[name] for name, value in asdict(engine.stats).items()}
    wrong = [r for r, q in zip(results, requests, strict=True) if len(r.token_ids) != q.sampling.max_new_tokens]
    assert not wrong, f"{len(wrong)} captions are not of the length asked for: {wrong[0]}"
    return Run(
        what=f"{engine.name} ({engine.kernels})", lengths=lengths, batch=batch, num_regions=len(requests),
        num_tokens=sum(len(r.token_ids) for r in results), wall_s=wall_s, vision_s=spent["vision_s"],
        prefill_s=spent["prefill_s"], decode_s=spent["decode_s"], peak_bytes=_peak_bytes(),
    )  # fmt: skip


class GenerateLoop:
    """The baseline: Hugging Face's LlamaForCausalLM on the same tensors, one region at a time."""

    def __init__(self, dam: Dam) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        llm = dam.config.llm
        config = LlamaConfig(
            vocab_size=dam.llm.vocab_size, hidden_size=llm.hidden_size, intermediate_size=llm.intermediate_size,
            num_hidden_layers=llm.num_layers, num_attention_heads=llm.num_heads, num_key_value_heads=llm.num_kv_heads,
            rms_norm_eps=llm.rms_norm_eps, max_position_embeddings=llm.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": llm.rope_theta},
            tie_word_embeddings=llm.tie_word_embeddings, eos_token_id=None, bos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        self._dam = dam
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        model.load_state_dict(dam.llm.state_dict(), assign=True)
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # a table, not a weight: not in the state dict
        self._model = model.train(False).to(dam.device)

    @torch.inference_mode()
    def run(self, requests: Sequence[Request], batch: int) -> Run:
        """`batch` only says which engine runs this one is to be compared with."""
        _reset_peak()
        vision_s, num_tokens = 0.0, 0
        started = time.perf_counter()
        for request in requests:
            begun = time.perf_counter()
            tokens_NTD = self._dam.encode(torch.from_numpy(request.views_N8SS))
            rows = self._dam.merge(self._dam.tokenizer.encode_prompt(request.query), tokens_NTD)[None]
            _wait(self._dam.device)
            vision_s += time.perf_counter() - begun
            ids = self._model.generate(
                inputs_embeds=rows, attention_mask=torch.ones(rows.shape[:2], dtype=torch.int64, device=rows.device),
                max_new_tokens=request.sampling.max_new_tokens, do_sample=False,
            )  # fmt: skip
            num_tokens += ids.shape[1]
        wall_s = time.perf_counter() - started
        assert num_tokens == sum(r.sampling.max_new_tokens for r in requests)
        return Run(
            what=LOOP, lengths="even", batch=batch, num_regions=len(requests), num_tokens=num_tokens,
            wall_s=wall_s, vision_s=vision_s, decode_s=wall_s - vision_s, peak_bytes=_peak_bytes(),
        )  # fmt: skip


def measure_copy(device: torch.device) -> float:
    """Bytes read and written a second by a large copy."""
    num_bytes = (4 << 30) if device.type == "cuda" else (512 << 20)
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / _fastest(lambda: target.copy_(source), device)


def measure_matrix(device: torch.device, dtype: torch.dtype) -> float:
    """Floating point operations a second of a large matrix product."""
    size = 8192 if device.type == "cuda" else 1536
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size**3 / _fastest(lambda: a @ b, device)


def roofline_s(dam: Dam, requests: Sequence[Request], batch: int, copy_rate: float, matrix_rate: float) -> float:
    """Seconds for all requests at the measured rates, `batch` captions decoding at once."""
    c, llm = dam.config, dam.config.llm
    num_weights = sum(p.numel() for p in dam.llm.parameters()) - dam.llm.model.embed_tokens.weight.numel()
    num_prompt = dam.num_positions(dam.tokenizer.encode_prompt(QUERY))
    attention = 2 * llm.num_layers * llm.hidden_size * num_prompt**2  # causal: half of both products
    prefill_flops = 2 * (num_weights - dam.llm.lm_head.weight.numel()) * num_prompt + attention
    flops = len(requests) * (_vision_flops(c) + prefill_flops)
    position_bytes = 2 * llm.num_layers * llm.num_kv_heads * llm.head_dim * dam.dtype.itemsize
    num_bytes = 0.0
    for request in requests:
        steps = request.sampling.max_new_tokens - 1  # the first token comes from the prefill
        cache = sum(num_prompt + step for step in range(1, steps + 1)) * position_bytes
        num_bytes += cache + steps * num_weights * dam.dtype.itemsize / batch
    return flops / matrix_rate + num_bytes / copy_rate


def _vision_flops(c: DamConfig) -> float:
    """Both passes, the adapters and the projector, of one view."""
    num, size, used = c.vision.grid**2, c.vision.hidden_size, c.num_used_layers
    attention = 4 * num * num * size
    layer = 2 * num * (4 * size**2 + 2 * size * c.vision.intermediate_size) + attention
    adapter = 2 * num * (4 * size**2 + 2 * size * c.context.intermediate_size) + attention
    patches = 2 * 2 * num * 4 * c.vision.patch_size**2 * size
    projector = 2 * c.num_image_tokens * (4 * size * c.llm.hidden_size + c.llm.hidden_size**2)
    return patches + used * (2 * layer + adapter) + projector


def summarise(runs: Sequence[Run]) -> None:
    """The ratios that the project's targets are about."""
    found = {(run.what == LOOP, run.lengths, run.batch): run for run in runs}
    for batch in dict.fromkeys(run.batch for run in runs):
        even, uneven, loop = (
            found[False, "even", batch],
            found[False, "uneven", batch],
            found.get((True, "even", batch)),
        )
        parts = [f"batch {batch}:"]
        if loop is not None:
            whole, language = even.regions_per_s / loop.regions_per_s, loop.language_s / even.language_s
            parts.append(f"{whole:.1f}x the generate loop ({language:.1f}x without vision on either side),")
        parts.append(f"uneven lengths at {uneven.tokens_per_s / even.tokens_per_s:.2f} of the even token rate")
        print(" ".join(parts))


def _show(run: Run) -> None:
    host_s = run.wall_s - run.vision_s - run.prefill_s - run.decode_s
    at_once = 1 if run.what == LOOP else run.batch
    split = f"vision {run.vision_s:6.2f} prefill {run.prefill_s:6.2f} decode {run.decode_s:6.2f} host {host_s:5.2f} s"
    share = "" if run.roofline_share is None else f"  roofline {run.roofline_share:5.1%}"
    print(
        f"{run.what:<14} {at_once:>4} at once, {run.lengths:<6} {run.num_regions:>5} regions {run.regions_per_s:8.2f} "
        f"regions/s {run.tokens_per_s:9.1f} tokens/s  {split}  peak {run.peak_bytes / 2**20:7.0f} MiB{share}",
        flush=True,
    )


def _make_engine(name: str, dam: Dam, batch: int) -> Engine:
    if name == "torch":
        return TorchEngine(dam, max_batch=batch, eos_ids=())
    from meddam_core.engines.mii.engine import MiiEngine

    return MiiEngine(dam, max_sequences=batch, eos_ids=(), keep_weights=True)


def _random_dam_3b(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Dam:
    tokenizer = _padded_tokenizer(read_tokenizer(TINY_TOKENIZER), DAM_3B.llm.vocab_size)
    return random_dam(DAM_3B, 0, tokenizer, device=device, dtype=dtype)


def _padded_tokenizer(tokenizer: Tokenizer, size: int) -> Tokenizer:
    """A tokenizer of the wanted size: the small one with pieces that no text contains."""
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(tokenizer.files["tokenizer.model"])
    for number in range(size - len(proto.pieces)):
        proto.pieces.add(piece=f"\u2045{number}\u2046", score=-1e6)
    return Tokenizer({**tokenizer.files, "tokenizer.model": proto.SerializeToString()})


def _fastest(action: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(8):
        _wait(device)
        started = time.perf_counter()
        action()
        _wait(device)
        times.append(time.perf_counter() - started)
    return min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def _peak_bytes() -> int:
    """Of the GPU, or of the process's resident memory, since the last reset (on Linux; elsewhere since the start)."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU with {os.cpu_count()} cores"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--checkpoint", help="DAM checkpoint folder")
    source.add_argument("--dam-3b", action="store_true", help="random weights of DAM-3B's dimensions")
    parser.add_argument("--engine", choices=("torch", "mii"), default="torch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch-sizes", type=lambda s: [int(b) for b in s.split(",")], default=[1, 8, 32, 128])
    parser.add_argument("--new-tokens", type=int, default=64, help="length of even captions")
    parser.add_argument("--regions", type=int, default=128, help="at least; four times the batch if that is more")
    parser.add_argument("--reference-regions", type=int, default=16, help="regions that the one-at-a-time loop does")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-reference", action="store_true", help="leave the one-at-a-time loop out")
    parser.add_argument("--json", action="store_true", help="print the runs as JSON too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
