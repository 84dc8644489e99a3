"""Each observation of the paper is seen, not seen, or undecided in runs that are made so."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from normuon_lens.analysis.claims import Claim, check_claims
from normuon_lens.analysis.claims.geometry import cv_by_chance
from normuon_lens.analysis.claims.training import ONE_SEED
from normuon_lens.analysis.claims.verdict import Vote
from normuon_lens.runfile import Matrices, Matrix, Run, Writer, open_run

SHAPES = {"q": (16, 16), "up": (64, 16), "gate": (64, 16), "down": (16, 64)}
STEPS, EVERY, LR = 120, 10, 0.01
CHANCE = cv_by_chance(64, 16)

IDS = [
    "adam-ill-conditioned",
    "muon-lowers-condition",
    "muon-leaves-imbalance",
    "normuon-evens-neurons",
    "state-memory",
    "update-rms",
    "steps-to-adam-loss",
    "step-time",
    "ablation-order",
]

Curve = Callable[[int], float]


def falling(by: float) -> Curve:
    """Return a loss that falls by so much from 4, at the first step, ever more slowly."""
    whole = 1 - math.exp((1 - STEPS) / 30)
    return lambda step: 4.0 - by * (1 - math.exp((1 - step) / 30)) / whole


FALLING = falling(2.0)


class Bench:
    """Writes runs whose spectra, norms, losses and times are chosen."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def run(
        self,
        optimizer: str,
        *,
        condition: float | Sequence[float] = 2.0,
        cv: float = 0.0,
        rms: float = 0.2,
        rms_from: int = 0,
        loss: Curve = FALLING,
        seconds: Callable[[int], float] | None = None,
        began: float | None = None,
        floor: float = 1e-12,
        lr: float | None = LR,
        scalars: Mapping[str, float] | None = None,
        shapes: Mapping[str, tuple[int, int]] = SHAPES,
        steps: int = STEPS,
        live: bool = False,
        void: Sequence[int] = (),
        dtype: str = "float32",
        weight: float = 1.0,
        groups: Sequence[Mapping[str, Any]] | None = None,
        **metadata: Any,
    ) -> Run:
        """Write one; `rms` is that of updates beyond step `rms_from`, in units of `lr`."""
        self.count += 1
        path = self.folder / f"{self.count}.h5"
        matrices = Matrices([Matrix(name, m, n, dtype) for name, (m, n) in shapes.items()])
        usual = {"optimizer": optimizer, "update": "exact", "lr": LR}
        usual |= {"scale": "match_rms"} if optimizer == "NorMuon" else {}
        about = {"optimizer": optimizer, "name": optimizer, "groups": groups or [usual]}
        writer = Writer(path, about | metadata, matrices)
        conditions = np.broadcast_to(condition, len(matrices))
        began = 1e9 + self.count * 1e5 if began is None else began
        for step in range(1, steps + 1):
            size = (0.2 if step <= rms_from else rms) * LR * (step not in void)
            rows = [
                size * np.sqrt(x.n / (1 + cv**2)) * (1 + cv * (-1.0) ** np.arange(x.m))
                for x in matrices
            ]
            logged = {"loss": loss(step), **(scalars or {})}
            logged |= {} if lr is None else {"lr": lr}
            logged |= {} if seconds is None else {"seconds": seconds(step)}
            norms = {"update": np.concatenate(rows)}
            writer.step(step, began + step, scalars=logged, norms=norms, void=step in void)
            if step == 1 or step % EVERY == 0:
                sigma = [
                    np.geomspace(1, 1 / c, min(x.m, x.n))
                    for c, x in zip(conditions, matrices, strict=True)
                ]
                count = len(matrices)
                writer.spectra(
                    "update",
                    step,
                    np.concatenate(sigma) * (step not in void),
                    np.full(count, floor),
                    weight_norm=np.full(count, weight),
                )
        writer.commit()
        run = open_run(path)
        if not live:
            run.status = "finished"  # as closing it would, in twice the time
        return run


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def claim(name: str, *runs: Run, skip: int = 20) -> Claim:
    return next(c for c in check_claims(runs, skip=skip) if c.id == name)


