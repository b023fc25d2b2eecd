"""The files that Slicer installs beside its modules and slicer-core does not bring: small ones of our own.

Colour tables and terminologies with a few entries, under the names of Slicer's, so that the logics load them as they do
in the application. Codes are SNOMED CT's, as DICOM uses them; continuous colour maps are matplotlib's of the same name.
"""

from __future__ import annotations

import colorsys
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Entry = tuple[str, str, tuple[int, int, int]]

_TISSUES: list[Entry] = [("85756007", "Tissue", (128, 174, 128)), ("91727004", "Skin", (177, 122, 101))]
_ANATOMY: list[Entry] = [
    ("12738006", "Brain", (250, 250, 225)),
    ("76752008", "Breast", (255, 224, 199)),
    ("80891009", "Heart", (206, 110, 84)),
    ("64033007", "Kidney", (185, 102, 83)),
    ("10200004", "Liver", (221, 130, 101)),
    ("39607008", "Lung", (197, 165, 145)),
    ("78961009", "Spleen", (157, 108, 162)),
]
_ALTERED: list[Entry] = [
    ("367643001", "Cyst", (205, 205, 100)),
    ("79654002", "Edema", (140, 224, 228)),
    ("4147007", "Mass", (144, 238, 144)),
    ("108369006", "Neoplasm", (144, 238, 144)),
]
_CATEGORIES = (
    ("85756007", "Tissue", _TISSUES),
    ("123037004", "Anatomical Structure", _ANATOMY),
    ("49755003", "Morphologically Altered Structure", _ALTERED),
)
_SIDED = {"Kidney", "Lung"}


def write_share(share: Path) -> None:
    """Write the colour table and the terminologies below the application's share folder."""
    colors = share / "ColorFiles"
    colors.mkdir(parents=True)
    for name, table in _color_tables().items():
        lines = [f"{index} {label} {red} {green} {blue} 255" for index, (label, red, green, blue) in enumerate(table)]
        (colors / f"{name}.txt").write_text("\n".join([f"# {name}", *lines]) + "\n", encoding="utf-8")
    terminologies = share / "qt-loadable-modules" / "Terminologies"
    terminologies.mkdir(parents=True)
    for file_name, context in (
        ("SlicerGeneralAnatomy", "Segmentation category and type - 3D Slicer General Anatomy list"),
        ("DICOM-Master", "Segmentation category and type - DICOM master list"),
    ):
        path = terminologies / f"SegmentationCategoryTypeModifier-{file_name}.term.json"
        path.write_text(json.dumps(_terminology(context), indent=1), encoding="utf-8")
    regions = terminologies / "AnatomicRegionAndModifier-DICOM-Master.term.json"
    regions.write_text(json.dumps(_regions(), indent=1), encoding="utf-8")


def _color_tables() -> dict[str, list[tuple[str, int, int, int]]]:
    """Name of a table -> its entries: label, red, green, blue (0 to 255)."""
    import matplotlib

    labels = [_entry(f"Label_{label}", colorsys.hsv_to_rgb((label * 0.382) % 1.0, 0.55, 0.9)) for label in range(1, 33)]
    tables = {"GenericColors": [("Background", 0, 0, 0), *labels]}
    for name in ("Viridis", "Plasma", "Inferno", "Magma", "Cividis"):
        color_map = matplotlib.colormaps[name.lower()]
        tables[name] = [_entry(str(level), color_map(level)) for level in range(256)]
    rainbow = [_entry(str(level), colorsys.hsv_to_rgb(level / 255 * 0.66, 1.0, 1.0)) for level in range(256)]
    tables["HotToColdRainbow"], tables["ColdToHotRainbow"] = rainbow, rainbow[::-1]
    return tables


def _entry(label: str, rgb: Sequence[float]) -> tuple[str, int, int, int]:
    return label, round(255 * rgb[0]), round(255 * rgb[1]), round(255 * rgb[2])


def _code(value: str, meaning: str) -> dict[str, Any]:
    return {"CodeMeaning": meaning, "CodingSchemeDesignator": "SCT", "CodeValue": value}


def _terminology(context: str) -> dict[str, Any]:
    schema = "https://raw.githubusercontent.com/qiicr/dcmqi/master/doc/segment-context-schema.json#"
    categories = []
    for value, meaning, entries in _CATEGORIES:
        types = [_type(*entry) for entry in entries]
        categories.append({**_code(value, meaning), "showAnatomy": "true", "Type": types})
    return {
        "SegmentationCategoryTypeContextName": context,
        "@schema": schema,
        "SegmentationCodes": {"Category": categories},
    }


def _type(value: str, meaning: str, color: tuple[int, int, int]) -> dict[str, Any]:
    entry = {**_code(value, meaning), "3dSlicerLabel": meaning.lower(), "recommendedDisplayRGBValue": list(color)}
    if meaning in _SIDED:
        sides = (("7771000", "Left"), ("24028007", "Right"))
        entry["Modifier"] = [
            {
                **_code(side, name),
                "3dSlicerLabel": f"{name} {meaning}".lower(),
                "recommendedDisplayRGBValue": list(color),
            }
            for side, name in sides
        ]
    return entry


def _regions() -> dict[str, Any]:
    schema = "https://raw.githubusercontent.com/qiicr/dcmqi/master/doc/anatomic-context-schema.json#"
    return {
        "AnatomicContextName": "Anatomic codes - DICOM master list",
        "@schema": schema,
        "AnatomicCodes": {"AnatomicRegion": [_code(value, meaning) for value, meaning, _ in _ANATOMY]},
    }
