"""The policy losses: the regions of the clip by hand, a NumPy loop, and identities between the algorithms."""

import mlx.core as mx
import numpy as np
import pytest

from training.policy_loss import (
    PolicyLossStatistics,
    aggregate,
    importance_ratio,
    off_policy_sequence_mask,
    policy_loss,
    policy_loss_statistics,
)

RNG = np.random.default_rng(6)
MASK = np.array(
    [
        [False, True, True, True, True, False],
        [True, True, False, False, True, True],  # a hole
        [False, False, False, False, False, False],
        [True, False, False, False, False, False],
    ]
)
OLD = RNG.normal(-2.0, 0.5, size=MASK.shape).astype(np.float32)
NEW = (OLD + RNG.normal(0.0, 0.4, size=MASK.shape)).astype(np.float32)
ADVANTAGES = RNG.normal(size=MASK.shape).astype(np.float32)
ROW_ADVANTAGES = RNG.normal(size=MASK.shape[0]).astype(np.float32)
VARIANTS = [
    {},
    {"clip_epsilon_high": 0.3},
    {"ratio": "sequence"},
    {"ratio": "sequence_product"},
    {"surrogate": "unclipped"},
    {"surrogate": "cispo"},
    {"surrogate": "cispo", "ratio_cap": 1.1},
    {"dual_clip": 1.5},
    {"delta": 1.5},
    {"surrogate": "sapo"},
    {"surrogate": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 4.0},
]
MODES = ["token_mean", "sequence_mean", "fixed_length", "sequence_sum", "micro_batch_mean"]


def loss_of(new=NEW, old=OLD, advantages=ADVANTAGES, mask=MASK, **options):
    return policy_loss(mx.array(new), mx.array(old), mx.array(advantages), mx.array(mask), **options)


def gradient_of(new=NEW, mode="token_mean", denominator=None, mask=MASK, **options):
    def total(x):
        return aggregate(loss_of(x, mask=mask, **options), mx.array(mask), mode, denominator)

    return np.array(mx.grad(total)(mx.array(new)))


def loop_ratio(new, old, mask, ratio):
    """In float64, over True positions one by one."""
    d = new.astype(np.float64) - old.astype(np.float64)
    ratios = np.ones(mask.shape)
    for i, t in np.argwhere(mask):
        row = d[i][mask[i]]
        ratios[i, t] = np.exp(
            {"token": d[i, t], "sequence": row.mean(), "sequence_product": row.sum()}[ratio]
        )
    return ratios


def loop_loss(
    new,
    old=OLD,
    advantages=ADVANTAGES,
    mask=MASK,
    *,
    clip_epsilon=0.2,
    clip_epsilon_high=None,
    ratio="token",
    surrogate="clipped",
    dual_clip=None,
    delta=None,
    ratio_cap=np.inf,
    weights=None,
    sapo_temperature_pos=1.0,
    sapo_temperature_neg=1.05,
):
    high = clip_epsilon if clip_epsilon_high is None else clip_epsilon_high
    ratios, losses = loop_ratio(new, old, mask, ratio), np.zeros(mask.shape)
    for i, t in np.argwhere(mask):
        r, a = ratios[i, t], float(advantages[i, t])
        if surrogate == "unclipped":
            losses[i, t] = -r * a
        elif (
            surrogate == "cispo"
        ):  # the weight is a constant: ``weights`` holds it still for finite differences
            w = min(r, ratio_cap) if weights is None else weights[i, t]
            losses[i, t] = -w * a * new[i, t]
        elif surrogate == "sapo":
            tau = sapo_temperature_pos if a > 0 else sapo_temperature_neg
            losses[i, t] = -a * 4 / tau / (1 + np.exp(-tau * (r - 1)))
        else:
            r_unclipped = r if delta is None else min(r, delta)
            losses[i, t] = -min(r_unclipped * a, min(max(r, 1 - clip_epsilon), 1 + high) * a)
            if dual_clip is not None and a < 0:
                losses[i, t] = min(losses[i, t], -dual_clip * a)
    return losses


