"""Pictures to try FreqSeg on, in Slicer's Sample Data module."""

from __future__ import annotations

from pathlib import Path

from .library import find_library

CATEGORY = "FreqSeg"
TESTING_DATA = "https://github.com/Slicer/SlicerTestingData/releases/download/SHA256/"
MR_HEAD = "cc211f0dfd9a05ca3841ce1141b292898b2dd2d3f08286affadf823a7e58df93"
CT_CHEST = "4507b664690840abb6cb9af2d919377ffc4ef75b167cb6fd0f747befdb12e38e"
SIMULATED = {
    # sample name: file, node name, sha256
    "FreqSegFLAIR": (
        "simulated_flair.nrrd",
        "Simulated FLAIR",
        "b22bd77053303e9e992fadfed8f9a011057674649d7b6da95f6c57175e7dbc60",
    ),
    "FreqSegCT": (
        "simulated_ct.nrrd",
        "Simulated CT",
        "291860972adf1ef25a438feda49854379314b6e971aa68dcd04cdb2f601f6223",
    ),
}


def register_sample_data() -> None:
    """The simulated head that comes with FreqSeg, from its own folder, and two of Slicer's hosted volumes."""
    import SampleData

    icons = Path(__file__).resolve().parents[1] / "Resources" / "Icons"
    register = SampleData.SampleDataLogic.registerCustomSampleDataSource
    for name, (file, node_name, sha256) in SIMULATED.items():
        path = sample_path(file)
        if path is not None:
            register(
                category=CATEGORY,
                sampleName=name,
                thumbnailFileName=str(icons / f"{name}.png"),
                uris=path.as_uri(),
                fileNames=file,
                checksums=f"SHA256:{sha256}",
                nodeNames=node_name,
            )
    for name, file, node_name, sha256 in (
        ("FreqSegMRHead", "MR-head.nrrd", "MRHead", MR_HEAD),
        ("FreqSegCTChest", "CT-chest.nrrd", "CTChest", CT_CHEST),
    ):
        register(
            category=CATEGORY,
            sampleName=name,
            thumbnailFileName=str(icons / "FreqSeg.png"),
            uris=TESTING_DATA + sha256,
            fileNames=file,
            checksums=f"SHA256:{sha256}",
            nodeNames=node_name,
        )


def sample_path(file: str) -> Path | None:
    """Where a simulated volume lies, or None where it was not installed."""
    find_library()
    from FreqSegLib.errors import InputError
    from FreqSegLib.samples import sample

    try:
        return sample(file)
    except InputError:
        return None
