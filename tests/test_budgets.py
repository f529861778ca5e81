"""Plans of head budgets: how slots are divided, and which files and models are refused."""

import dataclasses
import json
import random
from types import SimpleNamespace

import pytest

from checkpoints import make_requests
from h2optimizer.utils.budgets import UNIT, GivenBudgets, HeadBudgets, MeasuredBudgets, request_fingerprint
from h2optimizer.utils.requests import Request

WIDTHS = (16, 64, 256)
WINDOWS = (2, 3, 4, 5, 16, 63, 64, 65, 256, 1000, 4096)


def measured(layers=5, heads=3, seed=0, **fields) -> MeasuredBudgets:
    """Losses of any shape: they may rise with the width, as noise does, and fall late, which no convex curve does."""
    draw = random.Random(seed)
    losses = tuple(tuple(tuple(10 ** draw.uniform(-8, 1) for _ in WIDTHS) for _ in range(heads)) for _ in range(layers))
    return MeasuredBudgets(widths=WIDTHS, losses=losses, **fields)


def given(layers=5, heads=3, seed=0) -> GivenBudgets:
    draw = random.Random(seed)
    return GivenBudgets(shares=tuple(tuple(draw.uniform(0.01, 9) for _ in range(heads)) for _ in range(layers)))


def flat(windows) -> list[int]:
    return [slots for layer in windows for slots in layer]


def refined(layers=5, heads=3, seed=0) -> MeasuredBudgets:
    """A plan with windows of 4 and 60 that were measured together; the wider ones follow from the losses."""
    plan = measured(layers, heads, seed)
    return dataclasses.replace(plan, refined=(((UNIT,) * heads,) * layers, plan.windows(60)))


@pytest.mark.parametrize("make", [measured, given, refined])
@pytest.mark.parametrize("seed", range(4))
def test_windows_have_the_mean_and_only_grow(make, seed):
    """Slots that get lost or are given out twice, a head with none, a head that loses slots when all get more."""
    plan, before = make(seed=seed), [0] * 15
    for window in WINDOWS:
        windows = plan.windows(window)
        assert (len(windows), *map(len, windows)) == (5, 3, 3, 3, 3, 3)
        slots = flat(windows)
        assert all(type(of) is int for of in slots)
        assert sum(slots) == window * 15 and min(slots) >= 2
        assert all(now >= then for now, then in zip(slots, before, strict=True))
        before = slots


@pytest.mark.parametrize("make", [measured, given, refined])
@pytest.mark.parametrize("recent", [1, 8, 61])
def test_newest_slots_are_each_heads(make, recent):
    """Newest slots that are divided as well, that come on top of the window, or that leave a head none by score."""
    plan = make()
    for window in (recent + 2, 64, 300):
        slots = flat(plan.windows(window, recent))
        assert sum(slots) == window * 15 and min(slots) >= recent + 1
        assert [of - recent for of in slots] == flat(plan.windows(window - recent))


def test_slots_go_where_they_save_most():
    """Slots by size of the loss instead of what they save; a head that needs many slots at once and is given none."""
    plan = MeasuredBudgets(
        widths=WIDTHS, losses=(((0.5, 0.5, 0.5), (0.4, 0.4, 1e-5)), ((0.1, 0.0, 0.0), (0.0, 0.0, 0.0)))
    )
    (stuck, late), (early, idle) = plan.windows(32)
    assert late > 64 > early > idle == UNIT and stuck == 16, "the one needs up to 256 slots, the other up to 64"
    (stuck, late), (early, idle) = plan.windows(256)
    assert stuck > 256 >= late > early > idle == UNIT, "a head that nothing has satisfied gets what is left"


def test_budgets_are_multiples_but_for_one_remainder():
    """Budgets that kernels cannot align."""
    slots = flat(measured().windows(101))
    assert sum(of % UNIT != 0 for of in slots) <= 1


def test_measured_budgets_minimise_the_loss():
    """A division that an exchange of slots between two heads improves."""
    widths = (8, 32, 128)
    losses = tuple((tuple(scale * width**-1.0 for width in widths),) for scale in (0.1, 0.4, 1.6))
    slots = flat(MeasuredBudgets(widths=widths, losses=losses).windows(48))
    # scale / slots is least in sum where slots are as the root of scale: 1 : 2 : 4
    assert slots == pytest.approx([48 * 3 / 7, 48 * 6 / 7, 48 * 12 / 7], abs=2 * UNIT)


def test_given_table_is_kept_as_it_is():
    """Whole numbers that are rounded away where the window is their mean; ratios that change where it is not."""
    table = ((7, 100, 13), (4, 64, 52))
    plan = GivenBudgets(shares=table)
    assert plan.windows(40) == table
    assert plan.windows(400) == ((70, 1000, 130), (40, 640, 520))


def test_large_plans_take_little_work():
    """A pass over every slot of every head; measured in calls, not on the clock."""
    plan = measured(layers=80, heads=8)
    assert sum(len(of) for of in plan._order[:1]) < 80 * 8 * 300
    assert sum(flat(plan.windows(4096))) == 4096 * 640