def finite_differences(f, x, step=1e-6):
    gradient = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (f(up) - f(down)) / (2 * step)
    return gradient


# --- values and gradients


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_values_and_gradients_against_a_loop(options):
    assert np.allclose(np.array(loss_of(**options)), loop_loss(NEW, **options), atol=2e-6)

    weights = np.minimum(loop_ratio(NEW, OLD, MASK, "token"), options.get("ratio_cap", np.inf))
    expected = finite_differences(
        lambda x: loop_loss(x, **options, weights=weights).sum() / MASK.sum(), NEW.astype(np.float64)
    )
    assert np.allclose(gradient_of(**options), expected, atol=2e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        # loss and d loss / d logprob at clip_epsilon 0.2, clip_epsilon_high 0.3; the slope of -r A is -r A
        (1.25, 1.0, -1.25, -1.25),  # inside the higher range
        (1.5, 1.0, -1.3, 0.0),  # likelier and good: enough, flat
        (1.5, -1.0, 1.5, 1.5),  # likelier and bad: still pushed down
        (0.5, 1.0, -0.5, -0.5),  # rarer and good: still pushed up
        (0.5, -1.0, 0.8, 0.0),  # rarer and bad: enough, flat
        (1.0, -1.0, 1.0, 1.0),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_the_regions_of_the_clip(ratio, advantage, loss, slope):
    def value(x):
        one = mx.array([[True]])
        return policy_loss(
            x, mx.zeros((1, 1)), mx.array([[advantage]]), one, clip_epsilon=0.2, clip_epsilon_high=0.3
        ).sum()

    result, gradient = mx.value_and_grad(value)(mx.array([[np.log(ratio)]]))
    assert np.isclose(result.item(), loss, atol=1e-6)
    assert gradient.item() == 0.0 if slope == 0 else np.isclose(gradient.item(), slope, atol=1e-6)


def test_dual_clip_flattens_what_has_become_far_likelier_and_is_bad():
    for ratio, loss, slope in [(2.0, 2.0, 2.0), (5.0, 3.0, 0.0)]:

        def value(x):
            return policy_loss(
                x, mx.zeros((1, 1)), mx.array([[-1.0]]), mx.array([[True]]), dual_clip=3.0
            ).sum()

        result, gradient = mx.value_and_grad(value)(mx.array([[np.log(ratio)]]))
        assert np.isclose(result.item(), loss, atol=1e-5)
        assert np.isclose(gradient.item(), slope, atol=1e-5)


def test_delta_is_dual_clip_by_another_name():
    new = OLD + RNG.normal(0.0, 2.0, size=OLD.shape).astype(np.float32)
    assert np.allclose(np.array(loss_of(new, delta=2.0)), np.array(loss_of(new, dual_clip=2.0)), atol=1e-6)
    assert np.allclose(gradient_of(new, delta=2.0), gradient_of(new, dual_clip=2.0), atol=1e-6)


def test_on_policy_the_gradient_is_alive_even_with_no_room_to_clip():
    expected = np.where(MASK, -ADVANTAGES / MASK.sum(), 0)
    for options in ({}, {"clip_epsilon": 0.0}, *VARIANTS[4:]):
        assert np.allclose(gradient_of(OLD, **options), expected, atol=1e-7), options


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_only_the_logprobs_receive_gradient(options):
    def total(old, advantages):
        return policy_loss(mx.array(NEW), old, advantages, mx.array(MASK), **options).sum()

    for gradient in mx.grad(total, argnums=(0, 1))(mx.array(OLD), mx.array(ADVANTAGES)):
        assert not np.array(gradient).any()

    shared = mx.grad(lambda x: policy_loss(x, x, mx.array(ADVANTAGES), mx.array(MASK)).sum())(mx.array(NEW))
    assert np.allclose(np.array(shared), np.where(MASK, -ADVANTAGES, 0), atol=1e-6)  # ratio 1, gradient alive


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e4])
@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_garbage_at_masked_positions(options, garbage):
    new, old, advantages = (np.where(MASK, x, np.float32(garbage)) for x in (NEW, OLD, ADVANTAGES))
    for mode in MODES:
        gradient = gradient_of(new, old=old, advantages=advantages, mode=mode, **options)
        assert (gradient == gradient_of(mode=mode, **options)).all()
        assert (gradient[~MASK] == 0).all()
    dirty, clean = loss_of(new, old, advantages, **options), loss_of(**options)
    assert (np.array(dirty) == np.array(clean)).all()
    assert (np.array(dirty)[~MASK] == 0).all()


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_advantages_of_zero_give_a_gradient_of_exactly_zero(options):
    assert not gradient_of(advantages=np.zeros_like(ADVANTAGES), **options).any()


