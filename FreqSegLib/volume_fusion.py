"""A CT and a registered MR in, one fused volume on the CT's grid out.

Grey levels are windowed to [0, 1] first (recorded in the result), the MR is brought onto the CT's grid, and slices are
fused in batches. Where there is no MR the fused volume shows the CT alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from FreqSegLib.errors import InputError, NotRegisteredError, SettingsError
from FreqSegLib.intensity import Normalised, in_hounsfield_units, normalise
from FreqSegLib.progress import CancelCallback, ProgressCallback, Stage
from FreqSegLib.registration import OnGrid, RegistrationCheck, RigidTransform, check_registration, register_rigidly
from FreqSegLib.settings import FusionSettings
from FreqSegLib.slices import SliceStack
from FreqSegLib.volume import Volume

if TYPE_CHECKING:
    import torch

    from FreqSegLib.device import Batches
    from FreqSegLib.fusion import Fused, FusionMethod

PRESETS = ("lite",)
NOTE = "freqseg_fusion"
"""Name of the record among ``Volume.notes``."""
DEFAULT_CT_WINDOW = "brain"
WHITE = 255.0
LARGEST_BATCH = {"cpu": 8, "cuda": 64}
CHECKED_SLICES = 48


@dataclass(frozen=True)
class SourceRecord:
    """How one source's grey levels came to [0, 1]: ``low`` and below to 0, ``high`` and above to 1."""

    name: str
    intensity: str
    low: float
    high: float


@dataclass(frozen=True)
class FusionRecord:
    """Everything needed to say, and to repeat, how a fused volume was made.

    Attributes:
        version: of FreqSeg.
        method, wave, levels: of the fusion; None where the method's own value was taken.
        grey_levels: of the fused voxels.
        ct, mr: their normalisation.
        axis: of the slices.
        resampled: whether the MR was brought onto the CT's grid.
        covered: share of the CT's voxels where there is an MR.
        check: mutual information of the pair and of its displaced copies; None if that was not asked for.
        transform: rows of the rigid transform from CT to MR points (4 x 4, LPS mm); None without registration.
        seed: of the registration.
    """

    version: str
    method: str
    wave: str | None
    levels: int | None
    grey_levels: str
    ct: SourceRecord
    mr: SourceRecord
    axis: str
    resampled: bool
    covered: float
    check: RegistrationCheck | None = None
    transform: tuple[tuple[float, ...], ...] | None = None
    seed: int | None = None

    def as_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self))


@dataclass(frozen=True, eq=False)
class FusionResult:
    """What fusing gave.

    Attributes:
        fused: float32 grey levels 0 to 255 on the CT's grid; its notes hold the record.
        masks: if asked for, the CT's share in per cent (uint8), a volume a band, named after it.
        warnings: what the user should know.
        record: how it was made.
        pair: both sources as they were fused, for pictures and metrics.
    """

    fused: Volume
    masks: tuple[Volume, ...]
    warnings: tuple[str, ...]
    record: FusionRecord
    pair: Pair

    @property
    def metadata(self) -> dict[str, Any]:
        """The record as plain values."""
        return asdict(self.record)


@dataclass(frozen=True, eq=False)
class Pair:
    """A CT and an MR ready to be fused: normalised, and the MR where the CT is.

    Attributes:
        stack: the CT's slices.
        ct_levels, mr_levels: their normalisation.
        mr_on_grid: the MR on the CT's grid, a slab at a time.
    """

    stack: SliceStack
    ct_levels: Normalised
    mr_levels: Normalised
    mr_on_grid: OnGrid

    def slices(self, indices: range) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
        """Slices ``indices`` (step 1) of both, (B, h, w) in [0, 1], and where there is an MR; it is 0 elsewhere."""
        ct, mr, there = self._both(indices)
        if there is None:
            return ct, mr, np.ones(ct.shape, dtype=bool)
        mr[~there] = 0
        return ct, mr, there

    def filled(self, indices: range) -> tuple[NDArray[np.float32], NDArray[np.float32], int]:
        """The same with the CT where there is no MR, as fusing the CT with itself gives the CT, and how many are MR."""
        ct, mr, there = self._both(indices)
        if there is None:
            return ct, mr, ct.size
        np.copyto(mr, ct, where=~there)
        return ct, mr, int(there.sum())

    def _both(self, indices: range) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_] | None]:
        ct = self.ct_levels.apply(self.stack.displayed(self.stack.volume.array)[indices.start : indices.stop])
        mr = self._mr(indices)
        if not self.mr_on_grid.resampled:
            return ct, self.mr_levels.apply(mr), None
        there = np.isfinite(mr)
        return ct, self.mr_levels.apply(np.nan_to_num(mr)), there

    def _mr(self, indices: range) -> NDArray[Any]:
        stack = self.stack
        backwards = stack.flips[0]
        start = stack.count - indices.stop if backwards else indices.start
        slab = self.mr_on_grid.slab(stack.order[0], start, start + len(indices))
        steps = tuple(slice(None, None, -1 if flip else None) for flip in stack.flips)
        return slab.transpose(stack.order)[steps]


