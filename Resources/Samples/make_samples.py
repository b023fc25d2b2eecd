"""Write the simulated head CT, FLAIR MR and lesion that the demo opens.

Nobody was scanned for these images. The brain is the ICBM152 2009a average (Fonov et al. 2011) as nilearn packages it,
tilted, warped and pushed aside by a made-up mass; skull, scalp, coil shading and noise are computed here. The seed is
fixed, so the same versions of numpy and scipy write the same voxels. Run it with ``make samples``; licences and numbers
are in the README beside it.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

SEED = 152
SIZE = (208, 240, 25)  # voxels along left, posterior, superior
SPACING = (1.0, 1.0, 4.0)  # mm
CENTRE = (0.0, 15.0, 43.0)  # LPS mm of the middle of the grid; (0, 0, 0) is near the anterior commissure
SUBSLICES = 4  # thin slices averaged into a thick one: partial volume

BRAIN_SCALE = 0.94  # the average is larger than most brains
TILT = (5.0, -1.5, 3.0)  # degrees of pitch, roll and yaw: nobody lies straight
HEAD_WARP = (1.1, 80.0)  # mm, standard deviation and length of the warp that ends the average's symmetry ...
BRAIN_WARP = (1.8, 28.0)  # ... and of the one of the brain in its skull
SHARPEN = 3.0  # exponent on the tissue maps: 152 averaged cortices are softer than one

LESION = (31.0, -16.0, 36.0)  # RAS mm: right centrum semiovale, frontal to parietal
LESION_RADIUS = 15.5  # mm, before its edge is made irregular
OEDEMA_REACH = 4.5  # mm beyond the mass, in white matter only
MASS_EFFECT = (0.24, 26.0)  # share of the distance pushed aside at the centre; mm over which that dies away

FLUID_GAP = 1.6  # mm of fluid between the brain's hull and the skull
SKIN_THICKNESS = 1.4  # mm
FLAIR_NOISE = 5.5  # Rician, in FLAIR units
CT_NOISE = 5.0  # HU

NOTICE = "Simulated from the ICBM152 2009a average brain; not a patient. See Resources/Samples/README.md"


@dataclass(frozen=True)
class Tissue:
    """What a tissue looks like: CT in HU, FLAIR in units where white matter is 100."""

    ct: float
    flair: float


WHITE_MATTER = Tissue(30, 100)
GREY_MATTER = Tissue(37, 119)
FLUID = Tissue(8, 17)
FALX = Tissue(52, 55)
SINUS = Tissue(58, 22)
MASS = Tissue(21, 180)
OEDEMA = Tissue(23, 156)
BONE_TABLE = Tissue(1180, 10)
DIPLOE = Tissue(640, 80)
MUSCLE = Tissue(56, 75)
FAT = Tissue(-85, 225)
SKIN = Tissue(45, 160)
AIR = Tissue(-1000, 0)

Shares = dict[Tissue, np.ndarray]  # how much of each voxel is which tissue; the shares sum to one


@dataclass(frozen=True)
class Samples:
    """The three volumes, each (k, j, i) on one LPS grid: CT int16 in HU, FLAIR int16, lesion uint8 0 or 1."""

    ct: np.ndarray
    flair: np.ndarray
    lesion: np.ndarray


class Template:
    """The average brain, asked at points (3, ...) in ICBM152 RAS mm."""

    def __init__(self) -> None:
        from nilearn import datasets

        self._grey = _Map(datasets.load_mni152_gm_template(resolution=1))
        self._white = _Map(datasets.load_mni152_wm_template(resolution=1))
        mask = datasets.load_mni152_brain_mask(resolution=2)
        self._hull = _Map(mask, _distance_to_hull(np.asarray(mask.dataobj) > 0, spacing=2.0), outside=60.0)

    def tissues(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shares of grey and white matter."""
        return self._grey.at(points), self._white.at(points)

    def beyond_hull(self, points: np.ndarray) -> np.ndarray:
        """mm outside the brain's closed outline, negative inside."""
        return self._hull.at(points)