@pytest.mark.parametrize("window, recent", [(1, 0), (16, 16), (16, 15)])
def test_window_without_slots_to_divide(window, recent):
    wanted = f"window_length={window}: {recent} of its slots hold the newest tokens, .*give at least {recent + 2}, or"
    with pytest.raises(ValueError, match=wanted):
        measured().windows(window, recent)


# Files


def test_saved_plan_is_loaded(tmp_path):
    """A field that is lost on the way, or a file that says another thing than the plan."""
    path = tmp_path / "plan.json"
    plan = measured(score="value_mass", recent=24, model="m", weights="ab", texts=("c", "d"))
    plan = dataclasses.replace(plan, refined=(plan.windows(32),))
    plan.save(path)
    loaded = HeadBudgets.load(path)
    assert loaded.path == path and loaded.windows(64) == plan.windows(64)
    for name in ("widths", "losses", *MeasuredBudgets.FIELDS):
        assert getattr(loaded, name) == getattr(plan, name), name
    path.write_text('{"windows": [[1, 2.5], [3, 4]]}')
    assert HeadBudgets.load(str(path)).shares == ((1, 2.5), (3, 4))


GOOD = {"form": 1, "widths": [4, 8], "losses": [[[0.5, 0.25]]]}


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ("nonsense", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"windows": [[NaN]]}', "NaN"),
        ({}, "no 'widths'"),
        (GOOD | {"form": 2}, "its form is 2, this version reads 1"),
        (GOOD | {"widths": [8, 4]}, "widths are not ascending"),
        (GOOD | {"widths": [4, 8.5]}, "widths are not ascending"),
        (GOOD | {"widths": [4]}, "losses are not 1 numbers for each KV head"),
        (GOOD | {"losses": []}, "losses are not a table"),
        (GOOD | {"losses": [[[0.5, -0.25]]]}, "not a number of at least 0"),
        (GOOD | {"losses": [[[0.5, None]]]}, "not a number of at least 0"),
        (GOOD | {"losses": [[[0.5, 0.1], [0.5, 0.1]], [[0.5, 0.1]]]}, "losses are not a table"),
        (GOOD | {"refined": [[[8.5]]]}, "refined windows are not whole numbers"),
        (GOOD | {"refined": [[[8]], [[7]]]}, "refined windows do not grow"),
        (GOOD | {"refined": [[[8, 8]]]}, "refined windows are not whole numbers"),
        (GOOD | {"refined": 3}, "refined windows are not a table"),
        ({"windows": [[1, 2], [3]]}, "windows are not a table"),
        ({"windows": [[1, 0]]}, "not a number above 0"),
        ({"windows": [[1, True]]}, "not a number above 0"),
        ({"windows": 3}, "windows are not a table"),
    ],
)
def test_what_is_no_plan_is_refused_in_one_line(tmp_path, plan, reason):
    path = tmp_path / "plan.json"
    path.write_text(plan if isinstance(plan, str) else json.dumps(plan))
    with pytest.raises(ValueError) as caught:
        HeadBudgets.load(path)
    said = str(caught.value)
    assert said.startswith(f"{path}: not a plan of head budgets (") and reason in said and "\n" not in said
    assert said.endswith("run scripts/calibrate.py again")


def test_missing_file(tmp_path):
    with pytest.raises(
        ValueError, match=r"none\.json: cannot be read \(No such file or directory\); scripts/calibrate"
    ):
        HeadBudgets.load(tmp_path / "none.json")


def test_plan_of_another_model_is_refused(tmp_path):
    """A plan whose heads are others', or none at all."""
    path = tmp_path / "plan.json"
    measured(model="small", weights="0123456789abcdef").save(path)
    plan, config = HeadBudgets.load(path), SimpleNamespace(num_hidden_layers=5, num_key_value_heads=3)
    plan.check_model(config)
    plan.check_model(config, "0123456789abcdef" + "9" * 48)
    with pytest.raises(
        ValueError, match=r"plan\.json: measured on another model \(small, weights 0123456789abcdef; these"
    ):
        plan.check_model(config, "1" * 64)
    for of in (plan, GivenBudgets(path=path, shares=((1.0,) * 3,) * 5)):
        with pytest.raises(
            ValueError, match=r"plan\.json: budgets for 5 layers of 3 KV heads, but the model has 5 layers of 4"
        ):
            of.check_model(SimpleNamespace(num_hidden_layers=5, num_key_value_heads=4))


def test_requests_that_a_plan_has_seen_are_counted():
    """A plan that is judged on its own texts."""
    requests = [Request.from_line(json.dumps(fields), i) for i, fields in enumerate(make_requests(4))]
    plan = measured(texts=tuple(request_fingerprint(of) for of in requests[:2]))
    assert plan.calibrated_on(requests) == 2 and plan.calibrated_on(requests[2:]) == 0
    assert given().calibrated_on(requests) == 0