class VolumeFuser:
    """Fuses volumes with one method; made once, used for many pairs.

    Example:
        >>> fuser = VolumeFuser.from_preset("lite")
        >>> result = fuser.fuse(Volume.read("ct.nii.gz"), Volume.read("mr.nii.gz"))
        >>> result.fused.write("fused.nrrd")
    """

    def __init__(
        self, method: FusionMethod, settings: FusionSettings | None = None, *, device: torch.device | None = None
    ) -> None:
        """Args:
        method: fuses (B, 1, H, W) tensors in [0, 1]; on a CPU several threads call it at once.
        settings: everything else; ``method``, ``wave`` and ``levels`` are only recorded.
        device: where the tensors go; the CPU if left out.
        """
        import torch

        from FreqSegLib.fusion.network import FusionNetwork

        self.method = method.for_inference() if isinstance(method, FusionNetwork) else method
        self.settings = settings or FusionSettings()
        self.device = device or torch.device("cpu")
        self._batches: dict[tuple[int, int], Batches] = {}

    @classmethod
    def from_preset(
        cls,
        preset: str = "lite",
        *,
        method: str | None = None,
        device: str = "auto",
        settings: FusionSettings | None = None,
        weights_folder: Path | None = None,
    ) -> VolumeFuser:
        """A fuser with shipped weights.

        Args:
            preset: ``lite``, the networks that come with FreqSeg.
            method: one of :data:`FreqSegLib.fusion.METHODS`; the settings' if left out.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            settings: everything else.
            weights_folder: holds other weights of the network.

        Raises:
            SettingsError: an unknown preset, method, wavelet or number of levels.
            WeightsError: weights that are missing or damaged.
            DeviceError: the device is absent.
        """
        if preset not in PRESETS:
            raise SettingsError(f"there is no fusion preset '{preset}'; choose one of {', '.join(PRESETS)}")
        from FreqSegLib.device import resolve_device
        from FreqSegLib.fusion import fusion_method

        chosen = settings or FusionSettings()
        if method is not None:
            chosen = _with(chosen, method=method)
        place = resolve_device(device)
        fuse = fusion_method(
            chosen.method, wave=chosen.wave, levels=chosen.levels, weights_folder=weights_folder, device=place
        )
        return cls(fuse, chosen, device=place)

    def fuse(
        self,
        ct: Volume,
        mr: Volume,
        *,
        register: Literal["rigid"] | None = None,
        masks: bool = False,
        progress: ProgressCallback | None = None,
        cancel: CancelCallback | None = None,
    ) -> FusionResult:
        """Fuse one pair.

        Args:
            ct: the CT, or a 2D image of one; its grid is the result's.
            mr: the MR of the same patient; resampled where its grid differs.
            register: ``rigid`` lays the MR on the CT first; the settings' choice if left out.
            masks: also return the CT's share of every band.
            progress: told the stage and the slices done.
            cancel: asked between batches; True ends the run.

        Raises:
            InputError: the pair does not overlap, is not registered, refers to unequal frames of reference, or has
                voxels that are NaN or all the same.
            SettingsError: a window that holds none of the values, or a setting out of range.
            DeviceError: a single slice does not fit into memory.
            Cancelled: ``cancel`` said so.
        """
        settings = self.settings if register is None else _with(self.settings, register=register)
        warnings = [*ct.warnings, *mr.warnings, *_strange(ct, mr)]
        _check_comparable(ct, mr, settings)
        Stage("Preparing", 0, progress, cancel).advance(0)
        levels = _levels(ct, settings.ct_window), _levels(mr, settings.mr_intensity, mr=True)
        warnings += [warning for one in levels for warning in one.warnings]
        transform = self._registered(ct, mr, levels, settings, progress, cancel)
        pair = Pair(SliceStack.of(ct, settings.axis), *levels, OnGrid(ct, mr, transform))
        check = _checked(pair, settings, progress, cancel) if settings.check else None
        if check is not None and check.doubtful:
            warnings.append(f"{_compared(check)} Look whether the two lie on each other.")
        fused, shares, covered = self._fused(pair, masks, progress, cancel)
        if covered < 0.995:
            warnings.append(
                f"The MR covers {100 * covered:.0f} % of the CT; elsewhere the fused volume shows the CT alone."
            )
        record = _record(ct, mr, pair, settings, covered, check, transform)
        result = replace(
            ct.with_array(fused, name=f"{ct.name} fused with {mr.name}"),
            modality=None,
            description="",
            warnings=(),
            notes={NOTE: record.as_json()},
        )
        bands = tuple(replace(result.with_array(share, name=name), notes={}) for name, share in shares.items())
        return FusionResult(result, bands, tuple(dict.fromkeys(warnings)), record, pair)

    def fuse_slices(self, ct: NDArray[np.float32], mr: NDArray[np.float32]) -> Fused:
        """One batch of slices (B, h, w) in [0, 1], without gradients; the result lies on the fuser's device."""
        import torch

        pair = [torch.from_numpy(np.ascontiguousarray(one))[:, None].to(self.device) for one in (ct, mr)]
        with torch.inference_mode():
            return self.method(*pair)

    def _new_batches(self) -> Batches:
        from FreqSegLib.device import Batches, MeasuredBatches

        size = self.settings.batch_size
        return Batches(size) if size else MeasuredBatches(LARGEST_BATCH.get(self.device.type, 1))

    def _registered(
        self,
        ct: Volume,
        mr: Volume,
        levels: tuple[Normalised, Normalised],
        settings: FusionSettings,
        progress: ProgressCallback | None,
        cancel: CancelCallback | None,
    ) -> RigidTransform | None:
        if settings.register is None:
            return None
        Stage("Registering", 0, progress, cancel).advance(0)
        still, mobile = (one.with_array(level.apply(one.array)) for one, level in zip((ct, mr), levels, strict=True))
        return register_rigidly(still, mobile, seed=settings.seed, cancel=cancel)

    def _fused(
        self, pair: Pair, keep_masks: bool, progress: ProgressCallback | None, cancel: CancelCallback | None
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[np.uint8]], float]:
        """Fused voxels and masks in the CT's layout, and the share of voxels with an MR."""
        from FreqSegLib.device import SideBySide

        stack = pair.stack
        fused = stack.empty(np.float32)
        shares: dict[str, NDArray[np.uint8]] = {}
        covered = 0
        # what was measured on one volume holds for the next of this size
        batches = self._batches.setdefault(stack.slice_shape, self._new_batches())

        threads = SideBySide(self.device)

        def work(indices: range) -> int:
            ct, mr, there = pair.filled(indices)

            def part(start: int, stop: int) -> None:
                place = slice(indices.start + start, indices.start + stop)
                found = self.fuse_slices(ct[start:stop], mr[start:stop])
                stack.displayed(fused)[place] = found.image[:, 0].float().clamp(0, 1).mul_(WHITE).cpu().numpy()
                if keep_masks:
                    for name, values in _shares(found, stack.slice_shape, getattr(self.method, "wave", None)).items():
                        if name not in shares:
                            # another thread may be here too; the first one's array is kept
                            shares.setdefault(name, stack.empty(np.uint8))
                        stack.displayed(shares[name])[place] = values

            threads.run(part, len(indices))
            return there

        stage = Stage("Fusing", stack.count, progress, cancel)
        with threads:
            for indices, count in batches.run(stack.count, work):
                covered += count
                stage.advance(indices.stop)
        return fused, shares, covered / fused.size


