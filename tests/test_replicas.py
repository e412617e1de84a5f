"""Two replicas that share each batch train as one does: statistics of clicks are those of the global batch."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from clsd_tf.methods.clsd.config import ClsdConfig

# Between them every mean over a batch: of forms, teachers and objectives, also where clicks have no score.
SETTINGS = {
    "forms with a spread": {
        "teacher": "self", "lambda": 0.4, "mu": 0.5, "global_weighting": "standardized",
        "local_weighting": "standardized",
    },
    "moving means and a moving model": {
        "teacher": "ema", "ema_momentum": 0.9, "normalizer_momentum": 0.8, "lambda": 0.5, "mu": 0.5,
        "global_weighting": "mean_one",
    },
    "literal gate, clicks without a score": {
        "teacher": "prequential", "lambda": 0.3, "mu": 0.6, "ad_gate": {"objective": "literal"},
    },
}  # fmt: skip


OPTIMIZERS = {
    "forms with a spread": {"global_clip_norm": 0.1},
    "moving means and a moving model": {"embeddings": {"kind": "rowwise_adagrad"}},
}


@pytest.fixture(scope="module")
def results():
    settings = [
        {"clsd": {"loss_warmup_steps": 2, **values}, "optimizer": OPTIMIZERS.get(name, {})}
        for name, values in SETTINGS.items()
    ]
    for values in settings:
        ClsdConfig.model_validate(values["clsd"])
    script = pathlib.Path(__file__).with_name("two_replicas.py")
    root = str(script.parent.parent)
    finished = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps(settings), capture_output=True, text=True, timeout=300, check=False, cwd=root,
        env={"PYTHONPATH": root, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def fits(results):
    return dict(zip(SETTINGS, results["fits"], strict=True))


def assert_close(found, expected, tolerance):
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", SETTINGS)
def test_two_replicas_leave_the_weights_that_one_leaves(fits, name):
    one, two = fits[name]["one"], fits[name]["two"]
    assert_close(two["weights"], one["weights"], 2e-6)  # float32 sums in another order.
    assert_close(two["guards"], one["guards"], 1e-5)


@pytest.mark.parametrize("name", SETTINGS)
def test_two_replicas_report_what_one_reports(fits, name):
    one, two = fits[name]["one"], fits[name]["two"]
    for part in ("history", "evaluated"):
        assert two[part].keys() == one[part].keys()
        for key, values in one[part].items():
            np.testing.assert_allclose(two[part][key], values, rtol=2e-5, atol=1e-6, err_msg=key)
    watched = {"effective_click_share", "ad_gate_loss", "max_click_confidence", "click_confidence/tier/low"}
    assert watched <= one["history"].keys()
    assert one["history"]["loss"][1] < one["history"]["loss"][0]


# SIGTERM comes as the third epoch begins; all know of it with the step after the next.
@pytest.mark.parametrize(("steps_per_epoch", "finished_epochs"), [(1, 4), (2, 3)])
def test_sigterm_stops_replicas_whose_epochs_are_short(results, steps_per_epoch, finished_epochs):
    expected = f"saved: epoch {finished_epochs + 1}, 0 of {steps_per_epoch} steps done"
    assert expected in results["stops"][str(steps_per_epoch)]