def finding(found: Claim, label: str) -> float:
    return next(x.value for x in found.findings if x.label == label)


def test_all_are_answered_whatever_the_runs_are(bench: Bench) -> None:
    empty = bench.run("Adam", steps=0)
    other = bench.run("SGD")
    for runs in ([], [empty], [other], [other, bench.run("Muon", shapes={"w": (3, 3)})]):
        found = check_claims(runs)
        assert [c.id for c in found] == IDS
        assert {c.verdict for c in found} <= {"cannot tell", "seen", "not seen"}
        assert all(c.reason and c.statement and c.test and c.source for c in found)
    assert {c.verdict for c in check_claims([empty, other])} == {"cannot tell"}


def test_what_is_known_not_to_hold_is_known_of_both() -> None:
    states = [(True, True), (False, True), (False, False), (True, False)]  # yes, known
    for one, other in itertools.product(states, states):
        both = Vote(*np.array([one]).T) & Vote(*np.array([other]).T)
        if (False, True) in (one, other):
            expected = (False, True)
        else:
            known = one[1] and other[1]
            expected = (known and one[0] and other[0], known)
        assert (bool(both.yes[0] & both.known[0]), bool(both.known[0])) == expected


def test_what_a_file_says_of_itself_may_be_anything(bench: Bench) -> None:
    for junk in ([1], {"a": []}, "x", None, -1.5):
        about = dict.fromkeys(("created", "seed", "parameters", "world_size", "shadow_of"), junk)
        setting = dict.fromkeys(("optimizer", "scale", "only", "lr", "amsgrad", "update"), junk)
        groups: Any = junk if isinstance(junk, str) else [setting]
        runs = [bench.run(name, steps=30, groups=groups, **about) for name in ("Adam", "NorMuon")]
        assert [c.id for c in check_claims(runs)] == IDS


def spread(condition: float) -> float:
    """Return p95/p5 of 16 values that are even in their logarithm, about condition ** 0.9."""
    high, low = np.percentile(np.geomspace(1, 1 / condition, 16), [95, 5])
    return float(high / low)


@pytest.mark.parametrize(
    ("condition", "verdict"),
    [
        (20.0, "seen"),
        (9.0, "not seen"),
        (11.0, "not seen"),  # one value makes it: p95/p5 is 8.7
        ([20, 20, 20, 9], "seen"),
        ([20, 20, 9, 9], "cannot tell"),
        ([20, 9, 9, 9], "not seen"),
    ],
)
def test_adam(condition: Any, verdict: str, bench: Bench) -> None:
    found = claim("adam-ill-conditioned", bench.run("AdamW", condition=condition))
    assert found.verdict == verdict
    assert finding(found, "median condition number, Adam") == pytest.approx(np.median(condition))
    assert finding(found, "median σ p95/p5, Adam") == pytest.approx(
        np.median([spread(x) for x in np.ravel(condition)])
    )


def test_a_lower_bound_is_enough_to_be_bad_but_not_to_be_good(bench: Bench) -> None:
    adam = bench.run("Adam", condition=1000.0, floor=0.01)  # known up to 100
    found = claim("adam-ill-conditioned", adam)
    assert (found.verdict, found.findings[0].unit) == ("seen", "at least")
    assert finding(found, "median condition number, Adam") == pytest.approx(100)
    muon = bench.run("Muon", condition=100.0, floor=0.1)  # looks like 10
    assert claim("muon-lowers-condition", adam, muon).verdict == "cannot tell"
    clear = bench.run("Muon", condition=10.0)
    assert claim("muon-lowers-condition", adam, clear).verdict == "seen"
    # Adam is known to be at 100 at least, and might be higher: 60 may be less than half of it.
    near = bench.run("Muon", condition=60.0)
    assert claim("muon-lowers-condition", adam, near).verdict == "cannot tell"
    low = bench.run("Adam", condition=50.0, floor=0.2)  # at least 5
    assert claim("adam-ill-conditioned", low).verdict == "cannot tell"


