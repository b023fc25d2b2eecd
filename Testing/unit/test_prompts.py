"""What users type: checked, matched to a meaning, or refused."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from FreqSegLib import weights
from FreqSegLib.clip.mini_lm import MiniLM
from FreqSegLib.clip.prompts import MATCH_THRESHOLD, STRANGERS, PromptMatcher, clean_prompt
from FreqSegLib.clip.questions import apart_from_contrasts, null_prompts
from FreqSegLib.clip.vocabulary import MEANINGS, MODALITIES, Meaning, meaning, targets
from FreqSegLib.errors import SettingsError, VocabularyError, WeightsError


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("brain tumour", "brain tumour"),
        ("  Brain\t tumour \n", "Brain tumour"),
        ("left\u00a0lung", "left lung"),
        ("brain tu\u00admour\u200b", "brain tumour"),
        ("\u202ebrain tumour", "brain tumour"),
        ("tumor 🧠", "tumor 🧠"),
        ("tumeur cérébrale", "tumeur cérébrale"),
        ("β-amyloid plaque", "β-amyloid plaque"),
        ("x" * 300, "x" * 300),
    ],
)
def test_what_can_be_read_is_tidied(typed: str, read: str) -> None:
    assert clean_prompt(typed) == read


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("", "empty"),
        (" \t\n ", "empty"),
        ("\u200b\u2060", "empty"),
        ("brain\x00tumour", r"control characters: 'brain\x00tumour'"),
        ("\x1b[31mbrain", "control characters"),
        ("brain\udc80", "control characters"),
        ("🧠🫁", "no words"),
        ("12 / 34", "no words"),
        ("脑肿瘤", "not in English"),
        ("опухоль мозга", "not in English"),
        ("brain 脑肿瘤脑肿", "not in English"),
        ("tumour " * 1429, "10002 characters"),
        ("x" * 301, "301 characters"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(typed: str, said: str) -> None:
    with pytest.raises(SettingsError) as error:
        clean_prompt(typed)
    assert said in str(error.value)
    assert len(str(error.value)) < 500
    assert str(error.value).isprintable()


def test_the_vocabulary_is_consistent() -> None:
    wordings = [w for m in MEANINGS for w in (*m.wordings, *m.held_out)]
    wordings += [w for modality in MODALITIES.values() for w in modality.wordings]
    assert len(set(map(str.lower, wordings))) == len(wordings)
    assert len({m.name for m in MEANINGS}) == len(MEANINGS)
    assert len({m.color for m in targets()}) == len(targets())
    for m in MEANINGS:
        assert m.modality in MODALITIES
        assert set(m.channels) <= {0, 1}
        assert m.held_out
        assert m.name == m.wordings[0] or not m.is_target
        assert meaning(m.name) is m
    # every modality that has a target has its absence as a null prompt
    for m in targets():
        assert any(not other.is_target for other in MEANINGS if other.modality == m.modality)
    with pytest.raises(KeyError):
        meaning("liver")


def test_null_prompts_are_the_absence_and_all_of_other_modalities() -> None:
    nulls = null_prompts(meaning("left lung"))
    assert "part of a chest X-ray without lung" in nulls
    assert {"brain tumour", "breast lesion", "a normal brain without a tumour", "a CT of the head"} <= set(nulls)
    # what may be true of the same picture does not argue against the target
    assert not {"lungs", "right lung", "left lung", "a chest X-ray"} & set(nulls)
    assert null_prompts(None) == ["a normal scan", "a healthy patient without any finding"]


def test_a_target_is_set_apart_from_its_contrasts() -> None:
    encode = LetterPairs().encode
    for m in targets():
        assert m.contrasts
        assert m.name not in m.contrasts
        assert all(meaning(name).modality == m.modality for name in m.contrasts)
    left = encode(["left lung"])[0]
    asked = apart_from_contrasts(left, meaning("left lung"), encode)
    others = encode([meaning(name).wordings[0] for name in meaning("left lung").contrasts])
    assert float(asked.norm()) == pytest.approx(1.0)
    assert float(asked @ left) > max(0.0, float((others @ asked).max()))
    assert apart_from_contrasts(left, None, encode) is left


class LetterPairs:
    """A text encoder without weights: counts of letter pairs, so that equal words are near each other."""

    def encode(self, sentences) -> torch.Tensor:
        vectors = torch.zeros(len(sentences), 27 * 27)
        for row, sentence in enumerate(sentences):
            letters = [ord(c) - 96 if "a" <= c <= "z" else 0 for c in f" {sentence.lower()} "]
            for first, second in pairwise(letters):
                vectors[row, 27 * first + second] += 1
        return torch.nn.functional.normalize(vectors, dim=-1)


@pytest.mark.parametrize("text", ["left lung", "right lung", "lungs", "anterior hippocampus", "brain tumour"])
def test_a_known_wording_is_its_own_meaning_whatever_the_case(text: str) -> None:
    found = PromptMatcher(LetterPairs()).match(f"The {text.upper()}")
    assert found.meaning is meaning(text)
    assert found.similarity == pytest.approx(1.0)
    assert found.text == f"The {text.upper()}"


def test_sides_and_negations_outweigh_similar_words() -> None:
    matcher = PromptMatcher(LetterPairs())
    for typed, other in (("left lung", "right lung"), ("lungs", "left lung"), ("posterior hippocampus", "hippocampus")):
        found = matcher.match(typed).meaning
        assert found is not None
        assert found is not meaning(other)
    for typed in ("left hippocampus", "right brain tumour", "upper lungs"):
        assert matcher.match(typed).meaning is None
    denied = matcher.match("no brain tumour").meaning
    assert denied is None or not denied.is_target


def test_refusals_say_what_is_known() -> None:
    matcher = PromptMatcher(LetterPairs())
    with pytest.raises(VocabularyError, match=r"does not know 'liver'.*brain tumour \(brain FLAIR MR\)"):
        matcher.require("liver")
    with pytest.raises(VocabularyError, match=r"absent.*brain tumour"):
        matcher.require("no brain tumour")
    assert matcher.require("left lung").meaning is meaning("left lung")


@pytest.fixture(scope="module")
def text() -> MiniLM:
    folder = weights.find("minilm")
    if folder is None:
        pytest.skip("MiniLM's weights are not on this machine: freqseg models get minilm")
    return MiniLM(folder)


@pytest.fixture(scope="module")
def matcher(text: MiniLM) -> PromptMatcher:
    return PromptMatcher(text)


def named(matcher: PromptMatcher, prompts: list[str]) -> dict[str, str | None]:
    """The meaning each prompt is taken for; None if refused as unknown or as an absence."""
    found = {prompt: matcher.match(prompt).meaning for prompt in prompts}
    return {prompt: m.name if m is not None and m.is_target else None for prompt, m in found.items()}


def test_every_trained_wording_is_matched_to_its_meaning(matcher: PromptMatcher) -> None:
    for m in MEANINGS:
        for wording in (m.name, *m.wordings):
            assert matcher.match(wording).meaning is m, wording


def test_held_out_wordings_are_matched_but_for_one_that_is_refused(matcher: PromptMatcher) -> None:
    missed: dict[str, Meaning | None] = {}
    for m in MEANINGS:
        for wording in m.held_out:
            found = matcher.match(wording).meaning
            if found is not m:
                missed[wording] = found
    assert missed == {"radiograph region outside the lungs": None}


def test_prompts_nobody_listed_find_their_target(matcher: PromptMatcher) -> None:
    wanted = {
        "lungs": [
            "Both Lungs",
            "lung parenchyma",
            "normal lungs",
            "healthy lungs",
            "normal lung",
            "healthy lung fields",
        ],
        "left lung": ["lung, left", "normal left lung", "left-sided lung"],
        "right lung": ["right lungs", "healthy right lung"],
        "hippocampus": ["hippocampal", "normal hippocampus", "healthy hippocampi"],
        "brain tumour": ["Brain Tumour", "gliomas", "glioblastoma", "brain cancer", "tumor in brain"],
        "breast lesion": ["breast carcinoma", "mammary lesion", "malignant breast mass"],
    }
    for name, prompts in wanted.items():
        assert named(matcher, prompts) == dict.fromkeys(prompts, name)


def test_an_absence_is_never_taken_for_its_target(matcher: PromptMatcher) -> None:
    prompts = ["no tumour", "no tumor", "brain without tumour", "tumour-free brain", "normal brain", "healthy brain"]
    prompts += ["brain lacking tumour", "no evidence of brain tumour", "not a brain tumour", "no lungs", "neither lung"]
    prompts += ["lungs absent", "lungs without nodules", "normal breast", "no breast lesion", "absent hippocampus"]
    assert set(named(matcher, prompts).values()) == {None}
    for prompt in ("no tumour", "brain without tumour", "normal brain", "no lungs"):
        with pytest.raises(VocabularyError, match="absent"):
            matcher.require(prompt)


def test_strangers_are_refused_those_listed_and_others(matcher: PromptMatcher) -> None:
    others = ["kidney cyst", "aortic aneurysm", "pancreatic cancer", "bladder tumour", "dog", "hello world", "asdf"]
    others += [
        "pulmonary nodule",
        "left lung nodule",
        "lung tumour on the right",
        "upper left lung",
        "right lower lobe",
    ]
    others += ["left hippocampus", "left kidney", "left brain tumour", "parahippocampal gyrus", "entorhinal cortex"]
    others += ["white matter hyperintensity", "cerebral infarct", "pituitary adenoma", "metastases in the brain"]
    others += [
        "chest x-ray",
        "brain",
        "CT of the head",
        "cyst",
        "tumor in the liver",
        "bone tumour",
        "mass in the chest",
    ]
    assert set(named(matcher, [*STRANGERS, *others]).values()) == {None}
    with pytest.raises(VocabularyError, match="does not know 'kidney cyst'"):
        matcher.require("kidney cyst")


def test_a_match_needs_the_threshold(matcher: PromptMatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    near = matcher.match("mammary lesion")
    assert near.meaning is meaning("breast lesion")
    assert MATCH_THRESHOLD <= near.similarity < 0.9
    monkeypatch.setattr("FreqSegLib.clip.prompts.MATCH_THRESHOLD", near.similarity + 0.01)
    assert matcher.match("mammary lesion").meaning is None


def test_sentences_become_unit_vectors_that_do_not_depend_on_the_batch(text: MiniLM) -> None:
    together = text.encode(["brain tumour", "a much longer sentence about the left lung on a chest X-ray", "x " * 500])
    assert together.shape == (3, 384)
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(text.encode(["brain tumour"])[0], together[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(text.encode(["x " * 126])[0], together[2], rtol=0, atol=1e-5)


def test_damaged_or_foreign_text_weights_are_refused(text: MiniLM, tmp_path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    source = weights.find("minilm")
    assert source is not None
    for name in ("config.json", "vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(source / name, tmp_path / name)
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        MiniLM(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10" + bytes(200))
    with pytest.raises(WeightsError, match=r"model\.safetensors"):
        MiniLM(tmp_path)
    state = load_file(source / "model.safetensors")
    del state["encoder.layer.3.output.dense.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=r"encoder\.layer\.3\.output\.dense\.weight"):
        MiniLM(tmp_path)