def test_extreme_ratios_stay_finite():
    for d in (-1000.0, 1000.0):
        for options in VARIANTS:
            assert np.isfinite(np.array(loss_of(OLD + d, **options))).all()
            assert np.isfinite(gradient_of(OLD + d, **options)).all()


def test_row_advantages_are_shared_by_the_row():
    tiled = np.repeat(ROW_ADVANTAGES[:, None], MASK.shape[1], axis=1)
    assert (np.array(loss_of(advantages=ROW_ADVANTAGES)) == np.array(loss_of(advantages=tiled))).all()


def test_low_precision_logprobs_are_subtracted_in_float32():
    new, old = mx.array(NEW).astype(mx.bfloat16), mx.array(OLD)
    loss = policy_loss(new, old, mx.array(ADVANTAGES), mx.array(MASK))
    assert loss.dtype == mx.float32
    assert np.allclose(np.array(loss), loop_loss(np.array(new.astype(mx.float32))), atol=2e-6)


def test_sapos_gate_fades_on_both_sides_and_sooner_at_a_higher_temperature():
    """d loss / d logprob is -4 sigma (1 - sigma) r A, by hand at tau (r - 1) = log 3: 4 * 3/4 * 1/4 = 3/4."""
    for advantage, tau in [(1.0, 1.0), (-1.0, 2.0)]:
        ratio = 1 + np.log(3) / tau

        def value(x, advantage=advantage):
            one = mx.array([[True]])
            options = {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 2.0}
            loss = policy_loss(x, mx.zeros((1, 1)), mx.array([[advantage]]), one, surrogate="sapo", **options)
            return loss.sum()

        result, gradient = mx.value_and_grad(value)(mx.array([[np.log(ratio)]]))
        assert np.isclose(result.item(), -advantage * 4 / tau * 0.75, atol=1e-5)
        assert np.isclose(gradient.item(), -advantage * 0.75 * ratio, atol=1e-5)

    far = [np.log(0.01), np.log(10.0)]  # where a hard clip has long been flat on one side, both have faded
    slopes = gradient_of(
        np.array([far], dtype=np.float32),
        old=np.zeros((1, 2), dtype=np.float32),
        advantages=np.ones((1, 2), dtype=np.float32),
        mask=np.ones((1, 2), dtype=bool),
        surrogate="sapo",
    )
    assert (np.abs(slopes) < 0.01).all()
    assert (slopes < 0).all()


# --- completions that the policy has left behind


def left_behind(new, old, advantages, mask, threshold=0.5):
    return np.array(off_policy_sequence_mask(*map(mx.array, (new, old, advantages, mask)), threshold))


