"""Flat parameters: layouts, groups against naive loops, sums that keep their bits, digests."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from selffl_ray import flat as flat_module
from selffl_ray.errors import ModelError
from selffl_ray.flat import (
    GRID,
    LIMIT,
    Groups,
    ParamSpec,
    digest,
    exact_sum,
    exact_value,
    representable,
)

EXAMPLES = settings(deadline=None, derandomize=True, max_examples=100)

# The layers are interleaved, one is nested, and one parameter is a scalar without a layer name.
SPEC = ParamSpec(
    ("body.weight", "block.0.weight", "body.bias", "scale", "block.0.bias"),
    ((2, 3), (3, 2), (3,), (), (2,)),
)
LAYER_OF = ["body"] * 6 + ["block.0"] * 6 + ["body"] * 3 + ["scale"] + ["block.0"] * 2
GRANULARITIES = ("model", "layer", "parameter")


def rows(num_clients=3, spec=SPEC, seed=0, dtype=torch.float32):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(num_clients, spec.num_params))).to(dtype)


# ---------------------------------------------------------------------------------------------
# ParamSpec


def test_a_parameter_lies_behind_the_ones_before_it():
    assert SPEC.sizes == (6, 6, 3, 1, 2)
    assert SPEC.offsets == (0, 6, 12, 15, 16, 18)
    assert SPEC.num_params == 18


def test_views_have_the_shapes_and_the_coordinates_of_their_parameters():
    theta_CP = rows()
    views = SPEC.views(theta_CP)
    for view, shape, start, size in zip(views, SPEC.shapes, SPEC.offsets, SPEC.sizes, strict=False):
        assert view.shape == (3, *shape)
        for row in range(3):
            flat = [float(theta_CP[row, start + i]) for i in range(size)]
            assert view[row].flatten().tolist() == flat


def test_views_share_their_memory_with_the_rows():
    theta_CP = rows()
    SPEC.views(theta_CP)[2][1, 0] = 77.0
    assert theta_CP[1, 12] == 77.0
    theta_CP[0, 15] = -5.0
    assert SPEC.views(theta_CP)[3][0] == -5.0


def test_named_and_flatten_are_inverse_to_each_other():
    theta_P = rows(1)[0]
    named = SPEC.named(theta_P)
    assert tuple(named) == SPEC.names
    assert named["block.0.weight"].shape == (3, 2)
    assert torch.equal(SPEC.flatten(list(named.values())), theta_P)


def test_flatten_takes_the_layouts_dtype_and_leaves_the_graph():
    spec = ParamSpec(("a", "b"), ((2, 2), (1,)), torch.float64)
    params = [torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True).T, torch.tensor([5.0])]
    flat_P = spec.flatten(params)
    assert flat_P.dtype == torch.float64
    assert not flat_P.requires_grad
    assert flat_P.tolist() == [1, 3, 2, 4, 5]


def test_a_layer_is_the_name_up_to_the_last_dot():
    assert SPEC.layers == ("body", "block.0", "scale")


@pytest.mark.parametrize("wanted", [["body"], ["scale", "block.0"], []])
def test_a_mask_covers_the_coordinates_of_its_layers_and_no_others(wanted):
    mask_P = SPEC.mask(iter(wanted))
    assert mask_P.dtype == torch.bool
    assert mask_P.tolist() == [layer in wanted for layer in LAYER_OF]


def test_an_unknown_layer_is_refused_with_the_known_ones():
    with pytest.raises(ModelError, match=r"unknown layers \['haed'\].*'body', 'block.0', 'scale'"):
        SPEC.mask(["body", "haed"])


@pytest.mark.parametrize(
    ("names", "shapes", "message"),
    [
        (("a", "b"), ((1,),), "2 parameter names but 1 shapes"),
        (("a", "b", "a"), ((1,), (2,), (3,)), r"must differ, got \['a', 'b', 'a'\]"),
        ((), (), "no parameters to train"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(names, shapes, message):
    with pytest.raises(ModelError, match=message):
        ParamSpec(names, shapes)


# ---------------------------------------------------------------------------------------------
# Groups


def owners(granularity):
    """Group of each coordinate, by hand."""
    names = {"model": ["model"] * 18, "layer": LAYER_OF, "parameter": [str(i) for i in range(18)]}
    return names[granularity]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_groups_partition_the_coordinates(granularity):
    groups, owner_P = SPEC.groups(granularity), owners(granularity)
    assert list(groups.names) == list(dict.fromkeys(owner_P))
    assert groups.num_groups == len(set(owner_P))
    assert groups.sizes_G.tolist() == [owner_P.count(name) for name in groups.names]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_spread_repeats_each_groups_value_over_its_coordinates(granularity):
    groups, owner_P = SPEC.groups(granularity), owners(granularity)
    values_CG = torch.arange(2 * groups.num_groups, dtype=torch.float64).view(2, -1)
    spread_CP = groups.spread(values_CG).expand(2, 18)
    for row in range(2):
        expected = [float(values_CG[row, groups.names.index(name)]) for name in owner_P]
        assert spread_CP[row].tolist() == expected


def test_a_single_groups_value_stays_one_column():
    assert SPEC.groups("model").spread(torch.ones(4, 1)).shape == (4, 1)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_sums_and_mean_squares_agree_with_naive_loops(granularity):
    groups, owner_P = SPEC.groups(granularity), owners(granularity)
    # Large float32 numbers of both signs: sums in float32 would lose their last digits.
    rows_CP = rows() * 1e4 + 1e3
    sums_CG, squares_CG = groups.sum(rows_CP), groups.mean_square(rows_CP)
    assert sums_CG.dtype == squares_CG.dtype == torch.float64
    for row in range(3):
        values = [float(v) for v in rows_CP[row]]
        for g, name in enumerate(groups.names):
            own = [v for v, owner in zip(values, owner_P, strict=True) if owner == name]
            assert float(sums_CG[row, g]) == pytest.approx(math.fsum(own), rel=1e-13)
            mean_square = math.fsum(v * v for v in own) / len(own)
            assert float(squares_CG[row, g]) == pytest.approx(mean_square, rel=1e-13)


def test_layers_of_one_coordinate_each_are_not_taken_for_another_partition():
    """Three groups and three coordinates, but not one coordinate a group."""
    groups = Groups(("a", "b"), (1, 1, 1), (0, 1, 0))
    rows_CP = torch.tensor([[1.0, 10.0, 100.0]])
    assert groups.sum(rows_CP).tolist() == [[101.0, 10.0]]
    assert groups.spread(torch.tensor([[7.0, 8.0]])).tolist() == [[7.0, 8.0, 7.0]]


@pytest.fixture
def one_thread():
    """As in a host: with more, a long sum is split by how many rows there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_rows_group_sums_do_not_depend_on_its_neighbours(granularity):
    large = ParamSpec(("body.weight", "head", "body.bias"), ((123, 1001), (7,), (3,)))
    for spec in (SPEC, large):
        groups, rows_CP = spec.groups(granularity), rows(5, spec)
        together = groups.mean_square(rows_CP)
        for height in (1, 2):
            part = groups.mean_square(rows_CP[3 : 3 + height])
            assert torch.equal(part, together[3 : 3 + height])