def read_record(volume: Volume) -> dict[str, Any] | None:
    """The record among a fused volume's notes; None if it has none, or it is damaged."""
    try:
        found = json.loads(volume.notes[NOTE])
    except (KeyError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def prepared_pair(ct: Volume, mr: Volume, settings: FusionSettings | None = None) -> Pair:
    """A pair as :class:`VolumeFuser` sees it, without registration or checks of its place: for pictures and metrics.

    Raises:
        InputError, SettingsError: as :meth:`VolumeFuser.fuse`.
    """
    chosen = settings or FusionSettings()
    levels = _levels(ct, chosen.ct_window), _levels(mr, chosen.mr_intensity, mr=True)
    return Pair(SliceStack.of(ct, chosen.axis), *levels, OnGrid(ct, mr))


def _with(settings: FusionSettings, **changes: Any) -> FusionSettings:
    return replace(settings, **changes)


def _levels(volume: Volume, wanted: str, *, mr: bool = False) -> Normalised:
    """How grey levels map to [0, 1]."""
    automatic = wanted.strip().lower() == "auto"
    if not automatic:
        return normalise(volume, wanted)
    if not mr and in_hounsfield_units(volume):
        return normalise(volume, DEFAULT_CT_WINDOW)
    found = normalise(volume, "percentile")
    if volume.array.dtype == np.uint8:
        return Normalised(0.0, WHITE, "8-bit grey levels as they are")
    return found


def _strange(ct: Volume, mr: Volume) -> Iterator[str]:
    """What looks as if the wrong files were chosen."""
    if in_hounsfield_units(mr) or (mr.modality or "").upper() == "CT":
        if in_hounsfield_units(ct) or (ct.modality or "").upper() == "CT":
            yield f"'{mr.name}', given as the MR, looks like a CT too: this fuses two CTs."
        else:
            yield f"'{mr.name}', given as the MR, looks like a CT; are the two exchanged? The CT comes first."
    elif (ct.modality or "CT").upper() != "CT":
        yield f"'{ct.name}', given as the CT, says it is {ct.modality}."
    if mr.modality and mr.modality.upper() not in ("MR", "CT"):
        yield f"'{mr.name}', given as the MR, says it is {mr.modality}."
    if ct.patient and mr.patient and ct.patient != mr.patient:
        yield f"The two belong to different patients, by their DICOM headers: '{ct.patient}' and '{mr.patient}'."


def _check_comparable(ct: Volume, mr: Volume, settings: FusionSettings) -> None:
    """Refuse what cannot lie on each other, before anything is computed."""
    if ct.spatial_dimension != mr.spatial_dimension:
        raise InputError(
            f"'{ct.name}' has {ct.spatial_dimension} dimensions and '{mr.name}' {mr.spatial_dimension}; "
            "give two volumes, or two images"
        )
    if ct.spatial_dimension == 2:
        if settings.register is not None:
            raise InputError(
                "single images have no place in the patient to register by; give volumes, or register them with "
                "another program"
            )
        if ct.shape != mr.shape:
            raise InputError(
                f"images must have one size, as nothing says how to lay one on the other: '{ct.name}' has "
                f"{ct.shape[1]} x {ct.shape[2]} pixels, '{mr.name}' {mr.shape[1]} x {mr.shape[2]}"
            )
        return
    apart = ct.frame_of_reference and mr.frame_of_reference and ct.frame_of_reference != mr.frame_of_reference
    if apart and settings.check and settings.register is None:
        raise NotRegisteredError(
            f"'{ct.name}' and '{mr.name}' refer to unequal frames of reference ({ct.frame_of_reference} and "
            f"{mr.frame_of_reference}), so their positions do not compare. Register them (--register rigid), or take "
            "them as they are (--no-check)"
        )


def _checked(
    pair: Pair, settings: FusionSettings, progress: ProgressCallback | None, cancel: CancelCallback | None
) -> RegistrationCheck | None:
    """Refuse a pair that does not lie on each other."""
    Stage("Checking the registration", 0, progress, cancel).advance(0)
    flat = pair.stack.volume.spatial_dimension == 2
    # a few slabs spread over the volume: MR may be there in some of them only
    ct, mr = _spread(pair, cancel)
    offer = (
        "Register them with another program"
        if flat
        else "Register them (--register rigid)"
        if settings.register is None
        else "Registering did not help; check that both show the same region"
    )
    if not len(ct):
        raise NotRegisteredError(
            f"'{pair.stack.volume.name}' and the MR do not overlap: no voxel of the CT lies inside the MR. {offer}, "
            "or check that they belong together"
        )
    try:
        check = check_registration(ct, mr)
    except InputError as problem:
        raise NotRegisteredError(f"{problem}. {offer}, or take them as they are (--no-check)") from problem
    if check is not None and not check.registered:
        raise NotRegisteredError(f"{_compared(check)} {offer}, or take them as they are (--no-check)")
    return check


def _spread(pair: Pair, cancel: CancelCallback | None) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Some slices with an MR, evenly over the volume."""
    stage = Stage("Checking the registration", 0, None, cancel)
    found_ct, found_mr = [], []
    for index in np.unique(np.linspace(0, pair.stack.count - 1, min(CHECKED_SLICES, pair.stack.count)).round()):
        stage.advance(0)
        ct, mr, there = pair.slices(range(int(index), int(index) + 1))
        if there.any():
            found_ct.append(np.where(there, ct, np.float32(0)))
            found_mr.append(mr)
    empty = np.empty((0, *pair.stack.slice_shape), dtype=np.float32)
    return (np.concatenate(found_ct), np.concatenate(found_mr)) if found_ct else (empty, empty)


def _compared(check: RegistrationCheck) -> str:
    how = "turned by 180 degrees" if check.turned >= max(check.shifted) else "shifted by 8 pixels"
    return (
        f"The CT and the MR do not seem to lie on each other: they share {check.own:.2f} bits, but "
        f"{check.best_copy:.2f} bits when the MR is {how}."
    )


def _shares(found: Fused, shape: tuple[int, int], wave: str | None) -> dict[str, NDArray[np.uint8]]:
    """The CT's share of every band in per cent, at the slices' size, by name."""
    shares = {}
    details = sum(mask.shape[1] > 1 for mask in found.masks)
    for index, (name, mask) in enumerate(zip(found.names, found.masks, strict=True)):
        if tuple(mask.shape[-2:]) == shape:
            level, offsets = 0, [(0.0, 0.0)]
        elif wave is None:
            # every second pixel of the level before
            level = round(float(np.log2(max(1.0, shape[0] / mask.shape[-2]))))
            offsets = [(0.0, 0.0)]
        else:
            # details come finest first, then the low band of the last level
            level = min(index + 1, details)
            low, high = (_offset(wave, level, high=high) for high in (False, True))
            offsets = [(high, low), (low, high), (high, high)] if index < details else [(low, low)]
        per_cent = mask.float().clamp(0, 1).mul(100).round().byte().cpu().numpy()
        for channel, (band, (down, along)) in enumerate(zip(band_names(name, mask.shape[1]), offsets, strict=True)):
            rows = _coefficients(shape[0], mask.shape[-2], level, down)
            columns = _coefficients(shape[1], mask.shape[-1], level, along)
            shares[band] = per_cent[:, channel][:, rows[:, None], columns]
    return shares


def _offset(wave: str, level: int, *, high: bool) -> float:
    """Where coefficient 0 of a level lies, in pixels: the middle of what its filters see."""
    import pywt

    filters = pywt.Wavelet(wave)
    low = np.array(filters.dec_lo)
    weights = np.array(filters.dec_hi) ** 2 if high else low
    delay = float((np.arange(len(weights)) * weights).sum() / weights.sum())
    low_delay = float((np.arange(len(low)) * low).sum() / low.sum())
    # coefficient n sees the samples 2 n + 1 - k of the level before
    before = sum(2**step * (1 - low_delay) for step in range(level - 1))
    return before + 2 ** (level - 1) * (1 - delay)


def _coefficients(count: int, have: int, level: int, offset: float) -> NDArray[np.intp]:
    """The coefficient nearest to each of ``count`` pixels."""
    return np.clip(np.rint((np.arange(count) - offset) / 2**level), 0, have - 1).astype(np.intp)


def band_names(name: str, count: int) -> Sequence[str]:
    """``level 1 LH, HL, HH`` with 3 bands gives ``level 1 LH``, ``level 1 HL``, ``level 1 HH``; one keeps its name."""
    if count == 1:
        return (name,)
    first, *others = (part.strip() for part in name.split(","))
    if 1 + len(others) != count:
        return [f"{name} {number}" for number in range(1, count + 1)]
    before = first.rpartition(" ")[0]
    return [first, *(f"{before} {other}".strip() for other in others)]


def _record(
    ct: Volume,
    mr: Volume,
    pair: Pair,
    settings: FusionSettings,
    covered: float,
    check: RegistrationCheck | None,
    transform: RigidTransform | None,
) -> FusionRecord:
    from FreqSegLib import __version__

    ct_source, mr_source = (
        SourceRecord(volume.name, levels.label, levels.low, levels.high)
        for volume, levels in ((ct, pair.ct_levels), (mr, pair.mr_levels))
    )
    return FusionRecord(
        version=__version__,
        method=settings.method,
        wave=settings.wave,
        levels=settings.levels,
        grey_levels="0 to 255",
        ct=ct_source,
        mr=mr_source,
        axis=pair.stack.axis,
        resampled=pair.mr_on_grid.resampled,
        covered=round(covered, 4),
        check=check,
        transform=None if transform is None else tuple(tuple(row) for row in transform.matrix.tolist()),
        seed=None if transform is None else settings.seed,
    )
