"""``slicer.packaging``: installation requests are written down; nothing is ever installed."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from packaging.requirements import Requirement


class Packages:
    """What was asked to be installed, and what happens then."""

    def __init__(self) -> None:
        self.requested: list[str] = []
        self.failure: Exception | None = None
        self.on_install: Callable[[list[str]], None] | None = None

    def clear(self) -> None:
        self.requested = []
        self.failure = self.on_install = None

    def install(self, requirements: Any) -> None:
        """Record a request; raise ``failure`` when a test has set it."""
        names = requirements.split() if isinstance(requirements, str) else [str(name) for name in requirements]
        self.requested.extend(names)
        if self.failure is not None:
            raise self.failure
        if self.on_install is not None:
            self.on_install(names)

    def build_module(self) -> ModuleType:
        """Return the module ``slicer.packaging``."""
        module: Any = ModuleType("slicer.packaging", __doc__)

        def pip_install(requirements: Any, *_: Any, completedCallback: Any = None, **__: Any) -> None:
            self.install(requirements)
            if completedCallback is not None:
                completedCallback(0)

        def pip_uninstall(requirements: Any, **__: Any) -> None:
            self.requested.append(f"uninstall {requirements}")

        def pip_ensure(
            requirements: list[Requirement],
            constraints: Any = None,
            skip_packages: list[str] | None = None,
            prompt_install: bool = True,
            prompt_restart: bool = True,
            requester: str | None = None,
            skip_in_testing: bool = True,
            show_progress: bool = True,
        ) -> None:
            for requirement in requirements:
                if not isinstance(requirement, Requirement):
                    raise TypeError(f"pip_ensure takes packaging.requirements.Requirement objects, got {requirement!r}")
            self.install([str(requirement) for requirement in requirements])

        module.pip_install, module.pip_uninstall = pip_install, pip_uninstall
        module.pip_ensure = pip_ensure
        return module
