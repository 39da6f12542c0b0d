"""Checkpoints: what is restored is what was saved, or the one before; a folder belongs to one run."""

import contextlib
import gc
import json
import logging
import math
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from research import checkpoint, sharding
from research.config import ConfigError
from research.model import MoETransformer
from research.optimizer import make_optimizer
from research.step import init_state
from tests.small import model_config, small_config

# Orbax drops the other reads of a step where one has failed, and Python says so of each
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
SPECS = dict(weight=P(sharding.AXES), half=P(None, sharding.AXES), step=P(), key=P())


@pytest.fixture(scope="module", autouse=True)
def collected():
    """Those reads are gone before Python ends."""
    yield
    with warnings.catch_warnings(action="ignore"):
        gc.collect()


def mesh_of(devices: int):
    shape = dict(data=max(1, devices // 2), expert=1, seq=min(2, devices))
    return sharding.make_mesh(shape, jax.devices()[:devices])


def host_state(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return dict(
        weight=rng.standard_normal((16, 24), np.float32),
        half=rng.standard_normal((4, 8)).astype(jnp.bfloat16),
        step=np.int32(seed),
        key=rng.integers(0, 2**32, 2, np.uint32),
    )


def state(seed: int, devices: int = 1) -> dict:
    mesh = mesh_of(devices)
    return {k: jax.device_put(x, NamedSharding(mesh, SPECS[k])) for k, x in host_state(seed).items()}


def abstract(devices: int = 1) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0, devices))


def same(found, wanted) -> bool:
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


@contextlib.contextmanager
def manager_of(folder, keep_last: int = 3, keep_best: bool = False):
    with contextlib.closing(checkpoint.open_manager(str(folder), keep_last, keep_best)) as manager:
        yield manager
        manager.wait_until_finished()


def save_steps(folder, *steps: int) -> None:
    with manager_of(folder) as manager:
        for step in steps:
            checkpoint.save(manager, step, state(step), {"tokens": 100 * step}, None)


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory) -> Path:
    """A run's folder with the checkpoints of steps 1 and 2."""
    folder = tmp_path_factory.mktemp("two_saved")
    save_steps(folder, 1, 2)
    return folder


@pytest.fixture
def copied(two_saved, tmp_path) -> Path:
    shutil.copytree(two_saved, tmp_path, dirs_exist_ok=True)
    return tmp_path


def test_restored_state_and_meta_are_bitwise_those_saved(two_saved):
    assert not same(state(1), state(2))
    with manager_of(two_saved) as manager:
        found, meta = checkpoint.restore(manager, abstract())
    assert same(found, state(2)) and meta == {"tokens": 200}


def test_nothing_saved_restores_none(tmp_path):
    with manager_of(tmp_path) as manager:
        assert checkpoint.restore(manager, abstract()) is None


def test_a_step_saved_twice_stays_the_first(tmp_path):
    with manager_of(tmp_path) as manager:
        checkpoint.save(manager, 5, state(1), {}, None)
        checkpoint.save(manager, 5, state(2), {}, None)
        assert same(checkpoint.restore(manager, abstract())[0], state(1))


