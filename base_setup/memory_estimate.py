"""How much memory a run will need, from ``config.json`` and the options alone: no weights, no MLX.

    peak = what lives through the run + the largest of its phases

    lives through     weights, the trained copy, the critic, adapters, the optimiser's moments
    rollouts          keys and values of every completion, the logits being sampled from
    gradient pass     activations of one micro-batch, logits of one chunk, gradients
    update            gradients, and the numbers of the part being updated

The activations are counted array by array in a block of the Llama kind (RMS norms, rotary positions, grouped keys, a
gated MLP; Qwen, Mistral, Gemma and their like differ little). On the CPU both passes stop again and again to compute
in NumPy, and what has been evaluated while it was recorded stays alive to the end; elsewhere only what the backward
pass reads is kept. ``benchmarks/memory.py`` holds the sum against MLX's own count of a real step.

Not counted: Python and the libraries themselves (0.3 to 0.5 GB), and the buffers that MLX keeps for reuse on a GPU,
which it gives back when memory runs short.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from base_setup.backend import installed_build, set_memory_limits
from config.errors import InvalidConfigurationError, ModelLoadError
from config.ppo_config import PPOConfig
from config.training_config import block_numbers

GB = 10**9
MACHINES = (8, 16, 24, 64, 128)  # GB of memory that machines come with
#: Share of a machine's memory that one program can count on: what Metal recommends as a working set.
USABLE = 0.7

FLOAT32 = 4
#: Mirrors of what the modules above this one work with; tests hold them equal.
LOGITS_AT_ONCE = 1 << 25  # token_attribution.vocabulary.CHUNK_ELEMENTS
UPDATED_AT_ONCE = 1 << 19  # training.adamw.CHUNK
EFFICIENT_TOKENS = {"cpu": 1280}  # ppo_trainer.updater.PASS_TOKENS
#: All that forward and backward pass compute on the CPU over what the forward computes alone: measured with
#: benchmarks/memory.py on three sizes, to 4 %.
WITH_BACKWARD = {"lora": 2.06, "dora": 2.06, "soft_prompt": 2.06, "full": 2.31}
DORA_ARRAYS = (
    5  # of a layer's weight's size, in DoRA's forward pass on the CPU: measured likewise, two sizes, to 5 %
)
CODED_FROM, CODED_BLOCK = 4096, 256  # training.adamw.SMALLEST, BLOCK
PASS_TOKENS = {"cpu": 32, "metal": 512, "cuda": 512}  # token_attribution.sampled_states


class Matrix(NamedTuple):
    """Linear layers of one shape: so many of them in a block."""

    inputs: int
    outputs: int
    copies: int

    @property
    def numbers(self) -> int:
        """Weights of one of them."""
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Architecture:
    """What of a ``config.json`` the memory depends on."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    experts: int  # feed-forward networks per block; 1 where there is no choice
    active_experts: int  # of them, per token
    norms: int  # numbers in the norms of one block
    weight_bytes: float  # per number of the base model's matrices, scales included
    small_bytes: int  # per number of its norms, and of activations

    @classmethod
    def from_config(cls, config: Mapping[str, Any], device: str) -> Architecture:
        """Read the keys of the Llama, Qwen and GPT families; ``device``: cpu, metal or cuda."""
        inner = config.get("text_config")
        config = {**config, **inner} if isinstance(inner, Mapping) else config
        hidden = _whole(config, "hidden_size", "n_embd", "d_model")
        heads = _whole(config, "num_attention_heads", "n_head")
        experts = _whole(config, "num_experts", "num_local_experts", "n_routed_experts", default=1)
        feed_forward = _whole(config, "intermediate_size", "n_inner", "ffn_dim", default=4 * hidden)
        if experts > 1:
            feed_forward = _whole(config, "moe_intermediate_size", default=feed_forward)
        head_dim = _whole(config, "head_dim", default=hidden // heads)
        small = FLOAT32 if device == "cpu" or config.get("torch_dtype") == "float32" else 2
        bits = config.get("quantization") or config.get("quantization_config")
        weight = float(small)
        if isinstance(bits, Mapping):
            group = _whole(bits, "group_size", default=64)
            weight = (
                _whole(bits, "bits", default=4) / 8 + 2 * small / group
            )  # a scale and a bias for each group
        kind = str(config.get("model_type", ""))
        qk_norm = 2 * head_dim if kind.startswith(("qwen3", "gemma3")) else 0
        return cls(
            hidden=hidden,
            layers=_whole(config, "num_hidden_layers", "n_layer"),
            heads=heads,
            kv_heads=_whole(config, "num_key_value_heads", default=heads),
            head_dim=head_dim,
            intermediate=feed_forward,
            vocabulary=_whole(config, "vocab_size"),
            # Gemma has one matrix for both whatever its config.json says.
            tied=kind.startswith("gemma") or bool(config.get("tie_word_embeddings", True)),
            experts=experts,
            active_experts=_whole(config, "num_experts_per_tok", default=1),
            norms=2 * hidden + qk_norm,
            weight_bytes=weight,
            small_bytes=small,
        )

    @property
    def queries(self) -> int:
        """Width of the queries of one token."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of the keys of one token; the values are as wide."""
        return self.kv_heads * self.head_dim

    @property
    def linear(self) -> list[Matrix]:
        """The linear layers of one block."""
        d, f, e = self.hidden, self.intermediate, self.experts
        return [
            Matrix(d, self.queries, 1),
            Matrix(d, self.keys, 2),
            Matrix(self.queries, d, 1),
            Matrix(d, f, 2 * e),
            Matrix(f, d, e),
        ]

    @property
    def embedding(self) -> int:
        """Numbers in the embedding; an untied head has as many again."""
        return self.vocabulary * self.hidden

    @property
    def numbers(self) -> int:
        """All parameters."""
        block = sum(m.numbers * m.copies for m in self.linear) + self.norms
        return self.layers * block + self.embedding * (1 if self.tied else 2) + self.hidden

    @property
    def weights(self) -> int:
        """Bytes of the base model as it is loaded."""
        norms = self.layers * self.norms + self.hidden
        return round((self.numbers - norms) * self.weight_bytes + norms * self.small_bytes)


def read_config(name: str) -> dict[str, Any]:
    """The parsed ``config.json`` of a model folder, or of a Hugging Face name: of that nothing else is fetched."""
    folder = Path(name).expanduser()
    path = folder / "config.json"
    if not folder.is_dir():
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name):
            raise ModelLoadError(
                f'model: there is no folder "{name}", and it is no Hugging Face name either (those look like '
                '"Qwen/Qwen3-0.6B-Base"); give one of the two'
            )
        path = _from_hub(name)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelLoadError(
            f"{path}: it cannot be read ({error.strerror}); give a folder with a model"
        ) from error
    except ValueError as error:
        raise ModelLoadError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise ModelLoadError(f"{path}: a JSON object is expected")
    return config


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json"))
    except Exception as error:  # the hub client and its transport each raise their own kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelLoadError(
            f'model: the config.json of "{name}" could not be had ({type(error).__name__}: {reason}); give a folder '
            "with one, or a Hugging Face name that can be reached"
        ) from error


