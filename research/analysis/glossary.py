"""The words of a report, for a reader who meets them there."""

from research.analysis.context import TOLERANCE

TERMS: tuple[tuple[str, str], ...] = (
    ("Strategy", "How a step's tokens are cut: B rows of T tokens. B x T is held equal, or named under Not equal."),
    (
        "Loss at context c",
        "Mean of -log p, in nats per token (perplexity is e to it), over held-out target tokens. The targets are the "
        "same for every strategy; each is predicted from c + 1 to 1.25 c tokens of its document before it.",
    ),
    (
        "Loss at own length",
        "The same over every position of windows as long as the training rows, as the original measured. Short rows "
        "are charged for their first tokens, which have no context: it does not compare strategies.",
    ),
    (
        "Raw and sliding",
        "Beyond its trained length, the raw model meets rotary positions that it never saw. A window that slides "
        "shows it no more than fits: its loss is that of the longest context within the trained length.",
    ),
    (
        "Interval",
        "95 %, for the mean over all seeds and held-out documents that might be drawn (bootstrap over documents, "
        "Student's t over seeds, in pairs: the same documents and seeds for both strategies). The train text is given.",
    ),
    (
        "Shown; Holm",
        "A difference is shown where its p value, corrected by Holm's procedure for all the comparisons of its table, "
        "is below 0.05; a gain from context, where its own interval leaves out zero. Otherwise the report says that "
        "none is shown, which is not that there is none.",
    ),
    (
        "Effective context",
        f"The shortest context from which no longer one takes more than {TOLERANCE} nats per token off the loss.",
    ),
    (
        "Pair near, far",
        "A target and the token before it are a pair. Where the same pair was seen before, it can be copied: near, "
        "from within the context that all strategies share; far, only from within a longer one. It says where a gain "
        "falls, not that it comes of copying.",
    ),
    (
        "Independent and paired order",
        "Independent: each row comes from its own place of the corpus, the common practice. Paired: at each step every "
        "strategy sees the very same tokens, cut differently.",
    ),
    (
        "Row length and diversity",
        "The two parts of a difference between strategies: what is left under paired order is the effect of the "
        "rows' length; the rest is that of the number of places that a step comes from, and, where a run does "
        "not see the whole text, that the run comes from (diversity). Both models are scored with the same context.",
    ),
    (
        "Rows that grow",
        "A run whose steps hold as many tokens throughout, cut into short rows first and into longer ones later "
        "(config.train.stages). Its trained length is that of the last.",
    ),
    (
        "Noise of the gradient",
        "How much the gradient of one piece of text differs from that of another, at fixed weights: the trace of their "
        "covariance. The noise scale is the number of tokens whose mean gradient has as much noise as signal.",
    ),
    ("Unigram entropy", "The loss of knowing only how often each token occurs. A model above it has learnt nothing."),
    (
        "Floor",
        "(ln N - H(first token)) / T: the lowest mean loss at own length of a model that has memorised N windows of T "
        "tokens. Under a split that leaks, losses near it say nothing but that.",
    ),
    ("LEAKING", "Held-out windows overlap training windows: the number measures memorisation."),
    (
        "Train seconds",
        "Steps times the median step of the least disturbed run (where rows grow, stage by stage): without "
        "compilation, evaluation and checkpoints.",
    ),
)