def test_a_bad_completion_left_behind_is_dropped_whole():
    old = np.zeros((5, 3), dtype=np.float32)
    new = np.array(
        [
            [-0.4, -0.8, 0.0],  # 0.6 nats per token behind
            [-0.4, -0.8, 0.0],
            [-0.4, -0.4, 0.0],  # 0.4
            [0.9, 0.9, 0.0],  # far ahead
            [-1.8, 0.6, 0.0],  # 0.6 on average, although one token is likelier now
        ],
        dtype=np.float32,
    )
    advantages = np.array([-1.0, 1.0, -1.0, -1.0, -0.1], dtype=np.float32)
    mask = np.array([[True, True, False]] * 5)
    result = left_behind(new, old, advantages, mask)
    assert (result[:, :2] == np.array([0, 1, 1, 1, 0])[:, None]).all()
    assert (result[:, 2] == 1).all()
    assert (left_behind(new, old, advantages, mask, 0.61) == 1).all()
    assert (left_behind(old, old, advantages, mask, 0.0) == 1).all()  # on-policy nobody is behind


def test_with_an_advantage_per_token_the_good_tokens_of_a_dropped_row_stay():
    old, mask = np.zeros((1, 3), dtype=np.float32), np.ones((1, 3), dtype=bool)
    advantages = np.array([[-1.0, 0.0, 2.0]], dtype=np.float32)
    assert left_behind(old - 1, old, advantages, mask).tolist() == [[0.0, 1.0, 1.0]]


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -1e4])
def test_what_is_left_behind_is_judged_by_sampled_tokens_alone(garbage):
    new = OLD - 1
    clean = left_behind(new, OLD, ADVANTAGES, MASK)
    assert 0 < (clean == 0).sum() == (MASK & (ADVANTAGES < 0)).sum()
    dirty = left_behind(*(np.where(MASK, x, np.float32(garbage)) for x in (new, OLD, ADVANTAGES)), MASK)
    assert (dirty == clean).all()


def test_the_off_policy_mask_passes_no_gradient():
    def total(*arrays):
        return off_policy_sequence_mask(*arrays, mx.array(MASK), 0.1).sum()

    for gradient in mx.grad(total, argnums=(0, 1, 2))(*map(mx.array, (OLD - 1, OLD, ADVANTAGES))):
        assert not np.array(gradient).any()
    with pytest.raises(ValueError, match="threshold must be >= 0"):
        left_behind(NEW, OLD, ADVANTAGES, MASK, -0.1)


# --- sequence-level ratios


def test_each_token_of_a_sequence_receives_gspos_gradient():
    """-A_i s_i / n_i at each of the n_i tokens, for a mean over B rows."""
    options = {"ratio": "sequence", "clip_epsilon": 10.0, "advantages": ROW_ADVANTAGES}
    s, n = loop_ratio(NEW, OLD, MASK, "sequence"), np.maximum(MASK.sum(axis=1, keepdims=True), 1)
    expected = np.where(MASK, -ROW_ADVANTAGES[:, None] * s / n / len(MASK), 0)
    assert np.allclose(gradient_of(mode="sequence_mean", **options), expected, atol=1e-6)
    options["ratio"] = "sequence_product"
    product = loop_ratio(NEW, OLD, MASK, "sequence_product")
    expected = np.where(MASK, -ROW_ADVANTAGES[:, None] * product / len(MASK), 0)
    assert np.allclose(
        gradient_of(mode="sequence_mean", surrogate="unclipped", **options), expected, atol=1e-6
    )


def test_duplicating_every_token_leaves_the_sequence_ratio_unchanged():
    new, old, mask = (np.repeat(x, 2, axis=1) for x in (NEW, OLD, MASK))
    once = np.array(importance_ratio(*map(mx.array, (NEW, OLD, MASK)), "sequence"))
    twice = np.array(importance_ratio(*map(mx.array, (new, old, mask)), "sequence"))
    assert np.allclose(twice, np.repeat(once, 2, axis=1), atol=1e-6)
    product = np.array(importance_ratio(*map(mx.array, (new, old, mask)), "sequence_product"))
    assert np.abs(product[:2] - np.repeat(once, 2, axis=1)[:2]).max() > 0.01


