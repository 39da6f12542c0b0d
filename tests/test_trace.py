"""Where the time of a step goes: the part of the model that a kernel is of, by the names of real traces."""

import pytest

from experiments import scopes, trace

# Of two cores, by JAX 0.10; LATER of one GPU, by JAX 0.11.
JVP, BACK = "jit(train_step)/jvp(MoETransformer)", "jit(train_step)/transpose(jvp(MoETransformer))"
LAYER, AGAIN = "while/body/closed_call/layers/layers", "while/body/closed_call/layers/layers/checkpoint/layers"
LATER = "while/body/eval_jaxpr/layers/layers"
ATTENTION, EXPERTS = "mix/layers.attention", "think/layers.experts"
REAL = [
    (f"{JVP}/{LAYER}.{ATTENTION}/reduce_precision", "rest", False),
    (f"{JVP}/{LAYER}.{ATTENTION}/shard_map/closed_call/turns_3.5/while/body/...qk,...sk->...qs/dot_general",
     "attention", False),
    (f"{BACK}/{LATER}.{ATTENTION}/flash_backward_keys/pallas_call", "attention", True),
    (f"{JVP}/{LAYER}.{ATTENTION}/jit(_where)/select_n", "attention", False),  # xla
    ("jit(f)/transpose(jvp())/dot_product_attention_bwd", "attention", True),  # cuDNN's, wherever it is
    (f"{JVP}/{LAYER}.{ATTENTION}/checkpoint/shard_map/dot_general", "projections of attention", False),
    (f"{BACK}/{AGAIN}.{ATTENTION}/shard_map/dot_general", "projections of attention", True),  # the output's
    (f"{BACK}/{AGAIN}.{ATTENTION}/shard_map/reduce_sum", "attention", True),
    (f"{BACK}/{AGAIN}.{ATTENTION}/shard_map", "attention", True),  # copies in its loops
    (f"{JVP}/{LAYER}.{ATTENTION}/shard_map", "attention", False),
    ("jit(train_step)/layers/layers.mix/layers.attention/shard_map/closed_call/jit(_where)/broadcast_in_dim",
     "attention", False),
    ("jit(train_step)/layers/layers.mix/layers.attention/closed_call/add", "attention", False),  # on one device
    (f"{JVP}/{LAYER}.{ATTENTION}/checkpoint/concatenate", "projections of attention", False),
    (f"{BACK}/{AGAIN}.{ATTENTION}/checkpoint/rematted_computation/shard_map/mul", "projections of attention", True),
    (f"{BACK}/{LAYER}.{ATTENTION}/layers/layers.{ATTENTION}/checkpoint/reduce_sum",
     "projections of attention", True),
    (f"{BACK}/{AGAIN}.{EXPERTS}/shard_map/while/body/closed_call/while/body/expert/checkpoint/dot_general",
     "experts", True),
    (f"{JVP}/{LATER}.{EXPERTS}/expert/pallas_call", "experts", False),
    (f"{JVP}/{LAYER}.{EXPERTS}/shard_map/top_k", "router and dispatch", False),
    (f"{BACK}/{AGAIN}.{EXPERTS}/checkpoint/btd,de->bte/dot_general", "router and dispatch", True),
    (f"{JVP}/{LAYER}.{EXPERTS}/shard_map/reduce_sum", "router and dispatch", False),
    ("jit(train_step)/jvp()/shard_map/while/body/closed_call/dc,cv->dv/dot_general", "head and loss", False),
    ("jit(train_step)/transpose(jvp())/shard_map/mul", "head and loss", True),
    ("jit(train_step)/jvp()/jit(_threefry_split)/stack", "rest", False),
    (f"{JVP}/embed/mul", "embedding", False),
    (f"{BACK}/embed/scatter-add", "embedding", True),
    (f"{BACK}/{AGAIN}.think/shard_map/reduce_sum", "rest", True),
    (f"{JVP}/while/body/jit(dynamic_update_index_in_dim)/dynamic_update_slice", "rest", False),
    ("jit(train_step)/src,sqc->srq/dot_general", "optimizer", False),
    ("jit(train_step)/reshard", "optimizer", False),  # where it is a copy
    ("broadcast.135", "rest", False),
    ("", "not named", False),
]  # fmt: skip


@pytest.mark.parametrize(("scope", "part", "backward"), REAL)
def test_a_scope_says_which_part_of_the_model_a_kernel_is_of(scope, part, backward):
    assert scopes.part_of(scope) == (part, backward)


def test_every_rule_decides_about_a_real_scope():
    decided = {next((i for i, rule in enumerate(scopes.RULES) if rule[1].search(scope)), None) for scope, _, _ in REAL}
    assert decided == {None, *range(len(scopes.RULES))}
    assert {part for part, _, _ in scopes.RULES} | {"collectives", "not named"} == set(scopes.PARTS)


