"""What each part of the method adds: the trained model form by form, and the zero-shot pipeline branch by branch.

Every form of the trained model starts from one seed and sees the same batches for the same number of steps; every form,
trained or not, is measured by the pipeline itself on the same cases. Forms that are finished are not done again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from FreqSegLib.clip.vocabulary import targets
from FreqSegLib.embedding_cache import FEATURES, EmbeddingCache
from FreqSegLib.errors import SettingsError
from FreqSegLib.evaluation.ablation_report import Listed, Part
from FreqSegLib.evaluation.ablation_scores import CaseScore, read_scores, write_scores
from FreqSegLib.evaluation.cases import Case, Split
from FreqSegLib.evaluation.evaluate import WRONG_PROMPTS, EvaluationProgress, evaluate_cases
from FreqSegLib.interaction.adaptive_fusion import AdaptiveFusion
from FreqSegLib.interaction.dual_stream import DualStreamConfig, DualStreamModel
from FreqSegLib.presets import PRESET_FILE
from FreqSegLib.progress import CancelCallback
from FreqSegLib.settings import TextSegmentationSettings
from FreqSegLib.text_segmentation import TextSegmenter
from FreqSegLib.text_trained import WEIGHTS_FILE, SentenceEncoder, TrainedMethod
from FreqSegLib.training.lite_data import CachedSlices
from FreqSegLib.training.loop import LoopConfig, fit
from FreqSegLib.training.text_guided import PhaseTwo, TextGuidedConfig
from FreqSegLib.training.text_guided_card import LICENCE
from FreqSegLib.training.text_guided_data import Pictures, Wording
from FreqSegLib.training.text_guided_recipe import TextGuidedRecipe
from FreqSegLib.training.text_guided_tuning import choose_gates, gate_tuning
from FreqSegLib.training.work_folder import claim, write_text

PartName = Literal["trained", "zero-shot", "both"]
TRAINED, ZERO_SHOT = "trained", "zero-shot"
FULL = "adaptive"
VALIDATIONS = 4

_PLAIN: dict[str, Any] = {"interaction": "none", "language_gate": False, "fusion": "mean"}


@dataclass(frozen=True)
class Form(Listed):
    """A form of the trained model.

    Attributes:
        changes: of the full model's :class:`DualStreamConfig`.
        extra: only on request.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    extra: bool = False

    def config(self, full: DualStreamConfig) -> DualStreamConfig:
        """The architecture."""
        return replace(full, **self.changes)


TRAINED_FORMS: tuple[Form, ...] = (
    Form("none", "the semantic stream alone, FiLM in its decoder", None, {**_PLAIN, "bands": "none"}),
    Form("hf", "and a frequency stream on the high bands, logits averaged", "none", {**_PLAIN, "bands": "high"}),
    Form("lf", "on the low band instead", "none", {**_PLAIN, "bands": "low"}),
    Form("hf+lf", "on all bands", "lf", {**_PLAIN, "bands": "both"}),
    Form("efficient-ffbi", "and EfficientFFBI at the bottleneck", "hf+lf", {**_PLAIN, "interaction": "efficient"}),
    Form("ffbi", "FFBI instead", "hf+lf", {**_PLAIN, "interaction": "ffbi"}),
    Form("lffi", "and LFFI's language gate in place of FiLM", "ffbi", {"language_gate": True, "fusion": "mean"}),
    Form(FULL, "and adaptive fusion of both decoders: the full model", "lffi", {"fusion": "adaptive"}),
    Form("batch-normaliser", "the full model, embedding normalised by batch", FULL, {"normaliser": "batch"}, True),
    Form(
        "instance-normaliser", "the full model, embedding normalised by slice", FULL, {"normaliser": "instance"}, True
    ),
    Form("db4", "the full model with db4 in place of haar", FULL, {"wave": "db4"}, True),
    Form("placeless", "the full model, places not preferred by the sentence", FULL, {"place_terms": 0}, True),
)


@dataclass(frozen=True)
class Branching(Listed):
    """A form of the zero-shot pipeline.

    Attributes:
        branches: which frequency branches have a say.
    """

    branches: tuple[str, ...] = ()


ZERO_SHOT_FORMS: tuple[Branching, ...] = (
    Branching("none", "saliency of the slice itself"),
    Branching("hf", "half of it from the high-frequency image", "none", ("high",)),
    Branching("lf", "half of it from the low-frequency image", "none", ("low",)),
    Branching("hf+lf", "half of it from both, averaged", "lf", ("low", "high")),
    Branching("fusion", "the preset's own trained fusion of the branches", "hf+lf", ("trained",)),
)


