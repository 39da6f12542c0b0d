"""The README is true: its examples run, and configs/README.md names every field with its value."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base
from experiments.flags import load_config
from research.config import num_steps, validate
from tests.small import placed

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *ROOT.glob("configs/*.md"), *ROOT.glob("experiments/**/README.md")]
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def test_the_strategy_of_the_example_is_a_config(tmp_path):
    file = tmp_path / "longer.py"
    file.write_text(EXAMPLES[0])
    for scale in base.SCALES:
        config = load_config(f"{file}:{scale}")
        balanced = load_config(f"{ROOT}/configs/balanced.py:{scale}")
        assert config.batch_size * config.seq_len == balanced.batch_size * balanced.seq_len
        assert num_steps(config) == num_steps(balanced)
        validate(config, (1, 1, 1), "gpu")


def test_the_attention_of_the_example_sees_its_window(rng, one_device):
    names = {}
    exec(EXAMPLES[1], names)
    q, k, v = (placed(x, jnp.float32) for x in rng.standard_normal((3, 1, 16, 2, 8)))
    run = jax.jit(lambda v: names["attend_window"](q, k, v, 4))
    other = np.asarray(v).copy()
    other[:, 5] += 1
    changed = np.asarray(run(v) != run(placed(other, jnp.float32))).any(axis=(0, 2, 3))
    assert changed.tolist() == [5 <= t < 9 for t in range(16)]


def fields(config: ConfigDict, path: str = "config") -> list[str]:
    found = []
    for name in config:
        value = config[name]
        inner = f"{path}.{name}"
        found += fields(value, inner) if isinstance(value, ConfigDict) else [inner]
    return found


def table() -> dict[str, tuple[str, str]]:
    """What the table of fields says: field -> (value at cpu, value at published; "" where that is the same)."""
    section = (ROOT / "configs/README.md").read_text()
    rows = re.findall(r"^\| `([\w.]*\w)` \|([^|]*)\|([^|]*)\|[^|]*\|$", section, flags=re.M)
    return {name: (cpu.strip(), published.strip()) for name, cpu, published in rows}


def as_written(value) -> str:
    """A field's value as the table writes it."""
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"{value[0]}, {value[1]}, ..., {value[-1]}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_the_table_names_every_field_with_its_value_at_both_scales():
    configs = [load_config(f"{ROOT}/configs/balanced.py:{scale}") for scale in ("cpu", "published")]
    names = [name.removeprefix("config.") for name in fields(configs[0])]
    assert sorted(table()) == sorted(names)
    for name, said in table().items():
        cpu, published = (as_written(functools.reduce(getattr, name.split("."), config)) for config in configs)
        assert said == (cpu, "" if published == cpu else published), name


@pytest.mark.parametrize("page", sorted(p.relative_to(ROOT) for p in PAGES), ids=str)
def test_files_that_a_page_names_are_there(page):
    text = (ROOT / page).read_text()
    names = re.findall(r"\]\(([\w./-]+)(#[\w-]+)?\)", text)
    assert names
    for name, anchor in names:
        file = (ROOT / page).parent / name
        assert file.exists(), name
        assert not anchor or anchor in anchors(file), anchor


def anchors(file: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.M)
    return {"#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
