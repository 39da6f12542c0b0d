"""Every field of a config, with the defaults of both scales.

`cpu`        5 M parameters: minutes on two cores, on real text, at most one epoch.
`recall`     a smaller model on the synthetic recall task, in rows of 32, 64 and 128 tokens: two minutes. In half as
             many steps some seeds learn to look up, some do not; with rows of 512 neither of 42 and 43 in 12 M tokens.
`published`  the model, shapes, optimiser and protocol of the experiment this project answers, for one GPU.
             One deviation: bfloat16 where the original used float16 with a gradient scaler.

A strategy file (balanced.py, long_seq.py, large_batch.py) names only what makes it that strategy.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

SCALES = ("cpu", "published", "recall")
TOKENS = {"cpu": 80 * 8192, "recall": 2400 * 8192}  # of a run: the same for every strategy


def get_config(scale: str = "cpu") -> ConfigDict:
    """The fields that all strategies share.

    Raises: ValueError when `scale` is not one of SCALES.
    """
    if scale not in SCALES:
        raise ValueError(f"config scale {scale!r}: choose one of {', '.join(SCALES)}")
    config = ConfigDict()
    config.strategy = "unnamed"
    config.scale = scale
    config.seed = 42
    config.batch_size = 16  # sequences a step, over all devices and accumulation; -1: all that fit memory_budget
    config.seq_len = 512  # tokens a sequence
    config.memory_budget = ""  # of one device (a CPU: of all), such as 24GiB; a larger step is refused. Empty: no limit
    config.model = _model()
    config.optimizer = _optimizer()
    config.train = _train()
    config.train.tokens = TOKENS.get(scale)
    config.data = _data()
    config.eval = _eval()
    config.mesh = _mesh()
    if scale == "published":
        _published(config)
    elif scale == "recall":
        _recall(config)
    return config


def _model() -> ConfigDict:
    return ConfigDict(
        dict(
            num_layers=4,
            d_model=128,
            num_heads=4,
            d_ff=512,  # hidden width of one expert
            num_experts=8,
            experts_per_token=2,
            vocab_size=4096,
            activation="silu",  # silu: W2 silu(W1 x); swiglu: W2 (silu(Wg x) * (W1 x))
            tie_embeddings=True,
            rope_base=10_000.0,
            norm_epsilon=1e-6,
            init_stddev=0.02,
            dropout=0.0,  # at most one epoch of data: nothing to regularise
            router_noise=0.1,  # standard deviation added to the router's logits in training
            balance_weight=0.01,
            dtype="float32",  # of the computation; parameters are float32 always
            unroll=1,  # layers a turn of the loop over layers; num_layers: no loop
            remat="none",  # none | block (recompute each block in the backward pass) | full (and each half of it)
            attention="auto",  # auto | xla | chunked | flash | cudnn
            attention_chunk=256,  # queries of a block (chunked)
            moe="auto",  # auto | blocks | tiles | ragged
            moe_block=256,  # token rows a matmul (blocks), at most (tiles)
            loss_chunk=512,  # tokens whose logits exist at once
        )
    )


def _optimizer() -> ConfigDict:
    return ConfigDict(
        dict(
            name="muon",  # muon (matrices) + AdamW (embedding, norms) | adamw (everything)
            learning_rate=0.04,  # Muon's; AdamW's where name is adamw
            adamw_learning_rate=0.03,  # of the AdamW group beside Muon
            momentum=0.95,
            muon_weight_decay=0.0,
            weight_decay=0.1,  # AdamW's
            beta1=0.9,
            beta2=0.999,
            epsilon=1e-8,
            clip_norm=1.0,  # global norm; 0: no clipping
            warmup_fraction=0.05,
            schedule="constant",  # constant | cosine | wsd (warm-up, stable, decay), all after the warm-up
            decay_fraction=0.2,  # share of the steps that wsd decays over
            final_fraction=0.0,  # of the learning rate, at the end of cosine and wsd
        )
    )


def _train() -> ConfigDict:
    return ConfigDict(
        dict(
            steps=placeholder(int),  # one of steps and tokens is set
            tokens=placeholder(int),
            stages=placeholder(tuple),  # ((128, 0.5), ...): shorter rows first, for a share of the steps; unset: none
            accumulation=1,  # microbatches a step
            eval_every=10,  # steps; 0: only at the end
            checkpoint_every=20,  # steps; 0: only at the end
            log_every=1,
            keep_last=2,  # checkpoints
            keep_best=True,  # and the one with the lowest held-out loss
        )
    )


def _data() -> ConfigDict:
    return ConfigDict(
        dict(
            source="stdlib",  # stdlib | text | jsonl | parquet | hf | recall
            path="",  # a file or folder; for hf: owner/name/config, maybe @revision
            text_field="text",  # of jsonl, parquet and hf
            protocol="clean",  # clean | published (leaks on purpose)
            shuffle_block=0,  # tokens; 0: seq_len. The longest seq_len of a study pairs its strategies
            tokenizer="bpe",  # bpe (trained on the train split) | bytes | tokenizer.json | owner/name, maybe @revision
            max_documents=0,  # 0: all
            max_document_chars=0,
            max_tokens=0,
            heldout_fraction=0.1,  # of the documents
            split_seed=42,  # of the split and the held-out targets; config.seed has the order and the weights
            mask_documents=False,  # confine attention to each document
            max_epochs=1,  # 0: no limit
            cache_dir="",  # empty: ~/.cache/batch-or-length
            recall=dict(
                documents=76_800,
                heldout_documents=128,
                document_length=256,  # tokens
                num_keys=32,  # a document binds each once at most
                num_values=16,  # chance is one of them
                num_fillers=16,
                new_share=0.1,  # of the records: new keys; the others ask for keys again
                max_gap=2,  # tokens of filler after a record, 0 to as many
                shortest=4,  # distance to where a key was last said, in tokens
                longest=128,
            ),
        )
    )


def _eval() -> ConfigDict:
    return ConfigDict(
        dict(
            contexts=(24, 48, 96, 192, 384, 768, 1536),  # tokens; beyond the training length at the end of a run only
            num_targets=4096,  # held-out tokens that are scored under every context
            run_length=96,  # neighbouring targets; shorter runs come from more documents, and cost more
            own_targets=32_768,  # of windows of the strategy's own length
            batch_tokens=8192,  # tokens scored at once
        )
    )


def _mesh() -> ConfigDict:
    return ConfigDict(
        dict(
            data=-1,  # devices over which rows are sharded; -1: what is left (a CPU: the cores that divide the rows)
            expert=1,
            seq=1,  # devices over which positions are sharded
            fsdp=False,  # shard parameters and optimiser state as well
        )
    )


def _published(config: ConfigDict) -> None:
    config.model.update(
        dict(
            num_layers=6,
            d_model=384,
            num_heads=8,
            d_ff=1536,
            vocab_size=49_152,
            dropout=0.1,
            dtype="bfloat16",
            attention_chunk=512,
            moe_block=512,
            loss_chunk=4096,
        )
    )
    config.optimizer.update(dict(learning_rate=0.03, adamw_learning_rate=0.001))
    config.train.update(dict(steps=1000, eval_every=25, checkpoint_every=100, log_every=10))
    config.data.update(
        dict(
            source="hf",
            path="HuggingFaceTB/smollm-corpus/cosmopedia-v2",
            protocol="published",
            tokenizer="HuggingFaceTB/SmolLM-135M",
            max_documents=2000,
            max_document_chars=3000,
            max_tokens=500_000,
            max_epochs=0,
        )
    )
    config.eval.update(
        dict(contexts=(48, 96, 192, 384, 768, 1536, 3072), num_targets=24_576, run_length=192, batch_tokens=32_768)
    )
    config.eval.own_targets = 50 * 26 * 1024  # the original scored 50 batches


def _recall(config: ConfigDict) -> None:
    config.model.update(dict(num_layers=2, d_model=64, num_heads=1, d_ff=128, num_experts=4, vocab_size=128))
    # At the scale of a narrow model's weights, or looking up is not learnt; a faster rotation tells neighbours apart.
    config.model.update(dict(init_stddev=0.1, rope_base=1000.0))
    config.optimizer.update(dict(learning_rate=0.01, adamw_learning_rate=0.003))
    config.train.update(dict(eval_every=200, checkpoint_every=200, log_every=5))
    config.data.source = "recall"
