"""The stand-in application for the tests in this folder; nothing of it is imported before a test asks for it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from stand_in import Application

HERE = Path(__file__).resolve().parent
MODULE = HERE.parents[1] / "FreqSeg" / "FreqSeg.py"


@pytest.fixture(scope="session")
def slicer_application() -> Iterator[Application]:
    missing = [name for name in ("slicer", "PySide6") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"the stand-in needs {' and '.join(missing)}: pip install 'slicer-core>=5.13' PySide6-Essentials")
    # slicer-core imports every file of any folder named "slicer" on the path: not the tests of this one
    outside = [place for place in sys.path if Path(place).resolve() == HERE.parent]
    sys.path[:] = [str(HERE), *(place for place in sys.path if place not in outside)]
    from stand_in import Application

    application = Application.start()
    sys.path += outside
    yield application
    application.stop()


@pytest.fixture
def app(slicer_application: Application) -> Iterator[Application]:
    """The application with an empty scene and nothing left by another test.

    A test fails when a slot or an observer raised, unless it empties ``app.exceptions`` itself.
    """
    slicer_application.reset()
    yield slicer_application
    raised = list(slicer_application.exceptions)
    slicer_application.reset()
    assert not raised, f"slots or observers raised: {raised}"


@pytest.fixture
def fake(app: Application) -> Iterator[Any]:
    """A client without a worker."""
    from fake_client import FakeClient

    client = FakeClient()
    yield client
    client.close()


@pytest.fixture
def open_panel(app: Application, fake: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Opens the panel with the light client and all packages there."""

    def opened(client: Any = fake) -> Any:
        import slicer

        app.load_module(MODULE, enter=False)
        monkeypatch.setattr(sys.modules["FreqSeg"], "_client_of_the_user", lambda: client)
        monkeypatch.setattr(sys.modules["FreqSegPanel.packages"], "missing_packages", list)
        slicer.util.selectModule("FreqSeg")
        app.process()
        return slicer.util.getModuleWidget("FreqSeg")

    return opened