def simulate(seed: int = SEED) -> Samples:
    """The registered CT, FLAIR and lesion mask; one ``seed``, one result."""
    # numpy froze RandomState's streams; default_rng's may change between versions.
    random = np.random.RandomState(seed)
    template = Template()
    points = _patient_points()
    thin = points.shape[1:]
    warp = np.stack([HEAD_WARP[0] * _smooth_noise(random, thin, HEAD_WARP[1]) for _ in range(3)])
    depth = BRAIN_SCALE * template.beyond_hull(_to_template(points + warp))

    # What happens inside a skull leaves its shape alone.
    push = _mass_effect(points) + np.stack(
        [BRAIN_WARP[0] * _smooth_noise(random, thin, BRAIN_WARP[1]) for _ in range(3)]
    )
    push *= (-depth / 12).clip(0, 1)
    shares = _brain(random, template, _to_template(points + warp - push), depth)
    _grow_lesion(random, shares, points)
    _wrap_in_head(random, shares, points, depth)

    thick = {tissue: _thicken(share) for tissue, share in shares.items()}
    # Slightly smoothed: nobody who outlines a lesion draws single voxels.
    abnormal = ndimage.gaussian_filter(thick[MASS] + thick[OEDEMA], (0, 0.8, 0.8))
    lesion = _largest_piece(abnormal >= 0.5)
    return Samples(ct=_scan_ct(random, thick), flair=_scan_flair(random, thick), lesion=lesion)


def write(samples: Samples, folder: Path) -> list[Path]:
    """Write the three NRRD files into ``folder`` and return their paths."""
    import SimpleITK as sitk

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, array, modality, what in (
        ("simulated_ct.nrrd", samples.ct, "CT", "Simulated head CT, HU"),
        ("simulated_flair.nrrd", samples.flair, "MR", "Simulated head FLAIR MR"),
        ("simulated_lesion.nrrd", samples.lesion, "SEG", "Simulated lesion, truth mask"),
    ):
        image = sitk.GetImageFromArray(array)
        image.SetSpacing(SPACING)
        image.SetOrigin(_origin())
        image.SetMetaData("modality", modality)
        image.SetMetaData("description", f"{what}. {NOTICE}")
        path, unfinished = folder / name, folder / f"unfinished_{name}"
        sitk.WriteImage(image, str(unfinished), useCompression=True, compressionLevel=9)
        os.replace(unfinished, path)
        paths.append(path)
    return paths


def describe(samples: Samples) -> str:
    """The lesion's volume, slices and centre, as the README gives them."""
    k, j, i = np.nonzero(samples.lesion)
    millilitres = len(k) * float(np.prod(SPACING)) / 1000
    left, back, up = np.asarray(_origin()) + np.asarray(SPACING) * (i.mean(), j.mean(), k.mean())
    return (
        f"lesion: {millilitres:.1f} ml, slices {k.min()} to {k.max()}, largest in slice {np.bincount(k).argmax()}, "
        f"centre at LPS ({left:.0f}, {back:.0f}, {up:.0f}) mm"
    )


def _origin() -> tuple[float, ...]:
    return tuple(c - (n - 1) / 2 * s for c, n, s in zip(CENTRE, SIZE, SPACING, strict=True))


def _patient_points() -> np.ndarray:
    """RAS mm (3, k, j, i) of the thin slices' voxels."""
    left, back, first = _origin()
    x = -(left + SPACING[0] * np.arange(SIZE[0]))
    y = -(back + SPACING[1] * np.arange(SIZE[1]))
    z = first + SPACING[2] * ((np.arange(SIZE[2] * SUBSLICES) + 0.5) / SUBSLICES - 0.5)
    return np.stack(np.meshgrid(z, y, x, indexing="ij")[::-1])


def _to_template(points: np.ndarray) -> np.ndarray:
    """Patient RAS mm to ICBM152 RAS mm: this head's tilt and size."""
    pitch, roll, yaw = np.deg2rad(TILT)
    about_x = np.array([[1, 0, 0], [0, np.cos(pitch), -np.sin(pitch)], [0, np.sin(pitch), np.cos(pitch)]])
    about_y = np.array([[np.cos(roll), 0, np.sin(roll)], [0, 1, 0], [-np.sin(roll), 0, np.cos(roll)]])
    about_z = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1]])
    return np.tensordot(about_x @ about_y @ about_z / BRAIN_SCALE, points, axes=1)


def _mass_effect(points: np.ndarray) -> np.ndarray:
    """How far, in mm, the mass pushed what is now at ``points``."""
    share, reach = MASS_EFFECT
    offset = points - np.reshape(LESION, (3, 1, 1, 1))
    return share * np.exp(-(offset**2).sum(axis=0) / reach**2) * offset