@dataclass(frozen=True)
class AblationPlan:
    """Everything that decides an ablation.

    Attributes:
        embeddings, pictures: caches of the training slices, shared with ``train text-guided``.
        work: a folder a form, with its checkpoints, weights and scores.
        seed: of the plan of slices, the start and every batch.
        steps: of every form.
        split, most_cases, most_slices, wrong: what is measured, as ``freqseg evaluate`` has it.
        training: of phase 2.
        model: the full model; forms are changes of it.
    """

    embeddings: str = "build/lite/slices"
    pictures: str = "build/text_guided/pictures"
    work: str = "build/ablation"
    seed: int = 0
    steps: int = 400
    split: Split = "test"
    most_cases: int | None = None
    most_slices: int = 0
    wrong: int = WRONG_PROMPTS
    training: TextGuidedConfig = field(default_factory=TextGuidedConfig)
    model: DualStreamConfig = field(default_factory=DualStreamConfig)

    def loop(self) -> LoopConfig:
        """The same for every form."""
        return LoopConfig(
            steps=self.steps,
            warmup=max(1, min(100, self.steps // 10)),
            validate_every=math.ceil(self.steps / VALIDATIONS),
            patience=VALIDATIONS + 1,
            seed=self.seed,
        )

    def folder(self, part: str, form: str) -> Path:
        """Of one form; it holds its recipe."""
        return Path(self.work) / part / form

    def run(self, part: str, form: str) -> Path:
        """What was made for one form: checkpoints, weights, scores."""
        return self.folder(part, form) / "run"

    def scores_file(self, part: str, form: str) -> Path:
        """Scores of one form; the name says what was measured, so that another choice is measured anew."""
        cases, slices = self.most_cases or "all", self.most_slices or "all"
        return self.run(part, form) / f"scores_{self.split}_{cases}-cases_{slices}-slices_{self.wrong}-wrong.csv"

    def recipe(self, form: Form) -> TextGuidedRecipe:
        """What decides a form's weights."""
        return TextGuidedRecipe(
            embeddings="",
            work="",
            models="",
            seed=self.seed,
            finishing=None,
            loop=self.loop(),
            training=self.training,
            model=form.config(self.model),
        )


@dataclass(frozen=True)
class Lessons:
    """What forms are trained on: the same for all of them.

    Attributes:
        data, pictures: the plan's slices.
        wordings, vectors: how targets are asked for, vectors (len(wordings), 384).
    """

    data: CachedSlices
    pictures: Pictures
    wordings: tuple[Wording, ...]
    vectors: Tensor


def chosen_forms(only: Sequence[str], part: PartName = "both") -> tuple[list[Form], list[Branching]]:
    """Forms by name, in their order; all but the extra ones where none is named.

    Raises:
        SettingsError: there is no such part, or no such form in it.
    """
    if part not in get_args(PartName):
        raise SettingsError(f"part must be one of {', '.join(get_args(PartName))}, got {part!r}")
    trained = TRAINED_FORMS if part != ZERO_SHOT else ()
    zero_shot = ZERO_SHOT_FORMS if part != TRAINED else ()
    known = dict.fromkeys(form.name for form in (*trained, *zero_shot))
    unknown = [name for name in only if name not in known]
    if unknown:
        raise SettingsError(f"There is no form '{unknown[0]}' to ablate. Forms: {', '.join(known)}.")
    return (
        [form for form in trained if form.name in only or (not only and not form.extra)],
        [form for form in zero_shot if not only or form.name in only],
    )


@dataclass(frozen=True)
class ZeroShotRecipe:
    """What decides a zero-shot form's scores: its branches, and which weights."""

    branches: tuple[str, ...]
    weights: str


def train_forms(
    forms: Sequence[Form],
    lessons: Callable[[], Lessons],
    plan: AblationPlan,
    report: Callable[[str], None],
    device: torch.device | None = None,
) -> None:
    """Train each form that is not trained yet; a stopped one goes on where it was.

    Args:
        forms: see :data:`TRAINED_FORMS`.
        lessons: makes or reads the caches; called only when a form is to be trained.
        plan: see there.
        report: where lines of progress go.
        device: to train on.

    Raises:
        SettingsError: a form's folder holds a run of another plan.
    """
    for form in forms:
        claim(plan.folder(TRAINED, form.name), plan.recipe(form))
    given: Lessons | None = None
    for form in forms:
        if not _is_trained(plan.run(TRAINED, form.name)):
            given = given or lessons()
            report(f"{form.name}: {form.title}; {plan.steps} steps")
            train_form(form, given, plan, report, device)


def train_form(
    form: Form,
    lessons: Lessons,
    plan: AblationPlan,
    report: Callable[[str], None],
    device: torch.device | None = None,
) -> Path:
    """Train one form and choose its gates on validation patients.

    Returns:
        A folder laid out like shipped weights.
    """
    folder = plan.run(TRAINED, form.name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        model = DualStreamModel(form.config(plan.model))
    phase = PhaseTwo(
        model,
        lessons.data,
        lessons.pictures,
        lessons.wordings,
        lessons.vectors,
        plan.training,
        plan.seed,
        device=device,
    )

    def row(values: dict[str, float]) -> None:
        report(f"{form.name}: " + "  ".join(f"{key} {value:.4g}" for key, value in values.items()))

    fit(phase.model, phase.batch_loss, phase.validate, folder, plan.loop(), row)
    average = phase.model.average
    rows = [int(number) for number in phase.validation_rows]
    gates = choose_gates(phase.answers(average, phase.of_target, phase.vectors, rows, wrong=WRONG_PROMPTS))
    tuning = {name: asdict(gate_tuning(gate)) for name, gate in gates.items()}
    write_text(folder / PRESET_FILE, json.dumps({"tuning": tuning}, indent=1) + "\n")
    # last, so that a folder with weights is complete
    names = json.dumps([meaning.name for meaning in targets()])
    average.save(folder / WEIGHTS_FILE, {"licence": LICENCE, "meanings": names})
    return folder


def measure_trained(
    forms: Sequence[Form],
    segmenter: TextSegmenter,
    text: SentenceEncoder,
    cases: Sequence[Case],
    plan: AblationPlan,
    progress: Callable[[str, EvaluationProgress], None] | None = None,
    cancel: CancelCallback | None = None,
) -> None:
    """Measure each trained form that is not measured yet: masks as the model draws them, without the decoder.

    Args:
        forms: trained already.
        segmenter: the pipeline; its trained method is exchanged meanwhile.
        text: the sentence encoder.
        cases: see ``cases.list_cases``.
        plan: see there.
        progress: told the form's name, and how far it is.
        cancel: polled between slices.

    Raises:
        Cancelled: ``cancel`` answered True; forms that are finished are kept.
    """
    settings = TextSegmentationSettings(method="trained", refine=False)
    for form in forms:
        file = plan.scores_file(TRAINED, form.name)
        if file.exists():
            continue
        method = TrainedMethod.load(plan.run(TRAINED, form.name), f"ablation-{form.name}", text, segmenter.device)
        with _exchanged(segmenter, trained=method, cache=FeaturesInMemory.beside(segmenter.cache)):
            _measure(form.name, file, segmenter, cases, settings, plan, progress, cancel)


def measure_zero_shot(
    forms: Sequence[Branching],
    segmenter: TextSegmenter,
    weights_digest: str,
    cases: Sequence[Case],
    plan: AblationPlan,
    progress: Callable[[str, EvaluationProgress], None] | None = None,
    cancel: CancelCallback | None = None,
) -> None:
    """Measure each zero-shot form that is not measured yet; the rest is as for :func:`measure_trained`.

    The trained fusion is left out where the segmenter has none.

    Args:
        forms: see :data:`ZERO_SHOT_FORMS`.
        segmenter: the pipeline; its fusion is exchanged meanwhile.
        weights_digest: tells the preset's weights from others.
        cases, plan, progress, cancel: see :func:`measure_trained`.

    Raises:
        SettingsError: a form's folder holds the scores of other weights.
        Cancelled: ``cancel`` answered True; forms that are finished are kept.
    """
    for form in forms:
        if "trained" in form.branches and segmenter.fusion is None:
            continue
        file = plan.scores_file(ZERO_SHOT, form.name)
        claim(plan.folder(ZERO_SHOT, form.name), ZeroShotRecipe(form.branches, weights_digest))
        if file.exists():
            continue
        settings = TextSegmentationSettings(method="zero-shot", frequency_branches="on" if form.branches else "off")
        by_hand = form.branches and "trained" not in form.branches
        with _exchanged(segmenter, fusion=HalfBranches(form.branches) if by_hand else segmenter.fusion):
            _measure(form.name, file, segmenter, cases, settings, plan, progress, cancel)


def finished_parts(plan: AblationPlan, part: PartName = "both") -> list[Part]:
    """What has been measured so far with the plan's cases, as chapters of a report."""
    found = []
    for name, title, text, ways, full in (
        (TRAINED, "Trained model", _trained_text(plan), TRAINED_FORMS, FULL),
        (ZERO_SHOT, "Zero-shot pipeline", _ZERO_SHOT_TEXT, ZERO_SHOT_FORMS, None),
    ):
        files = [plan.scores_file(name, way.name) for way in ways] if part in (name, "both") else []
        scores = [score for file in files if file.exists() for score in read_scores(file)]
        if scores:
            paths = tuple(("none", way.name) for way in ways if way.name in ("hf+lf", FULL, "fusion"))
            found.append(Part(title, text, tuple(ways), full, tuple(scores), paths))
    return found


class HalfBranches(AdaptiveFusion):
    """Half the slice's own saliency, half that of frequency branches: nothing trained.

    Args:
        branches: ``low``, ``high`` or both; of both, the mean.
    """

    def __init__(self, branches: Sequence[str]) -> None:
        super().__init__("simple")
        self.branches = tuple(branches)
        torch.nn.init.constant_(self.gate, math.atanh(0.5))

    def fuse(self, low: Tensor, high: Tensor) -> Tensor:
        """The mean of the chosen branches, (B, 1, H, W) in [0, 1]."""
        by_name = {"low": low, "high": high}
        return torch.stack([by_name[name] for name in self.branches]).mean(0)


class FeaturesInMemory(EmbeddingCache):
    """An embedding cache that keeps what a trained model computed in memory, of one volume, and the rest on disk.

    Every form has features of its own, as large as the tower's embeddings: on disk they would push those out.
    """

    def __init__(self, folder: Path | None = None, gigabytes: float | None = None) -> None:
        super().__init__(folder, gigabytes)
        self._volume: str | None = None
        self._features: dict[str, NDArray[np.float16]] = {}

    @classmethod
    def beside(cls, cache: EmbeddingCache) -> FeaturesInMemory:
        """With the same folder and limit as ``cache``."""
        return cls(cache.folder, cache.limit / 1e9)

    def has(self, key: str, name: str) -> bool:
        return self.get(key, name) is not None if name.startswith(FEATURES) else super().has(key, name)

    def get(self, key: str, name: str) -> NDArray[np.float16] | None:
        if not name.startswith(FEATURES):
            return super().get(key, name)
        return self._features.get(name) if key == self._volume else None

    def put(self, key: str, name: str, array: NDArray[np.float16]) -> None:
        if not name.startswith(FEATURES):
            super().put(key, name, array)
            return
        if key != self._volume:
            self._volume, self._features = key, {}
        self._features[name] = array


def _measure(
    name: str,
    file: Path,
    segmenter: TextSegmenter,
    cases: Sequence[Case],
    settings: TextSegmentationSettings,
    plan: AblationPlan,
    progress: Callable[[str, EvaluationProgress], None] | None,
    cancel: CancelCallback | None,
) -> None:
    def told(found: EvaluationProgress) -> None:
        if progress is not None:
            progress(name, found)

    rows = evaluate_cases(
        segmenter, cases, settings=settings, wrong=plan.wrong, box_ceiling=False, progress=told, cancel=cancel
    )
    write_scores(file, [CaseScore.of(name, row) for row in rows])


@contextmanager
def _exchanged(segmenter: TextSegmenter, **parts: Any) -> Iterator[None]:
    """A segmenter with other parts until the block ends."""
    before = {name: getattr(segmenter, name) for name in parts}
    for name, part in parts.items():
        setattr(segmenter, name, part)
    try:
        yield
    finally:
        for name, part in before.items():
            setattr(segmenter, name, part)


def _is_trained(folder: Path) -> bool:
    return (folder / WEIGHTS_FILE).exists() and (folder / PRESET_FILE).exists()


_ZERO_SHOT_TEXT = (
    "Nothing is trained between the rows: the saliency of the slice, or half of it and half of its frequency images', "
    "with the preset's own settings and the decoder after it. Every branch is normalised over the volume before."
)


def _trained_text(plan: AblationPlan) -> str:
    return (
        f"Every form was trained for {plan.steps} steps from seed {plan.seed} on the same slices, batches and prompts, "
        "and draws at a probability of one half; its presence gate was chosen on validation patients, nothing else; "
        "the decoder does not redraw. The shipped model is trained for longer: these are differences between forms, "
        "not its quality. One seed a form: differences of the size that another seed makes mean nothing."
    )
