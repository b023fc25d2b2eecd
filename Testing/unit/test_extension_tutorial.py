"""The tutorial speaks of what there is: commands, options, the panel's labels, the logic's arguments, pictures."""

from __future__ import annotations

import ast
import re
import shlex
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

# In italics, but not labels of the panel: Slicer's own, presets, and groups of settings.
NOT_LABELS = {
    "FreqSeg",
    "Edit > Application Settings > Modules > Additional module paths",
    "Lite (built in)",
    "BiomedCLIP and SAM",
    "Advanced > threshold, components",
}


@pytest.fixture(scope="module")
def tutorial(project_root: Path) -> str:
    return (project_root / "docs" / "tutorial.md").read_text(encoding="utf-8")


def blocks(tutorial: str, language: str) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", tutorial, re.DOTALL)
    assert found
    return found


def test_every_command_line_is_understood(tutorial: str) -> None:
    import typer

    from FreqSegLib import cli_export, cli_fuse, cli_info, cli_models, cli_segment, cli_spectral, cli_train_spectral
    from FreqSegLib.cli_app import app

    of_the_app = (cli_export, cli_fuse, cli_info, cli_models, cli_segment, cli_spectral, cli_train_spectral)
    assert all(module.app is app for module in of_the_app)
    group = typer.main.get_command(app)
    lines = [
        shlex.split(line.strip())
        for block in blocks(tutorial, "sh")
        for line in block.splitlines()
        if "freqseg" in line
    ]
    assert len(lines) >= 8
    for words in lines:
        name, arguments = words[1], words[2:]
        assert words[0] == "freqseg"
        context = group.make_context("freqseg", [name], resilient_parsing=True)
        command = group.get_command(context, name)
        assert command is not None, name
        if name == "models":
            command = command.get_command(context, arguments.pop(0))
            assert command is not None, words
        # Reads and checks the arguments, and runs nothing.
        command.make_context(name, arguments, parent=context)


def test_the_script_for_slicer_uses_the_logic_as_it_is(tutorial: str, project_root: Path) -> None:
    module = ast.parse((project_root / "FreqSeg" / "FreqSeg.py").read_text(encoding="utf-8"))
    logic = next(node for node in module.body if isinstance(node, ast.ClassDef) and node.name == "FreqSegLogic")
    methods = {node.name: node.args for node in logic.body if isinstance(node, ast.FunctionDef)}
    called = [
        {
            node.func.attr: node
            for node in ast.walk(ast.parse(script))
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and ast.unparse(node.func.value) == "logic"
        }
        for script in blocks(tutorial, "python")
    ]
    assert [set(calls) for calls in called] == [{name, "close"} for name in ("segment", "segmentWithModel", "fuse")]
    assert {name for calls in called for name in calls} <= set(methods)
    assert len(called[0]["segment"].args) == len(methods["segment"].args) - 1
    for calls, name in ((called[1], "segmentWithModel"), (called[2], "fuse")):
        assert len(calls[name].args) == 2
        assert {word.arg for word in calls[name].keywords} <= {word.arg for word in methods[name].kwonlyargs}
    named = {argument.arg for argument in methods["segment"].kwonlyargs}
    spoken_of = set(re.findall(r"`(\w+)=[^`]*`", tutorial))
    assert spoken_of
    assert spoken_of <= named


def test_settings_spoken_of_are_settings(tutorial: str) -> None:
    from FreqSegLib.settings import TextSegmentationSettings

    written = re.findall(r"`(\{\"threshold\"[^`]*\})`", tutorial)
    assert len(written) == 1
    TextSegmentationSettings(**ast.literal_eval(written[0]))


def test_labels_are_those_of_the_panel(tutorial: str, project_root: Path) -> None:
    ui = ElementTree.parse(project_root / "FreqSeg" / "Resources" / "UI" / "FreqSeg.ui")
    shown = {(string.text or "").rstrip(":") for string in ui.iter("string")}
    prose = re.sub(r"```.*?```", "", tutorial, flags=re.DOTALL).replace("**", "")
    labels = set(re.findall(r"(?<![*\w])\*([^*\n]+)\*(?![*\w])", prose)) - NOT_LABELS
    assert len(labels) > 12
    assert labels - shown == set()


def test_sections_are_those_of_the_panel(tutorial: str, project_root: Path) -> None:
    ui = ElementTree.parse(project_root / "FreqSeg" / "Resources" / "UI" / "FreqSeg.ui")
    shown = {string.text for string in ui.iter("string")}
    sections = {"Segment", "Refine with clicks", "Segment with a trained model", "Fuse", "Look inside", "Models"}
    assert sections <= shown & set(re.findall(r"\*\*([^*]+)\*\*", tutorial))


def test_pictures_and_pages_it_links_to_are_there(tutorial: str, project_root: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", tutorial)
    assert len(targets) >= 5
    assert [name for name in targets if not (project_root / "docs" / name).is_file()] == []
