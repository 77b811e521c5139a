"""Checkpoints: loaded strictly and lean, saved so that they load again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from meddam_core.dam.checkpoint import build_dam, check_dam, load_dam, random_dam, save_dam
from meddam_core.dam.config import COMPONENTS
from meddam_core.dam.documents import DAM_3B
from meddam_core.dam.model import Dam
from meddam_core.dam.weights import WeightFiles, write_weights
from tests.meddam_core.dam.small import CHECKPOINT, CONFIG, ORACLE, random_views, small_config, small_dam, tokenizer


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkpoint folder that a test may break."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "dam"))


def _equal(ours: Dam, theirs: Dam) -> bool:
    other = dict(theirs.named_parameters())
    return all(torch.equal(p, other[name]) for name, p in ours.named_parameters())


def test_every_tensor_equals_the_file() -> None:
    dam = load_dam(CHECKPOINT)
    for component in COMPONENTS:
        on_disk = load_file(CHECKPOINT / component / "model.safetensors")
        ours = dict(dam.get_submodule(component).named_parameters())
        assert set(on_disk) == set(ours)
        assert all(torch.equal(ours[name], tensor) for name, tensor in on_disk.items())
    assert not dam.training


def test_dam_3b_has_the_published_names_and_shapes() -> None:
    expected = json.loads((ORACLE.parent / "dam3b_tensor_shapes.json").read_text())
    dam = build_dam(DAM_3B)
    for component in COMPONENTS:
        ours = {name: list(p.shape) for name, p in dam.get_submodule(component).named_parameters()}
        assert ours == expected[component]
    assert all(p.device.type == "meta" for p in dam.parameters())
    assert sum(p.numel() for p in dam.parameters()) == 3_559_843_942


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    config = small_config(context__treat_image_as_cimage=True, llm__eos_token_ids=(2, 5))
    dam = small_dam(config)
    save_dam(dam, tmp_path / "dam")
    again = load_dam(tmp_path / "dam")
    assert again.config == config and _equal(again, dam)
    views = torch.from_numpy(random_views(2, config.view_size))
    with torch.inference_mode():
        assert torch.equal(again.encode(views), dam.encode(views))


def test_sharded_and_bin_files_load_as_well(tmp_path: Path) -> None:
    dam = small_dam()
    save_dam(dam, tmp_path / "sharded", max_shard_bytes=20_000)
    assert len(list((tmp_path / "sharded" / "llm").glob("model-*.safetensors"))) > 2
    assert _equal(load_dam(tmp_path / "sharded"), dam)

    save_dam(dam, tmp_path / "bin")
    for component in COMPONENTS:
        file = tmp_path / "bin" / component / "model.safetensors"
        torch.save(load_file(file), file.with_name("pytorch_model.bin"))
        file.unlink()
    assert _equal(load_dam(tmp_path / "bin"), dam)


def test_a_bin_file_cannot_run_code(copy: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, ("raise SystemExit('ran')",)

    file = copy / "llm" / "model.safetensors"
    torch.save({"lm_head.weight": Evil()}, file.with_name("pytorch_model.bin"))
    file.unlink()
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        load_dam(copy)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_dam(small_dam(), tmp_path, max_shard_bytes=20_000)
    shard = next((tmp_path / "llm").glob("model-00002-*.safetensors"))
    shard.unlink()
    with pytest.raises(ValueError, match=shard.name):
        load_dam(tmp_path)


def test_every_wrong_tensor_is_listed(copy: Path) -> None:
    def change(component: str, **changes: torch.Tensor | None) -> None:
        file = copy / component / "model.safetensors"
        tensors = {**load_file(file), **{k.replace("__", "."): v for k, v in changes.items()}}
        save_file({k: v for k, v in tensors.items() if v is not None}, file)

    change("llm", lm_head__weight=None, extra__bias=torch.zeros(3))
    change("mm_projector", layers__2__bias=torch.zeros(65))
    change("context_provider", **{"context_provider_module.layers.1.attn_factor": None})
    with pytest.raises(ValueError, match="the weights do not fit") as refused:
        load_dam(copy)
    said = str(refused.value)
    assert "llm: lm_head.weight is missing; expected [1000, 64]" in said
    assert "llm: extra.bias [3] is unexpected" in said
    assert "mm_projector: layers.2.bias is [65]; expected [64]" in said
    assert "context_provider: context_provider_module.layers.1.attn_factor is missing" in said
    assert said.count("\n  - ") == 4


def test_no_weights_at_all(copy: Path) -> None:
    (copy / "vision_tower" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="vision_tower holds no weights"):
        load_dam(copy)


def test_embedding_rows_beyond_the_tokenizer_are_cut(copy: Path) -> None:
    """As the reference resizes them; a tokenizer larger than the embedding cannot be right."""
    file, settings = copy / "llm" / "model.safetensors", copy / "llm" / "config.json"
    tensors = load_file(file)
    kept = {name: tensors[name].clone() for name in ("model.embed_tokens.weight", "lm_head.weight")}
    save_file(tensors | {name: torch.cat((t, torch.full((24, 64), 9.0))) for name, t in kept.items()}, file)
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"vocab_size": 1024}))
    dam = load_dam(copy)
    assert dam.llm.vocab_size == 1000 and _equal(dam, load_dam(CHECKPOINT))

    save_file(tensors | {name: t[:900].clone() for name, t in kept.items()}, file)
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"vocab_size": 900}))
    with pytest.raises(ValueError, match="1000 tokens for 900 embedding rows"):
        load_dam(copy)


def test_tied_embeddings_are_saved_once_and_shared_again(tmp_path: Path) -> None:
    dam = small_dam(small_config(llm__tie_word_embeddings=True))
    save_dam(dam, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "llm" / "model.safetensors")
    again = load_dam(tmp_path, dtype=torch.bfloat16)
    assert again.llm.lm_head.weight is again.llm.model.embed_tokens.weight


def test_gates_that_are_no_parameters(tmp_path: Path) -> None:
    dam = small_dam(small_config(context__zero_init_output=False))
    save_dam(dam, tmp_path)
    assert not any("factor" in name for name in load_file(tmp_path / "context_provider" / "model.safetensors"))
    assert _equal(load_dam(tmp_path), dam)


def test_dtype_is_the_one_asked_for() -> None:
    dam = load_dam(CHECKPOINT, dtype=torch.bfloat16)
    assert {p.dtype for p in dam.parameters()} == {torch.bfloat16}
    views = torch.from_numpy(random_views(1, 112))
    with torch.inference_mode():
        exact = load_dam(CHECKPOINT).encode(views)
        assert (dam.encode(views).float() - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_random_weights_follow_the_seed() -> None:
    a, b, c = (random_dam(CONFIG, seed, tokenizer()) for seed in (1, 1, 2))
    assert _equal(a, b) and not _equal(a, c)
    zero = random_dam(CONFIG, 1, zero_gates=True)
    gates = [p for n, p in zero.named_parameters() if n.endswith("_factor")]
    assert len(gates) == 6 and not any(p.any() for p in gates)


_MEASURE = """
import resource, sys, threading, time, torch
torch.set_num_threads(1)
from meddam_core.dam.checkpoint import load_dam
load_dam(sys.argv[2])  # imports and thread pools are not the weights' fault
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before, peak, done = resident(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, resident())
        time.sleep(0.001)