# ---------------------------------------------------------------------------------------------
# Exact sums


@st.composite
def weighted_rows(draw):
    """Float32 rows with their weights, a permutation, and a group for each row."""
    count, width = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    number = st.floats(-LIMIT / 2, LIMIT / 2, width=32)
    values = draw(st.lists(number, min_size=count * width, max_size=count * width))
    weights = draw(st.lists(st.floats(0, 1), min_size=count, max_size=count))
    order = draw(st.permutations(range(count)))
    groups = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    return torch.tensor(values).view(count, width), weights, order, groups


@EXAMPLES
@given(weighted_rows())
def test_any_order_and_any_grouping_gives_the_same_bits(case):
    rows_CP, weights, order, groups = case
    total_P = exact_sum(rows_CP, weights)
    assert total_P.dtype == torch.int64
    assert torch.equal(exact_sum([rows_CP[i] for i in order], [weights[i] for i in order]), total_P)
    parts = [
        exact_sum([rows_CP[i] for i in own], [weights[i] for i in own])
        for own in ([i for i in order if groups[i] == g] for g in range(4))
        if own
    ]
    assert torch.equal(torch.stack(parts).sum(0), total_P)


@EXAMPLES
@given(weighted_rows())
def test_an_exact_sum_is_accurate_to_half_a_grid_step_a_term(case):
    rows_CP, weights, _, _ = case
    value_P = exact_value(exact_sum(rows_CP, weights))
    assert value_P.dtype == torch.float64
    for p in range(rows_CP.shape[1]):
        column = [float(v) for v in rows_CP[:, p]]
        expected = math.fsum(w * v for w, v in zip(weights, column, strict=True))
        # Half a step a term, and the rounding of products and of the result to float64.
        slack = 3 * 2.0**-53 * sum(abs(v) for v in column)
        assert abs(float(value_P[p]) - expected) <= 0.5 * GRID * len(weights) + slack


