"""What the backward pass of half a block keeps: arrays named where they are made. It computes the rest again."""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

KEPT = "kept"
KEPT_ONLY = jax.checkpoint_policies.save_only_these_names(KEPT)


def keep(tree: Any) -> Any:
    """The same arrays, to be kept under the policy KEPT_ONLY."""
    return jax.tree.map(lambda x: checkpoint_name(x, KEPT), tree)