def test_with_one_token_completions_every_ratio_is_the_token_ratio():
    mask = np.zeros(MASK.shape, dtype=bool)
    mask[np.arange(4), [1, 0, 5, 3]] = True
    for mode in ("token_mean", "sequence_mean"):
        grpo = gradient_of(mode=mode, mask=mask)
        for ratio in ("sequence", "sequence_product"):
            assert np.allclose(gradient_of(mode=mode, mask=mask, ratio=ratio), grpo, atol=1e-7)


def test_the_ratio_is_one_where_the_mask_is_false():
    for ratio in ("token", "sequence", "sequence_product"):
        assert (np.array(importance_ratio(*map(mx.array, (NEW, OLD, MASK)), ratio))[~MASK] == 1).all()


# --- aggregation


def test_the_modes_by_hand():
    per_token = mx.array([[1.0, 2.0, np.nan], [6.0, np.nan, np.nan]])
    mask = mx.array([[True, True, False], [True, False, False]])
    assert aggregate(per_token, mask, "token_mean").item() == 3.0  # (1 + 2 + 6) / 3
    assert aggregate(per_token, mask, "sequence_mean").item() == 3.75  # (1.5 + 6) / 2
    assert aggregate(per_token, mask, "fixed_length").item() == 1.5  # 9 / (2 * 3)
    assert aggregate(per_token, mask, "sequence_sum").item() == 4.5  # (1 + 2 + 6) / 2
    assert aggregate(per_token, mask, "micro_batch_mean").item() == 3.0
    for mode, numerator in zip(MODES, (9.0, 7.5, 9.0, 9.0, 9.0), strict=True):
        assert aggregate(per_token, mask, mode, denominator=30).item() == pytest.approx(numerator / 30)


def test_empty_rows_count_as_rows_but_not_as_tokens():
    per_token, mask = mx.array([[4.0], [np.nan]]), mx.array([[True], [False]])
    assert [aggregate(per_token, mask, mode).item() for mode in MODES] == [4.0, 2.0, 2.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("mode", "denominator"),
    [("token_mean", MASK.sum()), ("sequence_mean", 4), ("fixed_length", 4 * 6), ("sequence_sum", 4)],
)
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_micro_batches_add_up_to_the_whole(mode, denominator, size, ratio):
    whole = gradient_of(mode=mode, ratio=ratio)
    parts = []
    for start in range(0, 4, size):
        rows = slice(start, start + size)
        case = {"old": OLD[rows], "advantages": ADVANTAGES[rows], "mask": MASK[rows], "ratio": ratio}
        parts.append(gradient_of(NEW[rows], mode=mode, denominator=int(denominator), **case))
    assert np.allclose(np.concatenate(parts), whole, atol=1e-7)
    assert np.abs(whole).max() > 0.01


def test_a_mean_of_micro_batches_depends_on_the_split():
    """TRL's bnpo by hand: with tokens 4, 4, 0 and 1 in the rows, halves of 8 and 1 tokens weigh the same."""
    halves = []
    for rows in (slice(0, 2), slice(2, 4)):
        case = {"old": OLD[rows], "advantages": ADVANTAGES[rows], "mask": MASK[rows]}
        count = int(MASK[rows].sum()) * 2
        halves.append(gradient_of(NEW[rows], mode="micro_batch_mean", denominator=count, **case))
    whole = gradient_of(mode="token_mean") * MASK.sum()  # of the sum
    assert np.allclose(halves[0], whole[:2] / 16, atol=1e-7)
    assert np.allclose(halves[1], whole[2:] / 2, atol=1e-7)


def test_on_policy_rloo_is_reinforce():
    """The product of the ratios and the sum of the tokens have the same gradient at ratio 1, -A / B a token."""
    rloo = gradient_of(
        OLD,
        mode="sequence_mean",
        advantages=ROW_ADVANTAGES,
        ratio="sequence_product",
        surrogate="unclipped",
    )
    for surrogate in ("clipped", "unclipped", "cispo", "sapo"):
        reinforce = gradient_of(OLD, mode="sequence_sum", advantages=ROW_ADVANTAGES, surrogate=surrogate)
        assert np.allclose(reinforce, np.where(MASK, -ROW_ADVANTAGES[:, None] / 4, 0), atol=1e-6)
        assert np.allclose(reinforce, rloo, atol=1e-6)