@pytest.mark.parametrize(
    ("condition", "verdict"), [(45.0, "seen"), (55.0, "not seen"), ([1, 1, 99, 99], "cannot tell")]
)
def test_muon(condition: Any, verdict: str, bench: Bench) -> None:
    adam, muon = bench.run("Adam", condition=100.0), bench.run("Muon", condition=condition)
    found = claim("muon-lowers-condition", adam, muon)
    assert found.verdict == verdict
    assert claim("muon-lowers-condition", adam).verdict == "cannot tell"
    assert finding(found, "median σ p95/p5, Adam") == pytest.approx(spread(100))


def test_chance_is_that_of_random_orthogonal_matrices() -> None:
    rng = np.random.default_rng(0)
    for m, n in ((64, 16), (96, 8), (33, 32)):
        frames = [np.linalg.qr(rng.standard_normal((m, n)))[0] for _ in range(300)]
        norms = np.linalg.norm(frames, axis=2)
        expected = float(norms.std() / norms.mean())
        assert cv_by_chance(m, n) == pytest.approx(expected, rel=0.03)
    assert cv_by_chance(10_000, 100) == pytest.approx(math.sqrt((1 - 0.01) / 200), rel=0.02)


@pytest.mark.parametrize(("times", "verdict"), [(2.1, "seen"), (1.9, "not seen")])
def test_imbalance(times: float, verdict: str, bench: Bench) -> None:
    found = claim("muon-leaves-imbalance", bench.run("Muon", cv=times * CHANCE))
    assert found.verdict == verdict
    assert finding(found, "median neuron CV, Muon, m > n") == pytest.approx(times * CHANCE)
    assert found.findings[-1].unit == "of 2"


def test_imbalance_needs_tall_matrices(bench: Bench) -> None:
    flat = {"q": (16, 16), "down": (16, 64)}
    muon, normuon = (bench.run(x, cv=0.3, shapes=flat) for x in ("Muon", "NorMuon"))
    for name in ("muon-leaves-imbalance", "normuon-evens-neurons"):
        found = claim(name, muon, normuon)
        assert (found.verdict, "m > n" in found.reason) == ("cannot tell", True)


@pytest.mark.parametrize(
    ("cv", "condition", "verdict"),
    [
        (0.14, 3.9, "seen"),
        (0.16, 3.9, "not seen"),
        (0.14, 4.1, "not seen"),
        (0.14, [2, 2, 8, 2], "cannot tell"),
        (0.14, [99, 2, 2, 99], "seen"),  # these are not tall
    ],
)
def test_normuon(cv: float, condition: Any, verdict: str, bench: Bench) -> None:
    muon = bench.run("Muon", cv=0.3, condition=2.0)
    normuon = bench.run("NorMuon", cv=cv, condition=condition)
    assert claim("normuon-evens-neurons", muon, normuon).verdict == verdict


def test_only_steps_beyond_the_first_and_in_common_count(bench: Bench) -> None:
    adam = bench.run("Adam", condition=20.0, steps=30)
    assert claim("adam-ill-conditioned", adam).verdict == "seen"
    assert claim("adam-ill-conditioned", adam, skip=29).verdict == "seen"
    found = claim("adam-ill-conditioned", adam, skip=30)
    assert (found.verdict, "first 30" in found.reason) == ("cannot tell", True)
    short = bench.run("Muon", condition=2.0, steps=20)
    assert claim("muon-lowers-condition", adam, short).verdict == "cannot tell"
    assert claim("muon-lowers-condition", adam, short, skip=15).verdict == "seen"


def test_updates_that_are_mostly_rounding_say_nothing(bench: Bench) -> None:
    groups = [{"optimizer": "AdamW", "update": "difference"}]
    narrow = bench.run("AdamW", condition=20.0, dtype="bfloat16", groups=groups, weight=1e2)
    assert claim("adam-ill-conditioned", narrow).verdict == "cannot tell"
    wide = bench.run("AdamW", condition=20.0, groups=groups)
    assert claim("adam-ill-conditioned", wide).verdict == "seen"