def test_plain_floating_point_sums_would_depend_on_the_order():
    rows_CP = rows(50, dtype=torch.float64)
    forward, backward = rows_CP.cumsum(0)[-1], rows_CP.flip(0).cumsum(0)[-1]
    assert not torch.equal(forward, backward)
    weights = [1.0] * 50
    assert torch.equal(exact_sum(rows_CP, weights), exact_sum(rows_CP.flip(0), weights))


def test_multiples_of_the_grid_up_to_the_limit_are_summed_without_error():
    steps = torch.tensor([0, 1, -1, 12345, 2**51 - 1, -(2**51) + 1])
    row_P = steps.to(torch.float64) * GRID
    assert representable(row_P.unsqueeze(0)).all()
    assert torch.equal(exact_sum([row_P], [1.0]), steps)
    assert torch.equal(exact_sum([row_P] * 3, [1.0] * 3), 3 * steps)
    assert torch.equal(exact_value(steps), row_P)


def test_thousands_of_terms_keep_their_sum():
    """The bias of the integer form then exceeds 64 bits and must wrap as the sum does."""
    count = 5000
    rows_CP = rows(count)
    value_P = exact_value(exact_sum(rows_CP, [1 / count] * count))
    mean_P = rows_CP.double().mean(0)
    np.testing.assert_allclose(value_P, mean_P, rtol=0, atol=0.5 * GRID * count + 1e-15)


def test_a_weight_can_differ_by_coordinate():
    rows_CP = rows(4)
    weights_CP = rows(4, seed=1, dtype=torch.float64).abs()
    value_P = exact_value(exact_sum(rows_CP, weights_CP))
    np.testing.assert_allclose(value_P, (rows_CP * weights_CP).sum(0), rtol=0, atol=4 * GRID)
    by_number = exact_sum(rows_CP, [0.25, 0.5, 0.125, 0.125])
    weights_C = torch.tensor([0.25, 0.5, 0.125, 0.125], dtype=torch.float64)
    for same in (weights_C, weights_C[:, None], weights_C[:, None].expand(4, 18)):
        assert torch.equal(exact_sum(rows_CP, same), by_number)


def terms_of(row, weights):
    """What each coordinate adds in whole steps of the grid: the product in float64, then rounded.

    One number at a time: Python rounds halves to even, and its integers have no end.
    """
    return [round(float(v) * (w / GRID)) for v, w in zip(row, weights, strict=True)]