def test_the_modes_agree_when_all_completions_fill_the_width():
    full = np.ones(MASK.shape, dtype=bool)
    gradients = {mode: gradient_of(mode=mode, mask=full) for mode in MODES}
    gradients["sequence_sum"] /= full.shape[1]
    for mode in MODES[1:]:
        assert np.allclose(gradients["token_mean"], gradients[mode], atol=1e-7)


@pytest.mark.parametrize("mode", MODES)
def test_an_all_masked_batch_moves_nothing(mode):
    nothing = np.zeros(MASK.shape, dtype=bool)
    for denominator in (None, 0, 12):
        new = np.full(MASK.shape, np.nan, dtype=np.float32)
        assert not gradient_of(new, mode=mode, mask=nothing, denominator=denominator).any()


# --- statistics


def test_statistics_by_hand():
    new = mx.log(mx.array([[0.5, 0.5, 0.75, 1.25, 1.5, 1.5, 1.0, 9.0]]))
    advantages = mx.array([[-1.0, 1.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0]])
    mask = mx.array([[True, True, True, True, True, True, True, False]])
    statistics = policy_loss_statistics(
        new, mx.zeros((1, 8)), advantages, mask, clip_epsilon=0.2, clip_epsilon_high=0.3
    )
    ratios = np.array([0.5, 0.5, 0.75, 1.25, 1.5, 1.5, 1.0])
    expected = {
        "token_count": 7,
        "clip_low": 2,  # the first and the third: rarer and bad
        "clip_high": 1,  # the fifth: likelier and good
        "clip_region": 3,
        "approx_kl": (ratios - 1 - np.log(ratios)).sum(),
        "ratio_sum": ratios.sum(),
        "ratio_min": 0.5,
        "ratio_max": 1.5,
    }
    for name, value in expected.items():
        assert getattr(statistics, name).item() == pytest.approx(value, abs=1e-6), name


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_merged_statistics_are_those_of_the_whole(ratio):
    def statistics(rows):
        return policy_loss_statistics(*(mx.array(x[rows]) for x in (NEW, OLD, ADVANTAGES, MASK)), ratio=ratio)

    merged = statistics(slice(0, 1))
    for i in range(1, 4):  # the third row is empty
        merged = merged.merge(statistics(slice(i, i + 1)))
    assert isinstance(merged, PolicyLossStatistics)
    assert np.allclose(merged, statistics(slice(0, 4)), atol=1e-6)


def test_the_extremes_are_those_of_the_sampled_tokens_alone():
    mask = mx.array([[True, True, False]])
    for low, high in [(1.5, 2.0), (0.25, 0.5)]:  # the ratio of 1 at padding is neither
        new = mx.log(mx.array([[low, high, 9.0]]))
        statistics = policy_loss_statistics(new, mx.zeros((1, 3)), mx.ones((1, 3)), mask)
        assert [statistics.ratio_min.item(), statistics.ratio_max.item()] == pytest.approx([low, high])
    nothing = policy_loss_statistics(new, mx.zeros((1, 3)), mx.ones((1, 3)), mx.zeros((1, 3), dtype=mx.bool_))
    assert [nothing.ratio_min.item(), nothing.ratio_max.item()] == [np.inf, -np.inf]
    assert not any(value.item() for value in nothing[:6])


def test_the_clip_counts_are_the_tokens_without_gradient():
    statistics = policy_loss_statistics(*map(mx.array, (NEW, OLD, ADVANTAGES, MASK)))
    assert statistics.clip_region.item() == (gradient_of()[MASK] == 0).sum() > 0