REDUCE = "jit(train_step)/(transpose(jvp())/reshard:transpose(jvp(MoETransformer))/reshard:jvp()/shard_map/psum)"
NCCL = "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"


@pytest.mark.parametrize(
    ("instruction", "kernel", "scope", "backward"),
    [
        ("all-reduce.4", "all-reduce.4", REDUCE, True),
        ("all-reduce.3", "all-reduce.3", "jit(train_step)/(reduce_sum:jvp()/shard_map/psum_invariant)", False),
        ("all-gather.1", "all-gather.1", "jit(train_step)/reshard", False),
        ("all-reduce-start.2", NCCL, REDUCE, True),
        ("async-start", "ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", "", False),
        ("reduce-scatter.7", "reduce-scatter.7", f"{BACK}/{AGAIN}.{EXPERTS}/reshard", True),
    ],
)
def test_what_devices_send_each_other_is_no_part_of_the_model(instruction, kernel, scope, backward):
    assert trace.Event(scope, kernel, 0.0, 1.0, instruction).part == ("collectives", backward)


@pytest.mark.parametrize("name", ["copy.586", "wrapped_reduce.1", "gather_bitcast_fusion.2", "ynn_fusion.160"])
def test_a_copy_or_a_sum_of_one_device_is_no_collective(name):
    assert trace.Event("jit(train_step)/reshard", name, 0.0, 1.0, name).part == ("optimizer", False)


def test_a_kernel_is_not_of_the_place_that_its_constants_were_written_for():
    """One zero serves all: what stores the experts' logits was attention's by it."""
    stored = "jit(dynamic_update_index_in_dim)/dynamic_update_slice"
    fused = [
        instruction("dynamic-update-slice.1", "dynamic-update-slice", f"{JVP}/while/body/{stored}"),
        instruction("constant.1", "constant", f"{JVP}/{LAYER}.{ATTENTION}/shard_map"),
        instruction("parameter.1", "parameter", f"{JVP}/{LAYER}.{ATTENTION}/shard_map"),
    ]
    module = computation(1, fused) + computation(2, [instruction("fusion.1", "fusion", "", called=1)])
    assert scopes.part_of(scopes._scopes(memoryview(module))["fusion.1"]) == ("rest", False)


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def field(number: int, value: bytes | int) -> bytes:
    """Of a protocol buffer."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def instruction(name: str, opcode: str, scope: str, called: int | None = None) -> bytes:
    message = field(1, name.encode()) + field(2, opcode.encode()) + field(7, field(2, scope.encode()))
    return message + (b"" if called is None else field(38, called))


def computation(number: int, instructions: list[bytes]) -> bytes:
    return field(3, b"".join(field(2, i) for i in instructions) + field(5, number))


def test_a_fused_kernel_is_of_the_part_that_its_operations_name_the_most_surely():
    kept, silu = f"{JVP}/while/body/dynamic_update_slice", f"{JVP}/{LAYER}.think/layers.experts/jit(silu)/mul"
    assert scopes.telling([kept, f"{JVP}/{LAYER}.think/layers.experts/add", silu]) == silu
    assert scopes.telling([kept]) == kept and scopes.telling([]) == ""


def test_a_trace_is_grouped_into_milliseconds_a_step():
    experts, optimizer = f"{JVP}/{LAYER}.think/layers.experts/jit(silu)/mul", "jit(train_step)/add"
    events = [
        trace.Event(experts, "fusion_1", 0.0, 2e6),
        trace.Event(experts.replace(JVP, BACK), "fusion_2", 1e6, 3e6),  # on another stream, beside the first
        trace.Event(optimizer, "fusion_3", 6e6, 1e6),
        trace.Event(optimizer, "fusion_3", 9e6, 1e6),
    ]
    found = trace.summarize(events, steps=2)
    assert found["parts"] == [
        dict(part="experts", forward_ms=1.0, backward_ms=1.5, kernels=1.0),
        dict(part="optimizer", forward_ms=1.0, backward_ms=0.0, kernels=1.0),
    ]
    assert (found["kernels"], found["busy_ms"], found["idle_ms"]) == (2.0, 3.0, 2.0)
    assert [(k["name"], k["ms"], k["kernels"]) for k in found["longest"]][:2] == [
        ("fusion_2", 1.5, 0.5),
        ("fusion_1", 1.0, 0.5),
    ]
    assert trace.summarize(events, 2, waits=False)["idle_ms"] is None


def test_time_inside_an_operation_is_counted_once():
    events = [trace.Event("", "a", 0, 10), trace.Event("", "b", 1, 4), trace.Event("", "c", 2, 1)]
    assert [(e.name, e.duration) for e in trace.less_inner(events)] == [("a", 6), ("b", 3), ("c", 1)]