def _brain(random: np.random.RandomState, template: Template, points: np.ndarray, depth: np.ndarray) -> Shares:
    wrinkles = np.stack([0.8 * _smooth_noise(random, depth.shape, 10.0) for _ in range(3)])
    grey, white = template.tissues(points + wrinkles)
    fluid = (1 - grey - white).clip(0, 1)
    grey, white, fluid = (share**SHARPEN for share in (grey, white, fluid))
    total = grey + white + fluid
    shares = {GREY_MATTER: grey / total, WHITE_MATTER: white / total, FLUID: fluid / total}

    aside = np.abs(points[0])
    # The falx hangs in the cleft between the hemispheres; the third ventricle, as fluid and as central, lies deeper.
    _put(shares, FALX, 0.8 * shares[FLUID] * np.exp(-((aside / 0.9) ** 2)) * _step(depth + 34))
    _put(shares, SINUS, _step(4.5 - aside + 0.9 * (depth - FLUID_GAP).clip(None, 0)) * _step(55 - points[1]))
    return shares


def _grow_lesion(random: np.random.RandomState, shares: Shares, points: np.ndarray) -> None:
    x, y, z = points - np.reshape(LESION, (3, 1, 1, 1))
    radius = np.sqrt(x**2 + (y / 1.15) ** 2 + z**2)
    edge = LESION_RADIUS + 3.0 * _smooth_noise(random, x.shape, 14.0) + 1.2 * _smooth_noise(random, x.shape, 5.0)
    solid = 1 - shares[FLUID] - shares[FALX] - shares[SINUS]
    white = shares[WHITE_MATTER].copy()
    reach = OEDEMA_REACH * (1 + 0.6 * _smooth_noise(random, x.shape, 9.0))
    _put(shares, OEDEMA, white * solid * _step((edge + reach - radius) / 2))
    _put(shares, MASS, solid * (0.7 + 0.3 * white) * _step((edge - radius) / 1.8))


def _wrap_in_head(random: np.random.RandomState, shares: Shares, points: np.ndarray, depth: np.ndarray) -> None:
    """Fluid, skull and scalp around the brain, each layer as thick as it is on that side of a head."""
    offset = points - np.reshape((0.0, -15.0, 15.0), (3, 1, 1, 1))
    right, front, up = offset / np.sqrt((offset**2).sum(axis=0))
    temple = right**2 * _step((30 - points[2]) / 25)
    back = (-front).clip(0) ** 2
    bone = 5.4 + 1.6 * back + 1.2 * front.clip(0) ** 2 - 2.2 * temple + 0.6 * _smooth_noise(random, depth.shape, 30.0)
    fat = 2.6 + 1.4 * back - 0.8 * temple + 0.5 * _smooth_noise(random, depth.shape, 25.0)
    gap = FLUID_GAP + 0.8 * up.clip(0) + 0.4 * _smooth_noise(random, depth.shape, 20.0)
    for tissue, thickness in (
        (FLUID, gap),
        (BONE_TABLE, 0.3 * bone),
        (DIPLOE, 0.42 * bone),
        (BONE_TABLE, 0.28 * bone),
        (MUSCLE, 0.8 + 7.0 * temple),
        (FAT, fat),
        (SKIN, SKIN_THICKNESS),
    ):
        _put(shares, tissue, _step(depth), keep=SINUS if tissue is FLUID else None)
        depth = depth - thickness
    _put(shares, AIR, _step(depth))


def _scan_ct(random: np.random.RandomState, shares: Shares) -> np.ndarray:
    clean = ndimage.gaussian_filter(_mix(shares, "ct"), (0, 0.55, 0.55))
    noise = ndimage.gaussian_filter(random.standard_normal(clean.shape), (0, 0.5, 0.5))
    noisy = clean + CT_NOISE / noise.std() * noise
    return np.where(_head(shares), np.rint(noisy), AIR.ct).clip(AIR.ct, None).astype(np.int16)


