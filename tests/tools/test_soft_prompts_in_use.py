"""A trained soft prompt in generate and chat: the tokens of the run's own rollouts, also in a fresh process."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import main
from base_setup.soft_prompt import first_rows, set_soft_prompt
from config.decoding_config import DecodingConfig
from config.ppo_config import PPOConfig
from experience_buffer.data_structures import Prompt
from models.sft_model import LanguageModel, build_embedded, share_weights
from ppo_trainer.ppo_trainer import PPOTrainer
from tests.conftest import TINY
from tools.chatting import Conversation
from tools.generating import Answer, answer_to, generate
from tools.loading import load_for_use

LIVELY = replace(TINY, init_std=0.3)  # with smaller weights the likeliest token is the last one again
ROOT = Path(__file__).parents[2]
TEXTS = ["ab", "abcdef", "x"]
KINDS: dict[str, dict[str, Any]] = {
    "alone": {"fine_tune_type": "soft_prompt", "soft_prompt_text": "Say:"},
    "with lora": {"soft_prompt_tokens": 3},
}
TALK = ["one", "two", "three"]
HOW: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "drawn": {"temperature": 1.0, "top_p": 1.0},
    "all samplers": {
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 30,
        "min_p": 0.02,
        "repetition_penalty": 1.5,
        "logit_bias": {65: 2.0},
    },
    "one by one": {"temperature": 0, "presence_penalty": 2.0, "frequency_penalty": 1.0},
}
#: What a user's own program does, in a process that knows nothing but the folder.
FRESH = """
import json, sys
from config.decoding_config import DecodingConfig
from tools.chatting import Conversation
from tools.generating import answer_to, generate
from tools.loading import base_of, load_for_use

prompts, talk, hows = json.loads(sys.argv[2])
said = []
for folder in sys.argv[1].split(","):
    model = load_for_use(base_of(folder), folder)
    found = {}
    for name, options in hows.items():
        if "logit_bias" in options:
            options["logit_bias"] = {int(k): v for k, v in options["logit_bias"].items()}
        how = DecodingConfig(max_tokens=8, seed=3, **options)
        found[name] = [one.ids for one in generate(model, prompts, how)]
        assert [answer_to(model, ids, how, prompt=i).ids for i, ids in enumerate(prompts)] == found[name]
    chat = Conversation(model, DecodingConfig(max_tokens=8, temperature=0))
    said.append([found, ["".join(chat.say(text)) for text in talk]])
print(json.dumps(said))
"""


class Run(NamedTuple):
    """A run's folder and what its policy says."""

    folder: Path
    trainer: PPOTrainer
    prompts: list[list[int]]

    def rollouts(self, **sampling: Any) -> list[tuple[int, ...]]:
        """Through the trainer's own generator, with the random numbers of its step 0."""
        generator = self.trainer.generator
        generator.sampling = generator.sampling._replace(**sampling)
        prompts = [Prompt(i, TEXTS[i], tuple(ids)) for i, ids in enumerate(self.prompts)]
        return [one.completion_ids for one in generator.generate(prompts, 0, group_size=1)]


@pytest.fixture(scope="module")
def runs(make_config: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Each kind after a step of training so large that the vectors are far from where they began."""
    found = {}
    for kind, options in KINDS.items():
        folder = tmp_path_factory.mktemp("soft") / "run"
        config = make_config(
            PPOConfig,
            embedded_model=LIVELY,
            algorithm="grpo",
            batch_size=3,
            group_size=4,
            max_new_tokens=8,
            learning_rate=0.1,
            seed=3,
            output_dir=str(folder),
            verbose=False,
            **options,
        )
        trainer = PPOTrainer(
            config, reward_model=lambda completions, **columns: [float(len(set(c))) for c in completions]
        )
        trainer.train(TEXTS, num_epochs=2)
        ids = [trainer.policy.tokenizer.encode(text) for text in TEXTS]
        found[kind] = Run(folder, trainer, ids)
    return found


@pytest.fixture(scope="module")
def fresh(runs: dict[str, Run]) -> dict[str, Any]:
    """What a fresh process says from each folder: completions by sampler, and replies."""
    folders = ",".join(str(run.folder) for run in runs.values())
    question = json.dumps([next(iter(runs.values())).prompts, TALK, HOW])
    done = subprocess.run(
        [sys.executable, "-c", FRESH, folders, question], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(runs, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_process_says_what_the_runs_own_rollouts_do(
    runs: dict[str, Run], fresh: dict[str, Any], kind: str
) -> None:
    completions, _ = fresh[kind]
    for name in ("greedy", "drawn", "all samplers"):
        how = DecodingConfig(**HOW[name])
        expected = runs[kind].rollouts(
            temperature=how.temperature,
            top_p=how.top_p,
            top_k=how.top_k,
            min_p=how.min_p,
            repetition_penalty=how.repetition_penalty,
            logit_bias=tuple((how.logit_bias or {}).items()),
        )
        assert [tuple(ids) for ids in completions[name]] == expected, name
    # Without its vectors the model says something else, so the equality above is worth something.
    base = load_for_use(str(runs[kind].folder / "final" / "base"))
    how = DecodingConfig(max_tokens=8, **HOW["greedy"])
    assert [list(one.ids) for one in generate(base, runs[kind].prompts, how)] != completions["greedy"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_commands_say_it_too(
    runs: dict[str, Run],
    fresh: dict[str, Any],
    kind: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The base need not be named: the run says what it was trained on."""
    words = ["--adapter-path", str(runs[kind].folder), "--temp", "0", "-m", "8"]
    prompts = [word for text in TEXTS for word in ("-p", text)]
    output = tmp_path / "answers.jsonl"
    assert main.main(["generate", *words, *prompts, "--output", str(output)]) == 0
    decode = runs[kind].trainer.policy.tokenizer.decode
    expected = [decode(ids, skip_special_tokens=True) for ids in fresh[kind][0]["greedy"]]
    assert [json.loads(line)["completion"] for line in output.open()] == expected
    capsys.readouterr()
    assert main.main(["generate", *words, "-p", TEXTS[1], "--stream"]) == 0
    assert capsys.readouterr().out == expected[1] + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(TALK)))
    assert main.main(["chat", *words]) == 0
    assert capsys.readouterr().out == "".join(reply + "\n" for reply in fresh[kind][1])


