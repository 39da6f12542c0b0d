"""A verdict for every claim of the original that this project answers, in its order, each by a rule over the numbers.

A rule is a function of the analysis (comparison.py) that gives a verdict and the numbers behind it. Where the numbers
are absent, or do not decide, the verdict is `not tested`, with what would tell. Nothing is taken from elsewhere.
Strategies whose rows grow are of no one length: the claims compare the others, but for the one of later extension.
"""

from collections.abc import Callable, Mapping
from typing import Any

from research.analysis import claims_batch as batch
from research.analysis import claims_context as context
from research.analysis import claims_cost as cost
from research.analysis import claims_extension as extension
from research.analysis import claims_loss as loss
from research.analysis import claims_recall as recall
from research.analysis import evidence
from research.analysis.evidence import Analysis, Judged
from research.analysis.page import Verdict

CLAIMS: tuple[tuple[str, Callable[[Analysis], Judged]], ...] = (
    ("Larger batches average over more examples: less noise, more stable training.", batch.noise),
    ("A large batch makes slower progress a step: each update explores less.", batch.progress),
    ("Small batches are noisier; the noise explores, and helps to escape poor minima.", batch.explores),
    ("Memory grows linearly with the batch: 2x batch = 2x memory.", cost.memory_of_batch),
    ("Memory grows quadratically with the length: 2x length = 4x memory.", cost.memory_of_length),
    ("Shorter sequences need less memory.", cost.memory_of_short),
    ("The three strategies use equal GPU memory.", cost.equal_memory),
    ("Longer sequences let the model learn long-range dependencies.", context.long_range),
    ("Longer sequences give a better understanding of extended context.", context.understands_context),
    ("Longer sequences hold more information per training example.", loss.more_in_a_row),
    ("Short sequences cannot learn long-range patterns.", recall.short_cannot),
    ("Longer sequences are slower per step, shorter ones faster.", cost.slower_steps),
    ("Sequence length trades context against speed.", context.context_for_speed),
    ("Validation losses of 0.06 to 0.10 and accuracies of 98 % are reached.", loss.memorised),
    ("The three train in about the same time (6.97 to 7.04 minutes).", cost.equal_time),
    ("The balanced strategy wins on validation loss.", loss.balanced_wins),
    ("Large batch trains fastest per step.", cost.fastest_step),
    ("Large batch ends with the higher final loss.", loss.large_batch_last),
    ("Long sequence shows promise but does not win on short-term metrics.", context.promise),
    ("Large batch converges faster in validation loss.", loss.falls_fastest),
    ("Validation loss does not tell the whole story.", context.whole_story),
    ("Longer sequences learn more complex patterns over time.", loss.patterns_over_time),
    ("For deep contextual understanding longer is worth a higher validation loss.", context.worth_it),
    ("In practice length is between 1024 and 4096, with extension training later.", extension.in_practice),
)


def verdicts(results: Mapping[str, Any]) -> list[Verdict]:
    """One for each of CLAIMS, from results.json's content (its `analysis`; an absent part decides nothing)."""
    analysis = results.get("analysis") or {}
    growing = evidence.growing(analysis)
    one_length = evidence.without(analysis, growing) | {"left_out": growing}
    found = []
    for claim, rule in CLAIMS:
        verdict, text = rule(analysis if rule is extension.in_practice else one_length)
        found.append(Verdict(claim, verdict, " ".join(text.split())))
    return found