def _scan_flair(random: np.random.RandomState, shares: Shares) -> np.ndarray:
    clean = _mix(shares, "flair")
    spacing = (SPACING[2], SPACING[1], SPACING[0])
    clean += 0.035 * shares[WHITE_MATTER] * WHITE_MATTER.flair * _smooth_noise(random, clean.shape, 6.0, spacing)
    clean += 0.09 * shares[MASS] * MASS.flair * _smooth_noise(random, clean.shape, 5.0, spacing)
    clean += 0.12 * shares[FAT] * FAT.flair * _smooth_noise(random, clean.shape, 12.0, spacing)
    clean = ndimage.gaussian_filter(clean, (0, 0.45, 0.45)) * np.exp(
        0.06 * _smooth_noise(random, clean.shape, 90.0, spacing)
    )
    real, imaginary = (FLAIR_NOISE * random.standard_normal(clean.shape) for _ in range(2))
    return np.where(_head(shares), np.rint(np.hypot(clean + real, imaginary)), 0).astype(np.int16)


def _put(shares: Shares, tissue: Tissue, share: np.ndarray, keep: Tissue | None = None) -> None:
    """Let ``tissue`` take ``share`` of every voxel from what is there, in place, except from ``keep``."""
    rest = 1 - share
    for other in shares:
        if other is not keep:
            shares[other] *= rest
    gain = share if keep is None else share * (1 - shares[keep])
    shares[tissue] = shares[tissue] + gain if tissue in shares else gain


def _mix(shares: Shares, contrast: str) -> np.ndarray:
    return np.sum([getattr(tissue, contrast) * share for tissue, share in shares.items()], axis=0)


def _head(shares: Shares) -> np.ndarray:
    return shares[AIR] < 0.98


def _step(distance: np.ndarray) -> np.ndarray:
    """0 below -0.5 mm, 1 above 0.5 mm: the share of a 1 mm voxel that lies past a surface."""
    return (distance + 0.5).clip(0, 1)


def _thicken(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, SUBSLICES, *values.shape[1:]).mean(axis=1)


def _largest_piece(mask: np.ndarray) -> np.ndarray:
    pieces, _ = ndimage.label(mask)
    return (pieces == np.bincount(pieces.ravel())[1:].argmax() + 1).astype(np.uint8)


def _smooth_noise(
    random: np.random.RandomState,
    shape: tuple[int, ...],
    length: float,
    spacing: tuple[float, ...] = (SPACING[2] / SUBSLICES, SPACING[1], SPACING[0]),
) -> np.ndarray:
    """Noise of zero mean and unit standard deviation that varies over ``length`` mm: a random cubic B-spline."""
    splines = []
    for count, step in zip(shape, spacing, strict=True):
        knots = int(count * step / length) + 4
        away = np.abs(np.arange(count)[:, None] * step / length - np.arange(knots)[None, :] + 1)
        near, far = 2 / 3 - away**2 + away**3 / 2, (2 - away).clip(0) ** 3 / 6
        splines.append(np.where(away < 1, near, far))
    values = random.standard_normal([spline.shape[1] for spline in splines])
    for spline in splines:
        values = np.tensordot(values, spline, axes=(0, 1))
    return (values - values.mean()) / values.std()


def _distance_to_hull(mask: np.ndarray, spacing: float, reach: float = 40.0) -> np.ndarray:
    """mm outside ``mask`` once its clefts narrower than twice ``reach`` are closed; negative inside."""
    room = int(np.ceil(reach / spacing)) + 1
    grown = ndimage.distance_transform_edt(~np.pad(mask, room)) * spacing < reach
    closed = ndimage.distance_transform_edt(grown) * spacing >= reach
    signed = (ndimage.distance_transform_edt(~closed) - ndimage.distance_transform_edt(closed)) * spacing
    inner = tuple(slice(room, -room) for _ in range(3))
    return ndimage.gaussian_filter(signed, 3.0)[inner]


class _Map:
    """An image of the template, sampled linearly."""

    def __init__(self, image: Any, values: np.ndarray | None = None, outside: float = 0.0) -> None:
        self._values = np.asarray(image.dataobj if values is None else values, dtype=np.float64)
        self._to_voxels, self._outside = np.linalg.inv(image.affine), outside

    def at(self, points: np.ndarray) -> np.ndarray:
        voxels = np.tensordot(self._to_voxels[:3, :3], points, axes=1) + self._to_voxels[:3, 3].reshape(3, 1, 1, 1)
        return ndimage.map_coordinates(self._values, voxels, order=1, cval=self._outside)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent, help="folder to write to")
    samples = simulate()
    for path in write(samples, parser.parse_args().output):
        print(f"{path} ({path.stat().st_size / 1e6:.2f} MB)")
    print(describe(samples))


if __name__ == "__main__":
    main()
