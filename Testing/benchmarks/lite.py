"""The lite preset: time a slice against LiteMedSAM's encoder alone, a second prompt, and memory over slices."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from Testing.benchmarks.lite_setup import lite_segmenter, plain_encoder, sample_volume
from Testing.benchmarks.measuring import Section, Taken, answer_parent, in_child, megabytes, peak_memory, seconds, taken

PROMPT, SECOND_PROMPT = "brain tumour", "glioma"
ENCODED = 3
GOAL, TRAINED_GOAL, SECOND_GOAL, BRANCHES = 1.5, 1.25, 0.25, 3


def lite_time(slices: Sequence[int], frequency_slices: int) -> Section:
    """Args:
    slices: sizes of the volumes, ascending; the last one gives the ratios.
    frequency_slices: size of the volume for the frequency branches.
    """
    section = Section("The lite preset: time")
    with tempfile.TemporaryDirectory() as folder:
        segmenter, said = lite_segmenter(Path(folder))
        plain = plain_encoder()
        section.say(
            f"{torch.get_num_threads()} threads, {said}, simulated FLAIR of {sample_volume(1).shape[1:]}, gate off: "
            "every slice goes through every stage. Ratios of processor time stand beside those of the clock: other "
            "programs disturb them less."
        )
        # the first run of anything pays for loading and for buffers
        segmenter.set_volume(sample_volume(1))
        segmenter.segment([PROMPT])
        images = _framed(segmenter, ENCODED)
        tower = segmenter.encoder.tower  # type: ignore[attr-defined]
        apart = max(float((tower.embed(image) - plain(image)).abs().max()) for image in images)
        rounds = [_encoders(tower, plain, images)]
        runs = {}
        for count in slices:
            runs[count] = _run(segmenter, count)
            rounds.append(_encoders(tower, plain, images))
        ours, slow = (sum((r[name] for r in rounds), Taken(0, 0)).over(len(rounds)) for name in ("ours", "plain"))
        largest = runs[slices[-1]]
        total = largest["tower"] + largest["first"]
        parts = {
            "LiteMedSAM's encoder, plain": slow,
            "LiteMedSAM's encoder, ours": ours,
            "set_volume": largest["tower"],
            "first prompt": largest["first"],
            "second prompt": largest["second"],
            "a prompt that asks M2IB": largest["m2ib"],
            **({"first prompt, trained method": largest["trained"]} if "trained" in largest else {}),
            "set_volume and first prompt": total,
        }
        section.table(
            ["part", "s a slice", "of the encoder alone", "by processor time"],
            [
                [name, f"{part.wall:.2f}", f"{part.wall / ours.wall:.2f}", f"{part.cpu / ours.cpu:.2f}"]
                for name, part in parts.items()
            ],
        )
        section.say(f"Largest difference between both encoders' embeddings: {apart:.1e}.")
        whole = "Raw branch, whole run over the encoder alone"
        _goal(section, f"{whole}, ours", total, ours, GOAL)
        _goal(section, f"{whole}, plain", total, slow, GOAL)
        _goal(section, f"{whole}, ours, M2IB", largest["tower"] + largest["m2ib"], ours, GOAL)
        if "trained" in largest:
            # its prompt includes the decoder's redrawing of every slice
            whole_trained = largest["tower"] + largest["trained"]
            _goal(section, "Trained method, whole run over the encoder alone, ours", whole_trained, ours, TRAINED_GOAL)
        _goal(section, "Second prompt, share of the first run", largest["second"], total, SECOND_GOAL)
        wholes = {count: run["tower"] + run["first"] for count, run in runs.items()}
        section.table(
            ["slices", "whole run, s", "s a slice", "processor s a slice"],
            [[str(n), f"{n * one.wall:.1f}", f"{one.wall:.2f}", f"{one.cpu:.2f}"] for n, one in wholes.items()],
        )
        few, many = wholes[slices[0]], wholes[slices[-1]]
        section.say(
            f"- Time a slice at {slices[-1]} slices over that at {slices[0]} (linear is 1): "
            f"**{many.wall / few.wall:.2f}**, by processor time {many.cpu / few.cpu:.2f}"
        )
        _frequency(section, segmenter, frequency_slices, ours)
    return section


def lite_memory(slices: Sequence[int]) -> Section:
    """Peak memory of child processes that segment volumes of so many slices."""
    section = Section("The lite preset: memory")
    rows, peaks = [], {}
    for count in slices:
        found = in_child("Testing.benchmarks.lite", slices=count)
        peaks[count] = found["peak"]
        rows.append(
            [
                str(count),
                *(megabytes(found[name]) for name in ("loaded", "peak", "volume")),
                f"{found['seconds'] / count:.2f}",
            ]
        )
    section.table(["slices", "models loaded", "peak", "the volume itself", "s a slice"], rows)
    few, many = min(slices), max(slices)
    if many > few:
        per_slice = (peaks[many] - peaks[few]) / (many - few) / 2**20
        section.say(f"- Peak at {many} slices over that at {few}: **{peaks[many] / peaks[few]:.2f}**")
        section.say(f"- Growth: {per_slice:.2f} MB a slice, the input, its saliency and its masks included")
    return section


def _goal(section: Section, what: str, part: Taken, whole: Taken, limit: float) -> None:
    ratio = part.cpu / whole.cpu
    section.goal(f"{what} (by processor time {ratio:.2f})", part.wall / whole.wall, limit, at_least=False)


def _run(segmenter: Any, count: int) -> dict[str, Taken]:
    """A slice's share of each part, on a volume that is not in the cache."""
    segmenter.cache.clear()
    volume = sample_volume(count)
    # this target asks NIB; others ask M2IB, which takes longer
    zero_shot = replace(segmenter.settings, method="zero-shot")
    with_m2ib = replace(zero_shot, bottleneck="m2ib")
    found = {
        "tower": taken(lambda: segmenter.set_volume(volume)).over(count),
        "first": taken(lambda: segmenter.segment([PROMPT], settings=zero_shot)).over(count),
        "second": taken(lambda: segmenter.segment([SECOND_PROMPT], settings=zero_shot)).over(count),
        "m2ib": taken(lambda: segmenter.segment([PROMPT], settings=with_m2ib)).over(count),
    }
    if segmenter.trained is not None:
        trained = replace(segmenter.settings, method="trained")
        found["trained"] = taken(lambda: segmenter.segment([PROMPT], settings=trained)).over(count)
    return found


