"""Histories as sequences: every target once, after what came before it."""

import numpy as np
import pytest

from cladapt.sequential import BackboneConfig
from cladapt.tokens.sequences import MASK, PAD, START, SequenceForm, Span, form_of_backbone, padded

FORMS = (SequenceForm(4), SequenceForm(4, 0.3))


def passes(form: SequenceForm, span: Span) -> list[tuple[np.ndarray, np.ndarray]]:
    return form.rows(span, np.random.default_rng(0))


@pytest.mark.parametrize("form", FORMS, ids=["causal", "hiding"])
@pytest.mark.parametrize("length", [1, 3, 4, 5, 9, 23])
@pytest.mark.parametrize("first", [0, 2, 7])
def test_every_target_is_told_once_from_what_it_may_see(form: SequenceForm, length: int, first: int) -> None:
    items = np.arange(100, 100 + length)
    told = []
    for span in form.documents(items, first):
        for sequence, target in passes(form, span):
            assert len(sequence) == len(target) <= form.window
            for place in np.flatnonzero(target != PAD):
                told.append(int(target[place]))
                if form.hidden is None:
                    at = target[place] - 100
                    seen = [START, *items][max(0, at + 1 - (place + 1)) : at + 1]
                    assert sequence[: place + 1].tolist() == seen
                    assert len(seen) >= min(at + 1, form.window // 2)
                else:
                    assert sequence[place] == MASK
                    assert target[place] not in sequence
    assert sorted(told) == list(range(100 + first, 100 + length))


def test_a_hiding_pass_hides_its_share() -> None:
    (span,) = SequenceForm(12, 0.25).documents(np.arange(11), 1)
    hidden = [int((sequence == MASK).sum()) for sequence, _ in passes(SequenceForm(12, 0.25), span)]
    assert hidden == [3, 3, 2, 2]


def test_what_is_read_ends_with_the_newest_event() -> None:
    causal, hiding = FORMS
    assert causal.read(np.array([5, 6])).tolist() == [START, 5, 6]
    assert causal.read(np.arange(9)).tolist() == [5, 6, 7, 8]
    assert causal.read(np.arange(0)).tolist() == [START]
    assert hiding.read(np.arange(9)).tolist() == [6, 7, 8, MASK]
    assert hiding.read(np.arange(0)).tolist() == [START, MASK]
    assert SequenceForm(1, 0.5).read(np.arange(3)).tolist() == [MASK]


@pytest.mark.parametrize("form", FORMS, ids=["causal", "hiding"])
@pytest.mark.parametrize("length", [1, 3, 8])
def test_a_validation_target_is_told_from_what_evaluation_reads(form: SequenceForm, length: int) -> None:
    items = np.arange(length)
    (span,) = form.documents(items, length - 1)
    ((sequence, target),) = passes(form, span)
    assert sequence.tolist() == form.read(items[:-1]).tolist()
    assert target[-1] == length - 1
    assert (target[:-1] == PAD).all()


def test_targets_apart_end_their_spans() -> None:
    span = Span(np.array([START, 4, 5, 6]), 2)
    assert [(each.events.tolist(), each.begin) for each in span.apart()] == [([START, 4, 5], 2), ([START, 4, 5, 6], 3)]


def test_bert4rec_alone_hides() -> None:
    assert form_of_backbone(BackboneConfig(window=7), 0.2) == SequenceForm(7)
    assert form_of_backbone(BackboneConfig(backbone="bert4rec", window=7), 0.2) == SequenceForm(7, 0.2)


def test_padding_stands_behind() -> None:
    assert padded([np.array([1]), np.array([2, 3])]).tolist() == [[1, PAD], [2, 3]]
