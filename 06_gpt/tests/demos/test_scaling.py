"""The scaling law is found again where it is known, and what the fit says of real runs is its own prediction."""

import json

from shared.errors import BadInput

import numpy as np
import pytest

from demos import scaling

N, D = (grid.ravel() for grid in np.meshgrid([1.5e4, 5e4, 2e5, 8e5], [2.5e5, 5e5, 1e6, 2e6], indexing="ij"))


@pytest.mark.parametrize("law", [
    {"E": 1.3, "A": 60.0, "a": 0.45, "B": 300.0, "b": 0.5},
    {"E": 0.0, "A": 9.0, "a": 0.2, "B": 4000.0, "b": 0.7},
])
def test_a_known_law_is_found_again(law):
    """From losses made with a law, without noise, the fit gives back its five numbers and no others."""
    found = scaling.fit(N, D, scaling.predict(law, N, D))
    for key, value in law.items():
        assert abs(found[key] - value) < 1e-6 * max(1, value), f"{key} is {found[key]}, it was made with {value}"


def test_the_exponents_are_not_swapped():
    """The exponent a belongs to the parameters: losses that depend on the tokens alone leave no part to them."""
    law = {"E": 1.0, "A": 0.0, "a": 1.0, "B": 800.0, "b": 0.55}
    found = scaling.fit(N, D, scaling.predict(law, N, D))
    assert abs(found["b"] - 0.55) < 1e-9 and found["A"] * N.min() ** -found["a"] < 1e-6, found


def test_no_part_of_the_law_is_negative():
    """Noise of 3 % does not make the fit claim a negative loss for some size: E, A and B stay at 0 or above."""
    noise = np.random.default_rng(0)
    for _ in range(5):
        L = scaling.predict({"E": 0.1, "A": 9.0, "a": 0.2, "B": 40.0, "b": 0.4}, N, D)
        found = scaling.fit(N, D, L * np.exp(0.03 * noise.standard_normal(len(L))))
        assert min(found["E"], found["A"], found["B"]) >= 0, found


def test_the_demo_runs(text, out, capsys):
    """Every size is trained for every budget, each run is predicted from the others, and two widths are too few."""
    scaling.main(["--corpus", str(text), "--widths", "4", "8", "12", "--steps", "2", "4", "8", "--batch-size", "2"])
    summary = json.loads((out / "scaling" / "summary.json").read_text("utf-8"))
    rows = summary["rows"]
    assert len(rows) == 9 and len({row["N"] for row in rows}) == 3 and len({row["D"] for row in rows}) == 3
    for row in rows:
        law = scaling.predict(summary["law"], row["N"], row["D"])
        assert abs(row["law"] - law) < 1e-9, "the table shows another law than the one found"
        assert row["left out"] != row["law"], "the run was not left out"
    assert (out / "scaling" / "scaling.png").stat().st_size > 5000
    assert "left out" in capsys.readouterr().out
    with pytest.raises(BadInput, match="--widths"):
        scaling.main(["--widths", "8", "16"])
    for width in ("0", "100"):  # 100 channels are three heads of 33 and a third
        with pytest.raises(BadInput, match=f"--widths {width}"):
            scaling.main(["--corpus", str(text), "--widths", "8", "16", width])