def test_with_a_cap_the_good_tokens_above_it_are_counted():
    new = mx.log(mx.array([[0.01, 1.9, 2.1, 2.1, 3.0, 3.0]]))
    advantages = mx.array([[-1.0, 1.0, 1.0, -1.0, 1.0, 1.0]])
    mask = mx.array([[True, True, True, True, True, False]])
    statistics = policy_loss_statistics(new, mx.zeros((1, 6)), advantages, mask, ratio_cap=2.0)
    assert [x.item() for x in statistics[1:4]] == [0, 2, 2]  # the third and the fifth


@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_statistics_see_no_garbage_and_pass_no_gradient(garbage):
    clean = policy_loss_statistics(*map(mx.array, (NEW, OLD, ADVANTAGES, MASK)))
    dirty = [np.where(MASK, x, np.float32(garbage)) for x in (NEW, OLD, ADVANTAGES)]
    assert np.allclose(policy_loss_statistics(*map(mx.array, (*dirty, MASK))), clean, atol=0)

    def total(new, old, advantages):
        return sum(policy_loss_statistics(new, old, advantages, mx.array(MASK)))

    for gradient in mx.grad(total, argnums=(0, 1, 2))(mx.array(NEW), mx.array(OLD), mx.array(ADVANTAGES)):
        assert not np.array(gradient).any()


def test_statistics_work_inside_a_compiled_step():
    compiled = mx.compile(lambda *case: policy_loss_statistics(*case))
    case = tuple(map(mx.array, (NEW, OLD, ADVANTAGES, MASK)))
    assert np.allclose(compiled(*case), policy_loss_statistics(*case), atol=1e-6)


def test_a_compiled_step_takes_its_denominator_as_an_array():
    def loss(new, denominator):
        per_token = policy_loss(*map(mx.array, (new, OLD, ADVANTAGES, MASK)), ratio="sequence")
        return aggregate(per_token, mx.array(MASK), "sequence_mean", denominator)

    compiled = mx.compile(mx.grad(loss))
    for denominator in (4, 8):  # a number frozen into the first trace would be used again
        gradient = np.array(compiled(mx.array(NEW), mx.array(denominator)))
        expected = gradient_of(mode="sequence_mean", denominator=denominator, ratio="sequence")
        assert np.allclose(gradient, expected, atol=1e-7)


# --- wrong arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"surrogate": "clip"}, "clipped, unclipped, cispo, sapo"),
        ({"ratio": "row"}, "token, sequence, sequence_product"),
        ({"clip_epsilon": -0.1}, "must not be negative"),
        ({"clip_epsilon_high": -0.1}, "must not be negative"),
        ({"dual_clip": 1.0}, "greater than 1"),
        ({"delta": 1.1}, "greater than 1 [+] clip_epsilon_high = 1.2"),
        ({"dual_clip": 3.0, "delta": 3.0}, "give one of them"),
        ({"surrogate": "unclipped", "dual_clip": 3.0}, "belong to the clipped surrogate"),
        ({"ratio_cap": 5.0}, "belongs to the cispo surrogate"),
        ({"surrogate": "cispo", "ratio_cap": 0.0}, "greater than 0"),
        ({"surrogate": "sapo", "sapo_temperature_neg": 0.0}, "sapo_temperature_neg 0.0 must be greater"),
        ({"surrogate": "sapo", "dual_clip": 3.0}, "belong to the clipped surrogate"),
    ],
    ids=str,
)
def test_options_that_cannot_work_or_would_not_be_read_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        loss_of(**options)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"logprobs \(4, 5\), old_logprobs \(4, 6\), mask \(4, 6\)"):
        loss_of(NEW[:, :5])
    with pytest.raises(ValueError, match=r"advantages \(3,\) must be .* mask \(4, 6\)"):
        loss_of(advantages=ADVANTAGES[:3, 0])
    with pytest.raises(ValueError, match=", ".join(MODES)):
        aggregate(mx.zeros((1, 1)), mx.array([[True]]), "mean")
