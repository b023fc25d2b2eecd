"""Python packages FreqSeg needs and Slicer lacks: asked for once, installed at the point of use.

What is missing, and in which order it comes, is FreqSegLib.slicer_packages' business; here it is asked and installed as
Slicer's rules want it: torch through the PyTorch extension, everything else by pip.
"""

from __future__ import annotations

import importlib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import slicer
from slicer.i18n import tr as _

from .library import find_library

Say = Callable[[str], None]


class Packages:
    """Asks once a session; remembers a refusal until the user asks again."""

    def __init__(
        self,
        missing: Callable[[], Sequence[str]] | None = None,
        confirm: Callable[[str], bool] | None = None,
        install: Callable[[str, Path], None] | None = None,
        install_torch: Callable[[str], None] | None = None,
        optional: Callable[[], Sequence[str]] | None = None,
    ) -> None:
        """Args:
        missing: requirements that are not met, such as ["torch>=2.14", "timm>=1.0"].
        confirm: asks the user.
        install: installs one requirement, within a constraints file.
        install_torch: installs torch and torchvision, of a version such as ">=2.14".
        optional: requirements that are installed after those where that is possible, such as ["numba>=0.61"].
        """
        self._missing = missing or missing_packages
        self._confirm = confirm or _confirm
        self._install = install or install_package
        self._install_torch = install_torch or install_torch_by_extension
        self._optional = optional or optional_packages
        self.refused = False

    def missing(self) -> list[str]:
        return list(self._missing())

    def ensure(self, say: Say, ask_again: bool = False) -> str:
        """Install what is missing after asking.

        Args:
            say: shows a sentence while it installs.
            ask_again: ask even though the user refused before.

        Returns:
            Empty when everything is there, else the sentence that says what to do.
        """
        wanted = self.missing()
        if not wanted:
            self.refused = False
            return ""
        find_library()
        from FreqSegLib import slicer_packages

        plan = slicer_packages.install_plan(wanted)
        names = ", ".join(name_of(requirement) for requirement in plan.names)
        way_out = _("FreqSeg needs these Python packages: {names}. Press 'Install packages' in the Models section.")
        if self.refused and not ask_again:
            return way_out.format(names=names)
        question = _(
            "FreqSeg needs Python packages that Slicer does not have yet:\n\n{names}\n\nThey are downloaded once, "
            "together up to a few gigabytes. Install them now?"
        )
        if not self._confirm(question.format(names=names)):
            self.refused = True
            return way_out.format(names=names)
        steps: list[tuple[str, Callable[[Path], None]]] = []
        if plan.torch is not None:
            steps.append(("torch", lambda constraints: self._install_torch(plan.torch)))
        for requirement in plan.packages:
            steps.append((name_of(requirement), lambda constraints, one=requirement: self._install(one, constraints)))
        for number, (name, step) in enumerate(steps, start=1):
            say(_("Installing {name} ({number} of {count}) …").format(name=name, number=number, count=len(steps)))
            try:
                with slicer_packages.constraints_file() as constraints:
                    step(constraints)
            except Exception as error:
                logging.exception("FreqSeg: %s could not be installed", name)
                sentence = _("{name} could not be installed: {error} Press 'Install packages' to try again.")
                return sentence.format(name=name, error=_one_sentence(error))
        for requirement in self._optional():
            say(_("Installing {name} …").format(name=name_of(requirement)))
            try:
                with slicer_packages.constraints_file() as constraints:
                    self._install(requirement, constraints)
            except Exception:
                logging.warning("FreqSeg does without %s, which only makes it faster", requirement, exc_info=True)
        left = self.missing()
        if left:
            sentence = _("Still missing: {names}. Restart Slicer, then try again.")
            return sentence.format(names=", ".join(map(name_of, left)))
        self.refused = False
        return ""


def missing_packages() -> list[str]:
    """What FreqSeg needs and this Python lacks."""
    find_library()
    from FreqSegLib import slicer_packages

    return slicer_packages.missing_packages()


def optional_packages() -> list[str]:
    """What would make FreqSeg faster and this Python lacks."""
    find_library()
    from FreqSegLib import slicer_packages

    return slicer_packages.missing_packages(optional=True)


def install_package(requirement: str, constraints: Path) -> None:
    """By slicer.packaging where there is one (Slicer 5.12), else by slicer.util."""
    try:
        slicer_packaging: Any = importlib.import_module("slicer.packaging")
    except ImportError:
        slicer_packaging = None
    if hasattr(slicer_packaging, "pip_ensure"):
        wishes = {
            "constraints": str(constraints),
            "prompt_install": False,
            "prompt": False,
            "prompt_restart": False,
            "requester": "FreqSeg",
            "show_progress": False,
        }
        from packaging.requirements import Requirement

        slicer_packaging.pip_ensure([Requirement(requirement)], **_accepted(slicer_packaging.pip_ensure, wishes))
        return
    slicer.util.pip_install(["--constraint", str(constraints), requirement])


def install_torch_by_extension(version: str) -> None:
    """Through the PyTorch extension, which picks the build that fits the computer; its parameters vary by version.

    Raises:
        RuntimeError: the extension is not there, or did not install torch.
    """
    try:
        utils: Any = importlib.import_module("PyTorchUtils")
    except ImportError as error:
        raise RuntimeError(
            _("The PyTorch extension is missing. Install it in the Extensions Manager and restart Slicer.")
        ) from error
    logic = utils.PyTorchUtilsLogic()
    wishes: dict[str, Any] = {"askConfirmation": False, "confirm": False}
    if version:
        wishes["torchVersionRequirement"] = version
    if logic.installTorch(**_accepted(logic.installTorch, wishes)) is None:
        raise RuntimeError(_("The PyTorch extension did not install torch."))


def name_of(requirement: str) -> str:
    """The package's name of a requirement such as "timm>=1.0"."""
    end = next((index for index, letter in enumerate(requirement) if letter in "<>=!~[; @"), len(requirement))
    return requirement[:end].strip()


def _accepted(function: Callable[..., Any], wishes: Mapping[str, Any]) -> dict[str, Any]:
    known = inspect.signature(function).parameters
    return {name: value for name, value in wishes.items() if name in known}


def _confirm(question: str) -> bool:
    return bool(slicer.util.confirmOkCancelDisplay(question, windowTitle="FreqSeg"))


def _one_sentence(error: Exception) -> str:
    text = (str(error).strip() or type(error).__name__).splitlines()[-1]
    return text if text.endswith((".", "!", "?")) else f"{text}."