def test_matrices_that_another_optimizer_trains_are_left_out(bench: Bench) -> None:
    shapes = {"embedding": (64, 16), "up": (64, 16)}
    groups = [{"optimizer": "Muon"}, {"optimizer": "AdamW"}]
    path = bench.folder / "mixed.h5"
    table = Matrices([Matrix("embedding", 64, 16, group=1), Matrix("up", 64, 16, group=0)])
    writer = Writer(path, {"optimizer": "Muon", "groups": groups}, table)
    for step in range(1, 41):
        uneven = 1 + 0.5 * (-1.0) ** np.arange(64)
        norms = {"update": np.concatenate([np.ones(64), uneven])}
        writer.step(step, step, scalars={}, norms=norms)
        writer.spectra("update", step, np.tile(np.geomspace(1, 0.5, 16), 2), np.zeros(2))
    writer.close()
    found = claim("muon-leaves-imbalance", open_run(path))
    assert (found.verdict, found.findings[-1].unit) == ("seen", "of 1")
    # Nor do they count for Adam, as long as Muon's runs leave them out.
    adam = bench.run("AdamW", condition=20.0, shapes=shapes)
    assert claim("adam-ill-conditioned", adam).findings[-1].unit == "of 2"
    assert claim("adam-ill-conditioned", adam, open_run(path)).findings[-1].unit == "of 1"


def test_shadows_count_for_geometry_alone(bench: Bench) -> None:
    muon = bench.run("Muon", cv=0.3, shadow_of="AdamW")
    normuon = bench.run("NorMuon", cv=0.1, loss=falling(3), shadow_of="AdamW")
    adam = bench.run("AdamW", condition=20.0)
    found = {c.id: c for c in check_claims([adam, muon, normuon])}
    assert found["normuon-evens-neurons"].verdict == "seen"
    assert found["update-rms"].verdict == "seen"
    for name in ("steps-to-adam-loss", "step-time"):
        assert (found[name].verdict, "shadows" in found[name].reason) == ("cannot tell", True)
    own = [{"optimizer": "NorMuon", "scale": "match_rms", "lr": 0.5}]
    apart = bench.run("NorMuon", rms=9.0, groups=own, shadow_of="AdamW")
    assert claim("update-rms", apart).verdict == "cannot tell"


def test_runs_of_other_models_are_not_compared(bench: Bench) -> None:
    adam, muon = bench.run("Adam", parameters=5), bench.run("Muon", parameters=6)
    found = claim("muon-lowers-condition", adam, muon)
    assert (found.verdict, "not of one model" in found.reason) == ("cannot tell", True)


NUMBERS = sum(m * n for m, n in SHAPES.values())
ROWS = sum(m for m, n in SHAPES.values())
KEPT = {
    "AdamW": 8 * NUMBERS + 4 * len(SHAPES),
    "Muon": 4 * NUMBERS,
    "NorMuon": 4 * (NUMBERS + ROWS),
}


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "seen"),
        ({"NorMuon": 8 * NUMBERS}, "not seen"),
        ({"Muon": KEPT["NorMuon"]}, "not seen"),
        ({"AdamW": 4 * NUMBERS}, "not seen"),
        ({"AdamW": KEPT["AdamW"] - 4 * len(SHAPES) - 1}, "not seen"),
        ({"Muon": math.nan}, "cannot tell"),
        ({"Muon": math.nan, "NorMuon": 1.0}, "not seen"),
    ],
)
def test_memory(changed: dict[str, float], verdict: str, bench: Bench) -> None:
    runs = [
        bench.run(name, scalars={"optimizer_state_bytes": kept}, steps=2)
        for name, kept in (KEPT | changed).items()
    ]
    assert claim("state-memory", *runs).verdict == verdict


def test_memory_of_several_ranks_or_of_other_precision(bench: Bench) -> None:
    told = {name: {"optimizer_state_bytes": kept} for name, kept in KEPT.items()}
    runs = [bench.run(name, scalars=told[name], steps=2, world_size=2) for name in KEPT]
    assert claim("state-memory", *runs).verdict == "cannot tell"
    # Adam keeps bfloat16 where the weights are, ours float32.
    half = {"optimizer_state_bytes": KEPT["AdamW"] / 2}
    adam = bench.run("AdamW", scalars=half, steps=2, dtype="bfloat16")
    ours = [bench.run(x, scalars=told[x], steps=2, dtype="bfloat16") for x in ("Muon", "NorMuon")]
    assert claim("state-memory", adam, *ours).verdict == "seen"
    assert (
        claim("state-memory", bench.run("AdamW", scalars=half, steps=2), *ours).verdict
        == "not seen"
    )