@st.composite
def extreme_rows(draw):
    """Rows and weights (C, 1) or (C, P), near the limit and on halves of the grid too."""
    count, width = draw(st.integers(1, 40)), draw(st.integers(1, 20))
    below = np.nextafter(np.float32(LIMIT), np.float32(0)).item()
    number = st.one_of(
        st.sampled_from([below, -below, 0.0, -0.0, 2.0**-149]),
        st.integers(-(2**23), 2**23).map(lambda n: (n + 0.5) * GRID),
        st.floats(-below, below, width=32),
    )
    weight = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 0.5, 5e-324]), st.floats(-1, 1))
    columns = draw(st.sampled_from([1, width]))
    # One list each: that many draws one by one would take seconds.
    few = draw(st.lists(number, min_size=1, max_size=30))
    shares = draw(st.lists(weight, min_size=1, max_size=30))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    rows_CP = torch.from_numpy(rng.choice(few, (count, width))).float()
    return rows_CP, torch.from_numpy(rng.choice(shares, (count, columns)))


@EXAMPLES
@given(case=extreme_rows(), stretch=st.sampled_from([1, 8, 64, 2**17]))
def test_an_exact_sum_is_that_of_its_rounded_products_one_by_one(case, stretch):
    rows_CP, weight = case
    terms = [
        terms_of(row.tolist(), own.expand(len(row)).tolist())
        for row, own in zip(rows_CP, weight, strict=True)
    ]
    expected = torch.tensor([sum(column) for column in zip(*terms, strict=True)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flat_module, "BLOCK_BYTES", 8 * len(rows_CP) * stretch)
        assert torch.equal(exact_sum(rows_CP, weight), expected)
        assert torch.equal(exact_sum(list(rows_CP), weight), expected)


@pytest.mark.parametrize("count", [1, 16, 17, 32, 33, 100])
def test_an_exact_sum_is_the_same_in_stretches_of_columns_and_of_rows(monkeypatch, count):
    rows_CP = rows(count)
    weights = np.random.default_rng(0).random(count).tolist()
    whole = exact_sum(rows_CP, weights)
    alone = [exact_sum(rows_CP[at : at + 1], weights[at : at + 1]) for at in range(count)]
    assert torch.equal(torch.stack(alone).sum(0), whole)
    monkeypatch.setattr(flat_module, "BLOCK_BYTES", 1)
    assert torch.equal(exact_sum(rows_CP, weights), whole)
    monkeypatch.setattr(flat_module, "SUMMED_TOGETHER", 7)
    assert torch.equal(exact_sum(list(rows_CP), weights), whole)
    monkeypatch.setattr(flat_module, "SIDE_BY_SIDE", 3)
    assert torch.equal(exact_sum(rows_CP, weights), whole)


def test_a_block_of_terms_fits_the_cache_and_its_rows_begin_in_lines_of_their_own(monkeypatch):
    made = []
    empty = torch.empty

    def noted(size, **options):
        made.append(size)
        return empty(size, **options)

    monkeypatch.setattr(torch, "empty", noted)
    for count in (1, 2, 20, 26, 32, 100):
        exact_sum(torch.zeros(count, 79_510), [0.0] * count)
    blocks = [size for size in made if len(size) == 2]
    assert len(blocks) == 5 + math.ceil(100 / 32)
    for count, width in blocks:
        assert 8 * count * width <= flat_module.BLOCK_BYTES
        assert width >= 4000
        assert width == 79_510 or (width // 8 * 8 == width and width // 8 % 2 == 1)


def test_rows_of_any_shape_are_summed_and_rows_of_nothing_on_any_device():
    rows_CP, weights = rows(3), [0.2, 0.3, 0.5]
    whole = exact_sum(rows_CP, weights)
    assert torch.equal(exact_sum(rows_CP.view(3, 6, 3), weights), whole.view(6, 3))
    assert torch.equal(exact_sum(list(rows_CP.view(3, 6, 3)), weights), whole.view(6, 3))
    for device in ("cpu", "meta"):
        assert exact_sum(torch.zeros(3, 0, device=device), weights).shape == (0,)


def test_rows_and_weights_must_be_as_many():
    with pytest.raises(ValueError, match="3 rows and 2 weights"):
        exact_sum(rows(3), [0.5, 0.5])


def test_an_exact_sum_leaves_its_rows_as_they_were():
    rows_CP = rows(2, dtype=torch.float64)
    before = rows_CP.clone()
    exact_sum(rows_CP, [0.3, 0.7])
    assert torch.equal(rows_CP, before)


@pytest.mark.parametrize(
    ("value", "good"),
    [
        (math.nan, False),
        (math.inf, False),
        (-math.inf, False),
        (LIMIT, False),
        (-LIMIT, False),
        (np.nextafter(np.float32(LIMIT), np.float32(0)).item(), True),
        (-np.nextafter(np.float32(LIMIT), np.float32(0)).item(), True),
    ],
)
@pytest.mark.parametrize("place", [0, 7, 17])
def test_only_finite_rows_below_the_limit_are_representable(value, good, place):
    rows_CP = rows(3)
    rows_CP[1, place] = value
    assert representable(rows_CP).tolist() == [True, good, True]


@EXAMPLES
@given(
    numbers=st.lists(
        st.one_of(
            st.sampled_from([LIMIT, -LIMIT, math.nan, math.inf, 3e38, 1e-45]),
            st.floats(-LIMIT, LIMIT, width=32),
            st.floats(width=32),
        ),
        min_size=1,
        max_size=30,
    ),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_a_row_is_representable_if_each_of_its_numbers_is(numbers, seed, dtype):
    """Whatever the squares of a row add up to: most rows are told by that."""
    rng = np.random.default_rng(seed)
    rows_CP = torch.from_numpy(rng.choice(numbers, (4, 7)))
    rows_CP[0] = rows_CP[0].clamp(-1, 1).nan_to_num()
    expected = [all(abs(v) < LIMIT for v in row) for row in rows_CP.float().tolist()]
    assert representable(rows_CP.float().to(dtype)).tolist() == expected


def test_rows_whose_squares_add_up_to_more_than_the_limit_are_representable():
    rows_CP = torch.full((2, 300), LIMIT / 2)
    assert rows_CP.norm(dim=1).min() > LIMIT
    assert representable(rows_CP).tolist() == [True, True]


def test_rows_without_coordinates_are_representable():
    assert representable(torch.zeros(2, 0)).tolist() == [True, True]


# ---------------------------------------------------------------------------------------------
# Digests


def test_a_digest_depends_on_values_shapes_dtypes_order_and_numbers():
    a, b = torch.arange(6.0), torch.ones(2)
    changed = a.clone()
    changed[5] = torch.nextafter(changed[5], torch.tensor(9.0))
    cases = [
        digest([a, b]),
        digest([b, a]),
        digest([a]),
        digest([changed, b]),
        digest([a.view(2, 3), b]),
        digest([a.view(3, 2), b]),
        digest([a.double(), b]),
        digest([a.view(torch.int32), b]),
        digest([a, b, torch.zeros(0)]),
        digest([a, b], [1]),
        digest([a, b], [2]),
        digest([a, b], [1, 2]),
        digest([a, b], [2, 1]),
        digest([a, b], [12]),
        digest([a, b], ["1", "x"]),
        digest([], [1, 2]),
        digest([]),
    ]
    assert len(set(cases)) == len(cases)


def test_a_digest_does_not_depend_on_the_layout_in_memory_or_on_the_graph():
    a = torch.arange(6.0).view(2, 3)
    assert digest([a.T.contiguous().T]) == digest([a.clone().requires_grad_()]) == digest([a])


def test_a_digest_is_that_of_dtype_shape_and_bytes():
    parts = [torch.arange(6.0).view(2, 3), torch.tensor(5), torch.zeros(0, 2), torch.ones(3).bool()]
    sha = hashlib.sha256()
    for part, name in zip(parts, ("<f4(2, 3)|", "<i8()|", "<f4(0, 2)|", "|b1(3,)|"), strict=True):
        sha.update(name.encode() + part.numpy().tobytes())
    sha.update(b"1|x")
    assert digest(parts, [1, "x"]) == sha.hexdigest()


def test_negative_zero_and_nan_payloads_are_different_bits():
    assert digest([torch.tensor([0.0])]) != digest([torch.tensor([-0.0])])
    assert digest([torch.tensor([math.nan])]) == digest([torch.tensor([math.nan])])