@pytest.mark.parametrize(("before", "after"), [(8, 2), (8, 1), (2, 1), (1, 8)])
def test_a_sharded_state_moves_to_another_number_of_devices(tmp_path, before, after):
    with manager_of(tmp_path) as manager:
        checkpoint.save(manager, 1, state(1, before), {}, None)
        found, _ = checkpoint.restore(manager, abstract(after))
    assert same(found, host_state(1))
    for name, x in found.items():
        assert x.sharding == NamedSharding(mesh_of(after), SPECS[name])
    assert found["weight"].addressable_shards[0].data.shape == (16 // after, 24)


def test_train_state_goes_from_eight_devices_over_two_to_one(tmp_path):
    """The real state, its parameters sharded, into runs of another seed."""

    def init(devices: int, seed: int):
        mesh = mesh_of(devices)
        model = MoETransformer(model_config(fsdp=True, num_layers=1, vocab_size=16))
        optimizer = make_optimizer(small_config().optimizer, 10)
        shape = tuple(mesh.shape.values())
        return mesh, jax.jit(lambda: init_state(model, optimizer, seed, shape))

    mesh, first = init(8, 1)
    with jax.set_mesh(mesh):
        wanted = first()
    assert len({str(s.index) for s in wanted.params["embedding"].addressable_shards}) == 8
    held = wanted
    for step, devices in enumerate((2, 1), 1):
        with manager_of(tmp_path) as manager:
            checkpoint.save(manager, step, held, {}, None)
            mesh, other = init(devices, 2)
            with jax.set_mesh(mesh):
                held, _ = checkpoint.restore(manager, checkpoint.abstract(other, mesh))
                if devices == 1:
                    assert not same(other(), wanted)
        assert same(held, wanted)
        assert held.params["embedding"].sharding.mesh == mesh
        shards = held.params["embedding"].addressable_shards
        assert len({str(shard.index) for shard in shards}) == len(shards) == devices


def largest(folder: Path) -> Path:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def cut_off(step: Path) -> None:
    path = largest(step / "state")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 0x10
    path.write_bytes(raw)


def half_written(step: Path) -> None:
    shutil.rmtree(step / "state" / "d")
    (step / "commit_success.txt").unlink()


def other_cursor(step: Path) -> None:
    path = step / "meta" / "metadata"
    path.write_text(path.read_text().replace('"tokens": 200', '"tokens": 300'))


DAMAGES = dict(
    cut_off=cut_off,
    deleted=lambda step: largest(step / "state").unlink(),
    flipped=lambda step: flip(largest(step / "state"), largest(step / "state").stat().st_size // 2),
    array_metadata_emptied=lambda step: (step / "state" / "_METADATA").write_text(""),
    metadata_emptied=lambda step: (step / "meta" / "metadata").write_text(""),
    cursor_changed=other_cursor,
    state_missing=lambda step: shutil.rmtree(step / "state"),
    step_metadata_emptied=lambda step: (step / "_CHECKPOINT_METADATA").write_text(""),
    loss_emptied=lambda step: (step / "metrics" / "metrics").write_text(""),
    not_committed=lambda step: (step / "commit_success.txt").unlink(),
    half_written=half_written,
    emptied=lambda step: (shutil.rmtree(step), step.mkdir()),
)
HARMLESS = ("step_metadata_emptied", "loss_emptied", "not_committed")  # all arrays are there: either step is right


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_is_skipped_and_can_be_saved_again(copied, damage, caplog):
    DAMAGES[damage](copied / "checkpoints" / "2")
    with caplog.at_level(logging.WARNING), manager_of(copied) as manager:
        found, meta = checkpoint.restore(manager, abstract())
        step = meta["tokens"] // 100
        assert same(found, state(step))
        if damage not in HARMLESS:
            assert step == 1
            assert "step 2" in caplog.text
        checkpoint.save(manager, 2, state(2), {"tokens": 200}, None)
    with manager_of(copied) as manager:
        assert same(checkpoint.restore(manager, abstract())[0], state(2))


def test_no_flipped_byte_is_trained_on(two_saved, tmp_path):
    """Whatever byte is changed in whatever file, what comes back is a state that was saved."""
    skipped = 0
    files = sorted(p for p in (two_saved / "checkpoints" / "2").rglob("*") if p.is_file())
    for number, file in enumerate(files):
        for share in (0.1, 0.5, 0.9):
            folder = tmp_path / f"{number}_{share}"
            shutil.copytree(two_saved, folder)
            flip(folder / file.relative_to(two_saved), int(share * file.stat().st_size))
            with manager_of(folder) as manager:
                found, meta = checkpoint.restore(manager, abstract())
            step = meta["tokens"] / 100
            assert step in (1, 2) and same(found, state(int(step))), file
            skipped += step == 1
    assert skipped > 3


def test_all_damaged_is_an_error_and_stays_one(copied):
    for step in (1, 2):
        cut_off(copied / "checkpoints" / str(step))
    for _ in range(2):
        with manager_of(copied) as manager, pytest.raises(RuntimeError, match="checkpoints can"):
            checkpoint.restore(manager, abstract())


@pytest.mark.parametrize(
    ("change", "said"),
    [(lambda x: x | dict(extra=x["key"]), "['extra'] is not in them, is (2,) in this code"),
     (lambda x: {n: x[n] for n in ("half", "key", "step")}, "['weight'] is (16, 24) in them, is not in this code"),
     (lambda x: x | dict(weight=x["half"]), "['weight'] is (16, 24) in them, is (4, 8) in this code")],
)  # fmt: skip
def test_checkpoints_of_another_model_are_refused_not_called_damaged(copied, change, said):
    before = sorted(copied.rglob("*"))
    with manager_of(copied) as manager, pytest.raises(ConfigError, match="another model or optimiser") as error:
        checkpoint.restore(manager, change(abstract()))
    assert said in str(error.value)
    assert sorted(copied.rglob("*")) == before


def test_state_may_be_donated_while_it_is_being_saved(tmp_path):
    wanted = np.arange(1 << 20, dtype=np.float32)
    held = {"x": jax.jit(lambda: jnp.arange(1 << 20, dtype=jnp.float32))()}
    step = jax.jit(lambda s: jax.tree.map(lambda x: -2 * x - 1, s), donate_argnums=0)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), held)
    with manager_of(tmp_path) as manager:
        checkpoint.save(manager, 1, held, {}, None)
        for _ in range(9):
            held = step(held)
        assert not same(held["x"], wanted)
        manager.wait_until_finished()
        found, _ = checkpoint.restore(manager, shapes)
    assert same(found["x"], wanted)


