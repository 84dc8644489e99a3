"""Runs of one variant: told by their settings, named by what tells them apart."""

from __future__ import annotations

from pathlib import Path

from trainings import training

from normuon_lens.analysis.comparison.variants import groups_of, seed_of, variant_names


def test_runs_of_equal_settings_share_a_name(tmp_path: Path) -> None:
    ways = {
        "a": ("AdamW", {"initial_lr": 0.01, "lr": 0.001, "eps": 1e-8}),
        "b": ("AdamW", {"eps": 1e-8, "lr": 0.002, "initial_lr": 0.01}),
        "c": ("AdamW", {"initial_lr": 0.02, "lr": 0.001, "eps": 1e-8}),
        "d": ("Muon", {"lr": 0.02}),
    }
    runs = [
        training(tmp_path / f"{name}.h5", [1.0], optimizer=optimizer, groups=[group], seed=seed)
        for seed, (name, (optimizer, group)) in enumerate(ways.items())
    ]
    assert variant_names(runs) == ["AdamW lr=0.01", "AdamW lr=0.01", "AdamW lr=0.02", "Muon"]
    assert variant_names(runs[:2]) == ["AdamW", "AdamW"]
    assert [seed_of(run) for run in runs] == [0, 1, 2, 3]


def test_names_say_little_but_keep_variants_apart(tmp_path: Path) -> None:
    settings = [dict.fromkeys("abcde", i) for i in range(2)]
    settings += [{**settings[0], "e": 9}, {}]
    runs = [training(tmp_path / f"{i}.h5", [1.0], groups=[x]) for i, x in enumerate(settings)]
    names = variant_names(runs)
    assert names[1] == "AdamW a=1, b=1, c=1, …"
    assert names[0] == "AdamW a=0, b=0, c=0, … #1"
    assert names[2] == "AdamW a=0, b=0, c=0, … #2"
    assert names[3] == "AdamW"


def test_a_shadow_is_another_variant_than_a_real_run(tmp_path: Path) -> None:
    real = training(tmp_path / "a.h5", [1.0], optimizer="Muon")
    shadow = training(tmp_path / "b.h5", [1.0], optimizer="Muon", shadow_of="AdamW")
    assert variant_names([real, shadow]) == ["Muon", "Muon (shadow of AdamW)"]


def test_what_is_no_setting_is_none(tmp_path: Path) -> None:
    run = training(tmp_path / "x.h5", [1.0])
    for groups in ("text", [1, {"lr": 1}], {"lr": 1}, None):
        for seed in ("7", True, 1.5, None):
            run.metadata.update(groups=groups, seed=seed)
            assert groups_of(run) == ([{"lr": 1}] if isinstance(groups, list) else [])
            assert seed_of(run) is None
            assert variant_names([run, run]) == ["AdamW", "AdamW"]
