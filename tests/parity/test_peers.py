"""The benchmark's peers on a CPU, which need PyTorch."""

import contextlib
import json
import os

import pytest

torch = pytest.importorskip("torch")

from experiments import apart, benchmark, contestants, peers, rounds  # noqa: E402
from experiments.flags import load_config  # noqa: E402
from tests.test_benchmark import TINY  # noqa: E402


def test_peers_on_a_cpu_are_apart_and_wait_as_they_like(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    out, built, started, process = tmp_path / "cpu.json", [], [], apart.process
    monkeypatch.setattr(apart, "process", lambda: started.append(process()) or started[-1])
    monkeypatch.setattr(rounds, "build", lambda name, *args: built.append(name) or contestants.build(name, *args))
    assert benchmark.main([f"--out={out}", "--repeats=1", "--strategies=balanced", *TINY]) == 0
    ours, original = json.loads(out.read_text())["rows"]
    assert built == ["ours"] and original["seconds"]["median"] > 0
    assert len(started) == 2  # the original's, and that of what the machine does by PyTorch
    assert original["wait_policy"] is None and "OMP_WAIT_POLICY" not in os.environ
    assert original["threads"] > 0 and original["torch"] == torch.__version__
    assert "process_peak_bytes" not in ours and "compiled_bytes" not in original  # planned here, measured there


def test_a_peer_takes_as_many_threads_as_pytorch_does_by_itself():
    threads = torch.get_num_threads()
    try:
        for chosen in (1, threads):
            torch.set_num_threads(chosen)
            peers.prepare("cpu")
            assert torch.get_num_threads() == peers.environment()["threads"] == chosen
    finally:
        torch.set_num_threads(threads)


def test_a_peers_peak_memory_is_its_own_and_without_what_was_imported():
    """In a process for each: what the first one held is not the second one's."""
    found = []
    with contextlib.ExitStack() as stack:
        for vocab_size in (2**17, 64):
            config = load_config("configs/balanced.py:cpu", [*TINY, f"--config.model.vocab_size={vocab_size}"])
            step, facts = apart.build_in(stack.enter_context(apart.process()), "original", config, "cpu")
            assert step() > 0
            found.append(facts())
    tables = 4 * 2**17 * 32 * 4  # the embedding, its gradient and AdamW's two
    large, small = (row["process_peak_bytes"] for row in found)
    assert tables < large - small and 0 < small < 150e6, (large, small)  # PyTorch itself takes 200 MB and more
    assert all(row["first_step_seconds"] > 0 for row in found)
