"""Starting: exact versions, loud fallback, DeepSpeed's global state, kernels from the cache, the logit check."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch

from meddam_core.engines import make_engine, resolve_engine
from meddam_core.engines.base import Sampling
from meddam_core.engines.mii import compat, ops, startup
from meddam_core.engines.mii.compat import MiiUnavailable
from meddam_core.engines.mii.engine import MiiEngine
from meddam_core.engines.mii.trial import run_trial, try_kernels
from tests.meddam_core.engines.mii.conftest import CHECKPOINT, grouped_dam, make_request, oracle_dam


def versions(**changed: str | None) -> Callable[[str], str]:
    """Stands in for importlib.metadata.version: other versions installed than the real ones."""
    real = metadata.version

    def version(package: str) -> str:
        if package in changed and changed[package] is None:
            raise metadata.PackageNotFoundError(package)
        return changed.get(package) or real(package)

    return version


@pytest.mark.parametrize(
    ("installed", "message"),
    [
        ({"deepspeed": "0.20.0"}, "deepspeed 0.20.0 is installed, and this engine works with exactly 0.19.8"),
        ({"deepspeed-mii": "0.3.2"}, "deepspeed-mii 0.3.2 is installed"),
        ({"deepspeed-mii": None}, "deepspeed-mii is not installed. pip install"),
    ],
)
def test_other_versions_are_refused(
    installed: dict[str, str | None], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", versions(**installed))
    with pytest.raises(MiiUnavailable, match=message):
        MiiEngine(oracle_dam())
    with pytest.raises(ValueError, match=message):
        make_engine("mii", str(CHECKPOINT))


def test_a_package_that_only_looks_right_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from mii.batching.ragged_batching import RaggedBatchBase

    monkeypatch.delattr(RaggedBatchBase, "reset_request_status")
    with pytest.raises(MiiUnavailable, match="RaggedBatchBase lacks reset_request_status"):
        compat.import_deepspeed()


def test_auto_falls_back_loudly_and_mii_never_does(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # "meta" stands for a device that is not a CPU: auto tries mii there
    from meddam_core import engines

    monkeypatch.setattr(metadata, "version", versions(deepspeed="0.20.0"))
    monkeypatch.setattr(engines, "_make_torch", lambda folder, device, dtype, slots: "torch engine")
    with caplog.at_level(logging.WARNING), pytest.warns(RuntimeWarning, match="exactly 0.19.8"):
        engine, why = make_engine("auto", str(CHECKPOINT), device="cuda", dtype="bfloat16")
    assert engine == "torch engine"
    assert "mii cannot serve here, torch does: deepspeed 0.20.0" in why
    assert "mii cannot serve here" in caplog.text
    with pytest.raises(MiiUnavailable):
        make_engine("mii", str(CHECKPOINT), device="cuda", dtype="bfloat16")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended by signal 11"),
        ("import sys; sys.exit('the start-up check failed: x')", "failed: the start-up check failed: x"),
        ("import time; time.sleep(600)", "did not end within 2 s"),
    ],
)
def test_a_crash_or_hang_in_the_trial_is_a_reason(
    script: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -c {shlex.quote(script)}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(MiiUnavailable, match=message):
        run_trial(CHECKPOINT, device="cuda", dtype="bfloat16", timeout_s=2)


def test_the_trial_of_a_checkpoint() -> None:
    assert try_kernels(CHECKPOINT, "cpu", "float32", None) < 1e-4
    assert try_kernels(CHECKPOINT, "cpu", "bfloat16", "torch") < 0.05
    with pytest.raises(MiiUnavailable, match="failed: the compiled kernels do not fit"):
        run_trial(CHECKPOINT, device="cpu", dtype="float32", kernels="cuda")


def test_engines_by_name() -> None:
    engine, why = make_engine("mii", str(CHECKPOINT), slots=3)
    assert (engine.name, engine.kernels, why) == ("mii", "torch", "named explicitly")
    expected = engine.generate([make_request(1)])[0]
    engine.close()
    resolved = resolve_engine("mii", str(CHECKPOINT))
    assert (resolved.name, resolved.kernels) == ("mii", "torch")
    engine, why = make_engine("auto", str(CHECKPOINT))
    assert (engine.name, why) == ("torch", "the device is a CPU")
    assert engine.generate([make_request(1)])[0].token_ids == expected.token_ids
    with pytest.raises(ValueError, match="no engine 'vllm'"):
        make_engine("vllm", str(CHECKPOINT))
    with pytest.raises(ValueError, match="kernels is 'fast'"):
        make_engine("mii", str(CHECKPOINT), kernels="fast")


def test_compiled_kernels_are_refused_where_they_do_not_fit() -> None:
    llm, cpu = oracle_dam().config.llm, torch.device("cpu")
    with pytest.raises(
        MiiUnavailable, match=r"the device is cpu; the dtype is torch\.float32.*size 16.*size 176, which"
    ):
        startup.check_supported(llm, 1000, cpu, torch.float32, "cuda")
    startup.check_supported(llm, 1000, cpu, torch.float32, "torch")
    with pytest.raises(MiiUnavailable, match="kernels='torch' works here"):
        MiiEngine(oracle_dam(), kernels="cuda")


@pytest.mark.parametrize(
    ("capability", "fits"), [((7, 5), False), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((10, 0), False)]
)
def test_gpu_generations(capability: tuple[int, int], fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = grouped_dam(head_dim=128, heads=4, kv_heads=2, layers=1).config.llm
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    if fits:
        startup.check_supported(llm, 1000, torch.device("cuda"), torch.bfloat16, "cuda")
    else:
        with pytest.raises(MiiUnavailable, match=r"SM \d+\.\d"):
            startup.check_supported(llm, 1000, torch.device("cuda"), torch.bfloat16, "cuda")


def test_the_logit_check_finds_wrong_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    from meddam_core.engines.mii import torch_kernels

    assert MiiEngine(grouped_dam()).logit_difference < 1e-5  # type: ignore[operator]
    right = torch_kernels.rotary_table
    monkeypatch.setattr(torch_kernels, "rotary_table", lambda theta, *rest: right(theta * 1.5, *rest))
    with pytest.raises(MiiUnavailable, match="start-up check failed"):
        MiiEngine(grouped_dam())
    with pytest.raises(MiiUnavailable, match="start-up check failed"):
        make_engine("mii", str(CHECKPOINT))


def test_the_cache_is_sized_from_a_budget() -> None:
    dam = grouped_dam()
    llm = dam.config.llm
    block_bytes = 16 * 2 * llm.num_layers * llm.num_kv_heads * llm.head_dim * 4
    engine = MiiEngine(dam, cache_bytes=20 * block_bytes + 7)
    assert engine.num_blocks == 20
    caches = engine._ragged._state_manager._kv_cache._caches
    assert sum(c.numel() * c.element_size() for c in caches) == 20 * block_bytes
    assert MiiEngine(grouped_dam(), max_sequences=2).num_blocks == 2 * 480 // 16
    with pytest.raises(MiiUnavailable, match="left for keys and values"):
        MiiEngine(grouped_dam(), cache_bytes=100)


def test_global_state_is_as_before(capfd: pytest.CaptureFixture[str]) -> None:
    from deepspeed.accelerator import real_accelerator
    from deepspeed.inference.v2.allocator import Allocator
    from deepspeed.inference.v2.ragged import blocked_allocator, ragged_manager, ragged_wrapper

    compat.import_deepspeed()
    places = [
        (real_accelerator, "ds_accelerator"), (ragged_manager, "RaggedUtilsBuilder"),
        (ragged_wrapper, "RaggedUtilsBuilder"), (blocked_allocator, "torch"),
    ]  # fmt: skip
    before = [getattr(*place) for place in places]
    environment, handlers = dict(os.environ), list(logging.root.handlers)
    engine = MiiEngine(oracle_dam())
    engine.generate([make_request(0)])
    engine.close()
    assert [getattr(*place) for place in places] == before
    assert dict(os.environ) == environment
    assert logging.root.handlers == handlers
    assert not Allocator.cache
    assert capfd.readouterr().out == ""


def test_importing_is_light_and_quiet() -> None:
    code = (
        "import sys, os; before = dict(os.environ)\n"
        "import meddam_core.engines, meddam_core.engines.mii\n"
        "assert not {'torch', 'deepspeed', 'mii', 'transformers'} & set(sys.modules)\n"
        "from meddam_core.engines.mii.engine import MiiEngine\n"
        "assert not {'deepspeed', 'mii'} & set(sys.modules)\n"
        "from meddam_core.engines.mii.compat import import_deepspeed\n"
        "import_deepspeed()\n"
        "assert 'mii' in sys.modules and dict(os.environ) == before\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


def test_two_processes_on_one_node_do_not_meet() -> None:
    """Neither opens a port or reads one: both start with the same MASTER_PORT, held by somebody else."""
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        environment = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(taken.getsockname()[1]), RANK="0")
        code = (
            "import torch; torch.set_num_threads(1)\n"
            "from tests.meddam_core.engines.mii.conftest import make_request, oracle_dam\n"
            "from meddam_core.engines.mii.engine import MiiEngine\n"
            "print(MiiEngine(oracle_dam()).generate([make_request(1)])[0].token_ids)\n"
        )
        running = [
            subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
            for _ in range(2)
        ]
        try:
            printed = [process.communicate(timeout=600)[0] for process in running]
        finally:
            for process in running:
                process.kill()
    assert printed[0] == printed[1] != ""


def compile_extension(folder: Path, name: str, value: int) -> None:
    """A real extension module `name` with one function, where the cache keeps it."""
    place = folder / name
    place.mkdir(parents=True)
    source = place / f"{name}.c"
    source.write_text(
        "#include <Python.h>\n"
        f"static PyObject *answer(PyObject *s, PyObject *a) {{ return PyLong_FromLong({value}); }}\n"
        'static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, {0}};\n'
        f'static struct PyModuleDef module = {{PyModuleDef_HEAD_INIT, "{name}", "", -1, methods}};\n'
        f"PyMODINIT_FUNC PyInit_{name}(void) {{ return PyModule_Create(&module); }}\n"
    )
    include = sysconfig.get_paths()["include"]
    if not (Path(include) / "Python.h").is_file():
        pytest.skip("Python's headers are not installed")
    command = ["cc", "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(place / f"{name}.so")]
    subprocess.run(command, check=True)


def test_kernels_come_from_the_cache_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops import op_builder
    from deepspeed.ops.op_builder import ragged_ops
    from deepspeed.ops.op_builder.builder import OpBuilder

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(OpBuilder, "_loaded_ops", {})
    monkeypatch.setattr(ops, "_flash_folder", lambda: tmp_path)
    with pytest.raises(MiiUnavailable, match="imported before for another accelerator"):
        ops.load_ops(tmp_path)
    monkeypatch.setattr(op_builder, "RaggedOpsBuilder", ragged_ops.RaggedOpsBuilder)
    with pytest.raises(MiiUnavailable, match="libblockedflash"):
        ops.load_ops(tmp_path)
    (tmp_path / ops.FLASH_LIBRARY).symlink_to(next(Path(torch.__file__).parent.glob("lib/libshm.so")))
    folder = tmp_path / ops.cache_key((9, 0))
    assert "sm90" in folder.name
    for value, name in enumerate(ops.BUILDERS):
        compile_extension(folder, name, value)
        (folder / name / "complete").touch()
    assert ops.load_ops(tmp_path) == folder
    assert [OpBuilder._loaded_ops[name].answer() for name in ops.BUILDERS] == [0, 1, 2]


def test_kernels_that_do_not_build_or_load_are_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with pytest.raises(MiiUnavailable, match="ragged_ops do not build"):
        ops.build(tmp_path / "cache", "ragged_ops")  # torch has no CUDA here
    assert not ops.is_complete(tmp_path / "cache", "ragged_ops")
    broken = tmp_path / "cache" / "ragged_ops"
    broken.mkdir(exist_ok=True)
    (broken / "ragged_ops.so").write_bytes(b"not a library")
    with pytest.raises(MiiUnavailable, match="does not load here"):
        ops.load_extension(tmp_path / "cache", "ragged_ops")
    (tmp_path / "file").touch()
    with pytest.raises(MiiUnavailable, match="cannot be written to"):
        ops.build(tmp_path / "file" / "cache", "ragged_ops")


def test_the_default_cache_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ops.CACHE_VARIABLE, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = ops.cache_root()
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o077 == 0
    folder.rmdir()
    elsewhere = tmp_path / "planted"
    elsewhere.mkdir()
    folder.symlink_to(elsewhere)
    with pytest.raises(MiiUnavailable, match="belongs to somebody else"):
        ops.cache_root()
    monkeypatch.setenv(ops.CACHE_VARIABLE, str(elsewhere))
    assert ops.cache_root() == elsewhere


@pytest.mark.slow
def test_an_op_builds_into_the_cache_and_loads_in_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the one DeepSpeed op that builds without CUDA, through the same code."""
    compat.import_deepspeed()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setitem(ops.BUILDERS, "deepspeed_shm_comm", "ShareMemCommBuilder")
    (tmp_path / "deepspeed_shm_comm").mkdir()
    (tmp_path / "deepspeed_shm_comm" / "lock").touch()  # left by a killed process
    ops.build(tmp_path, "deepspeed_shm_comm")
    assert ops.is_complete(tmp_path, "deepspeed_shm_comm")
    code = (
        "import torch; from pathlib import Path; from meddam_core.engines.mii.ops import load_extension\n"
        f"assert load_extension(Path({str(tmp_path)!r}), 'deepspeed_shm_comm')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ, PATH="/nowhere"))


def test_sampling_equals_the_torch_engine() -> None:
    settings = [
        Sampling(max_new_tokens=12 + i, temperature=t, top_p=p, top_k=k, seed=s)
        for i, (t, p, k, s) in enumerate(
            ((0.2, 0.5, 0, 1), (1.0, 1.0, 0, 2), (0.8, 0.9, 20, 3), (0.0, 1.0, 0, 4), (1.5, 0.7, 0, 2))
        )
    ]
    requests = [make_request(i, s) for i, s in enumerate(settings * 2)]
    mine, _ = make_engine("mii", str(CHECKPOINT), slots=4)
    theirs, _ = make_engine("torch", str(CHECKPOINT), slots=3)
    pairs = list(zip(mine.generate(requests), theirs.generate(requests), strict=True))
    for a, b in pairs:
        assert (a.token_ids, a.text, a.finish_reason) == (b.token_ids, b.text, b.finish_reason)
        assert (a.num_prompt_tokens, a.num_image_tokens) == (b.num_prompt_tokens, b.num_image_tokens)
        assert a.mean_logprob == pytest.approx(b.mean_logprob, abs=1e-4)
