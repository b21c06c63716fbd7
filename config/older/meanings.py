"""What several of the older systems have in common: conversions, and the sentences for what is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from config.older.names import OFF, Ignored, Meaning, Missing, Ours, Renamed, Said, Together, Values

NO_TRACKER = Ignored(
    "trackers such as Weights & Biases are not available yet; every metric goes to metrics.jsonl in the run folder"
)
NO_EVALUATION = Ignored(
    "reinforcement learning is not evaluated while it trains yet (main.py evaluate judges a finished run); the "
    "supervised stages are, on all validation rows, by eval_every"
)
NO_SWITCH = Ignored("there is no such switch; it changes the speed and not what is trained")
NO_SPECULATION = Ignored(
    "speculative decoding is not available; it changes the speed and not the distribution that is sampled from"
)
NO_QUANTISED_CACHE = Missing(
    "keys and values are not quantised here, so completions are sampled from the unquantised model"
)
ALWAYS_LOGGED = Ignored("every step is logged to metrics.jsonl")


def same(ours: str) -> Renamed:
    """Ours under another name, the value as it is."""
    return Renamed(ours)


def or_off(ours: str) -> Renamed:
    """A limit for which 0 means none."""
    return Renamed(ours, lambda values, name: None if values.raw(name) in OFF else values.number(name))


def random_if_negative(values: Values) -> Iterator[Ours | Said]:
    """A seed; -1 draws one, which is written down."""
    seed = values.number("seed")
    if seed >= 0:
        yield Ours("seed", values.whole("seed"), ("seed",))
        return
    import secrets

    drawn = secrets.randbelow(1 << 31)
    yield Ours("seed", drawn, ("seed",))
    yield Said(
        ("seed",), f"{seed} asks for a random seed; drawn was {drawn}, and config.json of the run has it"
    )


def prompts_per_step(
    per_pass: str,
    passes: str,
    group: str,
    defaults: tuple[int, int, int] = (1, 1, 1),
    *,
    counts_completions: bool = False,
) -> Callable[[Values], Iterator[Ours | Said]]:
    """Prompts per pass × passes per step → ``batch_size`` prompts, ``micro_batch_size`` completions a pass.

    ``defaults``: what the system takes for each where it is not given. A supervised stage has rows, of one answer each.
    """

    def make(values: Values) -> Iterator[Ours | Said]:
        names = values.present(per_pass, passes)
        if not names:
            return
        size, count, members = (
            values.whole(name, default)
            for name, default in zip((per_pass, passes, group), defaults, strict=True)
        )
        members = max(members, 1) if values.has_groups else 1
        for name in names:
            if values.whole(name) < 1:
                values.refuse(name, "at least 1")
        completions = size if counts_completions else size * members
        prompts, rest = divmod(completions * count, members)
        if rest:
            values.refuse(
                names[0],
                f"whole groups ({per_pass} × {passes} = {completions * count} completions, a multiple of {group} = "
                f"{members})",
            )
        yield Ours("batch_size", prompts, names)
        if count > 1:
            yield Ours("micro_batch_size", completions, names)

    return make


def schedule(values: Values, name: str = "lr_schedule_config") -> Iterator[Ours | Said]:
    """mlx-lm's ``{name, arguments, warmup, warmup_init}``: the arguments are those of mlx.optimizers.schedulers."""
    if values.raw(name) in OFF:
        return
    table = values.table(name)
    kinds = {"cosine_decay": "cosine", "linear_schedule": "linear", "constant": "constant"}
    kind, arguments = table.get("name"), table.get("arguments", [])
    numbers = isinstance(arguments, list) and all(
        isinstance(x, (int, float)) and not isinstance(x, bool) for x in arguments
    )
    if not isinstance(kind, str) or kind not in kinds or not numbers:
        values.refuse(name, f"a name ({', '.join(kinds)}) and a list of numbers as arguments")
    names = (name,)
    yield Ours("lr_schedule", kinds[kind], names)
    if "learning_rate" not in values.given and arguments:
        yield Ours("learning_rate", arguments[0], names)
    elif arguments and values.number("learning_rate") != arguments[0]:
        yield Said(names, f"the schedule's peak {arguments[0]:g} is not used; learning_rate is")
    # cosine_decay(init, decay_steps, end); linear_schedule(init, end, steps)
    end, steps = (2, 1) if kind == "cosine_decay" else (1, 2)
    # What is not said is 0, or all steps, and not what a preset has.
    if kind != "constant":
        yield Ours("lr_end", arguments[end] if len(arguments) > end else 0.0, names)
        yield Ours("lr_decay_steps", arguments[steps] if len(arguments) > steps else None, names)
    yield Ours("warmup_steps", table.get("warmup", 0), names)
    if table.get("warmup_init"):
        yield Said(names, f"the warm-up starts at 1/warmup of the peak, not at {table['warmup_init']}")


SCHEDULED = "`lr_schedule`, `lr_end`, `lr_decay_steps`, `warmup_steps`"


def scheduled() -> Together:
    """The schedule as one entry of a table."""
    return Together(schedule, SCHEDULED)


def learning_rate_itself(values: Values) -> Iterator[Ours | Said]:
    """Named by a table so that the schedule sees it."""
    yield Ours("learning_rate", values.number("learning_rate"), ("learning_rate",))


def reference_model(model: str, reference: str) -> Callable[[Values], Iterator[Ours | Said]]:
    """The model, and a reference of its own where it is another one."""

    def make(values: Values) -> Iterator[Ours | Said]:
        if model in values:
            yield Ours("model_name", values.text(model), (model,))
        if values.raw(reference) not in OFF and values.raw(reference) != values.raw(model):
            yield Ours("reference_path", values.text(reference), (reference,))

    return make


def truncated_sampling(**theirs: str) -> Callable[[Values], Iterator[Ours | Said]]:
    """Ours = theirs for options that make the sampler another than the policy; then its tokens are weighted."""
    off: dict[str, Any] = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}

    def make(values: Values) -> Iterator[Ours | Said]:
        truncating = []
        for ours, name in theirs.items():
            if name not in values:
                continue
            value = off[ours] if values.raw(name) in OFF else values.number(name)
            yield Ours(ours, value, (name,))
            if value != off[ours]:
                truncating.append(name)
        if truncating:
            yield Ours("importance_correction", "token_truncate", tuple(truncating))
            yield Said(
                tuple(truncating),
                "this samples from another distribution than the policy's, which is corrected for here "
                "(importance_correction = token_truncate)",
            )

    return make


def keeping_the_end(name: str) -> Callable[[Values], Iterator[Ours | Said]]:
    """The longest prompt, of which those systems keep the end."""

    def make(values: Values) -> Iterator[Ours | Said]:
        yield Ours("max_prompt_length", values.whole(name), (name,))
        yield Ours("prompt_overflow", "keep_end", (name,))

    return make


def adapters_or_all(values: Values) -> Iterator[Ours | Said]:
    """use_lora → fine_tune_type."""
    yield Ours("fine_tune_type", "lora" if values.switch("use_lora") else "full", ("use_lora",))


def table(*entries: tuple[str | tuple[str, ...], Meaning]) -> dict[str, Meaning]:
    """A system's settings; several names may share a meaning."""
    return {
        name: meaning for names, meaning in entries for name in ([names] if isinstance(names, str) else names)
    }
