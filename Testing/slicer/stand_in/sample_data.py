"""The module ``SampleData``: registered sources are written down, nothing is downloaded unless it is a local file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import slicer


@dataclass
class SampleDataSource:
    """One registered data set."""

    category: str | None = None
    sampleName: str | None = None
    sampleDescription: str | None = None
    uris: Any = None
    fileNames: Any = None
    nodeNames: Any = None
    customDownloader: Any = None
    thumbnailFileName: str | None = None
    loadFileType: str | None = None
    loadFileProperties: dict[str, Any] = field(default_factory=dict)
    checksums: Any = None
    loadFiles: Any = None


class SampleDataLogic:
    """The functions of Slicer's sample-data logic that modules use."""

    registered: ClassVar[list[SampleDataSource]] = []

    @staticmethod
    def registerCustomSampleDataSource(**values: Any) -> None:
        """Register a data set.

        Raises:
            TypeError: a keyword is not documented.
            ValueError: as many file names, node names and checksums as URIs are needed.
        """
        source = SampleDataSource(**values)
        lengths = {
            name: 1 if isinstance(value, str) else len(value)
            for name in ("uris", "fileNames", "nodeNames", "checksums")
            if (value := getattr(source, name)) is not None
        }
        if len(set(lengths.values())) > 1:
            raise ValueError(f"sample data {source.sampleName}: lengths differ: {lengths}")
        SampleDataLogic.registered.append(source)

    def downloadFromSource(self, source: SampleDataSource) -> list[Any]:
        """Load local (``file:``) sources into the scene."""
        nodes = []
        uris = [source.uris] if isinstance(source.uris, str) else source.uris
        names = [source.nodeNames] if isinstance(source.nodeNames, str) else source.nodeNames
        for uri, name in zip(uris, names, strict=True):
            if urlsplit(uri).scheme != "file":
                raise RuntimeError(f"the stand-in has no network: {uri}")
            nodes.append(slicer.util.loadVolume(str(Path(unquote(urlsplit(uri).path))), {"name": name}))
        return nodes


def build_module() -> ModuleType:
    """Return the module ``SampleData``."""
    module: Any = ModuleType("SampleData", __doc__)
    module.SampleDataLogic, module.SampleDataSource = SampleDataLogic, SampleDataSource
    return module