def led_by(tiny: LanguageModel, ids: list[int]) -> LanguageModel:
    """A model whose soft prompt says what the tokens ``ids`` would."""
    model = share_weights(tiny.model)
    set_soft_prompt(model, first_rows(model, None, ids, seed=0))
    return LanguageModel(model, tiny.tokenizer, tiny.config, "x")


@pytest.mark.parametrize("options", HOW.values(), ids=HOW)
def test_vectors_do_what_their_tokens_do_in_every_sampler(
    tiny: LanguageModel, options: dict[str, Any]
) -> None:
    """Penalties and biases look at tokens; a vector is none, so the plain model's are told to look no further."""
    how = DecodingConfig(max_tokens=12, seed=5, penalty_context=2, **options)
    lead, prompts = [7, 3, 11], [[40, 41, 42], [50, 51]]
    led = led_by(tiny, lead)
    found = generate(led, prompts, how, members=2)
    assert found == generate(tiny, [lead + ids for ids in prompts], how, members=2)
    singly = [answer_to(led, ids, how, prompt=i, member=m) for i, ids in enumerate(prompts) for m in (0, 1)]
    assert found == singly
    assert all(isinstance(one, Answer) for one in found)


@pytest.mark.parametrize("penalty", [1.0, 1.6])
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_a_conversation_with_its_cache_says_what_one_without_does(rows: int, penalty: float) -> None:
    """Columns of the vectors are no tokens, and penalties see what the cache holds."""
    base = build_embedded(LIVELY, seed=1)
    base = led_by(base, [7, 3, 11, 20, 90][:rows]) if rows else base
    how = DecodingConfig(max_tokens=6, temperature=0, repetition_penalty=penalty, penalty_context=60)
    cached, plain = Conversation(base, how), Conversation(base, how)
    for text in ("one", "two", "three"):
        plain._cached = []
        assert list(cached.say(text)) == list(plain.say(text))
        assert cached._cache[0].offset == rows + len(cached._cached)
        assert cached._columns_of_tokens() == len(cached._cached)
    # An exchange taken back: what the cache shares with the new prompt stays, the vectors among it.
    cached.messages, plain.messages, plain._cached = cached.messages[:2], plain.messages[:2], []
    before = cached._cache
    assert list(cached.say("other")) == list(plain.say("other"))
    assert cached._cache is before


@pytest.mark.parametrize("rows", [0, 3])
def test_penalties_see_what_the_cache_holds(tiny: LanguageModel, rows: int) -> None:
    # "q" is said in the first message alone, which the second turn reads from the cache, and is likely otherwise.
    base = led_by(tiny, [7, 3, 11][:rows]) if rows else tiny
    [letter] = base.tokenizer.encode("q")
    for penalty, is_drawn in ((1e4, False), (0.0, True)):
        options: dict[str, Any] = {"logit_bias": {letter: 100.0}, "penalty_context": 200}
        how = DecodingConfig(max_tokens=3, temperature=0, presence_penalty=penalty, **options)
        talk = Conversation(base, how)
        list(talk.say("qqq"))
        talk.messages[-1]["content"] = "no"
        asked, _ = talk._fitting([*talk.messages, {"role": "user", "content": "two"}])
        list(talk.say("two"))
        assert talk._cached[: len(asked)] == asked
        assert (letter in talk._cached[len(asked) :]) == is_drawn