def _frequency(section: Section, segmenter: Any, count: int, encoder: Taken) -> None:
    segmenter.cache.clear()
    settings = replace(segmenter.settings, frequency_branches="on", method="zero-shot")
    volume = sample_volume(count)
    tower = taken(lambda: segmenter.set_volume(volume, settings=settings)).over(count)
    prompt = taken(lambda: segmenter.segment([PROMPT], settings=settings)).over(count)
    section.say(
        f"Frequency branches on, {count} slices: set_volume {tower.wall:.2f} s, prompt {prompt.wall:.2f} s a slice."
    )
    passes = encoder.over(1 / BRANCHES)
    _goal(section, f"Frequency branches, whole run over {BRANCHES} passes of the encoder", tower + prompt, passes, GOAL)


def _framed(segmenter: Any, count: int) -> list[torch.Tensor]:
    """Slices as the encoder gets them, (1, 3, 256, 256) each."""
    segmenter.set_volume(sample_volume(count))
    prepared = segmenter.prepared
    slices = [torch.from_numpy(prepared.image(index))[None, None] for index in range(count)]
    return [prepared.frame.to_frame(image).expand(-1, 3, -1, -1).contiguous() for image in slices]


@torch.inference_mode()
def _encoders(tower: Any, plain: torch.nn.Module, images: list[torch.Tensor]) -> dict[str, Taken]:
    """A slice's time in each, taken in turns."""
    found = {"ours": Taken(0, 0), "plain": Taken(0, 0)}
    for image in images:
        for name, encode in (("ours", tower.embed), ("plain", plain)):
            found[name] += taken(lambda encode=encode, image=image: encode(image))  # type: ignore[misc]
    return {name: value.over(len(images)) for name, value in found.items()}


def _child(slices: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        segmenter, _ = lite_segmenter(Path(folder))
        volume = sample_volume(slices)
        loaded = peak_memory()
        elapsed = seconds(lambda: (segmenter.set_volume(volume), segmenter.segment([PROMPT])))
    return {"loaded": loaded, "peak": peak_memory(), "volume": volume.array.nbytes, "seconds": elapsed}


if __name__ == "__main__":
    answer_parent(_child)
