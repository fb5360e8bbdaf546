"""Generation configs: a base decodes greedily, and says which settings of its source it was not given."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, GenerationConfig

from cladapt.artifacts import read_json
from cladapt.model.generation import greedy
from cladapt.model.load import load_base, new_model, save_base
from cladapt.tokens.sids import SidTable

SIDS = SidTable(("x", "y", "z"), np.array([[0, 1], [2, 0], [2, 1]]), (3, 2))
SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.05}
SPECIAL: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0}


@pytest.mark.parametrize("more", [{}, {"no_repeat_ngram_size": 2}, {"suppress_tokens": [4, 5]}])
def test_all_but_the_special_tokens_is_left_out_and_told(more: dict[str, Any]) -> None:
    config, left_out = greedy(GenerationConfig(**SAMPLING, **SPECIAL, **more, max_new_tokens=99), 3)
    found = {key: value for key, value in config.to_diff_dict().items() if key != "transformers_version"}
    assert found == {**SPECIAL, "do_sample": False, "max_new_tokens": 3}
    assert left_out == {**SAMPLING, **more, "max_new_tokens": 99}


def test_a_greedy_config_loses_nothing() -> None:
    once, _ = greedy(GenerationConfig(**SAMPLING, **SPECIAL), 3)
    again, left_out = greedy(once, 3)
    assert again.to_diff_dict() == once.to_diff_dict()
    assert left_out == {}
    assert greedy(None, 2)[0].max_new_tokens == 2


def test_a_base_is_written_with_a_greedy_config_and_the_omission_in_its_record(tmp_path: Path) -> None:
    model, tokenizer = new_model("tiny", SIDS, 0)
    model.generation_config = GenerationConfig(**SAMPLING, **SPECIAL)
    save_base(tmp_path / "base", model, tokenizer, SIDS, {"fitted_block": 1})
    written = read_json(tmp_path / "base" / "generation_config.json")
    del written["transformers_version"]
    assert written == {**SPECIAL, "do_sample": False, "max_new_tokens": 2}
    assert read_json(tmp_path / "base" / "cladapt.json")["generation_left_out"] == SAMPLING
    again = load_base(tmp_path / "base")
    save_base(tmp_path / "again", again.model, again.tokenizer, SIDS, again.provenance)
    assert load_base(tmp_path / "again").provenance["generation_left_out"] == SAMPLING
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "again").generation_config
    assert (stock.do_sample, stock.temperature, stock.repetition_penalty) == (False, None, None)