def save_metrics(folder, metrics: dict, keep_last: int = 1, keep_best: bool = True) -> list[int]:
    with manager_of(folder, keep_last, keep_best) as manager:
        for step, metric in metrics.items():
            checkpoint.save(manager, step, state(step), {}, metric)
        manager.wait_until_finished()
        return sorted(manager.all_steps())


def test_keep_last(tmp_path):
    kept = save_metrics(tmp_path, {1: 0.1, 2: 2.0, 3: 3.0}, keep_last=2, keep_best=False)
    assert kept == [2, 3]


def test_the_lowest_loss_is_kept_and_survives_a_resume(tmp_path):
    assert save_metrics(tmp_path, {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5}) == [2, 4]
    assert save_metrics(tmp_path, {5: 1.5, 6: 4.0}) == [2, 6]
    assert save_metrics(tmp_path, {7: 0.5, 8: 0.6}) == [7, 8]


@pytest.mark.parametrize("unknown", [math.nan, None])
def test_a_loss_that_is_not_known_is_never_the_best(tmp_path, unknown):
    assert save_metrics(tmp_path, {1: unknown, 2: 1.0, 3: unknown, 4: unknown, 5: 2.0}) == [2, 5]
    assert save_metrics(tmp_path, {6: unknown, 7: unknown}) == [2, 7]


CONFIG = dict(
    seed=1,
    seq_len=64,
    mesh=dict(data=1, seq=1),
    train=dict(steps=4, log_every=1, checkpoint_every=2, keep_last=2, keep_best=True),
    data=dict(cache_dir="", path="books"),
    eval=dict(contexts=(8, 16)),
)


def changed(**fields) -> dict:
    config = json.loads(json.dumps(CONFIG))
    for name, value in fields.items():
        group, _, field = name.rpartition("__")
        (config[group] if group else config)[field] = value
    return config


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refusal(folder, config=CONFIG, fingerprint="a") -> str:
    with pytest.raises(ConfigError) as error, checkpoint.claim_workdir(str(folder), config, fingerprint):
        pass
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def claimed(tmp_path) -> Path:
    with checkpoint.claim_workdir(str(tmp_path / "new" / "run"), CONFIG, "a"):
        pass
    return tmp_path / "new" / "run"


def test_another_config_is_refused_by_its_first_field_and_changes_nothing(claimed):
    before = contents(claimed)
    message = refusal(claimed, changed(seq_len=128, train__steps=9))
    assert "config.seq_len=128" in message and "64" in message and "steps" not in message
    message = refusal(claimed, changed(train__steps=9))
    assert "config.train.steps=9" in message and "4" in message
    assert "config.data.path='poems'" in refusal(claimed, changed(data__path="poems"))
    assert "config.dropout" in refusal(claimed, changed(dropout=0.5))
    assert contents(claimed) == before


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "mixtral"}'])
def test_a_config_that_is_not_a_runs_is_refused_and_stays(claimed, content):
    (claimed / "config.json").write_text(content)
    assert "not a run's" in refusal(claimed)
    assert (claimed / "config.json").read_text() == content


def test_another_corpus_is_refused(claimed):
    before = contents(claimed)
    assert "another corpus" in refusal(claimed, CONFIG, "b")
    assert contents(claimed) == before


@pytest.mark.parametrize(
    "fields",
    [dict(), dict(mesh__seq=4, mesh__data=2), dict(train__log_every=7, train__checkpoint_every=1),
     dict(train__keep_last=9, train__keep_best=False), dict(data__cache_dir="elsewhere")],
)  # fmt: skip
def test_what_does_not_change_the_result_may_differ(claimed, fields):
    before = contents(claimed)
    with checkpoint.claim_workdir(str(claimed), changed(**fields), "a"):
        assert contents(claimed) == before


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "--workdir" in refusal(folder)
    assert contents(tmp_path) == {"file": b""}


HOLD = """
import sys
from research import checkpoint
with checkpoint.claim_workdir(sys.argv[1], {"seed": 1}, "a"):
    print("claimed", flush=True)
    sys.stdin.read()
"""


def test_two_processes_cannot_share_a_folder(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "claimed\n"
        before = contents(tmp_path)
        assert "another process" in refusal(tmp_path, {"seed": 1})
        assert contents(tmp_path) == before
        child.kill()
    with checkpoint.claim_workdir(str(tmp_path), {"seed": 1}, "a"):
        pass  # the lock of a process that was killed holds nobody up