watcher = threading.Thread(target=watch); watcher.start()
dam = load_dam(sys.argv[1], dtype=getattr(torch, sys.argv[3]))
done = True; watcher.join()
weights = sum(p.numel() * p.element_size() for p in dam.parameters())
print(peak - before, weights)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("suffix", "dtype"), [("safetensors", "float32"), ("bin", "float32"), ("safetensors", "bfloat16")]
)
def test_peak_memory_stays_near_the_weights(tmp_path: Path, suffix: str, dtype: str) -> None:
    """Also where a component is one single file, and where it is converted on the way."""
    config = small_config(
        llm__hidden_size=512, llm__intermediate_size=1536, llm__num_layers=10, llm__num_heads=8, llm__num_kv_heads=8
    )
    save_dam(random_dam(config, 0, tokenizer()), tmp_path)
    if suffix == "bin":
        file = tmp_path / "llm" / "model.safetensors"
        torch.save(load_file(file), file.with_name("pytorch_model.bin"))
        file.unlink()
    command = [sys.executable, "-c", _MEASURE, str(tmp_path), str(CHECKPOINT), dtype]
    peak, weights = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert weights > 60e6
    assert peak < 1.3 * weights


def test_a_quantised_checkpoint_is_refused(copy: Path) -> None:
    file = copy / "mm_projector" / "model.safetensors"
    write_weights(file.parent, {n: t.to(torch.int8) for n, t in load_file(file).items()})
    with pytest.raises(ValueError, match="quantised"):
        load_dam(copy)


def test_a_checkpoint_is_checked_without_reading_its_weights(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WeightFiles, "tensors", None)
    check_dam(copy)
    file = copy / "mm_projector" / "model.safetensors"
    write_weights(file.parent, {n: t.to(torch.int8) for n, t in load_file(file).items()})
    with pytest.raises(ValueError, match="quantised"):
        check_dam(copy)
    file.unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        check_dam(copy)


def test_a_checkpoint_is_loaded_without_the_compiler() -> None:
    """torch._dynamo costs each process 1.5 s; drawing weights on the meta device would load it."""
    script = "import sys; from meddam_core.dam.checkpoint import load_dam; load_dam(sys.argv[1]); " \
        "sys.exit('torch._dynamo' in sys.modules)"  # fmt: skip
    subprocess.run([sys.executable, "-c", script, str(CHECKPOINT)], check=True)