def _whole(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelLoadError(f"config.json: {name} is {value!r}, a whole number from 1 up is expected")
        return value
    if default is None:
        raise ModelLoadError(f"config.json: there is no {names[0]}, which the memory estimate needs")
    return default


# The estimate --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes. Parts that live through the run, and what each phase adds to them."""

    lasting: dict[str, int]
    phases: dict[str, dict[str, int]]

    @property
    def phase(self) -> str:
        """The phase that needs most."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def parts(self) -> dict[str, int]:
        """What is alive at the peak, by name."""
        return {**self.lasting, **self.phases[self.phase]}

    @property
    def peak(self) -> int:
        """The sum of the parts."""
        return sum(self.parts.values())

    def peak_of(self, phase: str) -> int:
        """The most that this phase reaches."""
        return sum(self.lasting.values()) + sum(self.phases[phase].values())


class _Pass(NamedTuple):
    """A forward pass over ``rows`` sequences of ``length`` tokens, each token seeing at most ``span``."""

    rows: int
    length: int
    span: int
    continued: int = 0  # tokens of a shared prompt before each row

    @property
    def tokens(self) -> int:
        return self.rows * self.length


def predict(
    model: Mapping[str, Any],
    options: PPOConfig,
    *,
    critic: bool,
    device: str | None = None,
    prompt_length: int | None = None,
) -> MemoryEstimate:
    """What a run of ``PPOTrainer`` will need at most.

    Args:
        model: the contents of the model's ``config.json``.
        options: as ``resolve_config`` leaves them; ``micro_batch_size`` counts rows, None = the whole minibatch.
        critic: whether the algorithm has a value network.
        device: cpu, metal or cuda; None: what is installed here.
        prompt_length: tokens of the longest prompt; None: ``max_prompt_length``.
    """
    device = device or _installed_device()
    if device not in PASS_TOKENS:
        raise ValueError(f"device must be one of {', '.join(PASS_TOKENS)}, but it is {device}")
    if options.quantize_base is not None:
        group = options.quantize_group_size or 64
        model = {**model, "quantization": {"bits": options.quantize_base, "group_size": group}}
    arch = Architecture.from_config(model, device)
    lora = options.fine_tune_type != "full"
    trained = _trained(arch, options)
    numbers = sum(size * count for size, count in trained)
    separate = critic and options.value_network == "separate"
    networks = 2 if separate else 1
    gradients = numbers * FLOAT32
    lasting = {
        "base weights": arch.weights,
        "trained weights": 0 if lora else numbers * FLOAT32 * networks,
        "adapters": numbers * FLOAT32 * networks if lora else 0,
        "optimiser state": networks * sum(count * _moments(size, options) for size, count in trained),
        "reference": _reference(arch, options, gradients, device),
        "sampling copy": _sampling_copy(arch, options, gradients),
    }
    prompt = prompt_length or options.max_prompt_length
    every_row = options.batch_size * options.group_size
    rows = min(options.minibatch_size or every_row, every_row)
    micro = _micro_rows(options, rows, prompt, device)
    passes = _passes(micro, _prompts_of(micro, options), prompt, options.max_new_tokens, device)
    several = micro < rows
    keeps = _kept(arch, options, passes, device)
    sampled = micro * options.max_new_tokens
    logits, head_gradient = _head(arch, options, sampled, device)
    gradient_pass = {
        "activations": keeps,
        # With checkpointing the one block is computed again when the vocabulary has been left behind.
        "logits": 0 if options.gradient_checkpointing and device == "cpu" and lora else logits,
        # The sum so far, and this micro-batch's own while its graph is still there. The head's comes first.
        "gradients": (gradients if several else 0) + head_gradient,
    }
    backward = {
        "activations": min(keeps, _read_back(arch, options, passes)),
        "gradients": gradients * (2 if several else 1),
    }
    read = options.micro_batch_size or every_row  # without gradient, minibatches do not matter
    scored = _passes(read, _prompts_of(read, options), prompt, options.max_new_tokens, device)
    phases = {
        "rollouts": _rollouts(arch, options, min(every_row, options.rollout_batch_size), prompt, device),
        "scoring": _scoring(arch, scored, read * options.max_new_tokens),
        "gradient pass": max((gradient_pass, backward), key=lambda parts: sum(parts.values())),
        "update": {"gradients": gradients, "part being updated": _update_room(trained, options)},
    }
    return MemoryEstimate(lasting, phases)


def _installed_device() -> str:
    build = installed_build()
    return "cpu" if build == "source" else build


def _trained(arch: Architecture, options: PPOConfig) -> list[tuple[int, int]]:
    """Sizes of the arrays that train, and how many there are of each."""
    if options.fine_tune_type == "full":
        arrays = [(m.numbers, m.copies * arch.layers) for m in arch.linear]
        return [*arrays, (arch.embedding, 1 if arch.tied else 2), (arch.hidden, 2 * arch.layers + 1)]
    length = options.soft_prompt_length
    if length is None:  # as many as a text has tokens, at most one for each of its characters
        length = len(options.soft_prompt_text or "")
    vectors = [(length * arch.hidden, 1)] if length else []
    if options.fine_tune_type == "soft_prompt":
        return vectors
    rank, layers = options.lora_r, _adapted(arch, options)
    low_rank = [(width * rank, m.copies) for m in layers for width in (m.inputs, m.outputs)]
    dora = options.fine_tune_type == "dora"
    return low_rank + vectors + ([(m.outputs, m.copies) for m in layers] if dora else [])


def _adapted(arch: Architecture, options: PPOConfig) -> list[Matrix]:
    """The layers of the model that have an adapter; DoRA leaves experts alone."""
    blocks = arch.layers if options.lora_layers < 0 else min(options.lora_layers, arch.layers)
    if options.lora_blocks is not None:
        blocks = min(len(block_numbers(options.lora_blocks)), arch.layers)
    chosen = arch.linear[:3] if options.fine_tune_type == "dora" and arch.experts > 1 else arch.linear
    return [m._replace(copies=m.copies * blocks) for m in chosen]


def _moments(size: int, options: PPOConfig) -> int:
    """Bytes of both moments of an array."""
    if options.optimizer_bits == 8 and size >= CODED_FROM:
        return 2 * size + 2 * FLOAT32 * math.ceil(size / CODED_BLOCK)
    return 2 * FLOAT32 * size


def _reference(arch: Architecture, options: PPOConfig, trained: int, device: str) -> int:
    """What a reference has for itself: the base's arrays are shared."""
    if options.reference == "none":
        return 0
    if options.reference_path is not None:
        return arch.weights
    own = options.reference_sync_every is not None
    # The policy before its first update is in float32, which the base on a GPU need not be.
    converted = (
        options.fine_tune_type == "full" and arch.small_bytes != FLOAT32 and options.reference == "initial"
    )
    return trained if own or converted else 0


def _sampling_copy(arch: Architecture, options: PPOConfig, trained: int) -> int:
    if not options.samples_from_copy:
        return 0
    if not options.quantize_for_rollouts:
        return trained
    per_number = options.rollout_bits / 8 + 2 * arch.small_bytes / options.rollout_quant_group_size
    return round(arch.numbers * min(per_number, arch.weight_bytes))


def _micro_rows(options: PPOConfig, rows: int, prompt: int, device: str) -> int:
    """Rows of a micro-batch: as the config says, or else on the CPU as many as make ``EFFICIENT_TOKENS`` tokens."""
    limit = EFFICIENT_TOKENS.get(device)
    if options.micro_batch_size is not None or limit is None or options.reduction == "micro_batch_mean":
        return min(options.micro_batch_size or rows, rows)
    tokens = [_prompts_of(n, options) * prompt + n * (options.max_new_tokens - 1) for n in range(1, rows + 1)]
    most = max(1, sum(count <= limit for count in tokens))
    # A group stays whole where it fits into a pass.
    return most if most < options.group_size else most // options.group_size * options.group_size


def _prompts_of(rows: int, options: PPOConfig) -> int:
    """Distinct prompts among so many rows, which lie together by prompt."""
    return min(-(-rows // options.group_size), options.batch_size)


def _passes(rows: int, prompts: int, prompt: int, new: int, device: str) -> list[_Pass]:
    """The passes of one micro-batch: each distinct prompt once and then the completions, where that is less."""
    whole = prompt + new - 1
    if rows == prompts or prompts * prompt + rows * (new - 1) + PASS_TOKENS[device] >= rows * whole:
        return [_Pass(rows, whole, whole)]
    return [_Pass(prompts, prompt, prompt), _Pass(rows, new - 1, whole, prompt)]


def _linear_outputs(arch: Architecture) -> int:
    """Numbers per token that the linear layers of a block put out."""
    feed_forward = arch.intermediate * arch.active_experts
    return arch.queries + 2 * arch.keys + arch.hidden + 2 * feed_forward + arch.hidden * arch.active_experts


def _kept(arch: Architecture, options: PPOConfig, passes: list[_Pass], device: str) -> int:
    """Bytes of activations at the end of the forward pass."""
    if options.gradient_checkpointing:
        # What each block starts from, the keys that completions share, and all of the one block computed again.
        between = arch.layers * sum((arch.hidden + 2 * arch.keys) * one.tokens for one in passes)
        block = _everything(arch, options, passes) // arch.layers
        lengths = _row_lengths(arch, options, device) // arch.layers
        if device == "cpu":  # with the gradients of the block, which stay as well
            return between * FLOAT32 + round(WITH_BACKWARD[options.fine_tune_type] * block) + lengths
        return between * arch.small_bytes + block + lengths
    lengths = _row_lengths(arch, options, device)
    if device == "cpu":
        return round(WITH_BACKWARD[options.fine_tune_type] * _everything(arch, options, passes)) + lengths
    return _read_back(arch, options, passes) + lengths


def _row_lengths(arch: Architecture, options: PPOConfig, device: str) -> int:
    """Bytes of what DoRA makes of each adapted layer's whole weight to know the lengths of its rows.

    On the CPU all of it stays: update, sum, squares and what they are made of, ``DORA_ARRAYS`` of a weight's size by
    measurement. Elsewhere only an unpacked weight does, which the backward pass reads.
    """
    if options.fine_tune_type != "dora":
        return 0
    numbers = sum(m.numbers * m.copies for m in _adapted(arch, options))
    if device == "cpu":
        return DORA_ARRAYS * numbers * FLOAT32
    return numbers * arch.small_bytes if arch.weight_bytes < arch.small_bytes else 0


def _everything(arch: Architecture, options: PPOConfig, passes: list[_Pass]) -> int:
    """Every array of the forward pass, as MLX composes it on the CPU: it is evaluated while it is being recorded."""
    feed_forward = arch.intermediate * arch.active_experts
    outputs = _linear_outputs(arch)
    total = 0
    for one in passes:
        per_token = (
            8 * arch.hidden  # two norms of three arrays, two sums
            + outputs
            + 10 * arch.queries  # norm 3, rotation 4, scaled, attended, in order again
            + 7 * arch.keys  # norm 3, rotation 4
            + feed_forward  # the gated product
            + arch.heads * one.span  # scores, which become their softmax
        )
        if options.fine_tune_type in ("lora", "dora"):  # through both factors, scaled, and the sum
            per_token += 3 * outputs + 7 * options.lora_r
        if options.fine_tune_type == "dora":
            per_token += outputs  # times the magnitudes
        cached = 2 * arch.keys * one.rows * (one.continued + one.span) if one.continued else 0
        total += arch.layers * (per_token * one.tokens + cached) + 5 * arch.hidden * one.tokens
    return total * FLOAT32


def _read_back(arch: Architecture, options: PPOConfig, passes: list[_Pass]) -> int:
    """What of the forward pass the backward pass reads."""
    feed_forward = arch.intermediate * arch.active_experts
    total = 0
    for one in passes:
        per_token = (
            4 * arch.hidden  # what the norms read, and what they hand to the linear layers
            + 3 * arch.queries  # before its norm, scaled, and what attention hands to its output layer
            + 3 * arch.keys
            + 5 * feed_forward  # gate, sigmoid, their product, up, all three's product
            + arch.heads * one.span  # softmax
        )
        if options.fine_tune_type in ("lora", "dora"):
            per_token += 7 * options.lora_r
        cached = 2 * arch.keys * one.rows * one.continued
        total += arch.layers * (per_token * one.tokens + cached) + 2 * arch.hidden * one.tokens
    return total * arch.small_bytes


def _head(arch: Architecture, options: PPOConfig, sampled: int, device: str) -> tuple[int, int]:
    """Bytes of the logits with what is made of them, and of the gradients of the head's weights that are alive."""
    rows = min(sampled, max(1, LOGITS_AT_ONCE // arch.vocabulary))
    chunks = math.ceil(sampled / rows)
    full = options.fine_tune_type == "full"
    if (
        device == "cpu"
    ):  # recorded while it is evaluated: every chunk's logits stay, and what a chunk adds to the sum
        return sampled * arch.vocabulary * FLOAT32, 2 * chunks * arch.embedding * FLOAT32 * (
            full and chunks > 1
        )
    copies = 4  # logits, their logarithms, probabilities, slopes
    return copies * rows * arch.vocabulary * FLOAT32, arch.embedding * FLOAT32 * min(chunks, 2) * full


def _rollouts(arch: Architecture, options: PPOConfig, rows: int, prompt: int, device: str) -> dict[str, int]:
    """The prompts' pass; keys and values of all rows, one layer's twice while it grows; what is sampled from."""
    prompts = _Pass(min(options.batch_size, rows), prompt, prompt)
    shared = device == "cpu" and arch.small_bytes == FLOAT32  # models.prefix_cache.SharedCache
    columns = prompts.rows * prompt if shared else rows * prompt
    cache = 2 * arch.keys * (columns + rows * options.max_new_tokens) * arch.small_bytes
    return {
        "activations": _one_block(arch, prompts)
        + 2 * arch.keys * prompts.tokens * arch.layers * arch.small_bytes,
        "keys and values": cache * (arch.layers + 1),
        "logits": 3 * rows * arch.vocabulary * FLOAT32,
    }


def _scoring(arch: Architecture, passes: list[_Pass], sampled: int) -> dict[str, int]:
    """A pass without gradient: one block's arrays, the prompts' keys of all layers, and the logits of a chunk."""
    shared = passes[0].tokens if len(passes) > 1 else 0
    return {
        "activations": max(_one_block(arch, one) for one in passes)
        + 2 * arch.keys * shared * arch.layers * arch.small_bytes,
        "logits": min(sampled, max(1, LOGITS_AT_ONCE // arch.vocabulary)) * arch.vocabulary * FLOAT32,
    }


def _one_block(arch: Architecture, one: _Pass) -> int:
    """Bytes that are alive at once where nothing is kept for a backward pass."""
    feed_forward = arch.intermediate * arch.active_experts
    per_token = max(4 * feed_forward, 2 * arch.heads * one.span + 4 * arch.queries) + 4 * arch.hidden
    return per_token * one.tokens * arch.small_bytes


def _update_room(trained: list[tuple[int, int]], options: PPOConfig) -> int:
    numbers = min(sum(size * count for size, count in trained), 2 * UPDATED_AT_ONCE)
    return numbers * FLOAT32 * (5 if options.optimizer_bits == 32 else 10)


# What fits -----------------------------------------------------------------------------------------------

#: What makes a part smaller, for the sentence of a refusal.
REMEDIES = {
    "base weights": "give a smaller or a 4-bit model",
    "trained weights": 'set fine_tune_type to "lora"',
    "adapters": "lower lora_r or lora_layers",
    "optimiser state": 'set optimizer_bits to 8, or fine_tune_type to "lora"',
    "gradients": 'set fine_tune_type to "lora"',
    "activations": "lower max_prompt_length or max_new_tokens",
    "logits": "lower rollout_batch_size or max_new_tokens",
    "keys and values": "lower rollout_batch_size, max_prompt_length or max_new_tokens",
    "reference": 'set reference to "base" or "none"',
    "sampling copy": "sample from the policy itself (rollout_policy, quantize_for_rollouts)",
    "part being updated": 'set fine_tune_type to "lora"',
}


def fitting_micro_batch(
    model: Mapping[str, Any],
    options: PPOConfig,
    *,
    critic: bool,
    device: str | None = None,
    prompt_length: int | None = None,
) -> int | None:
    """The largest ``micro_batch_size`` whose predicted peak fits into ``max_memory_gb``; arguments as :func:`predict`.

    Without ``max_memory_gb``, or where it is enough, it is the config's own. One that is given is never exceeded.

    Raises:
        InvalidConfigurationError: one row is too much; the sentence says what was needed and what to change.
    """
    if options.max_memory_gb is None:
        return options.micro_batch_size

    def expected(rows: int) -> MemoryEstimate:
        part = options.replace(micro_batch_size=rows)
        return predict(model, part, critic=critic, device=device, prompt_length=prompt_length)

    budget = options.max_memory_gb * GB
    if options.micro_batch_size is None:
        own = predict(model, options, critic=critic, device=device, prompt_length=prompt_length)
        if own.peak <= budget:
            return None
    every_row = options.batch_size * options.group_size
    most = min(options.micro_batch_size or every_row, options.minibatch_size or every_row, every_row)
    if expected(most).peak <= budget:
        return most
    # Fewer rows never need more, but for the sum of gradients that a second micro-batch brings: hence `most` apart.
    least = expected(1)
    if least.peak > budget:
        part = max(least.parts, key=lambda name: least.parts[name])
        raise InvalidConfigurationError(
            f"max_memory_gb: {options.max_memory_gb:g} GB do not hold this run even with micro_batch_size = 1, where "
            f"{least.peak / GB:.2f} GB are predicted, most of it {part} ({least.parts[part] / GB:.2f} GB); raise it, "
            f"or {REMEDIES[part]}"
        )
    fits, too_many = 1, most
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if expected(middle).peak <= budget:
            fits = middle
        else:
            too_many = middle
    return fits


def within_memory(model: Mapping[str, Any], options: PPOConfig, *, critic: bool) -> PPOConfig:
    """``options`` with the ``micro_batch_size`` that fits ``max_memory_gb``; as they are where there is no such limit.

    With a limit, the buffers that MLX keeps for reuse may fill what the predicted peak leaves of it, and no more.
    """
    if options.max_memory_gb is None:
        return options
    fitted = options.replace(micro_batch_size=fitting_micro_batch(model, options, critic=critic))
    left = round(options.max_memory_gb * GB) - predict(model, fitted, critic=critic).peak
    if _installed_device() != "cpu":  # there MLX keeps 32 MiB at most
        set_memory_limits(cache_bytes=left)
    return fitted


def describe(
    model: Mapping[str, Any], options: PPOConfig, *, critic: bool, device: str | None = None
) -> list[str]:
    """The estimate as lines of text: its parts, and which machines it fits with which micro-batch."""
    device = device or _installed_device()
    estimate = predict(model, options, critic=critic, device=device)
    arch = Architecture.from_config(model, device)
    group = f" × {options.group_size} completions" if options.group_size > 1 else ""
    batch = (
        f"{options.batch_size} prompts{group}, {options.max_prompt_length} + {options.max_new_tokens} tokens"
    )
    micro = options.micro_batch_size
    title = (
        f"{options.model_name}: {_count(arch.numbers)} parameters, {options.algorithm}, {options.fine_tune_type}, "
        f"{batch}, {'all rows at once' if micro is None else f'micro_batch_size = {micro}'}, on {device}"
    )
    lines = [
        title,
        "",
        *(f"  {part:20s}{size / GB:9.3f} GB" for part, size in estimate.parts.items() if size),
    ]
    lines += [f"  {'peak':20s}{estimate.peak / GB:9.3f} GB, in the {estimate.phase}", ""]
    lines.append("  memory   of it for us   largest micro_batch_size that fits")
    for memory in MACHINES:
        room = USABLE * memory
        limited = options.replace(max_memory_gb=room)
        try:
            rows = fitting_micro_batch(model, limited, critic=critic, device=device)
            answer = "any: the default fits" if rows is None else str(rows)
        except InvalidConfigurationError:
            one = predict(model, options.replace(micro_batch_size=1), critic=critic, device=device)
            answer = f"none: one row needs {one.peak / GB:.1f} GB"
        lines.append(f"  {memory:3d} GB        {room:5.1f} GB   {answer}")
    if options.max_memory_gb is not None:
        try:
            rows = fitting_micro_batch(model, options, critic=critic, device=device)
            held = "the default" if rows is None else rows
            lines.append(f"  max_memory_gb: {options.max_memory_gb:g} GB hold micro_batch_size = {held}")
        except InvalidConfigurationError as error:
            lines.append(f"  {error}")
    return lines


def _count(numbers: int) -> str:
    return f"{numbers / 1e9:.2f} billion" if numbers >= 1e9 else f"{numbers / 1e6:.1f} million"
