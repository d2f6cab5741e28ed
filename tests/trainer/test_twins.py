"""Every published configuration has a smoke twin, which trains through all of its stages as it stands."""

from pathlib import Path

import pytest

from tests.trainer.processes import run
from trainer import checkpoint
from trainer import manifest as manifests

MANIFESTS = Path(__file__).parents[2] / "manifests"
TWINS = sorted(MANIFESTS.glob("*_smoke.yaml"))


@pytest.mark.parametrize("twin", TWINS, ids=lambda path: path.stem)
def test_a_twin_has_the_stages_of_its_configuration(twin):
    short, published = (manifests.load(path) for path in (twin, MANIFESTS / twin.name.replace("_smoke", "")))
    assert short.recipe == published.recipe
    of = [[stage.name for stage in made.schedule.stages] for made in (short, published)]
    assert of[0] == of[1] or set(of[0]) > set(of[1]), "what the published weights stand in for is trained too"


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize("twin", [path for path in TWINS if "latentdit" not in path.stem], ids=lambda path: path.stem)
def test_a_twin_trains(twin, small_dataset, tmp_path):
    """On two workers, from the first stage to the last; only the clips are others than those of the demo."""
    wanted = manifests.load(twin)
    sets = [f"--set=data.train={small_dataset}", "--set=data.eval=null"]
    statuses, said = run(2, [str(twin), "--runs", str(tmp_path), *sets], tmp_path / "log")
    assert statuses == [0, 0], said
    assert checkpoint.newest_step(str(tmp_path / wanted.name)) == wanted.schedule.steps
