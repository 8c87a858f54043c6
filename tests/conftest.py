"""What every test needs before it is collected: the interpreter switched on, threads shared out, markers honoured."""

from __future__ import annotations

import importlib.util
import os

import interpreter
import pytest
import torch
from hypothesis import HealthCheck, settings

# Read once, when triton is first imported: kernels run in numpy unless there is a device to compile for.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    interpreter.hasten()

# Test tensors are tiny: threads that spin for work, in every worker, make a loaded machine ten times slower.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # the same for the processes that tests start

# The same examples in every run, so that a failure is the change's; HYPOTHESIS_PROFILE=random looks for new ones.
settings.register_profile("random", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True)
settings.register_profile("fixed", settings.get_profile("random"), derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_collection_modifyitems(items):
    """Begin with what takes minutes, lest it be all that runs in the end; skip ``gpu`` tests without a CUDA device."""
    items.sort(key=lambda item: "compile" not in item.keywords)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True, scope="session")
def users_cache_folder(tmp_path_factory):
    """What the user's holds decides nothing here, and nothing is written there."""
    from fastrope import card

    with pytest.MonkeyPatch.context() as patch:
        folder, original = tmp_path_factory.mktemp("cache"), card.folder
        patch.setattr(card, "folder", lambda: folder)
        yield original


@pytest.fixture(autouse=True)
def _seed():
    """The same random numbers for a test whichever others ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def runnable(request):
    """Skips a test whose parameter ``backend`` cannot run here."""
    from numerics import skip_unless_runnable

    skip_unless_runnable(request.node.callspec.params["backend"])
