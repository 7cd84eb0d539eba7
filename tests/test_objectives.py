"""InfoNCE against loops, hand-made numbers and its own promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

from gim_stagewise.config import ObjectiveConfig
from gim_stagewise.errors import ConfigError
from gim_stagewise.objectives import InfoNCE, build_objective, check_rows
from gim_stagewise.objectives.rows import add_weighted_rows, row_products
from gim_stagewise.objectives.scores import Draw, Scores
from gim_stagewise.windows import Span


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def embeddings(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def infonce(
    channels: int,
    *,
    steps: int,
    negatives: int,
    skip: int = 1,
    seed: int = 0,
    window: int | None = None,
) -> InfoNCE:
    config = ObjectiveConfig(prediction_steps=steps, negatives=negatives, skip=skip, window=window)
    return build_objective(config, channels=channels, seed=seed, index=1)


def infonce_by_loops(
    z: Tensor, weights: Tensor, *, negatives: int, skip: int, draws: torch.Generator
) -> float:
    """Equations 3 and 4 of the paper, number by number."""
    samples, rows, columns, channels = z.shape
    numbers = z.tolist()
    everything = [
        numbers[s][r][c] for s in range(samples) for r in range(rows) for c in range(columns)
    ]
    loss = 0.0
    for k, weight in enumerate(weights.tolist(), start=1):
        pairs = [
            (numbers[s][r][c], numbers[s][r + k + skip][c])
            for s in range(samples)
            for r in range(rows - k - skip)
            for c in range(columns)
        ]
        drawn = torch.randint(len(everything), (len(pairs), negatives), generator=draws).tolist()
        terms = []
        for (context, target), others in zip(pairs, drawn, strict=True):
            bag = [target, *(everything[other] for other in others)]
            scores = [
                sum(
                    candidate[i] * weight[i][j] * context[j]
                    for i in range(channels)
                    for j in range(channels)
                )
                for candidate in bag
            ]
            terms.append(math.log(sum(math.exp(score) for score in scores)) - scores[0])
        loss += sum(terms) / len(terms)
    return loss


@settings(deadline=None, max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(2, 6), st.integers(1, 3), st.integers(1, 4)),
    steps=st.integers(1, 4),
    skip=st.integers(0, 2),
    negatives=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_loss_is_that_of_plain_loops(
    shape: tuple[int, ...], steps: int, skip: int, negatives: int, seed: int
) -> None:
    assume(steps + skip < shape[1])
    objective = infonce(shape[-1], steps=steps, negatives=negatives, skip=skip, seed=seed).double()
    z = embeddings(*shape, seed=seed, dtype=torch.float64)
    expected = infonce_by_loops(
        z, objective.W.detach(), negatives=negatives, skip=skip, draws=generator(seed)
    )
    assert objective(z, generator=generator(seed)).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("steps", "negatives"), [(1, 1), (3, 16), (5, 2)])
def test_embeddings_that_say_nothing_are_at_chance(steps: int, negatives: int) -> None:
    objective = infonce(4, steps=steps, negatives=negatives)
    loss = objective(torch.zeros(2, 7, 3, 4), generator=generator())
    assert loss.item() == pytest.approx(steps * math.log(negatives + 1), rel=1e-6)


def test_one_channel_two_rows_by_hand() -> None:
    # Context 1, target 2, W = ln 2: the positive scores e^(2·ln2·1) = 4. The one negative is the
    # context itself (e^(1·ln2·1) = 2) or the positive's own patch (4).
    objective = InfoNCE(1, prediction_steps=1, negatives=1, skip=0)
    with torch.no_grad():
        objective.W.fill_(math.log(2))
    z = torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1)
    losses = {round(objective(z, generator=generator(seed)).item(), 5) for seed in range(20)}
    assert losses == {round(math.log((4 + 2) / 4), 5), round(math.log((4 + 4) / 4), 5)}


def test_two_channels_by_hand() -> None:
    # W maps the context (1, 0) to its first column (3, 5); target (0, 1) scores 5. Every candidate
    # is the context (3) or the target (5), as the drawn indices say.
    objective = InfoNCE(2, prediction_steps=1, negatives=3, skip=0)
    with torch.no_grad():
        objective.W.copy_(torch.tensor([[[3.0, 7.0], [5.0, 11.0]]]))
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 2, 1, 2)
    drawn = torch.randint(2, (1, 3), generator=generator(4)).tolist()[0]
    bag = [5, *([3, 5][index] for index in drawn)]
    expected = math.log(sum(math.exp(score) for score in bag)) - 5
    assert objective(z, generator=generator(4)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("skip", [0, 1, 2])
@pytest.mark.parametrize("k", [1, 2])
def test_pairs_are_rows_k_and_skip_apart_in_one_column(k: int, skip: int) -> None:
    samples, rows, columns = 2, 6, 3
    places = [(s, r, c) for s in range(samples) for r in range(rows) for c in range(columns)]
    objective = infonce(3, steps=2, negatives=1, skip=skip)
    draw = objective.draws((samples, rows, columns), generator())[k - 1]
    expected = [(s, r, c) for s, r, c in places if r + k + skip < rows]
    assert [places[number] for number in draw.contexts.tolist()] == expected
    positives = [places[number] for number in draw.bag[:, 0].tolist()]
    assert positives == [(s, r + k + skip, c) for s, r, c in expected]


def test_the_skipped_row_is_in_no_pair() -> None:
    (draw,) = infonce(1, steps=1, negatives=1, skip=1).draws((1, 3, 1), generator())
    assert (draw.contexts.tolist(), draw.bag[:, 0].tolist()) == ([0], [2])


def test_negatives_come_from_every_embedding_of_the_batch() -> None:
    # Only rows 0 and 2 are in pairs, so a gradient in row 1 comes from negatives alone.
    objective = infonce(3, steps=1, negatives=400)
    z = embeddings(2, 3, 2, 3).requires_grad_()
    objective(z, generator=generator()).backward()
    assert z.grad is not None
    assert z.grad.abs().sum(dim=-1).count_nonzero() == 2 * 3 * 2


def test_the_positive_may_be_among_its_negatives() -> None:
    # The target scores 50, everything else next to nothing beside it: the loss counts how often
    # the target was drawn.
    objective = infonce(1, steps=1, negatives=400)
    with torch.no_grad():
        objective.W.fill_(1.0)
    z = torch.tensor([1.0, 0.0, 50.0]).reshape(1, 3, 1, 1)
    own = int((torch.randint(3, (1, 400), generator=generator()) == 2).sum())
    assert own > 0
    assert objective(z, generator=generator()).item() == pytest.approx(math.log(1 + own), rel=1e-5)


def test_gradients_are_those_of_finite_differences() -> None:
    objective = infonce(2, steps=2, negatives=3).double()
    weights = objective.W.detach().clone().requires_grad_()
    z = embeddings(2, 4, 2, 2, dtype=torch.float64).requires_grad_()

    def loss(z: Tensor, weights: Tensor) -> Tensor:
        value: Tensor = functional_call(objective, {"W": weights}, (z,), {"generator": generator()})
        return value

    assert torch.autograd.gradcheck(loss, (z, weights))


@pytest.mark.parametrize("scale", [1e2, 1e6, 1e15])
def test_large_scores_do_not_overflow(scale: float) -> None:
    z = (embeddings(2, 5, 2, 4) * scale).requires_grad_()
    loss = infonce(4, steps=3, negatives=8)(z, generator=generator())
    loss.backward()
    assert torch.isfinite(loss)
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()


def test_draws_come_from_the_generator_alone() -> None:
    objective, z = infonce(3, steps=2, negatives=4), embeddings(2, 5, 2, 3)
    losses = []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        losses.append(objective(z, generator=generator(7)).item())
        assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] == losses[1]
    assert losses[0] != objective(z, generator=generator(8)).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_is_one_number_of_the_embeddings_type(dtype: torch.dtype) -> None:
    objective = infonce(3, steps=2, negatives=4).to(dtype)
    loss = objective(embeddings(2, 5, 2, 3, dtype=dtype), generator=generator())
    assert loss.shape == ()
    assert loss.dtype == dtype


def test_projections_are_a_function_of_seed_and_index() -> None:
    config = ObjectiveConfig(prediction_steps=2, negatives=5, skip=0)

    def built(seed: int, index: int) -> InfoNCE:
        return build_objective(config, channels=6, seed=seed, index=index)

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = built(3, 1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(first.W, built(3, 1).W)
    assert not torch.equal(first.W, built(3, 2).W)
    assert not torch.equal(first.W, built(4, 1).W)
    assert first.W.shape == (2, 6, 6)
    assert not torch.equal(first.W[0], first.W[1])
    assert first.W.abs().max().item() <= 6**-0.5
    assert (first.negatives, first.skip) == (5, 0)


@settings(deadline=None)
@given(rows=st.integers(1, 12), steps=st.integers(1, 12), skip=st.integers(0, 4))
def test_a_grid_is_refused_if_and_only_if_a_step_has_no_pair(
    rows: int, steps: int, skip: int
) -> None:
    pairs = [(r, r + steps + skip) for r in range(rows) if r + steps + skip < rows]
    if pairs:
        check_rows(rows, prediction_steps=steps, skip=skip, key="objective.prediction_steps")
    else:
        with pytest.raises(ConfigError) as caught:
            check_rows(rows, prediction_steps=steps, skip=skip, key="objective.prediction_steps")
        assert caught.value.key == "objective.prediction_steps"


def test_a_refused_grid_is_told_the_largest_value_that_fits() -> None:
    key = "module.2.objective.prediction_steps"
    with pytest.raises(ConfigError) as caught:
        check_rows(5, prediction_steps=4, skip=1, key=key)
    message = str(caught.value)
    assert message.startswith(f"{key}: is 4, but the grid has 5 rows")
    assert "skip = 1" in message
    assert "use 3 or less" in message
    check_rows(5, prediction_steps=3, skip=1, key=key)


@pytest.mark.parametrize("rows", [1, 2])
def test_advice_can_be_followed(rows: int) -> None:
    with pytest.raises(ConfigError) as caught:
        check_rows(rows, prediction_steps=1, skip=1, key="objective.prediction_steps")
    assert "use 0" not in str(caught.value)


@pytest.mark.parametrize("piece", [1, 10**6])
@pytest.mark.parametrize("entries", [0, 3, 200])
@pytest.mark.parametrize("contiguous", [True, False])
# float64 takes other kernels than what is trained with.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_rows_are_multiplied_and_added_where_they_lie(
    device: str,
    dtype: torch.dtype,
    contiguous: bool,
    entries: int,
    piece: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gim_stagewise.objectives.rows.SUMMED_BYTES", piece)
    wide = 2 if contiguous else 3
    left, right, sums = (
        embeddings(rows, 21 * wide, dtype=dtype).to(device)[:, : 21 * 2] for rows in (7, 11, 9)
    )
    left_rows, right_rows, sum_rows = (
        torch.randint(rows, (entries,), generator=generator(rows)).to(device) for rows in (7, 11, 9)
    )
    most = 64 * torch.finfo(dtype).eps
    products = row_products(left, left_rows, right, right_rows)
    expected = (left[left_rows].double() * right[right_rows].double()).sum(1)
    torch.testing.assert_close(products.double(), expected, rtol=most, atol=most)
    terms = products[:, None].double() * right[right_rows].double()
    expected = sums.double().index_add(0, sum_rows, terms)
    add_weighted_rows(sums, sum_rows, right, right_rows, products)
    scale = expected.abs().max().clamp(min=1)
    torch.testing.assert_close(sums.double() / scale, expected / scale, rtol=most, atol=most)


@pytest.mark.parametrize("pairs", [1, 4])
@pytest.mark.parametrize("own_targets", [False, True])
def test_gradients_of_scores_are_right(own_targets: bool, pairs: int) -> None:
    z = embeddings(12, 5 if own_targets else 3, dtype=torch.float64).requires_grad_()
    weights = embeddings(2, 2 if own_targets else 3, 3, dtype=torch.float64).requires_grad_()
    draws = [
        Draw(
            step,
            Span(start, start + 6),
            start + torch.randint(6, (pairs,), generator=generator(step)),
            start + torch.randint(6, (pairs, 3), generator=generator(step)),
        )
        for start in (0, 6)
        for step in (1, 2)
    ]
    assert torch.autograd.gradcheck(
        lambda z, w: Scores.apply(z, w, draws),  # type: ignore[no-untyped-call]
        (z, weights),
    )


def test_a_window_reads_its_steps_and_draws_from_all() -> None:
    z = embeddings(2, 12, 4, dtype=torch.float64).requires_grad_()
    objective = infonce(4, steps=2, negatives=40, skip=0, window=4).double()
    loss = objective(z, generator=generator())
    draws = generator()
    start = int(torch.randint(12 - 4 + 1, (), generator=draws))
    expected = loop_loss(z, objective, Span(start, start + 4), draws=draws)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    assert z.grad is not None
    assert (z.grad.abs().sum(2) > 0).all()  # steps outside the window are negatives


def loop_loss(z: Tensor, objective: InfoNCE, window: Span, *, draws: torch.Generator) -> Tensor:
    """The loss of a window of sequences, pair by pair."""
    everything = z.flatten(0, 1)
    total = torch.zeros((), dtype=z.dtype)
    for k, weight in enumerate(objective.W, start=1):
        pairs = [
            (z[sample, step], z[sample, step + k + objective.skip])
            for sample in range(len(z))
            for step in range(window.start, window.stop - k - objective.skip)
        ]
        drawn = torch.randint(len(everything), (len(pairs), objective.negatives), generator=draws)
        for (context, target), numbers in zip(pairs, drawn.tolist(), strict=True):
            scores = torch.stack([x @ weight @ context for x in [target, *everything[numbers]]])
            total = total - scores.log_softmax(0)[0] / len(pairs)
    return total