@pytest.mark.parametrize(
    ("rms", "scale", "verdict"),
    [
        (0.2, "match_rms", "seen"),
        (0.2015, "match_rms", "seen"),
        (0.203, "match_rms", "not seen"),
        (0.2, None, "seen"),
        (0.3, None, "cannot tell"),
        (0.2, "preserve_norm", "cannot tell"),
    ],
)
def test_rms(rms: float, scale: str | None, verdict: str, bench: Bench) -> None:
    groups = [{"optimizer": "NorMuon"} | ({"scale": scale} if scale else {})]
    # One step of them all is off, or moves nothing.
    run = bench.run("NorMuon", rms=rms, rms_from=STEPS - 1, groups=groups, void=[5])
    found = claim("update-rms", run)
    assert found.verdict == verdict
    if scale != "preserve_norm":
        deviation = finding(found, "largest deviation from 1")
        assert deviation == pytest.approx(abs(rms / 0.2 - 1), abs=1e-6)


def test_rms_needs_the_learning_rate(bench: Bench) -> None:
    assert claim("update-rms", bench.run("NorMuon", lr=None)).verdict == "cannot tell"
    assert claim("update-rms", bench.run("NorMuon", lr=2 * LR)).verdict == "not seen"


def several(bench: Bench, optimizer: str, ends: Sequence[float], **more: Any) -> list[Run]:
    """Write one run a seed, whose losses fall by so much."""
    return [
        bench.run(optimizer, loss=falling(end), seed=seed, **more)
        for seed, end in enumerate(ends, start=more.pop("first_seed", 0))
    ]


@pytest.mark.parametrize(
    ("lead", "verdict"),
    [(0.3, "seen"), (-0.3, "not seen"), (0.5 * ONE_SEED, "cannot tell"), (0.0, "cannot tell")],
)
def test_steps_with_one_seed(lead: float, verdict: str, bench: Bench) -> None:
    adam, normuon = (bench.run(x, loss=falling(2 + y)) for x, y in (("Adam", 0), ("NorMuon", lead)))
    found = claim("steps-to-adam-loss", adam, normuon)
    assert found.verdict == verdict
    assert "one seed" in found.reason
    if verdict == "seen":
        # By the loss curves themselves; both are averaged over the same number of steps.
        curve = [falling(2 + lead)(step) for step in range(1, STEPS + 1)]
        means = np.convolve(curve, np.ones(20) / 20, "valid")
        target = np.mean([falling(2)(step) for step in range(STEPS - 19, STEPS + 1)])
        at = int(np.argmax(means <= target))
        share = (means[at - 1] - target) / (means[at - 1] - means[at])
        needed = finding(found, "steps to Adam's final loss, NorMuon")
        assert needed == pytest.approx(at + 19 + share)
        assert finding(found, "steps of Adam in all") == STEPS
        assert "tuned" in found.reason


def test_seeds_are_paired(bench: Bench) -> None:
    # What a seed does is larger than the difference, and the same for both.
    ends, leads = np.array([1.8, 2.0, 2.2]), np.array([0.02, 0.03, 0.025])
    adam = several(bench, "Adam", ends)
    normuon = several(bench, "NorMuon", ends + leads)
    found = claim("steps-to-adam-loss", *adam, *normuon)
    factor = np.mean([falling(1)(s) - 4 for s in range(STEPS - 19, STEPS + 1)])
    p = stats.ttest_1samp(leads * factor, 0).pvalue
    assert (found.verdict, f"3 seeds, paired, p = {p:.2g}" in found.reason) == ("seen", True)
    crossed = several(bench, "NorMuon", ends[[2, 0, 1]] + leads)
    found = claim("steps-to-adam-loss", *adam, *crossed)
    assert (found.verdict, "may be seed noise" in found.reason) == ("cannot tell", True)
    # The same seed twice is no second one.
    assert "one seed" in claim("steps-to-adam-loss", adam[0], adam[0], *normuon[:1]).reason


