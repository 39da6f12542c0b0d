"""The benchmark's peers on a CPU, which need PyTorch."""

import json
import os

from experiments import benchmark, contestants, rounds
from tests.test_benchmark import TINY


def test_peers_on_a_cpu_are_apart_and_wait_as_they_like(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    out, built = tmp_path / "cpu.json", []
    monkeypatch.setattr(rounds, "build", lambda name, *args: built.append(name) or contestants.build(name, *args))
    assert benchmark.main([f"--out={out}", "--repeats=1", "--strategies=balanced", *TINY]) == 0
    ours, original = json.loads(out.read_text())["rows"]
    assert built == ["ours"] and original["seconds"]["median"] > 0
    assert original["wait_policy"] is None and "OMP_WAIT_POLICY" not in os.environ
