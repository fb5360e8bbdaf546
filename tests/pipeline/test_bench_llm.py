"""The field's usual code learns the same targets by the same loss and ranks the same items; otherwise no time."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cladapt.config import SimulateConfig, TokensConfig
from cladapt.errors import CheckFailed, DataError
from cladapt.pipeline import bench, bench_llm
from cladapt.pipeline.bench import TARGETS, Case
from cladapt.pipeline.bench_llm import ROW_TOKENS, Field, Size, check_losses, some_users, worded_form
from cladapt.tokens.prompts import Document, share_prefixes
from cladapt.train.sinks import MemorySink


@pytest.fixture(scope="module")
def case() -> Case:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_llm, "VOCABULARY", 3000)
        patch.setattr(bench_llm, "TINY", {**bench_llm.TINY, "num_hidden_layers": 1})
        simulated = SimulateConfig(users=40, items=60, topics=4, events=8, blocks=2)
        made = bench_llm.make_llm_case(None, simulated, TokensConfig(dimensions=8, levels=2, codes=8, capacity=16))
    return replace(made, train=made.train.model_copy(update={"window": 8}), beams=6)


def test_both_forms_have_every_target_of_the_chosen_users_once(case: Case) -> None:
    users = some_users(case, 12)
    worded, trainings = worded_form(case), [case.split.training(i) for i in users]
    prompts, shared, packed = (
        [d for items, first in trainings for d in read(items, first)]
        for read in (worded.examples, worded.documents, case.form.documents)
    )
    wanted = sum(len(items) - first for items, first in map(case.split.training, users))
    assert wanted >= 12
    assert len(prompts) == wanted
    levels = case.base.sids.levels
    assert sum(int(d.loss.sum()) for d in packed) == levels * wanted
    assert len(shared) < wanted
    spelt = [np.sort(np.concatenate([d.tokens[d.loss] for d in form])) for form in (prompts, shared, packed)]
    np.testing.assert_array_equal(spelt[0], spelt[1])
    np.testing.assert_array_equal(spelt[0], spelt[2])
    assert some_users(case, 10**6) == list(range(len(case.split.user)))


def test_the_trainer_steps_over_padded_prompts_and_learns(case: Case) -> None:
    documents = examples(case, 6)
    field = Field(case, documents, 4)
    batch = field.collate(field.examples[:3])
    for row, document in enumerate(documents[:3]):
        n = len(document.tokens)
        np.testing.assert_array_equal(batch["input_ids"][row, :n], document.tokens)
        np.testing.assert_array_equal(batch["labels"][row, :n], np.where(document.loss, document.tokens, -100))
        assert not batch["attention_mask"][row, n:].any()
        assert (batch["labels"][row, n:] == -100).all()
    before = [p.detach().clone() for p in field.model.parameters()]
    field.epoch()
    moved = [not torch.equal(a, b) for a, b in zip(before, field.model.parameters(), strict=True)]
    learning = [p.requires_grad for p in field.model.parameters()]
    assert moved == learning  # every factor, and nothing else
    assert any(moved)


def test_losses_are_equal_or_no_time_is_recorded(case: Case) -> None:
    documents = examples(case, 4)[:4]
    shared = share_prefixes(documents, ROW_TOKENS)
    field = Field(case, documents, 4)
    check_losses(case, documents, shared, field.collate)
    with pytest.raises(CheckFailed, match=r"the mean loss of 4 prompts is .*no time is recorded"):
        check_losses(case, documents, shared, lambda some: field.collate(some[:2]))
    with pytest.raises(CheckFailed, match="no time is recorded"):
        check_losses(case, documents, shared[:1] if len(shared) > 1 else documents[:2], field.collate)


def examples(case: Case, targets: int) -> list[Document]:
    return [d for i in some_users(case, targets) for d in worded_form(case).examples(*case.split.training(i))]


def test_the_rows_name_what_they_are_over(
    case: Case, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_llm, "make_llm_case", lambda _: case)
    monkeypatch.setattr(bench_llm, "SIZES", {"tiny": Size(4, 3)})
    monkeypatch.setattr(bench_llm, "WINDOWS", (8,))
    rows = [row for row in bench_llm.field({}, 3, MemorySink()) if row["unit"] == "ratio"]
    found = {(row["name"], str(row["provider"]).partition(",")[0]): row for row in rows}
    assert list(found) == [
        ("field training", "Trainer with PEFT"),
        ("field training", "prompt form"),
        ("field training", "prompt form in steps of 4 items"),
        ("field training", "packed form"),
        ("field decoding", "transformers generate"),
        ("field decoding", "cladapt"),
    ]
    assert found["field training", "Trainer with PEFT"]["q50"] == 1.0
    assert found["field training", "packed form"]["metric"] == (
        "interactions per second over 'Trainer with PEFT, one padded prompt per target'"
    )
    assert {key for key in TARGETS if key[0].startswith("field")} <= set(found)
    assert capsys.readouterr().out == ""


def test_a_model_that_is_not_there_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    sink = MemorySink()
    with pytest.raises(DataError, match=r"cannot load a causal LM from '.*gone'"):
        bench.methods(5, tmp_path / "out.csv", sink, tmp_path / "gone")
    assert sink.events == []
    assert not (tmp_path / "out.csv").exists()