def test_other_seeds_are_not_paired(bench: Bench) -> None:
    a, b = [1.9, 2.0, 2.1], [2.3, 2.5, 2.4]
    adam = several(bench, "Adam", a)
    normuon = several(bench, "NorMuon", b, first_seed=7)
    found = claim("steps-to-adam-loss", *adam, *normuon)
    p = stats.ttest_ind(a, b, equal_var=False).pvalue
    assert (found.verdict, f"p = {p:.2g}" in found.reason) == ("seen", True)


@pytest.mark.parametrize(
    ("adam", "normuon", "said"),
    [
        ({}, {"steps": 110}, "different lengths"),
        ({"steps": 99}, {"steps": 99}, "99 losses"),
        ({}, {"live": True}, "still being recorded"),
        ({}, {"loss": lambda step: 1.0 if step < 110 else math.nan}, "no finite loss"),
        ({"seed": 1}, {"seed": 1, "loss": lambda step: 3 - step / 99}, "began with different"),
        ({"loss": lambda step: math.nan}, {}, "0 losses"),
    ],
)
def test_trainings_that_cannot_be_compared(
    adam: Any, normuon: Any, said: str, bench: Bench
) -> None:
    found = claim("steps-to-adam-loss", bench.run("Adam", **adam), bench.run("NorMuon", **normuon))
    assert (found.verdict, said in found.reason) == ("cannot tell", True), found.reason


@pytest.mark.parametrize(("ratio", "verdict"), [(1.04, "seen"), (1.06, "not seen")])
def test_time(ratio: float, verdict: str, bench: Bench) -> None:
    # They took turns, each with a clock of its own.
    adam = bench.run("Adam", seconds=lambda step: 0.5 * step, began=0.0)
    normuon = bench.run("NorMuon", seconds=lambda step: 0.5 * ratio * step, began=0.0)
    found = claim("step-time", adam, normuon)
    assert found.verdict == verdict
    assert finding(found, "NorMuon relative to Adam") == pytest.approx(ratio)


def test_times_that_say_nothing(bench: Bench) -> None:
    adam = bench.run("Adam", began=0.0)
    for normuon, said in (
        (bench.run("NorMuon", began=60.0), "at the same time"),
        (bench.run("NorMuon", began=1e6, scalars={"recording_overhead": 0.2}), "took 20%"),
        (bench.run("NorMuon", began=1e6, steps=50), "too few"),
    ):
        found = claim("step-time", adam, normuon)
        assert (found.verdict, said in found.reason) == ("cannot tell", True), found.reason
    assert claim("step-time", adam, bench.run("NorMuon", began=1e6)).verdict == "seen"
    steady = bench.run("Adam", seconds=lambda step: step)
    uneven = bench.run("NorMuon", seconds=lambda step: step + max(0, step - 70))
    assert "not steady" in claim("step-time", steady, uneven).reason


PARTS = {"granularity": "coordinate", "normalize": "before", "only": "tall"}


def ablated(bench: Bench, end: float, **changed: str) -> Run:
    group = {"optimizer": "NorMuon", "scale": "match_rms", "granularity": "neuron"}
    return bench.run("NorMuon", loss=falling(end), groups=[group | changed])


def test_ablations(bench: Bench) -> None:
    normuon = ablated(bench, 2.5)
    assert "no run with a part" in claim("ablation-order", normuon).reason
    worse = [ablated(bench, 2.0, **{name: value}) for name, value in PARTS.items()]
    found = claim("ablation-order", normuon, *worse)
    assert (found.verdict, "only=wide" in found.reason) == ("cannot tell", True)
    worse.append(ablated(bench, 2.0, only="wide"))
    assert claim("ablation-order", normuon, *worse).verdict == "seen"
    near = ablated(bench, 2.49, only="wide")
    assert claim("ablation-order", normuon, *worse[:-1], near).verdict == "cannot tell"
    better = ablated(bench, 2.7, only="wide")
    found = claim("ablation-order", normuon, *worse[:-1], better)
    assert (found.verdict, "only=wide" in found.reason) == ("not seen", True)
    # An ablation is no NorMuon of the paper's.
    assert claim("update-rms", *worse).verdict == "cannot tell"
